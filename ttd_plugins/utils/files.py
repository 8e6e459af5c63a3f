"""Atomic writes: a file is replaced completely or left as it was."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import sys
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
    has the permissions that the umask allows, also where the block replaces the temporary file by a private one.

    Args:
        path: the file to write; its folder exists.
        advice: what the user can do where the file cannot be written.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        temporary, mode = _new_file(path)
        yield temporary
        flush_to_disk(temporary)
        _set_mode(temporary, mode)
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
    path = Path(path)
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    # A new file has these permissions. Reading the umask itself means to change it, for all threads of the process.
    probe, mode = _new_file(path if path.is_file() else path / "mode")
    probe.unlink()
    for file in files:
        if not file.is_symlink():
            _set_mode(file, mode)


def flush_to_disk(path: Path) -> None:
    """Have the operating system write a file, or the names in a folder, to disk, so that a power cut loses none.

    Raises:
        OSError: the path cannot be opened or written.
    """
    windows = sys.platform == "win32"
    # Windows flushes only files that are open for writing, and opens no folders.
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
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


def _new_file(path: Path) -> tuple[Path, int]:
    """Make an empty file beside ``path``, and return it and the permissions that new files have here.

    Raises:
        OSError: the file cannot be made.
    """
    # O_EXCL never follows a symbolic link; the kernel applies the umask.
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
    new = path.with_name(f".{path.name}.{secrets.token_urlsafe(6)}{TEMPORARY_SUFFIX}")
    handle = os.open(new, flags, 0o666)
    try:
        return new, stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _set_mode(file: Path, mode: int) -> None:
    """Change permissions only where they differ: some file systems refuse every change."""
    if stat.S_IMODE(file.stat().st_mode) != mode:
        file.chmod(mode)
