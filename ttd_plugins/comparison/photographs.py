"""The package's photographs before and after TTD, for the first screen of the demo's report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttd_plugins.backbone_sources import open_backbone
from ttd_plugins.comparison.captioned_data import CaptionedData
from ttd_plugins.comparison.gallery import choose_gallery, compute_view
from ttd_plugins.comparison.options import CompareOptions
from ttd_plugins.comparison.results import ARMS, Arm, PhotographEvidence, PhotographExamples, View
from ttd_plugins.embedded import PHOTOGRAPHS_FOLDER, model_folder
from ttd_plugins.embedded.folder import LORA_FOLDER, read_json
from ttd_plugins.engine import TTD
from ttd_plugins.errors import TTDError, one_sentence
from ttd_plugins.options import TTDOptions
from ttd_plugins.utils.progress import Stage, no_progress

BEFORE, AFTER = "open_clip:photo", "open_clip:photo@ttd"
SHOWN = 7
RECIPE = model_folder("open_clip_photo") / LORA_FOLDER / "recipe.json"
QUOTED = {"caption_iou": "Caption IoU", "tag_f1": "tag F1", "tag_map": "tag mAP", "retrieval_r1": "retrieval R@1"}
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
    images = choose_gallery(samples, {BEFORE: views}, count)
    return PhotographExamples(
        before=BEFORE,
        after=AFTER,
        images=images,
        chosen=(
            f"Candidates are all {len(samples)} photographs of the package that have a caption with two or more "
            "annotated things and no crowd, each with its first such caption. They are ranked by the change of Caption "
            f"IoU. Shown are {len(images)} evenly spaced ranks, from the largest gain (the first) to the largest loss "
            "(the last). None of them was in the training."
        ),
        evidence=evidence,
    )


def read_evidence(recipe: Mapping[str, Any]) -> PhotographEvidence:
    """Training and validation metrics of the shipped LoRA, from the content of its ``recipe.json``.

    Raises:
        TTDError: an entry is missing or has another form.
    """
    try:
        settings, validation = recipe["settings"], recipe["validation"]
        return PhotographEvidence(
            steps=int(settings["steps"]),
            photographs=int(settings["photographs"]),
            captions=int(settings["captions"]),
            validation=int(validation["photographs"]),
            metrics={label: {arm: float(validation[arm][key]) for arm in ARMS} for key, label in QUOTED.items()},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TTDError(f"{RECIPE} lacks an entry ({one_sentence(error)}); reinstall ttd-plugins") from error


def _photographs_with_crowds() -> set[str]:
    """Names of photographs with a crowd that annotators outlined as one region, which is far from exact."""
    content = read_json(PHOTOGRAPHS_FOLDER / "instances.json")
    names = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
    return {names[annotation["image_id"]] for annotation in content["annotations"] if annotation["iscrowd"]}
