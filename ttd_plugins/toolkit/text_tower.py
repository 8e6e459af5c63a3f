"""Text towers made of residual blocks: embeddings at any length that keeps the end token, exact where trimming is.

A tower is native here if its parts are named ``token_embedding``, ``positional_embedding``, ``transformer.resblocks``
and ``ln_final``, inlined in the model or under ``model.text``. A causal tower pooled at its end token never looks
behind that token, so its parts are run with sliced positions and mask (the library's own ``encode_text`` takes the full
context only). A tower that pools at the last position is run at the full context; in either, the last block is run at
the pooled position alone. Every other tower (with an appended class token or masked padding, or not native at all)
gets the library's own ``encode_text``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ttd_plugins.errors import InputError
from ttd_plugins.toolkit.attention import (
    attention_dropout,
    has_hooks,
    is_plain_attention,
    project_out,
    project_some,
    run_blocks,
)
from ttd_plugins.toolkit.last_block import BlockParts, last_block_at
from ttd_plugins.toolkit.lora_targets import base_layer, linear_layers_of_blocks

DEFAULT_CONTEXT_LENGTH = 77
BLOCK_PARTS = ("ln_1", "ls_1", "ln_2", "ls_2", "mlp")
NATIVE_PARTS = ("token_embedding", "positional_embedding", "transformer", "ln_final")


def text_module(model: Any) -> Any:
    """The module that holds the text tower's parts: ``model.text``, or ``model`` where they are inlined."""
    return getattr(model, "text", model)


def embedding_width(model: Any) -> int | None:
    """Width of the text embeddings, or ``None`` where the tower is not native and so does not say."""
    if not is_native(model):
        return None
    tower = text_module(model)
    last = tower.text_projection
    if last is None:
        return int(tower.token_embedding.embedding_dim)
    return int(last.out_features if isinstance(last, nn.Linear) else last.shape[1])


def context_length(model: Any, tokenizer: Any = None) -> int:
    """Positions of the text tower, an appended class token not counted.

    A tower that is not native states its table of positions at most (514 for RoBERTa) and not the length that it was
    trained at, so there the tokenizer decides, or else CLIP's own 77.
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
    """Whether the text tower is made of residual blocks that can be named one by one."""
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
        if _pools_last(model):
            return _encode_in_parts(model, ids)
        return _first(model.encode_text(ids, normalize=False))
    if ids.shape[1] > context:
        raise InputError(f"token ids have {ids.shape[1]} positions, but the text tower has {context}")
    return _encode_in_parts(model, ids)


def _pools_last(model: Any) -> bool:
    """Whether a native tower without masks of its own making pools at the last position, padding or not (SigLIP's)."""
    text = text_module(model)
    if getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
        return False
    mask = getattr(text, "attn_mask", None)
    return pool_type(model) == "last" and (mask is None or mask.ndim == 2)


def _first(output: Any) -> Tensor:
    """The embedding, where a tower gives its tokens too."""
    return output[0] if isinstance(output, tuple) else output


def _encode_in_parts(model: Any, ids: Tensor) -> Tensor:
    """Embeddings ``[N, D]`` of ids ``[N, L]``, the last block at the position that is pooled alone."""
    text = text_module(model)
    length = ids.shape[1]
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(ids).to(dtype) + text.positional_embedding[:length].to(dtype)
    mask = None if text.attn_mask is None else text.attn_mask[:length, :length]
    *blocks, last = text.transformer.resblocks
    for block in blocks:
        x = run_blocks(text.transformer, _run_block, block, x, mask)
    pooled = text.ln_final(run_blocks(text.transformer, _run_last_block, last, x, mask, _positions(model, ids)))
    projection = text.text_projection
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection


def _positions(model: Any, ids: Tensor) -> Tensor:
    """The position ``[N]`` that is pooled of each row."""
    pool = pool_type(model)
    if pool == "argmax":
        return ids.argmax(dim=-1)
    if pool == "eos":
        return ids.eq(end_id(model)).int().argmax(dim=-1)
    return torch.full_like(ids[:, 0], ids.shape[1] - 1 if pool == "last" else 0)


def _run_block(block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    return block(x, attn_mask=mask)


def _run_last_block(block: Any, x: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """The last block's tokens ``[N, W]`` at one position each: one query, and one token in the MLP."""
    attention = block.attn
    known = is_plain_attention(attention) or hasattr(attention, "project_qkv")
    if not known or has_hooks(block, attention) or not all(hasattr(block, name) for name in BLOCK_PARTS):
        return _run_block(block, x, mask)[torch.arange(len(x), device=x.device), positions]

    def finish(mixed: Tensor, _: Tensor) -> Tensor:
        branch = project_out(attention, mixed)
        return block.ls_1(block.ln_attn(branch) if hasattr(block, "ln_attn") else branch)

    parts = BlockParts(
        norm=block.ln_1,
        project=partial(project_some, attention),
        finish=finish,
        feed_forward=lambda token: block.ls_2(block.mlp(block.ln_2(token))),
        dropout=attention_dropout(attention),
    )
    return last_block_at(parts, x, positions, mask)


def lora_targets(model: Any, is_whole: Callable[[nn.Module], bool] = is_plain_attention) -> list[str]:
    """Names of what LoRA may wrap in the text tower: attention and both matrices of the MLP in every block.

    Args:
        model: the model that the names are relative to.
        is_whole: whether an attention module is wrapped whole; any other is wrapped at its output projection only.

    Returns:
        Names for a native tower as said above, and the linear layers of its blocks for any other.
    """
    if not is_native(model):
        return linear_layers_of_blocks(text_module(model), "text")
    targets = []
    where = f"{prefix(model)}transformer.resblocks"
    for index, block in enumerate(text_module(model).transformer.resblocks):
        whole = is_whole(base_layer(block.attn))
        targets.append(f"{where}.{index}.attn" if whole else f"{where}.{index}.attn.out_proj")
        targets += [f"{where}.{index}.mlp.c_fc", f"{where}.{index}.mlp.c_proj"]
    return targets


def prefix(model: Any) -> str:
    """What names of the text tower's parts begin with: ``"text."``, or nothing where they are inlined."""
    return "text." if hasattr(model, "text") else ""
