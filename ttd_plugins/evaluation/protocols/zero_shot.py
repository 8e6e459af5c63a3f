"""Zero-shot classification within a protocol: does the nearest class name describe something that the image shows?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ttd_plugins.evaluation.metric_accumulators import ZeroShotAccumulator
from ttd_plugins.evaluation.metrics import zero_shot_hits
from ttd_plugins.method import similarity

KS = (1, 5)


def image_hits(
    pooled: Tensor, texts: Tensor, owner: Tensor, count: int, shown: Sequence[int], *, left_out: int | None = None
) -> dict[str, int] | None:
    """Return whether one of the nearest classes is shown in the image, ``top1`` and ``top5``, as 0 or 1.

    Args:
        pooled: ``[D]``, the pooled embedding of one image.
        texts: ``[M, D]``, L2-normalised embeddings of the names and aliases of classes. The score of a class is the
            cosine of its nearest text.
        owner: int64 ``[M]``, class index of each text.
        count: C, the number of classes.
        shown: indices of the classes that the image shows, each of them correct.
        left_out: index of a class without a score, such as the background.

    Returns:
        The hits, or ``None`` if the image shows no class.
    """
    if not shown:
        return None
    cosines = (texts @ similarity.normalize(pooled).to(texts)).cpu()
    scored = owner != left_out if left_out is not None else torch.ones_like(owner, dtype=torch.bool)
    best = torch.full((count,), -torch.inf).scatter_reduce(0, owner[scored], cosines[scored].float(), reduce="amax")
    correct = torch.zeros(1, count, dtype=torch.bool)
    correct[0, list(shown)] = True
    hits = zero_shot_hits(torch.ones(1, 1), best[:, None], correct, KS)
    return {f"top{k}": hit for k, hit in hits.items()}


def zero_shot_metrics(records: Iterable[dict[str, int] | None]) -> dict[str, float]:
    """Return accuracies ``top1`` and ``top5`` over the images that show a class, and their number ``images``.

    Args:
        records: results of :func:`image_hits`.
    """
    accumulator = ZeroShotAccumulator(KS)
    for record in records:
        if record is not None:
            hits = np.array([record[f"top{k}"] for k in KS], np.int64)
            accumulator.add({"hits": hits, "images": np.array(1, np.int64)})
    return accumulator.compute() | {"images": int(accumulator.states()["images"])}
