"""``ttd compare``: several backbones before and after TTD, with a control, in one report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttd_plugins.cli import image_maps
from ttd_plugins.cli.command_line import command_line

if TYPE_CHECKING:
    from ttd_plugins.comparison.results import Comparison
    from ttd_plugins.options import TTDOptions

SOME_FAILED = 1
"""Exit status if a backbone failed."""


def command(
    context: typer.Context,
    backbones: Annotated[
        str,
        typer.Option(
            "--backbones",
            metavar="A,B,...",
            help="Comma-separated: family:model@weights; the folder of a run or a demo; or NAME+PATH, where PATH is a "
            "run, an export, a demo or a file of weights.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("comparison"),
    data: Annotated[str, typer.Option("--data", help="scenes, coco_captions or cc3m_tagmask.")] = "scenes",
    root: Annotated[Path | None, typer.Option("--root", help="Folder of the data set.")] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Split of the data set.  [default: that of the data set]")
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option("--pairs", help="Image-text pairs to train on, as for `ttd train --data`; scenes need none."),
    ] = None,
    tune: Annotated[bool, typer.Option("--tune/--no-tune", help="Train, or measure as loaded.")] = True,
    seeds: Annotated[int, typer.Option("--seeds", help="Number of seeds.")] = 3,
    first_seed: Annotated[int, typer.Option("--first-seed", help="The first seed; the others follow it.")] = 0,
    steps: Annotated[int, typer.Option("--steps", help="Training steps of each arm.")] = 200,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pairs per step.")] = 48,
    rank: Annotated[int, typer.Option("--rank", help="Rank of LoRA.")] = 16,
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of LoRA.")] = False,
    learning_rate: Annotated[
        float | None, typer.Option("--lr", help="Peak learning rate.  [default: 1e-3 on scenes, 1e-4 on pairs]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Images that are measured.  [default: 512 scenes, or all]")
    ] = None,
    gallery: Annotated[int, typer.Option("--gallery", help="Images in the report.")] = 12,
    preset: Annotated[str, typer.Option("--preset", help="Protocols on a data set: fast or paper.")] = "fast",
    tags: image_maps.TagsOption = "words",
    tags_option: image_maps.TagsSettings = None,
    rule: image_maps.RuleOption = None,
    threshold: image_maps.ThresholdOption = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--ttd", metavar="KEY=VALUE", help="Any other option of TTD, as distill_weight=5; repeatable."),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes that decode pairs.")] = 0,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", help="Arms trained at a time on scenes.  [default: one per core, at most 4, on the CPU]"
        ),
    ] = None,
    device: image_maps.DeviceOption = None,
) -> None:
    """Compare backbones before and after TTD, with a control.

    Each backbone is measured, trained by TTD and by the contrastive term alone, and measured again. Prints a table and
    writes a report. If it is stopped, the same command continues it.
    """
    from ttd_plugins.comparison.options import CompareOptions, default_jobs
    from ttd_plugins.comparison.running import run_comparison
    from ttd_plugins.training.stop_signals import TrainingStoppedError
    from ttd_plugins.utils.progress import progress_bars

    options = CompareOptions(
        backbones=tuple(name.strip() for name in backbones.split(",") if name.strip()),
        data=data, root=root, split=split, pairs=pairs, tune=tune, seeds=seeds, first_seed=first_seed, steps=steps,
        batch_size=batch_size, rank=0 if full else rank, learning_rate=learning_rate, limit=limit, gallery=gallery,
        preset=preset, workers=workers, jobs=default_jobs(data, device) if jobs is None else jobs, device=device,
        ttd=ttd_options(tags, tags_option, rule, threshold, option),
    )  # fmt: skip
    with progress_bars(width=40, keep_finished=4) as stage:
        try:
            comparison = run_comparison(out, options, stage=stage, command=command_line(context))
        except TrainingStoppedError as stopped:
            typer.echo(f"{stopped}; the same command continues it", err=True)
            raise typer.Exit(stopped.status) from stopped
    print_summary(comparison, out)
    if comparison.failures:
        raise typer.Exit(SOME_FAILED)


def ttd_options(
    tags: str, tags_option: list[str] | None, rule: str | None, threshold: float | None, option: list[str] | None
) -> TTDOptions:
    """Return the options of TTD that the flags name.

    Raises:
        InputError: an option is unknown, or has the wrong type or range.
    """
    from ttd_plugins.options import TTDOptions

    changes: dict[str, Any] = {"extractor": tags, "extractor_options": image_maps.parse_settings(tags_option)}
    changes |= {name: value for name, value in (("rule", rule), ("threshold", threshold)) if value is not None}
    return TTDOptions(**changes | image_maps.parse_settings(option))


def print_summary(comparison: Comparison, out: Path) -> None:
    """Print the table, the backbones that failed, and where the files are."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from ttd_plugins.comparison.tables import table_rows

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
    lines += [f"{name} failed: {reason}" for name, reason in comparison.failures.items()]
    lines += [
        f"report: {out / 'report.html'}   plots: {out / 'plots'}",
        f"metrics: {out / 'results.json'}, {out / 'results.csv'}, {out / 'results.md'}",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
