"""One training step: schedule, forward, backward, clipping and optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.training.config import OptimizerConfig, Schedule
from ttd_plugins.training.prefetching import BatchPrefetcher
from ttd_plugins.training.stop_signals import StopSignals
from ttd_plugins.training.strategies import clip_limit
from ttd_plugins.training.train_state import TrainState
from ttd_plugins.utils import distributed

WEIGHTED_BY_IMAGES = ("tags_per_caption", "selected_per_caption", "caption_map_spread")
"""Statistics that are means over a process' images; the others are the same on every process."""


@dataclass
class StepResult:
    """What one step did.

    Attributes:
        learning_rate: of this step.
        losses, statistics: of each accumulated batch, by name; ``losses`` has ``"loss"``, the weighted sum.
        gradient_norm: global norm before clipping; ``None`` where no gradient was used.
        keys: keys of the pairs of this process.
        images: images of all processes.
        problem: why the step was skipped, as named values with ``"what"``; ``None`` where it was taken.
    """

    learning_rate: float
    losses: list[dict[str, float]] = field(default_factory=list)
    statistics: list[dict[str, float]] = field(default_factory=list)
    gradient_norm: float | None = None
    keys: list[str] = field(default_factory=list)
    images: int = 0
    problem: dict[str, Any] | None = None

    @property
    def loss(self) -> float:
        """Mean loss over the accumulated batches; NaN where the step was skipped."""
        return math.nan if self.problem else sum(one["loss"] for one in self.losses) / len(self.losses)


def effective_warm_up(warm_up: int, steps: int) -> int:
    """Steps of warm-up that a training of ``steps`` steps takes: a tenth of them where ``warm_up`` is not shorter."""
    return warm_up if warm_up < steps else steps // 10


def warm_up_warning(warm_up: int, steps: int) -> str | None:
    """Return a sentence on a warm-up that is shortened; ``None`` if it is shorter than the training."""
    shortened = effective_warm_up(warm_up, steps)
    if shortened == warm_up or steps <= 1:
        return None
    longer = "longer than" if warm_up > steps else "as long as"
    return (
        f"the warm-up of {warm_up} steps is {longer} the training of {steps}, so the learning rate would hardly reach "
        f"its peak; it is shortened to {shortened} steps (optimizer.warm_up)"
    )


def learning_rate_factor(step: int, steps: int, warm_up: int, schedule: Schedule = "cosine") -> float:
    """Factor of the peak learning rate at ``step`` (from 0): linear warm-up, then the schedule.

    ``"cosine"`` and ``"linear"`` fall from 1 after the warm-up to zero at ``steps``; ``"constant"`` stays at 1.

    Raises:
        InputError: the schedule is unknown.
    """
    if schedule not in get_args(Schedule):
        raise InputError(choices_sentence("schedule", str(schedule), get_args(Schedule)))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(steps - warm_up, 1)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if schedule == "linear" else 1.0


def training_step(
    state: TrainState, prefetcher: BatchPrefetcher, adam: OptimizerConfig, signals: StopSignals
) -> StepResult:
    """Take one optimizer step over ``adam.accumulation`` batches, or skip it where it is not finite.

    Raises:
        StopRequested, LoaderFailedError, InputError: as :meth:`BatchPrefetcher.next`; no parameter has changed then.
    """
    strategy, optimizer = state.strategy, state.strategy.optimizer
    warm_up = effective_warm_up(adam.warm_up, state.total_steps)
    factor = learning_rate_factor(state.step, state.total_steps, warm_up, adam.schedule)
    result = StepResult(adam.learning_rate * factor)
    for group in optimizer.param_groups:
        group["lr"] = result.learning_rate
    optimizer.zero_grad(set_to_none=True)

    for number in range(adam.accumulation):
        last = number == adam.accumulation - 1
        found = prefetcher.next(signals.received, first=number == 0)
        batch = found.batch
        result.keys += batch.keys
        with strategy.accumulation_context(last):
            with strategy.forward_context():
                loss, parts, statistics = strategy.module(found.images, batch.captions, found.tags, batch.groups)
            strategy.backward(loss / adam.accumulation)
        if signals.received is None and not (last and state.step + 1 == state.total_steps):
            prefetcher.prefetch()
        # The first host synchronisation of the batch: the device has all its work by now.
        losses, numbers = joint_metrics(loss, parts, statistics, len(found.images))
        if not math.isfinite(losses["loss"]):
            result.problem = {"what": "loss"} | losses
            break
        result.losses.append(losses)
        result.statistics.append(numbers)
        result.images += len(found.images) * distributed.process_count()

    if result.problem is None:
        norm = strategy.clip_gradients(list(state.trained.values()), clip_limit(adam))
        # A gradient scaler expects infinite gradients now and then: it skips the step itself and lowers its scale.
        if math.isfinite(norm) or strategy.scaler is not None:
            state.updating = True
            optimizer.step()
            state.updating = False
            state.update_average()
            result.gradient_norm = norm if math.isfinite(norm) else None
        else:
            result.problem = {"what": "gradient", "gradient_norm": norm, "loss": result.loss}
    if result.problem is not None:
        optimizer.zero_grad(set_to_none=True)
    return result


def joint_metrics(
    loss: Tensor, parts: Mapping[str, Tensor], statistics: Mapping[str, float | Tensor], count: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Losses and statistics of one batch over all processes; the loss is NaN where it is not finite on any of them.

    Args:
        loss, parts: scalars that are joint over the processes already.
        statistics: of this process.
        count: images of this process.
    """
    losses = {"loss": loss.item()} | {name: part.item() for name, part in parts.items()}
    numbers = {name: float(value) for name, value in statistics.items()}
    if distributed.process_count() > 1:
        values = [count * value if name in WEIGHTED_BY_IMAGES else value for name, value in numbers.items()]
        bad = float(not math.isfinite(losses["loss"]))
        joint = torch.tensor([*values, count, bad], dtype=torch.float32, device=loss.device)
        *values, total, bad = distributed.summed(joint).tolist()
        numbers = {
            name: value / total if name in WEIGHTED_BY_IMAGES else value
            for name, value in zip(numbers, values, strict=True)
        }
        # One process that finds it is enough, whatever the rounding on the others.
        if bad and math.isfinite(losses["loss"]):
            losses["loss"] = math.nan
    return losses, numbers
