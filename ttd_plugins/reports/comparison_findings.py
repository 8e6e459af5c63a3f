"""What the figures of a comparison say, in numbers and in words; every sentence is worked out from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ttd_plugins.comparison.results import Arm, BackboneResult, Comparison, Metric, mean_and_spread
from ttd_plugins.comparison.tables import gain
from ttd_plugins.reports import page

Verdict = Literal["better", "worse", "same", "spread", "none"]
VERDICT_WORDS: dict[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "same": "no change",
    "spread": "within the spread",
    "none": "",
}
BASELINES: dict[Arm, str] = {"control": "the control", "before": "the backbone before"}
SELECTION = ("tag_f1", "tag_balance")


@dataclass(frozen=True)
class Change:
    """What TTD did to one figure of one backbone.

    Attributes:
        mean: after minus the baseline, mean over seeds.
        spread: sample standard deviation of that difference over seeds; ``None`` with fewer than two.
        baseline: the arm that it is taken against: the control where it was run, else before.
        verdict: ``"spread"`` where the mean is no larger than the spread, ``"same"`` where it is below
            :data:`~ttd_plugins.reports.page.TIE`, ``"none"`` where a figure has no better direction.
    """

    mean: float
    spread: float | None
    baseline: Arm
    verdict: Verdict

    @property
    def signed(self) -> str:
        """``+0.094 ± 0.003``."""
        return page.signed(self.mean) + ("" if self.spread is None else f" ± {page.number(self.spread)}")


def mean(backbone: BackboneResult, arm: Arm, key: str) -> float | None:
    """Mean over the seeds; ``None`` where it is not defined or not finite."""
    value = backbone.mean(arm, key)
    return value if value is not None and math.isfinite(value) else None


def change(backbone: BackboneResult, figure: Metric) -> Change | None:
    """The change of a figure by TTD; ``None`` where the arms were not run or the figure is not defined."""
    baseline: Arm = "control" if backbone.metrics.get("control") else "before"
    key = figure.key
    if baseline == "control":
        found = gain(backbone, key)
    else:
        start = mean(backbone, "before", key)
        rows = [row.get(key) for row in backbone.metrics.get("after", [])]
        gains = [value - start for value in rows if value is not None and start is not None]
        if not gains or len(gains) != len(rows):
            return None
        found = mean_and_spread(gains)
    if found is None or not math.isfinite(found[0]):
        return None
    return Change(*found, baseline, _verdict(*found, figure))


def _verdict(value: float, spread: float | None, figure: Metric) -> Verdict:
    if figure.better is None:
        return "none"
    # As it is shown, or a reader would see 0.005 called none.
    if abs(round(value, 3)) < page.TIE:
        return "same"
    if spread is not None and abs(value) <= spread:
        return "spread"
    return "better" if (value > 0) == (figure.better == "higher") else "worse"


def describe_comparison(comparison: Comparison) -> page.Finding:
    """Say which backbone gains most and what it costs, where TTD does not help, and what is unsure."""
    figures = {figure.key: figure for figure in comparison.metrics}
    lead = figures.get(comparison.trade_off[0]) or next((f for f in comparison.metrics if f.better), None)
    tuned = [backbone for backbone in comparison.backbones if backbone.metrics.get("after")]
    if not comparison.backbones:
        return page.Finding("No backbone was compared", _trouble(comparison))
    if lead is None:
        return page.Finding("No figure was measured that has a better direction", _trouble(comparison))
    if not tuned:
        return page.Finding(_best_headline(comparison, lead), [*_best_words(comparison), *_trouble(comparison)])
    changes = {backbone.name: change(backbone, lead) for backbone in tuned}
    helped = any(found is not None and found.verdict == "better" for found in changes.values())
    # Where it helps nobody, the list of those that it does not help says all.
    judged = [figure for figure in _judged(comparison, lead) if helped or figure is not lead]
    sentences = [] if helped else _no_help_words(tuned, lead)
    sentences += [words for figure in judged if (words := _most_words(tuned, figure))]
    cost = figures.get(comparison.trade_off[1])
    sentences += _cost_words(tuned, cost) if cost is not None and cost is not lead else []
    sentences += _no_help_words(tuned, lead) if helped else []
    sentences += _below_before_words(tuned, lead)
    sentences += _unsure_words(tuned, lead, changes)
    return page.Finding(_headline(tuned, lead, cost), sentences + _trouble(comparison))


def _judged(comparison: Comparison, lead: Metric) -> list[Metric]:
    return [lead, *(figure for figure in comparison.metrics if figure.key in SELECTION and figure is not lead)]


def _better(value: Change, figure: Metric) -> float:
    """A change with the sign turned so that more is better."""
    return -value.mean if figure.better == "lower" else value.mean


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _headline(tuned: Sequence[BackboneResult], lead: Metric, cost: Metric | None) -> str:
    changes = {backbone.name: found for backbone in tuned if (found := change(backbone, lead)) is not None}
    if not changes:
        return f"What TTD does to {lead.label} could not be measured"
    helped = [name for name, found in changes.items() if found.verdict == "better"]
    if not helped:
        hurt = [name for name, found in changes.items() if found.verdict == "worse"]
        if hurt:
            return f"TTD does not help here: {lead.label} worsens on {_share(len(hurt), len(tuned))}"
        return f"TTD makes no sure difference to {lead.label} here"
    best = max(helped, key=lambda name: _better(changes[name], lead))
    verb = "raises" if lead.better == "higher" else "lowers"
    if len(tuned) == 1:
        words = f"TTD {verb} {lead.label} of {best} by {page.number(abs(changes[best].mean))}"
    else:
        words = f"TTD {verb} {lead.label} on {_share(len(helped), len(tuned))}, most on {best}"
    if cost is None or cost is lead:
        return words
    costs = {backbone.name: found for backbone in tuned if (found := change(backbone, cost)) is not None}
    paid = [name for name in helped if name in costs and costs[name].verdict == "worse"]
    if paid:
        at = "a cost" if len(helped) == 1 else f"a cost on {len(paid)} of them" if len(paid) < len(helped) else "a cost"
        return f"{words}, at {at} in {cost.label}"
    return f"{words}, at no sure cost in {cost.label}" if all(name in costs for name in helped) else words


def _share(count: int, total: int) -> str:
    if count == total:
        return "both backbones" if total == 2 else f"all {total} backbones" if total > 2 else "the backbone"
    return f"{count} of {page.plural(total, 'backbone')}"


def _most_words(tuned: Sequence[BackboneResult], figure: Metric) -> str:
    changes = [(backbone, found) for backbone in tuned if (found := change(backbone, figure)) is not None]
    if not changes:
        return ""
    backbone, found = max(changes, key=lambda item: _better(item[1], figure))
    first, last = mean(backbone, found.baseline, figure.key), mean(backbone, "after", figure.key)
    if found.verdict != "better":
        return (
            f"{_capital(figure.label)}: no backbone gains {page.TIE} over {BASELINES[found.baseline]} and more than "
            f"its spread; the best is {backbone.name} with {found.signed}."
        )
    who = f"{backbone.name} gains most" if len(changes) > 1 else f"{backbone.name} gains"
    return (
        f"{_capital(figure.label)}: {who} over {BASELINES[found.baseline]}, {found.signed} "
        f"({_numeral(first)} to {_numeral(last)})."
    )


def _numeral(value: float | None) -> str:
    return "n/a" if value is None else page.number(value)


def _cost_words(tuned: Sequence[BackboneResult], cost: Metric) -> list[str]:
    changes = {backbone.name: found for backbone in tuned if (found := change(backbone, cost)) is not None}
    if not changes:
        return [f"{_capital(cost.label)}: what TTD costs here was not measured."]
    paid = [name for name, found in changes.items() if found.verdict == "worse"]
    gained = [name for name, found in changes.items() if found.verdict == "better"]
    unsure = [name for name, found in changes.items() if found.verdict in ("spread", "same")]
    parts = []
    if paid:
        paid.sort(key=lambda name: _better(changes[name], cost))
        parts.append("TTD costs " + _each(paid, changes))
    if gained:
        parts.append(("it gains on " if parts else "TTD gains on ") + _each(gained, changes))
    if unsure:
        parts.append("no more than the spread or a tie on " + _each(unsure, changes))
    return [f"{_capital(cost.label)}: {'; '.join(parts)}."] if parts else []


def _each(names: Sequence[str], changes: dict[str, Change]) -> str:
    return ", ".join(f"{name} {changes[name].signed}" for name in names)


def _no_help_words(tuned: Sequence[BackboneResult], lead: Metric) -> list[str]:
    changes = {backbone.name: found for backbone in tuned if (found := change(backbone, lead)) is not None}
    rest = {name: found for name, found in changes.items() if found.verdict != "better"}
    if not rest:
        return []
    words = [f"{name} ({found.signed}, {VERDICT_WORDS[found.verdict]})" for name, found in rest.items()]
    return [f"TTD does not help {lead.label} on {', '.join(words)}."]


def _below_before_words(tuned: Sequence[BackboneResult], lead: Metric) -> list[str]:
    """Backbones on which TTD beats the control, and yet all the training left them worse than they were."""
    sentences = []
    for backbone in tuned:
        found = change(backbone, lead)
        before, after = mean(backbone, "before", lead.key), mean(backbone, "after", lead.key)
        if found is None or found.baseline == "before" or found.verdict != "better" or before is None or after is None:
            continue
        lost = (before - after) * (1 if lead.better == "higher" else -1)
        if lost >= page.TIE:
            sentences.append(
                f"{backbone.name} beats its control, but its {lead.label} is still worse than before any training, "
                f"{page.number(after)} against {page.number(before)}."
            )
    return sentences


def _unsure_words(tuned: Sequence[BackboneResult], lead: Metric, changes: dict[str, Change | None]) -> list[str]:
    words = []
    known = [found for found in changes.values() if found is not None]
    if known and all(found.spread is None for found in known):
        words.append("One seed was run, so the spread is unknown: small differences may be chance.")
    if any(found.baseline == "before" for found in known):
        words.append("Where no control was run, the gain may be that of any further training.")
    missing = [name for name, found in changes.items() if found is None]
    if missing:
        words.append(f"{_capital(lead.label)} is not defined in every arm of {', '.join(missing)}.")
    without = [backbone.name for backbone in tuned if not backbone.metrics.get("before")]
    if without:
        words.append(f"Before any training, {', '.join(without)} was not measured.")
    return words


def _best_headline(comparison: Comparison, lead: Metric) -> str:
    known = {b.name: value for b in comparison.backbones if (value := mean(b, "before", lead.key)) is not None}
    if not known:
        return f"{_capital(lead.label)} could not be measured"
    pick = min if lead.better == "lower" else max
    best = pick(known, key=known.__getitem__)
    if len(known) == 1:
        return f"{best}, as it was loaded: {lead.label} {page.number(known[best])}"
    return f"As they were loaded, {best} has the best {lead.label}: {page.number(known[best])}"


def _best_words(comparison: Comparison) -> list[str]:
    words = ["Nothing was fine-tuned: these are the backbones as they were loaded, and what TTD does is not shown."]
    for figure in comparison.metrics:
        known = {b.name: value for b in comparison.backbones if (value := mean(b, "before", figure.key)) is not None}
        if figure.better is not None and len(known) > 1:
            first = sorted(known, key=known.__getitem__, reverse=figure.better == "higher")
            words.append(
                f"{_capital(figure.label)}: {first[0]} {page.number(known[first[0]])} is best, "
                f"{first[-1]} {page.number(known[first[-1]])} is last."
            )
    return words


def _trouble(comparison: Comparison) -> list[str]:
    count = sum(len(backbone.warnings) for backbone in comparison.backbones)
    words = []
    if comparison.failures:
        names = ", ".join(comparison.failures)
        words.append(f"{page.plural(len(comparison.failures), 'backbone')} failed and was left out: {names}.")
        if len(comparison.failures) > 1:
            words[-1] = words[-1].replace(" was left out", " were left out")
    if count:
        words.append(f"{page.plural(count, 'warning')} came with these figures; the section Warnings has them.")
    return words
