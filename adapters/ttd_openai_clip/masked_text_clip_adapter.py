"""The adapter for transformers' ``ChineseCLIPModel`` and ``AltCLIPModel``."""

from __future__ import annotations

from torch import Tensor

from ttd_openai_clip.masked_text import MaskedTextAdapter
from ttd_openai_clip.transformers_adapter import TransformersCLIPAdapter
from ttd_plugins.adapter import Tower


class MaskedTextCLIPAdapter(MaskedTextAdapter, TransformersCLIPAdapter):
    """The image tower of transformers' ``CLIPModel`` beside a text tower in the style of BERT."""

    def pooling_positions(self, ids: Tensor) -> None:
        """``None``: the text tower attends to later tokens, so texts cannot be packed."""
        return

    def lora_targets(self, tower: Tower) -> list[str]:
        """The linear layers of every text block; the image tower's as in :class:`TransformersCLIPAdapter`."""
        return self._text_targets() if tower == "text" else super().lora_targets(tower)
