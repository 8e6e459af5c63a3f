"""Checkpoints of a run: folders of safetensors and JSON files, complete or absent.

    RUN/checkpoints/step-00000100/
        trained.safetensors     every trained tensor, named as in adapter.model.named_parameters()
        buffers.safetensors     buffers that training changed, such as those of batch normalisation
        teacher.safetensors     the moving average, with the EMA teacher
        average.safetensors     the moving average of the trained weights, with run.weight_ema
        optimizer.safetensors   the optimizer's tensors: "exp_avg/NAME" and so on
        random.safetensors      RNG states of every process
        state.json              step, epoch, loader positions, gradient scaler, metrics and the rest of the state;
                                SHA-256 of every other file and of itself, which reading verifies

A folder is written under a name that ends in ``.part`` and renamed when it is complete;
:func:`remove_unfinished` deletes what an interruption left.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ttd_plugins.errors import InputError, TTDError, one_sentence
from ttd_plugins.training.checkpoint_state import CHECKSUMS, FILES, StateSeal, check_state
from ttd_plugins.training.sharding import shard_like
from ttd_plugins.utils.contract_types import TunedFrom
from ttd_plugins.utils.files import file_sha256, flush_to_disk, follow_umask
from ttd_plugins.utils.state_dicts import read_state_dict

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter
    from ttd_plugins.training.config import TrainConfig

FORMAT = 1
TUNED_FROM = "tuned_from"
"""Key of the state that identifies the run or LoRA which the backbone was tuned from before this run."""
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8,})")
TRAINED, BUFFERS, TEACHER, AVERAGE, OPTIMIZER, RANDOM, STATE = (
    "trained.safetensors", "buffers.safetensors", "teacher.safetensors", "average.safetensors", "optimizer.safetensors",
    "random.safetensors", "state.json",
)  # fmt: skip


@dataclass
class Checkpoint:
    """The files of one checkpoint.

    Attributes:
        state: content of ``state.json``; ``state["step"]`` is the number of optimizer steps done.
        trained, buffers, teacher, average, optimizer, random: named tensors.
    """

    state: dict[str, Any]
    trained: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    random: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of each file, by file name; the file of the average exists only where there is one."""
        average = {AVERAGE: self.average} if self.average else {}
        return average | {
            TRAINED: self.trained,
            BUFFERS: self.buffers,
            TEACHER: self.teacher,
            OPTIMIZER: self.optimizer,
            RANDOM: self.random,
        }


# Files ---------------------------------------------------------------------------------------------------------------


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    folder = run / FOLDER
    names = [_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name[1]) for name in names if name)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return run / FOLDER / f"step-{step:08d}"


def remove_unfinished(run: Path) -> None:
    """Delete what an interrupted write or deletion left."""
    for path in (run / FOLDER).glob("*.part"):
        shutil.rmtree(path, ignore_errors=True)


def write_checkpoint(run: Path, checkpoint: Checkpoint, keep: int, *, protected: Collection[int] = ()) -> Path:
    """Write a checkpoint, and then delete all but this one and the newest ``keep``.

    Args:
        run: folder of the run.
        checkpoint: its content.
        keep: how many of the newest checkpoints stay.
        protected: steps whose checkpoints stay in any case.

    Raises:
        InputError: it cannot be written, for example on a full disk; earlier checkpoints are not touched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = checkpoint_folder(run, checkpoint.state["step"])
    part = final.with_name(final.name + ".part")
    try:
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            seal = StateSeal()
            for name, tensors in checkpoint.tensors().items():
                save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, part / name)
                # safetensors writes files that only their owner can read.
                follow_umask(part / name)
                flush_to_disk(part / name)
                seal.add(part / name)
            state = json.dumps(seal.sealed({"format": FORMAT} | checkpoint.state), indent=1, allow_nan=True)
            (part / STATE).write_text(state + "\n", encoding="utf-8")
            flush_to_disk(part / STATE)
            flush_to_disk(part)
            if final.exists():  # from a run that was resumed at an earlier step
                _delete(final)
            part.rename(final)
            flush_to_disk(final.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        steps = checkpoint_steps(run)
        last = f"the last good one is {checkpoint_folder(run, steps[-1])}" if steps else "there is no earlier one"
        reason = getattr(error, "strerror", None) or one_sentence(error)
        raise InputError(
            f"the checkpoint of step {checkpoint.state['step']} cannot be written to {final.parent} ({reason}); {last}"
            "; fix the cause and continue with --resume"
        ) from error
    # The folder may have checkpoints of later steps, so that the new one is not among the newest.
    stays = {checkpoint.state["step"], *protected}
    for step in [step for step in checkpoint_steps(run)[:-keep] if step not in stays]:
        _delete(checkpoint_folder(run, step))
    return final


def read_checkpoint(run: Path, step: int | None = None, *, complete: bool = True) -> Checkpoint:
    """Read the checkpoint of a step, by default the newest, and verify its checksums.

    A checkpoint whose state has no checksums is read without this verification.

    Args:
        run: folder of the run.
        step: step of the checkpoint; by default the newest.
        complete: whether every field that resuming a run needs must be present.

    Raises:
        InputError: there is no such checkpoint, or one of its files is damaged.
    """
    state = read_state(run, step, complete=complete)
    names = [TRAINED, BUFFERS, TEACHER, OPTIMIZER, RANDOM, *_average_file(state)]
    tensors = {name.removesuffix(".safetensors"): _read_tensors(run, step, name, state) for name in names}
    return Checkpoint({key: value for key, value in state.items() if key not in CHECKSUMS}, **tensors)


def read_state(run: Path, step: int | None = None, *, complete: bool = False) -> dict[str, Any]:
    """Read ``state.json`` of a checkpoint; see :func:`read_checkpoint`.

    Args:
        run: folder of the run.
        step: step of the checkpoint; by default the newest.
        complete: whether every field that resuming needs must be present.

    Raises:
        InputError: there is no such checkpoint, or its state is damaged.
    """
    file = _folder(run, step) / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the checkpoint file {file} cannot be read: {one_sentence(error)}; {_advice(run)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{file} is not of checkpoint format {FORMAT}, the one that this version of ttd-plugins reads")
    expected = int(file.parent.name.rpartition("-")[2])
    problem = check_state(state, expected, complete=complete)
    if problem is not None:
        raise InputError(f"the checkpoint file {file} is damaged: {problem}; {_advice(run)}")
    return state


def _advice(run: Path) -> str:
    """What to do about a damaged checkpoint."""
    if len(checkpoint_steps(run)) > 1:
        return "delete its folder to use the checkpoint before it"
    return "restore it from a copy, or start the run again in another folder"


@contextmanager
def damage_is_reported(where: str) -> Iterator[None]:
    """Turn what impossible values of a checkpoint raise into one sentence.

    Raises:
        InputError: the block raised an exception that wrong values cause.
    """
    try:
        yield
    except TTDError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"the checkpoint {where} is damaged: its values cannot be restored ({type(error).__name__}: "
            f"{one_sentence(error, 160)}); delete its folder to use the checkpoint before it"
        ) from error


def _folder(run: Path, step: int | None) -> Path:
    steps = checkpoint_steps(run)
    if not steps:
        raise InputError(f"{run} has no checkpoint")
    if step is not None and step not in steps:
        raise InputError(f"{run} has no checkpoint of step {step}; there are those of {', '.join(map(str, steps))}")
    return checkpoint_folder(run, steps[-1] if step is None else step)


def _read_tensors(run: Path, step: int | None, name: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = _folder(run, step) / name
    expected = state.get(FILES, {}).get(name)
    try:
        if expected is not None:
            found = file_sha256(file)
            if found != expected:
                raise InputError(
                    f"the checkpoint file {file} cannot be read: it is damaged, its SHA-256 is {found[:12]}… and not "
                    f"{expected[:12]}… as in state.json; {_advice(run)}"
                )
        return load_file(file)
    # A damaged header makes safetensors raise anything.
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the checkpoint file {file} cannot be read: {one_sentence(error)}; {_advice(run)}") from error


def _average_file(state: Mapping[str, Any]) -> list[str]:
    """The file of the moving average, where a checkpoint has one."""
    return [AVERAGE] if AVERAGE in state.get(FILES, {}) else []


def _delete(folder: Path) -> None:
    """Delete a folder so that an interruption leaves no half of it under its own name."""
    doomed = folder.with_name(folder.name + ".old.part")
    with suppress(OSError):
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


# Optimizer tensors and RNG states -----------------------------------------------------------------------------------


def pack_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Return the tensors of an optimizer's state, named ``KEY/PARAMETER``.

    Raises:
        TTDError: its state has a value that is not a tensor.
    """
    packed = {}
    # In the order of the groups, which is the same on all processes: gathering shards is collective.
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TTDError(
                    f"the optimizer stores {key!r} as a {type(value).__name__}, which a checkpoint cannot save"
                )
            packed[f"{key}/{names[parameter]}"] = value
    return packed


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, packed: Mapping[str, Tensor], names: Mapping[Tensor, str]
) -> None:
    """Load the tensors of :func:`pack_optimizer` into an optimizer.

    Raises:
        ValueError: a tensor belongs to no parameter, or has another shape.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for entry, value in packed.items():
        key, _, name = entry.partition("/")
        by_name.setdefault(name, {})[key] = value
    shapes = {name: parameter.shape for parameter, name in names.items()}
    for name, values in by_name.items():
        if name not in shapes or any(value.ndim and value.shape != shapes[name] for value in values.values()):
            raise ValueError(f"the optimizer's tensors of {name!r} fit no trained parameter")
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {
        i: {key: shard_like(value, p) for key, value in by_name[names[p]].items()}
        for i, p in enumerate(parameters)
        if names[p] in by_name
    }
    optimizer.load_state_dict(state)


def pack_rng_states(states: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Split the RNG states of all processes into named tensors and values that JSON can store."""
    tensors: dict[str, Tensor] = {}
    plain = []
    for number, state in enumerate(states):
        tensors |= {f"{key}/{number}": state[key] for key in ("torch", "cuda") if state[key] is not None}
        plain.append({key: state[key] for key in ("python", "numpy")})
    return tensors, plain


def unpack_rng_state(tensors: Mapping[str, Tensor], plain: list[dict[str, Any]], number: int) -> dict[str, Any]:
    """Return the RNG state of process ``number``."""
    return plain[number] | {key: tensors.get(f"{key}/{number}") for key in ("torch", "cuda")}


# A backbone from a run -----------------------------------------------------------------------------------------------


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy named tensors into the parameters and buffers of a model.

    Raises:
        InputError: the model has no tensor of that name and shape.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in tensors.items():
        if name not in own or own[name].shape != value.shape:
            there = f"has shape {list(own[name].shape)}" if name in own else "does not exist"
            raise InputError(
                f"{where} has {name!r} of shape {list(value.shape)}, which {there} in this backbone; it belongs to "
                "another backbone or to other towers"
            )
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(shard_like(value, own[name]))


def restore_backbone(
    run: Path,
    step: int | str | None = None,
    *,
    backbone: DenseAdapter | None = None,
    lora_scale: float | None = None,
    averaged: bool = True,
    options: Mapping[str, Any] | None = None,
    merge: bool = False,
) -> DenseAdapter:
    """Return the tuned backbone of a run, in evaluation mode, with unmerged LoRA where the run trains LoRA.

    Args:
        run: folder of the run.
        step: step of the checkpoint, or ``"best"`` for the best by ``evaluation.best``; by default the newest.
        backbone: the untuned backbone, for a run that was started with an object instead of a name.
        lora_scale: factor of LoRA; by default ``towers.lora_scale`` of the run.
        averaged: whether to return the moving average of the weights if the run has one (``run.weight_ema``).
        options: options of the family that replace those of the run, such as its dense mode.
        merge: whether to merge LoRA into the weights, and to set ``requires_grad`` as before the run.

    Returns:
        The backbone; its ``tuned_from`` names the run and the step.

    Raises:
        InputError: the run has no such checkpoint, is damaged, or belongs to another backbone.
        TTDError: the backbone cannot be loaded.
    """
    from ttd_plugins.training.config import TrainConfig
    from ttd_plugins.training.trainable_parameters import build_backbone, load_untuned

    run = Path(run)
    file = run / "config.yaml"
    if not file.is_file():
        raise InputError(f"{run} is not the folder of a run: it has no config.yaml")
    config = TrainConfig.read(file)
    # Once, because a run that goes on writes newer ones.
    folder = _folder(run, named_step(run, step))
    where, step = str(folder), int(folder.name.rpartition("-")[2])
    state = read_state(run, step)
    scale = config.towers.lora_scale if lora_scale is None else lora_scale
    # Read before the backbone is built, so that a damaged file is found at once.
    files = [TRAINED, BUFFERS, *(_average_file(state) if averaged else [])]
    tensors = [_read_tensors(run, step, name, state) for name in files]
    sums = [state.get(FILES, {}).get(name) or file_sha256(folder / name) for name in files]
    digest = hashlib.sha256("".join([*sums, f"{scale:g}" if scale != 1 else ""]).encode())
    config = _as_started(config, state, options or {})
    untuned = load_untuned(config) if backbone is None else backbone
    requires_grad = [(parameter, parameter.requires_grad) for parameter in untuned.model.parameters()]
    adapter = build_backbone(config, untuned, run=run)
    require_same_base(state, adapter, where)
    for one in tensors:
        load_tensors(adapter.model, one, where)
    if scale != 1:
        from ttd_plugins.lora import scale_lora

        scale_lora(adapter, scale)
    base = config.backbone.name or adapter.description.name
    adapter.tuned_from = TunedFrom("run", run.resolve().name, digest.hexdigest()[:16], step, base)
    if merge:
        adapter.merge()
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
    return adapter.eval()


def _as_started(config: TrainConfig, state: Mapping[str, Any], options: Mapping[str, Any]) -> TrainConfig:
    """The configuration with other options, and with the step of the run that its backbone was tuned from."""
    name, base = config.backbone.name, state.get(TUNED_FROM)
    if name is not None and isinstance(base, dict) and isinstance(base.get("step"), int) and Path(name).is_dir():
        name = f"{name}@{base['step']}"
    backbone = dataclasses.replace(config.backbone, name=name, options={**config.backbone.options, **options})
    return dataclasses.replace(config, backbone=backbone)


def require_same_base(state: Mapping[str, Any], adapter: DenseAdapter, where: str) -> None:
    """Refuse a backbone that was tuned from other weights than the one that a checkpoint continues.

    Args:
        state: state of the checkpoint.
        adapter: the backbone before the weights of the checkpoint are loaded.
        where: the checkpoint, for the message.

    Raises:
        InputError: it is another one.
    """
    stored, found = state.get(TUNED_FROM), adapter.tuned_from
    if isinstance(stored, dict) and found is not None and stored.get("sha256") != found.sha256:
        kind, name, digest = (str(stored.get(key, "")) for key in ("kind", "name", "sha256"))
        known = TunedFrom(kind, name, digest, stored.get("step"))
        raise InputError(f"{where} was tuned from {known}, and that is now {found}; restore its files")


def named_step(run: Path, step: int | str | None) -> int | None:
    """Return the step that a number, ``"best"`` or ``None`` (the newest) names.

    Raises:
        InputError: it is another text, or the run has no best checkpoint.
    """
    if not isinstance(step, str):
        return step
    from ttd_plugins.training.best_checkpoint import BEST, best_step

    if step.isdecimal():
        return int(step)
    if step != BEST:
        raise InputError(f"the step of a checkpoint is a number or {BEST}, not {step!r}")
    return best_step(run, checkpoint_steps(run))


def read_foreign_weights(file: Path) -> dict[str, Tensor]:
    """Read a checkpoint of another program; see :func:`~ttd_plugins.utils.state_dicts.read_state_dict`.

    Raises:
        InputError: the file cannot be read, is no weights file, or would run code when loaded.
    """
    return read_state_dict(file).tensors
