"""What was compared, what went wrong, and how to repeat it, as plain data for the templates."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ttd_plugins.comparison.results import Comparison


def warnings_view(comparison: Comparison) -> dict[str, Any] | None:
    """Warnings by backbone, and the failures; ``None`` if there are none."""
    warned = [backbone for backbone in comparison.backbones if backbone.warnings]
    return {"backbones": warned, "failures": comparison.failures} if warned or comparison.failures else None


def settings_view(comparison: Comparison) -> dict[str, Any]:
    """The command that repeats the comparison, and every setting."""
    settings = {key: value for key, value in comparison.settings.items() if key != "command"}
    return {"command": comparison.settings.get("command"), "settings": _definitions(settings)}


def backbones_view(comparison: Comparison) -> dict[str, Any] | None:
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
