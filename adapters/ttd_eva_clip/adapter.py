"""The adapter for CLIP models whose image tower is a timm EVA trunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ttd_eva_clip import recognition
from ttd_eva_clip.eva_blocks import bias_is_added_outside, opaque_qkv_reason, rotary_embedding, run_last_block
from ttd_plugins.adapter import ImageFeatures, Tower
from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.attention import call_checkpointed
from ttd_plugins.toolkit.dense_modes import QUERIES_AND_KEYS, DenseMode
from ttd_plugins.toolkit.lora_targets import base_layer
from ttd_plugins.toolkit.open_clip_adapter import TimmViTAdapter
from ttd_plugins.toolkit.position_embeddings import embedded_patches, resampled_positions


class EvaCLIPAdapter(TimmViTAdapter):
    """``open_clip.CustomTextCLIP`` whose ``visual.trunk`` is a timm ``Eva``, or an object with the same structure."""

    family = "eva_clip"
    export_failure = (
        "it passes only a trunk's name on to timm, and none of its own architectures has a trunk like this one"
    )
    recognition = recognition

    def _unsupported_mode_reason(self, mode: DenseMode) -> str | None:
        return opaque_qkv_reason(self._trunk.blocks[-1].attn) if mode.needs_explicit_qkv else None

    def _embedding_widths(self) -> tuple[int, int | None]:
        # open_clip's own head follows the trunk's where an architecture has a projection.
        heads = [self._trunk.head, *getattr(self._visual, "head", nn.Identity()).modules()]
        widths = [int(head.out_features) for head in heads if isinstance(base_layer(head), nn.Linear)]
        return widths[-1] if widths else int(self._trunk.embed_dim), text_tower.embedding_width(self.model)

    def _encode_image(self, pixels: Tensor, grid: tuple[int, int], pooled: bool) -> ImageFeatures:
        trunk = self._trunk
        prefix = int(trunk.num_prefix_tokens)
        *blocks, last = trunk.blocks
        x = self._embed(pixels, grid)
        ropes = self._ropes(grid)
        for block, rope in zip(blocks, ropes, strict=False):
            x = call_checkpointed(trunk, block, x, rope)
        averaged = pooled and trunk.global_pool != "token"
        trained, patches = call_checkpointed(
            trunk, run_last_block, last, x, ropes[-1], self.dense, grid, prefix, averaged
        )
        dense = self._project(trunk.norm(patches)).unflatten(1, grid)
        if not pooled:
            return ImageFeatures(dense)
        pooled_tokens = trunk.norm(trained).mean(dim=1) if averaged else trunk.norm(trained[:, 0])
        return ImageFeatures(dense, self._project(pooled_tokens))

    def _embed(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens ``[B, prefix + P, W]`` that enter the first block, class and register tokens first."""
        trunk = self._trunk
        # The trunk's own patch_embed raises at other sizes, so its parts are called.
        x = trunk.patch_embed.norm(embedded_patches(trunk.patch_embed.proj, pixels))
        extra = [trunk.cls_token, getattr(trunk, "reg_token", None)]
        tokens = [token.expand(len(x), -1, -1) for token in extra if token is not None]
        prefix = 0 if getattr(trunk, "no_embed_class", False) else int(trunk.num_prefix_tokens)
        own = trunk.pos_embed
        if own is not None:
            positions = resampled_positions(own[0], self._grid, grid, prefix=prefix, method=self.positions)
            positions = positions.to(own.dtype)
            if prefix == 0:
                x = x + positions
            else:
                x = torch.cat([*tokens, x], dim=1) + positions
                tokens = []
        x = torch.cat([*tokens, x], dim=1) if tokens else x
        return trunk.norm_pre(trunk.pos_drop(x))

    def _ropes(self, grid: tuple[int, int]) -> list[Tensor | None]:
        """Rotary position embedding of the patches for each block."""
        trunk = self._trunk
        rope = rotary_embedding(trunk, grid)
        if rope is not None and getattr(trunk, "rope_mixed", False):
            return list(rope)
        return [rope] * len(trunk.blocks)

    def _project(self, tokens: Tensor) -> Tensor:
        trunk = self._trunk
        return getattr(self._visual, "head", nn.Identity())(trunk.head(trunk.head_drop(trunk.fc_norm(tokens))))

    def lora_targets(self, tower: Tower) -> list[str]:
        """Every linear layer of attention and MLP in every block.

        Attention that multiplies by its fused weight itself, instead of calling the projection, is wrapped as a whole.
        In the last block the layers that the dense mode does not use are left out: the FFN, and queries or keys where
        they have layers of their own.
        """
        if tower == "text":
            return text_tower.lora_targets(self.model)
        targets: list[str] = []
        blocks = self._trunk.blocks
        for index, block in enumerate(blocks):
            where = f"visual.trunk.blocks.{index}"
            attention: Any = base_layer(block.attn)
            is_last = index == len(blocks) - 1
            if bias_is_added_outside(attention):
                targets.append(f"{where}.attn")
            else:
                used = QUERIES_AND_KEYS[self.dense.attention] if is_last else ("q", "k")
                parts = ["qkv"] if attention.qkv is not None else [f"{name}_proj" for name in (*used, "v")]
                targets += [f"{where}.attn.{name}" for name in (*parts, "proj")]
            if self.dense.ffn or not is_last:
                inner = block.mlp.named_children()
                targets += [f"{where}.mlp.{name}" for name, part in inner if isinstance(base_layer(part), nn.Linear)]
        return targets

    def lora_layers(self) -> Mapping[type[nn.Module], type[nn.Module]]:
        """LoRA layers for attention that peft's cannot wrap; they never write a base weight. Needs peft."""
        from ttd_eva_clip.attention_lora import LoRAEvaAttention

        layers = dict(super().lora_layers())
        for block in self._trunk.blocks:
            attention = base_layer(block.attn)
            if bias_is_added_outside(attention):
                layers[type(attention)] = LoRAEvaAttention
        return layers
