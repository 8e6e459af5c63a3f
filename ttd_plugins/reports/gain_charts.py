"""Charts of the gains of a comparison: one panel for each metric, all on one axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ttd_plugins.comparison.results import BackboneResult, Comparison, Metric
from ttd_plugins.reports.charts import Chart, mark
from ttd_plugins.reports.comparison_findings import TIE, Change, change
from ttd_plugins.reports.formatting import capitalised, one_line, shortened, signed
from ttd_plugins.reports.palette import light, series_role

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[tuple[int, BackboneResult]]
"""Backbones with their numbers, counted from 0."""
TENTATIVE_OPACITY = 0.35


def gain_charts(comparison: Comparison) -> list[Chart]:
    """For each metric with a better direction, the gain on every fine-tuned backbone, mean and spread over seeds.

    All panels have the same axis, so that bars of different metrics can be compared.
    """
    tuned = [(n, backbone) for n, backbone in enumerate(comparison.backbones) if backbone.metrics.get("after")]
    panels = [
        (metric, changes)
        for metric in comparison.metrics
        if metric.better is not None and any(changes := [change(backbone, metric) for _, backbone in tuned])
    ]
    limits = _shared_limits([found for _, changes in panels for found in changes if found is not None])
    return [_gain_chart(metric, tuned, changes, limits) for metric, changes in panels]


def _shared_limits(changes: Sequence[Change]) -> tuple[float, float]:
    """The range of all gains with their spreads and zero, with a margin."""
    ends = [0.0, *(found.mean + side * (found.spread or 0) for found in changes for side in (-1, 1))]
    ends = [end for end in ends if math.isfinite(end)]
    margin = max(0.06 * (max(ends) - min(ends)), 1e-3)
    return min(ends) - margin, max(ends) + margin


def _gain_chart(metric: Metric, tuned: Rows, changes: Sequence[Change | None], limits: tuple[float, float]) -> Chart:
    def draw(axes: Axes) -> None:
        axes.axvline(0, color=light("muted"), linewidth=1)
        for row, ((n, _), found) in enumerate(zip(tuned, changes, strict=True)):
            if found is None:
                axes.text(0, row, " n/a", va="center", fontsize=11, color=light("muted"))
                continue
            clear = found.verdict in ("better", "worse")
            colour = light(series_role(n))
            face = colour if clear else light("card")
            if found.tentative:
                axes.barh(row, found.mean, height=0.62, color=colour, alpha=TENTATIVE_OPACITY, linewidth=0)
                face = "none"
            bars = axes.barh(row, found.mean, height=0.62, facecolor=face, edgecolor=colour, linewidth=1.5)
            mark(bars[0], "bar tentative" if found.tentative else "bar", f"{found.signed} {found.words}".strip())
            if found.spread is not None:
                axes.errorbar(found.mean, row, xerr=found.spread, color=light("ink"), capsize=3, linewidth=1.2)
            axes.text(
                1.03, row, signed(found.mean), transform=axes.get_yaxis_transform(), va="center", fontsize=11,
                color=light("ink"),
            )  # fmt: skip
        names = [f"{n + 1} {shortened(one_line(backbone.name), 16)}" for n, backbone in tuned]
        axes.set_xlim(*limits)
        axes.set_yticks(range(len(tuned)), names, fontsize=11, color=light("ink"))
        axes.set_ylim(len(tuned) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", length=0, labelsize=11)
        axes.locator_params(axis="x", nbins=3)
        better = "gain, higher is better →" if metric.better == "higher" else "← gain, lower is better"
        axes.set_xlabel(better, loc="right", fontsize=11, labelpad=2, color=light("muted"))

    described = ", ".join(
        f"{backbone.name} {'n/a' if found is None else f'{found.signed} {found.words}'.strip()}"
        for (_, backbone), found in zip(tuned, changes, strict=True)
    )
    return Chart(
        key=f"gain-{metric.key}",
        title=capitalised(metric.label),
        description=f"Gain, {metric.better} is better: {described}",
        size=(280, 44 + 24 * len(tuned)),
        margins=(116, 2, 48, 40),
        draw=draw,
    )


def gains_heading(comparison: Comparison) -> str:
    """What the gain charts show, and against which arm."""
    found = [
        one
        for backbone in comparison.backbones
        for metric in comparison.metrics
        if backbone.metrics.get("after") and (one := change(backbone, metric)) is not None
    ]
    arms = {one.baseline for one in found}
    against = "control" if arms == {"control"} else "before" if arms == {"before"} else "control, or before without one"
    words = f"After TTD minus {against}; all panels share one axis."
    if any(one.spread is not None for one in found):
        words += f" Lines: spread over seeds. Open bars: within the spread, or below {TIE}."
    else:
        words += f" Open bars: below {TIE}."
    if any(one.tentative for one in found):
        words += " Pale bars: one seed, tentative."
    return words
