"""Make the screenshot of docs/app.md: the page of ``ttd app`` as it opens, with Chromium.

    python examples/make_app_image.py

Where playwright or Chromium is not installed, the script says so and makes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from make_docs_images import HEIGHT, IMAGES, find_browser, missing_browser, save

from ttd_plugins.app.gradio_page import build_page, launch_page
from ttd_plugins.app.studio import Studio, embedded_backbones, shipped_tuning
from ttd_plugins.utils.files import make_folder

WIDTH = 1360
COMPLETE = "#ttd-output .ttd-result[data-stage='']"


def draw(out: Path, backbones: Sequence[str], scheme: str = "light") -> None:
    """Draw the page with the answer to its first example.

    Args:
        out: the image, ``.png`` or ``.jpg``.
        backbones: names of the backbones on the page.
        scheme: ``"light"`` or ``"dark"``.
    """
    from playwright.sync_api import sync_playwright

    page, address = launch_page(build_page(Studio(backbones, shipped_tuning(backbones))))
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu"])
            tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
            tab.goto(address)
            tab.wait_for_selector(COMPLETE, timeout=600_000)
            # The thumbnails of scenes come after the page.
            tab.wait_for_function(
                "[...document.querySelectorAll('.ttd-thumb')].filter(e => e.checkVisibility())"
                ".every(e => getComputedStyle(e).backgroundImage !== 'none')"
            )
            save(tab.screenshot(animations="disabled", full_page=True), out)
            browser.close()
    finally:
        page.close(verbose=False)
    print(f"wrote {out} ({out.stat().st_size // 1000} kB)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the image of the guide."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=IMAGES)
    parser.add_argument("--backbones", help="comma-separated names; by default the embedded ones")
    options = parser.parse_args(arguments)
    reason = missing_browser()
    if reason is not None:
        print(f"skipped: {reason}")
        return
    make_folder(options.out)
    draw(options.out / "app.jpg", options.backbones.split(",") if options.backbones else embedded_backbones())


if __name__ == "__main__":
    main()
