"""What the adapters of all kinds of image towers share: the family, LoRA of the text tower, the inferred config."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ttd_open_clip import recognition
from ttd_open_clip.model_config import read_config
from ttd_open_clip.open_clip_blocks import is_plain_attention
from ttd_plugins.adapter import LibraryReference, Tower
from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.open_clip_adapter import OpenCLIPModelAdapter


class OpenCLIPBaseAdapter(OpenCLIPModelAdapter):
    """A model with open_clip's own text tower, or one from transformers; subclasses know the image tower.

    Attributes:
        image_tower: the kind of image tower that the class adapts.
    """

    family = "open_clip"
    recognition = recognition
    image_tower: ClassVar[recognition.ImageTower]

    def _unsupported_reason(self, model: nn.Module) -> str | None:
        kind = recognition.image_tower_kind(model)
        if kind is None or kind == self.image_tower:
            return super()._unsupported_reason(model)
        return (
            f"its image tower is of the kind {kind!r} and {type(self).__name__} adapts {self.image_tower!r}; "
            "ttd_plugins.wrap(model) chooses the class"
        )

    @property
    def library_reference(self) -> LibraryReference | None:  # type: ignore[override]
        """CoCa's own calls, which normalise by default, unlike those of open_clip's other models."""
        if not hasattr(self.model, "text_decoder"):
            return None
        return LibraryReference(
            image=lambda model, pixels: model.encode_image(pixels, normalize=False),
            text=lambda model, ids, mask: model.encode_text(ids, normalize=False),
        )

    def _inferred_config(self) -> Mapping[str, Any] | None:
        return read_config(self.model, self._embedding_widths()[0])

    def lora_targets(self, tower: Tower) -> list[str]:
        """Targets of the text tower: attention (whole) and both matrices of the MLP in every block.

        Attention with extras (norms on queries and keys, scaled heads) is wrapped at its output projection only. In a
        text tower from transformers the targets are the linear layers of its blocks.
        """
        return text_tower.lora_targets(self.model, is_plain_attention) if tower == "text" else self._image_targets()

    @abstractmethod
    def _image_targets(self) -> list[str]:
        """Names of the modules of the image tower that LoRA wraps."""

    def lora_layers(self) -> Mapping[type[nn.Module], type[nn.Module]]:
        """The toolkit's LoRA layer, and ours for open_clip's own attention; neither writes base weights. Needs peft."""
        from ttd_open_clip.attention_lora import LoRAOpenClipAttention

        layers = dict(super().lora_layers())
        for tower in (self._visual, text_tower.text_module(self.model)):
            for block in getattr(getattr(tower, "transformer", None), "resblocks", []):
                if not isinstance(block.attn, nn.MultiheadAttention) and is_plain_attention(block.attn):
                    layers[type(block.attn)] = LoRAOpenClipAttention
        return layers
