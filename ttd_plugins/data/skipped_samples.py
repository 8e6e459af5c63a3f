"""The list of samples that were left out: each once in a run, with the reason, however many processes find it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ttd_plugins.errors import TTDError

try:
    import fcntl
except ImportError:  # Windows, where processes that share a list may list a sample twice
    fcntl = None  # type: ignore[assignment]


class SkipLog:
    """Skipped samples, in memory or as one JSON object (``key``, ``reason``) a line of a file.

    A file may be shared by several processes and by a run that is resumed: what it holds is not listed again.

    Args:
        file: where to write, appending; ``None`` keeps the list in memory.

    Raises:
        TTDError: the file cannot be read or written.
    """

    def __init__(self, file: str | os.PathLike[str] | None = None) -> None:
        self.file = None if file is None else Path(file)
        self.reasons: dict[str, str] = {}
        self._read_to = 0
        if self.file is not None and self.file.exists():
            with self._opened("rb") as stream:
                self._catch_up(stream)

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, key: str, reason: str) -> bool:
        """List a sample, unless it is listed; returns whether it was new."""
        if key in self.reasons:
            return False
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self._opened("ab+") as stream:
                self._catch_up(stream)
                if key in self.reasons:
                    return False
                # A process that was killed while it wrote leaves half a line.
                start = b"" if self._ends_in_newline(stream) else b"\n"
                stream.write(start + json.dumps({"key": key, "reason": reason}).encode() + b"\n")
                stream.flush()
                self._read_to = stream.tell()
        self.reasons[key] = reason
        return True

    @contextlib.contextmanager
    def _opened(self, mode: str) -> Iterator[IO[bytes]]:
        assert self.file is not None
        try:
            with open(self.file, mode) as stream:
                if fcntl is not None and "+" in mode:
                    with contextlib.suppress(OSError):  # file systems without locks
                        fcntl.flock(stream, fcntl.LOCK_EX)
                yield stream
        except OSError as error:
            raise TTDError(
                f"the list of skipped samples {str(self.file)!r} cannot be kept: {error.strerror}"
            ) from error

    def _ends_in_newline(self, stream: IO[bytes]) -> bool:
        end = stream.seek(0, os.SEEK_END)
        if not end:
            return True
        stream.seek(end - 1)
        return stream.read(1) == b"\n"

    def _catch_up(self, stream: IO[bytes]) -> None:
        stream.seek(self._read_to)
        for line in stream:
            if line.endswith(b"\n"):
                self._read_to += len(line)
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                self.reasons.setdefault(record["key"], record["reason"])
