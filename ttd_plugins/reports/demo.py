"""The demo: measure a small backbone on scenes, repair its single tag bias with TTD, measure again, and show it.

The control takes the same steps on the same scenes from the same fresh LoRA weights with the contrastive term alone, so
that further training is not mistaken for TTD.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

import ttd_plugins
from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.embedded.scenes import ATTRIBUTION, Scene, Scenes
from ttd_plugins.engine import TTD, CaptionMaps
from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.evaluation.metrics import intersection_over_union, upsample_map
from ttd_plugins.evaluation.scenes import CAPTION_MAP_THRESHOLD, SceneMetrics, measure_on_scenes
from ttd_plugins.plugins import load
from ttd_plugins.reports.demo_html import DemoResult, GalleryItem, write_demo_report
from ttd_plugins.reports.heatmaps import draw_maps
from ttd_plugins.training.loop import StepReport
from ttd_plugins.training.scenes import SceneTuning, tune_on_scenes

Arm = Literal["control", "after"]
Stage = Callable[[str, int], Callable[[int], None]]
"""Called with a stage's name and its number of steps; gives the function to call with each number of steps done."""

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
    stage = stage or _silent
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
    write_demo_report(out / "report.html", result)
    return result


def _load(options: DemoOptions) -> DenseAdapter:
    """The same weights at every call, those of ``@random`` too."""
    torch.manual_seed(options.tuning.seed)
    return load(options.backbone)


def _silent(name: str, steps: int) -> Callable[[int], None]:
    """A stage that announces nothing."""
    return lambda done: None


class _Record:
    """``metrics.json`` and the weights of the arms: what is finished, and so need not be done again."""

    def __init__(self, out: Path, content: dict[str, Any]) -> None:
        self.out = out
        self.content = content

    @classmethod
    def open(cls, out: Path, options: DemoOptions) -> _Record:
        settings = {
            "backbone": options.backbone,
            "scenes": options.scenes,
            **options.tuning.as_dict(),
            "versions": {
                "ttd-plugins": ttd_plugins.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        content: dict[str, Any] = {"settings": settings, "seconds": {}, "curves": {}}
        path = out / "metrics.json"
        try:
            (out / "weights").mkdir(parents=True, exist_ok=True)
            earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except (OSError, ValueError) as error:
            raise InputError(
                f"the results cannot be kept in {out} ({one_sentence(error)}); give another --out"
            ) from error
        if earlier is not None:
            if earlier.get("settings") != json.loads(json.dumps(settings)):
                raise InputError(f"{path} holds the results of a run with other settings; give another --out")
            content = earlier
        record = cls(out, content)
        record.save()
        return record

    def save(self) -> None:
        """Write ``metrics.json`` whole or not at all."""
        part = self.out / "metrics.json.part"
        try:
            part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            part.replace(self.out / "metrics.json")
        except OSError as error:
            raise InputError(
                f"the results cannot be written to {self.out} ({one_sentence(error)}); "
                "free some room or give another --out"
            ) from error

    def measure(self, arm: str, measure: Callable[[], SceneMetrics]) -> None:
        if arm in self.content:
            return
        started = time.perf_counter()
        self.content[arm] = measure().as_dict()
        self.content["seconds"][f"measure {arm}"] = round(time.perf_counter() - started, 1)
        self.save()

    def tune(self, arm: Arm, backbone: DenseAdapter, tuning: SceneTuning, stage: Stage) -> DenseAdapter:
        """The backbone fine-tuned, now or by an earlier run whose weights were kept."""
        from safetensors.torch import load_file, save_file

        path = self.out / "weights" / f"{arm}.safetensors"
        if arm in self.content["curves"] and path.exists():
            if tuning.rank:
                backbone.add_lora(tuning.rank)
            kept = load_file(path)
            with torch.no_grad():
                for name, parameter in backbone.model.named_parameters():
                    if name in kept:
                        parameter.copy_(kept[name])
            return backbone.eval()
        advance = stage("fine-tuning with TTD" if arm == "after" else "control: contrastive only", tuning.steps)
        started = time.perf_counter()
        reports = tune_on_scenes(backbone, tuning, on_step=lambda report: advance(1))
        self.content["seconds"][f"tune {arm}"] = round(time.perf_counter() - started, 1)
        self.content["curves"][arm] = [asdict(report) for report in reports]
        trained = {n: p.detach().contiguous() for n, p in backbone.model.named_parameters() if p.requires_grad}
        part = path.with_suffix(".part")
        save_file(trained, part)
        part.replace(path)
        self.save()
        return backbone

    def curve(self, arm: Arm) -> list[StepReport]:
        return [StepReport(**row) for row in self.content["curves"][arm]]


def _render(count: int, side: int, stage: Stage) -> list[Scene]:
    advance = stage("drawing test scenes", count)
    scenes = []
    for scene in Scenes("test", count, side=side):
        scenes.append(scene)
        advance(1)
    return scenes


def _measure(backbone: DenseAdapter, tuning: SceneTuning, scenes: list[Scene], arm: str, stage: Stage) -> SceneMetrics:
    return measure_on_scenes(TTD(backbone, tuning.ttd), scenes, progress=stage(f"measuring: {arm}", len(scenes)))


def scene_caption_iou(maps: CaptionMaps, scene: Scene) -> float:
    """Caption IoU of one scene, as in :class:`~ttd_plugins.evaluation.scenes.SceneMetrics`."""
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
