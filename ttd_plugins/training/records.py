"""The files of a run beside its checkpoints: its configuration, and lists with one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ttd_plugins.errors import InputError, one_sentence


class Lines:
    """A file of JSON objects that is only added to, and cut to a step when a run is resumed.

    Each object has a ``step``.

    Args:
        file: where it is; made with the first line.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(self, line: dict[str, Any]) -> None:
        """Add one line, handed to the operating system before this returns.

        Raises:
            InputError: it cannot be written.
        """
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise _unwritable(self.file, error) from error

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; the last may be half a one after a crash, and is left out."""
        lines = []
        if self.file.exists():
            for text in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    continue
        return lines

    def cut(self, step: int) -> None:
        """Keep the lines up to ``step``."""
        if self.file.exists():
            kept = [line for line in self.read() if line.get("step", 0) <= step]
            write_whole(self.file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def write_whole(file: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    part = file.with_name(file.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _unwritable(file, error) from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder {folder} cannot be made ({error.strerror or one_sentence(error)}); give another --out"
        ) from error


def _unwritable(file: Path, error: OSError) -> InputError:
    reason = error.strerror or one_sentence(error)
    return InputError(f"{file} cannot be written ({reason}); mend it and go on with --resume")
