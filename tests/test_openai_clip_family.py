"""The family openai_clip: names, folders and objects that it takes, and what it says when something is missing."""

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

import huggingface_hub
import torch
import transformers
from helpers_openai_clip import (
    BUILDS,
    CONTEXT,
    EMBED,
    IMAGE,
    Words,
    library_image,
    pixels,
    transformers_clip,
    transformers_config,
    write_folder,
)
from safetensors.torch import load_file, save_file
from torch import nn
from ttd_openai_clip import tiny
from ttd_openai_clip.architectures import CONFIGURATIONS, SHORT_NAMES
from ttd_openai_clip.family import OpenAICLIPFamily

from ttd_plugins.adapter import Calibration
from ttd_plugins.errors import BackboneNameError, InputError, MissingDependencyError, TTDError, UnsupportedModelError

BASE = "openai/clip-vit-base-patch16"
TINY_FILES = ("config.json", "tokenizer.json", "ttd.json")


@pytest.fixture
def family() -> OpenAICLIPFamily:
    return OpenAICLIPFamily()


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


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """A published name whose architecture is a small one while the test runs."""
    monkeypatch.setitem(CONFIGURATIONS, BASE, transformers_config().to_dict())
    return BASE


# Names ---------------------------------------------------------------------------------------------------------------


def test_models_and_weights(family: OpenAICLIPFamily, tmp_path: Path) -> None:
    assert family.models() == ["tiny", *CONFIGURATIONS]
    assert set(SHORT_NAMES.values()) == set(CONFIGURATIONS)
    assert (family.weights("tiny"), family.default_weights("tiny")) == (["embedded"], "embedded")
    for own in (BASE, "ViT-B-16", "ViT-B/16", "some/finetune", str(tmp_path)):
        assert (family.weights(own), family.default_weights(own)) == (["own"], "own")


def test_architectures_are_those_of_open_clip() -> None:
    """Two independent tables of the same four models."""
    open_clip = pytest.importorskip("open_clip")
    for short, name in SHORT_NAMES.items():
        theirs = open_clip.get_model_config(short)
        config = transformers.CLIPConfig(**CONFIGURATIONS[name])
        vision, text = config.vision_config, config.text_config
        assert (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers) == (
            theirs["vision_cfg"]["image_size"], theirs["vision_cfg"]["patch_size"], theirs["vision_cfg"]["width"],
            theirs["vision_cfg"]["layers"],
        )  # fmt: skip
        assert vision.num_attention_heads == vision.hidden_size // 64
        assert (text.hidden_size, text.num_attention_heads, text.num_hidden_layers) == (
            theirs["text_cfg"]["width"], theirs["text_cfg"]["heads"], theirs["text_cfg"]["layers"]
        )  # fmt: skip
        assert (text.max_position_embeddings, text.vocab_size) == (77, theirs["text_cfg"]["vocab_size"])
        assert config.projection_dim == theirs["embed_dim"]
        assert vision.hidden_act == text.hidden_act == "quick_gelu"


def test_names_go_through_the_registry() -> None:
    from ttd_plugins.plugins import parse_name

    assert parse_name(f"openai_clip:{BASE}").weights == "own"
    assert parse_name("openai_clip:ViT-B-16@random").weights == "random"


@pytest.mark.parametrize("verb", ["weights", "load"])
def test_unknown_models_are_answered_with_suggestions(family: OpenAICLIPFamily, verb: str) -> None:
    arguments = ("ViT-B-61", "own")[: 1 if verb == "weights" else 2]
    with pytest.raises(BackboneNameError, match=r"unknown openai_clip model 'ViT-B-61'; did you mean .*ORG/NAME"):
        getattr(family, verb)(*arguments)


def test_unknown_weights_and_folders_are_answered_with_the_choices(family: OpenAICLIPFamily) -> None:
    with pytest.raises(BackboneNameError, match="known: own, random"):
        family.load("ViT-B-16", "openai")
    with pytest.raises(BackboneNameError, match="known: embedded, random"):
        family.load("tiny", "own")
    with pytest.raises(InputError, match="unknown precision 'int8'"):
        family.load("tiny", "random", precision="int8")
    for path in ("/nowhere/at/all", "./nowhere", "~/nowhere-of-this-name", "a/b/c"):
        with pytest.raises(TTDError, match=f"there is no folder {path}"):
            family.load(path, "own")


# Hub names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [BASE, "ViT-B-16", "ViT-B/16"])
def test_a_published_architecture_with_random_weights_needs_no_network(
    family: OpenAICLIPFamily, offline: None, small: str, tmp_path: Path, name: str
) -> None:
    adapter = family.load(name, "random", dense="clearclip", calibration=Calibration(5, 1), cache_dir=str(tmp_path))
    description = adapter.description
    assert description.name == f"openai_clip:{name}@random"
    assert (description.dense_mode, description.calibration) == ("clearclip", Calibration(5, 1))
    assert not adapter.model.training
    with torch.no_grad():
        assert adapter.encode_image(pixels()).patches.shape == (2, 4, 4, EMBED)
    with pytest.raises(
        TTDError, match=r"the tokenizer of openai_clip:.* cannot be loaded: .*hub.*tokenizer="
    ) as caught:
        adapter.tokenize(["a cat"])
    assert "\n" not in str(caught.value)
    given = family.load(name, "random", tokenizer=Words(), precision="bf16")
    assert given.tokenize(["a cat"]).lengths.tolist() == [4]
    assert given.model.dtype == torch.bfloat16


@pytest.mark.parametrize(("model", "weights"), [(BASE, "own"), ("nobody/nothing", "own"), ("nobody/nothing", "random")])
@pytest.mark.parametrize("broken", ["names", "offline mode"])
def test_without_a_network_there_is_one_clear_sentence(
    family: OpenAICLIPFamily,
    offline: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    weights: str,
    broken: str,
) -> None:
    """Fresh weights of an architecture that is not ours need its configuration, and with that a network too."""
    if broken == "offline mode":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    began = time.monotonic()
    with pytest.raises(TTDError) as caught:
        family.load(model, weights, cache_dir=str(tmp_path))
    # The hub's own client would try again for most of a minute.
    assert time.monotonic() - began < 30
    message = str(caught.value)
    assert f"openai_clip:{model}@{weights} cannot be loaded" in message
    if broken == "names":
        assert "Name or service not known" in message
    assert "connect to the network once" in message
    assert "\n" not in message
    assert caught.value.__cause__ is not None


def warm_cache(root: Path) -> Any:
    repository = root / "models--some--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return write_folder(repository / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("weights", ["own", "random"])
def test_a_warm_cache_needs_no_network(family: OpenAICLIPFamily, offline: None, tmp_path: Path, weights: str) -> None:
    pytest.importorskip("open_clip")
    model = warm_cache(tmp_path)
    adapter = family.load("some/clip", weights, cache_dir=str(tmp_path))
    same = torch.equal(adapter.model.visual_projection.weight, model.visual_projection.weight)
    assert same == (weights == "own")
    assert adapter.tokenize(["a cat"]).lengths.tolist() == [4]


# Folders -------------------------------------------------------------------------------------------------------------


def test_a_local_folder(family: OpenAICLIPFamily, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    model = write_folder(tmp_path / "model")
    adapter = family.load(str(tmp_path / "model"), "own")
    with torch.no_grad():
        pooled = adapter.encode_image(pixels()).pooled
        torch.testing.assert_close(pooled, library_image(model, pixels()), atol=1e-5, rtol=1e-5)
    assert adapter.tokenize(["a cat"]).ids.tolist()[0][:4] == [49406, 320, 2368, 49407]
    assert not adapter.model.training
    fresh = family.load(str(tmp_path / "model"), "random")
    assert not torch.equal(fresh.model.visual_projection.weight, model.visual_projection.weight)
    half = family.load(str(tmp_path / "model"), "own", precision="fp16")
    assert half.model.dtype == torch.float16


def test_a_folder_without_a_tokenizer_serves_images(family: OpenAICLIPFamily, tmp_path: Path) -> None:
    transformers_clip().save_pretrained(tmp_path)
    adapter = family.load(str(tmp_path), "own")
    with torch.no_grad():
        assert adapter.encode_image(pixels()).patches.shape == (2, 4, 4, EMBED)
    with pytest.raises(TTDError, match=r"tokenizer of .* cannot be loaded .*no tokenizer.json and no vocab.json"):
        adapter.tokenize(["a"])
    given = family.load(str(tmp_path), "own", tokenizer=Words())
    assert given.tokenize(["a cat"]).lengths.tolist() == [4]


def test_a_folder_with_preprocessing_of_its_own(family: OpenAICLIPFamily, tmp_path: Path) -> None:
    transformers_clip().save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": IMAGE}, "crop_size": {"height": IMAGE, "width": IMAGE}}
    transformers.CLIPImageProcessor(image_mean=[0.4] * 3, resample=2, **size).save_pretrained(tmp_path)
    description = family.load(str(tmp_path), "own").description
    assert description.mean == (0.4, 0.4, 0.4)
    assert description.interpolation == "bilinear"


def test_weights_that_are_missing_are_never_replaced_by_random_ones(family: OpenAICLIPFamily, tmp_path: Path) -> None:
    """transformers itself fills the gaps of a checkpoint with random values, and only logs it."""
    transformers_clip().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    del state["vision_model.post_layernorm.bias"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(TTDError, match=r"1 weights are absent .*such as vision_model.post_layernorm.bias"):
        family.load(str(tmp_path), "own")
    state["vision_model.post_layernorm.bias"] = torch.zeros(5)
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(
        TTDError, match=r"1 weights are .*of another shape, such as vision_model.post_layernorm.bias\)"
    ) as caught:
        family.load(str(tmp_path), "own")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "garbage"])
def test_damaged_weights_are_one_clear_sentence(family: OpenAICLIPFamily, tmp_path: Path, damage: str) -> None:
    transformers_clip().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if damage != "absent":
        weights.write_bytes(
            {"empty": b"", "cut": content[: len(content) // 2], "garbage": b"no checkpoint" * 9}[damage]
        )
    with pytest.raises(TTDError, match=r"cannot be loaded .*config.json and model.safetensors") as caught:
        family.load(str(tmp_path), "own")
    assert "\n" not in str(caught.value)
    # The architecture is whole, so fresh weights are to be had.
    assert family.load(str(tmp_path), "random").description.embedding_width == EMBED


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "{}", '{"model_type": "clip", "vision_config": {"hidden_size": "x"}}']
)
@pytest.mark.parametrize("weights", ["own", "random"])
def test_a_folder_that_is_no_model(family: OpenAICLIPFamily, tmp_path: Path, content: str | None, weights: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(TTDError, match=r"config.json|configuration") as caught:
        family.load(str(tmp_path), weights)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["siglip", "clip_vision_model", "blip", "clipseg"])
def test_folders_of_other_models_are_refused_before_anything_is_built(
    family: OpenAICLIPFamily, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UnsupportedModelError, match=f"cannot be adapted: .*model type '{kind}'"):
        family.load(str(tmp_path), "own")


@pytest.mark.parametrize("content", ["{", "[]", '{"image_mean": [0.5, 0.5]}'])
def test_damaged_preprocessing_is_one_clear_sentence(family: OpenAICLIPFamily, tmp_path: Path, content: str) -> None:
    transformers_clip().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(TTDError) as caught:
        family.load(str(tmp_path), "own")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "{}", "[1, 2]"])
def test_a_damaged_tokenizer_is_one_clear_sentence(family: OpenAICLIPFamily, tmp_path: Path, content: str) -> None:
    transformers_clip().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TTDError, match=r"the tokenizer of openai_clip:.* cannot be loaded") as caught:
        family.load(str(tmp_path), "own")
    assert "\n" not in str(caught.value)


# openai_clip:tiny ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name in TINY_FILES:
        shutil.copy(tiny.EMBEDDED_FOLDER / name, folder / name)
    monkeypatch.setattr(tiny, "EMBEDDED_FOLDER", folder)
    return folder


def test_tiny_is_small_and_random_on_demand(family: OpenAICLIPFamily) -> None:
    torch.manual_seed(1)
    adapter = family.load("tiny", "random")
    description = adapter.description
    assert description.name == "openai_clip:tiny@random"
    assert (description.image_size, description.patch_size) == ((64, 64), (8, 8))
    assert sum(2 * tensor.numel() for tensor in adapter.model.state_dict().values()) < 4_000_000
    tokens = adapter.tokenize(["a cat", "a cat " * 40, ""])
    assert tokens.truncated == [False, True, False]
    with torch.no_grad():
        image = adapter.encode_image(pixels(2, 64, 64))
        torch.testing.assert_close(image.pooled, library_image(adapter.model, pixels(2, 64, 64)), atol=1e-5, rtol=1e-5)
        cut = adapter.encode_text(tokens.ids[:1, : int(tokens.lengths[0])])
        torch.testing.assert_close(cut, adapter.encode_text(tokens.ids[:1]), atol=1e-5, rtol=1e-5)
    torch.manual_seed(1)
    again = family.load("tiny", "random")
    assert torch.equal(again.model.visual_projection.weight, adapter.model.visual_projection.weight)


def test_tiny_with_and_without_weights(family: OpenAICLIPFamily, tiny_folder: Path) -> None:
    with pytest.raises(TTDError, match=r"model\.safetensors are absent; .*openai_clip:tiny@random") as caught:
        family.load("tiny", "embedded")
    assert "\n" not in str(caught.value)
    model, _ = tiny.load_tiny(tiny_folder, weights=False)
    halves = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(halves, tiny_folder / "model.safetensors")
    settings = {"dense_mode": "naclip", "calibration": {"scale": 8.0, "shift": -2.0}}
    (tiny_folder / "ttd.json").write_text(json.dumps(settings))
    adapter = family.load("tiny", "embedded")
    assert adapter.description.name == "openai_clip:tiny@embedded"
    assert adapter.description.dense_mode == "naclip"
    assert adapter.description.calibration == Calibration(8.0, -2.0)
    for name, tensor in adapter.model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, halves[name].float()), name
    assert family.load("tiny", "embedded", dense="plain").description.dense_mode == "plain"


@pytest.mark.parametrize("file", TINY_FILES)
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1, 2]"])
def test_a_damaged_tiny_folder_is_one_clear_sentence(
    family: OpenAICLIPFamily, tiny_folder: Path, file: str, content: bytes | None
) -> None:
    (tiny_folder / file).unlink()
    if content is not None:
        (tiny_folder / file).write_bytes(content)
    with pytest.raises(TTDError) as caught:
        family.load("tiny", "random")
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_noticed(family: OpenAICLIPFamily, tiny_folder: Path) -> None:
    content = json.loads((tiny_folder / "config.json").read_text())
    content["text_config"]["vocab_size"] += 1
    (tiny_folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(TTDError, match="do not belong together"):
        family.load("tiny", "random")


# Objects -------------------------------------------------------------------------------------------------------------


def of_transformers(kind: str) -> Any:
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = tower | {"image_size": 16, "patch_size": 8}
    text = tower | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    make = getattr(transformers, f"{kind}Config")
    return getattr(transformers, f"{kind}Model")(make(text_config=text, vision_config=vision))


def of_open_clip(vision: dict[str, Any], **options: Any) -> Any:
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    kind = open_clip.CustomTextCLIP if options.pop("custom_text", False) else open_clip.CLIP
    return kind(embed_dim=8, vision_cfg=vision, text_cfg=text, **options)


def with_timm_trunk(name: str, **options: Any) -> Any:
    timm = pytest.importorskip("timm")
    model = of_open_clip(VIT, custom_text=True)
    model.visual = nn.Module()
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 4}
    model.visual.trunk = timm.create_model(name, **(shape | options))
    model.visual.head = nn.Sequential()
    return model


VIT = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 32}
OTHERS = {
    "open_clip ViT": ("open_clip", lambda: of_open_clip(VIT)),
    "open_clip ViT, custom text": ("open_clip", lambda: of_open_clip(VIT, custom_text=True)),
    "open_clip ResNet": ("open_clip", lambda: of_open_clip(RESNET)),
    "transformers SigLIP": ("siglip", lambda: of_transformers("Siglip")),
    "SigLIP trunk": (
        "siglip", lambda: with_timm_trunk("vit_base_patch16_siglip_224", num_classes=0, global_pool="map")
    ),
    "EVA trunk": ("eva_clip", lambda: with_timm_trunk("eva02_base_patch16_clip_224", num_classes=8)),
    "CLIPSeg": (None, lambda: of_transformers("CLIPSeg")),
    "vision tower alone": (None, lambda: transformers_clip().vision_model),
    "linear layer": (None, lambda: nn.Linear(2, 2)),
    "wrapper": (None, lambda: nn.Sequential(transformers_clip())),
}  # fmt: skip


def claimants(model: Any) -> set[str]:
    from ttd_plugins.plugins import families

    return {name for name, family in families().items() if family.claims(model)}


@pytest.mark.parametrize("build", BUILDS)
def test_each_container_is_claimed_by_this_family_alone(build: str) -> None:
    from ttd_plugins.plugins import family_for_model, wrap

    model = BUILDS[build]().train()
    assert claimants(model) == {"openai_clip"}
    assert family_for_model(model) == "openai_clip"
    adapter = wrap(model, tokenizer=Words(), preprocess={"mean": 0.5, "std": 0.5})
    assert adapter.model is model and model.training
    assert adapter.description.mean == (0.5, 0.5, 0.5)
    assert adapter.tokenize(["a"]).ids.shape == (1, CONTEXT)
    pytest.importorskip("peft")
    adapter.add_lora(2)
    assert claimants(model) == {"openai_clip"}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_of_other_families_are_not_claimed(family: OpenAICLIPFamily, kind: str) -> None:
    owner, build = OTHERS[kind]
    model = build()
    assert not family.claims(model)
    assert claimants(model) <= {owner}
    with pytest.raises(UnsupportedModelError, match="neither like transformers' CLIPModel"):
        family.wrap(model)


# What importing costs, and what is missing ---------------------------------------------------------------------------


def test_the_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys, ttd_openai_clip.plugin as plugin;"
        "heavy = {'transformers', 'open_clip', 'torch', 'torchvision', 'peft', 'timm', 'huggingface_hub', 'clip'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "found = []; plugin.register_adapters(found.append); assert found[0].name == 'openai_clip';"
        "from torch import nn; assert not found[0].claims(nn.Linear(2, 2));"
        "found[0].default_weights('ViT-B-16');"
        "assert not (heavy - {'torch'}) & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_transformers(family: OpenAICLIPFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for model in ("ViT-B-16", "tiny", "nobody/nothing"):
        with pytest.raises(MissingDependencyError, match=r"pip install 'ttd-plugins\[openai_clip\]'") as caught:
            family.load(model, "random")
        assert "\n" not in str(caught.value)
    assert "ViT-B-16" not in family.models() and BASE in family.models()
    # Models of the original package need no library.
    assert family.wrap(BUILDS["original_vit"]()).description.dense_mode == "maskclip"


@pytest.mark.parametrize(
    "error", [RuntimeError("operator torchvision::nms does not exist"), AttributeError("no Tensor")]
)
def test_broken_transformers(family: OpenAICLIPFamily, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """transformers loads its parts late, so an installation breaks when a class is asked for."""

    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise error

    monkeypatch.setitem(sys.modules, "transformers", Broken())
    with pytest.raises(MissingDependencyError, match=r"cannot be imported .*; run: pip install") as caught:
        family.load("ViT-B-16", "random")
    assert str(error) in str(caught.value)
    assert "\n" not in str(caught.value)
