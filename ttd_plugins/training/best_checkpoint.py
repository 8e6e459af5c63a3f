"""The best evaluation of a run by a named metric: which checkpoint is kept, and when a run stops early.

Everything is derived from the evaluations in ``log.jsonl``, so that a resumed run decides as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ttd_plugins.errors import InputError, listed
from ttd_plugins.training.config import EvaluationConfig, TrainConfig
from ttd_plugins.training.jsonl_log import JsonlLog

BEST = "best"
"""Name of the best checkpoint wherever a step is expected."""
SMALLER_IS_BETTER = {"mfpr", "mfnr"}

Evaluations = Sequence[tuple[int, Mapping[str, float]]]
"""(step, metrics) of evaluations, in order of their steps."""


@dataclass(frozen=True)
class Verdict:
    """What the evaluations of a run say.

    Attributes:
        metric: name of the metric.
        step, value: of the best evaluation whose checkpoint exists; ``None`` if there is none yet.
        top_step, top_value: of the best evaluation of all, including that before the first step.
        without_gain: how many evaluations came after that one.
        patience: how many may; ``None`` without a limit.
    """

    metric: str
    step: int | None
    value: float | None
    top_step: int
    top_value: float
    without_gain: int
    patience: int | None

    @property
    def ends_run(self) -> bool:
        """Whether the patience is exhausted."""
        return self.patience is not None and self.without_gain >= self.patience

    def sentence(self) -> str:
        """Describe the best checkpoint, for people."""
        if self.step is None:
            return f"no checkpoint has a value of {self.metric} yet"
        found = f"the best checkpoint by {self.metric} is that of step {self.step} ({self.value:.4g})"
        if self.top_step != self.step:
            what = "before the first step" if self.top_step == 0 else f"of step {self.top_step}, without a checkpoint"
            found += f", and the value {what} is better ({self.top_value:.4g})"
        return found


def stopped_early(verdict: Verdict, step: int) -> str:
    """One sentence about a run that stops before its last step."""
    return (
        f"stopped early after step {step}: {verdict.without_gain} evaluations in a row had no better {verdict.metric} "
        f"than {verdict.top_value:.4g} (evaluation.patience={verdict.patience})"
    )


def smaller_is_better(options: EvaluationConfig) -> bool:
    """Whether the smallest value of the metric is the best."""
    if options.best_mode is not None:
        return options.best_mode == "min"
    name = (options.best or "").rpartition("/")[2]
    return "loss" in name or name in SMALLER_IS_BETTER


def judge(evaluations: Evaluations, options: EvaluationConfig, existing: Collection[int]) -> Verdict | None:
    """Find the best evaluation by ``options.best``; returns ``None`` without such a metric or a finite value of it.

    Args:
        evaluations: those in the log.
        options: metric, mode and patience.
        existing: steps whose checkpoints exist.

    Raises:
        InputError: no evaluation has the metric.
    """
    if options.best is None or not evaluations:
        return None
    sign = -1 if smaller_is_better(options) else 1
    values = {step: metrics[options.best] for step, metrics in evaluations if options.best in metrics}
    if not values:
        names = sorted({name for _, metrics in evaluations for name in metrics})
        raise InputError(
            f"evaluation.best is {options.best!r}, and the evaluation has no finite metric of that name; it has "
            f"{listed(names, 40)}"
        )
    # NaN of a callback compares with nothing, so that it would stay the best.
    values = {step: value for step, value in values.items() if math.isfinite(value)}
    if not values:
        return None
    # The first of equal values is the best: a tie is no gain.
    top = max(values, key=lambda step: (sign * values[step], -step))
    saved = [step for step in values if step in existing]
    best = max(saved, key=lambda step: (sign * values[step], -step)) if saved else None
    return Verdict(
        metric=options.best,
        step=best,
        value=None if best is None else values[best],
        top_step=top,
        top_value=values[top],
        without_gain=sum(step > top for step, _ in evaluations),
        patience=options.patience,
    )


def read_evaluations(log: JsonlLog) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) of every evaluation in the log of a run."""
    found = [(line["step"], line.get("evaluation")) for line in log.read()]
    return [
        (step, {name: value for name, value in metrics.items() if isinstance(value, int | float)})
        for step, metrics in found
        if isinstance(metrics, dict)
    ]


def best_step(run: Path, existing: Collection[int]) -> int:
    """Return the step of the best checkpoint of a run by the metric that its ``config.yaml`` names.

    Raises:
        InputError: the run names no metric, or no evaluated step has a checkpoint.
    """
    options = TrainConfig.read(run / "config.yaml").evaluation
    if options.best is None:
        raise InputError(
            f"{run} has no best checkpoint, because evaluation.best names no metric; train with --best METRIC, or name "
            "a step"
        )
    found = judge(read_evaluations(JsonlLog(run / "log.jsonl")), options, existing)
    if found is None or found.step is None:
        raise InputError(f"{run} has no checkpoint of a step that was evaluated; name a step")
    return found.step
