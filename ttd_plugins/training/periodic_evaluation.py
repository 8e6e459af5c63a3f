"""Evaluation during a run: on generated scenes, annotated photographs, or held-out pairs without annotations."""

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
PAIRS = "pairs"
SCENE_COUNT = 256
FOLDER = "evaluation"


def open_evaluation(options: EvaluationConfig, out: Path) -> LabelledSet | None:
    """Open and check the labelled set that ``options`` name; returns ``None`` where they name none.

    Args:
        options: ``data`` is ``"scenes"``, ``"scenes:N"``, ``"pairs:SPEC"`` with pairs as ``ttd train --data`` accepts
            them, or ``"NAME:FOLDER"`` with a reader of ``ttd eval``.
        out: folder of the run; the records and ``results.json`` of each step go into its subfolder ``evaluation``.

    Raises:
        InputError: the name is unknown, or a number or folder is missing.
        DatasetError: the layout is wrong; the message names the path.
        MissingDependencyError: the packages that draw scenes are not installed.
    """
    if options.data is None:
        return None
    name, _, rest = options.data.partition(":")
    if name == SCENES:
        return SceneSet(options, rest)
    from ttd_plugins.evaluation.datasets import CAPTIONS, LABELS, SEGMENTATION

    known = [SCENES, PAIRS, *CAPTIONS, *SEGMENTATION, *LABELS]
    if name not in known:
        raise InputError(choices_sentence("labelled set of evaluation.data", name, known, 20))
    if not rest:
        what = "SPEC" if name == PAIRS else "FOLDER"
        raise InputError(f"evaluation.data {options.data!r} must name a folder, as in {name}:{what}")
    if name in CAPTIONS:
        return CaptionedSet(options, name, rest, out / FOLDER)
    return ProtocolSet(options, name, rest, out / FOLDER)


class LabelledSet:
    """A labelled set on which a backbone is measured at some steps."""

    def check(self, ttd: TTD) -> None:
        """Check that the backbone can be measured on this set.

        Raises:
            InputError: it cannot.
        """

    def delete_after(self, step: int) -> None:
        """Delete records of later steps, which a resumed run takes again."""

    def measure(self, ttd: TTD, step: int, stage: Stage) -> dict[str, float]:
        """Return the finite metrics of the engine's backbone, by names such as ``tags/map``."""
        raise NotImplementedError


class SceneSet(LabelledSet):
    """Generated scenes of the split ``validation``, with exact ground truth."""

    def __init__(self, options: EvaluationConfig, count: str) -> None:
        from ttd_plugins.embedded.scenes import Scenes

        if count and not (count.isdecimal() and int(count) > 0):
            raise InputError(f"evaluation.data {options.data!r} must be scenes, or scenes:N with a number of scenes N")
        requested = int(count or SCENE_COUNT)
        self.count = requested if options.limit is None else min(requested, options.limit)
        self.scenes: list[Scene] = []
        # Fails now where the packages that draw scenes are missing.
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


class FileSet(LabelledSet):
    """A set in files; the results of each step go into a folder of the run.

    Args:
        folder: the folder of all steps.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def delete_after(self, step: int) -> None:
        for folder in self.folder.glob("step-*"):
            number = folder.name.partition("-")[2]
            if number.isdecimal() and int(number) > step:
                shutil.rmtree(folder, ignore_errors=True)


class ProtocolSet(FileSet):
    """Held-out pairs, masks or labels, measured by retrieval, segmentation or classification."""

    def __init__(self, options: EvaluationConfig, name: str, root: str, folder: Path) -> None:
        from ttd_plugins.evaluation.datasets import SEGMENTATION, open_named

        super().__init__(folder)
        self.kind = "pairs" if name == PAIRS else "segmentation" if name in SEGMENTATION else "labels"
        spec = root if name == PAIRS else f"{name}:{root}"
        self.reader = open_named(spec, kind=self.kind, split=options.split, limit=options.limit)  # type: ignore[arg-type]
        self.reader.check()
        self.reader.require_truth()
        self.options = self._preset(options)

    def _preset(self, options: EvaluationConfig) -> Any:
        """Return the options of the protocol, with the size of the evaluation."""
        from ttd_plugins.evaluation.protocols import CLASSIFY_PRESETS, RETRIEVAL_PRESETS, SEGMENT_PRESETS

        of_kinds: dict[str, dict[str, Any]] = {
            "pairs": {**RETRIEVAL_PRESETS},
            "segmentation": {**SEGMENT_PRESETS},
            "labels": {**CLASSIFY_PRESETS},
        }
        presets = of_kinds[self.kind]
        if options.preset not in presets:
            raise InputError(choices_sentence("preset", options.preset, presets))
        chosen = presets[options.preset]
        if options.size is None:
            return chosen
        if self.kind == "pairs":
            return replace(chosen, size=options.size)
        return replace(chosen, dense=replace(chosen.dense, size=options.size))

    def measure(self, ttd: TTD, step: int, stage: Stage) -> dict[str, float]:
        from ttd_plugins.evaluation.protocols import evaluate_classify, evaluate_retrieval, evaluate_segment

        def named(name: str, steps: int) -> Any:
            return stage(f"evaluate: {name.removesuffix(': images')}", steps)

        out = self.folder / f"step-{step:08d}"
        own = ttd.options
        if self.kind == "pairs":
            options = replace(self.options, losses=True, ttd=own)
            found = evaluate_retrieval(ttd.backbone, self.reader, options, out=out, stage=named).metrics or {}
            loss = found.pop("loss")
            metrics = {f"loss/{name}": value for name, value in loss.items()}
            metrics |= {f"retrieval/{name}": value for name, value in found.items()}
        elif self.kind == "segmentation":
            options = replace(self.options, calibration=own.calibration)
            found = evaluate_segment(ttd.backbone, self.reader, options, out=out, stage=named).metrics or {}
            metrics = {f"segment/{name}": value for name, value in found.items() if name != "classes"}
        else:
            options = replace(self.options, calibration=own.calibration)
            found = evaluate_classify(ttd.backbone, self.reader, options, out=out, stage=named).metrics or {}
            metrics = {f"labels/{name}": found["pixel"][name] for name in ("map", "f1", "class_f1")}
            metrics |= {f"labels/{score}/map": found[score]["map"] for score in ("image", "combined")}
        # The records have every embedding and are large; results.json has the metrics.
        for records in out.glob("images-*.jsonl"):
            records.unlink()
        return _numbers(metrics)


class CaptionedSet(FileSet):
    """Annotated photographs, measured by the protocols of tag selection and text-level segmentation."""

    def __init__(self, options: EvaluationConfig, name: str, root: str, folder: Path) -> None:
        from ttd_plugins.evaluation.captioned_images import open_labelled, preset_protocols

        super().__init__(folder)
        self.tags, self.text = preset_protocols(options.preset)
        if options.size is not None:
            self.tags = replace(self.tags, dense=replace(self.tags.dense, size=options.size))
            self.text = replace(self.text, dense=replace(self.text.dense, size=options.size))
        self.reader = open_labelled(name, root, limit=options.limit, split=options.split)

    def measure(self, ttd: TTD, step: int, stage: Stage) -> dict[str, float]:
        from ttd_plugins.evaluation.captioned_images import as_trained
        from ttd_plugins.evaluation.protocols import evaluate_tags, evaluate_text

        tag_options, text_options = as_trained((self.tags, self.text), ttd.options)
        out = self.folder / f"step-{step:08d}"

        def named(name: str, steps: int) -> Any:
            return stage(f"evaluate: {name.removesuffix(': images')}", steps)

        tags = evaluate_tags(ttd.backbone, self.reader, tag_options, out=out / "tags", stage=named).metrics or {}
        text = evaluate_text(ttd.backbone, self.reader, text_options, out=out / "text", stage=named).metrics or {}
        # The records have every embedding and are large; results.json has the metrics.
        for records in out.glob("*/images-*.jsonl"):
            records.unlink()
        metrics: dict[str, float] = {f"tags/{name}": value for name, value in tags["pixel"].items()}
        metrics |= {f"tags/{score}/{name}": value for score in ("image", "text") for name, value in tags[score].items()}
        metrics |= {f"retrieval/{name}": value for name, value in tags.get("retrieval", {}).items()}
        metrics |= {f"text/{name}": text[name] for name in ("caption_iou", "mfpr", "mfnr", "tag_balance")}
        return _numbers(metrics)


def callback_metrics(returned: Any) -> dict[str, float]:
    """Return the metrics of a callback as numbers; tensors and arrays of one element are converted.

    Raises:
        InputError: the callback returned no mapping, or a metric is not a number.
    """
    if not isinstance(returned, Mapping):
        raise InputError(f"evaluate must return metrics by name, such as {{'iou': 0.5}}, not {type(returned).__name__}")
    metrics = {}
    for name, value in returned.items():
        try:
            number = value.item() if hasattr(value, "item") else value
            # float() would parse a text.
            if isinstance(number, str | bytes | bytearray):
                raise TypeError
            metrics[str(name)] = float(number)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise InputError(
                f"evaluate returned the metric {name!r} as {type(value).__name__}, which is not one number; return a "
                "float, or a tensor of one element"
            ) from None
    return metrics


def _numbers(values: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """Return the finite numbers of a nested mapping, by names such as ``outer/inner``."""
    flat = flatten(values, "/", before)
    return {k: float(v) for k, v in flat.items() if isinstance(v, int | float) and math.isfinite(v)}
