"""The lock under which libraries are imported and models are built."""

from __future__ import annotations

import threading

LOADING_LOCK = threading.RLock()
"""Held while a backbone library is imported or builds a model.

Some libraries import their parts when they are first used, and circular imports in two threads show each other half
imported modules. While they build a model, they also change torch's default dtype and initialisation for all threads.
"""
