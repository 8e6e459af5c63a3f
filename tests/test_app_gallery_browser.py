"""What the page of `ttd app` shows by itself, and that nothing moves or is replaced while it answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FakeFamily, FakePlugin
from helpers_app_page import COMPLETE, Watched
from helpers_browser import NEEDS_BROWSER, launched

pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
for _name in ("gradio", "matplotlib"):
    pytest.importorskip(_name)

from ttd_plugins.app.gradio_page import build_page, launch_page
from ttd_plugins.app.studio import AppResult, Studio, shipped_tuning
from ttd_plugins.embedded.photo_examples import EXAMPLES, photograph_credit
from ttd_plugins.plugins import temporary_plugin

pytestmark = NEEDS_BROWSER

FAKE, OTHER = "fake:small", "other:small"
BOXES = """() => ["#ttd-output .ttd-frame", "#ttd-output .ttd-tags", ".ttd-legend", "#ttd-run", ".ttd-credits"]
    .map(e => document.querySelector(e).getBoundingClientRect()).map(b => [b.x, b.y, b.width])"""


class GatedStudio(Studio):
    """Waits between the stages of a result while the gate is closed."""

    gate = threading.Event()

    def watch(self, *arguments: Any) -> Iterator[AppResult]:
        for result in super().watch(*arguments):
            yield result
            assert self.gate.wait(60)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with temporary_plugin(FakePlugin(FakeFamily(), FakeFamily("other")), name="fake_plugin"):
        page, address = launch_page(build_page(GatedStudio([FAKE, OTHER])))
        yield address
        page.close(verbose=False)


@pytest.fixture(autouse=True)
def gate() -> Iterator[threading.Event]:
    GatedStudio.gate.set()
    yield GatedStudio.gate
    GatedStudio.gate.set()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


def test_the_first_photograph_is_answered_on_load_and_the_others_by_one_click(browser: Any, address: str) -> None:
    visitor = Watched(browser, address)
    tab = visitor.tab
    for number in (0, 4):
        caption, credit = EXAMPLES[number][1], photograph_credit(number)
        if number:
            tab.get_by_role("button", name=caption).click()
        tab.locator(f"#ttd-output {COMPLETE} .ttd-caption", has_text=caption).wait_for()
        assert tab.locator("#ttd-caption textarea").input_value() == caption
        tab.wait_for_function("document.querySelector('#ttd-image img')?.naturalWidth > 100")
        tab.locator("#ttd-note", has_text=credit.licence).wait_for()
        links = tab.locator("#ttd-note a").evaluate_all("all => all.map(e => e.href)")
        assert links == [credit.page, credit.licence_url]
        pressed = tab.locator(".ttd-thumb[aria-pressed=true]:visible")
        assert pressed.count() == 1 and pressed.inner_text() == caption
        assert pressed.evaluate("e => getComputedStyle(e).backgroundImage").startswith('url("data:image/')
    # The image under the colours is grey.
    assert tab.locator(".ttd-map").first.evaluate("e => getComputedStyle(e, '::before').filter") == "grayscale(1)"
    listed = tab.locator(".ttd-credits a").evaluate_all("all => all.map(e => e.href)")
    assert {photograph_credit(number).page for number in range(len(EXAMPLES))} <= set(listed)
    visitor.close(address)


def test_nothing_moves_when_the_result_comes(browser: Any, address: str, gate: threading.Event) -> None:
    visitor = Watched(browser, address, viewport={"width": 1440, "height": 900})
    tab = visitor.tab
    gate.clear()
    tab.locator("#ttd-caption textarea").fill("a cat beside a bird")
    tab.locator("#ttd-caption textarea").press("Enter")
    waiting = tab.locator("#ttd-output .ttd-caption", has_text="a cat beside a bird")
    waiting.wait_for()
    # The stage is said where the eye is and to screen readers, and nothing looks like a result yet.
    assert "Computing the maps" in tab.locator(".ttd-progress").first.inner_text()
    assert "computing the maps" in tab.locator("#ttd-live").inner_text()
    assert tab.locator("#ttd-output .ttd-heat").count() == 0 and "…" in tab.locator(".ttd-tags").inner_text()
    before = tab.evaluate(BOXES)
    gate.set()
    tab.wait_for_selector(f"#ttd-output {COMPLETE}")
    assert tab.evaluate(BOXES) == before
    assert tab.locator("#ttd-live").inner_text() == "The result is complete."
    visitor.close(address)


def test_a_slow_answer_does_not_replace_a_newer_one(browser: Any, address: str, gate: threading.Event) -> None:
    visitor = Watched(browser, address)
    tab = visitor.tab
    gate.clear()
    captions = [caption for _, caption in EXAMPLES]
    for caption in (captions[1], captions[2]):
        tab.get_by_role("button", name=caption).click()
        tab.locator("#ttd-output .ttd-caption", has_text=caption).wait_for()
    gate.set()
    tab.locator(f"#ttd-output {COMPLETE} .ttd-caption", has_text=captions[2]).wait_for()
    tab.wait_for_timeout(500)
    assert captions[2] in tab.locator("#ttd-output .ttd-caption").inner_text()
    assert tab.locator("#ttd-caption textarea").input_value() == captions[2]
    visitor.close(address)


@pytest.mark.slow
def test_the_shipped_lora_is_after_on_load(browser: Any) -> None:
    for package in ("open_clip", "timm", "peft", "tokenizers"):
        pytest.importorskip(package)
    names = ["open_clip:photo"]
    page, address = launch_page(build_page(Studio(names, shipped_tuning(names))))
    try:
        visitor = Watched(browser, address)
        titles = visitor.tab.locator("#ttd-output figcaption").all_inner_texts()
        assert titles == ["Before TTD", "After: open_clip:photo@ttd"]
        assert visitor.tab.locator("#ttd-output .ttd-heat:visible").count() == 2
        visitor.close(address)
    finally:
        page.close(verbose=False)
