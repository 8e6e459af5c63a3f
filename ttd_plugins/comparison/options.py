"""The options of a comparison."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from ttd_plugins.comparison.results import ARMS, Arm
from ttd_plugins.errors import InputError
from ttd_plugins.options import TTDOptions

SCENES = "scenes"
"""Name of the generated scenes among the data sets."""


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, on which data, and how backbones are fine-tuned.

    Attributes:
        backbones: names for :func:`ttd_plugins.backbone_sources.open_backbone`, in the table's order.
        data: ``"scenes"``, or a captioned data set with masks: ``"coco_captions"`` or ``"cc3m_tagmask"``.
        root: folder of the data set.
        split: split of the data set; its default split if ``None``.
        pairs: image-text pairs for fine-tuning, as :func:`ttd_plugins.data.open_pairs` accepts them. Required for
            fine-tuning with a data set; scenes have their own training set.
        tune: whether to fine-tune; otherwise backbones are measured as loaded.
        seeds: number of seeds.
        first_seed: the first seed; the others follow it.
        steps, batch_size, rank: of each fine-tuning; rank 0 trains all weights instead of LoRA.
        learning_rate: peak learning rate; ``None`` means 1e-3 on scenes and 1e-4 on pairs.
        limit: number of images measured; ``None`` means 512 scenes or the whole data set.
        gallery: number of images in the report.
        preset: settings of the evaluation protocols on a data set, ``"fast"`` or ``"paper"``.
        workers: processes that decode pairs.
        jobs: arms that are fine-tuned at the same time, each in its own process with an equal share of the cores.
            Only for scenes on the CPU, where two processes of one core outperform one process of two cores. Results
            are the same up to the order of float sums, as for another number of threads.
        device: device of the backbones; the library's default if ``None``.
        ttd: options of the engine, the same for every backbone. Without a calibration each backbone uses its own.
    """

    backbones: tuple[str, ...]
    data: str = SCENES
    root: Path | None = None
    split: str | None = None
    pairs: str | None = None
    tune: bool = True
    seeds: int = 3
    first_seed: int = 0
    steps: int = 200
    batch_size: int = 48
    rank: int = 16
    learning_rate: float | None = None
    limit: int | None = None
    gallery: int = 12
    preset: str = "fast"
    workers: int = 0
    jobs: int = 1
    device: str | None = None
    ttd: TTDOptions = field(default_factory=TTDOptions)

    def __post_init__(self) -> None:
        if not self.backbones or len(set(self.backbones)) != len(self.backbones):
            raise InputError("name one or more backbones, each once")
        if self.seeds < 1 or self.steps < 1 or self.batch_size < 2 or self.rank < 0:
            raise InputError(
                "seeds and steps must be 1 or more, batch_size 2 or more and rank 0 or more; not "
                f"{self.seeds}, {self.steps}, {self.batch_size} and {self.rank}"
            )
        if (self.limit is not None and self.limit < 2) or self.gallery < 0:
            raise InputError(f"limit must be 2 or more and gallery 0 or more, not {self.limit} and {self.gallery}")
        if self.jobs < 1 or (self.jobs > 1 and (self.data != SCENES or self.device not in (None, "cpu"))):
            raise InputError(f"jobs must be 1 (or more on scenes on the CPU), not {self.jobs}")
        if self.ttd.contrastive_weight <= 0 and self.tune:
            raise InputError("contrastive_weight must be above 0, since the control trains with that term alone")

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that are run."""
        return ARMS if self.tune else ("before",)

    @property
    def seed_numbers(self) -> range:
        """The seeds, empty without fine-tuning."""
        return range(self.first_seed, self.first_seed + self.seeds if self.tune else self.first_seed)

    def ttd_of_arm(self, arm: Arm) -> TTDOptions:
        """Options of the engine for training an arm: the control has the contrastive term alone."""
        return self.ttd if arm == "after" else replace(self.ttd, tag_weight=0.0, distill_weight=0.0)


def default_jobs(data: str, device: str | None) -> int:
    """Return how many arms to train at the same time: one per core and at most 4 on scenes on the CPU, else 1."""
    import torch

    on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    return min(4, os.cpu_count() or 1) if data == SCENES and on_cpu else 1
