"""Text towers built from residual blocks, as open_clip's: embeddings for rows of any length that keeps the end token.

A tower is native here if its parts are named ``token_embedding``, ``positional_embedding``, ``transformer.resblocks``
and ``ln_final``, in the model itself or under ``model.text``.

- A causal tower pooled at its end token never attends to later positions, so rows may be cut after the end token. The
  parts of the tower run with sliced positions and mask, since the library's own ``encode_text`` needs the full context.
- Texts of a causal tower may also be packed into few rows (:mod:`ttd_plugins.packed_texts`).
- A tower that pools at the last position runs at the full context.
- In both, the last block is computed at the pooled position only.
- Every other tower (an appended class token, masked padding, not native) runs through the library's ``encode_text``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttd_plugins.errors import InputError
from ttd_plugins.packed_texts import PackedTexts
from ttd_plugins.toolkit.attention import call_checkpointed, is_plain_attention
from ttd_plugins.toolkit.last_block import last_block_at, last_block_of_packed_texts
from ttd_plugins.toolkit.lora_targets import base_layer, linear_layers_of_blocks
from ttd_plugins.toolkit.residual_blocks import block_parts, residual_block_targets, runs_in_parts
from ttd_plugins.utils.deprecation import renamed_keyword, renamed_names

DEFAULT_CONTEXT_LENGTH = 77
BLOCK_PARTS = ("ln_1", "ls_1", "ln_2", "ls_2", "mlp")
NATIVE_PARTS = ("token_embedding", "positional_embedding", "transformer", "ln_final")


def text_module(model: Any) -> Any:
    """The module with the text tower's parts: ``model.text``, or ``model`` where the parts are inlined."""
    return getattr(model, "text", model)


def name_prefix(model: Any) -> str:
    """The start of the names of the text tower's parts: ``"text."``, or ``""`` where they are inlined."""
    return "text." if hasattr(model, "text") else ""


def embedding_width(model: Any) -> int | None:
    """Width of the text embeddings, or ``None`` where the tower is not native and so does not say."""
    if not is_native(model):
        return None
    tower = text_module(model)
    if tower.text_projection is None:
        return int(tower.token_embedding.embedding_dim)
    projection = tower.text_projection
    last: Any = base_layer(projection) if isinstance(projection, nn.Module) else projection
    return int(last.out_features if isinstance(last, nn.Linear) else last.shape[1])


def context_length(model: Any, tokenizer: Any = None, default: int = DEFAULT_CONTEXT_LENGTH) -> int:
    """Positions of the text tower, without an appended class token.

    A tower that is not native has a table of positions (514 in RoBERTa) that says nothing about the length it was
    trained at. There the tokenizer's ``context_length`` decides, or else ``default``.
    """
    if is_native(model):
        return int(text_module(model).context_length)
    return int(getattr(tokenizer, "context_length", None) or default)


def pool_type(model: Any) -> str | None:
    """How a native tower pools (``argmax``, ``eos``, ``first``, ``last``), or ``None`` where it does not say."""
    return getattr(model, "text_pool_type", None) or getattr(text_module(model), "pool_type", None)


def end_id(model: Any) -> int:
    """Id of the end token of a tower pooled by ``eos``."""
    return int(model.text_eos_id if hasattr(model, "text_eos_id") else text_module(model).eos_id)


def is_native(model: Any) -> bool:
    """Whether the text tower is built from residual blocks under the names of this module."""
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

    The end token is where the tower pools (the largest id, or the id of the end token). For towers that pool elsewhere
    it is the last position that is not padding.
    """
    if pool_type(model) == "argmax":
        return ids.argmax(dim=-1) + 1
    end = ids.eq(end_id(model)) if pool_type(model) == "eos" else torch.zeros_like(ids, dtype=torch.bool)
    positions = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    last_token = ((ids != pad_id) * positions).amax(dim=-1)
    return torch.where(end.any(dim=-1), end.int().argmax(dim=-1) + 1, last_token)


def encode_text(model: Any, ids: Tensor) -> Tensor:
    """Text embeddings ``[N, D]`` of token ids ``[N, L]``, not L2-normalised.

    Raises:
        InputError: L is longer than the context, or shorter in a tower that needs the full context.
    """
    if not is_native(model):
        check_token_ids(ids)
        return _first(model.encode_text(ids, normalize=False))
    trimmable = can_trim(model)
    check_token_ids(ids, context_length(model), needs_full_context=not trimmable)
    if trimmable or _pools_last(model):
        return _encode_in_parts(model, ids)
    return _first(model.encode_text(ids, normalize=False))


def pooling_positions(model: Any, ids: Tensor) -> Tensor | None:
    """The pooled position of each row, int64 ``[N]``; ``None`` if the tower cannot encode packed texts.

    It can if it is native and causal, and if the attention of its blocks states its number of heads.
    """
    if not can_trim(model) or not hasattr(base_layer(text_module(model).transformer.resblocks[-1].attn), "num_heads"):
        return None
    return _positions(model, ids)


def encode_packed_texts(model: Any, packed: PackedTexts) -> Tensor:
    """Text embeddings ``[N, D]`` of packed texts, not L2-normalised; see :func:`pooling_positions`."""
    text = text_module(model)
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(packed.ids).to(dtype) + F.embedding(packed.positions, text.positional_embedding).to(dtype)
    *blocks, last = text.transformer.resblocks
    heads = int(base_layer(last.attn).num_heads)  # type: ignore[arg-type]
    mask = packed.additive_mask(x.dtype, heads)
    for block in blocks:
        x = call_checkpointed(text.transformer, _run_block, block, x, mask)
    return _projected(text, call_checkpointed(text.transformer, _run_last_block_packed, last, x, mask, packed))


def unpooled_reason(model: Any) -> str | None:
    """Why a text tower has no pooled embedding, as the end of a sentence; ``None`` where it has one."""
    text = text_module(model)
    pool = getattr(text, "pool_type", getattr(model, "text_pool_type", None))
    if pool == "none" and getattr(text, "cls_emb", None) is None:
        return "its text tower returns no pooled embedding (pool_type 'none')"
    return None


def check_token_ids(ids: Tensor, context: int | None = None, *, needs_full_context: bool = False) -> None:
    """Raise InputError if ids are not ``[N, L]`` with a length that is valid for the text tower.

    Args:
        ids: the token ids.
        context: positions of the text tower; ``None`` if any length is valid.
        needs_full_context: whether L must be the context length.
    """
    if ids.ndim != 2:
        raise InputError(f"token ids must have shape [texts, length], not {tuple(ids.shape)}")
    length = ids.shape[1]
    if context is not None and length > context:
        raise InputError(f"token ids have {length} positions, but the text tower has {context}")
    if needs_full_context and length != context:
        raise InputError(
            f"this text tower attends to all {context} positions, so token ids cut to {length} would change its "
            "embeddings; pass the rows that tokenize() returns"
        )


def _pools_last(model: Any) -> bool:
    """Whether a native tower pools at the last position, padding or not (as SigLIP does), and builds no mask itself."""
    text = text_module(model)
    if getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
        return False
    mask = getattr(text, "attn_mask", None)
    return pool_type(model) == "last" and (mask is None or mask.ndim == 2)


def _first(output: Any) -> Tensor:
    """The embedding, where a tower returns its tokens too."""
    return output[0] if isinstance(output, tuple) else output


def _encode_in_parts(model: Any, ids: Tensor) -> Tensor:
    """Embeddings ``[N, D]`` of ids ``[N, L]``; the last block is computed at the pooled position only."""
    text = text_module(model)
    length = ids.shape[1]
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(ids).to(dtype) + text.positional_embedding[:length].to(dtype)
    mask = None if text.attn_mask is None else text.attn_mask[:length, :length]
    *blocks, last = text.transformer.resblocks
    for block in blocks:
        x = call_checkpointed(text.transformer, _run_block, block, x, mask)
    return _projected(text, call_checkpointed(text.transformer, _run_last_block, last, x, mask, _positions(model, ids)))


def _projected(text: Any, pooled: Tensor) -> Tensor:
    """Embeddings ``[N, D]`` of pooled tokens ``[N, W]``: final norm and projection."""
    pooled = text.ln_final(pooled)
    projection = text.text_projection
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection


def _positions(model: Any, ids: Tensor) -> Tensor:
    """The pooled position of each row, ``[N]``."""
    pool = pool_type(model)
    if pool == "argmax":
        return ids.argmax(dim=-1)
    if pool == "eos":
        return ids.eq(end_id(model)).int().argmax(dim=-1)
    return torch.full_like(ids[:, 0], ids.shape[1] - 1 if pool == "last" else 0)


def _run_block(block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    return block(x, attn_mask=mask)


def _run_last_block(block: Any, x: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """Output tokens ``[N, W]`` of the last block at one position per row."""
    if not _has_parts(block):
        return _run_block(block, x, mask)[torch.arange(len(x), device=x.device), positions]
    return last_block_at(block_parts(block), x, positions, mask)


def _run_last_block_packed(block: Any, x: Tensor, mask: Tensor, packed: PackedTexts) -> Tensor:
    """Output tokens ``[N, W]`` of the last block at the pooled tokens; ``mask`` is ``[R * heads, L, L]``."""
    if not _has_parts(block):
        return packed.pooled(_run_block(block, x, mask))
    heads = len(mask) // len(x)
    return last_block_of_packed_texts(block_parts(block), x, packed, mask[::heads])


def _has_parts(block: Any) -> bool:
    return all(hasattr(block, name) for name in BLOCK_PARTS) and runs_in_parts(block)


@renamed_keyword("is_whole", "is_plain")
def lora_targets(model: Any, is_plain: Callable[[nn.Module], bool] = is_plain_attention) -> list[str]:
    """Names of the modules of the text tower that LoRA may wrap: attention and both matrices of the MLP in every block.

    Args:
        model: the model that the names are relative to.
        is_plain: whether LoRA can wrap an attention module as a whole; any other is wrapped at its output projection.

    Returns:
        Names as above for a native tower, and the linear layers of its blocks for any other.
    """
    if not is_native(model):
        return linear_layers_of_blocks(text_module(model), name_prefix(model).rstrip("."))
    blocks = text_module(model).transformer.resblocks
    return residual_block_targets(blocks, f"{name_prefix(model)}transformer.resblocks", is_plain)


if not TYPE_CHECKING:
    __getattr__ = renamed_names(__name__, {"prefix": "name_prefix"})
