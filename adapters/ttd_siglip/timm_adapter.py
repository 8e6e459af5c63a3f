"""The adapter for open_clip's SigLIP models, whose image tower is a timm vision transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttd_plugins.adapter import ExportedModel, ImageTransform, Tower
from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.attention import has_hooks, is_plain_attention, run_blocks, split_heads
from ttd_plugins.toolkit.last_block import BlockParts
from ttd_plugins.toolkit.lora_targets import base_layer, linear_layers_of_blocks
from ttd_plugins.toolkit.position_embeddings import resampled_positions
from ttd_plugins.toolkit.text import takes_parameter
from ttd_plugins.toolkit.transforms import NativeTransform
from ttd_siglip.adapter import SiglipAdapter
from ttd_siglip.dense import attend

DEFAULT_CONTEXT_LENGTH = 64


class TimmSiglipAdapter(SiglipAdapter):
    """open_clip's ``CustomTextCLIP`` around a timm trunk, seen through the contract.

    The trunk's parts are run one by one with position embeddings that are resampled as timm does it, where timm itself
    would have to overwrite them (``set_input_size``). Patch dropout is never applied: a dropped patch has no place in
    the map.
    """

    @property
    def _visual(self) -> Any:
        return self.model.visual

    @property
    def _trunk(self) -> Any:
        return self._visual.trunk

    @property
    def _text(self) -> Any:
        return getattr(self.model, "text", self.model)

    def _patch_size(self) -> tuple[int, int]:
        height, width = self._trunk.patch_embed.proj.kernel_size
        return int(height), int(width)

    def _input_size(self) -> tuple[int, int]:
        height, width = self._trunk.patch_embed.img_size or self._visual.image_size
        return int(height), int(width)

    def _grid(self) -> tuple[int, int]:
        (height, width), (rows, columns) = self._input_size(), self._patch_size()
        return height // rows, width // columns

    def _embedding_widths(self) -> tuple[int, int | None]:
        return self._image_width(), self._text_width()

    def _image_width(self) -> int:
        head = getattr(self._visual, "head", None)
        projections = (getattr(head, "proj", None), getattr(getattr(head, "mlp", None), "fc2", None), self._trunk.head)
        for layer in projections:
            last: Any = base_layer(layer) if layer is not None else None
            if hasattr(last, "out_features"):
                return int(last.out_features)
        return int(self._trunk.attn_pool.out_features)

    def _text_width(self) -> int | None:
        if not self._has_native_text():
            return None
        projection = self._text.text_projection
        if projection is None:
            return int(self._text.token_embedding.weight.shape[1])
        last: Any = base_layer(projection) if isinstance(projection, nn.Module) else projection
        return int(last.out_features if isinstance(last, nn.Linear) else last.shape[1])

    def _has_native_text(self) -> bool:
        parts = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
        return all(hasattr(self._text, name) for name in parts) and hasattr(self._text.transformer, "resblocks")

    def _context_length(self) -> int:
        if self._has_native_text():
            return int(self._text.context_length)
        # A tower from transformers states its table of positions at most, so there the tokenizer decides.
        return int(getattr(self.tokenizer, "context_length", None) or DEFAULT_CONTEXT_LENGTH)

    def _own_preprocessing(self) -> Mapping[str, Any] | None:
        return getattr(self._visual, "preprocess_cfg", None)

    # Features ------------------------------------------------------------------------------------------------------

    def _embed(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        trunk = self._trunk
        convolution = trunk.patch_embed.proj
        x = convolution(pixels.to(convolution.weight.dtype)).flatten(2).transpose(1, 2)
        x = trunk.patch_embed.norm(x)
        if trunk.pos_embed is not None:
            x = x + resampled_positions(trunk.pos_embed[0], self._grid(), grid, prefix=0).to(x.dtype)
        return trunk.norm_pre(trunk.pos_drop(x))

    def _blocks(self) -> Sequence[Any]:
        return list(self._trunk.blocks)

    def _run_block(self, block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return run_blocks(self._trunk, block, x)
        return run_blocks(self._trunk, _run_masked, block, x, mask)

    def _parts(self, block: Any) -> BlockParts | None:
        attention = block.attn
        # Other blocks and attentions of timm compute something else with the same names.
        if (type(block).__name__, type(attention).__name__) != ("Block", "Attention") or has_hooks(block, attention):
            return None
        return block_parts(block)

    def _checkpointed(self, block: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        return run_blocks(self._trunk, function, *arguments)

    def _norm(self, x: Tensor) -> Tensor:
        return self._trunk.norm(x)

    def _pool(self, x: Tensor) -> Tensor:
        return self._project(self._trunk.attn_pool(x))

    def _project(self, x: Tensor) -> Tensor:
        """What follows the pooling head; nothing in the published SigLIP models."""
        trunk = self._trunk
        return self._visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(x))))

    def _dense(self, x: Tensor) -> Tensor:
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
        """What the pooling head does with mixed values ``[B, N, W]``, to the joint space."""
        pool = self._trunk.attn_pool
        out = pool.proj_drop(pool.proj(mixed))
        if pool.mlp is not None:
            out = out + pool.mlp(pool.norm(out))
        return self._project(out)

    def _dense_and_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pool = self._trunk.attn_pool
        if self.dense.head != "value" or pool.pool != "token" or has_hooks(pool):
            return super()._dense_and_pool(x)
        # The probe's answer is mixed from the same values, and goes the same way from there.
        k, v = pool.kv(x).chunk(2, dim=-1)
        q = split_heads(pool.q(pool.latent.expand(len(x), -1, -1)), pool.num_heads)
        k = pool.k_norm(split_heads(k, pool.num_heads))
        answer = attend(pool.q_norm(q), k, split_heads(v, pool.num_heads))[:, :1]
        out = self._finish_pool(torch.cat([answer, v], dim=1))
        return out[:, 1:], out[:, 0]

    def _refusal_of_head_mode(self, head: str) -> str | None:
        pool = self._trunk.attn_pool
        if head == "value" or getattr(base_layer(pool.q), "in_features", None) == self._trunk.embed_dim:
            return None
        return "the pooling head projects no queries of the width of a patch, so a patch cannot be its probe; use value"

    def _refusal_of_last_block(self) -> str | None:
        block = self._trunk.blocks[-1]
        if takes_parameter(block.forward, "attn_mask"):
            return None
        return f"last_block='value' needs a block that takes a mask, and {type(block).__name__} takes none; use plain"

    def encode_text(self, ids: Tensor) -> Tensor:
        """Text embeddings ``[N, D]``, not L2-normalised; padding is attended to, as in training.

        Args:
            ids: int64 ``[N, L]`` with L the context length.

        Raises:
            InputError: L is another length.
        """
        self._require_ids(ids)
        return text_tower.encode_text(self.model, ids)

    def native_transform(self) -> ImageTransform:
        """The caller's ``preprocess``, or open_clip's evaluation preprocessing, which squashes and crops nothing."""
        if self._preprocess is not None:
            return NativeTransform(self._preprocess)
        from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

        found = {
            "resize_mode": "squash",
            **(self._own_preprocessing() or {}),
            "mean": self._normalisation.mean,
            "std": self._normalisation.std,
            "interpolation": self._normalisation.interpolation,
            "size": self._input_size(),
        }
        config = PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), found))
        return NativeTransform(image_transform_v2(config, is_train=False))

    def export(self, folder: Path) -> ExportedModel:
        """Write the model as open_clip's own folder, which ``local-dir:PATH`` loads, if open_clip has its architecture.

        Raises:
            UnsupportedModelError: open_clip builds no such model.
            MissingDependencyError: open_clip is not installed.
        """
        from ttd_plugins.toolkit.open_clip_export import export_open_clip
        from ttd_siglip.library import import_open_clip

        return export_open_clip(
            self,
            folder,
            open_clip=import_open_clip(),
            tokenizer=self.tokenizer,
            normalisation=self._normalisation,
            default_resize_mode="squash",
        )

    # Training ------------------------------------------------------------------------------------------------------

    def lora_targets(self, tower: Tower) -> list[str]:
        """Image: ``qkv``, ``proj``, ``fc1`` and ``fc2`` of every block. Text: attention (whole) and both matrices of
        the MLP of every block; attention of open_clip's own kind at its output projection only. A text tower from
        transformers gives the linear layers of its blocks.
        """
        if tower == "image":
            return linear_layers_of_blocks(self._trunk.blocks, "visual.trunk.blocks")
        prefix = "text" if hasattr(self.model, "text") else ""
        if not self._has_native_text():
            return linear_layers_of_blocks(self._text, prefix)
        where = f"{prefix}.transformer.resblocks".lstrip(".")
        targets = []
        for index, block in enumerate(self._text.transformer.resblocks):
            whole = is_plain_attention(base_layer(block.attn))
            targets.append(f"{where}.{index}.attn" if whole else f"{where}.{index}.attn.out_proj")
            targets += [f"{where}.{index}.mlp.c_fc", f"{where}.{index}.mlp.c_proj"]
        return targets

    def lora_layers(self) -> Mapping[type[nn.Module], type[nn.Module]]:
        """Our own LoRA layer for ``nn.MultiheadAttention``, which leaves the base weights alone; needs peft."""
        from ttd_plugins.toolkit.attention_lora import LoRAMultiheadAttention

        return {nn.MultiheadAttention: LoRAMultiheadAttention}

    def tower_parameters(self, tower: Tower) -> Iterable[tuple[str, nn.Parameter]]:
        """Named parameters of one tower; logit scale and bias belong to neither."""
        for name, parameter in self.model.named_parameters():
            image = name.startswith("visual.")
            if image == (tower == "image") and not name.startswith("logit_"):
                yield name, parameter


def _run_masked(block: Any, x: Tensor, mask: Tensor) -> Tensor:
    return block(x, attn_mask=mask)


def block_parts(block: Any) -> BlockParts:
    """timm's ``Block`` around its ``Attention``, in parts."""
    attention = block.attn

    def project(asking: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(part, attention.num_heads) for part in attention.qkv(x).chunk(3, dim=-1))
        return attention.q_norm(q[:, :, : asking.shape[1]]), attention.k_norm(k), v

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
        dropout=float(attention.attn_drop.p) if attention.training else 0.0,
    )
