"""Errors that a user of the package can cause; the message of each is one clear sentence.

The command line prints the sentence of a :class:`TTDError` and exits with status 2. Any other exception is a bug and
keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class TTDError(Exception):
    """Base class. The message says in one sentence what is wrong, where, and what to do."""


class BackboneNameError(TTDError):
    """A backbone name does not follow ``family:model@weights`` or names something unknown."""


class AdapterConflictError(TTDError):
    """Several plugins register one name, or several families claim one model object."""


class UnsupportedModelError(TTDError):
    """No family claims the model, or an adapter does not support a part of it."""


class PluginError(TTDError):
    """A plugin cannot be loaded, breaks the adapter contract, or raised an exception."""


class PluginWarning(UserWarning):
    """A plugin, or a part of one, is not used; the message says why."""


class InputWarning(UserWarning):
    """An input or option is probably a mistake and is used as it is; the message says what to do."""


class MissingDependencyError(TTDError):
    """An optional dependency is not installed, or cannot be imported."""


class TagExtractionError(TTDError):
    """A tag extractor is unknown, its resources are missing, or its result is invalid."""


class ImageSizeError(TTDError, ValueError):
    """An image size does not fit the patch grid of the backbone."""


class InputError(TTDError, ValueError):
    """An image, caption, option or path of the user is invalid."""


def one_sentence(error: BaseException, limit: int = 300) -> str:
    """Return the message of ``error`` on one line of at most ``limit`` characters, for quoting inside a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def listed(choices: Iterable[str], limit: int = 12) -> str:
    """Return ``choices`` sorted and joined by commas: at most ``limit`` of them, then the total number."""
    known = sorted(choices)
    return (", ".join(known[:limit]) + (f", … ({len(known)} in all)" if len(known) > limit else "")) or "none"


def choices_sentence(kind: str, given: str, choices: Iterable[str], limit: int = 12) -> str:
    """Return a sentence that ``given`` is unknown, with the closest of ``choices`` first.

    For example: ``unknown family 'strangr'; did you mean 'stranger'? known: other, stranger``.
    """
    known: Sequence[str] = sorted(choices)
    lowered = {choice.lower(): choice for choice in known}
    close = [lowered[name] for name in difflib.get_close_matches(given.lower(), list(lowered), n=3, cutoff=0.5)]
    hint = f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ";"
    return f"unknown {kind} {given!r}{hint} known: {listed(known, limit)}"
