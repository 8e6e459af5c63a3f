"""The contract between the engine and a backbone. The engine uses nothing else of a CLIP-like model.

An adapter describes its backbone (:class:`BackboneDescription`), and returns patch features in the joint image-text
space (:class:`ImageFeatures`) and text embeddings (:meth:`DenseAdapter.encode_text`). **No feature that an adapter
returns is L2-normalised**; the engine normalises in float32 where the method needs cosines.

This module imports torch only. Adapters import backbone libraries, and only when one is used.
"""

from __future__ import annotations

import re
import shlex
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from ttd_plugins.errors import ImageSizeError, PluginError, TTDError, UnsupportedModelError
from ttd_plugins.library_reference import LibraryReference as LibraryReference
from ttd_plugins.lora.attach import attach_lora, foreign_peft_layer
from ttd_plugins.lora.handle import TOWERS as TOWERS
from ttd_plugins.lora.handle import LoRAHandle
from ttd_plugins.lora.handle import Tower as Tower
from ttd_plugins.options import Calibration, Resampling
from ttd_plugins.utils import wrapped_models
from ttd_plugins.utils.contract_types import ExportedModel as ExportedModel
from ttd_plugins.utils.contract_types import ImageFeatures as ImageFeatures
from ttd_plugins.utils.contract_types import Tokens as Tokens
from ttd_plugins.utils.contract_types import TunedFrom as TunedFrom
from ttd_plugins.utils.deprecation import RenamedAttribute, renamed_keyword, renamed_names, warn_renamed
from ttd_plugins.utils.running_state import WeightSnapshot
from ttd_plugins.utils.sizes import Size as Size
from ttd_plugins.utils.sizes import size_pair

if TYPE_CHECKING:
    from PIL.Image import Image

API_VERSION = 1
"""Version of this contract."""

SUPPORTED_API_VERSIONS: tuple[int, ...] = (API_VERSION,)
"""Versions that this release supports, oldest first; a family of another version is refused.

``docs/contract.md`` states which changes raise the version, and how long an old one is supported.
"""

if not TYPE_CHECKING:
    __getattr__ = renamed_names(__name__, {"SPOKEN_API_VERSIONS": "SUPPORTED_API_VERSIONS"})

MAX_PATCHES = 2**15
"""Most patches of an image: the cost of attention grows with their square, so that a mistyped size would hang."""


@renamed_keyword("text_after_end_matters", "text_needs_full_context")
@dataclass(frozen=True)
class BackboneDescription:
    """Properties of a backbone.

    Attributes:
        family: name of the adapter family, the part before ``:`` in the backbone's name.
        model: name of the architecture, or the class name of a wrapped object.
        weights: name of the weights, or ``None`` for a wrapped object.
        embedding_width: D, the width of the joint space.
        patch_size: (height, width) in pixels of the area that one patch token covers.
        image_size: preferred input (height, width) in pixels.
        mean, std: normalisation of the RGB channels, for pixels in [0, 1].
        interpolation: name of the resampling filter (``"bicubic"`` or ``"bilinear"``).
        context_length: positions of the text tower.
        text_needs_full_context: whether positions after the end token can change a text embedding. If they cannot
            (causal towers pooled at the end token), the engine trims token rows to the length of the text.
        logits: the loss that the backbone was trained with, ``"softmax"`` (InfoNCE) or ``"sigmoid"`` (pairwise).
        dense_mode: name of the dense-feature mode in use.
        dense_modes: the dense-feature modes that this object supports.
        calibration: the default map from cosine to probability.
        calibrated: whether :attr:`calibration` was fitted to image-text pairs; otherwise probabilities are labelled.
        trained_on: the only kind of images that the weights were pre-trained on, in the plural ("drawings"); ``None``
            if the weights know photographs, or nothing is known. Where it is set, results come with a note.
        positions: how position embeddings are resampled at other image sizes, see :attr:`DenseAdapter.positions`.
    """

    family: str
    model: str
    weights: str | None
    embedding_width: int
    patch_size: tuple[int, int]
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    context_length: int
    text_needs_full_context: bool
    logits: Literal["softmax", "sigmoid"]
    dense_mode: str
    dense_modes: tuple[str, ...] = ()
    calibration: Calibration = field(default_factory=Calibration)
    calibrated: bool = False
    trained_on: str | None = None
    positions: Resampling = "library"

    text_after_end_matters = RenamedAttribute("text_needs_full_context")

    @property
    def name(self) -> str:
        """``family:model@weights``, or ``family:model`` for a wrapped object."""
        return f"{self.family}:{self.model}" + (f"@{self.weights}" if self.weights else "")


ImageTransform = Callable[["Image"], Tensor]
"""Converts a PIL image of any mode to float32 pixels ``[3, height, width]``, normalised for the backbone."""


def _remember_weights(adapter: DenseAdapter) -> None:
    """Deprecated name of :meth:`DenseAdapter.snapshot_weights`."""
    warn_renamed("DenseAdapter.remember_weights", "DenseAdapter.snapshot_weights")
    for cls in type(adapter).__mro__:
        method = vars(cls).get("snapshot_weights")
        # Not an override under the old name: it is the likely caller, through super().
        if method is not None and method is not vars(cls).get("remember_weights"):
            method(adapter)
            return


class DenseAdapter(nn.Module, ABC):
    """One backbone behind the contract.

    The adapter never changes the caller's :attr:`model`: it leaves no hooks, overwrites no position embedding, and
    keeps train/eval mode and ``requires_grad``. Only :meth:`add_lora`, :meth:`merge`, :meth:`unload` and
    :meth:`set_grad_checkpointing` change it. Features are differentiable with respect to the model and the pixels;
    they are on the device of their input and have the dtype of the model.

    Attributes:
        model: the caller's model.
        owner: the plugin that created this adapter, for messages; ``None`` if it was created by hand.
        distribution: name and version of the installed distribution of that plugin, or ``None``.
        tuned_from: the run, LoRA or file whose weights were loaded; ``None`` for a backbone as published.
        lora_needs_adapter: whether the library's own forward reads the weights of some LoRA targets without calling
            the modules. Unmerged LoRA then affects the features of this adapter only.
        library_reference: the library's own functions, for the conformance kit; an adapter sets it or makes it a
            property. ``None``: the kit looks for the names that libraries usually have.
        positions: how image position embeddings are resampled at untrained sizes; assign one of :attr:`resamplings`.
        resamplings: the values of :attr:`positions` that this adapter supports.
    """

    model: nn.Module
    lora_needs_adapter: bool = False
    library_reference: LibraryReference | None = None
    positions: Resampling = "library"
    resamplings: tuple[Resampling, ...] = ("library",)

    def __init__(self, model: nn.Module) -> None:
        """Adapt ``model`` without changing it.

        Raises:
            UnsupportedModelError: the model is a wrapper around a model, or it is quantised.
        """
        wrapped_models.refuse(model)
        super().__init__()
        self.model = model
        self.training = model.training
        self.owner: str | None = None
        self.distribution: tuple[str, str | None] | None = None
        self.tuned_from: TunedFrom | None = None
        self._lora: LoRAHandle | None = None
        self._originals: WeightSnapshot | None = None
        self._merged = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "remember_weights" in vars(cls) and "snapshot_weights" not in vars(cls):
            warn_renamed(f"{cls.__name__}.remember_weights", f"{cls.__name__}.snapshot_weights")
            cls.snapshot_weights = vars(cls)["remember_weights"]  # type: ignore[method-assign]

    # What an adapter author writes ---------------------------------------------------------------------------------

    @property
    @abstractmethod
    def description(self) -> BackboneDescription:
        """Properties of the backbone in its current state; cheap to compute."""

    @abstractmethod
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        """Encode images in one pass: patch features in the joint space, and the pooled embedding.

        Args:
            pixels: float ``[B, 3, height, width]``, normalised as :attr:`description` states; any size that
                :meth:`patch_grid` accepts, square or not.
            pooled: whether to return the pooled embedding too.

        Returns:
            Features that are not L2-normalised.

        Raises:
            ImageSizeError: the size does not fit the patch grid.
        """

    @abstractmethod
    def encode_text(self, ids: Tensor) -> Tensor:
        """Encode texts: embeddings ``[N, D]`` that are not L2-normalised.

        Args:
            ids: int64 ``[N, L]`` from :meth:`tokenize`. L is the context length; if
                ``description.text_needs_full_context`` is false, any L that includes each row's end token is valid.
        """

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokenise as in the backbone's training. Any string is valid; a truncated one keeps its end token."""

    def dense_transform(self, size: Size | None = None) -> ImageTransform:
        """Preprocessing for dense features: resize the whole image, antialiased, without a crop, and normalise it.

        Args:
            size: (height, width) in pixels, or the side of a square; ``description.image_size`` by default.

        Raises:
            ImageSizeError: the size does not fit the patch grid.
        """
        from ttd_plugins.toolkit.transforms import DenseTransform, Normalisation

        description = self.description
        height, width = size_pair(description.image_size if size is None else size)
        self.patch_grid(height, width)
        normalisation = Normalisation(description.mean, description.std, description.interpolation)
        return DenseTransform((height, width), normalisation)

    @abstractmethod
    def native_transform(self) -> ImageTransform:
        """The backbone's own evaluation preprocessing, which may crop."""

    def logit_scale(self) -> Tensor:
        """Multiplier of cosines in the backbone's own loss (exponentiated), a scalar tensor with gradient.

        By default ``exp`` of the model's parameter ``logit_scale``.
        """
        scale: Any = self.model.logit_scale
        return scale.exp().reshape(())

    def logit_bias(self) -> Tensor | None:
        """Additive term of the backbone's own logits, a scalar tensor, or ``None``."""
        return None

    @abstractmethod
    def lora_targets(self, tower: Tower) -> list[str]:
        """Names, as in ``self.model.named_modules()``, of the modules of a tower that LoRA wraps.

        Each affects both the pooled and the dense features, so that LoRA changes both consistently.
        """

    def lora_layers(self) -> Mapping[type[nn.Module], type[nn.Module]]:
        """Module classes for which the family provides its own LoRA layer, mapped to the class of that layer."""
        return {}

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Switch activation checkpointing of both towers on or off (arXiv 1604.06174).

        It acts in training mode only, and changes memory and time, not results. By default the model's own switch is
        used: ``set_grad_checkpointing``, or ``gradient_checkpointing_enable`` and ``gradient_checkpointing_disable``.

        Raises:
            UnsupportedModelError: the model has no such switch.
        """
        model: Any = self.model
        if hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing(enabled)
            return
        # The newer name first: the older one warns that it is deprecated.
        for verb in ("activation_checkpointing", "gradient_checkpointing"):
            if hasattr(model, f"{verb}_enable") and hasattr(model, f"{verb}_disable"):
                if enabled:
                    # A reentrant pass computes no gradient of LoRA whose input needs none.
                    getattr(model, f"{verb}_enable")(**{f"{verb}_kwargs": {"use_reentrant": False}})
                else:
                    getattr(model, f"{verb}_disable")()
                return
        raise UnsupportedModelError(
            f"{self.description.name} has no switch for activation checkpointing; train without it, with smaller "
            "batches and more accumulation"
        )

    @abstractmethod
    def tower_parameters(self, tower: Tower) -> Iterable[tuple[str, nn.Parameter]]:
        """Named parameters of one tower, as in ``self.model.named_parameters()``; no parameter is in both towers."""

    def tower_blocks(self, tower: Tower) -> list[nn.Module]:
        """The blocks that a tower calls in sequence; empty if the tower calls parts of blocks, or has no blocks.

        The engine wraps their calls for activation checkpointing of texts, and compiles those of images. Calls of a
        block's parts (mostly of the last block) are not affected. By default: the numbered modules that contain most
        of the tower's parameters.
        """
        sizes: Counter[str] = Counter()
        for name, parameter in self.tower_parameters(tower):
            numbered = re.match(r"(.+?)\.\d+\.", name)
            if numbered:
                sizes[numbered[1]] += parameter.numel()
        return list(self.model.get_submodule(sizes.most_common(1)[0][0]).children()) if sizes else []

    def export(self, folder: Path) -> ExportedModel:
        """Write the model in its current state to the empty ``folder``, in the format of the backbone's own library.

        The files load without ttd_plugins and reproduce the embeddings.
        :func:`ttd_plugins.export.export_backbone` calls this with LoRA temporarily merged, and renames the folder once
        it is complete.

        Raises:
            UnsupportedModelError: the family does not implement export, or the library cannot rebuild this model.
            MissingDependencyError: the library is not installed.
        """
        raise UnsupportedModelError(
            f"the family of {self.description.name} does not implement export; export the weights alone with "
            "form='weights', or LoRA with form='lora'"
        )

    # What every adapter has ----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        return next(self.model.parameters()).device

    @property
    def has_lora(self) -> bool:
        """Whether LoRA is attached: :meth:`add_lora` was called, and neither :meth:`merge` nor :meth:`unload` since."""
        return self._lora is not None

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patch grid of an image of ``height`` by ``width`` pixels.

        Raises:
            ImageSizeError: a side is not a positive multiple of the patch side, or there are too many patches.
        """
        rows, columns = self.description.patch_size
        if (height // rows) * (width // columns) > MAX_PATCHES:
            raise ImageSizeError(
                f"an image of {height} x {width} pixels has {height // rows} x {width // columns} patches, more than "
                f"{MAX_PATCHES:,} in all; choose a smaller size"
            )
        if height < rows or width < columns or height % rows or width % columns:
            raise ImageSizeError(
                f"{self.description.name} takes images whose height is a multiple of {rows} and whose width is a "
                f"multiple of {columns} pixels, not {height} x {width}; resize with dense_transform((height, width))"
            )
        return height // rows, width // columns

    def pixel_grid(self, pixels: Tensor) -> tuple[int, int]:
        """Rows and columns of the patch grid of a batch of pixels ``[B, 3, height, width]``.

        Raises:
            ImageSizeError: the tensor has another shape, or the image size does not fit the patch grid.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ImageSizeError(f"pixels must have shape [images, 3, height, width], not {tuple(pixels.shape)}")
        return self.patch_grid(pixels.shape[2], pixels.shape[3])

    def add_lora(
        self,
        rank: int = 8,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        towers: Sequence[Tower] = TOWERS,
        modules: str | None = None,
    ) -> Self:
        """Add LoRA (arXiv 2106.09685) to the towers in place, through peft, and freeze everything else.

        Args:
            rank: rank of the added matrices.
            alpha: the scale is ``alpha / rank``; by default alpha is twice the rank.
            dropout: probability of dropping an input of the LoRA path while training.
            towers: the towers to adapt.
            modules: a regular expression; of :meth:`lora_targets` only those are wrapped in whose names it is found.

        Returns:
            This adapter.

        Raises:
            TTDError: the model has LoRA already, or a tower has no module that LoRA can wrap.
            MissingDependencyError: peft is not installed.
        """
        self._lora = attach_lora(self, rank=rank, alpha=alpha, dropout=dropout, towers=towers, modules=modules)
        return self

    def snapshot_weights(self) -> None:
        """Copy the backbone's own parameters and buffers, so that :meth:`unload` can restore them.

        The engine calls this before the first step of full fine-tuning; LoRA does not need it. A second call does
        nothing, and neither does one after :meth:`merge`, which gave the originals up.
        """
        if self._originals is None and not self._merged:
            self._originals = WeightSnapshot(self.model, self.lora_parameters())

    remember_weights = _remember_weights
    __repr__ = wrapped_models.adapter_repr

    def lora_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters that :meth:`add_lora` added, in a stable order; empty without LoRA."""
        return self._lora.parameters() if self._lora is not None else []

    def merge(self) -> nn.Module:
        """Merge LoRA into the weights, and return the fine-tuned model with no trace of LoRA.

        Full fine-tuning changed the weights in place already, so that merging only drops the snapshot. Every parameter
        requires a gradient exactly if it did before :meth:`add_lora`. The adapter stays usable, but :meth:`unload`
        cannot restore the weights from before.

        Raises:
            TTDError: LoRA has values that are not finite, or the model has peft layers that this adapter did not add.
        """
        if self._lora is not None:
            self._lora.merge()
        elif (foreign := foreign_peft_layer(self.model)) is not None:
            raise TTDError(foreign)
        self._merged = self._merged or self._lora is not None or self._originals is not None
        self._lora = self._originals = None
        return self.model

    def unload(self) -> nn.Module:
        """Remove LoRA, restore the weights and buffers from before the first TTD step, and return the model.

        They are bitwise those of the caller's model. The adapter stays usable. LoRA that was added after a
        :meth:`merge` is removed with a warning that the merged weights stay.

        Raises:
            TTDError: :meth:`merge` made the tuning permanent.
        """
        if self._merged and self._lora is None:
            raise TTDError(
                f"the tuning of {self.description.name} was merged into its weights, so unload() cannot restore the "
                "originals; load the model again"
            )
        undo_tuning(self)
        if self._merged:
            warnings.warn(
                "unload() removed LoRA; the weights are those of the earlier merge(), not those before it", stacklevel=2
            )
        return self.model


def undo_tuning(adapter: DenseAdapter) -> None:
    """Remove LoRA of an adapter, and restore its snapshot of weights and buffers, if it has any."""
    if adapter._lora is not None:
        adapter._lora.remove()
        adapter._lora = None
    if adapter._originals is not None:
        adapter._originals.restore()
        adapter._originals = None


class AdapterFamily(ABC):
    """A named family of backbones, which a plugin registers; it loads and wraps models as adapters.

    Attributes:
        name: the part before ``:`` in ``family:model@weights``; lower-case letters, digits and underscores.
        summary: one line for ``ttd backbones``.
        api_version: the version of this contract that the family implements.
        embedded_models: names of the models whose weights come with the package, which need no download.
    """

    name: str
    summary: str = ""
    embedded_models: Sequence[str] = ()
    api_version: int = API_VERSION

    @abstractmethod
    def models(self) -> list[str]:
        """Names of the architectures that can be loaded."""

    @abstractmethod
    def weights(self, model: str) -> list[str]:
        """Names of the weights of ``model``, without ``"random"``.

        Raises:
            BackboneNameError: the model is unknown.
        """

    def default_weights(self, model: str) -> str | None:
        """Weights of a name without ``@``; ``None`` if the caller must choose."""
        return None

    @abstractmethod
    def load(self, model: str, weights: str, **options: Any) -> DenseAdapter:
        """Build ``model`` with ``weights`` (``"random"`` for random initialisation) and wrap it.

        Raises:
            BackboneNameError: a part of the name is unknown; the message lists the choices.
            TTDError: the weights cannot be read or downloaded.
        """

    @abstractmethod
    def claims(self, model: object) -> bool:
        """Whether this family adapts ``model``. Decide by structure alone, so that no two families claim one object."""

    def unclaimed_reason(self, model: object) -> str | None:
        """Why this family does not claim a model of its library, as the end of a sentence; ``None`` for other objects.

        :func:`ttd_plugins.wrap` quotes it where no family claims the object.
        """
        return None

    @abstractmethod
    def wrap(self, model: nn.Module, *, tokenizer: Any = None, preprocess: Any = None, **options: Any) -> DenseAdapter:
        """Adapt a model of the caller without changing it.

        Raises:
            UnsupportedModelError: a part of the model is not supported, with the reason.
        """


# The engine calls an adapter through these functions, which check the shapes of its results -------------------------


def image_pixels(adapter: DenseAdapter, image: Image, size: Size | None = None) -> Tensor:
    """Return ``adapter.dense_transform(size)(image)``: pixels ``[3, height, width]``.

    Raises:
        ImageSizeError: the size does not fit the patch grid.
        PluginError: the result is no tensor of that shape.
    """
    expected = size_pair(adapter.description.image_size if size is None else size)
    # First, since an adapter's own transform may not check the size.
    adapter.patch_grid(*expected)
    pixels = adapter.dense_transform(None if size is None else expected)(image)
    require_shape(adapter, "dense_transform", pixels, (3, *expected))
    return pixels


def image_features(adapter: DenseAdapter, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
    """Return ``adapter.encode_image(pixels, pooled=pooled)``.

    Raises:
        PluginError: a shape differs from that of :meth:`DenseAdapter.patch_grid` and the description.
    """
    features = adapter.encode_image(pixels, pooled=pooled)
    if not isinstance(features, ImageFeatures):
        raise _broken(adapter, f"encode_image returns a {type(features).__name__}, not ImageFeatures")
    width, grid = adapter.description.embedding_width, adapter.patch_grid(*pixels.shape[-2:])
    require_shape(adapter, "encode_image", features.patches, (len(pixels), *grid, width), "patches")
    if pooled:
        require_shape(adapter, "encode_image", features.pooled, (len(pixels), width), "pooled")
    return features


def named_tower_parameters(adapter: DenseAdapter, tower: Tower) -> list[tuple[str, nn.Parameter]]:
    """Return ``adapter.tower_parameters(tower)`` as a list.

    Raises:
        PluginError: the tower has no parameters, so that nothing of it could be trained or frozen.
    """
    named = list(adapter.tower_parameters(tower))
    if not named:
        raise _broken(adapter, f"tower_parameters({tower!r}) names no parameter")
    return named


def text_tokens(adapter: DenseAdapter, texts: Sequence[str]) -> Tokens:
    """Return ``adapter.tokenize(texts)``.

    Raises:
        PluginError: the result has not one row per text, or rows are not as long as the context.
    """
    tokens = adapter.tokenize(texts)
    if not isinstance(tokens, Tokens):
        raise _broken(adapter, f"tokenize returns a {type(tokens).__name__}, not Tokens")
    require_shape(adapter, "tokenize", tokens.ids, (len(texts), adapter.description.context_length), "ids")
    return tokens


def text_embeddings(adapter: DenseAdapter, ids: Tensor) -> Tensor:
    """Return ``adapter.encode_text(ids)``.

    Raises:
        PluginError: the shape differs from that of the description.
    """
    embeddings = adapter.encode_text(ids)
    require_shape(adapter, "encode_text", embeddings, (len(ids), adapter.description.embedding_width))
    return embeddings


def require_shape(
    adapter: DenseAdapter, method: str, found: object, expected: tuple[int, ...], part: str = "a tensor"
) -> None:
    """Raise PluginError if what ``method`` returned is no tensor of the expected shape."""
    if not isinstance(found, Tensor):
        raise _broken(adapter, f"{method} returns a {type(found).__name__}, not {part} of shape {expected}")
    if found.shape != expected:
        raise _broken(adapter, f"{method} returns {part} of shape {tuple(found.shape)}, not {expected}")


def _broken(adapter: DenseAdapter, what: str) -> PluginError:
    owner = adapter.owner or f"{type(adapter).__module__}.{type(adapter).__qualname__}"
    name = adapter.description.name
    command = shlex.join(["ttd", "check-adapter", name])
    return PluginError(f"{owner} breaks the adapter contract: {what} for {name}; `{command}` prints details")
