"""``ttd demo``: TTD reduces single tag bias, on photographs and, measured exactly, on generated scenes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ttd_plugins.cli import completion
from ttd_plugins.cli.command_line import command_line
from ttd_plugins.cli.help_pages import DATA, MODEL, OUTPUT, TRAINING, examples

if TYPE_CHECKING:
    from ttd_plugins.comparison.results import Comparison


@examples(
    ("Photographs and scenes, in about five minutes on two cores", "ttd demo"),
    ("Another backbone and fewer steps", "ttd demo --backbone siglip:tiny --steps 50 --out demo-siglip"),
    ("A first look: few steps on few scenes show little gain", "ttd demo --steps 2 --scenes 16 --out look"),
)
def command(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder for the results.", rich_help_panel=OUTPUT)
    ] = Path("demo"),
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="N",
            help="Seed of the training scenes and of new weights.",
            rich_help_panel=TRAINING,
        ),
    ] = 0,
    backbone: Annotated[
        str,
        typer.Option(
            "--backbone",
            metavar="NAME",
            help="An embedded backbone.",
            rich_help_panel=MODEL,
            autocompletion=completion.backbones,
        ),
    ] = "open_clip:tiny",
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", help="Training steps of each arm.", rich_help_panel=TRAINING)
    ] = 200,
    scenes: Annotated[
        int, typer.Option("--scenes", metavar="N", help="Test scenes that are measured.", rich_help_panel=DATA)
    ] = 512,
    full: Annotated[
        bool, typer.Option("--full", help="Train all weights instead of LoRA.", rich_help_panel=TRAINING)
    ] = False,
) -> None:
    """Show TTD on photographs and train a small backbone.

    Runs offline. Photographs: `open_clip:photo` and its weights after TTD, which ship with the package. Scenes: `ttd
    compare` for one backbone and one seed. Prints a table and writes a report with heat maps. If it is stopped, the
    same command continues it.
    """
    from ttd_plugins.comparison.demo import demo_options, run_demo
    from ttd_plugins.comparison.photographs import AFTER, BEFORE
    from ttd_plugins.utils.progress import progress_bars

    rank = {"rank": 0} if full else {}
    options = demo_options(backbone, seed=seed, steps=steps, scenes=scenes, **rank)
    plan = (
        f"1. photographs of the package: maps of {BEFORE} before and after TTD ({AFTER})\n"
        f"2. {scenes} generated scenes with exact truth: {backbone} is measured, trained for {steps} steps without TTD "
        "(control) and with TTD, and measured again\n"
        f"Results go to {out}. With default options this takes about five minutes on two cores; if it is stopped, the "
        "same command continues it."
    )
    with progress_bars(width=40) as stage:
        comparison = run_demo(
            out, options, stage=stage, command=command_line(context), on_start=lambda: typer.echo(plan)
        )
    print_summary(comparison, out)


def print_summary(comparison: Comparison, out: Path) -> None:
    """Print the metrics before and after, and where the files are."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from ttd_plugins.comparison.results import ARMS
    from ttd_plugins.comparison.tables import table_rows, training_limits
    from ttd_plugins.utils.number_format import format_number

    console = Console()
    if comparison.photographs is not None:
        evidence = comparison.photographs.evidence
        title = f"{comparison.photographs.before} on {evidence.validation} photographs"
        photographs = Table(box=SIMPLE, title=title)
        for heading in ("", "before", "control", "after TTD", "gain"):
            photographs.add_column(heading, justify="right" if heading else "left")
        for label, values in evidence.metrics.items():
            gain = values["after"] - values["control"]
            photographs.add_row(label, *(format_number(values[arm]) for arm in ARMS), format_number(gain, sign=True))
        console.print(photographs)
    scenes = comparison.settings["data"]["images"]
    rows = table_rows(comparison)
    table = Table(box=SIMPLE, title=f"{rows[0][0]} on {scenes} test scenes")
    table.add_column("")
    for _, arm, _ in rows:
        table.add_column(arm, justify="right")
    for index, metric in enumerate(comparison.metrics):
        table.add_row(metric.label, *(texts[index] for _, _, texts in rows))
    console.print(table)
    console.print(
        "gain: after TTD minus control. control: the same training without TTD.\n"
        + "".join(f"{sentence}\n" for _, sentence in training_limits(comparison))
        + f"report: {out / 'report.html'}   metrics: {out / 'metrics.json'}   heat maps: {out / 'heatmaps'}",
        highlight=False,
        soft_wrap=True,
    )
