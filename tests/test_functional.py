"""ttd_loss() on plain tensors: against loops over Python numbers, against the engine, and its refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import slow_reference as slow
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutants import assert_caught, mutant
from torch import Tensor
from toy_backbone import toy, toy_images

import ttd_plugins
from ttd_plugins import engine as engine_module
from ttd_plugins import functional
from ttd_plugins.engine import TTD, TTDOptions
from ttd_plugins.errors import InputError
from ttd_plugins.functional import TTDFeatures, ttd_loss
from ttd_plugins.options import Calibration

SCALE = 7.5
CAPTIONS = ["a dog on grass", "", "one owl", "red kite and blue sky"]


def random_features(
    counts: Sequence[int], *, patches: int = 6, width: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64
) -> TTDFeatures:
    """Features that are not normalised, with ``counts[b]`` tags of caption b."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    batch = len(counts)
    tags = [random(count, width) for count in counts]
    return TTDFeatures(random(batch, patches, width), random(batch, width), random(batch, width), tags)


def slow_loss(features: TTDFeatures, options: TTDOptions, **more: Any) -> slow.Slow:
    parts = [part.detach().tolist() for part in features[:3]]  # type: ignore[union-attr]
    calibration = options.calibration or Calibration()
    return slow.ttd(
        *parts,
        [tag.detach().tolist() for tag in features.tags],
        options,
        scale=calibration.scale,
        shift=calibration.shift,
        logit_scale=SCALE,
        **more,
    )


def flat(nested: Sequence[Sequence[Any]]) -> list[Any]:
    return [item for items in nested for item in items]


def assert_is(found: functional.TTDLoss, expected: slow.Slow) -> None:
    np.testing.assert_allclose(found.loss.item(), expected.loss, rtol=1e-9)
    for name, value in found.losses.items():
        np.testing.assert_allclose(value.item(), expected.parts[name], rtol=1e-9, atol=1e-12)
        assert not value.requires_grad
    assert found.selected.tolist() == flat(expected.selected)
    assert found.usable.tolist() == [max(row) > 0 for row in expected.union]
    np.testing.assert_allclose(found.union, expected.union, atol=1e-8)
    scores = np.array(flat(expected.scores), float)
    np.testing.assert_allclose(found.maps.scores.detach(), scores, atol=1e-9)
    maps = np.reshape(np.array(flat(expected.tag_maps), float), found.maps.tag_maps.shape)
    np.testing.assert_allclose(found.maps.tag_maps.detach(), maps, atol=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    score=st.sampled_from(["pixel", "image", "text"]),
    rule=st.sampled_from([("minmax", 0.4), ("absolute", 0.1), ("probability", 0.3)]),
    loss=st.sampled_from([("bce", "sigmoid"), ("bce", "minmax"), ("mse", "sigmoid"), ("l1", "none")]),
    rejected=st.sampled_from([0.0, 0.5, 1.0]),
    logits=st.sampled_from(["softmax", "sigmoid"]),
)
def test_it_agrees_with_loops(
    counts: list[int], seed: int, score: Any, rule: Any, loss: Any, rejected: float, logits: Any
) -> None:
    options = TTDOptions(
        score=score, rule=rule[0], threshold=rule[1], distance=loss[0], activation=loss[1], rejected_weight=rejected
    )
    features = random_features(counts, seed=seed)
    found = ttd_loss(*features, options, logit_scale=SCALE, logit_bias=-0.7, logits=logits)
    assert_is(found, slow_loss(features, options, logit_bias=-0.7, logits=logits))


def test_a_teacher_provides_selection_and_targets() -> None:
    options = TTDOptions(teacher="frozen")
    student, teacher = random_features([2, 0, 3]), random_features([2, 0, 3], seed=9)
    expected = slow_loss(student, options, teacher=slow_loss(teacher, options))
    found = ttd_loss(*student, options, logit_scale=SCALE, teacher_features=teacher)
    np.testing.assert_allclose(found.loss.item(), expected.loss, rtol=1e-9)
    plain = ttd_loss(*student, logit_scale=SCALE)
    assert abs(plain.loss.item() - found.loss.item()) > 1e-3
    with pytest.raises(InputError, match=r"teacher='frozen' needs the features of the teacher; pass teacher_features="):
        ttd_loss(*student, options, logit_scale=SCALE)
    with pytest.raises(InputError, match="same images, patches and candidate tags"):
        ttd_loss(*student, options, logit_scale=SCALE, teacher_features=random_features([2, 1, 2]))


def test_the_gradient_is_that_of_the_loops_with_targets_held_fixed() -> None:
    """Central differences of the slow loss, whose selection and targets are those of the unchanged features."""
    options = TTDOptions(threshold=0.4, rejected_weight=0.5)
    features = random_features([2, 0, 3], seed=4)
    leaves = [*features[:3], *features.tags]
    for leaf in leaves:
        leaf.requires_grad_()  # type: ignore[union-attr]
    ttd_loss(*features, options, logit_scale=SCALE).loss.backward()
    held, step = slow_loss(features, options), 1e-6
    for leaf in leaves:
        assert isinstance(leaf, Tensor)
        numeric = torch.zeros(leaf.numel(), dtype=torch.float64)
        for entry in range(leaf.numel()):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    leaf.view(-1)[entry] += sign * step
                sides.append(slow_loss(features, options, teacher=held).loss)
                with torch.no_grad():
                    leaf.view(-1)[entry] -= sign * step
            numeric[entry] = (sides[0] - sides[1]) / (2 * step)
        found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        np.testing.assert_allclose(found.flatten(), numeric, rtol=1e-4, atol=1e-7)


# The engine ----------------------------------------------------------------------------------------------------------


def engine_features(ttd: TTD, images: Tensor, captions: Sequence[str]) -> TTDFeatures:
    """What a person without an adapter computes: features of whole batches, each tag by itself."""
    backbone = ttd.backbone
    encoded = backbone.encode_image(images)

    def text(one: str) -> Tensor:
        return backbone.encode_text(backbone.tokenize([one]).ids)[0]

    tags = []
    for names in ttd.extractor(captions):
        embeddings = [text(name) for name in names]
        tags.append(torch.stack(embeddings) if embeddings else encoded.patches.new_zeros(0, encoded.patches.shape[-1]))
    return TTDFeatures(encoded.patches, encoded.pooled, torch.stack([text(caption) for caption in captions]), tags)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("teacher", ["self", "frozen"])
@pytest.mark.parametrize("groups", [None, [3, 3, 5, 6]])
def test_the_engine_has_the_same_loss_and_gradient(sigmoid: bool, teacher: Any, groups: Any) -> None:
    ttd = TTD(toy(sigmoid=sigmoid, dtype=torch.float64), teacher=teacher, score="image")
    images = toy_images(4).double()
    if teacher == "frozen":
        with torch.no_grad():
            for parameter in ttd.backbone.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    engine = ttd(images, CAPTIONS, groups=groups)
    engine.loss.backward()
    expected = {name: p.grad.clone() for name, p in ttd.named_parameters() if p.grad is not None}
    ttd.zero_grad(set_to_none=True)
    targets = None
    if ttd.teacher is not None:
        other = TTD(ttd.teacher)
        with torch.no_grad():
            targets = engine_features(other, images, CAPTIONS)
    found = ttd_loss(
        *engine_features(ttd, images, CAPTIONS),
        ttd.options,
        logit_scale=ttd.backbone.logit_scale(),
        logit_bias=ttd.backbone.logit_bias(),
        logits=ttd.backbone.description.logits,
        calibration=ttd.calibration,
        groups=groups if groups is None else torch.tensor(groups),
        teacher_features=targets,
    )
    torch.testing.assert_close(found.loss, engine.loss, rtol=1e-10, atol=0)
    found.loss.backward()
    gradients = {name: p.grad for name, p in ttd.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys() and len(gradients) > 3
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-8, atol=1e-11)
    assert found.losses.keys() == engine.losses.keys()


def test_the_engine_calls_this_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no second implementation: what changes here changes the engine."""
    images = toy_images(4)
    before = TTD(toy())(images, CAPTIONS).loss.item()
    broken = mutant(functional.ttd_loss, "(counted * distance)", "(2 * counted * distance)")
    monkeypatch.setattr(functional, "ttd_loss", broken)
    after = TTD(toy())(images, CAPTIONS)
    assert after.loss.item() == pytest.approx(before + 10 * after.losses["distill"].item() / 2, rel=1e-5)
    assert not hasattr(engine_module, "losses")


def test_a_mutant_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        features = random_features([2, 0, 3])
        found = functional.ttd_loss(*features, logit_scale=SCALE, threshold=0.4, rejected_weight=0.5)
        assert_is(found, slow_loss(features, TTDOptions(threshold=0.4, rejected_weight=0.5)))

    check()
    monkeypatch.setattr(functional, "ttd_loss", mutant(functional.ttd_loss, "options.rejected_weight", "1.0"))
    assert_caught(check)


# Shapes and dtypes ---------------------------------------------------------------------------------------------------


def test_every_form_of_tags_and_patches_is_the_same() -> None:
    features = random_features([2, 0, 1])
    expected = ttd_loss(*features, logit_scale=SCALE).loss
    patches, pooled, captions, tags = features
    grid = patches.unflatten(1, (2, 3))
    assert ttd_loss(grid, pooled, captions, tags, logit_scale=SCALE).loss == expected
    # Distinct tags, of which one has two captions.
    shared = torch.cat([tags[1], tags[0], tags[2]])
    index = torch.tensor([0, 0, 2])
    assert ttd_loss(patches, pooled, captions, shared, logit_scale=SCALE, image_index=index).loss == expected
    order = torch.tensor([1, 0, 2])
    turned = ttd_loss(
        patches, pooled, captions, shared[order], logit_scale=SCALE, image_index=index, tag_index=order, max_tags=2
    )
    assert turned.loss == expected
    units = [torch.nn.functional.normalize(part, dim=-1) for part in (patches, pooled, captions, shared)]
    same = ttd_loss(*units, logit_scale=SCALE, image_index=index, normalized=True)  # type: ignore[arg-type]
    torch.testing.assert_close(same.loss, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    features = random_features([2, 0, 1], dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    up = TTDFeatures(*(part.to(wide) for part in features[:3]), [tag.to(wide) for tag in features.tags])  # type: ignore
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ttd_loss(*features, logit_scale=SCALE)
    expected = ttd_loss(*up, logit_scale=SCALE)
    assert found.loss.dtype == found.maps.tag_maps.dtype == wide
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    mixed = ttd_loss(features.patches, *up[1:], logit_scale=SCALE)
    torch.testing.assert_close(mixed.loss, expected.loss, rtol=1e-6, atol=0)


def test_no_tags_at_all_leaves_the_contrastive_term() -> None:
    features = random_features([0, 0])
    found = ttd_loss(*features, logit_scale=SCALE)
    assert found.losses["tag"] == found.losses["distill"] == 0
    assert found.loss == found.losses["contrastive"]
    alone = ttd_loss(*random_features([1, 2])[:1], None, *random_features([1, 2])[2:], contrastive_weight=0)
    assert set(alone.losses) == {"tag", "distill"} and alone.loss > 0
    assert "2 captions, 3 tags" in repr(alone) and len(repr(alone)) < 200


GOOD = random_features([2, 0, 1], dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"patches": torch.ones(3, 5)}, r"patches must have shape \[B, P, D\] or \[B, H, W, D\], not \[3, 5\]"),
        ({"patches": [1.0]}, "patches must be a tensor .*, not an object of class list"),
        ({"patches": torch.ones(3, 0, 5)}, "at least one patch of one image"),
        ({"patches": torch.ones(3, 6, 5, dtype=torch.long)}, "patches must be floating-point embeddings, not int64"),
        ({"pooled": torch.ones(2, 5)}, r"pooled must have shape \[3, 5\], not \[2, 5\]"),
        ({"pooled": None}, "needs pooled image embeddings; pass pooled, or contrastive_weight=0"),
        ({"pooled": None, "score": "image", "contrastive_weight": 0}, "score='image' needs the pooled"),
        ({"captions": torch.ones(3, 4)}, r"captions must have shape \[3, 5\], not \[3, 4\]"),
        ({"tags": torch.ones(3, 5)}, "image_index is needed"),
        ({"tags": [torch.ones(1, 5)]}, "tags has 1 items for 3 captions"),
        ({"tags": [torch.ones(5)] * 3}, r"tags\[0\] must have shape \[any, 5\], not \[5\]"),
        ({"tags": "dog"}, "not an object of class str"),
        ({"tags": torch.ones(2, 5), "image_index": torch.tensor([1, 0])}, "must be ascending"),
        ({"tags": torch.ones(2, 5), "image_index": torch.tensor([0, 3])}, "numbers from 0 to 2"),
        ({"tags": torch.ones(2, 5), "image_index": torch.tensor([0.0, 1.0])}, "must be an int64 tensor"),
        ({"tags": torch.ones(2, 5), "image_index": torch.tensor([0])}, "there are 2 candidate tags"),
        (
            {"tags": torch.ones(2, 5), "image_index": torch.tensor([0]), "tag_index": torch.tensor([7])},
            "tag_index must have numbers from 0 to 1",
        ),
        ({"logit_scale": None}, "needs logit_scale, the multiplier of cosines"),
        ({"logits": "hinge"}, "logits must be 'softmax' or 'sigmoid'"),
        ({"groups": [1, 2]}, "groups must have the id of each pair's image, 3 hashable values"),
        ({"groups": [[1], [2], [3]]}, "must be hashable"),
        ({"treshold": 0.3}, "has no option 'treshold'"),
        ({"options": {"threshold": 0.3}}, "options of ttd_loss.. is a TTDOptions"),
    ],
)
def test_mistakes_are_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    arguments = {**GOOD._asdict(), "logit_scale": SCALE, **changes}
    with pytest.raises(InputError, match=sentence):
        ttd_loss(**arguments)


def test_it_is_public() -> None:
    assert ttd_plugins.ttd_loss is ttd_loss


# Options that need more tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["embeddings", "similarities"])
@pytest.mark.parametrize("logits", ["softmax", "sigmoid"])
def test_the_anchor_agrees_with_loops(kind: Any, logits: Any) -> None:
    options = TTDOptions(anchor_weight=2.0, anchor=kind)
    features, other = (
        random_features([2, 0, 1]),
        random_features([1, 1, 1], width=4 if kind == "similarities" else 5, seed=3),
    )
    assert features.pooled is not None and other.pooled is not None
    frozen = functional.AnchorFeatures(other.pooled, other.captions, SCALE, -0.7 if logits == "sigmoid" else None)
    found = ttd_loss(*features, options, logit_scale=SCALE, logits=logits, anchor_features=frozen)
    expected = slow.anchor(
        features.pooled.tolist(), features.captions.tolist(), other.pooled.tolist(), other.captions.tolist(),
        kind=kind, scale=SCALE, bias=-0.7 if logits == "sigmoid" else 0.0, form=logits,
    )  # fmt: skip
    np.testing.assert_allclose(found.losses["anchor"].item(), expected, rtol=1e-9)
    without = ttd_loss(*features, logit_scale=SCALE, logits=logits)
    np.testing.assert_allclose(found.loss.item(), without.loss.item() + 2 * expected, rtol=1e-9)
    with pytest.raises(InputError, match="the anchor needs pooled and anchor_features"):
        ttd_loss(*features, options, logit_scale=SCALE)
    with pytest.raises(InputError, match=r"anchor captions must have shape \[3, ., not \[3, 9\]|not \[3, 9\]"):
        ttd_loss(*features, options, logit_scale=SCALE, anchor_features=(other.pooled, torch.ones(3, 9)))


def test_equal_captions_of_different_images_are_no_negatives() -> None:
    features = random_features([2, 0, 1])
    ids = ["A dog", "a  DOG ", "cat"]
    found = ttd_loss(*features, logit_scale=SCALE, caption_ids=ids)
    assert_is(found, slow_loss(features, TTDOptions(), wording=["a dog", "a dog", "cat"]))
    assert ttd_loss(*features, logit_scale=SCALE, caption_ids=torch.tensor([4, 4, 9])).loss == found.loss
    plain = ttd_loss(*features, logit_scale=SCALE)
    assert ttd_loss(*features, logit_scale=SCALE, caption_ids=["a", "b", "c"]).loss == plain.loss != found.loss
    for wrong in (["a"], "abc", [["a"], ["b"], ["c"]]):
        with pytest.raises(InputError, match="caption_ids must"):
            ttd_loss(*features, logit_scale=SCALE, caption_ids=wrong)  # type: ignore[arg-type]
