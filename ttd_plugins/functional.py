"""The loss of TTD on plain tensors (arXiv 2404.00384), for models without an adapter.

:func:`ttd_loss` takes the features of one batch and returns its loss. :class:`ttd_plugins.TTD` computes the features of
a backbone and calls the same function.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ttd_plugins.errors import InputError
from ttd_plugins.method import losses, selection, similarity
from ttd_plugins.options import Calibration, TTDOptions
from ttd_plugins.utils import distributed


class TTDFeatures(NamedTuple):
    """Features of one batch by one model; shapes as in :func:`ttd_loss`."""

    patches: Tensor
    pooled: Tensor | None
    captions: Tensor
    tags: Sequence[Tensor] | Tensor


class AnchorFeatures(NamedTuple):
    """Global embeddings of the frozen model for the same images and captions, for the option ``anchor_weight``.

    ``pooled`` and ``captions`` are ``[B, D]``, or of another width with ``anchor="similarities"``, which also needs
    ``logit_scale`` and ``logit_bias`` of the frozen model's contrastive logits.
    """

    pooled: Tensor
    captions: Tensor
    logit_scale: Tensor | float = 1.0
    logit_bias: Tensor | float | None = None


@dataclass
class SimilarityMaps:
    """Similarity maps and scores of a batch, in at least float32.

    Attributes:
        tag_maps: cosines ``[N, P]``.
        caption_maps: cosines ``[B, P]``.
        scores: cosines ``[N]``, by the option ``score``.
    """

    tag_maps: Tensor
    caption_maps: Tensor
    scores: Tensor


@dataclass
class TTDLoss:
    """Loss of one batch, its parts, and what it was computed from. N is the number of tags of all captions.

    Attributes:
        loss: the weighted sum of the parts, a scalar with gradient.
        losses: ``"tag"``, ``"distill"``, ``"contrastive"`` and ``"anchor"``, unweighted scalars without gradient; a
            part of weight zero is left out.
        maps: similarity maps and scores of the student, with gradient.
        selected: bool ``[N]``, the image-relevant tags.
        tag_targets: ``[N, P]`` in [0, 1], min-max normalised maps of selected tags, zero for rejected ones.
        union: ``[B, P]`` in [0, 1], target of the captions' maps.
        usable: bool ``[B]``, captions whose union is not empty; the others do not contribute to ``"distill"``.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    maps: SimilarityMaps
    selected: Tensor
    tag_targets: Tensor
    union: Tensor
    usable: Tensor

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={float(value):.4g}" for name, value in self.losses.items())
        size = f"{len(self.union)} captions, {len(self.selected)} tags"
        return f"TTDLoss(loss={float(self.loss.detach()):.4g}, {parts}; {size})"


def ttd_loss(
    patches: Tensor,
    pooled: Tensor | None,
    captions: Tensor,
    tags: Sequence[Tensor] | Tensor,
    options: TTDOptions | None = None,
    *,
    logit_scale: Tensor | float | None = None,
    logit_bias: Tensor | float | None = None,
    logits: Literal["softmax", "sigmoid"] = "softmax",
    calibration: Calibration | None = None,
    groups: Sequence[Hashable] | Tensor | None = None,
    caption_ids: Sequence[Hashable] | Tensor | None = None,
    teacher_features: TTDFeatures | Sequence[Any] | None = None,
    anchor_features: AnchorFeatures | Sequence[Any] | None = None,
    image_index: Tensor | None = None,
    tag_index: Tensor | None = None,
    max_tags: int | None = None,
    normalized: bool = False,
    **changes: Any,
) -> TTDLoss:
    """Compute the loss of Text-Tag Self-Distillation for the features of one batch (arXiv 2404.00384, section 3).

    A batch has B image-text pairs, P patches an image, and joint embeddings of width D. Features need not be
    L2-normalised. They are float16, bfloat16, float32 or float64, on one device; half precision is converted to float32
    and the widest of the dtypes is used. All arithmetic ignores autocast. Targets have no gradient.

    If ``torch.distributed`` is initialised and gradients are enabled, the loss is that of the joint batch of all
    processes, as in :meth:`ttd_plugins.TTD.forward`.

    Args:
        patches: patch features in the joint space, ``[B, P, D]`` or ``[B, H, W, D]``.
        pooled: pooled image embeddings ``[B, D]``; ``None`` without the contrastive term and the anchor, and with
            another ``score`` than ``"image"``.
        captions: caption embeddings ``[B, D]``.
        tags: embeddings of the candidate tags of each caption: B tensors ``[T_b, D]``, of which each T_b may differ or
            be zero; or distinct embeddings ``[K, D]`` with ``image_index``.
        options: options of the method. The loss uses ``score``, ``rule``, ``threshold``, ``target_power``,
            ``distance``, ``activation``, the weights, ``anchor`` and ``calibration``; the others belong to the model.
        logit_scale: multiplier of the cosines in the contrastive term, exponentiated, with or without gradient; needed
            with ``contrastive_weight`` above 0.
        logit_bias: added to the contrastive logits; ``None`` for none.
        logits: form of the contrastive term, ``"softmax"`` (InfoNCE) or ``"sigmoid"`` (pairwise).
        calibration: map from cosine to probability, where ``options`` has none; by default ``Calibration()``.
        groups: the id of each pair's image, B hashable values or an integer tensor ``[B]``; pairs of one image are not
            negatives of each other.
        caption_ids: the captions themselves, or other ids; a caption that several images have is no negative of any of
            them. Texts that differ by case or white space alone are equal. By default all captions differ.
        teacher_features: features of another model for the same images and texts, which then provides the targets:
            patches, pooled, captions and tags, without gradient. Needed with the options ``teacher="frozen"`` and
            ``"ema"``.
        anchor_features: global embeddings of the frozen model, needed with ``anchor_weight`` above 0.
        image_index: int64 ``[N]``, ascending: the caption of each of N candidates, for ``tags`` of shape ``[K, D]``.
        tag_index: int64 ``[N]``: the row of ``tags`` of each candidate; by default candidate n has row n.
        max_tags: the largest number of candidates of one caption. With it, ``image_index`` and ``tag_index`` are
            trusted, and no host synchronisation happens.
        normalized: whether all features are L2-normalised already, in at least float32.
        **changes: options by name, as in ``ttd_loss(..., threshold=0.6)``.

    Returns:
        The loss and its parts.

    Raises:
        InputError: a shape, dtype, device or option does not fit; the message names the argument.

    Example::

        out = ttd_loss(patches, pooled, captions, [dog_and_grass, nothing, cat], logit_scale=model.logit_scale.exp())
        out.loss.backward()
    """
    options = _options(options, changes)
    own = TTDFeatures(patches, pooled, captions, tags)
    student, index = _prepared(own, "", options, image_index, tag_index, max_tags, normalized=normalized)
    if options.teacher != "self" and teacher_features is None:
        raise InputError(
            f"teacher={options.teacher!r} needs the features of the teacher; pass teacher_features=TTDFeatures(...), "
            "or the option teacher='self'"
        )
    ids = None if groups is None else _group_numbers(groups, len(student.captions), student.captions.device)
    contrastive = options.contrastive_weight > 0
    if contrastive and student.pooled is None:
        raise InputError("the contrastive term needs pooled image embeddings; pass pooled, or contrastive_weight=0")
    anchor = None
    if options.anchor_weight > 0:
        if student.pooled is None or anchor_features is None:
            raise InputError("the anchor needs pooled and anchor_features; pass both, or anchor_weight=0")
        anchor = _checked_anchor(AnchorFeatures(*anchor_features), student, options.anchor)
    if contrastive and logit_scale is None:
        raise InputError(
            "the contrastive term needs logit_scale, the multiplier of cosines, such as model.logit_scale.exp(); pass "
            "it, or contrastive_weight=0"
        )
    if logits not in ("softmax", "sigmoid"):
        raise InputError(f"logits must be 'softmax' or 'sigmoid', not {logits!r}")
    calibration = options.calibration or calibration or Calibration()
    batch = len(student.captions)
    with torch.autocast(student.captions.device.type, enabled=False):
        maps = similarity_maps(student, *index, score=options.score)
        source = maps
        if teacher_features is not None:
            with torch.no_grad():
                features = TTDFeatures(*teacher_features)
                other, other_index = _prepared(
                    features, "teacher ", options, image_index, tag_index, max_tags, normalized=normalized
                )
                _require_same_candidates(other, other_index, student, index, trusted=max_tags is not None)
                source = similarity_maps(other, *other_index, score=options.score)
        selected, tag_targets, union, usable = make_targets(source, index[0], batch, options, calibration)
        parts: dict[str, Tensor] = {}
        weights = {"tag": options.tag_weight, "distill": options.distill_weight}
        form: dict[str, Any] = {
            "distance": options.distance,
            "activation": options.activation,
            "calibration": calibration,
        }
        if options.tag_weight > 0:
            distance = losses.map_distance(maps.tag_maps, tag_targets, **form)
            weight = torch.where(selected, torch.ones_like(distance), options.rejected_weight)
            # Without tags, or if all are rejected with weight zero, both sums are zero, and so is the loss.
            parts["tag"] = _mean((weight * distance).sum(), weight.sum())
        if options.distill_weight > 0:
            distance = losses.map_distance(maps.caption_maps, union, **form)
            counted = usable.float()
            parts["distill"] = _mean((counted * distance).sum(), counted.sum())
        if contrastive:
            assert student.pooled is not None
            assert logit_scale is not None
            weights["contrastive"] = options.contrastive_weight
            images, texts = student.pooled, student.captions
            text_ids = None if caption_ids is None else _caption_numbers(caption_ids, batch, images.device)
            if torch.is_grad_enabled():
                images, texts = distributed.gather_rows(images), distributed.gather_rows(texts)
                ids = None if ids is None else distributed.gather_rows(ids)
                text_ids = None if text_ids is None else distributed.gather_rows(text_ids)
            scale = similarity.promote(logit_scale) if isinstance(logit_scale, Tensor) else logit_scale
            parts["contrastive"] = losses.contrastive_loss(
                images, texts, scale=scale, bias=logit_bias, form=logits, groups=ids, texts=text_ids
            )
        if anchor is not None:
            assert student.pooled is not None
            weights["anchor"] = options.anchor_weight
            embeddings = student.pooled, student.captions
            frozen = anchor.pooled, anchor.captions
            if torch.is_grad_enabled():
                embeddings = distributed.gather_rows(embeddings[0]), distributed.gather_rows(embeddings[1])
                frozen = distributed.gather_rows(frozen[0]), distributed.gather_rows(frozen[1])
            scale = anchor.logit_scale
            parts["anchor"] = losses.anchor_distance(
                *embeddings,
                *frozen,
                kind=options.anchor,
                scale=similarity.promote(scale) if isinstance(scale, Tensor) else scale,
                bias=anchor.logit_bias,
                form=logits,
            ).mean()
        loss = sum((weights[name] * part for name, part in parts.items()), maps.caption_maps.sum() * 0)
    assert isinstance(loss, Tensor)
    detached = {name: part.detach() for name, part in parts.items()}
    return TTDLoss(loss, detached, maps, selected, tag_targets, union, usable)


# Parts that the engine calls alone -----------------------------------------------------------------------------------


def similarity_maps(
    features: TTDFeatures, image_index: Tensor, tag_index: Tensor, max_tags: int | None, *, score: str
) -> SimilarityMaps:
    """Similarity maps and scores of L2-normalised features.

    Args:
        features: patches ``[B, P, D]``, pooled and captions ``[B, D]``, distinct tags ``[K, D]``.
        image_index, tag_index, max_tags: as in :func:`ttd_loss`.
        score: how a tag is scored: ``"pixel"``, ``"image"`` or ``"text"``.
    """
    patches, pooled, captions, tags = features
    assert isinstance(tags, Tensor)
    maps = similarity.tag_maps(patches, tags, image_index, tag_index, max_tags)
    if score == "pixel":
        scores = selection.pixel_scores(maps)
    elif score == "image":
        assert pooled is not None
        scores = selection.image_scores(pooled, tags, image_index, tag_index)
    else:
        scores = selection.text_scores(captions, tags, image_index, tag_index)
    return SimilarityMaps(maps, similarity.caption_maps(patches, captions), scores)


@torch.no_grad()
def make_targets(
    maps: SimilarityMaps, image_index: Tensor, batch: int, options: TTDOptions, calibration: Calibration
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Select tags and compute the targets of maps, without gradient.

    Returns:
        Selected tags, bool ``[N]``; targets of the tags' maps ``[N, P]``; their union ``[B, P]``; whether each union is
        not empty, bool ``[B]``.
    """
    selected = selection.select_tags(
        maps.scores,
        image_index,
        batch,
        rule=options.rule,
        threshold=options.threshold,
        calibration=calibration,
    )
    targets = similarity.minmax_normalize(maps.tag_maps) * selected[:, None]
    if options.target_power != 1:
        targets = targets**options.target_power
    union = similarity.union_map(targets, image_index, batch)
    # The union is empty without a selected tag, or if the maps of all selected tags are flat.
    return selected, targets, union, union.amax(-1) > 0


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """Return ``total / count``: with gradients over the joint batch of all processes, otherwise over this one."""
    return distributed.joint_mean(total, count) if torch.is_grad_enabled() else total / count.clamp_min(1e-6)


# Checks --------------------------------------------------------------------------------------------------------------


def _options(options: TTDOptions | None, changes: dict[str, Any]) -> TTDOptions:
    unknown = sorted(set(changes) - set(TTDOptions.__dataclass_fields__))
    if unknown:
        known = ", ".join(TTDOptions.__dataclass_fields__)
        raise InputError(f"ttd_loss() has no option {unknown[0]!r}; options: {known}")
    if options is not None and not isinstance(options, TTDOptions):
        raise InputError(f"options of ttd_loss() is a TTDOptions, not {options!r}; pass single options by name")
    return replace(options or TTDOptions(), **changes) if changes or options is None else options


_Index = tuple[Tensor, Tensor, int | None]


def _prepared(
    features: TTDFeatures,
    whose: str,
    options: TTDOptions,
    image_index: Tensor | None,
    tag_index: Tensor | None,
    max_tags: int | None,
    *,
    normalized: bool,
) -> tuple[TTDFeatures, _Index]:
    """Return checked features, L2-normalised in one dtype, with flat tags, and their indices."""
    patches, pooled, captions, tags = features
    patches = _checked(patches, f"{whose}patches", (3, 4))
    if patches.ndim == 4:
        patches = patches.flatten(1, 2)
    batch, count, width = patches.shape
    if not batch or not count or not width:
        shape = list(features.patches.shape)
        raise InputError(f"{whose}patches have shape {shape}; pass at least one patch of one image")
    captions = _checked(captions, f"{whose}captions", (2,), (batch, width), patches.device)
    compared = options.contrastive_weight > 0 or options.anchor_weight > 0
    needs_pooled = options.score == "image" or (compared and not whose)
    if pooled is not None:
        pooled = _checked(pooled, f"{whose}pooled", (2,), (batch, width), patches.device)
    elif options.score == "image":
        raise InputError(f"score='image' needs the pooled image embeddings; pass {whose}pooled")
    if isinstance(tags, Tensor):
        if image_index is None:
            raise InputError(
                f"{whose}tags is one tensor, so that image_index is needed, the caption of each tag; or pass a list of "
                f"{batch} tensors [tags of the caption, {width}]"
            )
        tags = _checked(tags, f"{whose}tags", (2,), (None, width), patches.device)
        index = _checked_index(image_index, tag_index, batch, len(tags), patches.device, max_tags)
    else:
        tags, index = _flat_tags(tags, f"{whose}tags", batch, width, patches)
    given = [patches, captions, tags] + ([pooled] if pooled is not None and needs_pooled else [])
    if not normalized:
        dtype = torch.float32
        for part in given:
            dtype = torch.promote_types(dtype, part.dtype)
        with torch.autocast(patches.device.type, enabled=False):
            patches, captions, tags = (similarity.normalize(part.to(dtype)) for part in (patches, captions, tags))
            pooled = similarity.normalize(pooled.to(dtype)) if pooled is not None and needs_pooled else None
    return TTDFeatures(patches, pooled if needs_pooled else None, captions, tags), index


def _checked(
    value: object,
    name: str,
    axes: tuple[int, ...],
    shape: tuple[int | None, ...] = (),
    device: torch.device | None = None,
) -> Tensor:
    """Return a floating-point tensor of one of so many axes, of a shape and on a device."""
    expected = {"patches": "[B, P, D] or [B, H, W, D]"}.get(name.rpartition(" ")[2])
    expected = expected or f"[{', '.join('any' if side is None else str(side) for side in shape)}]"
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a tensor {expected}, not an object of class {type(value).__name__}")
    fits = len(shape) in (0, value.ndim) and all(
        side in (None, own) for side, own in zip(shape, value.shape, strict=False)
    )
    if value.ndim not in axes or not fits:
        raise InputError(f"{name} must have shape {expected}, not {list(value.shape)}")
    if not value.is_floating_point():
        raise InputError(f"{name} must be floating-point embeddings, not {str(value.dtype).removeprefix('torch.')}")
    if device is not None and value.device != device:
        raise InputError(f"{name} is on {value.device} and the patches are on {device}; move one of them")
    return value


def _flat_tags(tags: object, name: str, batch: int, width: int, patches: Tensor) -> tuple[Tensor, _Index]:
    """Concatenate the tags of the captions; return them with their indices."""
    if not isinstance(tags, list | tuple):
        raise InputError(
            f"{name} must be a list of {batch} tensors [tags of the caption, {width}], or one tensor with image_index, "
            f"not an object of class {type(tags).__name__}"
        )
    if len(tags) != batch:
        raise InputError(f"{name} has {len(tags)} items for {batch} captions; pass one tensor for each, empty or not")
    shape = None, width
    parts = [_checked(part, f"{name}[{number}]", (2,), shape, patches.device) for number, part in enumerate(tags)]
    counts = [len(part) for part in parts]
    index = torch.repeat_interleave(torch.arange(batch), torch.tensor(counts)).to(patches.device)
    dtype = patches.dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    with torch.autocast(patches.device.type, enabled=False):
        flat = torch.cat([part.to(dtype) for part in parts])
    return flat, (index, torch.arange(len(flat), device=patches.device), max(counts))


def _checked_index(
    image_index: Tensor, tag_index: Tensor | None, batch: int, count: int, device: torch.device, max_tags: int | None
) -> _Index:
    """Return the indices of flat tags; values are checked unless ``max_tags`` says that they can be trusted."""
    if tag_index is None:
        tag_index = torch.arange(count, device=device)
    for name, index in (("image_index", image_index), ("tag_index", tag_index)):
        if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype != torch.long or index.device != device:
            raise InputError(f"{name} must be an int64 tensor [N] on {device}, one number for each candidate tag")
    if len(image_index) != len(tag_index):
        raise InputError(f"image_index has {len(image_index)} numbers, and there are {len(tag_index)} candidate tags")
    if max_tags is None and len(image_index):
        if int(image_index[0]) < 0 or int(image_index[-1]) >= batch or bool((image_index.diff() < 0).any()):
            raise InputError(f"image_index must be ascending, with numbers from 0 to {batch - 1}")
        if int(tag_index.amin()) < 0 or int(tag_index.amax()) >= count:
            raise InputError(f"tag_index must have numbers from 0 to {count - 1}, the rows of tags")
    return image_index, tag_index, max_tags


def _require_same_candidates(
    other: TTDFeatures, other_index: _Index, own: TTDFeatures, own_index: _Index, *, trusted: bool
) -> None:
    same = len(other_index[0]) == len(own_index[0]) and (trusted or torch.equal(other_index[0], own_index[0]))
    if other.patches.shape[:2] != own.patches.shape[:2] or not same:
        raise InputError("the teacher must have the same images, patches and candidate tags as the student")


def _group_numbers(groups: Any, batch: int, device: torch.device) -> Tensor:
    if isinstance(groups, str | bytes) or not hasattr(groups, "__len__") or len(groups) != batch:
        raise InputError(f"groups must have the id of each pair's image, {batch} hashable values")
    ids = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    try:
        return distributed.group_numbers([_hashable(one) for one in ids], device)
    except TypeError as error:
        raise InputError("groups must be hashable ids, such as strings or integers") from error


def _caption_numbers(captions: Any, batch: int, device: torch.device) -> Tensor | None:
    """Numbers of the captions' ids; ``None`` if no two are equal, in this batch and in those of other processes."""
    if isinstance(captions, str | bytes) or not hasattr(captions, "__len__") or len(captions) != batch:
        raise InputError(f"caption_ids must have one text or another hashable id for each of {batch} captions")
    ids = captions.tolist() if hasattr(captions, "tolist") else list(captions)
    try:
        ids = [" ".join(one.casefold().split()) if isinstance(one, str) else _hashable(one) for one in ids]
    except TypeError as error:
        raise InputError("caption_ids must be texts or other hashable ids") from error
    joint = torch.is_grad_enabled() and distributed.process_count() > 1
    # Another process may have the same caption.
    return distributed.group_numbers(ids, device) if joint or len(set(ids)) < len(ids) else None


def _checked_anchor(anchor: AnchorFeatures, student: TTDFeatures, kind: str) -> AnchorFeatures:
    """Return the embeddings of the frozen model after a check of their shapes."""
    (batch, width), device = student.captions.shape, student.captions.device
    # Similarities can be compared across joint spaces of other widths.
    pooled = _checked(anchor.pooled, "anchor pooled", (2,), (batch, width if kind == "embeddings" else None), device)
    captions = _checked(anchor.captions, "anchor captions", (2,), (batch, pooled.shape[1]), device)
    return anchor._replace(pooled=pooled, captions=captions)


def _hashable(one: Any) -> Hashable:
    hash(one)
    return one  # type: ignore[no-any-return]
