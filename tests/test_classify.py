"""Multi-label classification against slow counts: metrics, scores, selection, resuming, processes and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slow_reference as slow
import torch
from helpers_photographs import write_photographs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_backbone import ToyAdapter, toy
from typer.testing import CliRunner

from ttd_plugins import cli
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation import evaluate
from ttd_plugins.evaluation.datasets import open_labels
from ttd_plugins.evaluation.dense_inference import DenseOptions
from ttd_plugins.evaluation.metric_accumulators import MultiLabelAccumulator
from ttd_plugins.evaluation.metrics import multilabel_metrics
from ttd_plugins.evaluation.protocols import ClassifyProtocol, evaluate_classify

modest = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**31)
SHOWN = {"a": (1, 18, 193), "b": (18, 187), "c": (1,), "d": (0,)}
CAPTIONS = {name: ["a photo"] for name in SHOWN}
PLAIN = DenseOptions(size=16)


# Metrics --------------------------------------------------------------------------------------------------------------


def random_labels(seed: int, images: int, classes: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    scores = rng.choice([-0.5, 0.1, 0.2, 0.7], (images, classes))
    return scores, rng.choice([-1, 0, 0, 1], (images, classes)), rng.random((images, classes)) < 0.4


@modest
@given(seeds, st.integers(1, 9), st.integers(1, 5))
def test_metrics_agree_with_counting_class_by_class(seed: int, images: int, classes: int) -> None:
    scores, labels, selected = random_labels(seed, images, classes)
    found = multilabel_metrics(scores, labels, selected)
    aps, precisions, recalls = [], [], []
    tp = chosen = positive = 0
    for c in range(classes):
        rows = [n for n in range(images) if labels[n, c] != -1]
        truth = [bool(labels[n, c] == 1) for n in rows]
        assert found["positives"][c] == sum(truth)
        if not any(truth):
            assert math.isnan(found["ap"][c])
        own = sum(bool(selected[n, c]) and t for n, t in zip(rows, truth, strict=True))
        taken = sum(bool(selected[n, c]) for n in rows)
        tp, chosen, positive = tp + own, chosen + taken, positive + sum(truth)
        if any(truth):
            aps.append(slow.average_precision([float(scores[n, c]) for n in rows], truth))
            assert found["ap"][c] == pytest.approx(aps[-1])
            precisions.append(own / taken if taken else 0.0)
            recalls.append(own / sum(truth))
    assert found["present"] == len(aps)
    if not aps:
        assert math.isnan(found["map"]) and math.isnan(found["f1"])
        return
    assert found["map"] == pytest.approx(sum(aps) / len(aps))
    assert found["recall"] == pytest.approx(tp / positive)
    assert found["f1"] == pytest.approx(2 * tp / (chosen + positive))
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    assert found["class_f1"] == pytest.approx(2 * p * r / (p + r) if p + r else 0.0)


@modest
@given(seeds, st.integers(2, 9), st.integers(1, 4))
def test_batch_by_batch_is_as_at_once_also_for_torchmetrics(seed: int, images: int, classes: int) -> None:
    whole = random_labels(seed, images, classes)
    expected = multilabel_metrics(*whole)
    accumulator = MultiLabelAccumulator(classes)
    for part in (slice(0, 1), slice(1, None)):
        accumulator.update(*(one[part] for one in whole))
    np.testing.assert_equal(accumulator.compute(), expected)
    pytest.importorskip("torchmetrics")
    from ttd_plugins.evaluation.torchmetrics_classes import MultiLabelClassification

    metric = MultiLabelClassification(classes)
    for part in (slice(0, 1), slice(1, None)):
        metric.update(*(torch.as_tensor(one[part]) for one in whole))
    found = metric.compute()
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), np.array(value), equal_nan=True)


# The protocol ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four photographs of noise with dense masks."""
    return write_photographs(tmp_path / "data", CAPTIONS, SHOWN)


def softmax(values: list[float], scale: float) -> list[float]:
    powers = [math.exp(scale * (value - max(values))) for value in values]
    return [power / sum(powers) for power in powers]


def slow_scores(
    backbone: ToyAdapter, image: Path, names: list[tuple[str, ...]], activation: str, words: tuple[str, ...]
) -> dict[str, list[float]]:
    """Pixel, image and combined score of every class by loops."""
    with Image.open(image) as opened:
        seen = backbone.encode_image(backbone.dense_transform(16)(opened)[None])
    assert seen.pooled is not None
    patches = [slow.unit(seen.patches[0, y, x].tolist()) for y in range(4) for x in range(4)]
    pooled = slow.unit(seen.pooled[0].tolist())
    texts = [[slow.unit(backbone.encode_text(backbone.tokenize([t]).ids)[0].tolist()) for t in own] for own in names]
    texts += [[slow.unit(backbone.encode_text(backbone.tokenize([word]).ids)[0].tolist())] for word in words]

    def activated(vector: list[float]) -> list[float]:
        cosines = [max(slow.dot(vector, text) for text in own) for own in texts]
        if activation == "softmax":
            cosines = softmax(cosines, float(backbone.logit_scale()))
        if activation == "probability":
            own = backbone.description.calibration
            cosines = [slow.sigmoid(own.scale * value + own.shift) for value in cosines]
        return cosines[: len(names)]

    at_patches = [activated(patch) for patch in patches]
    pixel = [max(row[c] for row in at_patches) for c in range(len(names))]
    image_score = activated(pooled)
    return {
        "pixel": pixel,
        "image": image_score,
        "combined": [(p + i) / 2 for p, i in zip(pixel, image_score, strict=True)],
    }


@pytest.mark.parametrize(
    ("activation", "rule", "words"),
    [("softmax", "minmax", ("snow", "wall")), ("cosine", "top", ()), ("probability", "absolute", ())],
)
@torch.no_grad()
def test_scores_and_metrics_agree_with_loops(folder: Path, activation: Any, rule: Any, words: tuple[str, ...]) -> None:
    backbone = toy()
    data = open_labels("coco_panoptic", folder, classes="coco_panoptic")
    few = folder / "few.txt"
    few.write_text("person, man\ndog\ncat\ngrass-merged, grass\n")
    data = open_labels("coco_panoptic", folder, classes=few)
    options = ClassifyProtocol(
        dense=PLAIN, activation=activation, templates="none", rule=rule, threshold=0.4, top=2, background_words=words
    )
    result = evaluate_classify(backbone, data, options)
    assert result.metrics is not None and result.metrics["images"] == 4 and result.metrics["present"] == 3
    names = [item.texts for item in data.classes]
    rows = {name: slow_scores(backbone, folder / f"images/{name}.png", names, activation, words) for name in SHOWN}
    truth = {"a": (1, 1, 0, 1), "b": (0, 1, 0, 0), "c": (1, 0, 0, 0), "d": (0, 0, 0, 0)}
    for score in ("pixel", "image", "combined"):
        aps = []
        for c, item in enumerate(data.classes):
            labels = [bool(truth[name][c]) for name in SHOWN]
            if any(labels):
                values = [round(rows[name][score][c], 6) for name in SHOWN]
                aps.append(slow.average_precision(values, labels))
                assert result.metrics["classes"][item.name][f"ap_{score}"] == pytest.approx(aps[-1])
        assert result.metrics[score]["map"] == pytest.approx(sum(aps) / 3)
        tp = chosen = 0
        for name in SHOWN:
            values = rows[name][score]
            if rule == "top":
                picked = set(sorted(range(4), key=lambda c: -values[c])[:2])
            else:
                scaled = slow.minmax(values, 1.0) if rule == "minmax" else values
                picked = {c for c in range(4) if scaled[c] >= 0.4}
            chosen += len(picked)
            tp += sum(truth[name][c] for c in picked)
        assert result.metrics[score]["f1"] == pytest.approx(2 * tp / (chosen + 5))


def test_the_score_of_one_class_does_not_depend_on_how_patches_are_split(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_labels("coco_panoptic", folder, classes="coco_things")
    whole = evaluate_classify(toy(), data, ClassifyProtocol(dense=PLAIN, templates="none"))
    monkeypatch.setattr("ttd_plugins.evaluation.protocols.classify.PATCHES_AT_ONCE", 3)
    split = evaluate_classify(toy(), data, ClassifyProtocol(dense=PLAIN, templates="none"))
    np.testing.assert_equal(split.metrics, whole.metrics)


def test_an_interrupted_evaluation_goes_on_and_processes_share_it(folder: Path, tmp_path: Path) -> None:
    data = open_labels("coco_panoptic", folder, classes="coco_things")
    options = ClassifyProtocol(dense=PLAIN, templates="none")
    whole = evaluate_classify(toy(), data, options)
    first = evaluate_classify(toy(), data, options, out=tmp_path / "out", rank=0, world=2)
    assert first.metrics is None and first.done == 2
    last = evaluate_classify(toy(), data, options, out=tmp_path / "out", rank=1, world=2)
    np.testing.assert_equal(last.metrics, whole.metrics)
    assert (tmp_path / "out/results.json").is_file()
    with pytest.raises(InputError, match="other settings"):
        evaluate_classify(toy(), data, ClassifyProtocol(dense=PLAIN, templates="photo"), out=tmp_path / "out")


def test_options_that_have_no_meaning_are_refused(folder: Path) -> None:
    data = open_labels("coco_panoptic", folder)
    with pytest.raises(InputError, match="PAMR"):
        evaluate_classify(toy(), data, ClassifyProtocol(dense=DenseOptions(size=16, refine=True)))
    with pytest.raises(InputError, match="softmax"):
        evaluate_classify(
            toy(), data, ClassifyProtocol(dense=PLAIN, activation="cosine", background_words=("zebra crossing",))
        )
    with pytest.raises(InputError, match="rule"):
        evaluate(toy(), f"coco_panoptic:{folder}", protocol="classify", rule="middle")
    with pytest.raises(InputError, match="needs a folder"):
        evaluate(toy(), "voc2007", protocol="classify")


def test_the_command_prints_scores_and_classes(folder: Path, tmp_path: Path) -> None:
    arguments = [
        "eval", "classify", str(folder), "--data", "coco_panoptic", "--classes", "coco_things", "--preset", "fast",
        "--backbone", "open_clip:tiny", "--size", "64", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    for words in ("pixel.map", "image.map", "combined.map", "ap combined", "person", "dog", "results:"):
        assert words in result.output
    assert "bicycle" not in result.output
    stored = json.loads((tmp_path / "out/results.json").read_text())
    assert stored["protocol"] == "classify" and len(stored["figures"]["classes"]) == 80
    assert stored["figures"]["classes"]["bicycle"]["ap_pixel"] is None
    wrong = CliRunner().invoke(cli.app, ["eval", "classify", str(folder), "--data", "voc20007"])
    assert wrong.exit_code == 2 and "did you mean 'voc2007'" in wrong.output
