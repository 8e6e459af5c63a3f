"""Evaluation during a run, on the labelled set that its configuration names: scenes, or annotated photographs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttd_plugins.engine import TTD
from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.training.config import EvaluationConfig
from ttd_plugins.utils.progress import Stage, list_with_progress
from ttd_plugins.utils.settings import flatten

if TYPE_CHECKING:
    from ttd_plugins.embedded.scenes import Scene

SCENES = "scenes"
SCENE_COUNT = 256
FOLDER = "evaluation"


def open_evaluation(options: EvaluationConfig, out: Path) -> LabelledSet | None:
    """The labelled set that ``options`` name, looked through; ``None`` where they name none.

    Args:
        options: ``data`` is ``"scenes"``, ``"scenes:N"``, or ``"NAME:FOLDER"`` with a reader's name as ``ttd eval``
            takes it.
        out: the folder of the run; records and ``results.json`` of each step go below its ``evaluation``.

    Raises:
        InputError: the name is unknown, or a number or folder is missing.
        DatasetError: the layout is wrong; the message names the path.
        MissingDependencyError: the packages that draw scenes are not installed.
    """
    if options.data is None:
        return None
    name, _, rest = options.data.partition(":")
    return SceneSet(options, rest) if name == SCENES else CaptionedSet(options, name, rest, out / FOLDER)


class LabelledSet:
    """Gives named figures of a backbone at a step."""

    def check(self, ttd: TTD) -> None:
        """Refuse a backbone that the set does not suit.

        Raises:
            InputError: it does not.
        """

    def forget(self, after: int) -> None:
        """Delete what was kept of steps after ``after``, whose weights a resumed run makes anew."""

    def measure(self, ttd: TTD, step: int, stage: Stage) -> dict[str, float]:
        """The figures of the engine's backbone, by names such as ``tags/map``; those that are not finite left out."""
        raise NotImplementedError


class SceneSet(LabelledSet):
    """Generated scenes of the split ``validation``, with exact ground truth."""

    def __init__(self, options: EvaluationConfig, count: str) -> None:
        from ttd_plugins.embedded.scenes import Scenes

        if count and not (count.isdecimal() and int(count) > 0):
            raise InputError(f"evaluation.data {options.data!r} must be scenes, or scenes:N with a number of scenes N")
        self.count = int(count or SCENE_COUNT) if options.most is None else min(int(count or SCENE_COUNT), options.most)
        self.scenes: list[Scene] = []
        # The packages that draw are there, or this tells.
        Scenes("validation", 1)

    def check(self, ttd: TTD) -> None:
        from ttd_plugins.evaluation.scene_protocol import check_scenes_fit

        check_scenes_fit(ttd.backbone)

    def measure(self, ttd: TTD, step: int, stage: Stage) -> dict[str, float]:
        from ttd_plugins.embedded.scenes import Scenes
        from ttd_plugins.evaluation.scene_protocol import measure_on_scenes

        if not self.scenes:
            side = ttd.backbone.description.image_size[0]
            drawn = Scenes("validation", self.count, side=side)
            self.scenes = list_with_progress(drawn, stage("draw scenes", self.count))
        found = measure_on_scenes(ttd, self.scenes, progress=stage("evaluate: scenes", len(self.scenes))).as_dict()
        found.pop("scenes")
        return _numbers(found, "scenes/")


class CaptionedSet(LabelledSet):
    """Annotated photographs, by the protocols of tag selection and text-level segmentation."""

    def __init__(self, options: EvaluationConfig, name: str, root: str, folder: Path) -> None:
        from ttd_plugins.evaluation.captioned_images import open_labelled, preset_protocols
        from ttd_plugins.evaluation.datasets import CAPTIONS

        if name not in CAPTIONS:
            raise InputError(choices_sentence("labelled set of evaluation.data", name, [SCENES, *CAPTIONS]))
        if not root:
            raise InputError(f"evaluation.data {options.data!r} must say where the labelled set is: {name}:FOLDER")
        self.tags, self.text = preset_protocols(options.preset)
        if options.size is not None:
            self.tags = replace(self.tags, dense=replace(self.tags.dense, size=options.size))
            self.text = replace(self.text, dense=replace(self.text.dense, size=options.size))
        self.reader = open_labelled(name, root, limit=options.most, split=options.split)
        self.folder = folder

    def forget(self, after: int) -> None:
        for kept in self.folder.glob("step-*"):
            if int(kept.name.partition("-")[2]) > after:
                shutil.rmtree(kept, ignore_errors=True)

    def measure(self, ttd: TTD, step: int, stage: Stage) -> dict[str, float]:
        from ttd_plugins.evaluation.captioned_images import as_trained
        from ttd_plugins.evaluation.protocols import evaluate_tags, evaluate_text

        tag_options, text_options = as_trained((self.tags, self.text), ttd.options)
        out = self.folder / f"step-{step:08d}"

        def named(name: str, steps: int) -> Any:
            return stage(f"evaluate: {name.removesuffix(': images')}", steps)

        tags = evaluate_tags(ttd.backbone, self.reader, tag_options, out=out / "tags", stage=named).metrics or {}
        text = evaluate_text(ttd.backbone, self.reader, text_options, out=out / "text", stage=named).metrics or {}
        # They hold every embedding; results.json has what came of them.
        for records in out.glob("*/images-*.jsonl"):
            records.unlink()
        figures: dict[str, float] = {f"tags/{name}": value for name, value in tags["pixel"].items()}
        figures |= {f"tags/{score}/{name}": value for score in ("image", "text") for name, value in tags[score].items()}
        figures |= {f"retrieval/{name}": value for name, value in tags.get("retrieval", {}).items()}
        figures |= {f"text/{name}": text[name] for name in ("caption_iou", "mfpr", "mfnr", "tag_balance")}
        return _numbers(figures)


def _numbers(values: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """Finite numbers by their names; those of a nested mapping as ``outer/inner``."""
    flat = flatten(values, "/", before)
    return {k: float(v) for k, v in flat.items() if isinstance(v, int | float) and math.isfinite(v)}
