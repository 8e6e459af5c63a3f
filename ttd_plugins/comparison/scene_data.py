"""Comparison on generated scenes with exact ground truth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.comparison.data_interface import Curve, Measurement, Sample, finite_or_none
from ttd_plugins.comparison.metric_definitions import SCENE_METRICS
from ttd_plugins.comparison.options import SCENES, CompareOptions
from ttd_plugins.embedded.scenes import ATTRIBUTION, Scene, Scenes
from ttd_plugins.engine import TTD
from ttd_plugins.evaluation.scene_protocol import check_scenes_fit, measure_on_scenes, scene_truth
from ttd_plugins.options import TTDOptions
from ttd_plugins.training.collapse_watch import CollapseWatch, MetricAverager
from ttd_plugins.training.config import OptimizerConfig
from ttd_plugins.training.divergence import DivergenceWatch
from ttd_plugins.training.scene_tuning import SCENE_OPTIMIZER, KeptScenes, SceneTuning, training_scenes, tune_on_scenes
from ttd_plugins.training.step import effective_warm_up, warm_up_warning
from ttd_plugins.utils.progress import Stage, list_with_progress

DEFAULT_COUNT = 512
"""Test scenes that are measured by default."""
WINDOW = 10
"""Steps whose means the collapse watch looks at."""


class SceneData:
    """Scenes of the backbone's input size; each set of scenes is generated once per size."""

    metrics = SCENE_METRICS
    trade_off = ("caption_iou", "retrieval_r1")
    attribution = ATTRIBUTION

    def __init__(self, options: CompareOptions) -> None:
        """Check the options.

        Raises:
            MissingDependencyError: a package that draws scenes is not installed.
        """
        self.options = options
        self.count = options.limit or DEFAULT_COUNT
        self._sides: set[int] = set()
        self._test: dict[int, list[Scene]] = {}
        self._train: dict[int, tuple[int, KeptScenes]] = {}
        Scenes("test", 1)  # raises if a package is missing
        self._tuning(seed=0, ttd=options.ttd)

    @property
    def optimizer(self) -> OptimizerConfig:
        """Optimizer of the fine-tuning."""
        rate = self.options.learning_rate
        return SCENE_OPTIMIZER if rate is None else replace(SCENE_OPTIMIZER, learning_rate=rate)

    def describe(self) -> dict[str, Any]:
        names = ("learning_rate", "weight_decay", "warm_up", "clip_norm")
        optimizer = {name: getattr(self.optimizer, name) for name in names}
        optimizer["warm_up"] = effective_warm_up(self.optimizer.warm_up, self.options.steps)
        return {"name": SCENES, "images": self.count, "optimizer": optimizer}

    def warnings(self) -> list[str]:
        warning = warm_up_warning(self.optimizer.warm_up, self.options.steps) if self.options.tune else None
        return [] if warning is None else [warning]

    def check(self, backbone: DenseAdapter) -> None:
        check_scenes_fit(backbone)
        self._sides.add(backbone.description.image_size[0])

    def measure(self, backbone: DenseAdapter, folder: Path, stage: Stage) -> Measurement:
        scenes = self._scenes(backbone.description.image_size[0], stage)
        ttd = TTD(backbone, self.options.ttd)
        values = measure_on_scenes(ttd, scenes, progress=stage("measure", len(scenes))).as_dict()
        bias = values.pop("caption_map_in_tag")
        return Measurement(
            {key: finite_or_none(value) for key, value in values.items()},
            {kind: finite_or_none(value) for kind, value in bias.items()},
        )

    def tune(
        self, backbone: DenseAdapter, seed: int, ttd: TTDOptions, folder: Path, stage: Stage
    ) -> tuple[Curve, list[str]]:
        tuning = self._tuning(seed, ttd)
        side = backbone.description.image_size[0]
        # Only one seed is cached: all backbones are trained on it before the next one.
        if side not in self._train or self._train[side][0] != seed:
            self._train[side] = (seed, KeptScenes(training_scenes(tuning, side)))
        advance = stage("train", tuning.steps)
        reports = tune_on_scenes(backbone, tuning, scenes=self._train[side][1], on_step=lambda report: advance(1))
        curve = [
            {
                "step": report.step,
                "loss": report.loss,
                **report.losses,
                **report.statistics,
                "gradient_norm": report.gradient_norm,
            }
            for report in reports
        ]
        return curve, collapse_warnings(curve) + divergence_warnings(curve)

    def _tuning(self, seed: int, ttd: TTDOptions) -> SceneTuning:
        options = self.options
        return SceneTuning(options.steps, options.batch_size, options.rank, seed, optimizer=self.optimizer, ttd=ttd)

    def samples(self, count: int) -> Iterator[Sample]:
        side = min(self._sides, default=64)
        scenes = self._test.get(side) or Scenes("test", self.count, side=side)
        for index, scene in enumerate(islice(scenes, count)):
            # A single true tag cannot show the bias.
            if len(scene.true_tags) > 1:
                truth = {tag: scene.masks[tag] for tag in scene.true_tags}
                yield Sample(
                    f"scene-{index:04d}",
                    scene.image,
                    scene.caption,
                    truth,
                    absent=scene.absent_tags,
                    caption_truth=scene_truth(scene),
                )

    def _scenes(self, side: int, stage: Stage) -> list[Scene]:
        if side not in self._test:
            advance = stage(f"draw test scenes of {side} pixels", self.count)
            self._test[side] = list_with_progress(Scenes("test", self.count, side=side), advance)
        return self._test[side]


def divergence_warnings(curve: Sequence[Mapping[str, float]]) -> list[str]:
    """Return one sentence if the training diverged, and none otherwise."""
    watch = DivergenceWatch()
    for row in curve:
        watch.add(int(row["step"]), row["loss"], row, (), skipped=False)
    if not watch.diverged:
        return []
    why = watch.sentence(curve[-1]["loss"], curve[-1].get("caption_map_spread"))
    return [f"step {curve[-1]['step']}: the training diverged: {why}; lower the learning rate"]


def collapse_warnings(curve: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the warnings of the collapse watch, on means over windows of :data:`WINDOW` steps."""
    watch, window, warnings = CollapseWatch(), MetricAverager(), []
    for row in curve:
        window.add(row)
        if row["step"] % WINDOW == 0:
            warnings += [f"step {row['step']}: {sentence}" for sentence in watch.check(window.means())]
            window = MetricAverager()
    return warnings
