"""``ttd demo``: TTD repairs single tag bias in a small model on this machine, with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttd_plugins.errors import InputError

if TYPE_CHECKING:
    from ttd_plugins.reports.demo import DemoResult

ROWS = {
    "tag_ap": "tag AP (pixel score)",
    "tag_ap_blind": "tag AP, never looking",
    "tag_f1": "tag F1",
    "caption_iou": "caption IoU",
    "tag_iou": "tag IoU",
    "tag_balance": "tag balance",
    "retrieval_r1": "retrieval R@1",
}


def command(
    out: Annotated[Path, typer.Option("--out", help="Folder for the report.")] = Path("demo"),
    seed: Annotated[int, typer.Option("--seed", help="Decides the training scenes and fresh weights.")] = 0,
    backbone: Annotated[str, typer.Option("--backbone", help="An embedded backbone.")] = "open_clip:tiny",
    steps: Annotated[int | None, typer.Option("--steps", help="Training steps of each arm.")] = None,
    scenes: Annotated[int | None, typer.Option("--scenes", help="Test scenes that are measured.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Fine-tune all weights in place of LoRA.")] = False,
) -> None:
    """Measure a backbone, tune it with TTD, measure again.

    Everything happens offline on this machine and ends in a table and a report with pictures. Stopped and started
    again, it goes on.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {out} cannot be made ({error.strerror}); give another --out") from error
    from dataclasses import replace

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ttd_plugins.reports.demo import DemoOptions, run_demo

    options = DemoOptions(backbone=backbone)
    changes: dict[str, Any] = {"seed": seed} | ({"steps": steps} if steps else {}) | ({"rank": 0} if full else {})
    options = replace(options, tuning=replace(options.tuning, **changes), scenes=scenes or options.scenes)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:

        def stage(name: str, total: int) -> Any:
            task = progress.add_task(name, total=total)
            return lambda done: progress.advance(task, done)

        result = run_demo(out, options, stage=stage)
    print_summary(result, out)


def print_summary(result: DemoResult, out: Path) -> None:
    """Print the figures before and after, what they mean, and where everything is."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, title=f"{result.settings['backbone']} on {result.settings['scenes']} test scenes")
    table.add_column("")
    for column in ("before", "control", "after TTD", "gain"):
        table.add_column(column, justify="right")
    for name, label in ROWS.items():
        best = max(result.before[name], result.control[name])
        figures = [result.before[name], result.control[name], result.after[name]]
        table.add_row(label, *(f"{figure:.3f}" for figure in figures), f"{result.after[name] - best:+.3f}")
    console = Console()
    console.print(table)
    console.print(
        "gain: after TTD against the better of before and control (the same training without TTD).\n"
        f"report: {out / 'report.html'}   figures: {out / 'metrics.json'}   pictures: {out / 'heatmaps'}",
        highlight=False,
        soft_wrap=True,
    )
