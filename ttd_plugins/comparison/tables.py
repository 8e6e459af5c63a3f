"""Tables of a comparison: summary statistics, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttd_plugins.comparison.choice import Choice, choose, measured, memory_text
from ttd_plugins.comparison.lora_scales import cost_metrics, raised_metric, scaled_results
from ttd_plugins.comparison.results import ARMS, BackboneResult, Comparison, Metric, paired_gain
from ttd_plugins.utils.deprecation import renamed_names
from ttd_plugins.utils.files import write_atomic
from ttd_plugins.utils.number_format import format_spread

FEW_STEPS = 100
"""A training of fewer steps is too short to judge TTD."""
ARM_LABELS = {"before": "before", "control": "control", "after": "after TTD"}


def gain(backbone: BackboneResult, key: str) -> tuple[float, float | None] | None:
    """Return the gain (after TTD minus control, per seed): its mean and sample standard deviation over seeds.

    ``None`` if an arm was not run or the metric is undefined; the deviation is ``None`` for fewer than two seeds.
    """
    return paired_gain(backbone.metrics.get("after", []), backbone.metrics.get("control", []), key)


def training_limits(comparison: Comparison) -> list[tuple[str, str]]:
    """What limits the conclusions from a comparison: a few words for a headline, and a sentence.

    A training of fewer than :data:`FEW_STEPS` steps, and one seed.
    """
    trained = [backbone for backbone in comparison.backbones if backbone.metrics.get("after")]
    if not trained:
        return []
    limits = []
    steps = comparison.settings.get("steps")
    if isinstance(steps, int) and steps < FEW_STEPS:
        words = f"{steps} step" + "s" * (steps != 1)
        sentence = f"The training took only {words}: fewer than {FEW_STEPS} are too few to judge TTD. Train longer."
        limits.append((f"only {words}", sentence))
    if all(len(backbone.metrics["after"]) == 1 for backbone in trained):
        sentence = "One seed was run, so the spread is unknown: every verdict is tentative."
        limits.append(("one seed", sentence))
    return limits


def summary(backbone: BackboneResult, metrics: Sequence[Metric]) -> dict[str, Any]:
    """Return ``means`` and ``spreads`` by arm and metric, and ``gains`` by metric."""
    arms = [arm for arm in ARMS if backbone.metrics.get(arm)]
    gains = {metric.key: gain(backbone, metric.key) for metric in metrics}
    return {
        "means": {arm: {metric.key: backbone.mean(arm, metric.key) for metric in metrics} for arm in arms},
        "spreads": {arm: {metric.key: backbone.spread(arm, metric.key) for metric in metrics} for arm in arms},
        "gains": {key: {"mean": found[0], "spread": found[1]} for key, found in gains.items() if found is not None},
    }


def table_rows(comparison: Comparison) -> list[tuple[str, str, list[str]]]:
    """Return backbone, arm (or ``gain``), and one text per metric, for each row of the table."""
    keys = [metric.key for metric in comparison.metrics]
    rows = []
    for backbone in comparison.backbones:
        for arm in ARMS:
            if backbone.metrics.get(arm):
                texts = [format_spread(backbone.mean(arm, key), backbone.spread(arm, key)) for key in keys]
                rows.append((backbone.name, ARM_LABELS[arm], texts))
        gains = [gain(backbone, key) for key in keys]
        if any(found is not None for found in gains):
            texts = ["-" if found is None else format_spread(*found, sign=True) for found in gains]
            rows.append((backbone.name, "gain", texts))
    return rows


def markdown(comparison: Comparison) -> str:
    """Return the table in Markdown, with the meaning of its columns and the backbones that failed."""
    heads = ["backbone", "", *(metric.label for metric in comparison.metrics)]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * len(comparison.metrics)]
    lines += [f"| {name} | {arm} | {' | '.join(texts)} |" for name, arm, texts in table_rows(comparison)]
    lines += [
        "",
        f"Mean ± sample standard deviation over seeds ({comparison.settings.get('seeds')}). Control: the same steps, "
        "data, parameters and seed with the contrastive term alone. Gain: after TTD minus control, per seed.",
        "",
        *(
            f"- {metric.label}{f' ({metric.better} is better)' if metric.better else ''}: {metric.meaning}"
            for metric in comparison.metrics
        ),
    ]
    lines += [line for _, sentence in training_limits(comparison) for line in ("", sentence)]
    lines += _scale_lines(comparison)
    choice = choose(comparison)
    if choice is not None:
        lines += ["", *(f"- {sentence}" for sentence in choice.sentences)]
        if measured(comparison.backbones):
            lines += ["", f"| backbone | {choice.metric.label} | images/s | memory |", "|---|---:|---:|---:|"]
            lines += [_cost_row(backbone, choice) for backbone in comparison.backbones]
    if comparison.failures:
        lines += ["", "Failed:", "", *(f"- {name}: {reason}" for name, reason in comparison.failures.items())]
    return "\n".join(lines) + "\n"


def scale_rows(comparison: Comparison) -> tuple[list[Metric], list[tuple[str, float, list[str]]]]:
    """Return the columns of the table of LoRA factors, and backbone, factor and one gain per column for each row."""
    raised = raised_metric(comparison)
    columns = [*([] if raised is None else [raised]), *cost_metrics(comparison)]
    rows = []
    for backbone in comparison.backbones:
        for one in scaled_results(backbone, comparison.metrics):
            gains = [one.gains.get(metric.key) for metric in columns]
            texts = ["-" if found is None else format_spread(*found, sign=True) for found in gains]
            rows.append((backbone.name, one.scale, texts))
    return columns, rows


def _scale_lines(comparison: Comparison) -> list[str]:
    columns, rows = scale_rows(comparison)
    if not rows:
        return []
    heads = ["backbone", "LoRA x", *(f"{metric.label}, gain" for metric in columns)]
    lines = ["", "After TTD, LoRA scaled (0 is before, 1 as trained); gain over the control:", ""]
    lines += [f"| {' | '.join(heads)} |", "|---|---:|" + "---:|" * len(columns)]
    return lines + [f"| {name} | {scale:g} | {' | '.join(texts)} |" for name, scale, texts in rows]


def _cost_row(backbone: BackboneResult, choice: Choice) -> str:
    quality = format_spread(
        backbone.mean(choice.arm, choice.metric.key), backbone.spread(choice.arm, choice.metric.key)
    )
    cost = backbone.cost
    shown = (f"{cost['images_per_second']:.4g}", memory_text(cost["memory_bytes"])) if cost else ("-", "-")
    return f"| {backbone.name} | {quality} | {' | '.join(shown)} |"


def write_markdown(path: Path, comparison: Comparison) -> None:
    """Write :func:`markdown` to a file.

    Raises:
        InputError: the file cannot be written.
    """
    write_atomic(path, markdown(comparison))


def write_csv(path: Path, comparison: Comparison) -> None:
    """Write one row per backbone, arm and seed; the seed of ``before`` and undefined metrics are empty.

    The arm ``after x 0.5`` is ``after`` with LoRA scaled by 0.5.

    Raises:
        InputError: the file cannot be written.
    """
    keys = [metric.key for metric in comparison.metrics]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["backbone", "arm", "seed", *keys])
    first_seed = comparison.settings.get("first_seed", 0)
    for backbone in comparison.backbones:
        for arm in ARMS:
            for seed, values in enumerate(backbone.metrics.get(arm, []), start=first_seed):
                writer.writerow([backbone.name, arm, "" if arm == "before" else seed, *_cells(values, keys)])
        for scale, rows in sorted(backbone.scaled.items(), key=lambda item: float(item[0])):
            for seed, values in enumerate(rows, start=first_seed):
                writer.writerow([backbone.name, f"after x {scale}", seed, *_cells(values, keys)])
    write_atomic(path, text.getvalue())


def _cells(values: Mapping[str, float | None], keys: Sequence[str]) -> list[str]:
    return ["" if values.get(key) is None else repr(values[key]) for key in keys]


if not TYPE_CHECKING:
    __getattr__ = renamed_names(
        __name__,
        {
            "number": "ttd_plugins.utils.number_format.format_spread",
            "format_number": "ttd_plugins.utils.number_format.format_spread",
        },
    )
