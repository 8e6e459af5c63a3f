"""Numbers and words as reports write them."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from ttd_plugins.utils.deprecation import renamed_names
from ttd_plugins.utils.number_format import MINUS, format_number

if not TYPE_CHECKING:
    __getattr__ = renamed_names(__name__, {"printable": "one_line"})


def number(value: float) -> str:
    """Three decimals with a true minus sign, or ``n/a``."""
    return format_number(value, minus=MINUS)


def signed(value: float) -> str:
    """A difference with its sign; zero has none."""
    shown = format_number(value, sign=True, minus=MINUS)
    return "0.000" if shown == "+0.000" else shown


def plural(count: int, noun: str) -> str:
    """``1 backbone``, ``2 backbones``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def capitalised(text: str) -> str:
    """The text with its first letter in upper case and the rest as it was."""
    return text[:1].upper() + text[1:]


def shortened(name: str, limit: int = 26) -> str:
    """A name of at most ``limit`` characters; the middle is cut, since both ends tell models apart."""
    if len(name) <= limit:
        return name
    left = (limit - 1) // 2
    return f"{name[:left]}…{name[left + 1 - limit :]}"


def valid_text(text: str) -> str:
    """The text without control characters; lone surrogates are replaced, and white space becomes spaces."""
    spaced = "".join(" " if c.isspace() else c for c in text).encode("utf-8", "replace").decode("utf-8")
    # U+FFFE and U+FFFF are no characters, and XML forbids them.
    return "".join(c for c in spaced if unicodedata.category(c) != "Cc" and c not in "\ufffe\uffff")


def one_line(text: str) -> str:
    """:func:`valid_text` on one line, without repeated spaces."""
    return " ".join(valid_text(text).split())
