"""Similarity maps of a caption and its tags as one PNG file."""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttd_plugins.errors import InputError
from ttd_plugins.reports.charts import drawing_style, figure_png, font_families
from ttd_plugins.reports.formatting import one_line, plural
from ttd_plugins.reports.heat_overlay import COLOUR_MAP, overlay
from ttd_plugins.reports.palette import light
from ttd_plugins.utils.deprecation import renamed_names
from ttd_plugins.utils.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ttd_plugins.engine import CaptionMaps

MAX_TAGS = 30
MAX_CAPTION_LINES = 8
DOTS_PER_INCH = 110
MAX_PIXELS = 24_000_000
"""Pixels of a PNG of a large photograph or of many maps."""

# Lengths in inches.
_PANEL = 2.0
_GAP = 0.14
_PAIR_GAP = 0.2
_MARGIN = 0.22
_TITLE = 0.46
_LINE = 0.19
_BAR = 0.34

_SELECTED = "#0f766e"
_REJECTED = "#a8a29e"


@dataclass(frozen=True)
class _Panel:
    """One image with two lines of text above it and a frame."""

    title: str
    note: str
    image: NDArray[np.uint8]
    frame: str = light("muted")
    dashed: bool = False


def draw_maps(
    maps: CaptionMaps | Sequence[CaptionMaps],
    path: Path,
    *,
    after: CaptionMaps | None = None,
    image: NDArray[np.uint8] | None = None,
) -> None:
    """Draw the maps of one image and its captions as one PNG.

    The first row shows the image, the caption map and the union of the selected tags' maps, which is the target of the
    caption map. Then follows each tag's map with its score and its selection. Every map is min-max normalised over its
    patches: colours show where, not how much. The notes state the range of cosines. At most :data:`MAX_TAGS` tags are
    drawn, those with the highest scores, and the PNG states how many are left out.

    Args:
        maps: the maps, or those of several captions, drawn one below the other; those before training if ``after`` is
            passed.
        path: the file to write.
        after: maps of the same image, caption and tags after training, drawn beside the others.
        image: uint8 ``[height, width, 3]``, the photograph itself. Panels then have its aspect ratio, and its
            resolution unless the PNG would have more than :data:`MAX_PIXELS`. By default the input of the network.

    Raises:
        InputError: ``path`` cannot be written, there are no maps, or ``after`` has another caption or other tags.
        MissingDependencyError: matplotlib is not installed.
    """
    several = list(maps) if isinstance(maps, Sequence) else [maps]
    if not several:
        raise InputError("there are no maps to draw")
    if after is not None and (len(several) > 1 or (after.caption, after.tags) != (several[0].caption, several[0].tags)):
        raise InputError("the maps before and after must be of one caption and the same tags")
    dots: float = DOTS_PER_INCH
    size = None if image is None else image.shape[:2]
    with drawing_style("maps"):
        if image is not None:
            dots = _resolution([_layout(one, after, size) for one in several], image)
            shrunk = _shrunk(image, dots * _PANEL)
            several = [replace(one, image=shrunk) for one in several]
            after = after and replace(after, image=shrunk)
        parts = [figure_png(_draw(one, after, size), dots) for one in several]
        write_atomic(path, parts[0] if len(parts) == 1 else _stacked(parts))


def maps_figure(maps: CaptionMaps, *, after: CaptionMaps | None = None) -> Figure:
    """Return the drawing of :func:`draw_maps` as a ``matplotlib.figure.Figure``.

    Raises:
        InputError: ``after`` has another caption or other tags.
        MissingDependencyError: matplotlib is not installed.
    """
    if after is not None and (after.caption, after.tags) != (maps.caption, maps.tags):
        raise InputError("the maps before and after must be of one caption and the same tags")
    with drawing_style("maps"):
        return _draw(maps, after)


def _resolution(layouts: Sequence[_Layout], image: NDArray[np.uint8]) -> float:
    """Dots per inch at which a panel has the pixels of the image, within :data:`MAX_PIXELS` of the whole PNG."""
    inches = sum(layout.size[0] * layout.size[1] for layout in layouts)
    wanted = image.shape[1] / _PANEL
    return max(DOTS_PER_INCH, min(wanted, math.sqrt(MAX_PIXELS / inches)))


def _shrunk(image: NDArray[np.uint8], width: float) -> NDArray[np.uint8]:
    height, own = image.shape[:2]
    if own <= math.ceil(width):
        return image
    size = (math.ceil(width), max(round(height * width / own), 1))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _stacked(parts: Sequence[bytes]) -> bytes:
    """PNGs of equal width below each other."""
    images = [Image.open(io.BytesIO(part), formats=("PNG",)).convert("RGB") for part in parts]
    whole = Image.new("RGB", (max(one.width for one in images), sum(one.height for one in images)), "white")
    top = 0
    for one in images:
        whole.paste(one, (0, top))
        top += one.height
    buffer = io.BytesIO()
    whole.save(buffer, format="PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class _Layout:
    """Where the parts of the drawing of one caption are, in inches.

    Attributes:
        shown: indices of the tags that are drawn.
        lefts: left edges of the columns.
        top: height above the rows.
        panel_height: height of a panel without its title.
        heading, footing: lines of text.
        size: width and height of the whole.
    """

    shown: list[int]
    lefts: list[float]
    top: float
    panel_height: float
    heading: list[str]
    footing: list[str]
    size: tuple[float, float]

    @property
    def row_height(self) -> float:
        return _TITLE + self.panel_height + _GAP


def _layout(maps: CaptionMaps, after: CaptionMaps | None, size: tuple[int, ...] | None) -> _Layout:
    """Place the parts; ``size`` is (height, width) of the image where it is not that of the maps."""
    shown = _tags_to_show(maps)
    columns = 6 if after is not None else 5
    # Before and after of one map stand closer than two different maps.
    lefts = [_MARGIN + n * (_PANEL + _GAP) + (n // 2 * _PAIR_GAP if after is not None else 0) for n in range(columns)]
    rows = 1 + math.ceil(len(shown) * (1 if after is None else 2) / columns)
    height, width = size or maps.image.shape[:2]
    panel_height = min(max(_PANEL * height / width, 0.3 * _PANEL), 2 * _PANEL)
    line_characters = round(columns * _PANEL * 10.5)
    heading = _wrap(one_line(maps.caption) or "(empty caption)", line_characters, MAX_CAPTION_LINES)
    footing = _wrap(_remarks(maps, after, hidden=len(maps.tags) - len(shown)), round(line_characters * 1.25), 5)
    top = _MARGIN + 1.4 * _LINE * len(heading) + _GAP
    bottom = _MARGIN + _LINE * len(footing) + _BAR
    whole = (lefts[-1] + _PANEL + _MARGIN, top + rows * (_TITLE + panel_height + _GAP) + bottom)
    return _Layout(shown, lefts, top, panel_height, heading, footing, whole)


def _draw(maps: CaptionMaps, after: CaptionMaps | None, size: tuple[int, ...] | None = None) -> Figure:
    """Draw one caption; ``size`` is (height, width) of the image where the panels have fewer pixels."""
    from matplotlib.figure import Figure

    layout = _layout(maps, after, size)
    overview: list[_Panel | None] = [*_overview(maps, after, size)]
    if after is not None:
        overview.insert(1, None)
    details: list[_Panel | None] = [*_tag_panels(maps, after, layout.shown)]
    columns = len(layout.lefts)
    rows = [overview] + [details[start : start + columns] for start in range(0, len(details), columns)]
    figure = Figure(figsize=layout.size, dpi=DOTS_PER_INCH, facecolor="white")
    _write(figure, _MARGIN, _MARGIN, "\n".join(layout.heading), size=12, weight="bold", spacing=1.4)
    for number, row in enumerate(rows):
        for left, panel in zip(layout.lefts, row, strict=False):
            if panel is not None:
                _draw_panel(figure, panel, left, layout.top + number * layout.row_height, layout.panel_height)
    below = layout.top + len(rows) * layout.row_height
    _draw_colour_bar(figure, below)
    _write(figure, _MARGIN, below + _BAR, "\n".join(layout.footing), size=8.5, colour=light("muted"))
    return figure


def _tags_to_show(maps: CaptionMaps) -> list[int]:
    """Indices of the tags with the highest scores, at most :data:`MAX_TAGS`, in the caption's order."""
    return sorted(np.argsort(-maps.scores, kind="stable")[:MAX_TAGS].tolist())


def _overview(maps: CaptionMaps, after: CaptionMaps | None, size: tuple[int, ...] | None = None) -> list[_Panel]:
    """The image, the caption map and the union target, before and after if there are both."""
    height, width = size or maps.image.shape[:2]
    panels = [_Panel("Image", f"{width} × {height} pixels", maps.image)]
    stages = [("", maps)] if after is None else [(" before", maps), (" after", after)]
    for stage, found in stages:
        low, high = float(found.caption_map.min()), float(found.caption_map.max())
        note = f"cosine {low:.2f} to {high:.2f}".replace("-", "−")
        panels.append(_Panel(f"Caption{stage}", note, overlay(maps.image, found.caption_map_normalized)))
    for stage, found in stages:
        count = int(found.selected.sum())
        note = f"{count} of {plural(len(found.tags), 'tag')} selected" if count else "no tag selected"
        panels.append(_Panel(f"Union{stage} (target)", note, overlay(maps.image, found.union)))
    return panels


def _tag_panels(maps: CaptionMaps, after: CaptionMaps | None, shown: list[int]) -> list[_Panel]:
    """One panel per tag, or two neighbours if there are maps before and after."""
    panels = []
    for tag in shown:
        for stage, found in [("", maps)] if after is None else [(" (before)", maps), (" (after)", after)]:
            selected = bool(found.selected[tag])
            (name,) = _wrap(one_line(found.tags[tag]), 24 - len(stage), 1)
            panels.append(
                _Panel(
                    title=name + stage,
                    note=f"{found.scores[tag]:.2f} {'selected' if selected else 'rejected'}".replace("-", "−"),
                    image=overlay(maps.image, found.tag_maps_normalized[tag]),
                    frame=_SELECTED if selected else _REJECTED,
                    dashed=not selected,
                )
            )
    return panels


def _remarks(maps: CaptionMaps, after: CaptionMaps | None, *, hidden: int) -> str:
    remarks = list(dict.fromkeys([*maps.notes, *(after.notes if after is not None else ())]))
    remarks.append("Each map runs from its own lowest to its own highest cosine: colours show where, not how much.")
    if not maps.tags:
        remarks.append("The caption has no candidate tags.")
    if hidden:
        remarks.append(f"{hidden} of {len(maps.tags)} tags, those with the lowest scores, are not shown.")
    if maps.truncated:
        remarks.append("The caption is longer than the text tower's context, so its end was not read.")
    return " ".join(remarks)


def _columns(text: str) -> int:
    """The width of a text in Latin characters."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _wrap(text: str, width: int, limit: int) -> list[str]:
    """Wrap a text into 1 to ``limit`` lines of at most ``width`` Latin characters; long words are broken."""
    lines = [""]
    for word in text.split():
        if lines[-1] and _columns(f"{lines[-1]} {word}") <= width:
            lines[-1] += " " + word
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if _columns(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    if len(lines) <= limit:
        return lines
    last = lines[limit - 1]
    while _columns(last) >= width:
        last = last[:-1]
    return [*lines[: limit - 1], last.rstrip() + "…"]


def _write(
    figure: Figure,
    left: float,
    above: float,
    text: str,
    *,
    size: float,
    weight: str = "normal",
    colour: str = "",
    spacing: float = 1.3,
    **placing: Any,
) -> None:
    """Write a text whose upper left corner is ``left`` and ``above`` inches from the edges."""
    width, height = figure.get_size_inches()
    figure.text(
        left / width,
        1 - above / height,
        text,
        fontsize=size,
        fontweight=weight,
        color=colour or light("ink"),
        linespacing=spacing,
        fontfamily=list(font_families()),
        **{"va": "top", "ha": "left", **placing},
    )


def _draw_panel(figure: Figure, panel: _Panel, left: float, above: float, panel_height: float) -> None:
    bold = "normal" if panel.dashed else "bold"
    # Aligned on baselines, so that a title with a "g" stands no higher than its neighbour.
    _write(figure, left, above + 0.13, panel.title, size=9, weight=bold, va="baseline")
    _write(figure, left, above + 0.32, panel.note, size=8.5, colour=light("muted"), va="baseline")
    width, height = figure.get_size_inches()
    box = (left / width, 1 - (above + _TITLE + panel_height) / height, _PANEL / width, panel_height / height)
    axes = figure.add_axes(box, xticks=[], yticks=[], anchor="NW")
    axes.imshow(panel.image, interpolation="bilinear")
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set(visible=True, edgecolor=panel.frame, linewidth=2.0 if panel.frame == _SELECTED else 1.0)
        spine.set_linestyle((0, (3, 2)) if panel.dashed else "-")


def _draw_colour_bar(figure: Figure, above: float) -> None:
    width, height = figure.get_size_inches()
    box = ((_MARGIN + 0.6) / width, 1 - (above + 0.16) / height, 1.6 / width, 0.12 / height)
    axes = figure.add_axes(box, xticks=[], yticks=[], frameon=False)
    axes.imshow(np.arange(256)[None], aspect="auto", cmap=COLOUR_MAP)
    axes.grid(visible=False)
    _write(figure, _MARGIN, above + 0.1, "lowest", size=8.5, colour=light("muted"), va="center")
    _write(figure, _MARGIN + 2.3, above + 0.1, "highest similarity", size=8.5, colour=light("muted"), va="center")


_OVERLAY = "ttd_plugins.reports.heat_overlay"
__getattr__ = renamed_names(
    __name__,
    {
        "HEAT_ALPHA": f"{_OVERLAY}.HEAT_OPACITY",
        "colour_table": f"{_OVERLAY}.colour_table",
        "greyed": f"{_OVERLAY}.grey",
        "heat_levels": f"{_OVERLAY}.heat_levels",
        "png_data_uri": f"{_OVERLAY}.png_data_uri",
    },
)
