"""The programs in ``examples/`` run, and do what they say."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

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


def test_fewer_pairs_than_a_batch_end_the_programs_with_a_sentence(coco: Path) -> None:
    loop = example("open_clip_training_loop")
    options = {"steps": 1, "batch_size": 9}
    with pytest.raises(SystemExit, match="fewer pairs than --batch-size"):
        loop.train(
            small_model(),
            open_clip.SimpleTokenizer(),
            lambda transform: loop.CocoCaptions(coco / "captions.json", coco / "images", transform),
            **options,
        )
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="needs the extra 'lora'")
    from helpers_openai_clip import write_folder

    write_folder(coco / "model")
    arguments = ["--pairs", str(pairs_of(coco, "csv")), "--model", str(coco / "model"), "--out", str(coco / "tuned")]
    with pytest.raises(SystemExit, match="has 8 pairs, fewer than a batch of 9; lower --batch-size"):
        example("transformers_training").main([*arguments, "--steps", "1", "--batch-size", "9", "--cpu"])


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


def test_backbones_are_compared_and_ranked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("resvg_py", "matplotlib"):
        pytest.importorskip(package, reason="comparisons on scenes need the extra 'demo'")
    comparing = example("compare_backbones")
    monkeypatch.setenv("COLUMNS", "200")
    names = ["open_clip:tiny@random", "eva_clip:tiny@random"]
    few = ["--images", "6", "--seeds", "1", "--steps", "1", "--batch-size", "2"]
    found = comparing.main([*names, "--out", str(tmp_path), *few])
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["settings"]["steps"] == 1 and (tmp_path / "report.html").stat().st_size > 0
    gains = {name: content["backbones"][name]["gains"] for name in names}
    rows = comparing.ranking(found)
    assert {row[0] for row in rows} == set(names) and rows[0][1] >= rows[1][1]
    for name, up, cost in rows:
        assert (up, cost) == (gains[name]["caption_iou"]["mean"], gains[name]["retrieval_r1"]["mean"])
    out = capsys.readouterr().out
    assert all(name in out for name in names) and f"{rows[0][1]:+z.3f}" in out and "report.html" in out
    # Taken up, and not run again.
    monkeypatch.setattr("ttd_plugins.comparison.scene_data.SceneData.tune", None)
    again = comparing.main([*names, "--out", str(tmp_path), *few])
    assert comparing.ranking(again) == rows


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
    # Rows of another backbone or other scenes are neither taken for an arm nor shown.
    other = [{**row, "backbone": "siglip:tiny", "seconds": 98765.0} for row in rows]
    other += [{**row, "scenes": 17, "seconds": 98765.0} for row in rows]
    out.write_text("".join(json.dumps(row) + "\n" for row in other))
    ablation.main()
    assert "98765" not in capsys.readouterr().out
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert found[:6] == other and [row["metrics"] for row in found[6:]] == [row["metrics"] for row in rows]
    # Rows of earlier releases name neither.
    old = [{key: value for key, value in row.items() if key not in ("backbone", "scenes")} for row in rows]
    out.write_text("".join(json.dumps(row) + "\n" for row in old))
    ablation.main()
    assert len(out.read_text().splitlines()) == 3


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
