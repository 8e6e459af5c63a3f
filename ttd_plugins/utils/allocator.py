"""The allocator of the C library: keep freed memory for the next tensors instead of returning it to the system."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of ``mallopt`` in glibc's ``malloc.h``."""
LARGEST_KEPT = 1 << 28
"""Bytes of the largest block that is kept; larger ones are returned to the system when they are freed."""


def keep_freed_memory() -> bool:
    """Let this process reuse the memory of freed tensors on the CPU, in programs of our own.

    By default glibc returns each block above 32 MiB to the system when it is freed, and large parts of the heap too.
    The next tensor of that size then gets pages that the system has to fill with zeros first. An image tower frees and
    allocates such blocks in every layer. Results are the same; the process stays as large as it was at its peak.

    Returns:
        Whether the C library is glibc and accepted both settings; other libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    # musl has no mallopt.
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    accepted = [library.mallopt(_MMAP_THRESHOLD, LARGEST_KEPT), library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)]
    return all(accepted)
