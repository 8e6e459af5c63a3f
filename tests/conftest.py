"""Settings of all tests, made before torch is imported."""

from __future__ import annotations

import os

# Where tests share the cores among workers of pytest-xdist, each works on one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
