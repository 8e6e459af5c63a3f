"""Inline SVG of a comparison: the trade-off of two figures, and the curves of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ttd_plugins.comparison.results import ARMS, Arm, BackboneResult, Comparison, Metric
from ttd_plugins.reports import page
from ttd_plugins.reports.comparison_findings import mean

SERIES = 8
"""Colours that the sheet knows; more backbones start again, and their numbers tell them apart."""
ARM_LABELS: dict[Arm, str] = {"before": "Before", "control": "Control", "after": "After TTD"}
DRAWN: tuple[Arm, ...] = ("before", "after", "control")
"""The dashes of the control go over the line of TTD, so that both are seen where they agree."""
LABEL_CHARACTERS = 26
SEED_POINTS = 80

Point = tuple[float, float]


def series(number: int) -> str:
    """Class of the backbone with this number, which gives its colour."""
    return f"s{number % SERIES}"


def shortened(name: str, most: int = LABEL_CHARACTERS) -> str:
    """A long name without its middle: both ends tell models apart."""
    if len(name) <= most:
        return name
    left = (most - 1) // 2
    return f"{name[:left]}…{name[left + 1 - most :]}"


@dataclass(frozen=True)
class Box:
    """A rectangle in SVG units."""

    left: float
    top: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """Shared area."""
        across = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        down = min(self.top + self.height, other.top + other.height) - max(self.top, other.top)
        return max(across, 0.0) * max(down, 0.0)


def place_labels(
    points: Sequence[Point], widths: Sequence[float], height: float, area: Box, taken: list[Box]
) -> list[Box]:
    """A box for the label of each point that overlaps no other label and nothing of ``taken`` where there is room.

    Places near the point are tried first. A label never leaves ``area``.
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


def trade_off_figures(comparison: Comparison) -> tuple[Metric, Metric] | None:
    """What TTD should raise and what it may cost; ``None`` where one of them is no column."""
    by_key = {figure.key: figure for figure in comparison.metrics}
    up, cost = (by_key.get(key) for key in comparison.trade_off)
    return (up, cost) if up is not None and cost is not None else None


def trade_off_points(backbone: BackboneResult, up: Metric, cost: Metric) -> dict[Arm, Point]:
    """Arm -> (cost, gain), mean over the seeds, where both are defined."""
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


def trade_off_chart(comparison: Comparison, width: int, height: int, *, names: bool) -> str:
    """The trade-off as SVG of ``width`` by ``height``; labels are numbers with the backbone's name where ``names``.

    Empty where no backbone has both figures.
    """
    axes = trade_off_figures(comparison)
    if axes is None:
        return ""
    up, cost = axes
    points = [trade_off_points(backbone, up, cost) for backbone in comparison.backbones]
    seeds: list[dict[Arm, list[Point]]] = [
        {arm: seed_points(backbone, arm, up, cost) for arm in ARMS if arm != "before"}
        for backbone in comparison.backbones
    ]
    everything = [point for found in points for point in found.values()]
    if not everything:
        return ""
    everything += [point for found in seeds for dots in found.values() for point in dots]
    left, right, top, bottom = 50, 16, 34, 46
    low_x, high_x = _padded([x for x, _ in everything])
    low_y, high_y = _padded([y for _, y in everything])
    x_ticks, y_ticks = _inner_ticks(low_x, high_x, 8 if names else 5), _inner_ticks(low_y, high_y, 8)

    def place(point: Point) -> Point:
        return (
            left + (width - left - right) * (point[0] - low_x) / (high_x - low_x),
            height - bottom - (height - top - bottom) * (point[1] - low_y) / (high_y - low_y),
        )

    drawn = []
    for tick in y_ticks:
        y = place((low_x, tick))[1]
        drawn.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text class="tick" x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in x_ticks:
        x = place((tick, low_y))[0]
        drawn.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
        drawn.append(
            f'<text class="tick" x="{x:.1f}" y="{height - bottom + 17}" text-anchor="middle">{tick:.4g}</text>'
        )
    drawn.append(f'<text class="axis" x="{left - 44}" y="17">{page.text(_axis(up, "↑", "↓"))}</text>')
    drawn.append(
        f'<text class="axis" x="{width - right}" y="{height - 8}" text-anchor="end">'
        f"{page.text(_axis(cost, '→', '←'))}</text>"
    )
    taken: list[Box] = []
    for number, (found, dots) in enumerate(zip(points, seeds, strict=True)):
        marks, boxes = _backbone_marks(found, dots, place, page.text(comparison.backbones[number].name))
        drawn.append(f'<g class="{series(number)}">{marks}</g>')
        taken += boxes
    labelled = [(number, found) for number, found in enumerate(points) if found]
    anchors = [place(found["after"] if "after" in found else next(iter(found.values()))) for _, found in labelled]
    texts = [
        f"{number + 1} {shortened(comparison.backbones[number].name)}" if names else str(number + 1)
        for number, _ in labelled
    ]
    area = Box(left + 2, top + 2, width - left - right - 4, height - top - bottom - 4)
    boxes = place_labels(anchors, [7.3 * len(text) + 4 for text in texts], 16, area, taken)
    for (number, _), (x, y), text, box in zip(labelled, anchors, texts, boxes, strict=True):
        near = (min(max(x, box.left), box.left + box.width), min(max(y, box.top), box.top + box.height))
        if math.dist(near, (x, y)) > 16:
            drawn.append(f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{near[0]:.1f}" y2="{near[1]:.1f}"/>')
        drawn.append(
            f'<text class="label {series(number)}" x="{box.left + 2:.1f}" y="{box.top + 12.5:.1f}">'
            f"{page.text(text)}</text>"
        )
    told = "; ".join(
        f"{comparison.backbones[number].name}: "
        + ", ".join(f"{ARM_LABELS[arm].lower()} {page.number(y)} at {page.number(x)}" for arm, (x, y) in found.items())
        for number, found in labelled
    )
    label = page.text(f"{up.label} against {cost.label}, mean over seeds. {told}")
    kind = "wide" if names else "narrow"
    head = f'<svg class="trade {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
    return f"{head}{''.join(drawn)}</svg>"


def _padded(values: Iterable[float]) -> tuple[float, float]:
    """The range of values with a margin."""
    known = list(values)
    low, high = min(known), max(known)
    margin = max(0.09 * (high - low), 0.02 * abs(high), 1e-3)
    return low - margin, high + margin


def _inner_ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` round numbers between ``low`` and ``high``, as many as there may be."""
    power = 10.0 ** math.floor(math.log10(high - low) - 1)
    for factor in (1, 2, 5, 10, 20, 50, 100):
        step = factor * power
        first, last = math.ceil(low / step), math.floor(high / step)
        if last - first < most:
            return [round(n * step, 12) for n in range(first, last + 1)]
    raise AssertionError("a step of ten times the range has at most one tick")


def _axis(figure: Metric, more: str, less: str) -> str:
    arrow = {"higher": f"{more} better", "lower": f"{less} better", None: more}[figure.better]
    return f"{figure.label[:1].upper()}{figure.label[1:]}, {arrow}"


def _backbone_marks(
    found: Mapping[Arm, Point], dots: Mapping[Any, Sequence[Point]], place: Callable[[Point], Point], name: str
) -> tuple[str, list[Box]]:
    """Seeds, arrows and the marks of the arms of one backbone, and the boxes that labels should leave free."""
    parts, boxes = [], []
    at = {arm: place(point) for arm, point in found.items()}
    for arm, values in dots.items():
        # A lone seed is the mean itself.
        for x, y in map(place, values if len(values) > 1 else []):
            parts.append(f'<circle class="dot {arm}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>')
            boxes.append(Box(x - 3, y - 3, 6, 6))
    for arm in ARMS[:2]:
        if arm in at and "after" in at:
            parts.append(_arrow(at[arm], at["after"], arm))
    for arm, (x, y) in at.items():
        across, up = map(page.number, found[arm])
        title = f"<title>{name}, {ARM_LABELS[arm].lower()}: {up} at {across}</title>"
        if arm == "control":
            parts.append(
                f'<rect class="mark control" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10">{title}</rect>'
            )
        else:
            parts.append(f'<circle class="mark {arm}" cx="{x:.1f}" cy="{y:.1f}" r="6">{title}</circle>')
        boxes.append(Box(x - 7, y - 7, 14, 14))
    for arm in ARMS[:2]:
        if arm in at and "after" in at:
            (x1, y1), (x2, y2) = at[arm], at["after"]
            for share in np.linspace(0.15, 0.85, 8):
                boxes.append(Box(x1 + share * (x2 - x1) - 3, y1 + share * (y2 - y1) - 3, 6, 6))
    return "".join(parts), boxes


def _arrow(start: Point, end: Point, arm: str) -> str:
    """An arrow from mark to mark; none where they touch."""
    length = math.dist(start, end)
    if length < 18:
        return ""
    dx, dy = (end[0] - start[0]) / length, (end[1] - start[1]) / length
    x1, y1 = start[0] + 7 * dx, start[1] + 7 * dy
    tip = end[0] - 8 * dx, end[1] - 8 * dy
    base = tip[0] - 8 * dx, tip[1] - 8 * dy
    head = " ".join(
        f"{x:.1f},{y:.1f}" for x, y in (tip, (base[0] - 4 * dy, base[1] + 4 * dx), (base[0] + 4 * dy, base[1] - 4 * dx))
    )
    return (
        f'<line class="way {arm}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{base[0]:.1f}" y2="{base[1]:.1f}"/>'
        f'<polygon class="head" points="{head}"/>'
    )


def curve_keys(comparison: Comparison) -> list[str]:
    """What the curves record but for the step, ``loss`` first, in the order in which they are met."""
    keys: dict[str, None] = {}
    for backbone in comparison.backbones:
        for runs in backbone.curves.values():
            for run in runs:
                for row in run[:1] + run[-1:]:
                    keys.update(dict.fromkeys(row))
    keys.pop("step", None)
    return sorted(keys, key=lambda key: key != "loss")


def curve_lines(backbone: BackboneResult, key: str) -> dict[Arm, list[list[Point]]]:
    """Arm -> for each seed its (step, value), finite ones only."""
    found: dict[Arm, list[list[Point]]] = {}
    for arm, runs in backbone.curves.items():
        lines = [
            [(row["step"], row[key]) for row in run if key in row and math.isfinite(row[key]) and "step" in row]
            for run in runs
        ]
        if any(lines):
            found[arm] = [line for line in lines if line]
    return found


def mean_line(lines: Sequence[Sequence[Point]]) -> list[Point]:
    """Mean over seeds at every step that all of them have; where there is none, over those that have the step."""
    by_step: dict[float, list[float]] = {}
    for line in lines:
        for step, value in line:
            by_step.setdefault(step, []).append(value)
    most = max(map(len, by_step.values()), default=0)
    return [(step, float(np.mean(values))) for step, values in sorted(by_step.items()) if len(values) == most]


def curve_chart(title: str, lines: Mapping[Arm, Sequence[Sequence[Point]]], limits: Point | None = None) -> str:
    """Curves of one figure of one backbone as SVG; ``limits`` gives a scale that charts share."""
    width, height = 340, 180
    left, right, top, bottom = 46, 10, 10, 24
    values = [value for runs in lines.values() for run in runs for _, value in run]
    steps = [step for runs in lines.values() for run in runs for step, _ in run]
    ticks = page.ticks(*(limits or (min(values), max(values))))
    first, last = min(steps), max(steps)

    def points(line: Sequence[Point]) -> str:
        return " ".join(
            f"{left + (width - left - right) * (step - first) / max(last - first, 1):.1f},"
            f"{height - bottom - (height - top - bottom) * (value - ticks[0]) / (ticks[-1] - ticks[0]):.1f}"
            for step, value in line
        )

    drawn = []
    for tick in ticks:
        y = height - bottom - (height - top - bottom) * (tick - ticks[0]) / (ticks[-1] - ticks[0])
        drawn.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        )
    drawn.append(
        f'<text class="tick" x="{left}" y="{height - 6}">step {first:g}</text>'
        f'<text class="tick" x="{width - right}" y="{height - 6}" text-anchor="end">{last:g}</text>'
    )
    told = []
    for arm in DRAWN:
        runs = lines.get(arm, [])
        drawn += [f'<polyline class="raw {arm}" points="{points(page.thinned(run, SEED_POINTS))}"/>' for run in runs]
        if runs:
            middle = page.running_mean(page.thinned(mean_line(runs)))
            drawn.append(f'<polyline class="mean {arm}" points="{points(middle)}"/>')
            told.append(f"{ARM_LABELS[arm]} from {middle[0][1]:.4g} to {middle[-1][1]:.4g}")
    label = page.text(f"{title} over steps: {', '.join(told)}")
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'
