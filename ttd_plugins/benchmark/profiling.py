"""Profile of one step: its kernels by time, and the time of the host."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType

from ttd_plugins.benchmark.step_variants import Bench

LONGEST = 15
"""Kernels and operators in a profile."""


def profile_step(bench: Bench, variant: str) -> dict[str, Any]:
    """Profile one step after warm-up.

    Returns:
        ``seconds`` of a step that runs alone, and ``host_seconds`` until its last kernel is queued (medians of five
        steps without profiler; a full queue lets the host wait); of one step under ``torch.profiler``:
        ``kernels`` and ``kernel_seconds`` in all, copies and fills excluded; ``longest_kernels`` and
        ``longest_operators`` (the host's own time), each with name, calls and seconds.
    """

    def synchronize() -> None:
        if bench.device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        bench.call(variant)
    host, whole = [], []
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        bench.call(variant)
        host.append(time.perf_counter() - start)
        synchronize()
        whole.append(time.perf_counter() - start)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        bench.call(variant)
        synchronize()
    events: Sequence[Any] = profiler.key_averages()
    kernels = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and not event.key.startswith(("Memcpy", "Memset"))
    ]
    operators = [event for event in events if event.device_type == DeviceType.CPU]

    def longest(found: list[Any], attribute: str) -> list[dict[str, Any]]:
        ordered = sorted(found, key=lambda event: getattr(event, attribute), reverse=True)[:LONGEST]
        return [
            {"name": event.key, "calls": event.count, "seconds": getattr(event, attribute) / 1e6} for event in ordered
        ]

    return {
        "seconds": median(whole),
        "host_seconds": median(host),
        "kernels": sum(event.count for event in kernels),
        "kernel_seconds": sum(event.self_device_time_total for event in kernels) / 1e6,
        "longest_kernels": longest(kernels, "self_device_time_total"),
        "longest_operators": longest(operators, "self_cpu_time_total"),
    }
