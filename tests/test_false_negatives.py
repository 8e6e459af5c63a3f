"""A caption that describes an image too is no negative of it: several captions an image, and identical captions."""

from __future__ import annotations

from typing import Any

import pytest
import slow_reference as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import assert_caught, mutant
from toy_backbone import toy, toy_images

from ttd_plugins.engine import TTD
from ttd_plugins.errors import InputError
from ttd_plugins.method import losses

ids = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=7)


def check(pairs: list[tuple[int, int]], form: Any, given_ids: str = "both", seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(len(pairs), 4, generator=generator, dtype=torch.float64) for _ in range(2))
    groups, texts = ([pair[part] for pair in pairs] for part in (0, 1))
    images_differ, texts_differ = given_ids == "texts", given_ids == "groups"
    expected = slow.contrastive(
        image.tolist(), text.tolist(), 4.0, -1.0, form, None if texts_differ else texts,
        None if images_differ else groups,
    )  # fmt: skip
    found = losses.contrastive_loss(
        image, text, scale=4.0, bias=-1.0, form=form,
        groups=None if images_differ else torch.tensor(groups), texts=None if texts_differ else torch.tensor(texts),
    )  # fmt: skip
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(pairs=ids, form=st.sampled_from(["softmax", "sigmoid"]), given_ids=st.sampled_from(["both", "texts", "groups"]))
def test_the_loss_agrees_with_loops(pairs: list[tuple[int, int]], form: str, given_ids: str) -> None:
    check(pairs, form, given_ids)


@pytest.mark.parametrize(
    ("old", "new"),
    [("described[image][:, text]", "described[text][:, image]"), ("described[image, text] = True", "pass"),
     (" & (numbers[:, None] != numbers)", "")],
)  # fmt: skip
def test_a_broken_mask_is_noticed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def both() -> None:
        for form in ("softmax", "sigmoid"):
            check([(0, 0), (0, 1), (1, 1), (2, 3), (3, 3)], form)

    both()
    monkeypatch.setattr(losses, "false_negatives", mutant(losses.false_negatives, old, new))
    assert_caught(both)


def test_ids_are_needed() -> None:
    with pytest.raises(InputError, match="needs the ids of images, of captions, or of both"):
        losses.false_negatives(None, None)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_identical_captions_of_different_images_are_no_negatives_in_the_engine(sigmoid: bool) -> None:
    def contrastive(captions: list[str], groups: Any = None) -> float:
        ttd = TTD(toy(dtype=torch.float64, sigmoid=sigmoid))
        return ttd(toy_images(len(captions)).double(), captions, groups=groups).losses["contrastive"].item()

    if not sigmoid:
        assert contrastive(["a dog", "A  dog "]) == pytest.approx(0, abs=1e-12)
    three = contrastive(["a dog", "a dog", "one owl"])
    assert three == contrastive(["a dog", " a  dog", "one owl"])
    ttd = TTD(toy(dtype=torch.float64, sigmoid=sigmoid))
    images = toy_images(3).double()
    output = ttd(images, ["a dog", "a dog", "one owl"])
    alignment, bias = output.alignment, ttd.backbone.logit_bias()
    assert alignment.pooled is not None
    expected = slow.contrastive(
        alignment.pooled.tolist(), alignment.captions.tolist(), ttd.backbone.logit_scale().item(),
        0.0 if bias is None else bias.item(), ttd.backbone.description.logits, ["a dog", "a dog", "one owl"],
    )  # fmt: skip
    assert three == pytest.approx(expected, rel=1e-9)


def test_an_image_with_two_captions_shares_them_with_its_other_pair() -> None:
    """The image of pairs 0 and 1 has both captions, and pair 2 has one of them: no text of pair 2 is its negative."""
    mask = losses.false_negatives(torch.tensor([7, 7, 8, 9]), torch.tensor([1, 2, 2, 3]))
    assert mask.int().tolist() == [[0, 1, 1, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_a_batch_without_repetition_has_bitwise_the_numbers_without_ids() -> None:
    generator = torch.Generator().manual_seed(0)
    for form in ("softmax", "sigmoid"):
        image, text = (torch.randn(9, 6, generator=generator) for _ in range(2))
        plain = losses.contrastive_loss(image, text, scale=10.0, form=form)  # type: ignore[arg-type]
        numbers = torch.arange(9)
        masked = losses.contrastive_loss(image, text, scale=10.0, form=form, groups=numbers, texts=numbers)  # type: ignore[arg-type]
        assert torch.equal(plain, masked)
