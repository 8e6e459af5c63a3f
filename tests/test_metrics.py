"""Metrics agree with brute force, ties and empty cases included."""

from __future__ import annotations

import math

import numpy as np
import pytest
import slow_reference as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ttd_plugins.evaluation.metrics import (
    average_precision,
    f1_score,
    intersection_over_union,
    retrieval_recall,
    tag_balance,
    upsample_map,
)

modest = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)
# Few values, so that most candidates tie with another.
ranked = st.lists(st.tuples(st.sampled_from([-0.5, 0.0, 0.25, 0.3, 1.0]), st.booleans()), max_size=25)


def columns(pairs: list[tuple[float, bool]]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    return np.array([s for s, _ in pairs], np.float32), np.array([flag for _, flag in pairs], bool)


@modest
@given(ranked)
def test_average_precision_agrees_with_brute_force_at_ties(pairs: list[tuple[float, bool]]) -> None:
    scores, labels = columns(pairs)
    expected = slow.average_precision(scores.tolist(), labels.tolist())
    np.testing.assert_allclose(average_precision(scores, labels), expected, equal_nan=True, atol=1e-12)


@modest
@given(ranked, seeds)
def test_average_precision_does_not_depend_on_the_order(pairs: list[tuple[float, bool]], seed: int) -> None:
    scores, labels = columns(pairs)
    order = np.random.default_rng(seed).permutation(len(pairs))
    np.testing.assert_allclose(
        average_precision(scores[order], labels[order]), average_precision(scores, labels), equal_nan=True
    )


@modest
@given(seeds, st.integers(1, 40))
def test_average_precision_of_distinct_scores_is_the_textbook_sum(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.permutation(count).astype(np.float32), rng.random(count) < 0.5
    labels[0] = True
    found = precision = 0.0
    for rank, candidate in enumerate(np.argsort(-scores), start=1):
        if labels[candidate]:
            found += 1
            precision += found / rank
    assert average_precision(scores, labels) == pytest.approx(precision / found)


def test_average_precision_of_known_rankings() -> None:
    labels = np.array([True, False, True, False])
    assert average_precision(np.array([4.0, 1.0, 3.0, 2.0]), labels) == 1.0
    assert average_precision(np.array([1.0, 4.0, 2.0, 3.0]), labels) == pytest.approx((1 / 3 + 2 / 4) / 2)
    # A scorer that cannot tell has the share of positives, and nothing without a positive has no value.
    assert average_precision(np.zeros(4), labels) == 0.5
    assert math.isnan(average_precision(np.zeros(4), np.zeros(4, bool)))
    assert math.isnan(average_precision(np.zeros(0), np.zeros(0, bool)))


@modest
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=20))
def test_f1_is_the_harmonic_mean_of_precision_and_recall(pairs: list[tuple[bool, bool]]) -> None:
    selected, labels = (np.array([pair[i] for pair in pairs], bool) for i in (0, 1))
    right = sum(s and t for s, t in pairs)
    precision, recall = right / max(sum(selected), 1), right / max(sum(labels), 1)
    expected = 2 * precision * recall / (precision + recall) if right else 0.0
    assert f1_score(selected, labels) == pytest.approx(expected)


@modest
@given(seeds, st.integers(1, 6), st.integers(1, 6), st.floats(0, 1), st.floats(0, 1))
def test_intersection_over_union_agrees_with_counting(
    seed: int, height: int, width: int, predicted: float, true: float
) -> None:
    rng = np.random.default_rng(seed)
    prediction, truth = rng.random((height, width)) < predicted, rng.random((height, width)) < true
    assert intersection_over_union(prediction, truth) == pytest.approx(slow.iou(prediction.tolist(), truth.tolist()))


def test_masks_that_are_both_empty_agree_wholly() -> None:
    empty, full = np.zeros((2, 2), bool), np.ones((2, 2), bool)
    assert intersection_over_union(empty, empty) == 1.0
    assert intersection_over_union(empty, full) == intersection_over_union(full, empty) == 0.0


@modest
@given(seeds, st.integers(1, 5), st.integers(1, 5), st.integers(1, 23), st.integers(1, 23))
def test_upsampling_agrees_with_bilinear_loops(seed: int, rows: int, columns: int, height: int, width: int) -> None:
    one = np.random.default_rng(seed).random((rows, columns), np.float32)
    found = upsample_map(one, height, width)
    assert found.shape == (height, width)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, slow.upsample(one.tolist(), height, width), atol=1e-5)


def test_upsampling_takes_any_memory_layout_and_dtype() -> None:
    one = np.arange(12, dtype=np.float64).reshape(3, 4)
    np.testing.assert_array_equal(upsample_map(one.T[::-1], 6, 6), upsample_map(one.T[::-1].copy(), 6, 6))


@modest
@given(seeds, st.integers(2, 4))
def test_tag_balance_is_the_weakest_mean_over_the_strongest(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    heat = rng.random((5, 6))
    masks = [rng.random((5, 6)) < 0.4 for _ in range(count)]
    for mask in masks:
        mask[0, 0] = True
    means = [slow.mean_inside(heat.tolist(), mask.tolist()) for mask in masks]
    assert tag_balance(heat, masks) == pytest.approx(min(means) / max(means))


def test_tag_balance_of_known_maps() -> None:
    left, right = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    left[:, :2], right[:, 2:] = True, True
    assert tag_balance(np.ones((2, 4)), [left, right]) == 1.0
    assert tag_balance(left.astype(float), [left, right]) == 0.0
    assert tag_balance(np.zeros((2, 4)), [left, right]) == 0.0, "a map that lights up nothing is not balanced"
    assert tag_balance(left + 0.5 * right, [right, left]) == 0.5


def directions(seed: int, count: int, width: int) -> torch.Tensor:
    vectors = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=-1)


@modest
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 14))
def test_retrieval_agrees_with_brute_force_also_where_captions_repeat(seed: int, count: int, kinds: int) -> None:
    captions = [f"caption {number}" for number in np.random.default_rng(seed).integers(0, kinds, count)]
    of_caption = dict(zip(sorted(set(captions)), directions(seed, count, 5), strict=False))
    texts = torch.stack([of_caption[caption] for caption in captions])
    images = directions(seed + 1, count, 5)
    expected = slow.retrieval(images.tolist(), texts.tolist(), captions)
    assert retrieval_recall(images, texts, captions) == pytest.approx(expected)


@modest
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 14))
def test_retrieval_at_k_agrees_with_brute_force(seed: int, count: int, k: int) -> None:
    captions = [f"caption {number}" for number in range(count)]
    images, texts = directions(seed, count, 5), directions(seed + 1, count, 5)
    expected = slow.retrieval(images.tolist(), texts.tolist(), captions, k)
    assert retrieval_recall(images, texts, captions, k) == pytest.approx(expected)


def test_identical_captions_are_both_right() -> None:
    # Image 1 is nearest to text 0, which has the caption of image 1.
    images = torch.eye(3)
    texts = torch.eye(3)[[1, 0, 2]]
    assert retrieval_recall(images, texts, ["a dog", "a dog", "a cat"]) == 1.0
    assert retrieval_recall(images, texts, ["a dog", "a bird", "a cat"]) == pytest.approx(1 / 3)
    assert retrieval_recall(images, texts, ["a dog", "a bird", "a cat"], k=9) == 1.0
