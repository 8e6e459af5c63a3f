"""Pairs in memory behind the protocol of loaders, a toy that can be tuned, and short runs of it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor
from toy_backbone import ToyAdapter, toy, toy_images

from ttd_plugins.training.config import TrainConfig
from ttd_plugins.training.reporting import Reporter
from ttd_plugins.training.run import TrainResult, train_run

WORDS = "dog cat kite owl grass sky tree boat lamp red blue old small".split()


@dataclass
class Batch:
    images: Tensor
    captions: list[str]
    tags: list[list[str]] | None
    keys: list[str]
    groups: list[str]


def caption_of(number: int) -> str:
    return " ".join(WORDS[(number * step + step) % len(WORDS)] for step in range(1, 2 + number % 4))


class MemoryPairs:
    """Batches of generated pairs, shuffled anew in every epoch; a position is the number of batches that are done.

    Attributes:
        wrong: numbers of pairs whose pixels are not finite.
        siblings: how many consecutive pairs show one image.
        on_batch: called with (epoch, batch) before one is given.
    """

    def __init__(self, count: int = 24, batch_size: int = 4, *, rank: int = 0, world_size: int = 1) -> None:
        self.count, self.batch_size, self.rank, self.world_size = count, batch_size, rank, world_size
        self.wrong: set[int] = set()
        self.siblings = 1
        self.on_batch: Callable[[int, int], None] = lambda epoch, batch: None
        self.known = True
        self.asked: list[tuple[int, Any]] = []

    def batches_per_epoch(self) -> int | None:
        return self.count // (self.batch_size * self.world_size) if self.known else None

    def batch(self, numbers: list[int]) -> Batch:
        images = torch.stack([toy_images(1, seed=number // self.siblings)[0] for number in numbers])
        for row, number in enumerate(numbers):
            if number in self.wrong:
                images[row] = torch.nan
        return Batch(
            images,
            [caption_of(number) for number in numbers],
            None,
            [f"pair-{number}" for number in numbers],
            [f"image-{number // self.siblings}" for number in numbers],
        )

    def epoch(self, epoch: int, start: Any = None) -> Iterator[tuple[Batch, int]]:
        self.asked.append((epoch, start))
        # Draws from the global generator, as making a DataLoader does.
        torch.empty((), dtype=torch.int64).random_()
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(epoch)).tolist()
        joint = self.batch_size * self.world_size
        for number in range(start or 0, self.count // joint):
            self.on_batch(epoch, number)
            mine = order[number * joint + self.rank * self.batch_size :][: self.batch_size]
            yield self.batch(mine), number + 1


def toy_config(**sections: dict[str, Any]) -> TrainConfig:
    """Full fine-tuning of a toy for 10 steps, logged and saved at every one."""
    values: dict[str, Any] = {
        "towers": {"image": "full", "text": "full"},
        "optimizer": {"steps": 10, "batch_size": 4, "learning_rate": 0.01, "warm_up": 2},
        "run": {"log_every": 1, "checkpoint_every": 1, "keep": 100, "cpu": True},
    }
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    return TrainConfig.from_dict(values)


def run_toy(
    out: Path,
    config: TrainConfig | None = None,
    *,
    pairs: MemoryPairs | None = None,
    backbone: ToyAdapter | None = None,
    **more: Any,
) -> TrainResult:
    backbone = toy(dropout=0.3) if backbone is None else backbone
    return train_run(config or toy_config(), out, backbone=backbone, loader=pairs or MemoryPairs(), **more)


def run_on_folder(pairs: Path, out: Path, *, slowly: float = 0.0) -> TrainResult:
    """A toy tuned on a folder of pictures, on from where it stopped; ``slowly`` seconds go by after each step."""

    class Slow(Reporter):
        def on_step(self, step: int, loss: float) -> None:
            time.sleep(slowly)

    config = toy_config(
        data={"source": str(pairs)}, optimizer={"steps": 12}, run={"log_every": 2, "checkpoint_every": 3, "keep": 2}
    )
    return train_run(config, out, backbone=toy(dropout=0.3), resume=True, reporter=Slow())


TIMES = {"images_per_second", "seconds_per_step", "data_seconds_per_step"}


def log_of(out: Path) -> list[dict[str, Any]]:
    """The lines of the log without what a clock decides."""
    from ttd_plugins.training.jsonl_log import JsonlLog

    return [{k: v for k, v in line.items() if k not in TIMES} for line in JsonlLog(out / "log.jsonl").read()]


def weights_of(result: TrainResult) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in result.backbone.model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def join(rank: int, port: int) -> None:
    """Make this process the one of that number among two that meet over gloo."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def two_processes(process: Callable[[int, int, str], None], folder: Path) -> Path:
    """Run ``process(rank, port, folder)`` in two processes that find each other at the port; gives the folder."""
    torch.multiprocessing.spawn(process, args=(free_port(), str(folder)), nprocs=2)
    return folder
