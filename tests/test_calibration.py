"""Fitting the map from cosine to probability: the optimum, what it does not depend on, and what cannot be fitted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_examples import example
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from toy_backbone import END, ToyAdapter, toy
from typer.testing import CliRunner

from ttd_plugins import cli, load
from ttd_plugins.adapter import (
    BackboneDescription,
    Calibration,
    DenseAdapter,
    ImageFeatures,
    ImageTransform,
    Size,
    Tokens,
    Tower,
)
from ttd_plugins.calibration import MIN_IMAGES, CalibrationFit, fit_calibration, fit_logistic, log_loss
from ttd_plugins.engine import TTD, TTDOptions, TTDOutput
from ttd_plugins.errors import InputError, TagExtractionError, TTDError
from ttd_plugins.method.losses import map_distance
from ttd_plugins.method.selection import select_tags
from ttd_plugins.method.similarity import normalize
from ttd_plugins.method.text_embeddings import encode_texts
from ttd_plugins.tags import fold

WIDTH = 20
WORDS = [f"thing{number}" for number in range(24)]


def overlapping(count: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of two overlapping classes."""
    rng = np.random.default_rng(seed)
    present = rng.random(count) < 0.5
    return 0.2 + 0.05 * rng.standard_normal(count) + 0.04 * present, present


class Seeing(ToyAdapter):
    """A toy whose first patch looks like the words that the pixels' first row numbers: own words score high."""

    slope, offset = 1.0, 0.0

    @property
    def description(self) -> BackboneDescription:
        # What affine() adds.
        plain = super().description
        return replace(plain, embedding_width=plain.embedding_width + 3)

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        self.images.append((tuple(pixels.shape), pooled))
        rows, columns = self.patch_grid(*pixels.shape[-2:])
        embeddings = self.plain_text(self.tokenize(WORDS).ids).detach()
        patches = torch.empty(len(pixels), rows, columns, embeddings.shape[1])
        for number, image in enumerate(pixels):
            # Noise of the image alone: its last pixel tells which it is.
            noise = torch.Generator().manual_seed(int(image[0, -1, -1].abs() * 1000))
            patches[number].normal_(generator=noise)
            named = image[0, 0, :3].round().long().clamp(0, len(WORDS) - 1)
            patches[number, 0, :3] = embeddings[named] + 0.6 * patches[number, 0, :3]
        return ImageFeatures(self.affine(patches, 1), None)

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.affine(self.plain_text(ids), 1 if self.offset >= 0 else -1)

    def plain_text(self, ids: Tensor) -> Tensor:
        """A vector of its own for each word, summed over words."""
        return (self.model.words(ids) * (ids > END)[:, :, None]).sum(1)

    def affine(self, features: Tensor, sign: int) -> Tensor:
        """Features whose cosines are ``slope * c + offset`` of what they were: two more dimensions do it."""
        unit = normalize(features) * self.slope**0.5
        more = unit.new_full((*unit.shape[:-1], 1), sign * abs(self.offset) ** 0.5)
        rest = (1 - self.slope - abs(self.offset)) ** 0.5
        # What remains of the unit length goes where the other kind of feature has nothing.
        image = features.ndim == 4
        zero, fill = unit.new_zeros(more.shape), unit.new_full(more.shape, rest)
        return torch.cat([unit, more, fill if image else zero, zero if image else fill], dim=-1)


def seeing(slope: float = 1.0, offset: float = 0.0) -> Seeing:
    adapter = toy(seed=3, kind=Seeing, width=WIDTH)
    assert isinstance(adapter, Seeing)
    adapter.slope, adapter.offset = slope, offset
    return adapter


def pictures(count: int = 60, seed: int = 0) -> list[tuple[Tensor, str]]:
    """Pixels whose first row numbers three words, and a caption of those words."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        numbers = rng.choice(len(WORDS), size=3, replace=False)
        image = torch.full((3, 16, 16), float(index))
        image[0, 0, :3] = torch.tensor(numbers.tolist())
        found.append((image, " and ".join(WORDS[number] for number in numbers)))
    return found


# The regression ------------------------------------------------------------------------------------------------------


def test_the_optimum_is_where_the_gradient_of_the_written_out_objective_is_zero() -> None:
    scores, present = overlapping()
    for ridge in (1e-4, 0.3):
        found = fit_logistic(scores, present, ridge=ridge)
        scale, shift = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (found.scale, found.shift))
        x, y = torch.tensor(scores), torch.tensor(present).double()
        p = torch.sigmoid(scale * x + shift)
        slope = scale * x.std(correction=0)
        loss = -(y * p.log() + (1 - y) * (1 - p).log()).mean() + ridge / 2 * slope**2
        gradients = torch.autograd.grad(loss, (scale, shift))
        assert all(abs(float(g)) < 1e-10 for g in gradients)
    assert log_loss(found, scores, present) == pytest.approx(-(y * p.log() + (1 - y) * (1 - p).log()).mean().item())


def test_it_finds_the_parameters_that_made_the_data() -> None:
    rng = np.random.default_rng(1)
    scores = rng.uniform(-0.2, 0.6, 200_000)
    present = rng.random(len(scores)) < 1 / (1 + np.exp(-(14 * scores - 3)))
    found = fit_logistic(scores, present)
    assert found.scale == pytest.approx(14, rel=0.02)
    assert found.shift == pytest.approx(-3, rel=0.02)


def test_separable_data_have_a_finite_answer_that_separates() -> None:
    found = fit_logistic(np.array([0.1, 0.11, 0.3, 0.31]), np.array([False, False, True, True]))
    assert np.isfinite([found.scale, found.shift]).all()
    assert found.scale * 0.11 + found.shift < -2 < 2 < found.scale * 0.3 + found.shift


AFFINE = st.tuples(st.floats(1e-3, 1e3), st.floats(-50, 50))


@settings(max_examples=60, deadline=None)
@given(AFFINE, st.integers(0, 1000))
def test_an_affine_change_of_the_cosines_changes_nothing_that_uses_the_refitted_calibration(
    change: tuple[float, float], seed: int
) -> None:
    slope, offset = change
    scores, present = overlapping(80, seed)
    # Eighty random scores may rank the wrong way round, which is an error of its own.
    assume(scores[present].mean() > scores[~present].mean())
    moved = slope * scores + offset
    before, after = fit_logistic(scores, present), fit_logistic(moved, present)
    raw, changed = torch.tensor(scores), torch.tensor(moved)
    torch.testing.assert_close(after.probability(changed), before.probability(raw), rtol=0, atol=1e-6)
    index = torch.zeros(len(raw), dtype=torch.long)
    clear = (before.probability(raw) - 0.5).abs() > 1e-5
    chosen, again = (
        select_tags(s, index, 1, rule="probability", threshold=0.5, calibration=c)
        for s, c in ((raw, before), (changed, after))
    )
    assert torch.equal(chosen[clear], again[clear])
    targets = torch.rand(8, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for distance in ("bce", "mse", "l1"):
        one, other = (
            map_distance(s.view(8, 10), targets, distance=distance, calibration=c)
            for s, c in ((raw, before), (changed, after))
        )
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scores", "present", "message"),
    [
        ([0.1, 0.2], [True, True], "words that are absent"),
        ([], [], "words that are absent"),
        ([0.2, 0.2, 0.2, 0.2], [True, False, True, False], "the same score"),
        ([0.1, float("nan")], [True, False], "not finite"),
        ([0.1, 0.3, 0.2, 0.4], [True, False, True, False], "scores as high"),
    ],
)
def test_what_cannot_be_fitted(scores: list[float], present: list[bool], message: str) -> None:
    with pytest.raises(TTDError, match=message):
        fit_logistic(np.array(scores), np.array(present))
    with pytest.raises(InputError, match="ridge"):
        fit_logistic(np.array([0.1, 0.2]), np.array([False, True]), ridge=0.0)


# A backbone ----------------------------------------------------------------------------------------------------------


def by_hand(adapter: Seeing, found: list[tuple[Tensor, str]], words: list[list[str]]) -> np.ndarray:
    """Nearest-patch scores, one word and image at a time."""
    scores = []
    for (image, _), names in zip(found, words, strict=True):
        patches = adapter.encode_image(image[None]).patches[0].reshape(-1, WIDTH + 3)
        for name in names:
            text = adapter.encode_text(adapter.tokenize([name]).ids)[0]
            scores.append(max(float(torch.cosine_similarity(p, text, dim=0)) for p in patches))
    return np.array(scores)


def test_the_fit_is_better_than_the_default_on_images_it_has_not_seen() -> None:
    adapter = seeing()
    fit = fit_calibration(adapter, pictures(80))
    assert fit.default == adapter.calibration
    assert fit.log_loss < min(0.6, fit.default_log_loss)
    assert (fit.images, fit.held_out_images, fit.words, fit.held_out_words) == (60, 20, 180, 60)
    assert fit.captions_without_words == 0


def test_own_words_score_as_by_hand_and_borrowed_ones_are_never_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from ttd_plugins import calibration

    seen: dict[str, Any] = {}
    score = calibration._score

    def spy(backbone: Any, pairs: Any, *more: Any) -> Any:
        seen["pairs"], seen["scores"] = pairs, score(backbone, pairs, *more)
        return seen["scores"]

    monkeypatch.setattr(calibration, "_score", spy)
    found = pictures(24)
    adapter = seeing()
    fit_calibration(adapter, found, batch_size=5)
    borrowed = 0
    for pair, (_, caption) in zip(seen["pairs"], found, strict=True):
        assert pair.own == caption.split(" and ")
        assert len(pair.sampled) == len(pair.own)
        assert not {fold(word) for word in pair.sampled} & {fold(word) for word in pair.own}
        borrowed += len(pair.sampled)
    assert borrowed == 72
    words = [[*pair.own, *pair.sampled] for pair in seen["pairs"]]
    np.testing.assert_allclose(np.concatenate(seen["scores"]), by_hand(adapter, found, words), atol=1e-5)


def test_the_same_seed_gives_the_same_answer_and_another_another() -> None:
    fits = [fit_calibration(seeing(), pictures(40), seed=seed) for seed in (0, 0, 1)]
    assert fits[0] == fits[1]
    assert fits[0] != fits[2]


def test_batches_pairs_pil_images_and_paths_are_the_same(tmp_path: Path) -> None:
    found = pictures(24)
    images, captions = [image for image, _ in found], [caption for _, caption in found]
    batches = [(torch.stack(images[i : i + 7]), captions[i : i + 7]) for i in range(0, 24, 7)]
    assert fit_calibration(seeing(), batches).calibration == fit_calibration(seeing(), iter(found)).calibration
    rng = np.random.default_rng(0)
    drawn = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in found]
    for index, image in enumerate(drawn):
        image.save(tmp_path / f"{index}.png")
    paths = [tmp_path / f"{index}.png" for index in range(24)]
    adapter = toy(width=8)
    answers = []
    for kind in (drawn, paths, [str(path) for path in paths]):
        try:
            answers.append(fit_calibration(adapter, zip(kind, captions, strict=True)))
        except TTDError as error:  # a random toy may tell own words worse than borrowed ones
            answers.append(str(error))
    assert answers[0] == answers[1] == answers[2]


def test_all_captions_of_an_image_are_held_out_together() -> None:
    found = pictures(30)
    twice = [*found, *[(image.clone(), caption) for image, caption in found]]
    fit = fit_calibration(seeing(), twice, held_out=0.2)
    assert (fit.images, fit.held_out_images, fit.words, fit.held_out_words) == (24, 6, 144, 36)


def test_nothing_of_the_backbone_changes() -> None:
    adapter = toy(seed=3, kind=Seeing, width=WIDTH, dropout=0.5)
    adapter.train()
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    fit = fit_calibration(adapter, pictures(30))
    assert adapter.training and adapter.model.dropout.training
    assert all(torch.equal(tensor, adapter.state_dict()[name]) for name, tensor in before.items())
    assert torch.equal(state, torch.get_rng_state())
    assert fit == fit_calibration(adapter.eval(), pictures(30))


@settings(max_examples=10, deadline=None)
@given(st.floats(0.1, 0.6), st.floats(-0.35, 0.35))
def test_a_backbone_with_other_cosines_trains_and_selects_alike_after_refitting(slope: float, offset: float) -> None:
    images = torch.stack([image for image, _ in pictures(6, seed=9)])
    captions = [caption for _, caption in pictures(6, seed=9)]
    outputs, fits = [], []
    for adapter in (seeing(), seeing(slope, offset)):
        fits.append(fit_calibration(adapter, pictures(40)))
        ttd = TTD(
            adapter,
            TTDOptions(calibration=fits[-1].calibration, rule="probability", threshold=0.5, contrastive_weight=0.0),
        )
        assert ttd.calibration == fits[-1].calibration
        outputs.append(ttd(images, captions))
    first, second = outputs
    torch.testing.assert_close(second.alignment.tag_maps, slope * first.alignment.tag_maps + offset, rtol=0, atol=1e-5)
    assert fits[1].log_loss == pytest.approx(fits[0].log_loss, abs=1e-4)
    scores = [fits[i].calibration.probability(o.alignment.scores) for i, o in enumerate(outputs)]
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-3)
    clear = (scores[0] - 0.5).abs() > 2e-3
    assert torch.equal(first.targets.selected[clear], second.targets.selected[clear])
    if bool(clear.all()):
        for name in ("tag", "distill"):
            torch.testing.assert_close(second.losses[name], first.losses[name], rtol=2e-3, atol=1e-3)


class Changed(DenseAdapter):
    """Another adapter whose cosines all become ``slope * c + offset``, as a real backbone of another family has them.

    Features are normalised and shortened to ``sqrt(slope)``. One more coordinate, equal on every image and text, adds
    the offset, and what is left of length one goes where the other side has zero.
    """

    def __init__(self, inner: DenseAdapter, slope: float, offset: float) -> None:
        super().__init__(inner.model)
        self.inner, self.slope, self.offset = (inner,), slope, offset

    @property
    def description(self) -> BackboneDescription:
        own = self.inner[0].description
        return replace(own, embedding_width=own.embedding_width + 3)

    def changed(self, features: Tensor, image: bool) -> Tensor:
        unit = normalize(features) * self.slope**0.5
        constant = unit.new_full((*unit.shape[:-1], 1), self.offset**0.5)
        rest = torch.full_like(constant, (1 - self.slope - self.offset) ** 0.5)
        zero = torch.zeros_like(constant)
        return torch.cat([unit, constant, *((rest, zero) if image else (zero, rest))], dim=-1)

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        features = self.inner[0].encode_image(pixels, pooled=pooled)
        whole = None if features.pooled is None else self.changed(features.pooled, True)
        return ImageFeatures(self.changed(features.patches, True), whole)

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.changed(self.inner[0].encode_text(ids), False)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        return self.inner[0].tokenize(texts)

    def dense_transform(self, size: Size | None = None) -> ImageTransform:
        return self.inner[0].dense_transform(size)

    def native_transform(self) -> ImageTransform:
        return self.inner[0].native_transform()

    def logit_scale(self) -> Tensor:
        return self.inner[0].logit_scale()

    def lora_targets(self, tower: Tower) -> list[str]:
        return self.inner[0].lora_targets(tower)

    def tower_parameters(self, tower: Tower) -> Iterable[tuple[str, torch.nn.Parameter]]:
        return self.inner[0].tower_parameters(tower)


Pairs = list[tuple[Image.Image, str]]


@pytest.fixture(scope="module")
def refitted() -> tuple[list[tuple[DenseAdapter, CalibrationFit]], Pairs]:
    """A trained backbone and the same with other cosines, each with a calibration fitted to it, and scenes."""
    pytest.importorskip("open_clip")
    pytest.importorskip("resvg_py")
    from ttd_plugins.embedded.scenes import Scenes

    pairs = [(Image.fromarray(scene.image), scene.caption) for scene in Scenes("validation", 40)]
    plain = load("open_clip:tiny")
    adapters = [plain, Changed(plain, 0.35, 0.4)]
    return [(adapter, fit_calibration(adapter, pairs)) for adapter in adapters], pairs


def losses_and_gradients(
    adapter: DenseAdapter, options: TTDOptions, pairs: Pairs
) -> tuple[TTDOutput, dict[str, Tensor]]:
    transform = adapter.dense_transform()
    images = torch.stack([transform(image) for image, _ in pairs])
    output = TTD(adapter, options)(images, [caption for _, caption in pairs])
    named = {name: p for name, p in adapter.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(output.loss, list(named.values()), allow_unused=True)
    return output, {name: g for name, g in zip(named, found, strict=True) if g is not None}


def test_the_calibration_of_changed_cosines_is_the_changed_calibration(refitted: Any) -> None:
    (plain, changed), _ = refitted
    before, after = plain[1].calibration, changed[1].calibration
    assert after.scale == pytest.approx(before.scale / 0.35, rel=1e-3)
    assert after.shift == pytest.approx(before.shift - before.scale * 0.4 / 0.35, rel=1e-3)
    assert changed[1].log_loss == pytest.approx(plain[1].log_loss, abs=1e-4)
    # The default map, which belongs to the backbone as it was, is wrong for the changed one.
    assert changed[1].default == plain[1].default
    assert changed[1].default_log_loss > plain[1].default_log_loss + 0.1


@pytest.mark.parametrize(("rule", "threshold"), [("probability", 0.5), ("minmax", 0.4)])
@pytest.mark.parametrize(
    ("distance", "activation"), [("bce", "sigmoid"), ("mse", "sigmoid"), ("l1", "sigmoid"), ("bce", "minmax")]
)
def test_changed_cosines_change_no_selection_loss_or_gradient_after_refitting(
    rule: Any, threshold: float, distance: Any, activation: Any, refitted: Any
) -> None:
    fits, pairs = refitted
    options = TTDOptions(rule=rule, threshold=threshold, distance=distance, activation=activation, contrastive_weight=0)
    (first, gradients), (second, others) = (
        losses_and_gradients(adapter, replace(options, calibration=fit.calibration), pairs[:12])
        for adapter, fit in fits
    )
    torch.testing.assert_close(second.alignment.scores, 0.35 * first.alignment.scores + 0.4, rtol=0, atol=1e-5)
    assert torch.equal(second.targets.selected, first.targets.selected)
    assert 0 < int(first.targets.selected.sum()) < len(first.targets.selected)
    torch.testing.assert_close(second.targets.union, first.targets.union, rtol=0, atol=1e-3)
    assert set(first.losses) == set(second.losses) == {"tag", "distill"}
    for name in first.losses:
        torch.testing.assert_close(second.losses[name], first.losses[name], rtol=1e-3, atol=1e-5)
    assert set(gradients) == set(others)
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(others[name], gradient, rtol=0, atol=0.02 * scale + 1e-6, msg=name)


def test_without_refitting_changed_cosines_change_losses_and_selection(refitted: Any) -> None:
    fits, pairs = refitted
    options = TTDOptions(rule="probability", threshold=0.5, contrastive_weight=0, calibration=fits[0][1].calibration)
    first, second = (losses_and_gradients(adapter, options, pairs[:12])[0] for adapter, _ in fits)
    assert not first.targets.selected.all()
    # Every word now looks present.
    assert second.targets.selected.all() and second.losses["tag"] > 1.5 * first.losses["tag"]


class Silent:
    name = "silent"

    def __call__(self, captions: Sequence[str]) -> list[list[str]]:
        return [[] for _ in captions]


class Short(Silent):
    name = "short"

    def __call__(self, captions: Sequence[str]) -> list[list[str]]:
        return [["one"]]


@pytest.mark.parametrize(
    ("pairs", "options", "kind", "message"),
    [
        ([], {}, InputError, "0 of 0 pairs"),
        (pictures(MIN_IMAGES - 1), {}, InputError, f"at least {MIN_IMAGES} different images"),
        ([pictures(1)[0]] * 50, {}, InputError, f"{MIN_IMAGES} different images"),
        ([(image, "and the of") for image, _ in pictures(30)], {}, TagExtractionError, "'words' finds no word"),
        (pictures(30), {"extractor": Silent()}, TagExtractionError, "'silent' finds no word in any of 30 captions"),
        (pictures(30), {"extractor": Short()}, TagExtractionError, "'short' returned 1 lists for 30 captions"),
        (pictures(30), {"extractor": "wrods"}, TagExtractionError, "did you mean 'words'"),
        (pictures(30), {"held_out": 1.0}, InputError, "held_out"),
        (pictures(30), {"batch_size": 0}, InputError, "batch_size"),
        (pictures(30), {"template": "a photo"}, InputError, "template"),
        (["ab"], {}, InputError, "item 0 is not a pair"),
        ([(torch.zeros(2, 3, 16, 16), "a dog")], {}, InputError, "item 0 has shape"),
        ([(torch.zeros(2, 3, 16, 16), ["a dog"])], {}, InputError, "item 0 is not a batch"),
        ([(7, caption) for _, caption in pictures(30)], {}, InputError, "not a int"),
        ([("none.png", caption) for _, caption in pictures(30)], {}, InputError, "'none.png' does not exist"),
    ],
)
def test_one_sentence_for_what_cannot_be_used(
    pairs: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        fit_calibration(seeing(), pairs, **options)
    assert "\n" not in str(caught.value)


def test_captions_without_words_are_left_out_and_counted() -> None:
    found = [*pictures(30), (torch.ones(3, 16, 16), "the of")]
    fit = fit_calibration(seeing(), found)
    assert (fit.images + fit.held_out_images, fit.captions_without_words) == (30, 1)


def test_the_answer_can_be_written_as_json() -> None:
    fit = CalibrationFit(Calibration(7.0, -1.0), Calibration(), 0.5, 0.6, 15, 5, 30, 10, 0)
    assert json.loads(json.dumps(fit.as_dict()))["calibration"] == {"scale": 7.0, "shift": -1.0}


def test_no_text_is_no_embedding() -> None:
    assert encode_texts(toy(), [])[0].shape == (0, 5)


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_fits_on_scenes() -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("resvg_py")
    result = CliRunner().invoke(cli.app, ["calibrate", "open_clip:tiny", "--scenes", "40", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["backbone"], answer["scenes"]) == ("open_clip:tiny", 40)
    assert (answer["images"], answer["held_out_images"]) == (30, 10)
    assert answer["calibration"]["scale"] > 0
    plain = CliRunner().invoke(cli.app, ["calibrate", "open_clip:tiny", "--scenes", "40"])
    assert f"log-loss {answer['log_loss']:.4f}" in plain.stdout
    assert f"log-loss {answer['default_log_loss']:.4f}" in plain.stdout
    assert f"scale={answer['calibration']['scale']:.6g}" in plain.stdout


@pytest.mark.parametrize("arguments", [["--scenes", "0"], ["--scenes", "5"]])
def test_the_command_says_when_there_are_too_few(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli.app, ["calibrate", "open_clip:tiny", *arguments])
    assert result.exit_code == cli.USER_ERROR
    assert result.stderr.startswith("error: ")


# The table of the families -------------------------------------------------------------------------------------------


def test_the_table_of_log_losses(capsys: pytest.CaptureFixture[str]) -> None:
    for library in ("open_clip", "transformers", "resvg_py"):
        pytest.importorskip(library)
    table = example("calibration_table")
    others = ["openai_clip:tiny@random", "siglip:tiny@random", "eva_clip:tiny@random"]
    table.main(["open_clip:tiny", *others, "open_clip:tyni", "--scenes", "40"])
    head, line, fitted, *more = capsys.readouterr().out.splitlines()
    assert head.startswith("| backbone |") and set(line) == {"|", "-"}
    assert head.count("|") == line.count("|") == fitted.count("|") == 8
    cells = [cell.strip() for cell in fitted.strip("|").split("|")]
    expected = json.loads(
        CliRunner().invoke(cli.app, ["calibrate", "open_clip:tiny", "--scenes", "40", "--json"]).stdout
    )
    assert cells[0] == "`open_clip:tiny`" and cells[1] == "softmax"
    assert (cells[3], cells[5]) == (f"{expected['default_log_loss']:.3f}", f"**{expected['log_loss']:.3f}**")
    assert cells[6] == f"{expected['held_out_images']}, {2 * expected['held_out_words']}"
    for name, row in zip(others, more, strict=False):
        # A model that knows nothing may score borrowed words as high as own ones, and then there is nothing to fit.
        assert row.startswith(f"| `{name}` |") and ("**" in row or "a calibration cannot be fitted" in row)
    assert "open_clip:tyni" in more[-1] and "did you mean" in more[-1]
    assert len(more) == len(others) + 1


def test_the_table_needs_scenes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("resvg_py")
    with pytest.raises(SystemExit):
        example("calibration_table").main(["open_clip:tiny", "--scenes", "0"])
    assert "--scenes must be 1 or more, not 0" in capsys.readouterr().err
