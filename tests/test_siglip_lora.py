"""LoRA in SigLIP models: in both the pooled and the dense features, exact, and gone without a trace."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("open_clip")

import torch
from helpers_open_clip import assert_unchanged, snapshot
from helpers_siglip import CONTAINERS, pixels, rows, siglip_like_tokenizer, tiny, tiny_timm
from ttd_siglip.adapter import SiglipAdapter
from ttd_siglip.family import adapt
from ttd_siglip.siglip_modes import MODES

from ttd_plugins.errors import TTDError

both = pytest.mark.parametrize("container", CONTAINERS)


def with_lora(container: str, **options: Any) -> SiglipAdapter:
    """An adapter whose LoRA is away from its initial zero."""
    adapter = adapt(tiny(container), **options)
    adapter.add_lora(3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.lora_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapter


def features(adapter: SiglipAdapter) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        image = adapter.encode_image(pixels(2, 24, 40))
        return {"patches": image.patches, "pooled": image.pooled, "text": adapter.encode_text(rows())}


def test_targets_in_transformers_leave_the_pooling_head_out() -> None:
    adapter = adapt(tiny("transformers"))
    image, text = adapter.lora_targets("image"), adapter.lora_targets("text")
    assert len(image) == 3 * 6
    assert len(text) == 2 * 6
    assert all(name.startswith("vision_model.encoder.layers.") for name in image)
    assert all(name.startswith("text_model.encoder.layers.") for name in text)
    assert {name.rpartition(".")[2] for name in image} == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    adapter.dense = "value,last_block=value"
    gone = set(image) - set(adapter.lora_targets("image"))
    assert gone == {f"vision_model.encoder.layers.2.self_attn.{name}" for name in ("q_proj", "k_proj")}


def test_targets_in_timm_are_the_linear_layers_of_the_blocks() -> None:
    adapter = adapt(tiny("timm"))
    image, text = adapter.lora_targets("image"), adapter.lora_targets("text")
    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert set(image) == {f"visual.trunk.blocks.{i}.{name}" for i in range(3) for name in names}
    assert set(text) == {
        f"text.transformer.resblocks.{i}.{name}" for i in range(2) for name in ("attn", "mlp.c_fc", "mlp.c_proj")
    }
    custom = adapt(tiny_timm(text={"block_type": "custom"})).lora_targets("text")
    assert "text.transformer.resblocks.0.attn.out_proj" in custom


@both
@pytest.mark.parametrize("mode", MODES)
def test_every_lora_parameter_gets_a_gradient_from_pooled_and_from_dense(container: str, mode: str) -> None:
    adapter = with_lora(container, dense=mode)
    image_count = sum("lora_" in name for name, _ in adapter.tower_parameters("image"))
    assert image_count == 2 * len(adapter.lora_targets("image"))
    for kind in ("patches", "pooled"):
        adapter.model.zero_grad()
        getattr(adapter.encode_image(pixels()), kind).square().sum().backward()
        for name, parameter in adapter.tower_parameters("image"):
            if "lora_" in name:
                assert parameter.grad is not None, (kind, name)
                assert float(parameter.grad.abs().max()) > 0, (kind, name)
            else:
                assert parameter.grad is None, name
    adapter.model.zero_grad()
    adapter.encode_text(rows()).square().sum().backward()
    for name, parameter in adapter.tower_parameters("text"):
        if "lora_" in name:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name


@both
@pytest.mark.parametrize("mode", ["value", "value,last_block=value"])
def test_lora_changes_pooled_and_dense_alike(container: str, mode: str) -> None:
    """The parity of one patch holds under LoRA too, so the two cannot disagree."""
    plain, adapter = adapt(tiny(container), dense=mode), with_lora(container, dense=mode)
    for name, tensor in features(plain).items():
        assert not torch.allclose(tensor, features(adapter)[name], atol=1e-2), name
    with torch.no_grad():
        one = adapter.encode_image(pixels(2, 8, 8))
    torch.testing.assert_close(one.patches[:, 0, 0], one.pooled, atol=1e-5, rtol=1e-5)


@both
def test_merging_keeps_the_features(container: str) -> None:
    adapter = with_lora(container)
    before = features(adapter)
    model = adapter.merge()
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    for name, tensor in features(adapter).items():
        torch.testing.assert_close(tensor, before[name], atol=2e-5, rtol=1e-5)
    for name, tensor in features(adapt(model)).items():
        torch.testing.assert_close(tensor, before[name], atol=2e-5, rtol=1e-5)


@both
def test_unloading_leaves_no_trace(container: str) -> None:
    model = tiny(container)
    before = snapshot(model)
    adapter = adapt(model)
    adapter.add_lora(2)
    optimizer = torch.optim.SGD(adapter.lora_parameters(), lr=0.1)
    for _ in range(3):
        image = adapter.encode_image(pixels())
        loss = (
            image.patches.square().mean() + image.pooled.square().mean() + adapter.encode_text(rows()).square().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapter.unload()
    assert_unchanged(before, model)


@both
def test_lora_with_gradient_checkpointing_and_in_half_precision(container: str) -> None:
    model = tiny(container).to(torch.bfloat16).train()
    if container == "timm":
        model.set_grad_checkpointing(True)
    else:
        model.gradient_checkpointing_enable()
    adapter = adapt(model, last_block="value")
    adapter.add_lora(2)
    image = adapter.encode_image(pixels().requires_grad_())
    (image.patches.float().square().sum() + image.pooled.float().square().sum()).backward()
    raised = [p for name, p in adapter.tower_parameters("image") if "lora_B" in name]
    assert raised
    assert all(p.dtype == torch.float32 and p.grad is not None and float(p.grad.abs().max()) > 0 for p in raised)


@both
def test_lora_twice_is_refused(container: str) -> None:
    with pytest.raises(TTDError, match="has LoRA"):
        with_lora(container).add_lora(2)


@both
def test_ttd_trains_a_wrapped_model_and_gives_it_back(container: str) -> None:
    from ttd_plugins import TTD, wrap

    model = tiny(container)
    backbone = wrap(model, tokenizer=siglip_like_tokenizer(), lora=2)
    ttd = TTD(backbone)
    optimizer = torch.optim.AdamW(backbone.lora_parameters(), lr=1e-2)
    captions = ["a cat on the grass", "two red dog", "a photo of a cat and dog"]
    losses = []
    for _ in range(5):
        loss = ttd(pixels(3), captions).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tuned = backbone.merge()
    assert tuned is model
    assert not [name for name, _ in model.named_modules() if "lora" in name]
