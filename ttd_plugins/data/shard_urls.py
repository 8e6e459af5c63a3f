"""Which shards that are no files may be opened: URLs, and shell commands where the caller permits them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from urllib.parse import urlsplit

from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.utils.user_files import shown

_pipe_allowed: ContextVar[bool] = ContextVar("pipe_allowed", default=False)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=:)")
_SCHEMES = ("http", "https", "ftps", "sftp", "scp", "gs", "htgs", "ais", "hf", "file")
# The characters of RFC 3986 without the single quote: some releases of webdataset put the URL into a shell command.
_URL = re.compile(r"[\w.~:/?#\[\]@!$&()*+,;=%-]+", re.ASCII)


@contextmanager
def allow_pipe(allowed: bool = True) -> Iterator[None]:
    """Permit ``pipe:COMMAND`` as a shard within a ``with`` block, for sources that are opened in it.

    A shard ``pipe:COMMAND`` runs a shell command. No configuration file can permit that: the commands have the flag
    ``--allow-pipe``, and a program calls this function.

    Args:
        allowed: whether it is permitted; ``False`` leaves everything as it is.
    """
    token = _pipe_allowed.set(allowed or _pipe_allowed.get())
    try:
        yield
    finally:
        _pipe_allowed.reset(token)


def pipe_is_allowed() -> bool:
    """Return whether shell commands are permitted here; see :func:`allow_pipe`."""
    return _pipe_allowed.get()


def require_permitted(shards: Iterable[str], *, pipe_allowed: bool) -> None:
    """Check the shards that ``webdataset`` opens.

    Args:
        shards: URLs of shards.
        pipe_allowed: whether shell commands are permitted.

    Raises:
        InputError: a shard is a shell command that is not permitted, has an unknown scheme, names no host or no file,
            or is no valid URL.
    """
    for shard in shards:
        scheme = found[0].lower() if (found := _SCHEME.match(shard.strip())) else ""
        if scheme == "pipe":
            if pipe_allowed:
                continue
            raise InputError(
                f"the shard {shown(shard)} is a shell command, which is refused; if you trust it, give --allow-pipe to "
                "the command, each time, or open it within ttd_plugins.data.allow_pipe()"
            )
        if scheme not in _SCHEMES:
            raise InputError(f"the shard {shown(shard)} has an unknown scheme; known: {', '.join(_SCHEMES)}")
        if not _URL.fullmatch(shard):
            raise InputError(f"the shard {shown(shard)} is no valid URL; write other characters as %XX")
        _require_host(shard, scheme)


def _require_host(shard: str, scheme: str) -> None:
    """Check that a URL names a host and a file, since the programs that open it would retry for minutes."""
    try:
        parts = urlsplit(shard)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(f"the shard {shown(shard)} is no valid URL: {one_sentence(error)}") from error
    if not host:
        kind = "bucket" if scheme in ("gs", "htgs", "ais") else "host"
        raise InputError(f"the shard {shown(shard)} names no {kind}; write {scheme}://{kind.upper()}/PATH.tar")
    if not parts.path.strip("/"):
        raise InputError(f"the shard {shown(shard)} names no file; write {scheme}://{parts.netloc}/PATH.tar")
