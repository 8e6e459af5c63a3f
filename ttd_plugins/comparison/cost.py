"""What a backbone costs in use: images per second and peak memory of dense encoding."""

from __future__ import annotations

import time
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ttd_plugins.adapter import DenseAdapter, image_features
from ttd_plugins.engine import evaluation_mode

BATCH = 8
"""Images that are encoded at once."""
ROUNDS = 3
MAX_SECONDS = 10.0
"""A slow backbone is measured in fewer rounds."""


@torch.no_grad()
def measure_cost(backbone: DenseAdapter) -> dict[str, float | int]:
    """Measure dense encoding of :data:`BATCH` images of the backbone's preferred size, on its device.

    Returns:
        ``images_per_second``, the median over rounds after a warm-up; ``memory_bytes``, weights and buffers with the
        peak allocation of one pass on the device; ``batch``.
    """
    height, width = backbone.description.image_size
    dtype = next(backbone.model.parameters()).dtype
    pixels = torch.zeros(BATCH, 3, height, width, device=backbone.device, dtype=dtype)
    with evaluation_mode(backbone):
        image_features(backbone, pixels)
        seconds: list[float] = []
        while len(seconds) < ROUNDS and sum(seconds) < MAX_SECONDS:
            _wait(backbone)
            started = time.perf_counter()
            image_features(backbone, pixels)
            _wait(backbone)
            seconds.append(time.perf_counter() - started)
        peak = _peak_of_pass(backbone, pixels)
    stored = [*backbone.model.parameters(), *backbone.model.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in stored)
    median = sorted(seconds)[len(seconds) // 2]
    return {"images_per_second": round(BATCH / max(median, 1e-9), 2), "memory_bytes": weights + peak, "batch": BATCH}


def _wait(backbone: DenseAdapter) -> None:
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)


def _peak_of_pass(backbone: DenseAdapter, pixels: Tensor) -> int:
    """Largest sum of tensors that one pass allocates and has not freed yet, in bytes."""
    if backbone.device.type == "cuda":
        before = torch.cuda.memory_allocated(backbone.device)
        torch.cuda.reset_peak_memory_stats(backbone.device)
        image_features(backbone, pixels)
        return int(torch.cuda.max_memory_allocated(backbone.device)) - before
    # Not torch.profiler, which prints errors about GPUs on machines without one.
    with _Allocations([*backbone.model.parameters(), *backbone.model.buffers(), pixels]) as allocations:
        image_features(backbone, pixels)
    return allocations.peak


class _Allocations(TorchDispatchMode):
    """Bytes of the storages that operations allocate within a ``with`` block, while they are alive.

    Args:
        existing: tensors that are not counted.
    """

    def __init__(self, existing: list[Tensor]) -> None:
        super().__init__()
        self.used = self.peak = 0
        self._known = WeakIdKeyDictionary()
        self._existing = [tensor.untyped_storage() for tensor in existing]
        for storage in self._existing:
            self._known[storage] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage not in self._known:
                    self._known[storage] = True
                    self.used += storage.nbytes()
                    self.peak = max(self.peak, self.used)
                    weakref.finalize(storage, self._free, storage.nbytes()).atexit = False
        return result

    def _free(self, size: int) -> None:
        self.used -= size
