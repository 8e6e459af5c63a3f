"""The log of skipped samples: each sample once per run, with its reason, even across processes."""

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
except ImportError:  # on Windows, processes that share a file may list a sample twice
    fcntl = None  # type: ignore[assignment]


class SkipLog:
    """Skipped samples, in memory or in a file with one JSON object (``key``, ``reason``) per line.

    Several processes and resumed runs may share a file; a sample that it contains is not listed again.

    Attributes:
        file: the file, or ``None``.
        reasons: reason of each skipped sample by key.

    Args:
        file: the file to append to; ``None`` stores the list in memory.

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
        """List a sample unless it is listed already, and return whether it was new."""
        if key in self.reasons:
            return False
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self._opened("ab+") as stream:
                self._catch_up(stream)
                if key in self.reasons:
                    return False
                # A process that was killed while writing leaves half a line.
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
                    with contextlib.suppress(OSError):  # some file systems have no locks
                        fcntl.flock(stream, fcntl.LOCK_EX)
                yield stream
        except OSError as error:
            raise TTDError(
                f"the list of skipped samples {str(self.file)!r} cannot be read or written: {error.strerror}"
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
