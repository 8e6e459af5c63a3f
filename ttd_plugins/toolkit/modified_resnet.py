"""The image tower of OpenAI's ResNets, which pools by attention, as the original package and open_clip build it.

The two libraries differ in the names of the activations and in the dtype of mixed precision only. The parts of the
trunk run one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttd_plugins.adapter import ImageFeatures
from ttd_plugins.toolkit.attention import call_checkpointed, split_heads
from ttd_plugins.toolkit.clip_adapter import CLIPAdapter
from ttd_plugins.toolkit.dense_modes import PRESETS, DenseMode
from ttd_plugins.toolkit.lora_targets import base_layer
from ttd_plugins.toolkit.position_embeddings import resampled_positions

STRIDE = 32
TRUNK = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "avgpool", "layer1", "layer2", "layer3", "layer4", "attnpool")
ATTENTION_POOL = ("positional_embedding", "q_proj", "k_proj", "v_proj", "c_proj", "num_heads")


def is_modified_resnet(visual: object) -> bool:
    """Whether an image tower has the parts of a modified ResNet."""
    pool = getattr(visual, "attnpool", None)
    return all(hasattr(visual, name) for name in TRUNK) and all(hasattr(pool, name) for name in ATTENTION_POOL)


class ModifiedResNetAdapter(CLIPAdapter):
    """A CLIP model whose ``visual`` is a modified ResNet; subclasses add the text tower of their library.

    Dense features are the value path of the attention pool, cell by cell and without its position embedding, as in
    MaskCLIP (arXiv 2112.01071). Batch norms use their running statistics in train mode too: images do not influence
    each other and no buffer changes, while weights and biases are trained as usual.
    """

    default_mode = "value_only"
    # The libraries pass the weights of the attention pool to a function.
    lora_needs_adapter = True

    @property
    def _resnet(self) -> Any:
        return self.model.visual

    def _embedding_width(self) -> int:
        projection: Any = base_layer(self._resnet.attnpool.c_proj)
        return int(projection.out_features)

    @property
    def _patch_size(self) -> tuple[int, int]:
        return STRIDE, STRIDE

    @property
    def _grid(self) -> tuple[int, int]:
        side = round((len(self._resnet.attnpool.positional_embedding) - 1) ** 0.5)
        return side, side

    def _unsupported_mode_reason(self, mode: DenseMode) -> str | None:
        if mode == PRESETS["value_only"]:
            return None
        return (
            "the image tower is a ResNet, whose attention pool has only the value path: its cells were never trained "
            "to attend to each other, and it has no residual connection and no feed-forward network"
        )

    def tower_blocks(self, tower: Any) -> list[nn.Module]:
        """The text blocks; none for the image tower, whose trunk runs part by part."""
        return [] if tower == "image" else super().tower_blocks(tower)

    def _encode_image(self, pixels: Tensor, grid: tuple[int, int], pooled: bool) -> ImageFeatures:
        pool = self._resnet.attnpool
        cells = feature_map(self._resnet, pixels).flatten(2).transpose(1, 2)
        dense = pool.c_proj(pool.v_proj(cells)).unflatten(1, grid)
        return ImageFeatures(dense, self._pool_cells(cells, grid) if pooled else None)

    def _pool_cells(self, cells: Tensor, grid: tuple[int, int]) -> Tensor:
        """The pooled embedding ``[B, D]``: the mean of the cells attends to itself and to all cells.

        The projections are called as modules, so that LoRA is included; the libraries pass their weights to a function.
        """
        pool = self._resnet.attnpool
        tokens = torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1)
        positions = resampled_positions(pool.positional_embedding, self._grid, grid, prefix=1, method=self.positions)
        tokens = tokens + positions.to(tokens.dtype)
        q, k, v = pool.q_proj(tokens[:, :1]), pool.k_proj(tokens), pool.v_proj(tokens)
        q, k, v = (split_heads(part, pool.num_heads) for part in (q, k, v))
        return pool.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, 0])

    def _image_targets(self) -> list[str]:
        """The value and output projections of the attention pool.

        Its queries and keys affect only the pooled embedding, so they are no targets; neither is the convolutional
        trunk.
        """
        return ["visual.attnpool.v_proj", "visual.attnpool.c_proj"]


def feature_map(visual: Any, pixels: Tensor) -> Tensor:
    """The feature map ``[B, C, height / 32, width / 32]`` that enters the attention pool."""
    x = pixels.to(visual.conv1.weight.dtype)
    for number in (1, 2, 3):
        convolved = getattr(visual, f"conv{number}")(x)
        x = _activation(visual, number)(_batch_norm(getattr(visual, f"bn{number}"), convolved))
    x = visual.avgpool(x)
    for layer in resnet_layers(visual):
        for bottleneck in layer:
            x = call_checkpointed(visual, _run_bottleneck, bottleneck, x)
    return x


def resnet_layers(visual: Any) -> list[Any]:
    """The four layers of a modified ResNet, each a list of bottlenecks."""
    return [visual.layer1, visual.layer2, visual.layer3, visual.layer4]


def _batch_norm(norm: Any, x: Tensor) -> Tensor:
    """Batch norm with its running statistics; computed in the dtype of the norm, returned in the dtype of ``x``."""
    if isinstance(norm, nn.Identity):
        # It was folded into the convolution.
        return x
    given = x.to(norm.weight.dtype)
    if not norm.training:
        # As a module, so that hooks see the call.
        out = norm(given)
    else:
        out = F.batch_norm(
            given, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
        )
    return out.to(x.dtype)


def _run_bottleneck(block: Any, x: Tensor) -> Tensor:
    """A bottleneck of the modified ResNet, strided by average pools before the last convolution and the shortcut."""
    out = _activation(block, 1)(_batch_norm(block.bn1, block.conv1(x)))
    out = _activation(block, 2)(_batch_norm(block.bn2, block.conv2(out)))
    out = _batch_norm(block.bn3, block.conv3(block.avgpool(out)))
    if block.downsample is not None:
        for step in block.downsample:
            x = _batch_norm(step, x) if hasattr(step, "running_mean") else step(x)
    return _activation(block, 3)(out + x)


def _activation(block: Any, number: int) -> Callable[[Tensor], Tensor]:
    """An activation by its name in open_clip, or in the releases of the original package."""
    names = (f"act{number}", f"relu{number}", "relu")
    return next(getattr(block, name) for name in names if hasattr(block, name))
