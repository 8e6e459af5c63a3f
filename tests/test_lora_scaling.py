"""Scaling of LoRA: the weights lie on the line between the original and the trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="LoRA needs peft")
pytest.importorskip("open_clip", reason="needs open_clip_torch")
pytest.importorskip("transformers", reason="needs transformers")

from ttd_plugins import export_backbone, load, load_lora, save_lora
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.lora import scale_lora, scaled_lora

BACKBONES = ("open_clip:tiny", "eva_clip:tiny", "siglip:tiny", "openai_clip:tiny")


def with_lora(name: str) -> Any:
    backbone = load(name, lora=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.lora_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return backbone


@pytest.mark.parametrize("name", BACKBONES)
def test_merged_weights_are_the_interpolation(name: str) -> None:
    original = {key: value.clone() for key, value in load(name).model.state_dict().items()}
    trained = with_lora(name).merge().state_dict()
    assert any(not torch.equal(trained[key], original[key]) for key in original)
    for factor in (0.0, 0.4, 1.0, 1.5):
        backbone = with_lora(name)
        scale_lora(backbone, factor)
        scaled = backbone.merge().state_dict()
        for key, value in original.items():
            expected = value + factor * (trained[key] - value)
            torch.testing.assert_close(scaled[key], expected, atol=1e-6, rtol=1e-5, msg=f"{key} at {factor}")


def test_the_scale_is_saved_with_the_lora(tmp_path: Path) -> None:
    backbone = with_lora("open_clip:tiny")
    before = [parameter.clone() for parameter in backbone.lora_parameters()]
    scale_lora(backbone, 0.5)
    save_lora(backbone, tmp_path)
    again = load_lora(load("open_clip:tiny"), tmp_path)
    found = again.lora_parameters()
    assert all(torch.equal(a, b) for a, b in zip(found, backbone.lora_parameters(), strict=True))
    assert any(torch.equal(a, b) for a, b in zip(found, before, strict=True))
    assert any(torch.equal(a, 0.5 * b) for a, b in zip(found, before, strict=True))


@pytest.mark.parametrize("factor", [-0.1, float("nan"), float("inf")])
def test_other_factors_are_refused(factor: float) -> None:
    backbone = with_lora("open_clip:tiny")
    before = [parameter.clone() for parameter in backbone.lora_parameters()]
    with pytest.raises(InputError, match="must be a number of 0 or more"):
        scale_lora(backbone, factor)
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.lora_parameters(), strict=True))


def test_a_backbone_without_lora_is_refused() -> None:
    with pytest.raises(TTDError, match="open_clip:tiny@embedded has no LoRA to scale"):
        scale_lora(load("open_clip:tiny"), 0.5)


def test_an_export_is_scaled_and_leaves_the_backbone_as_it_was(tmp_path: Path) -> None:
    backbone = with_lora("open_clip:tiny")
    before = [parameter.clone() for parameter in backbone.lora_parameters()]
    export_backbone(backbone, tmp_path / "half", lora_scale=0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.lora_parameters(), strict=True))
    assert "lora_scale" in (tmp_path / "half" / "README.md").read_text()
    scale_lora(backbone, 0.5)
    expected = backbone.merge().state_dict()
    found = load(f"open_clip:local-dir:{tmp_path / 'half'}").model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_block_scales_for_its_time_alone() -> None:
    backbone = with_lora("open_clip:tiny")
    before = [parameter.clone() for parameter in backbone.lora_parameters()]
    during: list[torch.Tensor] = []

    def fail() -> None:
        with scaled_lora(backbone, 0.3):
            during.extend(parameter.clone() for parameter in backbone.lora_parameters())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not all(torch.equal(a, b) for a, b in zip(before, during, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.lora_parameters(), strict=True))
    with scaled_lora(load("open_clip:tiny"), 1.0):
        pass
