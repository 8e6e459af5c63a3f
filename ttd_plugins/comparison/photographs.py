"""The package's photographs before and after TTD, for the first screen of the demo's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ttd_plugins.backbone_sources import open_backbone
from ttd_plugins.comparison.captioned_data import CaptionedData
from ttd_plugins.comparison.gallery import choose_gallery, compute_view
from ttd_plugins.comparison.options import CompareOptions
from ttd_plugins.comparison.results import (
    ARMS,
    Arm,
    GalleryImage,
    PhotographEvidence,
    PhotographExamples,
    View,
)
from ttd_plugins.embedded import PHOTOGRAPHS_FOLDER, model_folder
from ttd_plugins.embedded.folder import LORA_FOLDER, read_json
from ttd_plugins.engine import TTD
from ttd_plugins.errors import TTDError, one_sentence
from ttd_plugins.evaluation.metrics import tag_balance, upsample_map
from ttd_plugins.options import TTDOptions
from ttd_plugins.utils.number_format import format_number
from ttd_plugins.utils.progress import Stage, no_progress

BEFORE, AFTER = "open_clip:photo", "open_clip:photo@ttd"
SHOWN = 7
RECIPE = model_folder("open_clip_photo") / LORA_FOLDER / "recipe.json"
QUOTED = {
    "tag_balance": "tag balance",
    "caption_iou": "Caption IoU",
    "tag_f1": "tag F1",
    "tag_map": "tag mAP",
    "retrieval_r1": "retrieval R@1",
    "zero_shot_top1": "zero-shot top-1",
}
"""Metrics of the recipe that the report quotes."""


def photograph_examples(
    count: int = SHOWN, *, options: TTDOptions | None = None, stage: Stage = no_progress
) -> PhotographExamples:
    """Compute the maps of the package's photographs before and after TTD, and choose which are shown.

    Args:
        count: number of photographs that are shown.
        options: options of the engine, which decide the candidate tags and their selection.
        stage: progress callback.

    Raises:
        MissingDependencyError: open_clip or peft is not installed.
        TTDError: a file of the package is absent or damaged.
    """
    evidence = read_evidence(read_json(RECIPE))
    data = CaptionedData(CompareOptions((BEFORE,), data="coco_captions", root=PHOTOGRAPHS_FOLDER, tune=False))
    crowds = _photographs_with_crowds()
    samples = [sample for sample in data.samples(len(data.reader.keys())) if sample.key not in crowds]
    advance = stage("photographs", 2 * len(samples))
    views: list[dict[Arm, View]] = [{} for _ in samples]
    arms: tuple[tuple[Arm, str], ...] = (("before", BEFORE), ("after", AFTER))
    for arm, name in arms:
        ttd = TTD(open_backbone(name), options or TTDOptions())
        for sample, by_arm in zip(samples, views, strict=True):
            by_arm[arm] = compute_view(ttd, sample)
            advance(1)
    images = choose_gallery(samples, {BEFORE: views}, len(samples))
    balance = {image.key: {arm: _balance(image, arm) for arm, _ in arms} for image in images}
    return PhotographExamples(
        before=BEFORE,
        after=AFTER,
        images=_evenly_ranked(images, balance, count),
        balance=balance,
        chosen=_rule(images, balance, count),
        evidence=evidence,
    )


def _balance(image: GalleryImage, arm: Arm) -> float:
    """Tag balance of the caption map of one photograph."""
    regions = list(image.truth.values())
    return tag_balance(upsample_map(image.views[BEFORE][arm].caption, *regions[0].shape), regions)


def _evenly_ranked(
    images: Sequence[GalleryImage], balance: Mapping[str, Mapping[Arm, float]], count: int
) -> list[GalleryImage]:
    """``count`` evenly spaced ranks by the change of tag balance, the largest gain and the largest loss included."""

    def change(image: GalleryImage) -> float:
        return balance[image.key]["after"] - balance[image.key]["before"]

    ranking = sorted(images, key=change, reverse=True)
    places = sorted(set(np.linspace(0, len(ranking) - 1, min(count, len(ranking))).round().astype(int).tolist()))
    return [
        replace(
            ranking[place],
            why=f"rank {place + 1} of {len(ranking)} photographs by the change of tag balance: "
            f"{format_number(change(ranking[place]), sign=True)}",
        )
        for place in places
    ]


def _rule(images: Sequence[GalleryImage], balance: Mapping[str, Mapping[Arm, float]], count: int) -> str:
    """Say how the photographs were chosen, and what changes on all candidates."""
    ious = {arm: [image.views[BEFORE][arm].iou for image in images] for arm in ("before", "after")}
    mean = {arm: float(np.mean([value for value in values if value is not None])) for arm, values in ious.items()}
    even = {arm: float(np.mean([of_image[arm] for of_image in balance.values()])) for arm in ("before", "after")}
    return (
        f"Candidates are all {len(images)} photographs of the package that have a caption with two or more annotated "
        "things and no crowd, each with its first such caption. They are ranked by the change of tag balance, which "
        f"measures single tag bias. Shown are {min(count, len(images))} evenly spaced ranks, from the largest gain "
        "(first) to the largest loss (last). The training of the LoRA had none of these photographs; that of the "
        "backbone had crops of them without captions or labels. Means over all candidates: "
        f"tag balance {format_number(even['before'])} before and {format_number(even['after'])} after TTD, Caption IoU "
        f"{format_number(mean['before'])} before and {format_number(mean['after'])} after TTD."
    )


def read_evidence(recipe: Mapping[str, Any]) -> PhotographEvidence:
    """Training and validation metrics of the shipped LoRA, from the content of its ``recipe.json``.

    Raises:
        TTDError: an entry is missing or has another form.
    """
    try:
        settings, validation = recipe["settings"], recipe["validation"]
        means = {arm: validation["means"][arm] for arm in ARMS}
        return PhotographEvidence(
            seeds=int(settings["seeds"]),
            steps=int(settings["steps"]),
            photographs=int(settings["photographs"]),
            captions=int(settings["captions"]),
            validation=int(validation["photographs"]),
            metrics={label: {arm: float(means[arm][key]) for arm in ARMS} for key, label in QUOTED.items()},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TTDError(f"{RECIPE} lacks an entry ({one_sentence(error)}); reinstall ttd-plugins") from error


def _photographs_with_crowds() -> set[str]:
    """Names of photographs with a crowd that annotators outlined as one region, which is far from exact."""
    content = read_json(PHOTOGRAPHS_FOLDER / "instances.json")
    names = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
    return {names[annotation["image_id"]] for annotation in content["annotations"] if annotation["iscrowd"]}
