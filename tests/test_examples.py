"""The programs in ``examples/`` run, and do what they say."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_examples import ROOT, example
from PIL import Image

open_clip = pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")
pytest.importorskip("peft", reason="needs the extra 'lora'")

SHARED = ROOT.parent / "shared" / "data" / "coco_instances_train"


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Eight pictures in COCO's caption format."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for number, (name, colour) in enumerate([("red", (220, 30, 30)), ("green", (30, 200, 30))] * 4):
        pixels = np.clip(np.array(colour) + rng.integers(-25, 25, (40, 56, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg"})
        annotations += [{"image_id": number, "caption": f"a {name} wall and a dog"}] * 2
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return tmp_path


def small_model() -> torch.nn.Module:
    return open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg={"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32},
        text_cfg={"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    )


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
def test_three_lines_in_a_stock_loop_train_and_unload_leaves_no_trace(coco: Path, rank: int) -> None:
    loop = example("open_clip_training_loop")
    torch.manual_seed(0)
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    losses, backbone = loop.train(
        model,
        open_clip.SimpleTokenizer(),
        lambda transform: loop.CocoCaptions(coco / "captions.json", coco / "images", transform),
        steps=16,
        batch_size=4,
        rank=rank,
        learning_rate=3e-3,
    )
    assert np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    tuned = model.state_dict()
    changed = [name for name in tuned if name not in before or not torch.equal(tuned[name], before[name])]
    assert changed, "training changed something"

    given_back = backbone.unload()
    assert given_back is model
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before), "bitwise the originals"
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_merged_weights_are_an_open_clip_checkpoint(coco: Path, tmp_path: Path) -> None:
    loop = example("open_clip_training_loop")
    torch.manual_seed(0)
    model = small_model()
    keys = list(model.state_dict())
    _, backbone = loop.train(
        model,
        open_clip.SimpleTokenizer(),
        lambda transform: loop.CocoCaptions(coco / "captions.json", coco / "images", transform),
        steps=2,
        batch_size=4,
    )
    model.eval()
    pixels = torch.randn(2, 3, 32, 32)
    tuned = backbone.encode_image(pixels)
    merged = backbone.merge().state_dict()
    assert list(merged) == keys
    fresh = small_model().eval()
    fresh.load_state_dict(merged)
    torch.testing.assert_close(fresh.encode_image(pixels), tuned.pooled, atol=1e-5, rtol=1e-5)


def pairs_of(folder: Path, kind: str) -> Path:
    """A CSV or JSON-lines file with the first caption of each picture."""
    content = json.loads((folder / "captions.json").read_text())
    first = {annotation["image_id"]: annotation["caption"] for annotation in reversed(content["annotations"])}
    rows = [{"image": f"images/{item['file_name']}", "caption": first[item["id"]]} for item in content["images"]]
    file = folder / f"pairs.{kind}"
    with file.open("w", newline="") as lines:
        if kind == "csv":
            writer = csv.DictWriter(lines, ["image", "caption"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
    return file


@pytest.mark.parametrize(("rank", "kind"), [(4, "csv"), (0, "jsonl")], ids=["lora-csv", "full-jsonl"])
def test_trainer_tunes_a_transformers_model_that_loads_as_any_other(coco: Path, rank: int, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="needs the extra 'lora'")
    from helpers_openai_clip import pixels, write_folder

    training = example("transformers_training")
    original = write_folder(coco / "model")
    arguments = ["--pairs", str(pairs_of(coco, kind)), "--model", str(coco / "model"), "--out", str(coco / "tuned")]
    arguments += ["--steps", "12", "--batch-size", "4", "--rank", str(rank), "--learning-rate", "3e-3", "--cpu"]
    losses = training.main(arguments)
    assert len(losses) == 12 and np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    tuned, report = transformers.CLIPModel.from_pretrained(coco / "tuned", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert list(tuned.state_dict()) == list(original.state_dict())
    with torch.no_grad():
        after, before = (model.get_image_features(pixels()).pooler_output for model in (tuned, original))
    assert not torch.allclose(after, before, atol=1e-2)
    processor = transformers.CLIPProcessor.from_pretrained(coco / "tuned")
    assert processor.tokenizer("a dog")["input_ids"] == [49406, 320, 1929, 49407]
    assert processor.image_processor.crop_size["height"] == 32


def test_trainer_and_unload_leave_no_trace(coco: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="needs the extra 'lora'")
    from helpers_openai_clip import write_folder

    training = example("transformers_training")
    original = write_folder(coco / "model")
    model = transformers.CLIPModel.from_pretrained(coco / "model")
    options = {"remove_unused_columns": False, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    arguments = transformers.TrainingArguments(
        str(coco / "out"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, **options
    )
    processor = transformers.CLIPProcessor.from_pretrained(coco / "model")
    losses, backbone = training.train(model, processor, pairs_of(coco, "csv"), arguments, size=64)
    assert len(losses) == 2 and backbone.has_lora
    assert backbone.unload() is model
    assert list(model.state_dict()) == list(original.state_dict())
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_backbones_are_compared_on_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("resvg_py", reason="scenes are drawn with the extra 'demo'")
    pytest.importorskip("matplotlib", reason="pictures are drawn with the extra 'demo'")
    comparison = example("compare_backbones")
    monkeypatch.setenv("COLUMNS", "200")
    names = ["open_clip:tiny@random", "eva_clip:tiny@random", "open_clip:no-such-model@random"]
    arguments = [*names, "--out", str(tmp_path), "--steps", "2", "--batch-size", "8", "--scenes", "8", "--rank", "4"]
    rows = comparison.main([*arguments, "--pictures", "1", "--calibration", "own"])
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["backbones"] == rows and content["settings"]["steps"] == 2
    assert [row["backbone"] for row in rows] == names
    for row in rows[:2]:
        assert {"before", "control", "after"} <= set(row)
        assert all(0 <= row[arm]["tag_ap"] <= 1 for arm in ("before", "control", "after"))
        # Two steps from the same LoRA weights on the same scenes, with and without TTD.
        assert row["before"] != row["after"] != row["control"]
    assert "unknown open_clip model" in rows[2]["error"]
    assert {path.parent.name for path in tmp_path.glob("pictures/*/01.png")} == {
        "open_clip_tiny_random", "eva_clip_tiny_random"
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "open_clip:no-such-model@random is left out" in out and "eva_clip:tiny@random" in out


def test_backbones_are_compared_on_pairs_of_ones_own(coco: Path) -> None:
    comparison = example("compare_backbones")
    data = comparison.PairData(pairs_of(coco, "jsonl"))
    assert (len(data.training), len(data.held_out)) == (6, 2)
    arguments = ["open_clip:tiny@random", "--pairs", str(pairs_of(coco, "csv")), "--out", str(coco / "out")]
    arguments += ["--calibration", "own", "--no-control", "--pictures", "0", "--steps", "2", "--rank", "4"]
    (row,) = comparison.main([*arguments, "--batch-size", "4"])
    assert "control" not in row and row["before"] != row["after"]
    assert row["before"]["pairs"] == 2 and 0 <= row["before"]["word_ap"] <= 1
    (row,) = comparison.main([*arguments, "--batch-size", "7"])
    assert row["error"] == "6 training pairs are fewer than a batch of 7"


def test_words_of_a_caption_are_told_from_words_of_others(coco: Path) -> None:
    """A scorer that knows what is pictured has word_ap 1, the opposite one has less, and each caption's words count."""
    comparison = example("compare_backbones")
    data = comparison.PairData(pairs_of(coco, "jsonl"))
    from ttd_plugins import TTD, load

    class Oracle(TTD):
        sign = 1.0

        def align(self, images: torch.Tensor, captions: list[str], candidates: Any, *, pooled: bool = True) -> Any:
            alignment = super().align(images, captions, candidates, pooled=pooled)
            pairs = zip(candidates.image_index.tolist(), candidates.tag_index.tolist(), strict=True)
            is_own = [candidates.distinct[tag] in captions[image].split() for image, tag in pairs]
            alignment.tag_maps = self.sign * torch.tensor(is_own).float()[:, None].expand(-1, 2)
            return alignment

    oracle = Oracle(load("open_clip:tiny@random"))
    assert data.measure(oracle)["word_ap"] == 1
    oracle.sign = -1.0
    assert data.measure(oracle)["word_ap"] < 0.8


def test_the_comparison_fits_each_backbones_calibration(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="scenes are drawn with the extra 'demo'")
    comparison = example("compare_backbones")
    data, tuning = comparison.SceneData(8), comparison.SceneTuning(steps=1, batch_size=4, rank=2)
    row = comparison.compare("open_clip:tiny", data, tuning, tmp_path, count=0, control=False)
    fitted = row["calibration"]
    assert fitted["log_loss"] < fitted["default_log_loss"]
    assert fitted["calibration"] != fitted["default"]


def test_readme_names_every_example() -> None:
    readme = (ROOT / "README.md").read_text()
    for script in (ROOT / "examples").glob("*.py"):
        assert f"examples/{script.name}" in readme, script.name


def test_readme_shows_the_lines_of_the_example() -> None:
    readme = (ROOT / "README.md").read_text()
    for line in (r"bb = wrap\(model, tokenizer=tokenizer", r"ttd = TTD\(bb\)", r"loss = ttd\(images, captions\)\.loss"):
        assert re.search(line, readme)


def test_the_ablation_runs_an_arm_and_does_not_run_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("resvg_py", reason="scenes are drawn with the extra 'demo'")
    ablation = example("ablation")
    out = tmp_path / "ablation.jsonl"
    arguments = ["ablation.py", "--out", str(out), "--steps", "1", "--scenes", "16", "--only", "control,rank:4"]
    monkeypatch.setattr(sys, "argv", arguments)
    ablation.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["before", "control", "rank:4"]
    ablation.main()
    assert len(out.read_text().splitlines()) == 3
    assert "every arm is a line of" in capsys.readouterr().out


def test_every_arm_of_the_ablation_is_a_valid_setting() -> None:
    ablation = example("ablation")
    base = ablation.SceneTuning()
    for name, changes in ablation.arms().items():
        tuning = ablation.settings(base, changes)
        assert (tuning == base) == (not changes), name


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/coco_instances_train")
def test_twenty_steps_on_photographs_with_a_full_size_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    loop = example("open_clip_training_loop")
    losses = loop.main(
        ["--captions", str(SHARED / "captions.json"), "--images", str(SHARED / "images"), "--model", "ViT-B-32"]
        + ["--steps", "20", "--batch-size", "16"]
    )
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    print(capsys.readouterr().out.splitlines()[-1])
