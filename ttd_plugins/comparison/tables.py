"""The figures of a comparison as numbers in JSON, as a sheet, and as a table to read."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttd_plugins.comparison.results import ARMS, BackboneResult, Comparison, Metric, mean_and_spread

ARM_LABELS = {"before": "before", "control": "control", "after": "after TTD"}


def gain(backbone: BackboneResult, key: str) -> tuple[float, float | None] | None:
    """After less control, seed by seed: the mean and the sample standard deviation over seeds.

    ``None`` where an arm was not run or a figure is not defined; the deviation is ``None`` with fewer than two seeds.
    """
    pairs = zip(backbone.metrics.get("after", []), backbone.metrics.get("control", []), strict=False)
    values = [(after.get(key), control.get(key)) for after, control in pairs]
    known = [after - control for after, control in values if after is not None and control is not None]
    if not known or len(known) != len(values):
        return None
    return mean_and_spread(known)


def summary(backbone: BackboneResult, figures: Sequence[Metric]) -> dict[str, Any]:
    """``means`` and ``spreads`` by arm and figure, and the ``gains`` after less control by figure."""
    arms = [arm for arm in ARMS if backbone.metrics.get(arm)]
    gains = {figure.key: gain(backbone, figure.key) for figure in figures}
    return {
        "means": {arm: {figure.key: backbone.mean(arm, figure.key) for figure in figures} for arm in arms},
        "spreads": {arm: {figure.key: backbone.spread(arm, figure.key) for figure in figures} for arm in arms},
        "gains": {key: {"mean": found[0], "spread": found[1]} for key, found in gains.items() if found is not None},
    }


def number(mean: float | None, spread: float | None, *, sign: bool = False) -> str:
    """``0.512 ± 0.004``, or ``-`` where there is none."""
    if mean is None:
        return "-"
    return f"{mean:{'+' if sign else ''}z.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def table_rows(comparison: Comparison) -> list[tuple[str, str, list[str]]]:
    """Backbone, arm, and a text for each figure; the row ``gain`` is after less control."""
    rows = []
    for backbone in comparison.backbones:
        for arm in ARMS:
            if backbone.metrics.get(arm):
                keys = [figure.key for figure in comparison.metrics]
                rows.append(
                    (
                        backbone.name,
                        ARM_LABELS[arm],
                        [number(backbone.mean(arm, k), backbone.spread(arm, k)) for k in keys],
                    )
                )
        gains = [gain(backbone, figure.key) for figure in comparison.metrics]
        if any(found is not None for found in gains):
            texts = ["-" if found is None else number(*found, sign=True) for found in gains]
            rows.append((backbone.name, "gain", texts))
    return rows


def markdown(comparison: Comparison) -> str:
    """The table in Markdown, what its columns mean, and what failed."""
    heads = ["backbone", "", *(figure.label for figure in comparison.metrics)]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * len(comparison.metrics)]
    lines += [f"| {name} | {arm} | {' | '.join(texts)} |" for name, arm, texts in table_rows(comparison)]
    seeds = comparison.settings.get("seeds")
    lines += [
        "",
        f"Mean ± sample standard deviation over seeds ({seeds}). Control: the same steps, data, parameters and seed "
        "with the contrastive term alone. Gain: after TTD less control, seed by seed.",
        "",
        *(
            f"- {figure.label}{f' ({figure.better} is better)' if figure.better else ''}: {figure.meaning}"
            for figure in comparison.metrics
        ),
    ]
    if comparison.failures:
        lines += ["", "Left out:", "", *(f"- {name}: {reason}" for name, reason in comparison.failures.items())]
    return "\n".join(lines) + "\n"


def write_markdown(path: Path, comparison: Comparison) -> None:
    """Write :func:`markdown` whole."""
    _write(path, markdown(comparison))


def write_csv(path: Path, comparison: Comparison) -> None:
    """Write one row for each backbone, arm and seed; ``before`` has no seed, and what is not defined is empty."""
    keys = [figure.key for figure in comparison.metrics]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["backbone", "arm", "seed", *keys])
    for backbone in comparison.backbones:
        for arm in ARMS:
            for seed, values in enumerate(backbone.metrics.get(arm, [])):
                cells = ["" if values.get(key) is None else repr(values[key]) for key in keys]
                writer.writerow([backbone.name, arm, "" if arm == "before" else seed, *cells])
    _write(path, text.getvalue())


def _write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
