"""Evaluation metrics against counting by hand, and batch by batch over shards and two processes as at once."""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ttd_plugins.errors import MissingDependencyError
from ttd_plugins.evaluation import metric_accumulators, metrics
from ttd_plugins.evaluation.metrics import (
    IGNORE,
    Overlap,
    SelectionCounts,
    class_counts,
    class_overlaps,
    mask_overlap,
    mean_overlap,
    retrieval_recalls,
    selection_counts,
    zero_shot_accuracy,
)

modest = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**31)


# Selection ------------------------------------------------------------------------------------------------------------


@modest
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=25))
def test_selection_figures_agree_with_counting(pairs: list[tuple[bool, bool]]) -> None:
    found = selection_counts(np.array([a for a, _ in pairs], bool), np.array([b for _, b in pairs], bool))
    tp = tn = chosen = positive = 0
    for selected, label in pairs:
        tp += 1 if selected and label else 0
        tn += 1 if not selected and not label else 0
        chosen += 1 if selected else 0
        positive += 1 if label else 0
    precision = tp / chosen if chosen else 0.0
    recall = tp / positive if positive else 0.0
    assert found.precision == pytest.approx(precision)
    assert found.recall == pytest.approx(recall)
    assert found.f1 == pytest.approx(2 * precision * recall / (precision + recall) if tp else 0.0)
    if pairs:
        assert found.accuracy == pytest.approx((tp + tn) / len(pairs))
    else:
        assert math.isnan(found.accuracy)


@pytest.mark.parametrize(
    ("precision", "recall", "f1"),
    [
        (59.8, 83.7, 69.8), (52.7, 70.7, 60.4), (69.3, 56.2, 62.1), (92.5, 28.6, 43.7), (85.6, 29.7, 44.1),
        (82.9, 74.5, 78.5), (88.3, 78.0, 82.8),
    ],
)  # fmt: skip
def test_published_f1_follow_from_published_precision_and_recall(precision: float, recall: float, f1: float) -> None:
    # 10,000 positives, of which recall are found, among as many selected as the precision says.
    true = round(100 * recall)
    selected = round(true / precision * 100)
    found = SelectionCounts(true, selected - true, 10_000 - true, 0)
    assert found.precision * 100 == pytest.approx(precision, abs=0.01)
    assert found.recall * 100 == pytest.approx(recall, abs=0.01)
    assert found.f1 * 100 == pytest.approx(f1, abs=0.08)


def test_published_caption_figures_add_to_one() -> None:
    for iou, fpr, fnr in ((0.604, 0.199, 0.198), (0.655, 0.163, 0.182)):
        assert iou + fpr + fnr == pytest.approx(1, abs=0.0015)


# Overlap --------------------------------------------------------------------------------------------------------------


def slow_overlap(prediction: Sequence[bool], truth: Sequence[bool]) -> tuple[float, float, float]:
    both = only_p = only_t = 0
    for p, t in zip(prediction, truth, strict=True):
        both += 1 if p and t else 0
        only_p += 1 if p and not t else 0
        only_t += 1 if t and not p else 0
    union = both + only_p + only_t
    return (both / union, only_p / union, only_t / union) if union else (1.0, 0.0, 0.0)


@modest
@given(seeds, st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_caption_overlap_agrees_with_counting_and_adds_to_one(seed: int, p: float, t: float, void: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = []
    overlaps = []
    for _ in range(3):
        prediction, truth, valid = rng.random((4, 5)) < p, rng.random((4, 5)) < t, rng.random((4, 5)) < 0.7
        overlaps.append(mask_overlap(prediction, truth, valid if void else None))
        kept = valid.ravel() if void else np.ones(20, bool)
        rows.append(slow_overlap(prediction.ravel()[kept].tolist(), truth.ravel()[kept].tolist()))
        assert (overlaps[-1].iou, overlaps[-1].fpr, overlaps[-1].fnr) == pytest.approx(rows[-1])
    mean = mean_overlap(overlaps)
    assert mean.iou == pytest.approx(sum(row[0] for row in rows) / 3)
    assert mean.iou + mean.fpr + mean.fnr == pytest.approx(1)


def test_the_mean_over_no_caption_is_nan() -> None:
    assert math.isnan(mean_overlap([]).iou)


def slow_classes(predictions: Any, truths: Any, classes: int) -> dict[str, Any]:
    ious, fprs, fnrs = [], [], []
    for c in range(classes):
        both = only_p = only_t = 0
        for p, t in zip(predictions, truths, strict=True):
            if t != IGNORE:
                both += 1 if p == c and t == c else 0
                only_p += 1 if p == c and t != c else 0
                only_t += 1 if p != c and t == c else 0
        union = both + only_p + only_t
        ious.append(both / union if union else math.nan)
        fprs.append(only_p / union if union else math.nan)
        fnrs.append(only_t / union if union else math.nan)
    present = [c for c in range(classes) if not math.isnan(ious[c])]
    means = {
        name: sum(values[c] for c in present) / len(present) if present else math.nan
        for name, values in (("miou", ious), ("mfpr", fprs), ("mfnr", fnrs))
    }
    return {"iou": ious, "fpr": fprs, "fnr": fnrs, "present": len(present)} | means


@modest
@given(seeds, st.integers(1, 6), st.integers(1, 4))
def test_class_overlaps_agree_with_counting(seed: int, classes: int, images: int) -> None:
    rng = np.random.default_rng(seed)
    # Half of the classes may be absent altogether.
    pool = rng.integers(0, classes, max(classes // 2, 1))
    predictions = rng.choice(pool, (images, 3, 4))
    truths = np.where(rng.random((images, 3, 4)) < 0.2, IGNORE, rng.choice(pool, (images, 3, 4)))
    counts = sum(class_counts(p, t, classes) for p, t in zip(predictions, truths, strict=True))
    assert isinstance(counts, np.ndarray)
    found, expected = class_overlaps(counts), slow_classes(predictions.ravel(), truths.ravel(), classes)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, err_msg=name, equal_nan=True)
    if found["present"]:
        assert found["miou"] + found["mfpr"] + found["mfnr"] == pytest.approx(1)


def test_a_class_that_occurs_nowhere_is_left_out_and_one_that_is_only_predicted_counts() -> None:
    figures = class_overlaps(class_counts(np.array([0, 1]), np.array([0, 0]), 3))
    assert figures["iou"][:2] == [0.5, 0.0]
    assert math.isnan(figures["iou"][2])
    assert figures["present"] == 2 and figures["miou"] == 0.25 and figures["fpr"][1] == 1.0


def test_a_class_beyond_the_last_is_refused() -> None:
    with pytest.raises(ValueError, match="truth has classes from 7 to 7"):
        class_counts(np.array([0]), np.array([7]), 3)


# Retrieval and zero-shot ----------------------------------------------------------------------------------------------


def unit_rows(rng: np.random.Generator, count: int, width: int = 4) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(count, width))), dim=-1)


def slow_recall(image: torch.Tensor, text: torch.Tensor, owner: list[int], groups: list[int], k: int) -> list[float]:
    """Image to text and text to image, by sorting lists."""
    similarity = (image @ text.T).tolist()
    of_image: list[set[int]] = [{g for g, o in zip(groups, owner, strict=True) if o == i} for i in range(len(image))]
    hits = [0, 0]
    for i in range(len(image)):
        best = sorted(range(len(text)), key=lambda j: -similarity[i][j])[:k]
        hits[0] += any(groups[j] in of_image[i] for j in best)
    for j in range(len(text)):
        best = sorted(range(len(image)), key=lambda i: -similarity[i][j])[:k]
        hits[1] += any(groups[j] in of_image[i] for i in best)
    return [hits[0] / len(image), hits[1] / len(text)]


@modest
@given(seeds, st.integers(1, 7), st.integers(1, 4), st.integers(1, 12))
def test_recall_with_several_captions_an_image(seed: int, images: int, most: int, kinds: int) -> None:
    rng = np.random.default_rng(seed)
    owner = [i for i in range(images) for _ in range(int(rng.integers(1, most + 1)))]
    groups = rng.integers(0, kinds, len(owner)).tolist()
    by_group = unit_rows(rng, kinds)
    image, text = unit_rows(rng, images), by_group[groups] + 1e-6 * unit_rows(rng, len(owner))
    found = retrieval_recalls(image, text, owner, groups, (1, 2, 5))
    for k in (1, 2, 5):
        expected = slow_recall(image, text, owner, groups, k)
        assert found[f"image_to_text_r{k}"] == pytest.approx(expected[0])
        assert found[f"text_to_image_r{k}"] == pytest.approx(expected[1])
        assert found[f"r{k}"] == pytest.approx(sum(expected) / 2)


@modest
@given(seeds, st.integers(1, 9), st.integers(1, 7), st.booleans())
def test_zero_shot_accuracy_agrees_with_sorting(seed: int, images: int, classes: int, several: bool) -> None:
    rng = np.random.default_rng(seed)
    image, names = unit_rows(rng, images), unit_rows(rng, classes)
    shown = (
        rng.random((images, classes)) < 0.4
        if several
        else np.eye(classes, dtype=bool)[rng.integers(0, classes, images)]
    )
    labels = torch.from_numpy(shown if several else shown.argmax(1))
    found = zero_shot_accuracy(image, names, labels, (1, 5))
    for k in (1, 5):
        hits = 0
        for i in range(images):
            ranked = sorted(range(classes), key=lambda c: -float(image[i] @ names[c]))
            hits += any(shown[i, c] for c in ranked[:k])
        # An image that shows none of the classes counts nowhere.
        count = sum(bool(row.any()) for row in shown)
        assert found[k] == pytest.approx(hits / count if count else math.nan, nan_ok=True)


# Batch by batch -------------------------------------------------------------------------------------------------------


def batches(seed: int, count: int = 6) -> list[dict[str, Any]]:
    """Random input for every metric, a batch at a time."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        masks = [rng.random((4, 4)) < 0.5 for _ in range(number % 3 + 1)]
        for mask in masks:
            mask[0, 0] = True
        captions = [f"caption {i}" for i in rng.integers(0, 9, 3)]
        found.append(
            {
                "selected": rng.random(5) < 0.5,
                "labels": rng.random(5) < 0.4,
                "scores": rng.normal(size=5).astype(np.float32).round(1),
                "prediction": rng.random((4, 4)) < 0.5,
                "truth": rng.random((4, 4)) < 0.5,
                "classes": (
                    rng.integers(0, 3, (4, 4)),
                    np.where(rng.random((4, 4)) < 0.2, IGNORE, rng.integers(0, 3, (4, 4))),
                ),
                "heat": rng.random((4, 4)),
                "masks": masks,
                "images": unit_rows(rng, 2).float(),
                "texts": unit_rows(rng, 3).float(),
                "keys": [2 * number, 2 * number + 1],
                "owners": [2 * number, 2 * number, 2 * number + 1],
                "captions": captions,
                "names": unit_rows(np.random.default_rng(1), 6).float(),
                "label": torch.from_numpy(rng.integers(0, 6, 2)),
                "shown": torch.from_numpy(rng.random((2, 6)) < 0.2),
            }
        )
    return found


def updates(batch: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {
        "TagSelectionMetrics": (batch["selected"], batch["labels"]),
        "TagAveragePrecision": (batch["scores"], batch["labels"]),
        "CaptionOverlap": (batch["prediction"], batch["truth"]),
        "ClassOverlap": batch["classes"],
        "TagBalance": (batch["heat"], batch["masks"]),
        "RetrievalRecall": (batch["images"], batch["texts"], batch["keys"], batch["owners"], batch["captions"]),
        "ZeroShotAccuracy": (batch["images"], batch["names"], batch["label"]),
        "ZeroShotAccuracy of several": (batch["images"], batch["names"], batch["shown"]),
    }


def twins() -> dict[str, Any]:
    from ttd_plugins.evaluation import torchmetrics_classes

    made = {name: getattr(torchmetrics_classes, name.partition(" ")[0]) for name in updates(batches(0, 1)[0])}
    return {name: kind(4) if name == "ClassOverlap" else kind() for name, kind in made.items()}


def measured(seed: int) -> dict[str, Any]:
    """The functional twins over everything at once."""
    rows = batches(seed)
    scores, labels = (np.concatenate([b[name] for b in rows]) for name in ("scores", "labels"))
    overlap = mean_overlap(mask_overlap(b["prediction"], b["truth"]) for b in rows)
    balance = [metrics.tag_balance(b["heat"], b["masks"]) for b in rows if len(b["masks"]) > 1]
    hits = zero_shot_accuracy(
        torch.cat([b["images"] for b in rows]), rows[0]["names"], torch.cat([b["label"] for b in rows])
    )
    shown = torch.cat([b["shown"] for b in rows])
    assert not shown.any(1).all(), "some image shows none of the classes"
    several = zero_shot_accuracy(torch.cat([b["images"] for b in rows]), rows[0]["names"], shown)
    return {
        "TagSelectionMetrics": selection_counts(np.concatenate([b["selected"] for b in rows]), labels).as_dict(),
        "TagAveragePrecision": metrics.average_precision(scores, labels),
        "CaptionOverlap": {"iou": overlap.iou, "fpr": overlap.fpr, "fnr": overlap.fnr},
        "ClassOverlap": class_overlaps(np.sum([class_counts(*b["classes"], 4) for b in rows], 0)),
        "TagBalance": float(np.mean(balance)),
        "RetrievalRecall": retrieval_recalls(
            torch.cat([b["images"] for b in rows]),
            torch.cat([b["texts"] for b in rows]),
            list(itertools.chain.from_iterable(b["owners"] for b in rows)),
            list(itertools.chain.from_iterable(b["captions"] for b in rows)),
        ),
        "ZeroShotAccuracy": {f"top{k}": value for k, value in hits.items()},
        "ZeroShotAccuracy of several": {f"top{k}": value for k, value in several.items()},
    }


def compare(found: Any, expected: Any, name: str) -> None:
    assert (found.keys() if isinstance(found, dict) else None) == (
        expected.keys() if isinstance(expected, dict) else None
    )
    pairs = [(found[k], expected[k]) for k in expected] if isinstance(expected, dict) else [(found, expected)]
    for one, other in pairs:
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-6, equal_nan=True, err_msg=name)


ACCUMULATORS = {
    "TagSelectionMetrics": metric_accumulators.TagSelectionAccumulator,
    "TagAveragePrecision": metric_accumulators.AveragePrecisionAccumulator,
    "CaptionOverlap": metric_accumulators.CaptionOverlapAccumulator,
    "ClassOverlap": partial(metric_accumulators.ClassOverlapAccumulator, 4),
    "TagBalance": metric_accumulators.TagBalanceAccumulator,
    "RetrievalRecall": metric_accumulators.RetrievalAccumulator,
    "ZeroShotAccuracy": metric_accumulators.ZeroShotAccumulator,
    "ZeroShotAccuracy of several": metric_accumulators.ZeroShotAccumulator,
}


def test_accumulators_agree_with_functions_to_the_last_bit() -> None:
    """The protocols use them, without torchmetrics."""
    expected = measured(3)
    own: dict[str, Any] = {name: kind() for name, kind in ACCUMULATORS.items()}
    for batch in batches(3):
        for name, arguments in updates(batch).items():
            own[name].update(*arguments)
    for name, value in expected.items():
        found = own[name].compute()
        if isinstance(value, dict):
            assert found.keys() == value.keys()
        np.testing.assert_equal(found, value, err_msg=name)


def test_accumulators_without_data() -> None:
    for name, kind in ACCUMULATORS.items():
        found = kind().compute()
        values = list(found.values()) if isinstance(found, dict) else [found]
        values = [value for part in values for value in np.ravel(part)]
        # Without a candidate nothing is selected, so only the accuracy is unknown.
        expected = 1 if name == "TagSelectionMetrics" else len(values) - (name == "ClassOverlap")
        assert sum(map(math.isnan, values)) == expected, name


def test_torchmetrics_classes_agree_with_functions_and_over_merged_shards() -> None:
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    expected = measured(3)
    one, shards = twins(), (twins(), twins())
    for number, batch in enumerate(batches(3)):
        for name, arguments in updates(batch).items():
            one[name].update(*arguments)
            shards[number % 2][name].update(*arguments)
    for name, value in expected.items():
        compare(one[name].compute(), value, name)
        shards[0][name].merge_state(shards[1][name])
        compare(shards[0][name].compute(), value, f"{name} merged")


def test_torchmetrics_classes_without_data() -> None:
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    empty = twins()
    for name in ("TagAveragePrecision", "TagBalance"):
        assert math.isnan(float(empty[name].compute()))
    assert math.isnan(float(empty["CaptionOverlap"].compute()["iou"]))
    assert float(empty["TagSelectionMetrics"].compute()["f1"]) == 0


def _process(rank: int, rendezvous: str, answers: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    own = twins()
    for batch in batches(3)[rank::2]:
        for name, arguments in updates(batch).items():
            own[name].update(*arguments)
    torch.save({name: metric.compute() for name, metric in own.items()}, f"{answers}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_torchmetrics_classes_agree_over_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    torch.multiprocessing.start_processes(
        _process, (str(tmp_path / "meet"), str(tmp_path / "answer")), nprocs=2, start_method="fork"
    )
    expected = measured(3)
    for rank in range(2):
        for name, found in torch.load(tmp_path / f"answer-{rank}.pt").items():
            compare(found, expected[name], f"{name} on process {rank}")


def test_the_absence_of_torchmetrics_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "ttd_plugins.evaluation.torchmetrics_classes", raising=False)
    with pytest.raises(MissingDependencyError, match=r"classes need torchmetrics .*pip install torchmetrics"):
        importlib.import_module("ttd_plugins.evaluation.torchmetrics_classes")


def test_overlap_is_a_plain_value() -> None:
    assert Overlap(1.0, 0.0, 0.0) == mask_overlap(np.ones((2, 2), bool), np.ones((2, 2), bool))
