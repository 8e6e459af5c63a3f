"""The report of a comparison: one HTML file that needs no network. ``ttd demo`` and ``ttd compare`` write it.

This module prepares plain data; the markup is in ``templates/comparison.html.j2``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttd_plugins.comparison.results import ARMS, Arm, BackboneResult, Comparison, Metric
from ttd_plugins.reports.charts import Chart, chart_svg
from ttd_plugins.reports.comparison_charts import (
    ARM_LABELS,
    bias_chart,
    bias_means,
    curve_chart,
    curve_keys,
    curve_label,
    curve_lines,
    trade_off_chart,
    trade_off_metrics,
)
from ttd_plugins.reports.comparison_choice import choice_view
from ttd_plugins.reports.comparison_findings import (
    TIE,
    VERDICT_WORDS,
    Change,
    change,
    describe_comparison,
    judged_metrics,
    mean,
)
from ttd_plugins.reports.comparison_gallery import gallery_view
from ttd_plugins.reports.formatting import plural
from ttd_plugins.reports.heat_overlay import HEAT_OPACITY, colour_gradient
from ttd_plugins.reports.lora_scale_charts import scale_view
from ttd_plugins.reports.palette import SERIES
from ttd_plugins.reports.photographs import photographs_view
from ttd_plugins.reports.templating import render, script, stylesheet
from ttd_plugins.utils.files import write_atomic

PAPER_URL = "https://arxiv.org/abs/2404.00384"
CURVE_NOTES = {
    "loss": "The sum of the weighted terms; that of TTD has more terms than the control’s.",
    "contrastive": "Both trainings have it; it keeps captions and images together.",
    "tag": "Each tag’s map against its own min-max target.",
    "distill": "The caption map against the union of the selected tags’ maps.",
    "anchor": "The distance of the global embeddings to those of the frozen model.",
    "caption_map_spread": "Towards zero would be collapse.",
    "selected_per_caption": "None or all would be collapse.",
}


def write_comparison_report(path: Path, comparison: Comparison) -> None:
    """Write the page: finding, metrics, trade-off, LoRA factors, bias, training curves, gallery, backbones, warnings.

    Photographs before and after TTD come first, if the comparison has any. With one backbone, tiles of its main
    metrics come before the table. The file contains its style, script, charts and
    images, and a content security policy forbids everything else. Without its script the page only loses sorting,
    the choice of maps and backbones, and the opacity slider.

    Args:
        path: where to write.
        comparison: what the page shows; every string in it is escaped. The page says so where an arm was not run,
            a metric is ``None`` or the gallery is empty.

    Raises:
        InputError: the path cannot be written, or a map or image has a wrong shape or values.
        MissingDependencyError: matplotlib, which draws charts and colours maps, is not installed.
    """
    finding = describe_comparison(comparison)
    backbones = comparison.backbones
    tuned = any(backbone.metrics.get("after") for backbone in backbones)
    photographs = photographs_view(comparison.photographs) if comparison.photographs else None
    html = render(
        "comparison.html.j2",
        title=finding.headline,
        finding=finding,
        about=_about(comparison, tuned=tuned),
        stylesheet=stylesheet("report.css", "photographs.css", "heat_overlay.css"),
        script=script("report.js"),
        paper_url=PAPER_URL,
        arm_labels=ARM_LABELS,
        comparison=comparison,
        names=[name_view(n, backbone.name) for n, backbone in enumerate(backbones)],
        tiles=[_tile(backbones[0], m) for m in judged_metrics(comparison)] if tuned and len(backbones) == 1 else [],
        tie=TIE,
        rows=_metric_rows(comparison),
        choice=choice_view(comparison),
        trade_off=_trade_off(comparison),
        lora_scales=scale_view(comparison),
        bias=_bias(comparison),
        curves=_curves(comparison),
        gallery=gallery_view(comparison) if comparison.gallery else None,
        photographs=photographs,
        percent=round(100 * HEAT_OPACITY),
        gradient=colour_gradient() if comparison.gallery or photographs else "",
        about_table=_about_table(comparison),
        command=comparison.settings.get("command"),
        settings=_definitions({key: v for key, v in comparison.settings.items() if key != "command"}),
    )
    write_atomic(path, html)


def _about(comparison: Comparison, *, tuned: bool) -> list[str]:
    """What was run, in a few words."""
    settings = comparison.settings
    data = settings.get("data")
    name = data.get("name") if isinstance(data, Mapping) else data
    seeds = max((len(runs) for b in comparison.backbones for runs in b.metrics.values()), default=0)
    one = len(comparison.backbones) == 1
    parts = ["ttd-plugins", comparison.backbones[0].name if one else plural(len(comparison.backbones), "backbone")]
    parts += [str(name)] if name else []
    if tuned:
        parts.append(plural(seeds, "seed"))
        parts += [f"{settings['steps']} steps"] if "steps" in settings else []
    return parts


def name_view(number: int, name: str) -> dict[str, Any]:
    """A backbone's number, colour and name, in parts between which a long name may break."""
    return {"number": number + 1, "series": number % SERIES, "parts": re.split(r"(?<=[:/@+_-])(?=.)", name)}


# Metrics --------------------------------------------------------------------------------------------------------------


def _tile(backbone: BackboneResult, metric: Metric) -> dict[str, Any]:
    values = {arm: mean(backbone, arm, metric.key) for arm in ARMS}
    return {
        "label": metric.label,
        "value": values["after"],
        "change": _change_view(change(backbone, metric)),
        "from": [(ARM_LABELS[arm].lower(), values[arm]) for arm in ARMS[:2] if values[arm] is not None],
    }


def _metric_rows(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "backbone": n,
            "name": backbone.name,
            "arm": arm,
            "place": place,
            "first": arm == next(one for one in ARMS if backbone.metrics.get(one)),
            "cells": [_cell(backbone, arm, metric) for metric in comparison.metrics],
        }
        for n, backbone in enumerate(comparison.backbones)
        for place, arm in enumerate(ARMS)
        if backbone.metrics.get(arm) and comparison.metrics
    ]


def _cell(backbone: BackboneResult, arm: Arm, metric: Metric) -> dict[str, Any]:
    return {
        "value": mean(backbone, arm, metric.key),
        "spread": backbone.spread(arm, metric.key),
        "change": _change_view(change(backbone, metric)) if arm == "after" else None,
    }


def _change_view(found: Change | None) -> dict[str, str]:
    """A change whose sign, word and colour say the same."""
    if found is None:
        return {"verdict": "none", "sign": "", "shown": "gain n/a", "word": ""}
    word = VERDICT_WORDS[found.verdict]
    if found.baseline == "before" and word:
        word += " than before" if found.verdict in ("better", "worse") else " against before"
    sign = {"better": "▲", "worse": "▼"}.get(found.verdict, "")
    return {"verdict": found.verdict, "sign": sign, "shown": found.signed, "word": word}


# Charts ---------------------------------------------------------------------------------------------------------------


def _trade_off(comparison: Comparison) -> dict[str, Any]:
    charts = [trade_off_chart(comparison, narrow=narrow) for narrow in (False, True)]
    metrics = trade_off_metrics(comparison)
    return {
        "metrics": metrics,
        "wide": None if charts[0] is None else chart_svg(charts[0]),
        "narrow": None if charts[1] is None else chart_svg(charts[1]),
    }


def _bias(comparison: Comparison) -> list[dict[str, Any]]:
    found = [(n, b.name, means) for n, b in enumerate(comparison.backbones) if (means := bias_means(b))]
    return [{"backbone": n, "svg": chart_svg(bias_chart(f"bias-{n}", name, means))} for n, name, means in found]


def _curves(comparison: Comparison) -> list[dict[str, Any]]:
    """For each value that the trainings record, one chart per backbone."""
    panels: list[dict[str, Any]] = []
    for key in curve_keys(comparison):
        lines = {n: found for n, b in enumerate(comparison.backbones) if (found := curve_lines(b, key))}
        charts: list[tuple[int, Chart]] = [
            (n, curve_chart(f"curve-{len(panels)}-{n}", f"{curve_label(key)} of {comparison.backbones[n].name}", found))
            for n, found in lines.items()
        ]
        if charts:
            panels.append(
                {
                    "label": curve_label(key),
                    "note": CURVE_NOTES.get(key, ""),
                    "charts": [{"backbone": n, "svg": chart_svg(chart, legend=False)} for n, chart in charts],
                }
            )
    return panels


# Backbones and settings -----------------------------------------------------------------------------------------------


def _about_table(comparison: Comparison) -> dict[str, Any] | None:
    """What is known of the backbones: a column for each fact, and the time that each took."""
    keys = list(dict.fromkeys(key for backbone in comparison.backbones for key in backbone.about))
    timed = any(backbone.seconds for backbone in comparison.backbones)
    if not keys and not timed:
        return None
    rows = [
        [_value(backbone.about.get(key)) for key in keys]
        + ([[{"text": _duration(sum(backbone.seconds.values())), "title": ""}]] if timed else [])
        for backbone in comparison.backbones
    ]
    return {"heads": [_words(key) for key in keys] + ["time"] * timed, "rows": rows}


def _words(key: object) -> str:
    return str(key).replace("_", " ")


def _value(value: Any, label: str = "") -> list[dict[str, str]]:
    """A value of a table, in lines; a hash is shortened, and its whole is the ``title``."""
    if isinstance(value, Mapping):
        return [line for key, inner in value.items() for line in _value(inner, f"{_words(key)} ")]
    if value is None:
        text = "–"
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, int):
        text = f"{value / 1e6:.1f} M" if value >= 10**6 else f"{value:,}".replace(",", " ")
    elif isinstance(value, float):
        text = f"{value:.4g}".replace("-", "−")
    elif isinstance(value, list | tuple):
        pair = len(value) == 2 and all(isinstance(one, int) for one in value)
        text = (" × " if pair else ", ").join(map(str, value))
    else:
        text = str(value)
        if re.fullmatch(r"[0-9a-f]{32,}", text):
            return [{"text": f"{label}{text[:10]}…", "title": text}]
    return [{"text": label + text, "title": ""}]


def _duration(seconds: float) -> str:
    if not seconds or not math.isfinite(seconds):
        return "n/a"
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


def _definitions(settings: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """Settings as (name, text), or (name, list of the same) for nested ones."""
    rows: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows.append((str(key), _definitions(value) if value else "none"))
        elif isinstance(value, float):
            rows.append((str(key), f"{value:.6g}"))
        elif isinstance(value, list | tuple):
            rows.append((str(key), ", ".join(map(str, value)) or "none"))
        else:
            rows.append((str(key), "–" if value is None else str(value)))
    return rows
