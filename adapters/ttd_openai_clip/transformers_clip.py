"""The adapter for transformers' ``CLIPModel``, of version 4 or 5; transformers itself is not imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ttd_openai_clip.adapter import OpenAICLIPAdapter
from ttd_openai_clip.download import HubTokenizer
from ttd_openai_clip.preprocessing import image_processor
from ttd_openai_clip.structure import TRANSFORMERS_ATTENTION
from ttd_plugins.adapter import ExportedModel, ImageFeatures, Tower
from ttd_plugins.errors import TTDError, UnsupportedModelError
from ttd_plugins.toolkit.attention import has_hooks, split_heads
from ttd_plugins.toolkit.dense_modes import DenseMode
from ttd_plugins.toolkit.last_block import BlockParts, last_block, last_block_at
from ttd_plugins.toolkit.lora_targets import base_layer
from ttd_plugins.toolkit.text import takes_parameter

LEGACY_END = 2
"""Configurations from before transformers 4.31 name this id as the end token, and pool at the largest id instead."""

MASKABLE = (None, "eager", "sdpa")
"""Implementations of attention that take an additive mask."""

USED_BY_PATCHES: dict[str, tuple[str, ...]] = {
    "value": (),
    "plain": ("q_proj", "k_proj"),
    "qq": ("q_proj",),
    "kk": ("k_proj",),
    "qq+kk": ("q_proj", "k_proj"),
    "kk+window": ("k_proj",),
}
"""Which of queries and keys of the last block dense features depend on."""


class TransformersCLIPAdapter(OpenAICLIPAdapter):
    """transformers' ``CLIPModel``, seen through the contract.

    All layers but the last run as the library runs them; the last one runs here, through its own modules, and for texts
    at the end token alone. A text tower that somebody watches, or whose attention takes no mask, is the library's.
    """

    _tower_prefixes = {  # noqa: RUF012
        "image": ("vision_model.", "visual_projection."),
        "text": ("text_model.", "text_projection."),
    }

    # What the container says ---------------------------------------------------------------------------------------

    @property
    def _vision(self) -> Any:
        return self.model.vision_model

    @property
    def _text(self) -> Any:
        return self.model.text_model

    def _embedding_widths(self) -> tuple[int, int]:
        image, text = (base_layer(p) for p in (self.model.visual_projection, self.model.text_projection))  # type: ignore[arg-type]
        return int(image.out_features), int(text.out_features)  # type: ignore[arg-type]

    @property
    def _patch_size(self) -> tuple[int, int]:
        height, width = self._vision.embeddings.patch_embedding.kernel_size
        return height, width

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
    def _context_length(self) -> int:
        return int(self._text.embeddings.position_embedding.weight.shape[0])

    @property
    def _vocabulary(self) -> int:
        return int(self._text.embeddings.token_embedding.weight.shape[0])

    def _end_positions(self, ids: Tensor) -> Tensor:
        end = getattr(self._text, "eos_token_id", LEGACY_END)
        if end == LEGACY_END:
            return ids.argmax(dim=-1)
        found = ids == end
        return torch.where(found.any(dim=-1), found.int().argmax(dim=-1), -1)

    def _refusal_of_mode(self, mode: DenseMode) -> str | None:
        attention = self._vision.encoder.layers[-1].self_attn
        if all(hasattr(attention, name) for name in (*TRANSFORMERS_ATTENTION, "num_heads")):
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
            # Newer versions' layers checkpoint themselves; before that their encoder did.
            own = hasattr(layer, "gradient_checkpointing")
            x = _run(_call_layer, layer, x, checkpointed=not own and _checkpoints(vision.encoder))
        checkpointed = _checkpoints(last) or _checkpoints(vision.encoder)
        trained, patches = _run(last_block, _parts(last), x, self.dense, grid, checkpointed=checkpointed)
        project: Any = self.model.visual_projection
        dense = project(vision.post_layernorm(patches)).unflatten(1, grid)
        return ImageFeatures(dense, project(vision.post_layernorm(trained[:, 0])) if pooled else None)

    def _embed(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens ``[B, 1 + P, W]``, the class token first."""
        embeddings = self._vision.embeddings
        x = embeddings.patch_embedding(pixels.to(embeddings.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        class_token = embeddings.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([class_token, x], dim=1)
        own: Tensor = embeddings.position_embedding.weight
        if grid == self._grid:
            positions = own
        elif hasattr(embeddings, "interpolate_pos_encoding"):
            # The library's own resampling, as get_image_features(..., interpolate_pos_encoding=True) has it.
            positions = embeddings.interpolate_pos_encoding(x, pixels.shape[2], pixels.shape[3])
        else:
            positions = self._positions(own, grid)
        return x + positions.to(x.dtype)

    def _encode_text(self, ids: Tensor) -> Tensor:
        text = self._text
        *layers, last = text.encoder.layers
        if not _in_parts(last) or has_hooks(text, text.encoder) or _attention_kind(text) not in MASKABLE:
            return self._library_text(ids)
        x = text.embeddings(input_ids=ids)
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        for layer in layers:
            own = hasattr(layer, "gradient_checkpointing")
            x = _run(_call_layer, layer, x, mask[None, None], checkpointed=not own and _checkpoints(text.encoder))
        # Where there is no end token the library pools the first.
        positions = self._end_positions(ids).clamp_min(0)
        checkpointed = _checkpoints(last) or _checkpoints(text.encoder)
        pooled = _run(last_block_at, _parts(last), x, positions, mask, checkpointed=checkpointed)
        project: Any = self.model.text_projection
        return project(text.final_layer_norm(pooled))

    def _library_text(self, ids: Tensor) -> Tensor:
        model: Any = self.model
        out = model.get_text_features(input_ids=ids)
        if isinstance(out, Tensor):
            return out
        # Version 5 gives an output object, or a plain tuple if its configuration says so.
        return out[1] if isinstance(out, tuple) else out.pooler_output

    def export(self, folder: Path) -> ExportedModel:
        """Write the folder of transformers' ``save_pretrained``: model, image processor, and the tokenizer if known.

        Raises:
            UnsupportedModelError: the model is of no class of transformers.
            MissingDependencyError: transformers is not installed.
        """
        from ttd_openai_clip.library import import_transformers
        from ttd_plugins.toolkit.transformers_export import export_transformers

        transformers = import_transformers()
        own = image_processor(self._preprocess)
        if not hasattr(own, "save_pretrained"):
            height, width = self.description.image_size
            own = transformers.CLIPImageProcessor(
                size={"shortest_edge": max(height, width)},
                crop_size={"height": height, "width": width},
                image_mean=list(self._normalisation.mean),
                image_std=list(self._normalisation.std),
                resample=2 if self._normalisation.interpolation == "bilinear" else 3,
            )
        tokenizer, notes = self.tokenizer, []
        if isinstance(tokenizer, HubTokenizer):
            try:
                tokenizer = tokenizer.load()
            except TTDError as error:
                tokenizer = None
                notes.append(f"The tokenizer could not be fetched ({error}).")
        return export_transformers(
            self, folder, transformers=transformers, tokenizer=tokenizer, processor=own, notes=tuple(notes)
        )

    # Training ------------------------------------------------------------------------------------------------------

    def lora_targets(self, tower: Tower) -> list[str]:
        """The projections of attention and both matrices of the MLP in every block.

        In the last image block only what dense features depend on: its queries and keys as far as the dense mode uses
        them (the value modes use neither), and its MLP where the mode keeps it.
        """
        where = "vision_model" if tower == "image" else "text_model"
        encoder: Any = self.model.get_submodule(f"{where}.encoder")
        targets = []
        for index in range(len(encoder.layers)):
            projections = ["q_proj", "k_proj", "v_proj", "out_proj"]
            matrices = ["fc1", "fc2"]
            if tower == "image" and index == len(encoder.layers) - 1:
                used = USED_BY_PATCHES[self.dense.attention]
                projections = [name for name in projections if name not in ("q_proj", "k_proj") or name in used]
                matrices = matrices if self.dense.ffn else []
            prefix = f"{where}.encoder.layers.{index}"
            targets += [f"{prefix}.self_attn.{name}" for name in projections]
            targets += [f"{prefix}.mlp.{name}" for name in matrices]
        return targets


def _parts(layer: Any) -> BlockParts:
    attention = layer.self_attn

    def project(asking: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = attention.q_proj(asking), attention.k_proj(x), attention.v_proj(x)
        heads = attention.num_heads
        return split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)

    return BlockParts(
        norm=layer.layer_norm1,
        project=project,
        finish=lambda mixed, _: attention.out_proj(mixed),
        feed_forward=lambda tokens: layer.mlp(layer.layer_norm2(tokens)),
        dropout=float(attention.dropout) if attention.training else 0.0,
    )


def _in_parts(layer: Any) -> bool:
    """Whether a layer may be run part by part: its projections have names, and nobody watches its calls."""
    attention = layer.self_attn
    known = all(hasattr(attention, name) for name in (*TRANSFORMERS_ATTENTION, "num_heads"))
    return known and not has_hooks(layer, attention)


def _attention_kind(tower: Any) -> str | None:
    return getattr(getattr(tower, "config", None), "_attn_implementation", None)


def _call_layer(layer: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    # Version 4 wants a causal mask by position and gives a tuple.
    masks = (None, mask) if takes_parameter(layer.forward, "causal_attention_mask") else (mask,)
    out = layer(x, *masks)
    return out[0] if isinstance(out, tuple) else out


def _checkpoints(module: Any) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled())


def _run(function: Callable[..., Any], *arguments: Any, checkpointed: bool) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False) if checkpointed else function(*arguments)
