"""Errors that a user of the package can cause; the message of each is one clear sentence.

The command line prints the sentence of a :class:`TTDError` and exits with status 2. Any other exception is a bug and
keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of the machine or of a device ran out."""
    # By name, so that this module does not import torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def one_sentence(error: BaseException, limit: int = 300) -> str:
    """Return the message of ``error`` on one line of at most ``limit`` characters, for quoting inside a sentence."""
    text = printable(_without_advice(str(error))) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|[@-Z\\^_])")
# torch advises to load a file that it refuses by running its code, and other libraries advise to run code of a folder.
_ADVICE = re.compile(
    r"(Please file an issue|\(1\) In PyTorch|\(1\) Re-running|Check the documentation of torch\.load|In PyTorch 2\.6, "
    r"we changed|, do those steps only if you trust|You can inspect the repository|Please pass the (argument|option)|"
    r"you can set `weights_only|Alternatively, to load with `?weights_only|To execute this).*",
    re.DOTALL,
)


def _without_advice(text: str) -> str:
    """Cut what a library advises that this project never does: loading a file by running code in it."""
    cut = _ADVICE.sub("", _ESCAPES.sub("", text)).rstrip(" \n.,;:") if _ADVICE.search(text) else text
    return cut.replace(
        "Weights only load failed. This file can still be loaded, to", "Weights only load failed"
    ).strip()


def printable(text: object) -> str:
    """Return a text on one line that a terminal shows as it is: without escape sequences and control characters."""
    plain = _ESCAPES.sub("", str(text))
    one_line = " ".join(plain.split())
    return "".join(letter if letter.isprintable() or letter == " " else "�" for letter in one_line)


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
    shown = one_sentence(ValueError(repr(given)), 120)
    return f"unknown {kind} {shown}{hint} known: {listed(known, limit)}"
