"""``ttd backbones``: the names that ``--backbone`` takes."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from ttd_plugins.cli import completion, image_maps
from ttd_plugins.cli.help_pages import examples
from ttd_plugins.errors import printable


@examples(
    ("Every family", "ttd backbones"),
    ("Models of one family", "ttd backbones open_clip"),
    ("Only names with a text, or that match a pattern", 'ttd backbones --filter "*B-16*"'),
)
def command(
    family: Annotated[
        str | None,
        typer.Argument(
            metavar="FAMILY",
            help="Only this family.  [default: all]",
            show_default=False,
            autocompletion=completion.families,
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--filter",
            metavar="PATTERN",
            help="Only names that contain this text, or match it where it has * or ?.  [default: all]",
        ),
    ] = None,
    as_json: image_maps.JsonOption = False,
) -> None:
    """List backbones: families, models and weights.

    Every model also takes @random. Where a backbone is named, your own ones work too: the folder of a run (RUN or
    RUN@STEP), NAME+LORA with a folder of LoRA, and the folder of an export.
    """
    from ttd_plugins.plugins import list_backbones

    found = list_backbones(family, pattern)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(info) for info in found], indent=2))
        return
    for info in found:
        typer.echo(printable(f"{info.family}: {info.summary or 'no summary'} (plugin {info.plugin})"))
        if info.error:
            typer.echo(f"  error: {printable(info.error)}")
        for backbone in info.backbones:
            weights = " ".join(
                f"@{name}{' (default)' if name == backbone.default_weights else ''}" for name in backbone.weights
            )
            typer.echo(f"  {printable(f'{info.family}:{backbone.model}')} {printable(weights or '@random only')}")
    if family is None and pattern is None:
        typer.echo("your own: RUN or RUN@STEP (`ttd train`), NAME+LORA (a folder of LoRA), or an exported folder")
