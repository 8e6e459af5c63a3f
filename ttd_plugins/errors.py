"""Errors that a user of the package can cause, each one clear sentence.

The command line prints :class:`TTDError` as that sentence and exits with status 2; anything else is a bug and keeps
its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class TTDError(Exception):
    """Base class: what is wrong, where, and what to do, in one sentence."""


class BackboneNameError(TTDError):
    """A backbone name does not follow ``family:model@weights`` or names something unknown."""


class AdapterConflictError(TTDError):
    """Two plugins claim one name or one model object."""


class UnsupportedModelError(TTDError):
    """No adapter takes the model, or an adapter refuses a part of it, with the reason."""


class PluginError(TTDError):
    """A plugin failed: it cannot be loaded, breaks the contract, or raised when it was asked something."""


class PluginWarning(UserWarning):
    """A plugin, or a part of one, was left out; the message says why."""


class MissingDependencyError(TTDError):
    """An optional dependency is not installed, or only half installed."""


class TagExtractionError(TTDError):
    """A tag extractor cannot work: an unknown name, or resources that are not there."""


class ImageSizeError(TTDError, ValueError):
    """An image size does not fit the patch grid of the backbone."""


class InputError(TTDError, ValueError):
    """An image, caption, option or path given by the user cannot be used."""


def one_sentence(error: BaseException, limit: int = 300) -> str:
    """Return the message of ``error`` on one line of at most ``limit`` characters, for quoting inside a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def listed(choices: Iterable[str], most: int = 12) -> str:
    """Return ``choices`` sorted and joined by commas, at most ``most`` of them and then how many there are in all."""
    known = sorted(choices)
    return (", ".join(known[:most]) + (f", … ({len(known)} in all)" if len(known) > most else "")) or "none"


def choices_sentence(kind: str, given: str, choices: Iterable[str], most: int = 12) -> str:
    """Say that ``given`` is unknown, with the closest of ``choices`` first.

    Returns one sentence such as ``unknown family 'strangr'; did you mean 'stranger'? known: other, stranger``.
    """
    known: Sequence[str] = sorted(choices)
    lowered = {choice.lower(): choice for choice in known}
    close = [lowered[name] for name in difflib.get_close_matches(given.lower(), list(lowered), n=3, cutoff=0.5)]
    hint = f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ";"
    return f"unknown {kind} {given!r}{hint} known: {listed(known, most)}"
