"""What tokenizers need from an adapter."""

from __future__ import annotations

import inspect
from typing import Any


def takes_parameter(function: Any, parameter: str) -> bool:
    """Whether a callable has a parameter of that name."""
    try:
        return parameter in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def valid_unicode(string: str) -> str:
    """The string with unpaired surrogates, which no tokenizer can encode, replaced."""
    try:
        string.encode("utf-8")
    except UnicodeEncodeError:
        return string.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return string
