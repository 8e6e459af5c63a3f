"""Exported backbones load in their own libraries without ttd_plugins, and give the tuned embeddings."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")
pytest.importorskip("transformers", reason="needs the extra 'siglip'")
pytest.importorskip("peft", reason="needs the extra 'lora'")

import helpers_openai_clip as parts
import open_clip
import peft
import torch
import transformers
from helpers_export import case, load_elsewhere, probe, snapshot, tuned, unchanged
from helpers_full_size import BACKBONES, open_clip_siglip_stand_in
from helpers_hub import TOKENIZER_REPOSITORY, architectures
from helpers_open_clip import tiny_clip
from helpers_siglip import siglip_like_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from toy_backbone import ToyAdapter, ToyModel
from typer.testing import CliRunner

from ttd_plugins import cli, load, wrap
from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.errors import InputError, TTDError, UnsupportedModelError
from ttd_plugins.export import CITATION, ModelCard, export_backbone
from ttd_plugins.export_record import RECORD_FILE, read_record
from ttd_plugins.lora import CONFIG_FILE, WEIGHTS_FILE, load_lora

CLOSE = 1e-5


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Small architectures that open_clip and timm know by name, as they know the full-size ones."""
    folder = tmp_path_factory.mktemp("architectures")
    with architectures(folder, tags=False):
        yield folder


def named(name: str, tmp_path: Path) -> DenseAdapter:
    """A backbone by name, with tokenizers that need no network."""
    options: dict[str, Any] = {}
    if "hub-test-map" in name:
        siglip_like_tokenizer().save_pretrained(tmp_path / "words")
        options["tokenizer"] = open_clip.tokenizer.HFTokenizer(str(tmp_path / "words"), context_length=10)
    return load(name, **options)


# Native form, loaded by its own library in another process ------------------------------------------------------------

NAMED = {"open_clip": "hub-test-vit", "eva_clip": "hub-test-eva", "siglip": "hub-test-map"}
TINY = {"open_clip:tiny": "local-dir:", "openai_clip:tiny": "CLIPModel", "siglip:tiny@random": "SiglipModel"}
LORA = ("transformers_clip", "transformers_siglip")


def test_every_family_loads_without_ttd_plugins_and_gives_the_tuned_embeddings(small: Path, tmp_path: Path) -> None:
    cases = []
    for family, architecture in NAMED.items():
        adapter = tuned(named(f"{family}:{architecture}@random", tmp_path))
        done = export_backbone(adapter, tmp_path / family)
        assert f'open_clip.create_model("{architecture}", pretrained=' in done.model.load
        cases.append(case(family, adapter, done, tmp_path))
    for number, (name, way) in enumerate(TINY.items()):
        adapter = tuned(load(name))
        done = export_backbone(adapter, tmp_path / f"tiny{number}")
        assert way in done.model.load
        cases.append(case(name, adapter, done, tmp_path))
    wrapped = {"wrapped": (tiny_clip(custom_text=True, quick_gelu=True), None)}
    wrapped |= {name: (BACKBONES[name].build(False), BACKBONES[name].tokenizer()) for name in LORA}
    for name, (model, tokenizer) in wrapped.items():
        adapter = tuned(wrap(model, tokenizer=tokenizer))
        cases.append(case(name, adapter, export_backbone(adapter, tmp_path / name), tmp_path))
        if name in LORA:
            plain = tmp_path / f"{name}-plain"
            export_backbone(BACKBONES[name].adapter(full=False), plain)
            done = export_backbone(adapter, tmp_path / f"{name}-lora", form="lora")
            assert done.model.library == "peft"
            base = (type(adapter.model).__name__, plain)
            cases.append(case(f"{name} by peft", adapter, done, tmp_path, base=base))
    found = load_elsewhere(tmp_path, cases, architectures=small)
    assert found.keys() == {*NAMED, *TINY, *wrapped, *(f"{name} by peft" for name in LORA)}
    for name, answer in found.items():
        assert answer["image"] <= CLOSE and answer["text"] <= CLOSE, (name, answer)
        # Where the family resizes with PIL itself, transformers' resizing may round a pixel to the next of 256 levels.
        allowed = 1.01 / 255 / 0.26130258 if name in ("openai_clip:tiny", "transformers_clip") else CLOSE
        assert answer.get("preprocessing", 0) <= allowed, (name, answer)
        assert answer.get("tokens", 0) == 0, (name, answer)
    # Every name with a tokenizer of its own was asked for tokens.
    assert {name for name, answer in found.items() if "tokens" in answer} == {*NAMED, *TINY, *LORA}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["open_clip:ViT-B-32@random", "eva_clip:EVA02-B-16@random", "siglip:ViT-B-16-SigLIP@random", "transformers_clip",
     "transformers_siglip"],
)  # fmt: skip
def test_full_size_architectures_load_without_ttd_plugins(name: str, tmp_path: Path) -> None:
    if ":" in name:
        options = {"tokenizer": open_clip_siglip_stand_in(32000)} if "SigLIP" in name else {}
        adapter = load(name, **options)
    else:
        adapter = BACKBONES[name].adapter(full=True)
    before = probe(adapter)
    tuned(adapter, std=0.02)
    done = export_backbone(adapter, tmp_path / "export")
    prepared = case(name, adapter, done, tmp_path)
    after = probe(adapter)
    # Otherwise an export of the untuned weights would pass too.
    for tuned_ones, plain in ((after.image, before.image), (after.text, before.text)):
        assert ((tuned_ones - plain).norm(dim=-1) / plain.norm(dim=-1)).min() > 0.01
    if ":" in name:
        architecture = name.partition(":")[2].partition("@")[0]
        assert f'create_model("{architecture}", pretrained=' in done.model.load
    del adapter
    answer = load_elsewhere(tmp_path, [prepared])[name]
    assert answer["image"] <= CLOSE and answer["text"] <= CLOSE, answer


def test_tuning_moves_the_embeddings_far_beyond_the_tolerance() -> None:
    plain, adapter = load("open_clip:tiny"), tuned(load("open_clip:tiny"))
    a, b = probe(plain), probe(adapter)
    assert (a.image - b.image).abs().max() > 0.01 and (a.text - b.text).abs().max() > 0.01


@pytest.mark.parametrize("form", ["native", "lora", "weights"])
def test_the_adapter_is_left_as_it_was_and_goes_on_training(form: Any, tmp_path: Path) -> None:
    adapter = tuned(load("open_clip:tiny"), dropout=0.1)
    adapter.model.train()
    adapter.model.visual.eval()  # type: ignore[union-attr]
    flags = [(name, module.training) for name, module in adapter.model.named_modules()]
    wanted = [(name, parameter.requires_grad) for name, parameter in adapter.model.named_parameters()]
    before, config = snapshot(adapter), adapter.model.peft_config
    export_backbone(adapter, tmp_path / "out", form=form)
    assert unchanged(adapter, before) and adapter.has_lora and adapter.model.peft_config is config
    assert flags == [(name, module.training) for name, module in adapter.model.named_modules()]
    assert wanted == [(name, parameter.requires_grad) for name, parameter in adapter.model.named_parameters()]
    adapter.encode_image(torch.randn(1, 3, 64, 64)).patches.sum().backward()
    assert all(p.grad is not None for n, p in adapter.model.named_parameters() if "lora_B" in n and "visual" in n)


def test_full_tuning_is_exported_too(tmp_path: Path) -> None:
    adapter = load("openai_clip:tiny")
    with torch.no_grad():
        for parameter in adapter.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    export_backbone(adapter, tmp_path / "out")
    again = load(f"openai_clip:{tmp_path / 'out'}")
    assert unchanged(again, snapshot(adapter))
    assert again.tokenize(["a <end> of it"]).ids.equal(adapter.tokenize(["a <end> of it"]).ids)


@pytest.mark.parametrize("name", ["open_clip:tiny", "openai_clip:tiny", "siglip:tiny@random"])
def test_what_was_exported_loads_here_again_by_the_name_that_the_card_says(name: str, tmp_path: Path) -> None:
    adapter = tuned(load(name))
    done = export_backbone(adapter, tmp_path / "out")
    assert done.model.name is not None
    again = load(done.model.name.replace("PATH", str(done.folder)))
    a, b = probe(adapter), probe(again)
    torch.testing.assert_close(a.image, b.image, atol=CLOSE, rtol=0)
    torch.testing.assert_close(a.text, b.text, atol=CLOSE, rtol=0)
    texts = ["a red cat", "two dogs & an umbrella"]
    assert adapter.tokenize(texts).ids.equal(again.tokenize(texts).ids)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": {"vision": {"pool_type": "avg"}},
    "average, norm after": {"vision": {"pool_type": "avg", "final_ln_after_pool": True}},
    "no first norm": {"vision": {"no_ln_pre": True}},
    "layer scale": {"vision": {"ls_init_value": 0.1}, "text": {"ls_init_value": 0.2}},
    "wide mlp, oblong": {"vision": {"mlp_ratio": 2.5, "image_size": [32, 48]}},
    "tanh": {"vision": {"act_kwargs": {"approximate": "tanh"}}, "text": {"norm_kwargs": {"eps": 1e-3}}},
    "quick gelu": {"quick_gelu": True},
    "sigmoid": {"init_logit_bias": -10.0, "init_logit_scale": 2.3, "nonscalar_logit_scale": True},
    "text of its own": {"custom_text": True, "text": {"pool_type": "first", "proj_bias": True}},
    "class token in the text": {"custom_text": True, "text": {"embed_cls": True, "no_causal_mask": True, "pad_id": 3}},
    "end token": {"custom_text": True, "text": {"pool_type": "eos", "eos_id": 63}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_architecture_without_a_name_is_read_off_the_model(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_clip(**options)
    with torch.no_grad():
        if model.logit_bias is not None:
            model.logit_bias.fill_(-7.5)
    adapter = tuned(wrap(model))
    done = export_backbone(adapter, tmp_path / "out")
    built = open_clip.create_model(f"local-dir:{done.folder}").eval()
    pixels = torch.randn(2, 3, *adapter.description.image_size)
    ids = torch.randint(4, 62, (2, 12))
    ids[:, -1] = 63
    with torch.no_grad():
        torch.testing.assert_close(built.encode_image(pixels), adapter.encode_image(pixels).pooled, atol=CLOSE, rtol=0)
        torch.testing.assert_close(built.encode_text(ids), adapter.encode_text(ids), atol=CLOSE, rtol=0)
    assert built.logit_scale.equal(model.logit_scale)
    assert (built.logit_bias is None) == (model.logit_bias is None)
    assert built.logit_bias is None or built.logit_bias.equal(model.logit_bias)


def test_a_wrapped_model_of_a_registered_architecture_is_recognised(small: Path, tmp_path: Path) -> None:
    for family, architecture in NAMED.items():
        model = open_clip.create_model(architecture, load_weights=False).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        done = export_backbone(wrap(model), tmp_path / family)
        assert f'create_model("{architecture}"' in done.model.load


def test_preprocessing_and_tokenizer_that_are_not_open_clips_own_are_said(small: Path, tmp_path: Path) -> None:
    done = export_backbone(named("siglip:hub-test-map@random", tmp_path), tmp_path / "out")
    config = json.loads((done.folder / "open_clip_config.json").read_text())
    assert config["preprocess_cfg"] == {
        "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"
    }  # fmt: skip
    assert config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == TOKENIZER_REPOSITORY
    assert any("prepares images as for OpenAI's models" in note for note in done.model.notes)
    assert "tokenizer.json" in done.files
    bare = export_backbone(wrap(tiny_clip(), tokenizer=lambda texts: torch.zeros(len(texts), 12)), tmp_path / "bare")
    assert any("cannot be saved as files" in note for note in bare.model.notes)
    assert "tokenizer.json" not in bare.files


def test_half_precision_stays_what_it_is(tmp_path: Path) -> None:
    adapter = tuned(wrap(tiny_clip().to(torch.bfloat16)))
    done = export_backbone(adapter, tmp_path / "out")
    assert 'precision="pure_bf16"' in done.model.load
    assert {tensor.dtype for tensor in load_file(done.folder / "open_clip_model.safetensors").values()} == {
        torch.bfloat16
    }


# The original package ------------------------------------------------------------------------------------------------


def original(kind: str, width: int = 64) -> Any:
    """A small model of the original package with heads of 64 channels, as that package takes for granted."""
    torch.manual_seed(0)
    if kind == "vit":
        visual: nn.Module = parts.VisionTransformer(32, 8, width, 2, width // 64, parts.EMBED)
    else:
        visual = parts.ModifiedResNet((1, 1, 1, 1), parts.EMBED, 4, 64, 8)
    model = parts.CLIP(visual)
    model.transformer = parts.Transformer(width, 2, width // 64, attn_mask=model.build_attention_mask())
    model.token_embedding = nn.Embedding(parts.VOCABULARY, width)
    model.positional_embedding = nn.Parameter(torch.randn(parts.CONTEXT, width))
    model.ln_final = parts.LayerNorm(width)
    model.text_projection = nn.Parameter(torch.randn(width, parts.EMBED) / width**0.5)
    return parts.shaken(model)


def build_model(state: dict[str, torch.Tensor]) -> Any:
    """What clip.model.build_model does: all sizes from the state dict, heads of 64 channels, then float16."""
    width = state["ln_final.weight"].shape[0]
    depth = len({name.split(".")[2] for name in state if name.startswith("transformer.resblocks")})
    embed = state["text_projection"].shape[1]
    if "visual.proj" in state:
        wide, patch = state["visual.conv1.weight"].shape[0], state["visual.conv1.weight"].shape[-1]
        layers = len([name for name in state if name.startswith("visual.") and name.endswith(".attn.in_proj_weight")])
        side = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        visual: nn.Module = parts.VisionTransformer(side * patch, patch, wide, layers, wide // 64, embed)
    else:
        counts = [
            len({name.split(".")[2] for name in state if name.startswith(f"visual.layer{number}")})
            for number in (1, 2, 3, 4)
        ]
        wide = state["visual.layer1.0.conv1.weight"].shape[0]
        side = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
        visual = parts.ModifiedResNet(tuple(counts), embed, wide * 32 // 64, side * 32, wide)
    model = parts.CLIP(visual)
    model.context_length, model.vocab_size = (
        state["positional_embedding"].shape[0],
        state["token_embedding.weight"].shape[0],
    )
    model.transformer = parts.Transformer(width, depth, width // 64, attn_mask=model.build_attention_mask())
    model.token_embedding = nn.Embedding(model.vocab_size, width)
    model.positional_embedding = nn.Parameter(torch.empty(model.context_length, width))
    model.ln_final = parts.LayerNorm(width)
    model.text_projection = nn.Parameter(torch.empty(width, embed))
    parts.convert_weights(model)
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_original_package_builds_the_tuned_model_from_the_state_dict(kind: str, tmp_path: Path) -> None:
    adapter = tuned(wrap(original(kind)))
    done = export_backbone(adapter, tmp_path / "out")
    assert done.model.library == "clip" and "clip.model.build_model" in done.model.load
    state = load_file(done.folder / "model.safetensors")
    built = build_model(dict(state)).float()
    built.load_state_dict(state)
    found = probe(adapter)
    with torch.no_grad():
        torch.testing.assert_close(built.encode_image(found.pixels), found.image, atol=CLOSE, rtol=0)
        torch.testing.assert_close(built.encode_text(found.ids), found.text, atol=CLOSE, rtol=0)
    assert any("float16" in note for note in done.model.notes)


@pytest.mark.parametrize("name", ["original_vit", "original_resnet"])
def test_heads_of_another_width_are_refused_for_the_original_package(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"build_model.*heads"):
        export_backbone(BACKBONES[name].adapter(full=False), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# LoRA alone ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "towers"),
    # The one that is left out has the largest vocabulary and the same layers as another.
    [(name, ("image", "text")) for name in BACKBONES if name != "siglip2"]
    + [("open_clip", ("image",)), ("open_clip", ("text",)), ("transformers_clip", ("text",))],
)
def test_lora_alone_comes_back_bitwise(name: str, towers: Any, tmp_path: Path) -> None:
    adapter = tuned(BACKBONES[name].adapter(full=False), alpha=6.5, towers=towers)
    done = export_backbone(adapter, tmp_path / "lora", form="lora")
    assert done.files == ("README.md", CONFIG_FILE, WEIGHTS_FILE, "ttd_export.json")
    other = BACKBONES[name].adapter(full=False)
    assert load_lora(other, done.folder) is other
    assert unchanged(other, snapshot(adapter)) and other.has_lora
    assert len(other.lora_parameters()) == len(adapter.lora_parameters())
    a, b = probe(adapter), probe(other)
    assert a.image.equal(b.image) and a.text.equal(b.text)
    assert all(parameter.requires_grad for parameter in other.lora_parameters())


@pytest.mark.parametrize("name", ["open_clip", "eva01", "siglip", "original_vit", "original_resnet"])
def test_peft_refuses_what_its_own_layers_would_compute_otherwise(name: str, tmp_path: Path) -> None:
    towers = ("image",) if name == "original_resnet" else ("image", "text")
    done = export_backbone(tuned(BACKBONES[name].adapter(full=False), towers=towers), tmp_path / "lora", form="lora")
    assert done.model.library == "ttd_plugins"
    with pytest.raises((KeyError, ValueError), match="TTD_LORA"):
        peft.PeftModel.from_pretrained(BACKBONES[name].build(False), done.folder)
    assert (
        peft.utils.save_and_load.load_peft_weights(str(done.folder), device="cpu").keys()
        == load_file(done.folder / WEIGHTS_FILE).keys()
    )


def tampered(folder: Path, **changes: Any) -> Path:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_lora_that_does_not_belong_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    done = export_backbone(tuned(load("openai_clip:tiny")), tmp_path / "lora", form="lora")
    folder, adapter = done.folder, load("openai_clip:tiny@random")
    before = snapshot(adapter)

    def refused(other: DenseAdapter, match: str) -> None:
        with pytest.raises(TTDError, match=match):
            load_lora(other, folder)
        assert not other.has_lora and not [name for name in other.model.state_dict() if "lora_" in name]

    refused(load("open_clip:tiny@random"), "for none of the modules of open_clip:tiny")
    # Queries and keys of the last block are used in one mode and not in the other.
    refused(load("openai_clip:tiny@random", dense="clearclip"), "same dense mode")
    good = (folder / CONFIG_FILE).read_text()
    for change, match in (
        ({"r": 5}, r"no LoRA can be read .*r is 5, and .* has the shape"),
        ({"use_dora": True}, "more than plain LoRA"),
        ({"rank_pattern": {"x": 2}}, "more than plain LoRA"),
        ({"peft_type": "IA3"}, "no LoRA can be read"),
        ({"r": "many"}, "no LoRA can be read"),
    ):
        tampered(folder, **change)
        refused(adapter, match)
        (folder / CONFIG_FILE).write_text(good)
    tensors = load_file(folder / WEIGHTS_FILE)
    gone = next(iter(tensors))
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, folder / WEIGHTS_FILE)
    refused(adapter, f"such as {gone}")
    (folder / WEIGHTS_FILE).write_bytes(b"\x08\x00")
    refused(adapter, "no LoRA can be read")
    (folder / WEIGHTS_FILE).unlink()
    refused(adapter, "no LoRA can be read")
    assert unchanged(adapter, before)


def test_lora_is_no_second_time_put_in(tmp_path: Path) -> None:
    adapter = tuned(load("openai_clip:tiny"))
    done = export_backbone(adapter, tmp_path / "lora", form="lora")
    before = snapshot(adapter)
    with pytest.raises(TTDError, match="has LoRA"):
        load_lora(adapter, done.folder)
    assert adapter.has_lora and unchanged(adapter, before)


def test_lora_alone_that_would_leave_out_trained_weights_is_refused(tmp_path: Path) -> None:
    adapter = tuned(load("openai_clip:tiny"), towers=("image",))
    adapter.model.logit_scale.requires_grad_(True)  # type: ignore[union-attr]
    done = export_backbone(adapter, tmp_path / "scale", form="lora")
    assert any("logit_scale" in note for note in done.model.notes)
    for _, parameter in adapter.tower_parameters("text"):
        parameter.requires_grad_(True)
    with pytest.raises(TTDError, match="trainable tensors beside LoRA, such as text_model"):
        export_backbone(adapter, tmp_path / "out", form="lora")


# The weights alone, and what cannot be exported ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eva_clip:tiny@random", "siglip:tiny@random"])
def test_weights_alone_go_back_into_the_same_model(name: str, tmp_path: Path) -> None:
    adapter = tuned(load(name))
    done = export_backbone(adapter, tmp_path / "out", form="weights")
    assert done.files == ("README.md", "model.safetensors", "ttd_export.json")
    other = load(name)
    other.model.load_state_dict(load_file(done.folder / "model.safetensors"))
    a, b = probe(adapter), probe(other)
    torch.testing.assert_close(a.image, b.image, atol=CLOSE, rtol=0)
    torch.testing.assert_close(a.text, b.text, atol=CLOSE, rtol=0)
    adapter.merge()
    assert unchanged(other, snapshot(adapter))


def test_eva_clip_tiny_says_why_it_cannot_be_rebuilt(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        export_backbone(load("eva_clip:tiny@random"), tmp_path / "out")
    for part in ("eva_clip:tiny@random", "passes only a trunk's name on to timm", "form='weights'", "form='lora'"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_family_that_does_not_say_how_has_the_other_forms(tmp_path: Path) -> None:
    adapter = ToyAdapter(ToyModel(), logits="softmax")
    with pytest.raises(UnsupportedModelError, match="does not implement export"):
        export_backbone(adapter, tmp_path / "out")
    done = export_backbone(adapter, tmp_path / "out", form="weights")
    assert load_file(done.folder / "model.safetensors").keys() == adapter.model.state_dict().keys()


def test_a_library_that_would_compute_something_else_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    create = open_clip.create_model

    def wrong(*arguments: Any, **options: Any) -> Any:
        model = create(*arguments, **options)
        with torch.no_grad():
            model.text_projection.mul_(1.001)
        return model

    monkeypatch.setattr(open_clip, "create_model", wrong)
    with pytest.raises(UnsupportedModelError, match=r"embeddings differ by 1\.0e-03"):
        export_backbone(load("open_clip:tiny"), tmp_path / "out")
    monkeypatch.undo()
    original_load = transformers.CLIPModel.from_pretrained

    def worse(*arguments: Any, **options: Any) -> Any:
        model, report = original_load(*arguments, **options)
        model.visual_projection.weight.data.mul_(1.001)
        return model, report

    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", worse)
    with pytest.raises(UnsupportedModelError, match=r"differ by 1\.0e-03"):
        export_backbone(load("openai_clip:tiny"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_lora_with_values_that_are_not_finite_is_not_folded_in(tmp_path: Path) -> None:
    adapter = tuned(load("openai_clip:tiny"))
    with torch.no_grad():
        adapter.lora_parameters()[0][0, 0] = float("nan")
    with pytest.raises(TTDError, match="not finite"):
        export_backbone(adapter, tmp_path / "out")
    assert adapter.has_lora and not list(tmp_path.iterdir())


def test_lora_alone_needs_lora(tmp_path: Path) -> None:
    with pytest.raises(TTDError, match="has no LoRA to export"):
        export_backbone(load("openai_clip:tiny@random"), tmp_path / "out", form="lora")
    assert not list(tmp_path.iterdir())


# Complete or absent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["open_clip:tiny", "openai_clip:tiny"])
@pytest.mark.parametrize("form", ["native", "lora", "weights"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    name: str, form: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    adapter = tuned(load(name))
    before = snapshot(adapter)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(InputError, match="No space left on device") as caught:
        export_backbone(adapter, tmp_path / "out", form=form)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir()) and unchanged(adapter, before)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_whatever_stops_it_leaves_nothing_and_the_adapter_as_it_was(
    stop: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    adapter = tuned(load("openai_clip:tiny"))
    before = snapshot(adapter)

    def stopped(folder: Path) -> Any:
        (folder / "half.safetensors").write_bytes(b"0")
        raise stop

    monkeypatch.setattr(adapter, "export", stopped)
    with pytest.raises(stop):
        export_backbone(adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir()) and unchanged(adapter, before) and adapter.has_lora


def test_folders_that_are_taken_are_refused_and_empty_ones_used(tmp_path: Path) -> None:
    adapter = load("openai_clip:tiny@random")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        export_backbone(adapter, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        export_backbone(adapter, tmp_path / "full")
    with pytest.raises(InputError, match=r"below' cannot be read \(Not a directory\)"):
        export_backbone(adapter, tmp_path / "file" / "below")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine"]
    with pytest.raises(InputError, match=r"unknown form of export 'nativ'; did you mean 'native'"):
        export_backbone(adapter, tmp_path / "out", form="nativ")  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    export_backbone(adapter, tmp_path / "empty", form="weights")
    export_backbone(adapter, tmp_path / "new" / "deep", form="weights")
    assert (tmp_path / "empty" / "README.md").is_file() and (tmp_path / "new" / "deep" / "README.md").is_file()


# The card ------------------------------------------------------------------------------------------------------------


def test_the_card_says_what_is_known_and_nothing_else(tmp_path: Path) -> None:
    card = ModelCard(
        base="open_clip:tiny@embedded",
        data={"pairs": 591, "source": "my | photographs\n<b>of</b> shoes"},
        settings={"steps": 200, "lora": {"rank": 16, "dropout": 0.0}, "never set": None},
        metrics={"before": {"tag AP": 0.971234567}, "after": {"tag AP": 0.98}},
    )
    done = export_backbone(load("open_clip:tiny"), tmp_path / "out", card=card)
    text = (done.folder / "README.md").read_text()
    for part in ("| pairs | 591 |", "my \\| photographs &lt;b>of&lt;/b> shoes", "| lora.rank | 16 |", "Metrics: after",
                 "| tag AP | 0.971235 |", CITATION, "local-dir:PATH",
                 "import open_clip", "arXiv 2404.00384"):  # fmt: skip
        assert part in text, part
    assert "None" not in text and "never set" not in text and str(tmp_path) not in text
    bare = export_backbone(load("openai_clip:tiny"), tmp_path / "bare")
    text = (bare.folder / "README.md").read_text()
    assert not any(heading in text for heading in ("## Data", "## Settings", "## Metrics"))
    assert "import transformers\n" in text and "its licence applies" in text
    assert text.startswith("---\nlibrary_name: transformers\n")


def test_names_of_folders_that_are_not_utf_8_are_exported(tmp_path: Path) -> None:
    card = ModelCard(base="open_clip:tiny@/models/caf\udce9", data={"pairs": "/data/caf\udce9"})
    done = export_backbone(load("open_clip:tiny"), tmp_path / "out", form="weights", card=card)
    assert "| pairs | /data/caf\\udce9 |" in (done.folder / "README.md").read_text(encoding="utf-8")
    record = read_record(done.folder)
    assert record is not None and record.base == card.base
    (done.folder / RECORD_FILE).write_text('{"form": "weights", "base": 3}')
    with pytest.raises(InputError, match=r"ttd_export.json is damaged .*Input should be a valid string"):
        read_record(done.folder)


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["lora", "full"])
def test_a_run_is_exported_by_its_folder_and_step(text: str, tmp_path: Path) -> None:
    from ttd_plugins.training.checkpoints import Checkpoint, restore_backbone, write_checkpoint
    from ttd_plugins.training.config import TrainConfig
    from ttd_plugins.training.trainable_parameters import build_backbone

    run = tmp_path / "run"
    values = {
        "backbone": {"name": "openai_clip:tiny"},
        "towers": {"text": text, "rank": 3},
        "data": {"source": "shoes"},
    }
    config = TrainConfig.from_dict(values)
    adapter = build_backbone(config)
    run.mkdir()
    (run / "config.yaml").write_text(config.yaml())
    generator = torch.Generator().manual_seed(0)
    for step in (5, 9):
        with torch.no_grad():
            for parameter in adapter.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        trained = {name: p.detach().clone() for name, p in adapter.model.named_parameters() if p.requires_grad}
        write_checkpoint(run, Checkpoint({"step": step, "figures": {"loss": 1.5}}, trained), keep=3)
    for step, arguments in ((9, []), (5, ["--step", "5"])):
        out = tmp_path / f"out{step}"
        answer = ttd(run, "--out", out, *arguments)
        assert answer.exit_code == 0, answer.output
        due, again = probe(restore_backbone(run, step)), probe(load(f"openai_clip:{out}"))
        torch.testing.assert_close(again.image, due.image, atol=CLOSE, rtol=0)
        torch.testing.assert_close(again.text, due.text, atol=CLOSE, rtol=0)
        card = (out / "README.md").read_text()
        for part in (f"| step | {step} |", "| towers.rank | 3 |", "| source | shoes |", "| loss | 1.5 |"):
            assert part in card, part
    answer = ttd(run, "--out", tmp_path / "lora", "--form", "lora")
    assert answer.exit_code == (0 if text == "lora" else cli.USER_ERROR), answer.output
    assert ttd(run, "--out", tmp_path / "none", "--step", "7").exit_code == cli.USER_ERROR
    assert ttd(tmp_path, "--out", tmp_path / "none").exit_code == cli.USER_ERROR
    assert not (tmp_path / "none").exists()


# The command ---------------------------------------------------------------------------------------------------------


def ttd(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["export", *map(str, arguments)])


def test_the_command_exports_a_backbone_by_name(tmp_path: Path) -> None:
    answer = ttd("--backbone", "openai_clip:tiny", "--out", tmp_path / "out")
    assert answer.exit_code == 0, answer.output
    assert f'transformers.CLIPModel.from_pretrained("{tmp_path / "out"}")' in answer.stdout
    answer = ttd("--backbone", "siglip:tiny@random", "--out", tmp_path / "json", "--json", "--form", "weights")
    assert answer.exit_code == 0, answer.output
    report = json.loads(answer.stdout)
    assert report["files"] == ["README.md", "model.safetensors", "ttd_export.json"] and report["form"] == "weights"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "either the folder of a run or --backbone"),
        (["run", "--backbone", "openai_clip:tiny"], "either the folder of a run or --backbone"),
        (["--backbone", "openai_clip:tiny", "--step", "3"], "--step selects a checkpoint"),
        (["run", "--backbone-option", "dense=plain"], "--backbone-option needs --backbone"),
        (["--backbone", "openai_clip:tiny", "--form", "onnx"], "must be one of native, lora, weights"),
        (["--backbone", "openai_clip:tiny@random", "--form", "lora"], "has no LoRA"),
        (["--backbone", "eva_clip:tiny@random"], "cannot rebuild eva_clip:tiny@random"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(arguments: list[str], part: str, tmp_path: Path) -> None:
    answer = ttd(*arguments, "--out", tmp_path / "out")
    assert answer.exit_code == cli.USER_ERROR
    lines = [line for line in answer.stderr.splitlines() if not line.startswith("warning: plugin")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and part in lines[0], answer.stderr
    assert not list(tmp_path.iterdir())
