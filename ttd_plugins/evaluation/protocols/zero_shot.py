"""Zero-shot classification beside a protocol: does the nearest class name name something that the picture shows?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ttd_plugins.evaluation.metrics import zero_shot_hits
from ttd_plugins.method import similarity

KS = (1, 5)


def shown_hits(
    pooled: Tensor, texts: Tensor, owner: Tensor, count: int, shown: Sequence[int], *, left_out: int | None = None
) -> dict[str, int] | None:
    """Whether a class that a picture shows is the nearest, or among the nearest five; ``None`` where none is shown.

    Args:
        pooled: ``[D]``, the pooled embedding of one picture.
        texts: ``[M, D]``, L2-normalised embeddings of the classes' names and aliases; the nearest one counts.
        owner: int64 ``[M]``, the class of each text.
        count: C, how many classes there are.
        shown: the classes that the picture shows, any of which is right.
        left_out: a class that is not asked for, such as the background.
    """
    if not shown:
        return None
    cosines = (texts @ similarity.normalize(pooled).to(texts)).cpu()
    mine = owner != left_out if left_out is not None else torch.ones_like(owner, dtype=torch.bool)
    best = torch.full((count,), -torch.inf).scatter_reduce(0, owner[mine], cosines[mine].float(), reduce="amax")
    right = torch.zeros(1, count, dtype=torch.bool)
    right[0, list(shown)] = True
    hits = zero_shot_hits(torch.ones(1, 1), best[:, None], right, KS)
    return {f"top{k}": hit for k, hit in hits.items()}


def zero_shot_figures(records: Iterable[dict[str, int] | None]) -> dict[str, float]:
    """``top1`` and ``top5`` over the pictures that show a class, and how many those are (``images``)."""
    kept = [record for record in records if record is not None]
    figures: dict[str, float] = {
        f"top{k}": sum(record[f"top{k}"] for record in kept) / len(kept) if kept else float("nan") for k in KS
    }
    return figures | {"images": len(kept)}
