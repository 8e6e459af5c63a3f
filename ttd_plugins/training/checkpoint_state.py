"""The file ``state.json`` of a checkpoint: its fields, their types, and the checksums that seal a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field, Strict, TypeAdapter

from ttd_plugins.errors import one_sentence
from ttd_plugins.utils.files import file_sha256

CHECKSUMS = FILES, OWN = "sha256", "state_sha256"
"""Keys of the checksums: by name of each other file, and of the state without this key."""

Count = Annotated[int, Strict(), Field(ge=0)]
Number = Annotated[float, Strict()]
Name = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]


@dataclass
class _Averager:
    sums: dict[Name, Number]
    counts: dict[Name, Count]


@dataclass
class _Watch:
    first_spread: Number | None
    told: list[Name]


@dataclass
class _Health:
    first_loss: Number | None
    first_spread: Number | None
    recent: list[Flag]
    protected: list[Count]
    after_skip: list[Count]
    first_norm: Number | None = None
    last_norm: Number | None = None


@dataclass
class _Random:
    python: Annotated[list[Any], Field(min_length=3, max_length=3)]
    numpy: Annotated[list[Any], Field(min_length=5, max_length=5)]


@dataclass
class _State:
    """The fields that every release writes; those with a default are absent in earlier ones."""

    format: Count
    step: Count
    steps: Count
    epoch: Count
    positions: list[Any]
    processes: Annotated[int, Strict(), Field(ge=1)]
    scaler: dict[str, Any] | None
    skipped_steps: Count
    figures: dict[str, Any]
    window: _Averager
    watch: _Watch
    warnings: list[Name]
    random: list[_Random]
    health: _Health | None = None
    sha256: dict[Name, Name] = field(default_factory=dict)
    state_sha256: Name = ""


_STATE: TypeAdapter[Any] = TypeAdapter(_State)


class StateSeal:
    """Collects the SHA-256 of a checkpoint's files, and adds them to its state."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}

    def add(self, file: Path) -> None:
        """Hash a complete file."""
        self._files[file.name] = file_sha256(file)

    def sealed(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state with the checksums of all files and of itself."""
        # Through JSON, so that the hash is that of the stored values.
        whole = json.loads(json.dumps({**state, FILES: self._files}))
        return {**whole, OWN: _hash(whole)}


def check_state(state: dict[str, Any], step: int, *, complete: bool) -> str | None:
    """Return what is wrong with the content of a ``state.json``, or ``None``.

    Args:
        state: its content.
        step: the step that the folder's name says.
        complete: whether every field must be present, as resuming needs; weights alone need the step only.
    """
    if (FILES in state) != (OWN in state):
        return "one of its checksums is missing"
    if OWN in state and state[OWN] != _hash({key: value for key, value in state.items() if key != OWN}):
        return "its checksum does not fit its content"
    try:
        _STATE.validate_python(state)
    except pydantic.ValidationError as error:
        found = [one for one in error.errors(include_url=False) if complete or one["type"] != "missing"]
        if found:
            place = ".".join(map(str, found[0]["loc"]))
            return f"{place}: {one_sentence(ValueError(found[0]['msg']), 80)}"
    if state.get("step", step) != step:
        return f"it is of step {state['step']}, and its folder is of step {step}"
    if complete and not len(state["positions"]) == len(state["random"]) == state["processes"]:
        return "positions and random do not have one entry for each process"
    return None


def _hash(state: Mapping[str, Any]) -> str:
    text = json.dumps(state, sort_keys=True, ensure_ascii=True, allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()
