"""Measure a TTD step on a GPU: every row of the table in docs/speed.md, by one command that can be stopped and resumed.

    python benchmarks/gpu.py --out runs/gpu --minutes 25
    python benchmarks/gpu.py --device cpu --quick --out runs/quick    # a tiny model, to try the program

A row is a backbone, a batch size, and whether the image blocks are compiled. Each row measures the variants of
``ttd bench``, open_clip's own training step, peak memory, and ``ttd train`` with its loader. A finished row is stored
in ``results.json`` and is measured again only if its settings, the device, a version or the code has changed. Rows
that would start after ``--minutes`` are left to the next call of the same command. The two rows with the largest ratio
TTD / contrastive are profiled at the end. ``table.md`` has the table and the profiles.

Weights, pixels and captions are random and deterministic, so no file and no network is needed.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

import ttd_plugins
from ttd_plugins import fine_tune
from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.benchmark.gpu_results import LOOP, Record, Results, Row, markdown
from ttd_plugins.benchmark.measure import MEMORY_VARIANTS, summary
from ttd_plugins.benchmark.memory import measure as measure_memory
from ttd_plugins.benchmark.profiling import profile_step
from ttd_plugins.benchmark.random_pairs import RandomPairs, draw_captions, write_pairs
from ttd_plugins.benchmark.step_variants import VARIANTS, Bench, BenchOptions
from ttd_plugins.errors import TTDError, is_out_of_memory, one_sentence
from ttd_plugins.training.jsonl_log import JsonlLog
from ttd_plugins.training.stop_signals import TrainingStoppedError
from ttd_plugins.utils.files import write_atomic
from ttd_plugins.utils.output_folder import FolderKind, output_folder

PRECISION = "bfloat16"
FOLDER = FolderKind("gpu-benchmark", "a folder of benchmarks/gpu.py")
RESULTS, TABLE = "results.json", "table.md"
PACKAGES = ("open_clip_torch", "timm", "accelerate")

Report = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        rows: the rows, in the order in which they are measured.
        repeats: rounds; each times every variant once.
        train_steps: steps of ``ttd train``.
        log_every: steps per log line of ``ttd train``; the first line is warm-up and does not count.
        workers: worker processes of its loader.
        pairs: its data.
        profiled: number of rows that are profiled.
    """

    device: str
    rows: tuple[Row, ...]
    repeats: int
    train_steps: int
    log_every: int
    workers: int
    pairs: RandomPairs
    profiled: int = 2

    @property
    def settings(self) -> Record:
        """The settings that decide the numbers of a row, for JSON."""
        return {
            "precision": PRECISION,
            "repeats": self.repeats,
            "train_steps": self.train_steps,
            "log_every": self.log_every,
            "workers": self.workers,
            "pairs": asdict(self.pairs),
        }


MODELS = (
    *(("open_clip:ViT-B-16", batch) for batch in (64, 128, 256)),
    *(("open_clip:ViT-L-14", batch) for batch in (64, 128)),
    ("siglip:ViT-B-16-SigLIP", 128),
)


def full_plan() -> Plan:
    """Return the plan for a GPU."""
    rows = tuple(Row(*model, compiled) for compiled in (False, True) for model in MODELS)
    workers = max(min((os.cpu_count() or 1) - 1, 15), 0)
    # Steps of the largest batch end before the first worker has read its shards.
    pairs = RandomPairs(count=24_576, images=256, width=640, height=480, shards=48)
    return Plan("cuda", rows, repeats=3, train_steps=60, log_every=10, workers=workers, pairs=pairs)


def quick_plan(device: str) -> Plan:
    """Return a plan with the embedded tiny model, whose numbers mean nothing."""
    rows = tuple(Row("open_clip:tiny", batch) for batch in (4, 6))
    pairs = RandomPairs(count=24, images=4, width=64, height=64, shards=2)
    return Plan(device, rows, repeats=1, train_steps=3, log_every=1, workers=0, pairs=pairs)


# Device -----------------------------------------------------------------------------------------------------


def environment(device: str) -> Record:
    """Return the device, its driver, the versions, and a digest of the code, for JSON."""
    cuda = device == "cuda"
    found: Record = {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {platform.machine()}, {os.cpu_count()} cores",
        "driver": driver_version() if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "ttd_plugins": ttd_plugins.__version__,
        "code": code_digest(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def driver_version() -> str:
    """Return the version of NVIDIA's driver, or ``"unknown"`` where ``nvidia-smi`` does not report it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(done.stdout.split()), "unknown")


def code_digest() -> str:
    """Return a digest of this program and of the packages ``ttd_plugins`` and ``ttd_*`` that it uses."""
    core = Path(ttd_plugins.__file__).parent
    folders = [core, *sorted(core.parent.glob("ttd_*")), *sorted(core.parent.glob("adapters/ttd_*"))]
    digest = hashlib.sha256()
    for file in [Path(__file__), *(file for folder in dict.fromkeys(folders) for file in sorted(folder.rglob("*.py")))]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


# One row -------------------------------------------------------------------------------------------------------------


class DoesNotFitError(Exception):
    """The device's memory ran out. The memory of the failed call is free again."""


def fitting(function: Callable[[], T], free: Callable[[], None]) -> T:
    """Return the function's result.

    Raises:
        DoesNotFitError: the device's memory ran out.
    """
    try:
        return function()
    except torch.OutOfMemoryError:
        pass
    # Outside the handler, whose exception references the tensors of the failed call.
    free()
    raise DoesNotFitError


def free_memory() -> None:
    """Return unused memory to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class OpenClipLoop:
    """A step of open_clip's own training loop (``open_clip_train.train.train_one_epoch``), without its loader.

    It uses model, batch, precision and optimizer of a :class:`Bench`, and open_clip's loss. Texts are tokenised in
    advance, as open_clip's loader does in its workers, and are at the full context. Compiled image blocks are shared.
    """

    def __init__(self, bench: Bench) -> None:
        import open_clip

        self.bench = bench
        self.model: Any = bench.adapter.model
        sigmoid = bench.adapter.description.logits == "sigmoid"
        self.loss: Any = open_clip.SigLipLoss() if sigmoid else open_clip.ClipLoss(cache_labels=True)
        self.tokens = bench.adapter.tokenize(bench.captions).ids.to(bench.device)

    def __call__(self) -> None:
        """Take one step."""
        model, optimizer = self.model, self.bench.optimizer
        self.bench.adapter.train()
        optimizer.zero_grad()
        with self.bench.autocast():
            image = model.encode_image(self.bench.images, normalize=True)
            text = model.encode_text(self.tokens, normalize=True)
            bias = {} if model.logit_bias is None else {"logit_bias": model.logit_bias}
            loss = self.loss(image, text, logit_scale=model.logit_scale.exp(), **bias)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))


def build(row: Row, plan: Plan) -> Bench:
    """Return the benchmark of a row: a backbone with random weights, and one batch.

    Raises:
        DoesNotFitError: the device's memory ran out.
        TTDError: the backbone cannot be loaded or compiled.
    """
    if row.compile:
        # Code that was compiled for another row would count as a recompilation.
        torch.compiler.reset()
    options = BenchOptions(
        row.backbone,
        batch_size=row.batch_size,
        compile=row.compile,
        precision=PRECISION,
        repeats=plan.repeats,
        device=plan.device,
    )
    captions = draw_captions(row.batch_size, plan.pairs.seed)
    return fitting(lambda: Bench(options, captions=captions), free_memory)


def measure_row(row: Row, plan: Plan, out: Path, report: Report) -> Record:
    """Measure one row.

    Args:
        row: the row.
        plan: the plan.
        out: folder with the pairs in ``pairs``; ``ttd train`` writes into ``train``, which is removed.
        report: called with what is measured next.

    Returns:
        A record for JSON: the description of the setup; seconds, ratios and operations as in ``ttd bench``;
        ``images_per_second`` of each variant; ``model_flops_utilisation``; ``memory`` in bytes; ``train``; and
        ``out_of_memory``, the variants that do not fit into the device's memory.

    Raises:
        TTDError: the backbone cannot be loaded, compiled or trained for another reason.
    """
    report("building")
    try:
        bench = build(row, plan)
    except DoesNotFitError:
        return {"out_of_memory": ["building"]}
    found = measure_variants(bench, plan.repeats, report)
    adapter = bench.adapter
    del bench
    free_memory()
    report("ttd train")
    try:
        found["train"] = measure_training(row, plan, adapter, out)
    except DoesNotFitError:
        found["train"] = None
        found["out_of_memory"].append("train")
    return found


def measure_variants(bench: Bench, repeats: int, report: Report) -> Record:
    """Measure all variants and open_clip's step in turns; see :func:`measure_row`."""
    batch = len(bench.captions)
    out_of_memory: list[str] = []
    operations: dict[str, int] = {}
    calls: dict[str, Callable[[], None]] = {name: partial(bench.call, name) for name in VARIANTS}
    calls[LOOP] = OpenClipLoop(bench)

    def attempt(name: str, function: Callable[[], T]) -> T | None:
        try:
            return fitting(function, bench.free_memory)
        except DoesNotFitError:
            out_of_memory.append(name)
            return None

    for name in list(calls):
        report(f"counting and warming up: {name}")
        counted = 0 if name == LOOP else attempt(name, partial(bench.count, name))
        # The first call compiles blocks, and prepares kernels for the shapes.
        if counted is None or attempt(name, partial(bench.seconds, calls[name])) is None:
            del calls[name]
        elif name != LOOP:
            operations[name] = counted
    rounds: list[dict[str, float]] = []
    for number in range(repeats):
        report(f"timing: round {number + 1} of {repeats}")
        names = list(calls)
        # Each round starts with another variant, so that none always runs after the same one.
        first = number % max(len(names), 1)
        times: dict[str, float] = {}
        for name in names[first:] + names[:first]:
            seconds = attempt(name, partial(bench.seconds, calls[name], bench.in_a_row))
            if seconds is None:
                del calls[name]
            else:
                times[name] = seconds
        rounds.append(times)
    rounds = [{name: times[name] for name in calls} for times in rounds]
    operations = {name: count for name, count in operations.items() if name in calls}
    found = bench.describe() | {"data": "random captions", "repeats": repeats} | summary(rounds, operations)
    loop_ratios = [times["ttd"] / times[LOOP] for times in rounds] if {"ttd", LOOP} <= calls.keys() else []
    found["ratios"]["ttd_over_open_clip_loop"] = median(loop_ratios) if loop_ratios else None
    found["images_per_second"] = {name: batch / times["median"] for name, times in found["seconds"].items()}
    found["peak_operations_per_second"] = peak = bench.peak()
    found["model_flops_utilisation"] = {
        name: count / found["seconds"][name]["median"] / peak for name, count in operations.items()
    }
    used: dict[str, Any] = {}
    for name in (name for name in MEMORY_VARIANTS if name in calls):
        report(f"memory: {name}")
        used[name] = attempt(f"memory of {name}", partial(measure_memory, bench, name))
    found["memory"] = used
    ours, theirs = ((used.get(name) or {}).get("peak", 0) for name in ("ttd", "contrastive"))
    found["ratios"]["memory_ttd_over_contrastive"] = ours / theirs if ours and theirs else None
    found["out_of_memory"] = out_of_memory
    bench.free_memory()
    return found


def measure_training(row: Row, plan: Plan, adapter: DenseAdapter, out: Path) -> Record:
    """Train all weights with ``ttd train``'s own function and loader.

    Returns:
        ``images_per_second``, ``seconds_per_step`` and ``data_seconds_per_step`` (spent in the loader), medians over
        the log lines after the first.

    Raises:
        DoesNotFitError: the device's memory ran out.
        TTDError: training failed for another reason.
    """
    run = out / "train"
    shutil.rmtree(run, ignore_errors=True)
    config = {
        "data": {"source": str(out / "pairs"), "workers": plan.workers},
        "towers": {"image": "full", "text": "full", "logit_scale": True},
        "optimizer": {"learning_rate": 1e-7, "batch_size": row.batch_size, "steps": plan.train_steps, "warm_up": 0},
        # The blocks of a compiled row are compiled already.
        "run": {
            "mixed_precision": "bf16",
            "cpu": plan.device == "cpu",
            "log_every": plan.log_every,
            "checkpoint_every": 0,
        },
    }
    fits = True
    try:
        fine_tune(config, run, backbone=adapter, progress=False)
        lines = [line for line in JsonlLog(run / "log.jsonl").read() if "images_per_second" in line][1:]
    except TrainingStoppedError:
        raise
    except (TTDError, torch.OutOfMemoryError) as error:
        if not is_out_of_memory(error) and not (error.__cause__ and is_out_of_memory(error.__cause__)):
            raise
        fits = False
    finally:
        shutil.rmtree(run, ignore_errors=True)
    # Outside the handler, whose exception references the tensors of the failed step.
    if not fits:
        free_memory()
        raise DoesNotFitError
    names = ("images_per_second", "seconds_per_step", "data_seconds_per_step")
    return {name: median(line[name] for line in lines) for name in names}


# Profiles ------------------------------------------------------------------------------------------------------------


def profile_row(row: Row, plan: Plan) -> Record:
    """Profile the TTD step and the contrastive step of a row.

    Returns:
        The profile of each step, ``None`` where it does not fit into the device's memory; see :func:`profile_step`.
    """
    found: Record = dict.fromkeys(("ttd", "contrastive"))
    try:
        bench = build(row, plan)
    except DoesNotFitError:
        return found
    for variant in found:
        try:
            found[variant] = fitting(partial(profile_step, bench, variant), bench.free_memory)
        except DoesNotFitError:
            continue
    return found


# Command -------------------------------------------------------------------------------------------------------------


def run(plan: Plan, out: Path, minutes: float, report: Report) -> Results:
    """Measure the rows that are not done, then profile the worst ones, and write both files after each.

    Args:
        plan: the plan.
        out: folder of this program; ``results.json`` and ``table.md`` are written there.
        minutes: no row and no profile starts later than this.
        report: called with what happens.

    Raises:
        InputError: a file cannot be read or written.
        TrainingStoppedError: a signal arrived during training; finished rows are stored.
    """
    end = time.monotonic() + 60 * minutes
    results = Results(out / RESULTS, plan.settings, environment(plan.device))
    write_pairs(out / "pairs", plan.pairs)

    def measure(kind: str, row: Row, function: Callable[[], Record]) -> bool:
        if results.find(kind, row) is not None:
            return True
        if time.monotonic() >= end:
            return False
        try:
            record = function()
        except TrainingStoppedError:
            raise
        # The other rows are valid even if this one cannot be measured; the next call tries again.
        except TTDError as error:
            record = {"error": one_sentence(error)}
            report(f"{row.title}: {record['error']}")
        results.add(kind, row, record)
        write_atomic(out / TABLE, markdown(results))
        free_memory()
        return True

    def report_on(row: Row, step: str) -> None:
        report(f"{row.title}: {step}")

    started = [measure("rows", row, partial(measure_row, row, plan, out, partial(report_on, row))) for row in plan.rows]
    if all(started):
        worst = worst_rows(results.current("rows"), plan.rows, plan.profiled)
        started += [measure("profiles", row, partial(profile_row, row, plan)) for row in worst]
    write_atomic(out / TABLE, markdown(results))
    left = started.count(False)
    left += sum("error" in record for kind in results.content for record in results.current(kind))
    report(f"{left} rows or profiles are left; run the same command again" if left else "all rows are measured")
    return results


def worst_rows(records: Sequence[Record], rows: Sequence[Row], count: int) -> list[Row]:
    """Return the rows with the largest TTD / contrastive, the worst first."""
    ratios = {
        Row(**record["row"]): record["ratios"]["ttd_over_contrastive"]
        for record in records
        if record.get("ratios", {}).get("ttd_over_contrastive") is not None
    }
    return sorted((row for row in rows if row in ratios), key=lambda row: -ratios[row])[:count]


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model and batches of 4 and 6, to try the program")
    parser.add_argument("--minutes", type=float, default=25.0, help="no row starts later than this  [default: 25]")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results  [default: runs/gpu]")
    parser.add_argument("--only", default="", help="only rows whose name has this text, such as ViT-L-14; no profiles")
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.quick:
        parser.error("the rows need a GPU; add --quick to try the program on a CPU")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; add --device cpu --quick to try the program")
    plan = quick_plan(args.device) if args.quick else full_plan()
    rows = tuple(row for row in plan.rows if args.only in row.title)
    if not rows:
        parser.error(f"no row has {args.only!r} in its name; the names are {', '.join(row.title for row in plan.rows)}")
    # A part of the rows does not have the worst ones of all.
    plan = replace(plan, rows=rows, profiled=0 if args.only else plan.profiled)
    start = time.monotonic()

    def report(sentence: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {sentence}", file=sys.stderr, flush=True)

    try:
        with output_folder(args.out, FOLDER):
            run(plan, args.out, args.minutes, report)
    except TrainingStoppedError as stopped:
        print(f"stopped; finished rows are in {args.out / RESULTS}; run the same command again", file=sys.stderr)
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        print(f"stopped; finished rows are in {args.out / RESULTS}; run the same command again", file=sys.stderr)
        sys.exit(130)
    except TTDError as error:
        sys.exit(f"error: {one_sentence(error)}")
    print(f"results: {args.out / RESULTS}\ntable:   {args.out / TABLE}")


if __name__ == "__main__":
    main()
