"""The open_clip adapter: dense and pooled features, text, input, and that it leaves the model alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from helpers_open_clip import (
    CONTEXT,
    EMBED,
    END,
    GRID,
    IMAGE,
    PATCH,
    VOCABULARY,
    WordTokenizer,
    assert_unchanged,
    cosine_gap,
    pixels,
    reference_dense,
    snapshot,
    tiny_clip,
    token_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from ttd_open_clip.adapter import OpenCLIPAdapter

from ttd_plugins.errors import ImageSizeError, InputError, TTDError, UnsupportedModelError
from ttd_plugins.toolkit.dense_modes import PRESETS, DenseMode

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "layer_scale": {"vision": {"ls_init_value": 0.5}},
    "no_ln_pre": {"vision": {"no_ln_pre": True}},
    "final_ln_after_pool": {"vision": {"final_ln_after_pool": True}},
    "avg": {"vision": {"pool_type": "avg"}},
    "avg_final_ln_after_pool": {"vision": {"pool_type": "avg", "final_ln_after_pool": True}},
    "sin_cos": {"vision": {"pos_embed_type": "sin_cos_2d"}},
    "output_tokens": {"vision": {"output_tokens": True}},
    "custom_block": {"vision": {"block_type": "custom"}},
    "qk_norm": {"vision": {"qk_norm": True}},
    "sub_ln": {"vision": {"scale_attn": True, "scale_attn_inner": True, "scale_fc": True, "scale_heads": True}},
    "custom_text": {"custom_text": True},
    "sigmoid": {"init_logit_bias": -10.0, "init_logit_scale": 2.0},
}
SIZES = [(IMAGE, IMAGE), (IMAGE, 2 * IMAGE), (2 * IMAGE, IMAGE), (PATCH, PATCH), (24, 40), (16, 64)]


def library_image(model: Any, images: torch.Tensor) -> torch.Tensor:
    out = model.encode_image(images, normalize=False)
    return out[0] if isinstance(out, tuple) else out


def value_reference(model: Any, images: torch.Tensor) -> torch.Tensor:
    return reference_dense(model, images, "value", True, True)


# Dense and pooled features -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_pooled_is_the_librarys_own(variant: str) -> None:
    model = tiny_clip(**VARIANTS[variant])
    with torch.no_grad():
        features = OpenCLIPAdapter(model).encode_image(pixels())
        torch.testing.assert_close(features.pooled, library_image(model, pixels()), atol=2e-6, rtol=1e-5)
    assert features.patches.shape == (2, GRID, GRID, EMBED)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("qk_norm", "sub_ln")])
def test_dense_is_the_hand_written_value_path(variant: str) -> None:
    model = tiny_clip(**VARIANTS[variant])
    with torch.no_grad():
        patches = OpenCLIPAdapter(model).encode_image(pixels()).patches
        torch.testing.assert_close(patches, value_reference(model, pixels()), atol=1e-5, rtol=1e-5)


def test_sub_layer_norms_are_part_of_the_value_path() -> None:
    model = tiny_clip(**VARIANTS["sub_ln"])
    block = model.visual.transformer.resblocks[-1]
    with torch.no_grad():
        block.attn.head_scale.copy_(torch.rand_like(block.attn.head_scale) + 0.5)
        seen = OpenCLIPAdapter(model).encode_image(pixels()).patches
        one_by_one = []
        x = model.visual._embeds(pixels())
        for earlier in list(model.visual.transformer.resblocks)[:-1]:
            x = earlier(x)
        for position in range(1, x.shape[1]):
            one_by_one.append(block(x[:, position : position + 1]))
        expected = model.visual.ln_post(torch.cat(one_by_one, dim=1)) @ model.visual.proj
    torch.testing.assert_close(seen.flatten(1, 2), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["value", "plain", "qq", "kk", "qq+kk", "kk+window"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("ffn", [True, False])
@pytest.mark.parametrize("size", [(IMAGE, IMAGE), (24, 40)])
def test_every_mode_equals_its_formula(attention: Any, residual: bool, ffn: bool, size: tuple[int, int]) -> None:
    model = tiny_clip(vision={"image_size": size, "ls_init_value": 0.7})
    adapter = OpenCLIPAdapter(model, dense=DenseMode(attention, residual, ffn, window_std=1.5))
    images = pixels(2, *size)
    with torch.no_grad():
        features = adapter.encode_image(images)
        expected = reference_dense(model, images, attention, residual, ffn, std=1.5)
        torch.testing.assert_close(features.patches, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.pooled, library_image(model, images), atol=2e-6, rtol=1e-5)


def test_the_formulas_tell_the_modes_apart() -> None:
    model = tiny_clip()
    with torch.no_grad():
        all_modes = [OpenCLIPAdapter(model, dense=name).encode_image(pixels()).patches for name in PRESETS]
    for i, one in enumerate(all_modes):
        for other in all_modes[i + 1 :]:
            assert cosine_gap(one, other) > 1e-3


@pytest.mark.parametrize("dense", PRESETS)
@pytest.mark.parametrize("variant", ["avg", "avg_final_ln_after_pool", "custom_block"])
def test_pooled_is_the_librarys_in_every_mode_of_other_towers(variant: str, dense: str) -> None:
    model = tiny_clip(**VARIANTS[variant])
    with torch.no_grad():
        pooled = OpenCLIPAdapter(model, dense=dense).encode_image(pixels()).pooled
        torch.testing.assert_close(pooled, library_image(model, pixels()), atol=2e-6, rtol=1e-5)


def test_presets_are_the_published_choices() -> None:
    assert (PRESETS["maskclip"].attention, PRESETS["maskclip"].residual, PRESETS["maskclip"].ffn) == (
        "value",
        True,
        True,
    )
    assert PRESETS["clearclip"] == DenseMode("qq", residual=False, ffn=False)
    assert PRESETS["sclip"] == DenseMode("qq+kk", residual=True, ffn=True)
    assert PRESETS["naclip"] == DenseMode("kk+window", residual=False, ffn=False, window_std=5.0)
    assert DenseMode("qq", residual=True, ffn=False).name == "qq,residual"
    assert DenseMode("kk+window", False, False, window_std=2).name == "kk+window(2)"


def test_without_projection_the_joint_space_is_the_towers_width() -> None:
    model = tiny_clip(text={"width": 32, "proj_type": "none"})
    model.visual.proj = None
    adapter = OpenCLIPAdapter(model)
    with torch.no_grad():
        features = adapter.encode_image(pixels())
        torch.testing.assert_close(features.pooled, library_image(model, pixels()), atol=2e-6, rtol=1e-5)
    assert adapter.description.embedding_width == features.patches.shape[-1] == 32


def test_pooled_is_left_out_when_not_asked_for() -> None:
    adapter = OpenCLIPAdapter(tiny_clip())
    with torch.no_grad():
        lean = adapter.encode_image(pixels(), pooled=False)
        assert lean.pooled is None
        assert torch.equal(lean.patches, adapter.encode_image(pixels()).patches)


def test_one_patch_reaches_one_place_of_the_map() -> None:
    """Columns are columns: what stands in the top right corner changes the top right of the map most."""
    model = tiny_clip(vision={"layers": 1})
    adapter = OpenCLIPAdapter(model)
    images = pixels(1, 24, 40)
    other = images.clone()
    other[:, :, :PATCH, -PATCH:] += 1
    with torch.no_grad():
        change = (adapter.encode_image(images).patches - adapter.encode_image(other).patches).norm(dim=-1)[0]
    assert change.shape == (3, 5)
    assert int(change.argmax()) == 4
    assert change[0, 4] > 0.1
    # With one block in value mode nothing else can change.
    assert float(change.flatten().sort().values[:-1].max()) < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_other_sizes_use_resampled_positions(size: tuple[int, int]) -> None:
    """The reference is open_clip itself at that size, given the position embedding that its loader would make."""
    model = tiny_clip()
    other = tiny_clip(vision={"image_size": size})
    grid = (size[0] // PATCH, size[1] // PATCH)
    state = model.state_dict()
    own = state["visual.positional_embedding"]
    table = own[1:].reshape(1, GRID, GRID, -1).permute(0, 3, 1, 2)
    if grid != (GRID, GRID):
        table = torch.nn.functional.interpolate(table, size=grid, mode="bicubic", antialias=True, align_corners=False)
    resampled = torch.cat([own[:1], table.permute(0, 2, 3, 1).reshape(-1, own.shape[1])])
    other.load_state_dict(state | {"visual.positional_embedding": resampled})
    before = snapshot(model)
    with torch.no_grad():
        features = OpenCLIPAdapter(model).encode_image(pixels(2, *size))
        torch.testing.assert_close(features.pooled, library_image(other, pixels(2, *size)), atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(features.patches, value_reference(other, pixels(2, *size)), atol=1e-5, rtol=1e-5)
    assert features.patches.shape == (2, *grid, EMBED)
    assert_unchanged(before, model)


def test_resampling_agrees_with_the_librarys_loader() -> None:
    from open_clip.model import resize_pos_embed

    model = tiny_clip()
    larger = tiny_clip(vision={"image_size": 48})
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    with torch.no_grad():
        pooled = OpenCLIPAdapter(model).encode_image(pixels(2, 48, 48)).pooled
        torch.testing.assert_close(pooled, library_image(larger, pixels(2, 48, 48)), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 33, 32), (2, 3, 4, 32), (2, 1, 32, 32), (3, 32, 32)])
def test_sizes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageSizeError):
        OpenCLIPAdapter(tiny_clip()).encode_image(torch.zeros(shape))


def test_images_do_not_see_each_other() -> None:
    adapter = OpenCLIPAdapter(tiny_clip())
    images = pixels(3)
    with torch.no_grad():
        together = adapter.encode_image(images)
        alone = adapter.encode_image(images[1:2])
    torch.testing.assert_close(together.patches[1:2], alone.patches, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(together.pooled[1:2], alone.pooled, atol=2e-6, rtol=1e-5)


# What is left behind -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dense", PRESETS)
def test_nothing_is_left_in_the_model(training: bool, dense: str) -> None:
    model = tiny_clip(vision={"patch_dropout": 0.5}).train(training)
    model.visual.conv1.requires_grad_(False)
    model.visual.ln_post.eval()
    before = snapshot(model)
    adapter = OpenCLIPAdapter(model, tokenizer=WordTokenizer(), dense=dense)
    features = adapter.encode_image(pixels(2, 24, 40))
    features.patches.sum().backward()
    adapter.encode_text(token_rows([3, 5])[:, :5]).sum().backward()
    adapter.tokenize(["a b c"])
    model.zero_grad()
    assert_unchanged(before, model)


def test_patches_are_never_dropped() -> None:
    model = tiny_clip(vision={"patch_dropout": 0.5})
    adapter = OpenCLIPAdapter(model)
    with torch.no_grad():
        evaluated = adapter.encode_image(pixels())
        model.train()
        trained = adapter.encode_image(pixels())
    torch.testing.assert_close(trained.patches, evaluated.patches, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(trained.pooled, evaluated.pooled, atol=2e-6, rtol=1e-5)


def test_gradients_reach_pixels_and_every_weight_that_matters() -> None:
    model = tiny_clip()
    images = pixels().requires_grad_()
    features = OpenCLIPAdapter(model).encode_image(images)
    (features.patches.square().sum() + features.pooled.square().sum()).backward()
    assert images.grad is not None
    assert float(images.grad.abs().min()) > 0
    for name, parameter in model.visual.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("dense", ["maskclip", "value_only", "sclip"])
def test_gradient_checkpointing_changes_nothing_and_covers_the_last_block(dense: str) -> None:
    grads = []
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for checkpointing in (False, True):
        model = tiny_clip(vision={"final_ln_after_pool": True}).train()
        model.set_grad_checkpointing(checkpointing)
        adapter = OpenCLIPAdapter(model, dense=dense)
        # Every mode starts the last block with its first norm, and again in the backward pass where it is checkpointed.
        handle = model.visual.transformer.resblocks[-1].ln_1.register_forward_pre_hook(count)
        features = adapter.encode_image(pixels())
        texts = adapter.encode_text(token_rows([3, 7])[:, :7])
        (features.patches.square().sum() + features.pooled.square().sum() + texts.square().sum()).backward()
        handle.remove()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert calls == 3
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
@pytest.mark.parametrize("dense", ["maskclip", "clearclip", "naclip"])
def test_half_precision_models(precision: str, dense: str) -> None:
    from open_clip.model import convert_weights_to_lp, get_cast_dtype

    plain = tiny_clip()
    half = tiny_clip(cast_dtype=get_cast_dtype(precision))
    if precision == "bf16":
        convert_weights_to_lp(half, dtype=torch.bfloat16)
    else:
        half.to(torch.bfloat16)
    with torch.no_grad():
        exact = OpenCLIPAdapter(plain, dense=dense).encode_image(pixels(2, 24, 40))
        adapter = OpenCLIPAdapter(half, dense=dense)
        features = adapter.encode_image(pixels(2, 24, 40))
        texts = adapter.encode_text(token_rows([3, 5])[:, :5])
    assert features.patches.dtype == features.pooled.dtype == texts.dtype == torch.bfloat16
    assert cosine_gap(features.patches.float(), exact.patches) < 0.02
    assert cosine_gap(features.pooled.float(), exact.pooled) < 0.02


def test_autocast() -> None:
    model = tiny_clip()
    adapter = OpenCLIPAdapter(model)
    with torch.no_grad():
        exact = adapter.encode_image(pixels())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = adapter.encode_image(pixels())
    assert cosine_gap(features.patches.float(), exact.patches) < 0.02
    assert cosine_gap(features.pooled.float(), exact.pooled) < 0.02


def test_copies_and_pickles_work_alike() -> None:
    adapter = OpenCLIPAdapter(tiny_clip(), tokenizer=WordTokenizer(), dense="clearclip")
    with torch.no_grad():
        expected = adapter.encode_image(pixels()).patches
        for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
            assert torch.equal(twin.encode_image(pixels()).patches, expected)
            assert twin.description == adapter.description


def test_meta_device() -> None:
    adapter = OpenCLIPAdapter(tiny_clip().to("meta"))
    features = adapter.encode_image(torch.zeros(2, 3, 24, 40, device="meta"))
    assert features.patches.shape == (2, 3, 5, EMBED)
    assert features.pooled.shape == (2, EMBED)
    assert adapter.encode_text(torch.zeros(2, 5, dtype=torch.long, device="meta")).shape == (2, EMBED)


# Text ----------------------------------------------------------------------------------------------------------------

TEXT_VARIANTS: dict[str, dict[str, Any]] = {
    "inlined": {},
    "custom": {"custom_text": True},
    "eos": {"text": {"pool_type": "eos", "eos_id": END}},
    "custom_eos": {"custom_text": True, "text": {"pool_type": "eos", "eos_id": END}},
    "linear_projection": {"text": {"proj_bias": True}},
    "no_projection": {"text": {"proj_type": "none", "width": EMBED, "heads": 2}},
    "custom_output_blocks": {"text": {"block_type": "custom"}},
    "first": {"text": {"pool_type": "first"}},
}


@pytest.mark.parametrize("variant", TEXT_VARIANTS)
def test_text_embeddings_are_the_librarys_at_any_length_that_keeps_the_end(variant: str) -> None:
    model = tiny_clip(**TEXT_VARIANTS[variant])
    adapter = OpenCLIPAdapter(model)
    assert not adapter.description.text_needs_full_context
    rows = token_rows([2, 3, 6, 5])
    with torch.no_grad():
        expected = model.encode_text(rows, normalize=False)
        for length in range(6, CONTEXT + 1):
            torch.testing.assert_close(adapter.encode_text(rows[:, :length]), expected, atol=2e-6, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, CONTEXT), min_size=1, max_size=5),
    extra=st.integers(0, CONTEXT),
    seed=st.integers(0, 10_000),
    custom=st.booleans(),
)
def test_trimming_is_exact(lengths: list[int], extra: int, seed: int, custom: bool) -> None:
    model = tiny_clip(custom_text=custom, seed=seed % 3)
    rows = token_rows(lengths, seed=seed)
    length = min(max(lengths) + extra, CONTEXT)
    with torch.no_grad():
        expected = model.encode_text(rows, normalize=False)
        torch.testing.assert_close(OpenCLIPAdapter(model).encode_text(rows[:, :length]), expected, atol=2e-6, rtol=1e-5)


WHOLE_TEXT: dict[str, dict[str, Any]] = {
    "bidirectional": {"text": {"no_causal_mask": True, "pool_type": "last"}},
    "last": {"text": {"pool_type": "last"}},
    "bidirectional_argmax": {"custom_text": True, "text": {"no_causal_mask": True}},
    "class_token": {"custom_text": True, "text": {"embed_cls": True, "output_tokens": True}},
}


@pytest.mark.parametrize("variant", WHOLE_TEXT)
def test_towers_that_look_behind_the_end_get_the_whole_row(variant: str) -> None:
    model = tiny_clip(**WHOLE_TEXT[variant])
    adapter = OpenCLIPAdapter(model, tokenizer=WordTokenizer())
    assert adapter.description.text_needs_full_context
    rows = token_rows([2, 5, CONTEXT])
    with torch.no_grad():
        expected = model.text(rows)[0] if variant == "class_token" else model.encode_text(rows, normalize=False)
        torch.testing.assert_close(adapter.encode_text(rows), expected)
    with pytest.raises(InputError, match="attends to all 12 positions"):
        adapter.encode_text(rows[:, :5])
    assert adapter.tokenize(["one two"]).lengths.tolist() == [4]


def test_the_refused_trimming_would_indeed_change_embeddings() -> None:
    model = tiny_clip(**WHOLE_TEXT["bidirectional_argmax"])
    rows = token_rows([3, 3])
    changed = rows.clone()
    changed[:, 5:] = 7
    with torch.no_grad():
        assert not torch.allclose(model.encode_text(rows), model.encode_text(changed), atol=1e-3)


def test_a_text_tower_from_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from open_clip.hf_model import HFTextEncoder

    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=CONTEXT + 2, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = tiny_clip(custom_text=True)
    torch.manual_seed(0)
    model.text = HFTextEncoder(
        "roberta", output_dim=EMBED, config=config, pretrained=False, pooler_type="mean_pooler", proj_type="linear"
    )
    model.eval()
    adapter = OpenCLIPAdapter(model, tokenizer=WordTokenizer(CONTEXT))
    assert adapter.description.text_needs_full_context
    # The table of positions (14 here) is no context length; the tokenizer knows the one that the model was trained at.
    assert adapter.description.context_length == CONTEXT
    assert adapter.tokenize(["one two"]).ids.shape == (1, CONTEXT)
    assert OpenCLIPAdapter(model).description.context_length == 77
    rows = token_rows([4, 6])
    with torch.no_grad():
        expected = model.encode_text(rows)
        torch.testing.assert_close(adapter.encode_text(rows), expected)
    targets = adapter.lora_targets("text")
    assert len(targets) == 2 * 6
    assert not any("pooler" in name for name in targets)
    adapter.add_lora(2, towers=["text"])
    adapter.encode_text(rows).square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.lora_parameters())
    adapter.unload()
    with torch.no_grad():
        assert torch.equal(adapter.encode_text(rows), expected)


@pytest.mark.parametrize("shape", [(CONTEXT,), (2, CONTEXT + 1)])
def test_token_ids_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError):
        OpenCLIPAdapter(tiny_clip()).encode_text(torch.zeros(shape, dtype=torch.long))


# Tokens --------------------------------------------------------------------------------------------------------------


def real_tokenizer_adapter(context: int = 16) -> OpenCLIPAdapter:
    model = tiny_clip(text={"vocab_size": 49408, "context_length": context})
    return OpenCLIPAdapter(model, tokenizer=open_clip.get_tokenizer("ViT-B-32"))


def test_tokens_of_open_clips_own_tokenizer() -> None:
    adapter = real_tokenizer_adapter()
    tokens = adapter.tokenize(["", "a photo of a cat", "cat " * 14, "cat " * 15, "cat " * 40])
    assert tokens.ids.shape == (5, 16)
    assert tokens.ids.dtype == tokens.lengths.dtype == torch.int64
    assert tokens.lengths.tolist() == [2, 7, 16, 16, 16]
    assert tokens.truncated == [False, False, False, True, True]
    assert (tokens.ids.gather(1, tokens.lengths[:, None] - 1) == 49407).all()
    assert tokens.lengths.device.type == "cpu"


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=60), max_size=4))
def test_any_string_is_tokenised_and_its_embedding_needs_no_more_than_its_length(texts: list[str]) -> None:
    adapter = ANY_STRING
    tokens = adapter.tokenize(texts)
    assert tokens.ids.shape == (len(texts), 16)
    encode = adapter.tokenizer.encode
    assert tokens.truncated == [len(encode(one)) + 2 > 16 for one in texts]
    if texts:
        with torch.no_grad():
            cut = adapter.encode_text(tokens.ids[:, : int(tokens.lengths.max())])
            torch.testing.assert_close(cut, adapter.model.encode_text(tokens.ids), atol=2e-6, rtol=1e-5)


ANY_STRING = real_tokenizer_adapter()


def test_unpaired_surrogates_are_taken() -> None:
    assert real_tokenizer_adapter().tokenize(["caf\ud83d", "\ud83d\ude00"]).lengths.min() > 2


def test_a_tokenizer_that_takes_no_context_length() -> None:
    words = WordTokenizer(CONTEXT)
    adapter = OpenCLIPAdapter(tiny_clip(), tokenizer=lambda texts: words(texts))
    # It has no encode() either: a row that is full counts as truncated.
    assert adapter.tokenize(["a b", "a " * 10, "a " * 11]).truncated == [False, True, True]

    class WithEncode:
        def __call__(self, texts: list[str]) -> torch.Tensor:
            return words(texts)

        def encode(self, text: str) -> list[int]:
            return [1] * len(text.split())

    adapter = OpenCLIPAdapter(tiny_clip(), tokenizer=WithEncode())
    assert adapter.tokenize(["a b", "a " * 10, "a " * 11]).truncated == [False, False, True]


def test_a_tokenizer_that_must_be_told_to_truncate() -> None:
    def tokenize(texts: list[str], context_length: int = 77, truncate: bool = False) -> torch.Tensor:
        assert truncate, "too long"
        return WordTokenizer()(texts, context_length).int()

    tokens = OpenCLIPAdapter(tiny_clip(), tokenizer=tokenize).tokenize(["a " * 30, "b"])
    assert tokens.ids.dtype == torch.int64
    assert tokens.truncated == [True, False]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "without a tokenizer; pass tokenizer=open_clip.get_tokenizer"),
        (lambda texts: {"input_ids": [[1]]}, "not a dict"),
        (lambda texts: torch.zeros(1, 77, dtype=torch.long), r"must return a tensor of shape \(1, 12\)"),
        (lambda texts: 1 / 0, "failed .ZeroDivisionError"),
    ],
)
def test_tokenizers_that_do_not_fit(tokenizer: Any, message: str) -> None:
    with pytest.raises(TTDError, match=message):
        OpenCLIPAdapter(tiny_clip(), tokenizer=tokenizer).tokenize(["a"])


@pytest.mark.parametrize("texts", ["a cat", ["a", None], [b"a"]])
def test_only_lists_of_strings_are_tokenised(texts: Any) -> None:
    with pytest.raises(InputError, match="list of strings"):
        OpenCLIPAdapter(tiny_clip(), tokenizer=WordTokenizer()).tokenize(texts)


# Pictures ------------------------------------------------------------------------------------------------------------


def with_preprocessing(**options: Any) -> Any:
    from open_clip.model import set_model_preprocess_cfg

    model = tiny_clip()
    config = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic", "size": IMAGE}
    set_model_preprocess_cfg(model, config | options)
    return model


def picture(width: int = 50, height: int = 30) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_the_whole_picture_is_kept() -> None:
    adapter = OpenCLIPAdapter(with_preprocessing())
    image = Image.new("RGB", (100, 40), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 4, 40))
    pixels = adapter.dense_transform((16, 40))(image)
    assert pixels.shape == (3, 16, 40)
    assert pixels.dtype == torch.float32
    scaled = pixels * torch.tensor((0.2, 0.3, 0.4)).view(3, 1, 1) + torch.tensor((0.5, 0.4, 0.3)).view(3, 1, 1)
    assert float(scaled[:, :, 0].min()) > 0.9
    assert float(scaled[:, :, 4:].max()) < 0.1
    assert adapter.dense_transform()(image).shape == (3, IMAGE, IMAGE)
    assert adapter.dense_transform(16)(image).shape == (3, 16, 16)
    with pytest.raises(ImageSizeError):
        adapter.dense_transform(30)


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    for interpolation in ("bicubic", "bilinear"):
        adapter = OpenCLIPAdapter(with_preprocessing(interpolation=interpolation, mean=(0, 0, 0), std=(1, 1, 1)))
        assert adapter.description.interpolation == interpolation
        assert float((adapter.dense_transform(8)(Image.fromarray(stripes)) - 0.5).abs().max()) < 0.05


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I;16", "I;16B", "I", "PA", "LAB"]
)
def test_any_mode_of_picture(mode: str) -> None:
    adapter = OpenCLIPAdapter(with_preprocessing())
    for transform in (adapter.dense_transform(), adapter.native_transform()):
        pixels = transform(Image.new(mode, (40, 36)))
        assert pixels.shape == (3, IMAGE, IMAGE)
        assert torch.isfinite(pixels).all()


def test_sixteen_bit_greys_are_scaled_rather_than_clipped() -> None:
    adapter = OpenCLIPAdapter(with_preprocessing(mean=(0, 0, 0), std=(1, 1, 1)))
    grey = Image.fromarray(np.full((40, 40), 0x8000, dtype=np.uint16))
    assert abs(float(adapter.dense_transform()(grey).mean()) - 0.5) < 0.01
    with pytest.raises(InputError, match="floating-point values of unknown range"):
        adapter.dense_transform()(Image.new("F", (40, 40)))


def test_native_preprocessing_is_open_clips_own() -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model = with_preprocessing(resize_mode="longest", fill_color=7)
    own = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    assert torch.equal(OpenCLIPAdapter(model).native_transform()(picture()), own(picture()))
    given = open_clip.image_transform((IMAGE, IMAGE), is_train=False, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    adapter = OpenCLIPAdapter(model, preprocess=given)
    assert torch.equal(adapter.native_transform()(picture()), given(picture()))
    assert adapter.description.mean == (0.1, 0.2, 0.3)


def test_where_normalisation_is_read_from() -> None:
    plain = OpenCLIPAdapter(tiny_clip()).description
    assert (plain.mean, plain.std) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    legacy = tiny_clip()
    legacy.visual.image_mean, legacy.visual.image_std = (0.1, 0.1, 0.1), 0.5
    assert OpenCLIPAdapter(legacy).description.std == (0.5, 0.5, 0.5)
    mapping = OpenCLIPAdapter(with_preprocessing(), preprocess={"mean": (0.9, 0.9, 0.9), "interpolation": "bilinear"})
    assert mapping.description.mean == (0.9, 0.9, 0.9)
    assert mapping.description.std == (0.2, 0.3, 0.4)
    assert mapping.description.interpolation == "bilinear"
    assert mapping.native_transform()(picture()).shape == (3, IMAGE, IMAGE)
    with pytest.raises(InputError, match="does not say how it normalises"):
        OpenCLIPAdapter(tiny_clip(), preprocess=lambda image: image)


def test_transforms_can_be_sent_to_workers() -> None:
    adapter = OpenCLIPAdapter(with_preprocessing())
    for transform in (adapter.dense_transform((16, 24)), adapter.native_transform()):
        assert torch.equal(pickle.loads(pickle.dumps(transform))(picture()), transform(picture()))


# Description, claims and refusals ------------------------------------------------------------------------------------


def test_description() -> None:
    description = OpenCLIPAdapter(tiny_clip(), name="tiny", weights="random").description
    assert description.name == "open_clip:tiny@random"
    assert description.embedding_width == EMBED
    assert description.patch_size == (PATCH, PATCH)
    assert description.image_size == (IMAGE, IMAGE)
    assert description.context_length == CONTEXT
    assert description.logits == "softmax"
    assert description.dense_mode == "maskclip"
    assert set(description.dense_modes) == set(PRESETS)
    assert OpenCLIPAdapter(tiny_clip()).description.name == "open_clip:CLIP"


@pytest.mark.parametrize("nonscalar", [True, False])
def test_logit_scale_and_bias(nonscalar: bool) -> None:
    model = tiny_clip(init_logit_bias=-10.0, init_logit_scale=2.0, nonscalar_logit_scale=nonscalar)
    adapter = OpenCLIPAdapter(model)
    assert adapter.description.logits == "sigmoid"
    assert adapter.logit_scale().shape == adapter.logit_bias().shape == ()
    torch.testing.assert_close(adapter.logit_scale(), torch.tensor(2.0).exp())
    (adapter.logit_scale() + adapter.logit_bias()).backward()
    assert model.logit_scale.grad is not None
    assert model.logit_bias.grad is not None
    assert OpenCLIPAdapter(tiny_clip()).logit_bias() is None


@pytest.mark.parametrize("custom_text", [True, False])
def test_towers_share_no_parameter_and_leave_out_the_logits(custom_text: bool) -> None:
    model = tiny_clip(custom_text=custom_text, init_logit_bias=-10.0)
    adapter = OpenCLIPAdapter(model)
    image = dict(adapter.tower_parameters("image"))
    text = dict(adapter.tower_parameters("text"))
    assert not set(image) & set(text)
    assert set(image) | set(text) == {name for name, _ in model.named_parameters()} - {"logit_scale", "logit_bias"}
    adapter.encode_text(token_rows([3])).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(text)


def test_the_dense_mode_can_be_changed_and_is_checked() -> None:
    adapter = OpenCLIPAdapter(tiny_clip())
    adapter.dense = "sclip"
    assert adapter.description.dense_mode == "sclip"
    with pytest.raises(InputError, match="unknown dense mode 'clearclp'; did you mean 'clearclip'"):
        adapter.dense = "clearclp"
    with pytest.raises(InputError, match="unknown dense attention"):
        DenseMode("vv")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="window_std"):
        DenseMode("kk+window", window_std=0)


def test_modes_that_need_queries_are_refused_for_attention_with_extras() -> None:
    model = tiny_clip(vision={"qk_norm": True})
    assert OpenCLIPAdapter(model).description.dense_modes == ("maskclip", "value_only", "plain")
    with pytest.raises(UnsupportedModelError, match="dense mode 'clearclip' cannot be used"):
        OpenCLIPAdapter(model, dense="clearclip")


class Renamed(nn.Module):
    """An image tower with the given attributes and no more."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def resnet() -> Any:
    torch.manual_seed(0)
    return open_clip.CLIP(
        embed_dim=EMBED,
        vision_cfg={"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 32},
        text_cfg={"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 1},
    )


def with_trunk() -> Any:
    model = tiny_clip(custom_text=True)
    model.visual = Renamed(trunk=nn.Linear(2, 2), head=nn.Identity())
    return model


def attention_pooled() -> Any:
    return tiny_clip(vision={"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2})


def shared_no_space() -> Any:
    model = tiny_clip()
    model.visual.proj = None
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (resnet, "of the kind 'resnet'"),
        (with_trunk, "is a timm trunk"),
        (attention_pooled, "of the kind 'attention_pooled'"),
        (lambda: tiny_clip(vision={"pool_type": "none"}), "no pooled embedding"),
        (lambda: tiny_clip(text={"pool_type": "none"}), "text tower returns no pooled embedding"),
        (shared_no_space, "share no space"),
        (lambda: nn.Linear(2, 2), "no image tower named visual"),
    ],
)
def test_models_that_cannot_be_served_are_refused_with_the_reason(build: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        OpenCLIPAdapter(build())


@pytest.mark.parametrize("dense", ["maskclip", "clearclip"])
def test_full_size(dense: str) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model(model_name="ViT-B-32", load_weights=False).eval()
    adapter = OpenCLIPAdapter(model, tokenizer=open_clip.get_tokenizer("ViT-B-32"), dense=dense)
    images = pixels(1, 224, 224)
    with torch.no_grad():
        features = adapter.encode_image(images)
        assert features.patches.shape == (1, 7, 7, 512)
        torch.testing.assert_close(features.pooled, library_image(model, images), atol=1e-5, rtol=1e-4)
        tokens = adapter.tokenize(["a photo of a cat on a mat"])
        cut = adapter.encode_text(tokens.ids[:, : int(tokens.lengths.max())])
        torch.testing.assert_close(cut, model.encode_text(tokens.ids), atol=1e-5, rtol=1e-4)
