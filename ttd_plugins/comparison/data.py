"""What backbones are compared on: generated scenes, or annotated photographs with pairs to train on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.comparison.results import Figure
from ttd_plugins.embedded.scenes import ATTRIBUTION, Scene, Scenes
from ttd_plugins.engine import TTD, TTDOptions
from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.evaluation.scene_protocol import check_scenes_fit, measure_on_scenes
from ttd_plugins.training.loop import OptimizerOptions
from ttd_plugins.training.scene_tuning import KeptScenes, SceneTuning, training_scenes, tune_on_scenes
from ttd_plugins.training.watch import CollapseWatch, Window
from ttd_plugins.utils.progress import Stage, list_with_progress, no_progress

if TYPE_CHECKING:
    from ttd_plugins.comparison.running import CompareOptions

SCENES = "scenes"
WATCHED = 10
"""Steps whose mean the watch for collapse looks at."""
CHECKPOINT_MINUTES = 1.0
"""What a run that is killed while pairs are trained on may lose."""
Values = dict[str, float | None]
Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Sample:
    """A picture for the gallery: key, RGB picture, caption, and the masks of its true tags."""

    key: str
    image: NDArray[np.uint8]
    caption: str
    truth: Mapping[str, NDArray[np.bool_]]
    valid: NDArray[np.bool_] | None = None


class ComparisonData(Protocol):
    """What backbones are compared on.

    Attributes:
        figures: the columns.
        attribution: who made the pictures.
    """

    @property
    def figures(self) -> tuple[Figure, ...]: ...
    @property
    def attribution(self) -> str: ...

    def describe(self) -> dict[str, Any]:
        """What repeats it."""

    def check(self, backbone: DenseAdapter) -> None:
        """Refuse a backbone that the data do not suit, before any time is spent."""

    def measure(self, backbone: DenseAdapter, folder: Path, title: str, stage: Stage) -> Values:
        """The figures of a backbone; ``folder`` may keep what is half done."""

    def tune(
        self, backbone: DenseAdapter, seed: int, ttd: TTDOptions, folder: Path, title: str, stage: Stage
    ) -> tuple[Curve, list[str]]:
        """Fine-tune in place; the curve, and what the watch for collapse told."""

    def samples(self, count: int) -> Iterator[Sample]:
        """Pictures that may be shown, always the same."""


# Figures that scenes and photographs share.
TAG_BALANCE = Figure(
    "tag_balance",
    "tag balance",
    "higher",
    "How evenly the caption's map is lit over its true tags; 1 is even.",
)
TAG_F1 = Figure("tag_f1", "tag F1", "higher", "F1 of the tags that are selected, over all candidate words.")
RETRIEVAL_R1 = Figure(
    "retrieval_r1",
    "retrieval R@1",
    "higher",
    "Image-text retrieval at 1, mean of both directions: what fine-tuning may cost.",
)
ZERO_SHOT = Figure(
    "zero_shot_top1",
    "zero-shot top-1",
    "higher",
    "How often the class name nearest to the image embedding is one that the picture shows: what fine-tuning may cost.",
)
SCENE_FIGURES = (
    Figure(
        "caption_iou",
        "Caption IoU",
        "higher",
        "Overlap of the caption's map, above 0.40, with what it truly names.",
    ),
    Figure("tag_iou", "tag IoU", "higher", "Overlap of a true tag's map, above 0.50, with that tag's region."),
    TAG_BALANCE,
    TAG_F1,
    Figure("tag_ap", "tag AP", "higher", "Average precision of the nearest-patch score, over all candidate words."),
    Figure(
        "tag_ap_blind",
        "tag AP, blind",
        None,
        "The same by a scorer that knows each word's mean and never looks at the picture.",
    ),
    RETRIEVAL_R1,
    ZERO_SHOT,
    Figure(
        "caption_map_spread",
        "map spread",
        None,
        "Largest less smallest cosine of the caption's map; near zero means collapse.",
    ),
)


class SceneData:
    """Generated scenes with exact ground truth, drawn once for each side of the backbones' inputs."""

    figures = SCENE_FIGURES
    attribution = ATTRIBUTION

    def __init__(self, options: CompareOptions) -> None:
        self.options = options
        self.count = options.limit or 512
        self._test: dict[int, list[Scene]] = {}
        self._train: dict[int, tuple[int, KeptScenes]] = {}
        Scenes("test", 1)  # the packages that draw are there, or this tells
        SceneTuning(options.steps, options.batch_size, options.rank)

    @property
    def optimizer(self) -> OptimizerOptions:
        """How parameters are moved."""
        rate = self.options.learning_rate
        return OptimizerOptions() if rate is None else OptimizerOptions(learning_rate=rate)

    def describe(self) -> dict[str, Any]:
        return {"name": SCENES, "images": self.count, "optimizer": asdict(self.optimizer)}

    def check(self, backbone: DenseAdapter) -> None:
        check_scenes_fit(backbone)

    def measure(self, backbone: DenseAdapter, folder: Path, title: str, stage: Stage) -> Values:
        scenes = self._scenes(backbone.description.image_size[0], stage)
        ttd = TTD(backbone, self.options.ttd)
        found = measure_on_scenes(ttd, scenes, progress=stage(f"{title}: measure", len(scenes))).as_dict()
        return {figure.key: _finite(found[figure.key]) for figure in self.figures}

    def tune(
        self, backbone: DenseAdapter, seed: int, ttd: TTDOptions, folder: Path, title: str, stage: Stage
    ) -> tuple[Curve, list[str]]:
        options = self.options
        tuning = SceneTuning(options.steps, options.batch_size, options.rank, seed, optimizer=self.optimizer, ttd=ttd)
        side = backbone.description.image_size[0]
        # Those of one seed at a time, which is what all backbones are tuned on before the next.
        if side not in self._train or self._train[side][0] != seed:
            self._train[side] = (seed, KeptScenes(training_scenes(tuning, side)))
        advance = stage(f"{title}: tune", options.steps)
        reports = tune_on_scenes(backbone, tuning, scenes=self._train[side][1], on_step=lambda report: advance(1))
        curve = [{"step": report.step, "loss": report.loss, **report.losses, **report.statistics} for report in reports]
        return curve, _watched(curve)

    def samples(self, count: int) -> Iterator[Sample]:
        side = min(self._test, default=64)
        for index, scene in enumerate(self._scenes(side, no_progress)[:count]):
            # One with a single true tag shows no bias.
            if len(scene.true_tags) > 1:
                truth = {tag: scene.masks[tag] for tag in scene.true_tags}
                yield Sample(f"scene-{index:04d}", scene.image, scene.caption, truth)

    def _scenes(self, side: int, stage: Stage) -> list[Scene]:
        if side not in self._test:
            advance = stage(f"draw test scenes of {side} pixels", self.count)
            self._test[side] = list_with_progress(Scenes("test", self.count, side=side), advance)
        return self._test[side]


CAPTION_FIGURES = (
    Figure(
        "caption_iou",
        "Caption IoU",
        "higher",
        "Overlap of the caption's map, above 0.40, with what it truly names.",
    ),
    Figure(
        "caption_fpr",
        "Caption FPR",
        "lower",
        "Share of the overlap's union that the caption's map lights falsely.",
    ),
    Figure("caption_fnr", "Caption FNR", "lower", "Share of the overlap's union that the caption's map misses."),
    TAG_BALANCE,
    TAG_F1,
    Figure("tag_map", "tag mAP", "higher", "Average precision of the nearest-patch score, over all candidate words."),
    Figure(
        "tag_map_image",
        "tag mAP, image score",
        None,
        "The same by the pooled image embedding, the usual baseline.",
    ),
    RETRIEVAL_R1,
    Figure("retrieval_r5", "retrieval R@5", "higher", "Image-text retrieval at 5, mean of both directions."),
)


class CaptionedData:
    """Annotated photographs to measure on, by the protocols of tag selection and text-level segmentation."""

    figures: tuple[Figure, ...] = CAPTION_FIGURES
    attribution = ""

    def __init__(self, options: CompareOptions) -> None:
        from ttd_plugins.evaluation.captioned_images import as_trained, open_labelled, preset_protocols
        from ttd_plugins.evaluation.datasets import CAPTIONS

        self.options = options
        if options.data not in CAPTIONS:
            raise InputError(choices_sentence("data set", options.data, [SCENES, *CAPTIONS]))
        if options.root is None:
            raise InputError(f"say where {options.data} is: the folder of the data set (--root)")
        self.tags, self.text = as_trained(preset_protocols(options.preset), options.ttd)
        if options.tune and options.pairs is None:
            raise InputError("say which pairs to fine-tune on (--pairs), or leave fine-tuning out (--no-tune)")
        self.reader = open_labelled(options.data, options.root, limit=options.limit, split=options.split)
        if self.reader.classes:
            self.figures = (*CAPTION_FIGURES, ZERO_SHOT)
        if options.tune and options.pairs is not None:
            from ttd_plugins.data import open_pairs

            open_pairs(options.pairs)

    @property
    def learning_rate(self) -> float:
        """Peak of the schedule; by default that of ``ttd train``."""
        return 1e-4 if self.options.learning_rate is None else self.options.learning_rate

    def describe(self) -> dict[str, Any]:
        return {
            **self.reader.describe(),
            "split": self.options.split,
            "pairs": self.options.pairs,
            "preset": self.options.preset,
            "learning_rate": self.learning_rate,
        }

    def check(self, backbone: DenseAdapter) -> None:
        pass

    def measure(self, backbone: DenseAdapter, folder: Path, title: str, stage: Stage) -> Values:
        from ttd_plugins.evaluation.protocols import evaluate_tags, evaluate_text

        def named(name: str, steps: int) -> Callable[[int], None]:
            return stage(f"{title}: {name}", steps)

        # Records of an interrupted measurement are taken up.
        tags = evaluate_tags(backbone, self.reader, self.tags, out=folder / "tags", stage=named).metrics or {}
        text = evaluate_text(backbone, self.reader, self.text, out=folder / "text", stage=named).metrics or {}
        found = {
            "caption_iou": text["caption_iou"],
            "caption_fpr": text["mfpr"],
            "caption_fnr": text["mfnr"],
            "tag_balance": text["tag_balance"],
            "tag_f1": tags["pixel"]["f1"],
            "tag_map": tags["pixel"]["map"],
            "tag_map_image": tags["image"]["map"],
            "retrieval_r1": tags["retrieval"]["r1"],
            "retrieval_r5": tags["retrieval"]["r5"],
        }
        if ZERO_SHOT in self.figures:
            found[ZERO_SHOT.key] = tags["zero_shot"]["top1"]
        return {key: _finite(value) for key, value in found.items()}

    def tune(
        self, backbone: DenseAdapter, seed: int, ttd: TTDOptions, folder: Path, title: str, stage: Stage
    ) -> tuple[Curve, list[str]]:
        from ttd_plugins.training.config import TrainConfig
        from ttd_plugins.training.records import Lines
        from ttd_plugins.training.run import Reporter, train_run

        options = self.options
        tower = "lora" if options.rank else "full"
        config = TrainConfig.from_dict(
            {
                "data": {"source": options.pairs, "workers": options.workers},
                "towers": {"image": tower, "text": tower, "rank": options.rank or 1},
                "optimizer": {
                    "steps": options.steps,
                    "batch_size": options.batch_size,
                    "learning_rate": self.learning_rate,
                    "warm_up": min(100, options.steps // 10),
                },
                "run": {
                    "seed": seed,
                    "log_every": WATCHED,
                    "cpu": options.device == "cpu",
                    "keep": 1,
                    "checkpoint_minutes": CHECKPOINT_MINUTES,
                },
            }
        )

        class Bar(Reporter):
            def started(self, steps: int, done: int) -> None:
                self.advance = stage(f"{title}: tune", steps)
                self.advance(done)

            def stepped(self, step: int, loss: float) -> None:
                self.advance(1)

        result = train_run(replace(config, ttd=ttd), folder, backbone=backbone, resume=True, reporter=Bar())
        backbone.to(options.device or "cpu").eval()
        lines = [line for line in Lines(folder / "log.jsonl").read() if "loss" in line]
        drop = ("epoch", "learning_rate")
        curve = [
            {k: v for k, v in line.items() if isinstance(v, int | float) and k not in drop and "second" not in k}
            for line in lines
        ]
        return curve, result.warnings

    def samples(self, count: int) -> Iterator[Sample]:
        from ttd_plugins.data.images import read_image

        for key in self.reader.keys()[:count]:
            item = self.reader.read(key)
            for truth in item.captions:
                tags = [tag for tag in truth.true_tags() if item.masks[tag].any()]
                if len(tags) > 1:
                    image = np.asarray(read_image(item.path))
                    masks = {tag: item.masks[tag] for tag in tags}
                    yield Sample(key, image, truth.caption, masks, item.valid)
                    break


def open_data(options: CompareOptions) -> ComparisonData:
    """What ``options`` are about.

    Raises:
        InputError, DatasetError: it is unknown, incomplete, or laid out wrongly.
        MissingDependencyError: the packages that draw scenes are not installed.
    """
    return SceneData(options) if options.data == SCENES else CaptionedData(options)


def picture_at(sample: Sample, size: tuple[int, int]) -> Image.Image:
    """The whole picture at an input size, bicubic where it has another."""
    picture = Image.fromarray(sample.image)
    height, width = size
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.BICUBIC)


def _watched(curve: Sequence[Mapping[str, float]]) -> list[str]:
    watch, window, told = CollapseWatch(), Window(), []
    for row in curve:
        window.add(row)
        if row["step"] % WATCHED == 0:
            told += [f"step {row['step']}: {sentence}" for sentence in watch.look(window.means())]
            window = Window()
    return told


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
