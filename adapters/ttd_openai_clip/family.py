"""The family ``openai_clip``: models by name and as objects; transformers is imported only when it is needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ttd_openai_clip.adapter import OpenAICLIPAdapter
from ttd_openai_clip.align_adapter import AlignAdapter
from ttd_openai_clip.architectures import CONFIGURATIONS, SHORT_NAMES, hub_name
from ttd_openai_clip.masked_text_clip_adapter import MaskedTextCLIPAdapter
from ttd_openai_clip.original_adapter import OriginalResNetAdapter, OriginalViTAdapter
from ttd_openai_clip.recognition import MODEL_TYPES, container, import_transformers, unclaimed_reason
from ttd_openai_clip.transformers_adapter import TransformersCLIPAdapter
from ttd_plugins.adapter import Calibration, DenseAdapter
from ttd_plugins.errors import BackboneNameError, InputError, TTDError, UnsupportedModelError, choices_sentence
from ttd_plugins.options import Resampling
from ttd_plugins.toolkit.clip_family import OWN_WEIGHTS, PRECISIONS, RANDOM, TINY, CLIPFamily
from ttd_plugins.toolkit.transformers_models import LazyTokenizer, TransformersModel

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "sentencepiece.bpe.model")
FEWEST_TOKENS = 16
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
ADAPTERS: dict[str, type[OpenAICLIPAdapter]] = {
    "transformers": TransformersCLIPAdapter,
    "masked_text": MaskedTextCLIPAdapter,
    "align": AlignAdapter,
    "original_vit": OriginalViTAdapter,
    "original_resnet": OriginalResNetAdapter,
}


class OpenAICLIPFamily(CLIPFamily):
    """OpenAI's CLIP and its relatives: models of transformers by name, and those or the original package's as objects.

    Names are a model on the hub (``openai/clip-vit-base-patch16``, any ``ORG/NAME`` with one of the classes below), a
    short name for OpenAI's own (``ViT-B-16``), the path of a folder, and ``tiny``, the embedded model.

    Objects are transformers' ``CLIPModel``, ``MetaClip2Model``, ``ChineseCLIPModel``, ``AltCLIPModel`` and
    ``AlignModel``, models of ``clip.load``, or objects with the same structure. The default dense mode is ``maskclip``;
    ResNets support only ``value_only``, and ALIGN only ``head``.
    """

    summary = "OpenAI's CLIP, MetaCLIP 2, Chinese CLIP, AltCLIP and ALIGN in transformers; OpenAI's clip package"
    api_version = 1
    adapter_class = OpenAICLIPAdapter

    def models(self) -> list[str]:
        """``tiny``, and the names of OpenAI's vision transformers on the hub."""
        return [TINY, *CONFIGURATIONS]

    def weights(self, model: str) -> list[str]:
        """``embedded`` for ``tiny``, ``own`` for every other model.

        Raises:
            BackboneNameError: the model is unknown.
            TTDError: the model is the path of a folder that does not exist.
        """
        if model != TINY:
            self._resolve(model)
        return [str(self.default_weights(model))]

    def _bundles_weights(self, model: str) -> bool:
        return True

    def _resolve(self, model: str) -> str:
        """The hub name or the folder that a model's name stands for."""
        name = hub_name(model)
        if name in CONFIGURATIONS or Path(name).expanduser().is_dir():
            return name if name in CONFIGURATIONS else str(Path(name).expanduser())
        if name.startswith((".", "/", "~")) or len(Path(name).parts) > 2:
            raise TTDError(f"there is no folder {model}; give the path of a folder, or ORG/NAME on the model hub")
        if not _HUB_NAME.fullmatch(name):
            choices = [*self.models(), *SHORT_NAMES]
            hint = "; ORG/NAME on the model hub and the path of a folder are accepted too"
            raise BackboneNameError(choices_sentence("openai_clip model", model, choices) + hint)
        return name

    def load(  # type: ignore[override]
        self,
        model: str,
        weights: str,
        *,
        dense: Any = None,
        calibration: Calibration | None = None,
        positions: Resampling = "library",
        tokenizer: Any = None,
        precision: str = "fp32",
        cache_dir: str | None = None,
    ) -> DenseAdapter:
        """Build a model of transformers, load its weights and wrap it, in evaluation mode and on the CPU.

        Fresh weights of OpenAI's own architectures need no network; their tokenizer is downloaded when a text is first
        tokenised.

        Args:
            model: a name on the hub, a short name, the path of a folder, or ``tiny``.
            weights: ``own`` or ``random``; for ``tiny`` ``embedded`` or ``random``.
            dense: the dense mode, a preset's name or a ``DenseMode``; by default that of the model.
            calibration: map from cosine to probability; by default that of the model, or else of the contract.
            positions: how position embeddings are resampled at other image sizes: ``library``, ``bicubic`` or ``dino``.
            tokenizer: replaces the model's own.
            precision: number format of the weights: ``fp32``, ``fp16`` or ``bf16``.
            cache_dir: folder for downloads; the hub's own by default.

        Raises:
            BackboneNameError: a part of the name is unknown; the message lists the choices.
            UnsupportedModelError: the name is that of another kind of model.
            InputError: an option is unknown.
            MissingDependencyError: transformers is not installed.
            TTDError: the weights cannot be read or downloaded.
        """
        if precision not in PRECISIONS:
            raise InputError(choices_sentence("precision", precision, PRECISIONS))
        dtype = PRECISIONS[precision]
        if model in self.embedded:
            return self._load_embedded(
                model,
                weights,
                tokenizer=tokenizer,
                dense=dense,
                calibration=calibration,
                positions=positions,
                dtype=dtype,
            )
        where = self._resolve(model)
        if weights not in (OWN_WEIGHTS, RANDOM):
            raise BackboneNameError(choices_sentence(f"weights of openai_clip:{model}", weights, [OWN_WEIGHTS, RANDOM]))
        source = TransformersModel(
            import_transformers,
            f"openai_clip:{model}@{weights}",
            where,
            "CLIP",
            _unsupported_config_reason,
            kinds=MODEL_TYPES,
            processor_class="CLIPImageProcessor",
            processor_classes={"align": AlignAdapter.processor_class},
            cache_dir=cache_dir,
            tokenizer_files=TOKENIZER_FILES,
            fewest_tokens=FEWEST_TOKENS,
        )
        if weights == RANDOM and where in CONFIGURATIONS:
            built, processor = source.build(CONFIGURATIONS[where]), None
        else:
            built, processor = source.load(weights=weights == OWN_WEIGHTS)
        if tokenizer is None:
            # A tokenizer that cannot be loaded fails now, except where only images may be wanted.
            eager = weights == OWN_WEIGHTS and source.has_tokenizer_files
            tokenizer = source.load_tokenizer() if eager else LazyTokenizer(source)
        return self._adapt(
            built.to(dtype),
            tokenizer=tokenizer,
            preprocess=processor,
            dense=dense,
            calibration=calibration,
            positions=positions,
            name=model,
            weights=weights,
        )

    def claims(self, model: object) -> bool:
        """Whether ``model`` is a supported model of transformers or of the original package, by its structure."""
        return container(model) is not None

    def unclaimed_reason(self, model: object) -> str | None:
        """Why a model that resembles a supported one is not claimed; ``None`` for other objects."""
        return unclaimed_reason(model)

    def _adapt(self, model: nn.Module, **options: Any) -> OpenAICLIPAdapter:
        kind = container(model)
        if kind is None:
            raise UnsupportedModelError(
                f"this {type(model).__name__} cannot be adapted: it is built neither like transformers' CLIPModel nor "
                "like a model of the original clip package"
            )
        return ADAPTERS[kind](model, **options)


def _unsupported_config_reason(config: Mapping[str, Any]) -> str | None:
    """Why a model with this ``config.json`` cannot be adapted, as the end of a sentence; ``None`` where it can."""
    kind = config.get("model_type")
    if kind in MODEL_TYPES:
        return None
    return f"its configuration has model type {kind!r}, and this family supports {', '.join(MODEL_TYPES)}"
