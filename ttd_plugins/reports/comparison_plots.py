"""The plots of a comparison as PNG files: the trade-off, the gains, and the curves of training."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttd_plugins.comparison.results import ARMS, Arm, Comparison
from ttd_plugins.errors import MissingDependencyError, one_sentence
from ttd_plugins.reports import page
from ttd_plugins.reports.comparison_charts import (
    ARM_LABELS,
    DRAWN,
    curve_keys,
    curve_lines,
    mean_line,
    seed_points,
    shortened,
    trade_off_figures,
    trade_off_points,
)
from ttd_plugins.reports.comparison_findings import change
from ttd_plugins.reports.heatmaps import printable, save_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

DOTS_PER_INCH = 150
_COLOURS = ("#0b62a4", "#b8430d", "#00755d", "#87479f", "#856400", "#b81f5b", "#4a5a6a", "#6b4420")
_MARKERS = "osD^vPX*"
_INK, _MUTED, _LINE = "#1f1d1a", "#625c54", "#e2dcd3"
_ARM_COLOURS = {"before": "#8a837a", "control": "#2b6cb0", "after": "#b8430d"}


def draw_comparison_plots(folder: Path, comparison: Comparison) -> list[Path]:
    """Draw ``trade-off.png``, ``gains.png`` and ``curves.png`` into ``folder``; what has no data is left out.

    The trade-off has an arrow from before and a dashed one from the control to after, and a dot for each seed. Gains
    are after minus the control (before where no control was run), mean and sample standard deviation over seeds.

    Returns:
        the files that were written.

    Raises:
        InputError: a file cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure as Drawing
    except ImportError as error:
        raise MissingDependencyError(
            f"plots are drawn with matplotlib ({one_sentence(error)}); install it with: pip install 'ttd-plugins[demo]'"
        ) from error
    written = []
    drawings = {"trade-off": _trade_off, "gains": _gains, "curves": _curves}
    for name, draw in drawings.items():
        drawing = Drawing(dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
        if not draw(drawing, comparison):
            continue
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            # A script that no installed font covers is drawn as boxes; that is all that can be shown of it.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            drawing.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
        path = folder / f"{name}.png"
        save_bytes(path, buffer.getvalue())
        written.append(path)
    return written


def _title(axes: Axes, text: str) -> None:
    axes.set_title(printable(text), fontsize=10, loc="left", color=_INK, parse_math=False)


def _bare(axes: Axes) -> None:
    axes.grid(color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=8.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_LINE)


def _trade_off(drawing: Drawing, comparison: Comparison) -> bool:
    from matplotlib.lines import Line2D

    figures = trade_off_figures(comparison)
    if figures is None:
        return False
    up, cost = figures
    found = [trade_off_points(backbone, up, cost) for backbone in comparison.backbones]
    if not any(found):
        return False
    drawing.set_size_inches(8, 5.2)
    axes = drawing.subplots()
    _bare(axes)
    handles = []
    for number, (backbone, points) in enumerate(zip(comparison.backbones, found, strict=True)):
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        for arm in ARMS[1:]:
            dots = seed_points(backbone, arm, up, cost)
            if len(dots) > 1:
                axes.scatter([x for x, _ in dots], [y for _, y in dots], s=9, color=colour, alpha=0.45, linewidths=0)
        for arm in ARMS[:2]:
            if arm in points and "after" in points:
                axes.annotate(
                    "",
                    xy=points["after"],
                    xytext=points[arm],
                    arrowprops={
                        "arrowstyle": "-|>",
                        "color": colour,
                        "linestyle": "-" if arm == "before" else (0, (4, 3)),
                        "shrinkA": 5,
                        "shrinkB": 6,
                        "linewidth": 1.6 if arm == "before" else 1.2,
                    },
                )
        for arm, point in points.items():
            face = {"before": "white", "control": _LINE, "after": colour}[arm]
            axes.scatter(
                point[0], point[1], s=60, marker=marker, facecolor=face, edgecolor=colour, linewidths=1.7, zorder=3
            )
        name = f"{number + 1} {shortened(printable(backbone.name), 36)}".replace("$", r"\$")
        handles.append(Line2D([], [], marker=marker, color=colour, linestyle="", label=name))
    for label, face in (("before", "white"), ("control", _LINE), ("after TTD", _MUTED)):
        if any(label.partition(" ")[0] in points for points in found):
            handles.append(
                Line2D([], [], marker="o", markerfacecolor=face, markeredgecolor=_MUTED, linestyle="", label=label)
            )
    ways: tuple[tuple[Arm, str, Any], ...] = ((ARMS[0], "from before", "-"), (ARMS[1], "from the control", (0, (3, 2))))
    for arm, label, style in ways:
        if any(arm in points and "after" in points for points in found):
            handles.append(Line2D([], [], color=_MUTED, linestyle=style, label=label))
    axes.margins(0.1)
    axes.set_xlabel(printable(cost.label), color=_INK, parse_math=False)
    axes.set_ylabel(printable(up.label), color=_INK, parse_math=False)
    drawing.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8.5, labelcolor=_INK)
    return True


def _gains(drawing: Drawing, comparison: Comparison) -> bool:
    judged = [figure for figure in comparison.metrics if figure.better is not None]
    tuned = [(n, backbone) for n, backbone in enumerate(comparison.backbones) if backbone.metrics.get("after")]
    gains = {figure.key: [change(backbone, figure) for _, backbone in tuned] for figure in judged}
    judged = [figure for figure in judged if any(gains[figure.key])]
    if not judged:
        return False
    columns = min(len(judged), 2 if len(tuned) > 5 else 3)
    rows = math.ceil(len(judged) / columns)
    drawing.set_size_inches(3.6 * columns + 1.4, rows * (0.75 + 0.3 * len(tuned)) + 0.5)
    grid = drawing.subplots(rows, columns, squeeze=False, sharey=True)
    names = [f"{n + 1} {shortened(printable(backbone.name), 24)}".replace("$", r"\$") for n, backbone in tuned]
    for axes, figure in zip(grid.flat, judged, strict=False):
        _bare(axes)
        axes.axvline(0, color=_INK, linewidth=1)
        _title(axes, f"{figure.label} ({figure.better} is better)")
        for place, ((number, _), found) in enumerate(zip(tuned, gains[figure.key], strict=True)):
            if found is None:
                axes.text(0, place, " n/a", va="center", fontsize=8, color=_MUTED)
                continue
            sure = found.verdict in ("better", "worse")
            colour = _COLOURS[number % len(_COLOURS)]
            axes.barh(
                place, found.mean, height=0.62, color=colour if sure else "white", edgecolor=colour, linewidth=1.2
            )
            if found.spread is not None:
                axes.errorbar(found.mean, place, xerr=found.spread, color=_INK, capsize=3, linewidth=1.1)
        axes.set_yticks(range(len(tuned)), names, fontsize=8.5, color=_INK)
        axes.set_ylim(len(tuned) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=5)
    for axes in list(grid.flat)[len(judged) :]:
        axes.set_visible(False)
    baselines = {found.baseline for values in gains.values() for found in values if found is not None}
    against = (
        "the control" if baselines == {"control"} else "before" if baselines == {"before"} else "control or before"
    )
    drawing.suptitle(
        f"After TTD minus {against}: mean and spread over seeds; open bars: within the spread, or below {page.TIE}",
        fontsize=9,
        color=_MUTED,
    )
    return True


def _curves(drawing: Drawing, comparison: Comparison) -> bool:
    from matplotlib.lines import Line2D

    wanted = [key for key in ("loss", "contrastive", "tag", "distill") if key in curve_keys(comparison)]
    lines = {
        (n, key): found
        for n, backbone in enumerate(comparison.backbones)
        for key in wanted
        if (found := curve_lines(backbone, key))
    }
    shown: Sequence[int] = sorted({n for n, _ in lines})
    wanted = [key for key in wanted if any(key == other for _, other in lines)]
    if not lines:
        return False
    drawing.set_size_inches(3.0 * len(wanted) + 0.4, 1.9 * len(shown) + 0.5)
    grid = drawing.subplots(len(shown), len(wanted), squeeze=False)
    for row, number in enumerate(shown):
        for column, key in enumerate(wanted):
            axes = grid[row][column]
            runs_by_arm = lines.get((number, key))
            if runs_by_arm is None:
                axes.set_visible(False)
                continue
            _bare(axes)
            for arm in DRAWN:
                runs = runs_by_arm.get(arm, [])
                style: Any = (0, (4, 2)) if arm == "control" else "-"
                for run in runs:
                    axes.plot(*zip(*run, strict=True), color=_ARM_COLOURS[arm], alpha=0.25, linewidth=0.7)
                if runs:
                    middle = page.running_mean(page.thinned(mean_line(runs)))
                    axes.plot(*zip(*middle, strict=True), color=_ARM_COLOURS[arm], linewidth=1.8, linestyle=style)
            _title(axes, f"{shortened(printable(comparison.backbones[number].name), 24)}: {key}")
    handles = [
        Line2D([], [], color=_ARM_COLOURS[arm], linestyle="--" if arm == "control" else "-", label=ARM_LABELS[arm])
        for arm in ARMS[1:]
    ]
    drawing.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=8.5)
    return True
