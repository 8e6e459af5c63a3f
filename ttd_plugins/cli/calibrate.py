"""``ttd calibrate``: fit the map from cosine to probability of a backbone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from ttd_plugins.cli import image_maps
from ttd_plugins.cli.config_flags import with_flags
from ttd_plugins.cli.help_pages import DATA, examples
from ttd_plugins.cli.train import PAIR_COLUMNS
from ttd_plugins.errors import InputError

DEFAULT_COUNT = 400
"""Scenes or pairs of a fit."""


@examples(
    ("On generated scenes", "ttd calibrate open_clip:tiny --scenes 40"),
    ("On pairs of your own", "ttd calibrate open_clip:photo --data pairs/ --limit 100"),
    ("A pretrained backbone", "ttd calibrate siglip:ViT-B-16-SigLIP@webli --data pairs/"),
)
@with_flags(PAIR_COLUMNS)
def command(
    name: image_maps.BackboneArgument,
    backbone_option: image_maps.BackboneSettings = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="PAIRS",
            help="Image-text pairs of your own, as `ttd train --data` accepts them.  [default: scenes]",
            rich_help_panel=DATA,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            help=f"Most pairs of --data, drawn at random.  [default: {DEFAULT_COUNT}]",
            rich_help_panel=DATA,
        ),
    ] = None,
    size: image_maps.SizeOption = None,
    scenes: Annotated[
        int | None,
        typer.Option(
            "--scenes",
            metavar="N",
            help=f"Validation scenes without --data; a quarter is held out.  [default: {DEFAULT_COUNT}]",
            rich_help_panel=DATA,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", metavar="N", help="Decides the held-out set and the borrowed words.", rich_help_panel=DATA
        ),
    ] = 0,
    allow_pipe: image_maps.AllowPipeOption = False,
    device: image_maps.DeviceOption = None,
    as_json: image_maps.JsonOption = False,
    *,
    given: dict[str, Any],
) -> None:
    """Fit the map from cosine to probability.

    The pairs are generated scenes, or your own with --data.

    In Python, ttd_plugins.calibration.fit_calibration(backbone, pairs) does it.
    """
    for flag, value, other in (("--scenes", scenes, data is not None), ("--limit", limit, data is None)):
        if value is not None and value < 1:
            raise InputError(f"{flag} must be 1 or more, not {value}")
        if value is not None and other:
            raise InputError(f"{flag} does not apply {'with' if data is not None else 'without'} --data")
    if data is None and given:
        raise InputError("the columns of pairs do not apply without --data")
    from ttd_plugins.calibration import fit_calibration
    from ttd_plugins.data.shard_urls import allow_pipe as pipe_permission
    from ttd_plugins.plugins import load

    pairs: Iterable[Any]
    what: dict[str, Any]
    if data is not None:
        options = {path.rpartition(".")[2]: value for path, value in given.items()}
        with pipe_permission(allow_pipe):
            pairs, what = _own_pairs(data, limit or DEFAULT_COUNT, seed, options)
        backbone = load(name, device=device, **image_maps.parse_settings(backbone_option))
    else:
        what = {"scenes": scenes or DEFAULT_COUNT}
        # Before the scenes are drawn, so that a wrong name is reported at once.
        backbone = load(name, device=device, **image_maps.parse_settings(backbone_option))
        pairs = _scenes(what["scenes"])
    fit = fit_calibration(backbone, pairs, size=image_maps.parse_size(size), seed=seed)
    if as_json:
        typer.echo(json.dumps({"backbone": name, **what, "seed": seed, **fit.as_dict()}, indent=2))
        return
    for label, calibration, loss in (
        ("default", fit.default, fit.default_log_loss),
        ("fitted", fit.calibration, fit.log_loss),
    ):
        numbers = f"scale {calibration.scale:8.3f}  shift {calibration.shift:8.3f}"
        typer.echo(f"{label:<8} {numbers}  log-loss {loss:.4f} on {fit.held_out_images} held-out images")
    typer.echo(
        f"use it: TTDOptions(calibration=Calibration(scale={fit.calibration.scale:.6g}, "
        f"shift={fit.calibration.shift:.6g}))"
    )


def _scenes(count: int) -> Iterable[tuple[Any, str]]:
    from PIL import Image

    from ttd_plugins.embedded.scenes import Scenes

    return ((Image.fromarray(scene.image), scene.caption) for scene in Scenes("validation", count))


def _own_pairs(spec: str, limit: int, seed: int, options: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return pairs, and what describes them in the result.

    Raises:
        InputError: there are no usable pairs.
    """
    from ttd_plugins.data import open_pairs
    from ttd_plugins.data.pair_sample import sample_pairs

    pairs, skipped = sample_pairs(open_pairs(spec, **options), limit, seed)
    if skipped:
        key, reason = next(iter(skipped.items()))
        typer.echo(f"warning: {len(skipped)} pairs are left out, such as {key!r}: {reason}", err=True)
    if not pairs:
        raise InputError(f"no pair of {spec!r} can be used")
    return pairs, {"data": spec, "pairs": len(pairs), "skipped": len(skipped)}
