"""Make the screenshots of docs/images from reports, with Chromium.

    python examples/make_docs_images.py --demo demo --comparison comparison

``--demo`` is the folder of ``ttd demo``, ``--comparison`` that of the comparison of four backbones in
docs/comparing.md. An image whose folder is not given stays as it is. Where playwright or Chromium is not installed, the
script says so and makes nothing.
"""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ttd_plugins.errors import InputError
from ttd_plugins.utils.files import make_folder, write_atomic

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, HEIGHT, QUALITY = 1280, 900, 82


def missing_browser() -> str | None:
    """Why no page can be drawn; ``None`` if it can."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed (pip install playwright)"
    return None if find_browser() else f"no browser was found ({', '.join(BROWSERS)})"


def find_browser() -> str | None:
    """Path of an installed Chromium."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def draw(report: Path, shots: dict[Path, str | None]) -> None:
    """Draw a report: its first screen where a selector is ``None``, or else the element of the selector.

    Raises:
        InputError: there is no report, or it has no such element.
    """
    from playwright.sync_api import sync_playwright

    if not report.is_file():
        raise InputError(f"{report} does not exist; finish `ttd demo` or `ttd compare` first")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(report.resolve().as_uri())
        for out, selector in shots.items():
            target: Any = page
            if selector is not None:
                if not page.locator(selector).count():
                    raise InputError(f"{report} has no {selector}, which {out.name} shows")
                target = page.locator(selector).first
            save(target.screenshot(animations="disabled"), out)
            print(f"wrote {out} ({out.stat().st_size // 1000} kB)")
        browser.close()


def save(shot: bytes, out: Path) -> None:
    """Write a screenshot as a JPEG, or as a PNG of 256 colours, by the suffix."""
    with Image.open(io.BytesIO(shot), formats=("PNG",)) as image:
        buffer = io.BytesIO()
        if out.suffix == ".jpg":
            image.convert("RGB").save(buffer, "JPEG", quality=QUALITY, optimize=True)
        else:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    write_atomic(out, buffer.getvalue())


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw what the given folders permit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, help="folder of `ttd demo`")
    parser.add_argument("--comparison", type=Path, help="folder of the comparison in docs/comparing.md")
    parser.add_argument("--out", type=Path, default=IMAGES)
    options = parser.parse_args(arguments)
    if options.demo is None and options.comparison is None:
        parser.error("name a folder with --demo or --comparison")
    reason = missing_browser()
    if reason is not None:
        print(f"skipped: {reason}")
        return
    make_folder(options.out)
    try:
        if options.demo is not None:
            draw(
                options.demo / "report.html",
                {options.out / "demo-report.jpg": None, options.out / "demo-photograph.jpg": ".hero"},
            )
        if options.comparison is not None:
            draw(
                options.comparison / "report.html",
                {
                    options.out / "comparison-report.png": None,
                    options.out / "comparison-gallery.jpg": "#gallery article",
                },
            )
    except InputError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
