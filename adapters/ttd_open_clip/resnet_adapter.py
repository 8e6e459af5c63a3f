"""The adapter for open_clip's modified ResNets, which pool by attention."""

from __future__ import annotations

from ttd_open_clip.base_adapter import OpenCLIPBaseAdapter
from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.modified_resnet import ModifiedResNetAdapter


class OpenCLIPResNetAdapter(ModifiedResNetAdapter, OpenCLIPBaseAdapter):
    """``open_clip.CLIP`` or ``CustomTextCLIP`` with a modified ResNet (``RN50`` to ``RN50x64``)."""

    image_tower = "resnet"

    def _embedding_widths(self) -> tuple[int, int | None]:
        return self._embedding_width(), text_tower.embedding_width(self.model)

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Switch activation checkpointing; for the ResNet by an attribute, since open_clip's own switch ignores it."""
        super().set_grad_checkpointing(enabled)
        self._visual.grad_checkpointing = enabled
