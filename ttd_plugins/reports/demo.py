"""The demo: measure a small backbone on scenes, repair its single tag bias with TTD, measure again, and show it.

The control takes the same steps on the same scenes from the same fresh LoRA weights with the contrastive term alone, so
that further training is not mistaken for TTD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.comparison.data import SCENE_FIGURES
from ttd_plugins.comparison.results import BackboneResult, Comparison, Picture, TagView, View
from ttd_plugins.embedded.scenes import ATTRIBUTION, Scene, Scenes
from ttd_plugins.engine import TTD, CaptionMaps
from ttd_plugins.evaluation.metrics import intersection_over_union, upsample_map
from ttd_plugins.evaluation.scene_protocol import CAPTION_MAP_THRESHOLD, SceneMetrics, measure_on_scenes
from ttd_plugins.plugins import load
from ttd_plugins.reports.comparison_html import write_comparison_report
from ttd_plugins.reports.heatmaps import draw_maps
from ttd_plugins.training.loop import StepReport
from ttd_plugins.training.scene_tuning import SceneTuning, tune_on_scenes
from ttd_plugins.training.stages import StageRecord, keep_weights, timed, versions
from ttd_plugins.utils.progress import Stage, list_with_progress, no_progress

Arm = Literal["control", "after"]

GALLERY_CANDIDATES = 96
GALLERY_LENGTH = 12


@dataclass(frozen=True)
class DemoOptions:
    """What ``ttd demo`` runs.

    Attributes:
        backbone: name of the backbone.
        scenes: test scenes that are measured.
        tuning: how it is fine-tuned; its seed is the demo's.
    """

    backbone: str = "open_clip:tiny"
    scenes: int = 512
    tuning: SceneTuning = field(default_factory=SceneTuning)


@dataclass(frozen=True)
class GalleryItem:
    """A scene of the gallery, its maps in each arm, and its Caption IoU in each arm."""

    scene: Scene
    before: CaptionMaps
    control: CaptionMaps
    after: CaptionMaps
    caption_iou: dict[str, float]


@dataclass(frozen=True)
class DemoResult:
    """Settings, metrics of the three arms, training curves and gallery."""

    settings: dict[str, Any]
    before: dict[str, Any]
    control: dict[str, Any]
    after: dict[str, Any]
    curves: dict[str, list[StepReport]]
    gallery: list[GalleryItem]
    attribution: str

    def comparison(self, name: str) -> Comparison:
        """The result as a comparison of one backbone."""
        arms: dict[Any, dict[str, Any]] = {"before": self.before, "control": self.control, "after": self.after}
        curves: dict[Any, list[StepReport]] = {"control": self.curves["control"], "after": self.curves["ttd"]}
        backbone = BackboneResult(
            name,
            metrics={arm: [{m.key: found[m.key] for m in SCENE_FIGURES}] for arm, found in arms.items()},
            bias={arm: [found["caption_map_in_tag"]] for arm, found in arms.items()},
            curves={
                arm: [[{"step": r.step, "loss": r.loss, **r.losses, **r.statistics} for r in reports]]
                for arm, reports in curves.items()
            },
        )
        gallery = [
            Picture(
                key=f"scene {number}",
                image=item.scene.image,
                caption=item.scene.caption,
                truth={tag: item.scene.masks[tag] for tag in item.scene.true_tags},
                absent=item.scene.absent_tags,
                views={name: {arm: _view(getattr(item, arm), item.caption_iou[arm]) for arm in arms}},
            )
            for number, item in enumerate(self.gallery, start=1)
        ]
        return Comparison(self.settings, SCENE_FIGURES, [backbone], gallery, attribution=self.attribution)


def _view(maps: CaptionMaps, iou: float) -> View:
    rows = zip(maps.tags, maps.probabilities, maps.selected, maps.tag_maps_normalized, strict=True)
    tags = [
        TagView(text, maps.caption.lower().find(text.lower()), float(score), bool(selected), heat)
        for text, score, selected, heat in rows
    ]
    return View(maps.caption_map_normalized, tags, iou, maps.truncated)


def run_demo(out: Path, options: DemoOptions | None = None, *, stage: Stage | None = None) -> DemoResult:
    """Run the demo and write ``metrics.json``, ``report.html`` and ``heatmaps/*.png`` into ``out``.

    ``metrics.json`` is written again after every stage. A run that was stopped and is started again with the same
    options takes up what it had finished.

    Args:
        out: folder for the results, made if it is not there.
        options: what to run.
        stage: announces the stages, for progress bars.

    Raises:
        InputError: ``out`` cannot be written, or holds the results of a run with other options.
        TTDError: the backbone cannot be loaded, or the packages that draw scenes are not installed.
    """
    options = options or DemoOptions()
    stage = stage or no_progress
    backbones: dict[str, DenseAdapter] = {"before": _load(options)}
    record = _Record.open(out, options)
    scenes = _render(options.scenes, backbones["before"].description.image_size[0], stage)
    record.measure("before", partial(_measure, backbones["before"], options.tuning, scenes, "before", stage))
    arms: dict[Arm, SceneTuning] = {"control": options.tuning.control(), "after": options.tuning}
    for arm, tuning in arms.items():
        backbones[arm] = record.tune(arm, _load(options), tuning, stage)
        record.measure(arm, partial(_measure, backbones[arm], options.tuning, scenes, arm, stage))

    gallery = _gallery(backbones, options.tuning, scenes[: min(GALLERY_CANDIDATES, len(scenes))], stage)
    folder = out / "heatmaps"
    folder.mkdir(exist_ok=True)
    for number, item in enumerate(gallery, 1):
        draw_maps(item.before, folder / f"scene-{number:02d}.png", after=item.after)
    result = DemoResult(
        settings=record.content["settings"] | {"seconds": record.content["seconds"]},
        before=record.content["before"],
        control=record.content["control"],
        after=record.content["after"],
        curves={"control": record.curve("control"), "ttd": record.curve("after")},
        gallery=gallery,
        attribution=ATTRIBUTION,
    )
    write_comparison_report(out / "report.html", result.comparison(options.backbone))
    return result


def _load(options: DemoOptions) -> DenseAdapter:
    """The same weights at every call, those of ``@random`` too."""
    torch.manual_seed(options.tuning.seed)
    return load(options.backbone)


class _Record(StageRecord):
    """``metrics.json`` and the weights of the arms."""

    @classmethod
    def open(cls, out: Path, options: DemoOptions) -> _Record:
        settings = {
            "backbone": options.backbone,
            "scenes": options.scenes,
            **options.tuning.as_dict(),
            "versions": versions(),
        }
        return cls(out / "metrics.json", settings, seconds={}, curves={})

    def measure(self, arm: str, measure: Callable[[], SceneMetrics]) -> None:
        if arm in self.content:
            return
        metrics, self.content["seconds"][f"measure {arm}"] = timed(measure)
        self.content[arm] = metrics.as_dict()
        self.save()

    def tune(self, arm: Arm, backbone: DenseAdapter, tuning: SceneTuning, stage: Stage) -> DenseAdapter:
        """The backbone fine-tuned, now or by an earlier run whose weights were kept."""
        if arm in self.content["curves"] and self.weights_file(arm).exists():
            return self.take_weights(arm, backbone, tuning.rank)
        advance = stage("fine-tuning with TTD" if arm == "after" else "control: contrastive only", tuning.steps)
        reports, self.content["seconds"][f"tune {arm}"] = timed(
            lambda: tune_on_scenes(backbone, tuning, on_step=lambda report: advance(1))
        )
        self.content["curves"][arm] = [asdict(report) for report in reports]
        keep_weights(self.weights_file(arm), backbone)
        self.save()
        return backbone

    def curve(self, arm: Arm) -> list[StepReport]:
        return [StepReport(**row) for row in self.content["curves"][arm]]


def _render(count: int, side: int, stage: Stage) -> list[Scene]:
    advance = stage("drawing test scenes", count)
    return list_with_progress(Scenes("test", count, side=side), advance)


def _measure(backbone: DenseAdapter, tuning: SceneTuning, scenes: list[Scene], arm: str, stage: Stage) -> SceneMetrics:
    return measure_on_scenes(TTD(backbone, tuning.ttd), scenes, progress=stage(f"measuring: {arm}", len(scenes)))


def scene_caption_iou(maps: CaptionMaps, scene: Scene) -> float:
    """Caption IoU of one scene, as in :class:`~ttd_plugins.evaluation.scene_protocol.SceneMetrics`."""
    heat = upsample_map(maps.caption_map_normalized, *scene.image.shape[:2])
    return intersection_over_union(heat > CAPTION_MAP_THRESHOLD, scene.named_region)


def _gallery(
    backbones: dict[str, DenseAdapter], tuning: SceneTuning, scenes: list[Scene], stage: Stage
) -> list[GalleryItem]:
    """Scenes with two true tags or more: the largest gains, some between, and the largest losses, in that order.

    A gain is over the better of before and control.
    """
    advance = stage("drawing the report", len(scenes))
    engines = {arm: TTD(backbone.eval(), tuning.ttd) for arm, backbone in backbones.items()}
    items = []
    for scene in scenes:
        if len(scene.true_tags) > 1:
            picture = Image.fromarray(scene.image)
            maps = {arm: ttd.maps(picture, scene.caption, size=scene.image.shape[:2]) for arm, ttd in engines.items()}
            items.append(
                GalleryItem(
                    scene=scene,
                    before=maps["before"],
                    control=maps["control"],
                    after=maps["after"],
                    caption_iou={arm: scene_caption_iou(found, scene) for arm, found in maps.items()},
                )
            )
        advance(1)
    items.sort(
        key=lambda item: max(item.caption_iou["before"], item.caption_iou["control"]) - item.caption_iou["after"]
    )
    if len(items) <= GALLERY_LENGTH:
        return items
    third = GALLERY_LENGTH // 3
    middle = np.linspace(third, len(items) - third - 1, GALLERY_LENGTH - 2 * third).round().astype(int)
    return [*items[:third], *(items[i] for i in middle), *items[-third:]]
