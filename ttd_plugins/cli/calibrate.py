"""``ttd calibrate``: fit the map from cosine to probability of a backbone."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ttd_plugins.cli import image_maps
from ttd_plugins.errors import InputError


def command(
    name: Annotated[str, typer.Argument(help=image_maps.BACKBONE_FORMS, show_default=False)],
    backbone_option: image_maps.BackboneSettings = None,
    scenes: Annotated[int, typer.Option("--scenes", help="Validation scenes; a quarter is held out.")] = 400,
    seed: Annotated[int, typer.Option("--seed", help="Decides the held-out set and the borrowed words.")] = 0,
    device: image_maps.DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead.")] = False,
) -> None:
    """Fit the map from cosine to probability on generated scenes.

    In Python, ttd_plugins.calibration.fit_calibration(backbone, pairs) fits it on your own pairs.
    """
    if scenes < 1:
        raise InputError(f"--scenes must be 1 or more, not {scenes}")
    from PIL import Image

    from ttd_plugins.calibration import fit_calibration
    from ttd_plugins.embedded.scenes import Scenes
    from ttd_plugins.plugins import load

    backbone = load(name, device=device, **image_maps.parse_settings(backbone_option))
    images = ((Image.fromarray(scene.image), scene.caption) for scene in Scenes("validation", scenes))
    fit = fit_calibration(backbone, images, seed=seed)
    if as_json:
        typer.echo(json.dumps({"backbone": name, "scenes": scenes, "seed": seed, **fit.as_dict()}, indent=2))
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
