"""Checkpoints for a training loop of one's own: what training changes, and nothing else.

With LoRA these are LoRA's tensors alone, some megabytes instead of the whole model. A checkpoint has the files of one
of ``ttd train`` (:mod:`ttd_plugins.training.checkpoints`): safetensors and JSON, with checksums, complete or absent.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttd_plugins.engine import TTD
from ttd_plugins.engine_teacher import PREFIX, STUDENT
from ttd_plugins.errors import InputError
from ttd_plugins.training import checkpoints
from ttd_plugins.utils.files import given_path
from ttd_plugins.utils.rng import get_rng_state, set_rng_state
from ttd_plugins.utils.wrapped_models import class_name

_MODEL = "model."
_COUNTER, _PAIRS = "__counter__", "__pairs__"


@dataclass(frozen=True)
class LoopState:
    """What :func:`load_training_state` found.

    Attributes:
        step: optimizer steps done.
        extra: the values that were passed to :func:`save_training_state`.
        folder: folder of the checkpoint.
    """

    step: int
    extra: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()


def trained_state_dict(ttd: TTD) -> dict[str, Tensor]:
    """Return the part of ``ttd.state_dict()`` that training changes, by the same names.

    These are the parameters that require a gradient, the buffers unless LoRA alone is trained, and the same tensors of
    the moving average of ``teacher="ema"``. ``ttd.load_state_dict(state, strict=False)`` loads them into an engine on
    the same backbone.

    Raises:
        InputError: ``ttd`` is no TTD, or nothing of its backbone requires a gradient.
    """
    names = _trained_names(ttd)
    return {name: value for name, value in ttd.state_dict().items() if name in names}


def save_training_state(
    folder: str | Path,
    ttd: TTD,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int,
    keep: int = 3,
    extra: Mapping[str, Any] | None = None,
    **parts: Any,
) -> Path:
    """Write a checkpoint of a loop to ``folder/checkpoints/step-N``, and delete all but the newest ``keep``.

    It has the trained tensors, the optimizer, the random states of Python, numpy and torch, and the parts.

    Args:
        folder: folder of the training; it is made if it does not exist.
        ttd: the engine.
        optimizer: its state is stored, hyperparameters such as the learning rate included.
        step: optimizer steps done.
        keep: how many of the newest checkpoints stay.
        extra: values that JSON can store, such as ``{"epoch": 3}``.
        **parts: objects with ``state_dict()``, such as ``scheduler=scheduler`` and ``scaler=scaler``.

    Returns:
        The folder of the checkpoint.

    Raises:
        InputError: an argument has the wrong type, a state has a value that cannot be stored, the folder has a
            checkpoint of a later step, or it cannot be written; earlier checkpoints are not touched then.
    """
    names, run = _trained_names(ttd), given_path(folder)
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise InputError(f"step must be a whole number of 0 or more, not {step!r}")
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise InputError(f"keep must be a whole number of 1 or more, not {keep!r}")
    later = [one for one in checkpoints.checkpoint_steps(run) if one > step]
    # A resumed loop loads the checkpoint of the last step, which would not be this one.
    if later:
        raise InputError(
            f"{run / checkpoints.FOLDER} has checkpoints of later steps than {step} ({', '.join(map(str, later))}); "
            "choose another folder or delete them"
        )
    model = ttd.backbone.model
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    buffers = {name: value for name, value in model.named_buffers() if f"{STUDENT}{_MODEL}{name}" in names}
    tensors, random = checkpoints.pack_rng_states([get_rng_state()])
    state: dict[str, Any] = {
        "step": step,
        "random": random,
        "extra": _encoded("extra", dict(extra or {})),
        "parts": {name: _encoded(name, _state_of(name, part)) for name, part in parts.items()},
    }
    moments: dict[str, Tensor] = {}
    if optimizer is not None:
        moments = checkpoints.pack_optimizer(optimizer, _parameter_names(optimizer, parameters))
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        state["groups"] = _encoded("the optimizer", groups)
    averages: dict[str, Tensor] = {}
    if ttd.options.teacher == "ema" and ttd.teacher is not None:
        own = dict(ttd.teacher.model.named_parameters()) | dict(ttd.teacher.model.named_buffers())
        averages = {name: own[name] for name in (*parameters, *buffers)}
    checkpoint = checkpoints.Checkpoint(
        state, trained=dict(parameters), buffers=buffers, teacher=averages, optimizer=moments, random=tensors
    )
    return checkpoints.write_checkpoint(run, checkpoint, keep)


def load_training_state(
    folder: str | Path,
    ttd: TTD,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int | None = None,
    **parts: Any,
) -> LoopState:
    """Load a checkpoint of :func:`save_training_state`, random states included, so that the loop continues bitwise.

    Args:
        folder: folder of the training.
        ttd: an engine that is built as the stored one was: the same backbone with the same LoRA.
        optimizer: over the same parameters.
        step: step of the checkpoint; by default the newest.
        **parts: the objects that were stored, by the same names.

    Raises:
        InputError: there is no such checkpoint, it is damaged, or it belongs to another backbone, optimizer or parts.
    """
    _trained_names(ttd)
    run = given_path(folder)
    stored = checkpoints.read_checkpoint(run, step, complete=False)
    state = stored.state
    where = str(checkpoints.checkpoint_folder(run, state["step"]))
    model = ttd.backbone.model
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if set(stored.trained) != set(trained):
        raise InputError(f"{where} has other tensors than this backbone trains; build it with the same LoRA and towers")
    wanted = set(state.get("parts", {}))
    if wanted != set(parts):
        raise InputError(
            f"{where} has the parts {', '.join(sorted(wanted)) or 'none'}; pass these by name, and no other"
        )
    if optimizer is not None and "groups" not in state:
        raise InputError(f"{where} has no optimizer; leave the optimizer out")
    if (ttd.options.teacher == "ema") != bool(stored.teacher):
        raise InputError(
            f"{where} has {'a' if stored.teacher else 'no'} moving average, and this TTD has "
            f"teacher={ttd.options.teacher!r}; build it as it was stored"
        )
    with checkpoints.damage_is_reported(where):
        checkpoints.load_tensors(model, stored.trained | stored.buffers, where)
        if stored.teacher and ttd.teacher is not None:
            checkpoints.load_tensors(ttd.teacher.model, stored.teacher, where)
        if optimizer is not None:
            checkpoints.unpack_optimizer(optimizer, stored.optimizer, _parameter_names(optimizer, trained))
            for group, values in zip(optimizer.param_groups, _decoded(state["groups"]), strict=True):
                group.update({key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
        for name, part in parts.items():
            part.load_state_dict(_decoded(state["parts"][name]))
        set_rng_state(checkpoints.unpack_rng_state(stored.random, state["random"], 0))
    return LoopState(state["step"], _decoded(state.get("extra", {})), Path(where))


def _trained_names(ttd: TTD) -> set[str]:
    """Names of the trained tensors in the engine's state dict."""
    if not isinstance(ttd, TTD):
        raise InputError(f"pass the TTD, not an object of class {class_name(ttd)}")
    backbone = ttd.backbone
    trained = {name: p for name, p in backbone.model.named_parameters() if p.requires_grad}
    if not trained:
        raise InputError(f"nothing of {backbone.description.name} requires a gradient; add LoRA, or unfreeze a tower")
    names = set(trained)
    lora = {id(parameter) for parameter in backbone.lora_parameters()}
    if any(id(parameter) not in lora for parameter in trained.values()):
        names |= {name for name, _ in backbone.model.named_buffers()}
    prefixes = (STUDENT, PREFIX) if ttd.options.teacher == "ema" else (STUDENT,)
    return {f"{prefix}{_MODEL}{name}" for prefix in prefixes for name in names}


def _parameter_names(optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor]) -> dict[Tensor, str]:
    """Names of an optimizer's parameters; each must belong to the backbone."""
    names = {parameter: name for name, parameter in trained.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and parameter not in names:
                raise InputError(
                    f"the optimizer has a parameter of shape {list(parameter.shape)} that is not the backbone's; build "
                    "it after add_lora(), from the parameters of the TTD"
                )
            names.setdefault(parameter, f"frozen/{len(names)}")
    return names


def _state_of(name: str, part: Any) -> Any:
    if not hasattr(part, "state_dict") or not hasattr(part, "load_state_dict"):
        raise InputError(f"{name} has no state_dict(); pass a scheduler or a gradient scaler, and values in extra")
    return part.state_dict()


def _encoded(name: str, value: Any) -> Any:
    """Return a state as JSON can store it; keys that are no texts become pairs."""
    if isinstance(value, Counter):
        return {_COUNTER: [[key, count] for key, count in value.items()]}
    if isinstance(value, Mapping):
        items = {key: _encoded(name, one) for key, one in value.items()}
        return items if all(isinstance(key, str) for key in items) else {_PAIRS: [list(pair) for pair in items.items()]}
    if isinstance(value, list | tuple):
        return [_encoded(name, one) for one in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} has a value of class {class_name(value)}, which a checkpoint cannot store") from None
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_COUNTER}:
        return Counter(dict(map(tuple, value[_COUNTER])))
    if value.keys() == {_PAIRS}:
        return {key: _decoded(one) for key, one in value[_PAIRS]}
    return {key: _decoded(one) for key, one in value.items()}
