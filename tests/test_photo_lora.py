"""``open_clip:photo@ttd``: the LoRA of the package as weights by name, and the script that trains it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("open_clip", "timm", "peft", "tokenizers"):
    pytest.importorskip(package, reason="open_clip:photo@ttd needs the extras open_clip and lora")

from safetensors.torch import load_file

from ttd_plugins import load
from ttd_plugins.app.studio import Studio, shipped_tuning
from ttd_plugins.backbone_sources import check_backbone, open_backbone
from ttd_plugins.embedded import PHOTOGRAPHS_FOLDER, model_folder
from ttd_plugins.embedded.folder import LORA_FOLDER
from ttd_plugins.embedded.photo_examples import photograph
from ttd_plugins.errors import BackboneNameError
from ttd_plugins.plugins import get_family, list_backbones

FOLDER = model_folder("open_clip_photo") / LORA_FOLDER
NAME = "open_clip:photo@ttd"


@pytest.fixture(scope="module")
def before() -> Any:
    return load("open_clip:photo")


@pytest.fixture(scope="module")
def after() -> Any:
    return load(NAME)


def test_the_files_are_small_and_readable_by_peft() -> None:
    config = json.loads((FOLDER / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA"
    tensors = load_file(FOLDER / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4 * 2**20
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_the_weights_are_the_formula_of_lora(before: Any, after: Any) -> None:
    """``W + alpha / r * B A`` from the file, computed here, and every other weight as before."""
    config = json.loads((FOLDER / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = {name.removeprefix("base_model.model."): t.double() for name, t in load_file(
        FOLDER / "adapter_model.safetensors").items()}  # fmt: skip
    expected = {name: value.double() for name, value in before.model.state_dict().items()}
    changed = set()
    for name, first in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            second = tensors[f"{module}.lora_B.weight"]
            expected[f"{module}.weight"] += config["lora_alpha"] / config["r"] * (second @ first)
            changed.add(f"{module}.weight")
    found = after.model.state_dict()
    assert found.keys() == expected.keys() and len(changed) == len(tensors) // 2 > 0
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-5, rtol=1e-4, msg=name)
        assert torch.equal(value, before.model.state_dict()[name]) == (name not in changed), name


def test_it_is_a_backbone_by_name_everywhere(after: Any) -> None:
    assert after.description.weights == "ttd" and not after.has_lora and not after.model.training
    family = get_family("open_clip")
    assert family.weights("photo") == ["embedded", "ttd"] and family.default_weights("photo") == "embedded"
    assert family.weights("tiny") == ["embedded"]
    (listed,) = [one for info in list_backbones() for one in info.backbones if one.model == "photo"]
    assert listed.weights == ("embedded", "ttd")
    check_backbone(NAME)
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        same = open_backbone(NAME).encode_image(image).pooled
        assert torch.equal(same, after.encode_image(image).pooled)
    # It can be tuned further, and unload() restores the weights after TTD.
    further = load(NAME, lora=2)
    assert further.has_lora
    further.unload()
    further.snapshot_weights()
    with torch.no_grad():
        further.model.logit_scale.add_(1)
    further.unload()
    assert all(torch.equal(v, after.model.state_dict()[k]) for k, v in further.model.state_dict().items())


def test_unknown_weights_are_one_sentence_with_the_choices() -> None:
    with pytest.raises(BackboneNameError, match="did you mean 'ttd'"):
        load("open_clip:photo@tdd")
    with pytest.raises(BackboneNameError, match="known: embedded, random"):
        load("open_clip:tiny@ttd")


def test_the_app_shows_it_as_after() -> None:
    names = ["open_clip:photo", "open_clip:tiny", "open_clip:photo@random"]
    assert shipped_tuning(names) == {"open_clip:photo": NAME}
    studio = Studio(["open_clip:photo"], shipped_tuning(["open_clip:photo"]))
    image, caption = photograph(0)
    (view,) = studio.view(image, caption, ["open_clip:photo"]).views
    assert view.error is None and view.before is not None and view.after is not None
    assert NAME in (view.after_title or "")
    assert abs(view.after.caption_map - view.before.caption_map).max() > 1e-3


def test_the_recipe_states_what_was_trained_and_measured() -> None:
    recipe = json.loads((FOLDER / "recipe.json").read_text(encoding="utf-8"))
    assert recipe["settings"]["licences"] == ["CC BY 2.0", "CC BY-SA 2.0"]
    validation = recipe["validation"]
    assert validation["photographs"] == 80
    for arm in ("before", "control", "after"):
        assert all(0 <= value <= 1 for value in validation[arm].values())
    # What the package claims: TTD gains in Caption IoU and tag balance beside the control, and R@1 is not below before.
    for key in ("caption_iou", "tag_balance"):
        for name in ("validation", "test"):
            assert recipe[name]["means"]["after"][key] > recipe[name]["means"]["control"][key] + 0.01
    assert validation["means"]["after"]["retrieval_r1"] >= validation["before"]["retrieval_r1"]


# The script


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Folders of the script's names with three photographs of the package each."""
    for name, chosen in (("coco_more", slice(0, 3)), ("coco_instances_train", slice(3, 6))):
        folder = tmp_path / "data" / name
        (folder / "images").mkdir(parents=True)
        for file in ("captions.json", "instances.json"):
            content = json.loads((PHOTOGRAPHS_FOLDER / file).read_text(encoding="utf-8"))
            content["images"] = content["images"][chosen]
            ids = {image["id"] for image in content["images"]}
            content["annotations"] = [one for one in content["annotations"] if one["image_id"] in ids]
            if name == "coco_more":
                content["images"][0]["license"] = 3
            (folder / file).write_text(json.dumps(content), encoding="utf-8")
        for image in content["images"]:
            shutil.copy(PHOTOGRAPHS_FOLDER / "images" / image["file_name"], folder / "images")
    return tmp_path / "data"


def test_the_script_trains_measures_and_resumes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    script = pytest.importorskip("build_photo_lora")
    work, out = tmp_path / "work", tmp_path / "out"
    options = ["--data", str(data), "--work", str(work), "--out", str(out), "--save", "--seeds", "1", "--steps", "2"]
    options += ["--batch-size", "2", "--crops", "2", "--rank", "2", "--size", "64", "--ttd", "threshold=0.6"]
    script.main(options)
    # One of three photographs has a licence that does not permit it.
    assert "2 photographs with 10 captions are in the training" in capsys.readouterr().out
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["settings"]["ttd"] == {"threshold": 0.6} and recipe["settings"]["photographs"] == 2
    assert recipe["validation"]["photographs"] == 3
    first = (work / "after-0" / "adapter_model.safetensors").read_bytes()
    assert (out / "adapter_model.safetensors").read_bytes() == first
    control = load_file(work / "control-0" / "adapter_model.safetensors")
    assert any(not torch.equal(value, load_file(out / "adapter_model.safetensors")[name])
               for name, value in control.items())  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(script, "train", None)
        script.main(options)
    assert json.loads((out / "recipe.json").read_text()) == recipe
    sys.modules.pop("build_photo_lora", None)


def test_the_script_refuses_modules_of_the_frozen_trunk(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    script = pytest.importorskip("build_photo_lora")
    options = ["--data", str(data), "--work", str(tmp_path / "work"), "--seeds", "1", "--modules", "conv_head|text"]
    with pytest.raises(SystemExit, match="must stay frozen"):
        script.main([*options, "--steps", "1", "--size", "64", "--crops", "1"])
    sys.modules.pop("build_photo_lora", None)
