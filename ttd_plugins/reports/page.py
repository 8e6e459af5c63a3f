"""What the HTML reports share: a self-contained page without network, text and numbers, ticks, curves and outlines."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.reports.heatmaps import HEAT_ALPHA, colour_table, printable

# Differences smaller than half a point are called none.
TIE = 0.005
OUTLINE_SCALE = 2
CURVE_POINTS = 200

PAPER = (
    "Jo, Ryu, Kim, Yang, Kim: TTD: Text-Tag Self-Distillation Enhancing Image-Text Alignment in CLIP to Alleviate "
    "Single Tag Bias. ECCV 2024."
)
PAPER_URL = "https://arxiv.org/abs/2404.00384"


@dataclass(frozen=True)
class Finding:
    """What the figures say: a headline, and sentences that bear it out."""

    headline: str
    sentences: list[str]


def document(title: str, body: str, *, sheets: Sequence[str], scripts: Sequence[str], style: str = "") -> str:
    """A whole page; style and script are inside, and a content policy forbids all else.

    Args:
        title: plain text.
        body: HTML of ``main``.
        sheets, scripts: files of this package, in order.
        style: rules of this page alone, after the sheets.
    """
    files = resources.files("ttd_plugins.reports")

    def read(names: Sequence[str]) -> str:
        return "".join(files.joinpath(name).read_text(encoding="utf-8") for name in names)

    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{text(title)}</title>
<style>
{read(sheets)}
{style}</style>
</head>
<body>
<main>
{body}</main>
<script>
{read(scripts)}</script>
</body>
</html>
"""


def method_note() -> str:
    """The paragraph that says whose method it is."""
    return (
        f'<p>Method: {text(PAPER)} <a href="{PAPER_URL}">arXiv 2404.00384</a>. '
        "This is an independent implementation.</p>"
    )


def heat_style() -> str:
    """The variables of pages with heat maps: opacity and colour scale."""
    return f":root {{ --heat: {HEAT_ALPHA}; --scale: {scale_gradient()}; }}\n"


def text(value: object) -> str:
    """Any value as escaped text, fit for an attribute in double quotes too."""
    return html.escape(printable(str(value)))


def number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−") if math.isfinite(value) else "n/a"


def signed(value: float) -> str:
    """A difference with its sign, which a zero has not."""
    shown = f"{value:+z.3f}".replace("-", "−") if math.isfinite(value) else "n/a"
    return "0.000" if shown == "+0.000" else shown


def scale_gradient() -> str:
    stops = ", ".join("#" + bytes(colour).hex() for colour in colour_table()[::17])
    return f"linear-gradient(90deg, {stops})"


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers from at or below ``low`` to at or above ``high``."""
    span = max(high - low, abs(high) * 1e-3, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / 3))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 4)
    start = math.floor(low / step)
    return [n * step for n in range(start, max(math.ceil(high / step), start + 1) + 1)]


def thinned(line: Sequence[tuple[float, float]], most: int = CURVE_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points, each the mean of neighbours."""
    pieces = np.array_split(np.array(line, dtype=float), min(len(line), most))
    return [(float(piece[:, 0].mean()), float(piece[:, 1].mean())) for piece in pieces]


def running_mean(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean over a window of about a twelfth of the line, cut at its ends."""
    reach = len(line) // 24
    values = [value for _, value in line]
    return [(step, float(np.mean(values[max(n - reach, 0) : n + reach + 1]))) for n, (step, _) in enumerate(line)]


def outline(region: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """White line with a dark rim along a region's border, as RGBA ``[2 height, 2 width, 4]``; clear elsewhere."""
    large = region.repeat(OUTLINE_SCALE, 0).repeat(OUTLINE_SCALE, 1)
    inner = _shrunk(large)
    line, rim = large & ~inner, ~large & ~_shrunk(~large)
    drawn = np.zeros((*large.shape, 4), np.uint8)
    drawn[rim] = (0, 0, 0, 150)
    drawn[line] = (255, 255, 255, 255)
    return drawn


def _shrunk(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The region without its border pixels; the edge of the picture is no border."""
    padded = np.pad(region, 1, mode="edge")
    return region & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def definitions(settings: Mapping[Any, Any]) -> str:
    rows = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            shown = definitions(value) if value else "none"
        elif isinstance(value, float):
            shown = f"{value:.6g}"
        elif isinstance(value, list | tuple):
            shown = text(", ".join(map(str, value))) or "none"
        elif value is None:
            shown = "–"
        else:
            shown = text(value)
        rows.append(f"<div><dt>{text(key)}</dt><dd>{shown}</dd></div>")
    return f"<dl>{''.join(rows)}</dl>"
