"""Reading the headers of tar files that may be broken, hostile or compressed without saying so."""

from __future__ import annotations

import struct
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from ttd_plugins.errors import one_sentence

MAX_HEADER_BYTES = 1 << 20
"""Size of the largest extended header, such as a long name."""
_EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")


@dataclass(frozen=True)
class Member:
    """A regular file in a tar file.

    Attributes:
        name: its path.
        offset: where its content starts, in bytes from the start of the uncompressed tar file.
        size: length of the content in bytes.
        sparse: whether its content is stored with holes, so that ``offset`` and ``size`` do not describe it.
        info: what ``tarfile`` knows of it.
    """

    name: str
    offset: int
    size: int
    sparse: bool
    info: tarfile.TarInfo


class _StrictInfo(tarfile.TarInfo):
    """A header. Reading it fails where :mod:`tarfile` would see the end of the file, or read 10^12 bytes at once."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> _StrictInfo:
        try:
            info = super().frombuf(buf, encoding, errors)
        except (tarfile.EmptyHeaderError, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a header is broken or truncated ({error})") from error
        if info.size < 0 or (info.type in _EXTENDED and info.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header states a size of {info.size:,} bytes")
        return info


def is_compressed(stream: IO[bytes]) -> bool:
    """Return whether a file at its start is compressed, whatever its name says; the file stays at its start."""
    head = stream.read(6)
    stream.seek(0)
    return head.startswith(_COMPRESSED)


def open_tar(stream: IO[bytes], *, seekable: bool) -> tarfile.TarFile:
    """Open a tar file for :func:`members`: with random access, or as a stream that may be compressed.

    Raises:
        tarfile.TarError, OSError, EOFError: the file cannot be read.
    """
    mode: Any = "r:" if seekable else "r|*"
    with _as_read_error():
        return tarfile.open(fileobj=stream, mode=mode, tarinfo=_StrictInfo)


@contextmanager
def _as_read_error() -> Iterator[None]:
    """Turn what tarfile raises for some broken files, such as a gzip header cut short, into its own error."""
    try:
        yield
    except (TypeError, LookupError, AttributeError, struct.error) as error:
        raise tarfile.ReadError(f"it is broken or truncated ({one_sentence(error)})") from error


def members(tar: tarfile.TarFile) -> Iterator[Member]:
    """Yield the regular files of a tar file in order.

    Raises:
        tarfile.ReadError: a header is broken, truncated or out of bounds. Other errors of reading are those of the
            stream.
    """
    before = -1
    headers = iter(tar)
    while True:
        with _as_read_error():
            info = next(headers, None)
        if info is None:
            return
        # Otherwise tarfile stores every member.
        tar.members = []  # type: ignore[attr-defined]
        # An extended header may state a negative size, and the file would be read in circles.
        if tar.offset <= before or info.size < 0:  # type: ignore[attr-defined]
            raise tarfile.ReadError("a header points backwards")
        before = tar.offset  # type: ignore[attr-defined]
        if info.isreg():
            yield Member(info.name, info.offset_data, info.size, info.sparse is not None, info)
