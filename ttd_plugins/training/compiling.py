"""Compiling what runs at one shape all along: the blocks of the image tower."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.errors import MissingDependencyError, UnsupportedModelError

COMPILERS = ("cc", "gcc", "clang", "g++", "clang++", "cl")


def compile_image_blocks(adapter: DenseAdapter, *, backend: str = "inductor") -> Callable[[], None]:
    """Have the image tower's blocks compiled by ``torch.compile`` when they are first called, in place.

    On a GPU memory-bound operations (norms, activations, residual sums, changes of precision) are fused, which the
    library's own encoding gains from as much as ours. Results are the same to rounding. Names of weights stay, and
    copies of the backbone are not compiled. Texts are left alone: their number and length change from batch to batch.

    Args:
        adapter: the backbone, with LoRA in it if there is to be any.
        backend: of ``torch.compile``.

    Returns:
        A function that takes it back, so that blocks which were compiled before are compiled as they were.

    Raises:
        UnsupportedModelError: the image tower names no blocks.
        MissingDependencyError: there is no C compiler, which inductor needs.
    """
    blocks = adapter.tower_blocks("image")
    if not blocks:
        raise UnsupportedModelError(
            f"the image tower of {adapter.description.name} names no blocks that are called whole, so there is nothing "
            "to compile; leave it out"
        )
    wanted = [os.environ[name] for name in ("CC", "CXX") if name in os.environ]
    if backend == "inductor" and not any(shutil.which(name) for name in (*wanted, *COMPILERS)):
        raise MissingDependencyError("compiling needs a C compiler, and none was found; install gcc, or leave it out")
    take_back = _compiled_calls(blocks)
    for block in blocks:
        block.compile(backend=backend)
    return take_back


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within it, modules that were compiled in place run as they were written."""
    put_back = _compiled_calls(model.modules())
    for module in model.modules():
        module._compiled_call_impl = None
    try:
        yield
    finally:
        put_back()


def _compiled_calls(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """What modules are called by where they are compiled in place, as a function that puts it back."""
    before = [(module, module._compiled_call_impl) for module in modules]

    def put_back() -> None:
        for module, call in before:
            module._compiled_call_impl = call

    return put_back
