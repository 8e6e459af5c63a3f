"""The evidence on photographs, end to end on a miniature of the same layouts, stopped once."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_examples import example
from helpers_pairs import Pair, as_shards
from helpers_photographs import write_photographs
from PIL import Image

for package in ("open_clip", "peft", "accelerate", "webdataset", "yaml"):
    pytest.importorskip(package, reason="the evidence on photographs needs the extras 'open_clip' and 'train'")

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 60, 220), "white": (240, 240, 240)}
CAPTIONS = {name: ["a dog on the grass beside a lovely car"] for name in "0123"}
SHOWN = dict.fromkeys(CAPTIONS, (18, 193))
FEW = ["--base-steps", "4", "--every", "2", "--steps", "2", "--batch-size", "8", "--size", "64", "--rank", "2"]
CATEGORIES = [
    {"id": 18, "name": "dog", "isthing": 1},
    {"id": 193, "name": "grass-merged", "isthing": 0},
    {"id": 3, "name": "car", "isthing": 1},
]


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


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = example("photographs_evidence")
    monkeypatch.setattr(module, "SIZE", 64)
    # Eighty templates for each of 133 classes take half a minute.
    presets = {"fast": replace(module.SEGMENT_PRESETS["fast"], templates="none")}
    monkeypatch.setattr(module, "SEGMENT_PRESETS", presets)
    return module


@pytest.fixture
def arguments(tmp_path: Path, evidence: Any) -> list[str]:
    shards = as_shards(tmp_path / "pairs", pairs(48), 2)
    for name in {*evidence.GALLERY, *evidence.SEGMENTATION}:
        folder = write_photographs(tmp_path / "data" / name, CAPTIONS, SHOWN)
        (folder / "categories.json").write_text(json.dumps(CATEGORIES))
    return ["--pairs", str(shards), "--data", str(tmp_path / "data"), "--work", str(tmp_path / "work"), *FEW]


def test_the_evidence_resumes_and_measures_every_arm(
    evidence: Any,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tune, tuned = evidence.fine_tune, []

    def stopping(config: dict[str, Any], run: Path, **more: Any) -> Any:
        tuned.append((run.name, config["ttd"]))
        if len(tuned) == 3:
            raise KeyboardInterrupt
        return tune(config, run, **more)

    monkeypatch.setattr(evidence, "fine_tune", stopping)
    with pytest.raises(KeyboardInterrupt):
        evidence.main([*arguments, "--seeds", "2", "--ttd", "threshold=0.6"])
    # Neither the base nor the control of the first seed is trained again.
    evidence.main([*arguments, "--seeds", "2", "--ttd", "threshold=0.6"])
    control, after = evidence.CONTRASTIVE, {"threshold": 0.6}
    expected = [("base", control), ("control-0", control), ("control-1", control), ("control-1", control)]
    assert tuned == [*expected, ("after-0", after), ("after-1", after)]
    work = tmp_path / "work"
    metrics = json.loads((work / "evidence-after.json").read_text())["metrics"]
    assert {arm: len(runs) for arm, runs in metrics.items()} == {"untrained": 1, "before": 1, "control": 2, "after": 2}
    for runs in metrics.values():
        for run in runs:
            assert set(run) == {*evidence.VALIDATION, *evidence.TEST, *evidence.SEGMENTATION, "all photographs"}
            assert all(0 <= value <= 1 for found in run.values() for value in found.values())
    assert metrics["control"][0] != metrics["control"][1] != metrics["after"][1]
    table = (work / "evidence-after.md").read_text()
    assert table in capsys.readouterr().out and "±" in table


def test_a_trunk_that_is_trained_is_refused(evidence: Any, arguments: list[str]) -> None:
    with pytest.raises(RuntimeError, match="the trunk is trained"):
        evidence.main([*arguments, "--modules", ""])


def test_stored_feature_maps_equal_the_trunks(evidence: Any, tmp_path: Path) -> None:
    import torch

    from ttd_plugins import load
    from ttd_plugins.adapter import image_features

    backbone: Any = load("open_clip:photo")
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = image_features(backbone, pixels, pooled=True)
        for _ in range(2):
            # The second cache reads what the first one stored.
            cache = evidence.TrunkCache(tmp_path / "maps.safetensors")
            cached = cache.attach(load("open_clip:photo").eval())
            for order in ([0, 1, 2], [2, 0]):
                found = image_features(cached, pixels[order], pooled=True)
                torch.testing.assert_close(found.patches, expected.patches[order], atol=1e-5, rtol=1e-5)
            cache.save()
            assert len(cache.maps) == 3
