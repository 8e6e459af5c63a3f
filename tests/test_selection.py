"""Scores and the rules that select tags agree with loops, at ties, for one tag, for none and for a hundred."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import slow_reference as slow
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mutants import assert_caught, mutant
from ragged import Ragged, by_image, flat, make_ragged, ragged_batches

from ttd_plugins.adapter import Calibration
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.method import selection, similarity

modest = settings(deadline=None, max_examples=40)
RULES = ("minmax", "absolute", "probability")
# Off every grid of coarse numbers, where the last bit would decide.
THRESHOLDS = {"minmax": 0.4137, "absolute": 0.2137, "probability": 0.5137}
CALIBRATION = Calibration(7.0, -1.5)


def scores_of(data: Ragged) -> torch.Tensor:
    maps = similarity.tag_maps(data.patches, data.tags, data.image_index, data.tag_index)
    return selection.pixel_scores(maps)


def check_pixel_scores(data: Ragged) -> None:
    data = data.normalized()
    expected = [
        [max(slow.dot(point, tag) for point in points) for tag in tags]
        for points, tags in zip(data.patches.tolist(), data.tags_by_image(), strict=True)
    ]
    np.testing.assert_allclose(scores_of(data), flat(expected), atol=1e-12)


def check_image_scores(data: Ragged) -> None:
    data = data.normalized()
    found = selection.image_scores(data.pooled, data.tags, data.image_index, data.tag_index)
    expected = [
        [slow.dot(whole, tag) for tag in tags]
        for whole, tags in zip(data.pooled.tolist(), data.tags_by_image(), strict=True)
    ]
    np.testing.assert_allclose(found, flat(expected), atol=1e-12)


def check_text_scores(data: Ragged) -> None:
    data = data.normalized()
    found = selection.text_scores(data.captions, data.tags, data.image_index, data.tag_index)
    expected = [
        [slow.dot(caption, tag) for tag in tags]
        for caption, tags in zip(data.captions.tolist(), data.tags_by_image(), strict=True)
    ]
    np.testing.assert_allclose(found, flat(expected), atol=1e-12)


def check_minmax_over_tags(data: Ragged) -> None:
    scores = scores_of(data.normalized())
    found = selection.minmax_over_tags(scores, data.image_index, data.batch)
    expected = [slow.minmax(one, constant=1.0) for one in by_image(scores, data.counts) if one]
    np.testing.assert_allclose(found, flat(expected), atol=1e-12)


def check_select_tags(data: Ragged) -> None:
    scores = scores_of(data.normalized())
    for rule in RULES:
        found = selection.select_tags(
            scores,
            data.image_index,
            data.batch,
            rule=rule,
            threshold=THRESHOLDS[rule],
            calibration=CALIBRATION,
        )
        expected = [
            slow.select(one, rule, THRESHOLDS[rule], CALIBRATION.scale, CALIBRATION.shift)
            for one in by_image(scores, data.counts)
        ]
        assert found.dtype == torch.bool
        assert by_image(found, data.counts) == expected


CHECKS: dict[str, Callable[[Ragged], None]] = {
    "pixel_scores": check_pixel_scores,
    "image_scores": check_image_scores,
    "text_scores": check_text_scores,
    "minmax_over_tags": check_minmax_over_tags,
    "select_tags": check_select_tags,
}


@pytest.mark.parametrize("name", CHECKS)
@modest
@given(data=ragged_batches())
@example(data=make_ragged(0, [0, 0]))
@example(data=make_ragged(1, [0, 100, 1]))
@example(data=make_ragged(2, [4, 4, 1], coarse=True))
def test_every_score_and_rule_agrees_with_its_loop(name: str, data: Ragged) -> None:
    CHECKS[name](data)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("pixel_scores", "amax(-1)", "mean(-1)"),
        ("image_scores", "pooled[image_index]", "pooled[image_index * 0]"),
        ("text_scores", "captions, tags", "captions.flip(0), tags"),
        ("minmax_over_tags", 'reduce="amin"', 'reduce="amax"'),
        ("minmax_over_tags", "torch.ones_like(scores)", "torch.zeros_like(scores)"),
        ("minmax_over_tags", "(scores - low) / span.clamp_min(eps)", "scores"),
        ("select_tags", "return scores >= threshold", "return torch.ones_like(scores, dtype=torch.bool)"),
        ("select_tags", "return scores >= threshold", "return torch.zeros_like(scores, dtype=torch.bool)"),
        ("select_tags", "return scores >= threshold", "return scores < threshold"),
        ("select_tags", "minmax_over_tags(scores, image_index, batch)", "minmax_over_tags(scores, image_index * 0, 1)"),
        ("select_tags", "(calibration or Calibration())", "Calibration()"),
    ],
)
def test_a_broken_score_or_rule_is_noticed(name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        for seed in range(8):
            CHECKS[name](make_ragged(seed, [2, 0, 3, 1], coarse=seed % 2 == 1))

    check()
    monkeypatch.setattr(selection, name, mutant(getattr(selection, name), old, new))
    assert_caught(check)


def test_a_score_at_the_threshold_is_kept() -> None:
    index = torch.tensor([0, 0, 0])
    scores = torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64)
    assert selection.select_tags(scores, index, 1, rule="minmax", threshold=0.5).tolist() == [False, True, True]
    assert selection.select_tags(scores, index, 1, rule="absolute", threshold=0.25).tolist() == [False, True, True]
    # The default calibration puts a cosine of 0.25 at one half.
    assert selection.select_tags(scores, index, 1, rule="probability", threshold=0.5).tolist() == [False, True, True]


@modest
@given(ragged_batches(), st.floats(0, 1))
def test_minmax_always_keeps_the_best_tags_and_an_only_one(data: Ragged, threshold: float) -> None:
    scores = scores_of(data.normalized())
    kept = selection.select_tags(scores, data.image_index, data.batch, rule="minmax", threshold=threshold)
    for one, flags in zip(by_image(scores, data.counts), by_image(kept, data.counts), strict=True):
        assert all(flag for score, flag in zip(one, flags, strict=True) if score == max(one))


@modest
@given(ragged_batches())
def test_a_caption_is_judged_by_itself(data: Ragged) -> None:
    scores = scores_of(data.normalized())
    for rule in RULES:
        together = selection.select_tags(scores, data.image_index, data.batch, rule=rule, threshold=THRESHOLDS[rule])
        alone = [
            selection.select_tags(
                part, torch.zeros(len(part), dtype=torch.long), 1, rule=rule, threshold=THRESHOLDS[rule]
            ).tolist()
            for part in scores.split(list(data.counts))
        ]
        assert by_image(together, data.counts) == alone


def test_equal_scores_are_all_kept_by_minmax_and_by_no_other_rule() -> None:
    scores, index = torch.full((4,), -0.9), torch.tensor([0, 0, 0, 1])
    for rule, kept in (("minmax", True), ("absolute", False), ("probability", False)):
        assert selection.select_tags(scores, index, 2, rule=rule).tolist() == [kept] * 4


def test_a_selection_has_no_gradient() -> None:
    scores = torch.tensor([0.1, 0.6], requires_grad=True)
    for rule in RULES:
        assert not selection.select_tags(scores, torch.tensor([0, 0]), 1, rule=rule).requires_grad


def test_an_unknown_rule_is_told_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown selection rule 'best'; known: minmax, absolute, probability"):
        selection.select_tags(torch.zeros(1), torch.zeros(1, dtype=torch.long), 1, rule="best")  # type: ignore[arg-type]
    assert issubclass(InputError, TTDError)


def test_scores_have_the_gradients_of_finite_differences() -> None:
    data = make_ragged(3, [2, 0, 3], patches=4, width=3)
    patches, pooled, tags = (part.requires_grad_() for part in (data.patches, data.pooled, data.tags))
    where = data.image_index, data.tag_index
    assert torch.autograd.gradcheck(lambda w, t: selection.image_scores(w, t, *where), (pooled, tags))
    assert torch.autograd.gradcheck(lambda w, t: selection.text_scores(w, t, *where), (pooled, tags))
    assert torch.autograd.gradcheck(
        lambda p, t: selection.pixel_scores(similarity.tag_maps(p, t, *where)), (patches, tags)
    )
