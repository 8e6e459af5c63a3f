"""The state of a run: everything that a checkpoint stores, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ttd_plugins.engine import TTD
from ttd_plugins.errors import InputError
from ttd_plugins.training import checkpoints
from ttd_plugins.training.collapse_watch import CollapseWatch, MetricAverager
from ttd_plugins.training.divergence import DivergenceWatch
from ttd_plugins.training.sharding import shard_like
from ttd_plugins.training.strategies import Strategy
from ttd_plugins.utils import distributed
from ttd_plugins.utils.rng import get_rng_state, set_rng_state


@dataclass(frozen=True)
class ResumePoint:
    """Resumable state after the last step: epoch, loader position, RNG."""

    epoch: int
    position: Any
    rng: dict[str, Any]


@dataclass
class TrainState:
    """Everything that a checkpoint stores.

    Attributes:
        ttd: the engine; its backbone's trained parameters and changed buffers, and its EMA teacher, are stored.
        strategy: holds the optimizer and the gradient scaler.
        total_steps: optimizer steps of the whole run.
        step: optimizer steps done.
        point: where the data and the random generators stood after the last step.
        skipped_steps: steps that were skipped because the loss or the gradient was not finite.
        averager: metrics since the last line of the log.
        watch: state of the watch for collapse.
        health: state of the watch for divergence.
        warnings: sentences of the watch for collapse.
        metrics: last line of the log.
        trained: trained parameters by name.
        initial_buffers: buffers of the backbone before training; only those that changed are stored.
        weight_ema: decay of the moving average of the trained weights; ``None`` without one.
        average: that average by name, empty without one.
        stored_steps: total steps that the restored checkpoint was written for; ``None`` in a new run.
        ended: whether the run stops after this step, before ``total_steps``.
        updating: whether the optimizer is changing the parameters; an exception then leaves them half changed.
    """

    ttd: TTD
    strategy: Strategy
    trained: dict[str, nn.Parameter]
    initial_buffers: dict[str, Tensor]
    total_steps: int
    step: int = 0
    point: ResumePoint = field(default_factory=lambda: ResumePoint(0, None, get_rng_state()))
    skipped_steps: int = 0
    averager: MetricAverager = field(default_factory=MetricAverager)
    watch: CollapseWatch = field(default_factory=CollapseWatch)
    health: DivergenceWatch = field(default_factory=DivergenceWatch)
    warnings: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    updating: bool = False
    weight_ema: float | None = None
    average: dict[str, Tensor] = field(default_factory=dict)
    stored_steps: int | None = None
    ended: bool = False

    def __post_init__(self) -> None:
        self.tuned_from = self.ttd.backbone.tuned_from
        if self.weight_ema is not None:
            self.average = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in self.trained.items()}

    def end_step(self, epoch: int, position: Any) -> None:
        """Count a step and store where the next one begins."""
        self.step += 1
        self.point = ResumePoint(epoch, position, get_rng_state())

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the trained weights, after the optimizer's step.

        The decay of the first steps is smaller, ``min(decay, (1 + n) / (10 + n))`` after n steps, so that a short run
        is not an average of its first weights.
        """
        if self.weight_ema is not None:
            decay = min(self.weight_ema, (1 + self.step) / (10 + self.step))
            for name, parameter in self.trained.items():
                self.average[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Use the average within a ``with`` block, if there is one; afterwards the weights are bitwise as before."""
        trained = {name: self.trained[name].detach().clone() for name in self.average}
        try:
            self.use_average()
            yield
        finally:
            with torch.no_grad():
                for name, value in trained.items():
                    self.trained[name].copy_(value)

    @torch.no_grad()
    def use_average(self) -> None:
        """Replace the trained weights by their average, if there is one."""
        for name, value in self.average.items():
            self.trained[name].copy_(value)

    def to_checkpoint(self, *, is_main: bool, processes: int) -> checkpoints.Checkpoint | None:
        """Return the checkpoint on the main process and ``None`` on the others. Collective."""
        position = self.point.position
        plain = dataclasses.asdict(position) if dataclasses.is_dataclass(position) else position  # type: ignore[arg-type]
        positions, rng_states = distributed.gathered(plain), distributed.gathered(self.point.rng)
        # Shards are gathered by all processes together, before the main one writes alone.
        trained = self.strategy.gather(self.trained, is_main)
        moments = checkpoints.pack_optimizer(self.strategy.inner_optimizer, self._names)
        moments = self.strategy.gather(moments, is_main)
        average = self.strategy.gather(self.average, is_main)
        if not is_main:
            return None
        rng_tensors, rng_values = checkpoints.pack_rng_states(rng_states)
        scaler, teacher = self.strategy.scaler, self._stored_teacher()
        averages = {} if teacher is None else dict(teacher.named_parameters())
        buffers = dict(self.ttd.backbone.model.named_buffers())
        return checkpoints.Checkpoint(
            state={
                "step": self.step,
                "steps": self.total_steps,
                "family": self._family(),
                "epoch": self.point.epoch,
                "positions": positions,
                "processes": processes,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "skipped_steps": self.skipped_steps,
                "figures": self.metrics,
                "window": self.averager.as_dict(),
                "watch": self.watch.as_dict(),
                "health": self.health.as_dict(),
                "warnings": self.warnings,
                "random": rng_values,
            }
            | ({} if self.tuned_from is None else {checkpoints.TUNED_FROM: self.tuned_from.as_dict()}),
            trained=trained,
            buffers={name: value for name, value in buffers.items() if self._changed(name, value)},
            teacher={name: averages[name] for name in self.trained if name in averages},
            average=average,
            optimizer=moments,
            random=rng_tensors,
        )

    def restore(self, stored: checkpoints.Checkpoint, where: str, *, rank: int, processes: int) -> None:
        """Load a checkpoint, random state included.

        Raises:
            InputError: the checkpoint was written by another number of processes, belongs to another backbone, or is
                damaged.
        """
        with checkpoints.damage_is_reported(where):
            self._restore(stored, where, rank=rank, processes=processes)

    def _restore(self, stored: checkpoints.Checkpoint, where: str, *, rank: int, processes: int) -> None:
        state = stored.state
        checkpoints.require_same_base(state, self.ttd.backbone, where)
        family, own = state.get("family"), self._family()
        # Checkpoints of older releases do not have it.
        if (
            isinstance(family, dict)
            and own["distribution"]
            and family.get("distribution") not in (None, own["distribution"])
        ):
            raise InputError(
                f"{where} is of a backbone from the distribution {family['distribution']}, and {own['distribution']} "
                f"now provides the family {own['name']!r}; install the first, or leave the second out with "
                "TTD_PLUGINS_DENY"
            )
        if state["processes"] != processes:
            raise InputError(
                f"{where} was written by {state['processes']} processes and cannot be continued by {processes}; start "
                f"{state['processes']}"
            )
        if set(stored.trained) != set(self.trained):
            raise InputError(f"{where} has other tensors than this configuration trains; it is of another backbone")
        checkpoints.load_tensors(self.ttd.backbone.model, stored.trained, where)
        checkpoints.load_tensors(self.ttd.backbone.model, stored.buffers, where)
        if set(stored.average) != set(self.average):
            raise InputError(
                f"{where} has {'no' if self.average else 'a'} moving average of the weights, and run.weight_ema is "
                f"{self.weight_ema}; restore its average.safetensors, or start another run"
            )
        for name, value in stored.average.items():
            self.average[name].copy_(shard_like(value, self.average[name]))
        if self._stored_teacher() is not None and not stored.teacher:
            raise InputError(
                f"{where} has no moving average, and ttd.teacher=ema needs it to continue; restore its "
                "teacher.safetensors, or start another run"
            )
        if self.ttd.teacher is not None:
            checkpoints.load_tensors(self.ttd.teacher.model, stored.teacher, where)
        checkpoints.unpack_optimizer(self.strategy.inner_optimizer, stored.optimizer, self._names)
        if self.strategy.scaler is not None and state["scaler"] is not None:
            self.strategy.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped_steps, self.stored_steps = state["step"], state["skipped_steps"], state["steps"]
        self.averager, self.watch = MetricAverager(**state["window"]), CollapseWatch.from_dict(state["watch"])
        # Older checkpoints have no watch for divergence.
        self.health = DivergenceWatch(**(state.get("health") or {}))
        self.warnings, self.metrics = state["warnings"], state["figures"]
        rng = checkpoints.unpack_rng_state(stored.random, state["random"], rank)
        set_rng_state(rng)
        self.point = ResumePoint(state["epoch"], state["positions"][rank], rng)

    def weight_norm(self) -> float | None:
        """Norm of all trained weights; ``None`` where they are sharded."""
        weights = [parameter.detach() for parameter in self.trained.values()]
        if any(hasattr(weight, "full_tensor") for weight in weights):
            return None
        norms = torch.stack([weight.norm(dtype=torch.float32) for weight in weights])
        return float(norms.norm())

    def changes_in_forward_pass(self) -> bool:
        """Whether a forward pass alone changes stored state: an EMA teacher, or running statistics."""
        return self._stored_teacher() is not None or any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
            for module in self.ttd.backbone.model.modules()
        )

    def _family(self) -> dict[str, str | None]:
        """The backbone's family, and the installed distribution that provides it."""
        backbone = self.ttd.backbone
        name, version = backbone.distribution or (None, None)
        return {"name": backbone.description.family, "distribution": name, "version": version}

    def _stored_teacher(self) -> nn.Module | None:
        teacher = self.ttd.teacher
        return teacher.model if teacher is not None and self.ttd.options.teacher == "ema" else None

    def _changed(self, name: str, value: Tensor) -> bool:
        return not torch.equal(value, self.initial_buffers[name])
