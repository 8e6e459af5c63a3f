"""One fine-tuning run: accelerate's processes, checkpoints that lose nothing, and figures that tell how it goes."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.engine import TTD, TTDOutput, evaluation_mode
from ttd_plugins.errors import InputError, MissingDependencyError, TTDError, choices_sentence, one_sentence
from ttd_plugins.method.text_embeddings import on_device
from ttd_plugins.training import checkpoints, sharding
from ttd_plugins.training.config import EvaluationConfig, TrainConfig, first_difference
from ttd_plugins.training.loop import learning_rate_factor
from ttd_plugins.training.periodic_evaluation import LabelledSet, open_evaluation
from ttd_plugins.training.records import Lines, make_folder, write_whole
from ttd_plugins.training.towers import build_backbone, parameter_groups, train_mode
from ttd_plugins.training.watch import CollapseWatch, Window
from ttd_plugins.utils import distributed
from ttd_plugins.utils.compiling import compile_image_blocks
from ttd_plugins.utils.progress import no_progress

RESUME_MUTABLE_KEYS = (
    "data.max_skipped", "run.log_every", "run.checkpoint_every", "run.checkpoint_minutes", "run.keep",
    "run.picture_every", "run.pictures", "run.evaluate_every", "run.trackers", "run.nonfinite", "run.max_skipped_steps",
    "run.sharded", "run.compile", *(f"evaluation.{one.name}" for one in dataclasses.fields(EvaluationConfig)),
)  # fmt: skip
"""Options that a resumed run may change, since they decide neither data nor, but for rounding, gradients."""

BATCH, END, FAILED = range(3)
"""What a process found when it asked for a batch."""


# What a run is given -------------------------------------------------------------------------------------------------


class PairBatch(Protocol):
    """A batch as loaders give it; :class:`ttd_plugins.data.Batch` is one."""

    images: Tensor
    captions: list[str]
    tags: list[list[str]] | None
    keys: list[str]
    groups: list[str]


class PairBatches(Protocol):
    """A loader of one process; :class:`ttd_plugins.data.PairLoader` is one."""

    def epoch(self, epoch: int, start: Any = None) -> Iterator[tuple[Any, Any]]:
        """Batches of an epoch, each with the position after it: a value that JSON holds."""
        ...

    def batches_per_epoch(self) -> int | None:
        """Batches of this process in an epoch, or ``None`` where a stream does not know."""
        ...


class Reporter:
    """What is told while a run goes on, on the main process; every method may be left as it is."""

    def started(self, steps: int, done: int) -> None:
        """The first step is about to be taken; ``done`` were taken by the runs that this one resumes."""

    def stepped(self, step: int, loss: float) -> None:
        """A step was taken."""

    def logged(self, figures: Mapping[str, Any]) -> None:
        """A line was added to the log."""

    def stage(self, name: str, steps: int) -> Callable[[int], None]:
        """Other work of so many steps begins; gives the function that is called with each number of them done."""
        return no_progress(name, steps)

    def said(self, sentence: str) -> None:
        """Something that a person should read."""

    def ended(self) -> None:
        """No more is coming, whatever the reason."""


Draw = Callable[[TTD, int, Path, list[tuple[Any, str, list[str] | None]]], None]
"""Called with the engine, the step, a folder and (PIL image, caption, tags) of the fixed samples."""

Evaluate = Callable[[TTD, int], Mapping[str, float]]
"""Called with the engine, in evaluation mode, and the step, on the main process; gives named figures."""


class TrainingStoppedError(TTDError):
    """The run was stopped by a signal, and its state saved.

    Attributes:
        status: the exit status that says so, 130 after Ctrl-C and 143 after SIGTERM.
    """

    status: int = 130


class NonFiniteError(TTDError):
    """A loss or gradient was not finite, and the run may not go on."""


@dataclass
class TrainResult:
    """What a run came to.

    Attributes:
        folder: the folder of the run.
        backbone: the tuned backbone, in evaluation mode, with LoRA in place where it was asked for.
        step: optimiser steps done in all.
        checkpoint: the last checkpoint.
        figures: the last line of the log.
        skipped_steps: steps that were left out because they were not finite.
        warnings: what the watch for collapse told, of the runs that this one resumed too.
        evaluations: (step, figures) of every evaluation in the log, on the main process; empty on others.
    """

    folder: Path
    backbone: DenseAdapter
    step: int
    checkpoint: Path
    figures: dict[str, Any]
    skipped_steps: int
    warnings: list[str] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)


# Signals -------------------------------------------------------------------------------------------------------------


class _Signals:
    """Remembers SIGTERM and Ctrl-C for the end of a step; a second one acts at once."""

    def __init__(self, said: Callable[[str], None]) -> None:
        self.received: int | None = None
        self._said = said
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.received = number
        self._said(f"{signal.Signals(number).name}: saving after this step; once more stops at once")


# The run -------------------------------------------------------------------------------------------------------------


def train_run(
    config: TrainConfig,
    out: Path | str,
    *,
    backbone: DenseAdapter | None = None,
    loader: PairBatches | Callable[[DenseAdapter, int, int], PairBatches] | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    draw: Draw | None = None,
    evaluate: Evaluate | None = None,
) -> TrainResult:
    """Fine-tune a backbone, in one process or in each of several; see :func:`ttd_plugins.fine_tune`."""
    out, reporter = Path(out), reporter or Reporter()
    accelerator = _accelerator(config, out)
    run: _Run | None = None
    try:
        run = _Run(accelerator, config, out, backbone, loader, resume, reporter, draw, evaluate)
        return run.train()
    finally:
        if run is not None:
            run.close()
        _forget_accelerate()


class _Step(nn.Module):
    """What accelerate wraps: the engine, giving tensors of the loss alone, so that nothing else seems to be used."""

    def __init__(self, ttd: TTD) -> None:
        super().__init__()
        self.ttd = ttd

    def forward(
        self, images: Tensor, captions: list[str], tags: list[list[str]] | None, groups: list[str] | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, float | Tensor]]:
        output: TTDOutput = self.ttd(images, captions, tags, groups)
        # No numbers yet: they wait for the device, and the backward pass should not.
        return output.loss, output.losses, output.figures


@dataclass
class _Point:
    """Where the run stands between two steps, in what a forward pass or the data move on."""

    epoch: int
    position: Any
    random: dict[str, Any]


class _Run:
    def __init__(
        self,
        accelerator: Any,
        config: TrainConfig,
        out: Path,
        backbone: DenseAdapter | None,
        loader: PairBatches | Callable[[DenseAdapter, int, int], PairBatches] | None,
        resume: bool,
        reporter: Reporter,
        draw: Draw | None,
        evaluate: Evaluate | None,
    ) -> None:
        self.out, self.draw, self.evaluate = out, draw, evaluate
        self.accelerator = accelerator
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.reporter = reporter if self.main else Reporter()
        self.labelled: LabelledSet | None = None
        self.config = self._agreed(lambda: self._open(config, resume))
        self.log, self.nonfinite = Lines(out / "log.jsonl"), Lines(out / "nonfinite.jsonl")

        self.backbone = build_backbone(self.config, backbone)
        self.backbone.to(self.accelerator.device)
        if self.config.run.gradient_checkpointing:
            self.backbone.set_grad_checkpointing()
        if "full" in (self.config.towers.image, self.config.towers.text) or self.config.towers.logit_scale:
            self.backbone.snapshot_weights()
        shares = self.processes > 1 and (self.config.run.sharded or _fsdp_is_asked_for())
        if self.config.run.compile and shares:
            raise InputError("run.compile does not go with shared-out weights yet; leave out one of them")
        options = self.config.ttd
        if shares and self.config.towers.text != "frozen":
            # Gathered weights are new tensors that look like the last ones, so that old embeddings would pass for new.
            options = dataclasses.replace(options, text_cache_size=0)
        self.ttd = TTD(self.backbone, options)
        model = self.backbone.model
        step = _Step(self.ttd)
        self.shards = sharding.Shards(step, self.accelerator.device) if shares else None
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in self.trained.items()}
        self.first_buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self.loader = self._loader(loader)
        self.steps = self._total_steps()
        adam = self.config.optimizer
        groups = parameter_groups(model, adam)
        optimizer = torch.optim.AdamW(
            sharding.split_groups(groups) if self.shards is not None else groups,
            lr=adam.learning_rate, betas=adam.betas, eps=adam.eps,
            # One kernel in the place of ten passes over all weights.
            fused=True if self.shards is None and self.accelerator.device.type == "cuda" else None,
        )  # fmt: skip
        if self.shards is None:
            self.module, self.optimizer = self.accelerator.prepare(step, optimizer)
        else:
            # accelerate would shard the scalars as well, which torch refuses, and does not shard on the CPU at all.
            self.module, self.optimizer = step, self.accelerator.prepare_optimizer(optimizer)
        train_mode(self.backbone)
        self.ttd.training = True

        self.step = self.skipped_steps = 0
        self.window, self.watch = Window(), CollapseWatch()
        self.warnings: list[str] = []
        self.figures: dict[str, Any] = {}
        self.epoch, self.position = 0, None
        self.stream: Iterator[tuple[Any, Any]] | None = None
        self.ahead: list[tuple[Any, Any] | Exception | None] = []
        self.copied: tuple[Tensor, Tensor] | None = None
        self.take_back: Callable[[], None] = lambda: None
        # Other draws for every process, or their dropouts would be the same.
        _seed(self.config.run.seed + 1_000_003 * self.rank)
        if checkpoints.checkpoint_steps(out):
            self._restore()
        elif self.main:
            self._cut(-1)
        self._agreed(lambda: None if self.labelled is None else self.labelled.check(self.ttd))
        if self.config.run.compile:
            self.take_back = compile_image_blocks(self.backbone)
        try:
            # Not before all is known to be well, so that a mistake leaves no run behind.
            self._agreed(lambda: write_whole(out / "config.yaml", self.config.yaml()))
        except BaseException:
            self.take_back()
            raise
        self.point = _Point(self.epoch, self.position, checkpoints.random_state())
        self.batch_in_epoch = self.position is not None
        self.saved = self.step if checkpoints.checkpoint_steps(out) else -1

    # Setting up ----------------------------------------------------------------------------------------------------

    def _agreed(self, action: Callable[[], Any]) -> Any:
        """What ``action`` gives on the main process first and then on the others, which stop too where it fails."""
        failure: BaseException | None = None
        value = None
        if self.main:
            try:
                value = action()
            except Exception as error:
                failure = error
        told = distributed.gathered(None if failure is None else one_sentence(failure))[0]
        if failure is not None:
            raise failure
        if told is not None:
            raise TTDError(f"the main process failed: {told}")
        return distributed.gathered(value)[0]

    def _open(self, config: TrainConfig, resume: bool) -> TrainConfig:
        """Make the folder of the run, or take up the one that is there."""
        file = self.out / "config.yaml"
        log = self.out / "log.jsonl"
        if file.exists() and (checkpoints.checkpoint_steps(self.out) or (log.exists() and log.stat().st_size)):
            if not resume:
                raise InputError(f"{self.out} holds a run already; go on with --resume, or give another --out")
            different = first_difference(TrainConfig.read(file), config, ignore=RESUME_MUTABLE_KEYS)
            if different is not None:
                raise InputError(
                    f"{different} is not what the run in {self.out} was started with; leave it as it was, or start "
                    "another run"
                )
        # A labelled set that is laid out wrongly is told before anything is loaded or left behind.
        self.labelled = open_evaluation(config.evaluation, self.out)
        make_folder(self.out / checkpoints.FOLDER)
        checkpoints.sweep(self.out)
        return config

    def _loader(self, given: PairBatches | Callable[[DenseAdapter, int, int], PairBatches] | None) -> PairBatches:
        if given is None:
            return open_loader(self.config, self.backbone, self.out, self.rank, self.processes)
        if hasattr(given, "epoch"):
            return cast(PairBatches, given)
        return cast(Callable[..., PairBatches], given)(self.backbone, self.rank, self.processes)

    def _total_steps(self) -> int:
        options = self.config.optimizer
        if options.steps is not None:
            return options.steps
        batches = self.loader.batches_per_epoch()
        if batches is None:
            raise InputError(
                "how many pairs the data holds is not known before they are read; say how long to train: "
                "optimizer.steps (--steps)"
            )
        if batches < 1:
            raise InputError(
                f"the data does not fill one batch of {options.batch_size} in each of {self.processes} processes; "
                "lower optimizer.batch_size (--batch-size)"
            )
        return max(1, math.ceil(options.epochs * batches / options.accumulation))

    def _restore(self) -> None:
        kept = checkpoints.read_checkpoint(self.out)
        state, where = kept.state, str(checkpoints.checkpoint_folder(self.out, kept.state["step"]))
        if state["processes"] != self.processes:
            raise InputError(
                f"the run in {self.out} was made by {state['processes']} processes and cannot go on with "
                f"{self.processes}; start as many"
            )
        if set(kept.trained) != set(self.trained):
            raise InputError(f"{where} holds other tensors than this configuration trains; it is of another backbone")
        checkpoints.load_tensors(self.backbone.model, kept.trained, where)
        checkpoints.load_tensors(self.backbone.model, kept.buffers, where)
        if self.ttd.teacher is not None:
            checkpoints.load_tensors(self.ttd.teacher.model, kept.teacher, where)
        checkpoints.unpack_optimizer(self._inner_optimizer, kept.optimizer, self.names)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped_steps = state["step"], state["skipped_steps"]
        self.epoch, self.position = state["epoch"], state["positions"][self.rank]
        self.window, self.watch = Window(**state["window"]), CollapseWatch(**state["watch"])
        self.warnings, self.figures = state["warnings"], state["figures"]
        if self.main:
            self._cut(self.step)
        checkpoints.set_random_state(checkpoints.unpack_random(kept.random, state["random"], self.rank))

    def _cut(self, step: int) -> None:
        """Forget what was noted of later steps."""
        self.log.cut(step)
        self.nonfinite.cut(step)
        if self.labelled is not None:
            self.labelled.forget(step)

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    # Training ------------------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        config = self.config.run
        self._start_trackers()
        self.reporter.started(self.steps, self.step)
        self.since, self.saved_at = _Since(), time.monotonic()
        with _Signals(self.reporter.said) as signals:
            if self.step == 0:
                self._picture()
            self._evaluate()
            while self.step < self.steps:
                self._one_step(signals)
                if self.step % config.log_every == 0 or self.step == self.steps:
                    self._write_log()
                self._picture()
                if self._checkpoint_is_due() or self.step == self.steps:
                    self._save()
                # After the checkpoint, so that one that was killed is all that is left to do.
                self._evaluate()
            if self.saved != self.step:
                self._save()
        if self.shards is not None:
            self.shards.end()
        self.ttd.eval()
        return TrainResult(
            folder=self.out,
            backbone=self.backbone,
            step=self.step,
            checkpoint=checkpoints.checkpoint_folder(self.out, self.step),
            figures=self.figures,
            skipped_steps=self.skipped_steps,
            warnings=self.warnings,
            evaluations=self._evaluations() if self.main else [],
        )

    def close(self) -> None:
        """End the trackers and the workers of the loader; the backbone is the caller's again."""
        # Neither may hide why the run ended.
        with suppress(Exception):
            for tracker in self.accelerator.trackers:
                tracker.finish()
        with suppress(Exception):
            if self.stream is not None and hasattr(self.stream, "close"):
                self.stream.close()
        self.take_back()
        self.reporter.ended()

    def _one_step(self, signals: _Signals) -> None:
        options = self.config.optimizer
        rate = options.learning_rate * learning_rate_factor(self.step, self.steps, options.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        keys: list[str] = []
        seen: list[dict[str, float]] = []
        trouble: dict[str, Any] | None = None
        loss_of_step = 0.0
        for number in range(options.accumulation):
            batch = self._next_batch(signals, first=number == 0)
            keys += batch.keys
            last = number == options.accumulation - 1
            # Gradients that are shared out are averaged at once: whole ones would take the memory that is saved.
            with nullcontext() if last or self.shards is not None else self.accelerator.no_sync(self.module):
                images = self._to_device(batch.images)
                with nullcontext() if self.shards is None else self.accelerator.autocast():
                    loss, parts, statistics = self.module(images, batch.captions, batch.tags, batch.groups)
                self.accelerator.backward(loss / options.accumulation)
            if signals.received is None and not (last and self.step + 1 == self.steps):
                self._look_ahead()
            figures = self._joint(loss, parts, {name: float(value) for name, value in statistics.items()}, len(images))
            if not math.isfinite(figures["loss"]):
                trouble = {"what": "loss"} | {name: figures[name] for name in ("loss", *parts)}
                break
            seen.append(figures)
            loss_of_step += figures["loss"] / options.accumulation
            self.since.images += len(images) * self.processes
        if trouble is None:
            parameters = list(self.trained.values())
            limit = math.inf if options.clip_norm is None else options.clip_norm
            if self.shards is not None:
                norm = sharding.limit_gradients(parameters, limit)
            else:
                norm = float(self.accelerator.clip_grad_norm_(parameters, limit))
            # A scaler expects such gradients now and then, and lowers its scale.
            if not math.isfinite(norm) and self.accelerator.scaler is None:
                trouble = {"what": "gradient", "gradient_norm": norm, "loss": loss_of_step}
            else:
                self.optimizer.step()
                for figures in [*seen, {"gradient_norm": norm} if math.isfinite(norm) else {}]:
                    self.window.add(figures)
        if trouble is not None:
            self.optimizer.zero_grad(set_to_none=True)
            self._not_finite(trouble, keys)
        self.step += 1
        self.figures_rate = rate
        self.point = _Point(self.epoch, self.position, checkpoints.random_state())
        self.since.steps += 1
        self.reporter.stepped(self.step, loss_of_step if trouble is None else math.nan)

    def _joint(
        self, loss: Tensor, parts: Mapping[str, Tensor], statistics: Mapping[str, float], count: int
    ) -> dict[str, float]:
        """The figures of one batch of all processes. Losses are joint already."""
        figures = {"loss": loss.item()} | {name: part.item() for name, part in parts.items()}
        if self.processes > 1:
            shares = ("tags_per_caption", "selected_per_caption", "caption_map_spread")
            values = [count * value if name in shares else value for name, value in statistics.items()]
            bad = float(not math.isfinite(figures["loss"]))
            joint = torch.tensor([*values, count, bad], dtype=torch.float32, device=self.accelerator.device)
            *values, count, bad = distributed.summed(joint).tolist()
            names = zip(statistics, values, strict=True)
            statistics = {name: value / count if name in shares else value for name, value in names}
            # One process that finds it is enough, whatever rounding tells the others.
            figures["loss"] = math.nan if bad and math.isfinite(figures["loss"]) else figures["loss"]
        return figures | dict(statistics)

    def _next_batch(self, signals: _Signals, *, first: bool) -> PairBatch:
        """The next batch, of the next epoch where one has ended; all processes end an epoch together."""
        started = time.perf_counter()
        while True:
            code, batch, error = BATCH, None, None
            if signals.received is None or not first:
                try:
                    batch = self._from_stream()
                    code = END if batch is None else BATCH
                # Workers of a loader are reached by Ctrl-C too, and then fail in ways of their own.
                except Exception as failure:
                    code, error = FAILED, failure
            stop = signals.received or 0
            if self.processes > 1:
                worst = torch.tensor([code, stop], device=self.accelerator.device)
                torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
                code, stop = (int(value) for value in worst)
            # Within a step there is nothing to save yet, unless its data will not come any more.
            if stop and (first or code == FAILED):
                self._stop(stop)
            if code == FAILED:
                self._save_point()
                if error is not None:
                    raise error
                raise TTDError("the data of another process failed; its own message says how")
            if code == BATCH:
                assert batch is not None
                found, self.position = batch
                self.batch_in_epoch = True
                self.since.data += time.perf_counter() - started
                return found
            if not self.batch_in_epoch:
                raise InputError(
                    f"epoch {self.epoch + 1} of the data holds no batch of {self.config.optimizer.batch_size} usable "
                    f"pairs in each of {self.processes} processes; {self.out / 'skipped.jsonl'} lists what was left out"
                )
            self.epoch, self.position, self.stream, self.batch_in_epoch = self.epoch + 1, None, None, False

    def _from_stream(self) -> tuple[Any, Any] | None:
        # A DataLoader draws a seed from torch's generator, which a resumed run would draw once more.
        before = checkpoints.random_state()
        try:
            if self.ahead:
                found = self.ahead.pop()
                if isinstance(found, Exception):
                    raise found
                return found
            if self.stream is None:
                self.stream = iter(self.loader.epoch(self.epoch, self.position))
            return next(self.stream, None)
        finally:
            checkpoints.set_random_state(before)

    def _look_ahead(self) -> None:
        """Take the next batch from the loader and queue its copy, while the device is busy with this one."""
        found: tuple[Any, Any] | Exception | None
        started = time.perf_counter()
        try:
            found = self._from_stream()
            if found is not None:
                images = found[0].images
                self.copied = images, on_device(images, self.accelerator.device)
        # It is not due yet: this step is whole, and is saved first.
        except Exception as failure:
            found = failure
        self.since.data += time.perf_counter() - started
        self.ahead.append(found)

    def _to_device(self, images: Tensor) -> Tensor:
        copied, self.copied = self.copied, None
        if copied is not None and copied[0] is images:
            return copied[1]
        return on_device(images, self.accelerator.device)

    def _not_finite(self, trouble: dict[str, Any], keys: list[str]) -> None:
        run = self.config.run
        by_process = distributed.gathered(keys)
        step = self.step + 1
        if self.main:
            said = {name: value if isinstance(value, str) else repr(value) for name, value in trouble.items()}
            self.nonfinite.add(
                {"step": step, "epoch": self.epoch, **said, "keys": [k for ks in by_process for k in ks]}
            )
        self.skipped_steps += 1
        value = trouble["loss"] if trouble["what"] == "loss" else trouble["gradient_norm"]
        what = f"the {trouble['what']} of step {step} is {value}"
        where = f"the keys of its batch are in {self.nonfinite.file}"
        if run.nonfinite == "fatal":
            self.skipped_steps -= 1
            self._save_point()
            raise NonFiniteError(
                f"{what}; {where}; lower the learning rate, or leave such steps out: run.nonfinite=skip"
            )
        if self.skipped_steps > run.max_skipped_steps:
            self.skipped_steps -= 1
            self._save_point()
            raise NonFiniteError(
                f"{what}, and {run.max_skipped_steps} steps were left out already (run.max_skipped_steps); {where}; "
                "lower the learning rate"
            )
        self.reporter.said(f"{what}, so it was left out; {where}")

    # Stopping and saving -------------------------------------------------------------------------------------------

    def _stop(self, number: int) -> None:
        saved = self._save_point()
        name = signal.Signals(number).name
        last = checkpoints.checkpoint_steps(self.out)
        kept = f"the checkpoint is {checkpoints.checkpoint_folder(self.out, last[-1])}" if last else "nothing was saved"
        after = "" if saved else " (the step that was under way could not be saved)"
        error = TrainingStoppedError(
            f"stopped by {name} after step {self.step} of {self.steps}; {kept}{after}; go on with: ttd train --out "
            f"{self.out} --resume"
        )
        error.status = 128 + number
        raise error

    def _save_point(self) -> bool:
        """Save the state of the last whole step, in the middle of the next one; ``False`` where it is past."""
        moved = self.config.ttd.teacher == "ema" or any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
            for module in self.backbone.model.modules()
        )
        if self.saved == self.step:
            return True
        between = self.epoch == self.point.epoch and self.position == self.point.position
        if moved and not between:
            return False
        self._save()
        return True

    def _checkpoint_is_due(self) -> bool:
        run = self.config.run
        if run.checkpoint_every and self.step % run.checkpoint_every == 0:
            return True
        if not run.checkpoint_minutes:
            return False
        late = time.monotonic() - self.saved_at >= 60 * run.checkpoint_minutes
        # Every process takes part in a checkpoint, and their clocks differ.
        return bool(distributed.gathered(late)[0])

    def _save(self) -> None:
        point = self.point
        positions, states = distributed.gathered(_jsonable(point.position)), distributed.gathered(point.random)
        epoch = point.epoch
        # Shares are gathered by all processes together, before the main one writes alone.
        trained = sharding.gathered_on_main(self.trained, self.main)
        moments = sharding.gathered_on_main(checkpoints.pack_optimizer(self._inner_optimizer, self.names), self.main)

        def write() -> None:
            tensors, plain = checkpoints.pack_random(states)
            scaler = self.accelerator.scaler
            teacher = self.ttd.teacher if self.config.ttd.teacher == "ema" else None
            averages = dict(teacher.model.named_parameters()) if teacher is not None else {}
            buffers = dict(self.backbone.model.named_buffers())
            checkpoints.write_checkpoint(
                self.out,
                checkpoints.Checkpoint(
                    state={
                        "step": self.step,
                        "steps": self.steps,
                        "epoch": epoch,
                        "positions": positions,
                        "processes": self.processes,
                        "scaler": scaler.state_dict() if scaler is not None else None,
                        "skipped_steps": self.skipped_steps,
                        "figures": self.figures,
                        "window": self.window.as_dict(),
                        "watch": self.watch.as_dict(),
                        "warnings": self.warnings,
                        "random": plain,
                    },
                    trained=trained,
                    buffers={n: b for n, b in buffers.items() if not torch.equal(b, self.first_buffers[n])},
                    teacher={name: averages[name] for name in self.trained if name in averages},
                    optimizer=moments,
                    random=tensors,
                ),
                self.config.run.keep,
            )

        self._agreed(write)
        self.saved, self.saved_at = self.step, time.monotonic()

    # Figures -------------------------------------------------------------------------------------------------------

    def _write_log(self) -> None:
        means = self.window.means()
        line: dict[str, Any] = {"step": self.step, "epoch": self.epoch, "learning_rate": self.figures_rate}
        line |= means | {"skipped_steps": self.skipped_steps} | self.since.figures()
        self.since = _Since()
        self.window = Window()
        self.figures = line
        new = self.watch.look(means)
        sentences = [f"step {self.step}: {sentence}" for sentence in new]
        self.warnings += sentences
        if self.main:
            self.log.add(line | ({"warnings": new} if new else {}))
        self._track(line)
        self.reporter.logged(line)
        for sentence in sentences:
            self.reporter.said(sentence)

    def _picture(self) -> None:
        run = self.config.run
        if self.draw is None or not run.picture_every or not run.pictures or self.step % run.picture_every:
            return

        def look() -> None:
            assert self.draw is not None
            folder = self.out / "pictures" / f"step-{self.step:08d}"
            make_folder(folder)
            self.draw(self.ttd, self.step, folder, self._samples())

        self._looking(look)

    def _evaluate(self) -> None:
        """Evaluate where it is due and not done, by the labelled set and by the callback: one line of the log."""
        options, every = self.config.evaluation, self.config.run.evaluate_every
        by_set = options.data is not None and (
            self.step in (0, self.steps) or bool(options.every and self.step % options.every == 0)
        )
        by_callback = self.evaluate is not None and every and self.step % every == 0
        if not by_set and not by_callback:
            return
        if self._agreed(lambda: any(step == self.step for step, _ in self._evaluations())):
            return

        def look() -> None:
            found: list[dict[str, float]] = []
            if by_set and self.labelled is not None:
                found.append(self.labelled.measure(self.ttd, self.step, self.reporter.stage))
            if by_callback and self.evaluate is not None:
                found.append(dict(self.evaluate(self.ttd, self.step)))
            figures = {name: value for one in found for name, value in one.items()}
            self.log.add({"step": self.step, "evaluation": figures})
            self._track({"step": self.step} | {f"evaluation/{name}": value for name, value in figures.items()})
            for one in found:
                self.reporter.logged({"step": self.step} | one)

        self._looking(look)

    def _evaluations(self) -> list[tuple[int, dict[str, float]]]:
        return [(line["step"], line["evaluation"]) for line in self.log.read() if "evaluation" in line]

    def _looking(self, look: Callable[[], None]) -> None:
        """Do something with the backbone that leaves the training as it was, on the main process."""
        before = checkpoints.random_state()

        def watched() -> None:
            with evaluation_mode(self.backbone), torch.no_grad():
                look()

        try:
            with nullcontext() if self.shards is None else self.shards.whole(self.main):
                self._agreed(watched)
        finally:
            checkpoints.set_random_state(before)

    def _samples(self) -> list[tuple[Any, str, list[str] | None]]:
        """The first pairs of the next batch, kept as pictures, so that a resumed run draws the same."""
        import json

        from PIL import Image

        folder = self.out / "pictures" / "samples"
        file = folder / "samples.json"
        if not file.exists():
            make_folder(folder)
            found = self._from_stream()
            self.ahead.append(found)
            if found is None:
                return []
            batch, rows = found[0], []
            for number in range(min(self.config.run.pictures, len(batch.images))):
                name = f"sample-{number + 1}.png"
                Image.fromarray(self.ttd._picture(batch.images[number].cpu())).save(folder / name)
                tags = batch.tags[number] if batch.tags is not None else None
                rows.append(
                    {"picture": name, "caption": batch.captions[number], "tags": tags, "key": batch.keys[number]}
                )
            write_whole(file, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
        rows = json.loads(file.read_text(encoding="utf-8"))
        return [(Image.open(folder / row["picture"]).convert("RGB"), row["caption"], row["tags"]) for row in rows]

    def _start_trackers(self) -> None:
        if not self.config.run.trackers:
            return
        file = self.out / "trackers.json"

        def identify() -> str:
            if not file.exists():
                write_whole(file, uuid.uuid4().hex + "\n")
            return file.read_text(encoding="utf-8").strip()

        name = self._agreed(identify)
        flat = {f"{s}.{k}": v if isinstance(v, int | float | str | bool) else repr(v)
                for s, keys in self.config.as_dict().items() for k, v in keys.items()}  # fmt: skip
        kwargs = {"tensorboard": {"purge_step": self.step + 1}, "wandb": {"id": name, "resume": "allow"}}
        try:
            self.accelerator.init_trackers(
                "ttd", config=flat, init_kwargs={key: kwargs[key] for key in self.config.run.trackers if key in kwargs}
            )
        # Trackers are foreign programs, which may want a login or a network.
        except Exception as error:
            raise TTDError(f"a tracker cannot start ({one_sentence(error)}); leave it out of run.trackers") from error

    def _track(self, line: Mapping[str, Any]) -> None:
        if self.config.run.trackers:
            values = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
            self.accelerator.log(values, step=line["step"])


class _Since:
    """Time and images since the last line of the log; a resumed run starts anew."""

    def __init__(self) -> None:
        self.started, self.images, self.steps, self.data = time.perf_counter(), 0, 0, 0.0

    def figures(self) -> dict[str, float]:
        """Images a second of all processes, seconds a step, and those among them in which the loader was asked."""
        seconds, steps = time.perf_counter() - self.started, max(self.steps, 1)
        return {
            "images_per_second": round(self.images / max(seconds, 1e-9), 2),
            "seconds_per_step": round(seconds / steps, 4),
            "data_seconds_per_step": round(self.data / steps, 4),
        }


# Parts ---------------------------------------------------------------------------------------------------------------


def open_loader(config: TrainConfig, backbone: DenseAdapter, out: Path, rank: int, processes: int) -> PairBatches:
    """The loader that the configuration names, for one process of several.

    Raises:
        InputError: no data is named, or it cannot be used.
    """
    data = config.data
    if data.source is None:
        raise InputError("no data is named; give data.source (--data), as in a folder of name.jpg and name.txt")
    from ttd_plugins.data import PairLoader, open_pairs

    known = ("shuffle", "drop_last", "buffer")
    for option in data.loader:
        if option not in known:
            raise InputError(choices_sentence("key", f"data.loader.{option}", [f"data.loader.{one}" for one in known]))
    return PairLoader(
        open_pairs(data.source, **data.options),
        backbone.dense_transform(data.image_size),
        batch_size=config.optimizer.batch_size,
        seed=config.run.seed,
        captions=data.captions,
        workers=data.workers,
        rank=rank,
        world_size=processes,
        skipped=out / "skipped.jsonl",
        max_skipped=data.max_skipped,
        pin_memory=backbone.device.type == "cuda",
        **data.loader,
    )


def _accelerator(config: TrainConfig, out: Path) -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, DistributedType
    except ImportError as error:
        raise MissingDependencyError(
            "training needs accelerate, which is not installed; run: pip install 'ttd-plugins[train]'"
        ) from error
    for tracker in config.run.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise MissingDependencyError(f"the tracker {tracker!r} is not installed; run: pip install {tracker}")
    options: dict[str, Any] = {
        "mixed_precision": config.run.mixed_precision,
        "log_with": list(config.run.trackers) or None,
        "project_dir": str(out),
        # A batch without tags, or without a contrastive term, leaves some weights without gradient.
        "kwargs_handlers": [DistributedDataParallelKwargs(find_unused_parameters=True)],
    }
    try:
        accelerator = Accelerator(cpu=config.run.cpu, **options)
        if accelerator.num_processes == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Without a GPU accelerate joins what a launcher started only where it is told to use the CPU; left apart,
            # each process would train a model of its own into the one folder.
            _forget_accelerate(processes=True)
            accelerator = Accelerator(cpu=True, **options)
    except (ValueError, ImportError) as error:
        raise InputError(f"accelerate cannot start: {one_sentence(error)}") from error
    if config.run.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        _forget_accelerate()
        raise InputError("run.mixed_precision fp16 scales its loss on a GPU only; take bf16 or no on the CPU")
    kind = accelerator.distributed_type
    refusal = None
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP):
        refusal = (
            f"accelerate is set up for {str(kind).rpartition('.')[2]}, whose checkpoints are not written here yet; "
            "choose data-parallel training or FSDP in `accelerate config`"
        )
    elif _fsdp_is_asked_for():
        refusal = _fsdp_refusal()
    if refusal is None and config.run.mixed_precision == "fp16" and (config.run.sharded or _fsdp_is_asked_for()):
        refusal = "run.mixed_precision fp16 scales its loss, which is not done with shared-out weights; take bf16 or no"
    if refusal is not None:
        _forget_accelerate()
        raise InputError(refusal)
    return accelerator


def _fsdp_is_asked_for() -> bool:
    """Whether ``accelerate launch`` was told to shard; without a GPU its own state does not say so."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _fsdp_refusal() -> str | None:
    """What of accelerate's FSDP settings, which it hands on in the environment, is not carried out here."""
    given = {
        name: os.environ.get(f"FSDP_{name}", "").lower() for name in ("OFFLOAD_PARAMS", "ACTIVATION_CHECKPOINTING")
    }
    if os.environ.get("FSDP_VERSION", "1") != "2":
        return "accelerate is set up for FSDP of version 1, and version 2 is what is there; set fsdp_version: 2"
    if given["OFFLOAD_PARAMS"] in ("true", "1"):
        return "weights are not moved to the CPU between steps; set fsdp_offload_params: false"
    if given["ACTIVATION_CHECKPOINTING"] in ("true", "1"):
        return (
            "gradient checkpointing is the backbone's own here: set run.gradient_checkpointing (--grad-checkpointing), "
            "and fsdp_activation_checkpointing: false"
        )
    return None


def _forget_accelerate(*, processes: bool = False) -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=processes)
    GradientState._reset_state()


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _jsonable(position: Any) -> Any:
    return dataclasses.asdict(position) if dataclasses.is_dataclass(position) else position  # type: ignore[arg-type]


def is_main_process() -> bool:
    """Whether this is the process that speaks for all."""
    from accelerate.state import PartialState

    return bool(PartialState().is_main_process)
