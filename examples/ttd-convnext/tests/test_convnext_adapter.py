"""Features of ConvNeXt CLIP models against formulas, their names, objects and errors, and training with TTD."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ttd_convnext", reason="needs: pip install -e examples/ttd-convnext")
open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")

import huggingface_hub
import torch
from helpers_convnext import CHANNELS, PROJECTIONS, SIDE, TEXT, WIDTH, convnext_clip, pixels
from safetensors.torch import save_file
from torch import Tensor
from ttd_convnext.adapter import DEFAULT_CALIBRATION
from ttd_convnext.family import ConvNeXtFamily
from ttd_convnext.recognition import unsupported_config_reason

from ttd_plugins import TTD, load, wrap
from ttd_plugins.adapter import Calibration
from ttd_plugins.errors import BackboneNameError, ImageSizeError, TTDError, UnsupportedModelError
from ttd_plugins.export import export_backbone
from ttd_plugins.plugins import families, family_for_model, list_backbones

ARCHITECTURE = "convnext-of-the-tests"


@pytest.fixture
def family() -> ConvNeXtFamily:
    return ConvNeXtFamily()


@pytest.fixture
def architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small architecture that open_clip knows by name while the test runs, with one pretrained tag."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    tag = open_clip.pretrained._pcfg(hf_hub="nobody/convnext/", mean=(0.1, 0.2, 0.3))
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, ARCHITECTURE, {"some_tag": tag})
    vision = {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": SIDE}
    config = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": TEXT}
    (tmp_path / f"{ARCHITECTURE}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{ARCHITECTURE}.json")
    return ARCHITECTURE


# Features ------------------------------------------------------------------------------------------------------------


def formula(model: Any, positions: Tensor, head: str) -> Tensor:
    """LayerNorm and projection of vectors ``[..., C]``, written out."""
    norm = model.visual.trunk.head.norm
    centred = positions - positions.mean(-1, keepdim=True)
    x = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias
    if head == "linear":
        return x @ model.visual.head.proj.weight.T
    if head == "trunk":
        return x @ model.visual.trunk.head.fc.weight.T + model.visual.trunk.head.fc.bias
    mlp = model.visual.head.mlp
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    return (0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))) @ mlp.fc2.weight.T


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("head", PROJECTIONS)
def test_features_are_those_of_the_formula(head: str, custom_text: bool) -> None:
    model = convnext_clip(head, custom_text=custom_text)
    adapter = wrap(model)
    assert adapter.description.embedding_width == WIDTH
    images = pixels(2, 64, 128)
    with torch.no_grad():
        features = adapter.encode_image(images)
        map_ = model.visual.trunk.stages(model.visual.trunk.stem(images)).permute(0, 2, 3, 1)
        assert map_.shape == (2, 2, 4, CHANNELS)
        torch.testing.assert_close(features.patches, formula(model, map_, head), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.pooled, formula(model, map_.mean((1, 2)), head), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.pooled, model.encode_image(images), atol=1e-6, rtol=1e-6)


def test_a_picture_of_one_position_has_one_patch_that_is_the_pooled_embedding() -> None:
    with torch.no_grad():
        features = wrap(convnext_clip()).encode_image(pixels(3, 32, 32))
    assert features.pooled is not None
    torch.testing.assert_close(features.patches[:, 0, 0], features.pooled)


def test_the_pooled_embedding_is_not_the_mean_of_the_patches() -> None:
    with torch.no_grad():
        features = wrap(convnext_clip()).encode_image(pixels())
    assert features.pooled is not None
    mean = features.patches.mean((1, 2))
    assert (mean - features.pooled).abs().max() > 0.05 * features.pooled.abs().max()


def test_a_norm_before_the_pooling_is_taken_where_it_is() -> None:
    model = convnext_clip(head_norm_first=True)
    with torch.no_grad():
        features = wrap(model).encode_image(pixels())
        torch.testing.assert_close(features.pooled, model.encode_image(pixels()), atol=1e-6, rtol=1e-6)
        # With the norm first, all that follows is linear.
        torch.testing.assert_close(features.patches.mean((1, 2)), features.pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(96, 100), (16, 96), (0, 96)])
def test_sizes_off_the_stride_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageSizeError, match="multiple of 32"):
        wrap(convnext_clip()).encode_image(torch.zeros(1, 3, *size))


def test_calibration_and_normalisation_are_the_familys_unless_given() -> None:
    model = convnext_clip()
    assert wrap(model).description.calibration == DEFAULT_CALIBRATION
    given = wrap(model, calibration=Calibration(3.0, 1.0), preprocess={"mean": 0.5, "std": 0.25})
    assert given.description.calibration == Calibration(3.0, 1.0)
    assert (given.description.mean, given.description.std) == ((0.5,) * 3, (0.25,) * 3)


# Names and objects ---------------------------------------------------------------------------------------------------


def test_the_installed_family_is_listed() -> None:
    (info,) = list_backbones("convnext")
    assert (info.plugin, info.error) == ("convnext", None)
    found = {backbone.model: backbone.weights for backbone in info.backbones}
    assert found["tiny"] == ()
    assert "laion2b_s13b_b82k_augreg" in found["convnext_base_w"]
    assert "laion2b_s29b_b131k_ft_soup" in found["convnext_large_d_320"]
    assert not [name for name in found if not name.startswith("convnext") and name != "tiny"]


def test_other_families_objects_are_not_claimed_nor_this_ones_by_others(family: ConvNeXtFamily) -> None:
    for head in PROJECTIONS:
        assert family_for_model(convnext_clip(head)) == "convnext"
    for other in families():
        if other != "convnext" and "tiny" in families()[other].models():
            assert not family.claims(load(f"{other}:tiny@random").model), other
    assert family_for_model(wrap(convnext_clip(), lora=2).model) == "convnext"
    with pytest.raises(UnsupportedModelError, match="not built like timm's ConvNeXt"):
        family.wrap(torch.nn.Linear(2, 2))


def test_attention_pooling_is_refused_with_the_reason() -> None:
    model = convnext_clip()
    model.visual.head.pool = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="pools by attention"):
        wrap(model)
    assert unsupported_config_reason({"vision_cfg": {"timm_model_name": "convnext_base", "timm_pool": "rot_attn"}})


def test_unknown_names_are_answered_with_suggestions(family: ConvNeXtFamily, architecture: str) -> None:
    with pytest.raises(
        BackboneNameError, match=r"unknown convnext model 'convnext_bass'; did you mean 'convnext_base'"
    ):
        family.load("convnext_bass", "random")
    with pytest.raises(BackboneNameError, match=r"weights of convnext:tiny 'embedded'; known: random"):
        family.load("tiny", "embedded")
    with pytest.raises(BackboneNameError, match=r"weights of convnext:convnext-of-the-tests 'some_tog'; did you mean"):
        family.load(architecture, "some_tog")
    with pytest.raises(UnsupportedModelError, match=r"convnext:ViT-B-16 cannot be adapted: .*no timm trunk"):
        family.load("ViT-B-16", "random")
    with pytest.raises(UnsupportedModelError, match="the timm trunk eva02_base_patch16_clip_224, and no ConvNeXt"):
        family.weights("EVA02-B-16")


def test_tokens_of_an_architecture_are_those_of_its_tokenizer(architecture: str) -> None:
    adapter = load(f"convnext:{architecture}@random")
    assert adapter.description.name == f"convnext:{ARCHITECTURE}@random"
    tokens = adapter.tokenize(["a cat", "a cat " * 20])
    assert tokens.ids.shape == (2, 12)
    assert (tokens.lengths.tolist(), tokens.truncated) == ([4, 12], [False, True])


def test_a_checkpoint_on_disk(architecture: str, tmp_path: Path) -> None:
    model = open_clip.create_model(model_name=architecture).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    adapter = load(f"convnext:{architecture}@{tmp_path / 'weights.pt'}")
    with torch.no_grad():
        assert torch.equal(adapter.encode_image(pixels()).pooled, model.encode_image(pixels()))
    torch.save({"other": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(TTDError, match=r"weights.pt cannot be loaded .*saved for open_clip's "):
        load(f"convnext:{architecture}@{tmp_path / 'weights.pt'}")


def test_a_pretrained_tag_from_a_warm_cache(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip's own download code, which finds the file where an earlier download put it."""
    model = open_clip.create_model(model_name=architecture).eval()
    commit = "0" * 40
    snapshot = tmp_path / "cache" / "models--nobody--convnext" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    save_file(dict(model.state_dict()), snapshot / "open_clip_model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    adapter = load(f"convnext:{architecture}@some_tag", cache_dir=str(tmp_path / "cache"))
    assert adapter.description.name == f"convnext:{ARCHITECTURE}@some_tag"
    assert adapter.description.mean == (0.1, 0.2, 0.3)
    with torch.no_grad():
        assert torch.equal(adapter.encode_image(pixels()).pooled, model.encode_image(pixels()))


def test_without_a_network_there_is_one_clear_sentence(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(TTDError, match=r"some_tag cannot be loaded: the model hub .*path of a checkpoint") as caught:
        load(f"convnext:{architecture}@some_tag", cache_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
def test_ttd_trains_and_unload_gives_the_very_model_back(rank: int) -> None:
    if rank:
        pytest.importorskip("peft", reason="LoRA needs peft")
    torch.manual_seed(0)
    backbone = load("convnext:tiny@random")
    model = backbone.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if rank:
        backbone.add_lora(rank)
    ttd = TTD(backbone)
    ttd.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3 if rank else 1e-3)
    images, captions = pixels(4, 96, 128), ["a red dog", "green grass and a tree", "the blue kite", "an owl"]
    losses = []
    for _ in range(4):
        loss = ttd(images, captions).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    if not rank:
        assert not torch.equal(model.state_dict()["visual.trunk.stem.0.weight"], before["visual.trunk.stem.0.weight"])
    assert backbone.unload() is model
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_lora_reaches_both_layers_of_every_block() -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    adapter = wrap(convnext_clip(), lora={"rank": 2, "towers": ["image"]})
    for parameter in adapter.lora_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    features = adapter.encode_image(pixels())
    assert features.pooled is not None
    for output in (features.patches, features.pooled):
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        found = torch.autograd.grad((output * weights).sum(), adapter.lora_parameters(), retain_graph=True)
        # Five blocks, two layers each, two matrices each.
        assert len(found) == 20
        assert all(bool(gradient.abs().max() > 0) for gradient in found)


# Export --------------------------------------------------------------------------------------------------------------


def test_open_clip_and_load_give_the_tuned_embeddings_of_the_exported_folder(architecture: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    adapter = load(f"convnext:{architecture}@random", lora={"rank": 2})
    with torch.no_grad():
        # timm begins with layer scales of 1e-6, under which LoRA in the blocks would not be seen.
        for block in (block for stage in adapter.model.visual.trunk.stages for block in stage.blocks):
            block.gamma.fill_(1.0)
        for parameter in adapter.lora_parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    ids = adapter.tokenize(["a cat", "two red birds"]).ids
    done = export_backbone(adapter, tmp_path / "out")
    assert f'"{ARCHITECTURE}"' in done.model.load and done.model.name is not None
    again = load(done.model.name.replace("PATH", str(done.folder)))
    assert (again.description.weights, again.description.mean) == ("own", adapter.description.mean)
    built = open_clip.create_model(f"local-dir:{done.folder}").eval()
    plain = open_clip.create_model(ARCHITECTURE, pretrained=str(done.folder / "open_clip_model.safetensors")).eval()
    with torch.no_grad():
        image, text = adapter.encode_image(pixels()).pooled, adapter.encode_text(ids)
        untuned = adapter.unload().encode_image(pixels())
        torch.testing.assert_close(again.encode_image(pixels()).pooled, image, atol=1e-5, rtol=0)
        torch.testing.assert_close(again.encode_text(ids), text, atol=1e-5, rtol=0)
        for model in (built, plain):
            torch.testing.assert_close(model.encode_image(pixels()), image, atol=1e-5, rtol=0)
            torch.testing.assert_close(model.encode_text(ids), text, atol=1e-5, rtol=0)
    assert (image - untuned).abs().max() > 1e-2


def test_a_trunk_without_a_name_says_why_it_cannot_be_rebuilt(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=r"open_clip cannot rebuild convnext:tiny@random: it passes only a trunk's name on to timm",
    ):
        export_backbone(load("convnext:tiny@random"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
