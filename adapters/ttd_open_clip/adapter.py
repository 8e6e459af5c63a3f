"""The adapter for open_clip's native vision transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttd_open_clip.dense import is_plain_attention, last_block, refusal_by_hand, require_by_hand
from ttd_open_clip.structure import refusal_of_model
from ttd_open_clip.transforms import read_normalisation
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


class OpenCLIPAdapter(DenseAdapter):
    """A CLIP model with open_clip's own vision transformer, seen through the contract.

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
            model: ``open_clip.CLIP``, ``open_clip.CustomTextCLIP`` or an object built alike.
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
    def dense(self) -> DenseMode:
        """How dense features are made; set it to a preset's name or a :class:`DenseMode` to change it."""
        return self._dense

    @dense.setter
    def dense(self, value: str | DenseMode) -> None:
        mode = dense_mode(value)
        require_by_hand(self._visual.transformer.resblocks[-1].attn, mode)
        self._dense = mode

    def _embedding_widths(self) -> tuple[int, int | None]:
        projection = getattr(self._visual, "proj", None)
        width = self._visual.conv1.out_channels if projection is None else projection.shape[1]
        return width, text.embedding_width(self.model)

    @property
    def description(self) -> BackboneDescription:
        """What this backbone is."""
        visual = self._visual
        rows, columns = visual.grid_size
        height, width = visual.conv1.kernel_size
        by_hand = refusal_by_hand(visual.transformer.resblocks[-1].attn) is None
        return BackboneDescription(
            family="open_clip",
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
        visual = self._visual
        grid = self.patch_grid(pixels.shape[2], pixels.shape[3])
        *blocks, last = visual.transformer.resblocks
        x = self._embed(pixels, grid)
        for block in blocks:
            x = run_blocks(visual.transformer, block, x)
        averaged = pooled and getattr(visual, "pool_type", "tok") != "tok"
        trained, patches = run_blocks(visual.transformer, last_block, last, x, self.dense, grid, averaged)
        dense = self._project(visual.ln_post(patches)).unflatten(1, grid)
        if not pooled:
            return ImageFeatures(dense)
        if not averaged:
            return ImageFeatures(dense, self._project(visual.ln_post(trained)))
        if getattr(visual, "final_ln_after_pool", False):
            return ImageFeatures(dense, self._project(visual.ln_post(trained.mean(dim=1))))
        return ImageFeatures(dense, self._project(visual.ln_post(trained).mean(dim=1)))

    def _embed(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens ``[B, 1 + P, W]`` that enter the first block, the class token first."""
        visual = self._visual
        x = visual.conv1(pixels.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        class_token = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        positions = resampled_positions(visual.positional_embedding, visual.grid_size, grid, prefix=1)
        x = torch.cat([class_token, x], dim=1) + positions.to(x.dtype)
        return visual.ln_pre(x)

    def _project(self, tokens: Tensor) -> Tensor:
        projection = getattr(self._visual, "proj", None)
        return tokens if projection is None else tokens @ projection

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
        """Write the model as open_clip's own folder, which ``local-dir:PATH`` loads, tokenizer included.

        An architecture without a name is described by a configuration that is read off the model.

        Raises:
            UnsupportedModelError: open_clip builds no such model.
            MissingDependencyError: open_clip is not installed.
        """
        from ttd_open_clip.configuration import read_config
        from ttd_open_clip.library import import_open_clip
        from ttd_plugins.toolkit.open_clip_export import export_open_clip

        return export_open_clip(
            self,
            folder,
            open_clip=import_open_clip(),
            tokenizer=self.tokenizer,
            normalisation=self._normalisation,
            inferred=read_config(self.model),
        )

    # Training ------------------------------------------------------------------------------------------------------

    def lora_targets(self, tower: Tower) -> list[str]:
        """Attention (whole) and both matrices of the MLP in every block.

        Where the dense mode leaves out the FFN, so does this for the last block's. Attention with extras (norms on
        queries and keys, scaled heads) is wrapped at its output projection only. A text tower from transformers gives
        the linear layers of its blocks.
        """
        if tower == "text":
            return text.lora_targets(self.model, is_plain_attention)
        targets = []
        blocks = self._visual.transformer.resblocks
        for index, block in enumerate(blocks):
            prefix = f"visual.transformer.resblocks.{index}"
            whole = is_plain_attention(base_layer(block.attn))
            targets.append(f"{prefix}.attn" if whole else f"{prefix}.attn.out_proj")
            if self.dense.ffn or index < len(blocks) - 1:
                targets += [f"{prefix}.mlp.c_fc", f"{prefix}.mlp.c_proj"]
        return targets

    def lora_layers(self) -> Mapping[type[nn.Module], type[nn.Module]]:
        """Our own LoRA layers for self-attention, which leave the base weights alone; needs peft."""
        from ttd_open_clip.lora import LoRAOpenClipAttention
        from ttd_plugins.toolkit.attention_lora import LoRAMultiheadAttention

        layers: dict[type[nn.Module], type[nn.Module]] = {nn.MultiheadAttention: LoRAMultiheadAttention}
        for tower in (self._visual, text.text_module(self.model)):
            for block in getattr(getattr(tower, "transformer", None), "resblocks", []):
                if not isinstance(block.attn, nn.MultiheadAttention) and is_plain_attention(block.attn):
                    layers[type(block.attn)] = LoRAOpenClipAttention
        return layers

    def tower_parameters(self, tower: Tower) -> Iterable[tuple[str, nn.Parameter]]:
        """Named parameters of one tower; logit scale and bias, and a caption decoder, belong to neither."""
        for name, parameter in self.model.named_parameters():
            if name.startswith("visual."):
                owner: str | None = "image"
            elif name.startswith("text.") or (not hasattr(self.model, "text") and not name.startswith("logit_")):
                owner = "text"
            else:
                owner = None
            if owner == tower:
                yield name, parameter
