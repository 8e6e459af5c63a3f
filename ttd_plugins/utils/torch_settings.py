"""Settings of torch that are read without a message."""

from __future__ import annotations

import warnings

import torch


def matmul_precision() -> str:
    """Return ``torch.get_float32_matmul_precision()``; in torch 2.9 that call alone prints a deprecation warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.get_float32_matmul_precision()
