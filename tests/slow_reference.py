"""TTD written slowly, from the description of the method: plain Python numbers, one at a time, and loops.

Nothing here calls the package, or torch, or a vectorised numpy function, so that it cannot share a mistake with them.
Vectors are lists of numbers, ``patches[b][p]`` is a vector, and the tags of image b are the vectors ``tags[b]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Vector = Sequence[float]


def dot(a: Vector, b: Vector) -> float:
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += x * y
    return total


def unit(vector: Vector) -> list[float]:
    length = math.sqrt(dot(vector, vector))
    return [x / length for x in vector] if length > 0 else [0.0 for _ in vector]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def minmax(values: Vector, constant: float, eps: float = 1e-6) -> list[float]:
    """``(v - min) / (max - min)``; ``constant`` everywhere if the values are the same."""
    low, high = min(values), max(values)
    return [constant if high - low <= eps else (v - low) / (high - low) for v in values]


def union(maps: Sequence[Vector], patches: int) -> list[float]:
    out = [0.0] * patches
    for one in maps:
        for p in range(patches):
            if one[p] > out[p]:
                out[p] = one[p]
    return out


def select(scores: Vector, rule: str, threshold: float, scale: float, shift: float) -> list[bool]:
    """Which of one caption's tags are kept."""
    if rule == "minmax":
        judged = minmax(scores, constant=1.0) if scores else []
    elif rule == "probability":
        judged = [sigmoid(scale * score + shift) for score in scores]
    else:
        judged = list(scores)
    return [value >= threshold for value in judged]


def distance_at(value: float, target: float, distance: str) -> float:
    if distance == "mse":
        return (value - target) ** 2
    if distance == "l1":
        return abs(value - target)
    value = min(max(value, 1e-6), 1 - 1e-6)
    return -(target * math.log(value) + (1 - target) * math.log(1 - value))


def map_distance(
    one: Vector, target: Vector, distance: str, activation: str, scale: float = 10.0, shift: float = -2.5
) -> float:
    """Mean over patches of the distance of one map to its target."""
    total = 0.0
    normalized = minmax(one, constant=0.0)
    for p, (value, aim) in enumerate(zip(one, target, strict=True)):
        logit = scale * value + shift
        if activation == "sigmoid" and distance == "bce":
            # -log sigmoid(z) = softplus(-z), which does not lose what is near 0 and 1.
            total += aim * softplus(-logit) + (1 - aim) * softplus(logit)
        elif activation == "sigmoid":
            total += distance_at(sigmoid(logit), aim, distance)
        elif activation == "minmax":
            total += distance_at(normalized[p], aim, distance)
        else:
            total += distance_at(value, aim, distance)
    return total / len(one)


def contrastive(
    images: Sequence[Vector],
    texts: Sequence[Vector],
    scale: float,
    bias: float,
    form: str,
    names: Sequence[Any] | None = None,
    groups: Sequence[Any] | None = None,
) -> float:
    """The loss of CLIP or SigLIP over pairs of vectors of any length.

    ``names`` are the captions and ``groups`` the ids of the images: a caption that some pair has with an image is no
    negative of it.
    """
    images, texts = [unit(v) for v in images], [unit(v) for v in texts]
    count, total = len(images), 0.0
    names = list(range(count)) if names is None else names
    groups = list(range(count)) if groups is None else groups
    together = set(zip(groups, names, strict=True))

    def negative(i: int, j: int) -> bool:
        return (groups[i], names[j]) not in together

    for i in range(count):
        if form == "sigmoid":
            for j in range(count):
                if i != j and not negative(i, j):
                    continue
                logit = scale * dot(images[i], texts[j]) + bias
                total += softplus(-logit if i == j else logit) / count
        else:
            own = scale * dot(images[i], texts[i]) + bias
            of_image = [scale * dot(images[i], texts[j]) + bias for j in range(count) if negative(i, j)]
            of_text = [scale * dot(images[j], texts[i]) + bias for j in range(count) if negative(j, i)]
            for others in (of_image, of_text):
                row = [own, *others]
                top = max(row)
                total += (top + math.log(sum(math.exp(x - top) for x in row)) - own) / (2 * count)
    return total


def anchor(
    images: Sequence[Vector],
    texts: Sequence[Vector],
    frozen_images: Sequence[Vector],
    frozen_texts: Sequence[Vector],
    *,
    kind: str,
    scale: float,
    bias: float,
    form: str,
) -> float:
    """Mean over pairs of the distance to a frozen model, by features or by the similarities of the batch."""
    images, texts = [unit(v) for v in images], [unit(v) for v in texts]
    frozen_images, frozen_texts = [unit(v) for v in frozen_images], [unit(v) for v in frozen_texts]
    count, total = len(images), 0.0
    if kind == "embeddings":
        for own, frozen in ((images, frozen_images), (texts, frozen_texts)):
            for one, other in zip(own, frozen, strict=True):
                total += sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / (2 * count)
        return total
    for i in range(count):
        if form == "sigmoid":
            for j in range(count):
                new, old = (
                    1 / (1 + math.exp(-(scale * dot(a[i], b[j]) + bias)))
                    for a, b in ((images, texts), (frozen_images, frozen_texts))
                )
                total += (old * math.log(old / new) + (1 - old) * math.log((1 - old) / (1 - new))) / count
            continue
        for swapped in (False, True):
            rows = []
            for a, b in ((images, texts), (frozen_images, frozen_texts)):
                row = [math.exp(scale * (dot(a[j], b[i]) if swapped else dot(a[i], b[j]))) for j in range(count)]
                rows.append([value / sum(row) for value in row])
            new_row, old_row = rows
            total += sum(p * math.log(p / q) for p, q in zip(old_row, new_row, strict=True)) / (2 * count)
    return total


@dataclass
class Slow:
    """What the slow engine says of a batch; everything by image."""

    tag_maps: list[list[list[float]]]
    caption_maps: list[list[float]]
    scores: list[list[float]]
    selected: list[list[bool]]
    targets: list[list[list[float]]]
    union: list[list[float]]
    parts: dict[str, float]
    loss: float


def ttd(
    patches: Sequence[Sequence[Vector]],
    pooled: Sequence[Vector] | None,
    captions: Sequence[Vector],
    tags: Sequence[Sequence[Vector]],
    options: Any,
    *,
    scale: float,
    shift: float,
    logit_scale: float = 1.0,
    logit_bias: float = 0.0,
    logits: str = "softmax",
    teacher: Slow | None = None,
    wording: Sequence[Any] | None = None,
) -> Slow:
    """One batch from features, normalised or not, to the loss.

    Args:
        patches, pooled, captions, tags: features by image; ``tags[b]`` are the embeddings of the tags of caption b.
        options: what the options of the engine are called there.
        scale, shift: calibration.
        logit_scale, logit_bias, logits: of the backbone's own loss.
        wording: the captions as texts, where some are equal.
        teacher: whose selection, targets and unions are taken, in place of this pass's own.
    """
    batch = len(patches)
    out = Slow([], [], [], [], [], [], {}, 0.0)
    for b in range(batch):
        points = [unit(point) for point in patches[b]]
        caption = unit(captions[b])
        names = [unit(tag) for tag in tags[b]]
        out.caption_maps.append([dot(point, caption) for point in points])
        out.tag_maps.append([[dot(point, name) for point in points] for name in names])
        scores = []
        for n, name in enumerate(names):
            if options.score == "pixel":
                scores.append(max(out.tag_maps[b][n]))
            elif options.score == "image":
                assert pooled is not None
                scores.append(dot(unit(pooled[b]), name))
            else:
                scores.append(dot(caption, name))
        out.scores.append(scores)
        kept = select(scores, options.rule, options.threshold, scale, shift)
        targets = [
            [value**options.target_power for value in minmax(one, constant=0.0)] if keep else [0.0] * len(points)
            for one, keep in zip(out.tag_maps[b], kept, strict=True)
        ]
        out.selected.append(kept)
        out.targets.append(targets)
        out.union.append(union(targets, len(points)))
    aim = teacher or out

    def compare(one: Vector, target: Vector) -> float:
        return map_distance(one, target, options.distance, options.activation, scale, shift)

    total = weights = 0.0
    for b in range(batch):
        for n in range(len(tags[b])):
            weight = 1.0 if aim.selected[b][n] else options.rejected_weight
            total += weight * compare(out.tag_maps[b][n], aim.targets[b][n])
            weights += weight
    out.parts["tag"] = total / weights if weights else 0.0
    with_target = [b for b in range(batch) if max(aim.union[b]) > 0]
    out.parts["distill"] = sum(compare(out.caption_maps[b], aim.union[b]) for b in with_target) / max(
        len(with_target), 1
    )
    if options.contrastive_weight > 0:
        assert pooled is not None
        out.parts["contrastive"] = contrastive(pooled, captions, logit_scale, logit_bias, logits, wording)
    out.loss = (
        options.tag_weight * out.parts["tag"]
        + options.distill_weight * out.parts["distill"]
        + options.contrastive_weight * out.parts.get("contrastive", 0.0)
    )
    return out


# Metrics -----------------------------------------------------------------------------------------------------------


def average_precision(scores: Vector, labels: Sequence[bool]) -> float:
    """Mean over positives of the precision among all candidates that score at least as high."""
    precisions = []
    for score, label in zip(scores, labels, strict=True):
        if label:
            above = [other for s, other in zip(scores, labels, strict=True) if s >= score]
            precisions.append(sum(above) / len(above))
    return sum(precisions) / len(precisions) if precisions else math.nan


def iou(prediction: Sequence[Sequence[bool]], truth: Sequence[Sequence[bool]]) -> float:
    both = either = 0
    for row, true_row in zip(prediction, truth, strict=True):
        for p, t in zip(row, true_row, strict=True):
            both += bool(p and t)
            either += bool(p or t)
    return both / either if either else 1.0


def upsample(one: Sequence[Vector], height: int, width: int) -> list[list[float]]:
    """Bilinear, with the centres of pixels aligned and the border repeated."""
    rows, columns = len(one), len(one[0])

    def between(position: int, size: int, count: int) -> tuple[int, int, float]:
        at = min(max((position + 0.5) * count / size - 0.5, 0.0), count - 1.0)
        low = math.floor(at)
        return low, min(low + 1, count - 1), at - low

    out = []
    for y in range(height):
        top, bottom, down = between(y, height, rows)
        line = []
        for x in range(width):
            left, right, across = between(x, width, columns)
            above = one[top][left] * (1 - across) + one[top][right] * across
            below = one[bottom][left] * (1 - across) + one[bottom][right] * across
            line.append(above * (1 - down) + below * down)
        out.append(line)
    return out


def mean_inside(heat: Sequence[Vector], mask: Sequence[Sequence[bool]]) -> float:
    inside = [h for line, row in zip(heat, mask, strict=True) for h, keep in zip(line, row, strict=True) if keep]
    return sum(inside) / len(inside)


def retrieval(images: Sequence[Vector], texts: Sequence[Vector], captions: Sequence[str], k: int = 1) -> float:
    """Recall at k, both directions; no two candidates of different captions may tie."""
    count, hits = len(captions), 0
    for i in range(count):
        by_image = sorted(range(count), key=lambda j: -dot(images[i], texts[j]))[:k]
        by_text = sorted(range(count), key=lambda j: -dot(images[j], texts[i]))[:k]
        hits += any(captions[j] == captions[i] for j in by_image)
        hits += any(captions[j] == captions[i] for j in by_text)
    return hits / (2 * count)
