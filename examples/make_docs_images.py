"""Make the images of docs/images: screenshots of reports with Chromium, and masks of `ttd segment`.

    python examples/make_docs_images.py --run runs/docs
    python examples/make_docs_images.py --demo demo --comparison comparison

``--run`` makes everything: it runs `ttd demo` and the comparison of docs/comparing.md in folders of its own, and draws
all images. This takes 35 minutes on two idle cores; if it is stopped, the same command continues it. ``--demo`` and
``--comparison`` draw from finished folders; an image whose folder is not given stays as it is. ``--quick`` runs with
settings that are too small to show anything, to test this script. Where playwright or Chromium is not installed, the
script says so and makes no screenshot.
"""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.utils.files import make_folder, write_atomic
from ttd_plugins.utils.progress import progress_bars

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, HEIGHT, QUALITY = 1280, 900, 82
DEMO, COMPARISON, SEGMENTING = "demo", "comparison", "segmenting"
SHOTS: dict[str, dict[str, str | None]] = {
    DEMO: {"demo-report.jpg": None, "demo-photograph.jpg": ".hero"},
    COMPARISON: {"comparison-report.png": None, "comparison-gallery.jpg": "#gallery article"},
}
"""For each report its images: the first screen, or the element of a selector."""
MASKS = "segmenting.jpg"
BACKBONES = ("openai_clip:tiny", "open_clip:tiny", "siglip:tiny", "eva_clip:tiny")


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
        # The bar of controls follows the reader, and would cover the element that is drawn.
        page.add_style_tag(content=".controls { position: static !important; }")
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


def run_demo(out: Path, *, quick: bool) -> None:
    """Run `ttd demo`, or continue it."""
    from ttd_plugins.comparison import demo

    size = {"steps": 1, "scenes": 16} if quick else {}
    with progress_bars(width=40) as stage:
        demo.run_demo(out, demo.demo_options("open_clip:tiny", **size), stage=stage, command="ttd demo")


def run_comparison(out: Path, *, quick: bool) -> None:
    """Run the comparison of docs/comparing.md, or continue it."""
    from ttd_plugins.comparison.options import CompareOptions, default_jobs
    from ttd_plugins.comparison.running import run_comparison as compare

    names = BACKBONES[:2] if quick else BACKBONES
    size: dict[str, Any] = {"steps": 1, "seeds": 1, "limit": 16, "gallery": 3} if quick else {"seeds": 3}
    options = CompareOptions(names, jobs=1 if quick else default_jobs("scenes", None), **size)
    with progress_bars(width=40) as stage:
        compare(out, options, stage=stage, command=f"ttd compare --backbones {','.join(names)} --data scenes --seeds 3")


def draw_masks(out: Path, *, quick: bool) -> None:
    """Draw what `ttd segment` finds on photographs of the package."""
    import segment_gallery

    segment_gallery.main(["--out", str(out), *(["--photographs", "1"] if quick else [])])


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw what the given folders permit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder in which demo and comparison are run; draws all images")
    parser.add_argument("--demo", type=Path, help="folder of `ttd demo`")
    parser.add_argument("--comparison", type=Path, help="folder of the comparison in docs/comparing.md")
    parser.add_argument("--quick", action="store_true", help="with --run: settings that only test this script")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the images")
    options = parser.parse_args(arguments)
    folders = {DEMO: options.demo, COMPARISON: options.comparison}
    if options.run is None and not any(folders.values()):
        parser.error("name a folder with --run, --demo or --comparison")
    if options.quick and (options.run is None or options.out == IMAGES):
        parser.error("--quick needs --run, and --out with another folder than that of the documentation")
    make_folder(options.out)
    try:
        if options.run is not None:
            for name, run in ((DEMO, run_demo), (COMPARISON, run_comparison)):
                if folders[name] is None:
                    folders[name] = options.run / name
                    make_folder(folders[name])
                    run(folders[name], quick=options.quick)
            draw_masks(options.out / MASKS, quick=options.quick)
        reason = missing_browser()
        if reason is not None:
            print(f"skipped screenshots: {reason}")
            return
        for name, folder in folders.items():
            if folder is not None:
                draw(folder / "report.html", {options.out / file: one for file, one in SHOTS[name].items()})
    except TTDError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
