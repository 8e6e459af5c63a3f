"""What a run writes beside checkpoints: metrics of callbacks, keys, advice on how to continue, the id of trackers."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="needs the extra 'train'")

import torch
from helpers_training import MemoryPairs, log_of, run_toy, toy_config
from test_train_kill import make_pairs
from toy_backbone import toy

from ttd_plugins.errors import InputError
from ttd_plugins.training.jsonl_log import JsonlLog
from ttd_plugins.training.reporting import Reporter
from ttd_plugins.training.run import train_run
from ttd_plugins.training.stop_signals import TrainingStoppedError

SHORT = {"optimizer": {"steps": 2}}
EVALUATED = {**SHORT, "run": {"evaluate_every": 2}}


# Metrics of a callback -----------------------------------------------------------------------------------------------


def test_metrics_may_be_tensors_and_numpy_scalars(tmp_path: Path) -> None:
    def evaluate(ttd: Any, step: int) -> Any:
        return {"tensor": torch.tensor([0.5]), "numpy": np.float32(0.25), "array": np.array([2]), "plain": 1}

    result = run_toy(tmp_path, toy_config(**EVALUATED), evaluate=evaluate)
    expected = {"tensor": 0.5, "numpy": 0.25, "array": 2.0, "plain": 1.0}
    assert result.evaluations == [(0, expected), (2, expected)]
    assert [line["evaluation"] for line in log_of(tmp_path) if "evaluation" in line] == [expected, expected]


def test_a_metric_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    config = toy_config(**EVALUATED, evaluation={"best": "score"})
    values = {0: math.nan, 2: 0.5}
    result = run_toy(tmp_path / "once", config, evaluate=lambda ttd, step: {"score": values[step], "other": 1.0})
    assert result.best == 2 and [step for step, _ in result.evaluations] == [0, 2]
    never = run_toy(tmp_path / "never", config, evaluate=lambda ttd, step: {"score": math.nan})
    assert never.best is None and never.step == 2


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (
            {"iou": torch.zeros(2)},
            "evaluate returned the metric 'iou' as Tensor, which is not one number; return a",
        ),
        ({"loss": 0.5, "name": "0.5"}, "the metric 'name' as str, which is not one number"),
        ({"iou": None}, "the metric 'iou' as NoneType, which is not one number"),
        ({"iou": {"dog": 0.5}}, "the metric 'iou' as dict, which is not one number"),
        (None, r"evaluate must return metrics by name, such as \{'iou': 0.5\}, not NoneType"),
        (0.5, "evaluate must return metrics by name"),
    ],
)
def test_a_metric_that_is_no_number_is_one_sentence(returned: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        run_toy(tmp_path, toy_config(**EVALUATED), evaluate=lambda ttd, step: returned)


# Keys ----------------------------------------------------------------------------------------------------------------


def test_keys_that_are_not_utf8_are_logged_and_read_back(tmp_path: Path) -> None:
    keys = [os.fsdecode(b"caf\xe9.jpg"), "café.jpg", "\\udce9"]
    log = JsonlLog(tmp_path / "nonfinite.jsonl")
    log.add({"step": 1, "keys": keys})
    assert [line["keys"] for line in log.read()] == [keys]
    log.truncate(1)
    assert [line["keys"] for line in log.read()] == [keys]
    assert "café" in log.file.read_text(encoding="utf-8")


# How to continue -----------------------------------------------------------------------------------------------------


class StopsAtOnce(Reporter):
    def on_step(self, step: int, loss: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_command_that_continues_a_run_can_be_copied(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")
    pairs, out = make_pairs(tmp_path / "pairs"), tmp_path / "it's my run"
    config = toy_config(
        backbone={"name": "open_clip:tiny@random"},
        data={"source": str(pairs)},
        optimizer={"steps": 3, "batch_size": 2},
        run={"evaluate_every": 0},
    )
    with pytest.raises(TrainingStoppedError) as stopped:
        train_run(config, out, reporter=StopsAtOnce())
    command = str(stopped.value).rpartition("continue with: ")[2]
    assert shlex.split(command) == ["ttd", "train", "--out", str(out), "--resume"]


def test_a_run_of_objects_is_continued_by_a_call(tmp_path: Path) -> None:
    """No command has the objects of the caller."""
    with pytest.raises(TrainingStoppedError, match=r"; call fine_tune again with resume=True$"):
        run_toy(tmp_path, reporter=StopsAtOnce())
    with pytest.raises(TrainingStoppedError, match=r"; press the button again$"):
        run_toy(tmp_path, resume=True, reporter=StopsAtOnce(), resume_advice="press the button again")


def test_the_command_that_exports_the_best_checkpoint_can_be_copied(tmp_path: Path) -> None:
    config = toy_config(optimizer={"steps": 2}, run={"evaluate_every": 1}, evaluation={"best": "score"})
    out = tmp_path / "a run"
    result = run_toy(out, config, evaluate=lambda ttd, step: {"score": step})
    (command,) = [note.rpartition("export it with: ")[2] for note in result.notes if "export it with" in note]
    assert shlex.split(command) == ["ttd", "export", str(out), "--step", "best", "--out", "FOLDER"]


# Random numbers ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_the_generators_of_the_caller_alone(tmp_path: Path) -> None:
    backbone, pairs = toy(dropout=0.3), MemoryPairs()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run_toy(tmp_path, toy_config(**SHORT), backbone=backbone, pairs=pairs)
    assert torch.equal(torch.rand(3), expected)


# Trackers ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tracked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids that trackers were started with."""
    from accelerate import Accelerator

    ids: list[str] = []

    def init_trackers(self: Any, name: str, *, config: Any, init_kwargs: Any) -> None:
        ids.append(init_kwargs["wandb"]["id"])

    monkeypatch.setattr(Accelerator, "init_trackers", init_trackers)
    monkeypatch.setattr("ttd_plugins.training.processes.importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_, **__: [])
    return ids


def test_a_resumed_run_has_the_id_of_its_trackers_which_is_json(tracked: list[str], tmp_path: Path) -> None:
    config = toy_config(**SHORT, run={"trackers": ["wandb"]})
    run_toy(tmp_path, config)
    run_toy(tmp_path, config, resume=True)
    content = json.loads((tmp_path / "trackers.json").read_text())
    assert tracked == [content["id"]] * 2 and content.keys() == {"id"} and len(content["id"]) == 32
    # The bare text of earlier releases, which JSON would read as a number.
    (tmp_path / "trackers.json").write_text("1" * 32 + "\n")
    run_toy(tmp_path, config, resume=True)
    assert tracked[2:] == ["1" * 32]


@pytest.mark.parametrize("content", ["", "{", "{}", '{"id": 3}', "[]", "\xff"])
def test_a_damaged_id_of_trackers_is_one_sentence(content: str, tracked: list[str], tmp_path: Path) -> None:
    config = toy_config(**SHORT, run={"trackers": ["wandb"]})
    run_toy(tmp_path, config)
    tmp_path.joinpath("trackers.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"trackers.json .*; delete it, and trackers start a new run"):
        run_toy(tmp_path, config, resume=True)
    assert len(tracked) == 1
