"""Features of Perception Encoders against the library and formulas, names, objects, errors, training and export."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ttd_perception_encoder", reason="needs: pip install -e examples/ttd-perception-encoder")
open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")

import timm
import torch
from helpers_perception_encoder import KINDS, perception_encoder, pixels
from safetensors.torch import save_file
from torch import nn
from ttd_perception_encoder.adapter import DEFAULT_CALIBRATION
from ttd_perception_encoder.family import PerceptionEncoderFamily
from ttd_perception_encoder.recognition import unsupported_config_reason
from ttd_perception_encoder.tiny import CONTEXT, EMBEDDING, PATCH, SIDE, TEXT, TRUNK

from ttd_plugins import TTD, load, wrap
from ttd_plugins.adapter import Calibration
from ttd_plugins.errors import BackboneNameError, ImageSizeError, TTDError, UnsupportedModelError
from ttd_plugins.export import export_backbone
from ttd_plugins.plugins import families, family_for_model, list_backbones

ARCHITECTURE = "PE-of-the-tests"


@pytest.fixture
def family() -> PerceptionEncoderFamily:
    return PerceptionEncoderFamily()


@pytest.fixture
def architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small architecture that open_clip and timm know by name while the test runs."""

    def build(pretrained: bool = False, pretrained_cfg: Any = None, **options: Any) -> Any:
        options.pop("pretrained_cfg_overlay", None)
        options.pop("cache_dir", None)
        return timm.create_model(**TRUNK, **options)

    entries = timm.models._registry._model_entrypoints
    monkeypatch.setitem(entries, "vit_pe_core_of_the_tests", build)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    tag = open_clip.pretrained._pcfg(
        hf_hub="nobody/pe/", mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", resize_mode="squash"
    )
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, ARCHITECTURE, {"some_tag": tag})
    vision = {"timm_model_name": "vit_pe_core_of_the_tests", "timm_pool": "map", "timm_proj": None, "image_size": SIDE}
    config = {"embed_dim": EMBEDDING, "vision_cfg": vision, "text_cfg": TEXT, "custom_text": True}
    (tmp_path / f"{ARCHITECTURE}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{ARCHITECTURE}.json")
    return ARCHITECTURE


# Features ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_librarys_head_on_all_tokens_and_on_each_patch_alone(kind: str, projection: bool) -> None:
    model = perception_encoder(kind, projection=projection)
    adapter = wrap(model)
    trunk, head = model.visual.trunk, model.visual.head
    with torch.no_grad():
        features = adapter.encode_image(pixels())
        torch.testing.assert_close(features.pooled, model.encode_image(pixels()), atol=1e-5, rtol=1e-5)
        tokens = trunk.forward_features(pixels())[:, trunk.num_prefix_tokens :]
        # The library's pooling of one token: the query can attend to nothing else.
        alone = [head(trunk.forward_head(tokens[:, index : index + 1])) for index in range(tokens.shape[1])]
        expected = torch.stack(alone, 1).unflatten(1, (SIDE // PATCH, SIDE // PATCH))
        torch.testing.assert_close(features.patches, expected, atol=1e-5, rtol=1e-5)
        assert adapter.encode_image(pixels(), pooled=False).pooled is None


def test_the_head_by_a_formula() -> None:
    model = perception_encoder()
    trunk = model.visual.trunk
    pool = trunk.attn_pool
    with torch.no_grad():
        features = wrap(model).encode_image(pixels())
        x = trunk.forward_features(pixels())[:, 1:]
        width = x.shape[-1]
        x = x @ pool.kv.weight[width:].T + pool.kv.bias[width:]
        x = x @ pool.proj.weight.T + pool.proj.bias
        normed = nn.functional.layer_norm(x, (width,), pool.norm.weight, pool.norm.bias, pool.norm.eps)
        hidden = nn.functional.gelu(normed @ pool.mlp.fc1.weight.T + pool.mlp.fc1.bias)
        x = x + hidden @ pool.mlp.fc2.weight.T + pool.mlp.fc2.bias
        expected = (x @ trunk.head.weight.T + trunk.head.bias).unflatten(1, (SIDE // PATCH, SIDE // PATCH))
    torch.testing.assert_close(features.patches, expected, atol=1e-5, rtol=1e-5)


def test_an_image_of_one_patch_without_a_class_token_has_the_pooled_embedding_as_its_patch() -> None:
    with torch.no_grad():
        features = wrap(perception_encoder("no_class_token")).encode_image(pixels(3, PATCH, PATCH))
    assert features.pooled is not None
    torch.testing.assert_close(features.patches[:, 0, 0], features.pooled)


@pytest.mark.parametrize("size", [(32, 96), (128, 48)])
@pytest.mark.parametrize("kind", KINDS)
def test_other_sizes_are_those_of_timms_own_resizing(kind: str, size: tuple[int, int]) -> None:
    """timm overwrites the positions of the model, so a copy of it is resized."""
    model = perception_encoder(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resized = copy.deepcopy(model)
    resized.visual.trunk.set_input_size(size)
    with torch.no_grad():
        features = wrap(model).encode_image(pixels(2, *size))
        torch.testing.assert_close(features.pooled, resized.encode_image(pixels(2, *size)), atol=1e-4, rtol=1e-4)
    assert features.patches.shape == (2, size[0] // PATCH, size[1] // PATCH, EMBEDDING)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert tuple(model.visual.trunk.rope.feat_shape) == (SIDE // PATCH, SIDE // PATCH)


@pytest.mark.parametrize("size", [(64, 70), (8, 64), (0, 64)])
def test_sizes_off_the_patches_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageSizeError, match="multiple of 16"):
        wrap(perception_encoder()).encode_image(torch.zeros(1, 3, *size))


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        adapter = wrap(perception_encoder())
        adapter.train()
        adapter.set_grad_checkpointing(enabled)
        features = adapter.encode_image(pixels())
        assert features.pooled is not None
        (features.patches.square().sum() + features.pooled.square().sum()).backward()
        gradients.append(adapter.model.visual.trunk.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)


# Names and objects ---------------------------------------------------------------------------------------------------


def test_the_installed_family_is_listed() -> None:
    (info,) = list_backbones("perception_encoder")
    assert (info.plugin, info.error) == ("perception_encoder", None)
    found = {backbone.model: backbone.weights for backbone in info.backbones}
    assert found.pop("tiny") == ()
    assert found["PE-Core-B-16"] == ("meta",)
    assert all(name.startswith("PE-Core-") for name in found) and len(found) >= 5


def test_no_model_has_two_families(family: PerceptionEncoderFamily) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    for kind in KINDS:
        model = perception_encoder(kind)
        assert [name for name, other in families().items() if other.claims(model)] == ["perception_encoder"]
    for other in families():
        if other != "perception_encoder" and "tiny" in families()[other].models():
            assert not family.claims(load(f"{other}:tiny@random").model), other
    assert family_for_model(wrap(perception_encoder(), lora=2).model) == "perception_encoder"


def test_other_models_are_refused_with_the_reason(family: PerceptionEncoderFamily) -> None:
    with pytest.raises(UnsupportedModelError, match="not built like Perception Encoder's"):
        family.wrap(nn.Linear(2, 2))
    model = perception_encoder()
    model.visual.trunk.attn_pool.latent = nn.Parameter(torch.zeros(1, 2, TRUNK["embed_dim"]))
    with pytest.raises(UnsupportedModelError, match="its pooling head has 2 queries"):
        wrap(model)
    model = perception_encoder()
    model.visual.trunk.rope_mixed = True
    with pytest.raises(UnsupportedModelError, match="rotary positions are not those"):
        wrap(model)
    assert "only 'map'" in str(
        unsupported_config_reason(
            {"vision_cfg": {"timm_model_name": "vit_pe_core_base_patch16_224", "timm_pool": "avg"}}
        )
    )


def test_unknown_names_are_answered_with_suggestions(family: PerceptionEncoderFamily, architecture: str) -> None:
    with pytest.raises(BackboneNameError, match=r"unknown perception_encoder model 'PE-Core-B-61'; did you mean .*-16"):
        family.load("PE-Core-B-61", "random")
    with pytest.raises(BackboneNameError, match=r"weights of perception_encoder:tiny 'embedded'; known: random"):
        family.load("tiny", "embedded")
    with pytest.raises(BackboneNameError, match=rf"weights of perception_encoder:{ARCHITECTURE} 'some_tog'; did you"):
        family.load(architecture, "some_tog")
    with pytest.raises(UnsupportedModelError, match=r"perception_encoder:ViT-B-16 cannot be adapted: .*no timm trunk"):
        family.load("ViT-B-16", "random")
    with pytest.raises(UnsupportedModelError, match=r"timm's eva02_base_patch16_clip_224, and .* \(vit_pe_core_\*\)"):
        family.weights("EVA02-B-16")


def test_an_architecture_by_name_with_its_tokenizer_and_preprocessing(architecture: str, tmp_path: Path) -> None:
    model = open_clip.create_model(model_name=architecture).eval()
    save_file(dict(model.state_dict()), tmp_path / "weights.safetensors")
    adapter = load(f"perception_encoder:{architecture}@{tmp_path / 'weights.safetensors'}")
    description = adapter.description
    assert (description.mean, description.std, description.interpolation) == ((0.5,) * 3, (0.5,) * 3, "bilinear")
    with torch.no_grad():
        assert torch.allclose(adapter.encode_image(pixels()).pooled, model.encode_image(pixels()), atol=1e-5)
    tokens = adapter.tokenize(["a cat", "a cat " * 40])
    assert tokens.ids.shape == (2, CONTEXT)
    assert (tokens.lengths.tolist(), tokens.truncated) == ([4, CONTEXT], [False, True])
    torch.save({"other": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(TTDError, match=r"weights.pt cannot be loaded.*saved for open_clip's "):
        load(f"perception_encoder:{architecture}@{tmp_path / 'weights.pt'}")


def test_calibration_and_normalisation_are_the_familys_unless_given() -> None:
    model = perception_encoder()
    assert wrap(model).description.calibration == DEFAULT_CALIBRATION
    given = wrap(model, calibration=Calibration(3.0, 1.0), preprocess={"mean": 0.5, "std": 0.25})
    assert given.description.calibration == Calibration(3.0, 1.0)
    assert (given.description.mean, given.description.std) == ((0.5,) * 3, (0.25,) * 3)


def test_the_smallest_published_architecture() -> None:
    adapter = load("perception_encoder:PE-Core-T-16-384@random")
    description = adapter.description
    assert (description.image_size, description.patch_size) == ((384, 384), (16, 16))
    assert (description.mean, description.context_length, description.embedding_width) == ((0.5,) * 3, 32, 512)
    with torch.no_grad():
        features = adapter.encode_image(pixels(1, 384, 384))
        torch.testing.assert_close(
            features.pooled, adapter.model.encode_image(pixels(1, 384, 384)), atol=1e-5, rtol=1e-4
        )
    assert features.patches.shape == (1, 24, 24, 512)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PE-Core-B-16", "PE-Core-L-14-336"])
def test_larger_published_architectures(name: str) -> None:
    adapter = load(f"perception_encoder:{name}@random")
    side = adapter.description.image_size[0]
    with torch.no_grad():
        pooled = adapter.encode_image(pixels(1, side, side)).pooled
        torch.testing.assert_close(pooled, adapter.model.encode_image(pixels(1, side, side)), atol=1e-5, rtol=1e-4)


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
def test_ttd_trains_and_unload_restores_the_model_bitwise(rank: int) -> None:
    if rank:
        pytest.importorskip("peft", reason="LoRA needs peft")
    torch.manual_seed(0)
    backbone = load("perception_encoder:tiny@random")
    model = backbone.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if rank:
        backbone.add_lora(rank)
    ttd = TTD(backbone)
    ttd.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3 if rank else 1e-3)
    images, captions = pixels(4, 64, 96), ["a red dog", "green grass and a tree", "the blue kite", "an owl"]
    losses = []
    for _ in range(4):
        loss = ttd(images, captions).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert backbone.unload() is model
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_lora_reaches_every_linear_layer_of_every_block_and_not_the_pooling_head() -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    adapter = wrap(perception_encoder(), lora={"rank": 2, "towers": ["image"]})
    layers = [
        f"visual.trunk.blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert adapter.lora_targets("image") == layers
    for parameter in adapter.lora_parameters():
        nn.init.normal_(parameter, std=0.1)
    features = adapter.encode_image(pixels())
    assert features.pooled is not None
    for output in (features.patches, features.pooled):
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        found = torch.autograd.grad((output * weights).sum(), adapter.lora_parameters(), retain_graph=True)
        assert len(found) == 2 * len(layers)
        assert all(bool(gradient.abs().max() > 0) for gradient in found)


# Export --------------------------------------------------------------------------------------------------------------


def test_open_clip_and_load_give_the_tuned_embeddings_of_the_exported_folder(architecture: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    adapter = load(f"perception_encoder:{architecture}@random", lora={"rank": 2})
    with torch.no_grad():
        # timm starts the last layer near zero.
        adapter.model.visual.trunk.head.weight.normal_(std=0.1)
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
        torch.testing.assert_close(again.encode_image(pixels()).pooled, image, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again.encode_text(ids), text, atol=1e-4, rtol=1e-4)
        for model in (built, plain):
            torch.testing.assert_close(model.encode_image(pixels()), image, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(model.encode_text(ids), text, atol=1e-4, rtol=1e-4)
    assert (image - untuned).abs().max() > 1e-2


def test_a_trunk_without_a_name_says_why_it_cannot_be_rebuilt(tmp_path: Path) -> None:
    message = r"open_clip cannot rebuild perception_encoder:tiny@random: it passes only a trunk's name on to timm"
    with pytest.raises(UnsupportedModelError, match=message):
        export_backbone(load("perception_encoder:tiny@random"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
