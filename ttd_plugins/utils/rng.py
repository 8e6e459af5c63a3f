"""State of the global random number generators: Python's, NumPy's, torch's and that of the current CUDA device."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def get_rng_state() -> dict[str, Any]:
    """Return the state of the generators of this process.

    Returns:
        ``"python"`` and ``"numpy"`` as lists that JSON can store; ``"torch"`` and ``"cuda"`` as uint8 tensors, the
        latter ``None`` without a CUDA device.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    # Not is_available(), which would query the driver in the worker processes of a loader.
    cuda = torch.cuda.is_initialized()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if cuda else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore a state from :func:`get_rng_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state.get("cuda") is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore all generators when the block ends."""
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Seed torch's generators of the CPU and of the current CUDA device, and restore all generators at the end.

    Args:
        seed: the seed.
    """
    with preserved_rng():
        # torch.manual_seed would seed the generators of all devices, which nothing restores.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)
        yield


def seed_everything(seed: int, *, accelerators: bool = True) -> None:
    """Seed all generators; negative and large seeds are reduced to the range that each generator accepts.

    Args:
        seed: the seed.
        accelerators: whether to seed the generators of GPUs too. Without them a call is cheap enough for every sample.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed formats a stack trace for GPUs that are not initialised yet.
    (torch.manual_seed if accelerators else torch.default_generator.manual_seed)(seed % 2**63)
