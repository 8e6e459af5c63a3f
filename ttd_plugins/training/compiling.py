"""Compile the blocks of the image tower, whose inputs have the same shape in every step."""

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
    """Compile the image tower's blocks in place with ``torch.compile``; compilation happens on the first call.

    On a GPU this fuses memory-bound operations (norms, activations, residual sums, casts), in the library's own
    encoding too. Results are equal to rounding. Names of weights stay, and copies of the backbone are not compiled. The
    text tower is not compiled, because number and length of texts change between batches.

    Args:
        adapter: the backbone; attach LoRA before.
        backend: the backend of ``torch.compile``.

    Returns:
        A function that restores the previous state of the blocks, compiled or not.

    Raises:
        UnsupportedModelError: the image tower names no blocks.
        MissingDependencyError: the backend inductor finds no C compiler.
    """
    blocks = adapter.tower_blocks("image")
    if not blocks:
        raise UnsupportedModelError(
            f"tower_blocks() of {adapter.description.name} names no blocks of the image tower, so nothing can be "
            "compiled; leave the option out"
        )
    wanted = [os.environ[name] for name in ("CC", "CXX") if name in os.environ]
    if backend == "inductor" and not any(shutil.which(name) for name in (*wanted, *COMPILERS)):
        raise MissingDependencyError(
            "compiling needs a C compiler, and none was found; install gcc, or leave the option out"
        )
    restore = _saved_compiled_calls(blocks)
    for block in blocks:
        block.compile(backend=backend)
    return restore


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Disable compilation of modules within a ``with`` block."""
    restore = _saved_compiled_calls(model.modules())
    for module in model.modules():
        module._compiled_call_impl = None
    try:
        yield
    finally:
        restore()


def _saved_compiled_calls(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Return a function that restores the present compiled calls of the modules."""
    before = [(module, module._compiled_call_impl) for module in modules]

    def restore() -> None:
        for module, call in before:
            module._compiled_call_impl = call

    return restore
