"""The evidence on photographs, end to end on a miniature of the same layouts, stopped once."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_examples import example
from helpers_pairs import Pair, as_shards
from helpers_photographs import write_photographs
from PIL import Image

for package in ("open_clip", "peft", "accelerate", "tokenizers", "webdataset", "yaml"):
    pytest.importorskip(package, reason="the evidence on photographs needs the extras 'open_clip', 'train' and 'demo'")

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 60, 220), "white": (240, 240, 240)}
SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16, "pool_type": "avg"},
    "text_cfg": {"context_length": 32, "vocab_size": 270, "layers": 1, "width": 32, "heads": 2},
}
CAPTIONS = {name: ["a dog on the grass beside a lovely car"] for name in "0123"}
SHOWN = dict.fromkeys(CAPTIONS, (18, 193))
FEW = ["--steps", "24", "--every", "12", "--batch-size", "8", "--patch-dropout", "0", "--learning-rate", "5e-3"]
FEW += ["--tuning-steps", "2", "--tuning-batch-size", "4"]


def pairs(count: int) -> list[Pair]:
    """Walls of one colour, which their two captions name."""
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        name = list(COLOURS)[number % 4]
        pixels = np.clip(np.array(COLOURS[name]) + rng.integers(-20, 20, (24, 32, 3)), 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "jpeg")
        found.append(Pair(f"{number:05d}.jpg", stream.getvalue(), (f"a {name} wall", f"{name} paint on a wall")))
    return found


def test_the_evidence_runs_end_to_end_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example("pretrain_tiny"), "WARM_UP", 2)
    evidence = example("flickr8k_evidence")
    for name, value in (("SIDE", 32), ("VOCABULARY", 270), ("MODEL", SMALL)):
        monkeypatch.setattr(evidence, name, value)
    # The first half is held out, of which the calibration is fitted and wants twenty pictures.
    shards = as_shards(tmp_path / "pairs", pairs(48), 2)
    for folder in ("masks", "others"):
        write_photographs(tmp_path / folder, CAPTIONS, SHOWN)
    work = tmp_path / "work"
    arguments = ["--pairs", str(shards), "--masks", str(tmp_path / "masks"), "--work", str(work), *FEW]
    arguments += ["--validation", str(tmp_path / "others"), "--fitted"]
    tune, tuned = evidence.fine_tune, []

    def stopping(config: dict[str, Any], *rest: Any, **more: Any) -> Any:
        tuned.append(config["ttd"])
        if len(tuned) == 2:
            raise KeyboardInterrupt
        return tune(config, *rest, **more)

    monkeypatch.setattr(evidence, "fine_tune", stopping)
    with pytest.raises(KeyboardInterrupt):
        evidence.main(arguments)
    half = json.loads((work / "evidence.json").read_text())["figures"]
    assert list(half) == ["before", "control"]
    # Neither the pre-training nor what was measured is done again.
    monkeypatch.setattr(evidence, "pretrain", None)
    evidence.main(arguments)
    assert tuned == [{"tag_weight": 0.0, "distill_weight": 0.0}, {}, {}, {}]
    content = json.loads((work / "evidence.json").read_text())
    assert list(content["figures"]) == ["before", "control", "after", "after, calibration fitted"]
    # The two sets of masks are the same here.
    assert content["validation"] == content["figures"]
    assert {arm: content["figures"][arm] for arm in half} == half
    for figures in content["figures"].values():
        assert set(figures) == set(evidence.METRICS.values()) and all(0 <= value <= 1 for value in figures.values())
        assert figures["text.caption_iou"] + figures["text.mfpr"] + figures["text.mfnr"] == pytest.approx(1)
    assert content["figures"]["control"] != content["figures"]["after"] != content["figures"][evidence.FITTED]
    # Colours are learnt from pairs, and retrieval of four of them by chance is a quarter.
    assert content["pretraining"]["pairs"] == 24 and content["figures"]["before"]["retrieval_r1"] > 0.4
    table = (work / "evidence.md").read_text()
    assert table in capsys.readouterr().out and f"{half['control']['text.caption_iou']:.3f}" in table
