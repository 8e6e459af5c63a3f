"""The adapters for models of the original ``clip`` package, which is never imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttd_openai_clip.adapter import OpenAICLIPAdapter
from ttd_openai_clip.original_export import export_original
from ttd_plugins.adapter import ExportedModel, ImageFeatures, Tower
from ttd_plugins.packed_texts import PackedTexts
from ttd_plugins.toolkit.attention import call_checkpointed, is_plain_attention, opaque_attention_reason
from ttd_plugins.toolkit.dense_modes import DenseMode
from ttd_plugins.toolkit.last_block import (
    BlockCalls,
    last_block,
    last_block_at,
    last_block_of_packed_texts,
    last_block_with_mask,
)
from ttd_plugins.toolkit.lora_targets import base_layer
from ttd_plugins.toolkit.modified_resnet import ModifiedResNetAdapter
from ttd_plugins.toolkit.position_embeddings import embedded_patches, with_class_token
from ttd_plugins.toolkit.residual_blocks import block_parts, feed_forward, residual_block_targets, runs_in_parts


class OriginalCLIPAdapter(OpenAICLIPAdapter):
    """Common to the original package's vision transformers and ResNets: the text tower, with the sequence first."""

    tower_prefixes = {  # noqa: RUF012
        "image": ("visual.",),
        "text": ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection"),
    }

    def _unsupported_reason(self, model: nn.Module) -> str | None:
        if isinstance(model, torch.jit.ScriptModule):
            return (
                "it is a TorchScript archive, whose parts cannot be run one by one; load it with clip.load(NAME, "
                "jit=False)"
            )
        return None

    @property
    def _visual(self) -> Any:
        return self.model.visual

    @property
    def _dtype(self) -> torch.dtype:
        return self._visual.conv1.weight.dtype

    @property
    def _context_length(self) -> int:
        return int(self.model.positional_embedding.shape[0])

    @property
    def _vocabulary(self) -> int:
        return int(self.model.token_embedding.weight.shape[0])

    @property
    def _text_width(self) -> int:
        return int(self.model.text_projection.shape[1])

    @property
    def _text_blocks(self) -> Any:
        return self.model.transformer.resblocks

    @property
    def _text_needs_full_context(self) -> bool:
        return any(block.attn_mask is None or block.attn_mask.ndim != 2 for block in self._text_blocks)

    def _end_positions(self, ids: Tensor) -> Tensor:
        return ids.argmax(dim=-1)

    def _encode_text(self, ids: Tensor) -> Tensor:
        model = self.model
        length = ids.shape[1]
        x = model.token_embedding(ids).to(self._dtype) + model.positional_embedding[:length].to(self._dtype)
        x = x.transpose(0, 1)
        *blocks, last = self._text_blocks
        for block in blocks:
            x = call_checkpointed(model.transformer, _run_block, block, x, _text_mask(block, x))
        mask = _text_mask(last, x)
        in_parts = runs_in_parts(last) and (mask is None or mask.ndim == 2)
        run = _run_last_block if in_parts else _run_last_block_as_module
        return self._project_text(call_checkpointed(model.transformer, run, last, x, mask, ids.argmax(dim=-1)))

    def _project_text(self, pooled: Tensor) -> Tensor:
        return self.model.ln_final(pooled).to(self._dtype) @ self.model.text_projection

    def pooling_positions(self, ids: Tensor) -> Tensor | None:
        """The pooled position of each row; ``None`` if the text tower is not causal."""
        attention = base_layer(self._text_blocks[-1].attn)
        packs = not self._text_needs_full_context and hasattr(attention, "num_heads")
        return self._end_positions(ids) if packs else None

    def encode_packed_texts(self, packed: PackedTexts) -> Tensor:
        """Text embeddings ``[N, D]`` of packed texts, not L2-normalised."""
        model = self.model
        positions = F.embedding(packed.positions, model.positional_embedding)
        x = (model.token_embedding(packed.ids).to(self._dtype) + positions.to(self._dtype)).transpose(0, 1)
        *blocks, last = self._text_blocks
        mask = packed.additive_mask(x.dtype, int(base_layer(last.attn).num_heads))  # type: ignore[arg-type]
        for block in blocks:
            x = call_checkpointed(model.transformer, _run_block, block, x, mask)
        return self._project_text(call_checkpointed(model.transformer, _run_last_block_packed, last, x, mask, packed))

    def _text_targets(self) -> list[str]:
        return residual_block_targets(self._text_blocks, "transformer.resblocks", _wraps_whole)

    def tower_blocks(self, tower: Tower) -> list[nn.Module]:
        """The image blocks. A text block stores the mask of the full context, so its parts are called instead."""
        return [] if tower == "text" else super().tower_blocks(tower)

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Set the attribute ``grad_checkpointing``, since the package has no switch of its own; see the contract."""
        for part in (self.model.transformer, getattr(self._visual, "transformer", self._visual)):
            part.grad_checkpointing = enabled

    def lora_layers(self) -> Mapping[type[nn.Module], type[nn.Module]]:
        """The toolkit's LoRA layer for ``nn.MultiheadAttention``, which never writes a base weight; needs peft."""
        from ttd_plugins.toolkit.attention_lora import LoRAMultiheadAttention

        return {nn.MultiheadAttention: LoRAMultiheadAttention}

    def export(self, folder: Path) -> ExportedModel:
        """Write a state dict for the original package's ``build_model``, as safetensors.

        ``build_model`` reads sizes from the tensors, assumes heads of 64 channels, and casts most weights to float16.
        Its assumptions are checked first.

        Raises:
            UnsupportedModelError: ``build_model`` would build a different model.
        """
        return export_original(self, folder)


class OriginalViTAdapter(OriginalCLIPAdapter):
    """The original package's ``CLIP`` with a vision transformer.

    Its blocks take tokens with the sequence first; here only calls of its modules do.
    """

    def _embedding_widths(self) -> tuple[int, int]:
        projection = getattr(self._visual, "proj", None)
        return (self._visual.conv1.out_channels if projection is None else projection.shape[1]), self._text_width

    @property
    def _patch_size(self) -> tuple[int, int]:
        height, width = self._visual.conv1.kernel_size
        return height, width

    @property
    def _grid(self) -> tuple[int, int]:
        height, width = self._patch_size
        return self._visual.input_resolution // height, self._visual.input_resolution // width

    def _unsupported_mode_reason(self, mode: DenseMode) -> str | None:
        attention = self._visual.transformer.resblocks[-1].attn
        if not mode.needs_explicit_qkv or is_plain_attention(attention) or hasattr(attention, "project_qkv"):
            return None
        return opaque_attention_reason(attention)

    def _encode_image(self, pixels: Tensor, grid: tuple[int, int], pooled: bool) -> ImageFeatures:
        visual = self._visual
        *blocks, last = visual.transformer.resblocks
        x = self._embed(pixels, grid).transpose(0, 1)
        for block in blocks:
            x = call_checkpointed(visual.transformer, block, x)
        x = x.transpose(0, 1)
        trained, patches = call_checkpointed(visual.transformer, _run_last_image_block, last, x, self.dense, grid)
        dense = self._project(visual.ln_post(patches)).unflatten(1, grid)
        return ImageFeatures(dense, self._project(visual.ln_post(trained[:, 0])) if pooled else None)

    def _embed(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens ``[B, 1 + P, W]`` that enter the first block, the class token first."""
        visual = self._visual
        positions = self._positions(visual.positional_embedding, grid)
        x = with_class_token(embedded_patches(visual.conv1, pixels), visual.class_embedding, positions)
        return visual.ln_pre(x)

    def _project(self, tokens: Tensor) -> Tensor:
        projection = getattr(self._visual, "proj", None)
        return tokens if projection is None else tokens @ projection

    def lora_targets(self, tower: Tower) -> list[str]:
        """Attention (whole) and both matrices of the MLP in every block.

        The MLP of the last image block is left out where the dense mode leaves out the FFN.
        """
        if tower == "text":
            return self._text_targets()
        blocks = self._visual.transformer.resblocks
        return residual_block_targets(blocks, "visual.transformer.resblocks", _wraps_whole, last_mlp=self.dense.ffn)


class OriginalResNetAdapter(ModifiedResNetAdapter, OriginalCLIPAdapter):
    """The original package's ``CLIP`` with a modified ResNet."""

    def _embedding_widths(self) -> tuple[int, int]:
        return self._embedding_width(), self._text_width

    def lora_targets(self, tower: Tower) -> list[str]:
        """The value and output projections of the attention pool; attention (whole) and the MLP of every text block."""
        return self._text_targets() if tower == "text" else self._image_targets()


def _run_block(block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """Output of a block of the package for ``x`` ``[L, N, W]``; a mask is ``[L, L]`` or ``[N * heads, L, L]``."""
    normed = block.ln_1(x)
    x = x + block.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
    return x + block.mlp(block.ln_2(x))


def _text_mask(block: Any, x: Tensor) -> Tensor | None:
    """A block's mask, cut to the length of ``x`` ``[L, N, W]``."""
    mask = block.attn_mask
    return None if mask is None else mask[: len(x), : len(x)].to(dtype=x.dtype, device=x.device)


def _run_last_block(block: Any, x: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """Output tokens ``[N, W]`` of a block for ``x`` ``[L, N, W]``, at one position per row."""
    return last_block_at(block_parts(block), x.transpose(0, 1), positions, mask)


def _run_last_block_packed(block: Any, x: Tensor, mask: Tensor, packed: PackedTexts) -> Tensor:
    """Output tokens ``[N, W]`` of a block for ``x`` ``[L, R, W]``, with a mask ``[R * heads, L, L]``."""
    if not runs_in_parts(block):
        return packed.pooled(_run_block(block, x, mask).transpose(0, 1))
    heads = len(mask) // x.shape[1]
    return last_block_of_packed_texts(block_parts(block), x.transpose(0, 1), packed, mask[::heads])


def _run_last_block_as_module(block: Any, x: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """:func:`_run_last_block` by a call of the block's own attention."""
    return _run_block(block, x, mask).transpose(0, 1)[torch.arange(x.shape[1], device=x.device), positions]


def _run_last_image_block(block: Any, x: Tensor, mode: DenseMode, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """:func:`ttd_plugins.toolkit.last_block.last_block` for ``x`` ``[B, 1 + P, W]``."""
    if mode.needs_explicit_qkv or runs_in_parts(block):
        return last_block(block_parts(block), x, mode, grid)

    def attention_branch(tokens: Tensor, mask: Tensor | None) -> Tensor:
        normed = block.ln_1(tokens).transpose(0, 1)
        return block.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0].transpose(0, 1)

    calls = BlockCalls(attention_branch, feed_forward=lambda tokens: feed_forward(block, tokens))
    return last_block_with_mask(calls, x, mode)


def _wraps_whole(attention: nn.Module) -> bool:
    return True
