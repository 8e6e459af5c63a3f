"""Residual blocks as OpenAI's package and open_clip name their parts: ``ln_1``, ``attn``, ``ln_2`` and ``mlp``.

open_clip adds layer scales ``ls_1`` and ``ls_2``, and in custom blocks a norm ``ln_attn`` after attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ttd_plugins.toolkit.attention import (
    attention_dropout,
    has_hooks,
    is_plain_attention,
    project_out,
    project_with_queries,
)
from ttd_plugins.toolkit.last_block import BlockParts
from ttd_plugins.toolkit.lora_targets import base_layer


def runs_in_parts(block: Any, is_plain: Callable[[nn.Module], bool] = is_plain_attention) -> bool:
    """Whether a block may be run part by part: its attention is plain or has LoRA of the toolkit, and has no hooks."""
    attention = block.attn
    return (is_plain(attention) or hasattr(attention, "project_qkv")) and not has_hooks(block, attention)


def block_parts(block: Any) -> BlockParts:
    """The parts of a block whose attention has a fused input projection, LoRA of the toolkit included."""
    attention = block.attn
    return BlockParts(
        norm=block.ln_1,
        project=partial(project_with_queries, attention),
        finish=lambda mixed, _: attention_branch(block, project_out(attention, mixed)),
        feed_forward=partial(feed_forward, block),
        dropout=attention_dropout(attention),
    )


def attention_branch(block: Any, attended: Tensor) -> Tensor:
    """The output of attention as it enters the residual connection: after inner norm and layer scale."""
    if hasattr(block, "ln_attn"):
        attended = block.ln_attn(attended)
    return block.ls_1(attended) if hasattr(block, "ls_1") else attended


def feed_forward(block: Any, tokens: Tensor) -> Tensor:
    """The feed-forward branch of a block: norm, MLP, layer scale."""
    out = block.mlp(block.ln_2(tokens))
    return block.ls_2(out) if hasattr(block, "ls_2") else out


def residual_block_targets(
    blocks: Iterable[Any],
    prefix: str,
    is_plain: Callable[[nn.Module], bool] = is_plain_attention,
    *,
    last_mlp: bool = True,
) -> list[str]:
    """Names of the modules that LoRA may wrap in residual blocks: attention and both matrices of the MLP.

    Args:
        blocks: the blocks of a tower.
        prefix: name of the list of blocks in the model.
        is_plain: whether LoRA can wrap an attention module as a whole; any other is wrapped at its output projection.
        last_mlp: whether the features depend on the MLP of the last block.
    """
    targets = []
    blocks = list(blocks)
    for index, block in enumerate(blocks):
        attention = f"{prefix}.{index}.attn"
        targets.append(attention if is_plain(base_layer(block.attn)) else f"{attention}.out_proj")
        if last_mlp or index < len(blocks) - 1:
            targets += [f"{prefix}.{index}.mlp.c_fc", f"{prefix}.{index}.mlp.c_proj"]
    return targets
