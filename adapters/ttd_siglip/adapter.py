"""Base class of the adapters of both libraries: the pass through the tower, and dense features by the pooling head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ttd_plugins.adapter import Calibration, ImageFeatures, Tokens
from ttd_plugins.toolkit.clip_adapter import CLIPAdapter
from ttd_plugins.toolkit.dense_modes import diagonal_mask
from ttd_plugins.toolkit.last_block import BlockParts
from ttd_plugins.toolkit.text_tower import check_token_ids
from ttd_plugins.toolkit.transforms import Normalisation
from ttd_siglip import siglip_tokenizing
from ttd_siglip.normalisation import read_normalisation
from ttd_siglip.recognition import unsupported_reason
from ttd_siglip.siglip_modes import MODES, SiglipMode, siglip_mode, value_block

PRIOR = 10.0
"""The negated initial value of the logit bias: the log-odds that a pair of a batch is no match (arXiv 2303.15343)."""


class SiglipAdapter(CLIPAdapter):
    """A SigLIP model behind the contract; subclasses say where each library stores the parts.

    The tokenizer is one of transformers (or a processor) or of open_clip; ``preprocess`` is an image processor (or a
    processor) of transformers, open_clip's preprocessing, or a mapping with ``mean`` and ``std``.
    """

    family = "siglip"
    modes = MODES
    default_mode = "value"

    # Padding is attended to, as in training.
    _text_needs_full_context = True

    def __init__(self, model: nn.Module, *, dense: Any = None, last_block: str | None = None, **options: Any) -> None:
        """Adapt ``model`` without changing it.

        Args:
            model: transformers' ``SiglipModel``, or open_clip's ``CustomTextCLIP`` around a timm trunk.
            dense: the dense mode, a name of ``MODES`` or a :class:`SiglipMode`.
            last_block: ``"plain"`` or ``"value"``; replaces that of ``dense``.
            options: as in :class:`CLIPAdapter`; the calibration defaults to the model's own logits.

        Raises:
            UnsupportedModelError: a part of the model is not supported, with the reason.
            InputError: an option is unknown.
        """
        dense = siglip_mode(self.default_mode if dense is None else dense, last_block)
        super().__init__(model, dense=dense, **options)

    # Where a library stores the parts ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _input_size(self) -> tuple[int, int]:
        """Height and width in pixels of the library's own input, which need not be a multiple of the patch size."""

    @property
    def _grid(self) -> tuple[int, int]:
        (height, width), (rows, columns) = self._input_size, self._patch_size
        return height // rows, width // columns

    @abstractmethod
    def _embed(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens ``[B, P, W]`` that enter the first block."""

    @abstractmethod
    def _blocks(self) -> Sequence[Any]:
        """The encoder blocks."""

    @abstractmethod
    def _run_block(self, block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        """One block with an additive mask ``[P, P]``, with activation checkpointing where the tower's switch is on."""

    @abstractmethod
    def _parts(self, block: Any) -> BlockParts | None:
        """The parts of the last block; ``None`` where it must be called as a module."""

    @abstractmethod
    def _checkpointed(self, block: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``function(*arguments)`` with the activation checkpointing of the block."""

    @abstractmethod
    def _norm(self, x: Tensor) -> Tensor:
        """The final norm of the encoder."""

    @abstractmethod
    def _pool(self, x: Tensor) -> Tensor:
        """The library's own pooled embedding ``[B, D]`` of tokens ``[B, P, W]``."""

    @abstractmethod
    def _dense_features(self, x: Tensor) -> Tensor:
        """Tokens ``[B, P, W]`` mapped to the joint space one by one, ``[B, P, D]``, by the dense mode."""

    @abstractmethod
    def _encode_text(self, ids: Tensor) -> Tensor:
        """Text embeddings of ids of the full context."""

    @abstractmethod
    def _unsupported_head_reason(self, head: str) -> str | None:
        """Why the pooling head cannot use this mode now, as the end of a sentence; ``None`` where it can."""

    @abstractmethod
    def _unmasked_last_block_reason(self) -> str | None:
        """Why the last block takes no mask, as the end of a sentence; ``None`` where it takes one."""

    @abstractmethod
    def _own_preprocessing(self) -> Mapping[str, Any] | None:
        """The model's own settings ``mean``, ``std`` and ``interpolation``, if it has any."""

    def _unsupported_reason(self, model: nn.Module) -> str | None:
        return unsupported_reason(model)

    def _unsupported_mode_reason(self, mode: SiglipMode) -> str | None:
        reason = self._unsupported_head_reason(mode.head)
        return self._unmasked_last_block_reason() if reason is None and mode.last_block == "value" else reason

    def _read_normalisation(self, preprocess: Any) -> Normalisation:
        return read_normalisation(preprocess, self._own_preprocessing())

    def _default_calibration(self) -> Calibration:
        """The model's own logits without the prior of its batches; the contract's default where it has no bias."""
        bias = self.logit_bias()
        if bias is None or bias.is_meta:
            return Calibration()
        return Calibration(scale=float(self.logit_scale().detach()), shift=float(bias.detach()) + PRIOR)

    # Features ------------------------------------------------------------------------------------------------------

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patch grid of an image of ``height`` by ``width`` pixels.

        The model's own input size is valid even where it is not a multiple of the patch size (384 pixels and patches of
        14): the convolution ignores the rest, as in training.

        Raises:
            ImageSizeError: a side is not a positive multiple of the patch side.
        """
        return self._grid if (height, width) == self._input_size else super().patch_grid(height, width)

    def _encode_image(self, pixels: Tensor, grid: tuple[int, int], pooled: bool) -> ImageFeatures:
        *blocks, last = self._blocks()
        x = self._embed(pixels, grid)
        for block in blocks:
            x = self._run_block(block, x, None)
        if self.dense.last_block == "value":
            trained, patches = self._run_value_block(last, x, pooled)
            dense = self._dense_features(self._norm(patches))
            embedding = self._pool(self._norm(trained)) if pooled else None
        else:
            patches = self._norm(self._run_block(last, x, None))
            dense, embedding = self._dense_and_pool(patches) if pooled else (self._dense_features(patches), None)
        return ImageFeatures(dense.unflatten(1, grid), embedding)

    def _run_value_block(self, block: Any, x: Tensor, pooled: bool) -> tuple[Tensor, Tensor]:
        """Patches ``[B, P, W]`` of the last block as trained (none unless ``pooled``), and of the value mode."""
        parts = self._parts(block)
        if parts is not None:
            return self._checkpointed(block, value_block, parts, x, pooled)
        trained = self._run_block(block, x, None) if pooled else x[:, :0]
        return trained, self._run_block(block, x, diagonal_mask(x.shape[1], x, prefix=0))

    def _dense_and_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`_dense_features` and :meth:`_pool` of the same tokens."""
        return self._dense_features(x), self._pool(x)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Text embeddings ``[N, D]``, not L2-normalised; padding is attended to, as in training.

        Args:
            ids: int64 ``[N, L]`` with L the context length.

        Raises:
            InputError: L is another length.
        """
        check_token_ids(ids, self._context_length, needs_full_context=True)
        return self._encode_text(ids)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokenise with the model's tokenizer at the full context, padded at the right, as SigLIP was trained.

        Raises:
            TTDError: no tokenizer was given, or it does not fit the model.
            InputError: ``texts`` is not a sequence of strings.
        """
        return siglip_tokenizing.tokenize(self.tokenizer, texts, self._context_length, self.description.name)
