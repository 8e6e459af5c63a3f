"""The openai_clip adapters: features, text, LoRA and claims of the three containers."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from helpers_openai_clip import (
    BUILDS,
    CONTEXT,
    EMBED,
    GRID,
    IMAGE,
    PATCH,
    RESNET_IMAGE,
    TRUE_VOCABULARY,
    VITS,
    VOCABULARY,
    OldModel,
    Words,
    assert_unchanged,
    bicubic,
    clip_tokenizer,
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
    transformers_config,
    unit,
)
from PIL import Image
from torch import nn
from ttd_openai_clip.family import OpenAICLIPFamily

from ttd_plugins.adapter import Calibration, DenseAdapter
from ttd_plugins.errors import ImageSizeError, InputError, TTDError, UnsupportedModelError
from ttd_plugins.toolkit.dense_modes import PRESETS, DenseMode

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
    assert OpenAICLIPFamily().claims(old)
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


# Sizes ---------------------------------------------------------------------------------------------------------------


def at_another_size(model: Any, grid: tuple[int, int]) -> Any:
    """A copy of a model whose position table is that of ``grid``, so that the library's own forward takes the size."""
    twin = copy.deepcopy(model)
    if hasattr(model, "vision_model"):
        embeddings = twin.vision_model.embeddings
        own = embeddings.position_embedding.weight
        table = torch.cat([own[:1], bicubic(own[1:].unflatten(0, (GRID, GRID)), grid, -0.75).flatten(0, 1)])
        embeddings.interpolate_pos_encoding = lambda *_: table
        return twin
    holder = twin.visual.attnpool if hasattr(twin.visual, "attnpool") else twin.visual
    own = holder.positional_embedding
    side = int((len(own) - 1) ** 0.5)
    table = torch.cat([own[:1], bicubic(own[1:].unflatten(0, (side, side)), grid, -0.5).flatten(0, 1)])
    holder.positional_embedding = nn.Parameter(table)
    return twin


@BUILD
@pytest.mark.parametrize("grid", [(8, 8), (3, 5), (7, 1), (4, 6)])
def test_other_sizes_use_resampled_positions(build: str, grid: tuple[int, int]) -> None:
    """The reference is the library's own forward, with a position table from a kernel that is written out."""
    model = BUILDS[build]()
    before = snapshot(model)
    images = pixels_of(build, 2, *grid)
    with torch.no_grad():
        features = FAMILY.wrap(model).encode_image(images)
        twin = at_another_size(model, grid)
        if build == "transformers":
            own = twin.get_image_features(images, interpolate_pos_encoding=True).pooler_output
            library = model.get_image_features(images, interpolate_pos_encoding=True).pooler_output
            torch.testing.assert_close(features.pooled, library, atol=1e-5, rtol=1e-5)
        else:
            own = twin.encode_image(images)
        torch.testing.assert_close(features.pooled, own, atol=1e-5, rtol=1e-5)
        expected = reference_cells(model, images) if build == "original_resnet" else reference_dense(model, images)
    torch.testing.assert_close(features.patches, expected, atol=1e-5, rtol=1e-5)
    assert features.patches.shape == (2, *grid, EMBED)
    assert_unchanged(before, model)


def test_sizes_of_a_version_without_interpolation() -> None:
    """transformers before 4.47 has no interpolation for CLIP; there, positions are resampled as for the originals."""
    model = transformers_clip()
    with torch.no_grad():
        library = FAMILY.wrap(model).encode_image(pixels(2, 64, 64)).pooled
    plain = copy.deepcopy(model)
    embeddings = plain.vision_model.embeddings
    bare = nn.Module()
    for name in ("class_embedding", "patch_embedding", "position_embedding", "image_size"):
        setattr(bare, name, getattr(embeddings, name))
    plain.vision_model.embeddings = bare
    own = embeddings.position_embedding.weight
    with torch.no_grad():
        ours = FAMILY.wrap(plain).encode_image(pixels(2, 64, 64)).pooled
        table = torch.cat([own[:1], bicubic(own[1:].unflatten(0, (GRID, GRID)), (8, 8), -0.5).flatten(0, 1)])
        model.vision_model.embeddings.interpolate_pos_encoding = lambda *_: table
        expected = model.get_image_features(pixels(2, 64, 64), interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, library, atol=1e-4)


@BUILD
def test_sizes_that_do_not_fit_are_refused(build: str) -> None:
    side = unit(build)
    adapter = FAMILY.wrap(BUILDS[build]())
    for shape in ((2, 3, side + 1, side), (2, 3, side // 2, side), (2, 1, side, side), (3, side, side)):
        with pytest.raises(ImageSizeError):
            adapter.encode_image(torch.zeros(shape))


@pytest.mark.parametrize("build", VITS)
def test_one_patch_reaches_one_place_of_the_map(build: str) -> None:
    """With one block that sees single patches, what stands in the top right corner changes that corner alone."""
    model = BUILDS[build]()
    if build == "transformers":
        model.vision_model.encoder.layers = model.vision_model.encoder.layers[-1:]
    else:
        model.visual.transformer.resblocks = model.visual.transformer.resblocks[-1:]
    adapter = FAMILY.wrap(model)
    images = pixels(1, 24, 40)
    other = images.clone()
    other[:, :, :PATCH, -PATCH:] += 1
    with torch.no_grad():
        change = (adapter.encode_image(images).patches - adapter.encode_image(other).patches).norm(dim=-1)[0]
    assert change.shape == (3, 5)
    assert int(change.argmax()) == 4
    assert change[0, 4] > 0.1
    assert float(change.flatten().sort().values[:-1].max()) < 1e-5


@BUILD
@pytest.mark.parametrize("training", [True, False])
def test_images_do_not_see_each_other(build: str, training: bool) -> None:
    adapter = FAMILY.wrap(BUILDS[build]().train(training))
    images = pixels_of(build, 3)
    with torch.no_grad():
        together, alone = adapter.encode_image(images), adapter.encode_image(images[1:2])
    torch.testing.assert_close(together.patches[1:2], alone.patches, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.pooled[1:2], alone.pooled, atol=1e-5, rtol=1e-5)


@BUILD
def test_pooled_is_left_out_when_not_asked_for(build: str) -> None:
    adapter = FAMILY.wrap(BUILDS[build]())
    with torch.no_grad():
        lean = adapter.encode_image(pixels_of(build), pooled=False)
        assert lean.pooled is None
        assert torch.equal(lean.patches, adapter.encode_image(pixels_of(build)).patches)


# What is left behind, and what training needs ------------------------------------------------------------------------


@BUILD
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_in_the_model(build: str, training: bool) -> None:
    model = BUILDS[build]().train(training)
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    adapter = FAMILY.wrap(model, tokenizer=Words())
    features = adapter.encode_image(pixels_of(build, 2, 2, 3))
    (features.patches.sum() + features.pooled.sum()).backward()
    adapter.encode_text(adapter.tokenize(["a cat"]).ids[:, :5]).sum().backward()
    model.zero_grad()
    assert_unchanged(before, model)


@BUILD
@pytest.mark.parametrize("grid", [None, (2, 3)])
def test_gradients_reach_pixels_and_every_weight_of_the_image_tower(build: str, grid: tuple[int, int] | None) -> None:
    model = BUILDS[build]().train()
    images = pixels_of(build, 2, *(grid or (None, None))).requires_grad_()
    adapter = FAMILY.wrap(model)
    features = adapter.encode_image(images)
    (features.patches.square().sum() + features.pooled.square().sum()).backward()
    assert images.grad is not None
    # Behind the activations of a ResNet some pixels are silent.
    assert float((images.grad != 0).float().mean()) > (0.7 if build == "original_resnet" else 0.99)
    for name, parameter in adapter.tower_parameters("image"):
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def switch_checkpointing_on(model: Any) -> None:
    """As docs/openai-clip.md says."""
    if hasattr(model, "vision_model"):
        model.gradient_checkpointing_enable()
    else:
        model.transformer.grad_checkpointing = True
        tower = model.visual if hasattr(model.visual, "attnpool") else model.visual.transformer
        tower.grad_checkpointing = True


def counted_modules(model: Any) -> list[nn.Module]:
    """A module of each image block and each text block, which runs once in a forward pass."""
    if hasattr(model, "vision_model"):
        return [layer.layer_norm1 for tower in (model.vision_model, model.text_model) for layer in tower.encoder.layers]
    text = [block.ln_1 for block in model.transformer.resblocks]
    if hasattr(model.visual, "attnpool"):
        stages = (model.visual.layer1, model.visual.layer2, model.visual.layer3, model.visual.layer4)
        return [*text, *(bottleneck.conv2 for stage in stages for bottleneck in stage)]
    return [*text, *(block.ln_1 for block in model.visual.transformer.resblocks)]


@pytest.mark.parametrize(
    ("build", "dense"), [(build, mode) for build in VITS for mode in PRESETS] + [("original_resnet", "value_only")]
)
@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_changes_nothing_and_covers_every_block(build: str, dense: str, lora: bool) -> None:
    grads, calls = [], []
    for checkpointing in (False, True):
        model = BUILDS[build]().train()
        if checkpointing:
            switch_checkpointing_on(model)
        counts: Counter[int] = Counter()
        for module in counted_modules(model):
            module.register_forward_pre_hook(lambda module, _, counts=counts: counts.update([id(module)]))
        adapter = FAMILY.wrap(model, dense=dense)
        if lora:
            torch.manual_seed(3)
            adapter.add_lora(2)
            with torch.no_grad():
                for parameter in adapter.lora_parameters():
                    parameter.normal_(std=0.2)
        features = adapter.encode_image(pixels_of(build))
        texts = adapter.encode_text(token_rows([3, 7])[:, :7])
        (features.patches.square().sum() + features.pooled.square().sum() + texts.square().sum()).backward()
        trained = adapter.lora_parameters() if lora else list(model.parameters())
        grads.append([p.grad for p in trained])
        calls.append([counts[id(module)] for module in counted_modules(model)])
    # A checkpointed block runs again in the backward pass; what nothing in it needs a gradient for need not.
    assert set(calls[0]) == {1}
    if not (lora and build == "original_resnet"):
        assert set(calls[1]) == {2}
    assert [g is None for g in grads[0]] == [g is None for g in grads[1]]
    if lora:
        assert all(g is not None and float(g.abs().max()) > 0 for g in grads[1])
    for one, other in zip(*grads, strict=True):
        if one is not None:
            torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


# Half precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dense", list(PRESETS))
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_half_precision_in_transformers(dtype: torch.dtype, dense: str, size: tuple[int, int]) -> None:
    model = transformers_clip()
    with torch.no_grad():
        exact, words = (
            FAMILY.wrap(model, dense=dense).encode_image(pixels(2, *size)),
            library_text(model, token_rows([3])),
        )
        adapter = FAMILY.wrap(model.to(dtype), dense=dense)
        features, texts = adapter.encode_image(pixels(2, *size)), adapter.encode_text(token_rows([3])[:, :3])
        if size == (32, 32):
            assert cosine_gap(features.pooled, library_image(model, pixels(2, *size))) < 1e-3
    assert features.patches.dtype == features.pooled.dtype == texts.dtype == dtype
    assert cosine_gap(features.patches, exact.patches) < 0.02
    assert cosine_gap(features.pooled, exact.pooled) < 0.02
    assert cosine_gap(texts, words) < 0.02


@pytest.mark.parametrize("build", ["original_vit", "original_resnet"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_originals_equal_the_librarys_forward(build: str, dtype: torch.dtype) -> None:
    """Convolutions and linear layers in half precision, norms and embeddings in float32, as the package makes them."""
    model = convert_weights(BUILDS[build](), dtype)
    kinds = {parameter.dtype for parameter in model.parameters()}
    assert kinds == {torch.float32, dtype}
    adapter = FAMILY.wrap(model)
    with torch.no_grad():
        features = adapter.encode_image(pixels_of(build))
        if build == "original_vit":
            # CPU kernels of BatchNorm do not take a float16 map with float32 weights, so the ResNet has no reference.
            assert cosine_gap(features.pooled, model.encode_image(pixels_of(build))) < 2e-3
        texts = adapter.encode_text(token_rows([3, 5])[:, :5])
        assert cosine_gap(texts, model.encode_text(token_rows([3, 5]))) < 2e-3
        enlarged = adapter.encode_image(pixels_of(build, 1, 5, 3))
    assert enlarged.patches.dtype == texts.dtype == dtype
    assert bool(enlarged.patches.isfinite().all())


@BUILD
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lora_in_half_precision(build: str, dtype: torch.dtype) -> None:
    model = BUILDS[build]().train()
    model = model.to(dtype) if build == "transformers" else convert_weights(model, dtype)
    before = snapshot(model)
    adapter = FAMILY.wrap(model).add_lora(2)
    image, text = adapter.encode_image(pixels_of(build, 2, 1, 2)), adapter.encode_text(token_rows([3, 5])[:, :5])
    (
        image.patches.float().square().sum() + image.pooled.float().square().sum() + text.float().square().sum()
    ).backward()
    raised = [p for name, p in adapter.model.named_parameters() if "lora_B" in name]
    assert len(raised) >= 2
    assert all(p.dtype == torch.float32 and float(p.grad.abs().max()) > 0 for p in raised)
    adapter.unload()
    assert_unchanged(before, model)


@BUILD
def test_autocast(build: str) -> None:
    adapter = FAMILY.wrap(BUILDS[build]())
    with torch.no_grad():
        exact = adapter.encode_image(pixels_of(build))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = adapter.encode_image(pixels_of(build))
            texts = adapter.encode_text(token_rows([3]))
    assert cosine_gap(features.patches, exact.patches) < 0.02
    assert cosine_gap(features.pooled, exact.pooled) < 0.02
    assert bool(texts.isfinite().all())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_of_transformers(implementation: str) -> None:
    import transformers

    model = transformers.CLIPModel._from_config(transformers_config(), attn_implementation=implementation).eval()
    model.load_state_dict(transformers_clip().state_dict())
    with torch.no_grad():
        features = FAMILY.wrap(model).encode_image(pixels())
        torch.testing.assert_close(features.patches, reference_dense(model, pixels()), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.pooled, library_image(model, pixels()), atol=1e-5, rtol=1e-5)


@BUILD
@pytest.mark.parametrize("lora", [None, 2])
def test_copies_and_pickles_work_alike(build: str, lora: int | None) -> None:
    adapter = FAMILY.wrap(BUILDS[build](), tokenizer=Words())
    if lora:
        adapter.add_lora(lora)
        with torch.no_grad():
            for parameter in adapter.lora_parameters():
                parameter.normal_(std=0.2)
    with torch.no_grad():
        expected = adapter.encode_image(pixels_of(build)).patches
        for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
            assert torch.equal(twin.encode_image(pixels_of(build)).patches, expected)
            assert twin.description == adapter.description
            assert torch.equal(twin.tokenize(["a b"]).ids, adapter.tokenize(["a b"]).ids)
            twin.unload()
            assert not twin.has_lora
    assert adapter.has_lora == bool(lora)


# LoRA targets, measured ----------------------------------------------------------------------------------------------


def lora_of(adapter: DenseAdapter, target: str) -> dict[str, nn.Parameter]:
    module = adapter.model.get_submodule(target)
    return {name: parameter for name, parameter in module.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    ("build", "dense"), [(build, mode) for build in VITS for mode in PRESETS] + [("original_resnet", "value_only")]
)
def test_every_lora_target_changes_dense_and_pooled_features_and_gets_gradients_from_both(
    build: str, dense: str
) -> None:
    adapter = FAMILY.wrap(BUILDS[build](), dense=dense).add_lora(2)
    images, rows = pixels_of(build, 2, 2, 3), token_rows([5, 9])[:, :9]
    generator = torch.Generator().manual_seed(4)

    def features() -> dict[str, torch.Tensor]:
        image = adapter.encode_image(images)
        return {"patches": image.patches, "pooled": image.pooled, "text": adapter.encode_text(rows)}

    expected = {"image": {"patches", "pooled"}, "text": {"text"}}
    with torch.no_grad():
        plain = features()
        for tower, kinds in expected.items():
            for target in adapter.lora_targets(tower):
                raised = [parameter for name, parameter in lora_of(adapter, target).items() if "lora_B" in name]
                assert raised, target
                for parameter in raised:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
                gaps = {kind: float((now - plain[kind]).abs().max()) for kind, now in features().items()}
                assert {kind for kind, gap in gaps.items() if gap > 1e-4} == kinds, (target, gaps)
                for parameter in raised:
                    parameter.zero_()
        for parameter in adapter.lora_parameters():
            parameter.normal_(std=0.2)
    for kind in plain:
        adapter.model.zero_grad()
        features()[kind].square().sum().backward()
        for tower, kinds in expected.items():
            for target in adapter.lora_targets(tower):
                for name, parameter in lora_of(adapter, target).items():
                    reached = parameter.grad is not None and float(parameter.grad.abs().max()) > 0
                    unused = kind not in kinds or unused_by_patches(build, target, name, dense, kind)
                    assert reached != unused, (target, name, kind)


USED = {"value": "", "plain": "qk", "qq": "q", "kk": "k", "qq+kk": "qk", "kk+window": "k"}


def unused_by_patches(build: str, target: str, name: str, dense: str, kind: str) -> bool:
    """Whole attention of the original package brings queries and keys along in the last block; the mode may not use
    them, and the patches then give them no gradient."""
    if build != "original_vit" or kind != "patches" or target != "visual.transformer.resblocks.2.attn":
        return False
    return any(f"_{letter}." in name and letter not in USED[PRESETS[dense].attention] for letter in "qk")


@pytest.mark.parametrize("dense", list(PRESETS))
def test_what_is_left_out_of_the_last_block_acts_on_the_pooled_embedding_alone(dense: str) -> None:
    """The class token attends as trained, so the last block's queries and keys matter to it in every mode. They are
    left out where patches ignore them, because tuning them would part pooled from dense features."""
    model = transformers_clip()
    adapter = FAMILY.wrap(model, dense=dense)
    last = "vision_model.encoder.layers.2"
    names = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")] + ["mlp.fc1", "mlp.fc2"]
    left_out = {name for name in names if f"{last}.{name}" not in adapter.lora_targets("image")}
    with torch.no_grad():
        plain = adapter.encode_image(pixels())
        for name in names:
            weight = model.get_submodule(f"{last}.{name}").weight
            original = weight.clone()
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))
            changed = adapter.encode_image(pixels())
            weight.copy_(original)
            assert float((changed.pooled - plain.pooled).abs().max()) > 1e-4, name
            assert (float((changed.patches - plain.patches).abs().max()) > 1e-4) == (name not in left_out), name
    mode = PRESETS[dense]
    expected = {f"self_attn.{letter}_proj" for letter in "qk" if letter not in USED[mode.attention]}
    assert left_out == expected | (set() if mode.ffn else {"mlp.fc1", "mlp.fc2"})


@BUILD
def test_names_of_lora_targets(build: str) -> None:
    adapter = FAMILY.wrap(BUILDS[build]())
    image, text = adapter.lora_targets("image"), adapter.lora_targets("text")
    if build == "transformers":
        assert len(text) == 2 * 6 and len(image) == 3 * 6 - 2
        assert all(name.startswith("vision_model.encoder.layers.") for name in image)
    else:
        blocks = {f"resblocks.{i}.{name}" for i in range(2) for name in ("attn", "mlp.c_fc", "mlp.c_proj")}
        assert set(text) == {f"transformer.{name}" for name in blocks}
        if build == "original_vit":
            assert len(image) == 3 * 3
            adapter.dense = "value_only"
            assert len(adapter.lora_targets("image")) == 3 * 3 - 2
        else:
            assert image == ["visual.attnpool.v_proj", "visual.attnpool.c_proj"]
    adapter.add_lora(2)
    assert adapter.lora_targets("image") and set(adapter.lora_targets("text")) == set(text)
    for tower in ("image", "text"):
        held = {name.partition(".lora_")[0] for name, _ in adapter.tower_parameters(tower) if "lora_" in name}
        assert held == set(adapter.lora_targets(tower))


# ResNets of the original package -------------------------------------------------------------------------------------


def test_a_resnet_has_the_value_path_alone() -> None:
    model = original_resnet()
    description = FAMILY.wrap(model).description
    assert description.dense_mode == "value_only"
    assert description.dense_modes == ("value_only",)
    assert description.patch_size == (32, 32)
    assert description.image_size == (RESNET_IMAGE, RESNET_IMAGE)
    for name in set(PRESETS) - {"value_only"}:
        with pytest.raises(UnsupportedModelError, match=f"dense mode '{name}' cannot be used.*use one of: value_only"):
            FAMILY.wrap(model, dense=name)


def test_batch_norms_keep_to_their_running_statistics_and_are_trained() -> None:
    model = original_resnet()
    adapter = FAMILY.wrap(model)
    images = pixels(2, 64, 96)
    with torch.no_grad():
        evaluated = adapter.encode_image(images)
    model.train()
    features = adapter.encode_image(images)
    assert torch.equal(features.patches, evaluated.patches)
    assert torch.equal(features.pooled, evaluated.pooled)
    statistics = {name: buffer.clone() for name, buffer in model.visual.named_buffers()}
    assert any(name.endswith("running_var") for name in statistics)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    norms = {name: p.clone() for name, p in model.visual.named_parameters() if ".bn" in name or name.startswith("bn")}
    for _ in range(2):
        image = adapter.encode_image(images)
        optimizer.zero_grad()
        (image.patches.square().sum() + image.pooled.square().sum()).backward()
        optimizer.step()
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.visual.named_buffers())
    trained = dict(model.visual.named_parameters())
    assert norms and all(not torch.equal(trained[name], before) for name, before in norms.items())


def test_a_resnet_of_an_older_release_with_one_activation() -> None:
    model = original_resnet()
    older = copy.deepcopy(model)
    for module in older.modules():
        if hasattr(module, "relu1"):
            del module.relu1, module.relu2, module.relu3
            module.relu = nn.ReLU(inplace=True)
    with torch.no_grad():
        expected, seen = (FAMILY.wrap(one).encode_image(pixels(2, 64, 64)) for one in (model, older))
    assert torch.equal(expected.pooled, seen.pooled) and torch.equal(expected.patches, seen.patches)


# Text ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos", [2, 40])
def test_both_rules_for_the_end_of_a_text(eos: int) -> None:
    """Configurations from before transformers 4.31 say 2 and mean the largest id; later ones name the end token."""
    model = transformers_clip(text={"eos_token_id": eos, "bos_token_id": 1})
    adapter = FAMILY.wrap(model, tokenizer=lambda texts: rows[: len(texts)])
    rows = torch.zeros(2, CONTEXT, dtype=torch.long)
    # The end token of the new rule first, the largest id later, and each once more behind its first place.
    rows[0, :8] = torch.tensor([1, 9, 40, 2, 50, 7, 50, 40])
    rows[1, :8] = torch.tensor([1, 40, 50, 2, 3, 4, 50, 40])
    lengths = adapter.tokenize(["a", "b"]).lengths.tolist()
    assert lengths == ([5, 3] if eos == 2 else [3, 2])
    with torch.no_grad():
        expected = library_text(model, rows)
        torch.testing.assert_close(adapter.encode_text(rows), expected, atol=1e-6, rtol=1e-5)
        for row, length in enumerate(lengths):
            cut = adapter.encode_text(rows[row : row + 1, :length])
            torch.testing.assert_close(cut, expected[row : row + 1], atol=1e-5, rtol=1e-5)
            # One position fewer is another text.
            assert not torch.allclose(adapter.encode_text(rows[row : row + 1, : length - 1]), cut, atol=1e-3)


@pytest.mark.parametrize("build", ["original_vit", "original_resnet"])
def test_the_originals_pool_at_the_largest_id_of_int32_tokens(build: str) -> None:
    model = BUILDS[build]()
    adapter = FAMILY.wrap(model, tokenizer=Words())
    tokens = adapter.tokenize(["a b c", "a"])
    assert tokens.ids.dtype == torch.int64
    assert tokens.lengths.tolist() == [5, 3]
    with torch.no_grad():
        own = model.encode_text(Words()(["a b c", "a"], context_length=CONTEXT))
        torch.testing.assert_close(adapter.encode_text(tokens.ids), own, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(adapter.encode_text(tokens.ids.int()[:, :5]), own, atol=1e-5, rtol=1e-5)
    masks = [block.attn_mask for block in model.transformer.resblocks]
    assert all(mask.shape == (CONTEXT, CONTEXT) for mask in masks)


def test_a_text_tower_without_a_mask_gets_whole_rows() -> None:
    model = original_vit()
    for block in model.transformer.resblocks:
        block.attn_mask = None
    adapter = FAMILY.wrap(model)
    assert adapter.description.text_needs_full_context
    rows = token_rows([3, 5])
    with torch.no_grad():
        torch.testing.assert_close(adapter.encode_text(rows), library_text(model, rows), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="cut to 5 would change"):
        adapter.encode_text(rows[:, :5])


@BUILD
def test_token_ids_of_other_shapes_are_refused(build: str) -> None:
    adapter = FAMILY.wrap(BUILDS[build]())
    with pytest.raises(InputError, match=f"{CONTEXT + 1} positions, but the text tower has {CONTEXT}"):
        adapter.encode_text(torch.ones(2, CONTEXT + 1, dtype=torch.long))
    with pytest.raises(InputError, match="shape"):
        adapter.encode_text(torch.ones(CONTEXT, dtype=torch.long))


# Tokenizers ----------------------------------------------------------------------------------------------------------


def simple_tokenize(texts: str | list[str], context_length: int = 77, truncate: bool = False) -> torch.IntTensor:
    """``clip.tokenize`` around the byte-pair encoding that open_clip packs: int32, zeros behind the end token."""
    import open_clip

    encode = open_clip.SimpleTokenizer().encode
    rows = torch.zeros(1 if isinstance(texts, str) else len(texts), context_length, dtype=torch.int)
    for row, one in zip(rows, [texts] if isinstance(texts, str) else texts, strict=True):
        ids = [49406, *encode(one), 49407]
        if len(ids) > context_length:
            if not truncate:
                raise RuntimeError(f"Input {one} is too long for context length {context_length}")
            ids = [*ids[: context_length - 1], 49407]
        row[: len(ids)] = torch.tensor(ids)
    return rows


TEXTS = [
    "a cat",
    "",
    "A  Photo of\nDOGS, don't!",
    "cat " * 10,
    "cat " * 11,
    "dog " * 90,
    "caf\u00e9 \u6f22\u5b57 \U0001f600",
]


def test_tokens_of_openais_own_vocabulary() -> None:
    """transformers' tokenizer and the original's encoding give the same ids up to the end token."""
    pytest.importorskip("open_clip")
    model = transformers_clip(text=TRUE_VOCABULARY)
    adapter = FAMILY.wrap(model, tokenizer=clip_tokenizer())
    tokens = adapter.tokenize(TEXTS)
    assert tokens.ids.shape == (len(TEXTS), CONTEXT) and tokens.ids.dtype == tokens.lengths.dtype == torch.int64
    assert tokens.lengths.tolist()[:6] == [4, 2, 10, 12, 12, 12]
    assert tokens.truncated[:6] == [False, False, False, False, True, True]
    assert tokens.ids[0].tolist() == [49406, 320, 2368] + [49407] * (CONTEXT - 3)
    assert (tokens.ids.gather(1, tokens.lengths[:, None] - 1) == 49407).all()
    other = FAMILY.wrap(model, tokenizer=simple_tokenize).tokenize(TEXTS)
    assert torch.equal(tokens.lengths, other.lengths)
    assert tokens.truncated == other.truncated
    behind = torch.arange(CONTEXT)[None] >= tokens.lengths[:, None]
    assert torch.equal(tokens.ids.masked_fill(behind, 0), other.ids)
    with torch.no_grad():
        expected = library_text(model, tokens.ids)
        torch.testing.assert_close(adapter.encode_text(other.ids), expected, atol=1e-6, rtol=1e-5)
    assert adapter.tokenize([]).ids.shape == (0, CONTEXT)


def test_tokens_of_a_model_with_the_legacy_end_token() -> None:
    """OpenAI's own uploads say ``eos_token_id`` 2: the end token is the largest id, which pads too."""
    pytest.importorskip("open_clip")
    legacy = transformers_clip(text=TRUE_VOCABULARY | {"eos_token_id": 2})
    tokens = FAMILY.wrap(legacy, tokenizer=clip_tokenizer()).tokenize(TEXTS)
    current = FAMILY.wrap(transformers_clip(text=TRUE_VOCABULARY), tokenizer=clip_tokenizer()).tokenize(TEXTS)
    assert torch.equal(tokens.ids, current.ids) and torch.equal(tokens.lengths, current.lengths)


@pytest.mark.parametrize("options", [{"padding_side": "left"}, {"truncation_side": "left"}, {"pad_token": "!"}])
def test_habits_of_a_tokenizer_are_no_concern_of_the_models(options: dict[str, str]) -> None:
    pytest.importorskip("open_clip")
    model = transformers_clip(text=TRUE_VOCABULARY)
    tokenizer = clip_tokenizer(**options)
    tokens = FAMILY.wrap(model, tokenizer=tokenizer).tokenize(["a cat", "cat dog " * 20])
    expected = FAMILY.wrap(model, tokenizer=clip_tokenizer()).tokenize(["a cat", "cat dog " * 20])
    assert tokens.ids[0, :4].tolist() == [49406, 320, 2368, 49407]
    assert torch.equal(tokens.lengths, expected.lengths)
    assert tokens.truncated == [False, True]
    assert int(tokens.ids[1, -1]) == 49407
    # The caller's tokenizer is as it was.
    assert all(getattr(tokenizer, name) == value for name, value in options.items())


def test_a_processor_stands_for_its_tokenizer_and_image_processor() -> None:
    import transformers

    pytest.importorskip("open_clip")
    image_processor = transformers.CLIPImageProcessor(size={"shortest_edge": IMAGE}, image_mean=[0.1, 0.2, 0.3])
    processor = transformers.CLIPProcessor(image_processor, clip_tokenizer())
    model = transformers_clip(text=TRUE_VOCABULARY)
    for adapter in (FAMILY.wrap(model, preprocess=processor), FAMILY.wrap(model, tokenizer=processor)):
        assert adapter.tokenize(["a cat"]).lengths.tolist() == [4]
    assert FAMILY.wrap(model, preprocess=processor).description.mean == (0.1, 0.2, 0.3)


def test_any_string_is_tokenised() -> None:
    pytest.importorskip("open_clip")
    model = transformers_clip(text=TRUE_VOCABULARY)
    for tokenizer in (clip_tokenizer(), simple_tokenize):
        tokens = FAMILY.wrap(model, tokenizer=tokenizer).tokenize(
            ["caf\ud83d", "\ud83d\ude00", "\0\n\t", "\u2603" * 99]
        )
        assert tokens.ids.shape == (4, CONTEXT)
        assert int(tokens.lengths.min()) >= 2
        assert tokens.truncated[-1]
    special = FAMILY.wrap(model, tokenizer=clip_tokenizer()).tokenize(["<|endoftext|> a cat"])
    assert int(special.lengths) >= 2


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "without a tokenizer; pass tokenizer=transformers.CLIPTokenizer"),
        (lambda texts: {"input_ids": [[1]]}, "not a dict"),
        (lambda texts: torch.zeros(1, 77, dtype=torch.long), r"must return a tensor of shape \(1, 12\)"),
        (lambda texts: 1 / 0, "failed .ZeroDivisionError"),
        (lambda texts: torch.full((1, CONTEXT), VOCABULARY), f"ids up to {VOCABULARY}, but the text tower has"),
        (lambda texts: torch.ones(1, CONTEXT, dtype=torch.long), "rows without the end token"),
    ],
)
def test_tokenizers_that_do_not_fit(tokenizer: Any, message: str) -> None:
    with pytest.raises(TTDError, match=message) as caught:
        FAMILY.wrap(transformers_clip(), tokenizer=tokenizer).tokenize(["a"])
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_be_asked_for_more_counts_every_full_row() -> None:
    rows = token_rows([CONTEXT, 5])
    tokens = FAMILY.wrap(original_vit(), tokenizer=lambda texts: rows[: len(texts)]).tokenize(["a", "b"])
    assert tokens.truncated == [True, False]


@pytest.mark.parametrize("texts", ["a cat", ["a", None], [b"a"]])
def test_only_lists_of_strings_are_tokenised(texts: Any) -> None:
    with pytest.raises(InputError, match="list of strings"):
        FAMILY.wrap(original_vit(), tokenizer=Words()).tokenize(texts)


# Pictures ------------------------------------------------------------------------------------------------------------


def picture(width: int = 50, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("shape", [(50, 30), (30, 50), (47, 47), (33, 91), (20, 17), (640, 41)])
@pytest.mark.parametrize("side", [32, 45])
def test_native_preprocessing_is_the_published_one(shape: tuple[int, int], side: int) -> None:
    """``clip.load`` gives this Compose; the model here is built for the side, which need not fit patches of 8."""
    transforms = pytest.importorskip("torchvision.transforms")
    from ttd_openai_clip.preprocessing import ShortestSideCrop

    from ttd_plugins.toolkit.transforms import OPENAI_NORMALISATION

    published = transforms.Compose(
        [
            transforms.Resize(side, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            lambda image: image.convert("RGB"),
            transforms.ToTensor(),
            transforms.Normalize(OPENAI_NORMALISATION.mean, OPENAI_NORMALISATION.std),
        ]
    )
    image = picture(*shape)
    ours = ShortestSideCrop((side, side), OPENAI_NORMALISATION)(image)
    torch.testing.assert_close(ours, published(image), atol=1e-6, rtol=1e-6)
    if side == IMAGE:
        adapter = FAMILY.wrap(original_vit())
        torch.testing.assert_close(adapter.native_transform()(image), published(image), atol=1e-6, rtol=1e-6)
        given = FAMILY.wrap(original_vit(), preprocess=published)
        assert torch.equal(given.native_transform()(image), published(image))
        assert given.description.mean == adapter.description.mean == OPENAI_NORMALISATION.mean


def test_native_preprocessing_is_transformers_own() -> None:
    import transformers

    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}
    )
    own = processor(images=picture(), return_tensors="pt")["pixel_values"][0]
    given = FAMILY.wrap(transformers_clip(), preprocess=processor)
    assert torch.equal(given.native_transform()(picture()), own)
    # Ours resamples with PIL and transformers with torchvision, which differ by at most one of 255 levels or so.
    assert float((FAMILY.wrap(transformers_clip()).native_transform()(picture()) - own).abs().max()) < 0.03
    other = transformers.CLIPImageProcessor(size={"shortest_edge": IMAGE}, image_std=[0.1] * 3, resample=2)
    description = FAMILY.wrap(transformers_clip(), preprocess=other).description
    assert description.std == (0.1, 0.1, 0.1)
    assert description.interpolation == "bilinear"


@BUILD
def test_dense_preprocessing_keeps_the_whole_picture(build: str) -> None:
    """The published preprocessing crops the sides of a wide picture away; the dense one only resizes."""
    side = unit(build)
    adapter = FAMILY.wrap(BUILDS[build](), preprocess={"mean": 0.5, "std": 0.5})
    image = Image.new("RGB", (200, 40), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 8, 40))
    dense = adapter.dense_transform((2 * side, 5 * side))(image)
    assert dense.dtype == torch.float32 and dense.shape == (3, 2 * side, 5 * side)
    assert float(dense[:, :, 0].min()) > 0.8
    assert float(dense[:, :, side:].max()) == -1
    native = adapter.native_transform()(image)
    assert native.shape == adapter.dense_transform()(image).shape == (3, *adapter.description.image_size)
    assert float(native.max()) == -1
    with pytest.raises(ImageSizeError):
        adapter.dense_transform(side + 1)
    for mode in ("L", "RGBA", "P", "I;16", "1"):
        assert adapter.dense_transform()(Image.new(mode, (9, 5))).shape == (3, *adapter.description.image_size)
        assert adapter.native_transform()(Image.new(mode, (9, 5))).shape == (3, *adapter.description.image_size)


def test_the_dense_transform_is_pils_resize_and_the_normalisation() -> None:
    adapter = FAMILY.wrap(original_vit())
    description = adapter.description
    values = np.asarray(picture().resize((40, 16), Image.Resampling.BICUBIC), np.float32) / 255
    expected = (values - np.array(description.mean, np.float32)) / np.array(description.std, np.float32)
    seen = adapter.dense_transform((16, 40))(picture()).permute(1, 2, 0)
    torch.testing.assert_close(seen, torch.from_numpy(expected), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        (lambda image: image, "does not say how it normalises"),
        ({"mean": [0.5, 0.5]}, "3 numbers"),
        ({"do_rescale": False}, "does not scale pixels"),
        ({"rescale_factor": 1.0}, "does not scale pixels"),
    ],
)
def test_preprocessing_that_cannot_be_used(preprocess: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FAMILY.wrap(original_vit(), preprocess=preprocess)


def test_pixels_that_are_not_normalised() -> None:
    description = FAMILY.wrap(original_vit(), preprocess={"do_normalize": False}).description
    assert (description.mean, description.std) == ((0.0,) * 3, (1.0,) * 3)


@BUILD
def test_transforms_can_be_sent_to_workers(build: str) -> None:
    adapter = FAMILY.wrap(BUILDS[build]())
    for transform in (adapter.dense_transform(), adapter.native_transform()):
        assert torch.equal(pickle.loads(pickle.dumps(transform))(picture()), transform(picture()))


# Description and refusals --------------------------------------------------------------------------------------------


@BUILD
def test_description(build: str) -> None:
    model = BUILDS[build]()
    description = FAMILY.wrap(model, calibration=Calibration(5, 1)).description
    assert description.name == f"openai_clip:{type(model).__name__}"
    assert description.embedding_width == EMBED
    assert description.context_length == CONTEXT
    assert not description.text_needs_full_context
    assert description.logits == "softmax"
    assert description.calibration == Calibration(5, 1)
    assert FAMILY.wrap(model).description.calibration == Calibration()
    if build != "original_resnet":
        assert description.dense_mode == "maskclip"
        assert set(description.dense_modes) == set(PRESETS)
        assert description.patch_size == (PATCH, PATCH) and description.image_size == (IMAGE, IMAGE)


@BUILD
def test_towers_share_no_parameter_and_leave_out_the_logit_scale(build: str) -> None:
    model = BUILDS[build]()
    adapter = FAMILY.wrap(model)
    image, text = (dict(adapter.tower_parameters(tower)) for tower in ("image", "text"))
    assert not set(image) & set(text)
    assert set(image) | set(text) == {name for name, _ in model.named_parameters()} - {"logit_scale"}
    adapter.encode_text(token_rows([CONTEXT])).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(text)
    assert adapter.logit_bias() is None
    scale = adapter.logit_scale()
    assert scale.shape == ()
    torch.testing.assert_close(scale, torch.tensor(2.6592).exp(), atol=1e-4, rtol=1e-5)
    scale.backward()
    assert float(model.logit_scale.grad) > 0


def without_position() -> Any:
    model = transformers_clip()
    model.vision_model.embeddings.image_size = 2 * IMAGE
    return model


def shared_no_space() -> Any:
    model = transformers_clip()
    model.text_projection = nn.Linear(16, EMBED + 1, bias=False)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (without_position, "17 position embeddings for a grid of 8 x 8 patches"),
        (shared_no_space, "share no space"),
        (lambda: nn.Linear(2, 2), "neither like transformers' CLIPModel nor"),
    ],
)
def test_models_that_cannot_be_served_are_refused_with_the_reason(build: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"cannot be adapted: .*{message}") as caught:
        FAMILY.wrap(build()).description  # noqa: B018
    assert "\n" not in str(caught.value)


def test_attention_wrapped_by_others_is_refused_where_it_would_be_passed_over() -> None:
    peft = pytest.importorskip("peft")
    model = original_vit()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules="visual.transformer.resblocks.2.attn"), model)
    with pytest.raises(UnsupportedModelError, match=r"clearclip.*cannot be used: .*peft.*use one of: maskclip"):
        FAMILY.wrap(model, dense="clearclip")
    assert "clearclip" not in FAMILY.wrap(model).description.dense_modes


def test_the_dense_mode_can_be_changed_and_is_checked() -> None:
    adapter = FAMILY.wrap(transformers_clip(), dense="clearclip")
    adapter.dense = DenseMode("qq", residual=True, ffn=False)
    assert adapter.description.dense_mode == "qq,residual"
    with pytest.raises(InputError, match="unknown dense mode 'maskclp'; did you mean 'maskclip'"):
        adapter.dense = "maskclp"


@BUILD
def test_ttd_trains_a_wrapped_model_and_gives_it_back(build: str) -> None:
    from ttd_plugins import TTD, wrap

    model = BUILDS[build]()
    backbone = wrap(model, tokenizer=Words(), lora=2)
    ttd = TTD(backbone)
    optimizer = torch.optim.AdamW(backbone.lora_parameters(), lr=1e-2)
    captions = ["a cat on the grass", "two red dogs", "a photo of a cat and dog"]
    losses = []
    for _ in range(5):
        loss = ttd(pixels_of(build, 3), captions).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tuned = backbone.merge()
    assert tuned is model
    assert not [name for name, _ in model.named_modules() if "lora" in name]
