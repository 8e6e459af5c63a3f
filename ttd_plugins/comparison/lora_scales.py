"""The frontier of gain and cost: a backbone after TTD with its LoRA scaled, from 0 (before) to 1 (as trained)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ttd_plugins.comparison.results import TIE, BackboneResult, Comparison, Metric, mean_and_spread, paired_gain
from ttd_plugins.utils.number_format import format_number

COSTS = ("retrieval_r1", "zero_shot_top1", "label_map_image")
"""Keys of the metrics that TTD may lower: those of the pooled embeddings."""

Values = Sequence[Mapping[str, float | None]]


@dataclass(frozen=True)
class ScaledResult:
    """A backbone after TTD at one factor of LoRA.

    Attributes:
        scale: the factor; at 0 it is the backbone before TTD, at 1 as trained.
        means: key of a metric to its mean over seeds; ``None`` if undefined.
        gains: key of a metric to the gain over the control of the same seed: mean, and sample standard deviation
            (``None`` for one seed). Undefined gains are left out.
    """

    scale: float
    means: Mapping[str, float | None]
    gains: Mapping[str, tuple[float, float | None]]


def scaled_results(backbone: BackboneResult, metrics: Sequence[Metric]) -> list[ScaledResult]:
    """Return the results of a backbone by factor of LoRA, in ascending order.

    Empty without a control, or if no factor between 0 and 1 or above was measured for every seed.
    """
    control, after = backbone.metrics.get("control", []), backbone.metrics.get("after", [])
    complete = {float(scale): rows for scale, rows in backbone.scaled.items() if len(rows) == len(after)}
    if not control or len(control) != len(after) or not complete:
        return []
    by_scale: dict[float, Values] = {**complete, 1.0: after}
    if before := backbone.metrics.get("before"):
        by_scale[0.0] = before * len(after)
    found = []
    for scale in sorted(by_scale):
        means, gains = {}, {}
        for metric in metrics:
            values = [row.get(metric.key) for row in by_scale[scale]]
            known = [value for value in values if value is not None]
            means[metric.key] = mean_and_spread(known)[0] if len(known) == len(values) else None
            gain = paired_gain(by_scale[scale], control, metric.key)
            if gain is not None:
                gains[metric.key] = gain
        found.append(ScaledResult(scale, means, gains))
    return found


def cost_metrics(comparison: Comparison) -> list[Metric]:
    """Return the metrics that TTD may lower and that some backbone has at several factors of LoRA."""
    keys = {comparison.trade_off[1], *COSTS}
    results = [scaled_results(backbone, comparison.metrics) for backbone in comparison.backbones]
    return [
        metric
        for metric in comparison.metrics
        if metric.key in keys and any(metric.key in one.gains for found in results for one in found)
    ]


def raised_metric(comparison: Comparison) -> Metric | None:
    """Return the metric that TTD should raise; ``None`` if it is not measured."""
    return next((metric for metric in comparison.metrics if metric.key == comparison.trade_off[0]), None)


def scale_sentences(comparison: Comparison) -> list[str]:
    """Say, for each backbone with a gain, what the factor nearest to one half keeps of the gain and of the cost."""
    raised, costs = raised_metric(comparison), cost_metrics(comparison)
    if raised is None:
        return []
    sentences = []
    for backbone in comparison.backbones:
        results = {one.scale: one for one in scaled_results(backbone, comparison.metrics)}
        between = [scale for scale in results if 0 < scale < 1]
        if not between:
            continue
        half, full = results[min(between, key=lambda scale: abs(scale - 0.5))], results[1.0]
        total = full.gains.get(raised.key)
        if total is None or total[0] < TIE or raised.key not in half.gains:
            continue
        kept = half.gains[raised.key][0]
        parts = [
            f"{metric.label} {format_number(half.gains[metric.key][0], sign=True)} instead of "
            f"{format_number(full.gains[metric.key][0], sign=True)}"
            for metric in costs
            if metric.key in half.gains and metric.key in full.gains and full.gains[metric.key][0] < 0
        ]
        cost = f", at {' and '.join(parts)}" if parts else ""
        sentences.append(
            f"{backbone.name}: LoRA scaled by {half.scale:g} has a gain of "
            f"{format_number(kept, sign=True)} in {raised.label} "
            f"({kept / total[0]:.0%} of {format_number(total[0], sign=True)}){cost}."
        )
    return sentences
