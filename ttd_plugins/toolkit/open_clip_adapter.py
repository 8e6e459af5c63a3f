"""Base class of adapters for models that open_clip builds, whatever their image tower: texts, preprocessing, export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor, nn

from ttd_plugins.adapter import ExportedModel, ImageTransform, Tokens, Tower
from ttd_plugins.packed_texts import PackedTexts
from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.clip_adapter import CLIPAdapter
from ttd_plugins.toolkit.open_clip_export import export_open_clip
from ttd_plugins.toolkit.tokenizing import RowTokenizer
from ttd_plugins.toolkit.transforms import (
    OPENAI_NORMALISATION,
    NativeTransform,
    Normalisation,
    read_normalisation,
)


class OpenCLIPModelAdapter(CLIPAdapter):
    """A model with ``visual`` and a text tower as open_clip builds them.

    Tokenizers are those of ``open_clip.get_tokenizer``: called with a list of strings, they return ids ``[N,
    context]``.

    Attributes:
        recognition: the module with ``claims(model)``, ``unsupported_reason(model)``,
            ``unsupported_config_reason(model_cfg)`` and ``import_open_clip()``.
        default_context_length: positions of a text tower that does not state them and has no tokenizer.
        default_resize_mode: open_clip's name for how images of other aspect ratios are resized, where the model does
            not say.
        export_failure: why open_clip may be unable to rebuild a model, for messages.
    """

    recognition: ModuleType
    default_context_length: ClassVar[int] = text_tower.DEFAULT_CONTEXT_LENGTH
    default_resize_mode: ClassVar[str] = "shortest"
    export_failure: ClassVar[str] = "none of its architectures is this model"

    def _unsupported_reason(self, model: nn.Module) -> str | None:
        return self.recognition.unsupported_reason(model)

    @property
    def _visual(self) -> Any:
        return self.model.visual

    @property
    def _input_size(self) -> Any:
        """Height and width in pixels that the library's preprocessing produces."""
        return self._visual.image_size

    def _read_normalisation(self, preprocess: Any) -> Normalisation:
        return read_normalisation(self._visual, preprocess, OPENAI_NORMALISATION, "open_clip's preprocess_val")

    # Texts ---------------------------------------------------------------------------------------------------------

    @property
    def _context_length(self) -> int:
        return text_tower.context_length(self.model, self.tokenizer, self.default_context_length)

    @property
    def _text_needs_full_context(self) -> bool:
        return not text_tower.can_trim(self.model)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Text embeddings ``[N, D]``, not L2-normalised.

        Args:
            ids: int64 ``[N, L]``; L may be any length that keeps each row's end token, unless
                ``description.text_needs_full_context``.

        Raises:
            InputError: L is longer than the context, or shorter where the full context is needed.
        """
        return text_tower.encode_text(self.model, ids)

    def pooling_positions(self, ids: Tensor) -> Tensor | None:
        """The pooled position of each row; ``None`` if the text tower is not native or not causal."""
        return text_tower.pooling_positions(self.model, ids)

    def encode_packed_texts(self, packed: PackedTexts) -> Tensor:
        """Text embeddings ``[N, D]`` of packed texts, not L2-normalised."""
        return text_tower.encode_packed_texts(self.model, packed)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokenise with the caller's tokenizer at the model's context length.

        A text counts as truncated if it fills the context and the tokenizer has more ids for it. A tokenizer with
        neither ``context_length`` nor ``encode`` cannot tell, so there every text that fills the context counts.

        Raises:
            TTDError: no tokenizer was given, or it does not fit the model.
            InputError: ``texts`` is not a sequence of strings.
        """
        advice = "open_clip.get_tokenizer(NAME), NAME being the model's name"
        return RowTokenizer(self.tokenizer, self.model, self.description.name, advice).tokenize(texts)

    # Preprocessing and export --------------------------------------------------------------------------------------

    def native_transform(self) -> ImageTransform:
        """The caller's ``preprocess``, or open_clip's evaluation preprocessing for this model, which may crop."""
        if self._preprocess is not None:
            return NativeTransform(self._preprocess)
        transform = self.recognition.import_open_clip().transform
        settings = {
            "resize_mode": self.default_resize_mode,
            **(getattr(self._visual, "preprocess_cfg", None) or {}),
            "mean": self._normalisation.mean,
            "std": self._normalisation.std,
            "interpolation": self._normalisation.interpolation,
            "size": self._input_size,
        }
        config = transform.PreprocessCfg(**transform.merge_preprocess_dict(transform.PreprocessCfg(), settings))
        return NativeTransform(transform.image_transform_v2(config, is_train=False))

    def export(self, folder: Path) -> ExportedModel:
        """Write the model as open_clip's own folder, which ``local-dir:PATH`` loads, tokenizer included.

        open_clip passes only the name of a timm trunk on to timm. So it cannot rebuild a trunk of other sizes than
        those of its architectures, such as the trunk of an embedded ``tiny`` model.

        Raises:
            UnsupportedModelError: open_clip cannot build this model.
            MissingDependencyError: open_clip is not installed.
        """
        return export_open_clip(
            self,
            folder,
            open_clip=self.recognition.import_open_clip(),
            tokenizer=self.tokenizer,
            normalisation=self._normalisation,
            inferred=self._inferred_config(),
            default_resize_mode=self.default_resize_mode,
            why=self.export_failure,
        )

    def _inferred_config(self) -> Mapping[str, Any] | None:
        """A ``model_cfg`` of open_clip read from the modules, for architectures without a name; ``None`` for none."""
        return None

    # Training ------------------------------------------------------------------------------------------------------

    def lora_layers(self) -> Mapping[type[nn.Module], type[nn.Module]]:
        """The toolkit's LoRA layer for ``nn.MultiheadAttention``, which never writes a base weight; needs peft."""
        from ttd_plugins.toolkit.attention_lora import LoRAMultiheadAttention

        return {nn.MultiheadAttention: LoRAMultiheadAttention}

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Switch activation checkpointing; a text tower of transformers by its own switch.

        open_clip's switch for such towers only ever switches it on.
        """
        super().set_grad_checkpointing(enabled)
        inner: Any = getattr(text_tower.text_module(self.model), "transformer", None)
        if not text_tower.is_native(self.model) and hasattr(inner, "gradient_checkpointing_disable"):
            if enabled:
                inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            else:
                inner.gradient_checkpointing_disable()

    def tower_parameters(self, tower: Tower) -> Iterable[tuple[str, nn.Parameter]]:
        """Named parameters of one tower; logit scale and bias, and a caption decoder, belong to neither."""
        inlined = not hasattr(self.model, "text")
        for name, parameter in self.model.named_parameters():
            is_image = name.startswith("visual.")
            is_text = name.startswith("text.") or (inlined and not is_image and not name.startswith("logit_"))
            if is_image if tower == "image" else is_text:
                yield name, parameter


class TimmViTAdapter(OpenCLIPModelAdapter):
    """A model of open_clip whose image tower is a vision transformer of timm: ``visual.trunk``."""

    @property
    def _trunk(self) -> Any:
        return self._visual.trunk

    @property
    def _grid(self) -> tuple[int, int]:
        rows, columns = self._trunk.patch_embed.grid_size
        return int(rows), int(columns)

    @property
    def _patch_size(self) -> tuple[int, int]:
        height, width = self._trunk.patch_embed.proj.kernel_size
        return int(height), int(width)
