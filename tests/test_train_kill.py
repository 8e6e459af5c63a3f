"""``ttd train`` killed without warning and resumed, as a process of its own: it ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="needs the extra 'train'")

from helpers_training import assert_same, caption_of, log_of, run_on_folder
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from ttd_plugins import cli
from ttd_plugins.training.checkpoints import checkpoint_steps, read_checkpoint
from ttd_plugins.training.stop_signals import TrainingStoppedError

PROGRAM = "from ttd_plugins.cli import main; main()"


def make_pairs(folder: Path, count: int = 20) -> Path:
    """A folder of small pictures with captions, two of them broken."""
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (5, 7, 3), np.uint8)
        Image.fromarray(pixels).resize((60, 50)).save(folder / f"pair{number:02d}.png")
        (folder / f"pair{number:02d}.txt").write_text(caption_of(number))
    (folder / "pair03.png").write_bytes(b"")
    (folder / "pair11.txt").write_bytes(b"\xff\xfe\xfa")
    return folder


def command(pairs: Path, out: Path, *, steps: int, resume: bool = False) -> list[str]:
    options = [
        *("--backbone", "open_clip:tiny", "--data", str(pairs), "--steps", str(steps), "--batch-size", "4"),
        *("--lr", "1e-3", "--warm-up", "2", "--rank", "2", "--text-tower", "full", "--accumulation", "2"),
        *("--set", "towers.dropout=0.1", "--set", "run.log_every=2", "--set", "run.checkpoint_every=3"),
        *("--set", "run.cpu=true", "--set", "run.keep=2"),
    ]
    return [sys.executable, "-c", PROGRAM, "train", "--out", str(out), *options, *(["--resume"] if resume else [])]


def started(arguments: list[str]) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(arguments: list[str]) -> str:
    process = started(arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def assert_readable(out: Path) -> None:
    for step in checkpoint_steps(out):
        read_checkpoint(out, step)


def assert_as_left_alone(out: Path, whole: Path) -> None:
    assert checkpoint_steps(out)[-1] == checkpoint_steps(whole)[-1]
    for name in ("trained.safetensors", "optimizer.safetensors", "random.safetensors"):
        ours, theirs = (next((run / "checkpoints").glob(f"step-*{checkpoint_steps(run)[-1]}")) for run in (out, whole))
        assert_same(load_file(ours / name), load_file(theirs / name))
    assert log_of(out) == log_of(whole)
    assert sorted((out / "skipped.jsonl").read_text().splitlines()) == sorted(
        (whole / "skipped.jsonl").read_text().splitlines()
    )
    assert not list(out.rglob("*.part"))


TOY = """
import sys
from pathlib import Path
from helpers_training import run_on_folder
from ttd_plugins.training.stop_signals import TrainingStoppedError
try:
    run_on_folder(Path(sys.argv[1]), Path(sys.argv[2]), slowly=0.1)
except TrainingStoppedError as stopped:
    sys.exit(stopped.status)
"""


def test_a_run_that_is_killed_once_and_stopped_once_ends_as_the_one_left_alone(tmp_path: Path) -> None:
    pairs, whole, out = make_pairs(tmp_path / "pairs"), tmp_path / "whole", tmp_path / "out"
    run_on_folder(pairs, whole)
    assert len((whole / "skipped.jsonl").read_text().splitlines()) == 2
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
        before = checkpoint_steps(out)
        process = started([sys.executable, "-c", TOY, str(pairs), str(out)])
        while checkpoint_steps(out)[-1:] == before[-1:] and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode == status, errors
        assert_readable(out)
        assert 0 < checkpoint_steps(out)[-1] < checkpoint_steps(whole)[-1]
    run_on_folder(pairs, out)
    assert_as_left_alone(out, whole)


def test_the_command_ends_with_the_status_of_the_signal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped(*_: object, **__: object) -> None:
        error = TrainingStoppedError("stopped by SIGTERM after step 3")
        error.status = 143
        raise error

    monkeypatch.setattr("ttd_plugins.fine_tuning.fine_tune", stopped)
    found = CliRunner().invoke(cli.app, ["train", "--backbone", "open_clip:tiny", "--out", str(tmp_path)])
    assert found.exit_code == 143 and "stopped by SIGTERM after step 3" in found.output


@pytest.mark.slow
def test_killed_at_twenty_random_moments_and_resumed_each_time(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")
    pytest.importorskip("peft", reason="needs the extra 'lora'")
    pairs, steps = make_pairs(tmp_path / "pairs"), 24
    begun = time.monotonic()
    finished(command(pairs, tmp_path / "whole", steps=steps))
    seconds = time.monotonic() - begun
    out, moments, kills, ended = tmp_path / "out", random.Random(0), 0, 0
    report = []
    while kills < 20:
        process = started(command(pairs, out, steps=steps, resume=True))
        try:
            # Somewhere between its start and the end of a whole run.
            process.wait(moments.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        assert_readable(out)
        report.append(checkpoint_steps(out)[-1] if checkpoint_steps(out) else 0)
        print(f"kill {kills} of 20, status {process.returncode}: newest checkpoint {report[-1]}", flush=True)
        if process.returncode == 0:
            # Done before all kills were: the rest of them go to another run.
            assert_as_left_alone(out, tmp_path / "whole")
            ended += 1
            out = tmp_path / f"out-{ended}"
    finished(command(pairs, out, steps=steps, resume=True))
    assert_as_left_alone(out, tmp_path / "whole")
    print(f"killed {kills} times, {ended + 1} runs ended; newest checkpoints after each start: {report}")
