"""open_clip models around convolutional trunks of timm: features against formulas, names, LoRA, training, the kit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

open_clip = pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")

import huggingface_hub
import timm
import torch
from helpers_trunks import CONTEXT, HEADS, SIDE, STRIDE, TEXT, TRUNKS, WIDTH, pixels, shaken, trunk_clip
from safetensors.torch import save_file
from torch import Tensor, nn
from ttd_open_clip import recognition
from ttd_open_clip.trunk_adapter import DEFAULT_CALIBRATION, OpenCLIPTrunkAdapter

from ttd_plugins import TTD, load, wrap
from ttd_plugins.adapter import Calibration
from ttd_plugins.errors import ImageSizeError, TTDError, UnsupportedModelError
from ttd_plugins.plugins import families, family_for_model, list_backbones
from ttd_plugins.testing import AdapterConformance

NAME = "trunk-of-the-tests"
MOBILECLIP = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear", "resize_mode": "shortest"}


def add_architecture(folder: Path, monkeypatch: pytest.MonkeyPatch, vision: dict[str, Any], **tag: Any) -> str:
    """An architecture that open_clip knows by name while the test runs, with the pretrained tag ``some_tag``."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    place = open_clip.pretrained._pcfg(hf_hub="nobody/trunk/", **tag)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, {"some_tag": place})
    config = {"embed_dim": WIDTH, "vision_cfg": {"image_size": SIDE} | vision, "text_cfg": TEXT}
    (folder / f"{NAME}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{NAME}.json")
    return NAME


@pytest.fixture
def architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    vision = {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"}
    return add_architecture(tmp_path, monkeypatch, vision, **MOBILECLIP)


# Features ------------------------------------------------------------------------------------------------------------


def last_map(model: Any, images: Tensor) -> Tensor:
    """The feature map ``[B, H, W, C]``, by the modules of each trunk in sequence."""
    trunk = model.visual.trunk
    if hasattr(trunk, "conv_stem"):
        x = trunk.bn2(trunk.conv_head(trunk.blocks(trunk.bn1(trunk.conv_stem(images)))))
    else:
        x = getattr(trunk, "final_conv", nn.Identity())(trunk.stages(trunk.stem(images)))
    return x.permute(0, 2, 3, 1)


def head_formula(model: Any, positions: Tensor, head: str) -> Tensor:
    """Norm and projection of vectors ``[..., C]``, written out."""
    trunk, visual = model.visual.trunk, model.visual
    norm = getattr(getattr(trunk, "head", None), "norm", None)
    x = positions
    if isinstance(norm, nn.LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias
    if head == "linear":
        return x @ visual.head.proj.weight.T
    if head == "trunk":
        last = trunk.get_classifier()
        return x @ last.weight.T + last.bias
    hidden = x @ visual.head.mlp.fc1.weight.T + visual.head.mlp.fc1.bias
    return (0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))) @ visual.head.mlp.fc2.weight.T


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", TRUNKS)
def test_features_are_those_of_the_formula(kind: str, head: str, custom_text: bool) -> None:
    model = trunk_clip(kind, head, custom_text=custom_text)
    adapter = wrap(model)
    assert isinstance(adapter, OpenCLIPTrunkAdapter)
    assert (adapter.description.embedding_width, adapter.description.patch_size) == (WIDTH, (STRIDE, STRIDE))
    images = pixels(2, 64, 128)
    with torch.no_grad():
        features = adapter.encode_image(images)
        map_ = last_map(model, images)
        assert map_.shape[:3] == (2, 2, 4)
        torch.testing.assert_close(features.patches, head_formula(model, map_, head), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(features.pooled, head_formula(model, map_.mean((1, 2)), head), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(features.pooled, model.encode_image(images), atol=1e-5, rtol=1e-5)
        assert adapter.encode_image(images, pooled=False).pooled is None


@pytest.mark.parametrize("kind", TRUNKS)
def test_an_image_of_one_position_has_one_patch_that_is_the_pooled_embedding(kind: str) -> None:
    with torch.no_grad():
        features = wrap(trunk_clip(kind)).encode_image(pixels(3, STRIDE, STRIDE))
    torch.testing.assert_close(features.patches[:, 0, 0], features.pooled)


@pytest.mark.parametrize(("kind", "linear"), [("convnext", False), ("efficientnet", True), ("mobileclip", True)])
def test_the_mean_over_the_map_is_the_pooled_embedding_where_the_head_is_linear(kind: str, linear: bool) -> None:
    with torch.no_grad():
        features = wrap(trunk_clip(kind)).encode_image(pixels())
    difference = (features.patches.mean((1, 2)) - features.pooled).abs().max() / features.pooled.abs().max()
    assert difference < 1e-4 if linear else difference > 0.05


def test_a_norm_before_the_pooling_is_taken_where_it_is() -> None:
    model = trunk_clip(head_norm_first=True)
    with torch.no_grad():
        features = wrap(model).encode_image(pixels())
        torch.testing.assert_close(features.pooled, model.encode_image(pixels()), atol=1e-6, rtol=1e-6)
        # With the norm first, all that follows is linear.
        torch.testing.assert_close(features.patches.mean((1, 2)), features.pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(96, 100), (16, 96), (0, 96)])
def test_sizes_off_the_stride_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageSizeError, match="multiple of 32"):
        wrap(trunk_clip()).encode_image(torch.zeros(1, 3, *size))


def test_a_trunk_whose_map_does_not_follow_the_image_is_refused_with_the_reason() -> None:
    model = trunk_clip()

    class FixedMap(nn.Module):
        """A trunk that pools every map to 2 x 2."""

        feature_info = model.visual.trunk.feature_info
        global_pool = model.visual.trunk.head.global_pool
        num_classes, num_features = 0, 40
        trunk = model.visual.trunk

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward_features(self, x: Tensor) -> Tensor:
            return nn.functional.adaptive_avg_pool2d(self.trunk.forward_features(x), 2)

        def forward_head(self, x: Tensor) -> Tensor:
            return self.trunk.forward_head(x)

    model.visual.trunk = FixedMap()
    with pytest.raises(UnsupportedModelError, match=r"a map of 2 x 2 positions for images of 96 x 128 .* 3 x 4"):
        wrap(model).encode_image(pixels(1, 96, 128))


# Names and objects ---------------------------------------------------------------------------------------------------


def test_calibration_and_normalisation_are_the_familys_unless_given() -> None:
    model = trunk_clip()
    assert wrap(model).description.calibration == DEFAULT_CALIBRATION
    given = wrap(model, calibration=Calibration(3.0, 1.0), preprocess={"mean": 0.5, "std": 0.25})
    assert given.description.calibration == Calibration(3.0, 1.0)
    assert (given.description.mean, given.description.std) == ((0.5,) * 3, (0.25,) * 3)


def test_architectures_with_such_trunks_are_listed() -> None:
    (info,) = list_backbones("open_clip")
    found = {backbone.model: backbone.weights for backbone in info.backbones}
    assert "laion2b_s13b_b82k_augreg" in found["convnext_base_w"]
    assert "laion2b_s29b_b131k_ft_soup" in found["convnext_large_d_320"]
    assert "datacompdr" in found["MobileCLIP-S1"] and "dfndr2b" in found["MobileCLIP2-S3"]


@pytest.mark.parametrize("kind", TRUNKS)
def test_such_models_are_claimed_by_this_family_alone(kind: str) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    for head in HEADS:
        assert family_for_model(trunk_clip(kind, head)) == "open_clip"
    model = trunk_clip(kind)
    assert not [name for name, family in families().items() if name != "open_clip" and family.claims(model)]
    assert family_for_model(wrap(model, lora=2).model) == "open_clip"


def test_attention_pooling_and_other_trunks_are_refused_with_the_reason() -> None:
    model = trunk_clip()
    model.visual.head.pool = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"pools by attention \(visual\.head\.pool\)"):
        wrap(model)
    config = {"vision_cfg": {"timm_model_name": "convnext_base", "timm_pool": "rot_attn"}}
    assert "pools by rot_attn" in str(recognition.unsupported_config_reason(config))
    model = trunk_clip("efficientnet")
    model.visual.trunk.global_pool.pool_type = "max"
    with pytest.raises(UnsupportedModelError, match="its image tower pools by max"):
        wrap(model)
    with pytest.raises(UnsupportedModelError, match="the timm trunk swin_base_patch4_window7_224"):
        load("open_clip:swin_base_patch4_window7_224@random")


@pytest.mark.slow
def test_the_supported_modules_of_timm_compute_maps_of_the_stride() -> None:
    """One model of each module, on the meta device, at a size that is not square."""
    from timm.models import _registry as registry

    for module in recognition.TRUNK_MODULES:
        names = sorted(registry._module_to_models[module], key=lambda name: (not name.startswith("test_"), len(name)))
        with torch.device("meta"):
            trunk: Any = timm.create_model(names[0], num_classes=0).eval()
            shell = nn.Module()
            shell.visual = nn.Module()
            shell.visual.trunk = trunk
            assert recognition.has_trunk(shell), module
            stride = getattr(trunk.feature_info, "info", trunk.feature_info)[-1]["reduction"]
            map_ = trunk.forward_features(torch.zeros(1, 3, 3 * stride, 5 * stride))
            assert map_.shape[2:] == (3, 5), module
            trunk.forward_head(map_[..., :1, :1])


def test_tokens_of_an_architecture_are_those_of_its_tokenizer(architecture: str) -> None:
    adapter = load(f"open_clip:{architecture}@random")
    assert adapter.description.name == f"open_clip:{NAME}@random"
    tokens = adapter.tokenize(["a cat", "a cat " * 20])
    assert tokens.ids.shape == (2, CONTEXT)
    assert (tokens.lengths.tolist(), tokens.truncated) == ([4, CONTEXT], [False, True])


def test_a_checkpoint_on_disk(architecture: str, tmp_path: Path) -> None:
    model = open_clip.create_model(model_name=architecture).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    adapter = load(f"open_clip:{architecture}@{tmp_path / 'weights.pt'}")
    with torch.no_grad():
        assert torch.equal(adapter.encode_image(pixels()).pooled, model.encode_image(pixels()))
    torch.save({"other": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(TTDError, match=r"weights.pt cannot be loaded.*saved for open_clip's "):
        load(f"open_clip:{architecture}@{tmp_path / 'weights.pt'}")


def test_a_pretrained_tag_from_a_warm_cache(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip's own download code, which finds the file where an earlier download put it."""
    model = open_clip.create_model(model_name=architecture).eval()
    commit = "0" * 40
    snapshot = tmp_path / "cache" / "models--nobody--trunk" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    save_file(dict(model.state_dict()), snapshot / "open_clip_model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    adapter = load(f"open_clip:{architecture}@some_tag", cache_dir=str(tmp_path / "cache"))
    assert adapter.description.name == f"open_clip:{NAME}@some_tag"
    assert adapter.description.mean == (0.0, 0.0, 0.0)
    with torch.no_grad():
        assert torch.equal(adapter.encode_image(pixels()).pooled, model.encode_image(pixels()))


# Preprocessing of MobileCLIP -----------------------------------------------------------------------------------------


def expect_mobileclip(adapter: Any) -> None:
    from PIL import Image

    description = adapter.description
    assert (description.mean, description.std, description.interpolation) == ((0.0,) * 3, (1.0,) * 3, "bilinear")
    image = Image.linear_gradient("L").convert("RGB").resize((SIDE, SIDE))
    for transform in (adapter.dense_transform((SIDE, SIDE)), adapter.native_transform()):
        found = transform(image)
        assert 0.0 <= found.min() < 0.01 and 0.99 < found.max() <= 1.0


@pytest.mark.parametrize("weights", ["random", "file"])
def test_a_name_without_a_tag_has_the_preprocessing_that_all_tags_share(
    architecture: str, tmp_path: Path, weights: str
) -> None:
    if weights == "file":
        weights = str(tmp_path / "weights.pt")
        torch.save(open_clip.create_model(model_name=architecture).state_dict(), weights)
    expect_mobileclip(load(f"open_clip:{architecture}@{weights}"))


def test_tags_that_differ_leave_open_clips_own_preprocessing(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_clip.pretrained._pcfg(hf_hub="nobody/other/", mean=(0.5, 0.5, 0.5))
    tags = open_clip.pretrained._PRETRAINED[NAME] | {"other_tag": other}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, tags)
    assert load(f"open_clip:{architecture}@random").description.mean == open_clip.constants.OPENAI_DATASET_MEAN


@pytest.mark.parametrize("given", ["object", "preprocess"])
def test_an_object_has_its_own_preprocessing(architecture: str, given: str) -> None:
    options = {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0), "image_interpolation": "bilinear"}
    model, _, preprocess = open_clip.create_model_and_transforms(architecture, **options)
    if given == "object":
        expect_mobileclip(wrap(model))
        return
    del model.visual.preprocess_cfg, model.visual.image_mean, model.visual.image_std
    expect_mobileclip(wrap(model, preprocess=preprocess))


# LoRA and training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
def test_ttd_trains_and_unload_restores_weights_and_statistics_bitwise(kind: str, rank: int) -> None:
    if rank:
        pytest.importorskip("peft", reason="LoRA needs peft")
    torch.manual_seed(0)
    # In training mode from the start, as open_clip's classes build it.
    backbone = wrap(trunk_clip(kind).train(), tokenizer=open_clip.SimpleTokenizer(context_length=CONTEXT))
    model = backbone.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if rank:
        backbone.add_lora(rank)
    ttd = TTD(backbone)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3 if rank else 1e-3)
    images, captions = pixels(4, 96, 128), ["a red dog", "green grass and a tree", "the blue kite", "an owl"]
    losses = []
    for step in range(5):
        loss = ttd(images, captions).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 1:
            ttd.train()
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in before.items() if not torch.equal(model.state_dict().get(name, tensor), tensor)}
    assert not changed if rank else changed
    assert backbone.unload() is model
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_frozen_batch_normalisation_uses_its_running_averages_in_training_mode() -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    adapter = wrap(trunk_clip("efficientnet"), tokenizer=tokenizer, lora=2)
    with torch.no_grad():
        evaluated = adapter.encode_image(pixels())
    TTD(adapter).train()(pixels(), ["a red dog", "the blue kite"])
    with torch.no_grad():
        trained = adapter.encode_image(pixels())
    assert adapter.model.training
    assert torch.equal(trained.patches, evaluated.patches) and torch.equal(trained.pooled, evaluated.pooled)


def test_a_norm_over_the_batch_in_the_head_counts_images_and_not_positions() -> None:
    """MobileNetV4 normalises after the average: in training mode once for each image, as in the library."""
    model = trunk_clip()
    model.visual.trunk = timm.create_model("mobilenetv4_conv_small_050", num_classes=0)
    model.visual.head.proj = nn.Linear(model.visual.trunk.head_hidden_size, WIDTH, bias=False)
    shaken(model).train()
    images = pixels(4)
    with torch.no_grad():
        features = wrap(model).encode_image(images)
        norm = model.visual.trunk.norm_head
        assert int(norm.num_batches_tracked) == 1 and norm.training
        # Statistics of each batch, so that the library computes the same for the same batch.
        torch.testing.assert_close(features.pooled, model.encode_image(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "modules"), [("convnext", 10), ("efficientnet", 7), ("mobileclip", 16)])
def test_lora_reaches_pooled_and_dense_features(kind: str, modules: int) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    adapter = wrap(trunk_clip(kind, "trunk"), lora={"rank": 2, "towers": ["image"]})
    assert adapter.lora_targets("image") == wrap(trunk_clip(kind, "trunk")).lora_targets("image")
    for parameter in adapter.lora_parameters():
        nn.init.normal_(parameter, std=0.1)
    features = adapter.encode_image(pixels())
    assert features.pooled is not None
    for output in (features.patches, features.pooled):
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        found = torch.autograd.grad((output * weights).sum(), adapter.lora_parameters(), retain_graph=True)
        assert all(bool(gradient.abs().max() > 0) for gradient in found)
        # Two matrices each.
        assert len(found) == 2 * len(adapter.lora_targets("image")) >= 2 * modules
    named = dict(adapter.model.named_modules())
    assert not [name for name in adapter.lora_targets("image") if ".se." in name]
    for name in adapter.lora_targets("image"):
        layer = named[name].get_base_layer()
        assert isinstance(layer, nn.Linear) or (layer.kernel_size, layer.groups) == ((1, 1), 1)


# The kit -------------------------------------------------------------------------------------------------------------


def small(kind: str, head: str, seed: int = 0) -> Any:
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    return wrap(trunk_clip(kind, head, seed=seed), tokenizer=tokenizer)


class TestConvNeXt(AdapterConformance):
    family = "open_clip"

    def make_adapter(self) -> Any:
        return small("convnext", "linear")


class TestHeadIsAnMLP(AdapterConformance):
    """As in ``convnext_large_d``: the last step is no linear map of the position, so less of the kit applies."""

    family = "open_clip"

    def make_adapter(self) -> Any:
        return small("convnext", "mlp")


class TestEfficientNet(AdapterConformance):
    family = "open_clip"

    def make_adapter(self) -> Any:
        return small("efficientnet", "linear")


class TestMobileCLIP(AdapterConformance):
    family = "open_clip"

    def make_adapter(self) -> Any:
        return small("mobileclip", "trunk", seed=1)


def full_size(name: str) -> Any:
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if part != "logit_scale":
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return wrap(model.eval(), tokenizer=open_clip.get_tokenizer(name))


@pytest.mark.slow
class TestFullSizeMobileCLIP(AdapterConformance):
    family = "open_clip"

    def make_adapter(self) -> Any:
        return full_size("MobileCLIP-S1")


@pytest.mark.slow
class TestFullSizeConvNeXt(AdapterConformance):
    family = "open_clip"

    def make_adapter(self) -> Any:
        return full_size("convnext_base_w")


@pytest.mark.parametrize(("name", "grid"), [("MobileCLIP-S1", (8, 8)), ("convnext_base_w", (8, 8))])
def test_a_full_size_model_by_name(name: str, grid: tuple[int, int]) -> None:
    adapter = load(f"open_clip:{name}@random")
    description = adapter.description
    assert description.image_size == (256, 256)
    assert description.mean == ((0.0,) * 3 if name == "MobileCLIP-S1" else open_clip.constants.OPENAI_DATASET_MEAN)
    images = pixels(1, 256, 256)
    with torch.no_grad():
        features = adapter.encode_image(images)
        torch.testing.assert_close(features.pooled, adapter.model.encode_image(images), atol=1e-4, rtol=1e-4)
    assert features.patches.shape == (1, *grid, description.embedding_width)
