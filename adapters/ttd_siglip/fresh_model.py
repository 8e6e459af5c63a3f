"""A ``SiglipModel`` with fresh weights, with logit scale and bias as at the start of SigLIP's training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ttd_siglip.recognition import import_transformers

LOGIT_SCALE, LOGIT_BIAS = math.log(10), -10.0


def fresh_model(config: Mapping[str, Any]) -> Any:
    """Build ``SiglipModel`` from keyword arguments of ``SiglipConfig``, on the CPU and in train mode.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    transformers = import_transformers()
    model = transformers.SiglipModel(transformers.SiglipConfig(**config))
    initialise_logits(model)
    return model


def initialise_logits(model: Any) -> None:
    """Set logit scale and bias of a fresh model as at the start of training (arXiv 2303.15343).

    transformers sets both to 0. SigLIP starts at a temperature of 10 and a bias of -10, because a batch has many more
    negative pairs than positive ones.
    """
    with torch.no_grad():
        model.logit_scale.fill_(LOGIT_SCALE)
        model.logit_bias.fill_(LOGIT_BIAS)
