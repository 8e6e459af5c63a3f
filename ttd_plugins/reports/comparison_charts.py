"""Charts of a comparison: trade-off, training curves, and bias by kind of word; gains are in ``gain_charts.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ttd_plugins.comparison.results import ARMS, Arm, BackboneResult, Comparison, Metric, mean_and_spread
from ttd_plugins.reports.charts import Chart, mark, pixels, unit_coordinates
from ttd_plugins.reports.comparison_findings import mean
from ttd_plugins.reports.formatting import capitalised, number, one_line, shortened
from ttd_plugins.reports.palette import light, series_role

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

ARM_LABELS: dict[Arm, str] = {"before": "Before", "control": "Control", "after": "After TTD"}
KIND_LABELS = {
    "background": "Backgrounds (grass, snow …)",
    "common": "Common things",
    "middle": "Less common things",
    "rare": "Rare things",
}
"""Kinds of words in scenes, from the most to the least frequent in captions."""
KIND_ROWS = {"background": "Backgrounds", "common": "Common", "middle": "Less common", "rare": "Rare"}
CURVE_LABELS = {
    "loss": "Total loss",
    "contrastive": "Contrastive loss",
    "tag": "Tag loss",
    "distill": "Distillation loss",
    "anchor": "Anchor loss",
    "caption_map_spread": "Spread of the caption map",
    "selected_per_caption": "Selected tags per caption",
}
CURVE_AXES = {
    **dict.fromkeys(("loss", "contrastive", "tag", "distill", "anchor"), "lower is better ↓"),
    "caption_map_spread": "near 0 is collapse",
    "selected_per_caption": "tags per caption",
}
"""Labels of the vertical axes."""
CURVE_POINTS, SEED_POINTS = 200, 80
_DASHES: Any = (0, (4, 2.5))

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle; ``top`` is its smaller vertical coordinate."""

    left: float
    top: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        across = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        down = min(self.top + self.height, other.top + other.height) - max(self.top, other.top)
        return max(across, 0.0) * max(down, 0.0)


def place_labels(
    points: Sequence[Point], widths: Sequence[float], height: float, area: Box, taken: list[Box]
) -> list[Box]:
    """A box for the label of each point, which avoids other labels and ``taken`` where there is room.

    Places near the point come first. A label never leaves ``area``.
    """
    placed: list[Box] = []
    for (x, y), width in zip(points, widths, strict=True):
        best, least = None, math.inf
        for distance in (11, 20, 32, 46, 62, 80, 100, 130):
            for angle in (0, 180, 45, -45, 135, -135, 90, -90):
                dx, dy = math.cos(math.radians(angle)), -math.sin(math.radians(angle))
                left = x + dx * distance - width * (1 - dx) / 2
                top = y + dy * distance - height / 2
                left = min(max(left, area.left), area.left + max(area.width - width, 0))
                top = min(max(top, area.top), area.top + area.height - height)
                box = Box(left, top, width, height)
                cost = sum(3 * box.overlap(other) for other in placed) + sum(box.overlap(other) for other in taken)
                cost += distance / 100
                if cost < least - 1e-9:
                    best, least = box, cost
            if best is not None and least < 1.5:
                break
        assert best is not None
        placed.append(best)
    return placed


# Trade-off ------------------------------------------------------------------------------------------------------------


def trade_off_metrics(comparison: Comparison) -> tuple[Metric, Metric] | None:
    """The metric that TTD should raise and the one it may cost; ``None`` if one of them is not measured."""
    by_key = {metric.key: metric for metric in comparison.metrics}
    up, cost = (by_key.get(key) for key in comparison.trade_off)
    return (up, cost) if up is not None and cost is not None else None


def trade_off_points(backbone: BackboneResult, up: Metric, cost: Metric) -> dict[Arm, Point]:
    """For each arm (cost, gain), mean over the seeds, where both are defined."""
    found: dict[Arm, Point] = {}
    for arm in ARMS:
        x, y = mean(backbone, arm, cost.key), mean(backbone, arm, up.key)
        if x is not None and y is not None:
            found[arm] = (x, y)
    return found


def seed_points(backbone: BackboneResult, arm: Arm, up: Metric, cost: Metric) -> list[Point]:
    """(cost, gain) of each seed of an arm."""
    pairs = [(row.get(cost.key), row.get(up.key)) for row in backbone.metrics.get(arm, [])]
    return [(float(x), float(y)) for x, y in pairs if x is not None and y is not None and math.isfinite(x + y)]


def trade_off_chart(comparison: Comparison, *, narrow: bool = False) -> Chart | None:
    """The trade-off of all backbones; ``None`` if no backbone has both metrics.

    Args:
        comparison: what is drawn.
        narrow: for a phone: smaller, and labels are the backbones' numbers without their names.
    """
    axes_of = trade_off_metrics(comparison)
    if axes_of is None:
        return None
    up, cost = axes_of
    points = [trade_off_points(backbone, up, cost) for backbone in comparison.backbones]
    if not any(points):
        return None
    arms = [arm for arm in ARMS if any(arm in found for found in points)]
    dots = any(len(seed_points(backbone, "after", up, cost)) > 1 for backbone in comparison.backbones)

    def draw(axes: Axes) -> None:
        _trade_off_axes(axes, comparison, points, up, cost)
        taken: list[Box] = []
        for n, (backbone, found) in enumerate(zip(comparison.backbones, points, strict=True)):
            seeds: dict[Arm, list[Point]] = {arm: seed_points(backbone, arm, up, cost) for arm in ARMS[1:]}
            taken += _draw_backbone(axes, backbone.name, light(series_role(n)), found, seeds)
        _draw_labels(axes, comparison, points, taken, names=not narrow)

    described = "; ".join(
        f"{backbone.name}: "
        + ", ".join(f"{ARM_LABELS[arm].lower()} {number(y)} at {number(x)}" for arm, (x, y) in found.items())
        for backbone, found in zip(comparison.backbones, points, strict=True)
        if found
    )
    return Chart(
        key="trade-off-narrow" if narrow else "trade-off",
        title=f"{capitalised(up.label)} against {cost.label}",
        description=f"Mean over seeds. {described}",
        size=(360, 330) if narrow else (760, 430),
        margins=(50, 34, 16, 46),
        draw=draw,
        legend=lambda: _trade_off_legend(arms, dots=dots),
        legend_columns=2 if narrow else 6,
        legend_height=68 if narrow else 30,
    )


def _trade_off_axes(
    axes: Axes, comparison: Comparison, points: Sequence[Mapping[Arm, Point]], up: Metric, cost: Metric
) -> None:
    drawn = [point for found in points for point in found.values()]
    drawn += [p for b in comparison.backbones for arm in ARMS[1:] for p in seed_points(b, arm, up, cost)]
    axes.set_xlim(_padded([x for x, _ in drawn]))
    axes.set_ylim(_padded([y for _, y in drawn]))
    axes.locator_params(axis="x", nbins=7 if axes.bbox.width > 400 else 4)
    axes.locator_params(axis="y", nbins=7)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    named: dict[str, Any] = {"fontsize": 13, "fontweight": "bold", "color": light("ink")}
    axes.set_title(vertical_label(up), loc="left", x=-0.06 if axes.bbox.width > 400 else -0.14, pad=12, **named)
    axes.set_xlabel(horizontal_label(cost), loc="right", labelpad=6, **named)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """The range of values with a margin."""
    low, high = min(values), max(values)
    margin = max(0.09 * (high - low), 0.02 * abs(high), 1e-3)
    return low - margin, high + margin


def vertical_label(metric: Metric) -> str:
    """The label of a vertical axis, which names the better direction."""
    better = {"higher": ", higher is better ↑", "lower": ", lower is better ↓", None: ""}[metric.better]
    return one_line(capitalised(metric.label) + better)


def horizontal_label(metric: Metric) -> str:
    """The label of a horizontal axis, which names the better direction."""
    label = one_line(capitalised(metric.label))
    if metric.better is None:
        return label
    return f"{label}, higher is better →" if metric.better == "higher" else f"← {label}, lower is better"


def _draw_backbone(
    axes: Axes, name: str, colour: str, found: Mapping[Arm, Point], seeds: Mapping[Arm, Sequence[Point]]
) -> list[Box]:
    """Draw seeds, arrows and marks of a backbone; returns the boxes that labels should leave free."""
    boxes = []
    for dots in seeds.values():
        # A single seed is the mean itself.
        for dot in dots if len(dots) > 1 else []:
            mark(axes.scatter(*dot, s=20, color=colour, alpha=0.5, linewidths=0), "dot")
            x, y = pixels(axes, dot)
            boxes.append(Box(x - 3, y - 3, 6, 6))
    for arm in ARMS[:2]:
        if arm in found and "after" in found:
            start, end = pixels(axes, found[arm]), pixels(axes, found["after"])
            for share in np.linspace(0, 1, 2 + round(math.dist(start, end) / 6)):
                x, y = (a + share * (b - a) for a, b in zip(start, end, strict=True))
                boxes.append(Box(x - 3, y - 3, 6, 6))
            # Marks that touch need no arrow.
            if math.dist(start, end) >= 18:
                arrow = axes.annotate("", xy=found["after"], xytext=found[arm], arrowprops=_arrow(arm, colour))
                assert arrow.arrow_patch is not None
                mark(arrow.arrow_patch, f"arrow {arm}")
    for arm, point in found.items():
        face = colour if arm == "after" else light("card")
        drawn = axes.scatter(
            *point, s=100, marker="s" if arm == "control" else "o", facecolor=face, edgecolor=colour, linewidths=2.2,
            zorder=3,
        )  # fmt: skip
        mark(drawn, f"mark {arm}", f"{name}, {ARM_LABELS[arm].lower()}: {number(point[1])} at {number(point[0])}")
        x, y = pixels(axes, point)
        boxes.append(Box(x - 7, y - 7, 14, 14))
    return boxes


def _arrow(arm: Arm, colour: str) -> dict[str, Any]:
    before = arm == "before"
    return {
        "arrowstyle": "-|>,head_length=0.5,head_width=0.28",
        "color": colour,
        "linestyle": "-" if before else _DASHES,
        "linewidth": 1.8 if before else 1.4,
        "shrinkA": 6,
        "shrinkB": 7,
    }


def _draw_labels(
    axes: Axes, comparison: Comparison, points: Sequence[Mapping[Arm, Point]], taken: list[Box], *, names: bool
) -> None:
    labelled = [(n, found) for n, found in enumerate(points) if found]
    anchors = [
        pixels(axes, found["after"] if "after" in found else next(iter(found.values()))) for _, found in labelled
    ]
    texts = [
        f"{n + 1} {shortened(one_line(comparison.backbones[n].name))}" if names else str(n + 1) for n, _ in labelled
    ]
    inside, units = axes.bbox, unit_coordinates(axes)
    area = Box(inside.x0 + 2, inside.y0 + 2, inside.width - 4, inside.height - 4)
    boxes = place_labels(anchors, [7.6 * len(text) + 6 for text in texts], 18, area, taken)
    for (n, _), (x, y), text, box in zip(labelled, anchors, texts, boxes, strict=True):
        near = (min(max(x, box.left), box.left + box.width), min(max(y, box.top), box.top + box.height))
        if math.dist(near, (x, y)) > 16:
            line = {"arrowstyle": "-", "color": light("muted"), "linewidth": 0.8, "shrinkA": 0, "shrinkB": 8}
            axes.annotate("", xy=(x, y), xytext=near, xycoords=units, textcoords=units, arrowprops=line)
        label = axes.annotate(
            text, xy=(box.left + box.width / 2, box.top + box.height / 2), xycoords=units,
            ha="center", va="center", fontsize=12, fontweight="bold", color=light(series_role(n)),
            bbox={"facecolor": light("card"), "alpha": 0.75, "edgecolor": "none", "pad": 1}, zorder=4,
        )  # fmt: skip
        mark(label, "label")


def _trade_off_legend(arms: Sequence[Arm], *, dots: bool) -> list[Artist]:
    from matplotlib.lines import Line2D

    muted = light("muted")
    handles = [
        Line2D([], [], linestyle="", marker="s" if arm == "control" else "o", markersize=9, markeredgewidth=2,
               markeredgecolor=muted, markerfacecolor=muted if arm == "after" else light("card"),
               label=ARM_LABELS[arm])
        for arm in arms
    ]  # fmt: skip
    if dots:
        handles.append(
            Line2D([], [], linestyle="", marker="o", markersize=4.5, color=muted, alpha=0.6, label="One seed")
        )
    for arm, label in (("before", "From before"), ("control", "From the control")):
        if {"after", arm} <= set(arms):
            handles.append(Line2D([], [], color=muted, linestyle="-" if arm == "before" else _DASHES, label=label))
    return list(handles)


# Training curves ------------------------------------------------------------------------------------------------------


def curve_keys(comparison: Comparison) -> list[str]:
    """What the curves record besides the step: losses in a fixed order, then the rest in order of appearance."""
    rows = [
        row for b in comparison.backbones for runs in b.curves.values() for run in runs for row in run[:1] + run[-1:]
    ]
    keys = dict.fromkeys(key for row in rows for key in row if key != "step")
    known = list(CURVE_LABELS)
    return sorted(keys, key=lambda key: known.index(key) if key in known else len(known))


def curve_label(key: str) -> str:
    """The name of a curve on paper."""
    return CURVE_LABELS.get(key, capitalised(key.replace("_", " ")))


def curve_axis(key: str) -> str:
    """Label of the vertical axis of a curve."""
    return CURVE_AXES.get(key, "")


def curve_lines(backbone: BackboneResult, key: str) -> dict[Arm, list[list[Point]]]:
    """For each arm and seed the (step, value) pairs; values that are not finite are left out."""
    found: dict[Arm, list[list[Point]]] = {}
    for arm, runs in backbone.curves.items():
        lines = [
            [(row["step"], row[key]) for row in run if key in row and math.isfinite(row[key]) and "step" in row]
            for run in runs
        ]
        if any(lines):
            found[arm] = [line for line in lines if line]
    return found


def curve_chart(key: str, title: str, lines: Mapping[Arm, Sequence[Sequence[Point]]], axis: str = "") -> Chart:
    """Curves of one value of one backbone: seeds thin, the running mean of their mean thick.

    Args:
        key: unique on a page.
        title: what the chart shows.
        lines: for each arm and seed the (step, value) pairs.
        axis: label of the vertical axis; it names the better direction.
    """
    order: tuple[Arm, ...] = ("after", "control")
    means = {arm: running_mean(thinned(mean_line(lines[arm]))) for arm in order if lines.get(arm)}

    def draw(axes: Axes) -> None:
        # The control is drawn last and dashed, so that both are seen where they agree.
        for arm in means:
            for run in lines[arm]:
                xs, ys = zip(*thinned(run, SEED_POINTS), strict=True)
                mark(axes.plot(xs, ys, color=light(arm), alpha=0.3, linewidth=1)[0], f"seed {arm}")
        for arm, line in means.items():
            xs, ys = zip(*line, strict=True)
            style = _DASHES if arm == "control" else "-"
            drawn = axes.plot(xs, ys, color=light(arm), linewidth=2.2, linestyle=style)[0]
            mark(drawn, f"mean {arm}", ARM_LABELS[arm])
        steps = [step for runs in lines.values() for run in runs for step, _ in run]
        first, last = min(steps), max(steps)
        ends = [(first, f"step {first:g}"), (last, f"{last:g}")] if last > first else [(first, f"step {first:g}")]
        axes.set_xticks(*zip(*ends, strict=True))
        axes.margins(x=0.02)
        axes.grid(axis="x", visible=False)
        axes.locator_params(axis="y", nbins=4)
        axes.tick_params(length=0, labelsize=11)
        axes.set_ylabel(axis, fontsize=10.5, color=light("muted"))

    described = ", ".join(
        f"{ARM_LABELS[arm]} from {line[0][1]:.4g} to {line[-1][1]:.4g}" for arm, line in means.items()
    )
    return Chart(
        key=key,
        title=title,
        description=f"Over steps: {described}",
        size=(340, 180),
        margins=(64, 8, 16, 24),
        draw=draw,
        legend=_curve_legend,
    )


def _curve_legend() -> list[Artist]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=light(arm), linewidth=2.2, linestyle=_DASHES if arm == "control" else "-", label=label)
        for arm, label in ARM_LABELS.items()
        if arm != "before"
    ]


def mean_line(lines: Sequence[Sequence[Point]]) -> list[Point]:
    """Mean over seeds at every step that the largest number of seeds share."""
    by_step: dict[float, list[float]] = {}
    for line in lines:
        for step, value in line:
            by_step.setdefault(step, []).append(value)
    seeds = max(map(len, by_step.values()), default=0)
    return [(step, float(np.mean(values))) for step, values in sorted(by_step.items()) if len(values) == seeds]


def thinned(line: Sequence[Point], limit: int = CURVE_POINTS) -> list[Point]:
    """At most ``limit`` points, each the mean of neighbours."""
    pieces = np.array_split(np.array(line, dtype=float), min(len(line), limit))
    return [(float(piece[:, 0].mean()), float(piece[:, 1].mean())) for piece in pieces]


def running_mean(line: Sequence[Point]) -> list[Point]:
    """Mean over a window of about a twelfth of the line; the window is cut at the ends."""
    reach = len(line) // 24
    values = [value for _, value in line]
    return [(step, float(np.mean(values[max(n - reach, 0) : n + reach + 1]))) for n, (step, _) in enumerate(line)]


# Bias by kind of word -------------------------------------------------------------------------------------------------


def bias_means(backbone: BackboneResult) -> dict[str, dict[Arm, tuple[float, float | None]]]:
    """For each kind of word and arm, mean and spread over seeds of the caption map inside tags of that kind.

    Kinds are in the order of :data:`KIND_LABELS`; a value that is undefined for a seed is left out.
    """
    rows = {arm: backbone.bias.get(arm, []) for arm in ARMS}
    kinds = dict.fromkeys(kind for seeds in rows.values() for row in seeds for kind in row)
    known = list(KIND_LABELS)
    found: dict[str, dict[Arm, tuple[float, float | None]]] = {}
    for kind in sorted(kinds, key=lambda kind: known.index(kind) if kind in known else len(known)):
        for arm, seeds in rows.items():
            values = [row.get(kind) for row in seeds]
            finite = [value for value in values if value is not None and math.isfinite(value)]
            if finite and len(finite) == len(values):
                found.setdefault(kind, {})[arm] = mean_and_spread(finite)
    return found


def bias_gap(bias: Mapping[str, Mapping[Arm, tuple[float, float | None]]], arm: Arm) -> float | None:
    """Largest minus smallest mean over the kinds of words in an arm; ``None`` with fewer than two kinds."""
    means = [found[arm][0] for found in bias.values() if arm in found]
    return max(means) - min(means) if len(means) > 1 else None


def bias_chart(key: str, name: str, bias: Mapping[str, Mapping[Arm, tuple[float, float | None]]]) -> Chart:
    """Bars of one backbone, grouped by arm: the mean of the caption map for each kind of word.

    Within a group, bars of equal length mean no bias; a band marks the gap between the longest and the shortest.
    """
    arms = [arm for arm in ARMS if any(arm in found for found in bias.values())]
    group = len(bias) + 1.7
    gaps = {arm: bias_gap(bias, arm) for arm in arms}

    def draw(axes: Axes) -> None:
        ticks = []
        for place, arm in enumerate(arms):
            title = place * group
            words = ARM_LABELS[arm] if (gap := gaps[arm]) is None else f"{ARM_LABELS[arm]}: gap {number(gap)}"
            axes.text(0, title, words, fontsize=12, fontweight="bold", va="center")
            means = [found[arm][0] for found in bias.values() if arm in found]
            if gaps[arm] is not None:
                band = axes.fill_betweenx(
                    [title + 0.5, title + len(bias) + 0.5], min(means), max(means), color=light("shade"), alpha=0.5,
                    linewidth=0, zorder=0.5,
                )  # fmt: skip
                mark(band, f"gap {arm}", words)
            for row, (kind, found) in enumerate(bias.items(), start=1):
                ticks.append((title + row, shortened(one_line(KIND_ROWS.get(kind, kind)), 14)))
                if arm not in found:
                    axes.text(0, title + row, " n/a", fontsize=11, va="center", color=light("muted"))
                    continue
                value, spread = found[arm]
                bars = axes.barh(title + row, min(max(value, 0), 1), height=0.72, color=light(arm))
                label = KIND_LABELS.get(kind, kind)
                mark(bars[0], f"bar {arm}", f"{ARM_LABELS[arm]}, {label}: {number(value)}")
                if spread is not None:
                    axes.errorbar(value, title + row, xerr=spread, color=light("ink"), capsize=2, linewidth=1)
                axes.text(1.02, title + row, number(value), fontsize=11, va="center", color=light("ink"))
        axes.set_xlim(0, 1)
        axes.set_ylim(len(arms) * group - 0.9, -0.7)
        axes.set_yticks(*zip(*ticks, strict=True), fontsize=11)
        axes.set_xticks([0, 0.5, 1])
        axes.set_xlabel(
            "Mean of the caption map, equal bars are better", loc="right", fontsize=11, labelpad=2, color=light("muted")
        )
        axes.grid(axis="y", visible=False)
        axes.tick_params(length=0, labelsize=11)
        axes.spines["bottom"].set_visible(False)

    described = "; ".join(
        f"{ARM_LABELS[arm]}: "
        + ", ".join(
            f"{KIND_LABELS.get(kind, kind)} {number(found[arm][0])}" for kind, found in bias.items() if arm in found
        )
        for arm in arms
    )
    return Chart(
        key=key,
        title=f"Bias of {name} by kind of word",
        description=f"Mean of the caption map inside the tags. {described}",
        size=(360, 50 + 19 * group * len(arms)),
        margins=(98, 4, 46, 40),
        draw=draw,
    )
