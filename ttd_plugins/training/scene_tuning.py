"""Fine-tuning on generated scenes: the small experiment of the demo, of comparisons and of the ablation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from ttd_plugins.adapter import TOWERS, DenseAdapter, named_tower_parameters
from ttd_plugins.embedded.scenes import Scene, Scenes
from ttd_plugins.engine import TTD, TTDOptions
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.scene_protocol import scene_pixels
from ttd_plugins.training.config import OptimizerConfig
from ttd_plugins.training.loop import StepReport, train_in_memory
from ttd_plugins.utils.configuration import check_seed
from ttd_plugins.utils.rng import seeded_torch

SCENE_OPTIMIZER = OptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.999), eps=1e-8, warm_up=20)
"""Settings that suit the small embedded models on scenes."""


@dataclass(frozen=True)
class SceneTuning:
    """How a backbone is fine-tuned on scenes.

    Attributes:
        steps: optimizer steps.
        batch_size: scenes a step.
        rank: LoRA rank on both towers; 0 means full fine-tuning of both.
        seed: decides the scenes and the fresh LoRA weights.
        bare_captions: share of captions that are bare nouns; the rest are sentences.
        optimizer: settings of the optimizer; its ``steps``, ``epochs`` and ``batch_size`` are not used.
        ttd: options of the engine.
    """

    steps: int = 200
    batch_size: int = 48
    rank: int = 16
    seed: int = 0
    bare_captions: float = 0.0
    optimizer: OptimizerConfig = SCENE_OPTIMIZER
    ttd: TTDOptions = field(default_factory=TTDOptions)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.steps < 1 or self.batch_size < 2 or self.rank < 0:
            raise InputError(
                f"steps must be 1 or more, batch_size 2 or more and rank 0 or more; "
                f"not {self.steps}, {self.batch_size} and {self.rank}"
            )

    def control(self) -> SceneTuning:
        """Return the same steps, data, parameters and seed with the contrastive term only."""
        return replace(self, ttd=self.ttd.contrastive_alone())

    def as_dict(self) -> dict[str, Any]:
        """Return a dictionary that JSON can store."""
        return asdict(self)


def training_scenes(tuning: SceneTuning, side: int) -> Scenes:
    """Return the training scenes, images of ``side`` pixels; each access renders its scene again."""
    # Pre-training used seed 0.
    count, seed = tuning.steps * tuning.batch_size, 1000 + tuning.seed
    return Scenes("train", count, seed=seed, side=side, bare_captions=tuning.bare_captions)


class KeptScenes(Sequence[Scene]):
    """Cache of rendered scenes, without their masks, which training does not use."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes
        self._cache: dict[int, Scene] = {}

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # Sequence overloads int and slice
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index not in self._cache:
            self._cache[index] = replace(self.scenes[index], masks={})
        return self._cache[index]


def scene_batches(
    scenes: Sequence[Scene], batch_size: int, adapter: DenseAdapter
) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield normalised pixels and captions of ``batch_size`` consecutive scenes; an incomplete batch is dropped."""
    for start in range(0, len(scenes) - batch_size + 1, batch_size):
        batch = [scenes[index] for index in range(start, start + batch_size)]
        yield scene_pixels(batch, adapter), [scene.caption for scene in batch]


def tune_on_scenes(
    backbone: DenseAdapter,
    tuning: SceneTuning,
    *,
    scenes: Sequence[Scene] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> list[StepReport]:
    """Fine-tune ``backbone`` in place on training scenes that pre-training did not see.

    Args:
        backbone: without LoRA; LoRA is added unless ``tuning.rank`` is 0.
        tuning: the settings; runs with the same seed have the same fresh LoRA weights and the same scenes.
        scenes: the result of :func:`training_scenes`, if it is available already.
        on_step: called after each step.

    Returns:
        One report for each step.
    """
    with seeded_torch(tuning.seed):
        if tuning.rank:
            backbone.add_lora(tuning.rank)
        else:
            for tower in TOWERS:
                for _, parameter in named_tower_parameters(backbone, tower):
                    parameter.requires_grad_(True)
        scenes = training_scenes(tuning, backbone.description.image_size[0]) if scenes is None else scenes
        return train_in_memory(
            TTD(backbone, tuning.ttd),
            scene_batches(scenes, tuning.batch_size, backbone),
            tuning.steps,
            tuning.optimizer,
            on_step=on_step,
        )
