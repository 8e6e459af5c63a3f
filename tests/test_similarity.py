"""Maps, min-max over patches and the union agree with loops, and their gradients with finite differences."""

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

from ttd_plugins.method import similarity

modest = settings(deadline=None, max_examples=40)
NONE_AT_ALL = make_ragged(0, [0, 0])
A_HUNDRED = make_ragged(1, [0, 100, 1])


def check_tag_maps(data: Ragged) -> None:
    data = data.normalized()
    maps = similarity.tag_maps(data.patches, data.tags, data.image_index, data.tag_index)
    assert maps.shape == (len(data.image_index), data.patches.shape[1])
    expected = [
        [[slow.dot(point, tag) for point in points] for tag in tags]
        for points, tags in zip(data.patches.tolist(), data.tags_by_image(), strict=True)
    ]
    np.testing.assert_allclose(maps, np.reshape(flat(expected), maps.shape), atol=1e-12)


def check_caption_maps(data: Ragged) -> None:
    data = data.normalized()
    expected = [
        [slow.dot(point, caption) for point in points]
        for points, caption in zip(data.patches.tolist(), data.captions.tolist(), strict=True)
    ]
    np.testing.assert_allclose(similarity.caption_maps(data.patches, data.captions), expected, atol=1e-12)


def check_minmax(data: Ragged) -> None:
    # Not cosines: the function must not depend on their range.
    maps = data.patches.flatten(1, 1).transpose(1, 2)
    found = similarity.minmax_normalize(maps)
    expected = [[slow.minmax(one, constant=0.0) for one in image] for image in maps.tolist()]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert bool(((found >= 0) & (found <= 1)).all())


def check_union(data: Ragged) -> None:
    maps = torch.sigmoid(data.tags[data.tag_index] @ data.patches[0].T)
    maps[::3] = 0
    found = similarity.union_map(maps, data.image_index, data.batch)
    expected = [slow.union(image, maps.shape[1]) for image in by_image(maps, data.counts)]
    np.testing.assert_array_equal(found, expected)


CHECKS: dict[str, Callable[[Ragged], None]] = {
    "tag_maps": check_tag_maps,
    "caption_maps": check_caption_maps,
    "minmax_normalize": check_minmax,
    "union_map": check_union,
}


@pytest.mark.parametrize("name", CHECKS)
@modest
@given(data=ragged_batches())
@example(data=NONE_AT_ALL)
@example(data=A_HUNDRED)
def test_every_stage_agrees_with_its_loop(name: str, data: Ragged) -> None:
    CHECKS[name](data)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("union_map", 'reduce="amax"', 'reduce="sum"'),
        ("union_map", 'reduce="amax"', 'reduce="mean"'),
        ("union_map", 'reduce="amax"', 'reduce="amin"'),
        ("union_map", "include_self=True", "include_self=False).roll(1, 0"),
        ("minmax_normalize", "(maps - low)", "maps"),
        ("minmax_normalize", "maps.amax(-1, keepdim=True)", "maps.amax()"),
        ("minmax_normalize", "torch.zeros_like(maps)", "torch.ones_like(maps)"),
        ("caption_maps", "bpd,bd->bp", "bpd,cd->bp"),
        ("tag_maps", "tags[tag_index]", "tags[tag_index.flip(0)]"),
        ("tag_maps", "[image_index, slot]", "[image_index, 0 * slot]"),
    ],
)
def test_a_broken_stage_is_noticed(name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        for seed in range(8):
            CHECKS[name](make_ragged(seed, [2, 0, 3, 1], coarse=seed % 2 == 1))

    check()
    monkeypatch.setattr(similarity, name, mutant(getattr(similarity, name), old, new))
    assert_caught(check)


@modest
@given(ragged_batches())
def test_float32_is_close_to_float64(data: Ragged) -> None:
    double, single = data.normalized(), data.to(torch.float32).normalized()
    assert single.patches.dtype == torch.float32
    maps = [similarity.tag_maps(d.patches, d.tags, d.image_index, d.tag_index) for d in (double, single)]
    torch.testing.assert_close(maps[1].double(), maps[0], atol=1e-5, rtol=0)


@modest
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_normalised_vectors_have_length_one_and_zero_stays_zero(seed: int, width: int) -> None:
    features = make_ragged(seed, [1], width=width).patches
    features[0, 0] = 0
    expected = [slow.unit(vector) for vector in features[0].tolist()]
    np.testing.assert_allclose(similarity.normalize(features)[0], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_features_are_promoted_to_float32_at_least(given_dtype: torch.dtype, expected: torch.dtype) -> None:
    features = torch.tensor([[3.0, 4.0]], dtype=given_dtype)
    assert similarity.promote(features).dtype == expected
    torch.testing.assert_close(similarity.normalize(features), torch.tensor([[0.6, 0.8]], dtype=expected))


def test_half_precision_does_not_overflow_when_normalised() -> None:
    # The square of 300 is beyond float16.
    assert similarity.normalize(torch.full((4,), 300.0, dtype=torch.float16)).tolist() == [0.5] * 4


@pytest.mark.parametrize("span", [0.0, 9e-7])
def test_a_map_without_place_becomes_zero(span: float) -> None:
    maps = torch.tensor([[0.5, 0.5 + span, 0.5]], dtype=torch.float64)
    assert similarity.minmax_normalize(maps).tolist() == [[0.0, 0.0, 0.0]]


def test_a_small_range_above_the_limit_is_stretched() -> None:
    maps = torch.tensor([[0.5, 0.5 + 1.1e-6, 0.5]], dtype=torch.float64)
    assert similarity.minmax_normalize(maps).tolist() == [[0.0, 1.0, 0.0]]
    assert similarity.minmax_normalize(maps, eps=1e-3).tolist() == [[0.0, 0.0, 0.0]]


def test_a_single_patch_has_no_place_to_tell() -> None:
    assert similarity.minmax_normalize(torch.tensor([[0.7]])).tolist() == [[0.0]]


def test_an_image_without_tags_has_an_empty_union() -> None:
    union = similarity.union_map(torch.tensor([[0.2, 0.9], [0.4, 0.1]]), torch.tensor([1, 1]), 3)
    np.testing.assert_array_equal(union, np.float32([[0, 0], [0.4, 0.9], [0, 0]]))


def test_the_largest_number_of_tags_may_be_known_beforehand() -> None:
    data = A_HUNDRED.normalized()
    arguments = (data.patches, data.tags, data.image_index, data.tag_index)
    maps = similarity.tag_maps(*arguments)
    count = int(torch.bincount(data.image_index).max())
    torch.testing.assert_close(similarity.tag_maps(*arguments, max_tags=count), maps, atol=0, rtol=0)
    with pytest.warns(FutureWarning, match=r"tag_maps\(most=...\) is now tag_maps\(max_tags=...\)"):
        torch.testing.assert_close(similarity.tag_maps(*arguments, most=count), maps, atol=0, rtol=0)  # type: ignore[call-arg]


def test_a_map_of_a_smaller_range_than_eps_normalises_to_zero() -> None:
    maps = torch.tensor([[0.1, 0.9], [0.3, 0.2]])
    assert similarity.minmax_normalize(maps, eps=10.0).tolist() == [[0.0, 0.0], [0.0, 0.0]]


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[3], [2, 0, 1], [0, 0], [12, 1]])
def test_gradients_agree_with_finite_differences(counts: list[int]) -> None:
    data = make_ragged(5, counts, patches=4, width=3)
    patches, tags, captions = (part.requires_grad_() for part in (data.patches, data.tags, data.captions))

    def maps(patches: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        patches, tags = similarity.normalize(patches), similarity.normalize(tags)
        return similarity.tag_maps(patches, tags, data.image_index, data.tag_index)

    def union(patches: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        ready = similarity.minmax_normalize(maps(patches, tags))
        return similarity.union_map(ready, data.image_index, data.batch)

    def of_captions(patches: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        return similarity.caption_maps(similarity.normalize(patches), similarity.normalize(captions))

    assert torch.autograd.gradcheck(of_captions, (patches, captions))
    if data.image_index.numel():
        assert torch.autograd.gradcheck(maps, (patches, tags))
        assert torch.autograd.gradcheck(lambda p, t: similarity.minmax_normalize(maps(p, t)), (patches, tags))
        # Zero maps tie with the empty union, so the union is looked at where something is above zero.
        assert torch.autograd.gradcheck(lambda p, t: union(p, t).square(), (patches, tags))


def test_a_constant_map_has_a_gradient_of_zero_and_no_nan() -> None:
    maps = torch.full((1, 4), 0.3, requires_grad=True)
    similarity.minmax_normalize(maps).sum().backward()
    assert maps.grad is not None
    assert maps.grad.tolist() == [[0.0] * 4]
