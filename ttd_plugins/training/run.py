"""One fine-tuning run in a folder: set-up, the loop with its checkpoints, evaluations and heat maps, and the result."""

from __future__ import annotations

import json
import logging
import math
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.data.images import read_image
from ttd_plugins.engine import TTD, evaluation_mode
from ttd_plugins.errors import InputError, TTDError, is_out_of_memory, one_sentence
from ttd_plugins.lora import scale_lora, scaled_lora
from ttd_plugins.training import checkpoints
from ttd_plugins.training.best_checkpoint import Verdict, judge, stopped_early
from ttd_plugins.training.checkpoint_manager import CheckpointManager
from ttd_plugins.training.compiling import compile_image_blocks
from ttd_plugins.training.config import TrainConfig
from ttd_plugins.training.falling_loss import falling_loss_sentence
from ttd_plugins.training.loop import run_loop
from ttd_plugins.training.periodic_evaluation import LabelledSet, callback_metrics
from ttd_plugins.training.prefetching import BatchPrefetcher, LoaderFailedError, PairBatches, StopRequested
from ttd_plugins.training.processes import (
    main_process_first,
    reset_accelerate,
    sharding_is_requested,
    start_accelerate,
)
from ttd_plugins.training.reporting import Reporter
from ttd_plugins.training.run_logger import RunLogger
from ttd_plugins.training.run_setup import (
    RUN_FOLDER,
    check_extension,
    open_loader,
    prepare_folder,
    total_steps,
    write_settings,
)
from ttd_plugins.training.step import StepResult, warm_up_warning
from ttd_plugins.training.stop_signals import StopSignals, TrainingStoppedError
from ttd_plugins.training.strategies import ReplicatedStrategy, ShardedStrategy, Strategy
from ttd_plugins.training.train_state import TrainState
from ttd_plugins.training.trainable_parameters import build_backbone, train_mode
from ttd_plugins.utils import distributed
from ttd_plugins.utils.deprecation import warn_renamed
from ttd_plugins.utils.files import given_path, make_folder, write_atomic
from ttd_plugins.utils.output_folder import output_folder
from ttd_plugins.utils.rng import get_rng_state, preserved_rng, seed_everything

LoaderFactory = Callable[[DenseAdapter, int, int], PairBatches]
"""Called with the backbone, the rank and the number of processes; returns this process' loader."""

Sample = tuple[Image.Image, str, list[str] | None]
"""Image, caption and tags of a pair."""

Draw = Callable[[TTD, int, Path, list[Sample]], None]
"""Called with the engine, the step, a folder and the fixed samples; writes heat maps into the folder."""

Evaluate = Callable[[TTD, int], Mapping[str, float]]
"""Called with the engine, in evaluation mode, and the step, on the main process; returns named metrics."""


LEAST_SKIPPED = 3
"""Steps that may be skipped whatever their share: a few bad samples must not end a short run."""


class NonFiniteError(TTDError):
    """A loss or gradient was not finite, and the configuration does not allow to skip the step."""


@dataclass
class TrainResult:
    """The result of a run.

    Attributes:
        folder: folder of the run.
        backbone: the tuned backbone, in evaluation mode, with unmerged LoRA where LoRA was trained.
        step: optimizer steps done in all.
        checkpoint: folder of the last checkpoint.
        metrics: last line of the log.
        skipped_steps: steps that were skipped because they were not finite.
        warnings: sentences of the watch for collapse, including those of resumed runs.
        evaluations: (step, metrics) of every evaluation in the log, on the main process; empty on others.
        notes: sentences on how the weights were chosen and on the end of the run, such as early stopping.
        best: step of the best checkpoint by ``evaluation.best``; ``None`` without one.
        diverged: one sentence where the run diverged, so that its weights are most likely useless; ``None`` otherwise.
    """

    folder: Path
    backbone: DenseAdapter
    step: int
    checkpoint: Path
    metrics: dict[str, Any]
    skipped_steps: int
    warnings: list[str] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    diverged: str | None = None
    notes: list[str] = field(default_factory=list)
    best: int | None = None

    @property
    def figures(self) -> dict[str, Any]:
        """Deprecated name of :attr:`metrics`."""
        warn_renamed("TrainResult.figures", "TrainResult.metrics")
        return self.metrics


def train_run(
    config: TrainConfig,
    out: Path | str,
    *,
    backbone: DenseAdapter | None = None,
    loader: PairBatches | LoaderFactory | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    draw: Draw | None = None,
    evaluate: Evaluate | None = None,
    resume_advice: str | None = None,
) -> TrainResult:
    """Fine-tune a backbone, in one process or in each of several; see :func:`ttd_plugins.fine_tune`.

    Args:
        resume_advice: how to continue a run that was stopped; by default the command, or the call where objects are
            given that no command has.
    """
    out = given_path(out)
    if resume_advice is None:
        given = any(one is not None for one in (backbone, loader, evaluate))
        command = shlex.join(["ttd", "train", "--out", str(out), "--resume"])
        resume_advice = "call fine_tune again with resume=True" if given else f"continue with: {command}"
    accelerator = start_accelerate(config, out)
    is_main = bool(accelerator.is_main_process)
    with ExitStack() as stack:
        stack.callback(reset_accelerate)
        # The run seeds every generator; those of the caller continue as if there had been no run.
        stack.enter_context(preserved_rng())

        def lock_folder() -> None:
            stack.enter_context(output_folder(out, RUN_FOLDER))

        main_process_first(lock_folder, is_main=is_main)
        logger = RunLogger(out, config, reporter or Reporter(), accelerator)
        try:
            run = _Run(accelerator, logger, config, out, backbone, loader, resume, draw, evaluate, resume_advice)
            try:
                return run.train()
            finally:
                run.close()
        finally:
            logger.close()


class _Run:
    """The parts of one run, and what happens around its steps (:class:`~ttd_plugins.training.loop.LoopCallbacks`)."""

    def __init__(
        self,
        accelerator: Any,
        logger: RunLogger,
        config: TrainConfig,
        out: Path,
        backbone: DenseAdapter | None,
        loader: PairBatches | LoaderFactory | None,
        resume: bool,
        draw: Draw | None,
        evaluate: Evaluate | None,
        resume_advice: str,
    ) -> None:
        self.resume_advice = resume_advice
        self.config, self.out, self.logger, self.draw, self.evaluate = config, out, logger, draw, evaluate
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self.is_main = bool(accelerator.is_main_process)
        # Only the main process evaluates.
        self.labelled: LabelledSet | None = None

        def prepare() -> None:
            self.labelled = prepare_folder(config, out, resume)
            if config.evaluation.best and not self.labelled and not (evaluate and config.run.evaluate_every):
                raise InputError(
                    "evaluation.best names a metric, and nothing is evaluated; name a labelled set in evaluation.data "
                    "(--evaluate), such as scenes"
                )

        main_process_first(prepare, is_main=self.is_main)
        self.strategy, self.ttd = self._build_strategy(accelerator, backbone)
        model = self.ttd.backbone.model
        pairs = self._open_loader(loader)
        skipped = f", {config.optimizer.batch_size} in each of {self.processes} processes; see {out / 'skipped.jsonl'}"
        self.prefetcher = BatchPrefetcher(
            pairs,
            self.strategy.device,
            prepare_texts=self.ttd.prepare_texts,
            processes=self.processes,
            empty_epoch_advice=skipped,
        )
        self.state = TrainState(
            self.ttd,
            self.strategy,
            {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad},
            {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
            total_steps=total_steps(config, pairs, self.processes),
            weight_ema=config.run.weight_ema,
        )
        warning = warm_up_warning(config.optimizer.warm_up, self.state.total_steps)
        if warning is not None and self.is_main:
            logger.message(warning, logging.WARNING)
        train_mode(self.ttd.backbone)
        self.ttd.training = True
        # Another seed for every process, or their dropout would be the same.
        seed_everything(config.run.seed + 1_000_003 * self.rank)
        self.checkpoints = CheckpointManager(out, config.run, rank=self.rank, processes=self.processes)
        self.signals = StopSignals(logger.message)
        self._undo_compile: Callable[[], None] = lambda: None
        self._restore()
        main_process_first(self._check_labelled, is_main=self.is_main)
        if config.run.compile:
            self._undo_compile = compile_image_blocks(self.ttd.backbone)

    # Set-up --------------------------------------------------------------------------------------------------------

    def _build_strategy(self, accelerator: Any, given: DenseAdapter | None) -> tuple[Strategy, TTD]:
        config = self.config
        sharded = self.processes > 1 and sharding_is_requested(config)
        if config.run.compile and sharded:
            raise InputError("run.compile does not support sharded weights; remove one of the two options")
        backbone = build_backbone(config, given, run=self.out)
        backbone.to(accelerator.device)
        if config.run.gradient_checkpointing:
            backbone.set_grad_checkpointing()
        if "full" in (config.towers.image, config.towers.text) or config.towers.logit_scale:
            backbone.snapshot_weights()
        options = config.ttd
        if sharded and config.towers.text != "frozen":
            # Gathered weights are new tensors at old addresses, so that cached embeddings would pass for new ones.
            options = replace(options, text_cache_size=0)
        ttd = TTD(backbone, options)
        if sharded:
            return ShardedStrategy(ttd, config.optimizer, accelerator), ttd
        return ReplicatedStrategy(ttd, config.optimizer, accelerator), ttd

    def _open_loader(self, given: PairBatches | LoaderFactory | None) -> PairBatches:
        backbone = self.ttd.backbone
        if given is None:
            return open_loader(self.config, backbone, self.out, self.rank, self.processes)
        if hasattr(given, "epoch"):
            return cast(PairBatches, given)
        return cast(LoaderFactory, given)(backbone, self.rank, self.processes)

    def _restore(self) -> None:
        restored = self.checkpoints.restore(self.state)
        step = self.state.step if restored else -1
        message = check_extension(self.state, self.config.optimizer, self.out)
        if message is not None:
            self.logger.message(message)
        self.logger.truncate(step)
        if self.is_main and self.labelled is not None:
            self.labelled.delete_after(step)
        self.prefetcher.seek(self.state.point.epoch, self.state.point.position)
        if not restored:
            self.state.point = replace(self.state.point, rng=get_rng_state())

    def _check_labelled(self) -> None:
        if self.labelled is not None:
            self.labelled.check(self.ttd)

    # Training ------------------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Take all steps that are left, and return the result."""
        state = self.state
        # Not before the set-up is complete, so that a mistake in it leaves no run behind.
        main_process_first(lambda: write_settings(self.config, self.out), is_main=self.is_main)
        self.logger.start(state)
        self.checkpoints.start_clock()
        with self.signals:
            if state.step == 0:
                self._draw_heatmaps()
                norm = state.weight_norm()
                if norm is not None:
                    state.health.weigh(norm, ())
            self._evaluate()
            self._judge()
            try:
                run_loop(state, self.prefetcher, self.config.optimizer, self, self.signals)
            except StopRequested as request:
                raise self._stopped(request.signal_number) from None
            except LoaderFailedError as failure:
                self.checkpoints.save_within_step(state, self.prefetcher)
                if failure.__cause__ is not None:
                    raise failure.__cause__ from None
                raise
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise self._out_of_memory(error) from error
            if self.checkpoints.saved_step != state.step:
                self.checkpoints.save(state)
        # Before the shards end, whose average is sharded too.
        state.use_average()
        self.strategy.finish()
        self.ttd.eval()
        notes = self._notes()
        if self.config.towers.lora_scale != 1:
            scale_lora(self.ttd.backbone, self.config.towers.lora_scale)
        return TrainResult(
            folder=self.out,
            backbone=self.ttd.backbone,
            step=state.step,
            checkpoint=checkpoints.checkpoint_folder(self.out, state.step),
            metrics=state.metrics,
            skipped_steps=state.skipped_steps,
            warnings=state.warnings,
            evaluations=self.logger.evaluations() if self.is_main else [],
            diverged=self._divergence(),
            notes=notes,
            best=self.checkpoints.best_step,
        )

    def step_ended(self, result: StepResult) -> None:
        """Log, draw, save and evaluate where it is due."""
        state, options = self.state, self.config.run
        if result.problem is None:
            self._watch(state.step, result)
        self.logger.count(state, result, self.prefetcher.take_seconds())
        self.logger.reporter.on_step(state.step, result.loss)
        if state.step % options.log_every == 0 or state.step == state.total_steps:
            self.logger.write_line(state, result.learning_rate)
        self._draw_heatmaps()
        if self.checkpoints.is_due(state):
            self.checkpoints.save(state)
        # After the checkpoint, so that a run that is killed while it evaluates repeats nothing else.
        if self._evaluate():
            self._judge()

    def step_skipped(self, result: StepResult) -> None:
        """Write the keys of a step that was not finite; end the run where the configuration says so."""
        state, options = self.state, self.config.run
        keys = [key for of_process in distributed.gathered(result.keys) for key in of_process]
        problem, step = result.problem or {}, state.step + 1
        if self.is_main:
            self.logger.write_skipped(step, self.prefetcher.epoch, problem, keys)
        self._watch(step, result)
        value = problem["loss" if problem["what"] == "loss" else "gradient_norm"]
        what = f"the {problem['what']} of step {step} is {value}"
        where = f"the keys of its batch are in {self.logger.skipped.file}"
        by_share = max(LEAST_SKIPPED, math.floor(options.max_skipped_share * state.total_steps))
        limit = min(options.max_skipped_steps, by_share)
        advice = None
        if options.nonfinite == "fatal":
            advice = f"{what}; {where}; lower the learning rate, or skip such steps: run.nonfinite=skip"
        elif state.skipped_steps + 1 > limit:
            option = "run.max_skipped_share" if limit == by_share else "run.max_skipped_steps"
            advice = (
                f"{what}, and {limit} steps were skipped already ({option}); {where}; lower the learning rate"
                f"{self._earlier_checkpoint()}"
            )
        if advice is not None:
            self.checkpoints.save_within_step(state, self.prefetcher)
            raise NonFiniteError(advice)
        state.skipped_steps += 1
        self.logger.message(f"{what}, so the step was skipped; {where}", logging.WARNING)

    def _watch(self, step: int, result: StepResult) -> None:
        """Judge a step, and protect the checkpoints from before it where the run starts to diverge."""
        health, count = self.state.health, max(len(result.statistics), 1)
        spreads = [one["caption_map_spread"] for one in result.statistics if "caption_map_spread" in one]
        metrics = {"caption_map_spread": sum(spreads) / count} if spreads else {}
        existing = checkpoints.checkpoint_steps(self.out) if self.is_main else []
        diverges = health.add(step, result.loss, metrics, existing, skipped=result.problem is not None)
        # Measured as often as lines are logged: it reads every weight.
        due = step % self.config.run.log_every == 0 or step == self.state.total_steps
        norm = self.state.weight_norm() if due else None
        if norm is not None:
            diverges = health.weigh(norm, existing) or diverges
        if diverges:
            why = health.sentence(result.loss, metrics.get("caption_map_spread"))
            self.logger.message(
                f"step {step}: the run diverges: {why}; lower the learning rate{self._earlier_checkpoint()}",
                logging.WARNING,
            )

    def _divergence(self) -> str | None:
        """Describe why the weights after the last step are most likely useless, if they are."""
        health, metrics = self.state.health, self.state.metrics
        if not health.diverged:
            return None
        why = health.sentence(metrics.get("loss", math.nan), metrics.get("caption_map_spread"))
        return (
            f"the run diverged: {why}; its weights are most likely useless; lower the learning rate"
            f"{self._earlier_checkpoint()}"
        )

    def _earlier_checkpoint(self) -> str:
        """Name the checkpoint from before the first trouble, for messages."""
        kept = self.state.health.kept
        return f"; the checkpoint before that is {checkpoints.checkpoint_folder(self.out, kept[0])}" if kept else ""

    def _out_of_memory(self, error: Exception) -> TTDError:
        """Save, where the step under way has changed nothing, and return the error that says so."""
        # Other processes are within a collective operation, which no checkpoint can join.
        if self.processes == 1 and not self.state.updating:
            self.strategy.optimizer.zero_grad(set_to_none=True)
            self.checkpoints.save_within_step(self.state, self.prefetcher)
        newest = self.checkpoints.newest()
        return TTDError(
            f"memory ran out in step {self.state.step + 1} ({one_sentence(error, 160)}); lower optimizer.batch_size or "
            f"data.image_size, or set run.gradient_checkpointing; "
            f"{f'the checkpoint is {newest}' if newest else 'nothing was saved'}"
        )

    def _stopped(self, number: int) -> TrainingStoppedError:
        """Save, and return the error that says where the run stopped."""
        saved = self.checkpoints.save_within_step(self.state, self.prefetcher)
        newest = self.checkpoints.newest()
        kept = f"the checkpoint is {newest}" if newest else "nothing was saved"
        note = "" if saved else " (the step that was under way could not be saved)"
        error = TrainingStoppedError(
            f"stopped by {signal.Signals(number).name} after step {self.state.step} of {self.state.total_steps}; "
            f"{kept}{note}; {self.resume_advice}"
        )
        error.status = 128 + number
        return error

    def close(self) -> None:
        """End the loader's workers, and leave the backbone as the caller had it."""
        self.prefetcher.close()
        self._undo_compile()

    # Between steps -------------------------------------------------------------------------------------------------

    def _without_side_effects(self, action: Callable[[], None]) -> None:
        """Use the backbone on the main process and leave the training as it was. Collective."""

        def in_evaluation_mode() -> None:
            with evaluation_mode(self.ttd.backbone), torch.no_grad():
                action()

        with preserved_rng(), self._final_weights(), self.strategy.full_weights(self.is_main):
            main_process_first(in_evaluation_mode, is_main=self.is_main)

    @contextmanager
    def _final_weights(self) -> Iterator[None]:
        """Use the weights that the run would yield now: their average if there is one, and LoRA with its scale."""
        with self.state.averaged_weights(), scaled_lora(self.ttd.backbone, self.config.towers.lora_scale):
            yield

    def _draw_heatmaps(self) -> None:
        options, step, draw = self.config.run, self.state.step, self.draw
        if draw is None or not options.heatmap_every or not options.heatmap_samples or step % options.heatmap_every:
            return

        def action() -> None:
            folder = self.out / "pictures" / f"step-{step:08d}"
            make_folder(folder)
            draw(self.ttd, step, folder, self._fixed_samples())

        self._without_side_effects(action)

    def _fixed_samples(self) -> list[Sample]:
        """Return the first pairs of the next batch, stored as images, so that a resumed run draws the same."""
        folder = self.out / "pictures" / "samples"
        file = folder / "samples.json"
        if not file.exists():
            make_folder(folder)
            found = self.prefetcher.peek()
            if found is None:
                return []
            batch, rows = found.batch, []
            for number in range(min(self.config.run.heatmap_samples, len(batch.images))):
                name = f"sample-{number + 1}.png"
                Image.fromarray(self.ttd.image_array(batch.images[number].cpu())).save(folder / name)
                tags = batch.tags[number] if batch.tags is not None else None
                rows.append(
                    {"picture": name, "caption": batch.captions[number], "tags": tags, "key": batch.keys[number]}
                )
            write_atomic(file, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
            return [(read_image(folder / row["picture"]), row["caption"], row["tags"]) for row in rows]
        except InputError as error:
            raise InputError(f"{error}; delete {folder}, and other samples are drawn") from error
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise InputError(
                f"the fixed samples in {folder} cannot be read ({one_sentence(error)}); delete that folder"
            ) from error

    def _evaluate(self) -> bool:
        """Evaluate on the labelled set and by the callback, where it is due and not in the log yet. Collective.

        Returns:
            Whether it was evaluated.
        """
        options, every, state = self.config.evaluation, self.config.run.evaluate_every, self.state
        by_set = options.data is not None and (
            state.step in (0, state.total_steps) or bool(options.every and state.step % options.every == 0)
        )
        by_callback = self.evaluate is not None and bool(every) and state.step % every == 0
        if not by_set and not by_callback:
            return False
        if main_process_first(
            lambda: any(step == state.step for step, _ in self.logger.evaluations()), is_main=self.is_main
        ):
            return False

        def action() -> None:
            found: list[dict[str, float]] = []
            if by_set and self.labelled is not None:
                found.append(self.labelled.measure(self.ttd, state.step, self.logger.reporter.stage))
            if by_callback and self.evaluate is not None:
                found.append(callback_metrics(self.evaluate(self.ttd, state.step)))
            self.logger.write_evaluation(state.step, found)

        self._without_side_effects(action)
        return True

    def _judge(self) -> None:
        """Keep the best checkpoint by the named metric, and end the run where its patience is exhausted. Collective."""
        options, state = self.config.evaluation, self.state
        if options.best is None:
            return

        def read(*more: int) -> Verdict | None:
            existing = {*checkpoints.checkpoint_steps(self.out), *more}
            return judge(self.logger.evaluations(), options, existing)

        # As if this step had a checkpoint, which it gets if it is the best.
        verdict = main_process_first(lambda: read(*([state.step] if state.step else [])), is_main=self.is_main)
        if verdict is None:
            return
        self.checkpoints.best_step = verdict.step
        if verdict.step == state.step and self.checkpoints.saved_step != state.step:
            self.checkpoints.save(state)
        if verdict.ends_run and state.step < state.total_steps:
            state.ended = True
            self.logger.message(f"{stopped_early(verdict, state.step)}; {verdict.sentence()}")

    def _notes(self) -> list[str]:
        """Sentences for the end of the run; on the main process only."""
        if not self.is_main:
            return []
        config, state, notes = self.config, self.state, []
        verdict = judge(self.logger.evaluations(), config.evaluation, checkpoints.checkpoint_steps(self.out))
        if verdict is not None:
            if state.ended:
                notes.append(stopped_early(verdict, state.step))
            run = shlex.quote(str(self.out))
            notes.append(f"{verdict.sentence()}; export it with: ttd export {run} --step best --out FOLDER")
        if config.run.weight_ema is not None:
            notes.append(
                f"the backbone, its evaluations and its export have the moving average of the trained weights "
                f"(run.weight_ema={config.run.weight_ema:g})"
            )
        if config.towers.lora_scale != 1:
            notes.append(
                f"LoRA is scaled by {config.towers.lora_scale:g} in the backbone, its evaluations and its export "
                "(towers.lora_scale); checkpoints store it as trained"
            )
        ttd = config.ttd
        if ttd.contrastive_weight > 0 and (ttd.tag_weight > 0 or ttd.distill_weight > 0):
            sentence = falling_loss_sentence(self.logger.values("contrastive"))
            notes += [] if sentence is None else [sentence]
        return notes
