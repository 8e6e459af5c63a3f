"""A log file with one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.utils.files import write_atomic

RESUME_ADVICE = "fix the cause and continue with --resume"


class JsonlLog:
    """A JSON Lines file whose objects have a ``step``; a resumed run truncates it to the step of its checkpoint.

    Args:
        file: path of the log; created with the first line.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(self, line: dict[str, Any]) -> None:
        """Append one line; the operating system has it when this returns.

        Raises:
            InputError: the file cannot be written.
        """
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            reason = error.strerror or one_sentence(error)
            raise InputError(f"{self.file} cannot be written ({reason}); {RESUME_ADVICE}") from error

    def read(self) -> list[dict[str, Any]]:
        """Return all complete lines; a last line that a crash cut short is skipped."""
        lines = []
        if self.file.exists():
            for text in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    continue
        return lines

    def truncate(self, step: int) -> None:
        """Delete the lines after ``step``."""
        if self.file.exists():
            kept = [line for line in self.read() if line.get("step", 0) <= step]
            write_atomic(
                self.file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), advice=RESUME_ADVICE
            )
