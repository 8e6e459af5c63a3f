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
from ttd_plugins.progress import Stage, counted
from ttd_plugins.training.config import EvaluationConfig

if TYPE_CHECKING:
    from ttd_plugins.embedded.scenes import Scene
    from ttd_plugins.evaluation.datasets import CaptionData

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
        from ttd_plugins.embedded.scenes import Scenes

        height, width = ttd.backbone.description.image_size
        if height != width:
            raise InputError(
                f"scenes are square, and {ttd.backbone.description.name} prefers {height} x {width} pixels"
            )
        Scenes("validation", 1, side=height)

    def measure(self, ttd: TTD, step: int, stage: Stage) -> dict[str, float]:
        from ttd_plugins.embedded.scenes import Scenes
        from ttd_plugins.evaluation.scenes import measure_on_scenes

        if not self.scenes:
            side = ttd.backbone.description.image_size[0]
            drawn = Scenes("validation", self.count, side=side)
            self.scenes = counted(drawn, stage("draw scenes", self.count))
        found = measure_on_scenes(ttd, self.scenes, progress=stage("evaluate: scenes", len(self.scenes))).as_dict()
        found.pop("scenes")
        return {f"scenes/{name}": value for name, value in _flat(found).items()}


class CaptionedSet(LabelledSet):
    """Annotated photographs, by the protocols of tag selection and text-level segmentation."""

    def __init__(self, options: EvaluationConfig, name: str, root: str, folder: Path) -> None:
        from ttd_plugins.evaluation.datasets import CAPTIONS, open_captions
        from ttd_plugins.evaluation.protocols import TAG_PRESETS

        if name not in CAPTIONS:
            raise InputError(choices_sentence("labelled set of evaluation.data", name, [SCENES, *CAPTIONS]))
        if not root:
            raise InputError(f"evaluation.data {options.data!r} must say where the labelled set is: {name}:FOLDER")
        if options.preset not in TAG_PRESETS:
            raise InputError(choices_sentence("preset", options.preset, TAG_PRESETS))
        more: dict[str, Any] = {"limit": options.most, "split": options.split}
        self.reader: CaptionData = open_captions(
            name, root, **{key: value for key, value in more.items() if value is not None}
        )
        if not len(self.reader):
            raise InputError(f"{root!r} holds no captioned picture")
        self.reader.check()
        self.options, self.folder = options, folder

    def forget(self, after: int) -> None:
        for kept in self.folder.glob("step-*"):
            if int(kept.name.partition("-")[2]) > after:
                shutil.rmtree(kept, ignore_errors=True)

    def measure(self, ttd: TTD, step: int, stage: Stage) -> dict[str, float]:
        from ttd_plugins.evaluation.protocols import TAG_PRESETS, TEXT_PRESETS, evaluate_tags, evaluate_text

        options = ttd.options
        # The words, the rule and the threshold of the run itself, so that its own selection is what is measured.
        tag_options = replace(
            TAG_PRESETS[self.options.preset],
            extractor=options.extractor,
            extractor_options=options.extractor_options,
            template=options.template,
            rule=options.rule,
            threshold=options.threshold,
            calibration=options.calibration,
        )
        text_options = replace(TEXT_PRESETS[self.options.preset], calibration=options.calibration)
        if self.options.size is not None:
            tag_options = replace(tag_options, dense=replace(tag_options.dense, size=self.options.size))
            text_options = replace(text_options, dense=replace(text_options.dense, size=self.options.size))
        out = self.folder / f"step-{step:08d}"

        def named(name: str, steps: int) -> Any:
            return stage(f"evaluate: {name.removesuffix(': images')}", steps)

        tags = evaluate_tags(ttd.backbone, self.reader, tag_options, out=out / "tags", stage=named).figures or {}
        text = evaluate_text(ttd.backbone, self.reader, text_options, out=out / "text", stage=named).figures or {}
        # They hold every embedding; results.json has what came of them.
        for records in out.glob("*/images-*.jsonl"):
            records.unlink()
        figures: dict[str, float] = {f"tags/{name}": value for name, value in tags["pixel"].items()}
        figures |= {f"tags/{score}/{name}": value for score in ("image", "text") for name, value in tags[score].items()}
        figures |= {f"retrieval/{name}": value for name, value in tags.get("retrieval", {}).items()}
        figures |= {f"text/{name}": text[name] for name in ("caption_iou", "mfpr", "mfnr", "tag_balance")}
        return _flat(figures)


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """Finite numbers by their names; those of a nested mapping as ``outer/inner``."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found[before + name] = float(value)
    return found
