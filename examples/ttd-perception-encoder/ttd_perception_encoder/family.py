"""The family ``perception_encoder``: models by name and as objects; open_clip is imported only when it is needed."""

from __future__ import annotations

from typing import Any

from ttd_perception_encoder.adapter import PerceptionEncoderAdapter
from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.errors import BackboneNameError, choices_sentence
from ttd_plugins.toolkit.clip_family import RANDOM, TINY
from ttd_plugins.toolkit.open_clip_family import OpenCLIPModelFamily


class PerceptionEncoderFamily(OpenCLIPModelFamily):
    """Perception Encoder (PE-Core) of open_clip; ``tiny`` has random weights only."""

    summary = "Perception Encoder (PE-Core) of open_clip and timm"
    api_version = 1
    adapter_class = PerceptionEncoderAdapter

    def weights(self, model: str) -> list[str]:
        """As in the base class; none for ``tiny``."""
        return [] if model == TINY else super().weights(model)

    def default_weights(self, model: str) -> str | None:
        """``own`` for a hub model or a folder; otherwise there is no default."""
        return None if model == TINY else super().default_weights(model)

    def _load_embedded(self, model: str, weights: str, *, tokenizer: Any, **options: Any) -> DenseAdapter:
        if weights != RANDOM:
            raise BackboneNameError(choices_sentence("weights of perception_encoder:tiny", weights, [RANDOM]))
        open_clip = self.adapter_class.recognition.import_open_clip()
        from ttd_perception_encoder.tiny import CONTEXT, build_tiny

        tokenizer = tokenizer if tokenizer is not None else open_clip.SimpleTokenizer(context_length=CONTEXT)
        return self._adapt(build_tiny(), tokenizer=tokenizer, name=TINY, weights=weights, **options)
