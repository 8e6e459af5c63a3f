"""Quality against cost in the report of a comparison: a chart, a table and the choice."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ttd_plugins.comparison.choice import Choice, choose, memory_text, quality_text, speed_text
from ttd_plugins.comparison.results import BackboneResult, Comparison
from ttd_plugins.reports.charts import Chart, chart_svg, mark, pixels, unit_coordinates
from ttd_plugins.reports.comparison_charts import Box, place_labels, vertical_label
from ttd_plugins.reports.comparison_findings import mean
from ttd_plugins.reports.formatting import capitalised, number, one_line, shortened
from ttd_plugins.reports.palette import light, series_role

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def choice_view(comparison: Comparison) -> dict[str, Any] | None:
    """The section of the page; ``None`` if there is nothing to choose from."""
    choice = choose(comparison)
    if choice is None:
        return None
    rows = [
        {
            "backbone": n,
            "quality": quality_text(backbone, choice.arm, choice.metric.key) if _quality(backbone, choice) else "n/a",
            "speed": speed_text(backbone.cost["images_per_second"]) if backbone.cost else "n/a",
            "memory": memory_text(backbone.cost["memory_bytes"]) if backbone.cost else "n/a",
            "roles": _roles(backbone.name, choice),
        }
        for n, backbone in enumerate(comparison.backbones)
    ]
    charts = [cost_chart(comparison, choice, narrow=narrow) for narrow in (False, True)]
    return {
        "sentences": choice.sentences,
        "metric": choice.metric,
        "rows": rows,
        "batch": next((int(b.cost["batch"]) for b in comparison.backbones if "batch" in b.cost), None),
        "wide": None if charts[0] is None else chart_svg(charts[0]),
        "narrow": None if charts[1] is None else chart_svg(charts[1]),
    }


def _roles(name: str, choice: Choice) -> str:
    roles = {"chosen": choice.chosen, "best": choice.best, "cheapest": choice.cheapest}
    return ", ".join(role for role, backbone in roles.items() if backbone == name)


def _quality(backbone: BackboneResult, choice: Choice) -> float | None:
    return mean(backbone, choice.arm, choice.metric.key)


def cost_chart(comparison: Comparison, choice: Choice | None = None, *, narrow: bool = False) -> Chart | None:
    """Quality against images per second, with the memory as the size of the mark; ``None`` without known cost.

    Args:
        comparison: what is drawn.
        choice: the result of :func:`~ttd_plugins.comparison.choice.choose`; by default it is computed.
        narrow: for a phone: smaller, and labels are the backbones' numbers without their names.
    """
    choice = choose(comparison) if choice is None else choice
    if choice is None:
        return None
    points = [
        (n, backbone, backbone.cost["images_per_second"], value)
        for n, backbone in enumerate(comparison.backbones)
        if backbone.cost.get("images_per_second") and (value := _quality(backbone, choice)) is not None
    ]
    if not points:
        return None
    metric, most = choice.metric, max(backbone.cost["memory_bytes"] for _, backbone, _, _ in points)

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

        speeds, values = [speed for *_, speed, _ in points], [value for *_, value in points]
        axes.set_xscale("log")
        low, high = min(speeds) / 1.6, max(speeds) * 1.6
        axes.set_xlim(low, high)
        margin = max(0.15 * (max(values) - min(values)), 0.01)
        axes.set_ylim(min(values) - margin, max(values) + margin)
        # A range below a power of ten would have no label.
        ticks = [float(f"{low * (high / low) ** (share / 10):.2g}") for share in (1, 3, 5, 7, 9)]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        named: dict[str, Any] = {"fontsize": 13, "fontweight": "bold", "color": light("ink")}
        axes.set_title(vertical_label(metric), loc="left", x=-0.06 if axes.bbox.width > 400 else -0.14, pad=12, **named)
        axes.set_xlabel("Images/s, higher is better →", loc="right", labelpad=6, **named)
        places, sides = [], []
        for n, backbone, speed, value in points:
            colour = light(series_role(n))
            side = 8 + 14 * math.sqrt(backbone.cost["memory_bytes"] / most)
            what = (
                f"{backbone.name}: {number(value)} at {speed_text(speed)}, {memory_text(backbone.cost['memory_bytes'])}"
            )
            face = colour if backbone.name == choice.chosen else light("card")
            drawn = axes.scatter(speed, value, s=side**2, facecolor=face, edgecolor=colour, linewidths=2.2, zorder=3)
            mark(drawn, "mark cost", what)
            places.append(pixels(axes, (speed, value)))
            sides.append(side)
        texts = [str(n + 1) if narrow else f"{n + 1} {shortened(one_line(b.name))}" for n, b, _, _ in points]
        inside, units = axes.bbox, unit_coordinates(axes)
        area = Box(inside.x0 + 2, inside.y0 + 2, inside.width - 4, inside.height - 4)
        taken = [Box(x - s / 2, y - s / 2, s, s) for (x, y), s in zip(places, sides, strict=True)]
        for (n, *_), text, box in zip(
            points, texts, place_labels(places, [7.6 * len(t) + 6 for t in texts], 18, area, taken), strict=True
        ):
            label = axes.annotate(
                text, xy=(box.left + box.width / 2, box.top + box.height / 2), xycoords=units, ha="center", va="center",
                fontsize=12, fontweight="bold", color=light(series_role(n)), zorder=4,
            )  # fmt: skip
            mark(label, "label")

    described = "; ".join(
        f"{b.name}: {number(value)} at {speed_text(speed)} and {memory_text(b.cost['memory_bytes'])}"
        for _, b, speed, value in points
    )
    return Chart(
        key="cost-narrow" if narrow else "cost",
        title=f"{capitalised(metric.label)} against images per second",
        description=f"Mean over seeds. {described}",
        size=(360, 300) if narrow else (760, 360),
        margins=(50, 34, 16, 46),
        draw=draw,
    )
