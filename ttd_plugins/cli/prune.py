"""``ttd prune``: score image-text pairs by similarity, so that trainings can drop the worst."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ttd_plugins.cli import image_maps
from ttd_plugins.cli.config_flags import flags_of, nested, print_json, with_flags
from ttd_plugins.cli.help_pages import DATA, OUTPUT, examples
from ttd_plugins.cli.train import PAIR_COLUMNS
from ttd_plugins.training.config import BackboneConfig, DataConfig

# The source is the command's argument, and all captions are scored in their order.
FLAGS = [
    *flags_of(
        BackboneConfig,
        "backbone.",
        defaults=BackboneConfig(name=image_maps.DEFAULT_BACKBONE),
    ),
    *flags_of(DataConfig, "data.", skip=("data.source", "data.captions", "data.loader")),
    *PAIR_COLUMNS,
]


@examples(
    ("Score the pairs of a folder", "ttd prune pairs/ --out scores.jsonl"),
    (
        "Train without the worst tenth of them",
        "ttd train --backbone open_clip:tiny --data pairs/ --steps 2 --batch-size 4 \\\n"
        "    --data-option keep=scores.jsonl --data-option quantile=0.1 \\\n"
        "    --out runs/pruned",
    ),
    (
        "As the paper does, on shards of CC12M",
        "ttd prune cc12m/ --backbone open_clip:ViT-B-16@openai --workers 8 \\\n    --out scores.parquet",
    ),
)
@with_flags(FLAGS)
def command(
    spec: Annotated[
        str,
        typer.Argument(metavar="PAIRS", help="Folder, table, COCO JSON, shards or hf:NAME.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            help="File for the scores, .jsonl or .parquet.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ],
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", help="Pairs in a batch.", rich_help_panel=DATA)
    ] = 64,
    allow_pipe: image_maps.AllowPipeOption = False,
    device: image_maps.DeviceOption = None,
    as_json: image_maps.JsonOption = False,
    *,
    given: dict[str, Any],
) -> None:
    """Score image-text pairs by their image-text similarity.

    An interrupted run continues. Trainings read the scores with the data options keep=FILE and threshold or quantile.
    """
    sections: dict[str, Any] = {"backbone": {}, "data": {}} | nested(given)
    backbone = BackboneConfig(**{"name": image_maps.DEFAULT_BACKBONE, **sections["backbone"]})
    data = DataConfig(source=spec, **sections["data"])
    assert backbone.name is not None
    from ttd_plugins.data.shard_urls import allow_pipe as pipe_permission
    from ttd_plugins.data.source_detection import open_pairs

    with pipe_permission(allow_pipe):
        source = open_pairs(spec, **data.options)
    from ttd_plugins.caption_maps import backbone_notes
    from ttd_plugins.data.pair_source import MapSource
    from ttd_plugins.data.pruning import quantiles, require_scores_file, score_pairs
    from ttd_plugins.plugins import load
    from ttd_plugins.utils.progress import progress_bars

    require_scores_file(out)
    model = load(backbone.name, device=device, **backbone.options)
    image_maps.warn_of(backbone_notes(model.description))
    total = int(source.caption_counts().sum()) if isinstance(source, MapSource) else None
    with progress_bars(terminal_only=True) as stage:
        result = score_pairs(
            source,
            model,
            out,
            size=data.image_size,
            batch_size=batch_size,
            workers=data.workers,
            max_skipped=data.max_skipped,
            on_batch=stage("scoring", total),
        )
    scored = int((result.scores.captions >= 0).sum())
    below = quantiles(result.scores)
    if as_json:
        answer = {"file": str(out), "scored": scored, "skipped": len(result.skipped), "quantiles": below}
        print_json(answer | {"settings": result.scores.settings})
        return
    typer.echo(f"{source.summary}: {scored:,} pairs scored, {len(result.skipped):,} samples skipped")
    for share, value in below.items():
        typer.echo(f"  {share:4.0%} of the pairs are below {value:.4f}")
    typer.echo(f"scores: {out}")
    if result.skipped:
        typer.echo(f"skipped samples, with reasons: {out}.skipped.jsonl")
