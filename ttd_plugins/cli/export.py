"""``ttd export``: write a tuned backbone in the format of its own library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttd_plugins.cli import image_maps
from ttd_plugins.errors import InputError

if TYPE_CHECKING:
    from ttd_plugins.export import Exported


def command(
    out: Annotated[Path, typer.Option("--out", help="Folder to write; new, or empty.", show_default=False)],
    run: Annotated[Path | None, typer.Argument(help="Folder of a run of `ttd train`.", show_default=False)] = None,
    form: Annotated[
        str,
        typer.Option(
            "--form",
            help="native: what the backbone's own library loads; lora: the small LoRA alone, for peft; weights: the "
            "state dict alone.",
        ),
    ] = "native",
    step: Annotated[
        str | None,
        typer.Option(
            "--step",
            metavar="STEP",
            help="Step of the checkpoint, or best: the best by the run's --best.  [default: the last]",
        ),
    ] = None,
    lora_scale: Annotated[
        float | None,
        typer.Option(
            "--lora-scale",
            help="Factor of LoRA: 1 is as trained; less keeps more of the original model, 0 all of it.  [default: the "
            "run's --lora-scale]",
        ),
    ] = None,
    averaged: Annotated[
        bool,
        typer.Option(
            "--averaged/--not-averaged",
            help="Export the moving average of the weights, where the run has --weight-ema.",
        ),
    ] = True,
    backbone: Annotated[
        str | None, typer.Option("--backbone", help="Instead of a run: the name of a backbone, exported as it is.")
    ] = None,
    backbone_option: image_maps.BackboneSettings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead.")] = False,
) -> None:
    """Write a tuned backbone for its own library.

    An open_clip folder, a transformers folder, or LoRA in peft's format, with a model card. Loads without ttd-plugins.
    """
    if (run is None) == (backbone is None):
        raise InputError("give either the folder of a run or --backbone NAME")
    if backbone is not None and step is not None:
        raise InputError("--step selects a checkpoint of a run, and --backbone has none; remove one of them")
    if backbone is None and backbone_option:
        raise InputError("--backbone-option needs --backbone; a run stores the options of its backbone")
    if backbone is not None and lora_scale is not None:
        raise InputError("--lora-scale needs the folder of a run, and --backbone has no LoRA; remove one of them")
    from ttd_plugins.export import FORMS, export_backbone, export_run
    from ttd_plugins.plugins import load

    if form not in FORMS:
        raise InputError(f"--form must be one of {', '.join(FORMS)}, not {form!r}")
    chosen: Any = form
    if backbone is not None:
        done = export_backbone(load(backbone, **image_maps.parse_settings(backbone_option)), out, form=chosen)
    else:
        assert run is not None
        done = export_run(run, out, form=chosen, step=step, lora_scale=lora_scale, averaged=averaged)
        if lora_scale is None and not as_json:
            from ttd_plugins.training.config import TrainConfig

            scale = TrainConfig.read(run / "config.yaml").towers.lora_scale
            if scale != 1:
                typer.echo(f"LoRA is scaled by {scale:g}, as in the run; --lora-scale 1 exports it as trained")
    if as_json:
        typer.echo(json.dumps(done.as_dict(), indent=2))
    else:
        print_export(done)


def print_export(done: Exported) -> None:
    """Print where the files are, how to load them, and what needs care."""
    typer.echo(f"wrote {done.folder}: {', '.join(done.files)}")
    typer.echo(f"load it with {done.model.library}:")
    for line in done.model.at(done.folder):
        typer.echo(f"  {line}")
    for note in done.model.notes:
        typer.echo(f"note: {note.replace('PATH', str(done.folder))}")
