"""Atomic writes: a file is replaced completely or left as it was."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ttd_plugins.errors import InputError, one_sentence

TEMPORARY_SUFFIX = ".part"
"""Ending of a file that is not complete yet."""


def given_path(path: Any, name: str = "out") -> Path:
    """Return a path that a caller passed.

    Args:
        path: a text or a path.
        name: name of the argument, for messages.

    Raises:
        InputError: it is empty, which would mean the current folder, or no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"{name} must be a path, not {path!r}")
    if isinstance(path, str) and (not path.strip() or "\0" in path):
        raise InputError(f"{name} must be a path, not {path!r}; '.' is the current folder")
    return Path(path)


@contextmanager
def atomic_path(path: Path | str, *, advice: str = "free some space or choose another folder") -> Iterator[Path]:
    """Yield a temporary path in the same folder; it replaces ``path`` when the block ends without an exception.

    The temporary file is new and its name is random, so that no existing file or symbolic link is followed. The result
    has the permissions that the umask allows.

    Args:
        path: the file to write; its folder exists.
        advice: what the user can do where the file cannot be written.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        # mkstemp opens with O_EXCL, which never follows a symbolic link.
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        flush_to_disk(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or one_sentence(error)}); {advice}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def write_atomic(
    path: Path | str, content: str | bytes, *, advice: str = "free some space or choose another folder"
) -> None:
    """Write text (as UTF-8) or bytes to ``path``, completely or not at all.

    Bytes of file names that are not UTF-8 are written escaped, as ``\\udce9``, which JSON and YAML read back.

    Raises:
        InputError: the file cannot be written; see :func:`atomic_path`.
    """
    with atomic_path(path, advice=advice) as temporary:
        temporary.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def make_folder(folder: Path | str, *, advice: str = "choose another --out") -> None:
    """Make a folder and its parents.

    Raises:
        InputError: the folder cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder {folder} cannot be made ({error.strerror or one_sentence(error)}); {advice}"
        ) from error


def follow_umask(path: Path | str) -> None:
    """Give a file, or all files in a folder, the permissions that the umask allows; writers with private ones exist.

    Raises:
        OSError: the permissions cannot be changed.
    """
    path, mode = Path(path), 0o666 & ~_umask()
    for file in [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]:
        if not file.is_symlink():
            file.chmod(mode)


def flush_to_disk(path: Path) -> None:
    """Have the operating system write a file, or the names in a folder, to disk, so that a power cut loses none.

    Raises:
        OSError: the path cannot be opened or written.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
