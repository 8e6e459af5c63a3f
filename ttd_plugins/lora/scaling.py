"""Scale LoRA after training: a trade between what it taught and what the original weights know."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.lora.attach import LoRABackbone


def scale_lora(adapter: LoRABackbone, factor: float) -> None:
    """Multiply the update of every LoRA layer by ``factor``, in place.

    The weights become ``original + factor * (trained - original)``: the interpolation of WiSE-FT (arXiv 2109.01903).
    At 0 they are the original weights, at 1 the trained ones. Saving, merging and further training see the result.

    Args:
        adapter: a backbone with LoRA.
        factor: 0 or more.

    Raises:
        InputError: ``factor`` is negative or not finite.
        TTDError: the backbone has no LoRA.
    """
    with torch.no_grad():
        for parameter in _scaled_parameters(adapter, factor):
            parameter.mul_(factor)


@contextmanager
def scaled_lora(adapter: LoRABackbone, factor: float) -> Iterator[None]:
    """Scale LoRA as :func:`scale_lora` does within a ``with`` block; afterwards it is bitwise as before.

    Raises:
        InputError, TTDError: as :func:`scale_lora`; a factor of 1 needs no LoRA.
    """
    if factor == 1:
        yield
        return
    before = [(parameter, parameter.detach().clone()) for parameter in _scaled_parameters(adapter, factor)]
    try:
        scale_lora(adapter, factor)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


def _scaled_parameters(adapter: LoRABackbone, factor: float) -> list[torch.nn.Parameter]:
    """The matrices B of every layer, after a check of the arguments."""
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor) or factor < 0:
        raise InputError(f"the scale of LoRA must be a number of 0 or more, not {factor!r}")
    handle = adapter._lora
    if handle is None:
        raise TTDError(f"{adapter.description.name} has no LoRA to scale; add_lora() or load_lora() adds it")
    return handle.second_matrices()
