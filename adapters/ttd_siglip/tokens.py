"""Tokenising for SigLIP: always the full context, padded at the right, because the last position is what is pooled.

Cleaning is the tokenizer's own: open_clip's lower-case and drop punctuation (``canonicalize``), transformers'
``SiglipTokenizer`` does the same, and its ``Siglip2Tokenizer`` lower-cases. A plain Gemma tokenizer, under which older
uploads of SigLIP 2 load, keeps capitals that SigLIP 2 never saw in training, so they are lower-cased here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ttd_plugins.adapter import Tokens
from ttd_plugins.errors import InputError, TTDError, one_sentence
from ttd_plugins.toolkit.text import takes_parameter, valid_unicode


def inner_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer inside a transformers processor, or what was given."""
    return tokenizer.tokenizer if hasattr(tokenizer, "image_processor") else tokenizer


def pad_right(tokenizer: Any) -> None:
    """Set the padding as SigLIP is trained; open_clip does not say it to the tokenizer inside its own."""
    inner = getattr(tokenizer, "tokenizer", None)
    if hasattr(inner, "padding_side"):
        inner.padding_side = "right"  # type: ignore[union-attr]


def tokenize(tokenizer: Any, texts: Sequence[str], context: int, name: str) -> Tokens:
    """Tokenise at the full context.

    A text counts as truncated if it fills the context and the tokenizer has more for it when given one position more;
    a tokenizer that cannot be told a length cannot be asked, so every text that fills the context counts.

    Args:
        tokenizer: one of transformers (called with ``padding``, ``truncation`` and ``max_length``) or one of
            open_clip (called with ``context_length``).
        texts: any strings.
        context: positions of the text tower.
        name: name of the backbone, for messages.

    Raises:
        TTDError: no tokenizer was given, or it does not fit the model.
        InputError: ``texts`` is not a sequence of strings.
    """
    if isinstance(texts, str) or not all(isinstance(one, str) for one in texts):
        raise InputError("tokenize takes a list of strings")
    if not texts:
        return Tokens(torch.zeros(0, context, dtype=torch.long), torch.zeros(0, dtype=torch.long), [])
    valid = [valid_unicode(one) for one in texts]
    ids = _rows(tokenizer, valid, context, name)
    lengths = _lengths(tokenizer, ids)
    truncated = [False] * len(valid)
    full = [row for row, length in enumerate(lengths.tolist()) if length == context]
    if full:
        if _is_transformers(tokenizer) or takes_parameter(tokenizer, "context_length"):
            longer = _rows(tokenizer, [valid[row] for row in full], context + 1, name)
            cut = (_lengths(tokenizer, longer) > context).tolist()
        else:
            cut = [True] * len(full)
        for row, was_cut in zip(full, cut, strict=True):
            truncated[row] = was_cut
    return Tokens(ids, lengths, truncated)


def _is_transformers(tokenizer: Any) -> bool:
    return takes_parameter(type(tokenizer).__call__, "padding")


def _rows(tokenizer: Any, texts: list[str], context: int, name: str) -> Tensor:
    if tokenizer is None:
        raise TTDError(
            f"{name} was wrapped without a tokenizer; pass tokenizer=transformers.AutoTokenizer.from_pretrained(NAME) "
            "or tokenizer=open_clip.get_tokenizer(NAME), NAME being the model's name"
        )
    try:
        ids = _call(tokenizer, texts, context, name)
    except TTDError:
        raise
    except Exception as error:
        raise TTDError(
            f"the tokenizer of {name} failed ({type(error).__name__}: {one_sentence(error)}); it must take a list of "
            "strings, as those of transformers and of open_clip do"
        ) from error
    if not isinstance(ids, Tensor) or ids.shape != (len(texts), context):
        seen = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise TTDError(
            f"the tokenizer of {name} must give ids of shape {(len(texts), context)}, not {seen}; use the tokenizer "
            "that belongs to the model"
        )
    return ids.long().cpu()


def _call(tokenizer: Any, texts: list[str], context: int, name: str) -> Any:
    if _is_transformers(tokenizer):
        if type(tokenizer).__name__.startswith("Gemma"):
            texts = [one.lower() for one in texts]
        # SigLIP's processor has no padding of its own, and Siglip2Tokenizer pads at the left unless it is told.
        return tokenizer(
            texts, padding="max_length", truncation=True, max_length=context, padding_side="right", return_tensors="pt"
        )["input_ids"]
    if getattr(getattr(tokenizer, "tokenizer", None), "padding_side", "right") != "right":
        raise TTDError(
            f"the tokenizer of {name} pads at the left, and SigLIP was trained with padding at the right; set "
            "tokenizer.tokenizer.padding_side = 'right'"
        )
    options = {"context_length": context} if takes_parameter(tokenizer, "context_length") else {}
    return tokenizer(texts, **options)


def _lengths(tokenizer: Any, ids: Tensor) -> Tensor:
    """Positions of each row up to and including its end token, int64 ``[N]``."""
    inner = tokenizer if _is_transformers(tokenizer) else getattr(tokenizer, "tokenizer", tokenizer)
    pad = getattr(inner, "pad_token_id", None)
    pad = 0 if pad is None else int(pad)
    positions = torch.arange(1, ids.shape[1] + 1)
    lengths = ((ids != pad) * positions).amax(dim=-1)
    if getattr(inner, "eos_token_id", None) == pad:
        # SigLIP pads with its end token, so the first pad is the end.
        lengths = lengths + 1
    return lengths.clamp(1, ids.shape[1])
