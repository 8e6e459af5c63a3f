"""The adapter for transformers' ``SiglipModel``, which covers SigLIP and the fixed-resolution SigLIP 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttd_plugins.adapter import ImageTransform, LibraryReference, Tower
from ttd_plugins.toolkit.attention import (
    attention_dropout,
    call_checkpointed,
    has_hooks,
    is_plain_attention,
    project_with_queries,
    split_heads,
)
from ttd_plugins.toolkit.last_block import BlockParts, last_block_at
from ttd_plugins.toolkit.lora_targets import base_layer
from ttd_plugins.toolkit.position_embeddings import embedded_patches, resampled_positions
from ttd_plugins.toolkit.transformers_adapter import TransformersModelAdapter
from ttd_plugins.toolkit.transformers_blocks import (
    ATTENTION_PARTS,
    MLP_PARTS,
    call_layer,
    layer_parts,
    layer_runs_in_parts,
)
from ttd_plugins.toolkit.transforms import callable_transform, image_processor
from ttd_siglip import siglip_tokenizing
from ttd_siglip.adapter import SiglipAdapter
from ttd_siglip.recognition import import_transformers
from ttd_siglip.siglip_modes import attend

TOWERS: dict[Tower, str] = {"image": "vision_model", "text": "text_model"}


class TransformersSiglipAdapter(SiglipAdapter, TransformersModelAdapter):
    """``SiglipModel`` of transformers; position embeddings are resampled by the model's own method."""

    processor_class = "SiglipImageProcessor"
    _import_transformers = staticmethod(import_transformers)
    tower_prefixes = {tower: (f"{name}.",) for tower, name in TOWERS.items()}  # noqa: RUF012

    @property
    def _input_size(self) -> tuple[int, int]:
        side = int(self._vision.embeddings.image_size)
        return side, side

    def _embedding_widths(self) -> tuple[int, int | None]:
        head: Any = base_layer(self._text.head)
        return int(self._vision.head.probe.shape[-1]), int(head.out_features)

    def _own_preprocessing(self) -> Mapping[str, Any] | None:
        return None

    @property
    def library_reference(self) -> LibraryReference:  # type: ignore[override]
        """transformers' own calls; its text tower was trained with attention to padding, so it gets no mask."""
        return LibraryReference(
            image=lambda model, pixels: model.get_image_features(pixel_values=pixels),
            text=lambda model, ids, mask: model.get_text_features(input_ids=ids),
        )

    # Features ------------------------------------------------------------------------------------------------------

    def _embed(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        embeddings = self._vision.embeddings
        if self.positions == "library" or grid == self._grid:
            return embeddings(pixels, interpolate_pos_encoding=True)
        own: Tensor = embeddings.position_embedding.weight
        x = embedded_patches(embeddings.patch_embedding, pixels)
        return x + resampled_positions(own, self._grid, grid, prefix=0, method=self.positions).to(x.dtype)

    def _blocks(self) -> Sequence[Any]:
        return self._vision.encoder.layers

    def _run_block(self, block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        return call_layer(self._vision.encoder, block, x, mask)

    def _parts(self, block: Any) -> BlockParts | None:
        return layer_parts(block) if layer_runs_in_parts(block) else None

    def _checkpointed(self, block: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        # Layers of transformers checkpoint their own calls, which are bypassed here.
        return call_checkpointed(block, function, *arguments)

    def _norm(self, x: Tensor) -> Tensor:
        return self._vision.post_layernorm(x)

    def _pool(self, x: Tensor) -> Tensor:
        return self._vision.head(x)

    def _dense_features(self, x: Tensor) -> Tensor:
        head = self._vision.head
        attention = head.attention
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        if self.dense.head == "value":
            width = attention.embed_dim
            mixed = F.linear(x, weight[2 * width :], None if bias is None else bias[2 * width :])
        else:
            q, k, v = (split_heads(part, attention.num_heads) for part in F.linear(x, weight, bias).chunk(3, dim=-1))
            mixed = attend(q, k if self.dense.head == "token_probe" else q, v, attention_dropout(attention))
        return self._finish_head(mixed)

    def _finish_head(self, mixed: Tensor) -> Tensor:
        """Mixed values ``[B, N, W]`` through the rest of the pooling head, to the joint space."""
        head = self._vision.head
        out = head.attention.out_proj(mixed)
        return out + head.mlp(head.layernorm(out))

    def _dense_and_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        head = self._vision.head
        if self.dense.head != "value" or has_hooks(head, head.attention):
            return super()._dense_and_pool(x)
        # The probe mixes the same values, so both share the rest of the head.
        q, k, v = project_with_queries(head.attention, head.probe.expand(len(x), -1, -1), x)
        probed = attend(q, k, v, attention_dropout(head.attention))
        out = self._finish_head(torch.cat([probed, v.transpose(1, 2).flatten(2)], dim=1))
        return out[:, 1:], out[:, 0]

    def _unsupported_head_reason(self, head: str) -> str | None:
        attention = self._vision.head.attention
        wrapped: type | None = None
        if not is_plain_attention(attention):
            wrapped = type(attention)
        elif not isinstance(attention.out_proj, nn.Linear):
            wrapped = type(attention.out_proj)
        if wrapped is None:
            return None
        return (
            f"the attention of the pooling head contains a {wrapped.__module__}.{wrapped.__qualname__}, and what a "
            "wrapper adds there would reach only one of the pooled and the dense features; merge it first, or leave "
            "vision_model.head.attention out of its targets"
        )

    def _unmasked_last_block_reason(self) -> str | None:
        kind = getattr(getattr(self._vision, "config", None), "_attn_implementation", None) or "sdpa"
        if "flash" not in kind and "flex" not in kind:
            return None
        return (
            f"last_block='value' needs attention that takes a mask, and the image tower runs {kind!r}; build it with "
            "attn_implementation='sdpa'"
        )

    def _encode_text(self, ids: Tensor) -> Tensor:
        text = self._text
        *layers, last = text.encoder.layers
        parts = self._parts(last)
        if parts is None or has_hooks(text, text.encoder):
            return text(input_ids=ids).pooler_output
        x = text.embeddings(input_ids=ids)
        for layer in layers:
            x = self._run_block(layer, x, None)
        # The last position is pooled, padding or not, so the last layer computes only that one.
        positions = torch.full_like(ids[:, 0], ids.shape[1] - 1)
        return text.head(text.final_layer_norm(self._checkpointed(last, last_block_at, parts, x, positions)))

    def native_transform(self) -> ImageTransform:
        """The caller's ``preprocess``, or transformers' own for SigLIP: squashed to a square, nothing cropped."""
        own = image_processor(self._preprocess)
        return callable_transform(self._own_processor() if own is None else own)

    def _processor_sizes(self) -> dict[str, Any]:
        height, width = self._input_size
        return {"size": {"height": height, "width": width}}

    def _export_notes(self) -> list[str]:
        second = siglip_tokenizing.siglip2_tokenizer(self.tokenizer) is not None
        return [
            *(["Lower-case texts first, and keep their punctuation, as in SigLIP 2's training."] if second else []),
            f'Tokenise with padding="max_length", max_length={self._context_length}, truncation=True and '
            'padding_side="right": the text tower attends to every position and pools the last.',
        ]

    def lora_targets(self, tower: Tower) -> list[str]:
        """The four projections and both matrices of the MLP in every encoder layer.

        The pooling head is left out, because its ``nn.MultiheadAttention`` reads the weight of its output projection
        and ignores a wrapper. Queries and keys of the last image layer are left out where ``last_block="value"`` does
        not use them.
        """
        where = f"{TOWERS[tower]}.encoder.layers"
        layers: Any = self.model.get_submodule(where)
        targets = []
        for index in range(len(layers)):
            unused = tower == "image" and index == len(layers) - 1 and self.dense.last_block == "value"
            attention = ATTENTION_PARTS[2:] if unused else ATTENTION_PARTS
            targets += [f"{where}.{index}.self_attn.{name}" for name in attention]
            targets += [f"{where}.{index}.mlp.{name}" for name in MLP_PARTS]
        return targets
