"""A whole benchmark: variants timed in turns, operations counted, memory, and where the time goes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from ttd_plugins.benchmark.memory import give_back, peak_memory
from ttd_plugins.benchmark.step_variants import RATIOS, VARIANTS, Bench, BenchOptions
from ttd_plugins.errors import TTDError, one_sentence

MEMORY_VARIANTS = ("contrastive", "contrastive_trimmed", "ttd", "unshared")


def run_benchmark(
    options: BenchOptions,
    *,
    bench: Bench | None = None,
    memory: bool = True,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a backbone.

    Args:
        options: what is measured.
        bench: what was built of them already.
        memory: whether peak memory is measured, in one fresh process a variant.
        on_progress: told what is done next.

    Returns:
        A JSON object: what was measured (``unshared`` is left out where the device has too little memory for it, and
        its ratios are ``None``); ``seconds`` of each variant (median, low and high); ``ratios``, medians of the
        rounds' own ratios, and ``spread``, their lowest and highest; ``operations`` of each variant, ``limits``, the
        same ratios of these, and ``over_limit``, how far each measured ratio is from it; ``parts`` of a TTD step in
        seconds and ``share`` of each; ``images_per_second`` of a TTD step; ``model_flops_utilisation`` of each variant,
        counted operations a second over ``peak_operations_per_second``, and whether that one was ``"measured"`` or
        ``"given"``; ``memory`` in bytes, and in ``memory_errors`` why that of a variant is not known.

    Raises:
        InputError: the data cannot be read.
        TTDError: the backbone cannot be had, or a step does not fit into the memory of the device.
    """
    try:
        return _run(options, bench, memory, on_progress or (lambda _: None))
    except torch.OutOfMemoryError as error:
        raise TTDError(_too_large("what is measured", options)) from error


def _too_large(what: str, options: BenchOptions) -> str:
    return (
        f"{what} with a batch of {options.batch_size} does not fit into the memory of the device (to count operations, "
        "the activations of all texts are held); give a smaller --batch-size"
    )


def _run(options: BenchOptions, bench: Bench | None, memory: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    tell(f"building {options.name}")
    bench = Bench(options) if bench is None else bench
    operations: dict[str, int] = {}
    for variant in VARIANTS:
        tell(f"counting: {variant}")
        fits = True
        try:
            operations[variant] = bench.count(variant)
        except torch.OutOfMemoryError:
            fits = False
        # Outside of the handler, which holds on to what the failed step had made.
        if not fits:
            bench.forget()
            if variant != "unshared":
                raise TTDError(_too_large(variant, options))
    measured = tuple(operations)
    rounds: list[dict[str, float]] = []
    parts: list[dict[str, float]] = []
    bench.parts()
    tell("warming up")
    bench.warm_up(measured)
    for number in range(options.repeats):
        tell(f"timing: round {number + 1} of {options.repeats}")
        # Another one begins each round, so that none always follows the same.
        first = number % len(measured)
        order = measured[first:] + measured[:first]
        rounds.append({variant: bench.seconds(partial(bench.call, variant), bench.in_a_row) for variant in order})
        parts.append(bench.parts())
    found = bench.describe() | {"repeats": options.repeats} | summary(rounds, operations)
    medians = {name: median(one[name] for one in parts) for name in parts[0]}
    found["parts"] = medians
    found["share"] = {name: seconds / sum(medians.values()) for name, seconds in medians.items()}
    found["images_per_second"] = found["batch_size"] / found["seconds"]["ttd"]["median"]
    found["peak_operations_per_second"] = peak = bench.peak()
    found["peak_source"] = "measured" if options.peak_tflops is None else "given"
    found["model_flops_utilisation"] = {
        variant: operations[variant] / seconds["median"] / peak for variant, seconds in found["seconds"].items()
    }
    found["memory"] = None
    found["ratios"]["memory_ttd_over_contrastive"] = None
    if memory:
        # Its own weights and gradients would be there beside those of the processes that measure.
        del bench
        gc.collect()
        give_back()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        used: dict[str, dict[str, int] | None] = {}
        for variant in (one for one in MEMORY_VARIANTS if one in measured):
            tell(f"memory: {variant}")
            try:
                used[variant] = peak_memory(options, variant)
            # A machine that has too little for it has measured the times all the same.
            except TTDError as error:
                used[variant] = None
                found.setdefault("memory_errors", {})[variant] = one_sentence(error)
        found["memory"] = used
        ours, theirs = used["ttd"], used["contrastive"]
        if ours and theirs and theirs["peak"] > 0:
            found["ratios"]["memory_ttd_over_contrastive"] = ours["peak"] / theirs["peak"]
    return found


def summary(rounds: Sequence[Mapping[str, float]], operations: Mapping[str, int]) -> dict[str, Any]:
    """Medians and spread of the seconds of variants and of the ratios of each round, beside the counted limits.

    Those of a variant that was not measured are ``None``.
    """
    seconds = {}
    for variant in rounds[0]:
        times = [one[variant] for one in rounds]
        seconds[variant] = {"median": median(times), "low": min(times), "high": max(times)}
    ratios: dict[str, float | None] = dict.fromkeys(RATIOS)
    spread: dict[str, list[float] | None] = dict.fromkeys(RATIOS)
    limits, over = ratios.copy(), ratios.copy()
    for name, (above, below) in RATIOS.items():
        if not {above, below} <= operations.keys():
            continue
        values = [one[above] / one[below] for one in rounds]
        ratios[name] = middle = median(values)
        spread[name] = [min(values), max(values)]
        limits[name] = limit = operations[above] / operations[below]
        over[name] = middle / limit
    return {
        "seconds": seconds,
        "ratios": ratios,
        "spread": spread,
        "operations": dict(operations),
        "limits": limits,
        "over_limit": over,
    }
