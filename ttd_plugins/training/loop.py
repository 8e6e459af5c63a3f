"""The training loop of every kind of training: pairs in ``ttd train``, scenes in the demo and in comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ttd_plugins.engine import TTD
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.training.config import OptimizerConfig
from ttd_plugins.training.prefetching import BatchPrefetcher, LoaderFailedError
from ttd_plugins.training.step import StepResult, training_step
from ttd_plugins.training.stop_signals import StopSignals
from ttd_plugins.training.strategies import ReplicatedStrategy
from ttd_plugins.training.train_state import TrainState


class LoopCallbacks(Protocol):
    """What happens around the steps of a loop."""

    def step_skipped(self, result: StepResult) -> None:
        """A step was not finite; called before it is counted. May raise, which ends the loop."""

    def step_ended(self, result: StepResult) -> None:
        """A step was counted."""


def run_loop(
    state: TrainState,
    prefetcher: BatchPrefetcher,
    optimizer: OptimizerConfig,
    callbacks: LoopCallbacks,
    signals: StopSignals,
) -> None:
    """Take steps until ``state.total_steps`` are done, or ``state.ended``.

    Raises:
        StopRequested, LoaderFailedError, InputError: as :func:`~ttd_plugins.training.step.training_step`.
    """
    while state.step < state.total_steps and not state.ended:
        result = training_step(state, prefetcher, optimizer, signals)
        if result.problem is not None:
            callbacks.step_skipped(result)
        state.end_step(prefetcher.epoch, prefetcher.position)
        callbacks.step_ended(result)


@dataclass(frozen=True)
class StepReport:
    """Metrics of one step: the loss, its parts, the engine's statistics and the gradient norm before clipping."""

    step: int
    loss: float
    losses: dict[str, float]
    statistics: dict[str, float]
    gradient_norm: float


@dataclass(frozen=True)
class _MemoryBatch:
    images: Tensor
    captions: list[str]
    tags: list[list[str]] | None = None
    keys: Sequence[str] = ()
    groups: list[str] | None = None


class _MemoryLoader:
    """Batches from an iterator of images and captions, one epoch of them."""

    def __init__(self, batches: Iterator[tuple[Tensor, list[str]]], steps: int) -> None:
        self.batches, self.steps = batches, steps

    def epoch(self, epoch: int, start: Any = None) -> Iterator[tuple[Any, int]]:
        number = -1
        for number, (images, captions) in enumerate(self.batches):
            yield _MemoryBatch(images, captions), number + 1
        if number + 1 < self.steps:
            raise TTDError(f"the data ended after {number + 1} batches, and {self.steps} steps were requested")

    def batches_per_epoch(self) -> int:
        return self.steps


class _CollectReports:
    """Callbacks that keep a report of each step and end the loop at a step that is not finite."""

    def __init__(self, state: TrainState, on_step: Callable[[StepReport], None] | None) -> None:
        self.state, self.on_step = state, on_step
        self.reports: list[StepReport] = []

    def step_skipped(self, result: StepResult) -> None:
        problem = result.problem or {}
        what = problem["what"]
        value = problem["loss" if what == "loss" else "gradient_norm"]
        raise TTDError(f"the {what} of step {self.state.step + 1} is {value}; lower the learning rate")

    def step_ended(self, result: StepResult) -> None:
        (losses,), (statistics,) = result.losses, result.statistics
        losses = dict(losses)
        loss = losses.pop("loss")
        norm = result.gradient_norm
        assert norm is not None
        report = StepReport(self.state.step, loss, losses, statistics, norm)
        self.reports.append(report)
        if self.on_step is not None:
            self.on_step(report)


def train_in_memory(
    ttd: TTD,
    batches: Iterator[tuple[Tensor, list[str]]],
    steps: int,
    optimizer: OptimizerConfig,
    *,
    on_step: Callable[[StepReport], None] | None = None,
) -> list[StepReport]:
    """Train the parameters of the engine's backbone that require a gradient, in place, in this process, without files.

    Args:
        ttd: the engine.
        batches: normalised images ``[B, 3, height, width]`` and B captions; at least ``steps`` batches.
        steps: optimizer steps.
        optimizer: its settings; ``steps``, ``epochs`` and ``batch_size`` are not used.
        on_step: called after each step.

    Returns:
        One report for each step.

    Raises:
        TTDError: no parameter requires a gradient, the batches ran out, or a loss or gradient is not finite.
    """
    if optimizer.accumulation != 1:
        raise InputError("training in memory takes one batch a step; set accumulation to 1")
    model = ttd.backbone.model
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise TTDError("no parameter of the backbone requires a gradient; call add_lora() or unfreeze a tower first")
    state = TrainState(ttd, ReplicatedStrategy(ttd, optimizer), trained, {}, total_steps=steps)
    loader = _MemoryLoader(iter(batches), steps)
    prefetcher = BatchPrefetcher(loader, ttd.backbone.device, prepare_texts=ttd.prepare_texts)
    callbacks = _CollectReports(state, on_step)
    ttd.train()
    try:
        # No handlers are installed: Ctrl-C ends the loop at once, since nothing could be saved.
        with torch.enable_grad():
            run_loop(state, prefetcher, optimizer, callbacks, StopSignals(lambda sentence: None))
    except LoaderFailedError as failure:
        raise failure.__cause__ or failure from None
    finally:
        prefetcher.close()
    ttd.eval()
    return callbacks.reports
