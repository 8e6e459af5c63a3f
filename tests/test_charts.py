"""Charts: one drawing for files and pages; in a page its colours, font and ids are the page's."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_comparison import HOSTILE, NAMES, make_backbone, make_comparison
from helpers_pages import Page, contrast
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ttd_plugins
from ttd_plugins.comparison.results import Metric
from ttd_plugins.reports.charts import Chart, chart_svg, write_chart_sheet
from ttd_plugins.reports.comparison_charts import (
    Box,
    bias_chart,
    bias_gap,
    bias_means,
    curve_chart,
    curve_keys,
    curve_lines,
    horizontal_label,
    mean_line,
    place_labels,
    running_mean,
    thinned,
    trade_off_chart,
    vertical_label,
)
from ttd_plugins.reports.comparison_plots import draw_comparison_plots
from ttd_plugins.reports.formatting import number, one_line, plural, shortened, signed, valid_text
from ttd_plugins.reports.gain_charts import gain_charts, gains_heading
from ttd_plugins.reports.palette import PALETTE, SERIES, css_variables
from ttd_plugins.utils.number_format import format_spread

pytest.importorskip("matplotlib")

BIAS: Any = {
    "before": [{"rare": 0.7, "background": 0.3, "common": 0.5}],
    "control": [{"rare": 0.7, "background": 0.3, "common": 0.5}, {"rare": 0.6, "background": 0.4, "common": None}],
    "after": [{"rare": 0.65, "background": 0.5, "common": 0.6}, {"rare": 0.63, "background": 0.6, "common": 0.6}],
}


def trade_off(**options: bool) -> Chart:
    chart = trade_off_chart(make_comparison(), **options)
    assert chart is not None
    return chart


def all_charts() -> list[Chart]:
    comparison = make_comparison()
    backbone = replace(comparison.backbones[0], bias=BIAS)
    return [
        trade_off(),
        trade_off(narrow=True),
        *gain_charts(comparison),
        curve_chart("curve", "Tag loss", curve_lines(comparison.backbones[0], "tag")),
        bias_chart("bias", "a", bias_means(backbone)),
    ]


# What a page gets


@pytest.mark.parametrize("chart", all_charts(), ids=lambda chart: chart.key)
def test_a_chart_in_a_page_has_the_colours_font_and_ids_of_the_page(chart: Chart) -> None:
    text = str(chart_svg(chart))
    page = Page(text)
    assert not re.findall(r"(?:fill|stroke): #", text)
    assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= set(PALETTE)
    for foreign in ("font-family", "<style", "<metadata", "xmlns", "DejaVu", "<!"):
        assert foreign not in text
    ids = [attributes["id"] or "" for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and all(one.startswith(f"{chart.key}-") for one in ids)
    used = {(a["xlink:href"] or "")[1:] for _, a in page.tags if "xlink:href" in a} | set(
        re.findall(r"url\(#(.*?)\)", text)
    )
    assert used == set(ids)


@pytest.mark.parametrize("chart", all_charts(), ids=lambda chart: chart.key)
def test_a_chart_says_what_it_shows_and_is_the_same_every_time(chart: Chart) -> None:
    first = str(chart_svg(chart))
    (svg,) = Page(first).all("svg")
    assert svg["role"] == "img"
    assert (svg["aria-label"] or "").startswith(one_line(chart.title)) and chart.description in (
        svg["aria-label"] or ""
    )
    assert first == str(chart_svg(chart))


def test_two_charts_on_a_page_share_no_id() -> None:
    charts = all_charts()
    ids = [a["id"] for chart in charts for _, a in Page(str(chart_svg(chart))).tags if "id" in a]
    assert len(ids) == len(set(ids)) > len(charts)


def test_the_trade_off_has_arrows_to_after_and_a_dot_per_seed() -> None:
    chart = str(chart_svg(trade_off()))
    assert len(re.findall('class="chart-dot', chart)) == 4 * 2 * 3
    assert len(re.findall('class="chart-mark', chart)) == 4 * 3
    assert len(re.findall('class="chart-label', chart)) == 4
    # The arrow of the backbone that hardly moves is left out only where marks touch.
    assert 6 <= len(re.findall('class="chart-arrow', chart)) <= 8
    assert "open_clip:tiny: before 0.540 at 0.220, control 0.543 at 0.223, after ttd 0.633 at 0.211" in chart
    # A pointer on a mark shows its values.
    assert "<title>siglip:tiny, control: 0.556 at 0.236</title>" in chart
    assert "Caption IoU, higher is better ↑" in chart and "Retrieval R@1, higher is better →" in chart
    assert "One seed" in chart and "From the control" in chart


def test_the_legend_lists_only_what_is_drawn() -> None:
    one = make_backbone("one", seeds=1, arms=("before", "after"))
    chart = trade_off_chart(make_comparison(("one",), 0, backbones=[one]))
    assert chart is not None
    text = str(chart_svg(chart))
    assert "Before" in text and "From before" in text
    assert "One seed" not in text and ">Control" not in text and "From the control" not in text


def test_curves_draw_each_seed_and_the_control_dashed() -> None:
    lines = curve_lines(make_comparison().backbones[0], "contrastive")
    text = str(chart_svg(curve_chart("c", "Contrastive loss", lines), legend=False))
    assert len(re.findall('class="chart-seed', text)) == 2 * 3
    means = re.findall(r'<g class="chart-mean (\w+)">(.*?)</g>', text)
    assert [(arm, "stroke-dasharray" in drawn) for arm, drawn in means] == [("after", False), ("control", True)]
    assert "Control from" in text and "After TTD from" in text
    assert "chart-mean control" not in str(chart_svg(curve_chart("c", "t", {"after": [[(1, 2.0)]]})))


def test_bars_of_bias_stand_for_the_mean_over_seeds_in_the_order_of_frequency() -> None:
    means = bias_means(replace(make_backbone("a"), bias=BIAS))
    assert list(means) == ["background", "common", "rare"]
    assert means["background"]["after"] == (pytest.approx(0.55), pytest.approx(0.1 / 2**0.5))
    # A kind that is undefined for a seed has no bar.
    assert set(means["common"]) == {"before", "after"}
    text = str(chart_svg(bias_chart("b", "a", means)))
    # Bars are grouped by arm, and within an arm by the frequency of the word.
    bars = re.findall(r'class="chart-bar (\w+)"><title>(.*?)</title><path d="(.*?)"', text)
    assert [arm for arm, *_ in bars] == ["before"] * 3 + ["control"] * 2 + ["after"] * 3
    assert [title.split(", ")[1].split(" ")[0] for _, title, _ in bars[:3]] == ["Backgrounds", "Common", "Rare"]
    widths = {}
    for arm, title, path in bars:
        xs = [float(x) for x in re.findall(r"[ML] ([\d.]+)", path)]
        widths[arm, title.rpartition(" ")[2]] = max(xs) - min(xs)
    assert widths["after", "0.550"] / widths["before", "0.300"] == pytest.approx(0.55 / 0.3, rel=1e-2)
    assert "n/a" in text and "0.550" in text
    assert bias_gap(means, "before") == pytest.approx(0.4) and "Before: gap 0.400" in text
    assert bias_gap({"rare": means["rare"]}, "before") is None


def test_names_that_are_hostile_are_text() -> None:
    one = make_backbone(HOSTILE)
    one.bias = {"before": [{HOSTILE: 0.4}]}
    comparison = make_comparison((HOSTILE,), 0, backbones=[one])
    chart = trade_off_chart(comparison)
    assert chart is not None
    for drawn in (chart, curve_chart("c", HOSTILE, curve_lines(one, "tag")), bias_chart("b", HOSTILE, bias_means(one))):
        page = Page(str(chart_svg(replace(drawn, description=f"{HOSTILE}\ufffe"))))
        assert not page.all("script") and not page.all("img")
        assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]


def test_panels_of_gains_share_one_axis_which_names_the_better_direction() -> None:
    backbones = [make_backbone("a", {"caption_iou": 0.2}), make_backbone("b", {"caption_fpr": -0.1})]
    charts = gain_charts(make_comparison(("a", "b"), 0, backbones=backbones))
    pages = {chart.key: str(chart_svg(chart)) for chart in charts}
    assert len(charts) == 4
    length = {}
    for key, page in pages.items():
        path = re.findall(r'class="chart-bar"><title>.*?</title><path d="(.*?)"', page)
        xs = [[float(x) for x in re.findall(r"[ML] ([\d.]+)", one)] for one in path]
        length[key] = [max(one) - min(one) for one in xs]
    # A unit has the same length in both panels.
    assert length["gain-caption_iou"][0] / length["gain-caption_fpr"][1] == pytest.approx(2, rel=0.02)
    assert "gain, higher is better →" in pages["gain-caption_iou"]
    assert "← gain, lower is better" in pages["gain-caption_fpr"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_gains_of_one_seed_are_pale_and_called_tentative(seeds: int) -> None:
    backbones = [make_backbone("a", {"caption_iou": 0.2}, seeds=seeds), make_backbone("b", seeds=seeds)]
    comparison = make_comparison(("a", "b"), 0, backbones=backbones)
    chart = gain_charts(comparison)[0]
    text = str(chart_svg(chart))
    assert ("chart-bar tentative" in text) == ("one seed" in chart.description) == (seeds == 1)
    assert ("Pale bars: one seed, tentative." in gains_heading(comparison)) == (seeds == 1)
    assert ("spread" in gains_heading(comparison)) == (seeds == 2)


@pytest.mark.parametrize("better", ["higher", "lower", None])
def test_axes_name_the_better_direction(better: Any) -> None:
    metric = Metric("m", "mFPR", better, "")
    vertical, horizontal = vertical_label(metric), horizontal_label(metric)
    assert vertical == {"higher": "MFPR, higher is better ↑", "lower": "MFPR, lower is better ↓", None: "MFPR"}[better]
    assert (
        horizontal == {"higher": "MFPR, higher is better →", "lower": "← MFPR, lower is better", None: "MFPR"}[better]
    )


# What a file gets


def test_plots_are_images_of_some_size(tmp_path: Path) -> None:
    comparison = make_comparison(pictures=0)
    comparison.backbones[0].bias = BIAS
    paths = draw_comparison_plots(tmp_path, comparison)
    assert [path.name for path in paths] == ["trade-off.png", "gains.png", "curves.png", "bias.png"]
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) > 300
            # Something is drawn on the white.
            assert len(image.convert("RGB").getcolors(10**6) or []) > 20


def test_a_file_has_the_light_colours_that_the_page_has_variables_for(tmp_path: Path) -> None:
    write_chart_sheet(tmp_path / "a.png", [bias_chart("b", "a", bias_means(replace(make_backbone("a"), bias=BIAS)))])
    drawn = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    for role in ("before", "control", "after"):
        colour = [int(PALETTE[role][0][n : n + 2], 16) for n in (1, 3, 5)]
        assert (drawn == colour).all(-1).sum() > 1000, role


def test_drawing_leaves_the_settings_of_matplotlib_alone(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 31, "axes.grid": False, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        drawn = str(chart_svg(trade_off()))
        write_chart_sheet(tmp_path / "a.png", [trade_off()])
        assert dict(matplotlib.rcParams) == before
    # Nor do the user's settings change a chart.
    assert drawn == str(chart_svg(trade_off()))


# Colours


def test_the_colours_of_the_page_have_contrast_in_light_and_dark() -> None:
    for scheme in (0, 1):
        theme = {role: colours[scheme] for role, colours in PALETTE.items()}
        for text, grounds in {
            "ink": ("page", "card", "same-soft"),
            "muted": ("page", "card"),
            "better": ("page", "card", "better-soft"),
            "worse": ("page", "card", "worse-soft"),
            "tentative": ("page", "card", "tentative-soft"),
            "control": ("page", "card"),
            # Labels of a chart, and the number on a chip.
            **{f"series-{n}": ("card",) for n in range(SERIES)},
        }.items():
            for ground in grounds:
                assert contrast(theme[text], theme[ground]) >= 4.5, (scheme, text, ground)
        for bar in ("before", "control", "after"):
            assert contrast(theme[bar], theme["page"]) >= 3, (scheme, bar)
            assert contrast(theme[bar], theme["card"]) >= 3, (scheme, bar)


def test_a_light_colour_names_its_role() -> None:
    assert len({light for light, _ in PALETTE.values()}) == len(PALETTE)
    css = css_variables()
    assert css.count("--ink:") == 2 and "@media screen and (prefers-color-scheme: dark)" in css
    assert ".dark { --page: #161412;" in css_variables(".dark")


# Labels


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(20, 730), st.floats(40, 380)), min_size=1, max_size=8))
def test_labels_keep_within_the_plot_and_off_each_other(points: list[tuple[float, float]]) -> None:
    area = Box(10, 30, 740, 360)
    boxes = place_labels(points, [100.0] * len(points), 16, area, [Box(x - 7, y - 7, 14, 14) for x, y in points])
    for n, box in enumerate(boxes):
        assert area.left <= box.left and box.left + box.width <= area.left + area.width + 1e-6
        assert area.top <= box.top and box.top + box.height <= area.top + area.height + 1e-6
        assert all(box.overlap(other) == 0 for other in boxes[:n])


def test_eight_backbones_at_one_point_have_labels_apart() -> None:
    boxes = place_labels([(300.0, 200.0)] * 8, [150.0] * 8, 16, Box(50, 34, 690, 360), [])
    assert all(one.overlap(two) == 0 for n, one in enumerate(boxes) for two in boxes[:n])


# Lines and words


def test_curves_are_averaged_over_seeds_where_all_have_the_step() -> None:
    assert mean_line([[(1, 2.0), (2, 4.0)], [(1, 4.0), (2, 0.0), (3, 9.0)]]) == [(1, 3.0), (2, 2.0)]
    assert curve_keys(make_comparison(NAMES)) == ["loss", "contrastive", "tag", "distill"]


def test_long_curves_are_thinned_to_means_of_neighbours() -> None:
    line = [(float(n), float(n % 2)) for n in range(1000)]
    short = thinned(line, 100)
    assert len(short) == 100 and short[0] == (4.5, 0.5) and thinned(line[:5]) == line[:5]
    assert running_mean([(1, 1.0), (2, 5.0)]) == [(1, 1.0), (2, 5.0)]
    assert running_mean(line)[500] == (500, pytest.approx(0.5, abs=0.02))


def test_long_names_keep_both_ends() -> None:
    assert shortened("open_clip:ViT-B-16@laion2b_s34b_b88k", 20) == "open_clip…_s34b_b88k"
    assert shortened("short") == "short"


def test_no_number_is_a_negative_zero() -> None:
    """Every text of a metric is made by one function, in pages, charts, tables and terminals."""
    for value in (-0.0, -0.0004, 0.0004):
        assert number(value) == signed(value) == "0.000"
        assert format_spread(value, None) == "0.000" and format_spread(value, 0.0001, sign=True) == "+0.000 ± 0.000"
    assert number(-0.0126) == "−0.013" and format_spread(-0.0126, None) == "-0.013"
    assert number(float("inf")) == "n/a" and format_spread(None, None) == "-"


@pytest.mark.parametrize("folder", ["comparison", "reports"])
def test_metrics_are_formatted_by_one_function(folder: str) -> None:
    root = Path(ttd_plugins.__file__).parent / folder
    for path in sorted(root.rglob("*.py")):
        assert not re.search(r":[+z]*\.3f", path.read_text(encoding="utf-8")), path


def test_numbers_and_words() -> None:
    assert [signed(value) for value in (0.0004, -0.0004, 0.0126, -0.5, float("nan"))] == [
        "0.000", "0.000", "+0.013", "−0.500", "n/a",
    ]  # fmt: skip
    assert plural(1, "seed") == "1 seed" and plural(0, "seed") == "0 seeds"
    assert one_line(" a\x00\n\tb \ud83d") == "a b ?" and valid_text("a\n b\ufffe") == "a  b"
