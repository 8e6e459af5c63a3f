"""The losses of TTD, and the contrastive loss that preserves global alignment.

The paper (arXiv 2404.00384) states what is compared: a tag's map with its own normalised map, and the caption's map
with the union; gradients of the targets are stopped. It does not publish the distance, the activation that brings a
map into [0, 1], nor the weights. These are options here, and ``examples/ablation.py`` measures them.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ttd_plugins.errors import InputError
from ttd_plugins.method.similarity import minmax_normalize, normalize, promote
from ttd_plugins.options import Activation, Anchor, Calibration, Distance

LogitForm = Literal["softmax", "sigmoid"]


def map_distance(
    maps: Tensor,
    targets: Tensor,
    *,
    distance: Distance = "bce",
    activation: Activation = "sigmoid",
    calibration: Calibration | None = None,
) -> Tensor:
    """Mean over patches of the distance between similarity maps and their targets.

    Args:
        maps: raw cosines ``[N, P]``.
        targets: ``[N, P]`` in [0, 1]; no gradient flows into them.
        distance: ``"bce"`` (binary cross-entropy), ``"mse"`` or ``"l1"``.
        activation: how a map is brought into the range of its target: ``"sigmoid"`` of the calibrated cosine,
            ``"minmax"`` over its own patches, or ``"none"``.
        calibration: the affine map inside the sigmoid; by default ``Calibration()``.

    Returns:
        ``[N]`` in at least float32, one distance per map.

    Raises:
        InputError: an option is unknown, or ``"bce"`` is combined with maps that are not in [0, 1].
    """
    if distance not in get_args(Distance) or activation not in get_args(Activation):
        raise InputError(
            f"unknown loss {distance!r} on {activation!r} maps; distances: {', '.join(get_args(Distance))}; "
            f"activations: {', '.join(get_args(Activation))}"
        )
    maps, targets = promote(maps), promote(targets.detach())
    if activation == "sigmoid":
        logits = (calibration or Calibration()).logit(maps)
        if distance == "bce":
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)
        maps = torch.sigmoid(logits)
    elif activation == "minmax":
        maps = minmax_normalize(maps)
    if distance == "bce":
        if activation == "none":
            raise InputError("binary cross-entropy needs maps in [0, 1]; choose the activation 'sigmoid' or 'minmax'")
        # The extremes of a min-max map are exactly 0 and 1, where the gradient of the logarithm is unbounded.
        maps = maps.clamp(1e-6, 1 - 1e-6)
        return -(targets * maps.log() + (1 - targets) * (1 - maps).log()).mean(-1)
    difference = maps - targets
    return (difference.square() if distance == "mse" else difference.abs()).mean(-1)


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    *,
    scale: Tensor | float,
    bias: Tensor | float | None = None,
    form: LogitForm = "softmax",
    groups: Tensor | None = None,
    texts: Tensor | None = None,
) -> Tensor:
    """The backbone's own contrastive loss of a batch of pairs, in at least float32 even under autocast.

    Args:
        image: ``[B, D]``, not necessarily normalised.
        text: ``[B, D]``; row b belongs to image b.
        scale: multiplier of the cosines.
        bias: added to the logits.
        form: ``"softmax"``: the symmetric InfoNCE (arXiv 2103.00020); ``"sigmoid"``: the pairwise loss
            (arXiv 2303.15343), summed over a row and averaged over rows.
        groups: int64 ``[B]``, equal for pairs of the same image; by default all images differ.
        texts: int64 ``[B]``, equal for pairs of the same caption; by default all captions differ. A caption of an image
            is a negative of it in no other pair either; see :func:`false_negatives`.

    Returns:
        A scalar.
    """
    siblings = None if groups is None and texts is None else false_negatives(groups, texts)
    with torch.autocast(image.device.type, enabled=False):
        logits = scale * normalize(image) @ normalize(text).T
    if bias is not None:
        logits = logits + bias
    if form == "softmax":
        if siblings is not None:
            logits = logits.masked_fill(siblings, -torch.inf)
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    if form == "sigmoid":
        signs = 2 * torch.eye(len(logits), device=logits.device) - 1
        terms = -F.logsigmoid(signs * logits)
        if siblings is not None:
            terms = terms.masked_fill(siblings, 0)
        return terms.sum(-1).mean()
    raise InputError(f"unknown form of logits {form!r}; known: {', '.join(get_args(LogitForm))}")


def false_negatives(groups: Tensor | None, texts: Tensor | None) -> Tensor:
    """Return which captions of other pairs describe an image too, so that they are no negatives of it.

    Entry (i, j) is true if any pair of the batch has the image of pair i and the caption of pair j, and i is not j.

    Args:
        groups: int64 ``[B]``, equal for pairs of the same image; ``None`` if all images differ.
        texts: int64 ``[B]``, equal for pairs of the same caption; ``None`` if all captions differ.

    Returns:
        bool ``[B, B]``, images by captions.

    Raises:
        InputError: both are ``None``.
    """
    one = groups if groups is not None else texts
    if one is None:
        raise InputError("false_negatives() needs the ids of images, of captions, or of both")
    numbers = torch.arange(len(one), device=one.device)
    # The first pair with the same id stands for all of them; torch.unique would synchronise with the device.
    image, text = (numbers if ids is None else (ids[:, None] == ids).int().argmax(-1) for ids in (groups, texts))
    described = torch.zeros(len(one), len(one), dtype=torch.bool, device=one.device)
    described[image, text] = True
    return described[image][:, text] & (numbers[:, None] != numbers)


def anchor_distance(
    image: Tensor,
    text: Tensor,
    frozen_image: Tensor,
    frozen_text: Tensor,
    *,
    kind: Anchor = "embeddings",
    scale: Tensor | float = 1.0,
    bias: Tensor | float | None = None,
    form: LogitForm = "softmax",
) -> Tensor:
    """Distance of each pair's global embeddings to those of the frozen model; zero where nothing has changed.

    Args:
        image: ``[B, D]``, pooled image embeddings, not necessarily normalised.
        text: ``[B, D]``, caption embeddings; row b belongs to image b.
        frozen_image, frozen_text: ``[B, D']``, those of the frozen model; no gradient flows into them.
        kind: ``"embeddings"`` (feature distillation): squared distance of the unit vectors, mean of image and text.
            ``"similarities"`` (relational distillation): Kullback-Leibler divergence of the frozen model's
            distribution over the batch to the student's, for each image over texts and for each text over images.
        scale: multiplier of the cosines of both models, for ``"similarities"``.
        bias: added to the logits of both models, for ``"similarities"``.
        form: as in :func:`contrastive_loss`. With ``"sigmoid"`` the divergence is that of each pair's probability,
            summed over a row.

    Returns:
        ``[B]`` in at least float32.

    Raises:
        InputError: ``kind`` or ``form`` is unknown.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = normalize(image), normalize(text)
        frozen_image, frozen_text = normalize(frozen_image.detach()), normalize(frozen_text.detach())
        if kind == "embeddings":
            return ((image - frozen_image).square().sum(-1) + (text - frozen_text).square().sum(-1)) / 2
        if kind != "similarities":
            raise InputError(f"unknown anchor {kind!r}; known: {', '.join(get_args(Anchor))}")
        logits, frozen = scale * image @ text.T, scale * frozen_image @ frozen_text.T
        if bias is not None:
            logits, frozen = logits + bias, frozen + bias
        if form == "softmax":
            return (_softmax_divergence(logits, frozen) + _softmax_divergence(logits.T, frozen.T)) / 2
        if form == "sigmoid":
            positive = frozen.sigmoid() * (F.logsigmoid(frozen) - F.logsigmoid(logits))
            negative = (-frozen).sigmoid() * (F.logsigmoid(-frozen) - F.logsigmoid(-logits))
            return (positive + negative).sum(-1)
    raise InputError(f"unknown form of logits {form!r}; known: {', '.join(get_args(LogitForm))}")


def _softmax_divergence(logits: Tensor, frozen: Tensor) -> Tensor:
    """Kullback-Leibler divergence ``[B]`` of the rows' distributions, the frozen ones first."""
    return F.kl_div(logits.log_softmax(-1), frozen.log_softmax(-1), reduction="none", log_target=True).sum(-1)
