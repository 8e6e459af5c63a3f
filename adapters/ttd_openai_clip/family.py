"""The family ``openai_clip``: what can be loaded by name, and how; transformers is not imported before that."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ttd_openai_clip.architectures import CONFIGURATIONS, SHORT_NAMES, hub_name
from ttd_openai_clip.structure import container
from ttd_plugins.adapter import AdapterFamily, Calibration
from ttd_plugins.errors import BackboneNameError, InputError, TTDError, UnsupportedModelError, choices_sentence

if TYPE_CHECKING:
    from ttd_openai_clip.adapter import OpenAICLIPAdapter
    from ttd_openai_clip.download import Source
    from ttd_plugins.toolkit.dense_modes import DenseMode

TINY = "tiny"
EMBEDDED = "embedded"
OWN_WEIGHTS = "own"
RANDOM = "random"
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class OpenAICLIPFamily(AdapterFamily):
    """OpenAI's CLIP: transformers' ``CLIPModel`` by name, and that or the original package's models as objects.

    Names: a model on the hub (``openai/clip-vit-base-patch16``, any ``ORG/NAME`` with a ``CLIPModel``), a short name
    for OpenAI's own (``ViT-B-16``), the path of a folder, and ``tiny``, which comes with the package.
    """

    name = "openai_clip"
    summary = "OpenAI's CLIP in transformers (CLIPModel) or in the original clip package, ResNets included"
    api_version = 1

    # Names ---------------------------------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """``tiny``, and the names of OpenAI's vision transformers on the hub."""
        return [TINY, *CONFIGURATIONS]

    def weights(self, model: str) -> list[str]:
        """``embedded`` for ``tiny``, ``own`` for every other model.

        Raises:
            BackboneNameError: the model is unknown.
            TTDError: the model is the path of a folder that is not there.
        """
        if model != TINY:
            self._place(model)
        return [self.default_weights(model)]

    def default_weights(self, model: str) -> str:
        """``embedded`` for ``tiny``, ``own`` for every other model."""
        return EMBEDDED if model == TINY else OWN_WEIGHTS

    def _place(self, model: str) -> str:
        """The hub name or the folder that a model's name means."""
        name = hub_name(model)
        if name in CONFIGURATIONS or Path(name).expanduser().is_dir():
            return name if name in CONFIGURATIONS else str(Path(name).expanduser())
        if name.startswith((".", "/", "~")) or len(Path(name).parts) > 2:
            raise TTDError(f"there is no folder {model}; give the path of a folder, or ORG/NAME on the model hub")
        if not _HUB_NAME.fullmatch(name):
            choices = [*self.models(), *SHORT_NAMES]
            hint = "; ORG/NAME on the model hub and the path of a folder are taken too"
            raise BackboneNameError(choices_sentence("openai_clip model", model, choices) + hint)
        return name

    # Loading -------------------------------------------------------------------------------------------------------

    def load(  # type: ignore[override]
        self,
        model: str,
        weights: str,
        *,
        dense: str | DenseMode | None = None,
        calibration: Calibration | None = None,
        tokenizer: Any = None,
        precision: str = "fp32",
        cache_dir: str | None = None,
    ) -> OpenAICLIPAdapter:
        """Build a model of transformers, load its weights, and wrap it, in evaluation mode and on the CPU.

        Fresh weights of OpenAI's own architectures need no network; their tokenizer is fetched when a text is
        tokenised first.

        Args:
            model: a name on the hub, a short name, the path of a folder, or ``tiny``.
            weights: ``own`` or ``random``; for ``tiny`` ``embedded`` or ``random``.
            dense: the dense mode, a preset's name or a ``DenseMode``; by default what suits the model.
            calibration: map from cosine to probability; by default the model's, or else the contract's.
            tokenizer: instead of the model's own.
            precision: number format of the weights: ``fp32``, ``fp16`` or ``bf16``.
            cache_dir: where downloads are kept; the hub's own place by default.

        Raises:
            BackboneNameError: a part of the name is unknown; the message lists the choices.
            UnsupportedModelError: the name is another kind of model's.
            MissingDependencyError: transformers is not installed.
            TTDError: the weights cannot be read or downloaded.
        """
        if precision not in PRECISIONS:
            raise InputError(choices_sentence("precision", precision, PRECISIONS))
        place = TINY if model == TINY else self._place(model)
        known = [self.default_weights(model), RANDOM]
        if weights not in known:
            raise BackboneNameError(choices_sentence(f"weights of openai_clip:{model}", weights, known))
        options: dict[str, Any] = {"dense": dense, "calibration": calibration, "name": model, "weights": weights}
        if model == TINY:
            return self._load_tiny(weights, tokenizer, precision, options)
        from ttd_openai_clip.download import Source

        return self._load(Source(f"openai_clip:{model}@{weights}", place, cache_dir), tokenizer, precision, options)

    def _load(self, source: Source, tokenizer: Any, precision: str, options: dict[str, Any]) -> OpenAICLIPAdapter:
        from ttd_openai_clip import download
        from ttd_openai_clip.library import import_transformers

        transformers = import_transformers()
        random = options["weights"] == RANDOM
        problem = None
        if random and source.where in CONFIGURATIONS:
            config, preprocess = transformers.CLIPConfig(**CONFIGURATIONS[source.where]), None
        else:
            problem = source.fetch(weights=not random)
            config = download.read_config(source, problem)
            preprocess = download.load_image_processor(source, problem)
        model = download.build(config, source.full) if random else download.load_model(source, config, problem)
        if tokenizer is None:
            tokenizer = download.HubTokenizer(source)
            # What is going to fail should do so now, except where images alone may be wanted.
            if not random and not (source.is_folder and not download.has_any(source.where, download.TOKENIZER_FILES)):
                tokenizer = tokenizer.load()
        return self._adapt(model.to(PRECISIONS[precision]), tokenizer=tokenizer, preprocess=preprocess, **options)

    def _load_tiny(self, weights: str, tokenizer: Any, precision: str, options: dict[str, Any]) -> OpenAICLIPAdapter:
        from ttd_openai_clip import tiny
        from ttd_plugins.embedded.folder import read_settings

        model, own_tokenizer = tiny.load_tiny(tiny.EMBEDDED_FOLDER, weights=weights == EMBEDDED)
        settings = read_settings(tiny.EMBEDDED_FOLDER)
        if options["dense"] is None:
            options["dense"] = settings.dense_mode
        if options["calibration"] is None:
            options["calibration"] = settings.calibration
        tokenizer = own_tokenizer if tokenizer is None else tokenizer
        return self._adapt(model.to(PRECISIONS[precision]), tokenizer=tokenizer, **options)

    # Wrapping ------------------------------------------------------------------------------------------------------

    def claims(self, model: object) -> bool:
        """Whether ``model`` is transformers' ``CLIPModel`` or a model of the original package, by its structure."""
        return container(model) is not None

    def wrap(  # type: ignore[override]
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        preprocess: Any = None,
        dense: str | DenseMode | None = None,
        calibration: Calibration | None = None,
    ) -> OpenAICLIPAdapter:
        """Adapt a model that the caller already has, without changing it.

        Args:
            model: ``transformers.CLIPModel``, what ``clip.load`` gives, or an object built alike.
            tokenizer: a tokenizer or processor of transformers, or ``clip.tokenize``; it may be left out where no
                text is going to be tokenised, or where ``preprocess`` is a processor with a tokenizer.
            preprocess: an image processor or processor of transformers, the preprocessing that ``clip.load`` gives, or
                a mapping with ``mean`` and ``std``; by default what OpenAI's models were trained with.
            dense: the dense mode, a preset's name or a ``DenseMode``; by default ``maskclip``, and ``value_only`` for
                ResNets, which have no other.
            calibration: map from cosine to probability; the contract's by default.

        Raises:
            UnsupportedModelError: a part of the model cannot be served, with the reason.
        """
        return self._adapt(model, tokenizer=tokenizer, preprocess=preprocess, dense=dense, calibration=calibration)

    def _adapt(self, model: nn.Module, **options: Any) -> OpenAICLIPAdapter:
        from ttd_openai_clip.original import OriginalResNetAdapter, OriginalViTAdapter
        from ttd_openai_clip.transformers_clip import TransformersCLIPAdapter

        kind = container(model)
        if kind is None:
            raise UnsupportedModelError(
                f"this {type(model).__name__} cannot be adapted: it is built neither like transformers' CLIPModel nor "
                "like a model of the original clip package"
            )
        adapters: dict[str, type[OpenAICLIPAdapter]] = {
            "transformers": TransformersCLIPAdapter,
            "original_vit": OriginalViTAdapter,
            "original_resnet": OriginalResNetAdapter,
        }
        return adapters[kind](model, **options)
