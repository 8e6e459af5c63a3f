"""LoRA on some of the modules that a backbone names: by a regular expression, in files, and in a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="LoRA needs peft")
pytest.importorskip("open_clip", reason="needs open_clip_torch")

from ttd_plugins import load, load_lora, save_lora
from ttd_plugins.errors import InputError


def wrapped_names(backbone: object) -> set[str]:
    return {w.name for w in backbone._lora._wrapped}  # type: ignore[attr-defined]


def test_only_modules_whose_names_match_are_wrapped() -> None:
    backbone = load("open_clip:tiny")
    targets = {name for tower in ("image", "text") for name in backbone.lora_targets(tower)}
    backbone.add_lora(2, modules=r"\.1\.|c_fc")
    expected = {name for name in targets if ".1." in name or "c_fc" in name}
    assert wrapped_names(backbone) == expected
    assert expected < targets


def test_a_file_brings_back_lora_on_the_same_modules(tmp_path: Path) -> None:
    backbone = load("open_clip:tiny", lora={"rank": 2, "modules": "c_proj"})
    with torch.no_grad():
        for parameter in backbone.lora_parameters():
            parameter.normal_()
    save_lora(backbone, tmp_path)
    again = load_lora(load("open_clip:tiny"), tmp_path)
    assert wrapped_names(again) == wrapped_names(backbone)
    # Peft ignores the key, and a folder of all modules does not have it.
    assert json.loads((tmp_path / "adapter_config.json").read_text())["ttd_some_modules"] is True
    save_lora(load("open_clip:tiny", lora=2), tmp_path / "all")
    assert "ttd_some_modules" not in json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    assert all(torch.equal(a, b) for a, b in zip(again.lora_parameters(), backbone.lora_parameters(), strict=True))
    ids = backbone.tokenize(["a red kite"]).ids
    with torch.no_grad():
        assert torch.equal(again.encode_text(ids), backbone.encode_text(ids))


@pytest.mark.parametrize(
    ("modules", "message"),
    [("(", "no regular expression"), ("no such name", r"found in no module of the image tower .*such as ")],
)
def test_an_expression_that_selects_nothing_is_refused(modules: str, message: str) -> None:
    backbone = load("open_clip:tiny")
    with pytest.raises(InputError, match=message):
        backbone.add_lora(2, modules=modules)
    assert not backbone.has_lora
