"""The family siglip: names, weights, objects that it takes, and what it says when something is missing."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("open_clip")
pytest.importorskip("timm")

import huggingface_hub
import open_clip
import torch
import transformers
from helpers_open_clip import tiny_clip
from helpers_siglip import (
    CONTEXT,
    WIDTH,
    config,
    library_image,
    pixels,
    siglip_like_tokenizer,
    tiny_timm,
    tiny_transformers,
    tiny_trunk,
    write_folder,
)
from safetensors.torch import load_file, save_file
from torch import nn
from ttd_siglip import recognition, tiny
from ttd_siglip.architectures import KNOWN
from ttd_siglip.family import SiglipFamily
from ttd_siglip.fresh_model import fresh_model

from ttd_plugins.adapter import Calibration
from ttd_plugins.errors import BackboneNameError, InputError, MissingDependencyError, TTDError, UnsupportedModelError
from ttd_plugins.plugins import family_for_model

# open_clip would download a sentencepiece model for a name with siglip in it that states no tokenizer.
NAME = "tests-tiny-map"
TINY_FILES = ("config.json", "tokenizer.json", "ttd.json")


@pytest.fixture
def family() -> SiglipFamily:
    return SiglipFamily()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names do not resolve, as without a network."""

    def fail(*_: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", fail)


def open_clip_config() -> dict[str, Any]:
    return {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 160, "timm_model_name": "tests_siglip_vit", "timm_pool": "map", "timm_proj": "none"
        },
        "text_cfg": {
            "context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "no_causal_mask": True,
            "proj_bias": True, "pool_type": "last",
        },
    }  # fmt: skip


@pytest.fixture
def architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small SigLIP that open_clip knows by name while the test runs, with one pretrained tag."""
    import timm

    def tests_siglip_vit(pretrained: bool = False, **options: Any) -> Any:
        return timm.create_model("test_vit", pretrained=pretrained, class_token=False, **options)

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "tests_siglip_vit", tests_siglip_vit)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    tag = open_clip.pretrained._slpcfg(hf_hub="nobody/nothing-of-this-name/")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, {"webli": tag})
    (tmp_path / f"{NAME}.json").write_text(json.dumps(open_clip_config()))
    open_clip.add_model_config(tmp_path / f"{NAME}.json")
    return NAME


# Names ---------------------------------------------------------------------------------------------------------------


def test_models_of_both_libraries_are_listed(family: SiglipFamily) -> None:
    models = family.models()
    assert models[0] == "tiny"
    assert {"google/siglip-base-patch16-224", "google/siglip2-so400m-patch14-384", "ViT-B-16-SigLIP"} <= set(models)
    assert {"ViT-gopt-16-SigLIP2-256", "ViT-SO400M-14-SigLIP"} <= set(models)
    for other in ("ViT-B-16", "EVA02-B-16", "PE-Core-B-16", "convnext_base", "MobileCLIP-B"):
        assert other in open_clip.list_models()
        assert other not in models


def test_known_architectures_are_those_of_open_clip(family: SiglipFamily) -> None:
    """Two independent tables: the sizes of the same checkpoints as open_clip's own configurations have them."""
    twins = {
        "google/siglip-base-patch16-384": "ViT-B-16-SigLIP-384",
        "google/siglip-base-patch16-256-multilingual": "ViT-B-16-SigLIP-i18n-256",
        "google/siglip-large-patch16-256": "ViT-L-16-SigLIP-256",
        "google/siglip-so400m-patch14-224": "ViT-SO400M-14-SigLIP",
        "google/siglip-so400m-patch14-384": "ViT-SO400M-14-SigLIP-384",
        "google/siglip2-base-patch32-256": "ViT-B-32-SigLIP2-256",
        "google/siglip2-base-patch16-224": "ViT-B-16-SigLIP2",
        "google/siglip2-large-patch16-512": "ViT-L-16-SigLIP2-512",
        "google/siglip2-so400m-patch16-384": "ViT-SO400M-16-SigLIP2-384",
        "google/siglip2-giant-opt-patch16-256": "ViT-gopt-16-SigLIP2-256",
    }
    for name, twin in twins.items():
        ours, theirs = KNOWN[name], open_clip.get_model_config(twin)
        vision, text = ours["vision_config"], ours["text_config"]
        assert vision["image_size"] == theirs["vision_cfg"]["image_size"], name
        assert f"patch{vision['patch_size']}_" in theirs["vision_cfg"]["timm_model_name"], name
        assert vision["hidden_size"] == text["projection_size"] == theirs["embed_dim"], name
        for key, other in (
            ("max_position_embeddings", "context_length"), ("vocab_size", "vocab_size"), ("hidden_size", "width"),
            ("num_hidden_layers", "layers"), ("num_attention_heads", "heads"),
        ):  # fmt: skip
            assert text[key] == theirs["text_cfg"][other], (name, key)
        assert text["intermediate_size"] == int(text["hidden_size"] * theirs["text_cfg"].get("mlp_ratio", 4.0)), name


def test_weights_and_defaults(family: SiglipFamily, tmp_path: Path) -> None:
    assert family.weights("ViT-B-16-SigLIP") == ["webli"]
    assert family.default_weights("ViT-B-16-SigLIP") is None
    assert (family.weights("tiny"), family.default_weights("tiny")) == (["embedded"], "embedded")
    for own in ("google/siglip2-base-patch16-224", "some/finetune", str(tmp_path), "hf-hub:timm/ViT-B-16-SigLIP"):
        assert (family.weights(own), family.default_weights(own)) == (["own"], "own")


def test_names_go_through_the_registry() -> None:
    from ttd_plugins.plugins import parse_name

    assert parse_name("siglip:google/siglip-base-patch16-224").weights == "own"
    assert parse_name("siglip:google/siglip-base-patch16-224@random").weights == "random"
    assert parse_name("siglip:ViT-B-16-SigLIP@webli").model == "ViT-B-16-SigLIP"


@pytest.mark.parametrize("verb", ["weights", "load"])
def test_unknown_models_are_answered_with_suggestions(family: SiglipFamily, verb: str) -> None:
    arguments = ("ViT-B-61-SigLIP", "random")[: 1 if verb == "weights" else 2]
    with pytest.raises(
        BackboneNameError, match=r"unknown siglip model 'ViT-B-61-SigLIP'; did you mean .*B-16.*ORG/NAME"
    ):
        getattr(family, verb)(*arguments)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("ViT-B-16", "no timm trunk"),
        ("EVA02-B-16", "'token'"),
        ("PE-Core-B-16", "not one of SigLIP's"),
        ("RN50", "no timm"),
    ],
)
def test_architectures_of_other_kinds_are_refused_with_the_reason(
    family: SiglipFamily, model: str, reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"siglip:{model} cannot be adapted: .*{reason}"):
        family.load(model, "random")


def test_unknown_weights_are_answered_with_the_choices(family: SiglipFamily, architecture: str) -> None:
    with pytest.raises(BackboneNameError, match=r"unknown weights of siglip:.*'webly'; did you mean 'webli'"):
        family.load(architecture, "webly")
    for model in ("google/siglip-base-patch16-224", "local-dir:/nowhere"):
        with pytest.raises(BackboneNameError, match=r"known: own, random"):
            family.load(model, "webli")
    with pytest.raises(BackboneNameError, match=r"known: embedded, random"):
        family.load("tiny", "webli")
    with pytest.raises(TTDError, match=r"no checkpoint file weights\.pt"):
        family.load(architecture, "weights.pt")
    for path in ("/nowhere/at/all", "./nowhere", "~/nowhere-of-this-name"):
        with pytest.raises(TTDError, match=f"there is no folder {path}"):
            family.load(path, "own")


# transformers: hub names and folders ---------------------------------------------------------------------------------


def test_a_known_architecture_with_random_weights_needs_no_network(
    family: SiglipFamily, offline: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(KNOWN, "google/siglip-test", config())
    adapter = family.load("google/siglip-test", "random", last_block="value", cache_dir=str(tmp_path))
    assert adapter.description.name == "siglip:google/siglip-test@random"
    assert adapter.description.dense_mode == "value,last_block=value"
    assert not adapter.model.training
    torch.testing.assert_close(adapter.logit_scale(), torch.tensor(10.0))
    torch.testing.assert_close(adapter.logit_bias(), torch.tensor(-10.0))
    with torch.no_grad():
        assert adapter.encode_image(pixels()).patches.shape == (2, 4, 4, WIDTH)
    with pytest.raises(TTDError, match=r"the tokenizer of siglip:google/siglip-test@random cannot be loaded: .*hub"):
        adapter.tokenize(["a cat"])
    given = family.load("google/siglip-test", "random", tokenizer=siglip_like_tokenizer(), precision="bf16")
    assert given.tokenize(["a cat"]).lengths.tolist() == [3]
    assert given.model.dtype == torch.bfloat16
    with pytest.raises(InputError, match="unknown precision 'int8'"):
        family.load("google/siglip-test", "random", precision="int8")


@pytest.mark.parametrize("model", ["google/siglip-base-patch16-224", "nobody/nothing", "hf-hub:nobody/nothing", NAME])
@pytest.mark.parametrize("broken", ["names", "offline mode"])
def test_without_a_network_there_is_one_clear_sentence(
    family: SiglipFamily,
    architecture: str,
    offline: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    model: str,
    broken: str,
) -> None:
    if broken == "offline mode":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    weights = "webli" if model == NAME else "own"
    began = time.monotonic()
    with pytest.raises(TTDError) as caught:
        family.load(model, weights, cache_dir=str(tmp_path))
    # The hub's own client would try again for most of a minute.
    assert time.monotonic() - began < 15
    message = str(caught.value)
    assert f"siglip:{model}@{weights} cannot be loaded" in message
    assert {"names": "Name or service not known", "offline mode": "HF_HUB_OFFLINE"}[broken] in message
    assert "connect to the network once" in message
    assert "\n" not in message
    assert caught.value.__cause__ is not None
    assert huggingface_hub.constants.HF_HUB_OFFLINE is (broken == "offline mode")


def test_a_warm_cache_needs_no_network(family: SiglipFamily, offline: None, tmp_path: Path) -> None:
    repository = tmp_path / "models--some--siglip"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    model = write_folder(snapshot)
    adapter = family.load("some/siglip", "own", cache_dir=str(tmp_path))
    assert torch.equal(adapter.model.vision_model.head.probe, model.vision_model.head.probe)
    assert adapter.tokenize(["a cat"]).lengths.tolist() == [3]


@pytest.mark.parametrize("processor", [True, False])
def test_a_local_folder(family: SiglipFamily, tmp_path: Path, processor: bool) -> None:
    model = write_folder(tmp_path / "model", processor=processor)
    adapter = family.load(str(tmp_path / "model"), "own")
    with torch.no_grad():
        pooled = adapter.encode_image(pixels()).pooled
        torch.testing.assert_close(pooled, library_image(model, pixels()), atol=2e-6, rtol=1e-5)
    assert adapter.description.mean == ((0.4, 0.4, 0.4) if processor else (0.5, 0.5, 0.5))
    assert adapter.description.interpolation == ("bilinear" if processor else "bicubic")
    assert adapter.tokenize(["a cat"]).ids.shape == (1, CONTEXT)
    fresh = family.load(str(tmp_path / "model"), "random")
    assert not torch.equal(fresh.model.vision_model.head.probe, model.vision_model.head.probe)
    assert float(fresh.logit_bias().detach()) == -10
    half = family.load(str(tmp_path / "model"), "own", precision="fp16")
    assert half.model.dtype == torch.float16


def test_weights_that_are_missing_are_never_replaced_by_random_ones(family: SiglipFamily, tmp_path: Path) -> None:
    """transformers itself fills the gaps of a checkpoint with random values, and only logs it."""
    write_folder(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["vision_model.head.probe"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        TTDError,
        match=r"1 weights are absent or of another shape, such as vision_model.head.probe",
    ):
        family.load(str(tmp_path), "own")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(TTDError, match="cannot be loaded"):
        family.load(str(tmp_path), "own")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "siglip2"}, "NaFlex"),
        ({"model_type": "clip"}, "'clip' model"),
        ({"model_type": "siglip_vision_model"}, "'siglip_vision_model' model"),
        ({"vision_config": {"vision_use_head": False}}, "no pooling head"),
    ],
)
def test_folders_of_other_models_are_refused_before_anything_is_built(
    family: SiglipFamily, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"} | changes))
    with pytest.raises(UnsupportedModelError, match=f"cannot be adapted: .*{reason}"):
        family.load(str(tmp_path), "own")


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "siglip", "vision_config": {"hidden_size": "x"}}'])
def test_a_folder_that_is_no_model(family: SiglipFamily, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(TTDError, match=r"cannot be loaded .*save_pretrained") as caught:
        family.load(str(tmp_path), "own")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer(family: SiglipFamily, tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer=False)
    with pytest.raises(TTDError, match=r"the tokenizer of siglip:.* cannot be loaded"):
        family.load(str(tmp_path), "own")
    given = family.load(str(tmp_path), "own", tokenizer=siglip_like_tokenizer())
    assert given.tokenize(["a cat"]).lengths.tolist() == [3]


def test_a_tokenizer_whose_library_is_missing(
    family: SiglipFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ImportError("SiglipTokenizer requires the SentencePiece library")

    write_folder(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(MissingDependencyError, match=r"SentencePiece.*pip install 'ttd-plugins\[siglip\]'"):
        family.load(str(tmp_path), "own")


# open_clip: architectures and folders --------------------------------------------------------------------------------


def test_an_architecture_of_open_clip_with_random_weights(family: SiglipFamily, architecture: str) -> None:
    adapter = family.load(architecture, "random", dense="token_probe", calibration=Calibration(5, 1))
    description = adapter.description
    assert description.name == f"siglip:{NAME}@random"
    assert description.dense_mode == "token_probe"
    assert description.calibration == Calibration(5, 1)
    assert description.mean == description.std == (0.5, 0.5, 0.5)
    assert description.logits == "sigmoid"
    assert not adapter.model.training
    with torch.no_grad():
        features = adapter.encode_image(pixels(1, 160, 160))
        torch.testing.assert_close(features.pooled, adapter.model.encode_image(pixels(1, 160, 160)))
    assert adapter.tokenize(["a cat"]).ids.shape == (1, 12)


def test_a_checkpoint_of_an_architecture_gets_siglips_preprocessing(
    family: SiglipFamily, architecture: str, tmp_path: Path
) -> None:
    """open_clip knows it for its tags only and gives OpenAI's mean and std, cropped, to a file on disk."""
    model = open_clip.create_model(model_name=architecture, load_weights=False).eval()
    assert model.visual.preprocess_cfg["mean"] != (0.5, 0.5, 0.5)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    adapter = family.load(architecture, str(tmp_path / "weights.safetensors"))
    with torch.no_grad():
        images = pixels(1, 160, 160)
        torch.testing.assert_close(adapter.encode_image(images).pooled, model.encode_image(images))
    assert adapter.description.mean == adapter.description.std == (0.5, 0.5, 0.5)
    assert adapter.model.visual.preprocess_cfg["resize_mode"] == "squash"
    (tmp_path / "weights.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(TTDError, match=r"cannot be loaded .*state dict of tensors"):
        family.load(architecture, str(tmp_path / "weights.safetensors"))


def test_a_folder_of_open_clip(family: SiglipFamily, architecture: str, tmp_path: Path) -> None:
    preprocessing = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear"}
    model = open_clip.create_model(model_name=architecture, load_weights=False).eval()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": open_clip_config(), "preprocess_cfg": preprocessing})
    )
    with pytest.raises(TTDError, match=r"cannot be loaded .*open_clip_config.json"):
        family.load(f"local-dir:{folder}", "own")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    adapter = family.load(f"local-dir:{folder}", "own")
    assert adapter.description.mean == (0.1, 0.2, 0.3)
    assert torch.equal(adapter.model.visual.trunk.attn_pool.latent, model.visual.trunk.attn_pool.latent)
    other = open_clip_config()
    other["vision_cfg"]["timm_pool"] = "avg"
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": other}))
    with pytest.raises(UnsupportedModelError, match="pools by 'avg'"):
        family.load(f"local-dir:{folder}", "own")


def test_a_tokenizer_that_open_clip_loads_is_told_to_pad_at_the_right(
    family: SiglipFamily, architecture: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inner = siglip_like_tokenizer()
    inner.padding_side = "left"
    inner.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setitem(
        open_clip.factory._MODEL_CONFIGS[architecture]["text_cfg"], "hf_tokenizer_name", str(tmp_path / "tokenizer")
    )
    adapter = family.load(architecture, "random")
    assert adapter.tokenize(["a cat"]).ids[0].tolist() == [3, 4, *[1] * 10]


# siglip:tiny ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name in TINY_FILES:
        shutil.copy(tiny.EMBEDDED_FOLDER / name, folder / name)
    monkeypatch.setattr(tiny, "EMBEDDED_FOLDER", folder)
    return folder


def test_tiny_is_small_and_starts_as_siglip_does(family: SiglipFamily) -> None:
    adapter = family.load("tiny", "random")
    parameters = sum(parameter.numel() for parameter in adapter.model.parameters())
    assert parameters < 1_800_000
    assert 2 * parameters < 4_000_000
    description = adapter.description
    assert description.name == "siglip:tiny@random"
    assert (description.image_size, description.patch_size) == ((64, 64), (8, 8))
    assert (description.embedding_width, description.context_length) == (160, 32)
    torch.testing.assert_close(adapter.logit_scale(), torch.tensor(10.0))
    torch.testing.assert_close(adapter.logit_bias(), torch.tensor(-10.0))
    tokens = adapter.tokenize(["a cat", "a cat " * 30, ""])
    assert tokens.ids.shape == (3, 32)
    assert tokens.truncated == [False, True, False]
    assert tokens.ids.gather(1, tokens.lengths[:, None] - 1).unique().tolist() == [1023]
    assert tokens.ids[0, -1] == 0
    with torch.no_grad():
        assert adapter.encode_text(tokens.ids).shape == (3, 160)
        assert adapter.encode_image(pixels(2, 64, 64)).pooled.shape == (2, 160)


def test_tiny_without_weights_says_so(family: SiglipFamily, tiny_folder: Path) -> None:
    with pytest.raises(TTDError, match=r"model\.safetensors are absent; .*siglip:tiny@random") as caught:
        family.load("tiny", "embedded")
    assert "\n" not in str(caught.value)


def test_tiny_with_weights(family: SiglipFamily, tiny_folder: Path) -> None:
    model = fresh_model(json.loads((tiny_folder / "config.json").read_text()))
    halves = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(halves, tiny_folder / "model.safetensors")
    (tiny_folder / "ttd.json").write_text(
        json.dumps({"dense_mode": "token_probe,last_block=value", "calibration": {"scale": 8.0, "shift": -2.0}})
    )
    adapter = family.load("tiny", "embedded")
    assert adapter.description.dense_mode == "token_probe,last_block=value"
    assert adapter.description.calibration == Calibration(8.0, -2.0)
    for name, tensor in adapter.model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, halves[name].float()), name
    assert family.load("tiny", "embedded", dense="value").description.dense_mode == "value"


@pytest.mark.parametrize("file", TINY_FILES)
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1, 2]"])
def test_a_damaged_folder_is_one_clear_sentence(
    family: SiglipFamily, tiny_folder: Path, file: str, content: bytes | None
) -> None:
    (tiny_folder / file).unlink()
    if content is not None:
        (tiny_folder / file).write_bytes(content)
    with pytest.raises(TTDError) as caught:
        family.load("tiny", "random")
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_noticed(family: SiglipFamily, tiny_folder: Path) -> None:
    text = (tiny_folder / "config.json").read_text().replace('"vocab_size": 1024', '"vocab_size": 1025')
    (tiny_folder / "config.json").write_text(text)
    with pytest.raises(TTDError, match="do not belong together"):
        family.load("tiny", "random")


def test_tiny_learns_from_the_sigmoid_loss(family: SiglipFamily) -> None:
    """A few steps as examples/pretrain_tiny.py takes them, on one batch."""
    from ttd_plugins.method.losses import contrastive_loss

    torch.manual_seed(0)
    adapter = family.load("tiny", "random")
    adapter.train()
    ids = adapter.tokenize(["a cat", "a red dog", "grass", "two birds"]).ids
    optimizer = torch.optim.AdamW(adapter.model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = contrastive_loss(
            adapter.encode_image(pixels(4, 64, 64)).pooled,
            adapter.encode_text(ids),
            scale=adapter.logit_scale(),
            bias=adapter.logit_bias(),
            form="sigmoid",
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# Objects -------------------------------------------------------------------------------------------------------------


def transformers_clip() -> nn.Module:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = transformers.CLIPConfig(
        text_config=small | {"vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49},
        vision_config=small | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    return transformers.CLIPModel(made)


def with_eva_trunk(name: str = "eva02_base_patch16_clip_224", **options: Any) -> nn.Module:
    import timm

    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 4} | options
    return tiny_timm(trunk=timm.create_model(name, **small))


def perception_encoder() -> nn.Module:
    """timm's EVA class with the very pooling head of SigLIP, and rotary positions."""
    return with_eva_trunk("vit_pe_core_tiny_patch16_384", global_pool="map", num_classes=0)


def coca_like() -> nn.Module:
    return tiny_clip(vision={"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2})


def vision_alone() -> nn.Module:
    return tiny_transformers().vision_model


def test_siglip_models_are_claimed(family: SiglipFamily) -> None:
    for model in (tiny_transformers(), tiny_timm(), tiny_timm(trunk=tiny_trunk(reg_tokens=1))):
        assert family.claims(model)
        assert family_for_model(model) == "siglip"


@pytest.mark.parametrize(
    "build",
    [
        transformers_clip,
        lambda: with_eva_trunk(global_pool="token"),
        perception_encoder,
        lambda: tiny_clip(),
        lambda: tiny_clip(custom_text=True),
        coca_like,
        lambda: tiny_timm(trunk=tiny_trunk(global_pool="avg")),
        vision_alone,
        lambda: nn.Linear(2, 2),
        lambda: nn.Sequential(tiny_transformers()),
        lambda: "google/siglip-base-patch16-224",
        lambda: None,
    ],
)
def test_models_of_other_families_are_not(family: SiglipFamily, build: Any) -> None:
    model = build()
    assert not family.claims(model)


def test_the_family_open_clip_claims_none_of_these() -> None:
    other = pytest.importorskip("ttd_open_clip.recognition")
    for model in (tiny_transformers(), tiny_timm()):
        assert not other.claims(model)
        assert recognition.claims(model)


def test_wrapping_through_the_registry() -> None:
    from ttd_plugins.plugins import wrap

    for model in (tiny_transformers().train(), tiny_timm().train()):
        adapter = wrap(model, tokenizer=siglip_like_tokenizer(), dense="query_query", last_block="value")
        assert adapter.model is model
        assert model.training
        assert adapter.description.family == "siglip"
        assert adapter.description.dense_mode == "query_query,last_block=value"
        assert adapter.tokenize(["a cat"]).lengths.tolist() == [3]


def test_nllb_and_other_text_towers_from_transformers() -> None:
    """As open_clip's nllb-clip-base-siglip: the trunk of SigLIP, and a text tower that says no context length."""
    from open_clip.hf_model import HFTextEncoder

    made = transformers.RobertaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=CONTEXT + 2, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = tiny_timm()
    model.text = HFTextEncoder(
        "roberta", output_dim=WIDTH, config=made, pretrained=False, pooler_type="mean_pooler", proj_type="linear"
    ).eval()

    class Tokenizer:
        context_length = CONTEXT
        pad_token_id = 1

        def __call__(self, texts: list[str], context_length: int = 77) -> torch.Tensor:
            return torch.tensor([([5] * len(text.split()) + [1] * 99)[:context_length] for text in texts])

    adapter = SiglipFamily().wrap(model, tokenizer=Tokenizer())
    assert adapter.description.context_length == CONTEXT
    ids = adapter.tokenize(["a b c", "a"]).ids
    with torch.no_grad():
        torch.testing.assert_close(adapter.encode_text(ids), model.encode_text(ids))
    assert len(adapter.lora_targets("text")) == 2 * 6
    assert SiglipFamily().wrap(model).description.context_length == 64


# What importing costs, and what is missing ---------------------------------------------------------------------------


def test_the_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys, ttd_siglip.plugin as plugin;"
        "heavy = {'transformers', 'open_clip', 'torch', 'torchvision', 'peft', 'timm', 'huggingface_hub'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "found = []; plugin.register_adapters(found.append); assert found[0].name == 'siglip';"
        "from torch import nn; assert not found[0].claims(nn.Linear(2, 2));"
        "found[0].default_weights('google/siglip-base-patch16-224');"
        "assert not (heavy - {'torch'}) & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["transformers", "open_clip"])
def test_missing_or_broken_libraries(family: SiglipFamily, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    model = "google/siglip-base-patch16-224" if module == "transformers" else "ViT-B-16-SigLIP"
    with pytest.raises(MissingDependencyError, match=r"pip install 'ttd-plugins\[siglip\]'"):
        family.load(model, "random")
    # What does not need the library is listed all the same.
    assert "google/siglip-base-patch16-224" in family.models()
    assert ("ViT-B-16-SigLIP" in family.models()) == (module == "transformers")
