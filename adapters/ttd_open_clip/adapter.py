"""The adapter for open_clip's native vision transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ttd_open_clip.base_adapter import OpenCLIPBaseAdapter
from ttd_open_clip.open_clip_blocks import is_plain_attention, opaque_qkv_reason, run_last_block
from ttd_open_clip.recognition import ImageTower
from ttd_plugins.adapter import ImageFeatures
from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.attention import call_checkpointed
from ttd_plugins.toolkit.dense_modes import DenseMode
from ttd_plugins.toolkit.position_embeddings import embedded_patches, resampled_positions, with_class_token
from ttd_plugins.toolkit.residual_blocks import residual_block_targets


class OpenCLIPAdapter(OpenCLIPBaseAdapter):
    """``open_clip.CLIP`` or ``CustomTextCLIP`` with open_clip's vision transformer, or an object of the same form."""

    image_tower: ClassVar[ImageTower] = "transformer"

    def _unsupported_mode_reason(self, mode: DenseMode) -> str | None:
        return opaque_qkv_reason(self._blocks[-1].attn) if mode.needs_explicit_qkv else None

    @property
    def _blocks(self) -> Any:
        return self._visual.transformer.resblocks

    @property
    def _grid(self) -> tuple[int, int]:
        rows, columns = self._visual.grid_size
        return rows, columns

    @property
    def _patch_size(self) -> tuple[int, int]:
        height, width = self._visual.conv1.kernel_size
        return height, width

    def _embedding_widths(self) -> tuple[int, int | None]:
        projection = getattr(self._visual, "proj", None)
        width = self._visual.conv1.out_channels if projection is None else projection.shape[1]
        return width, text_tower.embedding_width(self.model)

    def _encode_image(self, pixels: Tensor, grid: tuple[int, int], pooled: bool) -> ImageFeatures:
        visual = self._visual
        x = embedded_patches(visual.conv1, pixels)
        positions = resampled_positions(visual.positional_embedding, self._grid, grid, prefix=1, method=self.positions)
        x = visual.ln_pre(with_class_token(x, visual.class_embedding, positions))
        for block in self._blocks[:-1]:
            x = self._call_checkpointed(block, x)
        return self._encode_last_block(x, grid, pooled)

    def _call_checkpointed(self, function: Any, *arguments: Any) -> Any:
        return call_checkpointed(self._visual.transformer, function, *arguments)

    def _encode_last_block(self, x: Tensor, grid: tuple[int, int], pooled: bool) -> ImageFeatures:
        """Features from the tokens ``[B, 1 + P, W]`` that enter the last block."""
        visual = self._visual
        averaged = pooled and getattr(visual, "pool_type", "tok") != "tok"
        trained, patches = self._call_checkpointed(run_last_block, self._blocks[-1], x, self.dense, grid, averaged)
        dense = self._project(visual.ln_post(patches)).unflatten(1, grid)
        return ImageFeatures(dense, self._project(self._pool(trained, averaged)) if pooled else None)

    def _pool(self, trained: Tensor, averaged: bool) -> Tensor:
        """The pooled token ``[B, W]`` after the final norm, from tokens of the last block as trained."""
        norm = self._visual.ln_post
        if not averaged:
            return norm(trained[:, 0])
        if getattr(self._visual, "final_ln_after_pool", False):
            return norm(trained.mean(dim=1))
        return norm(trained).mean(dim=1)

    def _project(self, tokens: Tensor) -> Tensor:
        projection = getattr(self._visual, "proj", None)
        return tokens if projection is None else tokens @ projection

    def _image_targets(self) -> list[str]:
        """Attention (whole) and both matrices of the MLP in every block.

        The MLP of the last block is left out where the dense mode leaves out the FFN. Attention with extras is wrapped
        at its output projection only.
        """
        return residual_block_targets(
            self._blocks, "visual.transformer.resblocks", is_plain_attention, last_mlp=self.dense.ffn
        )
