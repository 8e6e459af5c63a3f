"""Comparison on captioned images with masks, with fine-tuning on image-text pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.comparison.data_interface import Curve, Measurement, Sample, finite_or_none
from ttd_plugins.comparison.metric_definitions import CAPTION_METRICS, ZERO_SHOT
from ttd_plugins.comparison.options import CompareOptions
from ttd_plugins.comparison.results import Metric
from ttd_plugins.errors import InputError
from ttd_plugins.options import TTDOptions
from ttd_plugins.utils.progress import Stage

LOG_EVERY = 10
"""Steps between two points of a training curve."""
CHECKPOINT_MINUTES = 1.0
"""Training time that a killed run may lose."""
NOT_IN_CURVES = {"epoch", "learning_rate"}


class CaptionedData:
    """A labelled data set, measured by the protocols of tag selection and text-level segmentation."""

    metrics: tuple[Metric, ...] = CAPTION_METRICS
    attribution = ""
    trade_off = ("caption_iou", "retrieval_r1")

    def __init__(self, options: CompareOptions) -> None:
        """Open the data set and the pairs.

        Raises:
            InputError, DatasetError: the data set or the pairs are unknown, missing or incomplete.
        """
        self.options = options
        if options.tune and options.pairs is None:
            raise InputError("name the pairs to fine-tune on (--pairs), or turn fine-tuning off (--no-tune)")
        self.reader = self.open_reader()
        if options.tune and options.pairs is not None:
            from ttd_plugins.data import open_pairs

            open_pairs(options.pairs)

    def open_reader(self) -> Any:
        """Open and check the data, and prepare the options of the protocols."""
        from ttd_plugins.evaluation.captioned_images import as_trained, open_labelled, preset_protocols

        self.tags, self.text = as_trained(preset_protocols(self.options.preset), self.options.ttd)
        reader = open_labelled(*self.place(), limit=self.options.limit, split=self.options.split)
        if reader.classes:
            self.metrics = (*CAPTION_METRICS, ZERO_SHOT)
        return reader

    def place(self) -> tuple[str, str]:
        """Return the name of the data set and its folder: ``data`` and ``root``, or ``data`` as ``NAME:FOLDER``.

        Raises:
            InputError: there is no folder, or there are two.
        """
        name, _, inside = self.options.data.partition(":")
        if inside and self.options.root is not None:
            raise InputError(f"--data {self.options.data} names its folder; leave --root out")
        if not inside and self.options.root is None:
            raise InputError(f"name the folder of {name} (--root)")
        return name, inside or str(self.options.root)

    @property
    def learning_rate(self) -> float:
        """Peak learning rate; by default that of ``ttd train``."""
        return 1e-4 if self.options.learning_rate is None else self.options.learning_rate

    @property
    def warm_up(self) -> int:
        """Steps of linear warm-up: at most a tenth of the training."""
        return min(100, self.options.steps // 10)

    def describe(self) -> dict[str, Any]:
        return {
            **self.reader.describe(),
            "split": self.options.split,
            "pairs": self.options.pairs,
            "preset": self.options.preset,
            "learning_rate": self.learning_rate,
        }

    def warnings(self) -> list[str]:
        return []

    def check(self, backbone: DenseAdapter) -> None:
        pass

    def measure(self, backbone: DenseAdapter, folder: Path, stage: Stage) -> Measurement:
        from ttd_plugins.evaluation.protocols import evaluate_tags, evaluate_text

        # Each protocol resumes from the records in its folder.
        tags = evaluate_tags(backbone, self.reader, self.tags, out=folder / "tags", stage=stage).metrics or {}
        text = evaluate_text(backbone, self.reader, self.text, out=folder / "text", stage=stage).metrics or {}
        values = {
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
        if ZERO_SHOT in self.metrics:
            values[ZERO_SHOT.key] = tags["zero_shot"]["top1"]
        return Measurement({key: finite_or_none(value) for key, value in values.items()})

    def tune(
        self, backbone: DenseAdapter, seed: int, ttd: TTDOptions, folder: Path, stage: Stage
    ) -> tuple[Curve, list[str]]:
        from ttd_plugins.training.config import TrainConfig
        from ttd_plugins.training.jsonl_log import JsonlLog
        from ttd_plugins.training.reporting import Reporter
        from ttd_plugins.training.run import train_run

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
                    "warm_up": self.warm_up,
                },
                "run": {
                    "seed": seed,
                    "log_every": LOG_EVERY,
                    "cpu": options.device == "cpu",
                    "keep": 1,
                    "checkpoint_minutes": CHECKPOINT_MINUTES,
                },
            }
        )

        class Bar(Reporter):
            def on_start(self, steps: int, done: int) -> None:
                self.advance = stage("train", steps)
                self.advance(done)

            def on_step(self, step: int, loss: float) -> None:
                self.advance(1)

        result = train_run(
            replace(config, ttd=ttd),
            folder,
            backbone=backbone,
            resume=True,
            reporter=Bar(),
            resume_advice="run the same comparison again, and it continues",
        )
        backbone.to(options.device or "cpu").eval()
        lines = [line for line in JsonlLog(folder / "log.jsonl").read() if "loss" in line]
        curve = [{k: v for k, v in line.items() if _belongs_in_curve(k, v)} for line in lines]
        return curve, result.warnings + ([] if result.diverged is None else [result.diverged])

    def samples(self, count: int) -> Iterator[Sample]:
        from ttd_plugins.data.images import read_image

        for key in self.reader.keys()[:count]:
            item = self.reader.read(key)
            for truth in item.captions:
                true = truth.true_tags()
                tags = [tag for tag in true if item.masks[tag].any()]
                # A single true tag cannot show the bias.
                if len(tags) > 1:
                    verdicts = zip(truth.mentions, truth.true, strict=True)
                    absent = dict.fromkeys(m.text for m, shown in verdicts if shown is False and m.text not in true)
                    image = np.asarray(read_image(item.path))
                    masks = {tag: item.masks[tag] for tag in tags}
                    yield Sample(key, image, truth.caption, masks, item.valid, tuple(absent), truth)
                    break


def _belongs_in_curve(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and name not in NOT_IN_CURVES and "second" not in name
