"""The common runner of all protocols: it resumes, shares work between processes, shows progress and writes results.

The metrics of a protocol are computed from records, one per image, which are appended to a file. An interrupted run
resumes with the images that have no record yet. Several processes (``rank`` of ``world``) write separate files into one
folder, and the process that finds a record of every image writes ``results.json``.
"""

from __future__ import annotations

import base64
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttd_plugins._version import __version__
from ttd_plugins.adapter import Calibration, DenseAdapter
from ttd_plugins.engine import evaluation_mode
from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.evaluation.dense_inference import resampling
from ttd_plugins.evaluation.protocol_options import PROTOCOLS
from ttd_plugins.toolkit.fast_inference import inference_settings
from ttd_plugins.toolkit.weights_hash import weights_hash
from ttd_plugins.utils.configuration import plain_values
from ttd_plugins.utils.deprecation import RenamedAttribute
from ttd_plugins.utils.files import given_path, write_atomic
from ttd_plugins.utils.output_folder import LOCK, FolderKind, output_folder
from ttd_plugins.utils.progress import Stage, no_progress
from ttd_plugins.utils.settings import filled, first_difference

Record = dict[str, Any]


@dataclass(frozen=True)
class EvaluationResult:
    """Result of a protocol, with everything needed to repeat it.

    Attributes:
        protocol: ``"tags"``, ``"text"``, ``"segment"``, ``"classify"`` or ``"retrieval"``.
        settings: every option, the backbone with a hash of its weights, and the data set.
        metrics: the metrics by name, or ``None`` while other processes still have images to do.
        done, images: number of images with a record, and of all images.
        seconds_per_image: mean wall-clock time per image, including reading.
        peak_memory_bytes: peak memory over all processes: resident memory, or on a GPU allocated device memory; 0
            where the system does not report it, as Windows.
        environment: versions and machine.
        path: ``results.json``, or ``None`` if nothing was written.
    """

    protocol: str
    settings: dict[str, Any]
    metrics: dict[str, Any] | None
    done: int
    images: int
    seconds_per_image: float
    peak_memory_bytes: int
    environment: dict[str, str]
    path: Path | None = None

    figures = RenamedAttribute("metrics")

    def as_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON, as in ``results.json``: metrics are under ``"figures"``, NaN becomes null."""
        content = asdict(self) | {"path": str(self.path) if self.path else None}
        return _plain({"figures" if name == "metrics" else name: value for name, value in content.items()})


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
    """Return rank and world size from ``RANK`` and ``WORLD_SIZE``, which torchrun and accelerate set, or ``(0, 1)``.

    Raises:
        InputError: one of them is not an integer.
    """
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise InputError(f"RANK and WORLD_SIZE must be integers: {one_sentence(error)}") from error
    return rank, world


def describe_backbone(adapter: DenseAdapter) -> dict[str, Any]:
    """Return what identifies a backbone: its name, the run or LoRA, dense mode, calibration, a hash of its weights.

    The resampling of position embeddings is included if it is not the library's, and ``inference`` for a faster copy.
    """
    description = adapter.description
    # Only where there is one, so that older results stay comparable.
    source = {} if adapter.tuned_from is None else {"tuned_from": adapter.tuned_from.as_dict()}
    about = source | {
        "name": description.name,
        "dense_mode": description.dense_mode,
        "calibration": asdict(description.calibration),
        "weights_sha256": weights_hash(adapter),
    }
    inference = inference_settings(adapter)
    about |= {} if inference is None else {"inference": inference}
    return about if description.positions == "library" else about | {"positions": description.positions}


def run_settings(
    protocol: str, adapter: DenseAdapter, options: Any, calibration: Calibration, data: dict[str, Any]
) -> dict[str, Any]:
    """Return the settings that identify a run.

    Args:
        protocol: name of the protocol.
        adapter: the backbone.
        options: the protocol's options, a dataclass; options of dense inference are its field ``dense``.
        calibration: the calibration in use.
        data: description of the data set.
    """
    dense = getattr(options, "dense", None)
    with resampling(adapter, None if dense is None else dense.positions):
        backbone = describe_backbone(adapter)
    return {
        "protocol": protocol,
        "options": asdict(options),
        "calibration": asdict(calibration),
        "backbone": backbone,
        "data": data,
    }


def pack(vector: Tensor) -> str:
    """Encode a float32 vector as text."""
    return base64.b64encode(vector.detach().float().cpu().numpy().astype("<f4").tobytes()).decode()


def unpack(texts: Sequence[str]) -> Tensor:
    """Decode N texts from :func:`pack` to vectors ``[N, D]``."""
    return torch.from_numpy(np.stack([np.frombuffer(base64.b64decode(text), "<f4") for text in texts]))


def _with_defaults(settings: Any) -> Any:
    """Add the options that did not exist when settings were written, with their defaults."""
    if not isinstance(settings, dict) or settings.get("protocol") not in PROTOCOLS:
        return settings
    defaults = plain_values(PROTOCOLS[settings["protocol"]]())
    return settings | {"options": filled(settings.get("options"), defaults)}


class _Records:
    """The records of a run, in the files of a folder or in memory."""

    def __init__(self, out: Path | None, settings: dict[str, Any], rank: int) -> None:
        self.out, self._memory = out, list[Record]()
        if out is None:
            return
        self._require_settings(out / "settings.json", settings)
        self._own = out / f"images-{rank}.jsonl"
        try:
            _remove_incomplete_line(self._own)
        except OSError as error:
            raise InputError(f"results cannot be written to {str(out)!r}: {one_sentence(error)}") from error

    def _require_settings(self, file: Path, settings: dict[str, Any]) -> None:
        """Check that earlier records of the folder have the same settings; write them to a new folder."""
        if file.is_file():
            try:
                before = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise InputError(
                    f"{str(file)!r} cannot be read ({one_sentence(error)}); choose another folder"
                ) from error
            difference = first_difference(_with_defaults(before), settings)
            if difference is not None:
                raise InputError(
                    f"the folder {str(file.parent)!r} contains results with other settings ({difference}); choose "
                    "another folder or empty it"
                )
            return
        _write_json(file, settings)

    def add(self, record: Record) -> None:
        if self.out is None:
            self._memory.append(record)
            return
        try:
            with self._own.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_plain(record), separators=(",", ":")) + "\n")
        except OSError as error:
            raise InputError(
                f"{str(self._own)!r} cannot be written ({error.strerror or one_sentence(error)}); fix the cause and "
                "start it again, and it continues after the images that have a record"
            ) from error

    def __iter__(self) -> Iterator[Record]:
        """Yield the records of all processes, each image once."""
        if self.out is None:
            yield from self._memory
            return
        seen: set[str] = set()
        for path in sorted(self.out.glob("images-*.jsonl")):
            try:
                with path.open("rb") as file:
                    for line in file:
                        # Another process may still be writing this line.
                        if not line.endswith(b"\n"):
                            continue
                        record = _parse_record(path, line)
                        if record["key"] not in seen:
                            seen.add(record["key"])
                            yield record
            except OSError as error:
                raise InputError(
                    f"{str(path)!r} cannot be read ({error.strerror or one_sentence(error)}); fix the cause and start "
                    "it again"
                ) from error


def _parse_record(file: Path, line: bytes) -> Record:
    """The record of a line.

    Raises:
        InputError: it is none.
    """
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record["key"], str):
            raise ValueError("it is not the record of an image")
    except (ValueError, KeyError, RecursionError) as error:
        raise InputError(
            f"a line of {str(file)!r} is damaged ({one_sentence(error, 100)}); delete that line, and the image is "
            "measured again"
        ) from error
    return record


def _is_earlier_evaluation(folder: Path) -> bool:
    """Whether a folder was written by a release without markers."""
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and {"protocol", "options", "backbone", "data"} <= settings.keys()


EVALUATION_FOLDER = FolderKind("evaluation", "the folder of ttd eval", _is_earlier_evaluation)


def _remove_incomplete_line(file: Path) -> None:
    """Remove a last line that an interruption left incomplete."""
    if file.is_file():
        content = file.read_bytes()
        end = content.rfind(b"\n") + 1
        if end != len(content):
            with file.open("r+b") as stream:
                stream.truncate(end)


def _write_json(file: Path, content: Any) -> None:
    write_atomic(file, json.dumps(content, indent=1, allow_nan=False) + "\n")


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: allocated device memory on a GPU, otherwise resident memory.

    Systems without the module ``resource``, such as Windows, do not report resident memory: 0 there.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return 0
    # The unit is a kilobyte on Linux and a byte on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def checked(data: Any) -> Callable[[Sequence[str], Callable[[int], None]], None]:
    """Return the check of a data set before its evaluation: its files, then that there is something to measure."""

    def check(keys: Sequence[str], progress: Callable[[int], None]) -> None:
        data.check(keys, progress)
        data.require_truth()

    return check


def require_truth(metrics: dict[str, Any], count: float, missing: str) -> dict[str, Any]:
    """Return metrics, unless there was nothing to measure.

    Args:
        metrics: the metrics.
        count: how much truth they are based on.
        missing: what there is none of, for the message.

    Raises:
        InputError: ``count`` is zero.
    """
    if not count:
        raise InputError(f"nothing can be measured: {missing}; check that annotations and images belong together")
    return metrics


def run_protocol(
    protocol: str,
    adapter: DenseAdapter,
    keys: Sequence[str],
    record_of: Callable[[str], Record],
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
    """Create a record of every image, and compute metrics from the records.

    Args:
        protocol: name of the protocol.
        adapter: the backbone, which is in evaluation mode meanwhile; memory is measured on its device.
        keys: keys of the images.
        record_of: returns the record of an image, without its key and time.
        summarise: computes metrics from an iterable of records, which it need not store.
        settings: everything that identifies a run.
        check: checks the files of the images that this process will do, before the first one.
        prepare: called once between the check and the first image; its time counts for no image.
        out: folder of the records and of ``results.json``; ``None`` stores everything in memory.
        rank, world: this process does every ``world``-th image, starting with ``rank``.
        stage: starts subtasks, for progress bars.

    Raises:
        InputError: the folder contains results of other settings or cannot be written, or ``rank`` is out of range.
        DatasetError: the data set has another layout than its reader expects.
    """
    if not 0 <= rank < world:
        raise InputError(f"rank must be from 0 to {world - 1} for {world} processes, not {rank}")
    if world > 1 and out is None:
        raise InputError("several processes need a common folder for their records; choose one with out (--out)")
    stage = stage or no_progress
    settings = _plain(settings)
    # Processes that share a folder have a lock each.
    lock = LOCK if rank == 0 else f"{LOCK}-{rank}"
    place = nullcontext(None) if out is None else output_folder(given_path(out), EVALUATION_FOLDER, lock=lock)
    with place as folder:
        records = _Records(folder, settings, rank)
        wanted = frozenset(keys)
        done = {record["key"] for record in records} & wanted
        pending = [key for key in keys[rank::world] if key not in done]
        if pending:
            check(pending, stage("check files", len(pending)))
            with evaluation_mode(adapter), torch.no_grad():
                if prepare is not None:
                    prepare()
                advance = stage(f"{protocol}: images", len(pending))
                for key in pending:
                    start = time.perf_counter()
                    record = record_of(key)
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
            folder / "results.json" if folder is not None and complete else None,
        )
        if result.path is not None:
            _write_json(result.path, result.as_dict())
        return result


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"
