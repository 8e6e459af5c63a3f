"""The family open_clip: names, weights, objects that it takes, and what it says when something is missing."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from helpers_open_clip import CONTEXT, EMBED, WordTokenizer, pixels, tiny_clip, write_tiny_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from ttd_open_clip import recognition, tiny
from ttd_open_clip.family import OpenCLIPFamily
from ttd_open_clip.tiny import build_tiny, load_tiny

from ttd_plugins.adapter import Calibration
from ttd_plugins.embedded.folder import read_settings
from ttd_plugins.embedded.tokenizer import TinyTokenizer
from ttd_plugins.errors import BackboneNameError, InputError, MissingDependencyError, TTDError, UnsupportedModelError
from ttd_plugins.plugins import family_for_model

NAME = "tests-tiny-vit"


@pytest.fixture
def family() -> OpenCLIPFamily:
    return OpenCLIPFamily()


@pytest.fixture
def architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small architecture that open_clip knows by name while the test runs, with one pretrained tag."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED,
        NAME,
        {"some_tag": open_clip.pretrained._pcfg(hf_hub="nobody/nothing-of-this-name/"), "other_tag": {}},
    )
    (tmp_path / f"{NAME}.json").write_text(json.dumps(config()))
    open_clip.add_model_config(tmp_path / f"{NAME}.json")
    return NAME


def config() -> dict[str, Any]:
    return {
        "embed_dim": EMBED,
        "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }


def built() -> Any:
    torch.manual_seed(11)
    return open_clip.CLIP(**config()).eval()


# Names ---------------------------------------------------------------------------------------------------------------


def test_models_are_the_architectures_that_can_be_adapted(family: OpenCLIPFamily) -> None:
    models = family.models()
    assert models[0] == "tiny"
    assert {
        "ViT-B-16",
        "ViT-B-32-quickgelu",
        "ViT-L-14-336",
        "ViT-H-14-CLIPA",
        "roberta-ViT-B-32",
        "convnext_base",
        "MobileCLIP-S1",
        "RN50",
        "coca_ViT-B-32",
    } <= set(models)
    for refused in ("ViT-B-16-SigLIP", "EVA02-B-16", "MobileCLIP-B", "ViTamin-B"):
        assert refused in open_clip.list_models()
        assert refused not in models


def test_every_listed_architecture_is_built_as_something_that_is_claimed(family: OpenCLIPFamily) -> None:
    """Built on the meta device from its vision configuration, so that the filter and the claim cannot drift apart."""
    from open_clip.model import _build_vision_tower

    listed, seen = family.models(), set()
    for name in open_clip.list_models():
        vision = dict(open_clip.get_model_config(name)["vision_cfg"])
        trunk = vision.get("timm_model_name")
        # One trunk of each kind: the largest take seconds even without memory.
        kind = trunk and trunk.partition("_")[0] + str(vision.get("timm_proj"))
        if kind and kind in seen:
            continue
        seen.add(kind)
        if not trunk and isinstance(vision["layers"], int):
            vision["layers"] = 1
        if trunk:
            vision["timm_model_pretrained"] = False
        with torch.device("meta"):
            tower = _build_vision_tower(EMBED, vision)
        shell = nn.Module()
        shell.visual, shell.logit_scale = tower, nn.Parameter(torch.zeros(()))
        shell.encode_image = shell.encode_text = lambda: None
        refused = recognition.unsupported_config_reason({"vision_cfg": vision})
        assert (name in listed) == (refused is None)
        assert family.claims(shell) == (refused is None), name
        assert recognition.has_trunk(shell) == bool(trunk and refused is None), name


def test_weights_are_open_clips_tags(family: OpenCLIPFamily) -> None:
    assert "laion2b_s34b_b88k" in family.weights("ViT-B-16")
    assert family.weights("ViT-B/16") == family.weights("ViT-B-16")
    assert "random" not in family.weights("ViT-B-16")
    assert family.default_weights("ViT-B-16") is None
    assert (family.weights("tiny"), family.default_weights("tiny")) == (["embedded"], "embedded")
    assert (family.weights("hf-hub:org/name"), family.default_weights("hf-hub:org/name")) == (["own"], "own")
    assert family.default_weights("local-dir:/somewhere") == "own"


@pytest.mark.parametrize("verb", ["weights", "load"])
def test_unknown_models_are_answered_with_suggestions(family: OpenCLIPFamily, verb: str) -> None:
    arguments = ("ViT-B-61", "random")[: 1 if verb == "weights" else 2]
    with pytest.raises(
        BackboneNameError, match=r"unknown open_clip model 'ViT-B-61'; did you mean .*ViT-B-16.*hf-hub:"
    ):
        getattr(family, verb)(*arguments)


@pytest.mark.parametrize(
    ("model", "reason"),
    [("ViT-B-16-SigLIP", "timm trunk"), ("EVA02-B-16", "timm trunk"), ("ViTamin-B", "timm trunk")],
)
def test_architectures_of_other_kinds_are_refused_with_the_reason(
    family: OpenCLIPFamily, model: str, reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"open_clip:{model} cannot be adapted: .*{reason}"):
        family.load(model, "random")


def test_unknown_weights_are_answered_with_the_choices(family: OpenCLIPFamily) -> None:
    with pytest.raises(
        BackboneNameError, match=r"unknown weights of open_clip:ViT-B-32 'opena'; did you mean 'openai'"
    ):
        family.load("ViT-B-32", "opena")
    with pytest.raises(BackboneNameError, match=r"known: embedded, random"):
        family.load("tiny", "openai")
    with pytest.raises(BackboneNameError, match=r"known: own, random"):
        family.load("local-dir:/nowhere", "openai")
    for path in ("weights.safetensors", "/nowhere/weights"):
        with pytest.raises(TTDError, match=f"no checkpoint file {path}"):
            family.load("ViT-B-32", path)


# Loading -------------------------------------------------------------------------------------------------------------


def test_random_weights(family: OpenCLIPFamily, architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(11)
    handlers = list(logging.getLogger().handlers)
    adapter = family.load(architecture, "random", dense="value_only", calibration=Calibration(5, 1))
    assert adapter.description.name == f"open_clip:{NAME}@random"
    assert adapter.description.dense_mode == "value_only"
    assert adapter.description.calibration == Calibration(5, 1)
    assert not adapter.model.training
    tokens = adapter.tokenize(["a cat"])
    assert tokens.ids.shape == (1, CONTEXT)
    assert tokens.ids[0, tokens.lengths[0] - 1] == 49407
    assert not caplog.records
    assert logging.getLogger().handlers == handlers
    # Quiet for the while of loading only, and for open_clip alone.
    logging.getLogger().warning("said")
    assert [record.message for record in caplog.records] == ["said"]


@pytest.mark.parametrize("kind", ["safetensors", "torch", "training"])
def test_a_checkpoint_on_disk(family: OpenCLIPFamily, architecture: str, tmp_path: Path, kind: str) -> None:
    model = built()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(model.state_dict(), path)
    elif kind == "torch":
        torch.save(model.state_dict(), path)
    else:
        state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state}, path)
    adapter = family.load(architecture, str(path))
    with torch.no_grad():
        pooled = adapter.encode_image(pixels()).pooled
        torch.testing.assert_close(pooled, model.encode_image(pixels()), atol=2e-6, rtol=1e-5)
    assert adapter.description.weights == str(path)


class Payload:
    """Something that a pickle must not be allowed to build."""


@pytest.mark.parametrize("kind", ["garbage", "other model", "pickle", "empty"])
def test_checkpoints_that_cannot_be_used(family: OpenCLIPFamily, architecture: str, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.pt"
    if kind == "garbage":
        path.write_bytes(b"not a checkpoint at all")
    elif kind == "other model":
        torch.save(tiny_clip().state_dict(), path)
    elif kind == "pickle":
        torch.save({"state_dict": Payload()}, path)
    else:
        path.write_bytes(b"")
    with pytest.raises(TTDError, match=r"weights.pt cannot be loaded .*state dict of tensors") as caught:
        family.load(architecture, str(path))
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)


def names_do_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", fail)


@pytest.mark.parametrize("name", [NAME, "hf-hub:nobody/nothing"])
@pytest.mark.parametrize("broken", ["names", "offline mode"])
def test_without_a_network_there_is_one_clear_sentence(
    family: OpenCLIPFamily,
    architecture: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    broken: str,
) -> None:
    names_do_not_resolve(monkeypatch)
    if broken == "offline mode":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    weights = "some-tag" if name == NAME else "own"
    began = time.monotonic()
    with pytest.raises(TTDError) as caught:
        family.load(name, weights, cache_dir=str(tmp_path))
    # The hub's own client would try again for most of a minute.
    assert time.monotonic() - began < 10
    message = str(caught.value)
    assert f"open_clip:{name}@{weights} cannot be loaded" in message
    assert {"names": "Name or service not known", "offline mode": "HF_HUB_OFFLINE is set"}[broken] in message
    assert "HF_HUB_OFFLINE" in message
    assert "path of a checkpoint" in message
    assert "\n" not in message
    assert caught.value.__cause__ is not None
    assert not caplog.records
    assert huggingface_hub.constants.HF_HUB_OFFLINE is (broken == "offline mode")


@pytest.mark.parametrize("by_tag", [True, False])
def test_a_warm_cache_needs_no_network(
    family: OpenCLIPFamily, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_tag: bool
) -> None:
    names_do_not_resolve(monkeypatch)
    repository = tmp_path / "cache" / ("models--nobody--nothing-of-this-name" if by_tag else "models--some--model")
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    model = built()
    save_file(model.state_dict(), snapshot / "open_clip_model.safetensors")
    (snapshot / "open_clip_config.json").write_text(json.dumps({"model_cfg": config(), "preprocess_cfg": {}}))
    name = (architecture, "some_tag") if by_tag else ("hf-hub:some/model", "own")
    adapter = family.load(*name, cache_dir=str(tmp_path / "cache"))
    assert torch.equal(adapter.model.visual.proj, model.visual.proj)


def test_weights_that_are_missing_are_never_replaced_by_random_ones(family: OpenCLIPFamily, tmp_path: Path) -> None:
    """open_clip itself only logs a warning when a folder's weights are not there."""
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config(), "preprocess_cfg": {}}))
    with pytest.raises(TTDError, match=r"cannot be loaded .*weights"):
        family.load(f"local-dir:{tmp_path}", "own")


def test_a_local_folder(family: OpenCLIPFamily, tmp_path: Path) -> None:
    preprocessing = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config(), "preprocess_cfg": preprocessing})
    )
    model = built()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    adapter = family.load(f"local-dir:{tmp_path}", "own")
    assert adapter.description.mean == (0.1, 0.2, 0.3)
    assert adapter.description.interpolation == "bilinear"
    with torch.no_grad():
        torch.testing.assert_close(
            adapter.encode_image(pixels()).pooled, model.encode_image(pixels()), atol=2e-6, rtol=1e-5
        )
        assert torch.equal(
            adapter.encode_text(adapter.tokenize(["a"]).ids), adapter.encode_text(adapter.tokenize(["A"]).ids)
        )


@pytest.mark.parametrize("content", [None, "{", '{"model_cfg": {"embed_dim": 3}}'])
def test_a_local_folder_that_is_no_model(family: OpenCLIPFamily, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(TTDError, match=r"local-dir:.* cannot be loaded"):
        family.load(f"local-dir:{tmp_path}", "own")


def test_weights_trained_with_quick_gelu_get_it(
    family: OpenCLIPFamily, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip loads them into the plain architecture with a warning, and other features come out."""
    (tmp_path / f"{NAME}-quickgelu.json").write_text(json.dumps(config() | {"quick_gelu": True}))
    open_clip.add_model_config(tmp_path / f"{NAME}-quickgelu.json")
    save_file(built().state_dict(), tmp_path / "weights.safetensors")
    tag = {"file": str(tmp_path / "weights.safetensors"), "quick_gelu": True}
    for name in (NAME, f"{NAME}-quickgelu"):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"openai": tag})
    adapter = family.load(NAME, "openai")
    assert adapter.description.name == f"open_clip:{NAME}-quickgelu@openai"
    assert isinstance(adapter.model.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)


def test_a_tokenizer_can_be_given_instead_of_downloaded(family: OpenCLIPFamily, architecture: str) -> None:
    tokenizer = WordTokenizer()
    assert family.load(architecture, "random", tokenizer=tokenizer).tokenizer is tokenizer


def test_half_precision_by_name(family: OpenCLIPFamily, architecture: str) -> None:
    adapter = family.load(architecture, "random", precision="pure_bf16")
    with torch.no_grad():
        assert adapter.encode_image(pixels()).patches.dtype == torch.bfloat16


# open_clip:tiny ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_tiny_folder(tmp_path / "tiny")
    monkeypatch.setattr(tiny, "EMBEDDED_FOLDER", folder)
    return folder


def test_tiny_comes_with_weights_tokenizer_mode_and_calibration(family: OpenCLIPFamily, tiny_folder: Path) -> None:
    adapter = family.load("tiny", "embedded")
    description = adapter.description
    assert description.name == "open_clip:tiny@embedded"
    assert description.dense_mode == "value_only"
    assert description.calibration == Calibration(8.0, -2.0)
    assert (description.mean, description.std) == ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    assert description.interpolation == "bilinear"
    assert not description.text_needs_full_context
    assert not adapter.model.training
    stored = load_file(tiny_folder / "model.safetensors")
    for name, tensor in adapter.model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].float()), name
    tokens = adapter.tokenize(["a cat", "a cat " * 20, ""])
    assert tokens.truncated == [False, True, False]
    assert tokens.ids.gather(1, tokens.lengths[:, None] - 1).unique().tolist() == [adapter.model.vocab_size - 1]
    with torch.no_grad():
        cut = adapter.encode_text(tokens.ids[:1, : int(tokens.lengths[0])])
        torch.testing.assert_close(cut, adapter.model.encode_text(tokens.ids[:1]), atol=2e-6, rtol=1e-5)
    assert family.load("tiny", "embedded", dense="maskclip").description.dense_mode == "maskclip"


def test_tiny_with_random_weights(family: OpenCLIPFamily, tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()
    torch.manual_seed(1)
    one = family.load("tiny", "random")
    torch.manual_seed(1)
    same = family.load("tiny", "random")
    other = family.load("tiny", "random")
    assert torch.equal(one.model.visual.proj, same.model.visual.proj)
    assert not torch.equal(one.model.visual.proj, other.model.visual.proj)
    with pytest.raises(TTDError, match=r"model\.safetensors are absent; .*open_clip:tiny@random"):
        family.load("tiny", "embedded")


def test_a_model_is_built_from_a_folder_or_its_configuration(tiny_folder: Path) -> None:
    config = json.loads((tiny_folder / "open_clip_config.json").read_text())
    for source in (config, tiny_folder, str(tiny_folder)):
        model = build_tiny(source)
        assert type(model) is open_clip.CLIP
        assert model.visual.preprocess_cfg["mean"] == [0.5, 0.4, 0.3]
        assert model.visual.preprocess_cfg["size"] == (32, 32)
        assert model.training


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "ttd.json", "open_clip_config.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1, 2]"])
def test_a_damaged_folder_is_one_clear_sentence(
    family: OpenCLIPFamily, tiny_folder: Path, file: str, content: bytes | None
) -> None:
    (tiny_folder / file).unlink()
    if content is not None:
        (tiny_folder / file).write_bytes(content)
    with pytest.raises(TTDError) as caught:
        family.load("tiny", "embedded")
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_noticed(tiny_folder: Path) -> None:
    path = tiny_folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["vocab_size"] += 1
    path.write_text(json.dumps(config))
    with pytest.raises(TTDError, match="do not belong together"):
        load_tiny(tiny_folder, weights=False)


def test_missing_settings_are_named(tiny_folder: Path) -> None:
    (tiny_folder / "ttd.json").write_text('{"dense_mode": "maskclip", "calibration": {"scale": 3}}')
    with pytest.raises(TTDError, match=r"ttd\.json must contain .*shift"):
        read_settings(tiny_folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TinyTokenizer:
    folder = write_tiny_folder(tmp_path_factory.mktemp("tokenizer"), weights=False)
    return TinyTokenizer(folder / "tokenizer.json", CONTEXT)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=4), length=st.integers(3, 40))
def test_the_tiny_tokenizer_takes_any_string(tokenizer: TinyTokenizer, texts: list[str], length: int) -> None:
    rows = tokenizer(texts, context_length=length)
    start, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    assert rows.shape == (len(texts), length)
    assert rows.dtype == torch.int64
    for row, text in zip(rows.tolist(), texts, strict=True):
        ids = tokenizer.encode(text)
        assert not {0, start, end} & set(ids)
        kept = ids[: length - 2]
        assert row == [start, *kept, end] + [0] * (length - 2 - len(kept))


def test_special_tokens_in_a_caption_are_text(tokenizer: TinyTokenizer) -> None:
    ids = tokenizer("<end> <start> <pad>")[0]
    assert int((ids == tokenizer.eot_token_id).sum()) == 1
    assert ids.shape == (CONTEXT,)


def test_the_tiny_tokenizer_can_be_copied_and_sent(tokenizer: TinyTokenizer) -> None:
    for twin in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert torch.equal(twin(["<end> a cat ☃"]), tokenizer(["<end> a cat ☃"]))


# Objects -------------------------------------------------------------------------------------------------------------


class OriginalBlock(nn.Module):
    """A block as in the original clip package: the same names, the sequence first, no layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict([("c_fc", nn.Linear(width, width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(width, width))])
        )


class OriginalClip(nn.Module):
    """The attribute names of the original clip package's CLIP."""

    def __init__(self, *, with_layer_scale: bool = False) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, 8, 4, 4, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.zeros(8))
        self.visual.positional_embedding = nn.Parameter(torch.zeros(5, 8))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(8), nn.LayerNorm(8)
        self.visual.transformer = nn.Module()
        self.visual.transformer.resblocks = nn.Sequential(OriginalBlock(8))
        if with_layer_scale:
            for block in self.visual.transformer.resblocks:
                block.ls_1 = block.ls_2 = nn.Identity()
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, image: torch.Tensor) -> torch.Tensor: ...

    def encode_text(self, text: torch.Tensor) -> torch.Tensor: ...


def transformers_clip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=small | {"vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49},
        vision_config=small | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    return transformers.CLIPModel(config)


def open_clip_siglip() -> nn.Module:
    vision = {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CustomTextCLIP(embed_dim=64, vision_cfg=vision, text_cfg=text)


def test_native_models_are_claimed(family: OpenCLIPFamily) -> None:
    for model in (tiny_clip(), tiny_clip(custom_text=True), tiny_clip(vision={"block_type": "custom"})):
        assert family.claims(model)
        assert family_for_model(model) == "open_clip"


def test_models_with_two_poolers_are_claimed_and_then_refused_with_the_reason(family: OpenCLIPFamily) -> None:
    model = tiny_clip(vision={"attentional_pool": "parallel", "attn_pooler_queries": 4, "attn_pooler_heads": 2})
    assert family.claims(model)
    with pytest.raises(UnsupportedModelError, match="no pooled embedding"):
        family.wrap(model)
    reason = recognition.unsupported_config_reason({"vision_cfg": {"attentional_pool": "parallel"}})
    assert reason is not None and "two poolers (parallel)" in reason


@pytest.mark.parametrize(
    "build",
    [
        OriginalClip,
        lambda: OriginalClip(with_layer_scale=True),
        transformers_clip,
        open_clip_siglip,
        lambda: nn.Linear(2, 2),
        lambda: nn.Sequential(tiny_clip()),
        lambda: "ViT-B-16",
        lambda: None,
    ],
)
def test_models_of_other_families_are_not(family: OpenCLIPFamily, build: Any) -> None:
    model = build()
    assert not family.claims(model)


def test_attention_as_in_open_clip_4(family: OpenCLIPFamily) -> None:
    """open_clip 4 has no batch_first anywhere: its attention is its own and always batch first."""
    model = tiny_clip(vision={"block_type": "custom"})
    del model.visual.transformer.batch_first
    assert not hasattr(model.visual.transformer.resblocks[0].attn, "batch_first")
    assert family.claims(model)
    with torch.no_grad():
        assert family.wrap(model).encode_image(pixels()).patches.shape == (2, 4, 4, EMBED)


def test_wrapping(family: OpenCLIPFamily) -> None:
    model = tiny_clip().train()
    adapter = family.wrap(model, tokenizer=WordTokenizer(), preprocess={"mean": 0.5, "std": 0.5}, dense="value_only")
    assert adapter.model is model
    assert model.training
    assert adapter.training
    assert adapter.description.name == "open_clip:CLIP"
    assert adapter.description.mean == (0.5, 0.5, 0.5)
    assert adapter.tokenize(["a b"]).lengths.tolist() == [4]
    assert family.wrap(model).description.dense_mode == "maskclip"
    with pytest.raises(TTDError, match="without a tokenizer"):
        family.wrap(model).tokenize(["a"])
    with pytest.raises(InputError, match="unknown dense mode"):
        family.wrap(model, dense="mask")


# What importing costs, and what is missing ---------------------------------------------------------------------------


def test_the_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys, ttd_open_clip.plugin as plugin; heavy = {'open_clip', 'torch', 'torchvision', 'peft', 'timm'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "found = []; plugin.register_adapters(found.append); assert found[0].name == 'open_clip';"
        "from torch import nn; assert not found[0].claims(nn.Linear(2, 2));"
        "assert not (heavy - {'torch'}) & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "failure", [ImportError("No module named 'open_clip'"), RuntimeError("operator torchvision::nms does not exist")]
)
def test_missing_or_broken_open_clip(
    family: OpenCLIPFamily, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    class Broken:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "open_clip":
                raise failure

    for name in [name for name in sys.modules if name.partition(".")[0] == "open_clip"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    for call in (family.models, lambda: family.weights("ViT-B-16"), lambda: family.load("ViT-B-16", "random")):
        with pytest.raises(MissingDependencyError) as caught:
            call()
        assert str(failure) in str(caught.value)
        assert "pip install 'ttd-plugins[open_clip]'" in str(caught.value)


def test_missing_tokenizers_library(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match="needs the library tokenizers"):
        load_tiny(tiny_folder)
