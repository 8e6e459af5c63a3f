"""Attention-pooled towers of open_clip, multilingual text towers, and transformers' relatives of CLIP.

Each passes the conformance kit, and its embeddings are the library's to 1e-5. `python tests/full_size_table.py --work
FOLDER` prints the same as tables, at full size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'openai_clip'")
pytest.importorskip("peft", reason="needs the extra 'lora'")

import torch
from full_size_table import differences, measure
from helpers_openai_clip import transformers_clip
from helpers_towers import BERT, SMALL_CONTEXT, TOWERS, Words, coca, relative, resnet
from PIL import Image
from ttd_open_clip.adapter import OpenCLIPAdapter

from ttd_plugins import load, wrap
from ttd_plugins.errors import InputError, UnsupportedModelError
from ttd_plugins.plugins import family_for_model
from ttd_plugins.testing import CHECKS, check_adapter

CORE = (
    "adapter_is_built", "description", "logits", "claimed_by_one_family", "pooled_matches_library",
    "text_matches_library", "other_sizes", "patches_in_place", "joint_space", "end_token", "truncation",
    "text_trimming", "lora_reaches_features", "lora_unloads_and_merges", "towers_complete", "model_unchanged",
    "export_holds_model",
)  # fmt: skip
"""The checks that fail first where a new tower is adapted wrongly; the slow run has all of them."""
FULL_CONTEXT = ("coca", "xlm_roberta", "nllb", "mt5")
"""Text towers that the library runs as a whole, so that rows are not trimmed."""
TEXT_OF_TRANSFORMERS = ("xlm_roberta", "nllb", "mt5")
"""open_clip rebuilds such a text tower by its name on a hub only, so that a small one cannot be exported."""
NOT_OF_THE_LIBRARY = {
    "sizes_match_library", "empty_batches", "grad_checkpointing", "float16", "preferred_size", "meta_texts"
}  # fmt: skip
UNSTATED = {"patches_match_library", "tokens_match_library", "pixels_match_library"}


def allowed_to_skip(name: str) -> set[str]:
    text = {"text_trimming"} if name in FULL_CONTEXT else set()
    return text | ({"export_holds_model"} if name in TEXT_OF_TRANSFORMERS else set())


@pytest.mark.parametrize("name", TOWERS)
def test_a_small_tower_passes_the_core_of_the_kit_and_equals_its_library(name: str) -> None:
    adapter = TOWERS[name].adapter(full=False)
    assert family_for_model(adapter.model) == TOWERS[name].family
    gaps = differences(TOWERS[name], adapter)
    assert set(gaps) == {"pooled", "text", "dense"} and max(gaps.values()) <= 1e-5, gaps
    report = check_adapter(lambda: adapter, family=TOWERS[name].family, only=list(CORE))
    assert report.ok, [str(result) for result in report.results if result.status == "failed"]
    assert set(report.skipped) <= allowed_to_skip(name)


def expect_all_well(name: str, found: dict[str, Any]) -> None:
    failed = [check for check in found["checks"] if check["status"] == "failed"]
    assert not failed, json.dumps(failed, indent=2)
    skipped = {check["name"] for check in found["checks"] if check["status"] == "skipped"}
    assert skipped <= UNSTATED | NOT_OF_THE_LIBRARY | allowed_to_skip(name), skipped
    assert len(found["checks"]) == len(CHECKS)
    assert max(found["differences"].values()) <= 1e-5, found["differences"]


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", TOWERS)
def test_towers_pass_the_whole_kit(name: str, full: bool) -> None:
    expect_all_well(name, measure(TOWERS[name], full=full))


# Attention-pooled towers of open_clip --------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [resnet, coca, lambda full: coca(full, width=24, head_width=8)])
def test_patches_are_what_the_pool_returns_for_one_patch_alone(build: Any) -> None:
    """The library's own pool, called with one token: its softmax over one key is one, whatever the query."""
    model = build(False)
    adapter = wrap(model)
    side = adapter.description.image_size[0]
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        patches = adapter.encode_image(images).patches.flatten(1, 2)
        if hasattr(model.visual, "attnpool"):
            cells = torch.nn.Module.__call__(model.visual.layer4, _before_last_layer(model, images)).flatten(2)
            pool = model.visual.attnpool
            kept = pool.positional_embedding.detach().clone()
            # Without positions, the mean of one cell is the cell itself.
            pool.positional_embedding.zero_()
            pool.positional_embedding.data = pool.positional_embedding.data[:2]
            alone = [pool(cells[:, :, index, None, None]) for index in range(cells.shape[2])]
            pool.positional_embedding.data = kept
        else:
            x = model.visual.transformer(model.visual._embeds(images))[:, 1:]
            alone = [model.visual._pool(x[:, index, None])[0] @ model.visual.proj for index in range(x.shape[1])]
        torch.testing.assert_close(patches, torch.stack(alone, dim=1), atol=1e-5, rtol=1e-4)


def _before_last_layer(model: Any, images: torch.Tensor) -> torch.Tensor:
    visual = model.visual
    return visual.layer3(visual.layer2(visual.layer1(visual.stem(images))))


def test_coca_supports_every_mode_of_the_last_block_before_its_pool() -> None:
    model = coca(False)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    adapter = wrap(model)
    assert adapter.description.dense_mode == "plain"
    assert len(adapter.description.dense_modes) == 6
    with torch.no_grad():
        library = model.encode_image(images, normalize=False)
        found = {}
        for mode in adapter.description.dense_modes:
            adapter.dense = mode
            features = adapter.encode_image(images)
            torch.testing.assert_close(features.pooled, library, atol=1e-5, rtol=1e-4)
            found[mode] = features.patches
    assert len({round(float(patches.sum()), 4) for patches in found.values()}) == 6


def test_an_averaging_pool_leaves_out_the_first_query_as_open_clip_does() -> None:
    model = coca(False, pool_type="avg")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.encode_image(images, normalize=False)
        torch.testing.assert_close(wrap(model).encode_image(images).pooled, expected, atol=1e-5, rtol=1e-4)


def test_two_poolers_are_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModelError, match="no pooled embedding"):
        wrap(coca(False, attentional_pool="parallel"))


def test_a_class_for_another_kind_of_image_tower_says_so() -> None:
    for build, kind in ((resnet, "resnet"), (coca, "attention_pooled")):
        with pytest.raises(UnsupportedModelError, match=rf"of the kind '{kind}' .*wrap\(model\)"):
            OpenCLIPAdapter(build(False))


def test_names_of_open_clip() -> None:
    for name in ("RN50", "RN101-quickgelu", "coca_ViT-B-32", "coca_base", "nllb-clip-base", "ViT-H-14-worldwide"):
        assert name in load_family("open_clip").models()


def load_family(name: str) -> Any:
    from ttd_plugins.plugins import families

    return families()[name]


# Relatives of CLIP in transformers -----------------------------------------------------------------------------------


def test_metaclip_2_ends_at_its_true_end_token() -> None:
    """Id 2 is the end token of XLM-V, and not the sign of an old configuration of CLIP."""
    model = relative("metaclip_2", False)
    adapter = wrap(model, tokenizer=Words(0, 2, 1, context=SMALL_CONTEXT, vocabulary=64))
    tokens = adapter.tokenize(["a b c", ""])
    assert tokens.lengths.tolist() == [5, 2]
    old = wrap(transformers_clip(text={"eos_token_id": 2}))
    assert old._end_positions(torch.tensor([[1, 2, 9, 0]])).tolist() == [2]


@pytest.mark.parametrize("kind", ["chinese_clip", "altclip", "align"])
def test_rows_are_padded_with_the_id_that_the_text_tower_masks(kind: str) -> None:
    """A tokenizer of transformers with another padding id, which the tower would take for a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"[CLS]": 2, "[SEP]": 3, "[UNK]": 4, "[PAD]": 5, "cat": 6}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    model = relative(kind, False)
    adapter = wrap(model, tokenizer=tokenizer)
    tokens = adapter.tokenize(["cat", "cat cat"])
    padding = model.text_model.config.pad_token_id
    assert tokens.lengths.tolist() == [3, 4]
    assert (tokens.ids[0, 3:] == padding).all()
    with torch.no_grad():
        alone = model.get_text_features(input_ids=torch.tensor([[2, 6, 3]])).pooler_output
        torch.testing.assert_close(adapter.encode_text(tokens.ids)[:1], alone, atol=1e-5, rtol=1e-4)


def test_context_lengths_are_those_of_training_where_the_table_is_longer() -> None:
    for kind, context in (("chinese_clip", 52), ("align", 64)):
        model = relative(kind, False)
        model.text_model.embeddings.position_embeddings = torch.nn.Embedding(512, BERT["hidden_size"])
        assert wrap(model).description.context_length == context


def test_patches_of_align_average_to_its_pooled_embedding() -> None:
    adapter = TOWERS["align"].adapter(full=False)
    with torch.no_grad():
        features = adapter.encode_image(torch.randn(2, 3, 64, 128, generator=torch.Generator().manual_seed(1)))
        torch.testing.assert_close(features.patches.mean((1, 2)), features.pooled, atol=1e-5, rtol=1e-4)
        assert features.patches.shape[1:3] == (2, 4)
        assert float(adapter.logit_scale()) == pytest.approx(1 / float(adapter.model.temperature))


def test_align_reads_the_processor_that_scales_to_minus_one_and_one() -> None:
    published = transformers.EfficientNetImageProcessor(
        size={"height": 128, "width": 128}, crop_size={"height": 105, "width": 105}, do_center_crop=True,
        rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False, include_top=False, resample=2,
    )  # fmt: skip
    adapter = wrap(relative("align", False), preprocess=published)
    description = adapter.description
    assert description.mean == description.std == (0.5, 0.5, 0.5)
    # 105 pixels are three whole strides and a rest, which the library computes too.
    assert description.image_size == (96, 96)
    assert adapter.patch_grid(105, 105) == (3, 3)
    image = Image.new("RGB", (128, 128), (255, 0, 51))
    native, dense = adapter.native_transform()(image), adapter.dense_transform()(image)
    assert native.shape == (3, 105, 105)
    torch.testing.assert_close(native[:, 50, 50], dense[:, 50, 50], atol=1e-4, rtol=0)
    adapter.encode_image(native[None])
    scaled_twice = transformers.EfficientNetImageProcessor(include_top=True)
    with pytest.raises(InputError, match="include_top=False"):
        wrap(relative("align", False), preprocess=scaled_twice)


def test_align_pooled_by_maximum_is_refused() -> None:
    model = relative("align", False)
    model.vision_model.config.pooling_type = "max"
    with pytest.raises(UnsupportedModelError, match="pools by maximum"):
        wrap(model)


@pytest.mark.parametrize("kind", ["metaclip_2", "chinese_clip", "altclip", "align"])
def test_a_saved_folder_is_loaded_by_name(kind: str, tmp_path: Path) -> None:
    model = relative(kind, False)
    model.save_pretrained(tmp_path)
    adapter = load(f"openai_clip:{tmp_path}")
    assert type(adapter.model) is type(model)
    side = adapter.description.image_size[0]
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.get_image_features(images).pooler_output
        torch.testing.assert_close(adapter.encode_image(images).pooled, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["metaclip_2", "chinese_clip", "align"])
def test_one_tower_alone_is_refused_with_the_class_to_pass(kind: str) -> None:
    model = relative(kind, False)
    with pytest.raises(UnsupportedModelError, match=f"pass a {type(model).__name__}"):
        wrap(model.vision_model)
