"""Draw the first image of README: one photograph, its caption map before and after TTD, and the union of its tags.

    python examples/make_readme_image.py

Writes ``readme-hero.jpg`` (four panels in a row) and ``readme-hero-narrow.jpg`` (two rows, for phones) to docs/images,
both at twice the resolution at which pages show them, and the badges ``badge-*.svg``, which state what pyproject.toml
states. Needs the extra ``demo``; takes about ten seconds.
"""

from __future__ import annotations

import argparse
import io
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ttd_plugins import TTD, load
from ttd_plugins.embedded import PHOTOGRAPHS_FOLDER
from ttd_plugins.evaluation.datasets.coco_masks import annotation_mask
from ttd_plugins.evaluation.metrics import upsample_map
from ttd_plugins.reports.heat_overlay import overlay
from ttd_plugins.reports.palette import light
from ttd_plugins.utils.files import make_folder, write_atomic

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
PHOTOGRAPH, CAPTION = "000000196393.jpg", "A cat and a canary are sharing dinner together."
OBJECTS = {"cat": "cat", "canary": "bird"}
"""Words of the caption, and the COCO class whose masks show the object."""
BEFORE, AFTER = "open_clip:photo", "open_clip:photo@ttd"
QUALITY = 86
MARGIN, GAP, WIDTH = 16, 28, 1760
WIDE, NARROW = "readme-hero.jpg", "readme-hero-narrow.jpg"


@dataclass(frozen=True)
class Panel:
    """An image with a title, and the mean of its map inside the mask of each object."""

    title: str
    note: str
    image: NDArray[np.uint8]
    means: dict[str, float]


def object_masks() -> dict[str, NDArray[np.bool_]]:
    """Masks of the objects, bool ``[height, width]``, by the word of the caption."""
    content = json.loads((PHOTOGRAPHS_FOLDER / "instances.json").read_text(encoding="utf-8"))
    image = next(one for one in content["images"] if one["file_name"] == PHOTOGRAPH)
    classes = {one["name"]: one["id"] for one in content["categories"]}
    size = image["height"], image["width"]
    masks = {}
    for word, name in OBJECTS.items():
        own = [
            one
            for one in content["annotations"]
            if one["image_id"] == image["id"] and one["category_id"] == classes[name]
        ]
        masks[word] = np.logical_or.reduce([annotation_mask(one["segmentation"], *size) for one in own])
    return masks


def panels() -> list[Panel]:
    """The photograph, the caption's map before and after TTD, and the union of the tags that are selected after it."""
    with Image.open(PHOTOGRAPHS_FOLDER / "images" / PHOTOGRAPH, formats=("JPEG",)) as opened:
        photograph = opened.convert("RGB")
    image, masks = np.asarray(photograph), object_masks()
    before, after = (TTD(load(name)).maps(photograph, CAPTION) for name in (BEFORE, AFTER))
    selected = ", ".join(tag for tag, kept in zip(after.tags, after.selected, strict=True) if kept)

    def panel(title: str, note: str, heat: NDArray[np.floating[Any]]) -> Panel:
        whole = upsample_map(heat, *image.shape[:2])
        return Panel(
            title, note, overlay(image, heat), {word: float(whole[mask].mean()) for word, mask in masks.items()}
        )

    return [
        Panel("Photograph", "COCO, CC BY 2.0", image, {}),
        panel("Caption map before TTD", "one word dominates", before.caption_map_normalized),
        panel("Caption map after TTD", "the words are more even", after.caption_map_normalized),
        panel("Union of selected tags", selected, after.union),
    ]


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings."""
    from matplotlib.font_manager import FontProperties, findfont

    return ImageFont.truetype(findfont(FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")), size)


def draw(shown: Sequence[Panel], columns: int, width: int, text: int) -> Image.Image:
    """Draw the panels in rows below the caption, on white.

    Args:
        shown: the panels.
        columns: panels in a row.
        width: width of the drawing in pixels.
        text: height of the titles' font in pixels; everything else follows from it.
    """
    side = (width - 2 * MARGIN - (columns - 1) * GAP) // columns
    height = round(side * shown[0].image.shape[0] / shown[0].image.shape[1])
    title, note, label = font(text, bold=True), font(round(0.86 * text)), font(round(0.8 * text))
    line = round(1.45 * text)
    head, bars = 2 * line + round(0.3 * text), len(OBJECTS) * line + round(0.4 * text)
    row = head + height + bars + GAP
    rows = -(-len(shown) // columns)
    top = round(2.3 * text)
    sheet = Image.new("RGB", (width, top + rows * row), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 0), f"“{CAPTION}”", light("ink"), font(round(1.12 * text)))
    for number, panel in enumerate(shown):
        left = MARGIN + number % columns * (side + GAP)
        y = top + number // columns * row
        pen.text((left, y), panel.title, light("ink"), title)
        pen.text((left, y + line), panel.note, light("muted"), note)
        y += head
        picture = Image.fromarray(panel.image).resize((side, height), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left, y))
        y += height + round(0.5 * text)
        start = left + round(max(pen.textlength(word, label) for word in OBJECTS) + 0.6 * text)
        end = left + side - round(2.6 * text)
        for word, mean in panel.means.items():
            middle = y + round(0.5 * line)
            pen.text((left, middle), word, light("ink"), label, anchor="lm")
            thick = round(0.28 * text)
            pen.rectangle((start, middle - thick, end, middle + thick), fill=light("same-soft"))
            pen.rectangle((start, middle - thick, start + round(mean * (end - start)), middle + thick), light("after"))
            pen.text((left + side, middle), f"{mean:.2f}", light("ink"), label, anchor="rm")
            y += line
        if not panel.means:
            lines = ("Bars: mean of the map", "inside the object's mask")
            for text_line in lines:
                pen.text((left, y + round(0.5 * line)), text_line, light("muted"), label, anchor="lm")
                y += line
    return sheet


def badges() -> dict[str, tuple[str, str, str]]:
    """Label, value and colour of each badge, by the name of its file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    prefix = "Programming Language :: Python :: 3."
    versions = [name.rsplit(" ", 1)[1] for name in project["classifiers"] if name.startswith(prefix)]
    return {
        "badge-python.svg": ("python", " | ".join(versions), light("series-0")),
        "badge-licence.svg": ("licence", project["license"], light("better")),
        "badge-paper.svg": ("ECCV 2024", f"arXiv {project['urls']['Paper'].rsplit('/', 1)[1]}", "#a61b1b"),
        "badge-network.svg": ("network", "not needed for demo and tests", light("muted")),
    }


def badge(label: str, value: str, colour: str) -> str:
    """A badge as SVG: white text on grey and on a colour, of fixed width in any font."""
    widths = [round(font(11).getlength(text)) + 14 for text in (label, value)]
    whole = sum(widths)
    texts = "".join(
        f'<text x="{x}" y="14" textLength="{width - 14}" lengthAdjust="spacingAndGlyphs">{text}</text>'
        for text, x, width in zip((label, value), (7, widths[0] + 7), widths, strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole}" height="20" role="img" aria-label="{label}: {value}">'
        f"<title>{label}: {value}</title>"
        f'<clipPath id="r"><rect width="{whole}" height="20" rx="3"/></clipPath><g clip-path="url(#r)">'
        f'<rect width="{widths[0]}" height="20" fill="#484540"/>'
        f'<rect x="{widths[0]}" width="{widths[1]}" height="20" fill="{colour}"/></g>'
        f'<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">{texts}</g></svg>\n'
    )


def save(sheet: Image.Image, out: Path) -> None:
    """Write a drawing as a JPEG."""
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=QUALITY, optimize=True, progressive=True)
    write_atomic(out, buffer.getvalue())
    print(f"wrote {out} ({out.stat().st_size // 1000} kB)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write both drawings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=IMAGES)
    options = parser.parse_args(arguments)
    make_folder(options.out)
    for name, content in badges().items():
        write_atomic(options.out / name, badge(*content))
    shown = panels()
    save(draw(shown, 4, WIDTH, 27), options.out / WIDE)
    save(draw(shown, 2, WIDTH // 2, 30), options.out / NARROW)


if __name__ == "__main__":
    main()
