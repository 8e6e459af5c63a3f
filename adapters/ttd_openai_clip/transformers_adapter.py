"""The adapter for transformers' ``CLIPModel``, of version 4 or 5, and for ``MetaClip2Model``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ttd_openai_clip.adapter import OpenAICLIPAdapter
from ttd_openai_clip.recognition import import_transformers, model_type
from ttd_plugins.adapter import ImageFeatures, Tower
from ttd_plugins.errors import UnsupportedModelError
from ttd_plugins.packed_texts import PackedTexts
from ttd_plugins.toolkit.attention import call_checkpointed, has_hooks, is_checkpointed
from ttd_plugins.toolkit.dense_modes import QUERIES_AND_KEYS, DenseMode
from ttd_plugins.toolkit.last_block import BlockParts, last_block, last_block_at, last_block_of_packed_texts
from ttd_plugins.toolkit.lora_targets import base_layer
from ttd_plugins.toolkit.position_embeddings import embedded_patches
from ttd_plugins.toolkit.transformers_adapter import TransformersModelAdapter
from ttd_plugins.toolkit.transformers_blocks import (
    ATTENTION_PARTS,
    MLP_PARTS,
    call_layer,
    has_projections,
    layer_parts,
    layer_runs_in_parts,
    text_sizes,
)

LEGACY_END = 2
"""Configurations from before transformers 4.31 name this id as the end token, and pool at the largest id instead."""

MASKABLE = (None, "eager", "sdpa")
"""Attention implementations that take an additive mask."""


class TransformersCLIPAdapter(OpenAICLIPAdapter, TransformersModelAdapter):
    """transformers' ``CLIPModel`` or ``MetaClip2Model``, whose structure is the same.

    All layers but the last run as the library runs them. The parts of the last one run here; for texts only at the end
    token. A text tower with hooks, or whose attention takes no mask, runs through the library.
    """

    processor_class = "CLIPImageProcessor"
    _import_transformers = staticmethod(import_transformers)
    tower_prefixes = {  # noqa: RUF012
        "image": ("vision_model.", "visual_projection."),
        "text": ("text_model.", "text_projection."),
    }

    def _embedding_widths(self) -> tuple[int, int]:
        image, text = (base_layer(p) for p in (self.model.visual_projection, self.model.text_projection))
        return int(image.out_features), int(text.out_features)  # type: ignore[arg-type]

    @property
    def _grid(self) -> tuple[int, int]:
        size = self._vision.embeddings.image_size
        height, width = (size, size) if isinstance(size, int) else size
        rows, columns = height // self._patch_size[0], width // self._patch_size[1]
        positions = self._vision.embeddings.position_embedding.weight.shape[0]
        if 1 + rows * columns != positions:
            raise UnsupportedModelError(
                f"this {type(self.model).__name__} cannot be adapted: it has {positions} position embeddings for a "
                f"grid of {rows} x {columns} patches and a class token"
            )
        return rows, columns

    @property
    def _vocabulary(self) -> int:
        return text_sizes(self.model)[1]

    def _end_positions(self, ids: Tensor) -> Tensor:
        end = getattr(self._text, "eos_token_id", LEGACY_END)
        # MetaCLIP 2 has this id as its true end token.
        if end == LEGACY_END and model_type(self.model) == "clip":
            return ids.argmax(dim=-1)
        found = ids == end
        return torch.where(found.any(dim=-1), found.int().argmax(dim=-1), -1)

    def _unsupported_mode_reason(self, mode: DenseMode) -> str | None:
        attention = self._vision.encoder.layers[-1].self_attn
        if has_projections(attention):
            return None
        kind = type(attention)
        return (
            f"the last block's attention is {kind.__module__}.{kind.__qualname__}, which has no q_proj, k_proj, v_proj "
            "and out_proj of its own"
        )

    # Features ------------------------------------------------------------------------------------------------------

    def _encode_image(self, pixels: Tensor, grid: tuple[int, int], pooled: bool) -> ImageFeatures:
        vision = self._vision
        *layers, last = vision.encoder.layers
        x = vision.pre_layrnorm(self._embed(pixels, grid))
        for layer in layers:
            x = call_layer(vision.encoder, layer, x)
        switch = _checkpoint_switch(vision.encoder, last)
        trained, patches = call_checkpointed(switch, last_block, layer_parts(last), x, self.dense, grid)
        project = self.model.visual_projection
        dense = project(vision.post_layernorm(patches)).unflatten(1, grid)
        return ImageFeatures(dense, project(vision.post_layernorm(trained[:, 0])) if pooled else None)

    def _embed(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens ``[B, 1 + P, W]``, the class token first."""
        embeddings = self._vision.embeddings
        x = embedded_patches(embeddings.patch_embedding, pixels)
        class_token = embeddings.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([class_token, x], dim=1)
        own: Tensor = embeddings.position_embedding.weight
        if grid == self._grid:
            positions = own
        elif self.positions == "library" and hasattr(embeddings, "interpolate_pos_encoding"):
            # The library's own resampling, as in get_image_features(..., interpolate_pos_encoding=True).
            positions = embeddings.interpolate_pos_encoding(x, pixels.shape[2], pixels.shape[3])
        else:
            positions = self._positions(own, grid)
        return x + positions.to(x.dtype)

    def _encode_text(self, ids: Tensor) -> Tensor:
        text = self._text
        if not self._text_runs_in_parts():
            return self._library_text(ids)
        x = text.embeddings(input_ids=ids)
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        # Where there is no end token the library pools the first position.
        positions = self._end_positions(ids).clamp_min(0)
        return self._run_text(x, mask, lambda parts, tokens: last_block_at(parts, tokens, positions, mask))

    def _text_runs_in_parts(self) -> bool:
        text = self._text
        hooked = has_hooks(text, text.encoder)
        return layer_runs_in_parts(text.encoder.layers[-1]) and not hooked and _attention_kind(text) in MASKABLE

    def _run_text(self, x: Tensor, mask: Tensor, run_last: Callable[[BlockParts, Tensor], Tensor]) -> Tensor:
        """Embeddings ``[N, D]`` from embedded tokens; ``run_last`` returns the pooled tokens of the last layer."""
        text = self._text
        *layers, last = text.encoder.layers
        for layer in layers:
            x = call_layer(text.encoder, layer, x, mask)
        pooled = call_checkpointed(_checkpoint_switch(text.encoder, last), run_last, layer_parts(last), x)
        return self.model.text_projection(text.final_layer_norm(pooled))

    def pooling_positions(self, ids: Tensor) -> Tensor | None:
        """The pooled position of each row; ``None`` if the text tower runs through the library."""
        return self._end_positions(ids).clamp_min(0) if self._text_runs_in_parts() else None

    def encode_packed_texts(self, packed: PackedTexts) -> Tensor:
        """Text embeddings ``[N, D]`` of packed texts, not L2-normalised."""
        # One token a row, since the library refuses rows that are longer than a text.
        ids, positions = packed.ids.reshape(-1, 1), packed.positions.reshape(-1, 1)
        x = self._text.embeddings(input_ids=ids, position_ids=positions).view(*packed.ids.shape, -1)
        mask = packed.additive_mask(x.dtype)
        return self._run_text(x, mask, lambda parts, tokens: last_block_of_packed_texts(parts, tokens, packed, mask))

    def _library_text(self, ids: Tensor) -> Tensor:
        out = self.model.get_text_features(input_ids=ids)
        if isinstance(out, Tensor):
            return out
        # Version 5 returns an output object, or a plain tuple if its configuration says so.
        return out[1] if isinstance(out, tuple) else out.pooler_output

    def _processor_sizes(self) -> dict[str, Any]:
        height, width = self.description.image_size
        return {"size": {"shortest_edge": max(height, width)}, "crop_size": {"height": height, "width": width}}

    def lora_targets(self, tower: Tower) -> list[str]:
        """The projections of attention and both matrices of the MLP in every block.

        In the last image block only those that dense features depend on: its queries and keys as far as the dense mode
        uses them (the value modes use neither), and its MLP where the mode keeps the FFN.
        """
        where = "vision_model" if tower == "image" else "text_model"
        encoder: Any = self.model.get_submodule(f"{where}.encoder")
        targets = []
        for index in range(len(encoder.layers)):
            projections: tuple[str, ...] = ATTENTION_PARTS
            matrices: tuple[str, ...] = MLP_PARTS
            if tower == "image" and index == len(encoder.layers) - 1:
                used = (*QUERIES_AND_KEYS[self.dense.attention], "v", "out")
                projections = tuple(name for name in projections if name.removesuffix("_proj") in used)
                matrices = MLP_PARTS if self.dense.ffn else ()
            prefix = f"{where}.encoder.layers.{index}"
            targets += [f"{prefix}.self_attn.{name}" for name in projections]
            targets += [f"{prefix}.mlp.{name}" for name in matrices]
        return targets


def _attention_kind(tower: Any) -> str | None:
    return getattr(getattr(tower, "config", None), "_attn_implementation", None)


def _checkpoint_switch(encoder: Any, layer: Any) -> Any:
    """The module whose switch decides over activation checkpointing of a layer whose parts are called."""
    return layer if is_checkpointed(layer) else encoder
