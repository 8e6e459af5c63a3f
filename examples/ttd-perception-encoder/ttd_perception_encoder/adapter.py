"""The adapter: dense features by the value path of the pooling head, and positions for other image sizes."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttd_perception_encoder import recognition
from ttd_plugins.adapter import Calibration, ImageFeatures, Tower
from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.attention import call_checkpointed
from ttd_plugins.toolkit.lora_targets import base_layer, linear_layers_of_blocks
from ttd_plugins.toolkit.open_clip_adapter import TimmViTAdapter
from ttd_plugins.toolkit.position_embeddings import embedded_patches, resampled_positions

# At a cosine of 0.25 the probability is 0.5, as in TCL. No published weights were measured; `ttd calibrate` fits one.
DEFAULT_CALIBRATION = Calibration(scale=10.0, shift=-2.5)


@dataclass(frozen=True)
class ValueMode:
    """The only dense mode: each patch passes through the pooling head by its own value."""

    name: str = "value"


class PerceptionEncoderAdapter(TimmViTAdapter):
    """``open_clip.CustomTextCLIP`` whose ``visual.trunk`` is a timm ``Eva`` with a pooling head (arXiv 2504.13181).

    In the pooling head one learned query attends to all tokens: the pooled embedding is a weighted mean of their
    values, then an output projection, an MLP with a residual connection, and the projection into the joint space. A
    patch feature is what the same head computes if the query attends to that patch alone. Its value then is the mean,
    and neither query nor keys matter.
    """

    family = "perception_encoder"
    modes = {"value": ValueMode()}  # noqa: RUF012
    default_mode = "value"
    default_resize_mode = "squash"
    export_failure = (
        "it passes only a trunk's name on to timm, and none of its own architectures has a trunk like this one"
    )
    recognition = recognition

    # What the model is ---------------------------------------------------------------------------------------------

    def _embedding_widths(self) -> tuple[int, int | None]:
        # open_clip's own projection follows the trunk's where an architecture has one.
        heads = [self._trunk.head, *self._visual.head.modules()]
        widths = [layer.out_features for layer in map(base_layer, heads) if isinstance(layer, nn.Linear)]
        width = widths[-1] if widths else self._trunk.attn_pool.out_features
        return int(width), text_tower.embedding_width(self.model)

    def _default_calibration(self) -> Calibration:
        return DEFAULT_CALIBRATION

    # Features ------------------------------------------------------------------------------------------------------

    def _encode_image(self, pixels: Tensor, grid: tuple[int, int], pooled: bool) -> ImageFeatures:
        trunk = self._trunk
        x, rope = self._embed(pixels, grid), self._rotary_embedding(grid)
        for block in trunk.blocks:
            x = call_checkpointed(trunk, block, x, rope)
        x = trunk.norm(x)
        patches = self._project(self._through_head(x[:, int(trunk.num_prefix_tokens) :]))
        # The query attends to the class token too.
        return ImageFeatures(patches.unflatten(1, grid), self._project(trunk.attn_pool(x)) if pooled else None)

    def _embed(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens ``[B, prefix + P, W]`` that enter the first block, class token first where there is one.

        The parts of the trunk are called one by one: as a whole it accepts one image size, and timm's
        ``set_input_size`` would overwrite the model's position embedding.
        """
        trunk = self._trunk
        x = trunk.patch_embed.norm(embedded_patches(trunk.patch_embed.proj, pixels))
        extra = [token.expand(len(x), -1, -1) for token in (trunk.cls_token, trunk.reg_token) if token is not None]
        has_own_positions = not trunk.no_embed_class
        if extra and has_own_positions:
            x = torch.cat([*extra, x], dim=1)
        if trunk.pos_embed is not None:
            prefix = int(trunk.num_prefix_tokens) if has_own_positions else 0
            positions = resampled_positions(trunk.pos_embed[0], self._grid, grid, prefix=prefix, method=self.positions)
            x = x + positions.to(x.dtype)
        if extra and not has_own_positions:
            x = torch.cat([*extra, x], dim=1)
        return trunk.norm_pre(trunk.pos_drop(x))

    def _rotary_embedding(self, grid: tuple[int, int]) -> Tensor | None:
        """Rotary positions of a grid, as after timm's ``set_input_size``: stretched over the grid of the training."""
        rope = self._trunk.rope
        if rope is None:
            return None
        if tuple(grid) == self._grid:
            return rope.get_embed()
        # The module has no parameters. A copy is resized, so that the model's own stays as it is.
        resized = copy.deepcopy(rope)
        resized.update_feat_shape(list(grid))
        return resized.get_embed()

    def _through_head(self, tokens: Tensor) -> Tensor:
        """What the pooling head computes for each of ``[B, P, W]`` tokens as if it were the only one."""
        pool = self._trunk.attn_pool
        _, value = pool.kv(tokens).chunk(2, dim=-1)
        x = pool.proj_drop(pool.proj(value))
        return x if pool.mlp is None else x + pool.mlp(pool.norm(x))

    def _project(self, x: Tensor) -> Tensor:
        """Pooled tokens to the joint space, by the layers of the trunk and of open_clip after the pooling head."""
        trunk = self._trunk
        return self._visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(x))))

    # Training ------------------------------------------------------------------------------------------------------

    def lora_targets(self, tower: Tower) -> list[str]:
        """Every linear layer in the blocks of the image tower; attention and MLP in the text tower.

        The pooling head is left out. Its queries and keys change the pooled embedding alone, so a LoRA on them would
        tune one kind of feature without the other.
        """
        if tower == "text":
            return text_tower.lora_targets(self.model)
        return linear_layers_of_blocks(self._trunk.blocks, "visual.trunk.blocks")
