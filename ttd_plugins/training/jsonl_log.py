"""A log file with one JSON object a line."""

from __future__ import annotations

import json
import math
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
            # A key may be the name of a file that is not UTF-8; JSON reads the escape back.
            with self.file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            reason = error.strerror or one_sentence(error)
            raise InputError(f"{self.file} cannot be written ({reason}); {RESUME_ADVICE}") from error

    def read(self) -> list[dict[str, Any]]:
        """Return all lines that are objects with a ``step``; lines that a crash cut short or damaged are skipped.

        Raises:
            InputError: the file cannot be read.
        """
        return [line for line in map(_parse, self._texts()) if line is not None]

    def truncate(self, step: int) -> int:
        """Delete the lines after ``step``, and lines that are damaged.

        Returns:
            How many damaged lines were deleted, without a last one that a crash cut short.

        Raises:
            InputError: the file cannot be read or written.
        """
        texts = self._texts()
        parsed = [_parse(text) for text in texts]
        if self.file.exists():
            kept = [line for line in parsed if line is not None and line["step"] <= step]
            write_atomic(
                self.file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), advice=RESUME_ADVICE
            )
        return sum(line is None for line in parsed[:-1])

    def _texts(self) -> list[str]:
        try:
            if not self.file.exists():
                return []
            # Only line feeds end a line: JSON may contain other separators of Unicode.
            return [text for text in self.file.read_text(encoding="utf-8", errors="replace").split("\n") if text]
        except (OSError, ValueError) as error:
            raise InputError(f"{self.file} cannot be read ({one_sentence(error)}); {RESUME_ADVICE}") from error


def _parse(text: str) -> dict[str, Any] | None:
    """The object of a line, or ``None`` where it is none or has no step."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    step = line.get("step") if isinstance(line, dict) else None
    is_step = isinstance(step, int | float) and not isinstance(step, bool) and math.isfinite(step)
    return line if is_step else None
