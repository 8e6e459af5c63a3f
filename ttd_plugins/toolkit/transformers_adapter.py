"""Base class of adapters for models of transformers with two towers: where the parts are, image processor, export."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from ttd_plugins.adapter import ExportedModel
from ttd_plugins.errors import TTDError
from ttd_plugins.toolkit.clip_adapter import CLIPAdapter
from ttd_plugins.toolkit.transformers_blocks import text_sizes
from ttd_plugins.toolkit.transformers_export import export_transformers
from ttd_plugins.toolkit.transformers_models import LazyTokenizer
from ttd_plugins.toolkit.transforms import image_processor


class TransformersModelAdapter(CLIPAdapter):
    """A model of transformers with ``vision_model`` and ``text_model``.

    Attributes:
        processor_class: class of transformers that prepares the model's images.
    """

    processor_class: ClassVar[str]

    @staticmethod
    @abstractmethod
    def _import_transformers() -> Any:
        """Return the module ``transformers``, or raise MissingDependencyError."""

    @abstractmethod
    def _processor_sizes(self) -> dict[str, Any]:
        """Keyword arguments of the image processor that set its sizes."""

    @property
    def _vision(self) -> Any:
        return self.model.vision_model

    @property
    def _text(self) -> Any:
        return self.model.text_model

    @property
    def _patch_size(self) -> tuple[int, int]:
        height, width = self._vision.embeddings.patch_embedding.kernel_size
        return int(height), int(width)

    @property
    def _context_length(self) -> int:
        return text_sizes(self.model)[0]

    def _own_processor(self) -> Any:
        """transformers' image processor with this model's size and normalisation."""
        return getattr(self._import_transformers(), self.processor_class)(
            **self._processor_sizes(),
            image_mean=list(self._normalisation.mean),
            image_std=list(self._normalisation.std),
            resample=2 if self._normalisation.interpolation == "bilinear" else 3,
        )

    def _export_notes(self) -> list[str]:
        """Notes for users of the exported model, each a full sentence."""
        return []

    def export(self, folder: Path) -> ExportedModel:
        """Write a ``save_pretrained`` folder of transformers: model, image processor, and the tokenizer if known.

        Raises:
            UnsupportedModelError: transformers has no such class.
            MissingDependencyError: transformers is not installed.
        """
        transformers = self._import_transformers()
        own = image_processor(self._preprocess)
        tokenizer, notes = self.tokenizer, self._export_notes()
        if isinstance(tokenizer, LazyTokenizer):
            try:
                tokenizer = tokenizer.load()
            except TTDError as error:
                tokenizer = None
                notes.append(f"The tokenizer could not be loaded ({error}).")
        return export_transformers(
            self,
            folder,
            transformers=transformers,
            tokenizer=tokenizer,
            processor=own if hasattr(own, "save_pretrained") else self._own_processor(),
            notes=tuple(notes),
        )
