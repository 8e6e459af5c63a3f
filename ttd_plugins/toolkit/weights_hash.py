"""A hash of a backbone's weights, which results store so that they are not taken for those of another model."""

from __future__ import annotations

import hashlib

import torch

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.toolkit.fast_inference import inference_settings


def weights_hash(adapter: DenseAdapter) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of all parameters and buffers."""
    digest = hashlib.sha256()
    model = adapter.model
    # The state dict of a copy for inference is refused, since nothing may load it.
    is_copy = inference_settings(adapter) is not None
    tensors = dict([*model.named_parameters(), *model.named_buffers()]) if is_copy else model.state_dict()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
