"""The adapter for transformers' ``ChineseCLIPModel`` and ``AltCLIPModel``."""

from __future__ import annotations

from ttd_openai_clip.masked_text import MaskedTextAdapter
from ttd_openai_clip.transformers_adapter import TransformersCLIPAdapter


class MaskedTextCLIPAdapter(MaskedTextAdapter, TransformersCLIPAdapter):
    """The image tower of transformers' ``CLIPModel`` beside a text tower in the style of BERT."""
