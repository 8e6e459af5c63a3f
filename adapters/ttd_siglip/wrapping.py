"""From a model object to the adapter of its library."""

from __future__ import annotations

from typing import Any

from torch import nn

from ttd_plugins.errors import UnsupportedModelError
from ttd_siglip.adapter import SiglipAdapter
from ttd_siglip.structure import is_timm_siglip, is_transformers_siglip, refusal_of_model
from ttd_siglip.timm_adapter import TimmSiglipAdapter
from ttd_siglip.transformers_adapter import TransformersSiglipAdapter


def adapt(model: nn.Module, **options: Any) -> SiglipAdapter:
    """Wrap ``model`` in the adapter that fits; ``options`` are those of :class:`SiglipAdapter`.

    Raises:
        UnsupportedModelError: no adapter fits, or a part of the model cannot be served, with the reason.
    """
    if is_transformers_siglip(model):
        return TransformersSiglipAdapter(model, **options)
    if is_timm_siglip(model):
        return TimmSiglipAdapter(model, **options)
    raise UnsupportedModelError(f"this {type(model).__name__} cannot be adapted: {refusal_of_model(model)}")
