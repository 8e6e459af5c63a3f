"""The page of a comparison in a real browser: sorting, selecting, keyboard, phone, dark, and no network."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_browser import NEEDS_BROWSER, launched
from helpers_comparison import NAMES, make_backbone, make_comparison, make_picture
from PIL import Image
from test_one_backbone_report import make_result

from ttd_plugins.reports.comparison_html import write_comparison_report
from ttd_plugins.reports.heat_overlay import overlay

pytest.importorskip("matplotlib")
pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
pytestmark = NEEDS_BROWSER

LONG = "open_clip:ViT-B-16-SigLIP2-512@webli_with_a_name_that_goes_on_and_on_and_on"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page, loaded once; what it asks of the network and says on the console is kept in ``page.told``."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    names = (*NAMES[:3], LONG)
    hole = make_backbone(LONG)
    hole.metrics["before"][0]["caption_iou"] = None
    hole.warnings.append("x" * 300)
    comparison = make_comparison(names)
    comparison.backbones = [*comparison.backbones[:3], hole]
    comparison.gallery = [make_picture(n, names) for n in range(2)]
    comparison.settings["note"] = "y" * 300
    write_comparison_report(path, comparison)
    with launched() as browser:
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.told = []
        opened.on("console", lambda message: opened.told.append(message.text))
        opened.on("pageerror", lambda error: opened.told.append(str(error)))
        opened.on(
            "request",
            lambda request: None if request.url.startswith(("data:", "file:")) else opened.told.append(request.url),
        )
        opened.goto(path.as_uri())
        yield opened


@pytest.fixture(autouse=True)
def _as_loaded(page: Any) -> Iterator[None]:
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light", media="screen")
    yield
    assert page.told == []


def column(page: Any, number: int) -> list[list[str]]:
    """What a column is sorted by, for each metric."""
    return page.eval_on_selector_all(
        "table.sortable tbody",
        f"all => all.map((one) => [...one.querySelectorAll('tr.row')].map((row) => row.cells[{number}].dataset.sort))",
    )


def test_headings_sort_within_each_metric_best_first_then_worst_then_as_it_was(page: Any) -> None:
    original = column(page, 0)
    lower = page.eval_on_selector_all("table.sortable tbody", "all => all.map((e) => e.dataset.better === 'lower')")
    assert lower == [False, True, False, False, False]
    for heading, number in (("After TTD", 3), ("Gain", 4)):
        button = page.locator("table.sortable thead button", has_text=heading)
        state = page.locator("table.sortable thead th", has_text=heading)
        for order in ("best", "worst"):
            button.click()
            assert state.get_attribute("aria-sort") == "other"
            for values, ascending in zip(column(page, number), lower, strict=True):
                known = [float(value) for value in values if value]
                assert known == sorted(known, reverse=ascending == (order == "worst"))
                # What is not known is last in both directions.
                assert values[len(known) :] == [""] * (len(values) - len(known))
            assert page.locator("#sorted").inner_text() == f"Sorted by {heading} within each metric, {order} first"
        button.click()
        assert state.get_attribute("aria-sort") == "none"
        assert column(page, 0) == original


def test_headings_sort_by_the_keyboard(page: Any) -> None:
    page.locator("table.sortable thead button").first.focus()
    page.keyboard.press("Enter")
    assert all(names == sorted(names, key=str.lower) for names in column(page, 0))
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert column(page, 1)[0] == sorted(column(page, 1)[0], reverse=True)
    assert page.locator('table.sortable th[aria-sort="none"]').count() == 4
    page.keyboard.press("Space")
    page.keyboard.press("Space")


@pytest.mark.parametrize("width", [390, 1280])
def test_names_and_gains_stay_in_view_while_the_table_scrolls(page: Any, width: int) -> None:
    """A phone, and letters so large that the table scrolls."""
    page.set_viewport_size({"width": width, "height": 844})
    table = page.locator(".scroll").first
    table.evaluate("(e, wide) => { e.querySelector('table').style.minWidth = wide; }", f"{width + 300}px")
    for place in (0, 300, 10**4):
        table.evaluate("(e, x) => { e.scrollLeft = x; }", place)
        for selector in ("tr.row th", "tr.row td.gain", "thead th.gain", "tr.group span"):
            inside = table.evaluate(
                """(e, selector) => {
                  const box = e.getBoundingClientRect(), one = e.querySelector(selector).getBoundingClientRect();
                  return one.left >= box.left - 1 && one.right <= box.right + 1 && one.width > 20;
                }""",
                selector,
            )
            assert inside, (place, selector)
    table.evaluate("e => { e.scrollLeft = 0; e.querySelector('table').style.minWidth = ''; }")


def test_on_a_phone_every_column_of_the_table_is_seen_at_once(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    hidden = page.locator(".scroll").first.evaluate("e => e.scrollWidth - e.clientWidth")
    assert hidden <= 0


def test_the_slider_sets_the_opacity_of_the_maps(page: Any) -> None:
    slider, heat = page.locator("#opacity"), page.locator("#gallery img.ttd-heat").first
    assert heat.evaluate("e => getComputedStyle(e).opacity") == "0.65"
    slider.focus()
    page.keyboard.press("Home")
    assert heat.evaluate("e => getComputedStyle(e).opacity") == "0"
    page.keyboard.press("ArrowRight")
    assert heat.evaluate("e => getComputedStyle(e).opacity") == "0.01"
    assert page.locator("#opacity-value").inner_text() == "1 %"
    slider.fill("65")


def shown(page: Any, selector: str) -> list[int]:
    """Positions of the elements that are visible."""
    return page.eval_on_selector_all(selector, "all => all.flatMap((e, n) => e.checkVisibility() ? [n] : [])")


def test_backbones_are_chosen(page: Any) -> None:
    page.locator(".chooser summary").click()
    assert shown(page, "#image-1 .card") == [0, 1, 2, 3]
    page.locator("input.backbone").nth(1).uncheck()
    assert shown(page, "#image-1 .card") == shown(page, "#image-2 .card") == [0, 2, 3]
    assert page.locator("#shown").inner_text() == "3 of 4"
    page.locator("input.backbone").nth(1).focus()
    page.keyboard.press("Space")
    assert shown(page, "#image-1 .card") == [0, 1, 2, 3]
    page.locator(".chooser summary").click()


def test_maps_are_chosen_by_the_keyboard_with_their_truth(page: Any) -> None:
    frame = page.locator("#image-1 .ttd-map").first

    def outline() -> str:
        return frame.evaluate("e => getComputedStyle(e, '::after').backgroundImage")

    whole = outline()
    assert whole.startswith('url("data:image/png')
    page.locator("#image-1 .maps input:checked").focus()
    page.keyboard.press("ArrowRight")
    visible = page.locator("#image-1 img.ttd-heat:visible")
    assert set(visible.evaluate_all("all => all.map((e) => e.dataset.map)")) == {"0"}
    # Before and after of four backbones.
    assert visible.count() == 8
    assert outline() not in (whole, "none")
    assert page.locator("#image-1 tr[aria-current] th").first.inner_text() == "dog"
    page.keyboard.press("ArrowRight")
    # There is no lion.
    assert outline() == "none"
    # The other picture is left as it was.
    assert page.locator('#image-2 img.ttd-heat[data-map="caption"]:visible').count() == 8
    page.locator("#image-1 .maps input").first.evaluate("e => e.click()")
    assert outline() == whole


def test_the_union_of_the_selected_tags_is_shown_with_the_true_region_of_the_caption(page: Any) -> None:
    frame = page.locator("#image-1 .ttd-map").first
    outline = "e => getComputedStyle(e, '::after').backgroundImage"
    whole = frame.evaluate(outline)
    page.locator('#image-1 .maps input[value="union"]').evaluate("e => e.click()")
    visible = page.locator("#image-1 img.ttd-heat:visible")
    assert set(visible.evaluate_all("all => all.map((e) => e.dataset.map)")) == {"union"}
    assert frame.evaluate(outline) == whole
    assert "selected" in page.locator("#image-1 figure.after figcaption").first.inner_text()
    page.locator("#image-1 .maps input").first.evaluate("e => e.click()")


def test_the_control_and_the_true_region_can_be_switched(page: Any) -> None:
    assert page.locator("#image-1 figure.control:visible").count() == 0
    page.locator("#control").check()
    assert page.locator("#image-1 figure.control:visible").count() == 4
    assert page.locator("#image-1 .scores td.control:visible").count() == 16
    page.locator("#control").uncheck()
    frame = page.locator("#image-1 .ttd-map").first
    page.locator("#outline").uncheck()
    assert frame.evaluate("e => getComputedStyle(e, '::after').backgroundImage") == "none"
    page.locator("#outline").check()


def test_one_curve_is_shown_at_a_time(page: Any) -> None:
    assert shown(page, ".part") == [0]
    page.locator("#curve").select_option(label="Tag loss")
    assert shown(page, ".part") == [2]
    # The control has no tag loss.
    assert page.locator(".part:visible .chart-mean.after").count() == 4
    assert page.locator(".part:visible .chart-mean.control").count() == 0
    page.locator("#curve").select_option(index=0)


WIDE = """() => {
  const width = document.documentElement.clientWidth;
  // What scrolls inside a box of its own may be wider.
  return [...document.querySelectorAll("body *")]
    .filter((e) => !e.closest(".scroll table") && !e.closest(".sr") && e.checkVisibility())
    .filter((e) => e.getBoundingClientRect().right > width + 1)
    .map((e) => e.outerHTML.slice(0, 90));
}"""


@pytest.mark.parametrize("width", [375, 390, 768, 1280])
def test_nothing_is_wider_than_the_window(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 812})
    page.locator("#control").check()
    page.locator(".chooser").evaluate("e => { e.open = true; }")
    assert page.evaluate(WIDE) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator(".plot svg:visible").count() == 1
    # Letters of the chart stay of a size that can be read.
    scale = page.locator(".plot svg:visible").evaluate("e => e.getBoundingClientRect().width / e.viewBox.baseVal.width")
    assert scale > 0.85
    page.locator(".chooser").evaluate("e => { e.open = false; }")
    page.locator("#control").uncheck()


# Of every visible text: its colour against the nearest ground that is painted. Maps and plots are looked at elsewhere.
CONTRAST = """() => {
  const channels = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
  const luminance = (colour) => channels(colour).slice(0, 3)
    .map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      // A radio button's pill is the sibling of the input that lies over it, so its own ground counts.
      const colour = getComputedStyle(e).backgroundColor;
      const alpha = channels(colour)[3];
      if (alpha === undefined || alpha > 0.99) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  let looked = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    if (element.closest("script, style, .sr, title") || getComputedStyle(element).fontSize === "0px") continue;
    const style = getComputedStyle(element);
    const colour = element.closest("svg") ? style.fill : style.color;
    const [high, low] = [luminance(colour), luminance(ground(element))].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    looked += 1;
    if (ratio < 4.5) found.push([ratio.toFixed(2), colour, element.outerHTML.slice(0, 90)]);
  }
  return { found, looked };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")
    result = page.evaluate(CONTRAST)
    assert result["looked"] > 300
    assert result["found"] == []


def test_labels_of_the_plot_do_not_overlap(page: Any) -> None:
    for width in (375, 1280):
        page.set_viewport_size({"width": width, "height": 812})
        boxes = page.eval_on_selector_all(
            ".plot .chart-label text",
            "all => all.filter((e) => e.checkVisibility()).map((e) => e.getBoundingClientRect().toJSON())",
        )
        assert len(boxes) == 4
        for n, one in enumerate(boxes):
            for two in boxes[:n]:
                across = min(one["right"], two["right"]) - max(one["left"], two["left"])
                down = min(one["bottom"], two["bottom"]) - max(one["top"], two["top"])
                assert across < 1 or down < 1


def test_every_control_is_reached_by_tab_in_the_order_of_the_page(page: Any) -> None:
    page.locator("nav a").first.focus()
    met: list[str] = []
    while "control" not in met and len(met) < 40:
        page.keyboard.press("Tab")
        met.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    order = [met.index(name) for name in ("scroll", "curve", "opacity", "outline", "control")]
    assert order == sorted(order)
    page.locator("#image-1 .maps input").first.focus()
    page.keyboard.press("Tab")
    # The maps of a picture are one stop, and arrows choose among them.
    assert page.evaluate("document.activeElement.name") == "image-2-map"


def test_printing_drops_the_controls_and_keeps_the_table(page: Any) -> None:
    page.emulate_media(media="print", color_scheme="light")
    assert not page.locator(".controls").is_visible()
    assert not page.locator("nav").is_visible()
    assert page.locator(".scroll").first.evaluate("e => getComputedStyle(e).overflowX") == "visible"
    assert page.locator("#image-1 img.ttd-heat:visible").count() == 8


def test_all_pictures_are_drawn(page: Any) -> None:
    broken = page.evaluate("[...document.images].filter((e) => e.complete && !e.naturalWidth).length")
    # The caption, the union and four tags; there is no union where no tag is selected.
    # The scene below the tiles has eight more.
    assert 2 * 4 * 3 * 5 < page.evaluate("document.images.length") - 8 <= 2 * 4 * 3 * 6
    assert broken == 0


def test_without_its_script_the_page_still_reads(page: Any, tmp_path: Path) -> None:
    write_comparison_report(tmp_path / "report.html", make_comparison(NAMES[:2], 1))
    context = page.context.browser.new_context(java_script_enabled=False)
    bare = context.new_page()
    bare.goto((tmp_path / "report.html").as_uri())
    assert bare.locator(".part").count() == 4
    assert bare.locator(".part").last.is_visible()
    assert not bare.locator("#opacity").is_visible()
    assert bare.locator("figure.control").first.is_visible()
    assert bare.locator("#gallery img.ttd-heat:visible").count() == 2 * 3
    context.close()


# One backbone, as `ttd demo` shows it


@pytest.fixture(scope="module")
def one(page: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page of one backbone, in a tab of its own; what goes wrong is kept in ``one.told``."""
    path = tmp_path_factory.mktemp("one") / "report.html"
    write_comparison_report(path, make_result())
    opened = page.context.browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    opened.told = []
    opened.on("console", lambda message: opened.told.append(message.text))
    opened.on("pageerror", lambda error: opened.told.append(str(error)))
    opened.goto(path.as_uri())
    yield opened
    assert opened.told == []
    opened.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_of_one_backbone_fits_and_draws_everything(one: Any, width: int) -> None:
    one.set_viewport_size({"width": width, "height": 900})
    assert one.evaluate(WIDE) == []
    assert one.evaluate("document.documentElement.scrollWidth") == width
    assert one.evaluate("[...document.images].filter((e) => e.complete && !e.naturalWidth).length") == 0
    flat = "all => all.filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 5).length"
    assert one.eval_on_selector_all(".ttd-frame, svg, .tiles li", flat) == 0
    assert one.locator(".tiles li").count() == 4
    # Before, control and after of three images; six curves and the bias are seen without a choice.
    assert one.locator("#gallery img.ttd-heat:visible").count() == 9 and one.locator("#scene img:visible").count() == 3
    assert one.locator("#training svg:visible").count() == 6 and one.locator("#bias svg:visible").count() == 1
    for selector, least in (("#bias svg", 0.85), ("#training svg", 0.8)):
        box = "e => e.getBoundingClientRect().width / e.viewBox.baseVal.width"
        assert one.locator(selector).first.evaluate(box) > least


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_of_the_page_of_one_backbone_has_contrast(one: Any, scheme: str) -> None:
    one.emulate_media(color_scheme=scheme)
    found = one.evaluate(CONTRAST)
    assert found["looked"] > 150 and found["found"] == []
    bar = one.locator("#bias .chart-bar.after path").first.evaluate("e => getComputedStyle(e).fill")
    assert bar == {"light": "rgb(184, 67, 13)", "dark": "rgb(255, 151, 87)"}[scheme]
    one.emulate_media(color_scheme="light")


def test_the_page_of_one_backbone_answers_its_controls(one: Any) -> None:
    one.set_viewport_size({"width": 1280, "height": 900})
    slider = one.locator("#opacity")
    slider.fill("30")
    assert one.locator("#gallery img.ttd-heat").first.evaluate("e => getComputedStyle(e).opacity") == "0.3"
    assert one.locator("#opacity-value").inner_text() == "30 %"
    slider.fill("65")
    one.locator("#control").uncheck()
    assert one.locator("#gallery img.ttd-heat:visible").count() == 6
    one.locator("#control").check()


def test_on_paper_colours_are_light_and_nothing_is_blank(one: Any) -> None:
    one.emulate_media(media="print", color_scheme="dark")
    assert one.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert one.locator("h1").evaluate("e => getComputedStyle(e).color") == "rgb(31, 29, 26)"
    for selector in (".ttd-frame", ".chip", ".tiles li", ".ramp", "#bias svg"):
        exact = one.locator(selector).first.evaluate("e => getComputedStyle(e).printColorAdjust")
        assert exact == "exact", selector
    for selector in ("article", ".panel", ".scene", ".tiles", ".card"):
        kept = one.locator(selector).first.evaluate("e => getComputedStyle(e).breakInside")
        assert kept == "avoid", selector
    arrows = one.eval_on_selector_all(".chart-arrow", "all => all.filter((e) => e.checkVisibility()).length")
    assert arrows >= 1
    one.emulate_media(media="screen", color_scheme="light")


def test_a_heat_map_looks_the_same_in_the_page_and_in_a_file(one: Any) -> None:
    """Pixels of the browser's stack of grey image and layer against the blend that PNGs have."""
    one.set_viewport_size({"width": 1280, "height": 900})
    comparison = make_result()
    image = comparison.gallery[0]
    view = image.views["open_clip:tiny"]["before"]
    one.locator("#outline").uncheck()
    frame = one.locator("#image-1 .ttd-map").first
    frame.evaluate("e => { e.style.width = '256px'; e.style.borderRadius = 0; }")
    with Image.open(io.BytesIO(frame.screenshot())) as shot:
        drawn = np.asarray(shot.convert("RGB").resize((256, 256))).astype(int)
    large = np.asarray(Image.fromarray(image.image).resize((256, 256), Image.Resampling.BILINEAR))
    expected = overlay(large, view.caption).astype(int)
    difference = np.abs(drawn - expected)[4:-4, 4:-4]
    assert difference.mean() < 4 and np.quantile(difference, 0.99) < 16
    # As a check of the check: another map of the same image is far from it.
    other = overlay(large, image.views["open_clip:tiny"]["after"].caption).astype(int)
    assert np.abs(drawn - other).mean() > 20
    one.locator("#outline").check()
