"""The eva_clip adapter: dense and pooled features, text, LoRA, and that it leaves the model alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from helpers_eva_clip import (
    CONTEXT,
    EMBED,
    EVA_OPTIONS,
    GRID,
    IMAGE,
    KINDS,
    PATCH,
    VARIANTS,
    eva_clip,
    reference_dense,
    trunk_options,
)
from helpers_open_clip import WordTokenizer, assert_unchanged, cosine_gap, pixels, snapshot, token_rows
from ttd_eva_clip.adapter import EvaCLIPAdapter
from ttd_eva_clip.attention_lora import LoRAEvaAttention

from ttd_plugins.errors import ImageSizeError, InputError, TTDError, UnsupportedModelError
from ttd_plugins.toolkit.dense_modes import PRESETS, DenseMode

SIZES = [(IMAGE, 2 * IMAGE), (2 * IMAGE, IMAGE), (PATCH, PATCH), (24, 40), (48, 48)]


def library(model: Any, images: torch.Tensor) -> torch.Tensor:
    return model.encode_image(images, normalize=False)


# Dense and pooled features -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_pooled_is_the_librarys_own_in_every_mode(variant: str) -> None:
    model = eva_clip(VARIANTS[variant])
    expected = library(model, pixels()).detach()
    for dense in PRESETS:
        with torch.no_grad():
            features = EvaCLIPAdapter(model, dense=dense).encode_image(pixels())
        torch.testing.assert_close(features.pooled, expected, atol=5e-6, rtol=1e-5)
        assert features.patches.shape == (2, GRID, GRID, EMBED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["value", "plain", "qq", "kk", "qq+kk", "kk+window"])
@pytest.mark.parametrize(("residual", "ffn"), [(True, True), (True, False), (False, True), (False, False)])
def test_every_mode_equals_its_formula(kind: str, attention: Any, residual: bool, ffn: bool) -> None:
    model = eva_clip(KINDS[kind] | {"img_size": (24, 40)})
    adapter = EvaCLIPAdapter(model, dense=DenseMode(attention, residual, ffn, window_std=1.5))
    images = pixels(2, 24, 40)
    with torch.no_grad():
        features = adapter.encode_image(images)
        expected = reference_dense(model, images, attention, residual, ffn, std=1.5)
        torch.testing.assert_close(features.patches, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.pooled, library(model, images), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith(("layer", "registers", "average"))])
@pytest.mark.parametrize("dense", PRESETS)
def test_formulas_with_layer_scale_registers_and_averages(variant: str, dense: str) -> None:
    model = eva_clip(VARIANTS[variant])
    mode = PRESETS[dense]
    with torch.no_grad():
        seen = EvaCLIPAdapter(model, dense=dense).encode_image(pixels()).patches
        expected = reference_dense(model, pixels(), mode.attention, mode.residual, mode.ffn)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)


def test_the_inner_norm_and_the_modes_make_a_difference() -> None:
    model = eva_clip()
    with torch.no_grad():
        maps = [EvaCLIPAdapter(model, dense=name).encode_image(pixels()).patches for name in PRESETS]
        model.visual.trunk.blocks[-1].attn.norm = torch.nn.Identity()
        maps.append(EvaCLIPAdapter(model).encode_image(pixels()).patches)
    for i, one in enumerate(maps):
        for other in maps[i + 1 :]:
            assert cosine_gap(one, other) > 1e-3


@pytest.mark.parametrize("variant", ["average", "average_post_norm", "average_without_class_token"])
def test_an_average_of_plain_patches_is_the_pooled_embedding_up_to_the_norm(variant: str) -> None:
    """With the norm taken out, head and mean commute, so that plain dense features average to pooled."""
    model = eva_clip(VARIANTS[variant])
    model.visual.trunk.fc_norm = torch.nn.Identity()
    with torch.no_grad():
        features = EvaCLIPAdapter(model, dense="plain").encode_image(pixels())
        torch.testing.assert_close(features.patches.mean(dim=(1, 2)), features.pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "variant", [*KINDS, "registers", "registers_without_positions", "mixed_rope", "no_absolute_positions"]
)
def test_other_sizes_are_as_after_set_input_size(variant: str, size: tuple[int, int]) -> None:
    model, other = eva_clip(VARIANTS[variant]), eva_clip(VARIANTS[variant])
    other.visual.set_input_size(size)
    before = snapshot(model)
    images = pixels(2, *size)
    with torch.no_grad():
        features = EvaCLIPAdapter(model).encode_image(images)
        torch.testing.assert_close(features.pooled, library(other, images), atol=5e-6, rtol=1e-5)
        twin = EvaCLIPAdapter(other).encode_image(images)
        torch.testing.assert_close(features.patches, twin.patches, atol=5e-6, rtol=1e-5)
        if variant in KINDS:
            expected = reference_dense(other, images, "value", True, True)
            torch.testing.assert_close(features.patches, expected, atol=1e-5, rtol=1e-5)
    assert features.patches.shape == (2, size[0] // PATCH, size[1] // PATCH, EMBED)
    assert_unchanged(before, model)


def test_a_trunk_of_dynamic_size_agrees_with_itself() -> None:
    model = eva_clip(VARIANTS["dynamic_size"])
    with torch.no_grad():
        features = EvaCLIPAdapter(model).encode_image(pixels(2, 24, 40))
        torch.testing.assert_close(features.pooled, library(model, pixels(2, 24, 40)), atol=5e-6, rtol=1e-5)


def test_columns_are_columns() -> None:
    model = eva_clip(KINDS["eva02_base"] | {"depth": 1})
    images = pixels(1, 24, 40)
    other = images.clone()
    other[:, :, :PATCH, -PATCH:] += 1
    adapter = EvaCLIPAdapter(model)
    with torch.no_grad():
        change = (adapter.encode_image(images).patches - adapter.encode_image(other).patches).norm(dim=-1)[0]
    assert change[0, 4] > 0.1
    assert float(change.flatten().sort().values[:-1].max()) < 1e-5
    assert int(change.argmax()) == 4


@pytest.mark.parametrize("shape", [(2, 3, 33, 32), (2, 3, 4, 32), (2, 1, 32, 32), (3, 32, 32)])
def test_sizes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageSizeError):
        EvaCLIPAdapter(eva_clip()).encode_image(torch.zeros(shape))


@pytest.mark.parametrize("kind", KINDS)
def test_images_do_not_see_each_other(kind: str) -> None:
    adapter = EvaCLIPAdapter(eva_clip(KINDS[kind]))
    with torch.no_grad():
        together, alone = adapter.encode_image(pixels(3)), adapter.encode_image(pixels(3)[1:2])
    torch.testing.assert_close(together.patches[1:2], alone.patches, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(together.pooled[1:2], alone.pooled, atol=2e-6, rtol=1e-5)


# What is left behind, and how it trains ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_in_the_model(kind: str, training: bool) -> None:
    model = eva_clip(KINDS[kind] | {"patch_drop_rate": 0.5, "drop_path_rate": 0.2}).train(training)
    model.visual.trunk.patch_embed.requires_grad_(False)
    model.visual.trunk.norm.eval()
    before = snapshot(model)
    for dense in ("maskclip", "sclip", "value_only"):
        adapter = EvaCLIPAdapter(model, tokenizer=WordTokenizer(), dense=dense)
        adapter.encode_image(pixels(2, 24, 40)).patches.sum().backward()
    adapter.encode_text(token_rows([3, 5])[:, :5]).sum().backward()
    adapter.tokenize(["a b c"])
    model.zero_grad()
    assert_unchanged(before, model)


def test_patches_are_never_dropped() -> None:
    model = eva_clip(KINDS["eva02_base"] | {"patch_drop_rate": 0.5})
    adapter = EvaCLIPAdapter(model)
    with torch.no_grad():
        evaluated = adapter.encode_image(pixels())
        model.train()
        trained = adapter.encode_image(pixels())
    torch.testing.assert_close(trained.patches, evaluated.patches)
    torch.testing.assert_close(trained.pooled, evaluated.pooled)


@pytest.mark.parametrize("dense", ["maskclip", "value_only", "sclip"])
def test_branches_are_dropped_while_training_as_the_library_drops_them(dense: str) -> None:
    model = eva_clip(KINDS["eva02_base"] | {"drop_path_rate": 0.9})
    adapter = EvaCLIPAdapter(model, dense=dense)
    with torch.no_grad():
        evaluated = adapter.encode_image(pixels()).patches
        assert torch.equal(adapter.encode_image(pixels()).patches, evaluated)
        model.train()
        draws = [adapter.encode_image(pixels(8)).patches for _ in range(3)]
    assert not torch.equal(draws[0], draws[1]) or not torch.equal(draws[1], draws[2])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_pixels_and_every_weight(kind: str) -> None:
    model = eva_clip(KINDS[kind])
    images = pixels(2, 24, 40).requires_grad_()
    features = EvaCLIPAdapter(model).encode_image(images)
    (features.patches.square().sum() + features.pooled.square().sum()).backward()
    assert images.grad is not None and float(images.grad.abs().min()) > 0
    for name, parameter in model.visual.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dense", ["maskclip", "value_only", "sclip"])
def test_gradient_checkpointing_changes_nothing_and_covers_the_last_block(kind: str, dense: str) -> None:
    grads, calls = [], [0, 0]
    for checkpointing in (False, True):
        model = eva_clip(KINDS[kind]).train()
        model.set_grad_checkpointing(checkpointing)

        def count(*_: Any, which: int = int(checkpointing)) -> None:
            calls[which] += 1

        handle = model.visual.trunk.blocks[-1].norm1.register_forward_pre_hook(count)
        adapter = shake(EvaCLIPAdapter(model, dense=dense).add_lora(2))
        features = adapter.encode_image(pixels(2, 24, 40))
        (features.patches.square().sum() + features.pooled.square().sum()).backward()
        handle.remove()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert calls[1] == 2 * calls[0]
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dense", ["maskclip", "clearclip", "naclip"])
def test_half_precision(kind: str, dense: str) -> None:
    plain = eva_clip(KINDS[kind])
    half = copy.deepcopy(plain).to(torch.bfloat16)
    with torch.no_grad():
        exact = EvaCLIPAdapter(plain, dense=dense).encode_image(pixels(2, 24, 40))
        features = EvaCLIPAdapter(half, dense=dense).encode_image(pixels(2, 24, 40))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = EvaCLIPAdapter(plain, dense=dense).encode_image(pixels(2, 24, 40))
    assert features.patches.dtype == features.pooled.dtype == torch.bfloat16
    for other in (features, cast):
        assert cosine_gap(other.patches.float(), exact.patches) < 0.03
        assert cosine_gap(other.pooled.float(), exact.pooled) < 0.03


def test_copies_and_pickles_work_alike() -> None:
    adapter = EvaCLIPAdapter(eva_clip(), tokenizer=WordTokenizer(), dense="clearclip")
    with torch.no_grad():
        expected = adapter.encode_image(pixels()).patches
        for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
            assert torch.equal(twin.encode_image(pixels()).patches, expected)
            assert twin.description == adapter.description


# LoRA ----------------------------------------------------------------------------------------------------------------


def shake(adapter: EvaCLIPAdapter) -> EvaCLIPAdapter:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.lora_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapter


def test_peft_on_the_fused_projection_would_be_passed_over() -> None:
    """Why attention with separate biases is wrapped whole: timm multiplies by the base weight."""
    model = eva_clip(KINDS["eva01_giant"])
    with torch.no_grad():
        expected = library(model, pixels())
        config = peft.LoraConfig(r=2, target_modules=r".*blocks\.\d+\.attn\.qkv", init_lora_weights=False)
        peft.inject_adapter_in_model(config, model)
        assert torch.equal(library(model, pixels()), expected)
    with pytest.raises(UnsupportedModelError, match=r"dense mode 'clearclip' cannot be used.*does not call"):
        EvaCLIPAdapter(model, dense="clearclip")
    assert EvaCLIPAdapter(model).description.dense_modes == ("maskclip", "value_only", "plain")


def test_targets() -> None:
    base = EvaCLIPAdapter(eva_clip()).lora_targets("image")
    assert [name.removeprefix("visual.trunk.blocks.") for name in base] == [
        *(f"0.attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "proj")),
        *(f"0.mlp.{name}" for name in ("fc1_g", "fc1_x", "fc2")),
        *(f"1.attn.{name}" for name in ("v_proj", "proj")),
        *(f"1.mlp.{name}" for name in ("fc1_g", "fc1_x", "fc2")),
    ]
    plain = EvaCLIPAdapter(eva_clip(), dense="plain").lora_targets("image")
    assert {name.rpartition(".")[2] for name in set(plain) - set(base)} == {"q_proj", "k_proj"}
    value_only = EvaCLIPAdapter(eva_clip(), dense="value_only").lora_targets("image")
    assert not any(name.startswith("visual.trunk.blocks.1.mlp") for name in value_only)
    whole = EvaCLIPAdapter(eva_clip(KINDS["eva02_enormous"])).lora_targets("image")
    assert [name.removeprefix("visual.trunk.blocks.") for name in whole] == [
        f"{block}.{name}" for block in "01" for name in ("attn", "mlp.fc1", "mlp.fc2")
    ]


@pytest.mark.parametrize("part", ["patches", "pooled"])
@pytest.mark.parametrize("dense", PRESETS)
@pytest.mark.parametrize("variant", [*KINDS, "no_bias"])
def test_every_image_lora_parameter_gets_a_gradient(variant: str, dense: str, part: str) -> None:
    adapter = shake(EvaCLIPAdapter(eva_clip(VARIANTS[variant]), dense=dense).add_lora(2, towers=["image"]))
    getattr(adapter.encode_image(pixels(2, 24, 40)), part).square().sum().backward()
    # A fused projection cannot leave out its queries and keys, which the patches of the last block may not use.
    spared = ("blocks.1.attn.lora_A_q", "blocks.1.attn.lora_B_q", "blocks.1.attn.lora_A_k", "blocks.1.attn.lora_B_k")
    seen = 0
    for name, parameter in adapter.model.named_parameters():
        if "lora_" in name and not (part == "patches" and any(one in name for one in spared)):
            assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name
            seen += 1
    assert seen > 10


@pytest.mark.parametrize("dense", PRESETS)
@pytest.mark.parametrize("variant", [*KINDS, "no_bias", "rope_attention"])
def test_lora_changes_features_merges_exactly_and_leaves(variant: str, dense: str) -> None:
    model = eva_clip(VARIANTS[variant]).double()
    before = snapshot(model)
    adapter = EvaCLIPAdapter(model, dense=dense)
    images, rows = pixels(2, 24, 40).double(), token_rows([3, 6])[:, :6]

    def features() -> list[torch.Tensor]:
        with torch.no_grad():
            image = adapter.encode_image(images)
            return [image.patches, image.pooled, adapter.encode_text(rows)]

    untuned = features()
    adapter.add_lora(3)
    for one, other in zip(untuned, features(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)
    shake(adapter)
    tuned = features()
    for one, other in zip(untuned, tuned, strict=True):
        assert cosine_gap(one, other) > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(library(model, pixels().double()), adapter.encode_image(pixels()).pooled)
    fresh = EvaCLIPAdapter(eva_clip(VARIANTS[variant]).double(), dense=dense)
    shake(fresh.add_lora(3)).merge()
    adapter.unload()
    assert_unchanged(before, model)
    adapter = fresh
    for one, other in zip(tuned, features(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_base_weights_stay_bitwise_and_dropout_works() -> None:
    model = eva_clip(KINDS["eva01_giant"]).train()
    adapter = shake(EvaCLIPAdapter(model).add_lora(2, dropout=0.5))
    assert isinstance(model.visual.trunk.blocks[0].attn, LoRAEvaAttention)
    original = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    with torch.no_grad():
        first, second = (adapter.encode_image(pixels(1, 8, 8)).patches for _ in range(2))
        assert not torch.allclose(first, second)
        for _ in range(50):
            adapter.encode_image(pixels(1, 8, 8))
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in original.items())


def test_the_towers_share_no_parameter() -> None:
    adapter = EvaCLIPAdapter(eva_clip())
    image, text = (dict(adapter.tower_parameters(tower)) for tower in ("image", "text"))
    assert not set(image) & set(text)
    assert set(image) | set(text) | {"logit_scale"} == {name for name, _ in adapter.model.named_parameters()}


# Text, input, description --------------------------------------------------------------------------------------------


def test_text_is_the_librarys_at_any_length_that_keeps_the_end() -> None:
    model = eva_clip()
    adapter = EvaCLIPAdapter(model)
    rows = token_rows([2, 3, 6, 5])
    with torch.no_grad():
        expected = model.encode_text(rows)
        for length in range(6, CONTEXT + 1):
            torch.testing.assert_close(adapter.encode_text(rows[:, :length]), expected, atol=2e-6, rtol=1e-5)
    with pytest.raises(InputError):
        adapter.encode_text(torch.zeros(2, CONTEXT + 1, dtype=torch.long))


def test_tokens() -> None:
    adapter = EvaCLIPAdapter(eva_clip(), tokenizer=WordTokenizer())
    tokens = adapter.tokenize(["a b", "a " * 10, "a " * 11])
    assert tokens.lengths.tolist() == [4, CONTEXT, CONTEXT]
    assert tokens.truncated == [False, False, True]
    with pytest.raises(TTDError, match=r"without a tokenizer; pass tokenizer=open_clip\.get_tokenizer"):
        EvaCLIPAdapter(eva_clip()).tokenize(["a"])


def test_description_and_logits() -> None:
    adapter = EvaCLIPAdapter(eva_clip(KINDS["eva02_base"] | {"img_size": (24, 40)}))
    description = adapter.description
    assert description.name == "eva_clip:CustomTextCLIP"
    assert (description.embedding_width, description.patch_size, description.image_size) == (EMBED, (8, 8), (24, 40))
    assert description.mean == (0.48145466, 0.4578275, 0.40821073)
    assert (description.interpolation, description.context_length) == ("bicubic", CONTEXT)
    assert not description.text_needs_full_context
    assert (description.logits, adapter.logit_bias()) == ("softmax", None)
    assert (description.dense_mode, description.dense_modes) == ("maskclip", tuple(PRESETS))
    assert adapter.logit_scale().item() == pytest.approx(1 / 0.07, rel=1e-5)


def test_preprocessing_is_read_from_the_model() -> None:
    from open_clip.model import set_model_preprocess_cfg
    from PIL import Image

    model = eva_clip()
    config = {"size": (32, 32), "mode": "RGB", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "fill_color": 0}
    set_model_preprocess_cfg(model, config | {"interpolation": "bilinear", "resize_mode": "shortest"})
    adapter = EvaCLIPAdapter(model)
    assert adapter.description.mean == (0.5, 0.4, 0.3)
    assert adapter.description.interpolation == "bilinear"
    image = Image.new("L", (50, 70), 255)
    white = (1 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4])
    for transform, size in ((adapter.native_transform(), (32, 32)), (adapter.dense_transform((24, 40)), (24, 40))):
        out = transform(image)
        torch.testing.assert_close(out, white.view(3, 1, 1).expand(3, *size))


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trunk", "reason"),
    [
        ({"global_pool": "map"}, "learned queries"),
        ({"global_pool": "max"}, "pools by 'max'"),
        ({"global_pool": ""}, "pools by 'nothing'"),
        ({"num_classes": EMBED + 1}, "share no space"),
    ],
)
def test_trunks_that_cannot_be_served_are_refused_with_the_reason(trunk: dict[str, Any], reason: str) -> None:
    assert trunk_options(trunk | KINDS["eva02_base"])["img_size"] == IMAGE
    with pytest.raises(UnsupportedModelError, match=f"this CustomTextCLIP cannot be adapted: .*{reason}"):
        EvaCLIPAdapter(eva_clip(KINDS["eva02_base"] | trunk))


@pytest.mark.skipif("num_kv_heads" not in EVA_OPTIONS, reason="timm before 1.0.30 has no EVA with shared keys")
def test_attention_with_shared_keys_is_refused_by_hand_only() -> None:
    model = eva_clip({"model_name": "eva02_base_patch16_clip_224", "attn_type": "rope", "num_kv_heads": 1})
    with pytest.raises(UnsupportedModelError, match="grouped-query"):
        EvaCLIPAdapter(model, dense="clearclip")
    with torch.no_grad():
        pooled = EvaCLIPAdapter(model).encode_image(pixels()).pooled
        torch.testing.assert_close(pooled, library(model, pixels()), atol=5e-6, rtol=1e-5)


def test_an_unknown_mode() -> None:
    with pytest.raises(InputError, match="unknown dense mode"):
        EvaCLIPAdapter(eva_clip(), dense="mask")
