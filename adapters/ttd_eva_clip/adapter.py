"""The adapter for CLIP models whose image tower is a timm EVA trunk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttd_eva_clip.dense import bias_is_added_outside, last_block, refusal_by_hand, require_by_hand, rotary_embedding
from ttd_eva_clip.structure import refusal_of_model
from ttd_eva_clip.transforms import read_normalisation
from ttd_plugins.adapter import (
    BackboneDescription,
    Calibration,
    DenseAdapter,
    ExportedModel,
    ImageFeatures,
    ImageTransform,
    Size,
    Tokens,
    Tower,
)
from ttd_plugins.errors import ImageSizeError, UnsupportedModelError
from ttd_plugins.toolkit import text_tower as text
from ttd_plugins.toolkit.attention import run_blocks
from ttd_plugins.toolkit.dense_modes import PRESETS, DenseMode, dense_mode
from ttd_plugins.toolkit.lora_targets import base_layer
from ttd_plugins.toolkit.position_embeddings import resampled_positions
from ttd_plugins.toolkit.tokenizing import RowTokenizer
from ttd_plugins.toolkit.transforms import DenseTransform, NativeTransform

# How much of the last block's queries and keys a patch takes part in, by what it attends to.
QUERIES_AND_KEYS = {
    "value": (),
    "plain": ("q", "k"),
    "qq": ("q",),
    "kk": ("k",),
    "qq+kk": ("q", "k"),
    "kk+window": ("k",),
}


class EvaCLIPAdapter(DenseAdapter):
    """A CLIP model with a timm EVA trunk, seen through the contract.

    The blocks are run here, and the last one gets its mask as an argument, so that gradient checkpointing works and
    nothing is left in the model. Patch dropout is never applied: a dropped patch has no place in the map.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        preprocess: Any = None,
        dense: str | DenseMode = "maskclip",
        calibration: Calibration | None = None,
        name: str | None = None,
        weights: str | None = None,
    ) -> None:
        """Adapt ``model`` without changing it.

        Args:
            model: ``open_clip.CustomTextCLIP`` whose ``visual.trunk`` is a timm ``Eva``, or an object built alike.
            tokenizer: called with a list of strings, gives token ids ``[N, context]``; ``None`` if texts are not
                going to be tokenised.
            preprocess: the model's evaluation preprocessing, or a mapping with ``mean`` and ``std``; by default what
                the model says itself.
            dense: how dense features are made, a name of ``PRESETS`` or a :class:`DenseMode`.
            calibration: map from cosine to probability; the contract's default where none is given.
            name, weights: names for the description.

        Raises:
            UnsupportedModelError: a part of the model cannot be served, with the reason.
            InputError: an option is unknown.
        """
        reason = refusal_of_model(model)
        if reason is not None:
            raise UnsupportedModelError(f"this {type(model).__name__} cannot be adapted: {reason}")
        super().__init__(model)
        self.tokenizer = tokenizer
        self._preprocess = None if isinstance(preprocess, Mapping) else preprocess
        self._normalisation = read_normalisation(self._visual, preprocess)
        self._calibration = calibration if calibration is not None else Calibration()
        self._name = name if name is not None else type(model).__name__
        self._weights = weights
        self.dense = dense_mode(dense)
        image_width, text_width = self._embedding_widths()
        if text_width is not None and image_width != text_width:
            raise UnsupportedModelError(
                f"this {type(model).__name__} cannot be adapted: image embeddings have width {image_width} and text "
                f"embeddings {text_width}, so they share no space"
            )

    # Description ---------------------------------------------------------------------------------------------------

    @property
    def _visual(self) -> Any:
        return self.model.visual

    @property
    def _trunk(self) -> Any:
        return self._visual.trunk

    @property
    def _grid(self) -> tuple[int, int]:
        rows, columns = self._trunk.patch_embed.grid_size
        return int(rows), int(columns)

    @property
    def dense(self) -> DenseMode:
        """How dense features are made; set it to a preset's name or a :class:`DenseMode` to change it."""
        return self._dense

    @dense.setter
    def dense(self, value: str | DenseMode) -> None:
        mode = dense_mode(value)
        require_by_hand(self._trunk.blocks[-1].attn, mode)
        self._dense = mode

    def _embedding_widths(self) -> tuple[int, int | None]:
        # open_clip's own head follows the trunk's where an architecture asks for a projection.
        heads = [self._trunk.head, *getattr(self._visual, "head", nn.Identity()).modules()]
        widths = [int(head.out_features) for head in heads if isinstance(base_layer(head), nn.Linear)]
        return widths[-1] if widths else int(self._trunk.embed_dim), text.embedding_width(self.model)

    @property
    def description(self) -> BackboneDescription:
        """What this backbone is."""
        trunk = self._trunk
        rows, columns = self._grid
        height, width = trunk.patch_embed.proj.kernel_size
        by_hand = refusal_by_hand(trunk.blocks[-1].attn) is None
        return BackboneDescription(
            family="eva_clip",
            model=self._name,
            weights=self._weights,
            embedding_width=self._embedding_widths()[0],
            patch_size=(height, width),
            image_size=(rows * height, columns * width),
            mean=self._normalisation.mean,
            std=self._normalisation.std,
            interpolation=self._normalisation.interpolation,
            context_length=text.context_length(self.model, self.tokenizer),
            text_needs_full_context=not text.can_trim(self.model),
            logits="softmax" if self.logit_bias() is None else "sigmoid",
            dense_mode=self.dense.name,
            dense_modes=tuple(name for name, mode in PRESETS.items() if by_hand or not mode.by_hand),
            calibration=self._calibration,
        )

    # Features ------------------------------------------------------------------------------------------------------

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        """Patch features in the joint space, and the library's pooled embedding, from one pass.

        Towers that average their patches need those of the last block twice when the pooled embedding is asked for, as
        trained and as the dense mode says; the two share what they can.

        Args:
            pixels: float ``[B, 3, height, width]``, normalised; cast to the dtype of the model.
            pooled: whether the pooled embedding is wanted too.

        Returns:
            Features that are not L2-normalised, in the dtype of the model.

        Raises:
            ImageSizeError: the size does not fit the patch grid.
            UnsupportedModelError: the attention of the last block was wrapped so that the dense mode is not sound.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ImageSizeError(f"pixels must have shape [images, 3, height, width], not {tuple(pixels.shape)}")
        trunk = self._trunk
        grid = self.patch_grid(pixels.shape[2], pixels.shape[3])
        prefix = int(trunk.num_prefix_tokens)
        *blocks, last = trunk.blocks
        x = self._embed(pixels, grid)
        ropes = self._ropes(grid)
        for block, rope in zip(blocks, ropes, strict=False):
            x = run_blocks(trunk, block, x, rope)
        averaged = pooled and trunk.global_pool != "token"
        trained, patches = run_blocks(trunk, last_block, last, x, ropes[-1], self.dense, grid, prefix, averaged)
        dense = self._project(trunk.norm(patches)).unflatten(1, grid)
        if not pooled:
            return ImageFeatures(dense)
        if not averaged:
            return ImageFeatures(dense, self._project(trunk.norm(trained[:, 0])))
        return ImageFeatures(dense, self._project(trunk.norm(trained).mean(dim=1)))

    def _embed(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens ``[B, prefix + P, W]`` that enter the first block, class and register tokens first."""
        trunk = self._trunk
        # The trunk's own patch_embed refuses other sizes, so its parts are called.
        x = trunk.patch_embed.proj(pixels.to(trunk.patch_embed.proj.weight.dtype)).flatten(2).transpose(1, 2)
        x = trunk.patch_embed.norm(x)
        extra = [trunk.cls_token, getattr(trunk, "reg_token", None)]
        tokens = [token.expand(len(x), -1, -1) for token in extra if token is not None]
        prefix = 0 if getattr(trunk, "no_embed_class", False) else int(trunk.num_prefix_tokens)
        own = trunk.pos_embed
        if own is not None:
            positions = resampled_positions(own[0], self._grid, grid, prefix=prefix).to(own.dtype)
            if prefix == 0:
                x = x + positions
            else:
                x = torch.cat([*tokens, x], dim=1) + positions
                tokens = []
        x = torch.cat([*tokens, x], dim=1) if tokens else x
        return trunk.norm_pre(trunk.pos_drop(x))

    def _ropes(self, grid: tuple[int, int]) -> list[Tensor | None]:
        """Rotary position embedding of the patches for each block."""
        trunk = self._trunk
        rope = rotary_embedding(trunk, grid)
        if rope is not None and getattr(trunk, "rope_mixed", False):
            return list(rope)
        return [rope] * len(trunk.blocks)

    def _project(self, tokens: Tensor) -> Tensor:
        trunk = self._trunk
        return getattr(self._visual, "head", nn.Identity())(trunk.head(trunk.head_drop(trunk.fc_norm(tokens))))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Text embeddings ``[N, D]``, not L2-normalised.

        Args:
            ids: int64 ``[N, L]``; L may be any length that keeps each row's end token, unless
                ``description.text_needs_full_context``.

        Raises:
            InputError: L is longer than the context, or shorter where every position matters.
        """
        return text.encode_text(self.model, ids)

    # Input ---------------------------------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokenise with the caller's tokenizer at the model's context length.

        A text counts as truncated if it fills the context and the tokenizer has more for it when given one position
        more. A tokenizer that takes no ``context_length`` and has no ``encode`` cannot be asked, so every text that
        fills the context counts.

        Raises:
            TTDError: no tokenizer was given, or it does not fit the model.
            InputError: ``texts`` is not a sequence of strings.
        """
        advice = "open_clip.get_tokenizer(NAME), NAME being the model's name"
        return RowTokenizer(self.tokenizer, self.model, self.description.name, advice).tokenize(texts)

    def dense_transform(self, size: Size | None = None) -> ImageTransform:
        """The whole image resized to ``size`` (height, width), antialiased, nothing cropped away, and normalised.

        Raises:
            ImageSizeError: the size does not fit the patch grid.
        """
        if size is None:
            size = self.description.image_size
        height, width = (size, size) if isinstance(size, int) else size
        self.patch_grid(height, width)
        return DenseTransform((height, width), self._normalisation)

    def native_transform(self) -> ImageTransform:
        """The caller's ``preprocess``, or open_clip's evaluation preprocessing for this model, which may crop."""
        if self._preprocess is not None:
            return NativeTransform(self._preprocess)
        from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

        own = getattr(self._visual, "preprocess_cfg", None) or {}
        found = {
            "mean": self._normalisation.mean,
            "std": self._normalisation.std,
            "interpolation": self._normalisation.interpolation,
            "size": self._visual.image_size,
        }
        config = PreprocessCfg(**merge_preprocess_dict(merge_preprocess_dict(PreprocessCfg(), own), found))
        return NativeTransform(image_transform_v2(config, is_train=False))

    # Logits --------------------------------------------------------------------------------------------------------

    def logit_scale(self) -> Tensor:
        """The exponentiated logit scale, a scalar tensor with gradient."""
        scale: Any = self.model.logit_scale
        return scale.exp().reshape(())

    def logit_bias(self) -> Tensor | None:
        """The logit bias of a model trained with a sigmoid loss, a scalar tensor, or ``None``."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.reshape(())

    def export(self, folder: Path) -> ExportedModel:
        """Write the model as open_clip's own folder, which ``local-dir:PATH`` loads, if open_clip has its architecture.

        open_clip passes nothing but a name on to timm, so a trunk of other sizes, such as that of ``eva_clip:tiny``,
        cannot be rebuilt by it.

        Raises:
            UnsupportedModelError: open_clip builds no such model.
            MissingDependencyError: open_clip is not installed.
        """
        from ttd_eva_clip.library import import_open_clip
        from ttd_plugins.toolkit.open_clip_export import export_open_clip

        return export_open_clip(
            self,
            folder,
            open_clip=import_open_clip(),
            tokenizer=self.tokenizer,
            normalisation=self._normalisation,
            why="it tells timm nothing but a trunk's name, and no architecture of its own has a trunk like this one",
        )

    # Training ------------------------------------------------------------------------------------------------------

    def lora_targets(self, tower: Tower) -> list[str]:
        """Every linear layer of attention and MLP in every block.

        Attention that multiplies by its fused weight itself, instead of calling the projection, is wrapped whole. Of
        the last block, what the dense mode does not use is left out: the FFN, and queries or keys where they are layers
        of their own.
        """
        if tower == "text":
            return text.lora_targets(self.model)
        targets: list[str] = []
        blocks = self._trunk.blocks
        for index, block in enumerate(blocks):
            where = f"visual.trunk.blocks.{index}"
            attention: Any = base_layer(block.attn)
            is_last = index == len(blocks) - 1
            if bias_is_added_outside(attention):
                targets.append(f"{where}.attn")
            else:
                used = QUERIES_AND_KEYS[self.dense.attention] if is_last else ("q", "k")
                parts = ["qkv"] if attention.qkv is not None else [f"{name}_proj" for name in (*used, "v")]
                targets += [f"{where}.attn.{name}" for name in (*parts, "proj")]
            if self.dense.ffn or not is_last:
                inner = block.mlp.named_children()
                targets += [f"{where}.mlp.{name}" for name, part in inner if isinstance(base_layer(part), nn.Linear)]
        return targets

    def lora_layers(self) -> Mapping[type[nn.Module], type[nn.Module]]:
        """Our own LoRA layers for attention that peft's cannot serve; they never write a base weight. Needs peft."""
        from ttd_eva_clip.lora import LoRAEvaAttention
        from ttd_plugins.toolkit.attention_lora import LoRAMultiheadAttention

        layers: dict[type[nn.Module], type[nn.Module]] = {nn.MultiheadAttention: LoRAMultiheadAttention}
        for block in self._trunk.blocks:
            attention = base_layer(block.attn)
            if bias_is_added_outside(attention):
                layers[type(attention)] = LoRAEvaAttention
        return layers

    def tower_parameters(self, tower: Tower) -> Iterable[tuple[str, nn.Parameter]]:
        """Named parameters of one tower; logit scale and bias belong to neither."""
        for name, parameter in self.model.named_parameters():
            if name.startswith("visual."):
                owner: str | None = "image"
            elif name.startswith("text.") or (not hasattr(self.model, "text") and not name.startswith("logit_")):
                owner = "text"
            else:
                owner = None
            if owner == tower:
                yield name, parameter
