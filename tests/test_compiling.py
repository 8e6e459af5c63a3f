"""Compiled image blocks give what they gave before, are named as before, and can be taken back."""

from __future__ import annotations

from copy import deepcopy

import pytest

pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")
pytest.importorskip("transformers", reason="needs the extra 'siglip'")
pytest.importorskip("peft", reason="needs the extra 'lora'")

import torch
from helpers_compiling import compile_counted
from test_speed import small
from toy_backbone import toy

from ttd_plugins import TTD
from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.errors import MissingDependencyError, UnsupportedModelError
from ttd_plugins.training.compiling import compile_image_blocks, uncompiled

CAPTIONS = ["a brown dog on the wet grass", "two children fly a kite over the beach"]


def step(adapter: DenseAdapter) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(2, 3, *adapter.description.image_size, generator=torch.Generator().manual_seed(0))
    adapter.zero_grad()
    adapter.train()
    loss = TTD(adapter)(images, CAPTIONS).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])


COMPILED = ["open_clip", "eva02", "siglip", "transformers_clip", "transformers_siglip", "original_vit"]


@pytest.mark.parametrize("kind", COMPILED)
def test_a_step_is_the_same(kind: str) -> None:
    adapter = small(kind)
    names, (loss, gradient) = list(adapter.state_dict()), step(adapter)
    # Dynamo traces as it would for inductor, but needs no C compiler.
    compile_image_blocks(adapter, backend="aot_eager")
    compiled_loss, compiled_gradient = step(adapter)
    torch.testing.assert_close(compiled_loss, loss, atol=1e-5, rtol=1e-5)
    assert (compiled_gradient - gradient).norm() <= 1e-4 * gradient.norm()
    assert list(adapter.state_dict()) == names
    assert all(block._compiled_call_impl is None for block in deepcopy(adapter).tower_blocks("image"))


def test_compiled_code_runs_and_can_be_left_out_and_taken_back() -> None:
    adapter = small("open_clip")
    since = compile_counted(adapter.tower_blocks("image"))
    step(adapter)
    # The last block is run in parts.
    assert since() == len(adapter.tower_blocks("image")) - 1
    with uncompiled(adapter.model):
        step(adapter)
        assert since() == 0
    step(adapter)
    assert since() > 0


def test_what_was_compiled_before_is_compiled_as_it_was_once_it_is_taken_back() -> None:
    adapter = small("open_clip")
    since = compile_counted(adapter.tower_blocks("image"))
    take_back = compile_image_blocks(adapter, backend="eager")
    step(adapter)
    assert since() == 0
    take_back()
    step(adapter)
    assert since() > 0


def test_what_cannot_be_compiled_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError, match=r"names no blocks .* nothing can be compiled"):
        compile_image_blocks(toy())
    with pytest.raises(UnsupportedModelError, match="names no blocks"):
        compile_image_blocks(small("original_resnet"))
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(MissingDependencyError, match="needs a C compiler"):
        compile_image_blocks(small("open_clip"))
