"""The contract's switch for gradient checkpointing: it acts on every family's models, and changes no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from toy_backbone import toy

from ttd_plugins import TTD, load
from ttd_plugins.adapter import API_VERSION, DenseAdapter
from ttd_plugins.errors import UnsupportedModelError

NEEDS = {"open_clip": "open_clip", "eva_clip": "open_clip", "siglip": "transformers", "openai_clip": "transformers"}


def gradient(name: str, enabled: bool) -> tuple[torch.Tensor, int]:
    """The whole gradient of a batch, and how often a norm was run."""
    torch.manual_seed(0)
    backbone = load(f"{name}:tiny@random")
    backbone.set_grad_checkpointing()
    backbone.set_grad_checkpointing(enabled)
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    for module in backbone.model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(count)
    ttd = TTD(backbone, text_activation_checkpointing=False).train()
    images = torch.randn(2, 3, *backbone.description.image_size, generator=torch.Generator().manual_seed(1))
    ttd(images, ["a dog on grass", "cat"]).loss.backward()
    return torch.cat([p.grad.flatten() for p in backbone.model.parameters() if p.grad is not None]), calls[0]


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.filterwarnings("error::FutureWarning")
def test_blocks_are_run_again_and_gradients_are_the_same(name: str) -> None:
    pytest.importorskip(NEEDS[name])
    plain, once = gradient(name, False)
    again, twice = gradient(name, True)
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)
    # The blocks of both towers, and not the norms at their ends.
    assert twice >= 1.6 * once


def test_it_is_a_method_with_a_body_so_that_the_contract_keeps_its_version() -> None:
    assert API_VERSION == 1 and "set_grad_checkpointing" not in DenseAdapter.__abstractmethods__
    with pytest.raises(UnsupportedModelError, match="has no switch for activation checkpointing"):
        toy().set_grad_checkpointing()
