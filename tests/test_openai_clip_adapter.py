"""The openai_clip adapters: features, text, LoRA and claims of the three containers."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from helpers_openai_clip import (
    BUILDS,
    CONTEXT,
    EMBED,
    VITS,
    OldModel,
    Words,
    assert_unchanged,
    convert_weights,
    cosine_gap,
    library_image,
    library_text,
    original_resnet,
    original_vit,
    pixels,
    pixels_of,
    reference_cells,
    reference_dense,
    snapshot,
    token_rows,
    transformers_clip,
)
from torch import nn
from ttd_openai_clip import plugin
from ttd_openai_clip.family import OpenAICLIPFamily

from ttd_plugins.errors import BackboneNameError, ImageSizeError, TTDError, UnsupportedModelError
from ttd_plugins.toolkit.dense import DenseMode

FAMILY = OpenAICLIPFamily()
BUILD = pytest.mark.parametrize("build", BUILDS)


@BUILD
def test_pooled_and_text_are_the_librarys_own(build: str) -> None:
    model = BUILDS[build]()
    adapter = FAMILY.wrap(model)
    rows = token_rows([2, 5, 6])
    with torch.no_grad():
        pooled = adapter.encode_image(pixels_of(build)).pooled
        torch.testing.assert_close(pooled, library_image(model, pixels_of(build)), atol=1e-5, rtol=1e-5)
        for length in (6, 9, CONTEXT):
            text = adapter.encode_text(rows[:, :length])
            torch.testing.assert_close(text, library_text(model, rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", VITS)
@pytest.mark.parametrize("attention", ["value", "plain", "qq", "kk", "qq+kk", "kk+window"])
@pytest.mark.parametrize(("residual", "ffn"), [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_every_mode_equals_its_formula(build: str, attention: Any, residual: bool, ffn: bool, size: Any) -> None:
    model = BUILDS[build]()
    adapter = FAMILY.wrap(model, dense=DenseMode(attention, residual, ffn, window_std=1.5))
    with torch.no_grad():
        expected = reference_dense(model, pixels(2, *size), attention, residual, ffn, std=1.5)
        torch.testing.assert_close(adapter.encode_image(pixels(2, *size)).patches, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [(2, 2), (1, 3)])
def test_cells_of_a_resnet(grid: tuple[int, int]) -> None:
    model = original_resnet()
    images = pixels_of("original_resnet", 2, *grid)
    with torch.no_grad():
        patches = FAMILY.wrap(model).encode_image(images).patches
        torch.testing.assert_close(patches, reference_cells(model, images), atol=1e-5, rtol=1e-5)
    with pytest.raises(UnsupportedModelError, match="is a ResNet"):
        FAMILY.wrap(model, dense="maskclip")


def test_version_4_of_transformers() -> None:
    new = transformers_clip()
    old = OldModel(new)
    assert plugin.adapter_for_model(old) == "openai_clip"
    with torch.no_grad():
        one, other = FAMILY.wrap(new), FAMILY.wrap(old)
        torch.testing.assert_close(one.encode_image(pixels()).pooled, other.encode_image(pixels()).pooled)
        torch.testing.assert_close(one.encode_text(token_rows([3])), other.encode_text(token_rows([3])[:, :3]))


@BUILD
@pytest.mark.parametrize("training", [True, False])
def test_lora_acts_gets_gradients_and_leaves_without_a_trace(build: str, training: bool) -> None:
    model = BUILDS[build]().train(training)
    before = snapshot(model)
    adapter = FAMILY.wrap(model)
    images, rows = pixels_of(build, 2, 1, 2), token_rows([3, 5])[:, :5]
    with torch.no_grad():
        plain = adapter.encode_image(images)
    adapter.add_lora(2)
    with torch.no_grad():
        for parameter in adapter.lora_parameters():
            parameter.normal_(std=0.2)
    tuned = adapter.encode_image(images)
    text = adapter.encode_text(rows)
    assert cosine_gap(plain.patches, tuned.patches) > 1e-3
    assert cosine_gap(plain.pooled, tuned.pooled) > 1e-3
    (tuned.patches.square().sum() + tuned.pooled.square().sum() + text.square().sum()).backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in adapter.lora_parameters())
    adapter.unload()
    assert_unchanged(before, model)


def test_merging_is_exact_in_double_precision() -> None:
    """The originals' LayerNorms compute in float32, so this is for transformers alone."""
    adapter = FAMILY.wrap(transformers_clip().double()).add_lora(2)
    with torch.no_grad():
        for parameter in adapter.lora_parameters():
            parameter.normal_(std=0.2)
        tuned = adapter.encode_image(pixels().double())
        adapter.merge()
        merged = adapter.encode_image(pixels().double())
    torch.testing.assert_close(merged.patches, tuned.patches, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("build", [original_vit, original_resnet])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_originals(build: Any, dtype: torch.dtype) -> None:
    images = pixels(2, 64, 64)
    with torch.no_grad():
        exact = FAMILY.wrap(build()).encode_image(images)
        adapter = FAMILY.wrap(convert_weights(build(), dtype))
        features = adapter.encode_image(images)
        assert adapter.encode_text(token_rows([3, 5])).dtype == dtype
    assert features.patches.dtype == features.pooled.dtype == dtype
    assert cosine_gap(features.patches, exact.patches) < 0.05


@BUILD
def test_meta_device_and_refused_sizes(build: str) -> None:
    adapter = FAMILY.wrap(BUILDS[build]().to("meta"))
    features = adapter.encode_image(pixels_of(build, 2, 1, 2).to("meta"))
    assert features.patches.shape == (2, 1, 2, EMBED)
    with pytest.raises(ImageSizeError):
        adapter.encode_image(torch.zeros(1, 3, 33, 32, device="meta"))


def test_clip_tokenize() -> None:
    tokens = FAMILY.wrap(original_vit(), tokenizer=Words()).tokenize(["a b", "a " * 10, "a " * 11])
    assert tokens.ids.dtype == torch.int64
    assert tokens.lengths.tolist() == [4, 12, 12]
    assert tokens.truncated == [False, False, True]


def test_claims_are_of_these_containers_alone() -> None:
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    vit = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 32}
    for vision in (vit, resnet):
        assert not FAMILY.claims(open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text))
    assert not FAMILY.claims(nn.Linear(2, 2))
    assert all(FAMILY.claims(build()) for build in BUILDS.values())


def test_refusals_of_names() -> None:
    with pytest.raises(BackboneNameError, match=r"unknown openai_clip model 'ViT-B-61'; did you mean"):
        FAMILY.load("ViT-B-61", "own")
    with pytest.raises(BackboneNameError, match="known: own, random"):
        FAMILY.load("ViT-B-16", "openai")
    with pytest.raises(TTDError, match="no folder"):
        FAMILY.load("/nowhere/at/all", "own")


def test_a_local_folder(tmp_path: Any) -> None:
    model = transformers_clip()
    model.save_pretrained(tmp_path)
    adapter = FAMILY.load(str(tmp_path), "own")
    with torch.no_grad():
        assert torch.equal(adapter.encode_image(pixels()).pooled, FAMILY.wrap(model).encode_image(pixels()).pooled)
    with pytest.raises(TTDError, match=r"tokenizer of .* cannot be loaded"):
        adapter.tokenize(["a"])
