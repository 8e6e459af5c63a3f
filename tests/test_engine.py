"""The engine end to end on a toy: against loops, with checks that broken stages fail, and its promises to callers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import slow_reference as slow
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mutants import assert_caught, mutant
from PIL import Image
from torch import Tensor
from toy_backbone import CONTEXT, END, SIDE, AutocastProof, ToyAdapter, token_of, toy, toy_images

from ttd_plugins import functional
from ttd_plugins.adapter import Calibration
from ttd_plugins.engine import TTD, Candidates, TTDOptions, TTDOutput
from ttd_plugins.errors import ImageSizeError, InputError, TagExtractionError, TTDError
from ttd_plugins.method import losses, selection, similarity
from ttd_plugins.method.text_embeddings import encode_texts

modest = settings(deadline=None, max_examples=30)
THRESHOLDS = {"minmax": 0.4137, "absolute": 0.1137, "probability": 0.5137}
CAPTIONS = ["a dog on grass", "red kite and blue sky", "the", "one owl"]
HUNDRED = " ".join(f"word{number}" for number in range(100))


def words(captions: Sequence[str]) -> list[list[str]]:
    """An extractor that keeps every distinct word as it stands."""
    return [list(dict.fromkeys(caption.split())) for caption in captions]


words.name = "test words"  # type: ignore[attr-defined]


def engine(backbone: ToyAdapter | None = None, **options: Any) -> TTD:
    return TTD(toy() if backbone is None else backbone, **options)


# Against the slow engine ---------------------------------------------------------------------------------------------


@dataclass
class Features:
    """What a backbone gives for a batch, as lists of numbers."""

    patches: list[Any]
    pooled: list[Any]
    captions: list[Any]
    tags: list[list[Any]]
    texts: list[str] | None = None


@torch.no_grad()
def features_one_by_one(
    backbone: ToyAdapter, images: Tensor, captions: Sequence[str], tags: Sequence[Sequence[str]], template: str
) -> Features:
    """Every image and every text by itself, texts at full length: no batching to go wrong."""
    # Captions that differ by case or white space alone are the same to the engine.
    out = Features([], [], [], [], [" ".join(caption.casefold().split()) for caption in captions])
    for image, caption, names in zip(images, captions, tags, strict=True):
        seen = backbone.encode_image(image[None])
        out.patches.append(seen.patches[0].flatten(0, 1).tolist())
        assert seen.pooled is not None
        out.pooled.append(seen.pooled[0].tolist())

        def text(one: str) -> list[float]:
            return backbone.encode_text(backbone.tokenize([one]).ids)[0].tolist()

        out.captions.append(text(caption))
        out.tags.append([text(template.replace("{}", name)) for name in names])
    return out


def slow_ttd(ttd: TTD, features: Features, options: Any = None, *, teacher: slow.Slow | None = None) -> slow.Slow:
    backbone = ttd.backbone
    bias = backbone.logit_bias()
    return slow.ttd(
        features.patches,
        features.pooled,
        features.captions,
        features.tags,
        options or ttd.options,
        scale=ttd.calibration.scale,
        shift=ttd.calibration.shift,
        logit_scale=backbone.logit_scale().item(),
        logit_bias=0.0 if bias is None else bias.item(),
        logits=backbone.description.logits,
        teacher=teacher,
        wording=features.texts,
    )


def assert_output_is(found: TTDOutput, expected: slow.Slow, atol: float = 1e-9) -> None:
    def same(values: Tensor, reference: Sequence[Any]) -> None:
        values = values.detach()
        np.testing.assert_allclose(values, np.reshape(np.array(reference, float), values.shape), atol=atol)

    def flat(nested: list[list[Any]]) -> list[Any]:
        return [item for items in nested for item in items]

    same(found.alignment.tag_maps, flat(expected.tag_maps))
    same(found.alignment.caption_maps, expected.caption_maps)
    same(found.alignment.scores, flat(expected.scores))
    assert found.targets.selected.tolist() == flat(expected.selected)
    assert found.targets.usable.tolist() == [max(row) > 0 for row in expected.union]
    # A range of a map is divided by, so errors grow where it is small.
    np.testing.assert_allclose(
        found.targets.tag_maps, np.reshape(flat(expected.targets), found.targets.tag_maps.shape), atol=atol * 1e3
    )
    np.testing.assert_allclose(found.targets.union, expected.union, atol=atol * 1e3)
    for name, part in found.losses.items():
        np.testing.assert_allclose(part, expected.parts[name], rtol=1e-7, atol=atol, err_msg=name)
    np.testing.assert_allclose(found.loss.detach(), expected.loss, rtol=1e-7, atol=atol)


def check_engine(
    captions: Sequence[str], seed: int = 0, *, sigmoid: bool = False, grid: tuple[int, int] = (2, 3), **options: Any
) -> None:
    backbone = toy(seed, dtype=torch.float64, sigmoid=sigmoid)
    ttd = TTD(backbone, extractor=words, **options)
    images = toy_images(len(captions), 4 * grid[0], 4 * grid[1], seed=seed).double()
    features = features_one_by_one(backbone, images, captions, words(captions), ttd.options.template)
    assert_output_is(ttd(images, captions), slow_ttd(ttd, features))


vocabulary = st.sampled_from(["dog", "cat", "grass", "a", "of", "Owl", "🐶", "собака", "犬", "کلب", "naïve"])
captions_of_any_kind = st.one_of(
    st.lists(vocabulary, max_size=2 * CONTEXT).map(" ".join),
    st.sampled_from(["", "   ", "dog", HUNDRED]),
    st.text(max_size=20),
)
every_option = st.fixed_dictionaries(
    {
        "score": st.sampled_from(["pixel", "image", "text"]),
        "loss": st.sampled_from(
            [(d, a) for d in ("bce", "mse", "l1") for a in ("sigmoid", "minmax", "none") if (d, a) != ("bce", "none")]
        ),
        "rule": st.sampled_from(list(THRESHOLDS)),
        "target_power": st.sampled_from([1.0, 2.0, 0.5]),
        "rejected_weight": st.sampled_from([1.0, 0.25, 0.0]),
        "tag_weight": st.sampled_from([1.0, 2.5]),
        "distill_weight": st.sampled_from([1.0, 0.5]),
        "contrastive_weight": st.sampled_from([1.0, 0.1, 0.0]),
        "template": st.sampled_from(["{}", "a photo of {} here"]),
        "calibration": st.sampled_from([None, Calibration(4.0, 0.5)]),
    }
)


def expand(options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    options["distance"], options["activation"] = options.pop("loss")
    return options | {"threshold": THRESHOLDS[options["rule"]]}


@modest
@given(
    captions=st.lists(captions_of_any_kind, min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    sigmoid=st.booleans(),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    options=every_option,
)
def test_the_whole_engine_agrees_with_loops(
    captions: list[str], seed: int, sigmoid: bool, grid: tuple[int, int], options: dict[str, Any]
) -> None:
    check_engine(captions, seed, sigmoid=sigmoid, grid=grid, **expand(options))


@pytest.mark.parametrize(
    "captions",
    [
        ["", "   "],
        ["dog"],
        [""],
        [HUNDRED, "", "dog"],
        ["🐶🔥", "👩‍👩‍👧 dog", "собака на траве", "一只狗 在草地上", "كلب على العشب"],
        ["dog dog dog", "dog"],
    ],
    ids=["no tags at all", "one of one", "one empty caption", "a hundred", "emoji and scripts", "repeated"],
)
def test_captions_of_every_kind_agree_with_loops(captions: list[str]) -> None:
    check_engine(captions)


MUTANTS: list[tuple[Any, str, str, str]] = [
    (similarity, "union_map", 'reduce="amax"', 'reduce="sum"'),
    (similarity, "union_map", 'reduce="amax"', 'reduce="amin"'),
    (similarity, "minmax_normalize", "(maps - low) / span.clamp_min(eps)", "maps"),
    (similarity, "tag_maps", "tags[tag_index]", "tags[tag_index.flip(0)]"),
    (similarity, "caption_maps", "bpd,bd->bp", "bpd,cd->bp"),
    (selection, "pixel_scores", "amax(-1)", "mean(-1)"),
    (selection, "select_tags", "return scores >= threshold", "return torch.ones_like(scores, dtype=torch.bool)"),
    (selection, "select_tags", "return scores >= threshold", "return torch.zeros_like(scores, dtype=torch.bool)"),
    (selection, "select_tags", "return scores >= threshold", "return scores < threshold"),
    (selection, "minmax_over_tags", 'image_index, scores, reduce="amax"', 'image_index * 0, scores, reduce="amax"'),
    (functional, "make_targets", " * selected[:, None]", ""),
    (functional, "make_targets", "targets**options.target_power", "targets"),
    (functional, "make_targets", "union.amax(-1) > 0", "union.amax(-1) >= 0"),
    (functional, "ttd_loss", "losses.map_distance(maps.caption_maps, union, **form)", "maps.caption_maps.mean(-1)"),
    (functional, "ttd_loss", "losses.map_distance(maps.tag_maps, tag_targets, **form)", "maps.tag_maps.mean(-1)"),
    (functional, "ttd_loss", "options.rejected_weight", "1.0"),
    (functional, "ttd_loss", "(counted * distance)", "distance"),
    (
        functional,
        "ttd_loss",
        "texts = student.pooled, student.captions",
        "texts = student.pooled, student.captions.roll(1, 0)",
    ),
    (TTD, "_encode", "self.options.template.format(tag)", "tag"),
]


def break_it(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, old: str, new: str) -> None:
    monkeypatch.setattr(owner, name, mutant(getattr(owner, name), old, new))


def without_grad(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Put back the stop of the gradient that making a mutant of a decorated function takes away."""
    monkeypatch.setattr(owner, name, torch.no_grad()(getattr(owner, name)))


@pytest.mark.parametrize(("owner", "name", "old", "new"), MUTANTS)
def test_a_broken_engine_is_noticed(owner: Any, name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        for seed in range(3):
            check_engine(
                [*CAPTIONS, ""], seed, rejected_weight=0.5, template="photo of {}", threshold=0.4137, target_power=2.0
            )

    check()
    break_it(monkeypatch, owner, name, old, new)
    if name == "make_targets":
        without_grad(monkeypatch, owner, name)
    assert_caught(check)


@pytest.mark.parametrize("teacher", ["self", "frozen"])
def test_parts_of_weight_zero_are_left_out(teacher: Any) -> None:
    for name, part in (("tag_weight", "tag"), ("distill_weight", "distill"), ("contrastive_weight", "contrastive")):
        ttd = engine(teacher=teacher, **{name: 0.0})
        found = ttd(toy_images(2), CAPTIONS[:2])
        assert set(found.losses) == {"tag", "distill", "contrastive"} - {part}
        weights = {"distill": ttd.options.distill_weight}
        expected = sum(weights.get(other, 1.0) * value for other, value in found.losses.items())
        assert found.loss.item() == pytest.approx(float(expected))
        assert ttd.backbone.images[0][1] is (part != "contrastive"), "pooled embeddings are worked out for nothing"
    nothing = engine(tag_weight=0.0, distill_weight=0.0, contrastive_weight=0.0)(toy_images(2), CAPTIONS[:2])
    assert nothing.loss.item() == 0.0
    assert nothing.loss.requires_grad


# Gradients -----------------------------------------------------------------------------------------------------------

SMOOTH = [("bce", "sigmoid"), ("mse", "sigmoid"), ("l1", "sigmoid"), ("mse", "none"), ("l1", "none"), ("bce", "minmax")]


def check_gradients_of_features(distance: str, activation: str, seed: int, **options: Any) -> None:
    """The gradient at the backbone's features is that of the slow loss whose targets are held fixed.

    Tags that are not selected and captions without a target take part, so a gradient through a target, through the
    selection or through the teacher would show.
    """
    backbone = toy(seed, dtype=torch.float64, width=3)
    # A threshold between the scores of tags, so that some are kept and some are not.
    ttd = TTD(backbone, extractor=words, distance=distance, activation=activation, threshold=0.6137, **options)
    captions, images = ["dog cat grass", "an owl", ""], toy_images(3, 8, 8, seed=seed).double()
    tags = words(captions)
    names = list(dict.fromkeys(name for one in tags for name in one))
    backbone.keep_outputs = True
    output = ttd(images, captions)
    output.loss.backward()
    # One call for all texts: the captions, then the distinct tags.
    patches, pooled, texts = backbone.outputs
    assert 0 < int(output.targets.selected.sum()) < len(output.targets.selected)

    def nested(values: list[Tensor]) -> Features:
        points, whole, of_texts = (value.detach() for value in values)
        of_captions, of_tags = of_texts[: len(captions)], of_texts[len(captions) :]
        of_name = dict(zip(names, of_tags.tolist(), strict=True))
        return Features(
            points.flatten(1, 2).tolist(),
            whole.tolist(),
            of_captions.tolist(),
            [[of_name[name] for name in one] for one in tags],
        )

    found = [patches, pooled, texts]
    fixed = slow_ttd(ttd, nested(found))
    step = 1e-5
    for position, feature in enumerate(found):
        assert feature.grad is not None
        numeric = torch.zeros_like(feature).flatten()
        for entry in range(feature.numel()):
            sides = []
            for sign in (1, -1):
                moved = feature.detach().clone()
                moved.view(-1)[entry] += sign * step
                changed = [*found[:position], moved, *found[position + 1 :]]
                sides.append(slow_ttd(ttd, nested(changed), teacher=fixed).loss)
            numeric[entry] = (sides[0] - sides[1]) / (2 * step)
        assert bool(numeric.any()), "this feature should matter"
        np.testing.assert_allclose(feature.grad.flatten(), numeric, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("distance", "activation"), SMOOTH)
def test_gradients_reach_patches_pooled_captions_and_tags_with_targets_held_fixed(
    distance: str, activation: str
) -> None:
    check_gradients_of_features(distance, activation, seed=1)


def test_a_gradient_that_is_not_stopped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        check_gradients_of_features("mse", "sigmoid", seed=1)

    check()
    # Two guards stand one behind the other; both must go before a gradient leaks.
    break_it(monkeypatch, losses, "map_distance", "promote(targets.detach())", "promote(targets)")
    break_it(monkeypatch, functional, "make_targets", "@torch.no_grad()\n", "")
    assert_caught(check)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("maps.tag_maps, tag_targets", "maps.tag_maps.detach(), tag_targets"),
        ("maps.caption_maps, union", "maps.caption_maps.detach(), union"),
        ("images, texts = student.pooled, ", "images, texts = student.pooled.detach(), "),
    ],
)
def test_a_gradient_that_is_stopped_too_early_is_noticed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(monkeypatch, functional, "ttd_loss", old, new)
    assert_caught(lambda: check_gradients_of_features("mse", "sigmoid", seed=1))


def loss_of_parameters(ttd: TTD, images: Tensor, captions: Sequence[str]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The loss as a function of the backbone's parameters, for gradcheck."""
    ttd.backbone.snapshot_weights()
    names = [name for name, _ in ttd.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in ttd.parameters()]

    def loss(*parameters: Tensor) -> Tensor:
        swapped = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(ttd, swapped, (images, captions)).loss

    return loss, values


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize(("distance", "activation"), [("bce", "sigmoid"), ("mse", "none"), ("mse", "minmax")])
def test_gradcheck_through_both_towers_where_the_teacher_is_frozen(
    distance: str, activation: str, sigmoid: bool
) -> None:
    backbone = toy(2, dtype=torch.float64, width=3, sigmoid=sigmoid)
    ttd = TTD(backbone, extractor=words, teacher="frozen", distance=distance, activation=activation)
    loss, values = loss_of_parameters(ttd, toy_images(3, 8, 12).double(), ["a dog", "", "cat grass owl"])
    # Away from the teacher, or student and target would coincide.
    generator = torch.Generator().manual_seed(0)
    values = [v + 0.05 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values]
    values = [value.detach().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


def gradients(ttd: TTD, images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    ttd.zero_grad(set_to_none=True)
    ttd(images, captions).loss.backward()
    return {name: p.grad.clone() for name, p in ttd.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("captions", [CAPTIONS, ["the", "a", "of", "an"]], ids=["tags", "no tags"])
def test_the_control_has_the_gradient_of_a_contrastive_loss_and_nothing_more(
    captions: list[str], sigmoid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ttd = engine(toy(sigmoid=sigmoid, dtype=torch.float64), tag_weight=0.0, distill_weight=0.0, contrastive_weight=0.7)
    backbone, images = ttd.backbone, toy_images(4).double()
    tags = ttd(images, captions).alignment.tags
    assert bool(len(tags)) == (captions is CAPTIONS) and not tags.requires_grad
    found = gradients(ttd, images, captions)
    encode = TTD._encode
    monkeypatch.setattr(TTD, "_encode", lambda self, *a, **more: encode(self, *a, **(more | {"tag_gradient": True})))
    through_tags = gradients(ttd, images, captions)

    # By its definition, one caption at a time, and without the engine.
    ttd.zero_grad(set_to_none=True)
    image = backbone.encode_image(images).pooled
    assert image is not None
    text = torch.cat([backbone.encode_text(backbone.tokenize([caption]).ids) for caption in captions])
    cosines = (image / image.norm(dim=1, keepdim=True)) @ (text / text.norm(dim=1, keepdim=True)).T
    logits, bias, total = backbone.logit_scale() * cosines, backbone.logit_bias(), torch.zeros((), dtype=torch.float64)
    logits = logits if bias is None else logits + bias
    for i in range(4):
        if sigmoid:
            for j in range(4):
                total = total + torch.log1p(torch.exp(-logits[i, j] if i == j else logits[i, j]))
        else:
            total = total - (logits[i, i] - logits[i].exp().sum().log()) / 2
            total = total - (logits[i, i] - logits[:, i].exp().sum().log()) / 2
    (0.7 * total / 4).backward()
    plain = {name: p.grad.clone() for name, p in ttd.named_parameters() if p.grad is not None}
    assert plain.keys() <= found.keys() and any(bool(value.abs().max() > 1e-4) for value in plain.values())
    for one in (found, through_tags):
        for name, value in one.items():
            torch.testing.assert_close(value, plain.get(name, torch.zeros_like(value)), rtol=1e-9, atol=1e-12)


def test_its_own_targets_give_the_gradients_of_a_frozen_copy() -> None:
    for options in ({}, {"distance": "mse"}, {"score": "image"}, {"score": "text", "rule": "probability"}):
        own = gradients(engine(teacher="self", **options), toy_images(4), CAPTIONS)
        frozen = gradients(engine(teacher="frozen", **options), toy_images(4), CAPTIONS)
        assert own.keys() == frozen.keys()
        for name in own:
            torch.testing.assert_close(own[name], frozen[name])


def test_both_towers_are_trained_and_every_weight_has_its_part() -> None:
    for sigmoid in (False, True):
        backbone = toy(sigmoid=sigmoid)
        ttd = TTD(backbone, contrastive_weight=0.0)
        ttd(toy_images(3), CAPTIONS[:3]).loss.backward()
        for tower, silent in (("image", {"pool_head.weight", "pool_head.bias"}), ("text", set())):
            for name, parameter in backbone.tower_parameters(tower):
                reached = parameter.grad is not None and bool(parameter.grad.any())
                assert reached is (name not in silent), name
        everything = gradients(TTD(backbone), toy_images(3), CAPTIONS[:3])
        assert all(gradient.any() for gradient in everything.values())
        assert len(everything) == len(list(backbone.parameters()))


def test_each_loss_alone_trains_both_towers() -> None:
    for name in ("tag_weight", "distill_weight"):
        weights = {"tag_weight": 0.0, "distill_weight": 0.0, "contrastive_weight": 0.0, name: 1.0}
        found = gradients(engine(**weights), toy_images(3), CAPTIONS[:3])
        for parameter in ("patch.weight", "patch_head.weight", "words.weight", "text_head.weight"):
            assert bool(found[f"backbone.model.{parameter}"].any()), (name, parameter)


def test_targets_carry_no_gradient_and_a_part_of_the_loss_neither() -> None:
    output = engine()(toy_images(3), CAPTIONS[:3])
    for tensor in (output.targets.tag_maps, output.targets.union, output.targets.selected, *output.losses.values()):
        assert not tensor.requires_grad
    assert output.alignment.tag_maps.requires_grad
    assert output.loss.requires_grad


def test_without_gradient_nothing_is_remembered() -> None:
    ttd = engine()
    with torch.no_grad():
        assert not ttd(toy_images(2), CAPTIONS[:2]).loss.requires_grad
    assert ttd.backbone._originals is None


# Captions, tags and counts -------------------------------------------------------------------------------------------


def test_each_distinct_text_is_encoded_once() -> None:
    ttd = engine()
    captions = ["a dog and a cat", "dog", "Dog on the grass", "cat cat", "", "dog"]
    ttd(toy_images(6), captions)
    # The tag "dog" is the second caption, and the last.
    assert ttd.backbone.tokenized == [[*captions[:5], "cat", "grass"]]
    assert [len(ids) for ids in ttd.backbone.texts] == [7]
    assert ttd.backbone.images == [((6, 3, SIDE, SIDE), True)]


def test_a_teacher_is_asked_once_more_and_for_no_pooled_embedding() -> None:
    ttd = engine(teacher="frozen")
    (teacher,) = ttd._teacher
    ttd(toy_images(2), ["a dog", "dog"])
    assert teacher.images == [((2, 3, SIDE, SIDE), False)]
    assert [len(ids) for ids in teacher.texts] == [len(ids) for ids in ttd.backbone.texts] == [2]


def test_a_batch_without_any_tag_encodes_none_and_keeps_the_contrastive_term() -> None:
    ttd = engine()
    output = ttd(toy_images(3), ["", "of the", "🐶"])
    assert [len(ids) for ids in ttd.backbone.texts] == [3]
    assert output.losses["tag"].item() == output.losses["distill"].item() == 0.0
    assert output.losses["contrastive"].item() > 0
    assert output.alignment.tag_maps.shape == (0, 16)
    assert not output.targets.usable.any()
    output.loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in ttd.parameters() if p.grad is not None)


def test_text_is_cut_to_the_longest_of_its_batch_only_where_what_follows_cannot_matter() -> None:
    captions, tags = ["one two three", "four"], [["one"], ["four"]]
    for matters, length in ((False, 4), (True, CONTEXT)):
        ttd = engine(toy(text_needs_full_context=matters))
        ttd(toy_images(2), captions, tags)
        assert {ids.shape[1] for ids in ttd.backbone.texts} == {length}
        assert all(bool((ids == END).any(1).all()) for ids in ttd.backbone.texts)


@modest
@given(st.lists(captions_of_any_kind, min_size=1, max_size=6))
def test_cutting_text_changes_no_embedding(texts: list[str]) -> None:
    backbone = toy(dtype=torch.float64)
    embeddings, truncated = encode_texts(backbone, texts)
    assert backbone.texts[-1].shape[1] <= CONTEXT
    full = similarity.normalize(backbone.encode_text(backbone.tokenize(texts).ids))
    torch.testing.assert_close(embeddings, full)
    assert truncated == [len(text.split()) > CONTEXT - 1 for text in texts]


def test_no_texts_give_no_embeddings() -> None:
    backbone = toy()
    embeddings, truncated = encode_texts(backbone, [])
    assert (embeddings.shape, truncated, backbone.texts) == ((0, 5), [], [])


def test_a_caption_longer_than_the_context_keeps_all_its_tags_and_is_reported() -> None:
    ttd = engine()
    output = ttd(toy_images(2), [HUNDRED, "dog"])
    assert output.alignment.truncated == [True, False]
    assert output.statistics["captions_truncated"] == 1
    assert output.statistics["tags_per_caption"] == 101 / 2
    assert output.alignment.candidates.distinct[99] == "word99"


def test_the_template_is_put_around_tags_and_not_around_captions() -> None:
    ttd = engine(template="a photo of {} there")
    ttd(toy_images(1), ["big dog"])
    assert ttd.backbone.tokenized == [["big dog", "a photo of big there", "a photo of dog there"]]
    (ids,) = ttd.backbone.texts
    assert ids[2].tolist() == [token_of(word) for word in "a photo of dog there".split()] + [END]


@pytest.mark.parametrize("tag", ["{}", "{0}", "{x", "%s", "a}"])
def test_a_tag_with_braces_is_only_text(tag: str) -> None:
    ttd = engine(template="photo of {}")
    ttd(toy_images(1), ["thing"], [[tag]])
    assert ttd.backbone.tokenized[0][1] == f"photo of {tag}"


def test_given_tags_are_used_as_they_are() -> None:
    output = engine()(toy_images(3), ["a dog", "a cat", ""], [["sky", "Sky"], (), ["a", "sky"]])
    candidates = output.alignment.candidates
    assert candidates.tags == [["sky", "Sky"], [], ["a", "sky"]]
    assert candidates.distinct == ["sky", "Sky", "a"]
    assert candidates.image_index.tolist() == [0, 0, 2, 2]
    assert candidates.tag_index.tolist() == [0, 1, 2, 0]


@modest
@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=5), max_size=5))
def test_candidates_are_flat_in_order_and_name_each_tag_once(tags: list[list[str]]) -> None:
    flat = Candidates.of(tags, torch.device("cpu"))
    assert flat.image_index.dtype == flat.tag_index.dtype == torch.int64
    rebuilt: list[list[str]] = [[] for _ in tags]
    for image, tag in zip(flat.image_index.tolist(), flat.tag_index.tolist(), strict=True):
        rebuilt[image].append(flat.distinct[tag])
    assert rebuilt == tags == flat.tags
    assert len(set(flat.distinct)) == len(flat.distinct)
    assert flat.image_index.tolist() == sorted(flat.image_index.tolist())


@pytest.mark.parametrize(
    ("count", "captions", "tags", "said"),
    [
        (2, ["one"], None, "2 images came with 1 captions"),
        (1, ["one", "two"], None, "1 images came with 2 captions"),
        (2, "ab", None, "captions must be a list"),
        (2, ["one", "two"], [["a"]], "2 captions came with 1 lists of tags"),
        (2, ["one", "two"], ["dog", "cat"], "tags must be a list of tags for each caption"),
        (0, [], None, "the batch is empty"),
        (1, [None], None, "caption 0 is a NoneType"),
    ],
)
def test_wrong_input_is_told_before_any_work(count: int, captions: Any, tags: Any, said: str) -> None:
    ttd = engine()
    with pytest.raises(InputError, match=said):
        ttd(toy_images(count), captions, tags)
    assert (ttd.backbone.images, ttd.backbone.texts) == ([], [])


def test_captions_of_one_image_are_no_negatives_of_each_other() -> None:
    images, captions = toy_images(1).expand(3, -1, -1, -1), CAPTIONS[:3]
    plain = engine()(images, captions).losses["contrastive"]
    apart = engine()(images, captions, groups=["a", "b", "c"]).losses["contrastive"]
    assert torch.equal(plain, apart)
    assert engine()(images, captions, groups=["a", "a", "a"]).losses["contrastive"].item() == 0.0
    with pytest.raises(InputError, match="3 images came with 2 groups"):
        engine()(images, captions, groups=["a", "b"])


def test_an_extractor_that_loses_captions_is_told() -> None:
    def careless(captions: Sequence[str]) -> list[list[str]]:
        return [["dog"]]

    careless.name = "careless"  # type: ignore[attr-defined]
    with pytest.raises(TagExtractionError, match="tag extractor 'careless' returned 1 lists for 2 captions"):
        TTD(toy(), extractor=careless)(toy_images(2), ["a", "b"])


def test_an_image_of_a_size_that_does_not_fit_is_told() -> None:
    with pytest.raises(ImageSizeError, match="multiple of 4"):
        engine()(toy_images(1, 16, 15), ["dog"])


def test_images_may_be_of_any_fitting_size() -> None:
    output = engine()(toy_images(2, 8, 20), ["dog", "cat"])
    assert output.alignment.grid == (2, 5)
    assert output.alignment.caption_maps.shape == (2, 10)


def test_a_batch_of_one_works_and_does_not_depend_on_company() -> None:
    images, options = toy_images(4), {"contrastive_weight": 0.0}
    together = engine(**options)(images, CAPTIONS)
    position = 0
    for number, caption in enumerate(CAPTIONS):
        alone = engine(**options)(images[number : number + 1], [caption])
        count = len(alone.targets.selected)
        part = slice(position, position + count)
        torch.testing.assert_close(alone.alignment.tag_maps, together.alignment.tag_maps[part])
        assert torch.equal(alone.targets.selected, together.targets.selected[part])
        torch.testing.assert_close(alone.targets.union[0], together.targets.union[number])
        position += count
    assert position == len(together.targets.selected)
    assert torch.isfinite(engine()(images[:1], ["dog"]).loss)


def test_statistics_tell_what_the_engine_saw() -> None:
    output = engine(rule="absolute", threshold=0.1)(toy_images(4), CAPTIONS)
    statistics, selected = output.statistics, output.targets.selected
    maps = output.alignment.caption_maps.tolist()
    assert statistics["tags_per_caption"] == len(selected) / 4
    assert statistics["selected_per_caption"] == int(selected.sum()) / 4
    assert statistics["captions_without_target"] == sum(not flag for flag in output.targets.usable.tolist())
    assert statistics["captions_without_target"] >= 1, "a caption of stop words has no target"
    assert statistics["caption_map_spread"] == pytest.approx(sum(max(m) - min(m) for m in maps) / 4)


@modest
@given(st.lists(captions_of_any_kind, min_size=1, max_size=4))
@example(["", ""])
def test_any_caption_gives_a_finite_loss_and_gradient(captions: list[str]) -> None:
    ttd = engine()
    output = ttd(toy_images(len(captions)), captions)
    output.loss.backward()
    assert bool(torch.isfinite(output.loss))
    assert all(bool(torch.isfinite(p.grad).all()) for p in ttd.parameters() if p.grad is not None)


def test_a_picture_that_is_the_same_everywhere_gives_empty_targets_and_a_finite_loss() -> None:
    ttd = engine()
    output = ttd(torch.zeros(2, 3, SIDE, SIDE), ["a dog", "cat grass"])
    output.loss.backward()
    assert not output.targets.union.any()
    assert all(bool(torch.isfinite(p.grad).all()) for p in ttd.parameters() if p.grad is not None)


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigmoid", [False, True])
def test_autocast_changes_nothing_of_our_own_arithmetic(sigmoid: bool) -> None:
    def run(autocast: bool) -> tuple[TTDOutput, dict[str, Tensor]]:
        ttd = TTD(toy(kind=AutocastProof, sigmoid=sigmoid))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = ttd(toy_images(4), CAPTIONS)
        output.loss.backward()
        return output, {name: p.grad for name, p in ttd.named_parameters() if p.grad is not None}

    (plain, plain_gradients), (cast, cast_gradients) = run(False), run(True)
    assert cast.loss.dtype == cast.alignment.tag_maps.dtype == torch.float32
    torch.testing.assert_close(cast.loss, plain.loss, rtol=1e-6, atol=0)
    for name in plain.losses:
        torch.testing.assert_close(cast.losses[name], plain.losses[name], rtol=1e-6, atol=0)
    for name in plain_gradients:
        torch.testing.assert_close(cast_gradients[name], plain_gradients[name], rtol=1e-4, atol=1e-7)


def test_a_stage_left_to_autocast_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    autocast = "with torch.autocast(student.captions.device.type, enabled=False):"
    break_it(monkeypatch, functional, "ttd_loss", autocast, "if True:")
    assert_caught(lambda: test_autocast_changes_nothing_of_our_own_arithmetic(False))


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_features_of_half_precision_are_judged_in_float32(how: str) -> None:
    backbone = toy(dtype=torch.bfloat16 if how == "weights" else torch.float32)
    backbone.keep_outputs = True
    ttd = TTD(backbone, extractor=words)
    captions = ["dog cat grass", "an owl", ""]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        output = ttd(toy_images(3), captions, [["dog", "cat", "grass"], ["owl"], []])
    patches, pooled, texts = (feature.detach() for feature in backbone.outputs)
    assert patches.dtype == torch.bfloat16
    texts, of_tags = texts[:3], texts[3:].double().tolist()
    features = Features(
        patches.double().flatten(1, 2).tolist(),
        pooled.double().tolist(),
        texts.double().tolist(),
        [of_tags[:3], of_tags[3:], []],
    )
    # The error of one bfloat16 rounding would be 4e-3.
    assert_output_is(output, slow_ttd(ttd, features), atol=1e-6)


# Modes, hooks, teachers ----------------------------------------------------------------------------------------------


def modes(ttd: TTD) -> list[bool]:
    return [module.training for module in ttd.modules()]


def hooks(ttd: TTD) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, kind)) for module in ttd.modules() for kind in kinds]


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("teacher", ["self", "frozen", "ema"])
def test_modes_hooks_and_flags_stay_as_found(training: bool, teacher: Any) -> None:
    backbone = toy(dropout=0.5)
    backbone.model.train(training)
    # A caller may have frozen a part and left it in another mode.
    backbone.model.patch_head.train(not training)
    backbone.model.words.weight.requires_grad_(False)
    handle = backbone.model.patch.register_forward_hook(lambda *_: None)
    ttd = TTD(ToyAdapter(backbone.model, logits="softmax"), teacher=teacher)
    before = modes(ttd), hooks(ttd), [p.requires_grad for p in ttd.parameters()]
    ttd(toy_images(2), CAPTIONS[:2]).loss.backward()
    ttd.maps(picture(), "a dog")
    with pytest.raises(ImageSizeError):
        ttd.maps(picture(), "a dog", size=17)
    assert (modes(ttd), hooks(ttd), [p.requires_grad for p in ttd.parameters()]) == before
    handle.remove()


def test_modes_come_back_when_a_map_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ttd = engine(toy(dropout=0.5)).train()
    before = modes(ttd)

    def fail(ids: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ttd.backbone, "encode_text", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        ttd.maps(picture(), "a dog")
    assert modes(ttd) == before


def test_an_engine_takes_the_mode_of_its_model() -> None:
    for training in (False, True):
        backbone = toy()
        backbone.model.train(training)
        assert TTD(ToyAdapter(backbone.model, logits="softmax")).training is training


def test_maps_are_those_of_evaluation_mode_while_the_loss_is_not() -> None:
    ttd = engine(toy(dropout=0.5))
    calm = ttd.maps(picture(), "a dog").caption_map
    ttd.train()
    np.testing.assert_array_equal(ttd.maps(picture(), "a dog").caption_map, calm)
    assert ttd(toy_images(1), ["a dog"]).loss != ttd(toy_images(1), ["a dog"]).loss


class PixelsElsewhere(Tensor):
    """Pixels on a device of their own, as on a GPU: no operation mixes them with a tensor of the CPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(Tensor)
        if any(type(one) is Tensor for one in args):
            raise RuntimeError("expected all tensors to be on the same device")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_an_image_is_restored_from_pixels_on_any_device() -> None:
    ttd = engine()
    pixels = toy_images(1)[0]
    expected = ttd.image_array(pixels)
    np.testing.assert_array_equal(ttd.image_array(pixels.as_subclass(PixelsElsewhere)), expected)
    np.testing.assert_array_equal(ttd.image_array(pixels.clone().requires_grad_()), expected)
    with torch.device("meta"):
        np.testing.assert_array_equal(ttd.image_array(pixels), expected)


def train_step(ttd: TTD, rate: float = 0.1) -> None:
    ttd.zero_grad(set_to_none=True)
    ttd(toy_images(4), CAPTIONS).loss.backward()
    with torch.no_grad():
        for parameter in ttd.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad


def test_a_frozen_teacher_ignores_later_training() -> None:
    ttd = engine(teacher="frozen").train()
    (teacher,) = ttd._teacher
    before = copy.deepcopy(teacher.model.state_dict())
    first = ttd(toy_images(4), CAPTIONS).targets
    for _ in range(3):
        train_step(ttd)
    later = ttd(toy_images(4), CAPTIONS)
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    assert torch.equal(later.targets.union, first.union)
    # The student has moved on, and would give itself other targets.
    assert not torch.equal(ttd.targets(later.alignment).union, first.union)


def test_a_teacher_is_in_evaluation_mode_whatever_the_student_is_in() -> None:
    ttd = engine(toy(dropout=0.5), teacher="frozen").train()
    first, second = (ttd(toy_images(2), CAPTIONS[:2]).targets.union for _ in range(2))
    assert torch.equal(first, second)


def test_an_average_moves_by_the_stated_formula_before_it_gives_targets() -> None:
    decay = 0.9
    ttd = engine(toy(dtype=torch.float64), teacher="ema", ema_decay=decay).train()
    (teacher,) = ttd._teacher
    averages = [p.detach().clone() for p in teacher.parameters()]
    for _ in range(4):
        averages = [decay * a + (1 - decay) * p for a, p in zip(averages, ttd.backbone.parameters(), strict=True)]
        train_step(ttd)
        for average, p in zip(averages, teacher.parameters(), strict=True):
            torch.testing.assert_close(p, average, rtol=1e-12, atol=1e-12)
    output = ttd(toy_images(4), CAPTIONS)
    torch.testing.assert_close(output.targets.union, TTD(teacher)(toy_images(4), CAPTIONS).targets.union)
    assert not torch.allclose(output.targets.union, ttd.targets(output.alignment).union)


def test_an_average_follows_the_mode_of_the_callers_own_model() -> None:
    backbone = toy()
    ttd = TTD(backbone, teacher="ema", ema_decay=0.5)
    (teacher,) = ttd._teacher

    def moved() -> bool:
        before = [p.clone() for p in teacher.parameters()]
        ttd(toy_images(2), CAPTIONS[:2])
        return any(not torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))

    with torch.no_grad():
        backbone.model.text_head.weight.add_(1.0)
    assert not moved()
    # A caller's loop knows its model, not our wrappers.
    backbone.model.train()
    assert moved()
    backbone.model.eval()
    assert not moved()


@pytest.mark.parametrize("teacher", ["frozen", "ema"])
def test_a_teachers_weights_are_not_trained_and_only_an_average_is_saved(teacher: Any) -> None:
    ttd, plain = engine(teacher=teacher), engine()
    more = ttd.state_dict().keys() - plain.state_dict().keys()
    of_teacher = {f"teacher.{name}" for name in ttd._teacher[0].state_dict()}
    assert more == (of_teacher if teacher == "ema" else set())
    assert len(list(ttd.parameters())) == len(list(plain.parameters()))
    (copied,) = ttd._teacher
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in ttd.parameters()}
    ttd.train()
    train_step(ttd)
    assert all(p.grad is None and not p.requires_grad for p in copied.parameters())
    assert not any(module.training for module in copied.modules())


def test_an_average_made_before_lora_is_told() -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    ttd = engine(teacher="ema").train()
    ttd.backbone.add_lora(2)
    with pytest.raises(TTDError, match="LoRA was added to or removed from the backbone after"):
        ttd(toy_images(1), ["dog"])


def test_a_frozen_teacher_is_the_original_without_lora_and_an_average_has_it() -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    backbone = toy()
    original = copy.deepcopy(backbone.model.state_dict())
    backbone.add_lora(2)
    with torch.no_grad():
        for parameter in backbone.lora_parameters():
            parameter.add_(0.3)
    frozen, average = TTD(backbone, teacher="frozen"), TTD(backbone, teacher="ema")
    assert all(torch.equal(v, original[k]) for k, v in frozen._teacher[0].model.state_dict().items())
    assert frozen._teacher[0].model.state_dict().keys() == original.keys()
    assert average._teacher[0].has_lora
    assert backbone.has_lora
    image, caption = toy_images(1), ["a dog"]
    by_average = average(image, caption)
    torch.testing.assert_close(by_average.targets.union, average.targets(by_average.alignment).union)
    by_original = frozen(image, caption)
    assert not torch.allclose(by_original.targets.union, frozen.targets(by_original.alignment).union)


# A caller's own loop ------------------------------------------------------------------------------------------------


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_state(model: torch.nn.Module, state: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_unload_after_full_fine_tuning_gives_the_originals_bitwise() -> None:
    backbone = toy()
    model = backbone.model
    before = state_of(model)
    ttd = TTD(backbone).train()
    for _ in range(3):
        train_step(ttd)
        model.steps += 1  # type: ignore[operator]  # a buffer, as of batch normalisation
    assert not same_state(model, before)
    assert backbone.unload() is model
    assert same_state(model, before)
    # And again, from there.
    train_step(ttd)
    assert not same_state(model, before)
    backbone.unload()
    assert same_state(model, before)


def test_merge_keeps_the_tuned_weights() -> None:
    backbone = toy()
    train_step(TTD(backbone).train())
    tuned = state_of(backbone.model)
    assert backbone.merge() is backbone.model
    assert same_state(backbone.model, tuned)
    with pytest.raises(TTDError, match="was merged into its weights, so unload\\(\\) cannot restore the originals"):
        backbone.unload()
    assert same_state(backbone.model, tuned)


def test_lora_leaves_no_trace_after_unload_and_its_work_after_merge() -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    for end in ("unload", "merge"):
        backbone = toy()
        before = state_of(backbone.model)
        flags = [p.requires_grad for p in backbone.model.parameters()]
        ttd = TTD(backbone.add_lora(2)).train()
        for _ in range(3):
            train_step(ttd)
        ttd.eval()
        tuned = ttd.maps(picture(), "a dog").caption_map
        assert backbone._originals is None, "under LoRA nothing needs to be copied"
        model = getattr(backbone, end)()
        assert [p.requires_grad for p in model.parameters()] == flags
        assert same_state(model, before) is (end == "unload")
        assert model.state_dict().keys() == before.keys()
        after = ttd.maps(picture(), "a dog").caption_map
        assert np.allclose(after, tuned, atol=1e-5) is (end == "merge")


# Maps to plot --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "tags", "size", "shape"),
    [
        ("a red kite on the grass", ["red", "kite", "grass"], None, (4, 4)),
        ("", [], None, (4, 4)),
        ("🐶", [], 8, (2, 2)),
        ("собака на траве", ["собака", "на", "траве"], (8, 20), (2, 5)),
        (HUNDRED, [f"word{number}" for number in range(100)], None, (4, 4)),
    ],
)
def test_maps_have_the_stated_shapes_and_ranges(
    caption: str, tags: list[str], size: Any, shape: tuple[int, int]
) -> None:
    found = engine().maps(picture(), caption, size=size)
    count = len(tags)
    assert (found.caption, found.tags, found.truncated) == (caption, tags, caption == HUNDRED)
    assert found.scores.shape == found.probabilities.shape == found.selected.shape == (count,)
    assert found.tag_maps.shape == found.tag_maps_normalized.shape == (count, *shape)
    assert found.union.shape == found.caption_map.shape == found.caption_map_normalized.shape == shape
    assert found.image.shape == (4 * shape[0], 4 * shape[1], 3)
    assert (found.image.dtype, found.selected.dtype, found.union.dtype) == (np.uint8, bool, np.float32)
    for unit in (found.tag_maps_normalized, found.union, found.caption_map_normalized):
        assert np.all((unit >= 0) & (unit <= 1))
    assert (found.caption_map_normalized.min(), found.caption_map_normalized.max()) == (0, 1)


def test_maps_are_those_of_the_slow_engine() -> None:
    backbone = toy(3)
    ttd = TTD(backbone, extractor=words)
    caption = "dog cat grass"
    pixels = backbone.dense_transform()(picture())[None]
    features = features_one_by_one(backbone, pixels, [caption], words([caption]), "{}")
    expected, found = slow_ttd(ttd, features), ttd.maps(picture(), caption)
    close = {"atol": 1e-5}
    np.testing.assert_allclose(found.scores, expected.scores[0], **close)
    probabilities = [slow.sigmoid(8.0 * score - 2.0) for score in expected.scores[0]]
    np.testing.assert_allclose(found.probabilities, probabilities, **close)
    assert found.selected.tolist() == expected.selected[0]
    np.testing.assert_allclose(found.tag_maps.reshape(3, -1), expected.tag_maps[0], **close)
    np.testing.assert_allclose(found.caption_map.ravel(), expected.caption_maps[0], **close)
    np.testing.assert_allclose(found.union.ravel(), expected.union[0], atol=1e-4)
    normalized = [slow.minmax(one, constant=0.0) for one in expected.tag_maps[0]]
    np.testing.assert_allclose(found.tag_maps_normalized.reshape(3, -1), normalized, atol=1e-4)
    np.testing.assert_allclose(
        found.caption_map_normalized.ravel(), slow.minmax(expected.caption_maps[0], constant=0.0), atol=1e-4
    )


def test_the_picture_of_the_maps_is_what_the_network_saw() -> None:
    flat = Image.new("RGB", (9, 5), (200, 30, 77))
    assert engine().maps(flat, "dog").image[3, 3].tolist() == [200, 30, 77]


def test_maps_take_a_path_and_given_tags(tmp_path: Any) -> None:
    file = tmp_path / "picture.png"
    picture().save(file)
    ttd = engine()
    for path in (file, str(file)):
        np.testing.assert_allclose(
            ttd.maps(path, "a dog", tags=["sky"]).tag_maps, ttd.maps(picture(), "sky").tag_maps, atol=1e-6
        )
    with pytest.raises(InputError, match="does not exist"):
        ttd.maps(tmp_path / "none.png", "a dog")
    with pytest.raises(InputError, match="tags must be a list"):
        ttd.maps(picture(), "a dog", tags="dog")


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"template": "a photo"}, "must contain {} once"),
        ({"template": "{} {}"}, "must contain {} once"),
        ({"template": "{} in {place}"}, "no other brace"),
        ({"template": "{{}}"}, "no other brace"),
        ({"score": "best"}, "unknown value of score 'best'; known: image, pixel, text"),
        ({"rule": "top"}, "unknown value of rule 'top'; known: absolute, minmax, probability"),
        ({"teacher": "wise"}, "unknown value of teacher 'wise'; did you mean 'self'? known: ema, frozen, self"),
        ({"distance": "kl"}, "unknown value of distance 'kl'"),
        ({"distance": "bce", "activation": "none"}, "the distance bce needs maps in [0, 1]"),
        ({"tag_weight": -1.0}, "tag_weight must be 0 or more, not -1.0"),
        ({"contrastive_weight": float("nan")}, "contrastive_weight must be a finite number, 0 or more, not nan"),
        ({"ema_decay": 1.5}, "ema_decay must be at least 0 and at most 1, not 1.5"),
        ({"treshold": 0.5}, "TTD has no option 'treshold'; options: extractor"),
    ],
)
def test_wrong_options_are_told_when_the_engine_is_made(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        engine(**options)
    assert said in str(caught.value)


def test_options_are_taken_whole_or_by_name() -> None:
    options = TTDOptions(rule="absolute", threshold=0.2)
    assert TTD(toy(), options).options == options
    assert TTD(toy(), options, threshold=0.3).options == TTDOptions(rule="absolute", threshold=0.3)
    assert engine(extractor_options={"stop_words": ["dog"]}).extractor(["a dog"]) == [["a"]]


def test_the_calibration_is_the_backbones_own_unless_given() -> None:
    assert engine().calibration == Calibration(8.0, -2.0)
    assert engine(calibration=Calibration(1.0, 0.0)).calibration == Calibration(1.0, 0.0)


def test_the_slow_engine_is_no_copy_of_nothing() -> None:
    """The reference itself, on numbers worked out by hand."""
    options = SimpleNamespace(
        score="pixel",
        rule="absolute",
        threshold=0.7,
        distance="l1",
        activation="none",
        target_power=2.0,
        rejected_weight=0.5,
        tag_weight=1.0,
        distill_weight=10.0,
        contrastive_weight=0.0,
    )
    patches = [[[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]]
    # Maps: (1, 0, 0.6) is kept and stays, (-1, 0, -0.6) is not; the caption's is (0, 1, 0.8), its target (1, 0, 0.36).
    found = slow.ttd(patches, None, [[0.0, 5.0]], [[[7.0, 0.0], [-1.0, 0.0]]], options, scale=1.0, shift=0.0)
    assert found.selected == [[True, False]]
    assert found.union == [pytest.approx([1.0, 0.0, 0.36])]
    assert found.parts["tag"] == pytest.approx((1.0 * 0.24 / 3 + 0.5 * 1.6 / 3) / 1.5)
    assert found.parts["distill"] == pytest.approx(2.44 / 3)
    assert found.loss == pytest.approx(1.04 / 4.5 + 24.4 / 3)
