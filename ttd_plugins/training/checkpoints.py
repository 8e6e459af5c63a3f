"""Checkpoints of a run: safetensors and JSON, written beside their place and renamed, so complete or absent.

    RUN/checkpoints/step-00000100/
        trained.safetensors     every tensor that was trained, names as in adapter.model.named_parameters()
        buffers.safetensors     buffers that training changed, such as those of batch normalisation
        teacher.safetensors     the moving average, where the teacher is one
        optimizer.safetensors   the optimiser's tensors: "exp_avg/NAME" and so on
        random.safetensors      random states of every process
        state.json              step, epoch, positions in the data, scaler, figures, and what belongs to the tensors

A ``.part`` at the end of a name means that writing or deleting was interrupted; :func:`sweep` takes such folders away.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ttd_plugins.errors import InputError, TTDError, one_sentence
from ttd_plugins.training.sharding import shared_out_like

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter

FORMAT = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8,})")
TRAINED, BUFFERS, TEACHER, OPTIMIZER, RANDOM, STATE = (
    "trained.safetensors", "buffers.safetensors", "teacher.safetensors", "optimizer.safetensors", "random.safetensors",
    "state.json",
)  # fmt: skip


@dataclass
class Checkpoint:
    """All that a run is at one step.

    Attributes:
        state: what JSON holds; ``state["step"]`` is the number of optimiser steps done.
        trained, buffers, teacher, optimizer, random: named tensors.
    """

    state: dict[str, Any]
    trained: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    random: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The files of tensors by their names."""
        return {
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
    """Where the checkpoint of a step lies."""
    return run / FOLDER / f"step-{step:08d}"


def sweep(run: Path) -> None:
    """Take away what an interrupted write or deletion left."""
    for path in (run / FOLDER).glob("*.part"):
        shutil.rmtree(path, ignore_errors=True)


def write_checkpoint(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, and then delete all but the newest ``keep``.

    Raises:
        InputError: it cannot be written, as where the disk is full; the earlier ones are as they were.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = checkpoint_folder(run, checkpoint.state["step"])
    part = final.with_name(final.name + ".part")
    try:
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            for name, tensors in checkpoint.tensors().items():
                save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, part / name)
                _sync(part / name)
            state = json.dumps({"format": FORMAT} | checkpoint.state, indent=1, allow_nan=True)
            (part / STATE).write_text(state + "\n", encoding="utf-8")
            _sync(part / STATE)
            _sync(part)
            if final.exists():  # written by a run that was resumed from an earlier step
                _delete(final)
            part.rename(final)
            _sync(final.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        steps = checkpoint_steps(run)
        last = f"the last good one is {checkpoint_folder(run, steps[-1])}" if steps else "there is none before it"
        reason = getattr(error, "strerror", None) or one_sentence(error)
        raise InputError(
            f"the checkpoint of step {checkpoint.state['step']} cannot be written to {final.parent} ({reason}); {last}"
            "; mend it and go on with --resume"
        ) from error
    for step in checkpoint_steps(run)[:-keep]:
        _delete(checkpoint_folder(run, step))
    return final


def read_checkpoint(run: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of a step, by default the newest.

    Raises:
        InputError: there is none, or a file of it is not what was written.
    """
    return Checkpoint(read_state(run, step), **{
        name.removesuffix(".safetensors"): _read_tensors(run, step, name)
        for name in (TRAINED, BUFFERS, TEACHER, OPTIMIZER, RANDOM)
    })  # fmt: skip


def read_state(run: Path, step: int | None = None) -> dict[str, Any]:
    """What ``state.json`` of a checkpoint holds; see :func:`read_checkpoint`."""
    file = _folder(run, step) / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the checkpoint file {file} cannot be read: {one_sentence(error)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{file} is not of a checkpoint of format {FORMAT}, which this version of ttd-plugins reads")
    return state


def _folder(run: Path, step: int | None) -> Path:
    steps = checkpoint_steps(run)
    if not steps:
        raise InputError(f"{run} holds no checkpoint")
    if step is not None and step not in steps:
        raise InputError(f"{run} has no checkpoint of step {step}; there are those of {', '.join(map(str, steps))}")
    return checkpoint_folder(run, steps[-1] if step is None else step)


def _read_tensors(run: Path, step: int | None, name: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = _folder(run, step) / name
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the checkpoint file {file} cannot be read: {one_sentence(error)}") from error


def _delete(folder: Path) -> None:
    """Delete a folder so that an interruption leaves no half of it under its own name."""
    doomed = folder.with_name(folder.name + ".old.part")
    with suppress(OSError):
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Tensors of an optimiser, and random states --------------------------------------------------------------------------


def pack_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The tensors of an optimiser, named ``KEY/PARAMETER``.

    Raises:
        TTDError: its state holds something that is no tensor.
    """
    packed = {}
    # In the order of the groups, which all processes have, since gathering shares takes all of them.
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TTDError(f"the optimiser keeps {key!r} as a {type(value).__name__}, which is not saved")
            packed[f"{key}/{names[parameter]}"] = value
    return packed


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, packed: Mapping[str, Tensor], names: Mapping[Tensor, str]
) -> None:
    """Give an optimiser the tensors of :func:`pack_optimizer` back."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for entry, value in packed.items():
        key, _, name = entry.partition("/")
        by_name.setdefault(name, {})[key] = value
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {
        i: {key: shared_out_like(value, p) for key, value in by_name[names[p]].items()}
        for i, p in enumerate(parameters)
        if names[p] in by_name
    }
    optimizer.load_state_dict(state)


def random_state() -> dict[str, Any]:
    """The random states of this process: of python, numpy, torch and its CUDA device; tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if cuda else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def pack_random(states: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The random states of all processes as named tensors and as what JSON holds."""
    tensors: dict[str, Tensor] = {}
    plain = []
    for number, state in enumerate(states):
        tensors |= {f"{key}/{number}": state[key] for key in ("torch", "cuda") if state[key] is not None}
        plain.append({key: state[key] for key in ("python", "numpy")})
    return tensors, plain


def unpack_random(tensors: Mapping[str, Tensor], plain: list[dict[str, Any]], number: int) -> dict[str, Any]:
    """The random state of process ``number``."""
    return plain[number] | {key: tensors.get(f"{key}/{number}") for key in ("torch", "cuda")}


# A backbone from a run -----------------------------------------------------------------------------------------------


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy named tensors into the parameters and buffers of a model.

    Raises:
        InputError: a name or a shape is not the model's.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in tensors.items():
        if name not in own or own[name].shape != value.shape:
            there = f"is of shape {list(own[name].shape)}" if name in own else "is not there"
            raise InputError(
                f"{where} holds {name!r} of shape {list(value.shape)}, which {there} in this backbone; it is of "
                "another backbone or other towers"
            )
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(shared_out_like(value, own[name]))


def restore_backbone(run: Path, step: int | None = None, *, backbone: DenseAdapter | None = None) -> DenseAdapter:
    """The tuned backbone of a run, in evaluation mode, with LoRA still in place where the run has it.

    Args:
        run: the folder of the run.
        step: which checkpoint; by default the newest.
        backbone: the untuned backbone, for a run that was given an object in place of a name.

    Raises:
        InputError: the run has no such checkpoint, or it is of another backbone.
        TTDError: the backbone cannot be loaded.
    """
    from ttd_plugins.training.config import TrainConfig
    from ttd_plugins.training.towers import build_backbone

    run = Path(run)
    file = run / "config.yaml"
    if not file.is_file():
        raise InputError(f"{run} is no folder of a run: it has no config.yaml")
    config = TrainConfig.read(file)
    where = str(_folder(run, step))
    adapter = build_backbone(config, backbone)
    load_tensors(adapter.model, _read_tensors(run, step, TRAINED), where)
    load_tensors(adapter.model, _read_tensors(run, step, BUFFERS), where)
    return adapter.eval()


def read_foreign_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint that others made: safetensors, or a pickle that holds tensors and plain containers only.

    Args:
        file: ``*.safetensors``, or what ``torch.save`` wrote; a ``state_dict`` or ``model`` inside it is unwrapped.

    Raises:
        InputError: the file cannot be read, or would run code when loaded.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = f"the checkpoint {str(file)!r}"
    if not file.is_file():
        raise InputError(f"{name} is not there")
    try:
        values = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    # The unpickler raises whatever a broken or hostile file makes it stumble on.
    except (SafetensorError, Exception) as error:
        raise InputError(
            f"{name} is refused: only tensors are loaded from it, without running code, and that failed "
            f"({one_sentence(error, 160)}); save it as safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(values, Mapping) and isinstance(values.get(key), Mapping):
            values = values[key]
    if not isinstance(values, Mapping) or not all(isinstance(value, Tensor) for value in values.values()):
        raise InputError(f"{name} holds no named tensors")
    return dict(values)
