"""Output folders: a command recognises its own, refuses any other that is not empty, and locks what it writes."""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttd_plugins._version import __version__
from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.utils.files import follow_umask, make_folder, write_atomic

if TYPE_CHECKING:
    from filelock import BaseFileLock

MARKER = ".ttd-plugins.json"
"""File that says which command wrote a folder."""
LOCK = ".ttd-plugins.lock"
"""Lock file of a folder; it is removed when the lock is released."""
OWNER_SUFFIX = ".owner"
"""Ending of the file beside a lock that describes the process that holds it."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderKind:
    """What a command writes into its folder.

    Attributes:
        name: name in the marker, such as ``"run"``.
        what: description for messages, such as ``"a run of ttd train"``.
        is_earlier: whether a folder without a marker was written by a release before markers; judged by its content.
    """

    name: str
    what: str
    is_earlier: Callable[[Path], bool] = lambda folder: False


@contextmanager
def output_folder(
    folder: Path | str, kind: FolderKind, *, lock: str = LOCK, advice: str = "choose another --out"
) -> Iterator[Path]:
    """Open the folder that a command writes, and hold its lock until the block ends.

    A folder that does not exist is made, with its parents. If nothing is written into a new or empty folder, the block
    leaves no trace of it.

    Args:
        folder: the folder.
        kind: what the command writes.
        lock: name of the lock file. Processes that share a folder use one name each.
        advice: what the user can do where the folder cannot be used.

    Raises:
        InputError: the folder is not empty and not of this kind, another process holds the lock, or the folder cannot
            be written. Nothing in it has changed then.
    """
    folder = Path(folder)
    # A refusal leaves nothing behind, so the folder is judged before it is made.
    _require_own(folder, kind, advice)
    made = _missing_folders(folder)
    was_empty = bool(made) or not _content(folder, advice)
    make_folder(folder, advice=advice)
    try:
        with locked(folder / lock, f"the folder {folder}", advice=advice):
            # Another command may have filled the folder while this one had no lock.
            _require_own(folder, kind, advice)
            if (_read_marker(folder) or {}).get("kind") != kind.name:
                marker = {"kind": kind.name, "what": kind.what, "ttd-plugins": __version__}
                write_atomic(folder / MARKER, json.dumps(marker) + "\n", advice=advice)
            try:
                yield folder
            finally:
                if was_empty and not _has_files(folder):
                    _clear(folder, lock)
    finally:
        for one in made:
            # Only empty folders are removed.
            with suppress(OSError):
                one.rmdir()


@contextmanager
def new_folder(
    out: Path | str, *, parents: bool = True, advice: str = "free some space or choose another folder"
) -> Iterator[Path]:
    """Yield a hidden folder beside ``out``; it replaces ``out`` at the end of the block, or is removed after an error.

    Files have the permissions that the umask allows.

    Args:
        out: the folder to write; it must not exist, or be empty.
        parents: whether parents that do not exist are made.
        advice: what the user can do where the folder cannot be written.

    Raises:
        InputError: ``out`` is not empty or cannot be written.
    """
    out = Path(out)
    require_new(out)
    parent, beside = out.absolute().parent, None
    made = _missing_folders(parent) if parents else []
    try:
        if parents:
            parent.mkdir(parents=True, exist_ok=True)
        elif not parent.is_dir():
            raise InputError(f"{str(out)!r} cannot be written: the folder {str(out.parent)!r} does not exist")
        # One name for every output, since that of `out` may be as long as the file system allows.
        beside = Path(tempfile.mkdtemp(prefix=".ttd-plugins-part-", dir=parent))
        inner = beside / "folder"
        inner.mkdir()
        yield inner
        follow_umask(inner)
        # This replaces an empty folder and fails on any other.
        os.replace(inner, out)
    except OSError as error:
        reason = error.strerror or one_sentence(error)
        raise InputError(f"{str(out)!r} cannot be written ({reason}); {advice}") from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
        for one in made:
            with suppress(OSError):
                one.rmdir()


def require_new(out: Path | str) -> None:
    """Check, before anything slow, that a folder does not exist or is empty.

    Raises:
        InputError: it is a file, is not empty, or cannot be read.
    """
    out = Path(out)
    try:
        # Path.is_dir() is False for an impossible name; this says why it is impossible.
        os.lstat(out)
        if not out.is_dir():
            raise InputError(f"{str(out)!r} is a file; choose another folder")
        if os.listdir(out):
            raise InputError(f"the folder {str(out)!r} is not empty; choose a new or an empty one")
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or one_sentence(error)
        raise InputError(f"{_short(out)!r} cannot be read ({reason}); choose another folder") from error


# Locks ---------------------------------------------------------------------------------------------------------------


@contextmanager
def locked(file: Path, what: str, *, advice: str = "choose another --out") -> Iterator[None]:
    """Hold a lock of the operating system, which ends with the process, however the process ends.

    Args:
        file: the lock file; its folder exists.
        what: what the lock protects, for messages.
        advice: what the user can do where another process holds it.

    Raises:
        InputError: another process, or another thread of this one, holds the lock; or the file cannot be written.
    """
    from filelock import FileLock, Timeout

    owner = file.with_name(file.name + OWNER_SUFFIX)
    lock = FileLock(str(file), timeout=0)
    try:
        # Releases of filelock before 3.17 follow a symbolic link.
        if file.is_symlink():
            raise InputError(f"{file} is a symbolic link, which no lock file is; {advice}")
        try:
            lock.acquire()
            # The process before this one may have removed the file that is locked now, and another process may have
            # locked a new file of this name.
            while not _is_file_at(lock, file):
                lock.release()
                lock.acquire()
        except NotImplementedError as error:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
    except Timeout:
        raise InputError(f"{_describe_owner(owner)} is writing {what}; wait until it ends, or {advice}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise InputError(f"{what} cannot be written ({error.strerror or one_sentence(error)}); {advice}") from error
        log.warning("the file system of %s has no locks; let one process at a time write it", what)
    try:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "command": _command(), "since": time.time()}
        write_atomic(owner, json.dumps(about) + "\n", advice=advice)
        yield
    finally:
        for one in (owner, file):
            with suppress(OSError):
                one.unlink()
        lock.release()


def _is_file_at(lock: BaseFileLock, file: Path) -> bool:
    """Whether the file that a lock holds is still the one at a path."""
    # Windows removes no file that is open.
    if sys.platform == "win32":
        return True
    held = lock._context.lock_file_fd
    assert held is not None
    try:
        return os.path.samestat(os.fstat(held), os.lstat(file))
    except FileNotFoundError:
        return False


def _command() -> str:
    program, *rest = sys.argv or [""]
    return shlex.join([Path(program).name, *rest])[:160]


def _describe_owner(file: Path) -> str:
    """Describe the process that holds a lock: number, host, command and start."""
    about = _read_object(file)
    if about is None or not isinstance(about.get("pid"), int):
        return "another process"
    if about["pid"] == os.getpid() and about.get("host") == socket.gethostname():
        return "this process itself, in another call,"
    host = about.get("host")
    where = "" if host == socket.gethostname() else f" on {host}"
    command = f" ({about['command']})" if about.get("command") else ""
    try:
        since = time.strftime(", started at %Y-%m-%d %H:%M:%S,", time.localtime(about["since"]))
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        since = ""
    return f"another process, {about['pid']}{where}{command}{since}"


# Whose folder it is --------------------------------------------------------------------------------------------------


def _require_own(folder: Path, kind: FolderKind, advice: str) -> None:
    """Raise InputError unless the folder is absent, empty, or of this kind."""
    if not _content(folder, advice):
        return
    marker = _read_marker(folder)
    if marker is None:
        if kind.is_earlier(folder):
            return
        raise InputError(f"the folder {folder} is not empty and is not {kind.what}; {advice}, a new or an empty folder")
    if marker["kind"] != kind.name:
        raise InputError(f"the folder {folder} is {marker['what']} and not {kind.what}; {advice}")


def _content(folder: Path, advice: str) -> list[str]:
    """Names in a folder without those of this module; empty if it does not exist."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise InputError(f"the folder {folder} cannot be made (Not a directory); {advice}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_sentence(error)
        raise InputError(f"the folder {_short(folder)} cannot be read ({reason}); {advice}") from error
    return [name for name in names if not _is_own(name)]


def _is_own(name: str) -> bool:
    return name.startswith(".ttd-plugins")


def _has_files(folder: Path) -> bool:
    """Whether a folder or one of its subfolders has a file that is not of this module."""
    found = ((Path(at), name) for at, _, names in os.walk(folder) for name in names)
    return any(at != folder or not _is_own(name) for at, name in found)


def _clear(folder: Path, lock: str) -> None:
    """Remove empty subfolders, the marker and lock files, unless another process has a lock of the folder."""
    own = lock + OWNER_SUFFIX
    if any(name.endswith(OWNER_SUFFIX) and name != own for name in os.listdir(folder)):
        return
    for at, folders, _ in os.walk(folder, topdown=False):
        for name in folders:
            with suppress(OSError):
                Path(at, name).rmdir()
    for name in os.listdir(folder):
        if _is_own(name):
            with suppress(OSError):
                (folder / name).unlink()


def _missing_folders(folder: Path) -> list[Path]:
    """The folder and those of its parents that do not exist, from the inside out."""
    missing = []
    with suppress(OSError, ValueError):
        for one in (folder, *folder.parents):
            if os.path.lexists(one):
                break
            missing.append(one)
    return missing


def _read_marker(folder: Path) -> dict[str, Any] | None:
    content = _read_object(folder / MARKER)
    if content is None or not all(isinstance(content.get(name), str) for name in ("kind", "what")):
        return None
    return content


def _read_object(file: Path) -> dict[str, Any] | None:
    """A small JSON object, or ``None`` where there is none."""
    try:
        if not file.is_file() or file.stat().st_size > 2**16:
            return None
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 100 else text[:99] + "…"
