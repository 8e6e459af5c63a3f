"""The SigLIP adapters: dense and pooled features, text, input, and that they leave the model alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("open_clip")
pytest.importorskip("timm")

import torch
from helpers_open_clip import assert_unchanged, cosine_gap, snapshot
from helpers_siglip import (
    CONTAINERS,
    CONTEXT,
    GRID,
    IMAGE,
    PATCH,
    VOCABULARY,
    WIDTH,
    config,
    library_image,
    library_text,
    pixels,
    reference_dense,
    rows,
    siglip2_tokenizer,
    siglip_like_tokenizer,
    tiny,
    tiny_timm,
    tiny_transformers,
    tiny_trunk,
)
from PIL import Image
from torch import nn
from ttd_siglip.family import adapt
from ttd_siglip.siglip_modes import MODES, SiglipMode, siglip_mode

from ttd_plugins.adapter import Calibration
from ttd_plugins.errors import ImageSizeError, InputError, TTDError, UnsupportedModelError

HEADS = ("value", "token_probe", "query_query")
both = pytest.mark.parametrize("container", CONTAINERS)


# Dense and pooled features -------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("mode", MODES)
def test_pooled_is_the_librarys_own_in_every_mode(container: str, mode: str) -> None:
    model = tiny(container)
    with torch.no_grad():
        features = adapt(model, dense=mode).encode_image(pixels())
        torch.testing.assert_close(features.pooled, library_image(model, pixels()), atol=2e-6, rtol=1e-5)
    assert features.patches.shape == (2, GRID, GRID, WIDTH)


@both
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("last_block", ["plain", "value"])
def test_every_mode_equals_its_formula(container: str, head: str, last_block: str) -> None:
    model = tiny(container)
    with torch.no_grad():
        patches = adapt(model, dense=head, last_block=last_block).encode_image(pixels()).patches
        expected = reference_dense(model, pixels(), head, last_block)
    torch.testing.assert_close(patches.flatten(1, 2), expected, atol=1e-5, rtol=1e-5)


@both
@pytest.mark.parametrize("mode", MODES)
def test_of_one_patch_pooled_and_dense_are_equal(container: str, mode: str) -> None:
    adapter = adapt(tiny(container), dense=mode)
    with torch.no_grad():
        features = adapter.encode_image(pixels(3, PATCH, PATCH))
    torch.testing.assert_close(features.patches[:, 0, 0], features.pooled, atol=1e-5, rtol=0)
    assert float(features.pooled.std()) > 0.1


@both
def test_the_head_given_one_token_at_a_time_is_the_value_mode(container: str) -> None:
    """The library's own pooling code is the reference: it sees each token of the image alone."""
    model = tiny(container)
    adapter = adapt(model)
    head = model.vision_model.head if container == "transformers" else model.visual.trunk.attn_pool
    seen: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        features = adapter.encode_image(pixels())
        handle.remove()
        (tokens,) = seen
        alone = torch.stack([head(tokens[:, i : i + 1]) for i in range(tokens.shape[1])], dim=1)
    torch.testing.assert_close(features.patches.flatten(1, 2), alone, atol=1e-5, rtol=1e-5)


@both
def test_the_formulas_tell_the_modes_apart(container: str) -> None:
    model = tiny(container)
    with torch.no_grad():
        all_modes = [adapt(model, dense=name).encode_image(pixels()).patches for name in MODES]
    for i, one in enumerate(all_modes):
        for other in all_modes[i + 1 :]:
            assert cosine_gap(one, other) > 1e-4


def test_norms_on_queries_and_keys_of_the_head_are_part_of_the_modes() -> None:
    """timm's head can norm queries and keys; with unit norms taken out the features differ."""
    model = tiny_timm()
    pool = model.visual.trunk.attn_pool
    pool.q_norm, pool.k_norm = nn.LayerNorm(WIDTH // 4), nn.LayerNorm(WIDTH // 4)
    adapter = adapt(model)
    with torch.no_grad():
        tokens = model.visual.trunk.forward_features(pixels())
        q, k, v = (
            t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (pool.q(tokens), *pool.kv(tokens).chunk(2, dim=-1))
        )
        q, k = pool.q_norm(q), pool.k_norm(k)
        for head, keys in (("token_probe", k), ("query_query", q)):
            mixed = ((q @ keys.mT / (WIDTH // 4) ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
            out = pool.proj(mixed)
            adapter.dense = head
            features = adapter.encode_image(pixels())
            torch.testing.assert_close(
                features.patches.flatten(1, 2), out + pool.mlp(pool.norm(out)), atol=1e-5, rtol=0
            )
            torch.testing.assert_close(features.pooled, library_image(model, pixels()), atol=2e-6, rtol=1e-5)


def test_what_follows_the_head_is_applied_to_patches_too() -> None:
    """Not in published SigLIP models; a projection of open_clip or a classifier of timm in the joint space's place."""
    model = tiny_timm(trunk=tiny_trunk(num_classes=WIDTH, fc_norm=True, final_norm=True))
    model.visual.head = nn.Sequential()
    model.visual.head.add_module("proj", nn.Linear(WIDTH, WIDTH, bias=False))
    adapter = adapt(model)
    with torch.no_grad():
        features = adapter.encode_image(pixels(2, PATCH, PATCH))
        torch.testing.assert_close(features.patches[:, 0, 0], features.pooled, atol=1e-5, rtol=0)
        pooled = adapter.encode_image(pixels()).pooled
        torch.testing.assert_close(pooled, library_image(model, pixels()), atol=2e-6, rtol=1e-5)
    assert adapter.description.embedding_width == WIDTH


@both
def test_pooled_is_left_out_when_not_asked_for(container: str) -> None:
    for mode in ("value", "value,last_block=value"):
        adapter = adapt(tiny(container), dense=mode)
        with torch.no_grad():
            lean = adapter.encode_image(pixels(), pooled=False)
            assert lean.pooled is None
            assert torch.equal(lean.patches, adapter.encode_image(pixels()).patches)


@both
def test_one_patch_reaches_one_place_of_the_map(container: str) -> None:
    """With one block that sees single patches, what stands in the top right corner changes that corner alone."""
    model = (
        tiny_transformers(num_hidden_layers=1) if container == "transformers" else tiny_timm(trunk=tiny_trunk(depth=1))
    )
    adapter = adapt(model, last_block="value")
    images = pixels(1, 24, 40)
    other = images.clone()
    other[:, :, :PATCH, -PATCH:] += 1
    with torch.no_grad():
        change = (adapter.encode_image(images).patches - adapter.encode_image(other).patches).norm(dim=-1)[0]
    assert change.shape == (3, 5)
    assert int(change.argmax()) == 4
    assert change[0, 4] > 0.1
    assert float(change.flatten().sort().values[:-1].max()) < 1e-5


@both
@pytest.mark.parametrize("size", [(IMAGE, 2 * IMAGE), (2 * IMAGE, IMAGE), (24, 40), (16, 64)])
def test_other_sizes_use_resampled_positions(container: str, size: tuple[int, int]) -> None:
    """The reference is the library at that size: transformers by its option, timm with its positions overwritten."""
    model = tiny(container)
    reference = copy.deepcopy(model)
    if container == "timm":
        reference.visual.trunk.set_input_size(size)
    before = snapshot(model)
    with torch.no_grad():
        features = adapt(model).encode_image(pixels(2, *size))
        torch.testing.assert_close(features.pooled, library_image(reference, pixels(2, *size)), atol=2e-6, rtol=1e-5)
        expected = reference_dense(reference, pixels(2, *size), "value", "plain")
    torch.testing.assert_close(features.patches.flatten(1, 2), expected, atol=1e-5, rtol=1e-5)
    assert features.patches.shape == (2, size[0] // PATCH, size[1] // PATCH, WIDTH)
    assert_unchanged(before, model)


@both
def test_an_input_size_that_the_patch_does_not_divide(container: str) -> None:
    """As the published so400m models at 384 pixels with patches of 14: the convolution leaves the rest out."""
    model = (
        tiny_transformers(image_size=37) if container == "transformers" else tiny_timm(trunk=tiny_trunk(img_size=37))
    )
    adapter = adapt(model)
    assert adapter.description.image_size == (IMAGE, IMAGE)
    with torch.no_grad():
        features = adapter.encode_image(pixels(2, 37, 37))
        torch.testing.assert_close(features.pooled, library_image(model, pixels(2, 37, 37)), atol=2e-6, rtol=1e-5)
        cut = adapter.encode_image(pixels(2, 37, 37)[:, :, :IMAGE, :IMAGE])
    torch.testing.assert_close(cut.patches, features.patches, atol=1e-5, rtol=1e-5)
    assert adapter.native_transform()(picture()).shape == (3, 37, 37)
    with pytest.raises(ImageSizeError):
        adapter.encode_image(pixels(1, 37, 32))


@both
@pytest.mark.parametrize("shape", [(2, 3, 33, 32), (2, 3, 4, 32), (2, 1, 32, 32), (3, 32, 32)])
def test_sizes_that_do_not_fit_are_refused(container: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageSizeError):
        adapt(tiny(container)).encode_image(torch.zeros(shape))


@both
@pytest.mark.parametrize("mode", ["value", "token_probe,last_block=value"])
def test_images_do_not_see_each_other(container: str, mode: str) -> None:
    adapter = adapt(tiny(container), dense=mode)
    images = pixels(3)
    with torch.no_grad():
        together = adapter.encode_image(images)
        alone = adapter.encode_image(images[1:2])
    torch.testing.assert_close(together.patches[1:2], alone.patches, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(together.pooled[1:2], alone.pooled, atol=2e-6, rtol=1e-5)


# What is left behind -------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["value", "query_query,last_block=value"])
def test_nothing_is_left_in_the_model(container: str, training: bool, mode: str) -> None:
    model = tiny(container).train(training)
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    adapter = adapt(model, tokenizer=siglip_like_tokenizer(), dense=mode)
    features = adapter.encode_image(pixels(2, 24, 40))
    (features.patches.sum() + features.pooled.sum()).backward()
    adapter.encode_text(adapter.tokenize(["a cat"]).ids).sum().backward()
    model.zero_grad()
    assert_unchanged(before, model)


def test_patches_are_never_dropped() -> None:
    model = tiny_timm(trunk=tiny_trunk(patch_drop_rate=0.5))
    adapter = adapt(model)
    with torch.no_grad():
        evaluated = adapter.encode_image(pixels())
        model.train()
        trained = adapter.encode_image(pixels())
    torch.testing.assert_close(trained.patches, evaluated.patches, atol=2e-6, rtol=1e-5)


@both
@pytest.mark.parametrize("size", [(IMAGE, IMAGE), (24, 40)])
def test_gradients_reach_pixels_and_every_weight_that_matters(container: str, size: tuple[int, int]) -> None:
    model = tiny(container)
    images = pixels(2, *size).requires_grad_()
    features = adapt(model).encode_image(images)
    (features.patches.square().sum() + features.pooled.square().sum()).backward()
    assert images.grad is not None
    assert float(images.grad.abs().min()) > 0
    tower = model.vision_model if container == "transformers" else model.visual
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@both
@pytest.mark.parametrize("mode", ["value", "value,last_block=value"])
def test_gradient_checkpointing_changes_nothing_and_covers_every_block(container: str, mode: str) -> None:
    grads, calls = [], []
    for checkpointing in (False, True):
        model = tiny(container).train()
        if container == "timm":
            model.set_grad_checkpointing(checkpointing)
            blocks, norm = model.visual.trunk.blocks, "norm1"
        else:
            if checkpointing:
                model.gradient_checkpointing_enable()
            blocks, norm = model.vision_model.encoder.layers, "layer_norm1"
        count = [0] * len(blocks)

        def step(index: int, count: list[int] = count) -> Any:
            def add(*_: Any) -> None:
                count[index] += 1

            return add

        for index, block in enumerate(blocks):
            getattr(block, norm).register_forward_pre_hook(step(index))
        adapter = adapt(model, dense=mode)
        features = adapter.encode_image(pixels())
        texts = adapter.encode_text(rows())
        (features.patches.square().sum() + features.pooled.square().sum() + texts.square().sum()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        calls.append(count)
    # A checkpointed block runs again in the backward pass.
    assert calls[1] == [2 * times for times in calls[0]]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-4, rtol=1e-4)


@both
@pytest.mark.parametrize("mode", ["value", "token_probe", "query_query,last_block=value"])
def test_half_precision_models(container: str, mode: str) -> None:
    with torch.no_grad():
        exact = adapt(tiny(container), dense=mode).encode_image(pixels(2, 24, 40))
        adapter = adapt(tiny(container).to(torch.bfloat16), dense=mode)
        features = adapter.encode_image(pixels(2, 24, 40))
        native = adapter.encode_image(pixels())
        texts = adapter.encode_text(rows())
    assert features.patches.dtype == features.pooled.dtype == native.patches.dtype == texts.dtype == torch.bfloat16
    assert cosine_gap(features.patches.float(), exact.patches) < 0.02
    assert cosine_gap(features.pooled.float(), exact.pooled) < 0.02


@both
def test_autocast(container: str) -> None:
    adapter = adapt(tiny(container), last_block="value")
    with torch.no_grad():
        exact = adapter.encode_image(pixels())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = adapter.encode_image(pixels())
    assert cosine_gap(features.patches.float(), exact.patches) < 0.02


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_of_transformers(implementation: str) -> None:
    import transformers

    model = transformers.SiglipModel._from_config(
        transformers.SiglipConfig(**config()), attn_implementation=implementation
    )
    model.load_state_dict(tiny_transformers().state_dict())
    adapter = adapt(model.eval(), last_block="value")
    with torch.no_grad():
        patches = adapter.encode_image(pixels()).patches.flatten(1, 2)
        torch.testing.assert_close(patches, reference_dense(model, pixels(), "value", "value"), atol=1e-5, rtol=1e-5)


@both
def test_copies_and_pickles_work_alike(container: str) -> None:
    adapter = adapt(tiny(container), dense="token_probe")
    with torch.no_grad():
        expected = adapter.encode_image(pixels()).patches
        for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
            assert torch.equal(twin.encode_image(pixels()).patches, expected)
            assert twin.description == adapter.description


@both
def test_meta_device(container: str) -> None:
    adapter = adapt(tiny(container).to("meta"), last_block="value")
    features = adapter.encode_image(torch.zeros(2, 3, 24, 40, device="meta"))
    assert features.patches.shape == (2, 3, 5, WIDTH)
    assert features.pooled.shape == (2, WIDTH)
    ids = torch.zeros(2, CONTEXT, dtype=torch.long, device="meta")
    assert adapter.encode_text(ids).shape == (2, WIDTH)
    assert adapter.description.calibration == Calibration()


# Text ----------------------------------------------------------------------------------------------------------------


@both
def test_text_embeddings_are_the_librarys(container: str) -> None:
    model = tiny(container)
    adapter = adapt(model)
    assert adapter.description.text_needs_full_context
    with torch.no_grad():
        embeddings = adapter.encode_text(rows())
        torch.testing.assert_close(embeddings, library_text(model, rows()), atol=2e-6, rtol=1e-5)
    assert embeddings.shape == (3, WIDTH)


@both
def test_padding_is_part_of_the_text_and_cut_rows_are_refused(container: str) -> None:
    adapter = adapt(tiny(container))
    changed = rows()
    changed[:, -1] = 7
    with torch.no_grad():
        assert not torch.allclose(adapter.encode_text(rows()), adapter.encode_text(changed), atol=1e-3)
    for length, message in (
        (5, "attends to all 10 positions"),
        (CONTEXT + 1, "11 positions, but the text tower has 10"),
    ):
        with pytest.raises(InputError, match=message):
            adapter.encode_text(torch.ones(2, length, dtype=torch.long))
    with pytest.raises(InputError, match="shape"):
        adapter.encode_text(torch.ones(CONTEXT, dtype=torch.long))


def test_a_text_tower_without_projection() -> None:
    """As open_clip has it for its i18n so400m model."""
    model = tiny_timm(text={"width": WIDTH, "proj_type": "none"})
    with torch.no_grad():
        torch.testing.assert_close(adapt(model).encode_text(rows()), library_text(model, rows()))


# Tokens --------------------------------------------------------------------------------------------------------------


def through_open_clip(folder: Any, tokenizer: Any) -> Any:
    """open_clip's tokenizer class, with the cleaning of its SigLIP configurations, around a saved one."""
    from open_clip.tokenizer import HFTokenizer

    tokenizer.save_pretrained(folder)
    return HFTokenizer(str(folder), context_length=CONTEXT, clean="canonicalize")


def test_tokens_padded_with_the_end_token() -> None:
    adapter = adapt(tiny_transformers(), tokenizer=siglip_like_tokenizer())
    tokens = adapter.tokenize(["", "a cat", "cat " * 8, "cat " * 9, "cat " * 10, "dog " * 40])
    assert tokens.ids.shape == (6, CONTEXT)
    assert tokens.ids.dtype == tokens.lengths.dtype == torch.int64
    assert tokens.lengths.tolist() == [1, 3, 9, 10, 10, 10]
    assert tokens.truncated == [False, False, False, False, True, True]
    assert (tokens.ids.gather(1, tokens.lengths[:, None] - 1) == 1).all()
    assert tokens.ids[1].tolist() == [3, 4, *[1] * 8]
    assert adapter.tokenize([]).ids.shape == (0, CONTEXT)


def test_tokens_of_siglip_2_are_lower_cased_and_padded_at_the_right() -> None:
    tokenizer = siglip2_tokenizer()
    assert tokenizer.padding_side == "left"
    adapter = adapt(tiny_transformers(), tokenizer=tokenizer)
    tokens = adapter.tokenize(["Cat", "cat", "zz" * 20])
    assert tokens.ids[0].tolist() == tokens.ids[1].tolist() == [33, *[0] * 9]
    assert tokens.lengths.tolist() == [1, 1, 10]
    assert tokens.truncated == [False, False, True]
    # The caller's tokenizer is as it was.
    assert tokenizer.padding_side == "left"


def test_a_plain_gemma_tokenizer_gets_lower_case() -> None:
    class GemmaTokenizerFast(type(siglip_like_tokenizer())):  # type: ignore[misc]
        pass

    plain = siglip_like_tokenizer()
    gemma = GemmaTokenizerFast(tokenizer_object=plain._tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    assert adapt(tiny_transformers(), tokenizer=plain).tokenize(["CAT"]).ids[0, 0] == 2
    assert adapt(tiny_transformers(), tokenizer=gemma).tokenize(["CAT"]).ids[0, 0] == 4


def test_a_tokenizer_of_open_clip_keeps_its_own_cleaning(tmp_path: Any) -> None:
    tokenizer = through_open_clip(tmp_path, siglip_like_tokenizer())
    adapter = adapt(tiny_timm(), tokenizer=tokenizer)
    tokens = adapter.tokenize(["A cat, a DOG.", "a cat a dog", "cat " * 9, "cat " * 10])
    assert torch.equal(tokens.ids[0], tokens.ids[1])
    assert tokens.lengths.tolist() == [5, 5, 10, 10]
    assert tokens.truncated == [False, False, False, True]
    tokenizer.tokenizer.padding_side = "left"
    with pytest.raises(TTDError, match="pads at the left"):
        adapter.tokenize(["a"])


def test_a_processor_stands_for_its_tokenizer_and_image_processor() -> None:
    from transformers import SiglipImageProcessor

    class Processor:
        image_processor = SiglipImageProcessor(size={"height": IMAGE, "width": IMAGE}, image_mean=[0.1, 0.2, 0.3])
        tokenizer = siglip_like_tokenizer()

    adapter = adapt(tiny_transformers(), tokenizer=Processor(), preprocess=Processor())
    assert adapter.tokenize(["a cat"]).lengths.tolist() == [3]
    assert adapter.description.mean == (0.1, 0.2, 0.3)


def test_any_string_is_tokenised() -> None:
    for tokenizer in (siglip_like_tokenizer(), siglip2_tokenizer()):
        adapter = adapt(tiny_transformers(), tokenizer=tokenizer)
        tokens = adapter.tokenize(["caf\ud83d", "\ud83d\ude00", "<pad> </s>", "\0\n\t", "漢字 ☃" * 30])
        assert tokens.ids.shape == (5, CONTEXT)
        assert int(tokens.lengths.min()) >= 1


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "without a tokenizer; pass tokenizer=transformers.AutoTokenizer"),
        (lambda texts: {"input_ids": [[1]]}, "not a dict"),
        (lambda texts: torch.zeros(1, 77, dtype=torch.long), r"must return a tensor of shape \(1, 10\)"),
        (lambda texts: 1 / 0, "failed .ZeroDivisionError"),
    ],
)
def test_tokenizers_that_do_not_fit(tokenizer: Any, message: str) -> None:
    with pytest.raises(TTDError, match=message):
        adapt(tiny_transformers(), tokenizer=tokenizer).tokenize(["a"])


def test_a_tokenizer_that_takes_no_length() -> None:
    fixed = adapt(tiny_transformers(), tokenizer=lambda texts: torch.full((len(texts), CONTEXT), 5))
    assert fixed.tokenize(["a"]).truncated == [True]


@pytest.mark.parametrize("texts", ["a cat", ["a", None], [b"a"]])
def test_only_lists_of_strings_are_tokenised(texts: Any) -> None:
    with pytest.raises(InputError, match="list of strings"):
        adapt(tiny_transformers(), tokenizer=siglip_like_tokenizer()).tokenize(texts)


# Pictures ------------------------------------------------------------------------------------------------------------


def picture(width: int = 50, height: int = 30) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@both
def test_the_whole_picture_is_kept(container: str) -> None:
    adapter = adapt(tiny(container))
    image = Image.new("RGB", (100, 40), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 4, 40))
    for transform in (adapter.dense_transform((16, 40)), adapter.native_transform()):
        seen = transform(image)
        assert seen.dtype == torch.float32
        assert float(seen[:, :, 0].min()) > 0.3
        assert float(seen[:, :, 4:].max()) < -0.8
    assert adapter.dense_transform((16, 40))(image).shape == (3, 16, 40)
    assert adapter.dense_transform()(image).shape == adapter.native_transform()(image).shape == (3, IMAGE, IMAGE)
    with pytest.raises(ImageSizeError):
        adapter.dense_transform(30)


@both
def test_without_a_word_on_it_normalisation_is_siglips(container: str) -> None:
    description = adapt(tiny(container)).description
    assert description.mean == description.std == (0.5, 0.5, 0.5)
    assert description.interpolation == "bicubic"
    mapping = adapt(tiny(container), preprocess={"mean": 0.9, "interpolation": "bilinear"})
    assert mapping.description.mean == (0.9, 0.9, 0.9)
    assert mapping.description.std == (0.5, 0.5, 0.5)
    assert mapping.description.interpolation == "bilinear"
    assert mapping.native_transform()(picture()).shape == (3, IMAGE, IMAGE)
    with pytest.raises(InputError, match="does not say how it normalises"):
        adapt(tiny(container), preprocess=lambda image: image)


def test_native_preprocessing_is_transformers_own() -> None:
    from transformers import SiglipImageProcessor

    processor = SiglipImageProcessor(size={"height": IMAGE, "width": IMAGE})
    own = processor(images=picture(), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(adapt(tiny_transformers()).native_transform()(picture()), own)
    other = SiglipImageProcessor(size={"height": 16, "width": 24}, image_std=[0.1] * 3, resample=2)
    adapter = adapt(tiny_transformers(), preprocess=other)
    assert adapter.native_transform()(picture()).shape == (3, 16, 24)
    assert adapter.description.std == (0.1, 0.1, 0.1)
    assert adapter.description.interpolation == "bilinear"


def test_native_preprocessing_is_open_clips_own() -> None:
    import open_clip
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model = tiny_timm()
    squash = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "resize_mode": "squash"}
    set_model_preprocess_cfg(model, squash | {"size": (IMAGE, IMAGE)})
    own = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    adapter = adapt(model)
    assert adapter.description.mean == (0.1, 0.2, 0.3)
    assert torch.equal(adapter.native_transform()(picture()), own(picture()))
    given = open_clip.image_transform((IMAGE, IMAGE), is_train=False, mean=(0.3, 0.2, 0.1), std=(1.0, 1.0, 1.0))
    adapter = adapt(model, preprocess=given)
    assert torch.equal(adapter.native_transform()(picture()), given(picture()))
    assert adapter.description.mean == (0.3, 0.2, 0.1)


@both
def test_transforms_can_be_sent_to_workers(container: str) -> None:
    adapter = adapt(tiny(container))
    for transform in (adapter.dense_transform((16, 24)), adapter.native_transform()):
        assert torch.equal(pickle.loads(pickle.dumps(transform))(picture()), transform(picture()))


# Description and refusals --------------------------------------------------------------------------------------------


@both
def test_description(container: str) -> None:
    description = adapt(tiny(container), name="some", weights="random").description
    assert description.name == "siglip:some@random"
    assert description.embedding_width == WIDTH
    assert description.patch_size == (PATCH, PATCH)
    assert description.image_size == (IMAGE, IMAGE)
    assert description.context_length == CONTEXT
    assert description.logits == "sigmoid"
    assert description.dense_mode == "value"
    assert set(description.dense_modes) == set(MODES)
    kind = "SiglipModel" if container == "transformers" else "CustomTextCLIP"
    assert adapt(tiny(container)).description.name == f"siglip:{kind}"


@both
def test_logit_scale_and_bias_are_scalars_with_gradient(container: str) -> None:
    model = tiny(container)
    adapter = adapt(model)
    assert adapter.logit_scale().shape == adapter.logit_bias().shape == ()
    torch.testing.assert_close(adapter.logit_scale(), torch.tensor(4.0).exp())
    torch.testing.assert_close(adapter.logit_bias(), torch.tensor(-12.0))
    (adapter.logit_scale() + adapter.logit_bias()).backward()
    assert model.logit_scale.grad is not None
    assert model.logit_bias.grad is not None


def test_nonscalar_and_missing_bias_of_open_clip() -> None:
    adapter = adapt(tiny_timm(nonscalar_logit_scale=True))
    assert adapter.logit_scale().shape == adapter.logit_bias().shape == ()
    softmax = adapt(tiny_timm(init_logit_bias=None))
    assert softmax.logit_bias() is None
    assert softmax.description.logits == "softmax"
    assert softmax.description.calibration == Calibration()


@both
def test_calibration_is_the_models_logits_without_the_prior_of_a_batch(container: str) -> None:
    adapter = adapt(tiny(container))
    calibration = adapter.description.calibration
    cosine = torch.tensor([0.0, 0.03, 0.2])
    expected = torch.sigmoid(torch.tensor(4.0).exp() * cosine - 12.0 + 10.0)
    torch.testing.assert_close(calibration.probability(cosine), expected)
    assert adapt(tiny(container), calibration=Calibration(3, 1)).description.calibration == Calibration(3, 1)


@both
def test_towers_share_no_parameter_and_leave_out_the_logits(container: str) -> None:
    model = tiny(container)
    adapter = adapt(model)
    image, text = (dict(adapter.tower_parameters(tower)) for tower in ("image", "text"))
    assert not set(image) & set(text)
    assert set(image) | set(text) == {name for name, _ in model.named_parameters()} - {"logit_scale", "logit_bias"}
    adapter.encode_text(rows()).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(text)


def test_the_dense_mode_can_be_changed_and_is_checked() -> None:
    adapter = adapt(tiny_transformers(), dense="token_probe", last_block="value")
    assert adapter.description.dense_mode == "token_probe,last_block=value"
    adapter.dense = "query_query"
    assert adapter.description.dense_mode == "query_query"
    with pytest.raises(InputError, match="unknown dense mode 'token_prob'; did you mean 'token_probe'"):
        adapter.dense = "token_prob"
    with pytest.raises(InputError, match="unknown last_block 'values'; did you mean 'value'"):
        adapt(tiny_transformers(), last_block="values")
    with pytest.raises(InputError, match="unknown dense mode 'vv'"):
        SiglipMode("vv")  # type: ignore[arg-type]
    assert siglip_mode("value,last_block=value", "plain") == SiglipMode()


def naflex() -> Any:
    import transformers

    small = config()["vision_config"]
    del small["image_size"]
    return transformers.Siglip2Model(
        transformers.Siglip2Config(vision_config=small | {"num_patches": 16}, text_config=config()["text_config"])
    )


def naflex_timm() -> Any:
    import timm

    trunk = timm.create_model(
        "naflexvit_base_patch16_siglip", embed_dim=WIDTH, depth=1, num_heads=4, num_classes=0, patch_size=8
    )
    return tiny_timm(trunk=trunk)


def with_head_positions() -> Any:
    model = tiny_timm()
    model.visual.trunk.attn_pool.pos_embed = nn.Parameter(torch.zeros(GRID * GRID, WIDTH))
    return model


def shared_no_space() -> Any:
    model = tiny_transformers()
    model.text_model.head = nn.Linear(24, WIDTH + 1)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (naflex, "NaFlex"),
        (naflex_timm, "NaFlex"),
        (lambda: tiny_timm(trunk=tiny_trunk(reg_tokens=1)), "class or register tokens"),
        (with_head_positions, "position embeddings of its own"),
        (lambda: tiny_transformers(vision_use_head=False), "without the pooling head"),
        (shared_no_space, "share no space"),
        (lambda: nn.Linear(2, 2), "neither like transformers' SiglipModel"),
    ],
)
def test_models_that_cannot_be_served_are_refused_with_the_reason(build: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"cannot be adapted: .*{message}") as caught:
        adapt(build())
    assert "\n" not in str(caught.value)


def test_a_wrapped_pooling_head_is_refused() -> None:
    """nn.MultiheadAttention reads the weight of its output projection past any wrapper, so LoRA there is a trap."""
    peft = pytest.importorskip("peft")
    model = tiny_transformers()
    adapter = adapt(model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["out_proj"]), model)
    with pytest.raises(
        UnsupportedModelError, match=r"pooling head contains a peft.*leave vision_model.head.attention out"
    ):
        adapter.encode_image(pixels())
    with pytest.raises(UnsupportedModelError, match="dense mode 'value' cannot be used"):
        adapt(model)
    model = tiny_transformers()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["head.attention"]), model)
    with pytest.raises(UnsupportedModelError, match="pooling head contains a peft"):
        adapt(model)


def test_a_head_without_query_projection_takes_the_value_mode_alone() -> None:
    model = tiny_timm()
    model.visual.trunk.attn_pool.q = nn.Identity()
    assert adapt(model).description.dense_modes == ("value", "value,last_block=value")
    with pytest.raises(UnsupportedModelError, match="no queries"):
        adapt(model, dense="token_probe")


def test_attention_that_takes_no_mask_keeps_the_plain_last_block() -> None:
    model = tiny_transformers()
    model.vision_model.config._attn_implementation = "flash_attention_2"
    assert adapt(model).description.dense_modes == ("value", "token_probe", "query_query")
    with pytest.raises(UnsupportedModelError, match="takes a mask, and the image tower runs 'flash_attention_2'"):
        adapt(model, last_block="value")


@pytest.mark.slow
@pytest.mark.parametrize("container", CONTAINERS)
def test_full_size(container: str) -> None:
    from ttd_siglip.family import SiglipFamily

    name = "google/siglip-base-patch16-224" if container == "transformers" else "ViT-B-16-SigLIP"
    adapter = SiglipFamily().load(name, "random")
    images = pixels(1, 224, 224)
    ids = torch.randint(0, 32000, (2, 64))
    assert VOCABULARY < 32000
    with torch.no_grad():
        features = adapter.encode_image(images)
        assert features.patches.shape == (1, 14, 14, 768)
        torch.testing.assert_close(features.pooled, library_image(adapter.model, images), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(adapter.encode_text(ids), library_text(adapter.model, ids), atol=1e-5, rtol=1e-4)
        one = adapter.encode_image(pixels(1, 16, 16))
        torch.testing.assert_close(one.patches[:, 0, 0], one.pooled, atol=1e-5, rtol=1e-5)
