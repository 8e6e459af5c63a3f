"""The tab that segments by names in a real browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_app_page import COMPLETE
from helpers_browser import NEEDS_BROWSER, launched
from PIL import Image

pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
for _name in ("gradio", "matplotlib", "open_clip", "tokenizers"):
    pytest.importorskip(_name)

from ttd_plugins.app.gradio_page import build_page, launch_page
from ttd_plugins.app.studio import Studio

pytestmark = NEEDS_BROWSER


def test_a_visitor_segments_an_image_by_names(tmp_path: Path) -> None:
    photo, text = tmp_path / "photo.png", tmp_path / "text.png"
    text.write_text("no image")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)).save(photo)
    page, address = launch_page(build_page(Studio(["open_clip:tiny"])))
    try:
        with launched() as browser:
            tab = browser.new_page()
            tab.set_default_timeout(60_000)
            tab.goto(address)
            tab.wait_for_selector("#ttd-run")
            tab.get_by_role("tab", name="Segment by names").click()
            run, output = tab.locator("#ttd-segment-run"), tab.locator("#ttd-segment-output")
            # The first photograph is segmented when the tab is opened.
            output.locator(f"{COMPLETE} .ttd-overlay").wait_for()
            assert "horse" in tab.locator("#ttd-segment-names textarea").input_value()
            assert tab.locator("#ttd-segment-note a").count() == 2
            tab.locator("#ttd-segment-image button[aria-label='Remove Image']").click()
            output.locator(".ttd-empty").wait_for()
            assert tab.locator("#ttd-segment-names textarea").input_value() == ""
            run.click()
            assert "There is no image yet" in output.locator(".ttd-error").inner_text()
            uploads = tab.locator("#ttd-segment-image input[type=file]")
            uploads.set_input_files(text)
            note = tab.locator("#ttd-segment-note")
            assert "text.png" in note.locator("[role=alert]").inner_text()
            uploads.set_input_files(photo)
            note.get_by_text("photo.png, 80 × 48 pixels").wait_for()
            names = tab.locator("#ttd-segment-names textarea")
            names.fill("dog|puppy, <i>sky</i>")
            tab.locator("#ttd-segment-background input").uncheck()
            names.press("Enter")
            output.locator(f"{COMPLETE} .ttd-overlay").wait_for()
            shown = output.inner_text()
            assert "open_clip:tiny" in shown and "%" in shown
            assert "dog" in shown and "<i>sky</i>" in shown and "background" not in shown
            # The first tab is as it was.
            tab.get_by_role("tab", name="Caption and tags").click()
            assert tab.locator("#ttd-run").is_visible()
    finally:
        page.close(verbose=False)
