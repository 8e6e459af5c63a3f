"""Export of open_clip models around trunks of timm: open_clip alone loads the folder and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

open_clip = pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")
pytest.importorskip("peft", reason="needs the extra 'lora'")

import timm
import torch
from helpers_trunks import CONTEXT, HEADS, SIDE, TEXT, TRUNKS, WIDTH, pixels, shaken, trunk_clip
from test_open_clip_trunks import MOBILECLIP, NAME, add_architecture

from ttd_plugins import load, wrap
from ttd_plugins.errors import UnsupportedModelError
from ttd_plugins.export import export_backbone
from ttd_plugins.toolkit.open_clip_models import set_preprocessing

TEXTS = ["a cat", "two red birds"]


@pytest.fixture
def small_fastvit(monkeypatch: pytest.MonkeyPatch) -> str:
    """A small FastViT that timm knows by name while the test runs, as a trunk that timm can rebuild."""
    name = "fastvit_of_the_tests"
    base, small = TRUNKS["mobileclip"]

    def build(pretrained: bool = False, pretrained_cfg: Any = None, **options: Any) -> Any:
        options = {key: value for key, value in options.items() if key not in ("pretrained_cfg_overlay", "cache_dir")}
        trunk: Any = timm.create_model(base, **small, **options)
        trunk.pretrained_cfg = {**trunk.pretrained_cfg, "architecture": name}
        return trunk

    registry = timm.models._registry
    monkeypatch.setitem(registry._model_entrypoints, name, build)
    monkeypatch.setitem(registry._module_to_models, "fastvit", registry._module_to_models["fastvit"] | {name})
    return name


def named_trunk(trunk: str, head: str, *, custom_text: bool) -> Any:
    """A model that open_clip has no name for, around a trunk that timm has a name for."""
    torch.manual_seed(0)
    vision = {"timm_model_name": trunk, "timm_pool": "avg", "timm_proj": HEADS[head], "image_size": SIDE}
    cls = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model = shaken(cls(embed_dim=WIDTH, vision_cfg=vision, text_cfg=TEXT))
    set_preprocessing(open_clip, model, MOBILECLIP)
    return model


def expect_same_in_open_clip_alone(adapter: Any, folder: Path) -> Any:
    """Export, and compare with what open_clip and ``load`` make of the folder; returns what open_clip loads."""
    ids = adapter.tokenize(TEXTS).ids
    done = export_backbone(adapter, folder)
    assert done.model.name == "open_clip:local-dir:PATH"
    again = load(done.model.name.replace("PATH", str(done.folder)))
    assert (again.description.mean, again.description.interpolation) == ((0.0,) * 3, "bilinear")
    assert again.description.dense_mode == adapter.description.dense_mode
    built, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{done.folder}")
    built.eval()
    with torch.no_grad():
        image, text = adapter.encode_image(pixels()), adapter.encode_text(ids)
        torch.testing.assert_close(again.encode_image(pixels()).pooled, image.pooled, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again.encode_image(pixels()).patches, image.patches, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again.encode_text(ids), text, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(built.encode_image(pixels()), image.pooled, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(built.encode_text(ids), text, atol=1e-4, rtol=1e-4)
    normalise = preprocess.transforms[-1]
    assert (tuple(normalise.mean), tuple(normalise.std)) == ((0.0,) * 3, (1.0,) * 3)
    return done


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["test_convnext", "test_efficientnet", "test_resnet", "fastvit"])
def test_a_trunk_with_a_name_is_rebuilt_from_the_configuration_that_is_read_from_it(
    kind: str, head: str, custom_text: bool, small_fastvit: str, tmp_path: Path
) -> None:
    model = named_trunk(small_fastvit if kind == "fastvit" else kind, head, custom_text=custom_text)
    adapter = wrap(model, tokenizer=open_clip.SimpleTokenizer(context_length=CONTEXT))
    expect_same_in_open_clip_alone(adapter, tmp_path / "out")


def test_a_trunk_without_any_projection(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "none", "image_size": SIDE}
    channels = timm.create_model("test_resnet").num_features
    model = shaken(open_clip.CLIP(embed_dim=channels, vision_cfg=vision, text_cfg=TEXT))
    set_preprocessing(open_clip, model, MOBILECLIP)
    adapter = wrap(model, tokenizer=open_clip.SimpleTokenizer(context_length=CONTEXT))
    expect_same_in_open_clip_alone(adapter, tmp_path / "out")


def test_a_tuned_model_by_the_name_of_its_architecture(
    small_fastvit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = {"timm_model_name": small_fastvit, "timm_pool": "avg", "timm_proj": None}
    add_architecture(tmp_path, monkeypatch, vision, **MOBILECLIP)
    adapter = load(f"open_clip:{NAME}@random", lora={"rank": 2})
    shaken(adapter.model)
    done = expect_same_in_open_clip_alone(adapter, tmp_path / "out")
    assert f'"{NAME}"' in done.model.load
    assert "another mean, std or resizing" in " ".join(done.model.notes)
    plain = open_clip.create_model(NAME, pretrained=str(done.folder / "open_clip_model.safetensors")).eval()
    with torch.no_grad():
        image = adapter.encode_image(pixels()).pooled
        torch.testing.assert_close(plain.encode_image(pixels()), image, atol=1e-4, rtol=1e-4)
        untuned = adapter.unload().encode_image(pixels())
    assert (image - untuned).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["convnext", "mobileclip"])
def test_a_trunk_that_differs_from_the_one_with_its_name_says_why_it_cannot_be_rebuilt(
    kind: str, tmp_path: Path
) -> None:
    adapter = wrap(trunk_clip(kind), tokenizer=open_clip.SimpleTokenizer(context_length=CONTEXT))
    message = r"open_clip cannot rebuild open_clip:CLIP: it passes only the name of a trunk on to timm"
    with pytest.raises(UnsupportedModelError, match=message):
        export_backbone(adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_trunk_without_a_name_says_the_same(tmp_path: Path) -> None:
    model = named_trunk("test_convnext", "linear", custom_text=False)
    model.visual.trunk.pretrained_cfg = {}
    model.visual.trunk.norm_pre = torch.nn.BatchNorm2d(64)
    adapter = wrap(model.eval(), tokenizer=open_clip.SimpleTokenizer(context_length=CONTEXT))
    with pytest.raises(UnsupportedModelError, match="it passes only the name of a trunk on to timm"):
        export_backbone(adapter, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileCLIP-S1", "convnext_base_w"])
def test_a_full_size_model_by_name(name: str, tmp_path: Path) -> None:
    adapter = load(f"open_clip:{name}@random")
    done = export_backbone(adapter, tmp_path / "out")
    assert f'"{name}"' in done.model.load
    built = open_clip.create_model(f"local-dir:{done.folder}").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            built.encode_image(pixels(1, 256, 256)), adapter.encode_image(pixels(1, 256, 256)).pooled
        )
