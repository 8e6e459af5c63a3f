"""One way to write a metric: in tables, sentences, charts and pages."""

from __future__ import annotations

import math

DECIMALS = 3
MINUS = "−"
"""The sign of pages and charts; files for programs and terminals have a hyphen."""


def format_number(value: float | None, *, sign: bool = False, minus: str = "-", unknown: str = "n/a") -> str:
    """Return a number with three decimals; a value that rounds to zero has no minus sign.

    Args:
        value: the number.
        sign: whether a positive number has a plus sign.
        minus: sign of a negative number, such as :data:`MINUS`.
        unknown: text for ``None``, NaN and infinities.
    """
    if value is None or not math.isfinite(value):
        return unknown
    shown = f"{value:{'+' if sign else ''}z.{DECIMALS}f}"
    return shown.replace("-", minus)


def format_spread(mean: float | None, spread: float | None, *, sign: bool = False, minus: str = "-") -> str:
    """Return text such as ``0.512 ± 0.004``; a missing spread is left out, and a missing mean is ``-``."""
    text = format_number(mean, sign=sign, minus=minus, unknown="-")
    return text if mean is None or spread is None else f"{text} ± {format_number(spread)}"
