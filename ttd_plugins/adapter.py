"""The contract between the engine and a backbone: all that TTD may ask of a CLIP-like model, and nothing more.

A backbone is described once (:class:`BackboneDescription`), gives patch tokens in the joint image-text space
(:class:`ImageFeatures`), and gives text embeddings (:meth:`DenseAdapter.encode_text`). **No feature that an adapter
returns is L2-normalised**; the engine normalises, in float32, where the method needs cosines.

This module imports torch only. Backbone libraries are imported by adapters, and only when one is used.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from ttd_plugins.errors import ImageSizeError, PluginError, UnsupportedModelError
from ttd_plugins.options import Calibration

if TYPE_CHECKING:
    from PIL.Image import Image

    from ttd_plugins.lora import LoRAHandle

API_VERSION = 1
"""Version of this contract."""

SUPPORTED_API_VERSIONS: tuple[int, ...] = (API_VERSION,)
"""Versions that this release speaks, oldest first; :mod:`ttd_plugins.plugins` refuses a family of another one.

What raises the version, and how long an old one is spoken: ``docs/contract.md``.
"""

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, ...] = ("image", "text")
Size = int | tuple[int, int]


@dataclass(frozen=True)
class BackboneDescription:
    """What a backbone is, in the field's terms.

    Attributes:
        family: name of the adapter family, the part before ``:`` in the backbone's name.
        model: name of the architecture, or the class name of a wrapped object.
        weights: name of the weights, or ``None`` for a wrapped object.
        embedding_width: D, the width of the joint space.
        patch_size: (height, width) in pixels of the area that one patch token stands for.
        image_size: preferred input (height, width) in pixels.
        mean, std: normalisation of the RGB channels, for pixels in [0, 1].
        interpolation: name of the resampling filter (``"bicubic"`` or ``"bilinear"``).
        context_length: positions of the text tower.
        text_needs_full_context: whether positions after the end token can change a text embedding. Where they cannot
            (causal towers pooled at the end token) the engine cuts token rows to their own length.
        logits: ``"softmax"`` (InfoNCE) or ``"sigmoid"`` (pairwise), how the backbone was trained.
        dense_mode: name of the dense-feature mode in use; ``dense_modes`` are the ones that this object can take.
        calibration: the default map from cosine to probability.
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

    @property
    def name(self) -> str:
        """``family:model@weights``, or ``family:model`` for a wrapped object."""
        return f"{self.family}:{self.model}" + (f"@{self.weights}" if self.weights else "")


@dataclass
class ImageFeatures:
    """Features of a batch of images in the joint space, not L2-normalised, in the dtype of the backbone.

    Attributes:
        patches: ``[B, H, W, D]``, row 0 at the top of the image, column 0 at its left.
        pooled: ``[B, D]``, the library's own image embedding; ``None`` when it was not asked for.
    """

    patches: Tensor
    pooled: Tensor | None = None


@dataclass
class Tokens:
    """Tokenised texts.

    Attributes:
        ids: int64 ``[N, L]`` with L the context length, padded as the backbone was trained.
        lengths: int64 ``[N]``, always on the CPU: positions up to and including the end token.
        truncated: for each text, whether it was longer than the context and lost words at its end.
    """

    ids: Tensor
    lengths: Tensor
    truncated: list[bool]

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.lengths.shape != self.ids.shape[:1] or len(self.truncated) != len(self.ids):
            raise ValueError(
                f"Tokens needs ids [N, L], lengths [N] and N truncation flags; got {tuple(self.ids.shape)}, "
                f"{tuple(self.lengths.shape)} and {len(self.truncated)}"
            )


@dataclass(frozen=True)
class ExportedModel:
    """What :meth:`DenseAdapter.export` wrote, and how the backbone's own library loads it.

    In every text ``PATH`` stands for the folder, which may be moved; :meth:`at` fills it in.

    Attributes:
        library: name of the package that loads it.
        load: one line of code that gives the model.
        more: further lines: another way to the model, its tokenizer, its preprocessing.
        name: what :func:`ttd_plugins.load` takes for the same, or ``None`` where no name does.
        notes: whole sentences on what was not saved or needs care.
    """

    library: str
    load: str
    more: tuple[str, ...] = ()
    name: str | None = None
    notes: tuple[str, ...] = ()

    def at(self, folder: str | Path) -> tuple[str, ...]:
        """Every line of code with ``folder`` in the place of ``PATH``, :attr:`load` first."""
        return tuple(line.replace("PATH", str(folder)) for line in (self.load, *self.more))


ImageTransform = Callable[["Image"], Tensor]
"""A PIL image (any mode) to float32 pixels ``[3, height, width]``, normalised for the backbone."""


class DenseAdapter(nn.Module, ABC):
    """One backbone, seen through the contract.

    The adapter holds the caller's model as :attr:`model` and never changes it: no hooks are left behind, no position
    embedding is overwritten, train/eval mode and ``requires_grad`` stay as found. The exceptions are the verbs that
    say so: :meth:`add_lora`, :meth:`merge`, :meth:`unload` and :meth:`set_grad_checkpointing`. Features are
    differentiable with respect to the model and the pixels, and live on the device of their input and in the dtype of
    the model.

    Attributes:
        model: the caller's model.
        owner: the plugin that made this adapter, for messages; ``None`` where it was made by hand.
        lora_needs_adapter: whether the library's own forward passes some of the modules that LoRA wraps by (it reads
            their weights and does not call them), so that unmerged LoRA counts in this adapter's features alone.
    """

    model: nn.Module
    lora_needs_adapter: bool = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.owner: str | None = None
        self._lora: LoRAHandle | None = None
        self._originals: list[tuple[Tensor, Tensor]] | None = None

    # What an adapter author writes ---------------------------------------------------------------------------------

    @property
    @abstractmethod
    def description(self) -> BackboneDescription:
        """What this backbone is; cheap, and true of the model as it is now."""

    @abstractmethod
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        """Patch features in the joint space, and the pooled embedding, from one pass.

        Args:
            pixels: float ``[B, 3, height, width]``, normalised as :attr:`description` says; any size for which
                :meth:`patch_grid` gives an answer, square or not.
            pooled: whether the pooled embedding is wanted too.

        Returns:
            Features that are not L2-normalised.

        Raises:
            ImageSizeError: the size does not fit the patch grid.
        """

    @abstractmethod
    def encode_text(self, ids: Tensor) -> Tensor:
        """Text embeddings ``[N, D]``, not L2-normalised.

        Args:
            ids: int64 ``[N, L]`` as :meth:`tokenize` gives. Where ``description.text_needs_full_context`` is false,
                L may be any length that keeps each row's end token; elsewhere it is the context length.
        """

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokenise as the backbone was trained; any string is taken, and one that is too long keeps its end token."""

    def dense_transform(self, size: Size | None = None) -> ImageTransform:
        """Preprocessing for dense features: resize the whole image, antialiased, without a crop, and normalise it.

        Args:
            size: (height, width) in pixels, or the side of a square; ``description.image_size`` by default.

        Raises:
            ImageSizeError: the size does not fit the patch grid.
        """
        from ttd_plugins.toolkit.transforms import DenseTransform, Normalisation

        description = self.description
        if size is None:
            size = description.image_size
        height, width = (size, size) if isinstance(size, int) else size
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
        """The additive term of the backbone's own logits, a scalar tensor, or ``None`` where there is none."""
        return None

    @abstractmethod
    def lora_targets(self, tower: Tower) -> list[str]:
        """Names, as in ``self.model.named_modules()``, of the modules of a tower that LoRA may wrap.

        Every one takes part in both the pooled and the dense features, so that the two cannot disagree.
        """

    def lora_layers(self) -> Mapping[type[nn.Module], type[nn.Module]]:
        """Module classes for which the family brings a LoRA layer of its own, mapped to that layer's class."""
        return {}

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Run the blocks of both towers again in the backward pass, in place of keeping what they computed.

        It acts while the model is in training mode, and changes memory and time alone. By default the model's own
        switch is used: ``set_grad_checkpointing``, or a ``gradient_checkpointing_enable`` with its opposite.

        Raises:
            UnsupportedModelError: the model has no such switch.
        """
        model: Any = self.model
        if hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing(enabled)
            return
        # The newer name first: the older one warns that it will go.
        for verb in ("activation_checkpointing", "gradient_checkpointing"):
            if hasattr(model, f"{verb}_enable") and hasattr(model, f"{verb}_disable"):
                if enabled:
                    # A reentrant pass gives no gradient to LoRA behind an input that needs none.
                    getattr(model, f"{verb}_enable")(**{f"{verb}_kwargs": {"use_reentrant": False}})
                else:
                    getattr(model, f"{verb}_disable")()
                return
        raise UnsupportedModelError(
            f"{self.description.name} has no switch for gradient checkpointing; train without it, with smaller batches "
            "and more accumulation"
        )

    @abstractmethod
    def tower_parameters(self, tower: Tower) -> Iterable[tuple[str, nn.Parameter]]:
        """Named parameters of one tower, as in ``self.model.named_parameters()``; the two towers share none."""

    def tower_blocks(self, tower: Tower) -> list[nn.Module]:
        """The blocks that a tower calls one after another; none where it calls their parts, or is not made of blocks.

        The engine may wrap their calls: to have what they compute for texts computed again in the backward pass where
        it would hold too much memory, or to compile those of images. A block whose parts are called now and then (the
        last one, mostly) is then as it was. By default: the numbered modules that hold most of the tower's parameters.
        """
        sizes: Counter[str] = Counter()
        for name, parameter in self.tower_parameters(tower):
            numbered = re.match(r"(.+?)\.\d+\.", name)
            if numbered:
                sizes[numbered[1]] += parameter.numel()
        return list(self.model.get_submodule(sizes.most_common(1)[0][0]).children()) if sizes else []

    def export(self, folder: Path) -> ExportedModel:
        """Write the model as it is now into ``folder``, an empty one, in the format of the backbone's own library.

        What is written loads without ttd_plugins and gives the same embeddings.
        :func:`ttd_plugins.export.export_backbone` folds LoRA in before it calls this, takes it out again after, and
        renames the folder once it is complete.

        Raises:
            UnsupportedModelError: the family does not say how, or the library could not rebuild this model.
            MissingDependencyError: the library is not installed.
        """
        raise UnsupportedModelError(
            f"the family of {self.description.name} does not say how its models are exported; export the weights alone "
            "with form='weights', or LoRA with form='lora'"
        )

    # What every adapter has ----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        return next(self.model.parameters()).device

    @property
    def has_lora(self) -> bool:
        """Whether :meth:`add_lora` was called and not undone."""
        return self._lora is not None

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patch grid of an image of ``height`` by ``width`` pixels.

        Raises:
            ImageSizeError: a side is not a positive multiple of the patch side.
        """
        rows, columns = self.description.patch_size
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
        self, rank: int = 8, *, alpha: float | None = None, dropout: float = 0.0, towers: Sequence[Tower] = TOWERS
    ) -> Self:
        """Put LoRA (arXiv 2106.09685) into the towers in place, through peft; everything else is frozen.

        Args:
            rank: rank of the added matrices.
            alpha: the scale is ``alpha / rank``; by default alpha is twice the rank.
            dropout: probability of dropping an input of the LoRA path while training.
            towers: which towers are adapted.

        Returns:
            This adapter.

        Raises:
            TTDError: LoRA is already there, or a tower has nothing that LoRA may wrap.
            MissingDependencyError: peft is not installed.
        """
        from ttd_plugins.lora import attach_lora

        self._lora = attach_lora(self, rank=rank, alpha=alpha, dropout=dropout, towers=towers)
        return self

    def snapshot_weights(self) -> None:
        """Keep a copy of the backbone's own parameters and buffers, so that :meth:`unload` can give them back.

        The engine calls this before the first step that can change them (full fine-tuning); under LoRA alone it is
        not needed. Calling it again changes nothing.
        """
        if self._originals is None:
            lora = {id(parameter) for parameter in self.lora_parameters()}
            tensors = [*self.model.parameters(), *self.model.buffers()]
            self._originals = [(t, t.detach().clone()) for t in tensors if id(t) not in lora]

    def lora_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters that :meth:`add_lora` brought, in a stable order; empty without LoRA."""
        return self._lora.parameters() if self._lora is not None else []

    def merge(self) -> nn.Module:
        """Fold LoRA into the weights and give the model back, tuned, with nothing of ours left in it.

        Full fine-tuning changed the weights in place already; merging then only forgets the originals.
        ``requires_grad`` flags are the caller's again. The adapter stays usable.
        """
        if self._lora is not None:
            self._lora.merge()
            self._lora = None
        self._originals = None
        return self.model

    def unload(self) -> nn.Module:
        """Take LoRA out, put back the weights from before the first TTD step, and give the model back.

        The weights are bitwise those that the caller brought, with or without LoRA. The adapter stays usable.
        """
        if self._lora is not None:
            self._lora.remove()
            self._lora = None
        if self._originals is not None:
            with torch.no_grad():
                for tensor, original in self._originals:
                    tensor.copy_(original)
            self._originals = None
        return self.model


class AdapterFamily(ABC):
    """What a plugin registers: a named family of backbones, and how to get adapters of it.

    Attributes:
        name: the part before ``:`` in ``family:model@weights``; lower case, digits and underscores.
        summary: one line for ``ttd backbones``.
        api_version: the version of this contract that the family was written for.
    """

    name: str
    summary: str = ""
    api_version: int = API_VERSION

    @abstractmethod
    def models(self) -> list[str]:
        """Names of the architectures that can be loaded."""

    @abstractmethod
    def weights(self, model: str) -> list[str]:
        """Names of the weights of ``model``, ``"random"`` left out.

        Raises:
            BackboneNameError: the model is unknown.
        """

    def default_weights(self, model: str) -> str | None:
        """Weights that a name without ``@`` means; ``None`` where the caller must choose."""
        return None

    @abstractmethod
    def load(self, model: str, weights: str, **options: Any) -> DenseAdapter:
        """Build ``model`` with ``weights`` (``"random"`` for fresh ones) and wrap it.

        Raises:
            BackboneNameError: a part of the name is unknown; the message lists the choices.
            TTDError: the weights cannot be read or downloaded.
        """

    @abstractmethod
    def claims(self, model: object) -> bool:
        """Whether this family takes ``model``; judged by structure alone, so that no two families claim one object."""

    @abstractmethod
    def wrap(self, model: nn.Module, *, tokenizer: Any = None, preprocess: Any = None, **options: Any) -> DenseAdapter:
        """Adapt a model that the caller already has, without changing it.

        Raises:
            UnsupportedModelError: a part of the model cannot be served, with the reason.
        """


# What the engine asks of an adapter goes through these, so that one that lies about its shapes is refused -------------


def image_pixels(adapter: DenseAdapter, image: Image, size: Size | None = None) -> Tensor:
    """``adapter.dense_transform(size)(image)``, pixels ``[3, height, width]``.

    Raises:
        PluginError: it is not what was asked for.
    """
    pixels = adapter.dense_transform(size)(image)
    due = adapter.description.image_size if size is None else (size, size) if isinstance(size, int) else tuple(size)
    _require(adapter, "dense_transform", pixels, (3, *due))
    return pixels


def image_features(adapter: DenseAdapter, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
    """:meth:`DenseAdapter.encode_image`.

    Raises:
        PluginError: the shapes are not those that :meth:`DenseAdapter.patch_grid` and the description promise.
    """
    features = adapter.encode_image(pixels, pooled=pooled)
    if not isinstance(features, ImageFeatures):
        raise _broken(adapter, f"encode_image gives a {type(features).__name__} where ImageFeatures are due")
    width = adapter.description.embedding_width
    grid = adapter.patch_grid(*pixels.shape[-2:])
    _require(adapter, "encode_image", features.patches, (len(pixels), *grid, width), "patches")
    if pooled:
        _require(adapter, "encode_image", features.pooled, (len(pixels), width), "pooled")
    return features


def text_tokens(adapter: DenseAdapter, texts: Sequence[str]) -> Tokens:
    """:meth:`DenseAdapter.tokenize`.

    Raises:
        PluginError: it gives something else than a row for every text, as long as the description says.
    """
    tokens = adapter.tokenize(texts)
    if not isinstance(tokens, Tokens):
        raise _broken(adapter, f"tokenize gives a {type(tokens).__name__} where Tokens are due")
    _require(adapter, "tokenize", tokens.ids, (len(texts), adapter.description.context_length), "ids")
    return tokens


def text_embeddings(adapter: DenseAdapter, ids: Tensor) -> Tensor:
    """:meth:`DenseAdapter.encode_text`.

    Raises:
        PluginError: the shape is not the one that the description promises.
    """
    embeddings = adapter.encode_text(ids)
    _require(adapter, "encode_text", embeddings, (len(ids), adapter.description.embedding_width))
    return embeddings


def _require(adapter: DenseAdapter, method: str, found: object, due: tuple[int, ...], part: str = "a tensor") -> None:
    if not isinstance(found, Tensor):
        raise _broken(adapter, f"{method} gives a {type(found).__name__} where {part} of shape {due} is due")
    if tuple(found.shape) != due:
        raise _broken(adapter, f"{method} gives {part} of shape {tuple(found.shape)} where {due} is due")


def _broken(adapter: DenseAdapter, what: str) -> PluginError:
    owner = adapter.owner or f"{type(adapter).__module__}.{type(adapter).__qualname__}"
    name = adapter.description.name
    return PluginError(
        f"{owner} breaks the contract of adapters: {what} for {name}; `ttd check-adapter {name}` says more"
    )
