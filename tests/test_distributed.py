"""Two processes that train together, over gloo on the CPU, are one process with the joint batch."""

from __future__ import annotations

import atexit
import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="needs the extra 'train'")

import torch
import torch.multiprocessing
from helpers_training import MemoryPairs, free_port, join, log_of, run_toy, toy_config, two_processes
from toy_backbone import toy, toy_images

from ttd_plugins.engine import TTD, TTDOutput
from ttd_plugins.training.stop_signals import TrainingStoppedError
from ttd_plugins.utils import distributed

# The last caption is that of another process again.
CAPTIONS = ["a dog on grass", "red kite and blue sky", "the", "one owl", "", "cat boat lamp", "One  owl"]
GROUPS = ["a", "b", "a", "c", "d", "b", "e"]
SPLITS = {"even": 4, "uneven": 6, "lopsided": 1}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "weights": {"rejected_weight": 0.3, "distance": "mse", "tag_weight": 2.0, "threshold": 0.4137},
    "tags alone": {"distill_weight": 0.0, "contrastive_weight": 0.0},
    "frozen teacher": {"teacher": "frozen", "rule": "absolute", "threshold": 0.1137},
    "embeddings anchored": {"anchor_weight": 2.0},
    "similarities anchored": {"anchor_weight": 2.0, "anchor": "similarities", "teacher": "frozen"},
}


def found(ttd: TTD, output: TTDOutput) -> dict[str, Any]:
    """The loss, its parts and the whole gradient, averaged over the processes as data-parallel training does."""
    ttd.zero_grad(set_to_none=True)
    output.loss.backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in ttd.parameters()]
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    return {
        "loss": output.loss.item(),
        "parts": {name: part.item() for name, part in output.losses.items()},
        "gradient": distributed.summed(whole) / distributed.process_count(),
    }


def engine_cases(rank: int, *, alone: bool) -> dict[str, Any]:
    """Every case on this process' share of the batch, or on all of it."""
    results = {}
    for sigmoid in (False, True):
        for split, first in SPLITS.items():
            for case, options in CASES.items():
                for groups in (None, GROUPS):
                    ttd = TTD(toy(3, dtype=torch.float64, sigmoid=sigmoid), **options)
                    with torch.no_grad():
                        for parameter in ttd.parameters():  # away from the frozen model
                            parameter.mul_(1 + 0.1 * torch.arange(parameter.numel()).sin().view_as(parameter))
                    images = toy_images(len(CAPTIONS), seed=1).double()
                    mine = slice(None) if alone else slice(0, first) if rank == 0 else slice(first, None)
                    output = ttd(images[mine], CAPTIONS[mine], groups=groups and groups[mine])
                    results[f"{sigmoid} {split} {case} {groups is not None}"] = found(ttd, output)
    return results


def pairs(rank: int, processes: int) -> MemoryPairs:
    made = MemoryPairs(24, 8 // processes, rank=rank, world_size=processes)
    made.siblings = 3
    # A picture in the share of the second process.
    made.wrong = {torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()[13]}
    return made


def train_cases(out: Path, rank: int, processes: int) -> dict[str, Any]:
    size = {"batch_size": 8 // processes}
    config = toy_config(optimizer=size | {"steps": 5})
    result = run_toy(out / "whole", config, pairs=pairs(rank, processes), backbone=toy())
    weights = {name: value.clone() for name, value in result.backbone.model.state_dict().items()}
    results: dict[str, Any] = {"weights": weights, "skipped": result.skipped_steps}
    if processes == 1:
        return results
    # Only one process is told to stop, in the middle of the run.
    stopped = pairs(rank, processes)
    if rank == 1:
        stopped.on_batch = lambda epoch, batch: os.kill(os.getpid(), signal.SIGTERM) if batch == 2 else None
    rarely = toy_config(optimizer=size | {"steps": 5}, run={"checkpoint_every": 0})
    try:
        run_toy(out / "stopped", rarely, pairs=stopped, backbone=toy())
    except TrainingStoppedError as error:
        results["status"] = error.status
    resumed = run_toy(out / "stopped", rarely, pairs=pairs(rank, processes), backbone=toy(), resume=True)
    results["resumed"] = {name: value.clone() for name, value in resumed.backbone.model.state_dict().items()}
    return results


def process(rank: int, port: int, out: str) -> None:
    join(rank, port)
    torch.save(engine_cases(rank, alone=False), f"{out}/engine-{rank}.pt")
    torch.save(train_cases(Path(out), rank, 2), f"{out}/train-{rank}.pt")
    distributed.end_process(0)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_processes(process, tmp_path_factory.mktemp("two"))


def test_loss_and_gradient_are_those_of_the_joint_batch(out: Path) -> None:
    expected = engine_cases(0, alone=True)
    for rank in range(2):
        results = torch.load(out / f"engine-{rank}.pt", weights_only=True)
        assert results.keys() == expected.keys()
        for name, one in results.items():
            assert one["loss"] == pytest.approx(expected[name]["loss"], rel=1e-10), name
            assert one["parts"] == pytest.approx(expected[name]["parts"], rel=1e-10), name
            whole = expected[name]["gradient"]
            assert float((one["gradient"] - whole).norm()) <= 1e-9 * float(whole.norm()), name
    # The cases would tell: groups and the split of the batch matter to what is compared.
    assert expected["False even defaults True"]["loss"] != expected["False even defaults False"]["loss"]
    assert len({round(one["loss"], 9) for one in expected.values()}) >= 2 * len(CASES)


def test_training_by_two_is_training_by_one(out: Path, tmp_path: Path) -> None:
    expected = train_cases(tmp_path, 0, 1)
    log = log_of(tmp_path / "whole")
    assert [line["step"] for line in log if "loss" not in line] == [2, 4]
    for rank in range(2):
        found = torch.load(out / f"train-{rank}.pt", weights_only=True)
        assert found["skipped"] == expected["skipped"] == 2
        for name, value in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-4, atol=1e-6)
    for line, other in zip(log_of(out / "whole"), log, strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    spoiled = (out / "whole" / "nonfinite.jsonl").read_text()
    assert spoiled == (tmp_path / "whole" / "nonfinite.jsonl").read_text()


def test_one_process_that_is_stopped_stops_both_and_both_go_on_bitwise(out: Path) -> None:
    for rank in range(2):
        found = torch.load(out / f"train-{rank}.pt", weights_only=True)
        assert found["status"] == 143
        assert all(torch.equal(value, found["weights"][name]) for name, value in found["resumed"].items())
    assert log_of(out / "stopped") == log_of(out / "whole")


def test_without_gradient_a_batch_stands_alone_and_one_process_needs_no_group() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    assert distributed.gather_rows(rows) is rows
    assert distributed.process_count() == 1 and distributed.gathered("a") == ["a"]
    assert distributed.joint_mean(torch.tensor(6.0), torch.tensor(4.0)).item() == 1.5
    assert distributed.joint_mean(torch.tensor(0.0), torch.tensor(0.0)).item() == 0.0


def end_with(rank: int, port: int, status: int) -> None:
    join(rank, port)
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    atexit.register(os._exit, 77)  # the interpreter is not taken down while gloo's threads run
    print("said before the end")
    distributed.end_process(status if rank else 0)


@pytest.mark.parametrize("status", [0, 5])
def test_a_process_of_several_ends_with_its_status_and_one_alone_goes_on(
    status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    distributed.end_process(3)
    context = torch.multiprocessing.spawn(end_with, args=(free_port(), status), nprocs=2, join=False)
    for process in context.processes:
        process.join(300)
    # The first is not kept waiting by one that failed.
    assert [process.exitcode for process in context.processes] == [0, status]
    assert capfd.readouterr().out.count("said before the end") == 2


def test_groups_are_told_apart_by_their_names() -> None:
    names = ["a", "b", "a", "", "ß", "\ud800"]
    numbers = distributed.group_numbers(names, torch.device("cpu"))
    assert numbers.dtype == torch.int64
    assert (numbers[:, None] == numbers).tolist() == [[one == other for other in names] for one in names]
