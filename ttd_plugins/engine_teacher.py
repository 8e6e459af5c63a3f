"""The moving-average teacher of the engine: its update, and its place in a state dict.

The teacher is not a submodule of the engine, so that no optimizer, device move or mode reaches it. Its tensors are in
the engine's state dict under ``teacher.``, by the names of the adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.errors import InputWarning, TTDError
from ttd_plugins.utils.running_state import running_norms

PREFIX, STUDENT = "teacher.", "backbone."
"""Prefixes of the teacher's and of the backbone's tensors in the state dict of the engine."""
MISSING = "the state dict has no moving average, and teacher='ema' needs it to continue"


@torch.no_grad()
def update_average(teacher: DenseAdapter, student: DenseAdapter, decay: float) -> None:
    """Move the teacher's parameters towards the student's, ``decay * teacher + (1 - decay) * student``.

    Running statistics are copied, as they are averages already.

    Raises:
        TTDError: LoRA was added or removed since the teacher was copied.
    """
    averages, parameters = list(teacher.parameters()), list(student.parameters())
    if [p.shape for p in averages] != [p.shape for p in parameters]:
        raise TTDError("LoRA was added to or removed from the backbone after TTD() was built; build a new TTD")
    for average, current in zip(averages, parameters, strict=True):
        average.lerp_(current.detach().to(average.dtype), 1 - decay)
    for norm, current_norm in zip(running_norms(teacher), running_norms(student), strict=True):
        for buffer, statistic in zip(norm.buffers(), current_norm.buffers(), strict=True):
            buffer.copy_(statistic)


def save_teacher(teacher: DenseAdapter, destination: MutableMapping[str, Any], prefix: str) -> None:
    """Add the teacher's tensors to a state dict; ``prefix`` is that of the engine."""
    for name, value in teacher.state_dict().items():
        destination[f"{prefix}{PREFIX}{name}"] = value


def teacher_problem(teacher: DenseAdapter | None, state: Mapping[str, Any], kind: str) -> str | None:
    """Why the teacher in a state dict of the engine does not fit an engine, as one sentence; ``None`` if it does.

    Args:
        teacher: the moving-average teacher; ``None`` if the engine has none.
        state: the state dict.
        kind: the option ``teacher`` of the engine.
    """
    has_teacher = any(key.startswith(PREFIX) for key in state)
    if teacher is None:
        if not has_teacher:
            return None
        return (
            f"the state dict has the moving average of teacher='ema', and this TTD has teacher={kind!r}; build it with "
            "teacher='ema', or load with strict=False, which leaves the average out"
        )
    if not has_teacher:
        return (
            f"{MISSING}; save the state dict of a TTD with teacher='ema', or load this one with strict=False, which "
            "starts the average anew at the loaded weights"
        )
    own = teacher.state_dict()
    wrong = [
        name
        for name, value in own.items()
        if f"{PREFIX}{name}" not in state or state[f"{PREFIX}{name}"].shape != value.shape
    ]
    if not wrong:
        return None
    return (
        f"the moving average in the state dict is of another backbone ({len(wrong)} tensors differ, such as "
        f"{wrong[0]}); build the backbone as it was saved, with the same LoRA"
    )


@torch.no_grad()
def load_teacher(
    teacher: DenseAdapter, state: Mapping[str, Any], prefix: str, missing_keys: list[str], error_msgs: list[str]
) -> None:
    """Copy the teacher's tensors from a state dict in which the engine has a prefix.

    Without a teacher in the state dict, the average starts anew at the backbone's weights in the state dict, with a
    warning. Keys that are missing, and messages about shapes, are appended as ``load_state_dict`` expects.
    """
    own: dict[str, Tensor] = teacher.state_dict()
    found = {name: state[f"{prefix}{PREFIX}{name}"] for name in own if f"{prefix}{PREFIX}{name}" in state}
    missing_keys += [f"{prefix}{PREFIX}{name}" for name in own if name not in found]
    if not found:
        found = {name: state[f"{prefix}{STUDENT}{name}"] for name in own if f"{prefix}{STUDENT}{name}" in state}
        if found:
            warnings.warn(f"{MISSING}; it starts anew at the loaded weights", InputWarning, stacklevel=6)
    for name, value in found.items():
        if value.shape == own[name].shape:
            own[name].copy_(value)
        else:
            error_msgs.append(
                f"the moving average in the state dict is of another backbone: {name} has shape {list(value.shape)}, "
                f"not {list(own[name].shape)}"
            )


def without_teacher(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return a state dict without the teacher's tensors."""
    return {key: value for key, value in state.items() if not key.startswith(prefix + PREFIX)}
