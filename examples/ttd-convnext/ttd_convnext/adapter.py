"""The adapter for CLIP models whose image tower is a timm ConvNeXt: no class token, and no attention to replace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ttd_convnext.structure import refusal_of_model
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
from ttd_plugins.toolkit.lora_targets import base_layer
from ttd_plugins.toolkit.tokenizing import RowTokenizer
from ttd_plugins.toolkit.transforms import DenseTransform, NativeTransform, Normalisation, read_normalisation

# A cosine of 0.25 means one half, as in TCL; no published ConvNeXt was measured. `ttd calibrate` fits one's own.
DEFAULT_CALIBRATION = Calibration(scale=10.0, shift=-2.5)

# Where a model does not say how its pixels are normalised: the mean and std of OpenAI's CLIP, as open_clip has it.
DEFAULT_NORMALISATION = Normalisation(
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "bicubic"
)


class ConvNeXtAdapter(DenseAdapter):
    """A CLIP model with a timm ConvNeXt trunk, seen through the contract.

    The tower makes a feature map of 1/32 of the input's height and width, averages it, and sends the average through a
    head (LayerNorm, then one linear layer or an MLP) into the joint space. A patch feature is what the same head makes
    of one position of the map, as if the map were that position alone. Since the LayerNorm comes after the average,
    the pooled embedding is not the mean of the patch features.

    Stochastic depth acts while training, as in the library.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        preprocess: Any = None,
        calibration: Calibration | None = None,
        name: str | None = None,
        weights: str | None = None,
    ) -> None:
        """Adapt ``model`` without changing it.

        Args:
            model: ``open_clip.CLIP`` or ``CustomTextCLIP`` whose ``visual.trunk`` is a timm ``ConvNeXt``.
            tokenizer: called with a list of strings, gives token ids ``[N, context]``; ``None`` if texts are not
                going to be tokenised.
            preprocess: the model's evaluation preprocessing, or a mapping with ``mean`` and ``std``; by default what
                the model says itself.
            calibration: map from cosine to probability; :data:`DEFAULT_CALIBRATION` where none is given.
            name, weights: names for the description.

        Raises:
            UnsupportedModelError: a part of the model cannot be served, with the reason.
            InputError: ``preprocess`` does not say how it normalises.
        """
        reason = refusal_of_model(model)
        if reason is not None:
            raise UnsupportedModelError(f"this {type(model).__name__} cannot be adapted: {reason}")
        super().__init__(model)
        self.tokenizer = tokenizer
        self._preprocess = None if isinstance(preprocess, Mapping) else preprocess
        self._normalisation = read_normalisation(
            self._visual, preprocess, DEFAULT_NORMALISATION, "open_clip's preprocess_val"
        )
        self._calibration = calibration if calibration is not None else DEFAULT_CALIBRATION
        self._name = name if name is not None else type(model).__name__
        self._weights = weights

    # Description ---------------------------------------------------------------------------------------------------

    @property
    def _visual(self) -> Any:
        return self.model.visual

    def _embedding_width(self) -> int:
        heads = (self._visual.trunk.head, self._visual.head)
        layers = [base_layer(module) for head in heads for module in head.modules()]
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        return int(linear[-1].out_features if linear else self._visual.trunk.num_features)

    @property
    def description(self) -> BackboneDescription:
        """What this backbone is."""
        stride = int(self._visual.trunk.feature_info[-1]["reduction"])
        height, width = self._visual.image_size
        return BackboneDescription(
            family="convnext",
            model=self._name,
            weights=self._weights,
            embedding_width=self._embedding_width(),
            patch_size=(stride, stride),
            image_size=(int(height), int(width)),
            mean=self._normalisation.mean,
            std=self._normalisation.std,
            interpolation=self._normalisation.interpolation,
            context_length=text.context_length(self.model, self.tokenizer),
            text_needs_full_context=not text.can_trim(self.model),
            logits="softmax" if self.logit_bias() is None else "sigmoid",
            dense_mode="head",
            dense_modes=("head",),
            calibration=self._calibration,
        )

    # Features ------------------------------------------------------------------------------------------------------

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        """Patch features in the joint space, and the library's pooled embedding, from one pass.

        Args:
            pixels: float ``[B, 3, height, width]``, normalised; sides are multiples of the stride, square or not; cast
                to the dtype of the model.
            pooled: whether the pooled embedding is wanted too.

        Returns:
            Features that are not L2-normalised, in the dtype of the model.

        Raises:
            ImageSizeError: the size does not fit the stride.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ImageSizeError(f"pixels must have shape [images, 3, height, width], not {tuple(pixels.shape)}")
        rows, columns = self.patch_grid(pixels.shape[2], pixels.shape[3])
        trunk = self._visual.trunk
        features = trunk.forward_features(pixels.to(next(trunk.stem.parameters()).dtype))
        positions = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1], 1, 1)
        patches = self._head(positions).reshape(len(pixels), rows, columns, -1)
        return ImageFeatures(patches, self._head(features) if pooled else None)

    def _head(self, features: Tensor) -> Tensor:
        """Embeddings ``[N, D]`` of feature maps ``[N, C, H, W]``, by the library's own pooling, norm and projection."""
        return self._visual.head(self._visual.trunk.forward_head(features))

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

        Raises:
            TTDError: no tokenizer was given, or it does not fit the model.
            InputError: ``texts`` is not a sequence of strings.
        """
        advice = "open_clip.get_tokenizer(NAME), NAME being the model's name"
        return RowTokenizer(self.tokenizer, self.model, self.description.name, advice).tokenize(texts)

    def dense_transform(self, size: Size | None = None) -> ImageTransform:
        """The whole image resized to ``size`` (height, width), antialiased, nothing cropped away, and normalised.

        Raises:
            ImageSizeError: the size does not fit the stride.
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

    def export(self, folder: Path) -> ExportedModel:
        """Write the model as open_clip's own folder, which ``local-dir:PATH`` loads, if open_clip has its architecture.

        open_clip passes nothing but a name on to timm, so a trunk of other sizes, such as that of ``convnext:tiny``,
        cannot be rebuilt by it.

        Raises:
            UnsupportedModelError: open_clip builds no such model.
            MissingDependencyError: open_clip is not installed.
        """
        from ttd_convnext.family import import_open_clip
        from ttd_plugins.toolkit.open_clip_export import export_open_clip

        return export_open_clip(
            self,
            folder,
            open_clip=import_open_clip(),
            tokenizer=self.tokenizer,
            normalisation=self._normalisation,
            why="it tells timm nothing but a trunk's name, and no architecture of its own has a trunk like this one",
        )

    # Logits --------------------------------------------------------------------------------------------------------

    def logit_scale(self) -> Tensor:
        """The exponentiated logit scale, a scalar tensor with gradient."""
        scale: Any = self.model.logit_scale
        return scale.exp().reshape(())

    def logit_bias(self) -> Tensor | None:
        """The logit bias of a model trained with a sigmoid loss, a scalar tensor, or ``None``."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.reshape(())

    # Training ------------------------------------------------------------------------------------------------------

    def lora_targets(self, tower: Tower) -> list[str]:
        """Both pointwise layers of the MLP in every block of the image tower; attention and MLP in the text tower.

        The depthwise convolutions are left out: each of their kernels is a matrix of one row, which is no place for a
        low rank.
        """
        if tower == "text":
            return text.lora_targets(self.model)
        return [
            f"visual.trunk.stages.{stage}.blocks.{block}.mlp.{layer}"
            for stage, part in enumerate(self._visual.trunk.stages)
            for block in range(len(part.blocks))
            for layer in ("fc1", "fc2")
        ]

    def lora_layers(self) -> Mapping[type[nn.Module], type[nn.Module]]:
        """The toolkit's LoRA layer for the text tower's attention, which never writes a base weight. Needs peft."""
        from ttd_plugins.toolkit.attention_lora import LoRAMultiheadAttention

        return {nn.MultiheadAttention: LoRAMultiheadAttention}

    def tower_parameters(self, tower: Tower) -> Iterable[tuple[str, nn.Parameter]]:
        """Named parameters of one tower; logit scale and bias belong to neither."""
        for name, parameter in self.model.named_parameters():
            if name.startswith("logit_"):
                continue
            if name.startswith("visual.") == (tower == "image"):
                yield name, parameter
