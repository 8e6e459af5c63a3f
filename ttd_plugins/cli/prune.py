"""``ttd prune``: score image-text pairs by similarity once, so that trainings can leave out the worst."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ttd_plugins.cli import maps
from ttd_plugins.errors import InputError


def command(
    spec: Annotated[str, typer.Argument(help="Folder, table, COCO JSON, shards or hf:NAME.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="File for the scores, .jsonl or .parquet.", show_default=False)],
    backbone: maps.BackboneOption = maps.DEFAULT_BACKBONE,
    backbone_option: maps.BackboneSettings = None,
    images: Annotated[Path | None, typer.Option("--images", help="Folder that paths start from.")] = None,
    image_column: Annotated[str | None, typer.Option("--image-column", help="Column of pictures.")] = None,
    caption_column: Annotated[str | None, typer.Option("--caption-column", help="Column or field of captions.")] = None,
    data_option: Annotated[
        list[str] | None,
        typer.Option("--data-option", metavar="KEY=VALUE", help="An option of the source, as split=test; repeatable."),
    ] = None,
    size: maps.SizeOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pairs that are scored at once.")] = 64,
    workers: Annotated[int, typer.Option("--workers", help="Processes that decode; 0 decodes in this one.")] = 0,
    max_skipped: Annotated[
        str | None,
        typer.Option("--max-skipped", help="Stop past this many broken samples, or this share: 100 or 0.01."),
    ] = None,
    device: maps.DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead.")] = False,
) -> None:
    """Score image-text pairs by their similarity.

    Stopped and started again, it goes on. The scores are used by keep=FILE with a threshold or a quantile.
    """
    from ttd_plugins.data.source_detection import open_pairs

    options: dict[str, Any] = maps.parse_settings(data_option)
    source = open_pairs(spec, images=images, image_column=image_column, caption_column=caption_column, **options)
    limit = parse_limit(max_skipped)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ttd_plugins.data.pair_source import MapSource
    from ttd_plugins.data.pruning import quantiles, require_scores_file, score_pairs
    from ttd_plugins.plugins import load

    require_scores_file(out)
    model = load(backbone, device=device, **maps.parse_settings(backbone_option))
    total = int(source.caption_counts().sum()) if isinstance(source, MapSource) else None
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("scoring", total=total)
        result = score_pairs(
            source,
            model,
            out,
            size=maps.parse_size(size),
            batch_size=batch_size,
            workers=workers,
            max_skipped=limit,
            on_batch=lambda done: progress.advance(task, done),
        )
    scored = int((result.scores.captions >= 0).sum())
    below = quantiles(result.scores)
    if as_json:
        answer = {"file": str(out), "scored": scored, "skipped": len(result.skipped), "quantiles": below}
        typer.echo(json.dumps(answer | {"settings": result.scores.settings}, indent=2))
        return
    typer.echo(f"{source.summary}: {scored:,} pairs scored, {len(result.skipped):,} samples skipped")
    for share, value in below.items():
        typer.echo(f"  {share:4.0%} of the pairs are below {value:.4f}")
    typer.echo(f"scores: {out}")
    if result.skipped:
        typer.echo(f"skipped samples and why: {out}.skipped.jsonl")


def parse_limit(text: str | None) -> int | float | None:
    """``"100"`` as a number of samples and ``"0.01"`` as a share of them.

    Raises:
        InputError: it is neither.
    """
    if text is None:
        return None
    try:
        return int(text) if text.strip().isdigit() else float(text)
    except ValueError as error:
        raise InputError(f"--max-skipped must be a number of samples or a share such as 0.01, not {text!r}") from error
