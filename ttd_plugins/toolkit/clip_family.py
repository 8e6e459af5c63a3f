"""Base class of families of published CLIP models: an embedded model named ``tiny``, and models as objects."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn

from ttd_plugins.adapter import AdapterFamily, Calibration, DenseAdapter
from ttd_plugins.embedded.folder import read_settings
from ttd_plugins.errors import BackboneNameError, choices_sentence
from ttd_plugins.toolkit.clip_adapter import CLIPAdapter

TINY = "tiny"
EMBEDDED, OWN_WEIGHTS, RANDOM = "embedded", "own", "random"
"""Weights of the embedded model, of a repository or folder that bundles them, and fresh ones."""
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class CLIPFamily(AdapterFamily):
    """A family of CLIP models; subclasses say which models there are and how they are loaded.

    The module ``tiny`` in the package of the subclass has ``EMBEDDED_FOLDER`` and ``load_tiny`` of the embedded model.

    Attributes:
        adapter_class: class of the adapter, which states the name of the family; families with several classes override
            :meth:`_adapt`.
    """

    adapter_class: ClassVar[type[CLIPAdapter]]

    @property
    def name(self) -> str:  # type: ignore[override]
        """The part before ``:`` in ``family:model@weights``."""
        return self.adapter_class.family

    def default_weights(self, model: str) -> str | None:
        """``embedded`` for ``tiny``, ``own`` for a model that bundles its weights; otherwise there is no default."""
        if model == TINY:
            return EMBEDDED
        return OWN_WEIGHTS if self._bundles_weights(model) else None

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

        Raises:
            UnsupportedModelError: a part of the model is not supported, with the reason.
            InputError: an option is unknown.
        """
        return self._adapt(model, tokenizer=tokenizer, preprocess=preprocess, dense=dense, calibration=calibration)

    def _adapt(self, model: nn.Module, **options: Any) -> DenseAdapter:
        """Wrap ``model`` in the adapter class that fits; ``options`` are those of the adapter."""
        return self.adapter_class(model, **options)

    def _load_tiny(
        self,
        weights: str,
        *,
        tokenizer: Any,
        dense: Any,
        calibration: Calibration | None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> DenseAdapter:
        """The embedded model; its folder says which dense mode and calibration are used by default.

        Raises:
            BackboneNameError: the weights are unknown.
            TTDError: a file of the folder is absent or damaged.
        """
        if weights not in (EMBEDDED, RANDOM):
            raise BackboneNameError(choices_sentence(f"weights of {self.name}:tiny", weights, [EMBEDDED, RANDOM]))
        tiny = importlib.import_module(f"{type(self).__module__.rpartition('.')[0]}.tiny")
        model, own_tokenizer = tiny.load_tiny(tiny.EMBEDDED_FOLDER, weights=weights == EMBEDDED)
        settings = read_settings(tiny.EMBEDDED_FOLDER)
        adapter = self._adapt(
            model.to(dtype),
            tokenizer=tokenizer if tokenizer is not None else own_tokenizer,
            dense=dense if dense is not None else settings.dense_mode,
            calibration=calibration if calibration is not None else settings.calibration,
            name=TINY,
            weights=weights,
            **options,
        )
        if isinstance(adapter, CLIPAdapter):
            adapter.trained_on = settings.trained_on if weights == EMBEDDED else None
            if calibration is None and (weights == RANDOM or settings.trained_on is not None):
                # The shipped calibration was fitted to the images of the training, and not to photographs.
                adapter.calibrated = False
        return adapter
