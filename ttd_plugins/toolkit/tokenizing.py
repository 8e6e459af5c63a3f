"""Tokenisation with a tokenizer that the caller passes: rows of ids, their lengths, and which texts were truncated."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttd_plugins.adapter import Tokens
from ttd_plugins.errors import InputError, TTDError, one_sentence
from ttd_plugins.toolkit import text_tower
from ttd_plugins.utils.deprecation import renamed_names


class MissingTokenizer:
    """Placeholder for a tokenizer that could not be loaded; it raises once texts are tokenised."""

    def __init__(self, reason: str) -> None:
        """Store ``reason``, a full sentence."""
        self.reason = reason

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Raise TTDError."""
        raise TTDError(self.reason)


def accepts_parameter(function: Any, parameter: str) -> bool:
    """Whether a callable has a parameter with this name."""
    try:
        return parameter in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def valid_unicode(string: str) -> str:
    """The string with unpaired surrogates replaced, since no tokenizer can encode them."""
    try:
        string.encode("utf-8")
    except UnicodeEncodeError:
        return string.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return string


def inner_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer inside a transformers processor; anything else unchanged."""
    return tokenizer.tokenizer if hasattr(tokenizer, "image_processor") else tokenizer


def tokenize_rows(
    texts: Sequence[str],
    context: int,
    *,
    rows: Callable[[list[str]], Tensor],
    lengths: Callable[[Tensor], Tensor],
    truncated: Callable[[list[str], Tensor], list[bool]],
) -> Tokens:
    """Tokenise any strings.

    Args:
        texts: N strings.
        context: positions of the text tower.
        rows: valid unicode strings to ids, int64 ``[N, context]`` on the CPU.
        lengths: ids ``[N, context]`` to positions up to and including the end token, int64 ``[N]``.
        truncated: texts that fill the context, and their ids, to whether each of them lost words.

    Raises:
        InputError: ``texts`` is not a sequence of strings.
    """
    if isinstance(texts, str) or not all(isinstance(one, str) for one in texts):
        raise InputError("tokenize takes a list of strings")
    if not texts:
        return Tokens(torch.zeros(0, context, dtype=torch.long), torch.zeros(0, dtype=torch.long), [])
    valid = [valid_unicode(one) for one in texts]
    ids = rows(valid)
    row_lengths = lengths(ids)
    flags = [False] * len(valid)
    full = [row for row, length in enumerate(row_lengths.tolist()) if length == context]
    if full:
        for row, flag in zip(full, truncated([valid[row] for row in full], ids[full]), strict=True):
            flags[row] = flag
    return Tokens(ids, row_lengths, flags)


def checked_rows(call: Callable[[], Any], shape: tuple[int, int], name: str, *, advice: str) -> Tensor:
    """Ids from a call of a tokenizer, int64 on the CPU.

    Args:
        call: calls the tokenizer.
        shape: texts and positions that the ids must have.
        name: name of the backbone, for messages.
        advice: which tokenizer fits, for messages: the end of "... ; use".

    Raises:
        TTDError: the tokenizer failed, or its ids have another shape.
    """
    try:
        ids = call()
    except TTDError:
        raise
    except Exception as error:  # tokenizers of any origin raise nearly anything
        raise TTDError(
            f"the tokenizer of {name} failed ({type(error).__name__}: {one_sentence(error)}); it must take a list of "
            f"strings; use {advice}"
        ) from error
    if not isinstance(ids, Tensor) or ids.shape != shape:
        seen = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise TTDError(f"the tokenizer of {name} must return a tensor of shape {shape}, not {seen}; use {advice}")
    return ids.long().cpu()


def context_options(tokenizer: Any, context: int) -> dict[str, Any]:
    """Keyword arguments that pass the context length to a tokenizer with open_clip's calling convention."""
    options: dict[str, Any] = {}
    if accepts_parameter(tokenizer, "context_length"):
        options["context_length"] = context
    if accepts_parameter(tokenizer, "truncate"):
        options["truncate"] = True
    return options


def loses_words(tokenizer: Any, texts: list[str], ids: Tensor, rows: Callable[[list[str], int], Tensor]) -> list[bool]:
    """For texts that fill their rows of ``ids``, whether the tokenizer has more ids for them.

    A tokenizer with a ``context_length`` is called with one position more. A tokenizer with neither ``context_length``
    nor ``encode`` cannot tell, so every text that fills the context counts as truncated.

    Args:
        tokenizer: one with open_clip's calling convention.
        texts: N strings.
        ids: ``[N, context]``.
        rows: texts and a context length to ids of that length.
    """
    context = ids.shape[1]
    if accepts_parameter(tokenizer, "context_length"):
        longer = rows(texts, context + 1)[:, :context]
        return [not bool(same) for same in (longer == ids).all(dim=-1)]
    encode = getattr(tokenizer, "encode", None)
    if encode is not None:
        return [len(encode(one)) + 2 > context for one in texts]
    return [True] * len(texts)


@dataclass(frozen=True)
class RowTokenizer:
    """A tokenizer and the text tower that its ids are for.

    Attributes:
        tokenizer: called with a list of strings, returns token ids ``[N, context]``; ``None`` where none was given.
        model: the model with the text tower, which decides the context length and the end of a row.
        name: name of the backbone, for messages.
        advice: the call that returns a fitting tokenizer, for messages.
    """

    tokenizer: Any
    model: Any
    name: str
    advice: str

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokenise at the model's context length.

        A text counts as truncated if it fills the context and the tokenizer has more ids for it; see
        :func:`loses_words`.

        Raises:
            TTDError: no tokenizer was given, or it does not fit the model.
            InputError: ``texts`` is not a sequence of strings.
        """
        context = text_tower.context_length(self.model, self.tokenizer)
        pad_id = self._pad_id()
        return tokenize_rows(
            texts,
            context,
            rows=lambda valid: self._rows(valid, context),
            lengths=lambda ids: text_tower.lengths_through_end(self.model, ids, pad_id),
            truncated=lambda full, ids: loses_words(self.tokenizer, full, ids, self._rows),
        )

    def _rows(self, texts: list[str], context: int) -> Tensor:
        if self.tokenizer is None:
            raise TTDError(f"{self.name} was wrapped without a tokenizer; pass tokenizer={self.advice}")
        return checked_rows(
            lambda: self.tokenizer(texts, **context_options(self.tokenizer, context)),
            (len(texts), context),
            self.name,
            advice=self.advice,
        )

    def _pad_id(self) -> int:
        inner = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        known = getattr(inner, "pad_token_id", None)
        return int(known if known is not None else getattr(text_tower.text_module(self.model), "pad_id", 0))


if not TYPE_CHECKING:
    __getattr__ = renamed_names(__name__, {"takes_parameter": "accepts_parameter"})
