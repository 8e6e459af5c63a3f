"""Image-text retrieval on plain pairs, with any number of captions per image, and the losses of held-out pairs."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ttd_plugins.adapter import DenseAdapter, image_features
from ttd_plugins.engine import TTD
from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.evaluation.datasets.plain_pairs import PlainPairs
from ttd_plugins.evaluation.metric_accumulators import RetrievalAccumulator
from ttd_plugins.evaluation.protocol_options import RetrievalProtocol
from ttd_plugins.evaluation.protocols.runner import (
    EvaluationResult,
    Record,
    checked,
    pack,
    require_truth,
    run_protocol,
    run_settings,
    unpack,
)
from ttd_plugins.method import similarity
from ttd_plugins.method.losses import contrastive_loss
from ttd_plugins.method.text_embeddings import encode_texts
from ttd_plugins.utils.distributed import group_numbers
from ttd_plugins.utils.progress import Stage

log = logging.getLogger(__name__)


def evaluate_retrieval(
    adapter: DenseAdapter,
    data: PlainPairs,
    options: RetrievalProtocol | None = None,
    *,
    out: Path | str | None = None,
    rank: int = 0,
    world: int = 1,
    stage: Stage | None = None,
) -> EvaluationResult:
    """Evaluate image-text retrieval on image-text pairs.

    Metrics: ``image_to_text_rK``, ``text_to_image_rK`` and their mean ``rK`` for K of 1, 5 and 10, over all captions of
    all images (identical captions are correct for each other's images); ``images``, ``captions``, and ``skipped``,
    the images that cannot be used. ``loss`` has the backbone's own ``contrastive`` loss, the mean over batches of the
    first caption of each image in the order of their keys. With ``losses`` it has also ``tag`` and ``distill``, the
    means of L_tag and L_distill over pairs with tags, and the weighted sum ``total``. The anchor is not a part of them.

    Arguments and errors are those of :func:`ttd_plugins.evaluation.protocols.tags.evaluate_tags`; the data need no
    annotation.
    """
    options = options or RetrievalProtocol()
    calibration = options.ttd.calibration or adapter.description.calibration
    transform = adapter.native_transform() if options.size is None else adapter.dense_transform(options.size)
    dense = adapter.dense_transform(options.size)
    # The contrastive loss needs other pairs, and comes from the embeddings of all. The anchor is no loss of a model.
    own = replace(options.ttd, contrastive_weight=0.0, anchor_weight=0.0, teacher="self")
    engine = TTD(adapter, own) if options.losses else None

    def record_of(key: str) -> Record:
        try:
            captions = data.captions(key)
            if not captions:
                raise InputError(data.problem(key) or "it has no usable caption")
            image = data.image(key)
        except InputError as error:
            return {"skipped": one_sentence(error)}
        pooled = image_features(adapter, transform(image)[None].to(adapter.device), pooled=True).pooled
        assert pooled is not None
        texts = encode_texts(adapter, [options.template.replace("{}", caption) for caption in captions])[0]
        record: Record = {
            "image": pack(similarity.normalize(pooled[0])),
            "texts": [pack(vector) for vector in texts],
            "words": captions,
        }
        if engine is not None:
            tags = data.tags(key)
            output = engine(dense(image)[None].to(adapter.device), captions[:1], None if tags is None else [tags])
            used = {"tag": len(output.targets.selected) > 0, "distill": bool(output.targets.usable.any())}
            record["losses"] = {name: float(part) if used[name] else None for name, part in output.losses.items()}
        return record

    bias = adapter.logit_bias()
    logits = {
        "scale": float(adapter.logit_scale().detach()),
        "bias": None if bias is None else float(bias.detach()),
        "form": adapter.description.logits,
    }
    return run_protocol(
        "retrieval", adapter, list(data.keys()), record_of, partial(_measured, options=options, logits=logits),
        run_settings("retrieval", adapter, options, calibration, data.describe()),
        check=checked(data), out=out, rank=rank, world=world, stage=stage,
    )  # fmt: skip


def _measured(records: Iterable[Record], options: RetrievalProtocol, logits: dict[str, Any]) -> dict[str, Any]:
    found = retrieval_metrics(records, options, logits)
    return require_truth(found, found["images"], f"none of {found['skipped']} images can be used")


def retrieval_metrics(records: Iterable[Record], options: RetrievalProtocol, logits: dict[str, Any]) -> dict[str, Any]:
    """Compute the metrics of :func:`evaluate_retrieval` from the records of its images.

    Args:
        records: the records.
        options: options of the protocol.
        logits: the backbone's logit ``scale``, ``bias`` and ``form``.
    """
    retrieval = RetrievalAccumulator()
    images = captions = skipped = 0
    reason = ""
    losses: dict[str, list[float]] = {}
    # Records of several processes come process by process; the order of keys decides the batches.
    kept: dict[str, tuple[str, str, str]] = {}
    for record in records:
        if "skipped" in record:
            skipped += 1
            reason = reason or f"{record.get('key')}: {record['skipped']}"
            continue
        number, images, captions = images, images + 1, captions + len(record["words"])
        retrieval.update(
            unpack([record["image"]]), unpack(record["texts"]), [number], [number] * len(record["texts"]),
            record["words"],
        )  # fmt: skip
        kept[str(record.get("key", number))] = (record["image"], record["texts"][0], record["words"][0])
        for name, value in record.get("losses", {}).items():
            if value is not None:
                losses.setdefault(name, []).append(value)
    if skipped:
        log.warning("%d of %d images are left out, such as %s", skipped, skipped + images, reason)
    found: dict[str, Any] = retrieval.compute() if images else {}
    loss = {"contrastive": _contrastive([kept[key] for key in sorted(kept)], options.batch, logits)}
    if options.losses:
        for name in ("tag", "distill"):
            weight = getattr(options.ttd, f"{name}_weight")
            if weight > 0:
                values = losses.get(name, [])
                loss[name] = sum(values) / len(values) if values else float("nan")
        loss["total"] = sum(getattr(options.ttd, f"{name}_weight") * value for name, value in loss.items())
    return found | {"loss": loss, "images": images, "captions": captions, "skipped": skipped}


def _contrastive(pairs: list[tuple[str, str, str]], batch: int, logits: dict[str, Any]) -> float:
    """Return the mean contrastive loss over batches; a last batch of one pair is left out."""
    total, count = 0.0, 0
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        if len(part) < 2:
            continue
        images, texts, captions = zip(*part, strict=True)
        groups = group_numbers(captions, torch.device("cpu"))
        total += float(contrastive_loss(unpack(images), unpack(texts), groups=groups, **logits)) * len(part)
        count += len(part)
    return total / count if count else float("nan")
