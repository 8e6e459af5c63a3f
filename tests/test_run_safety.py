"""A run loses nothing that was good: checksums, divergence, SIGHUP, two processes, killed workers, lost memory."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="needs the extra 'train'")

import torch
from helpers_training import MemoryPairs, assert_same, log_of, run_on_folder, run_toy, toy_config, weights_of
from test_train_kill import make_pairs, started
from toy_backbone import toy
from typer.testing import CliRunner

from ttd_plugins import cli
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.training import checkpoints
from ttd_plugins.training.checkpoint_state import CHECKSUMS
from ttd_plugins.training.checkpoints import (
    Checkpoint,
    checkpoint_folder,
    checkpoint_steps,
    read_checkpoint,
    restore_backbone,
    write_checkpoint,
)
from ttd_plugins.training.divergence import RECENT, DivergenceWatch
from ttd_plugins.training.reporting import Reporter
from ttd_plugins.training.run import NonFiniteError, train_run
from ttd_plugins.training.stop_signals import StopSignals, TrainingStoppedError

# Checksums -----------------------------------------------------------------------------------------------------------


def without_checksums(folder: Path) -> None:
    """As releases before checksums wrote it."""
    state = json.loads((folder / "state.json").read_text())
    for key in (*CHECKSUMS, "health"):
        del state[key]
    (folder / "state.json").write_text(json.dumps(state))


def test_a_flipped_byte_anywhere_in_a_checkpoint_is_found(tmp_path: Path) -> None:
    config = toy_config(optimizer={"steps": 1})
    run_toy(tmp_path, config)
    folder = checkpoint_folder(tmp_path, 1)
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for place in {0, 8, len(content) // 3, len(content) // 2, len(content) - 2}:
            if place >= len(content):
                continue
            changed = bytearray(content)
            changed[place] ^= 1
            file.write_bytes(changed)
            if file.suffix == ".json" and json_equal(bytes(changed), content):
                continue
            with pytest.raises(InputError, match=rf"{file.name}.*(damaged|cannot be read|format)") as caught:
                read_checkpoint(tmp_path)
            assert "\n" not in str(caught.value)
            with pytest.raises(InputError):
                run_toy(tmp_path, config, resume=True)
            if file.name in ("trained.safetensors", "buffers.safetensors", "state.json"):
                with pytest.raises(InputError):
                    restore_backbone(tmp_path, backbone=toy())
        file.write_bytes(content)
    assert run_toy(tmp_path, config, resume=True).step == 1


def json_equal(text: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(text) == json.loads(other))
    except ValueError:
        return False


def test_the_checkpoint_that_was_just_written_is_never_deleted(tmp_path: Path) -> None:
    for step in (900, 1000, 1100):
        write_checkpoint(tmp_path, Checkpoint({"step": step}), keep=3)
    folder = write_checkpoint(tmp_path, Checkpoint({"step": 810}), keep=3)
    assert folder.is_dir() and checkpoint_steps(tmp_path) == [810, 900, 1000, 1100]


def test_a_checkpoint_whose_checksums_were_taken_away_is_refused_and_an_old_one_is_read(tmp_path: Path) -> None:
    config = toy_config(optimizer={"steps": 3}, run={"checkpoint_every": 2})
    whole = run_toy(tmp_path / "whole", config)
    run_toy(tmp_path / "out", config)
    out = tmp_path / "out"
    for step in checkpoint_steps(out):
        without_checksums(checkpoint_folder(out, step))
    assert_same(dict(restore_backbone(out, backbone=toy()).model.state_dict()), weights_of(whole))
    shutil.rmtree(checkpoint_folder(out, 3))
    assert_same(weights_of(run_toy(out, config, resume=True)), weights_of(whole))
    for key in CHECKSUMS:
        state = json.loads((checkpoint_folder(out, 3) / "state.json").read_text())
        kept = state.pop(key)
        (checkpoint_folder(out, 3) / "state.json").write_text(json.dumps(state))
        with pytest.raises(InputError, match="one of its checksums is missing; delete its folder to use"):
            read_checkpoint(out)
        (checkpoint_folder(out, 3) / "state.json").write_text(json.dumps(state | {key: kept}))
    read_checkpoint(out)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_checkpoints_and_exports_have_the_permissions_of_the_umask(mask: int, tmp_path: Path) -> None:
    from ttd_plugins.export import export_backbone

    before = os.umask(mask)
    try:
        run_toy(tmp_path / "run", toy_config(optimizer={"steps": 1}))
        export_backbone(toy(), tmp_path / "export", form="weights")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert {path.name for path in files} >= {"trained.safetensors", "state.json", "model.safetensors", "log.jsonl"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


# Divergence ----------------------------------------------------------------------------------------------------------


def test_the_watch_judges_most_of_the_last_steps_and_protects_what_was_before() -> None:
    watch = DivergenceWatch()
    for step in range(1, 21):
        assert not watch.add(step, 10.0, {"caption_map_spread": 0.4}, [5, 10, 15], skipped=False)
    # One bad step is no divergence, and is forgotten.
    assert not watch.add(21, 40.0, {}, [10, 15, 20], skipped=False) and watch.kept == [15, 20]
    for step in range(22, 33):
        watch.add(step, 10.0, {}, [15, 20, 30], skipped=False)
    assert watch.kept == [] and not watch.diverged
    # A skipped step is not forgotten.
    watch.add(33, math.nan, {}, [20, 30], skipped=True)
    for step in range(34, 50):
        watch.add(step, 10.0, {}, [30, 40], skipped=False)
    assert watch.kept == [30] and not watch.diverged
    fell = [watch.add(step, 10.0, {"caption_map_spread": 0.0}, [30, 40, 50], skipped=False) for step in range(51, 61)]
    assert fell.count(True) == 1 and watch.diverged and watch.kept == [30, 40, 50]
    assert "the caption maps are flat (spread of cosines 0.0000, in the first step 0.4000)" in watch.sentence(10, 0.0)
    assert DivergenceWatch(**watch.as_dict()).diverged
    exploded = DivergenceWatch()
    for step in range(1, RECENT):
        exploded.add(step, 1.0 if step < 3 else 3.1, {}, [], skipped=False)
    assert exploded.diverged and "the loss is 3.1, and 1 in the first step" in exploded.sentence(3.1, None)
    # What was flat before any training is the backbone's own.
    flat = DivergenceWatch()
    for step in range(1, 9):
        flat.add(step, 1.0, {"caption_map_spread": 0.001}, [], skipped=False)
    assert not flat.diverged


class Listen(Reporter):
    def __init__(self) -> None:
        self.sentences: list[str] = []

    def on_message(self, sentence: str) -> None:
        self.sentences.append(sentence)


@pytest.mark.parametrize(
    ("rate", "why"), [(1e3, "the norm of the trained weights is"), (1e-3, "the caption maps are flat")]
)
def test_a_diverging_run_keeps_the_checkpoints_from_before_and_says_so(rate: float, why: str, tmp_path: Path) -> None:
    backbone = toy()

    class Break(Listen):
        def on_step(self, step: int, loss: float) -> None:
            if step >= 6 and rate < 1:
                with torch.no_grad():
                    for parameter in backbone.model.parameters():
                        parameter.zero_()

    reporter = Break()
    config = toy_config(optimizer={"steps": 24, "learning_rate": rate, "warm_up": 5}, run={"keep": 2})
    result = run_toy(tmp_path, config, backbone=backbone, reporter=reporter)
    assert result.diverged is not None and why in result.diverged
    assert "its weights are most likely useless; lower the learning rate" in result.diverged
    steps = checkpoint_steps(tmp_path)
    assert steps[-2:] == [23, 24] and len(steps) in (3, 4)
    assert f"the checkpoint before that is {checkpoint_folder(tmp_path, steps[0])}" in result.diverged
    if rate < 1:
        good = restore_backbone(tmp_path, steps[0], backbone=toy())
        assert steps[0] == 5 and all(bool(parameter.any()) for parameter in good.model.parameters())
    assert sum("the run diverges" in sentence for sentence in reporter.sentences) == 1
    # Resuming keeps the verdict, and an export warns.
    assert run_toy(tmp_path, config, backbone=toy(), resume=True).diverged is not None


def test_skipped_steps_are_bounded_by_their_share(tmp_path: Path) -> None:
    def pairs(wrong: int) -> MemoryPairs:
        made = MemoryPairs(24)
        made.wrong = set(range(wrong))
        return made

    config = toy_config(optimizer={"steps": 12}, run={"checkpoint_every": 1, "keep": 1})
    with pytest.raises(NonFiniteError, match=r"and 3 steps were skipped already \(run\.max_skipped_share\)"):
        run_toy(tmp_path / "a", config, pairs=pairs(24))
    one = run_toy(tmp_path / "b", toy_config(optimizer={"steps": 6}, run={"keep": 1}), pairs=pairs(1))
    assert one.skipped_steps == 1 and one.diverged is None
    # The checkpoint from before the skipped step stays to the end.
    (line,) = [json.loads(text) for text in (tmp_path / "b" / "nonfinite.jsonl").read_text().splitlines()]
    assert {line["step"] - 1, 6} <= {*checkpoint_steps(tmp_path / "b"), 0}
    half = toy_config(optimizer={"steps": 12}, run={"max_skipped_share": 0.5})
    assert run_toy(tmp_path / "c", half, pairs=pairs(1)).skipped_steps == 2


def test_the_command_ends_with_status_1_after_a_run_that_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_toy(tmp_path, toy_config(optimizer={"steps": 1}))
    result.diverged = "the run diverged: the loss is 99"
    monkeypatch.setattr("ttd_plugins.fine_tuning.fine_tune", lambda *_, **__: result)
    found = CliRunner().invoke(cli.app, ["train", "--backbone", "open_clip:tiny", "--out", str(tmp_path)])
    assert found.exit_code == 1 and "warning: the run diverged: the loss is 99" in found.output


# Two processes, signals ----------------------------------------------------------------------------------------------

SLOW = """
import sys
from pathlib import Path
from helpers_training import run_on_folder
from ttd_plugins.errors import TTDError
from ttd_plugins.training.stop_signals import TrainingStoppedError
try:
    run_on_folder(Path(sys.argv[1]), Path(sys.argv[2]), slowly=0.1)
except TrainingStoppedError as stopped:
    sys.exit(stopped.status)
except TTDError as error:
    print(error)
    sys.exit(2)
"""


# A test suite that was started under nohup hands on that SIGHUP is ignored.
HANGS_UP = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"


def wait_for_checkpoint(out: Path, process: Any) -> None:
    until = time.monotonic() + 120
    while not checkpoint_steps(out) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert checkpoint_steps(out)


def test_a_second_process_is_refused_and_sighup_saves(tmp_path: Path) -> None:
    pairs, out = make_pairs(tmp_path / "pairs"), tmp_path / "out"
    run_on_folder(pairs, tmp_path / "whole")
    first = started([sys.executable, "-c", HANGS_UP + SLOW, str(pairs), str(out)])
    wait_for_checkpoint(out, first)
    with pytest.raises(InputError, match=rf"another process, {first.pid} .* is writing the folder"):
        run_on_folder(pairs, out)
    first.send_signal(signal.SIGHUP)
    _, errors = first.communicate()
    assert first.returncode == 129, errors
    run_on_folder(pairs, out)
    lines = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines)) == [line["step"] for line in log_of(tmp_path / "whole")]


def test_a_terminal_that_closes_does_not_lose_the_run(tmp_path: Path) -> None:
    pairs, out = make_pairs(tmp_path / "pairs"), tmp_path / "out"
    ours, theirs = pty.openpty()
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    # The child makes the terminal its own, so that its closing sends SIGHUP.
    own = HANGS_UP + "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", own + SLOW, str(pairs), str(out)],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    os.close(theirs)
    wait_for_checkpoint(out, process)
    before = checkpoint_steps(out)
    os.close(ours)
    assert process.wait(120) == 129
    assert checkpoint_steps(out)[-1] >= before[-1]
    read_checkpoint(out)


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(lambda sentence: None) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_message_that_cannot_be_shown_does_not_end_the_run(tmp_path: Path) -> None:
    class Gone(Reporter):
        def on_message(self, sentence: str) -> None:
            raise OSError(5, "Input/output error")

        def on_step(self, step: int, loss: float) -> None:
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingStoppedError, match="stopped by SIGTERM after step 2"):
        run_toy(tmp_path, reporter=Gone())


def test_a_signal_within_a_write_to_the_same_stream_is_received() -> None:
    """A buffered stream refuses a write within a write with RuntimeError."""

    class Interrupted(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, content: Any) -> int:
            if not seen:
                seen.append(bytes(content))
                os.kill(os.getpid(), signal.SIGTERM)
            return len(content)

    seen: list[bytes] = []
    stream = io.BufferedWriter(Interrupted())
    with StopSignals(lambda sentence: print(stream.write(sentence.encode()))) as signals:
        stream.write(b"a line")
        stream.flush()
    assert signals.received == signal.SIGTERM and seen == [b"a line"]


# Workers -------------------------------------------------------------------------------------------------------------


def children() -> list[int]:
    import multiprocessing

    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def run_with_workers(pairs: Path, out: Path, reporter: Any = None, **sections: Any) -> Any:
    config = toy_config(
        data={"source": str(pairs), "workers": 2},
        optimizer={"steps": 40},
        run={"checkpoint_every": 0, "log_every": 5},
        **sections,
    )
    return train_run(config, out, backbone=toy(dropout=0.3), resume=True, reporter=reporter)


@pytest.mark.parametrize("moment", ["in a step", "in a step, both", "while saving"])
def test_a_killed_worker_is_one_sentence_and_a_checkpoint(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kill(Reporter):
        def on_step(self, step: int, loss: float) -> None:
            if step == 2 and moment != "while saving":
                for child in children()[: 2 if "both" in moment else 1]:
                    os.kill(child, signal.SIGKILL)
                # The signal of the child's end arrives here, far from any read.
                for _ in range(50):
                    time.sleep(0.002)

    if moment == "while saving":
        write = checkpoints.flush_to_disk

        def killing(path: Path) -> None:
            for child in children():
                os.kill(child, signal.SIGKILL)
            time.sleep(0.05)
            write(path)

        monkeypatch.setattr(checkpoints, "flush_to_disk", killing)
    sections = {"ttd": {"rule": "minmax"}}
    pairs = make_pairs(tmp_path / "pairs", 40)
    if moment == "while saving":
        monkeypatch.setattr(
            "ttd_plugins.training.checkpoint_manager.CheckpointManager.is_due", lambda self, state: True
        )
    with pytest.raises(TTDError, match=r"a worker process that decodes images of .* was killed") as caught:
        run_with_workers(pairs, tmp_path / "out", Kill(), **sections)
    assert "\n" not in str(caught.value)
    assert checkpoint_steps(tmp_path / "out")
    read_checkpoint(tmp_path / "out")
    monkeypatch.undo()
    assert run_with_workers(pairs, tmp_path / "out", **sections).step == 40


@pytest.mark.slow
def test_workers_killed_at_many_moments_are_always_one_sentence(tmp_path: Path) -> None:
    import random
    import threading

    pairs, moments = make_pairs(tmp_path / "pairs", 40), random.Random(0)
    killed = 0
    for number in range(40):
        out = tmp_path / f"out-{number}"

        def kill(seconds: float = moments.uniform(0.0, 0.4)) -> None:
            until = time.monotonic() + 20
            while not children() and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(seconds)
            for child in children()[:1]:
                os.kill(child, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        sentence = ""
        try:
            run_with_workers(pairs, out)
        except TTDError as error:
            sentence = str(error)
        thread.join()
        killed += bool(sentence)
        assert not sentence or ("was killed" in sentence and "\n" not in sentence)
        for step in checkpoint_steps(out):
            read_checkpoint(out, step)
        assert run_with_workers(pairs, out).step == 40
    assert killed > 10


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["forward", "optimizer"])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_is_one_sentence_and_a_checkpoint(where: str, error: Exception, tmp_path: Path) -> None:
    backbone, calls = toy(dropout=0.3), [0]

    def fail(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise error

    config = toy_config(optimizer={"steps": 4}, run={"checkpoint_every": 0})
    if where == "forward":
        backbone.model.patch.register_forward_pre_hook(fail)
    else:
        torch.optim.AdamW.step, original = (
            lambda self, *more: (fail(), original(self, *more))[1],
            torch.optim.AdamW.step,
        )
    try:
        with pytest.raises(TTDError, match=r"memory ran out in step \d .*lower optimizer\.batch_size") as caught:
            run_toy(tmp_path, config, backbone=backbone)
    finally:
        if where == "optimizer":
            torch.optim.AdamW.step = original
    assert "\n" not in str(caught.value)
    # A step of the optimizer that was interrupted may have changed half of the weights, so it is not saved.
    assert bool(checkpoint_steps(tmp_path)) == (where == "forward")
    if where == "forward":
        whole = run_toy(tmp_path / "whole", config)
        assert_same(weights_of(run_toy(tmp_path, config, resume=True)), weights_of(whole))
