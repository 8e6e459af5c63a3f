"""The loop: the loss falls, the schedule is the stated one, and what cannot go on is told in one sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_backbone import PATCH, SIDE, ToyAdapter, toy, toy_images

from ttd_plugins.embedded.scenes import Scene
from ttd_plugins.engine import TTD, TTDOptions
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.training import scene_tuning, strategies
from ttd_plugins.training.config import OptimizerConfig
from ttd_plugins.training.loop import StepReport, train_in_memory
from ttd_plugins.training.scene_tuning import SceneTuning, scene_batches, tune_on_scenes
from ttd_plugins.training.step import learning_rate_factor

QUICK = OptimizerConfig(learning_rate=0.02, weight_decay=0.0, warm_up=3)


def one_batch() -> tuple[Tensor, list[str]]:
    """Four pictures with a patch of a colour of their own each, and its name."""
    images = 0.1 * toy_images(4)
    for number, image in enumerate(images):
        image[number % 3, :PATCH, : 2 * PATCH] += 3.0 if number < 3 else -3.0
    return images, ["a red dog", "green grass", "the blue kite", "an owl"]


def repeated(times: int) -> Iterator[tuple[Tensor, list[str]]]:
    for _ in range(times):
        yield one_batch()


@pytest.mark.parametrize("teacher", ["self", "frozen", "ema"])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_the_loss_falls(teacher: Any, sigmoid: bool) -> None:
    reports = train_in_memory(TTD(toy(sigmoid=sigmoid), teacher=teacher), repeated(40), 40, QUICK)
    assert [report.step for report in reports] == list(range(1, 41))
    assert np.mean([r.loss for r in reports[-5:]]) < 0.9 * np.mean([r.loss for r in reports[:5]])
    assert all(math.isfinite(r.gradient_norm) and r.gradient_norm > 0 for r in reports)


def test_tag_and_caption_maps_come_closer_to_their_targets_without_the_contrastive_term() -> None:
    reports = train_in_memory(TTD(toy(), teacher="frozen", contrastive_weight=0.0), repeated(40), 40, QUICK)
    for name in ("tag", "distill"):
        assert reports[-1].losses[name] < reports[0].losses[name]
    assert all(set(report.losses) == {"tag", "distill"} for report in reports)


def test_a_report_tells_the_parts_of_the_loss() -> None:
    reports = train_in_memory(TTD(toy(), tag_weight=2.0, distill_weight=0.5), repeated(2), 2, QUICK)
    for report in reports:
        parts = report.losses
        assert report.loss == pytest.approx(2 * parts["tag"] + 0.5 * parts["distill"] + parts["contrastive"], rel=1e-5)
        assert report.statistics["tags_per_caption"] == 7 / 4


def test_every_step_is_told_as_it_is_done() -> None:
    seen: list[StepReport] = []
    reports = train_in_memory(TTD(toy()), repeated(9), 3, QUICK, on_step=seen.append)
    assert seen == reports
    assert len(reports) == 3


def test_the_engine_trains_in_training_mode_and_ends_in_evaluation_mode() -> None:
    ttd = TTD(toy(dropout=0.1))
    found: list[bool] = []
    train_in_memory(ttd, repeated(2), 2, QUICK, on_step=lambda _: found.append(ttd.backbone.model.dropout.training))
    assert found == [True, True]
    assert not any(module.training for module in ttd.modules())


def test_only_what_requires_a_gradient_is_moved() -> None:
    ttd = TTD(toy())
    for _, parameter in ttd.backbone.tower_parameters("text"):
        parameter.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in ttd.named_parameters()}
    train_in_memory(ttd, repeated(3), 3, QUICK)
    for name, parameter in ttd.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name


# Schedule and optimiser ----------------------------------------------------------------------------------------------


def test_the_schedule_warms_up_and_falls_as_a_cosine() -> None:
    found = [learning_rate_factor(step, 10, 4) for step in range(10)]
    expected = [0.25, 0.5, 0.75, 1.0] + [0.5 + 0.5 * math.cos(math.pi * k / 6) for k in range(6)]
    assert found == pytest.approx(expected)
    assert found[4] == 1.0
    assert learning_rate_factor(7, 10, 4) == pytest.approx(0.5)
    assert learning_rate_factor(10, 10, 4) == pytest.approx(0.0)


@pytest.mark.parametrize(("steps", "warm_up"), [(1, 0), (1, 1), (5, 0), (5, 5), (3, 20), (200, 20)])
def test_the_schedule_is_above_zero_at_every_step_and_never_above_one(steps: int, warm_up: int) -> None:
    factors = [learning_rate_factor(step, steps, warm_up) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:warm_up] == sorted(factors[:warm_up])
    assert factors[warm_up:] == sorted(factors[warm_up:], reverse=True)


def test_the_optimiser_gets_the_schedule_and_clipped_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    norms: list[float] = []
    decays: list[tuple[float, float]] = []

    class Recorder(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            matrices, vectors = self.param_groups
            assert matrices["lr"] == vectors["lr"]
            rates.append(matrices["lr"])
            decays.append((matrices["weight_decay"], vectors["weight_decay"]))
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norms.append(math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)))
            return super().step(closure)

    monkeypatch.setattr(strategies.torch.optim, "AdamW", Recorder)
    options = OptimizerConfig(learning_rate=0.5, weight_decay=0.3, warm_up=2, clip_norm=0.01)
    reports = train_in_memory(TTD(toy()), repeated(6), 6, options)
    assert rates == pytest.approx([0.5 * learning_rate_factor(step, 6, 2) for step in range(6)])
    assert decays == [(0.3, 0.0)] * 6
    assert norms == pytest.approx([min(0.01, report.gradient_norm) for report in reports], rel=1e-3)
    assert max(report.gradient_norm for report in reports) > 0.01, "the norm is told as it was before clipping"


# What cannot go on ---------------------------------------------------------------------------------------------------


def test_too_few_batches_are_told() -> None:
    with pytest.raises(TTDError, match="the data ended after 2 batches, and 3 steps were requested"):
        train_in_memory(TTD(toy()), repeated(2), 3, QUICK)


def test_nothing_to_train_is_told() -> None:
    ttd = TTD(toy())
    ttd.requires_grad_(False)
    with pytest.raises(TTDError, match="no parameter of the backbone requires a gradient"):
        train_in_memory(ttd, repeated(1), 1, QUICK)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_told_before_it_spoils_the_weights(value: float) -> None:
    ttd = TTD(toy())
    images, captions = one_batch()
    spoilt = images.clone()
    spoilt[0, 0, 0, 0] = value
    kept: list[list[Tensor]] = []

    def keep(_: StepReport) -> None:
        kept.append([p.detach().clone() for p in ttd.parameters()])

    with pytest.raises(TTDError, match=r"^the loss of step 2 is nan; lower the learning rate$"):
        train_in_memory(ttd, [(images, captions), (spoilt * value, captions)], 2, QUICK, on_step=keep)
    assert len(kept) == 1
    assert all(torch.equal(a, b) for a, b in zip(kept[0], ttd.parameters(), strict=True))


# Fine-tuning on scenes -----------------------------------------------------------------------------------------------


class FakeScenes:
    """Scenes of noise in place of the generated ones, with a record of what was asked for."""

    asked: list[tuple[Any, ...]]

    def __init__(self, split: str, length: int, *, seed: int, side: int, bare_captions: float) -> None:
        FakeScenes.asked.append((split, length, seed, side, bare_captions))
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        rng = np.random.default_rng([self.seed, index])
        image = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        return Scene(image, f"a dog {index} on grass", {"dog": image[..., 0] > 128}, ("dog",), ("grass",))


@pytest.fixture(autouse=True)
def fake_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeScenes.asked = []
    monkeypatch.setattr(scene_tuning, "Scenes", FakeScenes)


def test_batches_of_scenes_are_consecutive_and_a_short_rest_is_left_out() -> None:
    backbone = toy()
    batches = list(scene_batches(FakeScenes("train", 8, seed=0, side=SIDE, bare_captions=0.0), 3, backbone))  # type: ignore[arg-type]
    assert [captions for _, captions in batches] == [
        [f"a dog {index} on grass" for index in part] for part in ((0, 1, 2), (3, 4, 5))
    ]
    assert all(images.shape == (3, 3, SIDE, SIDE) for images, _ in batches)


def state(backbone: ToyAdapter) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in backbone.model.state_dict().items()}


def test_full_tuning_moves_both_towers_and_the_same_seed_gives_the_same_weights() -> None:
    tuning = SceneTuning(steps=3, batch_size=2, rank=0, optimizer=QUICK)
    tuned = []
    for seed in (0, 0, 1):
        backbone = toy()
        backbone.requires_grad_(False)
        before = state(backbone)
        reports = tune_on_scenes(backbone, SceneTuning(**(tuning.__dict__ | {"seed": seed})))
        assert len(reports) == 3
        tuned.append(state(backbone))
        for tower in ("image", "text"):
            for name, _ in backbone.tower_parameters(tower):  # type: ignore[arg-type]
                assert not torch.equal(tuned[-1][name], before[name]), name
        assert torch.equal(tuned[-1]["log_scale"], before["log_scale"])
    assert all(torch.equal(tuned[0][name], tuned[1][name]) for name in tuned[0])
    assert not all(torch.equal(tuned[0][name], tuned[2][name]) for name in tuned[0])
    assert FakeScenes.asked == [("train", 6, 1000, SIDE, 0.0)] * 2 + [("train", 6, 1001, SIDE, 0.0)]


def test_lora_leaves_the_base_weights_alone_and_its_seed_is_the_tunings() -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    tuned = []
    for _ in range(2):
        backbone = toy()
        before = state(backbone)
        tune_on_scenes(backbone, SceneTuning(steps=3, batch_size=2, rank=2, optimizer=QUICK))
        assert backbone.has_lora
        tuned.append([p.detach().clone() for p in backbone.lora_parameters()])
        assert all(bool(p.any()) for p in tuned[-1])
        backbone.unload()
        assert all(torch.equal(value, before[name]) for name, value in state(backbone).items())
    assert all(torch.equal(a, b) for a, b in zip(*tuned, strict=True))


def test_tuning_leaves_the_generators_of_the_caller_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tune_on_scenes(toy(dropout=0.3), SceneTuning(steps=2, batch_size=2, rank=0, optimizer=QUICK))
    assert torch.equal(torch.rand(3), expected)


def test_the_control_differs_in_the_two_weights_alone() -> None:
    tuning = SceneTuning(steps=4, batch_size=3, rank=2, seed=7, ttd=TTDOptions(contrastive_weight=0.5, threshold=0.3))
    control = tuning.control()
    assert control.ttd == TTDOptions(contrastive_weight=0.5, threshold=0.3, tag_weight=0.0, distill_weight=0.0)
    different = {name for name in tuning.as_dict() if getattr(tuning, name) != getattr(control, name)}
    assert different == {"ttd"}
    reports = tune_on_scenes(toy(), SceneTuning(steps=2, batch_size=2, rank=0, optimizer=QUICK).control())
    assert all(set(report.losses) == {"contrastive"} for report in reports)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": 1}, {"rank": -1}])
def test_settings_that_cannot_work_are_told(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="steps must be 1 or more, batch_size 2 or more and rank 0 or more"):
        SceneTuning(**wrong)
