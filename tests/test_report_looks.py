"""Reports on paper and for everybody: printed PDFs are not blank, and axe finds no violation in light and dark."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_browser import NEEDS_BROWSER, launched
from helpers_comparison import NAMES, make_backbone, make_comparison
from numpy.typing import NDArray
from PIL import Image
from test_demo_photographs import made_photographs
from test_one_backbone_report import make_result

from ttd_plugins.reports.comparison_html import write_comparison_report
from ttd_plugins.reports.palette import PALETTE

pytest.importorskip("matplotlib")
pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
pytestmark = NEEDS_BROWSER
NEEDS_POPPLER = pytest.mark.skipif(
    shutil.which("pdftoppm") is None, reason="no pdftoppm: apt-get install poppler-utils"
)
REPORTS = ("demo", "compare", "one seed")
DOTS = 50
"""Resolution of a printed page, in dots per inch."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of the demo, one of four backbones, and one of two backbones with one seed."""
    folder = tmp_path_factory.mktemp("reports")
    seeds = [make_backbone(name, seeds=1) for name in NAMES[:2]]
    made = {
        "demo": make_result(photographs=made_photographs()),
        "compare": make_comparison(pictures=1, failures={"gone": "no such weights"}, gallery_rule="By rank."),
        "one seed": make_comparison(NAMES[:2], 1, backbones=seeds),
    }
    paths = {name: folder / f"{name}.html" for name in made}
    for name, comparison in made.items():
        write_comparison_report(paths[name], comparison)
    return paths


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


# On paper


def printed(browser: Any, report: Path, folder: Path) -> NDArray[np.uint8]:
    """All printed pages below each other, ``[height, width, 3]``; the browser prints no background by itself."""
    page = browser.new_page(color_scheme="dark")
    page.goto(report.as_uri())
    page.pdf(path=folder / "p.pdf", print_background=False, format="A4")
    page.close()
    subprocess.run(["pdftoppm", "-r", str(DOTS), "-png", "p.pdf", "p"], cwd=folder, check=True, timeout=120)
    pages = []
    for path in sorted(folder.glob("p-*.png")):
        with Image.open(path) as image:
            pages.append(np.asarray(image.convert("RGB")))
    return np.concatenate(pages)


def area(pixels: NDArray[np.uint8], role: str) -> int:
    """Pixels of about the light colour of a role."""
    colour = np.array([int(PALETTE[role][0][n : n + 2], 16) for n in (1, 3, 5)])
    return int((np.abs(pixels.astype(int) - colour).max(axis=2) < 12).sum())


def heat_area(pixels: NDArray[np.uint8]) -> int:
    """Pixels in the violet of the heat map, which nothing else on a page has."""
    red, green, blue = np.moveaxis(pixels.astype(int), 2, 0)
    return int(((red > green + 25) & (blue > green + 15) & (red < 190)).sum())


@NEEDS_POPPLER
def test_the_printed_demo_has_bars_and_maps(browser: Any, reports: dict[str, Path], tmp_path: Path) -> None:
    pixels = printed(browser, reports["demo"], tmp_path)
    assert pixels[:3].mean() > 250, "the paper is white although the browser is dark"
    assert heat_area(pixels) > 20_000
    # Bars of bias.
    for role in ("before", "control", "after"):
        assert area(pixels, role) > 500, role


@NEEDS_POPPLER
@pytest.mark.parametrize("asks", [True, False])
def test_the_printed_comparison_has_tiles_bars_and_maps(
    browser: Any, reports: dict[str, Path], tmp_path: Path, asks: bool
) -> None:
    report = reports["compare"]
    if not asks:  # as a check of the check: without the request a browser leaves backgrounds out
        text = report.read_text("utf-8").replace("print-color-adjust: exact", "x: y")
        report = tmp_path / "blank.html"
        report.write_text(text, "utf-8")
    pixels = printed(browser, report, tmp_path)
    first = pixels[: round(11.7 * DOTS)]
    # Numbers of backbones on the tiles and the scene, which are on the first page.
    chips = [area(first, f"series-{number}") for number in range(4)]
    assert (min(chips) > 20) == asks, chips
    if asks:
        assert pixels[:3].mean() > 250
        assert heat_area(first) > 4_000 and heat_area(pixels) > 20_000
        # Bars of the gains.
        for number in range(3):
            assert area(pixels, f"series-{number}") - chips[number] > 100, number


def test_what_is_folded_on_screen_is_open_on_paper(browser: Any, reports: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(reports["compare"].as_uri())
    meanings = page.locator("details.meanings")
    assert meanings.get_attribute("open") is None
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert meanings.get_attribute("open") is not None
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert meanings.get_attribute("open") is None
    page.close()


# For everybody


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", REPORTS)
def test_axe_finds_no_violation(browser: Any, reports: dict[str, Path], name: str, scheme: str) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="no axe: pip install axe-playwright-python"
    )
    # The page's own policy forbids foreign scripts, such as the checker's.
    context = browser.new_context(color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(reports[name].as_uri())
    found = axe.Axe().run(page)
    told = [f"{one['id']}: {node['html'][:160]}" for one in found.response["violations"] for node in one["nodes"]]
    assert not told, "\n".join(told)
    assert len(found.response["passes"]) > 20
    context.close()


@pytest.mark.parametrize("name", REPORTS)
def test_headings_skip_no_level(browser: Any, reports: dict[str, Path], name: str) -> None:
    page = browser.new_page()
    page.goto(reports[name].as_uri())
    levels = page.eval_on_selector_all("h1, h2, h3, h4, h5, h6", "all => all.map((e) => Number(e.tagName[1]))")
    page.close()
    assert levels[0] == 1 and levels.count(1) == 1 and len(levels) > 8
    assert all(two <= one + 1 for one, two in itertools.pairwise(levels))


def test_verdicts_of_one_seed_are_neither_green_nor_red(browser: Any, reports: dict[str, Path]) -> None:
    page = browser.new_page(color_scheme="light")
    for name, least in (("one seed", 8), ("compare", 0)):
        page.goto(reports[name].as_uri())
        tentative = page.locator(".metrics .change.tentative")
        assert (tentative.count() >= least) if least else tentative.count() == 0
        colours = page.eval_on_selector_all(
            ".metrics .change:is(.better, .worse), .tiles .change:is(.better, .worse)",
            "all => [...new Set(all.map((e) => getComputedStyle(e).color))]",
        )
        wanted = {"tentative"} if least else {"better", "worse"}
        assert set(colours) == {css_colour(role) for role in wanted}, name
    page.close()


def css_colour(role: str) -> str:
    """The light colour of a role as a browser writes it."""
    colour = PALETTE[role][0]
    return f"rgb({', '.join(str(int(colour[n : n + 2], 16)) for n in (1, 3, 5))})"


def test_the_scene_stands_below_the_tiles_and_above_every_table(browser: Any, reports: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    for name in ("compare", "one seed"):
        page.goto(reports[name].as_uri())
        tops = [page.locator(one).first.bounding_box()["y"] for one in (".tiles", "#scene", "#metrics table")]
        assert tops == sorted(tops) and tops[1] < 900
    page.goto(reports["compare"].as_uri())
    assert "By rank." in page.locator("#gallery").inner_text()
    page.close()
