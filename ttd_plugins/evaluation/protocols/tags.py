"""Tag selection: which words of a caption are in its picture (arXiv 2404.00384, the protocol of CC3M-TagMask).

Candidates are pooled over captions; figures are precision, recall, F1 and accuracy of what is selected, and the average
precision of the scores. The baselines score a word by the pooled image embedding and by the caption's embedding, or
take all nouns. Beside them stand retrieval and zero-shot classification, which fine-tuning may cost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttd_plugins.adapter import Calibration, DenseAdapter
from ttd_plugins.data.images import read_image
from ttd_plugins.engine import TTDOptions, evaluation_mode
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.datasets import CaptionData
from ttd_plugins.evaluation.dense_inference import DenseOptions, class_embeddings, dense_features, templates_by_name
from ttd_plugins.evaluation.metrics import SelectionCounts, average_precision, retrieval_recalls, selection_counts
from ttd_plugins.evaluation.protocols.running import (
    EvaluationResult,
    Record,
    describe_backbone,
    pack,
    run_protocol,
    unpack,
)
from ttd_plugins.evaluation.protocols.zero_shot import shown_hits, zero_shot_figures
from ttd_plugins.evaluation.true_tags import label_candidates
from ttd_plugins.method import selection
from ttd_plugins.method.text_embeddings import TextEmbeddingCache
from ttd_plugins.options import Rule, Score
from ttd_plugins.tags import fold, split_words
from ttd_plugins.utils.progress import Stage

REMEMBERED_TEXTS = 20_000
"""Words come again and again over a data set, and so are not encoded anew for each picture."""
SCORES: tuple[Score, ...] = ("pixel", "image", "text")


@dataclass(frozen=True)
class TagProtocol:
    """How tags are scored and selected.

    Attributes:
        dense: how a picture is looked at; the score of a tag is the maximum of its map averaged over views.
        extractor, extractor_options: the tag extractor by name, and its options.
        template: what a tag is put into before it is encoded.
        rule, threshold: the selection rule (:func:`~ttd_plugins.method.selection.select_tags`), for every score.
        calibration: for the rule ``"probability"``; ``None`` means the backbone's own.
        nouns: whether the baseline of all nouns is measured, which needs Stanza.
        nouns_options: options of the extractor ``stanza``.
        retrieval: whether image-text retrieval is measured with the captions.
        zero_shot: templates of class names for zero-shot classification, as ``"photo"``, ``"imagenet"`` or ``"none"``;
            ``None`` leaves it out, as do data sets that label no classes.
    """

    dense: DenseOptions = field(default_factory=lambda: DenseOptions(size=224, flip=True))
    extractor: str = "words"
    extractor_options: Mapping[str, Any] = field(default_factory=dict)
    template: str = "{}"
    rule: Rule = "minmax"
    threshold: float = 0.5
    calibration: Calibration | None = None
    nouns: bool = False
    nouns_options: Mapping[str, Any] = field(default_factory=dict)
    retrieval: bool = True
    zero_shot: str | None = "photo"


TAG_PRESETS: dict[str, TagProtocol] = {
    "paper": TagProtocol(),
    "fast": TagProtocol(dense=DenseOptions(size=224)),
}
"""``"paper"``: 224 pixels, one scale, flip averaged. The selection rule is unpublished; the engine's default here."""


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
    """Measure tag selection on captioned pictures.

    Figures: for each of ``pixel``, ``image`` and ``text`` (and ``nouns``) ``precision``, ``recall``, ``f1``,
    ``accuracy`` and ``map``; the numbers of candidates, of positives and of those left out because nothing tells;
    ``retrieval``; and, where the data set labels classes, ``zero_shot``: how often a class that the picture shows has
    the name or alias nearest to the pooled image embedding (``top1``), or one of the nearest five (``top5``).

    Args:
        adapter: the backbone; in evaluation mode for the time being.
        data: the reader of the data set.
        options: a preset of :data:`TAG_PRESETS`, or settings of one's own.
        out, rank, world, stage: see :func:`~ttd_plugins.evaluation.protocols.running.run_protocol`.

    Raises:
        InputError, DatasetError: an option is wrong, or the data set is.
        TagExtractionError, MissingDependencyError: a tag extractor cannot be had.
    """
    from ttd_plugins.plugins import make_tag_extractor

    options = options or TagProtocol()
    if options.dense.refine:
        raise InputError("tags are scored by their nearest patch, before any refinement; leave PAMR out")
    # The engine's own check of the template, the rule and the score.
    TTDOptions(template=options.template, rule=options.rule, threshold=options.threshold)
    extractor = make_tag_extractor(options.extractor, **options.extractor_options)
    nouns = make_tag_extractor("stanza", **options.nouns_options) if options.nouns else None
    calibration = options.calibration or adapter.description.calibration
    memory = TextEmbeddingCache(REMEMBERED_TEXTS)
    templates = None if options.zero_shot is None or not data.classes else templates_by_name(options.zero_shot)
    owner = torch.tensor([index for index, item in enumerate(data.classes) for _ in item.texts])
    place_of = {item.name: index for index, item in enumerate(data.classes)}
    names: list[torch.Tensor] = []

    def name_classes() -> None:
        if templates is not None:
            texts_of_classes = [text for item in data.classes for text in item.texts]
            names.append(class_embeddings(adapter, texts_of_classes, templates))

    def texts(words: Sequence[str]) -> torch.Tensor:
        return memory.encode(adapter, words)[0]

    def one(key: str) -> Record:
        item = data.read(key)
        features = dense_features(adapter, read_image(item.path), options.dense, pooled=True)
        assert features.pooled is not None
        captions = [truth.caption for truth in item.captions]
        caption_embeddings = texts(captions)
        candidates = extractor(captions)
        # Each distinct tag once: equal scores of one picture are then equal to the last bit, whatever the batch.
        distinct = list(dict.fromkeys(tag for tags in candidates for tag in tags))
        embeddings = texts([options.template.replace("{}", tag) for tag in distinct])
        place = {tag: number for number, tag in enumerate(distinct)}
        pixel = features.maps(embeddings).flatten(1).amax(1) if distinct else embeddings.new_zeros(0)
        image = embeddings @ features.pooled.to(embeddings)
        found = []
        all_nouns = nouns(captions) if nouns is not None else [[] for _ in captions]
        for truth, tags, named, caption in zip(item.captions, candidates, all_nouns, caption_embeddings, strict=True):
            rows = torch.tensor([place[tag] for tag in tags], dtype=torch.long, device=embeddings.device)
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
                    "labels": label_candidates(truth.caption, tags, truth.mentions, truth.true),
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
            shown = sorted(place_of[name] for name in item.shown)
            record["zero_shot"] = shown_hits(features.pooled, names[0], owner, len(data.classes), shown)
        return record

    settings = {
        "protocol": "tags",
        "options": asdict(options),
        "calibration": asdict(calibration),
        "backbone": describe_backbone(adapter),
        "data": data.describe(),
    }
    with evaluation_mode(adapter):
        return run_protocol(
            "tags", adapter, list(data.keys()), one, tag_figures, settings,
            check=data.check, prepare=name_classes, out=out, rank=rank, world=world, stage=stage,
        )  # fmt: skip


def _is_noun(tag: str, nouns: Iterable[str]) -> bool:
    """Whether a candidate is a noun of the caption, or a word of a compound noun."""
    return any(fold(tag) == fold(noun) or fold(tag) in map(fold, split_words(noun)) for noun in nouns)


def tag_figures(records: Iterable[Record]) -> dict[str, Any]:
    """The figures of :func:`evaluate_tags` from the records of its pictures."""
    counts: dict[str, SelectionCounts] = defaultdict(SelectionCounts)
    scores: dict[str, list[float]] = {name: [] for name in SCORES}
    labels: list[bool] = []
    captions = unknown = 0
    images, texts, owner, words, hits = [], [], [], [], []
    for number, record in enumerate(records):
        if "zero_shot" in record:
            hits.append(record["zero_shot"])
        for caption in record["captions"]:
            captions += 1
            known = [i for i, label in enumerate(caption["labels"]) if label is not None]
            unknown += len(caption["labels"]) - len(known)
            own = [bool(caption["labels"][i]) for i in known]
            labels += own
            for name, values in caption["scores"].items():
                scores[name] += [values[i] for i in known]
            for name, chosen in caption["selected"].items():
                counts[name] += selection_counts(np.array([chosen[i] for i in known], bool), np.array(own, bool))
        if "image" in record:
            images.append(record["image"])
            texts += record["texts"]
            owner += [number] * len(record["texts"])
            words += record["words"]
    figures: dict[str, Any] = {
        name: counts[name].as_dict()
        | ({"map": average_precision(np.array(scores[name]), np.array(labels, bool))} if name in scores else {})
        for name in counts
    }
    figures |= {"captions": captions, "candidates": len(labels), "positives": sum(labels), "unknown": unknown}
    if images:
        figures["retrieval"] = retrieval_recalls(unpack(images), unpack(texts), owner, words)
    if hits:
        figures["zero_shot"] = zero_shot_figures(hits)
    return figures
