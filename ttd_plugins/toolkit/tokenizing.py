"""Tokenising with a callable that the caller gives: rows of ids, their lengths, and what was cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttd_plugins.adapter import Tokens
from ttd_plugins.errors import InputError, TTDError, one_sentence
from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.text import takes_parameter, valid_unicode


class MissingTokenizer:
    """Stands where a tokenizer could not be had, and says so once texts are to be tokenised."""

    def __init__(self, reason: str) -> None:
        """Remember ``reason``, a whole sentence."""
        self.reason = reason

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Raise TTDError."""
        raise TTDError(self.reason)


@dataclass(frozen=True)
class RowTokenizer:
    """A tokenizer and the text tower that its ids are for.

    Attributes:
        tokenizer: called with a list of strings, gives token ids ``[N, context]``; ``None`` where none was given.
        model: the model with the text tower, whose context length and way of pooling decide.
        name: name of the backbone, for messages.
        advice: the call that gives a fitting tokenizer, for messages.
    """

    tokenizer: Any
    model: Any
    name: str
    advice: str

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokenise at the model's context length.

        A text counts as truncated if it fills the context and the tokenizer has more for it when given one position
        more. A tokenizer that takes no ``context_length`` and has no ``encode`` cannot be asked, so every text that
        fills the context counts.

        Raises:
            TTDError: no tokenizer was given, or it does not fit the model.
            InputError: ``texts`` is not a sequence of strings.
        """
        if isinstance(texts, str) or not all(isinstance(one, str) for one in texts):
            raise InputError("tokenize takes a list of strings")
        context = text_tower.context_length(self.model, self.tokenizer)
        if not texts:
            return Tokens(torch.zeros(0, context, dtype=torch.long), torch.zeros(0, dtype=torch.long), [])
        valid = [valid_unicode(one) for one in texts]
        ids = self._rows(valid, context)
        lengths = text_tower.lengths_through_end(self.model, ids, self._pad_id())
        truncated = [False] * len(valid)
        full = [row for row, length in enumerate(lengths.tolist()) if length == context]
        if full:
            for row, cut in zip(full, self._has_more([valid[row] for row in full], ids[full]), strict=True):
                truncated[row] = cut
        return Tokens(ids, lengths, truncated)

    def _has_more(self, texts: list[str], ids: Tensor) -> list[bool]:
        context = ids.shape[1]
        if takes_parameter(self.tokenizer, "context_length"):
            longer = self._rows(texts, context + 1)[:, :context]
            return [not bool(same) for same in (longer == ids).all(dim=-1)]
        encode = getattr(self.tokenizer, "encode", None)
        if encode is not None:
            return [len(encode(one)) + 2 > context for one in texts]
        return [True] * len(texts)

    def _rows(self, texts: list[str], context: int) -> Tensor:
        if self.tokenizer is None:
            raise TTDError(f"{self.name} was wrapped without a tokenizer; pass tokenizer={self.advice}")
        options: dict[str, Any] = {}
        if takes_parameter(self.tokenizer, "context_length"):
            options["context_length"] = context
        if takes_parameter(self.tokenizer, "truncate"):
            options["truncate"] = True
        try:
            ids = self.tokenizer(texts, **options)
        except TTDError:
            raise
        except Exception as error:
            raise TTDError(
                f"the tokenizer of {self.name} failed ({type(error).__name__}: {one_sentence(error)}); it must take a "
                f"list of strings; pass tokenizer={self.advice}"
            ) from error
        if not isinstance(ids, Tensor) or ids.shape != (len(texts), context):
            seen = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
            raise TTDError(
                f"the tokenizer of {self.name} must give a tensor of shape {(len(texts), context)}, not {seen}; use "
                f"{self.advice}"
            )
        return ids.long().cpu()

    def _pad_id(self) -> int:
        inner = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        known = getattr(inner, "pad_token_id", None)
        return int(known if known is not None else getattr(text_tower.text_module(self.model), "pad_id", 0))
