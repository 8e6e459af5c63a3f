"""The family eva_clip: names, weights, objects that it takes, and what it says when something is missing."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import timm
import torch
from helpers_eva_clip import BASE, CONTEXT, EMBED, IMAGE, KINDS, VARIANTS, eva_clip, trunk_options
from helpers_open_clip import WordTokenizer, pixels, tiny_clip
from safetensors.torch import save_file
from torch import nn
from ttd_eva_clip import tiny
from ttd_eva_clip.family import EvaCLIPFamily
from ttd_eva_clip.recognition import unsupported_config_reason
from ttd_eva_clip.tiny import EMBEDDED_FOLDER, build_tiny, load_tiny

from ttd_plugins.adapter import Calibration
from ttd_plugins.errors import BackboneNameError, InputError, MissingDependencyError, TTDError, UnsupportedModelError
from ttd_plugins.plugins import family_for_model, load, wrap

NAME = "tests-tiny-eva"


@timm.models.register_model
def eva_of_the_tests(pretrained: bool = False, **options: Any) -> Any:
    """A small EVA trunk that timm, and so open_clip, knows by name."""
    return timm.create_model(**(trunk_options() | options))


@pytest.fixture
def family() -> EvaCLIPFamily:
    return EvaCLIPFamily()


def config() -> dict[str, Any]:
    return {
        "embed_dim": EMBED,
        "vision_cfg": {
            "image_size": IMAGE, "timm_model_name": "eva_of_the_tests", "timm_pool": "token", "timm_proj": None
        },
        "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        "custom_text": True,
    }  # fmt: skip


@pytest.fixture
def architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small architecture that open_clip knows by name while the test runs, with one pretrained tag."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    tag = open_clip.pretrained._pcfg(hf_hub="nobody/nothing-of-this-name/")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, {"some_tag": tag})
    (tmp_path / f"{NAME}.json").write_text(json.dumps(config()))
    open_clip.add_model_config(tmp_path / f"{NAME}.json")
    return NAME


# Names ---------------------------------------------------------------------------------------------------------------


def test_models_are_the_eva_architectures(family: EvaCLIPFamily) -> None:
    published = {name for name in open_clip.list_models() if name.startswith("EVA")}
    assert {"EVA02-B-16", "EVA02-L-14", "EVA02-L-14-336", "EVA02-E-14", "EVA02-E-14-plus", "EVA01-g-14"} <= published
    assert set(family.models()) == {"tiny", *published}
    assert "merged2b_s8b_b131k" in family.weights("EVA02-B-16")
    assert family.default_weights("EVA02-B-16") is None
    assert (family.weights("tiny"), family.default_weights("tiny")) == (["embedded"], "embedded")


def test_every_listed_architecture_is_built_as_something_that_is_claimed(family: EvaCLIPFamily) -> None:
    """One block of each on the meta device, so that the filter by name and the claim cannot drift apart."""
    for name in open_clip.list_models():
        vision = open_clip.get_model_config(name)["vision_cfg"]
        trunk_name = vision.get("timm_model_name", "")
        if not trunk_name.startswith(("eva", "vit_pe", "vit_base_patch16_siglip_224")):
            assert name not in family.models()[1:]
            continue
        with torch.device("meta"):
            trunk = timm.create_model(trunk_name, num_classes=EMBED, global_pool=vision["timm_pool"], depth=1)
        shell = nn.Module()
        shell.visual, shell.logit_scale = nn.Module(), nn.Parameter(torch.zeros(()))
        shell.visual.trunk = trunk
        shell.encode_image = shell.encode_text = lambda: None
        assert family.claims(shell) == (name in family.models()) == trunk_name.startswith("eva"), name
        assert (unsupported_config_reason({"vision_cfg": vision}) is None) == trunk_name.startswith("eva")


def test_unknown_names_are_answered_with_suggestions(family: EvaCLIPFamily, architecture: str) -> None:
    with pytest.raises(BackboneNameError, match=r"unknown eva_clip model 'EVA02-B-61'; did you mean .*EVA02-B-16"):
        family.load("EVA02-B-61", "random")
    with pytest.raises(
        BackboneNameError, match=r"unknown weights of eva_clip:EVA02-B-16 'merged'.*path of a checkpoin"
    ):
        family.load("EVA02-B-16", "merged")
    with pytest.raises(BackboneNameError, match="known: embedded, random"):
        family.load("tiny", "merged")
    with pytest.raises(TTDError, match="no checkpoint file /nowhere/weights"):
        family.load(architecture, "/nowhere/weights")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("ViT-B-16", "no timm trunk"),
        ("ViT-B-16-SigLIP", "timm's vit_base_patch16_siglip_224"),
        ("PE-Core-B-16", "timm's vit_pe_core_base_patch16_224"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(family: EvaCLIPFamily, model: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"eva_clip:{model} cannot be adapted: .*{reason}"):
        family.load(model, "random")


# Loading -------------------------------------------------------------------------------------------------------------


def test_random_weights(architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    adapter = load(f"eva_clip:{architecture}@random", dense="value_only", calibration=Calibration(5, 1))
    assert adapter.description.name == f"eva_clip:{NAME}@random"
    assert (adapter.description.dense_mode, adapter.description.calibration) == ("value_only", Calibration(5, 1))
    assert not adapter.model.training
    tokens = adapter.tokenize(["a cat"])
    assert tokens.ids[0, tokens.lengths[0] - 1] == 49407
    assert not caplog.records
    logging.getLogger().warning("said")
    assert [record.message for record in caplog.records] == ["said"]


@pytest.mark.parametrize("precision", ["fp32", "pure_bf16", "bf16"])
def test_a_checkpoint_on_disk(family: EvaCLIPFamily, architecture: str, tmp_path: Path, precision: str) -> None:
    model = open_clip.create_model(model_name=architecture, pretrained=None).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    adapter = family.load(architecture, str(tmp_path / "weights.safetensors"), precision=precision)
    with torch.no_grad():
        pooled = adapter.encode_image(pixels()).pooled
        close = {} if precision != "fp32" else {"atol": 2e-6, "rtol": 1e-5}
        torch.testing.assert_close(pooled, adapter.model.encode_image(pixels().to(pooled.dtype)), **close)
        if precision == "fp32":
            torch.testing.assert_close(pooled, model.encode_image(pixels()), **close)
    assert pooled.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)


def test_a_checkpoint_of_another_model(family: EvaCLIPFamily, architecture: str, tmp_path: Path) -> None:
    torch.save(tiny_clip().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(TTDError, match=r"weights.pt cannot be loaded .*state dict of tensors"):
        family.load(architecture, str(tmp_path / "weights.pt"))


@pytest.mark.parametrize("name", [NAME, "hf-hub:nobody/nothing"])
def test_without_a_network_there_is_one_clear_sentence(
    family: EvaCLIPFamily, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    weights = "some_tag" if name == NAME else "own"
    with pytest.raises(TTDError) as caught:
        family.load(name, weights, cache_dir=str(tmp_path))
    message = str(caught.value)
    assert f"eva_clip:{name}@{weights} cannot be loaded: the model hub" in message
    assert "Name or service not known" in message and "path of a checkpoint" in message
    assert "\n" not in message


# eva_clip:tiny -------------------------------------------------------------------------------------------------------


def test_tiny_is_small_and_random_on_demand() -> None:
    torch.manual_seed(1)
    adapter = load("eva_clip:tiny@random")
    description = adapter.description
    assert (description.image_size, description.patch_size, description.embedding_width) == ((64, 64), (8, 8), 96)
    assert description.context_length == 32 and not description.text_needs_full_context
    parameters = sum(parameter.numel() for parameter in adapter.model.parameters())
    assert parameters < 1_800_000
    assert sum(2 * tensor.numel() for tensor in adapter.model.state_dict().values()) < 4_000_000
    tokens = adapter.tokenize(["a cat", "a cat " * 40])
    assert tokens.truncated == [False, True]
    with torch.no_grad():
        features = adapter.encode_image(pixels(2, 64, 64))
        torch.testing.assert_close(features.pooled, adapter.model.encode_image(pixels(2, 64, 64)), atol=2e-6, rtol=1e-5)
        cut = adapter.encode_text(tokens.ids[:1, : int(tokens.lengths[0])])
        torch.testing.assert_close(cut, adapter.model.encode_text(tokens.ids[:1]), atol=2e-6, rtol=1e-5)
    torch.manual_seed(1)
    again = load("eva_clip:tiny@random")
    assert torch.equal(again.model.visual.trunk.head.weight, adapter.model.visual.trunk.head.weight)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the embedded folder without weights."""
    shutil.copytree(EMBEDDED_FOLDER, tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").unlink(missing_ok=True)
    monkeypatch.setattr(tiny, "EMBEDDED_FOLDER", tmp_path / "tiny")
    return tmp_path / "tiny"


def test_absent_weights_are_one_sentence_and_present_ones_are_loaded(family: EvaCLIPFamily, folder: Path) -> None:
    with pytest.raises(TTDError, match=r"model\.safetensors are absent; .*eva_clip:tiny@random"):
        family.load("tiny", "embedded")
    model = build_tiny(folder)
    save_file({name: t.half().contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    adapter = family.load("tiny", "embedded")
    for name, tensor in adapter.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].half().float()), name
    assert adapter.description.name == "eva_clip:tiny@embedded"


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model_cfg": {"embed_dim": 8, "trunk_cfg": {"model_name": "x"}}}'])
def test_a_damaged_folder_is_one_clear_sentence(folder: Path, content: bytes) -> None:
    (folder / "eva_clip_config.json").write_bytes(content)
    with pytest.raises(TTDError, match=r"eva_clip_config\.json") as caught:
        load_tiny(folder, weights=False)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_noticed(folder: Path) -> None:
    content = json.loads((folder / "eva_clip_config.json").read_text())
    content["model_cfg"]["text_cfg"]["vocab_size"] += 1
    (folder / "eva_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(TTDError, match="do not belong together"):
        load_tiny(folder, weights=False)


# Objects -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_eva_trunks_are_claimed_and_wrapped_as_they_are(family: EvaCLIPFamily, variant: str) -> None:
    model = eva_clip(VARIANTS[variant]).train()
    assert family.claims(model) and family_for_model(model) == "eva_clip"
    adapter = wrap(model, tokenizer=WordTokenizer(), preprocess={"mean": 0.5, "std": 0.5})
    assert adapter.model is model and model.training and adapter.training
    assert adapter.description.family == "eva_clip"
    assert adapter.description.mean == (0.5, 0.5, 0.5)


def test_claims_hold_under_lora(family: EvaCLIPFamily) -> None:
    for kind in KINDS.values():
        model = eva_clip(kind)
        wrap(model, lora=2)
        assert family.claims(model)


def of_transformers(kind: str) -> Any:
    import transformers

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = tower | {"image_size": 16, "patch_size": 8}
    text = tower | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    make = getattr(transformers, f"{kind}Config")
    return getattr(transformers, f"{kind}Model")(make(text_config=text, vision_config=vision))


def siglip_in_open_clip() -> Any:
    model = eva_clip()
    model.visual.trunk = timm.create_model(
        "vit_base_patch16_siglip_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0,
        global_pool="map",
    )  # fmt: skip
    return model


def perception_encoder() -> Any:
    return eva_clip({"model_name": BASE, "global_pool": "map"})


@pytest.mark.parametrize(
    "build",
    [
        tiny_clip,
        lambda: tiny_clip(custom_text=True),
        siglip_in_open_clip,
        perception_encoder,
        lambda: of_transformers("CLIP"),
        lambda: of_transformers("Siglip"),
        lambda: nn.Linear(2, 2),
        object,
    ],
)
def test_other_models_are_not_claimed(family: EvaCLIPFamily, build: Any) -> None:
    model = build()
    assert not family.claims(model)


def test_what_is_no_trunk_is_refused_when_asked_outright(family: EvaCLIPFamily) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no timm trunk named visual\.trunk"):
        family.wrap(tiny_clip())
    plain = siglip_in_open_clip()
    plain.visual.trunk.attn_pool = None
    with pytest.raises(UnsupportedModelError, match="not built like timm's Eva"):
        family.wrap(plain)
    with pytest.raises(InputError, match="does not say how it normalises"):
        family.wrap(eva_clip(), preprocess=lambda image: image)


# What importing costs, and what is missing ---------------------------------------------------------------------------


def test_the_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys, ttd_eva_clip.plugin as plugin; heavy = {'open_clip', 'torch', 'torchvision', 'peft', 'timm'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "found = []; plugin.register_adapters(found.append); assert found[0].name == 'eva_clip';"
        "from torch import nn; assert not found[0].claims(nn.Linear(2, 2));"
        "assert not (heavy - {'torch'}) & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_or_broken_open_clip(family: EvaCLIPFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "open_clip":
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name.partition(".")[0] == "open_clip"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    for call in (family.models, lambda: family.load("EVA02-B-16", "random"), lambda: family.load("tiny", "random")):
        with pytest.raises(MissingDependencyError, match=r"nms does not exist.*pip install 'ttd-plugins\[eva_clip\]'"):
            call()
