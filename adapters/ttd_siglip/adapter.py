"""What the adapters of both libraries share: one pass through the tower, dense features by the pooling head, text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ttd_plugins.adapter import (
    BackboneDescription,
    Calibration,
    DenseAdapter,
    ImageFeatures,
    ImageTransform,
    Size,
    Tokens,
)
from ttd_plugins.errors import ImageSizeError, InputError, UnsupportedModelError
from ttd_plugins.toolkit.last_block import BlockParts
from ttd_plugins.toolkit.transforms import DenseTransform
from ttd_siglip import tokens
from ttd_siglip.dense import SiglipMode, mode_names, self_mask, siglip_mode, value_block
from ttd_siglip.structure import refusal_of_model
from ttd_siglip.transforms import read_normalisation

PRIOR = 10.0
"""What the logit bias starts at, negated: the log-odds against a pair of one batch being a match (arXiv 2303.15343)."""


class SiglipAdapter(DenseAdapter):
    """A SigLIP model, seen through the contract.

    The blocks are run here, and the last one gets its mask as an argument, so that gradient checkpointing works and
    nothing is left in the model. The subclasses know where each library keeps the parts.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        preprocess: Any = None,
        dense: str | SiglipMode = "value",
        last_block: str | None = None,
        calibration: Calibration | None = None,
        name: str | None = None,
        weights: str | None = None,
    ) -> None:
        """Adapt ``model`` without changing it.

        Args:
            model: transformers' ``SiglipModel``, or open_clip's ``CustomTextCLIP`` around a timm trunk.
            tokenizer: a tokenizer (or processor) of transformers, or one of open_clip; ``None`` if texts are not going
                to be tokenised.
            preprocess: an image processor (or processor) of transformers, open_clip's preprocessing, or a mapping with
                ``mean`` and ``std``; by default what the model says itself, or else SigLIP's.
            dense: how dense features are made, a name of ``MODES`` or a :class:`SiglipMode`.
            last_block: ``"plain"`` or ``"value"``, in the place of what ``dense`` says.
            calibration: map from cosine to probability; by default from the model's own logits.
            name, weights: names for the description.

        Raises:
            UnsupportedModelError: a part of the model cannot be served, with the reason.
            InputError: an option is unknown.
        """
        reason = refusal_of_model(model)
        if reason is not None:
            raise UnsupportedModelError(f"this {type(model).__name__} cannot be adapted: {reason}")
        super().__init__(model)
        self.tokenizer = tokens.inner_tokenizer(tokenizer)
        self._preprocess = None if isinstance(preprocess, Mapping) else preprocess
        self._normalisation = read_normalisation(preprocess, self._own_preprocessing())
        self._name = name if name is not None else type(model).__name__
        self._weights = weights
        self._calibration = calibration if calibration is not None else self._own_calibration()
        self.dense = siglip_mode(dense, last_block)
        image_width, text_width = self._embedding_widths()
        if text_width is not None and image_width != text_width:
            raise UnsupportedModelError(
                f"this {type(model).__name__} cannot be adapted: image embeddings have width {image_width} and text "
                f"embeddings {text_width}, so they share no space"
            )

    # Where a library keeps the parts -------------------------------------------------------------------------------

    @abstractmethod
    def _grid(self) -> tuple[int, int]:
        """Rows and columns of the grid that the position embeddings were trained at."""

    @abstractmethod
    def _patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""

    @abstractmethod
    def _input_size(self) -> tuple[int, int]:
        """Height and width in pixels that the library feeds, which need not be a multiple of the patch size."""

    @abstractmethod
    def _embedding_widths(self) -> tuple[int, int | None]:
        """Width of image embeddings, and of text embeddings where the tower says it."""

    @abstractmethod
    def _context_length(self) -> int:
        """Positions of the text tower."""

    @abstractmethod
    def _embed(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens ``[B, P, W]`` that enter the first block."""

    @abstractmethod
    def _blocks(self) -> Sequence[Any]:
        """The encoder blocks."""

    @abstractmethod
    def _run_block(self, block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        """One block with an additive mask ``[P, P]``, checkpointed where the tower says so."""

    @abstractmethod
    def _parts(self, block: Any) -> BlockParts | None:
        """The last block in parts; ``None`` where it must be called whole."""

    @abstractmethod
    def _checkpointed(self, block: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``, checkpointed where the block is."""

    @abstractmethod
    def _norm(self, x: Tensor) -> Tensor:
        """The final norm of the encoder."""

    @abstractmethod
    def _pool(self, x: Tensor) -> Tensor:
        """The library's own pooled embedding ``[B, D]`` of tokens ``[B, P, W]``."""

    @abstractmethod
    def _dense(self, x: Tensor) -> Tensor:
        """Each of the tokens ``[B, P, W]`` in the joint space, ``[B, P, D]``, as the mode says."""

    @abstractmethod
    def _refusal_of_head_mode(self, head: str) -> str | None:
        """Why the pooling head cannot take this mode now, as the end of a sentence; ``None`` where it can."""

    @abstractmethod
    def _refusal_of_last_block(self) -> str | None:
        """Why the last block cannot take a mask, as the end of a sentence; ``None`` where it can."""

    @abstractmethod
    def _own_preprocessing(self) -> Mapping[str, Any] | None:
        """What the model itself says of ``mean``, ``std`` and ``interpolation``."""

    # Description ---------------------------------------------------------------------------------------------------

    @property
    def dense(self) -> SiglipMode:
        """How dense features are made; set it to a name of ``MODES`` or a :class:`SiglipMode` to change it."""
        return self._mode

    @dense.setter
    def dense(self, value: str | SiglipMode) -> None:
        mode = siglip_mode(value)
        self._require(mode)
        self._mode = mode

    def _require(self, mode: SiglipMode) -> None:
        reason = self._refusal_of_head_mode(mode.head)
        if reason is None and mode.last_block == "value":
            reason = self._refusal_of_last_block()
        if reason is not None:
            raise UnsupportedModelError(f"dense mode {mode.name!r} cannot be used: {reason}")

    def _own_calibration(self) -> Calibration:
        """The model's own logits without the prior of its batches; the contract's default where it has no bias."""
        bias = self.logit_bias()
        if bias is None or bias.is_meta:
            return Calibration()
        return Calibration(scale=float(self.logit_scale().detach()), shift=float(bias.detach()) + PRIOR)

    @property
    def description(self) -> BackboneDescription:
        """What this backbone is."""
        (rows, columns), (height, width) = self._grid(), self._patch_size()
        heads = [head for head in ("value", "token_probe", "query_query") if self._refusal_of_head_mode(head) is None]
        last_blocks = ["plain", *(["value"] if self._refusal_of_last_block() is None else [])]
        return BackboneDescription(
            family="siglip",
            model=self._name,
            weights=self._weights,
            embedding_width=self._embedding_widths()[0],
            patch_size=(height, width),
            image_size=(rows * height, columns * width),
            mean=self._normalisation.mean,
            std=self._normalisation.std,
            interpolation=self._normalisation.interpolation,
            context_length=self._context_length(),
            text_needs_full_context=True,
            logits="softmax" if self.logit_bias() is None else "sigmoid",
            dense_mode=self.dense.name,
            dense_modes=mode_names(heads, last_blocks),
            calibration=self._calibration,
        )

    # Features ------------------------------------------------------------------------------------------------------

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patch grid of an image of ``height`` by ``width`` pixels.

        The model's own input size is taken even where the patch side does not divide it (384 pixels and patches of 14):
        its convolution leaves the rest out, as in training.

        Raises:
            ImageSizeError: a side is not a positive multiple of the patch side.
        """
        if (height, width) == self._input_size():
            return self._grid()
        return super().patch_grid(height, width)

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        """Patch features in the joint space, and the library's pooled embedding, from one pass.

        With ``last_block="value"`` the last block gives its patches twice when the pooled embedding is asked for, since
        that needs them as trained; the two share what they can.

        Args:
            pixels: float ``[B, 3, height, width]``, normalised; cast to the dtype of the model.
            pooled: whether the pooled embedding is wanted too.

        Returns:
            Features that are not L2-normalised, in the dtype of the model.

        Raises:
            ImageSizeError: the size does not fit the patch grid.
            UnsupportedModelError: the pooling head was wrapped so that the dense mode is not sound.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ImageSizeError(f"pixels must have shape [images, 3, height, width], not {tuple(pixels.shape)}")
        grid = self.patch_grid(pixels.shape[2], pixels.shape[3])
        self._require(self.dense)
        *blocks, last = self._blocks()
        x = self._embed(pixels, grid)
        for block in blocks:
            x = self._run_block(block, x, None)
        if self.dense.last_block == "value":
            trained, patches = self._run_value_block(last, x, pooled)
            dense = self._dense(self._norm(patches))
            whole = self._pool(self._norm(trained)) if pooled else None
        else:
            patches = self._norm(self._run_block(last, x, None))
            dense, whole = self._dense_and_pool(patches) if pooled else (self._dense(patches), None)
        return ImageFeatures(dense.unflatten(1, grid), whole)

    def _run_value_block(self, block: Any, x: Tensor, pooled: bool) -> tuple[Tensor, Tensor]:
        """Patches ``[B, P, W]`` of the last block as trained (none unless ``pooled``), and each of itself alone."""
        parts = self._parts(block)
        if parts is not None:
            return self._checkpointed(block, value_block, parts, x, pooled)
        trained = self._run_block(block, x, None) if pooled else x[:, :0]
        return trained, self._run_block(block, x, self_mask(x.shape[1], x))

    def _dense_and_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`_dense` and :meth:`_pool` of the same tokens."""
        return self._dense(x), self._pool(x)

    def _require_ids(self, ids: Tensor) -> None:
        context = self._context_length()
        if ids.ndim != 2:
            raise InputError(f"token ids must have shape [texts, length], not {tuple(ids.shape)}")
        if ids.shape[1] != context:
            raise InputError(
                f"this text tower looks at all {context} positions and pools the last, so token ids with "
                f"{ids.shape[1]} would give other embeddings; pass the rows that tokenize() gives"
            )

    # Input ---------------------------------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokenise with the model's tokenizer at the full context, padded at the right, as SigLIP was trained.

        Raises:
            TTDError: no tokenizer was given, or it does not fit the model.
            InputError: ``texts`` is not a sequence of strings.
        """
        return tokens.tokenize(self.tokenizer, texts, self._context_length(), self.description.name)

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

    # Logits --------------------------------------------------------------------------------------------------------

    def logit_scale(self) -> Tensor:
        """The exponentiated logit scale, a scalar tensor with gradient."""
        scale: Any = self.model.logit_scale
        return scale.exp().reshape(())

    def logit_bias(self) -> Tensor | None:
        """The bias of the sigmoid logits, a scalar tensor with gradient; ``None`` for a model without one."""
        bias: Any = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.reshape(())
