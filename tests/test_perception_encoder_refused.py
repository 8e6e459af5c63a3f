"""Perception Encoder belongs to none of the built-in families, whose refusals say why."""

from __future__ import annotations

from typing import Any

import pytest

open_clip = pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")

import timm
from ttd_eva_clip.family import EvaCLIPFamily
from ttd_open_clip.family import OpenCLIPFamily
from ttd_openai_clip.family import OpenAICLIPFamily
from ttd_siglip.family import SiglipFamily

from ttd_plugins.errors import UnsupportedModelError

FAMILIES = {"open_clip": OpenCLIPFamily, "eva_clip": EvaCLIPFamily, "siglip": SiglipFamily}
REASONS = {
    "open_clip": "without feature maps .*supports open_clip's own vision transformers and ResNets",
    "eva_clip": "learned queries",
    "siglip": "built neither like transformers' SiglipModel nor like open_clip's SigLIP models",
}


def perception_encoder() -> Any:
    text = {"context_length": 12, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    placeholder = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160}
    model: Any = open_clip.CustomTextCLIP(embed_dim=24, vision_cfg=placeholder, text_cfg=text)
    model.visual.trunk = timm.create_model(
        "vit_pe_core_tiny_patch16_384", img_size=64, embed_dim=32, depth=1, num_heads=1, num_classes=24
    )
    return model.eval()


def test_no_built_in_family_claims_it() -> None:
    model = perception_encoder()
    assert not [family.__name__ for family in (*FAMILIES.values(), OpenAICLIPFamily) if family().claims(model)]


@pytest.mark.parametrize("name", FAMILIES)
def test_as_an_object_it_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REASONS[name]) as caught:
        FAMILIES[name]().wrap(perception_encoder())
    assert "perception" not in str(caught.value).lower()


@pytest.mark.parametrize("name", FAMILIES)
def test_by_name_it_is_refused_with_the_reason(name: str) -> None:
    family = FAMILIES[name]()
    assert "PE-Core-B-16" not in family.models()
    with pytest.raises(UnsupportedModelError, match=rf"{name}:PE-Core-B-16 cannot be adapted: .*vit_pe_core_base"):
        family.load("PE-Core-B-16", "random")
