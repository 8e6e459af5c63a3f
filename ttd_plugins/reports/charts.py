"""Charts: matplotlib draws each once, and the drawing goes into a PNG file or into a page as SVG.

In a page the colours are CSS variables and the font is the page's, so that a chart follows the dark scheme and prints.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ttd_plugins.reports.formatting import one_line
from ttd_plugins.reports.heat_overlay import missing_matplotlib
from ttd_plugins.reports.palette import PALETTE, light
from ttd_plugins.utils.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

UNITS_PER_INCH = 72
"""A chart's unit is a CSS pixel on the page and a point (1/72 inch) in a file."""
PNG_DOTS_PER_INCH = 150
_TITLE_HEIGHT = 22
_ROLES = {colours[0]: role for role, colours in PALETTE.items()}
# Fonts that cover other scripts; matplotlib looks into those that are installed where DejaVu Sans lacks a glyph.
_FALLBACK_FONTS = (
    "Noto Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Emoji",
    "Segoe UI Emoji",
    "Symbola",
    "Arial Unicode MS",
)
# matplotlib's settings are global.
_DRAWING = threading.RLock()


@dataclass(frozen=True)
class Chart:
    """One pair of axes and how to draw on it.

    Attributes:
        key: unique on a page; prefix of the ids in the SVG.
        title: what the chart shows.
        description: the data in words, for readers who do not see the chart.
        size: width and height in units of :data:`UNITS_PER_INCH`, without the title of a PNG and without the legend.
        margins: left, top, right and bottom between the edge and the axes, in the same units.
        draw: draws on axes whose position is final, so that it may measure in units.
        legend: makes the legend's handles; the legend stands below the chart.
        legend_columns: columns of the legend.
        legend_height: height of the legend in units.
    """

    key: str
    title: str
    description: str
    size: tuple[float, float]
    margins: tuple[float, float, float, float]
    draw: Callable[[Axes], None]
    legend: Callable[[], Sequence[Artist]] | None = None
    legend_columns: int = 5
    legend_height: float = 30


def chart_svg(chart: Chart, *, legend: bool = True) -> Markup:
    """The chart as inline SVG: accessible, deterministic, and coloured by the page's CSS variables.

    Args:
        chart: what is drawn.
        legend: whether to draw its legend; a page with many such charts explains the colours once.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    width, height = chart.size
    height += chart.legend_height if legend and chart.legend else 0
    with drawing_style(chart.key):
        figure = _new_figure(width, height)
        _draw_chart(figure, chart, (0, 0))
        if legend:
            _draw_legend(figure, chart)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline_svg(buffer.getvalue(), chart, (width, height))


def write_chart_sheet(
    path: Path, charts: Sequence[Chart], *, columns: int = 1, titles: bool = True, heading: str = ""
) -> None:
    """Write charts of one size as one PNG, row by row.

    Args:
        path: the file to write.
        charts: one or more.
        columns: charts in a row.
        titles: whether each chart has its title above it.
        heading: text above all charts.

    Raises:
        InputError: the file cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    columns = min(columns, len(charts))
    rows = -(-len(charts) // columns)
    width, height = charts[0].size
    above = _TITLE_HEIGHT if titles else 0
    top = 26 if heading else 4
    # One legend serves all charts.
    bottom = charts[0].legend_height if charts[0].legend else 4
    with drawing_style("sheet"):
        figure = _new_figure(columns * width, top + rows * (height + above) + bottom)
        for number, chart in enumerate(charts):
            left, down = number % columns * width, top + number // columns * (height + above) + above
            axes = _draw_chart(figure, chart, (left, down))
            if titles:
                axes.set_title(one_line(chart.title), x=0, loc="left", fontsize=11.5, color=light("ink"))
        if heading:
            height = figure.get_size_inches()[1] * UNITS_PER_INCH
            figure.text(0.01, 1 - 16 / height, heading, fontsize=11.5, color=light("muted"))
        _draw_legend(figure, charts[0])
        write_atomic(path, figure_png(figure))


def figure_png(figure: Figure, dots_per_inch: float = PNG_DOTS_PER_INCH) -> bytes:
    """A matplotlib drawing as the bytes of a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Scripts that no installed font covers are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", dpi=dots_per_inch, facecolor="white")
    return buffer.getvalue()


@contextmanager
def drawing_style(salt: str = "") -> Iterator[None]:
    """Draw with fixed settings of matplotlib; the user's settings are neither used nor changed.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context, rcParamsDefault
    except ImportError as error:
        raise missing_matplotlib(error) from error

    ink, muted, line = light("ink"), light("muted"), light("line")
    settings: dict[Any, Any] = {
        "axes.axisbelow": True,
        "axes.edgecolor": line,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": ink,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.family": list(font_families()),
        "font.size": 12,
        "grid.color": line,
        "grid.linewidth": 1,
        "legend.frameon": False,
        "legend.labelcolor": muted,
        "svg.fonttype": "none",
        "svg.hashsalt": f"ttd-plugins {salt}",
        "text.color": ink,
        # A caption or a name may contain dollar signs, which are not mathematics.
        "text.parse_math": False,
        "text.usetex": False,
        "xtick.color": line,
        "xtick.labelcolor": muted,
        "ytick.color": line,
        "ytick.labelcolor": muted,
    }
    defaults: dict[Any, Any] = {
        key: value for key, value in rcParamsDefault.items() if not key.startswith(("backend", "savefig."))
    }
    with _DRAWING, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        with rc_context({**defaults, **settings}):
            yield


def mark(artist: Artist, kind: str, tooltip: str = "") -> None:
    """Name what an artist shows: its group in the SVG gets the class ``chart-{kind}`` and a tooltip."""
    artist.set_gid(f"{kind}|{one_line(tooltip)}")


def pixels(axes: Axes, point: tuple[float, float]) -> tuple[float, float]:
    """The position of a data point in units from the lower left corner of the whole drawing."""
    x, y = axes.transData.transform(point)
    return float(x), float(y)


def unit_coordinates(axes: Axes) -> Transform:
    """The coordinates of :func:`pixels` as a transform for matplotlib's artists."""
    from matplotlib.transforms import Affine2D

    assert axes.figure is not None
    return Affine2D().scale(1 / UNITS_PER_INCH) + axes.figure.dpi_scale_trans


@cache
def font_families() -> tuple[str, ...]:
    """DejaVu Sans, and the installed fonts that cover other scripts."""
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return ("DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in installed))


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    # At this resolution a pixel is a unit.
    return Figure(figsize=(width / UNITS_PER_INCH, height / UNITS_PER_INCH), dpi=UNITS_PER_INCH, facecolor="white")


def _draw_chart(figure: Figure, chart: Chart, corner: tuple[float, float]) -> Axes:
    """Draw a chart; ``corner`` is its upper left corner, in units from that of the whole drawing."""
    width, height = (float(size * UNITS_PER_INCH) for size in figure.get_size_inches())
    left, top, right, bottom = chart.margins
    axes = figure.add_axes(
        (
            (corner[0] + left) / width,
            1 - (corner[1] + chart.size[1] - bottom) / height,
            (chart.size[0] - left - right) / width,
            (chart.size[1] - top - bottom) / height,
        )
    )
    chart.draw(axes)
    return axes


def _draw_legend(figure: Figure, chart: Chart) -> None:
    if chart.legend is not None:
        figure.legend(
            handles=list(chart.legend()),
            loc="lower center",
            ncols=chart.legend_columns,
            fontsize=11.5,
            handletextpad=0.5,
            columnspacing=1.4,
            borderaxespad=0.2,
        )


# SVG for pages --------------------------------------------------------------------------------------------------------

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


def _inline_svg(text: str, chart: Chart, size: tuple[float, float]) -> Markup:
    """Matplotlib's SVG made fit for a page: unique ids, no metadata, no fonts, colours as CSS variables."""
    root = ElementTree.fromstring(text)
    used = {value.lstrip("#") for element in root.iter() for key, value in element.items() if key == _LINK}
    used |= set(re.findall(r"url\(#([^)]+)\)", text))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.text = element.text.strip() if element.tag in ("text", "title") and element.text else None
        element.tail = None
        _clean_attributes(element, used, chart.key)
    width, height = size
    root.attrib.clear()
    label = one_line(f"{chart.title}. {chart.description}")
    root.attrib.update({"class": "chart", "viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": label})
    root.set("style", f"--width: {width:g}px")
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _clean_attributes(element: ElementTree.Element, used: set[str], prefix: str) -> None:
    attributes = dict(element.attrib)
    element.attrib.clear()
    for key, value in attributes.items():
        if key == "id" and "|" in value:
            kind, _, tooltip = value.partition("|")
            element.set("class", f"chart-{kind}")
            if tooltip:
                title = ElementTree.Element("title")
                title.text = tooltip
                element.insert(0, title)
        elif key == "id":
            if value in used:
                element.set("id", f"{prefix}-{value}")
        elif key == _LINK:
            element.set("xlink:href", f"#{prefix}-{value[1:]}")
        elif key == "style":
            element.set("style", _page_style(value))
        elif key == "clip-path":
            element.set(key, value.replace("url(#", f"url(#{prefix}-"))
        else:
            element.set(key, re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}", " ".join(value.split())))


def _page_style(style: str) -> str:
    """Declarations with the page's font and with CSS variables for colours."""
    kept = []
    for declaration in style.split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font":  # the shorthand of older versions: weight, size and family
            size = re.search(r"[\d.]+px", value)
            kept += [f"font-size: {size[0]}"] if size else []
            kept += ["font-weight: 700"] if re.match(r"(bold|700)\b", value) else []
        elif key and key != "font-family":
            kept.append(f"{key}: {f'var(--{_ROLES[value]})' if value in _ROLES else value}")
    return "; ".join(kept)
