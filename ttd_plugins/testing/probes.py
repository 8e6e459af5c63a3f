"""Measurements that several checks of the conformance kit share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

if TYPE_CHECKING:
    from ttd_plugins.testing.check_session import CheckSession

SMALL_MODEL = 20_000_000
"""Parameters up to which checks may repeat the work at large sizes and in float64."""


def is_small(session: CheckSession) -> bool:
    """Return whether the model is small enough for the costly parts of checks."""
    return sum(parameter.numel() for parameter in session.adapter.model.parameters()) <= SMALL_MODEL


def weighted(output: Tensor) -> Tensor:
    """Return a random weighted sum of the output, since a plain sum after a LayerNorm has no gradient."""
    return (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)).sum()


def reached(output: Tensor, named: Iterable[tuple[str, nn.Parameter]]) -> set[str]:
    """Return the names of the parameters with a nonzero gradient."""
    named = list(named)
    if not output.requires_grad:
        return set()
    found = torch.autograd.grad(weighted(output), [p for _, p in named], retain_graph=True, allow_unused=True)
    return {name for (name, _), g in zip(named, found, strict=True) if g is not None and bool(g.abs().max() > 0)}


def shown(names: Iterable[str]) -> str:
    """Return the first three names and the number of the others."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def perturb(model: nn.Module, seed: int = 3, size: float = 0.1) -> None:
    """Add noise to every parameter in place, relative to its spread; the same noise for equal models."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            spread = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
            parameter.add_(size * (spread or 0.1) * noise)


def fill_zeros(model: nn.Module) -> None:
    """Give parameters that are all zero small random values: libraries switch off new branches in this way."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim and parameter.is_floating_point() and not bool(parameter.any()):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@contextmanager
def recorded_outputs(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Record the last output tensor of each module inside the block."""
    outputs: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        while isinstance(output, tuple | list) and output:
            output = output[0]
        if isinstance(output, Tensor):
            outputs[module] = output.detach()

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def without_randomness(model: nn.Module) -> None:
    """Switch off dropout and stochastic depth, and keep norms with running statistics in evaluation mode."""
    for module in model.modules():
        is_dropout = "drop" in type(module).__name__.lower()
        for name, value in list(vars(module).items()):
            named = re.search(r"drop", name) or (is_dropout and name in ("p", "prob", "rate"))
            if named and isinstance(value, float) and 0 < value < 1:
                setattr(module, name, 0.0)
        if isinstance(module, _NormBase) or "running_mean" in module._buffers:
            module.eval()


@contextmanager
def forward_calls() -> Iterator[list[str]]:
    """Record the class names of the modules that run inside the block."""
    calls: list[str] = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
    try:
        yield calls
    finally:
        handle.remove()


def copied_weights(adapter: nn.Module) -> tuple[str, str] | None:
    """Return where an adapter keeps a copy of a weight of its model, and the weight's name; ``None`` if nowhere."""
    model: Any = adapter.model
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    by_size: dict[int, list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        # Constants are equal by chance.
        if parameter.is_floating_point() and parameter.numel() >= 8 and float(parameter.detach().float().std()) > 0:
            by_size.setdefault(parameter.numel(), []).append((name, parameter.detach()))
    for where, tensor in _tensors_of(vars(adapter), model):
        if not tensor.is_floating_point() or tensor.device.type == "meta":
            continue
        if tensor.untyped_storage().data_ptr() in shared:
            continue
        for name, parameter in by_size.get(tensor.numel(), []):
            if torch.equal(tensor.detach().flatten(), parameter.to(tensor.device, tensor.dtype).flatten()):
                return where, name
    return None


def _tensors_of(root: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that an object holds, each with the path to it; modules of ``model`` are left out."""
    own = {id(module) for module in model.modules()}
    seen: set[int] = set()

    def walk(value: Any, path: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        if id(value) in own or id(value) in seen or depth > 6 or len(seen) > 20_000:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield path, value
        elif isinstance(value, dict):
            for key, item in list(value.items()):
                yield from walk(item, f"{path}.{key}" if isinstance(key, str) else path, depth + 1)
        elif isinstance(value, tuple | list | set | frozenset):
            for item in value:
                yield from walk(item, path, depth + 1)
        elif isinstance(value, nn.Module):
            for name, tensor in (*value.named_parameters(), *value.named_buffers()):
                yield f"{path}.{name}", tensor
        elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
            yield from walk(vars(value), path, depth + 1)

    yield from ((path.replace("._modules", "").lstrip("."), tensor) for path, tensor in walk(root, "", 0))
