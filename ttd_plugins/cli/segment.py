"""``ttd segment``: a class for each pixel of an image, by any words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttd_plugins.cli import image_maps
from ttd_plugins.cli.config_flags import flags_of, nested, print_json, with_flags
from ttd_plugins.cli.help_pages import EVALUATION, OUTPUT, examples
from ttd_plugins.evaluation.protocol_options import IMAGE_SEGMENT, PLANE, with_changes, with_plane
from ttd_plugins.utils.configuration import from_mapping, plain_values
from ttd_plugins.utils.quick_start import collection_paused

if TYPE_CHECKING:
    from ttd_plugins.segmenting import Segmentation

MAX_ROWS = 20
DEFAULT_OUT = Path("segments")
FLAGS = flags_of(type(IMAGE_SEGMENT), defaults=IMAGE_SEGMENT)
# No data set has a plane of its own here, and with_plane() changes the background.
THRESHOLD_HELP = f"Constant background plane; alone it also sets --background constant.  [default: {PLANE}]"


@examples(
    ("Which pixels show which of these names", 'ttd segment photo.jpg "dog|puppy, grass, sky"'),
    ("Every photograph of a folder, by a list of names", "ttd segment photos/ names.txt --out segmented"),
    (
        "Faster: one scale, no mirrored image, no refinement",
        "ttd segment photo.jpg coco_things --scales 1 --no-flip --no-pamr --out quick",
    ),
)
@with_flags([replace(flag, help=THRESHOLD_HELP) if flag.path == "threshold" else flag for flag in FLAGS])
def command(
    image: Annotated[
        Path,
        typer.Argument(metavar="IMAGE", help="An image file, or a folder of images.", show_default=False),
    ],
    names: Annotated[
        str,
        typer.Argument(
            metavar="NAMES",
            help="Names with commas, as in 'dog|puppy, grass'; a file of names; or a built-in list such as "
            "coco_panoptic.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FOLDER", help="Folder for masks, overlays and results.", rich_help_panel=OUTPUT),
    ] = DEFAULT_OUT,
    backbone: image_maps.BackboneOption = image_maps.DEFAULT_BACKBONE,
    backbone_option: image_maps.BackboneSettings = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template",
            metavar="PROMPT",
            help="A prompt with {} for the name, instead of --templates; repeatable.",
            rich_help_panel=EVALUATION,
        ),
    ] = None,
    device: image_maps.DeviceOption = None,
    fast: image_maps.FastOption = False,
    bfloat16: image_maps.BFloat16Option = False,
    as_json: image_maps.JsonOption = False,
    *,
    given: dict[str, Any],
) -> None:
    """Find which pixels of IMAGE show which of NAMES.

    Writes a mask with a palette, an overlay with a legend, and the share and probability of each class. A folder of
    images is resumed by the same command. Backbones for small images have a smaller default --size.
    """
    changes = with_plane(nested(given))
    values = plain_values(IMAGE_SEGMENT)
    values["dense"] |= changes.pop("dense", {})
    options = from_mapping(type(IMAGE_SEGMENT), values | changes, "the flags")
    with collection_paused():
        from ttd_plugins.data.image_folders import find_images
        from ttd_plugins.evaluation.vocabulary import read_vocabulary

    # Before anything slow, so that a wrong path and a wrong file of names are reported at once.
    find_images(image, outside=out)
    classes = read_vocabulary(names)
    adapter = image_maps.load_backbone(
        backbone, image_maps.parse_settings(backbone_option), device=device, fast=fast, bfloat16=bfloat16
    )
    from ttd_plugins.segmenting import Segmenter, default_size, segment_folder
    from ttd_plugins.utils.progress import progress_bars

    if "dense.size" not in given:
        options = with_changes(options, {"size": default_size(adapter)})
    latest: list[Segmentation] = []
    with progress_bars(terminal_only=True) as stage:
        segmenter = Segmenter(adapter, classes, options, prompts=template, stage=stage)
        image_maps.warn_of(segmenter.notes)
        result = segment_folder(
            segmenter, image, out, stage=stage, on_result=lambda _, found: latest.__setitem__(slice(None), [found])
        )
    if as_json:
        answer = {"out": str(result.out), "images": result.images, "done": result.done, "failed": result.failed}
        print_json(answer | (latest[0].as_dict() if not image.is_dir() else {}))
        return
    if not image.is_dir():
        print_classes(latest[0])
    else:
        skipped = result.images - result.done - len(result.failed)
        already = f", {skipped:,} were done before" if skipped else ""
        wrong = f", {len(result.failed):,} cannot be read (see failed.json)" if result.failed else ""
        typer.echo(f"{result.images:,} images: {result.done:,} segmented{already}{wrong}")
    typer.echo(f"masks, overlays and results: {out}")


def print_classes(found: Segmentation) -> None:
    """Print a table of the classes with pixels, the largest first, and the names of the others."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE)
    table.add_column("class")
    label = "mean probability" if found.calibrated else "mean probability (uncalibrated)"
    for column in ("share", label, "highest"):
        table.add_column(column, justify="right")
    for one in found.present[:MAX_ROWS]:
        numbers = ["-" if value is None else f"{value:.3f}" for value in (one.mean_probability, one.max_probability)]
        table.add_row(Text(one.name), f"{one.share:.1%}", *numbers)
    console = Console()
    console.print(table)
    if len(found.present) > MAX_ROWS:
        typer.echo(f"and {len(found.present) - MAX_ROWS} smaller classes")
    absent = [one.name for one in found.classes if not one.pixels and one.texts and one.index]
    if absent:
        more = f" and {len(absent) - MAX_ROWS} more" if len(absent) > MAX_ROWS else ""
        typer.echo(f"no pixel: {', '.join(absent[:MAX_ROWS])}{more}")
