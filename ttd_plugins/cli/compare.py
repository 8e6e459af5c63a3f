"""``ttd compare``: several backbones before and after TTD, with a control, in one report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttd_plugins.cli import completion, image_maps
from ttd_plugins.cli.command_line import command_line
from ttd_plugins.cli.config_flags import flags_of, nested, with_flags
from ttd_plugins.cli.help_pages import MODEL, OBJECTIVE, OUTPUT, RUN, TRAINING, examples
from ttd_plugins.comparison.options import CompareOptions, default_jobs
from ttd_plugins.options import TTDOptions

if TYPE_CHECKING:
    from ttd_plugins.comparison.results import Comparison

SOME_FAILED = 1
"""Exit status if a backbone failed."""


FLAGS = flags_of(CompareOptions, skip=("backbones", "jobs"))


@examples(
    (
        "Two embedded backbones on generated scenes, without a network",
        "ttd compare --backbones openai_clip:tiny,siglip:tiny --seeds 1 --steps 20",
    ),
    (
        "Pretrained backbones as they are, on COCO captions with masks",
        "ttd compare --data coco_captions:coco/ --no-tune --out runs/before \\\n"
        "    --backbones open_clip:ViT-B-16@openai,siglip:ViT-B-16-SigLIP@webli",
    ),
    (
        "Train each on your own pairs, and measure held-out ones",
        "ttd compare --backbones open_clip:photo,open_clip:tiny --pairs pairs/ \\\n"
        "    --data pairs:heldout/ --seeds 1 --steps 2 --batch-size 4 --out runs/own",
    ),
)
@with_flags(FLAGS)
def command(
    context: typer.Context,
    backbones: Annotated[
        str,
        typer.Option(
            "--backbones",
            metavar="NAME,NAME,...",
            rich_help_panel=MODEL,
            autocompletion=completion.backbone_list,
            help="Comma-separated: family:model@weights; the folder of a run (RUN or RUN@STEP), an export or a demo; "
            "or NAME+PATH, where PATH is LoRA, a run, an export, a demo or a file of weights.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder for the results.", rich_help_panel=OUTPUT)
    ] = Path("comparison"),
    full: Annotated[
        bool,
        typer.Option("--full", help="Train all weights instead of LoRA, as --rank 0.", rich_help_panel=TRAINING),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            metavar="N",
            help="Arms trained at once on scenes.  [default: one per core, at most 4, on the CPU]",
            rich_help_panel=RUN,
        ),
    ] = None,
    allow_pipe: image_maps.AllowPipeOption = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--ttd",
            metavar="KEY=VALUE",
            help="An option of TTD, as distill_weight=5; repeatable.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    *,
    given: dict[str, Any],
) -> None:
    """Compare backbones before and after TTD, with a control.

    Each backbone is measured, trained by TTD and by the contrastive term alone, and measured again. Prints a table and
    writes a report. If it is stopped, the same command continues it.
    """
    from ttd_plugins.comparison.running import run_comparison
    from ttd_plugins.data.shard_urls import allow_pipe as pipe_permission
    from ttd_plugins.training.stop_signals import TrainingStoppedError
    from ttd_plugins.utils.progress import progress_bars

    values: dict[str, Any] = {"ttd": {}} | nested(given) | ({"rank": 0} if full else {})
    values["ttd"] = TTDOptions(**values["ttd"] | image_maps.parse_settings(option))
    names = tuple(name.strip() for name in backbones.split(",") if name.strip())
    options = CompareOptions(names, **values)
    options = replace(options, jobs=default_jobs(options.data, options.device) if jobs is None else jobs)
    with pipe_permission(allow_pipe), progress_bars(width=40, keep_finished=4) as stage:
        try:
            comparison = run_comparison(out, options, stage=stage, command=command_line(context))
        except TrainingStoppedError as stopped:
            typer.echo(str(stopped), err=True)
            raise typer.Exit(stopped.status) from stopped
    print_summary(comparison, out)
    if comparison.failures:
        raise typer.Exit(SOME_FAILED)


def print_summary(comparison: Comparison, out: Path) -> None:
    """Print the table, the backbones that failed, and where the files are."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from ttd_plugins.comparison.choice import choose
    from ttd_plugins.comparison.lora_scales import scale_sentences
    from ttd_plugins.comparison.tables import table_rows, training_limits

    console, rows = Console(), table_rows(comparison)
    # On a narrow terminal, several tables below each other: a number that is cut off is useless.
    first = max((len(name) for name, _, _ in rows), default=0) + max((len(arm) for _, arm, _ in rows), default=0) + 5
    widest = max((len(text) for _, _, texts in rows for text in texts), default=0)
    widest = max(widest, *(len(figure.label) for figure in comparison.metrics)) + 2
    at_once = max((console.width - first) // widest, 1)
    for start in range(0, len(comparison.metrics), at_once):
        table = Table(box=SIMPLE)
        table.add_column("backbone", overflow="fold")
        table.add_column("")
        for figure in comparison.metrics[start : start + at_once]:
            table.add_column(figure.label, justify="right", no_wrap=True)
        previous = ""
        for name, arm, texts in rows:
            if name != previous and previous:
                table.add_section()
            table.add_row(name if name != previous else "", arm, *texts[start : start + at_once])
            previous = name
        console.print(table)
    lines = ["mean ± spread over seeds. control: the same training without TTD. gain: after TTD minus control."]
    lines += [sentence for _, sentence in training_limits(comparison)]
    choice = choose(comparison)
    lines += [] if choice is None else choice.sentences
    scales = scale_sentences(comparison)
    lines += [*scales, "`ttd train` and `ttd export` take --lora-scale."] if scales else []
    lines += [f"{name} failed: {reason}" for name, reason in comparison.failures.items()]
    lines += [
        f"report: {out / 'report.html'}   plots: {out / 'plots'}",
        f"metrics: {out / 'results.json'}, {out / 'results.csv'}, {out / 'results.md'}",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
