"""Trade-off, gains, bias and training curves as plain data for the templates; the charts come as SVG."""

from __future__ import annotations

from typing import Any

from ttd_plugins.comparison.results import Comparison
from ttd_plugins.reports.charts import Chart, chart_svg
from ttd_plugins.reports.comparison_charts import (
    bias_chart,
    bias_means,
    curve_axis,
    curve_chart,
    curve_keys,
    curve_label,
    curve_lines,
    trade_off_chart,
    trade_off_metrics,
)
from ttd_plugins.reports.gain_charts import gain_charts, gains_heading

CURVE_NOTES = {
    "loss": "The sum of the weighted terms; that of TTD has more terms than the control’s.",
    "contrastive": "Both trainings have it; it keeps captions and images together.",
    "tag": "Each tag’s map against its own min-max target.",
    "distill": "The caption map against the union of the selected tags’ maps.",
    "anchor": "The distance of the global embeddings to those of the frozen model.",
    "caption_map_spread": "Towards zero would be collapse.",
    "selected_per_caption": "None or all would be collapse.",
}


def gains_view(comparison: Comparison) -> dict[str, Any] | None:
    """Panels of gains; ``None`` with one backbone, whose gains the tiles and the table show."""
    charts = gain_charts(comparison)
    if not charts or len(comparison.backbones) < 2:
        return None
    return {
        "about": gains_heading(comparison),
        "charts": [{"title": one.title, "svg": chart_svg(one)} for one in charts],
    }


def trade_off_view(comparison: Comparison) -> dict[str, Any]:
    """The trade-off, for a wide and a narrow window."""
    charts = [trade_off_chart(comparison, narrow=narrow) for narrow in (False, True)]
    metrics = trade_off_metrics(comparison)
    return {
        "metrics": metrics,
        "wide": None if charts[0] is None else chart_svg(charts[0]),
        "narrow": None if charts[1] is None else chart_svg(charts[1]),
    }


def bias_view(comparison: Comparison) -> list[dict[str, Any]]:
    """A chart for each backbone that was measured on scenes."""
    found = [(n, b.name, means) for n, b in enumerate(comparison.backbones) if (means := bias_means(b))]
    return [{"backbone": n, "svg": chart_svg(bias_chart(f"bias-{n}", name, means))} for n, name, means in found]


def curves_view(comparison: Comparison) -> list[dict[str, Any]]:
    """For each value that the trainings record, one chart per backbone."""
    panels: list[dict[str, Any]] = []
    for key in curve_keys(comparison):
        lines = {n: found for n, b in enumerate(comparison.backbones) if (found := curve_lines(b, key))}
        charts: list[tuple[int, Chart]] = []
        for n, found in lines.items():
            title = f"{curve_label(key)} of {comparison.backbones[n].name}"
            charts.append((n, curve_chart(f"curve-{len(panels)}-{n}", title, found, curve_axis(key))))
        if charts:
            panels.append(
                {
                    "label": curve_label(key),
                    "note": CURVE_NOTES.get(key, ""),
                    "charts": [{"backbone": n, "svg": chart_svg(chart, legend=False)} for n, chart in charts],
                }
            )
    return panels
