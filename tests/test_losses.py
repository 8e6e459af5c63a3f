"""Distances of maps and contrastive terms agree with loops; gradients reach what is trained and nothing else."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import slow_reference as slow
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import assert_caught, mutant

from ttd_plugins.adapter import Calibration
from ttd_plugins.errors import InputError
from ttd_plugins.method import losses

modest = settings(deadline=None, max_examples=40)
CALIBRATION = Calibration(7.0, -1.5)
PAIRS = [
    (distance, activation)
    for distance in get_args(losses.Distance)
    for activation in get_args(losses.Activation)
    if (distance, activation) != ("bce", "none")
]
seeds = st.integers(0, 2**32 - 1)


def maps_and_targets(seed: int, count: int, patches: int, *, coarse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and targets ``[count, patches]``; where ``coarse``, with ties, constant maps, and targets 0 and 1."""
    rng = np.random.default_rng(seed)
    maps, targets = rng.uniform(-1, 1, (count, patches)), rng.uniform(0, 1, (count, patches))
    if coarse:
        maps, targets = np.round(2 * maps) / 2, np.round(targets)
        maps[: count // 3] = 0.25
    return torch.from_numpy(maps), torch.from_numpy(targets)


def check_distance(distance: str, activation: str, maps: torch.Tensor, targets: torch.Tensor) -> None:
    found = losses.map_distance(
        maps,
        targets,
        distance=distance,  # type: ignore[arg-type]
        activation=activation,  # type: ignore[arg-type]
        calibration=CALIBRATION,
    )
    assert found.shape == maps.shape[:1]
    expected = [
        slow.map_distance(one, target, distance, activation, CALIBRATION.scale, CALIBRATION.shift)
        for one, target in zip(maps.tolist(), targets.tolist(), strict=True)
    ]
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-9, atol=1e-12)


def check_contrastive(form: str, seed: int, batch: int, width: int, scale: float, bias: float | None) -> None:
    rng = np.random.default_rng(seed)
    image, text = torch.from_numpy(rng.standard_normal((2, batch, width)))
    found = losses.contrastive_loss(image, text, scale=scale, bias=bias, form=form)  # type: ignore[arg-type]
    expected = slow.contrastive(image.tolist(), text.tolist(), scale, bias or 0.0, form)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("distance", "activation"), PAIRS)
@modest
@given(seed=seeds, count=st.sampled_from([0, 1, 2, 5, 100]), patches=st.integers(1, 6), coarse=st.booleans())
def test_every_distance_agrees_with_its_loop(
    distance: str, activation: str, seed: int, count: int, patches: int, coarse: bool
) -> None:
    check_distance(distance, activation, *maps_and_targets(seed, count, patches, coarse=coarse))


@pytest.mark.parametrize("form", get_args(losses.LogitForm))
@modest
@given(
    seed=seeds,
    batch=st.integers(1, 6),
    width=st.integers(1, 4),
    scale=st.floats(0.1, 100),
    bias=st.none() | st.floats(-12, 12),
)
def test_contrastive_terms_agree_with_their_loops(
    form: str, seed: int, batch: int, width: int, scale: float, bias: float | None
) -> None:
    check_contrastive(form, seed, batch, width, scale, bias)


@pytest.mark.parametrize(
    ("distance", "activation", "old", "new"),
    [
        ("mse", "none", "difference.square()", "difference"),
        ("mse", "none", 'if distance == "mse"', 'if distance == "l1"'),
        ("l1", "sigmoid", "torch.sigmoid(logits)", "logits"),
        ("bce", "sigmoid", "with_logits(logits, targets", "with_logits(logits, targets.round()"),
        ("bce", "sigmoid", "calibration or Calibration()", "Calibration()"),
        ("bce", "minmax", "(1 - targets) * (1 - maps).log()", "0 * maps"),
        ("mse", "minmax", "minmax_normalize(maps)", "maps"),
        ("bce", "minmax", "maps.clamp(1e-6, 1 - 1e-6)", "maps.clamp(1e-3, 1 - 1e-3)"),
    ],
)
def test_a_broken_distance_is_noticed(
    distance: str, activation: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check() -> None:
        for seed in range(4):
            check_distance(distance, activation, *maps_and_targets(seed, 3, 5))

    check()
    monkeypatch.setattr(losses, "map_distance", mutant(losses.map_distance, old, new))
    assert_caught(check)


@pytest.mark.parametrize(
    ("form", "old", "new"),
    [
        ("softmax", "F.cross_entropy(logits.T, labels)", "F.cross_entropy(logits, labels)"),
        ("softmax", "normalize(text)", "text"),
        ("softmax", "scale * normalize", "normalize"),
        ("sigmoid", "logits = logits + bias", "logits = logits - bias"),
        ("sigmoid", "sum(-1).mean()", "mean()"),
        ("sigmoid", "2 * torch.eye(len(logits), device=logits.device) - 1", "torch.eye(len(logits))"),
    ],
)
def test_a_broken_contrastive_term_is_noticed(form: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        check_contrastive(form, 0, 4, 3, 5.0, -2.0)

    check()
    monkeypatch.setattr(losses, "contrastive_loss", mutant(losses.contrastive_loss, old, new))
    assert_caught(check)


def check_siblings(form: str) -> None:
    """Pairs of one image are left out of each other's negatives, and stay in everybody else's."""
    rng = np.random.default_rng(4)
    image, text = torch.from_numpy(rng.standard_normal((2, 5, 3)))
    groups = torch.tensor([7, 2, 7, 7, 5])
    found = losses.contrastive_loss(image, text, scale=4.0, bias=-1.0, form=form, groups=groups)  # type: ignore[arg-type]
    cosine = (F.normalize(image) @ F.normalize(text).T).tolist()
    total = 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i and groups[j] != groups[i]]
        logits = [[4.0 * row[j] - 1.0 for j in range(5)] for row in cosine]
        if form == "softmax":
            rows = sum(np.exp(logits[i][j]) for j in [i, *others])
            columns = sum(np.exp(logits[j][i]) for j in [i, *others])
            total += (np.log(rows) + np.log(columns)) / 2 - logits[i][i]
        else:
            total += slow.softplus(-logits[i][i]) + sum(slow.softplus(logits[i][j]) for j in others)
    np.testing.assert_allclose(found, total / 5, rtol=1e-9)
    alone = losses.contrastive_loss(image, text, scale=4.0, bias=-1.0, form=form, groups=torch.arange(5))  # type: ignore[arg-type]
    plain = losses.contrastive_loss(image, text, scale=4.0, bias=-1.0, form=form)  # type: ignore[arg-type]
    assert alone == plain and plain != found


@pytest.mark.parametrize("form", get_args(losses.LogitForm))
def test_pairs_of_one_image_are_no_negatives_of_each_other(form: str) -> None:
    check_siblings(form)


@pytest.mark.parametrize(
    ("form", "old", "new"),
    [
        ("softmax", "masked_fill(siblings, -torch.inf)", "masked_fill(siblings, 0)"),
        ("sigmoid", "masked_fill(siblings, 0)", "masked_fill(siblings.T & False, 0)"),
        ("softmax", "false_negatives(groups, texts)", "false_negatives(groups, texts).logical_not()"),
        ("sigmoid", "false_negatives(groups, texts)", "false_negatives(groups * 0, texts)"),
    ],
)
def test_broken_siblings_are_noticed(form: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "contrastive_loss", mutant(losses.contrastive_loss, old, new))
    assert_caught(lambda: check_siblings(form))


def test_a_batch_of_siblings_alone_is_finite_with_its_gradient() -> None:
    for form in get_args(losses.LogitForm):
        image, text = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
        loss = losses.contrastive_loss(image, text, scale=10.0, form=form, groups=torch.zeros(3, dtype=torch.long))
        loss.backward()
        assert bool(torch.isfinite(loss)) and bool(torch.isfinite(image.grad).all())


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("distance", "activation"), PAIRS)
def test_gradients_of_maps_agree_with_finite_differences(distance: str, activation: str) -> None:
    for seed in range(3):
        maps, targets = maps_and_targets(seed, 3, 5)
        assert torch.autograd.gradcheck(
            lambda m, t=targets: losses.map_distance(m, t, distance=distance, activation=activation),
            (maps.requires_grad_(),),
        )


def check_targets_are_stopped(distance: str, activation: str) -> None:
    # The map is its own target, as in the method: without the stop, the gradient would have a second part.
    maps, _ = maps_and_targets(1, 2, 4)
    plain = maps.clone().requires_grad_()
    losses.map_distance(plain, maps.sigmoid(), distance=distance, activation=activation).sum().backward()
    own = maps.clone().requires_grad_()
    loss = losses.map_distance(own, own.sigmoid(), distance=distance, activation=activation).sum()
    loss.backward()
    assert own.grad is not None
    assert plain.grad is not None
    assert bool(plain.grad.any())
    torch.testing.assert_close(own.grad, plain.grad)


@pytest.mark.parametrize(("distance", "activation"), PAIRS)
def test_no_gradient_reaches_a_target(distance: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_targets_are_stopped(distance, activation)
    broken = mutant(losses.map_distance, "promote(targets.detach())", "promote(targets)")
    monkeypatch.setattr(losses, "map_distance", broken)
    assert_caught(lambda: check_targets_are_stopped(distance, activation))


@pytest.mark.parametrize("form", get_args(losses.LogitForm))
def test_contrastive_gradients_agree_with_finite_differences(form: str) -> None:
    rng = np.random.default_rng(0)
    image, text = (torch.from_numpy(rng.standard_normal((4, 3))).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, -1.0))
    assert torch.autograd.gradcheck(
        lambda i, t, s, b: losses.contrastive_loss(i, t, scale=s, bias=b, form=form), (image, text, scale, bias)
    )


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("distance", "activation"), PAIRS)
def test_distances_of_half_precision_maps_are_worked_out_in_float32(distance: str, activation: str) -> None:
    maps, targets = (part.bfloat16() for part in maps_and_targets(2, 4, 50))
    found = losses.map_distance(maps, targets, distance=distance, activation=activation)  # type: ignore[arg-type]
    assert found.dtype == torch.float32
    expected = losses.map_distance(maps.double(), targets.double(), distance=distance, activation=activation)  # type: ignore[arg-type]
    # In half precision the error would be some 1e-2; 1e-4 is lost where a min-max map reaches one.
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", get_args(losses.LogitForm))
def test_the_contrastive_term_is_worked_out_in_float32_under_autocast(form: str) -> None:
    image, text = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    expected = losses.contrastive_loss(image, text, scale=50.0, form=form)  # type: ignore[arg-type]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses.contrastive_loss(image, text, scale=50.0, form=form)  # type: ignore[arg-type]
        in_bfloat16 = losses.contrastive_loss(image.bfloat16(), text.bfloat16(), scale=50.0, form=form)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert found.dtype == in_bfloat16.dtype == torch.float32


def test_saturated_logits_stay_finite() -> None:
    maps = torch.tensor([[-1.0, 1.0]], requires_grad=True)
    steep = Calibration(1e4, 0.0)
    loss = losses.map_distance(maps, torch.tensor([[1.0, 0.0]]), calibration=steep)
    loss.sum().backward()
    assert maps.grad is not None
    assert loss.item() == pytest.approx(1e4)
    assert bool(torch.isfinite(maps.grad).all())


# Options -------------------------------------------------------------------------------------------------------------


def test_a_batch_of_one_pair_has_no_negatives() -> None:
    image, text = torch.randn(2, 1, 4)
    assert losses.contrastive_loss(image, text, scale=10.0).item() == 0.0
    logit = 10.0 * F.cosine_similarity(image, text).item() - 1
    found = losses.contrastive_loss(image, text, scale=10.0, bias=-1.0, form="sigmoid").item()
    assert found == pytest.approx(slow.softplus(-logit), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"distance": "kl"}, "unknown loss 'kl' on 'sigmoid' maps; distances: bce, mse, l1; activations: sigmoid"),
        ({"activation": "relu"}, "unknown loss 'bce' on 'relu' maps"),
        ({"activation": "none"}, "binary cross-entropy needs maps in"),
    ],
)
def test_unknown_options_of_a_distance_are_told(options: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        losses.map_distance(torch.zeros(1, 2), torch.zeros(1, 2), **options)  # type: ignore[arg-type]


def test_an_unknown_form_of_logits_is_told() -> None:
    with pytest.raises(InputError, match="unknown form of logits 'hinge'; known: softmax, sigmoid"):
        losses.contrastive_loss(torch.ones(2, 2), torch.ones(2, 2), scale=1.0, form="hinge")  # type: ignore[arg-type]
