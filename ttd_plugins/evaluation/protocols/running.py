"""What every protocol does the same: resume after an interruption, share the work, show progress, and write results.

The figures of a protocol are functions of records, one for each picture, which are appended to a file as they are made.
Whatever was stopped is taken up at the pictures that have no record yet; several processes (``rank`` of ``world``)
write files of their own into one folder, and the one that finds every picture done writes ``results.json``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttd_plugins._version import __version__
from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.utils.progress import Stage, no_progress

Record = dict[str, Any]


@dataclass(frozen=True)
class EvaluationResult:
    """What a protocol found, with enough to repeat it.

    Attributes:
        protocol: ``"tags"``, ``"text"`` or ``"segment"``.
        settings: every option, the backbone with a hash of its weights, and the data set.
        figures: the metrics by name, or ``None`` while other processes still have pictures to do.
        done, images: pictures with a record, and pictures in all.
        seconds_per_image: mean wall time a picture, reading included.
        peak_memory_bytes: the most that any process held: resident memory, or device memory on a GPU.
        environment: versions and machine.
        path: ``results.json``, or ``None`` where nothing was written.
    """

    protocol: str
    settings: dict[str, Any]
    figures: dict[str, Any] | None
    done: int
    images: int
    seconds_per_image: float
    peak_memory_bytes: int
    environment: dict[str, str]
    path: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; NaN, which JSON has not, becomes null."""
        return _plain(asdict(self) | {"path": str(self.path) if self.path else None})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return _plain(asdict(value)) if is_dataclass(value) and not isinstance(value, type) else value


def process_place() -> tuple[int, int]:
    """Rank and world size as torchrun and accelerate set them (``RANK``, ``WORLD_SIZE``); ``(0, 1)`` without them.

    Raises:
        InputError: they are no numbers that fit together.
    """
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise InputError(f"RANK and WORLD_SIZE must be numbers: {one_sentence(error)}") from error
    return rank, world


def weights_hash(adapter: DenseAdapter) -> str:
    """Sixteen digits of the SHA-256 of all parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter.model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_backbone(adapter: DenseAdapter) -> dict[str, Any]:
    """What repeats a backbone: its name, dense mode, calibration and a hash of its weights."""
    description = adapter.description
    return {
        "name": description.name,
        "dense_mode": description.dense_mode,
        "calibration": asdict(description.calibration),
        "weights_sha256": weights_hash(adapter),
    }


def pack(vector: Tensor) -> str:
    """A float32 vector as text."""
    return base64.b64encode(vector.detach().float().cpu().numpy().astype("<f4").tobytes()).decode()


def unpack(texts: Sequence[str]) -> Tensor:
    """Vectors ``[N, D]`` of texts that :func:`pack` made."""
    return torch.from_numpy(np.stack([np.frombuffer(base64.b64decode(text), "<f4") for text in texts]))


class _Records:
    """The records of a run, in files of a folder or in memory."""

    def __init__(self, out: Path | None, settings: dict[str, Any], rank: int) -> None:
        self.out, self._memory = out, list[Record]()
        if out is None:
            return
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._agree(out / "settings.json", settings)
        except OSError as error:
            raise InputError(f"results cannot be written to {str(out)!r}: {one_sentence(error)}") from error
        self._own = out / f"images-{rank}.jsonl"
        _cut_unfinished(self._own)

    def _agree(self, file: Path, settings: dict[str, Any]) -> None:
        if file.is_file():
            try:
                before = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{str(file)!r} cannot be read; give another folder: {one_sentence(error)}") from error
            different = sorted(k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k))
            if different:
                raise InputError(
                    f"the folder {str(file.parent)!r} holds results with other settings ({different[0]}: "
                    f"{json.dumps(before.get(different[0]))[:120]} there, "
                    f"{json.dumps(settings.get(different[0]))[:120]} now); give another folder or empty it"
                )
            return
        _write_whole(file, settings)

    def add(self, record: Record) -> None:
        if self.out is None:
            self._memory.append(record)
            return
        with self._own.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record), separators=(",", ":")) + "\n")

    def __iter__(self) -> Iterator[Record]:
        """Records of all processes, each picture once."""
        if self.out is None:
            yield from self._memory
            return
        seen: set[str] = set()
        for path in sorted(self.out.glob("images-*.jsonl")):
            with path.open(encoding="utf-8") as file:
                for line in file:
                    # Another process may be writing its last line.
                    if not line.endswith("\n"):
                        continue
                    record = json.loads(line)
                    if record["key"] not in seen:
                        seen.add(record["key"])
                        yield record


def _cut_unfinished(file: Path) -> None:
    """Take off a last line that an interruption left half written."""
    if file.is_file():
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            with file.open("r+b") as stream:
                stream.truncate(whole)


def _write_whole(file: Path, content: Any) -> None:
    """Write JSON such that nobody ever reads half of it."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, file)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of the device's memory on a GPU, resident ones elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # The unit is a kilobyte on Linux and a byte on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_protocol(
    protocol: str,
    adapter: DenseAdapter,
    keys: Sequence[str],
    one: Callable[[str], Record],
    summarise: Callable[[Iterable[Record]], dict[str, Any]],
    settings: dict[str, Any],
    *,
    check: Callable[[Sequence[str], Callable[[int], None]], None],
    prepare: Callable[[], object] | None = None,
    out: Path | str | None = None,
    rank: int = 0,
    world: int = 1,
    stage: Stage | None = None,
) -> EvaluationResult:
    """Make a record of every picture, and figures of the records.

    Args:
        protocol: its name.
        adapter: the backbone, whose device is asked for its memory.
        keys: the pictures.
        one: the record of a picture, without its key and time.
        summarise: figures of an iterable of records; it may hold no more of them than it needs.
        settings: what makes two runs the same.
        check: looks at the files of the pictures that this process will do, before any is computed.
        prepare: called once between the check and the first picture; its time is no picture's.
        out: folder of the records and ``results.json``; ``None`` keeps everything in memory.
        rank, world: this process does every ``world``-th picture, starting at ``rank``.
        stage: announces stages, for progress bars.

    Raises:
        InputError: the folder holds results of other settings or cannot be written, or rank and world do not fit.
        DatasetError: the data are not as their reader expects.
    """
    if not 0 <= rank < world:
        raise InputError(f"rank must be from 0 to {world - 1} of {world} processes, not {rank}")
    if world > 1 and out is None:
        raise InputError("several processes meet in a folder; give one with out (--out)")
    stage = stage or no_progress
    settings = _plain(settings)
    records = _Records(Path(out) if out is not None else None, settings, rank)
    wanted = frozenset(keys)
    done = {record["key"] for record in records} & wanted
    pending = [key for key in keys[rank::world] if key not in done]
    if pending:
        check(pending, stage("check files", len(pending)))
        if prepare is not None:
            prepare()
        advance = stage(f"{protocol}: images", len(pending))
        for key in pending:
            start = time.perf_counter()
            with torch.no_grad():
                record = one(key)
            seconds = time.perf_counter() - start
            records.add({"key": key, "seconds": seconds, "peak": peak_memory(adapter.device), **record})
            advance(1)
    cost = [(r["seconds"], r["peak"], r["key"]) for r in records if r["key"] in wanted]
    complete = len(cost) == len(wanted)
    result = EvaluationResult(
        protocol,
        settings,
        summarise(r for r in records if r["key"] in wanted) if complete else None,
        len(cost),
        len(wanted),
        float(np.mean([seconds for seconds, _, _ in cost])) if cost else float("nan"),
        max((peak for _, peak, _ in cost), default=0),
        {
            "ttd_plugins": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "device": _device_name(adapter.device),
        },
        Path(out) / "results.json" if out is not None and complete else None,
    )
    if result.path is not None:
        _write_whole(result.path, result.as_dict())
    return result


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"
