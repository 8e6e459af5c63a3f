"""A complete benchmark: alternating timings of variants, counted operations, memory, and the parts of a step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from ttd_plugins.benchmark.memory import peak_memory, trim_memory
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
    """Benchmark a backbone.

    Args:
        options: the benchmark's options.
        bench: a :class:`Bench` that was built with these options already.
        memory: whether to measure peak memory, in one new process per variant.
        on_progress: callback, called with a description of the next measurement.

    Returns:
        A dictionary for JSON: a description of the setup (see :meth:`Bench.describe`); ``seconds`` of each variant
        (median, low and high); ``ratios``, medians over rounds, and ``spread``, their lowest and highest value;
        ``operations`` of each variant; ``limits``, the same ratios of operations; ``over_limit``, each measured ratio
        over its limit; ``parts`` of a TTD step in seconds and the ``share`` of each; ``images_per_second`` of a TTD
        step; ``model_flops_utilisation`` of each variant, its operations per second over
        ``peak_operations_per_second``, which is ``"measured"`` or ``"given"`` (``peak_source``); ``memory`` in bytes,
        and ``memory_errors``, why the memory of a variant is unknown. If the device lacks memory for ``unshared``, that
        variant is missing and its ratios are ``None``.

    Raises:
        InputError: the data cannot be read.
        TTDError: the backbone cannot be loaded, or a step does not fit into the device's memory.
    """
    try:
        return _run(options, bench, memory, on_progress or (lambda _: None))
    except torch.OutOfMemoryError as error:
        raise TTDError(_too_large("what is measured", options)) from error


def _too_large(what: str, options: BenchOptions) -> str:
    return (
        f"{what} with a batch of {options.batch_size} does not fit into the device's memory (counting operations "
        "stores the activations of all texts); use a smaller --batch-size"
    )


def _run(options: BenchOptions, bench: Bench | None, memory: bool, report: Callable[[str], None]) -> dict[str, Any]:
    report(f"building {options.name}")
    bench = Bench(options) if bench is None else bench
    operations: dict[str, int] = {}
    for variant in VARIANTS:
        report(f"counting: {variant}")
        fits = True
        try:
            operations[variant] = bench.count(variant)
        except torch.OutOfMemoryError:
            fits = False
        # Outside the handler, whose exception references the tensors of the failed step.
        if not fits:
            bench.free_memory()
            if variant != "unshared":
                raise TTDError(_too_large(variant, options))
    measured = tuple(operations)
    rounds: list[dict[str, float]] = []
    parts: list[dict[str, float]] = []
    bench.parts()
    report("warming up")
    bench.warm_up(measured)
    for number in range(options.repeats):
        report(f"timing: round {number + 1} of {options.repeats}")
        # Each round starts with another variant, so that none always runs after the same one.
        first = number % len(measured)
        order = measured[first:] + measured[:first]
        rounds.append({variant: bench.seconds(partial(bench.call, variant), bench.in_a_row) for variant in order})
        parts.append(bench.parts())
    found = bench.describe() | {"repeats": options.repeats} | summary(rounds, operations)
    medians = {name: median(part[name] for part in parts) for name in parts[0]}
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
        # Free the weights and gradients of this process before the measuring processes allocate theirs.
        del bench
        gc.collect()
        trim_memory()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        used: dict[str, dict[str, int] | None] = {}
        for variant in (name for name in MEMORY_VARIANTS if name in measured):
            report(f"memory: {variant}")
            try:
                used[variant] = peak_memory(options, variant)
            # The times are valid even if the machine lacks memory for this measurement.
            except TTDError as error:
                used[variant] = None
                found.setdefault("memory_errors", {})[variant] = one_sentence(error)
        found["memory"] = used
        ours, theirs = used["ttd"], used["contrastive"]
        if ours and theirs and theirs["peak"] > 0:
            found["ratios"]["memory_ttd_over_contrastive"] = ours["peak"] / theirs["peak"]
    return found


def summary(rounds: Sequence[Mapping[str, float]], operations: Mapping[str, int]) -> dict[str, Any]:
    """Return medians and spread of times and of the ratios in each round, with the counted limits.

    Ratios of a variant that was not measured are ``None``.

    Args:
        rounds: seconds of each variant, per round.
        operations: counted operations of each variant.
    """
    seconds = {}
    for variant in rounds[0]:
        times = [times_of_round[variant] for times_of_round in rounds]
        seconds[variant] = {"median": median(times), "low": min(times), "high": max(times)}
    ratios: dict[str, float | None] = dict.fromkeys(RATIOS)
    spread: dict[str, list[float] | None] = dict.fromkeys(RATIOS)
    limits, over = ratios.copy(), ratios.copy()
    for name, (above, below) in RATIOS.items():
        if not {above, below} <= operations.keys():
            continue
        values = [times_of_round[above] / times_of_round[below] for times_of_round in rounds]
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
