"""A plain optimisation loop over ready batches: warm-up, cosine, clipping, and a loss that must stay finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ttd_plugins.engine import TTD
from ttd_plugins.errors import TTDError


@dataclass(frozen=True)
class OptimizerOptions:
    """How parameters are moved.

    Attributes:
        learning_rate: peak of the schedule.
        weight_decay: decoupled, as in AdamW (arXiv 1711.05101).
        warm_up: steps of linear warm-up, before a cosine to zero.
        clip_norm: largest norm of the whole gradient.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warm_up: int = 20
    clip_norm: float = 1.0


@dataclass(frozen=True)
class StepReport:
    """What one step did: the loss, its parts, the engine's statistics, and the norm of the gradient before clipping."""

    step: int
    loss: float
    losses: dict[str, float]
    statistics: dict[str, float]
    gradient_norm: float


def learning_rate_factor(step: int, steps: int, warm_up: int) -> float:
    """Share of the peak learning rate at ``step`` (from 0): linear warm-up, then a cosine to zero at ``steps``."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


def train(
    ttd: TTD,
    batches: Iterable[tuple[Tensor, list[str]]],
    steps: int,
    options: OptimizerOptions | None = None,
    *,
    on_step: Callable[[StepReport], None] | None = None,
) -> list[StepReport]:
    """Train what requires a gradient in the engine's backbone, in place, for ``steps`` batches.

    Args:
        ttd: the engine.
        batches: pairs of normalised images ``[B, 3, height, width]`` and B captions; at least ``steps`` of them.
        steps: optimiser steps.
        options: how parameters are moved.
        on_step: called after each step.

    Returns:
        One report a step.

    Raises:
        TTDError: nothing requires a gradient, the batches ran out, or the loss or its gradient is not finite.
    """
    options = options or OptimizerOptions()
    parameters = [p for p in ttd.backbone.parameters() if p.requires_grad]
    if not parameters:
        raise TTDError("nothing of the backbone requires a gradient; call add_lora() or unfreeze a tower first")
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    ttd.train()
    reports: list[StepReport] = []
    stream: Iterator[tuple[Tensor, list[str]]] = iter(batches)
    for step in range(steps):
        images, captions = next(stream, (None, []))
        if images is None:
            raise TTDError(f"the data ended after {step} batches, and {steps} steps were asked for")
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * learning_rate_factor(step, steps, options.warm_up)
        output = ttd(images, captions)
        if not torch.isfinite(output.loss):
            raise TTDError(f"the loss of step {step + 1} is {output.loss.item()}; lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm)
        if not torch.isfinite(norm):
            raise TTDError(f"the gradient of step {step + 1} is {float(norm)}; lower the learning rate")
        optimizer.step()
        report = StepReport(
            step=step + 1,
            loss=output.loss.item(),
            losses={name: part.item() for name, part in output.losses.items()},
            statistics=output.statistics,
            gradient_norm=float(norm),
        )
        reports.append(report)
        if on_step is not None:
            on_step(report)
    ttd.eval()
    return reports
