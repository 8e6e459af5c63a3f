"""The moving-average teacher of the engine: its update, and its place in a state dict.

The teacher is not a submodule of the engine, so that no optimizer, device move or mode reaches it. Its tensors are in
the engine's state dict under ``teacher.``, by the names of the adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.errors import InputError, InputWarning, TTDError
from ttd_plugins.utils.running_state import running_norms

PREFIX, STUDENT = "teacher.", "backbone."
"""Prefixes of the teacher's and of the backbone's tensors in the state dict of the engine."""


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


@torch.no_grad()
def load_teacher(teacher: DenseAdapter, state: MutableMapping[str, Any], prefix: str, *, strict: bool) -> list[str]:
    """Copy the teacher's tensors from a state dict.

    A state dict without a teacher is refused if ``strict``. Otherwise the average starts anew at the weights of the
    backbone in the state dict, with a warning.

    Returns:
        Keys that are missing.

    Raises:
        InputError: ``strict``, and the teacher is missing or is one of another backbone.
    """
    own: dict[str, Tensor] = teacher.state_dict()
    found = {name: state[f"{prefix}{PREFIX}{name}"] for name in own if f"{prefix}{PREFIX}{name}" in state}
    student = {name: state[f"{prefix}{STUDENT}{name}"] for name in own if f"{prefix}{STUDENT}{name}" in state}
    if not found:
        if not student:  # a state dict of other modules
            return []
        sentence = "the state dict has no moving average, and teacher='ema' needs it to continue"
        if strict:
            raise InputError(
                f"{sentence}; save the state dict of a TTD with teacher='ema', or load this one with strict=False, "
                "which starts the average anew at the loaded weights"
            )
        warnings.warn(f"{sentence}; it starts anew at the loaded weights", InputWarning, stacklevel=5)
        found = student
        missing = [f"{prefix}{PREFIX}{name}" for name in own]
    else:
        missing = [f"{prefix}{PREFIX}{name}" for name in own if name not in found]
    wrong = [name for name, value in found.items() if value.shape != own[name].shape]
    if wrong or (missing and strict):
        name = wrong[0] if wrong else missing[0].removeprefix(prefix + PREFIX)
        raise InputError(
            f"the moving average in the state dict is of another backbone ({len(wrong) or len(missing)} tensors "
            f"differ, such as {name}); build the backbone as it was saved, with the same LoRA"
        )
    for name, value in found.items():
        own[name].copy_(value)
    return missing


def without_teacher(state: MutableMapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return a state dict without the teacher's tensors."""
    return {key: value for key, value in state.items() if not key.startswith(prefix + PREFIX)}


def refuse_teacher(state: MutableMapping[str, Any], prefix: str, kind: str) -> None:
    """Raise InputError if a state dict has a teacher, which an engine with a teacher of ``kind`` cannot use."""
    if any(key.startswith(prefix + PREFIX) for key in state):
        raise InputError(
            f"the state dict has the moving average of teacher='ema', and this TTD has teacher={kind!r}; build it with "
            "teacher='ema', or load with strict=False, which leaves the average out"
        )
