"""``ttd train``: fine-tune a backbone on image-text pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttd_plugins.errors import InputError

if TYPE_CHECKING:
    from ttd_plugins.training.run import TrainResult

FLAGS = {
    "backbone": "backbone.name",
    "data": "data.source",
    "captions": "data.captions",
    "size": "data.image_size",
    "workers": "data.workers",
    "image_tower": "towers.image",
    "text_tower": "towers.text",
    "rank": "towers.rank",
    "learning_rate": "optimizer.learning_rate",
    "batch_size": "optimizer.batch_size",
    "accumulation": "optimizer.accumulation",
    "steps": "optimizer.steps",
    "epochs": "optimizer.epochs",
    "warm_up": "optimizer.warm_up",
    "evaluate": "evaluation.data",
    "evaluate_every": "evaluation.every",
    "evaluate_most": "evaluation.limit",
    "seed": "run.seed",
    "precision": "run.mixed_precision",
    "grad_checkpointing": "run.gradient_checkpointing",
    "compile_blocks": "run.compile",
    "tracker": "run.trackers",
}
"""Which option of the configuration each flag sets."""


def command(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of options; see docs/training.md.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("run"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in --out stopped.")] = False,
    backbone: Annotated[str | None, typer.Option("--backbone", help="family:model@weights.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Folder, table, COCO JSON, shards or datasets.")] = None,
    captions: Annotated[str | None, typer.Option("--captions", help="first, random or all of an image.")] = None,
    size: Annotated[str | None, typer.Option("--size", help="Input size in pixels: SIDE or HEIGHTxWIDTH.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes that decode pictures.")] = None,
    image_tower: Annotated[str | None, typer.Option("--image-tower", help="lora, full or frozen.")] = None,
    text_tower: Annotated[str | None, typer.Option("--text-tower", help="lora, full or frozen.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Rank of LoRA.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Pairs in a batch of one process.")] = None,
    accumulation: Annotated[int | None, typer.Option("--accumulation", help="Batches averaged into a step.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the data, without --steps.")] = None,
    warm_up: Annotated[int | None, typer.Option("--warm-up", help="Steps of linear warm-up.")] = None,
    evaluate: Annotated[
        str | None,
        typer.Option("--evaluate", help="Labelled set: scenes, scenes:N, coco_captions:FOLDER, cc3m_tagmask:FOLDER."),
    ] = None,
    evaluate_every: Annotated[
        int | None,
        typer.Option("--evaluate-every", help="Steps from one evaluation to the next; the first and last always."),
    ] = None,
    evaluate_most: Annotated[int | None, typer.Option("--evaluate-most", help="Only its first pictures.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Decides order, fresh weights and dropout.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="no, bf16 or fp16.")] = None,
    grad_checkpointing: Annotated[
        bool | None, typer.Option("--grad-checkpointing", help="Save memory, take more time.", show_default=False)
    ] = None,
    compile_blocks: Annotated[
        bool | None, typer.Option("--compile", help="Compile the image tower; for GPUs.", show_default=False)
    ] = None,
    tracker: Annotated[
        list[str] | None, typer.Option("--tracker", help="tensorboard, wandb, ...; may be repeated.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Any option, as section.key=value; may be repeated.")
    ] = None,
) -> None:
    """Fine-tune a backbone by TTD on image-text pairs.

    Options come from a YAML file, from flags, or from both; flags win. SIGTERM and Ctrl-C save first, and --resume goes
    on as if nothing had happened. `accelerate launch` and `torchrun` start it on several devices.
    """
    import json

    given = locals()
    changes = []
    for flag, path in FLAGS.items():
        value = _image_size(given[flag]) if flag == "size" else given[flag]
        if value is not None and value != []:
            changes.append(f"{path}={json.dumps(value)}")
    changes += change or []
    from ttd_plugins.fine_tuning import fine_tune
    from ttd_plugins.training.config import TrainConfig
    from ttd_plugins.training.stop_signals import TrainingStoppedError

    if config is None and resume and (out / "config.yaml").is_file():
        config = out / "config.yaml"
    elif config is None and not changes:
        raise InputError("say what to train: a YAML file, or --backbone NAME and --data SOURCE; see docs/training.md")
    try:
        result = fine_tune(TrainConfig.read(config, changes), out, resume=resume)
    except TrainingStoppedError as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(stopped.status) from stopped
    from ttd_plugins.training.processes import is_main_process

    if is_main_process():
        print_summary(result)


def _image_size(text: str | None) -> Any:
    if text is None:
        return None
    sides = text.lower().split("x")
    if not 1 <= len(sides) <= 2 or not all(side.isdecimal() for side in sides):
        raise InputError(f"--size is SIDE or HEIGHTxWIDTH in pixels, not {text!r}")
    return int(sides[0]) if len(sides) == 1 else [int(side) for side in sides]


def print_summary(result: TrainResult) -> None:
    """Say what came out, what it means, and where it is."""
    figures = result.metrics
    typer.echo(f"{result.step} steps on {result.backbone.description.name}; last figures:")
    for name, meaning in MEANINGS.items():
        if name in figures:
            typer.echo(f"  {name:<22} {figures[name]:>10.4g}  {meaning}")
    if result.evaluations:
        (first, before), (last, after) = result.evaluations[0], result.evaluations[-1]
        typer.echo(f"evaluation after step {last}" + (f" (and after step {first})" if first != last else "") + ":")
        for name, value in after.items():
            earlier = f"  ({before[name]:.4g})" if first != last and name in before else ""
            typer.echo(f"  {name:<22} {value:>10.4g}{earlier}")
    if result.skipped_steps:
        typer.echo(f"{result.skipped_steps} steps were left out; {result.folder / 'nonfinite.jsonl'} says which")
    for warning in result.warnings:
        typer.echo(f"warning: {warning}")
    for path, meaning in (
        (result.checkpoint, "the tuned weights, and all that a resumed run needs"),
        (result.folder / "log.jsonl", "the figures of every logged step"),
        (result.folder / "skipped.jsonl", "samples that were left out, with reasons"),
        (result.folder / "pictures", "heat maps of fixed samples"),
        (result.folder / "evaluation", "results of the labelled set at every step that was evaluated"),
        (result.folder / "config.yaml", "every option; ttd train with it repeats the run"),
    ):
        if path.exists():
            typer.echo(f"{path}: {meaning}")


MEANINGS = {
    "loss": "the weighted sum that was minimised",
    "tag": "L_tag: maps of tags against their own targets",
    "distill": "L_distill: the caption's map against the union of its tags' maps",
    "contrastive": "the backbone's own loss, which keeps retrieval",
    "tags_per_caption": "candidates",
    "selected_per_caption": "of them found in the picture",
    "caption_map_spread": "max - min of a caption's map; near zero means collapse",
    "images_per_second": "of all processes",
}
