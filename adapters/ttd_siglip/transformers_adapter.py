"""The adapter for transformers' ``SiglipModel``, which serves SigLIP and the fixed-resolution SigLIP 2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ttd_plugins.adapter import ExportedModel, ImageTransform, Tower
from ttd_plugins.toolkit.attention import attention_dropout, has_hooks, is_plain_attention, project_some, split_heads
from ttd_plugins.toolkit.last_block import BlockParts, last_block_at
from ttd_plugins.toolkit.lora_targets import base_layer
from ttd_plugins.toolkit.transforms import NativeTransform
from ttd_siglip.adapter import SiglipAdapter
from ttd_siglip.dense import attend
from ttd_siglip.transforms import ProcessorTransform, image_processor

TOWERS = {"image": "vision_model", "text": "text_model"}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "out_proj"), ("fc1", "fc2")


class TransformersSiglipAdapter(SiglipAdapter):
    """``SiglipModel`` seen through the contract; position embeddings are resampled by the model's own method."""

    @property
    def _vision(self) -> Any:
        return self.model.vision_model

    @property
    def _text(self) -> Any:
        return self.model.text_model

    def _patch_size(self) -> tuple[int, int]:
        height, width = self._vision.embeddings.patch_embedding.kernel_size
        return int(height), int(width)

    def _input_size(self) -> tuple[int, int]:
        side = int(self._vision.embeddings.image_size)
        return side, side

    def _grid(self) -> tuple[int, int]:
        height, width = self._patch_size()
        side = self._input_size()[0]
        return side // height, side // width

    def _embedding_widths(self) -> tuple[int, int | None]:
        head: Any = base_layer(self._text.head)
        return int(self._vision.head.probe.shape[-1]), int(head.out_features)

    def _context_length(self) -> int:
        return int(self._text.embeddings.position_embedding.weight.shape[0])

    def _own_preprocessing(self) -> Mapping[str, Any] | None:
        return None

    # Features ------------------------------------------------------------------------------------------------------

    def _embed(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        return self._vision.embeddings(pixels, interpolate_pos_encoding=True)

    def _blocks(self) -> Sequence[Any]:
        return self._vision.encoder.layers

    def _run_block(self, block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        # By position: a reentrant checkpoint passes no gradient through keyword arguments.
        return block(x, None if mask is None else mask[None, None])

    def _parts(self, block: Any) -> BlockParts | None:
        attention = block.self_attn
        if not all(hasattr(attention, name) for name in (*ATTENTION, "num_heads")) or has_hooks(block, attention):
            return None

        def project(asking: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = attention.q_proj(asking), attention.k_proj(x), attention.v_proj(x)
            heads = attention.num_heads
            return split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)

        return BlockParts(
            norm=block.layer_norm1,
            project=project,
            finish=lambda mixed, _: attention.out_proj(mixed),
            feed_forward=lambda tokens: block.mlp(block.layer_norm2(tokens)),
            dropout=float(attention.dropout) if attention.training else 0.0,
        )

    def _checkpointed(self, block: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        # Layers of transformers checkpoint their own calls, which are passed by here.
        if getattr(block, "gradient_checkpointing", False) and block.training and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _norm(self, x: Tensor) -> Tensor:
        return self._vision.post_layernorm(x)

    def _pool(self, x: Tensor) -> Tensor:
        return self._vision.head(x)

    def _dense(self, x: Tensor) -> Tensor:
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
        """What the pooling head does with mixed values ``[B, N, W]``, which ends in the joint space."""
        head = self._vision.head
        out = head.attention.out_proj(mixed)
        return out + head.mlp(head.layernorm(out))

    def _dense_and_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        head = self._vision.head
        if self.dense.head != "value" or has_hooks(head, head.attention):
            return super()._dense_and_pool(x)
        # The probe's answer is mixed from the same values, and goes the same way from there.
        q, k, v = project_some(head.attention, head.probe.expand(len(x), -1, -1), x)
        answer = attend(q, k, v, attention_dropout(head.attention))
        out = self._finish_head(torch.cat([answer, v.transpose(1, 2).flatten(2)], dim=1))
        return out[:, 1:], out[:, 0]

    def _refusal_of_head_mode(self, head: str) -> str | None:
        attention = self._vision.head.attention
        wrapped: type | None = None
        if not is_plain_attention(attention):
            wrapped = type(attention)
        elif not isinstance(attention.out_proj, nn.Linear):
            wrapped = type(attention.out_proj)
        if wrapped is None:
            return None
        return (
            f"the attention of the pooling head holds a {wrapped.__module__}.{wrapped.__qualname__}, and what a "
            "wrapper adds there would reach only one of the pooled and the dense features; merge it first, or leave "
            "vision_model.head.attention out of its targets"
        )

    def _refusal_of_last_block(self) -> str | None:
        kind = getattr(getattr(self._vision, "config", None), "_attn_implementation", None) or "sdpa"
        if "flash" not in kind and "flex" not in kind:
            return None
        return (
            f"last_block='value' needs attention that takes a mask, and the image tower runs {kind!r}; build it with "
            "attn_implementation='sdpa'"
        )

    def encode_text(self, ids: Tensor) -> Tensor:
        """Text embeddings ``[N, D]``, not L2-normalised; padding is attended to, as in training.

        Args:
            ids: int64 ``[N, L]`` with L the context length.

        Raises:
            InputError: L is another length.
        """
        self._require_ids(ids)
        text = self._text
        *layers, last = text.encoder.layers
        parts = self._parts(last)
        if parts is None or has_hooks(text, text.encoder):
            return text(input_ids=ids).pooler_output
        x = text.embeddings(input_ids=ids)
        for layer in layers:
            x = self._run_block(layer, x, None)
        # The last position is pooled, padding or not, so the last layer asks for it alone.
        positions = torch.full_like(ids[:, 0], ids.shape[1] - 1)
        return text.head(text.final_layer_norm(self._checkpointed(last, last_block_at, parts, x, positions)))

    def native_transform(self) -> ImageTransform:
        """The caller's ``preprocess``, or transformers' own for SigLIP: squashed to a square, nothing cropped."""
        if self._preprocess is not None:
            own = image_processor(self._preprocess)
            return NativeTransform(ProcessorTransform(own) if hasattr(own, "image_mean") else own)
        return NativeTransform(ProcessorTransform(self._own_processor()))

    def _own_processor(self) -> Any:
        """transformers' image processor for SigLIP, with this model's size and normalisation."""
        from transformers import SiglipImageProcessor

        height, width = self._input_size()
        return SiglipImageProcessor(
            size={"height": height, "width": width},
            image_mean=list(self._normalisation.mean),
            image_std=list(self._normalisation.std),
            resample=2 if self._normalisation.interpolation == "bilinear" else 3,
        )

    def export(self, folder: Path) -> ExportedModel:
        """Write the folder of transformers' ``save_pretrained``: model, image processor, and the tokenizer if known.

        Raises:
            UnsupportedModelError: the model is of no class of transformers.
            MissingDependencyError: transformers is not installed.
        """
        from ttd_plugins.toolkit.transformers_export import export_transformers
        from ttd_siglip.library import import_transformers

        own = image_processor(self._preprocess)
        note = (
            f'Tokenise with padding="max_length", max_length={self._context_length()}, truncation=True and '
            'padding_side="right": the text tower looks at every position and pools the last.'
        )
        return export_transformers(
            self,
            folder,
            transformers=import_transformers(),
            tokenizer=self.tokenizer,
            processor=own if hasattr(own, "save_pretrained") else self._own_processor(),
            notes=(note,),
        )

    # Training ------------------------------------------------------------------------------------------------------

    def lora_targets(self, tower: Tower) -> list[str]:
        """The four projections and both matrices of the MLP in every encoder layer.

        The pooling head is left out: its ``nn.MultiheadAttention`` reads its output projection's weight past any
        wrapper. So are queries and keys of the last image layer where ``last_block="value"`` has no use for them.
        """
        where = f"{TOWERS[tower]}.encoder.layers"
        layers: Any = self.model.get_submodule(where)
        targets = []
        for index in range(len(layers)):
            unused = tower == "image" and index == len(layers) - 1 and self.dense.last_block == "value"
            attention = ATTENTION[2:] if unused else ATTENTION
            targets += [f"{where}.{index}.self_attn.{name}" for name in attention]
            targets += [f"{where}.{index}.mlp.{name}" for name in MLP]
        return targets

    def tower_parameters(self, tower: Tower) -> Iterable[tuple[str, nn.Parameter]]:
        """Named parameters of one tower; logit scale and bias belong to neither."""
        prefix = f"{TOWERS[tower]}."
        return ((name, parameter) for name, parameter in self.model.named_parameters() if name.startswith(prefix))
