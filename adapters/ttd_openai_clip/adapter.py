"""What the adapters of all containers of OpenAI's CLIP have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttd_openai_clip.download import HubTokenizer
from ttd_openai_clip.preprocessing import native_transform, read_normalisation
from ttd_openai_clip.text import have_more, own_tokenizer, token_rows
from ttd_plugins.adapter import (
    BackboneDescription,
    Calibration,
    DenseAdapter,
    ImageFeatures,
    ImageTransform,
    Size,
    Tokens,
    Tower,
)
from ttd_plugins.errors import ImageSizeError, InputError, TTDError, UnsupportedModelError
from ttd_plugins.toolkit.dense_modes import PRESETS, DenseMode, dense_mode
from ttd_plugins.toolkit.position_embeddings import resampled_positions
from ttd_plugins.toolkit.text import valid_unicode
from ttd_plugins.toolkit.transforms import DenseTransform


class OpenAICLIPAdapter(DenseAdapter):
    """One of OpenAI's CLIP models, seen through the contract; the subclasses know the containers."""

    default_dense = "maskclip"

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        preprocess: Any = None,
        dense: str | DenseMode | None = None,
        calibration: Calibration | None = None,
        name: str | None = None,
        weights: str | None = None,
    ) -> None:
        """Adapt ``model`` without changing it.

        Args:
            model: the model object.
            tokenizer: a tokenizer or processor of transformers, ``clip.tokenize``, or a callable with open_clip's
                convention; ``None`` if texts are not going to be tokenised.
            preprocess: an image processor or processor of transformers, a torchvision ``Compose``, or a mapping with
                ``mean`` and ``std``; by default what OpenAI's models were trained with.
            dense: how dense features are made, a name of ``PRESETS`` or a :class:`DenseMode`; by default what suits
                the kind of image tower.
            calibration: map from cosine to probability; the contract's default where none is given.
            name, weights: names for the description.

        Raises:
            UnsupportedModelError: a part of the model cannot be served, with the reason.
            InputError: an option is unknown.
        """
        super().__init__(model)
        if tokenizer is None and hasattr(preprocess, "image_processor"):
            tokenizer = preprocess.tokenizer
        self.tokenizer = own_tokenizer(tokenizer)
        self._preprocess = preprocess
        self._normalisation = read_normalisation(preprocess)
        self._calibration = calibration if calibration is not None else Calibration()
        self._name = name if name is not None else type(model).__name__
        self._weights = weights
        self.dense = dense_mode(self.default_dense if dense is None else dense)
        image_width, text_width = self._embedding_widths()
        if image_width != text_width:
            raise UnsupportedModelError(
                f"this {type(model).__name__} cannot be adapted: image embeddings have width {image_width} and text "
                f"embeddings {text_width}, so they share no space"
            )

    # What a container says -----------------------------------------------------------------------------------------

    @abstractmethod
    def _embedding_widths(self) -> tuple[int, int]:
        """Widths of image and text embeddings."""

    @property
    @abstractmethod
    def _patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""

    @property
    @abstractmethod
    def _grid(self) -> tuple[int, int]:
        """Rows and columns of patches that the model was trained with."""

    @property
    @abstractmethod
    def _context_length(self) -> int:
        """Positions of the text tower."""

    @property
    def _text_after_end_matters(self) -> bool:
        """Whether the text tower looks behind the end token."""
        return False

    @abstractmethod
    def _end_positions(self, ids: Tensor) -> Tensor:
        """Positions ``[N]`` of the token at which the text tower pools each row; -1 where there is none."""

    @abstractmethod
    def _refusal_of_mode(self, mode: DenseMode) -> str | None:
        """Why dense features cannot be made by ``mode``; ``None`` where they can."""

    @abstractmethod
    def _encode_image(self, pixels: Tensor, grid: tuple[int, int], pooled: bool) -> ImageFeatures:
        """Features of pixels whose size was checked."""

    @abstractmethod
    def _encode_text(self, ids: Tensor) -> Tensor:
        """Text embeddings of ids whose shape was checked."""

    _tower_prefixes: dict[Tower, tuple[str, ...]]

    # Description ---------------------------------------------------------------------------------------------------

    @property
    def dense(self) -> DenseMode:
        """How dense features are made; set it to a preset's name or a :class:`DenseMode` to change it."""
        return self._dense

    @dense.setter
    def dense(self, value: str | DenseMode) -> None:
        mode = dense_mode(value)
        self._require_mode(mode)
        self._dense = mode

    def _require_mode(self, mode: DenseMode) -> None:
        reason = self._refusal_of_mode(mode)
        if reason is not None:
            known = ", ".join(name for name, preset in PRESETS.items() if self._refusal_of_mode(preset) is None)
            raise UnsupportedModelError(f"dense mode {mode.name!r} cannot be used: {reason}; use one of: {known}")

    @property
    def description(self) -> BackboneDescription:
        """What this backbone is."""
        (rows, columns), (height, width) = self._grid, self._patch_size
        return BackboneDescription(
            family="openai_clip",
            model=self._name,
            weights=self._weights,
            embedding_width=self._embedding_widths()[0],
            patch_size=(height, width),
            image_size=(rows * height, columns * width),
            mean=self._normalisation.mean,
            std=self._normalisation.std,
            interpolation=self._normalisation.interpolation,
            context_length=self._context_length,
            text_needs_full_context=self._text_after_end_matters,
            logits="softmax",
            dense_mode=self.dense.name,
            dense_modes=tuple(name for name, mode in PRESETS.items() if self._refusal_of_mode(mode) is None),
            calibration=self._calibration,
        )

    # Features ------------------------------------------------------------------------------------------------------

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        """Patch features in the joint space, and the library's pooled embedding, from one pass.

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
        grid = self.patch_grid(pixels.shape[2], pixels.shape[3])
        self._require_mode(self.dense)
        return self._encode_image(pixels, grid, pooled)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Text embeddings ``[N, D]``, not L2-normalised.

        Args:
            ids: int64 ``[N, L]``; L may be any length that keeps each row's end token, unless
                ``description.text_needs_full_context``.

        Raises:
            InputError: L is longer than the context, or shorter where every position matters.
        """
        if ids.ndim != 2:
            raise InputError(f"token ids must have shape [texts, length], not {tuple(ids.shape)}")
        context = self._context_length
        if ids.shape[1] > context:
            raise InputError(f"token ids have {ids.shape[1]} positions, but the text tower has {context}")
        if self._text_after_end_matters and ids.shape[1] != context:
            raise InputError(
                f"this text tower looks at all {context} positions, so token ids cut to {ids.shape[1]} would change "
                "its embeddings; pass the rows that tokenize() gives"
            )
        return self._encode_text(ids)

    def _positions(self, own: Tensor, grid: tuple[int, int]) -> Tensor:
        return resampled_positions(own, self._grid, grid, prefix=1)

    # Input ---------------------------------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokenise with the caller's tokenizer at the model's context length.

        A text counts as truncated if it fills the context and the tokenizer has more for it. A tokenizer that cannot
        be asked for more leaves every text that fills the context counted.

        Raises:
            TTDError: no tokenizer was given, or it does not fit the model.
            InputError: ``texts`` is not a sequence of strings.
        """
        if isinstance(texts, str) or not all(isinstance(one, str) for one in texts):
            raise InputError("tokenize takes a list of strings")
        context = self._context_length
        if not texts:
            return Tokens(torch.zeros(0, context, dtype=torch.long), torch.zeros(0, dtype=torch.long), [])
        if isinstance(self.tokenizer, HubTokenizer):
            self.tokenizer = self.tokenizer.load()
        name = self.description.name
        if self.tokenizer is None:
            raise TTDError(
                f"{name} was wrapped without a tokenizer; pass tokenizer=transformers.CLIPTokenizer.from_pretrained("
                "NAME), or clip.tokenize for a model of the original package"
            )
        valid = [valid_unicode(one) for one in texts]
        ids = token_rows(self.tokenizer, valid, context, name)
        self._require_known_ids(ids, name)
        lengths = self._end_positions(ids) + 1
        if bool((lengths == 0).any()):
            raise TTDError(
                f"the tokenizer of {name} gives rows without the end token at which the text tower pools; use the "
                "tokenizer that the model was trained with"
            )
        truncated = [False] * len(valid)
        full = [row for row, length in enumerate(lengths.tolist()) if length == context]
        if full:
            more = have_more(self.tokenizer, [valid[row] for row in full], ids[full], name)
            for row, cut in zip(full, more, strict=True):
                truncated[row] = cut
        return Tokens(ids, lengths, truncated)

    @property
    @abstractmethod
    def _vocabulary(self) -> int:
        """Number of token ids that the text tower knows."""

    def _require_known_ids(self, ids: Tensor, name: str) -> None:
        if int(ids.max()) >= self._vocabulary:
            raise TTDError(
                f"the tokenizer of {name} gives token ids up to {int(ids.max())}, but the text tower knows "
                f"{self._vocabulary}; use the tokenizer that the model was trained with"
            )

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
        """The caller's ``preprocess``, or the published one: shorter side to the image size, centre crop."""
        return native_transform(self._preprocess, self.description.image_size, self._normalisation)

    # Logits and training -------------------------------------------------------------------------------------------

    def logit_scale(self) -> Tensor:
        """The exponentiated logit scale, a scalar tensor with gradient."""
        scale: Any = self.model.logit_scale
        return scale.exp().reshape(())

    def tower_parameters(self, tower: Tower) -> Iterable[tuple[str, nn.Parameter]]:
        """Named parameters of one tower; the logit scale belongs to neither."""
        for name, parameter in self.model.named_parameters():
            if name.startswith(self._tower_prefixes[tower]):
                yield name, parameter
