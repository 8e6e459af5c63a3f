"""Encoder layers of transformers' CLIP and SigLIP: their parts, their calls, and the sizes of the text tower."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ttd_plugins.toolkit.attention import call_checkpointed, has_hooks, split_heads
from ttd_plugins.toolkit.last_block import BlockParts
from ttd_plugins.toolkit.tokenizing import accepts_parameter

ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
MLP_PARTS = ("fc1", "fc2")


def has_projections(attention: Any) -> bool:
    """Whether attention has the projections of transformers' CLIP and SigLIP under their names."""
    return all(hasattr(attention, name) for name in (*ATTENTION_PARTS, "num_heads"))


def layer_runs_in_parts(layer: Any) -> bool:
    """Whether an encoder layer may be run part by part: its projections are known, and nothing has hooks."""
    return has_projections(layer.self_attn) and not has_hooks(layer, layer.self_attn)


def layer_parts(layer: Any) -> BlockParts:
    """The parts of an encoder layer."""
    attention = layer.self_attn

    def project(query_tokens: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = attention.q_proj(query_tokens), attention.k_proj(x), attention.v_proj(x)
        heads = attention.num_heads
        return split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)

    return BlockParts(
        norm=layer.layer_norm1,
        project=project,
        finish=lambda mixed, _: attention.out_proj(mixed),
        feed_forward=lambda tokens: layer.mlp(layer.layer_norm2(tokens)),
        dropout=float(attention.dropout) if attention.training else 0.0,
    )


def call_layer(encoder: Any, layer: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Output ``[B, L, W]`` of an encoder layer, with activation checkpointing where its switch is on.

    Args:
        encoder: the layer's encoder, which checkpoints the layers in version 4 of transformers.
        layer: the layer; from version 5 on it checkpoints its own calls.
        x: tokens ``[B, L, W]``.
        mask: additive ``[L, L]`` or ``[B, L, L]``, or ``None``.
    """
    if mask is not None:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
    if hasattr(layer, "gradient_checkpointing"):
        return _call(layer, x, mask)
    return call_checkpointed(encoder, _call, layer, x, mask)


def _call(layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    # By position: a reentrant checkpoint passes no gradient through keyword arguments.
    # Version 4 has the causal mask as the second mask, and returns a tuple.
    masks = (None, mask) if accepts_parameter(layer.forward, "causal_attention_mask") else (mask,)
    out = layer(x, *masks)
    return out[0] if isinstance(out, tuple) else out


def text_sizes(model: Any) -> tuple[int, int]:
    """Context length and vocabulary size of a model's text tower."""
    embeddings = model.text_model.embeddings
    return int(embeddings.position_embedding.weight.shape[0]), int(embeddings.token_embedding.weight.shape[0])
