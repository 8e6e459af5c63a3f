"""The options of a comparison.

This module imports neither torch nor numpy, so that the command line can build its flags from the options.
"""

from __future__ import annotations

import math
import os
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from ttd_plugins.errors import InputError
from ttd_plugins.options import TTDOptions
from ttd_plugins.utils.configuration import MAX_SEED, Flag, Float, Int, Text, configuration, option

Arm = Literal["before", "control", "after"]
ARMS: tuple[Arm, ...] = ("before", "control", "after")
"""Backbone as loaded; trained by the contrastive term alone for the same steps; trained by TTD."""
SCENES = "scenes"
"""Name of the generated scenes among the data sets."""
PAIRS = "pairs"
"""Name of image-text pairs without annotations among the data sets."""
DEFAULT_SCALES = (0.25, 0.5, 0.75)
"""Factors of LoRA between the backbone before TTD (0) and after it (1)."""


@configuration(section="Training")
class CompareOptions:
    """What is compared, on which data, and how backbones are fine-tuned.

    Raises:
        InputError: an option has the wrong type or range, or two options contradict each other.
    """

    backbones: Annotated[
        tuple[str, ...], option("Names of backbones, as for `load()`, or NAME+PATH; the table has their order.")
    ]
    data: Annotated[
        Text,
        option(
            "Data: scenes; a data set of `ttd eval tags`, segment or classify, such as coco_captions, folder or table; "
            "or pairs. NAME:FOLDER names the folder too.",
            section="Data",
        ),
    ] = SCENES
    root: Annotated[
        Path | None,
        option(
            "Folder of the data set; for pairs the held-out pairs; null means the folder in the name of the data.",
            metavar="FOLDER",
            section="Data",
        ),
    ] = None
    split: Annotated[
        Text | None, option("Split of the data set; null means the data set's default.", section="Data")
    ] = None
    classes: Annotated[
        Text | None,
        option(
            "List of classes drawn from those of a data set, as `ttd eval segment --classes`; null means all.",
            metavar="NAME|FILE",
            section="Data",
        ),
    ] = None
    pairs: Annotated[
        Text | None,
        option(
            "Image-text pairs to train on, as `ttd train --data` accepts them; scenes need none; null means none.",
            metavar="PAIRS",
            section="Data",
        ),
    ] = None
    tune: Annotated[Flag, option("Whether to fine-tune; otherwise backbones are measured as loaded.")] = True
    seeds: Annotated[Int, option("Number of seeds.", ge=1)] = 3
    first_seed: Annotated[Int, option("The first seed; the others follow it.", ge=0, le=MAX_SEED)] = 0
    steps: Annotated[Int, option("Training steps of each arm.", ge=1)] = 200
    batch_size: Annotated[Int, option("Pairs per step.", ge=2)] = 48
    rank: Annotated[Int, option("Rank of LoRA on both towers; 0 trains all weights.", ge=0)] = 16
    lora_scales: Annotated[
        tuple[Float, ...] | None,
        option(
            "Factors of LoRA at which backbones after TTD are measured too, for the frontier of gain and cost; 1 alone "
            "measures no other; null means 0.25,0.5,0.75 with LoRA."
        ),
    ] = None
    learning_rate: Annotated[
        Float | None, option("Peak learning rate; null means 1e-3 on scenes and 1e-4 on pairs.", flag="--lr", gt=0)
    ] = None
    limit: Annotated[
        Int | None, option("Images measured; null means 512 scenes or the whole data set.", section="Data", ge=2)
    ] = None
    gallery: Annotated[Int, option("Images in the report.", section="Output", ge=0)] = 12
    preset: Annotated[Text, option("Settings of the protocols on a data set: fast or paper.", section="Evaluation")] = (
        "fast"
    )
    workers: Annotated[Int, option("Processes that decode pairs.", section="Run", ge=0)] = 0
    # Two processes of one core outperform one process of two cores; results are equal up to the order of float sums.
    jobs: Annotated[Int, option("Arms trained at the same time, on scenes on the CPU.", ge=1)] = 1
    device: Annotated[
        Text | None,
        option("Device, such as cpu or cuda; null means the family's choice.", metavar="DEVICE", section="Run"),
    ] = None
    ttd: Annotated[TTDOptions, option("Options of TTD; without a calibration each backbone uses its own.")] = field(
        default_factory=TTDOptions
    )

    def __post_init__(self) -> None:
        if not self.backbones or len(set(self.backbones)) != len(self.backbones):
            raise InputError("name one or more backbones, each once")
        if self.jobs > 1 and (self.data != SCENES or self.device not in (None, "cpu")):
            raise InputError(f"jobs must be 1 (or more on scenes on the CPU), not {self.jobs}")
        if self.ttd.contrastive_weight <= 0 and self.tune:
            raise InputError("contrastive_weight must be above 0, since the control trains with that term alone")
        for scale in self.lora_scales or ():
            if not math.isfinite(scale) or scale <= 0:
                raise InputError(f"lora_scales must be above 0 (0 is the backbone before TTD), not {scale:g}")
        if self.scales and not self.rank:
            raise InputError("lora_scales needs LoRA: set rank above 0, or leave lora_scales out")

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that are run."""
        return ARMS if self.tune else ("before",)

    @property
    def scales(self) -> tuple[float, ...]:
        """Factors of LoRA below or above 1 at which the arm ``after`` is measured too, in ascending order."""
        if not self.tune:
            return ()
        default = DEFAULT_SCALES if self.rank else ()
        return tuple(sorted(set(default if self.lora_scales is None else self.lora_scales) - {1.0}))

    @property
    def seed_numbers(self) -> range:
        """The seeds, empty without fine-tuning."""
        return range(self.first_seed, self.first_seed + self.seeds if self.tune else self.first_seed)

    def ttd_of_arm(self, arm: Arm) -> TTDOptions:
        """Options of the engine for training an arm: the control has the contrastive term alone."""
        return self.ttd if arm == "after" else self.ttd.contrastive_alone()


def default_jobs(data: str, device: str | None) -> int:
    """Return how many arms to train at the same time: one per core and at most 4 on scenes on the CPU, else 1."""
    import torch

    on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    return min(4, os.cpu_count() or 1) if data == SCENES and on_cpu else 1
