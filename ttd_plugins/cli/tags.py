"""``ttd tags``: which words of a caption are in the image."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ttd_plugins.cli import image_maps

if TYPE_CHECKING:
    from ttd_plugins.engine import CaptionMaps


def command(
    image: image_maps.ImageArgument,
    caption: image_maps.CaptionArgument,
    backbone: image_maps.BackboneOption = image_maps.DEFAULT_BACKBONE,
    backbone_option: image_maps.BackboneSettings = None,
    tags: image_maps.TagsOption = "words",
    tags_option: image_maps.TagsSettings = None,
    tag: image_maps.TagOption = None,
    size: image_maps.SizeOption = None,
    rule: image_maps.RuleOption = None,
    threshold: image_maps.ThresholdOption = None,
    device: image_maps.DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead.")] = False,
) -> None:
    """Select the words of CAPTION that are in IMAGE.

    Each candidate tag is scored by its nearest patch, and the selection rule decides.
    """
    found = image_maps.compute_maps(
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
    )
    # Another key, so that no script takes a guess for a probability.
    key = "probability" if found.calibrated else "uncalibrated_probability"
    rows = [
        {"tag": name, "score": float(score), key: float(probability), "selected": bool(selected)}
        for name, score, probability, selected in zip(
            found.tags, found.scores, found.probabilities, found.selected, strict=True
        )
    ]
    if as_json:
        answer = {
            "image": str(image),
            "caption": caption,
            "backbone": backbone,
            "truncated": found.truncated,
            "calibrated": found.calibrated,
            "notes": list(found.notes),
        }
        typer.echo(json.dumps({**answer, "tags": rows}, indent=2))
    elif rows:
        _print_table(found)
    else:
        typer.echo(f"no candidate tags: the tag extractor {tags!r} finds none in {caption!r}")


def _print_table(found: CaptionMaps) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE)
    table.add_column("tag")
    for column in ("score", found.probability_label, "selected"):
        table.add_column(column, justify="right")
    for i, tag in enumerate(found.tags):
        selected = "yes" if found.selected[i] else "no"
        # A tag may contain what rich takes for markup.
        table.add_row(Text(tag), f"{found.scores[i]:.3f}", f"{found.probabilities[i]:.3f}", selected)
    Console().print(table)
