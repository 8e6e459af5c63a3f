"""Base class of the adapters for OpenAI's CLIP and its relatives in transformers, whichever library built the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ttd_openai_clip.openai_tokenizing import lost_words, token_rows
from ttd_openai_clip.preprocessing import native_transform, read_normalisation
from ttd_plugins.adapter import ImageTransform, Tokens
from ttd_plugins.errors import TTDError
from ttd_plugins.toolkit.clip_adapter import CLIPAdapter
from ttd_plugins.toolkit.position_embeddings import resampled_positions
from ttd_plugins.toolkit.text_tower import check_token_ids
from ttd_plugins.toolkit.tokenizing import tokenize_rows
from ttd_plugins.toolkit.transformers_models import LazyTokenizer
from ttd_plugins.toolkit.transforms import OPENAI_NORMALISATION, Normalisation


class OpenAICLIPAdapter(CLIPAdapter):
    """A CLIP model of the original package or of transformers; subclasses support one structure each.

    The tokenizer is one of transformers (or a processor), ``clip.tokenize``, or a callable with open_clip's calling
    convention; ``preprocess`` is an image processor (or a processor) of transformers, a torchvision ``Compose``, or a
    mapping with ``mean`` and ``std``.
    """

    family = "openai_clip"

    def __init__(self, model: nn.Module, *, tokenizer: Any = None, preprocess: Any = None, **options: Any) -> None:
        """Adapt ``model`` without changing it; arguments and errors as in :class:`CLIPAdapter`.

        A processor passed as ``preprocess`` is also the tokenizer if none is given.
        """
        if tokenizer is None and hasattr(preprocess, "image_processor"):
            tokenizer = preprocess.tokenizer
        super().__init__(model, tokenizer=tokenizer, preprocess=preprocess, **options)

    # What a library's model says -----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _vocabulary(self) -> int:
        """Number of token ids of the text tower."""

    @abstractmethod
    def _end_positions(self, ids: Tensor) -> Tensor:
        """Positions ``[N]`` of the token at which the text tower pools each row; -1 where there is none."""

    @abstractmethod
    def _encode_text(self, ids: Tensor) -> Tensor:
        """Text embeddings of ids whose shape was checked."""

    @property
    def _text_needs_full_context(self) -> bool:
        return False

    def _unsupported_reason(self, model: nn.Module) -> str | None:
        return None

    def _read_normalisation(self, preprocess: Any) -> Normalisation:
        return read_normalisation(preprocess, self._default_normalisation)

    @property
    def _default_normalisation(self) -> Normalisation:
        """Mean, std and filter that the model was trained with, where ``preprocess`` does not say."""
        return OPENAI_NORMALISATION

    @property
    def _padding_id(self) -> int | None:
        """Id that pads rows of tokens; ``None`` for that of the tokenizer."""
        return None

    def _positions(self, own: Tensor, grid: tuple[int, int]) -> Tensor:
        return resampled_positions(own, self._grid, grid, prefix=1, method=self.positions)

    # The contract --------------------------------------------------------------------------------------------------

    def encode_text(self, ids: Tensor) -> Tensor:
        """Text embeddings ``[N, D]`` of ids ``[N, L]``, as the contract says.

        Raises:
            InputError: L is longer than the context, or shorter where the full context is needed.
        """
        check_token_ids(ids, self._context_length, needs_full_context=self._text_needs_full_context)
        return self._encode_text(ids)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokenise with the caller's tokenizer at the model's context length.

        A text counts as truncated if it fills the context and the tokenizer has more ids for it. With a tokenizer that
        cannot tell, every text that fills the context counts.

        Raises:
            TTDError: no tokenizer was given, or it does not fit the model.
            InputError: ``texts`` is not a sequence of strings.
        """
        context, name = self._context_length, self.description.name
        return tokenize_rows(
            texts,
            context,
            rows=lambda valid: self._rows(valid, context, name),
            lengths=lambda ids: self._lengths(ids, name),
            truncated=lambda full, ids: lost_words(self.tokenizer, full, ids, name),
        )

    def _rows(self, texts: list[str], context: int, name: str) -> Tensor:
        if isinstance(self.tokenizer, LazyTokenizer):
            self.tokenizer = self.tokenizer.load()
        if self.tokenizer is None:
            raise TTDError(
                f"{name} was wrapped without a tokenizer; pass tokenizer=transformers.CLIPTokenizer.from_pretrained("
                "NAME), or clip.tokenize for a model of the original package"
            )
        ids = token_rows(self.tokenizer, texts, context, name, self._padding_id)
        if int(ids.max()) >= self._vocabulary:
            raise TTDError(
                f"the tokenizer of {name} returns token ids up to {int(ids.max())}, but the text tower has "
                f"{self._vocabulary}; use the tokenizer that the model was trained with"
            )
        return ids

    def _lengths(self, ids: Tensor, name: str) -> Tensor:
        lengths = self._end_positions(ids) + 1
        if bool((lengths == 0).any()):
            raise TTDError(
                f"the tokenizer of {name} returns rows without the end token at which the text tower pools; use the "
                "tokenizer that the model was trained with"
            )
        return lengths

    def native_transform(self) -> ImageTransform:
        """The caller's ``preprocess``, or the published one: shorter side to the image size, centre crop."""
        return native_transform(self._preprocess, self.description.image_size, self._normalisation)
