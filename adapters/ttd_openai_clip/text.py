"""Tokenising: transformers' tokenizers, the function ``clip.tokenize``, and callables with open_clip's convention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttd_plugins.errors import TTDError, one_sentence
from ttd_plugins.toolkit.text import takes_parameter


def own_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer inside a transformers processor; anything else as it is."""
    return tokenizer.tokenizer if hasattr(tokenizer, "image_processor") else tokenizer


def is_from_transformers(tokenizer: Any) -> bool:
    """Whether a tokenizer is called as those of transformers are: lists of ids out, truncation by name."""
    return takes_parameter(tokenizer, "truncation") and takes_parameter(tokenizer, "max_length")


def token_rows(tokenizer: Any, texts: list[str], context: int, name: str) -> Tensor:
    """Token ids, int64 ``[N, context]``, on the CPU; a text that is too long loses words and keeps its end token.

    Args:
        tokenizer: one of the kinds that this module knows.
        texts: N strings.
        context: positions of the text tower.
        name: name of the backbone, for messages.

    Raises:
        TTDError: the tokenizer failed, or gives something else than rows of that length.
    """
    try:
        if is_from_transformers(tokenizer):
            rows = tokenizer(texts, padding=False, truncation=True, max_length=context)["input_ids"]
            ids: Any = _padded(rows, context, tokenizer.pad_token_id)
        else:
            options: dict[str, Any] = {}
            if takes_parameter(tokenizer, "context_length"):
                options["context_length"] = context
            if takes_parameter(tokenizer, "truncate"):
                options["truncate"] = True
            ids = tokenizer(texts, **options)
    except Exception as error:  # tokenizers of any origin raise nearly anything
        raise TTDError(
            f"the tokenizer of {name} failed ({type(error).__name__}: {one_sentence(error)}); it must take a list of "
            "strings, as transformers' CLIPTokenizer and clip.tokenize do"
        ) from error
    if not isinstance(ids, Tensor) or ids.shape != (len(texts), context):
        seen = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise TTDError(
            f"the tokenizer of {name} must give a tensor of shape {(len(texts), context)}, not {seen}; use the one "
            "that the model was trained with"
        )
    return ids.long().cpu()


def have_more(tokenizer: Any, texts: list[str], ids: Tensor, name: str) -> list[bool]:
    """For texts that fill their rows of ``ids``, whether something was cut off.

    A tokenizer that can be given one position more is asked that way. One that has neither ``context_length`` nor
    ``encode`` cannot be asked, so every text that fills the context counts.
    """
    context = ids.shape[1]
    if is_from_transformers(tokenizer):
        whole = tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"]
        return [len(row) > context for row in whole]
    if takes_parameter(tokenizer, "context_length"):
        longer = token_rows(tokenizer, texts, context + 1, name)[:, :context]
        return [not bool(same) for same in (longer == ids).all(dim=-1)]
    encode = getattr(tokenizer, "encode", None)
    if encode is not None:
        return [len(encode(one)) + 2 > context for one in texts]
    return [True] * len(texts)


def _padded(rows: list[list[int]], context: int, pad: int | None) -> Tensor:
    # By hand, since a tokenizer's own padding may be set to the left, where no position embedding was trained for it.
    ids = torch.zeros(len(rows), context, dtype=torch.long)
    for target, row in zip(ids, rows, strict=True):
        target.fill_(row[-1] if pad is None else pad)
        target[: len(row)] = torch.tensor(row)
    return ids
