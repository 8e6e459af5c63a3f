"""Numbers that callers pass as arguments of functions, outside of configuration classes."""

from __future__ import annotations

import math
import operator
from typing import Any

from ttd_plugins.errors import InputError


def whole_number(name: str, value: Any, *, at_least: int) -> int:
    """Return a whole number.

    Raises:
        InputError: the value is no whole number, or it is too small.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < at_least:
        raise InputError(f"{name} must be a whole number of at least {at_least}, not {value!r}")
    return operator.index(value)


def number(name: str, value: Any, *, low: float, high: float = math.inf, inclusive: bool = True) -> float:
    """Return a finite number from ``low`` to ``high``; without the two limits unless ``inclusive``.

    Raises:
        InputError: the value is no number, not finite, or outside the limits.
    """
    valid = isinstance(value, int | float) or (hasattr(value, "__float__") and getattr(value, "ndim", 1) == 0)
    if valid and not isinstance(value, bool):
        found = float(value)
        within = low <= found <= high if inclusive else low < found < high
        if math.isfinite(found) and within:
            return found
    if high == math.inf:
        limits = f"{'at least' if inclusive else 'above'} {low:g}"
    else:
        limits = f"at least {low:g} and at most {high:g}" if inclusive else f"above {low:g} and below {high:g}"
    raise InputError(f"{name} must be a finite number, {limits}, not {value!r}")
