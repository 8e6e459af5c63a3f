"""The frontier of gain and cost over factors of LoRA: charts and the section of a comparison's page."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ttd_plugins.comparison.lora_scales import (
    ScaledResult,
    cost_metrics,
    raised_metric,
    scale_sentences,
    scaled_results,
)
from ttd_plugins.comparison.results import Comparison, Metric
from ttd_plugins.comparison.tables import scale_rows
from ttd_plugins.reports.charts import Chart, chart_svg, mark
from ttd_plugins.reports.comparison_charts import horizontal_label, vertical_label
from ttd_plugins.reports.formatting import capitalised, one_line, shortened, signed
from ttd_plugins.reports.palette import light, series_role

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = tuple[int, str, list[ScaledResult]]


def scale_charts(comparison: Comparison, *, narrow: bool = False) -> list[Chart]:
    """For each metric that TTD may lower, the gain in the raised metric against the gain in that one.

    Each backbone is a line from LoRA scaled by 0 (before) to 1 (after TTD); the control is the origin.

    Args:
        comparison: what is drawn; empty if no factor besides 1 was measured.
        narrow: for a phone: smaller, and without names.
    """
    raised = raised_metric(comparison)
    if raised is None:
        return []
    charts = []
    for cost in cost_metrics(comparison):
        lines: list[Line] = []
        for n, backbone in enumerate(comparison.backbones):
            found = [
                one
                for one in scaled_results(backbone, comparison.metrics)
                if raised.key in one.gains and cost.key in one.gains
            ]
            if found:
                lines.append((n, backbone.name, found))
        if lines and cost.key != raised.key:
            charts.append(_scale_chart(raised, cost, lines, narrow=narrow))
    return charts


def _scale_chart(raised: Metric, cost: Metric, lines: list[Line], *, narrow: bool) -> Chart:
    def draw(axes: Axes) -> None:
        axes.axvline(0, color=light("muted"), linewidth=1)
        axes.axhline(0, color=light("muted"), linewidth=1)
        for n, name, found in lines:
            colour = light(series_role(n))
            points = [(one.gains[cost.key][0], one.gains[raised.key][0]) for one in found]
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, zorder=2)
            for one, (x, y) in zip(found, points, strict=True):
                face = colour if one.scale == 1 else light("card")
                dot = axes.scatter(x, y, s=46, facecolor=face, edgecolor=colour, linewidths=1.8, zorder=3)
                mark(dot, "mark", f"{name}, LoRA x {one.scale:g}: {signed(y)} at {signed(x)}")
            number = axes.annotate(
                str(n + 1), xy=points[-1], xytext=(7, 6), textcoords="offset points", fontsize=12, fontweight="bold",
                color=colour, zorder=4,
            )  # fmt: skip
            mark(number, "label")
        axes.margins(0.14)
        axes.locator_params(nbins=4 if narrow else 5)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        named: dict[str, Any] = {"fontsize": 13, "fontweight": "bold", "color": light("ink")}
        axes.set_title(vertical_label(_gain_metric(raised)), loc="left", x=-0.14, pad=12, **named)
        axes.set_xlabel(horizontal_label(_gain_metric(cost)), loc="right", labelpad=6, **named)

    described = "; ".join(
        f"{name}: "
        + ", ".join(
            f"x {one.scale:g} {signed(one.gains[raised.key][0])} at {signed(one.gains[cost.key][0])}" for one in found
        )
        for _, name, found in lines
    )
    key = f"lora-scale-{cost.key}"
    return Chart(
        key=f"{key}-narrow" if narrow else key,
        title=f"Gain in {raised.label} against gain in {cost.label} by factor of LoRA",
        description=f"Gain over the control, mean over seeds. {described}",
        size=(360, 300) if narrow else (400, 320),
        margins=(56, 34, 16, 46),
        draw=draw,
    )


def _gain_metric(metric: Metric) -> Metric:
    """The metric of an axis that shows gains."""
    return replace(metric, label=f"Gain in {metric.label}")


def scale_sheet_heading(comparison: Comparison) -> str:
    """What the charts show, in one line, for a file that has no page around it."""
    names = [
        f"{n + 1} {shortened(backbone.name, 20)}"
        for n, backbone in enumerate(comparison.backbones)
        if scaled_results(backbone, comparison.metrics)
    ]
    return one_line(
        f"LoRA scaled from 0 (before) to 1 (after TTD, filled); the control is the origin. {', '.join(names)}"
    )


def scale_view(comparison: Comparison) -> dict[str, Any] | None:
    """The section of the page; ``None`` if no factor besides 1 was measured."""
    columns, rows = scale_rows(comparison)
    if not rows:
        return None
    numbers = {backbone.name: n for n, backbone in enumerate(comparison.backbones)}
    charts = zip(scale_charts(comparison), scale_charts(comparison, narrow=True), strict=True)
    return {
        "sentences": scale_sentences(comparison),
        "columns": [capitalised(metric.label) for metric in columns],
        "rows": [{"backbone": numbers[name], "scale": f"{scale:g}", "gains": texts} for name, scale, texts in rows],
        "charts": [{"wide": chart_svg(wide), "narrow": chart_svg(narrow)} for wide, narrow in charts],
    }
