"""What stands between a name and its weights on disk: a hub that may be out of reach, and a library's logging."""

from __future__ import annotations

import logging
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit


def hub_problem() -> str | None:
    """Why the model hub cannot be reached, or ``None`` if it might be.

    The hub's client repeats a look-up that cannot succeed for the better part of a minute, so its name is resolved
    first. Behind a proxy names are resolved elsewhere, and offline mode asks nobody.
    """
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or host is None or urllib.request.getproxies():
        return None
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"the model hub {constants.ENDPOINT} cannot be reached ({error.strerror or error})"
    return None


@contextmanager
def hub_offline(offline: bool) -> Iterator[None]:
    """Let the hub's client look into its cache only, as ``HF_HUB_OFFLINE=1`` does, where ``offline`` is set."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def quiet_root_logger(package: str) -> Iterator[None]:
    """Keep the records that modules of ``package`` write to the root logger off it: what fails is raised."""

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return package not in Path(record.pathname).parts

    root = logging.getLogger()
    # Without a handler there, logging would configure the whole program for the first record.
    handler = logging.NullHandler()
    root.addFilter(from_elsewhere)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.removeFilter(from_elsewhere)
