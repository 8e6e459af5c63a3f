"""Text towers of transformers in the style of BERT: attention to all tokens but padding, pooled at the first token.

Chinese CLIP, AltCLIP and ALIGN have such towers. The mask is built from the ids, so rows may be cut after the last
token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttd_openai_clip.adapter import OpenAICLIPAdapter
from ttd_plugins.adapter import LibraryReference
from ttd_plugins.toolkit.lora_targets import linear_layers_of_blocks
from ttd_plugins.toolkit.transformers_adapter import TransformersModelAdapter

TRAINED_CONTEXT = {"chinese_clip": 52, "altclip": 77, "align": 64}
"""Positions that the published models were trained at, by ``config.model_type``; their tables have 512 or more."""


class MaskedTextAdapter(OpenAICLIPAdapter, TransformersModelAdapter):
    """A model of transformers whose text tower masks its padding; subclasses know the image tower."""

    @property
    def _text_embeddings(self) -> Any:
        # AltCLIP's tower is inside of another module.
        return getattr(self._text, "roberta", self._text).embeddings

    @property
    def _padding_id(self) -> int:
        padding = self._text.config.pad_token_id
        return 0 if padding is None else int(padding)

    @property
    def _context_length(self) -> int:
        embeddings = self._text_embeddings
        positions = int(embeddings.position_embeddings.weight.shape[0])
        # RoBERTa counts positions from one after the padding id.
        positions -= 0 if getattr(embeddings, "padding_idx", None) is None else int(embeddings.padding_idx) + 1
        return min(positions, TRAINED_CONTEXT.get(self.model.config.model_type, positions))

    @property
    def _vocabulary(self) -> int:
        return int(self._text_embeddings.word_embeddings.weight.shape[0])

    @property
    def library_reference(self) -> LibraryReference:  # type: ignore[override]
        """transformers' own calls, with the mask of the padding as its processors pass it."""
        return LibraryReference(
            text=lambda model, ids, mask: model.get_text_features(input_ids=ids, attention_mask=mask)
        )

    def _end_positions(self, ids: Tensor) -> Tensor:
        positions = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        return ((ids != self._padding_id) * positions).amax(dim=-1) - 1

    def _encode_text(self, ids: Tensor) -> Tensor:
        mask = (ids != self._padding_id).long()
        # An output object, or a tuple if the configuration says so.
        out = self.model.get_text_features(input_ids=ids, attention_mask=mask)
        return out[1] if isinstance(out, tuple) else out.pooler_output

    def _text_targets(self) -> list[str]:
        """The linear layers of the text tower's blocks."""
        return linear_layers_of_blocks(self._text, "text_model")
