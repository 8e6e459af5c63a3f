"""The baseline of the benchmark: a TTD step written directly from the paper (arXiv 2404.00384), in plain PyTorch.

It encodes the images once. Every candidate word of every caption, including repeated words, is a separate text that the
library's own text tower encodes at the full context. Maps and losses are computed caption by caption. The step is
correct and has no needless cost in its parts, but it shares nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.engine import TTDOptions
from ttd_plugins.testing.library_reference import library_text_embedding


def full_context_texts(adapter: DenseAdapter, texts: Sequence[str]) -> Tensor:
    """Return text embeddings ``[N, D]`` by the library's own function, at the full context."""
    ids = adapter.tokenize(texts).ids.to(adapter.device)
    embeddings = library_text_embedding(adapter, ids)
    return adapter.encode_text(ids) if embeddings is None else embeddings


def contrastive_term(
    adapter: DenseAdapter, image: Tensor, text: Tensor, captions: Sequence[str] | None = None
) -> Tensor:
    """Return the backbone's own contrastive loss, InfoNCE or pairwise sigmoid, a scalar.

    Args:
        adapter: the backbone.
        image, text: embeddings ``[B, D]``.
        captions: the texts; pairs with equal ones are not negatives of each other. By default all differ.
    """
    logits = adapter.logit_scale() * F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
    bias = adapter.logit_bias()
    if bias is not None:
        logits = logits + bias
    # The contrastive step that is timed pays nothing for a comparison of texts.
    ignored = None if captions is None else _equal_captions(captions, logits.device)
    if adapter.description.logits == "sigmoid":
        signs = 2 * torch.eye(len(logits), device=logits.device) - 1
        terms = F.logsigmoid(signs * logits)
        return -(terms if ignored is None else terms.masked_fill(ignored, 0)).sum(-1).mean()
    if ignored is not None:
        logits = logits.masked_fill(ignored, -torch.inf)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _equal_captions(captions: Sequence[str], device: torch.device) -> Tensor:
    """Return bool ``[B, B]``: the pairs of different rows whose captions are equal."""
    texts = [" ".join(text.casefold().split()) for text in captions]
    same = torch.tensor([[one == other for other in texts] for one in texts], device=device)
    return same & ~torch.eye(len(texts), dtype=torch.bool, device=device)


def unshared_losses(
    adapter: DenseAdapter, images: Tensor, captions: Sequence[str], tags: Sequence[Sequence[str]]
) -> dict[str, Tensor]:
    """Return the losses of a batch with the default :class:`~ttd_plugins.engine.TTDOptions`.

    Args:
        adapter: the backbone.
        images: ``[B, 3, height, width]``, normalised.
        captions: B strings.
        tags: candidate tags of each caption.

    Returns:
        ``"tag"``, ``"distill"``, ``"contrastive"`` and their weighted sum ``"loss"``, scalars.
    """
    options, calibration = TTDOptions(), adapter.description.calibration
    features = adapter.encode_image(images)
    patches = F.normalize(features.patches.flatten(1, 2).float(), dim=-1)
    texts = full_context_texts(adapter, [*captions, *(tag for names in tags for tag in names)]).float()
    unit = F.normalize(texts, dim=-1)
    tag_distances, caption_distances, usable = [], [], []
    start = len(captions)
    for number, names in enumerate(tags):
        if not names:
            continue
        maps = unit[start : start + len(names)] @ patches[number].T
        start += len(names)
        with torch.no_grad():
            scores = maps.amax(dim=1)
            span = scores.amax() - scores.amin()
            ranks = torch.where(span > 1e-6, (scores - scores.amin()) / span.clamp_min(1e-6), 1.0)
            low, high = maps.amin(dim=1, keepdim=True), maps.amax(dim=1, keepdim=True)
            normalised = torch.where(high - low > 1e-6, (maps - low) / (high - low).clamp_min(1e-6), 0.0)
            targets = normalised * (ranks >= options.threshold)[:, None]
            union = targets.amax(dim=0)
        logits = calibration.scale * maps + calibration.shift
        tag_distances.append(F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1))
        logits = calibration.scale * (patches[number] @ unit[number]) + calibration.shift
        caption_distances.append(F.binary_cross_entropy_with_logits(logits, union))
        usable.append((union.amax() > 0).float())
    zero = patches.sum() * 0
    losses = {
        "tag": torch.cat(tag_distances).mean() if tag_distances else zero,
        "distill": _mean(torch.stack(caption_distances), torch.stack(usable)) if usable else zero,
        "contrastive": contrastive_term(adapter, _pooled(features.pooled), texts[: len(captions)], captions),
    }
    losses["loss"] = (
        options.tag_weight * losses["tag"]
        + options.distill_weight * losses["distill"]
        + options.contrastive_weight * losses["contrastive"]
    )
    return losses


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (weights * values).sum() / weights.sum().clamp_min(1.0)


def _pooled(pooled: Tensor | None) -> Tensor:
    assert pooled is not None
    return pooled
