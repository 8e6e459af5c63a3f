"""Charts of a comparison: trade-off, gains, training curves, and bias by kind of word."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ttd_plugins.comparison.results import ARMS, Arm, BackboneResult, Comparison, Metric, mean_and_spread
from ttd_plugins.reports.charts import Chart, mark, pixels, unit_coordinates
from ttd_plugins.reports.comparison_findings import TIE, Change, change, mean
from ttd_plugins.reports.formatting import capitalised, number, printable, shortened
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
CURVE_LABELS = {
    "loss": "Total loss",
    "contrastive": "Contrastive loss",
    "tag": "Tag loss",
    "distill": "Distillation loss",
    "anchor": "Anchor loss",
    "caption_map_spread": "Spread of the caption map",
    "selected_per_caption": "Selected tags per caption",
}
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
    axes.set_title(_axis_label(up, "↑", "↓"), loc="left", x=-0.06 if axes.bbox.width > 400 else -0.14, pad=12, **named)
    axes.set_xlabel(_axis_label(cost, "→", "←"), loc="right", labelpad=6, **named)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """The range of values with a margin."""
    low, high = min(values), max(values)
    margin = max(0.09 * (high - low), 0.02 * abs(high), 1e-3)
    return low - margin, high + margin


def _axis_label(metric: Metric, more: str, less: str) -> str:
    arrow = {"higher": f"{more} better", "lower": f"{less} better", None: more}[metric.better]
    return printable(f"{capitalised(metric.label)}, {arrow}")


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
        f"{n + 1} {shortened(printable(comparison.backbones[n].name))}" if names else str(n + 1) for n, _ in labelled
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


# Gains ----------------------------------------------------------------------------------------------------------------


def gain_charts(comparison: Comparison) -> list[Chart]:
    """For each metric with a better direction, the gain on every fine-tuned backbone, mean and spread over seeds."""
    tuned = [(n, backbone) for n, backbone in enumerate(comparison.backbones) if backbone.metrics.get("after")]
    charts = []
    for metric in comparison.metrics:
        changes = [change(backbone, metric) for _, backbone in tuned]
        if metric.better is not None and any(changes):
            charts.append(_gain_chart(metric, tuned, changes))
    return charts


def _gain_chart(metric: Metric, tuned: Sequence[tuple[int, BackboneResult]], changes: Sequence[Change | None]) -> Chart:
    def draw(axes: Axes) -> None:
        axes.axvline(0, color=light("muted"), linewidth=1)
        for row, ((n, _), found) in enumerate(zip(tuned, changes, strict=True)):
            if found is None:
                axes.text(0, row, " n/a", va="center", fontsize=11, color=light("muted"))
                continue
            clear = found.verdict in ("better", "worse")
            colour = light(series_role(n))
            face = colour if clear else light("card")
            bars = axes.barh(row, found.mean, height=0.62, color=face, edgecolor=colour, linewidth=1.5)
            mark(bars[0], "bar", found.signed)
            if found.spread is not None:
                axes.errorbar(found.mean, row, xerr=found.spread, color=light("ink"), capsize=3, linewidth=1.2)
        names = [f"{n + 1} {shortened(printable(backbone.name), 20)}" for n, backbone in tuned]
        axes.set_yticks(range(len(tuned)), names, fontsize=11, color=light("ink"))
        axes.set_ylim(len(tuned) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)

    described = ", ".join(
        f"{backbone.name} {'n/a' if found is None else found.signed}"
        for (_, backbone), found in zip(tuned, changes, strict=True)
    )
    return Chart(
        key=f"gain-{metric.key}",
        title=f"{metric.label} ({metric.better} is better)",
        description=described,
        size=(380, 40 + 26 * len(tuned)),
        margins=(165, 4, 14, 28),
        draw=draw,
    )


def gains_heading(comparison: Comparison) -> str:
    """What the gain charts show, and against which arm."""
    found = [change(b, m) for b in comparison.backbones for m in comparison.metrics if b.metrics.get("after")]
    arms = {one.baseline for one in found if one is not None}
    against = "control" if arms == {"control"} else "before" if arms == {"before"} else "control, or before without one"
    return f"After TTD minus {against}. Lines: spread over seeds. Open bars: within the spread, or below {TIE}."


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


def curve_chart(key: str, title: str, lines: Mapping[Arm, Sequence[Sequence[Point]]]) -> Chart:
    """Curves of one value of one backbone: seeds thin, the running mean of their mean thick."""
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

    described = ", ".join(
        f"{ARM_LABELS[arm]} from {line[0][1]:.4g} to {line[-1][1]:.4g}" for arm, line in means.items()
    )
    return Chart(
        key=key,
        title=title,
        description=f"Over steps: {described}",
        size=(340, 180),
        margins=(48, 8, 16, 24),
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


def bias_chart(key: str, name: str, bias: Mapping[str, Mapping[Arm, tuple[float, float | None]]]) -> Chart:
    """Bars of one backbone: for each kind of word the mean of the caption map, before, in the control and after."""
    arms = [arm for arm in ARMS if any(arm in found for found in bias.values())]
    group = len(arms) + 1.4

    def draw(axes: Axes) -> None:
        for place, (kind, found) in enumerate(bias.items()):
            title = place * group
            axes.text(0, title, printable(KIND_LABELS.get(kind, kind)), fontsize=12, fontweight="bold", va="center")
            for row, arm in enumerate(arms, start=1):
                if arm not in found:
                    axes.text(0, title + row, "n/a", fontsize=11, va="center", color=light("muted"))
                    continue
                value, spread = found[arm]
                bars = axes.barh(title + row, min(max(value, 0), 1), height=0.8, color=light(arm))
                mark(bars[0], f"bar {arm}", f"{ARM_LABELS[arm]}: {number(value)}")
                if spread is not None:
                    axes.errorbar(value, title + row, xerr=spread, color=light("ink"), capsize=2, linewidth=1)
                axes.text(1.02, title + row, number(value), fontsize=11, va="center", color=light("ink"))
        axes.set_xlim(0, 1)
        axes.set_ylim(len(bias) * group - 0.7, -0.7)
        axes.set_yticks([])
        axes.set_xticks([0, 0.5, 1])
        axes.tick_params(length=0, labelsize=11)
        axes.spines["bottom"].set_visible(False)

    described = "; ".join(
        f"{KIND_LABELS.get(kind, kind)}: "
        + ", ".join(f"{ARM_LABELS[arm]} {number(v)}" for arm, (v, _) in found.items())
        for kind, found in bias.items()
    )
    return Chart(
        key=key,
        title=f"Bias of {name} by kind of word",
        description=f"Mean of the caption map inside the tags. {described}",
        size=(360, 34 + 18 * group * len(bias)),
        margins=(16, 6, 52, 26),
        draw=draw,
        legend=lambda: _bias_legend(arms),
        legend_columns=3,
    )


def _bias_legend(arms: Sequence[Arm]) -> list[Artist]:
    from matplotlib.patches import Patch

    return [Patch(facecolor=light(arm), label=ARM_LABELS[arm]) for arm in arms]
