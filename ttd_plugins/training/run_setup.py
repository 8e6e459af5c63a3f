"""Set-up of a run: its folder, the options that a resumed run may change, its loader and its number of steps."""

from __future__ import annotations

import math
import shutil
from dataclasses import fields
from pathlib import Path

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.lora.files import CONFIG_FILE as LORA_CONFIG_FILE
from ttd_plugins.lora.files import WEIGHTS_FILE as LORA_WEIGHTS_FILE
from ttd_plugins.training import checkpoints
from ttd_plugins.training.config import EvaluationConfig, LoaderConfig, OptimizerConfig, TrainConfig
from ttd_plugins.training.jsonl_log import JsonlLog
from ttd_plugins.training.periodic_evaluation import LabelledSet, open_evaluation
from ttd_plugins.training.prefetching import PairBatches
from ttd_plugins.training.step import effective_warm_up, learning_rate_factor
from ttd_plugins.training.train_state import TrainState
from ttd_plugins.training.trainable_parameters import INITIAL_LORA
from ttd_plugins.utils import configuration
from ttd_plugins.utils.files import write_atomic
from ttd_plugins.utils.output_folder import FolderKind
from ttd_plugins.utils.settings import first_difference

RESUME_MUTABLE_KEYS = (
    "data.max_skipped", "run.log_every", "run.checkpoint_every", "run.checkpoint_minutes", "run.keep",
    "run.heatmap_every", "run.heatmap_samples", "run.evaluate_every", "run.trackers", "run.nonfinite",
    "run.max_skipped_steps", "run.max_skipped_share", "run.sharded", "run.compile",
    "optimizer.steps", "optimizer.epochs", "towers.lora_scale",
    *(f"evaluation.{one.name}" for one in fields(EvaluationConfig)),
)  # fmt: skip
"""Options that a resumed run may change: they affect neither the data nor, except for rounding, the gradients.

The number of steps decides the learning rates of the steps that are left."""

RUN_SECTIONS = {"backbone", "data", "towers", "optimizer", "ttd", "run"}
"""Sections of the ``config.yaml`` of every release."""


def prepare_folder(config: TrainConfig, out: Path, resume: bool) -> LabelledSet | None:
    """Make the folder of a run or check that the run in it may be resumed; returns the labelled set, if any.

    Raises:
        InputError: the folder has a run that is not to be resumed or has another configuration, or the labelled set
            cannot be used.
    """
    file, log = out / "config.yaml", out / "log.jsonl"
    if file.exists() and (checkpoints.checkpoint_steps(out) or (log.exists() and log.stat().st_size)):
        if not resume:
            raise InputError(f"{out} has a run already; continue it with --resume, or choose another --out")
        difference = first_difference(TrainConfig.read(file).as_dict(), config.as_dict(), ignore=RESUME_MUTABLE_KEYS)
        if difference is not None:
            raise InputError(
                f"{difference.name} differs from the configuration of the run in {out}; keep its value, or start "
                "another run"
            )
    # A wrong layout is found before anything is loaded or written.
    labelled = open_evaluation(config.evaluation, out)
    checkpoints.remove_unfinished(out)
    return labelled


def is_earlier_run(folder: Path) -> bool:
    """Whether a folder is a run of a release that wrote no marker: its configuration, and a log or a checkpoint."""
    try:
        TrainConfig.read(folder / "config.yaml")
        sections = configuration.read_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
        lines = JsonlLog(folder / "log.jsonl").read()
    except (TTDError, OSError):
        return False
    steps = checkpoints.checkpoint_steps(folder)
    saved = [checkpoints.checkpoint_folder(folder, step) / checkpoints.STATE for step in steps]
    return sections.keys() >= RUN_SECTIONS and (bool(lines) or any(file.is_file() for file in saved))


RUN_FOLDER = FolderKind("run", "the folder of a run of ttd train", is_earlier_run)


def total_steps(config: TrainConfig, loader: PairBatches, processes: int) -> int:
    """Return the optimizer steps of a run.

    Raises:
        InputError: the number of batches in an epoch is not known, or there is none.
    """
    options = config.optimizer
    if options.steps is not None:
        return options.steps
    batches = loader.batches_per_epoch()
    if batches is None:
        raise InputError(
            "the number of pairs is not known before they are read; set the length of the training: optimizer.steps "
            "(--steps)"
        )
    if batches < 1:
        raise InputError(
            f"the data does not fill one batch of {options.batch_size} in each of {processes} processes; lower "
            "optimizer.batch_size (--batch-size)"
        )
    return max(1, math.ceil(options.epochs * batches / options.accumulation))


def open_loader(config: TrainConfig, backbone: DenseAdapter, out: Path, rank: int, processes: int) -> PairBatches:
    """Return the loader that the configuration names, for one process of several.

    Raises:
        InputError: no data is named, or the data cannot be used.
    """
    data = config.data
    if data.source is None:
        raise InputError("no data is named; set data.source (--data), for example a folder of name.jpg and name.txt")
    from ttd_plugins.data import PairLoader, open_pairs

    options = configuration.from_mapping(LoaderConfig, data.loader, "data.loader")
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
        **configuration.plain_values(options),
    )


def write_settings(config: TrainConfig, out: Path) -> None:
    """Write ``config.yaml`` of a run, and copy the LoRA that it starts from, which resuming and export need."""
    source, copied = config.towers.lora_from, out / INITIAL_LORA
    if source is not None and not copied.is_dir():
        part = copied.with_name(f"{INITIAL_LORA}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for name in (LORA_CONFIG_FILE, LORA_WEIGHTS_FILE):
            shutil.copyfile(Path(source) / name, part / name)
        part.rename(copied)
    write_atomic(out / "config.yaml", config.yaml())


def check_extension(state: TrainState, options: OptimizerConfig, out: Path) -> str | None:
    """Return a sentence where a resumed run has another number of steps than before; ``None`` if it has the same.

    Raises:
        InputError: the run has more steps than that already.
    """
    before, now = state.stored_steps, state.total_steps
    if before is None or before == now:
        return None
    if now < state.step:
        raise InputError(
            f"the run in {out} has {state.step} steps already, and {now} are requested; set optimizer.steps (--steps) "
            f"to more than {state.step}"
        )
    warm_up = effective_warm_up(options.warm_up, now)
    rate = options.learning_rate * learning_rate_factor(state.step, now, warm_up, options.schedule)
    return (
        f"the run has {now} steps instead of {before}; from step {state.step + 1} on, its learning rate is that of a "
        f"run of {now} steps ({options.schedule}, next {rate:.3g})"
    )
