"""What a comparison found, in numbers and in sentences; every sentence is computed from the metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ttd_plugins.comparison.results import TIE as TIE
from ttd_plugins.comparison.results import Arm, BackboneResult, Comparison, Metric, mean_and_spread, paired_gain
from ttd_plugins.comparison.tables import gain, training_limits
from ttd_plugins.reports.formatting import capitalised, number, plural, signed

Verdict = Literal["better", "worse", "same", "spread", "none"]
VERDICT_WORDS: dict[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "same": "no change",
    "spread": "within the spread",
    "none": "",
}
BASELINES: dict[Arm, str] = {"control": "the control", "before": "the backbone before training"}
SELECTION = ("tag_f1", "tag_balance")
"""Metrics that the summary judges besides the first metric of the trade-off."""
COLLAPSE = 0.5
"""The page warns when the spread of the caption map falls below this share of its value before training."""


@dataclass(frozen=True)
class Finding:
    """A headline, and the sentences that support it."""

    headline: str
    sentences: list[str]


@dataclass(frozen=True)
class Change:
    """The gain of TTD in one metric of one backbone.

    Attributes:
        mean: after minus the baseline, mean over seeds.
        spread: sample standard deviation of that difference over seeds; ``None`` with fewer than two.
        baseline: the control if it was run, otherwise before.
        verdict: ``"same"`` if the mean is below :data:`TIE`, ``"spread"`` if it is no larger than the spread,
            ``"none"`` if the metric has no better direction.
    """

    mean: float
    spread: float | None
    baseline: Arm
    verdict: Verdict

    @property
    def tentative(self) -> bool:
        """Whether one seed alone says better or worse, so that the difference may be chance."""
        return self.spread is None and self.verdict in ("better", "worse")

    @property
    def words(self) -> str:
        """The verdict in words, such as ``better`` or ``worse, one seed``."""
        return VERDICT_WORDS[self.verdict] + (", one seed" if self.tentative else "")

    @property
    def signed(self) -> str:
        """``+0.094 ± 0.003``."""
        return signed(self.mean) + ("" if self.spread is None else f" ± {number(self.spread)}")


def mean(backbone: BackboneResult, arm: Arm, key: str) -> float | None:
    """Mean over the seeds; ``None`` if it is undefined or not finite."""
    value = backbone.mean(arm, key)
    return value if value is not None and math.isfinite(value) else None


def change(backbone: BackboneResult, metric: Metric) -> Change | None:
    """The gain of TTD in a metric; ``None`` if an arm was not run or the metric is undefined for a seed."""
    baseline: Arm = "control" if backbone.metrics.get("control") else "before"
    before = backbone.metrics.get("before", [])
    after = backbone.metrics.get("after", [])
    # The backbone before training was measured once, for every seed.
    found = gain(backbone, metric.key) if baseline == "control" else paired_gain(after, before * len(after), metric.key)
    if found is None or not math.isfinite(found[0]):
        return None
    return Change(*found, baseline, _verdict(*found, metric))


def _verdict(value: float, spread: float | None, metric: Metric) -> Verdict:
    if metric.better is None:
        return "none"
    # The rounded value is compared, so that a difference shown as 0.005 is not called no change.
    if abs(round(value, 3)) < TIE:
        return "same"
    if spread is not None and abs(value) <= spread:
        return "spread"
    return "better" if (value > 0) == (metric.better == "higher") else "worse"


def judged_metrics(comparison: Comparison) -> list[Metric]:
    """The metrics of the summary: what TTD should raise, tag F1, tag balance, and what it may cost, if measured."""
    by_key = {metric.key: metric for metric in comparison.metrics}
    keys = dict.fromkeys([comparison.trade_off[0], *SELECTION, comparison.trade_off[1]])
    return [by_key[key] for key in keys if key in by_key]


def describe_comparison(comparison: Comparison) -> Finding:
    """Say which backbone gains most, what it costs, where TTD does not help, and what is uncertain."""
    by_key = {metric.key: metric for metric in comparison.metrics}
    lead = by_key.get(comparison.trade_off[0]) or next((m for m in comparison.metrics if m.better), None)
    tuned = [backbone for backbone in comparison.backbones if backbone.metrics.get("after")]
    trouble = _trouble(comparison)
    if not comparison.backbones:
        return Finding("No backbone was compared", trouble)
    if lead is None:
        return Finding("No metric with a better direction was measured", trouble)
    if not tuned:
        return Finding(_best_headline(comparison, lead), [*_best_sentences(comparison), *trouble])
    cost = by_key.get(comparison.trade_off[1])
    cost = None if cost is lead else cost
    balance = by_key.get("tag_balance")
    headline = _headline(tuned, lead, cost)
    if len(comparison.backbones) == 1:
        headline += _balance_words(tuned[0], lead, balance)
        judged = [lead, *(m for m in judged_metrics(comparison) if m is not lead)]
        sentences = [words for metric in judged if (words := _one_sentence(tuned[0], metric))]
        sentences += _bias_sentences(tuned[0])
    else:
        sentences = _many_sentences(comparison, tuned, lead, cost)
    limits = training_limits(comparison)
    if limits:
        headline += f" ({', '.join(words for words, _ in limits)})"
    sentences += [sentence for _, sentence in limits]
    sentences += _below_before_sentences(tuned, lead)
    sentences += _uncertainty_sentences(tuned, lead)
    sentences += _collapse_sentences(tuned)
    return Finding(headline, sentences + trouble)


def _changes(tuned: Sequence[BackboneResult], metric: Metric) -> dict[str, Change]:
    """The known changes by backbone."""
    return {backbone.name: found for backbone in tuned if (found := change(backbone, metric)) is not None}


def _towards_better(value: Change, metric: Metric) -> float:
    """The mean change, with its sign turned so that more is better."""
    return -value.mean if metric.better == "lower" else value.mean


# The headline ---------------------------------------------------------------------------------------------------------


def _headline(tuned: Sequence[BackboneResult], lead: Metric, cost: Metric | None) -> str:
    changes = _changes(tuned, lead)
    if not changes:
        return f"The effect of TTD on {lead.label} could not be measured"
    helped = [name for name, found in changes.items() if found.verdict == "better"]
    tentative = all(found.tentative for found in changes.values() if found.verdict in ("better", "worse"))
    if not helped:
        no_help = f"TTD does not {'seem to ' if tentative else ''}help here"
        hurt = [name for name, found in changes.items() if found.verdict == "worse"]
        if hurt and len(tuned) == 1:
            return f"{no_help}: {lead.label} of {hurt[0]} worsens by {number(abs(changes[hurt[0]].mean))}"
        if hurt:
            return f"{no_help}: {lead.label} worsens on {_share(len(hurt), len(tuned))}"
        return f"TTD makes no clear difference to {lead.label} here"
    best = max(helped, key=lambda name: _towards_better(changes[name], lead))
    verb = _effect("raise" if lead.better == "higher" else "lower", tentative=tentative)
    if len(tuned) == 1:
        words = f"TTD {verb} {lead.label} of {best} by {number(abs(changes[best].mean))}"
    else:
        words = f"TTD {verb} {lead.label} on {_share(len(helped), len(tuned))}, most on {best}"
    if cost is None:
        return words
    costs = _changes(tuned, cost)
    paid = [name for name in helped if name in costs and costs[name].verdict == "worse"]
    if paid:
        at = "a cost" if len(paid) == len(helped) else f"a cost on {len(paid)} of them"
        return f"{words}, at {at} in {cost.label}"
    return f"{words}, at no clear cost in {cost.label}" if all(name in costs for name in helped) else words


def _balance_words(backbone: BackboneResult, lead: Metric, balance: Metric | None) -> str:
    """End of the headline where tag balance, the other measure of single tag bias, says something else."""
    found = None if balance is None or balance is lead else change(backbone, balance)
    first = change(backbone, lead)
    if balance is None or found is None or first is None or found.verdict == first.verdict:
        return ""
    if found.verdict not in ("better", "worse"):
        return ""
    verb = _effect("raise" if found.verdict == "better" else "lower", tentative=found.tentative)
    return f", but it {verb} {balance.label}"


def _effect(verb: str, *, tentative: bool) -> str:
    """``raises``, or ``seems to raise`` where one seed alone says so."""
    return f"seems to {verb}" if tentative else f"{verb}s"


def _share(count: int, total: int) -> str:
    if count == total:
        return "both backbones" if total == 2 else f"all {total} backbones"
    return f"{count} of {plural(total, 'backbone')}"


def _best_headline(comparison: Comparison, lead: Metric) -> str:
    known = {b.name: value for b in comparison.backbones if (value := mean(b, "before", lead.key)) is not None}
    if not known:
        return f"{capitalised(lead.label)} could not be measured"
    pick = min if lead.better == "lower" else max
    best = pick(known, key=known.__getitem__)
    if len(known) == 1:
        return f"{best} as loaded: {lead.label} {number(known[best])}"
    return f"As loaded, {best} has the best {lead.label}: {number(known[best])}"


# Sentences on one backbone --------------------------------------------------------------------------------------------


def _one_sentence(backbone: BackboneResult, metric: Metric) -> str:
    """One metric of a lone backbone, which separates the gain of TTD from that of any further training."""
    found = change(backbone, metric)
    if found is None:
        return ""
    against = f"over {BASELINES[found.baseline]}" if found.mean > 0 else f"against {BASELINES[found.baseline]}"
    if found.verdict in ("better", "worse"):
        what = f"{'rises' if found.mean > 0 else 'falls'} by {number(abs(found.mean))} {against}"
    elif found.verdict == "spread":
        what = f"changes by {found.signed}, which is within the spread over seeds"
    else:
        what = f"does not change {against.replace('over', 'against')}"
    arms: tuple[tuple[Arm, str], ...] = (
        ("after", "after TTD"),
        ("control", "in the control"),
        ("before", "before training"),
    )
    values = [
        f"{number(value)} {words}" for arm, words in arms if (value := mean(backbone, arm, metric.key)) is not None
    ]
    return f"{capitalised(metric.label)} {what}: {', '.join(values)}."


def _bias_sentences(backbone: BackboneResult) -> list[str]:
    gaps = {}
    for arm in ("before", "after"):
        rows = backbone.bias.get(arm, [])
        means = {}
        for kind in dict.fromkeys(kind for row in rows for kind in row):
            values = [value for row in rows if (value := row.get(kind)) is not None and math.isfinite(value)]
            if values and len(values) == len(rows):
                means[kind] = mean_and_spread(values)[0]
        if len(means) < 2:
            return []
        low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        gaps[arm] = (low, high, means[high] - means[low])
    (low, high, gap), (_, _, left) = gaps["before"], gaps["after"]
    what = "shrinks to" if gap - left >= TIE else "grows to" if left - gap >= TIE else "stays at"
    names = {"middle": "less common"}
    return [
        f"Before training, the caption map favours {names.get(high, high)} words over {names.get(low, low)} words by "
        f"{number(gap)}. After TTD the gap between the most and the least favoured kind {what} {number(left)}."
    ]


# Sentences on several backbones ---------------------------------------------------------------------------------------


def _many_sentences(
    comparison: Comparison, tuned: Sequence[BackboneResult], lead: Metric, cost: Metric | None
) -> list[str]:
    helped = any(found.verdict == "better" for found in _changes(tuned, lead).values())
    no_help = _no_help_sentences(tuned, lead)
    judged = [lead, *(metric for metric in comparison.metrics if metric.key in SELECTION and metric is not lead)]
    # If TTD helps no backbone, the list of those that it does not help says everything about the first metric.
    sentences = [] if helped else no_help
    sentences += [words for m in judged if (helped or m is not lead) and (words := _best_gain_sentence(tuned, m))]
    sentences += _cost_sentences(tuned, cost) if cost is not None else []
    return sentences + (no_help if helped else [])


def _best_gain_sentence(tuned: Sequence[BackboneResult], metric: Metric) -> str:
    changes = [(backbone, found) for backbone in tuned if (found := change(backbone, metric)) is not None]
    if not changes:
        return ""
    backbone, found = max(changes, key=lambda item: _towards_better(item[1], metric))
    first, last = mean(backbone, found.baseline, metric.key), mean(backbone, "after", metric.key)
    if found.verdict != "better":
        return (
            f"{capitalised(metric.label)}: no backbone gains {TIE} over {BASELINES[found.baseline]}"
            f"{'' if found.spread is None else ' and more than its spread'}; "
            f"the best is {backbone.name} with {found.signed}."
        )
    who = f"{backbone.name} gains most" if len(changes) > 1 else f"{backbone.name} gains"
    values = ["n/a" if value is None else number(value) for value in (first, last)]
    return (
        f"{capitalised(metric.label)}: {who} over {BASELINES[found.baseline]}, {found.signed} "
        f"({values[0]} to {values[1]})."
    )


def _cost_sentences(tuned: Sequence[BackboneResult], cost: Metric) -> list[str]:
    changes = _changes(tuned, cost)
    if not changes:
        return [f"{capitalised(cost.label)}: the cost of TTD was not measured."]
    paid = [name for name, found in changes.items() if found.verdict == "worse"]
    gained = [name for name, found in changes.items() if found.verdict == "better"]
    unclear = [name for name, found in changes.items() if found.verdict in ("spread", "same")]
    parts = []
    if paid:
        paid.sort(key=lambda name: _towards_better(changes[name], cost))
        parts.append("TTD costs " + _each(paid, changes))
    if gained:
        parts.append(("it gains on " if parts else "TTD gains on ") + _each(gained, changes))
    if unclear:
        parts.append("no clear change on " + _each(unclear, changes))
    return [f"{capitalised(cost.label)}: {'; '.join(parts)}."] if parts else []


def _each(names: Sequence[str], changes: Mapping[str, Change]) -> str:
    return ", ".join(f"{name} {changes[name].signed}" for name in names)


def _no_help_sentences(tuned: Sequence[BackboneResult], lead: Metric) -> list[str]:
    rest = {name: found for name, found in _changes(tuned, lead).items() if found.verdict != "better"}
    words = [f"{name} ({found.signed}, {found.words})" for name, found in rest.items()]
    return [f"TTD does not help {lead.label} on {', '.join(words)}."] if words else []


def _best_sentences(comparison: Comparison) -> list[str]:
    words = ["Nothing was fine-tuned: the metrics are those of the backbones as loaded, without TTD."]
    for metric in comparison.metrics:
        known = {b.name: value for b in comparison.backbones if (value := mean(b, "before", metric.key)) is not None}
        if metric.better is not None and len(known) > 1:
            first = sorted(known, key=known.__getitem__, reverse=metric.better == "higher")
            words.append(
                f"{capitalised(metric.label)}: {first[0]} {number(known[first[0]])} is best, "
                f"{first[-1]} {number(known[first[-1]])} is last."
            )
    return words


# Doubts ---------------------------------------------------------------------------------------------------------------


def _below_before_sentences(tuned: Sequence[BackboneResult], lead: Metric) -> list[str]:
    """Backbones that gain over the control and yet are worse than before training."""
    sentences = []
    for backbone in tuned:
        found = change(backbone, lead)
        before, after = mean(backbone, "before", lead.key), mean(backbone, "after", lead.key)
        if found is None or found.baseline == "before" or found.verdict != "better" or before is None or after is None:
            continue
        lost = (before - after) * (1 if lead.better == "higher" else -1)
        if lost >= TIE:
            sentences.append(
                f"{backbone.name} gains over its control, but its {lead.label} is still worse than before training: "
                f"{number(after)} against {number(before)}."
            )
    return sentences


def _uncertainty_sentences(tuned: Sequence[BackboneResult], lead: Metric) -> list[str]:
    words = []
    changes = {backbone.name: change(backbone, lead) for backbone in tuned}
    known = [found for found in changes.values() if found is not None]
    if any(found.baseline == "before" for found in known):
        words.append("Where no control was run, any further training may explain the gain.")
    missing = [name for name, found in changes.items() if found is None]
    if missing:
        words.append(f"{capitalised(lead.label)} is not defined in every arm of {', '.join(missing)}.")
    without = [backbone.name for backbone in tuned if not backbone.metrics.get("before")]
    if without:
        words.append(f"{', '.join(without)} was not measured before training.")
    return words


def _collapse_sentences(tuned: Sequence[BackboneResult]) -> list[str]:
    sentences = []
    for backbone in tuned:
        before, after = (mean(backbone, arm, "caption_map_spread") for arm in ("before", "after"))  # type: ignore[arg-type]
        if before is not None and after is not None and after < COLLAPSE * before:
            sentences.append(
                f"Warning: the spread of the caption map of {backbone.name} fell from {number(before)} to "
                f"{number(after)}. Its maps may be collapsing, which min-max normalisation hides."
            )
    return sentences


def _trouble(comparison: Comparison) -> list[str]:
    words = []
    if comparison.failures:
        count, names = len(comparison.failures), ", ".join(comparison.failures)
        words.append(f"{plural(count, 'backbone')} failed and {'was' if count == 1 else 'were'} left out: {names}.")
    warned = sum(len(backbone.warnings) for backbone in comparison.backbones)
    if warned:
        words.append(f"The run raised {plural(warned, 'warning')}; see the section Warnings.")
    return words
