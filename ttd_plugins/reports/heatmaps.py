"""Maps of a caption and its tags as pictures: one PNG for a person, and the layers that HTML reports are built of."""

from __future__ import annotations

import base64
import io
import unicodedata
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttd_plugins.errors import InputError, MissingDependencyError, one_sentence
from ttd_plugins.evaluation.metrics import upsample_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ttd_plugins.engine import CaptionMaps

COLOUR_MAP = "inferno"
HEAT_ALPHA = 0.65
MAX_TAGS = 30
MAX_CAPTION_LINES = 8
DOTS_PER_INCH = 110

# Lengths in inches.
_PANEL = 2.0
_GAP = 0.14
_PAIR_GAP = 0.2
_MARGIN = 0.22
_TITLE = 0.46
_LINE = 0.19
_BAR = 0.34

_INK = "#1c1b1a"
_MUTED = "#68635c"
_SELECTED = "#0f766e"
_REJECTED = "#a8a29e"

# Vector fonts that cover other scripts; those that are installed are asked where DejaVu Sans has no glyph.
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


@cache
def colour_table() -> NDArray[np.uint8]:
    """The colour map of all heat layers as a uint8 table ``[256, 3]``, from 0 (dark) to 1 (bright).

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise _missing(error) from error
    return (colormaps[COLOUR_MAP](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def heat_levels(heat: NDArray[np.floating], height: int, width: int) -> NDArray[np.uint8]:
    """Bilinear resize of ``heat`` ``[H, W]`` in [0, 1] to rows of :func:`colour_table`, uint8 ``[height, width]``.

    Raises:
        InputError: ``heat`` is not a finite two-dimensional map.
    """
    if heat.ndim != 2 or not heat.size or not np.isfinite(heat).all():
        raise InputError(f"a heat map must be finite and of shape [H, W]; this one has shape {list(heat.shape)}")
    return (upsample_map(heat, height, width) * 255).round().clip(0, 255).astype(np.uint8)


def overlay(image: NDArray[np.uint8], heat: NDArray[np.floating], alpha: float = HEAT_ALPHA) -> NDArray[np.uint8]:
    """Lay a heat map over a picture: ``(1 - alpha) * image + alpha * colour(heat)``.

    Args:
        image: uint8 ``[height, width, 3]``.
        heat: ``[H, W]`` in [0, 1], of any grid; bilinear-resized to the picture, pixel centres aligned.
        alpha: opacity of the heat in [0, 1].

    Returns:
        uint8 ``[height, width, 3]``.

    Raises:
        InputError: a shape, dtype or value is not as said.
        MissingDependencyError: matplotlib is not installed.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"a picture must be uint8 [height, width, 3]; this one is {image.dtype} {list(image.shape)}")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha {alpha} must lie in [0, 1]")
    colours = colour_table()[heat_levels(heat, *image.shape[:2])]
    return ((1 - alpha) * image.astype(np.float32) + alpha * colours).round().astype(np.uint8)


def greyed(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture's luma on three equal channels, uint8 ``[height, width, 3]``, so that only the heat has colour."""
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def png_data_uri(array: NDArray[np.uint8], palette: NDArray[np.uint8] | None = None) -> str:
    """A picture as a ``data:image/png;base64,`` address.

    Args:
        array: uint8 ``[height, width]`` (grey, or rows of ``palette``), ``[height, width, 3]`` (RGB) or
            ``[height, width, 4]`` (RGBA).
        palette: uint8 ``[n, 3]``, n at most 256; the file then stores one byte a pixel.

    Raises:
        InputError: a shape or dtype is not as said.
    """
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise InputError(f"a picture must be uint8 with 1, 3 or 4 channels, not {array.dtype} {list(array.shape)}")
    picture = Image.fromarray(array)
    if palette is not None:
        if array.ndim != 2:
            raise InputError(f"a picture with a palette must be [height, width], not {list(array.shape)}")
        picture.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def jpeg_data_uri(picture: Image.Image, **options: Any) -> str:
    """A photograph as a ``data:image/jpeg;base64,`` address; ``options`` are Pillow's for JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", **options)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def printable(text: str) -> str:
    """``text`` on one line, without control characters and with lone surrogates replaced, fit for any output."""
    encodable = " ".join(text.split()).encode("utf-8", "replace").decode("utf-8")
    return "".join(c for c in encodable if unicodedata.category(c) != "Cc")


def save_bytes(path: Path, content: bytes) -> None:
    """Write a whole file; what was at ``path`` before stays until the new one is complete.

    Raises:
        InputError: the path cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        try:
            part.write_bytes(content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror or one_sentence(error)}") from error


@dataclass(frozen=True)
class _Panel:
    """One picture of the figure: what it is called, a second line, and how its frame looks."""

    title: str
    note: str
    picture: NDArray[np.uint8]
    frame: str = _MUTED
    dashed: bool = False


def draw_maps(maps: CaptionMaps, path: Path, *, after: CaptionMaps | None = None) -> None:
    """Draw the maps of one picture and caption as one PNG.

    First the picture, the caption's map and the union of the selected tags' maps (the target of the caption's map);
    then each tag's map with its score and whether it was selected. Every map is min-max-normalised over its patches,
    so that its colours say where and never how much; the notes give the range of cosines. Of more than 30 tags those
    with the highest scores are drawn, and the picture says how many are left out.

    Args:
        maps: the maps, before training where there are two.
        path: where to write.
        after: the maps of the same picture, caption and tags after training, drawn beside the others.

    Raises:
        InputError: ``path`` cannot be written, or ``after`` is of another caption or other tags.
        MissingDependencyError: matplotlib is not installed.
    """
    if after is not None and (after.caption, after.tags) != (maps.caption, maps.tags):
        raise InputError("the maps before and after must be of one caption and the same tags")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise _missing(error) from error

    shown = _tags_to_show(maps)
    overview: list[_Panel | None] = [*_overview(maps, after)]
    if after is not None:
        overview.insert(1, None)
    details: list[_Panel | None] = [*_tag_panels(maps, after, shown)]
    columns = 6 if after is not None else 5
    # Before and after of one thing stand closer than two things do.
    lefts = [_MARGIN + n * (_PANEL + _GAP) + (n // 2 * _PAIR_GAP if after is not None else 0) for n in range(columns)]
    rows = [overview] + [details[start : start + columns] for start in range(0, len(details), columns)]

    height, width = maps.image.shape[:2]
    panel_height = min(max(_PANEL * height / width, 0.3 * _PANEL), 2 * _PANEL)
    line_characters = round(columns * _PANEL * 10.5)
    heading = _wrap(printable(maps.caption) or "(empty caption)", line_characters, MAX_CAPTION_LINES)
    footing = _wrap(_remarks(maps, hidden=len(maps.tags) - len(shown)), round(line_characters * 1.25), 3)

    row_height = _TITLE + panel_height + _GAP
    top = _MARGIN + 1.4 * _LINE * len(heading) + _GAP
    bottom = _MARGIN + _LINE * len(footing) + _BAR
    size = (lefts[-1] + _PANEL + _MARGIN, top + len(rows) * row_height + bottom)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, facecolor="white")
    _write(figure, _MARGIN, _MARGIN, "\n".join(heading), size=12, weight="bold", spacing=1.4)
    for number, row in enumerate(rows):
        for left, panel in zip(lefts, row, strict=False):
            if panel is not None:
                _draw_panel(figure, panel, left, top + number * row_height, panel_height)
    below = top + len(rows) * row_height
    _draw_colour_bar(figure, below)
    _write(figure, _MARGIN, below + _BAR, "\n".join(footing), size=8.5, colour=_MUTED)

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A script that no installed font covers is drawn as boxes; that is all that can be shown of it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    save_bytes(path, buffer.getvalue())


def _missing(error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f"maps are drawn with matplotlib ({one_sentence(error)}); install it with: pip install 'ttd-plugins[demo]'"
    )


def _tags_to_show(maps: CaptionMaps) -> list[int]:
    """Positions of the tags with the highest scores, at most :data:`MAX_TAGS`, in the caption's order."""
    return sorted(np.argsort(-maps.scores, kind="stable")[:MAX_TAGS].tolist())


def _overview(maps: CaptionMaps, after: CaptionMaps | None) -> list[_Panel]:
    """The picture, the caption's map and the union target, each before and after where there are both."""
    height, width = maps.image.shape[:2]
    panels = [_Panel("Picture", f"{width} × {height} pixels", maps.image)]
    stages = [("", maps)] if after is None else [(" before", maps), (" after", after)]
    for stage, found in stages:
        low, high = float(found.caption_map.min()), float(found.caption_map.max())
        note = f"cosine {low:.2f} to {high:.2f}".replace("-", "−")
        panels.append(_Panel(f"Caption{stage}", note, overlay(greyed(maps.image), found.caption_map_normalized)))
    for stage, found in stages:
        count = int(found.selected.sum())
        note = f"{count} of {len(found.tags)} tags selected" if count else "no tag selected"
        panels.append(_Panel(f"Union{stage} (target)", note, overlay(greyed(maps.image), found.union)))
    return panels


def _tag_panels(maps: CaptionMaps, after: CaptionMaps | None, shown: list[int]) -> list[_Panel]:
    """One panel a tag, or two neighbours where there is a before and an after."""
    panels = []
    for tag in shown:
        for stage, found in [("", maps)] if after is None else [(" (before)", maps), (" (after)", after)]:
            selected = bool(found.selected[tag])
            (name,) = _wrap(printable(found.tags[tag]), 24 - len(stage), 1)
            panels.append(
                _Panel(
                    title=name + stage,
                    note=f"{found.scores[tag]:.2f} {'selected' if selected else 'rejected'}".replace("-", "−"),
                    picture=overlay(greyed(maps.image), found.tag_maps_normalized[tag]),
                    frame=_SELECTED if selected else _REJECTED,
                    dashed=not selected,
                )
            )
    return panels


def _remarks(maps: CaptionMaps, *, hidden: int) -> str:
    remarks = ["Each map runs from its own lowest to its own highest cosine: colours say where, not how much."]
    if not maps.tags:
        remarks.append("The caption has no candidate tags.")
    if hidden:
        remarks.append(f"{hidden} of {len(maps.tags)} tags, those with the lowest scores, are not shown.")
    if maps.truncated:
        remarks.append("The caption is longer than the text tower's context, so its end was not read.")
    return " ".join(remarks)


def _columns(text: str) -> int:
    """How wide a text is drawn, in Latin characters."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _wrap(text: str, width: int, most: int) -> list[str]:
    """Lines at most ``width`` Latin characters wide, at most ``most`` of them, at least one; words may be broken."""
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
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while _columns(last) >= width:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip() + "…"]


@cache
def _font_families() -> tuple[str, ...]:
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return ("DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in installed))


def _write(
    figure: Figure,
    left: float,
    above: float,
    text: str,
    *,
    size: float,
    weight: str = "normal",
    colour: str = _INK,
    spacing: float = 1.3,
    **placing: Any,
) -> None:
    """Text whose upper left corner is ``left`` and ``above`` inches from the figure's."""
    width, height = figure.get_size_inches()
    figure.text(
        left / width,
        1 - above / height,
        text,
        fontsize=size,
        fontweight=weight,
        color=colour,
        linespacing=spacing,
        fontfamily=list(_font_families()),
        **{"va": "top", "ha": "left", **placing},
        # A caption may hold dollar signs, which are not mathematics.
        parse_math=False,
        usetex=False,
    )


def _draw_panel(figure: Figure, panel: _Panel, left: float, above: float, panel_height: float) -> None:
    bold = "normal" if panel.dashed else "bold"
    # On base lines, or a title with a "g" in it would stand higher than its neighbour.
    _write(figure, left, above + 0.13, panel.title, size=9, weight=bold, va="baseline")
    _write(figure, left, above + 0.32, panel.note, size=8.5, colour=_MUTED, va="baseline")
    width, height = figure.get_size_inches()
    box = (left / width, 1 - (above + _TITLE + panel_height) / height, _PANEL / width, panel_height / height)
    axes = figure.add_axes(box, xticks=[], yticks=[], anchor="NW")
    axes.imshow(panel.picture, interpolation="nearest")
    for spine in axes.spines.values():
        spine.set(edgecolor=panel.frame, linewidth=2.0 if panel.frame == _SELECTED else 1.0)
        spine.set_linestyle((0, (3, 2)) if panel.dashed else "-")


def _draw_colour_bar(figure: Figure, above: float) -> None:
    width, height = figure.get_size_inches()
    box = ((_MARGIN + 0.6) / width, 1 - (above + 0.16) / height, 1.6 / width, 0.12 / height)
    axes = figure.add_axes(box, xticks=[], yticks=[], frameon=False)
    axes.imshow(np.arange(256)[None], aspect="auto", cmap=COLOUR_MAP)
    _write(figure, _MARGIN, above + 0.1, "lowest", size=8.5, colour=_MUTED, va="center")
    _write(figure, _MARGIN + 2.3, above + 0.1, "highest similarity", size=8.5, colour=_MUTED, va="center")
