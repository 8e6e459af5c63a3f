"""Tokenisation with transformers' tokenizers, ``clip.tokenize``, or callables with open_clip's calling convention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttd_plugins.toolkit.tokenizing import accepts_parameter, checked_rows, context_options, loses_words

ADVICE = "the tokenizer that the model was trained with, as transformers' CLIPTokenizer or clip.tokenize"


def is_from_transformers(tokenizer: Any) -> bool:
    """Whether a tokenizer has the calling convention of transformers: lists of ids, and parameters for truncation."""
    return accepts_parameter(tokenizer, "truncation") and accepts_parameter(tokenizer, "max_length")


def token_rows(tokenizer: Any, texts: list[str], context: int, name: str, padding: int | None = None) -> Tensor:
    """Token ids, int64 ``[N, context]``, on the CPU; a text that is too long loses words and keeps its end token.

    Args:
        tokenizer: one of the kinds named at the top of this module.
        texts: N strings.
        context: positions of the text tower.
        name: name of the backbone, for messages.
        padding: id behind the end token, for tokenizers of transformers; by default that of the tokenizer.

    Raises:
        TTDError: the tokenizer failed, or returns something else than rows of that length.
    """
    shape = (len(texts), context)
    return checked_rows(lambda: _call(tokenizer, texts, context, padding), shape, name, advice=ADVICE)


def _call(tokenizer: Any, texts: list[str], context: int, padding: int | None) -> Any:
    if not is_from_transformers(tokenizer):
        return tokenizer(texts, **context_options(tokenizer, context))
    rows = tokenizer(texts, padding=False, truncation=True, max_length=context)["input_ids"]
    return _padded(rows, context, tokenizer.pad_token_id if padding is None else padding)


def lost_words(tokenizer: Any, texts: list[str], ids: Tensor, name: str) -> list[bool]:
    """For texts that fill their rows of ``ids``, whether the tokenizer has more ids for them."""
    if is_from_transformers(tokenizer):
        untruncated = tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"]
        return [len(row) > ids.shape[1] for row in untruncated]
    return loses_words(tokenizer, texts, ids, lambda again, context: token_rows(tokenizer, again, context, name))


def _padded(rows: list[list[int]], context: int, pad: int | None) -> Tensor:
    # The tokenizer itself may pad at the left, where the positions of the words would not be the trained ones.
    ids = torch.zeros(len(rows), context, dtype=torch.long)
    for target, row in zip(ids, rows, strict=True):
        target.fill_(row[-1] if pad is None else pad)
        target[: len(row)] = torch.tensor(row)
    return ids
