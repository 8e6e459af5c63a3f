"""The text tower: embeddings at any length that keeps the end token, exact where trimming is exact.

A causal tower pooled at its end token never looks behind that token, so its parts are run with sliced positions and
mask (open_clip's own ``encode_text`` takes the full context only). Every other tower (bidirectional, with an appended
class token, pooled at the last position, from transformers) gets the library's own ``encode_text``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ttd_plugins.errors import InputError
from ttd_plugins.toolkit.attention import run_blocks

DEFAULT_CONTEXT_LENGTH = 77
NATIVE_PARTS = ("token_embedding", "positional_embedding", "transformer", "ln_final")


def text_module(model: Any) -> Any:
    """The module that holds the text tower's parts: ``model.text``, or ``model`` where they are inlined."""
    return getattr(model, "text", model)


def context_length(model: Any, tokenizer: Any = None) -> int:
    """Positions of the text tower, an appended class token not counted.

    A tower from transformers states its table of positions at most (514 for RoBERTa) and not the length that it was
    trained at, so there the tokenizer decides, or else open_clip's default.
    """
    if is_native(model):
        return int(text_module(model).context_length)
    return int(getattr(tokenizer, "context_length", None) or DEFAULT_CONTEXT_LENGTH)


def pool_type(model: Any) -> str | None:
    """How a native tower pools (``argmax``, ``eos``, ``first``, ``last``), or ``None`` where it does not say."""
    return getattr(model, "text_pool_type", None) or getattr(text_module(model), "pool_type", None)


def end_id(model: Any) -> int:
    """Id of the end token of a tower pooled by ``eos``."""
    return int(model.text_eos_id if hasattr(model, "text_eos_id") else text_module(model).eos_id)


def is_native(model: Any) -> bool:
    """Whether the text tower is open_clip's own, with blocks that can be named one by one."""
    text = text_module(model)
    return all(hasattr(text, name) for name in NATIVE_PARTS) and hasattr(text.transformer, "resblocks")


def can_trim(model: Any) -> bool:
    """Whether positions after the end token cannot change the embedding."""
    text = text_module(model)
    if not is_native(model) or getattr(text, "cls_emb", None) is not None:
        return False
    mask = getattr(text, "attn_mask", None)
    return mask is not None and mask.ndim == 2 and pool_type(model) in ("argmax", "eos", "first")


def lengths_through_end(model: Any, ids: Tensor, pad_id: int) -> Tensor:
    """Positions of each row up to and including its end token, int64 ``[N]``.

    The end token is where the tower pools (largest id, or the id of the end token); for towers that pool elsewhere it
    is the last position that is not padding.
    """
    if pool_type(model) == "argmax":
        return ids.argmax(dim=-1) + 1
    end = ids.eq(end_id(model)) if pool_type(model) == "eos" else torch.zeros_like(ids, dtype=torch.bool)
    positions = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    last_word = ((ids != pad_id) * positions).amax(dim=-1)
    return torch.where(end.any(dim=-1), end.int().argmax(dim=-1) + 1, last_word)


def encode_text(model: Any, ids: Tensor) -> Tensor:
    """Text embeddings ``[N, D]`` of token ids ``[N, L]``, not L2-normalised.

    Raises:
        InputError: L is longer than the context, or shorter where trimming is not exact.
    """
    if ids.ndim != 2:
        raise InputError(f"token ids must have shape [texts, length], not {tuple(ids.shape)}")
    if not is_native(model):
        return _first(model.encode_text(ids, normalize=False))
    context = context_length(model)
    if not can_trim(model):
        if ids.shape[1] != context:
            raise InputError(
                f"this text tower looks at all {context} positions, so token ids cut to {ids.shape[1]} would change "
                "its embeddings; pass the rows that tokenize() gives"
            )
        return _first(model.encode_text(ids, normalize=False))
    if ids.shape[1] > context:
        raise InputError(f"token ids have {ids.shape[1]} positions, but the text tower has {context}")
    return _encode_trimmed(model, ids)


def _first(output: Any) -> Tensor:
    """The embedding, where a tower gives its tokens too."""
    return output[0] if isinstance(output, tuple) else output


def _encode_trimmed(model: Any, ids: Tensor) -> Tensor:
    text = text_module(model)
    length = ids.shape[1]
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(ids).to(dtype) + text.positional_embedding[:length].to(dtype)
    mask = text.attn_mask[:length, :length]
    for block in text.transformer.resblocks:
        x = run_blocks(text.transformer, _run_block, block, x, mask)
    x = text.ln_final(x)
    pool = pool_type(model)
    if pool == "argmax":
        position = ids.argmax(dim=-1)
    elif pool == "eos":
        position = ids.eq(end_id(model)).int().argmax(dim=-1)
    else:
        position = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    pooled = x[torch.arange(len(ids), device=x.device), position]
    projection = text.text_projection
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection


def _run_block(block: Any, x: Tensor, mask: Tensor) -> Tensor:
    return block(x, attn_mask=mask)
