"""Tiles and the table of metrics, as plain data for the templates."""

from __future__ import annotations

from typing import Any

from ttd_plugins.comparison.results import ARMS, Arm, BackboneResult, Comparison, Metric
from ttd_plugins.reports.comparison_charts import ARM_LABELS
from ttd_plugins.reports.comparison_findings import Change, change, judged_metrics, mean
from ttd_plugins.reports.formatting import number, signed


def change_view(found: Change | None) -> dict[str, str]:
    """A change whose sign, word and colour say the same; with one seed all three are tentative."""
    if found is None:
        return {"verdict": "none", "sign": "", "mean": "gain n/a", "spread": "", "word": ""}
    word = found.words
    if found.baseline == "before" and word:
        word = (
            word.replace(found.verdict, f"{found.verdict} than before", 1)
            if found.verdict in ("better", "worse")
            else f"{word} against before"
        )
    signs = {"better": "△", "worse": "▽"} if found.tentative else {"better": "▲", "worse": "▼"}
    spread = "" if found.spread is None else number(found.spread)
    verdict = f"tentative {found.verdict}" if found.tentative else found.verdict
    return {
        "verdict": verdict,
        "sign": signs.get(found.verdict, ""),
        "mean": signed(found.mean),
        "spread": spread,
        "word": word,
    }


# Tiles ----------------------------------------------------------------------------------------------------------------


def tiles(comparison: Comparison) -> list[dict[str, Any]]:
    """With one backbone a tile for each main metric, with several one for each backbone."""
    judged = judged_metrics(comparison)
    if len(comparison.backbones) == 1 and comparison.backbones[0].metrics.get("after"):
        return [_metric_tile(comparison.backbones[0], metric) for metric in judged]
    by_key = {metric.key: metric for metric in judged}
    lead, cost = (by_key.get(key) for key in comparison.trade_off)
    if lead is None or len(comparison.backbones) < 2:
        return []
    return [_backbone_tile(n, one, lead, cost) for n, one in enumerate(comparison.backbones)]


def _metric_tile(backbone: BackboneResult, metric: Metric) -> dict[str, Any]:
    values = {arm: mean(backbone, arm, metric.key) for arm in ARMS}
    return {
        "backbone": None,
        "label": metric.label,
        "value": values["after"],
        "change": change_view(change(backbone, metric)),
        "from": _from(values),
        "cost": None,
    }


def _backbone_tile(place: int, backbone: BackboneResult, lead: Metric, cost: Metric | None) -> dict[str, Any]:
    tuned = bool(backbone.metrics.get("after"))
    arm: Arm = "after" if tuned else "before"
    values = {one: mean(backbone, one, lead.key) for one in ARMS}
    shown = None if cost is None or cost is lead else mean(backbone, arm, cost.key)
    return {
        "backbone": place,
        "label": lead.label,
        "value": values[arm],
        "change": change_view(change(backbone, lead)) if tuned else None,
        "from": _from(values) if tuned else [],
        "cost": None
        if cost is None or shown is None
        else {
            "label": cost.label,
            "value": shown,
            "change": change_view(change(backbone, cost)) if tuned else None,
        },
    }


def _from(values: dict[Arm, float | None]) -> list[tuple[str, float]]:
    return [(ARM_LABELS[arm].lower(), value) for arm in ARMS[:2] if (value := values[arm]) is not None]


# Table ----------------------------------------------------------------------------------------------------------------


def metrics_view(comparison: Comparison) -> dict[str, Any]:
    """The table: for each metric a row per backbone, with a column per arm and one for the gain."""
    arms = [arm for arm in ARMS if any(backbone.metrics.get(arm) for backbone in comparison.backbones)]
    return {
        "arms": arms,
        "gains": "after" in arms and len(arms) > 1,
        "groups": [
            {"metric": metric, "rows": [_row(n, one, metric, arms) for n, one in enumerate(comparison.backbones)]}
            for metric in (comparison.metrics if arms else ())
        ],
    }


def _row(place: int, backbone: BackboneResult, metric: Metric, arms: list[Arm]) -> dict[str, Any]:
    found = change(backbone, metric)
    return {
        "backbone": place,
        "name": backbone.name,
        "cells": [
            {"arm": arm, "value": mean(backbone, arm, metric.key), "spread": backbone.spread(arm, metric.key)}
            for arm in arms
        ],
        "gain": None if found is None else found.mean,
        "change": change_view(found),
    }
