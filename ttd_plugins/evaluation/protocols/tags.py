"""Tag selection: which words of a caption the image shows (arXiv 2404.00384, the protocol of CC3M-TagMask).

Candidates are pooled over captions. Metrics are precision, recall, F1 and accuracy of the selection, and the average
precision of the scores. The baselines score a tag with the pooled image embedding or with the caption's embedding, or
select all nouns. Retrieval and zero-shot classification are measured too, since fine-tuning may degrade them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.data.images import read_image
from ttd_plugins.engine import TTDOptions
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.datasets import CaptionData
from ttd_plugins.evaluation.dense_inference import class_embeddings, dense_features, templates_by_name
from ttd_plugins.evaluation.metric_accumulators import (
    AveragePrecisionAccumulator,
    RetrievalAccumulator,
    TagSelectionAccumulator,
)
from ttd_plugins.evaluation.protocol_options import TagProtocol
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
from ttd_plugins.evaluation.protocols.zero_shot import image_hits, zero_shot_metrics
from ttd_plugins.method import selection
from ttd_plugins.method.text_embeddings import TextEmbeddingCache
from ttd_plugins.options import Score
from ttd_plugins.tags import fold, split_words
from ttd_plugins.utils.deprecation import renamed_names
from ttd_plugins.utils.progress import Stage

TEXT_CACHE_SIZE = 20_000
"""Number of cached text embeddings: the same words occur in many captions of a data set."""
SCORES: tuple[Score, ...] = ("pixel", "image", "text")


def evaluate_tags(
    adapter: DenseAdapter,
    data: CaptionData,
    options: TagProtocol | None = None,
    *,
    out: Path | str | None = None,
    rank: int = 0,
    world: int = 1,
    stage: Stage | None = None,
) -> EvaluationResult:
    """Evaluate tag selection on captioned images.

    Metrics: for each of ``pixel``, ``image`` and ``text`` (and ``nouns``) ``precision``, ``recall``, ``f1``,
    ``accuracy`` and ``map`` (not for ``nouns``); the numbers ``captions``, ``candidates``, ``positives`` and
    ``unknown`` (candidates without a label, which are skipped); ``retrieval``; and, if the data set labels classes,
    ``zero_shot``: the fraction of images that show the class whose name or alias is nearest to the pooled image
    embedding (``top1``), or one of the five nearest classes (``top5``).

    Args:
        adapter: the backbone, which is in evaluation mode meanwhile.
        data: the reader of the data set.
        options: a preset of :data:`TAG_PRESETS`, or other options.
        out, rank, world, stage: see :func:`~ttd_plugins.evaluation.protocols.runner.run_protocol`.

    Raises:
        InputError, DatasetError: an option or the data set is invalid, or the data set has no truth at all.
        TagExtractionError, MissingDependencyError: a tag extractor cannot be loaded.
    """
    from ttd_plugins.plugins import make_tag_extractor

    options = options or TagProtocol()
    if options.dense.refine:
        raise InputError("PAMR does not apply to tag selection, which scores unrefined maps; leave it out")
    # The engine validates the template, the rule and the threshold.
    TTDOptions(template=options.template, rule=options.rule, threshold=options.threshold)
    extractor = make_tag_extractor(options.extractor, **options.extractor_options)
    nouns = make_tag_extractor("stanza", **options.nouns_options) if options.nouns else None
    calibration = options.calibration or adapter.description.calibration
    cache = TextEmbeddingCache(TEXT_CACHE_SIZE)
    templates = None if options.zero_shot is None or not data.classes else templates_by_name(options.zero_shot)
    owner = torch.tensor([index for index, item in enumerate(data.classes) for _ in item.texts])
    class_index = {item.name: index for index, item in enumerate(data.classes)}
    names: list[torch.Tensor] = []

    def encode_classes() -> None:
        if templates is not None:
            texts_of_classes = [text for item in data.classes for text in item.texts]
            names.append(class_embeddings(adapter, texts_of_classes, templates))

    def encode(texts: Sequence[str]) -> torch.Tensor:
        return cache.encode(adapter, texts)[0]

    def record_of(key: str) -> Record:
        item = data.read(key)
        features = dense_features(adapter, read_image(item.path), options.dense, pooled=True)
        assert features.pooled is not None
        captions = [truth.caption for truth in item.captions]
        caption_embeddings = encode(captions)
        candidates = extractor(captions)
        # Each distinct tag once, so that the same tag has bitwise equal scores in all captions of an image.
        distinct = list(dict.fromkeys(tag for tags in candidates for tag in tags))
        embeddings = encode([options.template.replace("{}", tag) for tag in distinct])
        row_of = {tag: row for row, tag in enumerate(distinct)}
        pixel = features.maps(embeddings).flatten(1).amax(1) if distinct else embeddings.new_zeros(0)
        image = embeddings @ features.pooled.to(embeddings)
        found = []
        all_nouns = nouns(captions) if nouns is not None else [[] for _ in captions]
        for truth, tags, named, caption in zip(item.captions, candidates, all_nouns, caption_embeddings, strict=True):
            rows = torch.tensor([row_of[tag] for tag in tags], dtype=torch.long, device=embeddings.device)
            scores = {"pixel": pixel[rows], "image": image[rows], "text": (embeddings @ caption)[rows]}
            index = torch.zeros(len(tags), dtype=torch.long, device=embeddings.device)
            selected = {
                name: selection.select_tags(
                    values, index, 1, rule=options.rule, threshold=options.threshold, calibration=calibration
                ).tolist()
                for name, values in scores.items()
            }
            if nouns is not None:
                selected["nouns"] = [_is_noun(tag, named) for tag in tags]
            found.append(
                {
                    "tags": tags,
                    "labels": truth.labels(tags),
                    "scores": {name: values.tolist() for name, values in scores.items()},
                    "selected": selected,
                }
            )
        record: Record = {"captions": found}
        if options.retrieval:
            record |= {
                "image": pack(features.pooled),
                "texts": [pack(vector) for vector in caption_embeddings],
                "words": captions,
            }
        if names:
            shown = sorted(class_index[name] for name in item.shown)
            record["zero_shot"] = image_hits(features.pooled, names[0], owner, len(data.classes), shown)
        return record

    return run_protocol(
        "tags", adapter, list(data.keys()), record_of, _measured,
        run_settings("tags", adapter, options, calibration, data.describe()),
        check=checked(data), prepare=encode_classes, out=out, rank=rank, world=world, stage=stage,
    )  # fmt: skip


def _measured(records: Iterable[Record]) -> dict[str, Any]:
    found = tag_metrics(records)
    missing = f"none of the {found['candidates']} candidate tags of {found['captions']} captions is a true tag"
    return require_truth(found, found["positives"], missing)


def _is_noun(tag: str, nouns: Iterable[str]) -> bool:
    """Return whether a candidate is a noun of the caption, or a word of a compound noun."""
    return any(fold(tag) == fold(noun) or fold(tag) in map(fold, split_words(noun)) for noun in nouns)


def tag_metrics(records: Iterable[Record]) -> dict[str, Any]:
    """Compute the metrics of :func:`evaluate_tags` from the records of its images."""
    selections: dict[str, TagSelectionAccumulator] = defaultdict(TagSelectionAccumulator)
    precisions = {name: AveragePrecisionAccumulator() for name in SCORES}
    retrieval, retrieved = RetrievalAccumulator(), False
    captions = candidates = positives = unknown = 0
    hits = []
    for number, record in enumerate(records):
        if "zero_shot" in record:
            hits.append(record["zero_shot"])
        for caption in record["captions"]:
            captions += 1
            known = [i for i, label in enumerate(caption["labels"]) if label is not None]
            unknown += len(caption["labels"]) - len(known)
            own = [bool(caption["labels"][i]) for i in known]
            candidates, positives = candidates + len(own), positives + sum(own)
            for name, values in caption["scores"].items():
                precisions[name].update([values[i] for i in known], own)
            for name, chosen in caption["selected"].items():
                selections[name].update([chosen[i] for i in known], own)
        if "image" in record:
            owners = [number] * len(record["texts"])
            retrieval.update(unpack([record["image"]]), unpack(record["texts"]), [number], owners, record["words"])
            retrieved = True
    found: dict[str, Any] = {
        name: selections[name].compute() | ({"map": precisions[name].compute()} if name in precisions else {})
        for name in selections
    }
    found |= {"captions": captions, "candidates": candidates, "positives": positives, "unknown": unknown}
    if retrieved:
        found["retrieval"] = retrieval.compute()
    if hits:
        found["zero_shot"] = zero_shot_metrics(hits)
    return found


__getattr__ = renamed_names(__name__, {"tag_figures": "tag_metrics", "REMEMBERED_TEXTS": "TEXT_CACHE_SIZE"})
