"""Base class of families of published CLIP models: embedded models such as ``tiny``, and models as objects."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ttd_plugins.adapter import AdapterFamily, Calibration, DenseAdapter
from ttd_plugins.embedded.folder import LORA_FOLDER, read_settings
from ttd_plugins.errors import BackboneNameError, choices_sentence
from ttd_plugins.lora import load_lora
from ttd_plugins.options import Resampling
from ttd_plugins.toolkit.clip_adapter import CLIPAdapter

TINY = "tiny"
EMBEDDED, OWN_WEIGHTS, RANDOM = "embedded", "own", "random"
"""Weights of the embedded model, of a repository or folder that bundles them, and fresh ones."""
AFTER_TTD = "ttd"
"""Weights of an embedded model after TTD, if its folder has a LoRA."""
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class CLIPFamily(AdapterFamily):
    """A family of CLIP models; subclasses say which models there are and how they are loaded.

    Attributes:
        adapter_class: class of the adapter, which states the name of the family; families with several classes override
            :meth:`_adapt`.
        embedded: by name of an embedded model, ``module:function`` in the package of the subclass. The function is
            called as :func:`~ttd_plugins.toolkit.tiny_models.load_tiny_model`, and the module has the folder of the
            model as ``EMBEDDED_FOLDER``.
    """

    embedded: ClassVar[Mapping[str, str]] = {TINY: "tiny:load_tiny"}

    adapter_class: ClassVar[type[CLIPAdapter]]

    @property
    def name(self) -> str:  # type: ignore[override]
        """The part before ``:`` in ``family:model@weights``."""
        return self.adapter_class.family

    @property
    def embedded_models(self) -> list[str]:  # type: ignore[override]
        """Names of the embedded models."""
        return list(self.embedded)

    def default_weights(self, model: str) -> str | None:
        """``embedded`` for an embedded model, ``own`` for one that bundles its weights; ``None`` for others."""
        if model in self.embedded:
            return EMBEDDED
        return OWN_WEIGHTS if self._bundles_weights(model) else None

    def _embedded_weights(self, model: str) -> list[str]:
        """Names of the weights of an embedded model, its default first, without ``random``."""
        has_lora = (self._embedded_module(model).EMBEDDED_FOLDER / LORA_FOLDER).is_dir()
        return [EMBEDDED, AFTER_TTD] if has_lora else [EMBEDDED]

    def _embedded_module(self, model: str) -> Any:
        """The module that builds an embedded model."""
        name = self.embedded[model].partition(":")[0]
        return importlib.import_module(f"{type(self).__module__.rpartition('.')[0]}.{name}")

    @abstractmethod
    def _bundles_weights(self, model: str) -> bool:
        """Whether a name is that of a repository or folder, which bundles weights."""

    def wrap(  # type: ignore[override]
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        preprocess: Any = None,
        dense: Any = None,
        calibration: Calibration | None = None,
        positions: Resampling = "library",
    ) -> DenseAdapter:
        """Adapt a model that the caller already has, without changing it.

        Args:
            model: a model that the family claims.
            tokenizer: the model's tokenizer; it may be left out where no text is tokenised. A model does not say which
                tokenizer it was trained with.
            preprocess: the model's evaluation preprocessing, or a mapping with ``mean`` and ``std``; by default what
                the model says itself, or else what its family was trained with.
            dense: the dense mode, a name or a mode object; by default that of the adapter.
            calibration: map from cosine to probability; by default that of the adapter.
            positions: how position embeddings are resampled at other image sizes: ``library``, ``bicubic`` or ``dino``.

        Raises:
            UnsupportedModelError: a part of the model is not supported, with the reason.
            InputError: an option is unknown.
        """
        return self._adapt(
            model,
            tokenizer=tokenizer,
            preprocess=preprocess,
            dense=dense,
            calibration=calibration,
            positions=positions,
        )

    def _adapt(self, model: nn.Module, **options: Any) -> DenseAdapter:
        """Wrap ``model`` in the adapter class that fits; ``options`` are those of the adapter."""
        return self.adapter_class(model, **options)

    def _load_embedded(
        self,
        model: str,
        weights: str,
        *,
        tokenizer: Any,
        dense: Any,
        calibration: Calibration | None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> DenseAdapter:
        """An embedded model; its folder says which dense mode and calibration are used by default.

        The weights ``ttd`` are those of the folder with its LoRA merged into them.

        Raises:
            BackboneNameError: the weights are unknown.
            MissingDependencyError: the weights are ``ttd``, and peft is not installed.
            TTDError: a file of the folder is absent or damaged.
        """
        known = [*self._embedded_weights(model), RANDOM]
        if weights not in known:
            raise BackboneNameError(choices_sentence(f"weights of {self.name}:{model}", weights, known))
        module, function = self._embedded_module(model), self.embedded[model].partition(":")[2]
        built, own_tokenizer = getattr(module, function)(module.EMBEDDED_FOLDER, weights=weights != RANDOM)
        if weights == AFTER_TTD:
            # Through an adapter of its own, so that unload() of the returned one restores the merged weights.
            load_lora(self._adapt(built, tokenizer=own_tokenizer), module.EMBEDDED_FOLDER / LORA_FOLDER).merge()
        settings = read_settings(module.EMBEDDED_FOLDER)
        adapter = self._adapt(
            built.to(dtype),
            tokenizer=tokenizer if tokenizer is not None else own_tokenizer,
            dense=dense if dense is not None else settings.dense_mode,
            calibration=calibration if calibration is not None else settings.calibration,
            name=model,
            weights=weights,
            **options,
        )
        if isinstance(adapter, CLIPAdapter):
            adapter.trained_on = settings.trained_on if weights != RANDOM else None
            if calibration is None and (weights == RANDOM or settings.trained_on is not None):
                # The shipped calibration was fitted to the images of the training, and not to photographs.
                adapter.calibrated = False
        return adapter
