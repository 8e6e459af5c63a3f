"""The anchor: the distance of the global embeddings to those of the frozen model, against loops, and its promises."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slow_reference as slow
import torch
from helpers_training import MemoryPairs, log_of, run_toy, toy_config
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import assert_caught, mutant
from toy_backbone import ToyAdapter, toy, toy_images

from ttd_plugins.comparison.options import CompareOptions
from ttd_plugins.engine import TTD, TTDOptions
from ttd_plugins.errors import InputError
from ttd_plugins.method import losses
from ttd_plugins.training.scene_tuning import SceneTuning
from ttd_plugins.training.stop_signals import TrainingStoppedError

CAPTIONS = ["a dog on grass", "red kite and blue sky", "", "one owl"]
KINDS = ["embeddings", "similarities"]


def moved(backbone: ToyAdapter, by: float = 0.2) -> None:
    """Move all weights away from where they are, as training does."""
    with torch.no_grad():
        for number, parameter in enumerate(backbone.parameters()):
            parameter.mul_(1 + by * (torch.arange(parameter.numel()) + number).sin().view_as(parameter))


def embeddings(backbone: ToyAdapter, images: torch.Tensor, captions: list[str]) -> tuple[Any, Any]:
    """Pooled embeddings and caption embeddings, each image and each caption by itself."""
    with torch.no_grad():
        pooled = [backbone.encode_image(image[None]).pooled for image in images]
        texts = [backbone.encode_text(backbone.tokenize([caption]).ids) for caption in captions]
    return [one[0].tolist() for one in pooled if one is not None], [one[0].tolist() for one in texts]


def check_anchor(kind: Any, seed: int, *, sigmoid: bool = False, teacher: Any = "self", count: int = 4) -> None:
    backbone = toy(seed, dtype=torch.float64, sigmoid=sigmoid)
    images, captions = toy_images(count, seed=seed).double(), CAPTIONS[:count]
    ttd = TTD(backbone, anchor_weight=2.5, anchor=kind, teacher=teacher)
    frozen = embeddings(backbone, images, captions)
    bias = backbone.logit_bias()
    settings_of_frozen = {
        "scale": backbone.logit_scale().item(),
        "bias": 0.0 if bias is None else bias.item(),
        "form": backbone.description.logits,
    }
    moved(backbone)
    output = ttd(images, captions)
    expected = slow.anchor(*embeddings(backbone, images, captions), *frozen, kind=kind, **settings_of_frozen)
    assert output.losses["anchor"].item() == pytest.approx(expected, rel=1e-7, abs=1e-10)
    weights = {"tag": 1.0, "distill": 10.0, "contrastive": 1.0, "anchor": 2.5}
    total = sum(weights[name] * float(part) for name, part in output.losses.items())
    assert output.loss.item() == pytest.approx(total, rel=1e-9)


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
    sigmoid=st.booleans(),
    teacher=st.sampled_from(["self", "frozen", "ema"]),
    count=st.integers(1, 4),
)
def test_the_anchor_agrees_with_loops(kind: str, seed: int, sigmoid: bool, teacher: str, count: int) -> None:
    check_anchor(kind, seed, sigmoid=sigmoid, teacher=teacher, count=count)


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("embeddings", "(text - frozen_text).square().sum(-1)) / 2", "(text - frozen_text).square().mean(-1)) / 2"),
        ("embeddings", "(image - frozen_image)", "(image - frozen_text)"),
        ("similarities", "_softmax_divergence(logits.T, frozen.T)", "_softmax_divergence(logits, frozen)"),
        ("similarities", "_softmax_divergence(logits, frozen)", "_softmax_divergence(frozen, logits)"),
    ],
)
def test_a_broken_anchor_is_noticed(kind: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        for seed in range(3):
            check_anchor(kind, seed)

    check()
    monkeypatch.setattr(losses, "anchor_distance", mutant(losses.anchor_distance, old, new))
    assert_caught(check)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_gradients_are_right_and_reach_both_towers_only(kind: Any, sigmoid: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    form: Any = "sigmoid" if sigmoid else "softmax"

    def distance(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return losses.anchor_distance(image, text, *values[2:], kind=kind, scale=3.0, bias=-1.0, form=form).mean()

    assert torch.autograd.gradcheck(distance, values[:2])
    distance(*values[:2]).backward()
    assert [value.grad is not None for value in values] == [True, True, False, False]
    backbone = toy(1)
    ttd = TTD(backbone, tag_weight=0, distill_weight=0, contrastive_weight=0, anchor_weight=1.0, anchor=kind)
    moved(backbone)
    ttd(toy_images(3), CAPTIONS[:3]).loss.backward()
    used = {name for name, one in backbone.model.named_parameters() if one.grad is not None and one.grad.any()}
    assert {"pool_head.weight", "text_head.weight"} <= used
    assert not any(name.startswith("logit") for name in used)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher", ["self", "frozen", "ema"])
def test_without_training_the_anchor_is_zero_and_has_no_gradient(kind: Any, teacher: Any) -> None:
    for backbone in (toy(2, dtype=torch.float64), toy(2, dtype=torch.float64, sigmoid=True)):
        backbone.add_lora(rank=2)
        ttd = TTD(backbone, anchor_weight=1.0, anchor=kind, teacher=teacher, contrastive_weight=0, tag_weight=0,
                  distill_weight=0)  # fmt: skip
        output = ttd(toy_images(3).double(), CAPTIONS[:3])
        output.loss.backward()
        assert output.losses["anchor"].item() == pytest.approx(0, abs=1e-12)
        for parameter in ttd.parameters():
            assert parameter.grad is None or parameter.grad.abs().max() < 1e-12


def test_the_frozen_model_is_the_backbone_without_lora_whatever_is_trained_later() -> None:
    backbone = toy(4, dtype=torch.float64)
    bare = copy.deepcopy(backbone)
    backbone.add_lora(rank=2)
    with torch.no_grad():
        for parameter in backbone.lora_parameters():
            parameter.add_(0.3)
    images = toy_images(3).double()
    found = TTD(backbone, anchor_weight=1.0)(images, CAPTIONS[:3]).losses["anchor"].item()
    expected = slow.anchor(
        *embeddings(backbone, images, CAPTIONS[:3]), *embeddings(bare, images, CAPTIONS[:3]),
        kind="embeddings", scale=1.0, bias=0.0, form="softmax",
    )  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-7)
    assert found > 1e-4


def test_after_full_training_a_new_engine_anchors_to_the_original_weights() -> None:
    backbone = toy(4, dtype=torch.float64)
    original = copy.deepcopy(backbone)
    backbone.snapshot_weights()
    moved(backbone)
    images = toy_images(3).double()
    found = TTD(backbone, anchor_weight=1.0)(images, CAPTIONS[:3]).losses["anchor"].item()
    expected = slow.anchor(
        *embeddings(backbone, images, CAPTIONS[:3]), *embeddings(original, images, CAPTIONS[:3]),
        kind="embeddings", scale=1.0, bias=0.0, form="softmax",
    )  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-7)


def test_the_pass_of_a_frozen_teacher_is_reused_and_other_teachers_need_one_more() -> None:
    ttd = TTD(toy(), teacher="frozen", anchor_weight=1.0)
    ttd(toy_images(2), ["a dog", "dog"])
    assert ttd.teacher is not None
    assert ttd._anchor == (ttd.teacher,)
    assert [pooled for _, pooled in ttd.teacher.images] == [True]
    assert len(ttd.teacher.texts) == 1
    for teacher in ("self", "ema"):
        ttd = TTD(toy(), teacher=teacher, anchor_weight=1.0)
        ttd(toy_images(2), ["a dog", "dog"])
        (frozen,) = ttd._anchor
        assert frozen is not ttd.teacher
        assert [pooled for _, pooled in frozen.images] == [True]
        assert frozen.tokenized == [["a dog", "dog"]]  # captions alone
    assert TTD(toy())._anchor == ()


def test_the_frozen_model_is_not_saved_trained_or_moved_by_the_average() -> None:
    backbone = toy()
    ttd = TTD(backbone, anchor_weight=1.0, teacher="ema", ema_decay=0.5)
    assert set(ttd.state_dict()) == set(TTD(toy(), teacher="ema").state_dict())
    (frozen,) = ttd._anchor
    before = copy.deepcopy(frozen.state_dict())
    moved(backbone)
    ttd.train()
    backbone.model.train()
    ttd(toy_images(2), CAPTIONS[:2]).loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen.training


@pytest.mark.parametrize("anchor", KINDS)
def test_it_holds_the_embeddings_of_a_training(anchor: Any) -> None:
    def drift(**options: Any) -> float:
        backbone, images = toy(5), toy_images(4)
        start = TTD(backbone, anchor_weight=1.0, anchor=anchor)
        ttd = TTD(backbone, **options)
        optimizer = torch.optim.Adam(backbone.parameters(), lr=1e-2)
        for _ in range(15):
            optimizer.zero_grad()
            ttd(images, CAPTIONS).loss.backward()
            optimizer.step()
        return start(images, CAPTIONS).losses["anchor"].item()

    assert drift(anchor_weight=30.0, anchor=anchor) < 0.5 * drift()


def test_a_text_cache_changes_no_anchor() -> None:
    results = []
    for size in (0, 100):
        backbone = toy(1)
        ttd = TTD(backbone, anchor_weight=1.0, text_cache_size=size)
        moved(backbone)
        results.append([ttd(toy_images(4), CAPTIONS).losses["anchor"].item() for _ in range(2)])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)


def test_a_run_logs_it_and_resumes_bitwise(tmp_path: Path) -> None:
    config = toy_config(ttd={"anchor_weight": 3.0, "anchor": "similarities"}, optimizer={"steps": 4})
    whole = run_toy(tmp_path / "whole", config, backbone=toy())
    anchors = [row["anchor"] for row in log_of(tmp_path / "whole") if "loss" in row]
    assert len(anchors) == 4
    assert anchors[0] < 1e-6 < anchors[-1]

    stopped = MemoryPairs()
    stopped.on_batch = lambda epoch, batch: os.kill(os.getpid(), signal.SIGTERM) if batch == 2 else None
    with pytest.raises(TrainingStoppedError):
        run_toy(tmp_path / "part", config, backbone=toy(), pairs=stopped)
    resumed = run_toy(tmp_path / "part", config, backbone=toy(), resume=True)
    expected = whole.backbone.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.backbone.model.state_dict().items())


def test_the_control_has_no_anchor() -> None:
    tuning = SceneTuning(ttd=TTDOptions(anchor_weight=2.0, threshold=0.3))
    expected = TTDOptions(threshold=0.3, tag_weight=0.0, distill_weight=0.0)
    assert tuning.control().ttd == expected
    options = CompareOptions(("open_clip:tiny",), ttd=TTDOptions(anchor_weight=2.0, threshold=0.3))
    assert options.ttd_of_arm("control") == expected
    assert options.ttd_of_arm("after").anchor_weight == 2.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"anchor_weight": -1.0}, "anchor_weight must be 0 or more, not -1.0"),
        ({"anchor": "patches"}, "unknown value of anchor 'patches'; known: embeddings, similarities"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        TTDOptions(**options)
    assert said in str(caught.value)
