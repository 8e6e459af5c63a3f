"""The adapters for models of the original ``clip`` package, which is never imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttd_openai_clip.adapter import OpenAICLIPAdapter
from ttd_plugins.adapter import ExportedModel, ImageFeatures, Tower
from ttd_plugins.errors import UnsupportedModelError
from ttd_plugins.toolkit.attention import (
    attention_dropout,
    has_hooks,
    is_plain_attention,
    project_out,
    project_some,
    run_blocks,
)
from ttd_plugins.toolkit.dense_modes import PRESETS, DenseMode, diagonal_mask
from ttd_plugins.toolkit.last_block import BlockParts, last_block, last_block_at
from ttd_plugins.toolkit.lora_targets import base_layer

RESNET_STRIDE = 32


class OriginalCLIPAdapter(OpenAICLIPAdapter):
    """What the original package's two kinds of models share: the text tower, with the sequence first."""

    _tower_prefixes = {  # noqa: RUF012
        "image": ("visual.",),
        "text": ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection"),
    }

    def __init__(self, model: nn.Module, **options: Any) -> None:
        """Adapt ``model`` without changing it; the options are those of :class:`OpenAICLIPAdapter`.

        Raises:
            UnsupportedModelError: the model is a TorchScript archive, or as the base class says.
        """
        if isinstance(model, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                "this model is a TorchScript archive, whose parts cannot be run one by one; load it with "
                "clip.load(NAME, jit=False)"
            )
        super().__init__(model, **options)

    @property
    def _visual(self) -> Any:
        return self.model.visual

    @property
    def _dtype(self) -> torch.dtype:
        return self._visual.conv1.weight.dtype

    @property
    def _context_length(self) -> int:
        positions: Any = self.model.positional_embedding
        return int(positions.shape[0])

    @property
    def _vocabulary(self) -> int:
        embedding: Any = self.model.token_embedding
        return int(embedding.weight.shape[0])

    @property
    def _text_width(self) -> int:
        projection: Any = self.model.text_projection
        return int(projection.shape[1])

    @property
    def _text_blocks(self) -> Any:
        transformer: Any = self.model.transformer
        return transformer.resblocks

    @property
    def _text_after_end_matters(self) -> bool:
        return any(block.attn_mask is None or block.attn_mask.ndim != 2 for block in self._text_blocks)

    def _end_positions(self, ids: Tensor) -> Tensor:
        return ids.argmax(dim=-1)

    def _encode_text(self, ids: Tensor) -> Tensor:
        model: Any = self.model
        length = ids.shape[1]
        x = model.token_embedding(ids).to(self._dtype) + model.positional_embedding[:length].to(self._dtype)
        x = x.transpose(0, 1)
        *blocks, last = self._text_blocks
        for block in blocks:
            x = run_blocks(model.transformer, _run_block, block, x, _text_mask(block, x))
        mask = _text_mask(last, x)
        run: Any = _run_last_block if _in_parts(last) and (mask is None or mask.ndim == 2) else _run_whole_block
        pooled = run_blocks(model.transformer, run, last, x, mask, ids.argmax(dim=-1))
        return model.ln_final(pooled).to(self._dtype) @ model.text_projection

    def _text_targets(self) -> list[str]:
        return [
            f"transformer.resblocks.{index}.{name}"
            for index in range(len(self._text_blocks))
            for name in ("attn", "mlp.c_fc", "mlp.c_proj")
        ]

    def tower_blocks(self, tower: Tower) -> list[nn.Module]:
        """Those of images. Of texts none: each holds the mask of the full context, so that its parts are called."""
        return [] if tower == "text" else super().tower_blocks(tower)

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Set the attribute that stands for the switch which the package lacks; see the contract."""
        model: Any = self.model
        for part in (model.transformer, getattr(model.visual, "transformer", model.visual)):
            part.grad_checkpointing = enabled

    def lora_layers(self) -> Mapping[type[nn.Module], type[nn.Module]]:
        """Our own LoRA layer for ``nn.MultiheadAttention``, which leaves the base weights alone; needs peft."""
        from ttd_plugins.toolkit.attention_lora import LoRAMultiheadAttention

        return {nn.MultiheadAttention: LoRAMultiheadAttention}

    def export(self, folder: Path) -> ExportedModel:
        """Write a state dict that the original package's ``build_model`` takes, as safetensors.

        ``build_model`` reads sizes off the tensors, takes heads of 64 channels for granted, and casts most weights to
        float16; what it takes for granted is checked here.

        Raises:
            UnsupportedModelError: ``build_model`` would build another model.
        """
        from ttd_openai_clip.original_export import export_original

        return export_original(self, folder)


class OriginalViTAdapter(OriginalCLIPAdapter):
    """The original package's ``CLIP`` around a vision transformer.

    Its blocks take tokens with the sequence first; here only the calls of its modules do.
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

    def _refusal_of_mode(self, mode: DenseMode) -> str | None:
        attention = self._visual.transformer.resblocks[-1].attn
        if not mode.by_hand or is_plain_attention(attention) or hasattr(attention, "project_qkv"):
            return None
        kind = type(attention)
        return (
            f"the last block's attention is {kind.__module__}.{kind.__qualname__}, whose queries and keys cannot be "
            "had without losing what it adds to them"
        )

    def _encode_image(self, pixels: Tensor, grid: tuple[int, int], pooled: bool) -> ImageFeatures:
        visual = self._visual
        *blocks, last = visual.transformer.resblocks
        x = self._embed(pixels, grid).transpose(0, 1)
        for block in blocks:
            x = run_blocks(visual.transformer, block, x)
        run: Any = last_block if _in_parts(last) or self.dense.by_hand else _whole
        block = _parts(last) if run is last_block else last
        trained, patches = run_blocks(visual.transformer, run, block, x.transpose(0, 1), self.dense, grid)
        dense = self._project(visual.ln_post(patches)).unflatten(1, grid)
        return ImageFeatures(dense, self._project(visual.ln_post(trained[:, 0])) if pooled else None)

    def _embed(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens ``[B, 1 + P, W]`` that enter the first block, the class token first."""
        visual = self._visual
        x = visual.conv1(pixels.to(self._dtype)).flatten(2).transpose(1, 2)
        class_token = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([class_token, x], dim=1) + self._positions(visual.positional_embedding, grid).to(x.dtype)
        return visual.ln_pre(x)

    def _project(self, tokens: Tensor) -> Tensor:
        projection = getattr(self._visual, "proj", None)
        return tokens if projection is None else tokens @ projection

    def lora_targets(self, tower: Tower) -> list[str]:
        """Attention (whole) and both matrices of the MLP in every block.

        Where the dense mode leaves out the FFN, so does this for the last image block's.
        """
        if tower == "text":
            return self._text_targets()
        targets = []
        depth = len(self._visual.transformer.resblocks)
        for index in range(depth):
            prefix = f"visual.transformer.resblocks.{index}"
            targets.append(f"{prefix}.attn")
            if self.dense.ffn or index < depth - 1:
                targets += [f"{prefix}.mlp.c_fc", f"{prefix}.mlp.c_proj"]
        return targets


class OriginalResNetAdapter(OriginalCLIPAdapter):
    """The original package's ``CLIP`` around a modified ResNet.

    Dense features are the value path of the attention pool, cell by cell and without its position embedding, as in
    MaskCLIP (arXiv 2112.01071). The trunk is run here, part by part, with batch norms at their running statistics in
    either mode: images do not see each other and no buffer changes, while weights and biases are trained as ever.
    """

    default_dense = "value_only"
    # The original hands the weights of its attention pool to a function.
    lora_needs_adapter = True

    def _embedding_widths(self) -> tuple[int, int]:
        projection: Any = base_layer(self._visual.attnpool.c_proj)
        return int(projection.out_features), self._text_width

    @property
    def _patch_size(self) -> tuple[int, int]:
        return RESNET_STRIDE, RESNET_STRIDE

    @property
    def _grid(self) -> tuple[int, int]:
        side = self._visual.input_resolution // RESNET_STRIDE
        return side, side

    def _refusal_of_mode(self, mode: DenseMode) -> str | None:
        if mode == PRESETS["value_only"]:
            return None
        return (
            "the image tower is a ResNet, whose attention pool has the value path alone: its cells were never trained "
            "to ask for one another, and it has no skip and no feed-forward network"
        )

    def tower_blocks(self, tower: Tower) -> list[nn.Module]:
        """None: the trunk too is run part by part."""
        return []

    def _encode_image(self, pixels: Tensor, grid: tuple[int, int], pooled: bool) -> ImageFeatures:
        pool = self._visual.attnpool
        cells = self._trunk(pixels).flatten(2).transpose(1, 2)
        dense = pool.c_proj(pool.v_proj(cells)).unflatten(1, grid)
        return ImageFeatures(dense, self._pool(cells, grid) if pooled else None)

    def _trunk(self, pixels: Tensor) -> Tensor:
        """The feature map ``[B, C, H, W]`` that enters the attention pool."""
        visual = self._visual
        x = pixels.to(self._dtype)
        for number in (1, 2, 3):
            # Releases of the package differ in whether there is one activation or one for each convolution.
            activation = getattr(visual, f"relu{number}", None) or visual.relu
            x = activation(_batch_norm(getattr(visual, f"bn{number}"), getattr(visual, f"conv{number}")(x)))
        x = visual.avgpool(x)
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            for bottleneck in layer:
                x = run_blocks(visual, _run_bottleneck, bottleneck, x)
        return x

    def _pool(self, cells: Tensor, grid: tuple[int, int]) -> Tensor:
        """The pooled embedding ``[B, D]``: the mean of the cells attends to itself and to all of them.

        The projections are called as modules, where the original hands their weights to a function, so that LoRA is
        part of the result.
        """
        pool = self._visual.attnpool
        tokens = torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1)
        tokens = tokens + self._positions(pool.positional_embedding, grid).to(tokens.dtype)
        q, k, v = pool.q_proj(tokens[:, :1]), pool.k_proj(tokens), pool.v_proj(tokens)
        q, k, v = (t.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return pool.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, 0])

    def lora_targets(self, tower: Tower) -> list[str]:
        """The value and output projections of the attention pool; attention (whole) and the MLP of every text block.

        The pool's queries and keys act on the pooled embedding alone, so they are no targets; neither is the
        convolutional trunk.
        """
        return self._text_targets() if tower == "text" else ["visual.attnpool.v_proj", "visual.attnpool.c_proj"]


def _run_block(block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """A block of the original package, ``x`` being ``[L, N, W]``, with a mask of its own length."""
    normed = block.ln_1(x)
    x = x + block.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
    return x + block.mlp(block.ln_2(x))


def _text_mask(block: Any, x: Tensor) -> Tensor | None:
    """A block's mask, cut to the length of ``x`` ``[L, N, W]``."""
    mask = block.attn_mask
    return None if mask is None else mask[: len(x), : len(x)].to(dtype=x.dtype, device=x.device)


def _run_last_block(block: Any, x: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """Tokens ``[N, W]`` of a block at one position each."""
    return last_block_at(_parts(block), x.transpose(0, 1), positions, mask)


def _run_whole_block(block: Any, x: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """The same by a call of the block's own attention."""
    return _run_block(block, x, mask).transpose(0, 1)[torch.arange(x.shape[1], device=x.device), positions]


def _in_parts(block: Any) -> bool:
    """Whether the block may be run part by part: nothing in it is wrapped unknown, and nobody watches its calls."""
    attention = block.attn
    return (is_plain_attention(attention) or hasattr(attention, "project_qkv")) and not has_hooks(block, attention)


def _parts(block: Any) -> BlockParts:
    attention = block.attn
    return BlockParts(
        norm=block.ln_1,
        project=partial(project_some, attention),
        finish=lambda mixed, _: project_out(attention, mixed),
        feed_forward=lambda tokens: block.mlp(block.ln_2(tokens)),
        dropout=attention_dropout(attention),
    )


def _whole(block: Any, x: Tensor, mode: DenseMode, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The same by a call of the block's own attention, the value modes with a mask."""
    normed = block.ln_1(x).transpose(0, 1)
    mask = diagonal_mask(len(normed), normed) if mode.attention == "value" else None
    branch = block.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0].transpose(0, 1)
    trained = x[:, :1] + branch[:, :1]
    patches = branch[:, 1:] + x[:, 1:] if mode.residual else branch[:, 1:]
    trained = trained + block.mlp(block.ln_2(trained))
    return trained, patches + block.mlp(block.ln_2(patches)) if mode.ffn else patches


def _batch_norm(norm: Any, x: Tensor) -> Tensor:
    """Batch norm at its running statistics, in float32 where the map is in half precision and the norm is not."""
    out = F.batch_norm(
        x.to(norm.weight.dtype), norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )
    return out.to(x.dtype)


def _run_bottleneck(block: Any, x: Tensor) -> Tensor:
    """A bottleneck of the modified ResNet: strides are average pools before the last convolution and the shortcut."""
    out = _activation(block, 1)(_batch_norm(block.bn1, block.conv1(x)))
    out = _activation(block, 2)(_batch_norm(block.bn2, block.conv2(out)))
    out = _batch_norm(block.bn3, block.conv3(block.avgpool(out)))
    if block.downsample is not None:
        for step in block.downsample:
            x = _batch_norm(step, x) if hasattr(step, "running_mean") else step(x)
    return _activation(block, 3)(out + x)


def _activation(block: Any, number: int) -> Callable[[Tensor], Tensor]:
    return getattr(block, f"relu{number}", None) or block.relu
