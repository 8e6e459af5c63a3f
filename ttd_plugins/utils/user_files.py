"""Reading the files and folders of users: regular files only, bounded sizes, no loops of symbolic links."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterator
from typing import IO

from ttd_plugins.errors import InputError, one_sentence

Path = str | os.PathLike[str]
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_regular(path: Path, title: str) -> os.stat_result:
    """Check that a path is a regular file, or a link to one, without opening it: opening a named pipe would block.

    Args:
        path: the path.
        title: the file in messages, such as ``"the table 'a.csv'"``.

    Raises:
        InputError: it does not exist, is a folder, a named pipe, a socket or a device, or its name is invalid.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{title} does not exist") from None
    except OSError as error:
        raise InputError(f"{title} cannot be read: {reason_of(error)}") from error
    except ValueError as error:
        raise InputError(f"{title} cannot be read: its name is invalid ({one_sentence(error)})") from error
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{title} is a folder, not a file")
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise InputError(f"{title} is {kind}, not a regular file")
    return found


def open_regular(path: Path, title: str) -> IO[bytes]:
    """Open a regular file for reading; see :func:`require_regular`.

    Raises:
        InputError: it is not a regular file, or cannot be opened.
    """
    require_regular(path, title)
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{title} cannot be read: {reason_of(error)}") from error


def read_regular(path: Path, title: str, limit: int | None = None) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the path.
        title: the file in messages.
        limit: the largest accepted size in bytes; ``None`` means no limit.

    Raises:
        InputError: it is not a regular file, cannot be read, or is larger than ``limit``.
    """
    with open_regular(path, title) as stream:
        try:
            data = stream.read() if limit is None else stream.read(limit + 1)
        except OSError as error:
            raise InputError(f"{title} cannot be read: {reason_of(error)}") from error
    if limit is not None and len(data) > limit:
        raise InputError(f"{title} is larger than {limit:,} bytes")
    return data


def shown(name: str, limit: int = 200) -> str:
    """Return a name in quotes for a message: escaped where it cannot be printed, and cut if it is very long."""
    return repr(name) if len(name) <= limit else f"{name[:limit]!r}…"


def reason_of(error: OSError) -> str:
    """Return why the operating system refused something, in lower case and without the path."""
    text = error.strerror or one_sentence(error)
    return text[:1].lower() + text[1:]


def walk_files(folder: Path) -> Iterator[str]:
    """Yield the files of a folder and its subfolders as relative paths with ``/``, without hidden ones.

    Links to folders are followed, after all real folders, and each folder is read once, by whichever path comes first.
    A link to a folder that contains the link is a loop, and is not followed.

    Raises:
        InputError: a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    folders = deque([("", os.fspath(folder))])
    links: deque[tuple[str, str]] = deque()
    while folders or links:
        relative, path = (folders or links).popleft()
        try:
            identity = os.stat(path)
            if (identity.st_dev, identity.st_ino) in seen:
                continue
            seen.add((identity.st_dev, identity.st_ino))
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"the folder {path!r} cannot be read: {reason_of(error)}") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            below = f"{relative}{entry.name}"
            # os.path.isdir, unlike DirEntry.is_dir, raises nothing for a link to itself.
            if not os.path.isdir(entry.path):
                yield below
            elif not entry.is_symlink():
                folders.append((f"{below}/", entry.path))
            elif not _contains(os.path.realpath(entry.path), os.path.realpath(path)):
                links.append((f"{below}/", entry.path))


def _contains(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
