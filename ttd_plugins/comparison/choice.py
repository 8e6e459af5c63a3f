"""Which backbone to use: the best one, the cheapest one, and a choice whose uncertainty is stated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ttd_plugins.comparison.results import TIE, Arm, BackboneResult, Comparison, Metric, mean_and_spread
from ttd_plugins.utils.number_format import format_spread

FASTER = 1.1
"""A cheaper backbone is chosen only if it encodes at least this many times as many images per second."""
ARM_WORDS: dict[Arm, str] = {"after": "after TTD", "control": "in the control", "before": "as loaded"}


@dataclass(frozen=True)
class Choice:
    """The backbone to use, by quality and cost.

    Attributes:
        metric: the metric of quality.
        arm: the arm that is judged: ``"after"``, or ``"before"`` where nothing was fine-tuned.
        best: name of the backbone with the best mean.
        cheapest: name of the backbone with the most images per second; ``None`` if the cost was not measured.
        chosen: the fastest of those that are not clearly worse than the best.
        tentative: whether too little was run to be sure.
        sentences: the choice, the best and the cheapest, and the uncertainty, each in one sentence.
    """

    metric: Metric
    arm: Arm
    best: str
    cheapest: str | None
    chosen: str
    tentative: bool
    sentences: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes for ``results.json``."""
        return {**vars(self), "metric": self.metric.key, "sentences": list(self.sentences)}


def choose(comparison: Comparison) -> Choice | None:
    """Choose among the backbones of a comparison; ``None`` with fewer than two that were measured.

    A backbone is clearly worse than the best one if its mean is at least :data:`~ttd_plugins.comparison.results.TIE`
    worse and, with several seeds, the mean of the differences per seed is larger than their standard deviation.
    """
    by_key = {metric.key: metric for metric in comparison.metrics}
    metric = by_key.get(comparison.trade_off[0]) or next((one for one in comparison.metrics if one.better), None)
    if metric is None or metric.better is None:
        return None
    arm: Arm = "after" if any(one.metrics.get("after") for one in comparison.backbones) else "before"
    known = {one.name: one for one in comparison.backbones if _values(one, arm, metric.key)}
    if len(known) < 2:
        return None
    sign = -1 if metric.better == "lower" else 1
    means = {name: sign * mean_and_spread(_values(one, arm, metric.key))[0] for name, one in known.items()}
    best = max(means, key=means.__getitem__)
    behind = {name: _behind(known[best], one, arm, metric.key, sign) for name, one in known.items() if name != best}
    speeds = {name: _speed(one.cost) for name, one in known.items() if _speed(one.cost)}
    cheapest = max(speeds, key=speeds.__getitem__) if speeds else None
    chosen = best
    if best in speeds:
        rivals = {name: speeds[name] for name in behind if name in speeds and not _is_clear(*behind[name])}
        fast = max(rivals, key=rivals.__getitem__, default=None)
        if fast is not None and rivals[fast] >= FASTER * speeds[best]:
            chosen = fast
    seeds = min(len(_values(one, arm, metric.key)) for one in known.values())
    doubts = _doubts(comparison, arm, seeds, behind, best)
    sentences = (
        _choice_sentence(metric, arm, chosen, best, known, behind, speeds, tentative=bool(doubts)),
        *_other_sentences(metric, arm, chosen, best, cheapest, known, behind, speeds),
        *doubts,
    )
    return Choice(metric, arm, best, cheapest, chosen, bool(doubts), sentences)


def quality_text(backbone: BackboneResult, arm: Arm, key: str) -> str:
    """Mean and spread of a metric, such as ``0.631 ± 0.004``."""
    return format_spread(*mean_and_spread(_values(backbone, arm, key)))


def cost_text(cost: Mapping[str, float]) -> str:
    """Speed and memory, such as ``820 images/s and 12 MiB``; empty if they were not measured."""
    if not _speed(cost):
        return ""
    return f"{speed_text(_speed(cost))} and {memory_text(cost['memory_bytes'])}"


def speed_text(images_per_second: float) -> str:
    """Such as ``82 images/s``."""
    return f"{images_per_second:.3g} images/s" if images_per_second < 1000 else f"{images_per_second:.0f} images/s"


def memory_text(size: float) -> str:
    """Such as ``12 MiB``."""
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def _values(backbone: BackboneResult, arm: Arm, key: str) -> list[float]:
    found = [row.get(key) for row in backbone.metrics.get(arm, [])]
    return [float(v) for v in found if v is not None] if all(v is not None and math.isfinite(v) for v in found) else []


def _speed(cost: Mapping[str, float]) -> float:
    return float(cost.get("images_per_second") or 0.0)


def _behind(best: BackboneResult, other: BackboneResult, arm: Arm, key: str, sign: int) -> tuple[float, float | None]:
    """How far ``other`` is behind, mean and spread over seeds; more is worse."""
    pairs = list(zip(_values(best, arm, key), _values(other, arm, key), strict=False))
    return mean_and_spread([sign * (one - two) for one, two in pairs])


def _is_clear(mean: float, spread: float | None) -> bool:
    return round(mean, 3) >= TIE and (spread is None or mean > spread)


def _choice_sentence(
    metric: Metric,
    arm: Arm,
    chosen: str,
    best: str,
    known: Mapping[str, BackboneResult],
    behind: Mapping[str, tuple[float, float | None]],
    speeds: Mapping[str, float],
    *,
    tentative: bool,
) -> str:
    words = "Tentative choice" if tentative else "Choice"
    values = f"{metric.label} {quality_text(known[chosen], arm, metric.key)} {ARM_WORDS[arm]}"
    cost = cost_text(known[chosen].cost)
    text = f"{words}: {chosen}, with {values}" + (f", at {cost}" if cost else "")
    if chosen == best:
        return f"{text}; no backbone is better."
    times = speeds[chosen] / speeds[best]
    return (
        f"{text}: it is {times:.1f} times as fast as the best, {best}, and not clearly worse "
        f"({format_spread(*behind[chosen])} behind)."
    )


def _other_sentences(
    metric: Metric,
    arm: Arm,
    chosen: str,
    best: str,
    cheapest: str | None,
    known: Mapping[str, BackboneResult],
    behind: Mapping[str, tuple[float, float | None]],
    speeds: Mapping[str, float],
) -> list[str]:
    sentences = []
    if best != chosen:
        cost = cost_text(known[best].cost)
        sentences.append(
            f"Best {ARM_WORDS[arm]}: {best}, {metric.label} {quality_text(known[best], arm, metric.key)}"
            + (f", at {cost}." if cost else ".")
        )
    if cheapest is not None:
        text = f"Cheapest: {cheapest}, {cost_text(known[cheapest].cost)}"
        if cheapest == best:
            sentences.append(f"{text}; it is also the best.")
        else:
            sentences.append(
                f"{text}, {metric.label} {quality_text(known[cheapest], arm, metric.key)}, "
                f"{format_spread(*behind[cheapest])} behind the best."
            )
    if set(known) - set(speeds):
        sentences.append(f"The cost of {', '.join(sorted(set(known) - set(speeds)))} was not measured.")
    return sentences


def _doubts(
    comparison: Comparison,
    arm: Arm,
    seeds: int,
    behind: Mapping[str, tuple[float, float | None]],
    best: str,
) -> list[str]:
    """Sentences on what makes a choice tentative."""
    doubts = []
    if arm == "after" and seeds < 2:
        doubts.append("One seed was run, so it is not known by how much the seeds differ: the choice is tentative.")
    else:
        close = [name for name, gap in behind.items() if not _is_clear(*gap)]
        if close:
            gaps = ", ".join(f"{name} ({format_spread(*behind[name])} behind)" for name in close)
            doubts.append(f"The lead of {best} over {gaps} is within the spread or below {TIE}: they may be equal.")
    return doubts


def measured(backbones: Sequence[BackboneResult]) -> bool:
    """Whether the cost of a backbone is known."""
    return any(_speed(backbone.cost) for backbone in backbones)
