"""``ttd train``: fine-tune a backbone on image-text pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttd_plugins.cli.config_flags import ConfigFlag, flags_of, old_flags, print_json, with_flags
from ttd_plugins.cli.help_pages import DATA, OUTPUT, RUN, examples
from ttd_plugins.cli.image_maps import AllowPipeOption
from ttd_plugins.errors import InputError
from ttd_plugins.training.config import TrainConfig

if TYPE_CHECKING:
    from ttd_plugins.training.run import TrainResult

PAIR_COLUMNS = (
    ConfigFlag(
        "data.options.images",
        "--images",
        str,
        "Folder that relative paths start from.  [default: the table's, or one near it]",
        "FOLDER",
        DATA,
    ),
    ConfigFlag(
        "data.options.image_column",
        "--image-column",
        str,
        "Column of image paths or images.  [default: by its name]",
        section=DATA,
    ),
    ConfigFlag(
        "data.options.caption_column",
        "--caption-column",
        str,
        "Column or field of captions.  [default: by its name]",
        section=DATA,
    ),
)
"""Options of ``open_pairs`` that have a flag of their own wherever pairs are read."""

FLAGS = [*flags_of(TrainConfig), *PAIR_COLUMNS]
DIVERGED = 1
"""Exit status of a run that ended, and whose weights are most likely useless."""
OLD_FLAGS = old_flags(FLAGS, {"--evaluate-most": "--evaluate-limit"})


@examples(
    (
        "Tune on a folder of images and captions",
        "ttd train --backbone open_clip:tiny --data pairs/ --steps 100 \\\n    --batch-size 8 --out runs/mine",
    ),
    ("Continue it where it stopped", "ttd train --out runs/mine --resume"),
    ("From a YAML file, with one option changed", "ttd train train.yaml --set run.seed=1 --out runs/yaml"),
    (
        "A pretrained backbone on shards, in bfloat16, with held-out pairs",
        "ttd train --backbone open_clip:ViT-B-16@openai --data cc12m/ --steps 2000 \\\n"
        "    --precision bf16 --evaluate pairs:heldout/ --evaluate-every 500 \\\n"
        "    --out runs/cc12m",
    ),
)
@with_flags([*FLAGS, *OLD_FLAGS])
def command(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="YAML file of options; see docs/training.md.", show_default=False),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder of the run.", rich_help_panel=OUTPUT)
    ] = Path("run"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out where it stopped.", rich_help_panel=OUTPUT)
    ] = False,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any option, as section.key=value; repeatable.",
            rich_help_panel=RUN,
        ),
    ] = None,
    allow_pipe: AllowPipeOption = False,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Print the JSON schema of the YAML file and stop.", rich_help_panel=OUTPUT),
    ] = False,
    *,
    given: dict[str, Any],
) -> None:
    """Fine-tune a backbone by TTD on image-text pairs.

    Options come from a YAML file, from flags, or from both; flags and --set take precedence. SIGTERM, SIGHUP and Ctrl-C
    save first, and --resume continues as if nothing had happened. The status is 1 if the run diverged. `accelerate
    launch` and `torchrun` start it on several devices.
    """
    if schema:
        from ttd_plugins.utils.configuration import json_schema

        print_json(json_schema(TrainConfig))
        return
    from ttd_plugins.data.shard_urls import allow_pipe as pipe_permission
    from ttd_plugins.fine_tuning import fine_tune
    from ttd_plugins.training.config import parse_change
    from ttd_plugins.training.processes import is_main_process
    from ttd_plugins.training.stop_signals import TrainingStoppedError

    changes = given | dict(parse_change(one) for one in change or [])
    if config is None and resume and (out / "config.yaml").is_file():
        config = out / "config.yaml"
    elif config is None and not changes:
        raise InputError("say what to train: a YAML file, or --backbone NAME and --data SOURCE; see docs/training.md")
    try:
        with pipe_permission(allow_pipe):
            result = fine_tune(TrainConfig.read(config, changes), out, resume=resume)
    except TrainingStoppedError as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(stopped.status) from stopped
    if is_main_process():
        print_summary(result)
    if result.diverged is not None:
        raise typer.Exit(DIVERGED)


def print_summary(result: TrainResult) -> None:
    """Print the last metrics, what they mean, and where the results are."""
    metrics = result.metrics
    typer.echo(f"{result.step} steps on {result.backbone.description.name}; last metrics:")
    for name, meaning in MEANINGS.items():
        if name in metrics:
            typer.echo(f"  {name:<22} {metrics[name]:>10.4g}  {meaning}")
    if result.evaluations:
        (first, before), (last, after) = result.evaluations[0], result.evaluations[-1]
        typer.echo(f"evaluation after step {last}" + (f" (and after step {first})" if first != last else "") + ":")
        for name, value in after.items():
            earlier = f"  ({before[name]:.4g})" if first != last and name in before else ""
            typer.echo(f"  {name:<22} {value:>10.4g}{earlier}")
    if result.skipped_steps:
        typer.echo(f"{result.skipped_steps} steps were skipped; {result.folder / 'nonfinite.jsonl'} lists them")
    for warning in result.warnings:
        typer.echo(f"warning: {warning}")
    if result.diverged is not None:
        typer.echo(f"warning: {result.diverged}")
    for note in result.notes:
        typer.echo(f"note: {note}")
    for path, meaning in (
        (result.checkpoint, "the tuned weights, and the state for --resume"),
        (result.folder / "log.jsonl", "the metrics of every logged step"),
        (result.folder / "skipped.jsonl", "samples that were skipped, with reasons"),
        (result.folder / "pictures", "heat maps of fixed samples"),
        (result.folder / "evaluation", "results on the labelled set"),
        (result.folder / "config.yaml", "every option; ttd train with this file repeats the run"),
    ):
        if path.exists():
            typer.echo(f"{path}: {meaning}")


MEANINGS = {
    "loss": "weighted sum of the losses",
    "tag": "L_tag: tag maps against their own targets",
    "distill": "L_distill: caption map against the union of its tag maps",
    "contrastive": "the backbone's own loss, which keeps retrieval",
    "anchor": "distance to the frozen model",
    "tags_per_caption": "candidate tags",
    "selected_per_caption": "selected tags",
    "caption_map_spread": "max - min of a caption map; near zero means collapse",
    "images_per_second": "of all processes",
}
