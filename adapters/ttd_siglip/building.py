"""A ``SiglipModel`` with fresh weights, at the logits that SigLIP starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ttd_siglip.library import import_transformers

LOGIT_SCALE, LOGIT_BIAS = math.log(10), -10.0


def fresh_model(config: Mapping[str, Any]) -> Any:
    """Build ``SiglipModel`` from keyword arguments of ``SiglipConfig``, on the CPU and in train mode.

    transformers leaves logit scale and bias of a fresh model at 0; here they are as SigLIP's training starts
    (arXiv 2303.15343): a temperature of 10 and a bias of -10, against the many negatives of a batch.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    transformers = import_transformers()
    model = transformers.SiglipModel(transformers.SiglipConfig(**config))
    start_logits(model)
    return model


def start_logits(model: Any) -> None:
    """Set logit scale and bias of a fresh model to where SigLIP's training starts."""
    with torch.no_grad():
        model.logit_scale.fill_(LOGIT_SCALE)
        model.logit_bias.fill_(LOGIT_BIAS)
