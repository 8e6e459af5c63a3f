"""``ttd export``: write a tuned backbone in the format of its own library."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttd_plugins.cli import completion, image_maps
from ttd_plugins.cli.help_pages import MODEL, OUTPUT, examples
from ttd_plugins.errors import InputError

if TYPE_CHECKING:
    from ttd_plugins.export import Exported
    from ttd_plugins.hub_upload import Pushed


FORM_NAMES = ("native", "lora", "weights")
"""Those of ttd_plugins.export, which imports torch."""


@examples(
    ("For the library of the backbone", "ttd export runs/mine --out tuned"),
    ("Only the LoRA, in the format of peft", "ttd export runs/mine --form lora --out tuned-lora"),
    ("To the Hugging Face hub", "ttd export runs/mine --push-to-hub USER/NAME --private"),
)
def command(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="Folder of a run of `ttd train`, or RUN@STEP.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Folder to write; new, or empty. Required without --push-to-hub.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--form",
            metavar="|".join(FORM_NAMES),
            rich_help_panel=OUTPUT,
            autocompletion=completion.one_of(FORM_NAMES),
            help="native: what the backbone's own library loads; lora: the small LoRA alone, for peft; weights: the "
            "state dict alone.",
        ),
    ] = "native",
    step: Annotated[
        str | None,
        typer.Option(
            "--step",
            metavar="STEP",
            rich_help_panel=MODEL,
            help="Step of the checkpoint, or best: the best by the run's --best.  [default: the last]",
        ),
    ] = None,
    lora_scale: Annotated[
        float | None,
        typer.Option(
            "--lora-scale",
            metavar="NUMBER",
            rich_help_panel=MODEL,
            help="Factor of LoRA: 1 is as trained; less keeps more of the original model, 0 all of it.  [default: the "
            "run's --lora-scale]",
        ),
    ] = None,
    averaged: Annotated[
        bool,
        typer.Option(
            "--averaged/--not-averaged",
            rich_help_panel=MODEL,
            help="Export the moving average of the weights, where the run has --weight-ema.",
        ),
    ] = True,
    backbone: Annotated[
        str | None,
        typer.Option(
            "--backbone",
            metavar="NAME",
            help=f"Instead of a run, a backbone as it is: {image_maps.BACKBONE_FORMS}  [default: RUN]",
            rich_help_panel=MODEL,
            autocompletion=completion.backbones,
        ),
    ] = None,
    backbone_option: image_maps.BackboneSettings = None,
    repository: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            metavar="USER/NAME",
            rich_help_panel=OUTPUT,
            help="Push the export to this repository of the Hugging Face hub; `hf auth login` or HF_TOKEN logs in.  "
            "[default: no push]",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Create a private repository.", rich_help_panel=OUTPUT)
    ] = False,
    licence: Annotated[
        str | None,
        typer.Option(
            "--licence",
            metavar="NAME",
            help="Licence in the model card, such as apache-2.0.  [default: a note on the base's]",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: image_maps.JsonOption = False,
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
    if out is None and repository is None:
        raise InputError("give the folder to write, --out FOLDER, or a repository, --push-to-hub USER/NAME")
    if private and repository is None:
        raise InputError("--private needs --push-to-hub; remove it")
    from ttd_plugins.export import FORMS, export_named, export_run

    if form not in FORMS:
        raise InputError(f"--form must be one of {', '.join(FORMS)}, not {form!r}")
    from ttd_plugins.hub_upload import check_push, push_to_hub

    if repository is not None:
        # Before anything slow, so that a missing token is reported at once.
        check_push(repository, private=private)
    more: dict[str, Any] = {
        "form": form,
        "lora_scale": lora_scale,
        "averaged": averaged,
        "licence": licence,
        "repository": repository,
    }
    with nullcontext() if out is not None else TemporaryDirectory(prefix="ttd-export-") as temporary:
        folder = out if out is not None else Path(str(temporary)) / "export"
        if backbone is not None:
            done = export_named(backbone, folder, options=image_maps.parse_settings(backbone_option), **more)
        else:
            assert run is not None
            done = export_run(run, folder, step=step, **more)
            if lora_scale is None and not as_json:
                _say_scale(run)
        # Before the push, so that the folder is known if that fails.
        if out is not None and not as_json:
            print_export(done)
        pushed = None if repository is None else push_to_hub(folder, repository, private=private)
    if as_json:
        answer = done.as_dict() if out is not None else done.as_dict() | {"folder": None}
        typer.echo(json.dumps(answer | ({} if pushed is None else {"pushed": asdict(pushed)}), indent=2))
    elif pushed is not None:
        print_pushed(pushed, done)


def _say_scale(run: Path) -> None:
    """Say by how much the run itself scales its LoRA."""
    from ttd_plugins.backbone_sources import split_step
    from ttd_plugins.training.config import TrainConfig

    scale = TrainConfig.read(split_step(run)[0] / "config.yaml").towers.lora_scale
    if scale != 1:
        typer.echo(f"LoRA is scaled by {scale:g}, as in the run; --lora-scale 1 exports it as trained")


def print_pushed(pushed: Pushed, done: Exported) -> None:
    """Print where the repository is, and how to load it."""
    typer.echo(f"pushed to {pushed.url} (commit {pushed.commit[:10]}): {', '.join(pushed.files)}")
    typer.echo(f"load it with {done.model.library}:")
    from ttd_plugins.export import on_hub

    for line in on_hub(done.model, pushed.repository):
        typer.echo(f"  {line}")


def print_export(done: Exported) -> None:
    """Print where the files are, how to load them, and what needs care."""
    typer.echo(f"wrote {done.folder}: {', '.join(done.files)}")
    typer.echo(f"load it with {done.model.library}:")
    for line in done.model.at(done.folder):
        typer.echo(f"  {line}")
    for note in done.model.notes:
        typer.echo(f"note: {note.replace('PATH', str(done.folder))}")
