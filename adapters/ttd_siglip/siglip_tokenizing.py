"""Tokenisation for SigLIP: the full context, padded at the right, because the text tower pools the last position.

Texts are cleaned as in training, whichever library loads the tokenizer:

- SigLIP: lower case without punctuation, which open_clip's and transformers' tokenizers do themselves.
- SigLIP 2: lower case with punctuation. transformers' ``Siglip2Tokenizer`` does so; a plain Gemma tokenizer, as in
  older uploads, keeps capitals, and open_clip's wrapper removes punctuation. So texts are lower-cased here, and go to
  the tokenizer inside of open_clip's wrapper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ttd_plugins.adapter import Tokens
from ttd_plugins.errors import TTDError
from ttd_plugins.toolkit.tokenizing import accepts_parameter, checked_rows, tokenize_rows

SIGLIP2_VOCABULARY = 256000


def pad_right(tokenizer: Any) -> None:
    """Set padding at the right, as in SigLIP's training; open_clip does not set it in the tokenizer that it wraps."""
    inner = getattr(tokenizer, "tokenizer", None)
    if hasattr(inner, "padding_side"):
        inner.padding_side = "right"  # type: ignore[union-attr]


def tokenize(tokenizer: Any, texts: Sequence[str], context: int, name: str) -> Tokens:
    """Tokenise at the full context.

    A text counts as truncated if it fills the context and the tokenizer has more ids for it at one position more. A
    tokenizer without a ``context_length`` cannot tell, so there every text that fills the context counts.

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

    def truncated(full: list[str], ids: Tensor) -> list[bool]:
        if not (_is_transformers(tokenizer) or accepts_parameter(tokenizer, "context_length")):
            return [True] * len(full)
        longer = _rows(tokenizer, full, context + 1, name)
        return (_lengths(tokenizer, longer) > context).tolist()

    return tokenize_rows(
        texts,
        context,
        rows=lambda valid: _rows(tokenizer, valid, context, name),
        lengths=lambda ids: _lengths(tokenizer, ids),
        truncated=truncated,
    )


def _is_transformers(tokenizer: Any) -> bool:
    return accepts_parameter(type(tokenizer).__call__, "padding")


def _rows(tokenizer: Any, texts: list[str], context: int, name: str) -> Tensor:
    if tokenizer is None:
        raise TTDError(
            f"{name} was wrapped without a tokenizer; pass tokenizer=transformers.AutoTokenizer.from_pretrained(NAME) "
            "or tokenizer=open_clip.get_tokenizer(NAME), NAME being the model's name"
        )
    shape = (len(texts), context)
    advice = "the model's own tokenizer, from transformers or from open_clip"
    return checked_rows(lambda: _call(tokenizer, texts, context, name), shape, name, advice=advice)


def siglip2_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer of transformers with SigLIP 2's vocabulary (Gemma's), taken out of open_clip's wrapper.

    ``None`` for the tokenizers of other models.
    """
    inner = tokenizer if _is_transformers(tokenizer) else getattr(tokenizer, "tokenizer", None)
    if inner is None or not _is_transformers(inner):
        return None
    by_class = type(inner).__name__.startswith(("Gemma", "Siglip2"))
    return inner if by_class or getattr(inner, "vocab_size", None) == SIGLIP2_VOCABULARY else None


def _call(tokenizer: Any, texts: list[str], context: int, name: str) -> Any:
    second = siglip2_tokenizer(tokenizer)
    if second is not None:
        tokenizer, texts = second, [one.lower() for one in texts]
    if _is_transformers(tokenizer):
        # SigLIP's processor sets no padding, and Siglip2Tokenizer pads at the left by default.
        return tokenizer(
            texts, padding="max_length", truncation=True, max_length=context, padding_side="right", return_tensors="pt"
        )["input_ids"]
    if getattr(getattr(tokenizer, "tokenizer", None), "padding_side", "right") != "right":
        raise TTDError(
            f"the tokenizer of {name} pads at the left, and SigLIP was trained with padding at the right; set "
            "tokenizer.tokenizer.padding_side = 'right'"
        )
    options = {"context_length": context} if accepts_parameter(tokenizer, "context_length") else {}
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
