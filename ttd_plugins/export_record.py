"""The record of an export, which :func:`ttd_plugins.load` reads to open the folder by its path alone.

An exported folder has a file ``ttd_export.json``: its form, the name under which it loads, the backbone that was
fine-tuned, and SHA-256 of its weights. It is data: nothing in it is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import PlainValidator, TypeAdapter

from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.utils.files import file_sha256

RECORD_FILE, CARD_FILE = "ttd_export.json", "README.md"
FORMAT: Literal[1] = 1
MAX_BYTES = 2**20
"""A record or a card is small; a larger file is none."""
_CARD_NAME = re.compile(r'^In ttd-plugins again: `ttd_plugins\.load\("([^"`]+)"\)`\.$', re.MULTILINE)


def _require_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("Input should be a valid string")
    return value


# pydantic's own texts are UTF-8, which names of folders need not be.
Text = Annotated[str, PlainValidator(_require_text)]


@dataclass(frozen=True)
class ExportRecord:
    """What an exported folder says of itself.

    Attributes:
        form: ``"native"``, ``"lora"`` or ``"weights"``.
        name: name for :func:`ttd_plugins.load`, with ``PATH`` for the folder; ``None`` if the folder alone loads under
            no name.
        base: name of the backbone that was fine-tuned; ``None`` if it has none, as an object of the caller.
        dense_mode: dense mode of the exported backbone, which no library stores.
        positions: how position embeddings are resampled, if not as the library does.
        calibration: scale and shift of its map from cosine to probability, if it was fitted.
        sha256: SHA-256 of each file of weights, by its name.
        format: version of this record.
    """

    form: Literal["native", "lora", "weights"]
    name: Text | None = None
    base: Text | None = None
    dense_mode: Text | None = None
    positions: Text | None = None
    calibration: tuple[Annotated[float, pydantic.Field(allow_inf_nan=False)], ...] | None = None
    sha256: dict[Text, Text] | None = None
    format: Literal[1] = FORMAT


_RECORD: TypeAdapter[ExportRecord] = TypeAdapter(ExportRecord)


def write_record(folder: Path, record: ExportRecord, weights: Iterable[Path]) -> None:
    """Write the record into an exported folder, with SHA-256 of the files ``weights``."""
    sums = {str(file.relative_to(folder)): file_sha256(file) for file in sorted(weights)}
    content = {**vars(record), "sha256": sums}
    (folder / RECORD_FILE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_record(folder: Path) -> ExportRecord | None:
    """Read the record of a folder; ``None`` if the folder is no export.

    Older exports have no record; their model card has the name.

    Raises:
        InputError: the record is damaged.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return _record_of_card(folder / CARD_FILE)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        record: ExportRecord = _RECORD.validate_python(json.loads(file.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.errors(include_url=False)[0]["msg"] if isinstance(error, pydantic.ValidationError) else error
        raise InputError(
            f"{file} is damaged ({one_sentence(ValueError(reason), 100)}); export the backbone again, or name the "
            "backbone too, as NAME+PATH"
        ) from error
    return record


def check_files(folder: Path, record: ExportRecord) -> None:
    """Compare the weights of an exported folder with the checksums of its record.

    Raises:
        InputError: a file is missing or has other content.
    """
    for name, expected in (record.sha256 or {}).items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not file.is_file():
            raise InputError(f"the exported folder {folder} lacks its file {name!r}; export the backbone again")
        found = file_sha256(file)
        if found != expected:
            raise InputError(
                f"{file} is damaged: its SHA-256 is {found[:12]}… and not {expected[:12]}… as in {RECORD_FILE}; "
                "export the backbone again, or restore the file from a copy"
            )


def _record_of_card(card: Path) -> ExportRecord | None:
    try:
        if not card.is_file() or card.stat().st_size > MAX_BYTES:
            return None
        found = _CARD_NAME.search(card.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return None if found is None else ExportRecord("native", name=found[1])
