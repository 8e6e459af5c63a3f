"""What a backbone costs in use: images per second and peak memory of dense encoding."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

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
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        image_features(backbone, pixels)
    with tempfile.TemporaryDirectory(prefix="ttd-cost-") as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    used = peak = 0
    for event in sorted(changes, key=lambda one: one["ts"]):
        used += int(event["args"]["Bytes"])
        peak = max(peak, used)
    return peak
