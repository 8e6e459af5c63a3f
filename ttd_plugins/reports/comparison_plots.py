"""The charts of a comparison as PNG files."""

from __future__ import annotations

from pathlib import Path

from ttd_plugins.comparison.results import Comparison
from ttd_plugins.reports.charts import write_chart_sheet
from ttd_plugins.reports.comparison_charts import (
    bias_chart,
    bias_means,
    curve_axis,
    curve_chart,
    curve_keys,
    curve_label,
    curve_lines,
    trade_off_chart,
)
from ttd_plugins.reports.comparison_choice import cost_chart
from ttd_plugins.reports.formatting import shortened
from ttd_plugins.reports.gain_charts import gain_charts, gains_heading
from ttd_plugins.reports.lora_scale_charts import scale_charts, scale_sheet_heading

_LOSSES = ("loss", "contrastive", "tag", "distill", "anchor")


def draw_comparison_plots(folder: Path, comparison: Comparison) -> list[Path]:
    """Draw trade-off, factors of LoRA, quality against cost, gains, curves and bias; charts without data are left out.

    The trade-off has an arrow from before, a dashed one from the control, and a dot for each seed. Gains are after
    minus control (minus before if no control was run), mean and sample standard deviation over seeds.

    Returns:
        the files that were written.

    Raises:
        InputError: a file cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    written = []
    trade_off = trade_off_chart(comparison)
    if trade_off is not None:
        written.append(folder / "trade-off.png")
        write_chart_sheet(written[-1], [trade_off], titles=False)
    scales = scale_charts(comparison)
    if scales:
        written.append(folder / "lora-scale.png")
        write_chart_sheet(
            written[-1], scales, columns=len(scales), titles=False, heading=scale_sheet_heading(comparison)
        )
    cost = cost_chart(comparison)
    if cost is not None:
        written.append(folder / "cost.png")
        write_chart_sheet(written[-1], [cost], titles=False)
    gains = gain_charts(comparison)
    if gains:
        written.append(folder / "gains.png")
        write_chart_sheet(written[-1], gains, columns=3, heading=gains_heading(comparison))
    keys = [key for key in _LOSSES if key in curve_keys(comparison)]
    curves = [
        curve_chart(
            f"curve-{n}-{key}", f"{shortened(backbone.name, 24)}: {curve_label(key).lower()}", lines, curve_axis(key)
        )
        for n, backbone in enumerate(comparison.backbones)
        for key in keys
        if (lines := curve_lines(backbone, key))
    ]
    if curves:
        written.append(folder / "curves.png")
        write_chart_sheet(written[-1], curves, columns=len(keys))
    bias = [(n, b.name, means) for n, b in enumerate(comparison.backbones) if (means := bias_means(b))]
    if bias:
        written.append(folder / "bias.png")
        charts = [bias_chart(f"bias-{n}", shortened(name, 30), means) for n, name, means in bias]
        write_chart_sheet(written[-1], charts, columns=4)
    return written
