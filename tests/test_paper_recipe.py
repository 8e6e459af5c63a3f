"""examples/paper_recipe: every command of its page, in order, in a folder with miniatures of the paper's data sets."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

yaml = pytest.importorskip("yaml", reason="training needs PyYAML")
for package in ("accelerate", "open_clip", "peft", "pyarrow", "torchvision"):
    pytest.importorskip(package, reason=f"the recipe needs {package}")

import torch
from helpers_pairs import Pair, make_pairs, picture_bytes, tar_of
from PIL import Image
from test_evaluation_data import ade20k, cityscapes, coco_object, coco_stuff, context59, palette, text
from typer.testing import CliRunner

from ttd_plugins import TTDOptions, cli, load
from ttd_plugins.data import open_pairs
from ttd_plugins.data.score_filter import read_scores
from ttd_plugins.training.config import TrainConfig

RECIPE = Path(__file__).resolve().parents[1] / "examples" / "paper_recipe"
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
PAIRS = {"cc3m": 24, "cc12m": 40}
SHARDS = {"cc3m": 2, "cc12m": 4}
TAGGED = [("a dog beside a boat", ["dog", "boat"]), ("a cat under the old tree", ["cat"]), ("the kite", ["kite"])]

# Of what img2dataset writes into each KEY.json.
FIELDS = {"url": "https://example.org/picture", "status": "success", "error_message": None, "width": 16, "height": 12}


def img2dataset_shards(root: Path, pairs: list[Pair], shards: int) -> None:
    """Shards of ``000000000.jpg``, ``.json`` and ``.txt``, each with its table and statistics beside it."""
    root.mkdir(parents=True)
    per_shard = len(pairs) // shards
    for shard in range(shards):
        members = []
        for number, pair in enumerate(pairs[shard * per_shard : (shard + 1) * per_shard]):
            key, caption = f"{shard:05d}{number:04d}", pair.captions[0]
            record = FIELDS | {"key": key, "caption": caption, "sha256": "0" * 64, "exif": "{}"}
            members += [
                (f"{key}.jpg", pair.picture),
                (f"{key}.json", json.dumps(record, indent=4).encode()),
                (f"{key}.txt", caption.encode()),
            ]
        tar_of(root / f"{shard:05d}.tar", members)
        (root / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (root / f"{shard:05d}_stats.json").write_text(json.dumps({"count": per_shard, "successes": per_shard}))


def tag_mask(root: Path) -> None:
    """CC3M-TagMask as its reader assumes it: a picture, its caption with true tags, and a mask a tag."""
    for number, (caption, tags) in enumerate(TAGGED):
        key = f"{number:09d}"
        (root / "image").mkdir(parents=True, exist_ok=True)
        (root / "image" / f"{key}.jpg").write_bytes(picture_bytes(100 + number, side=64))
        text(root / "json_refined" / f"{key}.json", json.dumps({"caption": caption, "tags": tags}))
        for place, tag in enumerate(tags):
            mask = np.zeros((64, 68), np.uint8)
            mask[:, 34 * place : 34 * place + 30] = 255
            file = root / "mask_using_HQ-SAM" / key / f"{tag}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(file)


def voc(root: Path) -> None:
    """Two pictures, one with a dog and one with a horse."""
    base = root / "VOCdevkit" / "VOC2012"
    text(base / "ImageSets/Segmentation/val.txt", "2007_000033\n2007_000042\n")
    for number, name in enumerate(("2007_000033", "2007_000042")):
        (base / "JPEGImages").mkdir(parents=True, exist_ok=True)
        (base / "JPEGImages" / f"{name}.jpg").write_bytes(picture_bytes(200 + number, side=48))
        mask = np.zeros((48, 52), np.uint8)
        mask[8:40, 8:24], mask[0] = 12 + number, 255
        palette(base / "SegmentationClass" / f"{name}.png", mask)


SETS: dict[str, Callable[[Path], Any]] = {
    "voc": voc, "coco_object": coco_object, "context59": context59, "ade20k": ade20k, "cityscapes": cityscapes,
    "coco_stuff": coco_stuff,
}  # fmt: skip


def miniature(folder: Path, sets: list[str]) -> None:
    """The folder that the page describes: data, and a copy of ``train.yaml``."""
    pairs = make_pairs(sum(PAIRS.values()))
    for name, count in PAIRS.items():
        img2dataset_shards(folder / "data" / name, pairs[:count], SHARDS[name])
        pairs = pairs[count:]
    tag_mask(folder / "data" / "cc3m_tagmask")
    for name in sets:
        SETS[name](folder / "data" / name)
    shutil.copy(RECIPE / "train.yaml", folder)


def script() -> str:
    """Every block of the page."""
    blocks = BLOCK.findall((RECIPE / "README.md").read_text())
    assert len(blocks) == 6
    return "\n".join(blocks)


def run_script(folder: Path, programs: dict[str, str], settings: dict[str, str]) -> str:
    """Run the page's blocks as one script, with these programs, until a command fails; what it prints."""
    (folder / "bin").mkdir()
    for name, content in programs.items():
        (folder / "bin" / name).write_text(content)
        (folder / "bin" / name).chmod(0o755)
    environment = os.environ | settings | {"PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])}
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script()],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code: str) -> str:
    """A program of the packages under test, however they are installed."""
    return f"#!{sys.executable}\n{code}\n"


ACCELERATE = python("from accelerate.commands.accelerate_cli import main; main()")
TTD = python("from ttd_plugins.cli import main; main()")
# Writes down what the shell made of a command.
RECORD = '#!/bin/sh\nprintf "%s\\0" "${0##*/}" "$@" >> commands\nprintf "\\n\\0" >> commands\n'


def settings(processes: int, steps: int, workers: int, sets: list[str]) -> dict[str, str]:
    """The page's variables for a miniature, and what keeps a machine's own settings out."""
    return {
        "BACKBONE": "open_clip:tiny",
        "DEVICE": "cpu",
        # With --cpu accelerate starts one process, whatever --num_processes says.
        "LAUNCH": f"--multi_gpu --num_processes {processes} --main_process_port 0" if processes > 1 else "--cpu",
        "WORKERS": str(workers),
        "MORE": f"--steps {steps} --warm-up 0 --lr 1e-3 --batch-size 8 --size 64 --precision no",
        "EVAL": "--size 64",
        "SETS": " ".join(sets),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "HF_HOME": "none",
    }


def check(folder: Path, *, processes: int, steps: int, sets: list[str]) -> None:
    """What the commands left is what the page says, of the miniature and of nothing else."""
    total = sum(PAIRS.values())
    scores = read_scores(folder / "runs/scores.parquet")
    assert len(set(scores.keys)) == total and np.isfinite(scores.similarity).all()

    config, published = (
        yaml.safe_load(file.read_text()) for file in (folder / "runs/ttd/config.yaml", RECIPE / "train.yaml")
    )
    flags = {
        "backbone": {"name"}, "data": {"image_size", "workers"}, "run": {"mixed_precision"},
        "optimizer": {"learning_rate", "warm_up", "batch_size", "steps"},
    }  # fmt: skip
    for section, values in published.items():
        for key, value in values.items():
            assert key in flags.get(section, ()) or config[section][key] == value, (section, key)
    # Paths of the file are relative to the folder of the test, which is the current one.
    kept = open_pairs(config["data"]["source"], **config["data"]["options"]).keep
    assert kept is not None and kept.selected + kept.rejected == total and 0 < kept.rejected <= total / 4

    (checkpoint,) = (folder / "runs/ttd/checkpoints").iterdir()
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["step"], state["processes"], state["skipped_steps"]) == (steps, processes, 0)
    figures = [json.loads(line) for line in (folder / "runs/ttd/log.jsonl").read_text().splitlines()]
    assert figures[-1]["step"] == steps and all(np.isfinite(line["loss"]) for line in figures)
    assert not (folder / "runs/ttd/skipped.jsonl").exists()

    tuned, before = load("open_clip:local-dir:runs/ttd-vit-b-16"), load("open_clip:tiny")
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = tuned.encode_image(pixels).pooled, before.encode_image(pixels).pooled
    assert a is not None and b is not None and (a - b).norm() > 1e-2 * b.norm()

    weights = set()
    for when in ("before", "after"):
        done = {path.parent.name: json.loads(path.read_text()) for path in folder.glob(f"runs/{when}/*/results.json")}
        assert sorted(done) == sorted(["tags", "text", *sets])
        assert all(one["done"] == one["images"] > 0 for one in done.values())
        assert done["tags"]["figures"]["positives"] == sum(len(tags) for _, tags in TAGGED)
        assert done["text"]["figures"]["captions"] == len(TAGGED)
        assert all(0 <= done[name]["figures"]["miou"] <= 1 for name in sets)
        weights.add(done["tags"]["settings"]["backbone"]["weights_sha256"])
    assert len(weights) == 2


def test_every_command_in_order_on_a_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell expands every command; those of ``ttd`` run in this process, which saves starting nine others."""
    miniature(tmp_path, ["voc"])
    given = settings(processes=1, steps=2, workers=0, sets=["voc"])
    run_script(tmp_path, {"ttd": RECORD, "accelerate": RECORD}, given)
    *recorded, rest = (tmp_path / "commands").read_text().split("\0\n\0")
    commands = [command.split("\0") for command in recorded]
    assert rest == ""
    assert [command[:2] for command in commands] == [
        ["ttd", "prune"], ["accelerate", "launch"], ["ttd", "export"], *[["ttd", "eval"]] * 6,
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for program, *arguments in commands:
        if program == "accelerate":
            (tmp_path / "bin" / program).write_text(ACCELERATE)
            done = subprocess.run([tmp_path / "bin" / program, *arguments], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            answer = CliRunner().invoke(cli.app, arguments)
            assert answer.exit_code == 0, (arguments, answer.output)
    check(tmp_path, processes=1, steps=2, sets=["voc"])


@pytest.mark.slow
def test_the_page_as_a_script_with_two_processes_and_all_data_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    miniature(tmp_path, list(SETS))
    printed = run_script(
        tmp_path, {"ttd": TTD, "accelerate": ACCELERATE}, settings(processes=2, steps=6, workers=1, sets=list(SETS))
    )
    assert "scores: runs/scores.parquet" in printed and "load it with open_clip" in printed
    monkeypatch.chdir(tmp_path)
    check(tmp_path, processes=2, steps=6, sets=list(SETS))


def test_train_yaml_says_of_every_choice_whose_it_is() -> None:
    file = RECIPE / "train.yaml"
    config = TrainConfig.read(file)
    assert config.backbone.name == "open_clip:ViT-B-16@openai" and config.data.source == "data/cc3m::data/cc12m"
    # The method's defaults are written out, so that a later default changes nothing here.
    assert config.ttd == TTDOptions()
    lines = file.read_text().splitlines()
    for unpublished in ("quantile", "rank", "alpha", "rule", "threshold", "distance", "contrastive_weight"):
        (line,) = (line for line in lines if line.strip().startswith(f"{unpublished}:"))
        assert "# ours" in line or "#   ours" in line, line
    assert "optimizer:                           # all ours" in lines
