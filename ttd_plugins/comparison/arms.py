"""One arm of a comparison: train a backbone, measure it; one arm at a time or several in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.backbone_sources import load_trained_weights, open_backbone
from ttd_plugins.comparison.data import open_data
from ttd_plugins.comparison.data_interface import ComparisonData, Curve, Measurement
from ttd_plugins.comparison.experiment_record import read_metadata, save_trained_weights, timed
from ttd_plugins.comparison.options import CompareOptions
from ttd_plugins.comparison.results import Arm
from ttd_plugins.errors import InputError
from ttd_plugins.lora import scaled_lora
from ttd_plugins.utils.progress import Advance, Stage, no_progress

TRAINING = "training"
"""Key of the training summary in the metadata of a weights file."""


@dataclass(frozen=True)
class ArmJob:
    """One backbone in one arm, for one seed.

    Attributes:
        backbone: name of the backbone.
        arm: ``before`` is measured only; the other arms are trained first.
        seed: seed of the training; ``None`` for ``before``.
        weights: file of the trained weights; not used by ``before``.
        folder: folder for unfinished work; deleted when the arm is complete.
        tuned_from: identifies the run or LoRA that the backbone was loaded from; ``None`` for a plain name.
        scales: factors of LoRA at which the arm is measured; 1 is the arm as trained.
        curve_is_recorded: whether the record already has the training curve, as it does for weights files
            without a training summary.
    """

    backbone: str
    arm: Arm
    seed: int | None
    weights: Path
    folder: Path
    curve_is_recorded: bool = False
    tuned_from: str | None = None
    scales: tuple[float, ...] = (1.0,)

    @property
    def label(self) -> str:
        """Arm and seed, as in ``after 0``."""
        return self.arm if self.seed is None else f"{self.arm} {self.seed}"


@dataclass(frozen=True)
class Training:
    """Summary of a fine-tuning; it is stored with the weights, so that neither exists without the other."""

    curve: Curve
    warnings: list[str]
    seconds: float


@dataclass(frozen=True)
class ArmResult:
    """Metrics of an arm by factor of LoRA, how long measuring took, and its training unless the record has that."""

    measurements: Mapping[float, Measurement]
    seconds: float
    training: Training | None = None


def run_arm(job: ArmJob, options: CompareOptions, data: ComparisonData, stage: Stage = no_progress) -> ArmResult:
    """Train (unless done earlier) and measure one arm."""

    def titled(name: str, steps: int) -> Advance:
        return stage(f"{job.backbone} {job.label}: {name}", steps)

    def measure(scale: float) -> Measurement:
        folder, step = ("measure", titled) if scale == 1 else (f"measure-{scale:g}", scaled_stage(titled, scale))
        with scaled_lora(backbone, scale):
            return data.measure(backbone, job.folder / folder, step)

    backbone, training = open_arm(job, options, data, titled)
    measurements, seconds = timed(lambda: {scale: measure(scale) for scale in job.scales})
    return ArmResult(measurements, seconds, training)


def scaled_stage(stage: Stage, scale: float) -> Stage:
    """A progress callback whose titles name the factor of LoRA."""
    return lambda name, steps: stage(f"{name}, LoRA x {scale:g}", steps)


def open_arm(
    job: ArmJob, options: CompareOptions, data: ComparisonData, stage: Stage = no_progress
) -> tuple[DenseAdapter, Training | None]:
    """Open the backbone of an arm in evaluation mode; it is trained if its weights file does not exist yet."""
    backbone = open_backbone(job.backbone, seed=options.first_seed, device=options.device)
    found = None if backbone.tuned_from is None else str(backbone.tuned_from)
    if found != job.tuned_from:
        raise InputError(
            f"{job.backbone} has changed since the comparison began (it was {job.tuned_from}, and is {found}); name "
            "the step of a run that goes on, as in RUN@STEP"
        )
    if job.seed is None:
        return backbone, None
    if job.weights.exists():
        summary = read_metadata(job.weights).get(TRAINING)
        if summary is not None or job.curve_is_recorded:
            training = None if summary is None else Training(**json.loads(summary))
            return load_trained_weights(backbone, job.weights), training
    seed, ttd = job.seed, options.ttd_of_arm(job.arm)
    (curve, warnings), seconds = timed(lambda: data.tune(backbone, seed, ttd, job.folder, stage))
    training = Training(curve, warnings, seconds)
    save_trained_weights(job.weights, backbone, {TRAINING: json.dumps(asdict(training))})
    return backbone.eval(), training


# Executors -----------------------------------------------------------------------------------------------------------


Outcomes = Generator[tuple[ArmJob, ArmResult | Exception], None, None]


class ArmExecutor(Protocol):
    """Runs arms and yields each with its result, or with the exception that it raised, when it is complete."""

    def run(self, jobs: Iterable[ArmJob]) -> Outcomes: ...


class SequentialExecutor:
    """Runs arms one after another in this process; takes each job when the previous one is complete."""

    def __init__(self, options: CompareOptions, data: ComparisonData, stage: Stage) -> None:
        self.options, self.data, self.stage = options, data, stage

    def run(self, jobs: Iterable[ArmJob]) -> Outcomes:
        for job in jobs:
            outcome: ArmResult | Exception
            try:
                outcome = run_arm(job, self.options, self.data, self.stage)
            # A backbone is third-party code: whatever it raises, the other backbones are compared.
            except Exception as error:
                outcome = error
            yield job, outcome


class ProcessExecutor:
    """Runs ``options.jobs`` arms at the same time, each in its own process with an equal share of the cores.

    Args:
        options: options of the comparison.
        stage: progress callback.
        fallback: runs the arms that failed in a process again, which has the full traceback, the plugins registered in
            this process, and the memory of all processes.
    """

    def __init__(self, options: CompareOptions, stage: Stage, fallback: ArmExecutor) -> None:
        self.options, self.stage, self.fallback = options, stage, fallback

    def run(self, jobs: Iterable[ArmJob]) -> Outcomes:
        jobs = list(jobs)
        if not jobs:
            return
        count, failed = self.options.jobs, []
        advance = self.stage(f"train and measure, {count} at a time", len(jobs))
        threads = max(1, (os.cpu_count() or 1) // count)
        context = multiprocessing.get_context("spawn")
        others = set(multiprocessing.active_children())
        with ProcessPoolExecutor(count, context, _start_worker, (self.options, threads)) as pool:
            futures = {pool.submit(_run_in_worker, job): job for job in jobs}
            try:
                for future in as_completed(futures):
                    if future.exception() is not None:
                        failed.append(futures[future])
                        continue
                    advance(1)
                    yield futures[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                # Otherwise this process could not end before the running arms are complete.
                for worker in set(multiprocessing.active_children()) - others:
                    worker.terminate()
                raise
        yield from self.fallback.run(failed)


_worker: dict[str, Any] = {}
"""Options and data of a worker process; the data cache scenes from one arm to the next."""


def _start_worker(options: CompareOptions, threads: int) -> None:
    # On Ctrl-C the main process stops its workers; if it is killed, they stop by themselves.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _worker.update(options=options, data=open_data(options))


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_in_worker(job: ArmJob) -> ArmResult:
    return run_arm(job, _worker["options"], _worker["data"])


def remove_unfinished_work(job: ArmJob) -> None:
    """Delete the folder of a complete arm."""
    shutil.rmtree(job.folder, ignore_errors=True)
