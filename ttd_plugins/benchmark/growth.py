"""How the time and the operations of a step grow with the batch, the image and the tags of a caption."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.benchmark.captions import batch_of_captions, open_captions, synthetic_captions, synthetic_tags
from ttd_plugins.benchmark.step_variants import Bench, BenchOptions
from ttd_plugins.errors import InputError

BATCHES = (2, 4, 8, 16, 32, 64)
TAGS = (2, 4, 8, 16, 32, 64)
SIZE_FACTORS = (0.5, 1.0, 1.5, 2.0)
BATCH_TAGS, TAGS_BATCH, SIZES_BATCH = 8, 4, 2


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the exponent e of ``values = c * sizes ** e`` by least squares of the logarithms.

    Raises:
        InputError: there are fewer than two different sizes, or a number is not positive.
    """
    if len(sizes) != len(values) or len(set(sizes)) < 2 or min(*sizes, *values) <= 0:
        raise InputError("an exponent needs at least two different sizes with one positive value each")
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in values]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - x_mean) ** 2 for x in xs)


def run_growth(
    options: BenchOptions,
    *,
    batches: Sequence[int] = BATCHES,
    tags: Sequence[int] = TAGS,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure the TTD step and the full-context contrastive step along three axes.

    Args:
        options: the benchmark's options; batch size and image size vary along their axes.
        batches: batch sizes.
        tags: numbers of distinct tags per caption.
        on_progress: callback, called with a description of the next measurement.

    Returns:
        For ``"batch"``, ``"image_tokens"`` and ``"tags_per_caption"``: the ``sizes``, the ``seconds`` and
        ``operations`` of both steps, and the fitted ``exponents``.
    """
    report = on_progress or (lambda _: None)
    adapter = Bench(options).adapter
    captions = (
        open_captions(options.data) if options.data else synthetic_captions(max(*batches, TAGS_BATCH), BATCH_TAGS)
    )
    found: dict[str, Any] = {}

    def along(
        axis: str, benches: Callable[[int], Bench], sizes: Sequence[int], label: Callable[[Bench, int], int]
    ) -> None:
        rows = []
        for size in sizes:
            report(f"growth with {axis}: {size}")
            bench = benches(size)
            rows.append((label(bench, size), _measure(bench, options.repeats)))
        found[axis] = axis_result([size for size, _ in rows], [row for _, row in rows])

    along(
        "batch",
        lambda size: _bench(adapter, replace(options, batch_size=size), batch_of_captions(captions, size), None),
        batches,
        lambda _, size: size,
    )
    along(
        "image_tokens",
        lambda side: _bench(
            adapter, replace(options, batch_size=SIZES_BATCH, image_size=side), captions[:SIZES_BATCH], None
        ),
        _sides(adapter),
        lambda bench, _: bench.grid[0] * bench.grid[1],
    )
    along(
        "tags_per_caption",
        lambda count: _bench(
            adapter,
            replace(options, batch_size=TAGS_BATCH),
            batch_of_captions(captions, TAGS_BATCH),
            synthetic_tags(TAGS_BATCH, count),
        ),
        tags,
        lambda _, count: count,
    )
    return found


def axis_result(sizes: Sequence[int], rows: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return the sizes, the measurements at each size, and their exponents."""
    kinds = {kind: {step: [row[kind][step] for row in rows] for step in rows[0][kind]} for kind in rows[0]}
    exponents = {
        kind: {step: fit_exponent(sizes, values) for step, values in steps.items()} for kind, steps in kinds.items()
    }
    return {"sizes": list(sizes), **kinds, "exponents": exponents}


def _bench(adapter: DenseAdapter, options: BenchOptions, captions: Sequence[str], tags: Any) -> Bench:
    return Bench(options, adapter=adapter, captions=captions, tags=tags)


def _sides(adapter: DenseAdapter) -> list[int]:
    """Return sides in pixels of square inputs around the preferred size, each a multiple of the patch size."""
    height, width = adapter.description.patch_size
    step = math.lcm(height, width)
    preferred = adapter.description.image_size[0]
    return sorted({max(round(factor * preferred / step), 1) * step for factor in SIZE_FACTORS})


def _measure(bench: Bench, repeats: int) -> dict[str, dict[str, float]]:
    steps = ("ttd", "contrastive")
    operations = {step: float(bench.count(step)) for step in steps}
    bench.warm_up(steps)
    times: dict[str, list[float]] = {step: [] for step in steps}
    for _ in range(repeats):
        for step in steps:
            times[step].append(bench.seconds(partial(bench.call, step)))
    return {"seconds": {step: median(values) for step, values in times.items()}, "operations": operations}
