"""What a run writes about itself: log lines, skipped steps, trackers, and messages to its reporter."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ttd_plugins.errors import InputError, TTDError, one_sentence
from ttd_plugins.training.best_checkpoint import read_evaluations
from ttd_plugins.training.collapse_watch import MetricAverager
from ttd_plugins.training.config import TrainConfig
from ttd_plugins.training.jsonl_log import JsonlLog
from ttd_plugins.training.processes import main_process_first
from ttd_plugins.training.reporting import Reporter
from ttd_plugins.training.step import StepResult
from ttd_plugins.training.train_state import TrainState
from ttd_plugins.utils.files import write_atomic

logger = logging.getLogger(__name__)


class RunLogger:
    """Logs of one run: ``log.jsonl``, ``nonfinite.jsonl``, accelerate's trackers and the reporter.

    Args:
        out: folder of the run.
        config: configuration of the run.
        reporter: callbacks; on the main process only.
        accelerator: accelerate's, for trackers.
    """

    def __init__(self, out: Path, config: TrainConfig, reporter: Reporter, accelerator: Any) -> None:
        self.out, self.config, self.accelerator = out, config, accelerator
        self.is_main = bool(accelerator.is_main_process)
        self.reporter = reporter if self.is_main else Reporter()
        self.log, self.skipped = JsonlLog(out / "log.jsonl"), JsonlLog(out / "nonfinite.jsonl")
        self._throughput = _Throughput()

    def truncate(self, step: int) -> None:
        """Delete log lines after ``step``."""
        for file in (self.log, self.skipped) if self.is_main else ():
            damaged = file.truncate(step)
            if damaged:
                self.message(f"{damaged} damaged lines of {file.file} were deleted", logging.WARNING)

    def start(self, state: TrainState) -> None:
        """Start the trackers and the clock."""
        self._start_trackers(state.step)
        self.reporter.on_start(state.total_steps, state.step)
        self._throughput = _Throughput()

    def count(self, state: TrainState, result: StepResult, loader_seconds: float) -> None:
        """Add one step to the averages."""
        if result.problem is None:
            for losses, statistics in zip(result.losses, result.statistics, strict=True):
                state.averager.add(losses | statistics)
            state.averager.add({} if result.gradient_norm is None else {"gradient_norm": result.gradient_norm})
        self._throughput.add(result.images, loader_seconds)

    def write_line(self, state: TrainState, learning_rate: float) -> None:
        """Write the averages since the last line, and warnings about collapse."""
        means = state.averager.means()
        line: dict[str, Any] = {"step": state.step, "epoch": state.point.epoch, "learning_rate": learning_rate}
        line |= means | {"skipped_steps": state.skipped_steps} | self._throughput.metrics()
        self._throughput, state.averager, state.metrics = _Throughput(), MetricAverager(), line
        new = state.watch.check(means)
        sentences = [f"step {state.step}: {sentence}" for sentence in new]
        state.warnings += sentences
        if self.is_main:
            self.log.add(line | ({"warnings": new} if new else {}))
        self._track(line)
        self.reporter.on_log(line)
        for sentence in sentences:
            self.message(sentence, logging.WARNING)

    def write_evaluation(self, step: int, found: list[dict[str, float]]) -> None:
        """Write the metrics of one or more evaluations after ``step`` as one line; main process only."""
        metrics = {name: value for one in found for name, value in one.items()}
        self.log.add({"step": step, "evaluation": metrics})
        self._track({"step": step} | {f"evaluation/{name}": value for name, value in metrics.items()})
        for one in found:
            self.reporter.on_log({"step": step} | one)

    def write_skipped(self, step: int, epoch: int, problem: Mapping[str, Any], keys: list[str]) -> None:
        """Write the keys of a step that was not finite; main process only."""
        values = {name: value if isinstance(value, str) else repr(value) for name, value in problem.items()}
        self.skipped.add({"step": step, "epoch": epoch, **values, "keys": keys})

    def evaluations(self) -> list[tuple[int, dict[str, float]]]:
        """(step, metrics) of every evaluation in the log."""
        return read_evaluations(self.log)

    def values(self, name: str) -> list[float]:
        """Value of a metric in every line of the log that has it, in order."""
        return [line[name] for line in self.log.read() if isinstance(line.get(name), int | float)]

    def message(self, sentence: str, level: int = logging.INFO) -> None:
        """Pass a sentence to the reporter and, on the main process, to :mod:`logging`."""
        if self.is_main:
            # A handler that shares the terminal with the reporter can skip what the reporter displays.
            logger.log(level, "%s", sentence, extra={"reported": self.reporter.displays_messages})
        # A terminal that was closed must not end the run.
        with suppress(OSError):
            self.reporter.on_message(sentence)

    def close(self) -> None:
        """End the trackers."""
        # A failure here must not hide why the run ended.
        with suppress(Exception):
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self.reporter.on_end()

    def _start_trackers(self, step: int) -> None:
        trackers = self.config.run.trackers
        if not trackers:
            return
        name = main_process_first(lambda: _tracker_id(self.out / "trackers.json"), is_main=self.is_main)
        flat = {
            f"{section}.{key}": value if isinstance(value, int | float | str | bool) else repr(value)
            for section, keys in self.config.as_dict().items()
            for key, value in keys.items()
        }
        options = {"tensorboard": {"purge_step": step + 1}, "wandb": {"id": name, "resume": "allow"}}
        try:
            self.accelerator.init_trackers(
                "ttd", config=flat, init_kwargs={key: options[key] for key in trackers if key in options}
            )
        # Trackers are other programs, which may need a login or a network.
        except Exception as error:
            raise TTDError(f"a tracker cannot start ({one_sentence(error)}); remove it from run.trackers") from error

    def _track(self, line: Mapping[str, Any]) -> None:
        if self.config.run.trackers:
            values = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
            self.accelerator.log(values, step=line["step"])


def _tracker_id(file: Path) -> str:
    """The id by which trackers recognise a run that is resumed; made by the first call.

    Raises:
        InputError: the file cannot be read or written, or has no id.
    """
    advice = "delete it, and trackers start a new run"
    if not file.exists():
        write_atomic(file, json.dumps({"id": uuid.uuid4().hex}) + "\n")
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({one_sentence(error)}); {advice}") from error
    # Older files have the id alone, 32 hexadecimal digits.
    if re.fullmatch(r"[\w-]+", text):
        return text
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    name = content.get("id") if isinstance(content, dict) else None
    if not isinstance(name, str) or not name:
        raise InputError(f"{file} has no id of a run; {advice}")
    return name


class _Throughput:
    """Time and images since the last line of the log; a resumed run starts anew."""

    def __init__(self) -> None:
        self.started, self.images, self.steps, self.loader_seconds = time.perf_counter(), 0, 0, 0.0

    def add(self, images: int, loader_seconds: float) -> None:
        """Count one step."""
        self.images += images
        self.steps += 1
        self.loader_seconds += loader_seconds

    def metrics(self) -> dict[str, float]:
        """Images a second of all processes, seconds a step, and how many of them were spent in the loader."""
        seconds, steps = time.perf_counter() - self.started, max(self.steps, 1)
        return {
            "images_per_second": round(self.images / max(seconds, 1e-9), 2),
            "seconds_per_step": round(seconds / steps, 4),
            "data_seconds_per_step": round(self.loader_seconds / steps, 4),
        }
