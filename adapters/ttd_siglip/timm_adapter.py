"""The adapter for open_clip's SigLIP models, whose image tower is a timm vision transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttd_plugins.adapter import Tower
from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.attention import attention_dropout, call_checkpointed, has_hooks, split_heads
from ttd_plugins.toolkit.last_block import BlockParts
from ttd_plugins.toolkit.lora_targets import base_layer, linear_layers_of_blocks
from ttd_plugins.toolkit.open_clip_adapter import TimmViTAdapter
from ttd_plugins.toolkit.position_embeddings import embedded_patches, resampled_positions
from ttd_plugins.toolkit.tokenizing import accepts_parameter
from ttd_siglip import recognition
from ttd_siglip.adapter import SiglipAdapter
from ttd_siglip.siglip_modes import attend


class TimmSiglipAdapter(SiglipAdapter, TimmViTAdapter):
    """open_clip's ``CustomTextCLIP`` around a timm trunk.

    The parts of the trunk run one by one with resampled position embeddings, because timm's own ``set_input_size``
    would overwrite the model's.
    """

    default_context_length = 64
    default_resize_mode = "squash"
    recognition = recognition

    @property
    def _input_size(self) -> tuple[int, int]:
        height, width = self._trunk.patch_embed.img_size or self._visual.image_size
        return int(height), int(width)

    def _embedding_widths(self) -> tuple[int, int | None]:
        text_width = text_tower.embedding_width(self.model)
        head = getattr(self._visual, "head", None)
        projections = (getattr(head, "proj", None), getattr(getattr(head, "mlp", None), "fc2", None), self._trunk.head)
        for layer in projections:
            last: Any = base_layer(layer) if layer is not None else None
            if hasattr(last, "out_features"):
                return int(last.out_features), text_width
        return int(self._trunk.attn_pool.out_features), text_width

    def _own_preprocessing(self) -> Mapping[str, Any] | None:
        return getattr(self._visual, "preprocess_cfg", None)

    # Features ------------------------------------------------------------------------------------------------------

    def _embed(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        trunk = self._trunk
        x = trunk.patch_embed.norm(embedded_patches(trunk.patch_embed.proj, pixels))
        if trunk.pos_embed is not None:
            positions = resampled_positions(trunk.pos_embed[0], self._grid, grid, prefix=0, method=self.positions)
            x = x + positions.to(x.dtype)
        return trunk.norm_pre(trunk.pos_drop(x))

    def _blocks(self) -> Sequence[Any]:
        return list(self._trunk.blocks)

    def _run_block(self, block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return call_checkpointed(self._trunk, block, x)
        return call_checkpointed(self._trunk, _run_masked, block, x, mask)

    def _parts(self, block: Any) -> BlockParts | None:
        attention = block.attn
        # Other blocks and attentions of timm compute something else with the same names.
        if (type(block).__name__, type(attention).__name__) != ("Block", "Attention") or has_hooks(block, attention):
            return None
        return block_parts(block)

    def _checkpointed(self, block: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        return call_checkpointed(self._trunk, function, *arguments)

    def _norm(self, x: Tensor) -> Tensor:
        return self._trunk.norm(x)

    def _pool(self, x: Tensor) -> Tensor:
        return self._project(self._trunk.attn_pool(x))

    def _project(self, x: Tensor) -> Tensor:
        """Layers after the pooling head; the published SigLIP models have none."""
        trunk = self._trunk
        return self._visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(x))))

    def _dense_features(self, x: Tensor) -> Tensor:
        pool = self._trunk.attn_pool
        if self.dense.head == "value" and type(pool.kv) is nn.Linear and not has_hooks(pool.kv):
            width = pool.kv.out_features // 2
            mixed = F.linear(x, pool.kv.weight[width:], None if pool.kv.bias is None else pool.kv.bias[width:])
        else:
            k, mixed = pool.kv(x).chunk(2, dim=-1)
            if self.dense.head != "value":
                q, k, v = (split_heads(part, pool.num_heads) for part in (pool.q(x), k, mixed))
                q = pool.q_norm(q)
                mixed = attend(q, pool.k_norm(k) if self.dense.head == "token_probe" else q, v)
        return self._finish_pool(mixed)

    def _finish_pool(self, mixed: Tensor) -> Tensor:
        """Mixed values ``[B, N, W]`` through the rest of the pooling head, to the joint space."""
        pool = self._trunk.attn_pool
        out = pool.proj_drop(pool.proj(mixed))
        if pool.mlp is not None:
            out = out + pool.mlp(pool.norm(out))
        return self._project(out)

    def _dense_and_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pool = self._trunk.attn_pool
        if self.dense.head != "value" or pool.pool != "token" or has_hooks(pool):
            return super()._dense_and_pool(x)
        # The probe mixes the same values, so both share the rest of the head.
        k, v = pool.kv(x).chunk(2, dim=-1)
        q = split_heads(pool.q(pool.latent.expand(len(x), -1, -1)), pool.num_heads)
        k = pool.k_norm(split_heads(k, pool.num_heads))
        probed = attend(pool.q_norm(q), k, split_heads(v, pool.num_heads))[:, :1]
        out = self._finish_pool(torch.cat([probed, v], dim=1))
        return out[:, 1:], out[:, 0]

    def _unsupported_head_reason(self, head: str) -> str | None:
        pool = self._trunk.attn_pool
        if head == "value" or getattr(base_layer(pool.q), "in_features", None) == self._trunk.embed_dim:
            return None
        return "the pooling head projects no queries of the width of a patch, so a patch cannot be its probe"

    def _unmasked_last_block_reason(self) -> str | None:
        block = self._trunk.blocks[-1]
        if accepts_parameter(block.forward, "attn_mask"):
            return None
        return f"last_block='value' needs a block that takes a mask, and {type(block).__name__} takes none"

    def _encode_text(self, ids: Tensor) -> Tensor:
        return text_tower.encode_text(self.model, ids)

    def lora_targets(self, tower: Tower) -> list[str]:
        """Image: ``qkv``, ``proj``, ``fc1`` and ``fc2`` of every block. Text: attention (whole) and MLP of every block.

        Text attention of open_clip's own class is wrapped at its output projection only. In a text tower from
        transformers the targets are the linear layers of its blocks.
        """
        if tower == "text":
            return text_tower.lora_targets(self.model)
        return linear_layers_of_blocks(self._trunk.blocks, "visual.trunk.blocks")


def _run_masked(block: Any, x: Tensor, mask: Tensor) -> Tensor:
    return block(x, attn_mask=mask)


def block_parts(block: Any) -> BlockParts:
    """The parts of timm's ``Block`` around its ``Attention``."""
    attention = block.attn

    def project(query_tokens: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(part, attention.num_heads) for part in attention.qkv(x).chunk(3, dim=-1))
        return attention.q_norm(q[:, :, : query_tokens.shape[1]]), attention.k_norm(k), v

    def finish(mixed: Tensor, normed: Tensor) -> Tensor:
        mixed = getattr(attention, "norm", nn.Identity())(mixed)
        if getattr(attention, "gate", None) is not None:
            mixed = mixed * attention.gate(normed).sigmoid()
        return block.drop_path1(block.ls1(attention.proj_drop(attention.proj(mixed))))

    return BlockParts(
        norm=block.norm1,
        project=project,
        finish=finish,
        feed_forward=lambda tokens: block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))),
        dropout=attention_dropout(attention),
    )
