"""Runs that are stopped, broken and resumed: nothing is lost, and nothing differs from a run that was left alone."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="needs the extra 'train'")

import torch
from helpers_training import TIMES, MemoryPairs, assert_same, log_of, run_toy, toy_config, weights_of
from toy_backbone import toy

from ttd_plugins.errors import InputError, TTDError, UnsupportedModelError
from ttd_plugins.training import checkpoints
from ttd_plugins.training.checkpoints import checkpoint_steps, read_checkpoint, restore_backbone
from ttd_plugins.training.collapse_watch import CollapseWatch
from ttd_plugins.training.config import replaced
from ttd_plugins.training.reporting import Reporter
from ttd_plugins.training.run import NonFiniteError
from ttd_plugins.training.stop_signals import TrainingStoppedError


class Said(Reporter):
    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.stepped_to: list[int] = []

    def on_message(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def on_step(self, step: int, loss: float) -> None:
        self.stepped_to.append(step)


# Resuming ------------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {"optimizer": {"steps": 8}},
    "everything that has a state": {
        "optimizer": {"steps": 5, "accumulation": 2, "weight_decay": 0.1},
        "ttd": {"teacher": "ema", "ema_decay": 0.7},
        "towers": {"logit_scale": True},
        "run": {"log_every": 2},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_resumed_from_any_step_ends_bitwise_as_the_one_left_alone(variant: str, tmp_path: Path) -> None:
    config = toy_config(**VARIANTS[variant])
    steps = config.optimizer.steps
    assert steps is not None
    whole = run_toy(tmp_path / "whole", config)
    expected, log = weights_of(whole), log_of(tmp_path / "whole")
    assert checkpoint_steps(tmp_path / "whole") == list(range(1, steps + 1))
    for step in range(steps):
        out = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", out)
        for later in range(step + 1, steps + 1):
            shutil.rmtree(checkpoints.checkpoint_folder(out, later))
        # As killed in the middle of the next line and of the next checkpoint.
        with (out / "log.jsonl").open("a") as stream:
            stream.write('{"step": 9, "lo')
        (out / "checkpoints" / f"step-{step + 1:08d}.part").mkdir()
        pairs, rarely = MemoryPairs(), replaced(config, "run", checkpoint_every=0)
        left = checkpoints.read_state(out) if step else {"epoch": 0, "positions": [None]}
        resumed = run_toy(out, rarely, pairs=pairs, resume=True)
        assert_same(weights_of(resumed), expected)
        assert log_of(out) == log
        assert not list(out.rglob("*.part"))
        assert pairs.asked[0] == (left["epoch"], left["positions"][0])
        again, before = read_checkpoint(out), read_checkpoint(tmp_path / "whole")
        for one, other in zip(again.tensors().values(), before.tensors().values(), strict=True):
            assert_same(one, other)
        for state in (again.state, before.state):
            state["figures"] = {name: value for name, value in state["figures"].items() if name not in TIMES}
        assert again.state == before.state


def test_a_run_goes_on_only_when_asked_and_only_as_it_was(tmp_path: Path) -> None:
    config = toy_config(optimizer={"steps": 2})
    run_toy(tmp_path, config)
    with pytest.raises(InputError, match=r"has a run already; continue it with --resume, or choose another --out"):
        run_toy(tmp_path, config)
    with pytest.raises(InputError, match=r"optimizer\.batch_size differs from the configuration of the run in"):
        run_toy(tmp_path, toy_config(optimizer={"steps": 2, "batch_size": 2}), resume=True)
    # How it is watched may change, and a finished run has nothing left to do.
    reporter = Said()
    done = run_toy(tmp_path, toy_config(optimizer={"steps": 2}, run={"keep": 5}), resume=True, reporter=reporter)
    assert (done.step, reporter.stepped_to) == (2, [])
    assert done.figures["step"] == 2


def test_the_folder_of_a_run_holds_what_repeats_it(tmp_path: Path) -> None:
    from ttd_plugins.training.config import TrainConfig

    config = toy_config(optimizer={"steps": 3})
    first = run_toy(tmp_path / "a", config)
    again = run_toy(tmp_path / "b", TrainConfig.read(tmp_path / "a" / "config.yaml"))
    assert_same(weights_of(again), weights_of(first))
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    other = run_toy(tmp_path / "c", toy_config(optimizer={"steps": 3}, run={"seed": 1}))
    assert not all(torch.equal(v, weights_of(first)[k]) for k, v in weights_of(other).items())


def test_lora_is_saved_alone_and_comes_back_in_place(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    towers = {"image": "lora", "text": "frozen", "rank": 2, "dropout": 0.2}
    result = run_toy(tmp_path, toy_config(towers=towers, optimizer={"steps": 3}))
    kept = read_checkpoint(tmp_path).trained
    assert kept and all("lora_" in name and name.startswith("patch_head") for name in kept)
    assert set(kept) == {name for name, p in result.backbone.model.named_parameters() if p.requires_grad}
    restored = restore_backbone(tmp_path, backbone=toy(dropout=0.3))
    assert restored.has_lora and not restored.model.training
    assert_same(dict(restored.model.state_dict()), weights_of(result))
    earlier = restore_backbone(tmp_path, 1, backbone=toy(dropout=0.3))
    assert_same({n: p.detach() for n, p in earlier.model.named_parameters() if n in kept},
                read_checkpoint(tmp_path, 1).trained)  # fmt: skip
    with pytest.raises(InputError, match=r"no checkpoint of step 7; there are those of 1, 2, 3"):
        restore_backbone(tmp_path, 7, backbone=toy())
    with pytest.raises(InputError, match="no backbone is named"):
        restore_backbone(tmp_path)
    with pytest.raises(InputError, match=r"which has shape|which does not exist"):
        restore_backbone(tmp_path, backbone=toy(width=7))


def test_full_fine_tuning_of_one_tower_leaves_the_rest_alone_and_can_be_taken_back(tmp_path: Path) -> None:
    backbone = toy()
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    result = run_toy(tmp_path, toy_config(towers={"image": "frozen", "text": "full"}), backbone=backbone)
    text = {name for name, _ in backbone.tower_parameters("text")}
    moved = {name for name, value in weights_of(result).items() if not torch.equal(value, before[name])}
    assert moved == text
    backbone.unload()
    assert_same(dict(backbone.model.state_dict()), before)


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run_toy(tmp_path, toy_config(optimizer={"steps": 7}, run={"keep": 2, "checkpoint_every": 2}))
    assert checkpoint_steps(tmp_path) == [6, 7]


def test_checkpoints_come_by_the_clock_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter, time=time.time)
    monkeypatch.setattr("ttd_plugins.training.checkpoint_manager.time", clock)
    pairs = MemoryPairs()

    def a_second_each(epoch: int, batch: int) -> None:
        now[0] += 1.0

    pairs.on_batch = a_second_each
    by_clock = {"checkpoint_every": 0, "checkpoint_minutes": 3 / 60}
    timed = run_toy(tmp_path / "timed", toy_config(optimizer={"steps": 8}, run=by_clock), pairs=pairs)
    # The batch of the next step has been taken already, so the clock is one second ahead.
    assert checkpoint_steps(tmp_path / "timed") == [2, 5, 8]
    rarely = run_toy(tmp_path / "rarely", toy_config(optimizer={"steps": 8}, run={"checkpoint_every": 0}))
    assert checkpoint_steps(tmp_path / "rarely") == [8]
    assert_same(weights_of(timed), weights_of(rarely))


def test_epochs_become_steps_and_a_stream_of_unknown_length_asks_for_them(tmp_path: Path) -> None:
    config = toy_config(optimizer={"steps": None, "epochs": 2, "accumulation": 4})
    assert run_toy(tmp_path / "a", config, pairs=MemoryPairs(24)).step == 3
    stream = MemoryPairs()
    stream.known = False
    with pytest.raises(InputError, match="set the length of the training"):
        run_toy(tmp_path / "b", config, pairs=stream)
    empty = MemoryPairs(3)
    with pytest.raises(InputError, match="does not fill one batch of 4"):
        run_toy(tmp_path / "c", config, pairs=empty)
    with pytest.raises(InputError, match="epoch 1 of the data holds no batch"):
        run_toy(tmp_path / "d", toy_config(), pairs=empty)


# Signals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("loader_dies", [False, True])
def test_a_signal_saves_first_and_loses_nothing(
    number: signal.Signals, status: int, loader_dies: bool, tmp_path: Path
) -> None:
    config = toy_config(optimizer={"steps": 5, "accumulation": 2}, run={"checkpoint_every": 100})
    whole = run_toy(tmp_path / "whole", config)
    pairs, asked = MemoryPairs(), []

    def on_batch(epoch: int, batch: int) -> None:
        asked.append(batch)
        if len(asked) == 4:
            os.kill(os.getpid(), number)
            if loader_dies:
                raise RuntimeError("DataLoader worker exited unexpectedly")

    pairs.on_batch = on_batch
    before = signal.getsignal(number)
    with pytest.raises(
        TrainingStoppedError, match=r"stopped by SIG\w+ after step \d of 5; the checkpoint is"
    ) as caught:
        run_toy(tmp_path / "out", config, pairs=pairs)
    assert caught.value.status == status
    assert signal.getsignal(number) is before
    assert checkpoint_steps(tmp_path / "out") == [1 if loader_dies else 2]
    resumed = run_toy(tmp_path / "out", config, resume=True)
    assert_same(weights_of(resumed), weights_of(whole))
    assert log_of(tmp_path / "out") == log_of(tmp_path / "whole")


def test_no_batch_is_fetched_once_a_signal_came(tmp_path: Path) -> None:
    backbone, pairs, asked = toy(), MemoryPairs(), []
    pairs.on_batch = lambda epoch, batch: asked.append(batch)
    backbone.model.patch.weight.register_hook(lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingStoppedError, match="after step 1 of 5"):
        run_toy(tmp_path, toy_config(optimizer={"steps": 5}), pairs=pairs, backbone=backbone)
    assert asked == [0]


@pytest.mark.parametrize(("failing", "kept"), [(3, 1), (4, 2)])
def test_a_loader_that_fails_costs_no_step_that_was_done(failing: int, kept: int, tmp_path: Path) -> None:
    config = toy_config(optimizer={"steps": 5, "accumulation": 2}, run={"checkpoint_every": 100})
    whole = run_toy(tmp_path / "whole", config)
    pairs, asked = MemoryPairs(), []

    def on_batch(epoch: int, batch: int) -> None:
        asked.append(batch)
        if len(asked) == failing + 1:
            raise TTDError("the disk is gone")

    pairs.on_batch = on_batch
    with pytest.raises(TTDError, match="the disk is gone"):
        run_toy(tmp_path / "out", config, pairs=pairs)
    assert checkpoint_steps(tmp_path / "out") == [kept]
    assert_same(weights_of(run_toy(tmp_path / "out", config, resume=True)), weights_of(whole))


# Compiling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_what_a_run_compiles_is_taken_back_at_its_end(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    def compile_blocks(backbone: Any) -> Any:
        happened.append("compiled")
        return lambda: happened.append("taken back")

    monkeypatch.setattr("ttd_plugins.training.run.compile_image_blocks", compile_blocks)
    pairs = MemoryPairs()
    pairs.known = known
    steps = {} if known else {"steps": None}
    config = toy_config(optimizer={"steps": 2} | steps, run={"compile": True})
    if known:
        run_toy(tmp_path, config, pairs=pairs)
        run_toy(tmp_path, toy_config(optimizer={"steps": 2}), resume=True)
        assert happened == ["compiled", "taken back"]
    else:
        with pytest.raises(InputError, match="the number of pairs is not known"):
            run_toy(tmp_path, config, pairs=pairs)
        assert happened == []


def test_nothing_to_compile_is_told_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="nothing can be compiled"):
        run_toy(tmp_path, toy_config(run={"compile": True}))
    assert not (tmp_path / "config.yaml").exists()


# Disks that fail -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", range(14))
def test_a_checkpoint_whose_writing_fails_anywhere_leaves_the_last_one_whole(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(optimizer={"steps": 3})
    armed, calls = [False], [0]

    def failing(function: Any) -> Any:
        def run(*arguments: Any, **more: Any) -> Any:
            if armed[0]:
                calls[0] += 1
                if calls[0] == call + 1:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments, **more)

        return run

    import safetensors.torch

    monkeypatch.setattr(checkpoints, "flush_to_disk", failing(checkpoints.flush_to_disk))
    monkeypatch.setattr(safetensors.torch, "save_file", failing(safetensors.torch.save_file))
    monkeypatch.setattr(Path, "rename", failing(Path.rename))

    class Arm(Reporter):
        def on_step(self, step: int, loss: float) -> None:
            armed[0] = step == 2

    # Five files are saved, six are synced, and so are their folder and, after the rename, the one above.
    out = tmp_path / "out"
    with pytest.raises(InputError) as caught:
        run_toy(out, config, reporter=Arm())
    assert "\n" not in str(caught.value)
    assert "No space left on device" in str(caught.value) and "--resume" in str(caught.value)
    last = checkpoint_steps(out)[-1]
    # What was renamed before the failure is whole, too.
    assert last == (2 if call == 13 else 1)
    assert f"step-{last:08d}" in str(caught.value)
    for step in checkpoint_steps(out):
        read_checkpoint(out, step)
    armed[0] = False
    whole = run_toy(tmp_path / "whole", config)
    assert_same(weights_of(run_toy(out, config, resume=True)), weights_of(whole))
    assert log_of(out) == log_of(tmp_path / "whole")


def test_a_checkpoint_that_is_cut_short_or_foreign_is_refused_by_name(tmp_path: Path) -> None:
    run_toy(tmp_path, toy_config(optimizer={"steps": 1}))
    folder = checkpoints.checkpoint_folder(tmp_path, 1)
    whole = (folder / "trained.safetensors").read_bytes()
    (folder / "trained.safetensors").write_bytes(whole[:100])
    with pytest.raises(InputError, match=r"trained\.safetensors cannot be read"):
        restore_backbone(tmp_path, backbone=toy())
    (folder / "state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(InputError, match=r"not of checkpoint format 1"):
        read_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"is not the folder of a run"):
        restore_backbone(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"the folder .* cannot be made \(Not a directory\); choose another --out"):
        run_toy(tmp_path / "file" / "run")


def test_foreign_weights_are_tensors_or_refused(tmp_path: Path) -> None:
    good = {"a": torch.ones(2)}
    torch.save({"state_dict": good, "epoch": 3}, tmp_path / "good.pt")
    assert_same(checkpoints.read_foreign_weights(tmp_path / "good.pt"), good)

    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "owned"),))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"state_dict": {"a": Evil()}}, tmp_path / "evil2.pt")
    torch.save({"a": 3}, tmp_path / "numbers.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("evil.pt", "evil2.pt", "broken.safetensors"):
        with pytest.raises(InputError, match=r"is refused: |is damaged"):
            checkpoints.read_foreign_weights(tmp_path / name)
    assert not (tmp_path / "owned").exists()
    with pytest.raises(InputError, match="no named tensors"):
        checkpoints.read_foreign_weights(tmp_path / "numbers.pt")
    with pytest.raises(InputError, match="does not exist"):
        checkpoints.read_foreign_weights(tmp_path / "none.pt")


# What is not finite --------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_left_out_and_told_with_its_keys(tmp_path: Path) -> None:
    pairs = MemoryPairs(24)
    pairs.wrong = {7}
    reporter = Said()
    backbone = toy()
    result = run_toy(tmp_path, toy_config(optimizer={"steps": 6}), pairs=pairs, backbone=backbone, reporter=reporter)
    lines = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert len(lines) == result.skipped_steps == 1
    assert "pair-7" in lines[0]["keys"] and len(lines[0]["keys"]) == 4
    assert (lines[0]["what"], lines[0]["loss"]) == ("loss", "nan")
    assert all(bool(torch.isfinite(value).all()) for value in weights_of(result).values())
    assert any("skipped" in sentence and "nonfinite.jsonl" in sentence for sentence in reporter.sentences)
    log = log_of(tmp_path)
    step = lines[0]["step"]
    assert "loss" not in log[step - 1] and log[-1]["skipped_steps"] == 1
    # Nothing moved in that step, the moments of the optimiser included.
    before, after = (read_checkpoint(tmp_path, number) for number in (step - 1, step))
    assert_same(after.trained, before.trained)
    assert_same(after.optimizer, before.optimizer)


def test_a_loss_that_is_not_finite_in_a_part_of_a_step_leaves_out_all_of_it(tmp_path: Path) -> None:
    pairs = MemoryPairs(24)
    # In the third batch, with which the second step begins.
    pairs.wrong = {torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()[9]}
    config = toy_config(optimizer={"steps": 3, "accumulation": 2})
    result = run_toy(tmp_path, config, pairs=pairs)
    (line,) = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert (line["what"], line["step"], result.skipped_steps) == ("loss", 2, 1)
    before, after = (read_checkpoint(tmp_path, number) for number in (1, 2))
    assert_same(after.trained, before.trained)
    assert_same(after.optimizer, before.optimizer)
    assert all(bool(torch.isfinite(value).all()) for value in weights_of(result).values())


def test_a_gradient_that_is_not_finite_is_left_out_too(tmp_path: Path) -> None:
    backbone = toy()
    calls = [0]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return gradient * math.inf if calls[0] == 3 else gradient

    backbone.model.patch.weight.register_hook(spoil)
    result = run_toy(tmp_path, toy_config(optimizer={"steps": 5}), backbone=backbone)
    (line,) = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert (line["what"], line["step"], result.skipped_steps) == ("gradient", 3, 1)
    assert all(bool(torch.isfinite(value).all()) for value in weights_of(result).values())


def test_what_is_not_finite_may_be_fatal_and_the_state_before_it_is_kept(tmp_path: Path) -> None:
    def pairs() -> MemoryPairs:
        made = MemoryPairs(24)
        made.wrong = {7}
        return made

    config = toy_config(optimizer={"steps": 6}, run={"nonfinite": "fatal", "checkpoint_every": 0})
    backbone = toy(dropout=0.3)
    with pytest.raises(NonFiniteError, match=r"the loss of step \d is nan; the keys of its batch are in .*nonfinite"):
        run_toy(tmp_path / "a", config, pairs=pairs(), backbone=backbone)
    assert all(parameter.grad is None for parameter in backbone.parameters())
    skipping = toy_config(optimizer={"steps": 6}, run={"checkpoint_every": 0})
    resumed = run_toy(tmp_path / "a", skipping, pairs=pairs(), resume=True)
    assert_same(weights_of(resumed), weights_of(run_toy(tmp_path / "b", skipping, pairs=pairs())))
    limited = toy_config(optimizer={"steps": 30}, run={"max_skipped_steps": 2, "checkpoint_every": 0})
    with pytest.raises(NonFiniteError, match=r"and 2 steps were skipped already"):
        run_toy(tmp_path / "c", limited, pairs=pairs())


# What is watched -----------------------------------------------------------------------------------------------------


def test_a_collapse_is_told_once_until_it_is_over() -> None:
    watch = CollapseWatch()
    healthy = {"caption_map_spread": 0.4, "tags_per_caption": 3.0, "selected_per_caption": 1.5}
    assert watch.check(healthy) == []
    (flat,) = watch.check(healthy | {"caption_map_spread": 0.01})
    assert "nearly flat (spread of cosines 0.0100, at the start 0.4000)" in flat
    assert set(watch.as_dict()) == {"first_spread", "told"}, "checkpoints have these keys"
    assert CollapseWatch.from_dict(watch.as_dict()).check(healthy | {"caption_map_spread": 0.01}) == []
    assert watch.check(healthy) == [] and len(watch.check(healthy | {"caption_map_spread": 0.0})) == 1
    assert "hardly any tag" in CollapseWatch().check(healthy | {"selected_per_caption": 0.0})[0]
    assert "every tag is selected" in CollapseWatch().check(healthy | {"selected_per_caption": 3.0})[0]
    assert CollapseWatch().check(healthy | {"tags_per_caption": 1.0, "selected_per_caption": 1.0}) == []
    assert CollapseWatch().check({}) == []


def test_the_old_name_of_what_is_watched_warns() -> None:
    with pytest.warns(FutureWarning, match=r"CollapseWatch\(told=...\) is now CollapseWatch\(present=...\)"):
        watch = CollapseWatch(told=["flat"])
    with pytest.warns(FutureWarning, match=r"CollapseWatch\.told is now CollapseWatch\.present"):
        assert watch.told == watch.present == ["flat"]


def test_a_collapse_stands_in_the_log_in_the_result_and_after_resuming(tmp_path: Path) -> None:
    config = toy_config(optimizer={"steps": 3}, ttd={"rule": "absolute", "threshold": 1.0})
    result = run_toy(tmp_path, config)
    assert len(result.warnings) == 1 and "hardly any tag is selected" in result.warnings[0]
    assert [("warnings" in line) for line in log_of(tmp_path)] == [True, False, False]
    assert run_toy(tmp_path, config, resume=True).warnings == result.warnings


def test_evaluation_and_pictures_change_nothing_of_the_training(tmp_path: Path) -> None:
    plain = run_toy(tmp_path / "plain", toy_config(optimizer={"steps": 4}))
    calls: list[Any] = []

    def evaluate(ttd: Any, step: int) -> Mapping[str, float]:
        torch.rand(3)
        calls.append((step, ttd.backbone.model.training, torch.is_grad_enabled()))
        return {"iou": 0.25 * step}

    def draw(ttd: Any, step: int, folder: Path, samples: list[Any]) -> None:
        torch.rand(5)
        calls.append((step, folder.name, [(picture.size, caption) for picture, caption, _ in samples]))

    watched = toy_config(optimizer={"steps": 4}, run={"evaluate_every": 2, "heatmap_every": 2, "heatmap_samples": 2})
    pairs = MemoryPairs()
    result = run_toy(tmp_path / "watched", watched, pairs=pairs, evaluate=evaluate, draw=draw)
    assert_same(weights_of(result), weights_of(plain))
    assert pairs.asked == [(0, None)]
    assert result.backbone.model.training is False
    evaluations = [call for call in calls if len(call) == 3 and isinstance(call[1], bool)]
    assert evaluations == [(step, False, False) for step in (0, 2, 4)]
    drawn = [call for call in calls if isinstance(call[1], str)]
    assert [call[1] for call in drawn] == ["step-00000000", "step-00000002", "step-00000004"]
    assert drawn[0][2] == drawn[2][2] and len(drawn[0][2]) == 2
    lines = [line for line in log_of(tmp_path / "watched") if "evaluation" in line]
    assert [line["evaluation"] for line in lines] == [{"iou": 0.0}, {"iou": 0.5}, {"iou": 1.0}]


def test_figures_are_written_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run_toy(tmp_path, toy_config(optimizer={"steps": 2}, run={"trackers": ["tensorboard"]}))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "ttd"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2]
    with pytest.raises(TTDError, match="the tracker 'no_such_tracker' is not installed"):
        run_toy(tmp_path / "x", toy_config(run={"trackers": ["no_such_tracker"]}))


def test_what_cannot_be_tuned_so_is_told(tmp_path: Path) -> None:
    with pytest.raises(TTDError, match=r"patch\.weight has dtype bfloat16, which rounds small steps away"):
        run_toy(tmp_path / "a", backbone=toy(dtype=torch.bfloat16))
    with pytest.raises(UnsupportedModelError, match="has no switch for activation checkpointing"):
        run_toy(tmp_path / "b", toy_config(run={"gradient_checkpointing": True}))
    with pytest.raises(InputError, match="fp16 scales its loss on a GPU only"):
        run_toy(tmp_path / "c", toy_config(run={"mixed_precision": "fp16"}))


def test_mixed_precision_trains_in_bfloat16_and_keeps_float32(tmp_path: Path) -> None:
    plain = run_toy(tmp_path / "plain", toy_config(optimizer={"steps": 2}), backbone=toy())
    mixed = run_toy(
        tmp_path / "mixed", toy_config(optimizer={"steps": 2}, run={"mixed_precision": "bf16"}), backbone=toy()
    )
    first, second = log_of(tmp_path / "plain")[0]["loss"], log_of(tmp_path / "mixed")[0]["loss"]
    assert first != second and first == pytest.approx(second, rel=0.05)
    assert {value.dtype for value in weights_of(mixed).values()} == {
        value.dtype for value in weights_of(plain).values()
    }


def test_matrices_decay_and_vectors_do_not() -> None:
    from ttd_plugins.training.config import OptimizerConfig
    from ttd_plugins.training.trainable_parameters import parameter_groups

    model = toy().model
    matrices, rest = parameter_groups(model, OptimizerConfig(weight_decay=0.3))
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim > 1 for p in matrices["params"]) and all(p.ndim < 2 for p in rest["params"])
    assert len(matrices["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_batch_normalisation_with_frozen_weights_keeps_its_averages() -> None:
    from ttd_plugins.training.trainable_parameters import train_mode

    backbone = toy()
    backbone.model.frozen = torch.nn.BatchNorm1d(3).requires_grad_(False)
    backbone.model.tuned = torch.nn.BatchNorm1d(3)
    train_mode(backbone)
    assert (backbone.model.training, backbone.model.frozen.training, backbone.model.tuned.training) == (
        True,
        False,
        True,
    )


def test_a_file_that_the_system_refuses_to_grow_is_one_sentence_too(tmp_path: Path) -> None:
    """A failure that is the operating system's own, as where a quota ends."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limit(Reporter):
        def on_step(self, step: int, loss: float) -> None:
            if step == 2:  # lines of the log still fit, random states do not
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    config = toy_config(optimizer={"steps": 3})
    try:
        with pytest.raises(
            InputError, match=r"the checkpoint of step 2 cannot be written to .*File too large.*00000001"
        ):
            run_toy(tmp_path, config, reporter=Limit())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint_steps(tmp_path) == [1] and not list(tmp_path.rglob("*.part"))
    assert run_toy(tmp_path, config, resume=True).step == 3


# The call that users make --------------------------------------------------------------------------------------------


def test_fine_tune_shows_progress_draws_heat_maps_and_takes_what_users_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    from ttd_plugins import fine_tune

    run = {"heatmap_every": 2, "heatmap_samples": 2, "log_every": 2}
    config = toy_config(optimizer={"steps": 4}, run=run, ttd={"rule": "absolute", "threshold": 1.0}).as_dict()
    result = fine_tune(config, tmp_path / "run", backbone=toy(), loader=lambda backbone, rank, count: MemoryPairs())
    drawn = sorted(
        str(path.relative_to(tmp_path / "run" / "pictures")) for path in tmp_path.rglob("step-*/sample-*.png")
    )
    assert drawn == [f"step-{step:08d}/sample-{number}.png" for step in (0, 2, 4) for number in (1, 2)]
    said = capsys.readouterr().err
    assert (
        "step 4/4: loss" in said
        and "step 2/4: loss" in said
        and re.search(r"step 2/4: loss .*  \d:\d\d:\d\d left", said)
        and "images/second" in said
        and "hardly any tag is selected" in said
    )
    assert result.step == 4
    again = fine_tune(None, tmp_path / "run", backbone=toy(), loader=MemoryPairs(), resume=True, progress=False)
    assert_same(weights_of(again), weights_of(result))
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="there is no configuration"):
        fine_tune(None, tmp_path / "none", resume=True)
