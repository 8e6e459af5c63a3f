"""Hundreds of tags an image: losses and gradients stay the same, and what a step stores grows with the maps alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from toy_backbone import toy, toy_images

import ttd_plugins.method.losses as losses
import ttd_plugins.method.text_embeddings as texts
from ttd_plugins import TTD
from ttd_plugins.method.losses import map_distance
from ttd_plugins.options import Calibration

CAPTIONS = ["a dog and a cat", "a kite over the sea", "grass", "a boat"]


def tags_of(count: int) -> list[list[str]]:
    """``count`` tags of each caption, of one to three words, some of them shared."""
    words = ["red", "old", "wet dog", "tall grass hill"]
    return [[f"{words[n % 4]} {n}{'' if n % 5 else f' {image}'}" for n in range(count)] for image in range(4)]


def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_POSITIONS", 64)
    monkeypatch.setattr(losses, "MAX_MAP_VALUES", 16 * 7)


def step(options: dict[str, Any], count: int = 40, dropout: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    backbone = toy(dropout=dropout).train() if dropout else toy()
    ttd = TTD(backbone, **options)
    output = ttd(toy_images(4), CAPTIONS, tags_of(count))
    output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distance": "mse", "activation": "minmax"},
        {"distance": "l1", "activation": "none"},
        {"teacher": "frozen"},
        {"tag_weight": 0.0},
    ],
)
def test_chunks_have_the_loss_and_the_gradients_of_one_piece(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    loss, gradients = step(options)
    limited(monkeypatch)
    chunked, found = step(options)
    torch.testing.assert_close(chunked, loss, atol=1e-6, rtol=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_the_distance_of_chunks_is_that_of_each_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "MAX_MAP_VALUES", 3 * 9)
    maps, targets = torch.randn(10, 9), torch.rand(10, 9)
    with torch.no_grad():
        expected = torch.cat([map_distance(maps[n : n + 1], targets[n : n + 1]) for n in range(10)])
        torch.testing.assert_close(map_distance(maps, targets, calibration=Calibration()), expected)


def stored(count: int) -> int:
    """Bytes that a step stores for its backward pass."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    output: Any
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = TTD(toy())(toy_images(4), CAPTIONS, tags_of(count))
    assert output.loss.requires_grad
    return sum(seen.values())


def test_a_step_stores_tokens_and_maps_of_many_tags_and_nothing_of_the_towers_depth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = {count: stored(count) for count in (128, 512)}
    limited(monkeypatch)
    few, many = stored(128), stored(512)
    # Linear in the tags, and below what the whole graph stores.
    assert many < 4.3 * few
    assert few < 0.8 * plain[128] and many < 0.8 * plain[512]


def test_a_usual_step_is_not_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a small batch needs no chunks")

    monkeypatch.setattr(texts, "checkpoint", refuse)
    monkeypatch.setattr(losses, "checkpoint", refuse)
    step({}, count=16)
