"""``ttd compare``: several backbones under one loss, with a control, in one report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttd_plugins.cli import maps

if TYPE_CHECKING:
    from ttd_plugins.comparison.results import Comparison

SOME_FAILED = 1


def command(
    backbones: Annotated[
        str,
        typer.Option(
            "--backbones",
            metavar="A,B,...",
            help="family:model@weights; a run or a demo; or NAME+PATH of a run, a demo, exported LoRA or weights.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("comparison"),
    data: Annotated[str, typer.Option("--data", help="scenes, coco_captions or cc3m_tagmask.")] = "scenes",
    root: Annotated[Path | None, typer.Option("--root", help="Folder of the data set that is measured on.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Its split.")] = None,
    pairs: Annotated[
        str | None,
        typer.Option("--pairs", help="Pairs to tune on beside a data set, as `ttd train --data` takes them."),
    ] = None,
    tune: Annotated[bool, typer.Option("--tune/--no-tune", help="Fine-tune, or measure as they are.")] = True,
    seeds: Annotated[int, typer.Option("--seeds", help="How many seeds: 0, 1 and so on.")] = 3,
    steps: Annotated[int, typer.Option("--steps", help="Training steps of each arm.")] = 200,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pairs a step.")] = 48,
    rank: Annotated[int, typer.Option("--rank", help="Rank of LoRA.")] = 16,
    full: Annotated[bool, typer.Option("--full", help="Fine-tune all weights in place of LoRA.")] = False,
    learning_rate: Annotated[
        float | None, typer.Option("--lr", help="Peak learning rate.  [default: 1e-3 on scenes, 1e-4 on pairs]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Pictures that are measured.  [default: 512 scenes, or all]")
    ] = None,
    gallery: Annotated[int, typer.Option("--gallery", help="Pictures in the report.")] = 12,
    preset: Annotated[str, typer.Option("--preset", help="Protocols on a data set: fast or paper.")] = "fast",
    tags: maps.TagsOption = "words",
    tags_option: maps.TagsSettings = None,
    rule: maps.RuleOption = None,
    threshold: maps.ThresholdOption = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--ttd", metavar="KEY=VALUE", help="Any other option of TTD, as distill_weight=5; repeatable."),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes that decode pairs.")] = 0,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", help="Arms tuned side by side on scenes.  [default: one a core, at most 4, on the CPU]"),
    ] = None,
    device: maps.DeviceOption = None,
) -> None:
    """Compare backbones before and after TTD, with a control.

    Each is measured, tuned by TTD and by the contrastive term alone, and measured again. Ends in a table and a report
    with pictures. Stopped and started again, it goes on.
    """
    import os

    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ttd_plugins.comparison.running import CompareOptions, run_comparison
    from ttd_plugins.engine import TTDOptions
    from ttd_plugins.errors import InputError, choices_sentence
    from ttd_plugins.training.run import TrainingStoppedError

    changes: dict[str, Any] = {"extractor": tags, "extractor_options": maps.parse_settings(tags_option)}
    changes |= {name: value for name, value in (("rule", rule), ("threshold", threshold)) if value is not None}
    for name, value in maps.parse_settings(option).items():
        if name not in TTDOptions.__dataclass_fields__ or name == "calibration":
            raise InputError(
                choices_sentence("option of TTD", name, set(TTDOptions.__dataclass_fields__) - {"calibration"})
            )
        changes[name] = value
    try:
        ttd = TTDOptions(**changes)
    except TypeError as error:
        raise InputError(f"an option of TTD is of the wrong type: {error}") from error
    if jobs is None:
        on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
        jobs = min(4, os.cpu_count() or 1) if data == "scenes" and on_cpu else 1
    options = CompareOptions(
        backbones=tuple(name.strip() for name in backbones.split(",") if name.strip()),
        data=data, root=root, split=split, pairs=pairs, tune=tune, seeds=seeds, steps=steps, batch_size=batch_size,
        rank=0 if full else rank, learning_rate=learning_rate, limit=limit, gallery=gallery, preset=preset,
        workers=workers, jobs=jobs, device=device, ttd=ttd,
    )  # fmt: skip
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:

        def stage(name: str, total: int) -> Any:
            # Finished bars give way, or a long run would fill the terminal.
            for task in list(progress.tasks)[:-4]:
                if task.finished:
                    progress.remove_task(task.id)
            added = progress.add_task(name, total=total)
            return lambda done: progress.advance(added, done)

        try:
            comparison = run_comparison(out, options, stage=stage)
        except TrainingStoppedError as stopped:
            typer.echo(f"{stopped}; the same command goes on", err=True)
            raise typer.Exit(stopped.status) from stopped
    print_summary(comparison, out)
    if comparison.failures:
        raise typer.Exit(SOME_FAILED)


def print_summary(comparison: Comparison, out: Path) -> None:
    """Print the table, what it means, what failed, and where everything is."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from ttd_plugins.comparison.tables import table_rows

    console, rows = Console(), table_rows(comparison)
    # On a narrow terminal one table under the other, since a figure that is cut off says nothing.
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
        before = ""
        for name, arm, texts in rows:
            if name != before and before:
                table.add_section()
            table.add_row(name if name != before else "", arm, *texts[start : start + at_once])
            before = name
        console.print(table)
    said = ["mean ± spread over seeds. control: the same training without TTD. gain: after TTD less control."]
    said += [f"{name} is left out: {reason}" for name, reason in comparison.failures.items()]
    said += [
        f"report: {out / 'report.html'}   plots: {out / 'plots'}",
        f"figures: {out / 'results.json'}, {out / 'results.csv'}, {out / 'results.md'}",
    ]
    console.print("\n".join(said), highlight=False, soft_wrap=True, markup=False)
