"""``ttd heatmap``: the maps of a caption and of its tags as a PNG file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ttd_plugins.cli import image_maps
from ttd_plugins.cli.help_pages import OUTPUT, examples
from ttd_plugins.errors import InputError


@examples(
    ("Draw the maps of a caption and of its words", 'ttd heatmap photo.jpg "a dog beside an umbrella" --out maps.png'),
    ("Two captions, one below the other", 'ttd heatmap photo.jpg "a dog" "a red umbrella" --out two.png'),
    (
        "A pretrained backbone, whose weights are downloaded once",
        'ttd heatmap photo.jpg "a dog beside an umbrella" --size 448 \\\n'
        "    --backbone open_clip:ViT-B-16@laion2b_s34b_b88k --out maps.png",
    ),
)
def command(
    image: image_maps.ImageArgument,
    caption: Annotated[
        list[str], typer.Argument(metavar="CAPTION", help="Its caption, or several.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE", help="The PNG file to write.", show_default=False, rich_help_panel=OUTPUT
        ),
    ],
    backbone: image_maps.BackboneOption = image_maps.DEFAULT_BACKBONE,
    backbone_option: image_maps.BackboneSettings = None,
    tags: image_maps.TagsOption = "words",
    tags_option: image_maps.TagsSettings = None,
    tag: image_maps.TagOption = None,
    size: image_maps.SizeOption = None,
    rule: image_maps.RuleOption = None,
    threshold: image_maps.ThresholdOption = None,
    device: image_maps.DeviceOption = None,
    fast: image_maps.FastOption = False,
    bfloat16: image_maps.BFloat16Option = False,
) -> None:
    """Draw the maps of CAPTION and its tags over IMAGE.

    The file shows the map of the caption, the map and score of each tag, and the union of the selected tags, at the
    aspect ratio and resolution of the image; several captions are drawn one below the other.
    """
    check_writable(out, image)
    pixels, found = image_maps.compute_all_maps(
        image,
        caption,
        backbone=backbone,
        backbone_options=image_maps.parse_settings(backbone_option),
        extractor=tags,
        extractor_options=image_maps.parse_settings(tags_option),
        tags=tag,
        size=image_maps.parse_size(size),
        rule=rule,
        threshold=threshold,
        device=device,
        fast=fast,
        bfloat16=bfloat16,
    )
    import numpy as np

    from ttd_plugins.reports.heatmaps import draw_maps

    draw_maps(found, out, image=np.asarray(pixels))
    typer.echo(f"wrote {out}")


def check_writable(out: Path, image: Path | None = None) -> None:
    """Check that a PNG can be written to ``out``, before anything slow.

    Raises:
        InputError: the name does not end in .png, the folder is missing or not writable, or ``out`` is the image.
    """
    name = f"--out {str(out)!r}"
    if out.suffix.lower() != ".png":
        raise InputError(f"{name} must end in .png")
    if not os.path.isdir(out.parent):
        raise InputError(f"{name} cannot be written: the folder {str(out.parent)!r} does not exist")
    if image is not None and os.path.exists(out) and os.path.exists(image) and os.path.samefile(out, image):
        raise InputError(f"{name} is the image itself, which the heat map would replace; choose another name")
    if out.is_dir():
        raise InputError(f"{name} cannot be written: it is a folder")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise InputError(f"{name} cannot be written: {error.strerror or error}") from error
