"""Sharded training by ``torch.distributed.fsdp.fully_shard`` (FSDP2): each process stores 1/W of every weight.

Between steps, weights, gradients and optimizer moments are sharded by rows. A step gathers the weights when it begins,
computes with full weights as an unsharded step does, and averages each gradient into its shards. Scalars cannot be
sharded: they stay full, and :func:`clip_sharded_gradients` averages their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ttd_plugins.errors import MissingDependencyError
from ttd_plugins.utils import distributed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, a shard of one that is spread over the processes."""
    # Not isinstance: without torch.distributed the class may be missing.
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the rows of all processes; a tensor that is not sharded is returned as it is. Collective."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process' shard of a tensor that every process has, where ``like`` is sharded; else the tensor."""
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    shares: DTensor = like  # type: ignore[assignment]
    return distribute_tensor(
        tensor.to(like.device, like.dtype), shares.device_mesh, shares.placements, src_data_rank=None
    )


def gather_on_main(tensors: Mapping[str, Tensor], main: bool) -> dict[str, Tensor]:
    """Return full copies of named tensors in CPU memory on the main process, and nothing on the others. Collective."""
    found = {}
    for name, tensor in tensors.items():
        one = full_tensor(tensor.detach())
        if main:
            found[name] = one.cpu() if is_sharded(tensor) else one
    return found


class ShardedModule:
    """A module whose parameters are sharded over the processes.

    Args:
        root: the module whose forward pass gathers the parameters; changed in place.
        device: device of the parameters.

    Raises:
        MissingDependencyError: torch has no ``fully_shard`` yet.
    """

    def __init__(self, root: nn.Module, device: torch.device) -> None:
        try:
            from torch.distributed.fsdp import fully_shard
        except ImportError as error:
            raise MissingDependencyError(
                "sharded training needs torch 2.6 or later; run: pip install -U torch"
            ) from error
        from torch.distributed.device_mesh import init_device_mesh

        # fully_shard adds hooks with the first step and removes none.
        self._hooks = {module: tuple(set(hooks) for hooks in _state_hooks(module)) for module in root.modules()}
        names = [(module, name) for module in root.modules() for name in module._parameters]
        before = [getattr(module, name) for module, name in names]
        scalars = {parameter for parameter in before if parameter is not None and parameter.ndim == 0}
        with torch.no_grad():
            for parameter in before:
                if parameter is not None and not parameter.is_contiguous():
                    parameter.data = parameter.data.contiguous()
        fully_shard(root, mesh=init_device_mesh(device.type, (dist.get_world_size(),)), ignored_params=scalars)
        self.root = root
        # Other objects refer to the original parameters: they stay, empty, and are filled and restored at the end.
        self._places: list[tuple[nn.Module, str, nn.Parameter, Tensor]] = []
        for (module, name), parameter in zip(names, before, strict=True):
            if parameter is not None and parameter not in scalars:
                self._places.append((module, name, parameter, getattr(module, name)))
        self._empty()

    @contextmanager
    def full_weights(self, here: bool) -> Iterator[None]:
        """Full parameters in the module of this process within the block, where ``here``. Collective."""
        self._reshard()
        registered = [getattr(module, name) for module, name, _, _ in self._places]
        self._fill(here)
        try:
            yield
        finally:
            for (module, name, _, _), parameter in zip(self._places, registered, strict=True):
                setattr(module, name, parameter)
            self._empty()

    def end(self) -> None:
        """Restore full parameters on every process, in the original parameter objects."""
        self._reshard()
        self._fill(True)
        for module in self.root.modules():
            for hooks, known in zip(_state_hooks(module), self._hooks[module], strict=True):
                for key in [key for key in hooks if key not in known]:
                    del hooks[key]
            for mark in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
                module.__dict__.pop(mark, None)

    def _reshard(self) -> None:
        """Reshard after a forward pass without a backward pass; otherwise ``state_dict`` would do so later."""
        self.root.reshard()  # type: ignore[operator]

    def _fill(self, here: bool) -> None:
        done: set[int] = set()
        for module, name, parameter, share in self._places:
            if id(parameter) not in done:  # a parameter shared by two modules is gathered once
                done.add(id(parameter))
                rows = full_tensor(share.detach())
                if here:
                    parameter.data = rows
            if here:
                setattr(module, name, parameter)

    def _empty(self) -> None:
        for _, _, parameter, _ in self._places:
            parameter.data = parameter.data.new_empty(0)


def _state_hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._state_dict_pre_hooks, module._load_state_dict_pre_hooks


def split_groups(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Split parameter groups into sharded and full parameters, which one fused update cannot mix."""
    split = []
    for group in groups:
        for sharded in (True, False):
            parameters = [parameter for parameter in group["params"] if is_sharded(parameter) == sharded]
            if parameters:
                split.append({**group, "params": parameters})
    return split


@torch.no_grad()
def clip_sharded_gradients(parameters: Iterable[Tensor], limit: float) -> float:
    """Average the gradients of full parameters over the processes, and clip all to a global norm of ``limit``.

    Returns:
        The global norm before clipping. Collective.
    """
    shares, others = [], []
    for parameter in parameters:
        if parameter.grad is not None and is_sharded(parameter.grad):
            shares.append(parameter.grad.to_local())  # type: ignore[attr-defined]
        elif parameter.grad is not None:
            parameter.grad.copy_(distributed.summed(parameter.grad) / distributed.process_count())
            others.append(parameter.grad)
    if not shares and not others:
        return 0.0
    device = (shares or others)[0].device
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in shares:
        squares += gradient.double().square().sum()
    squares = distributed.summed(squares)
    for gradient in others:
        squares += gradient.double().square().sum()
    norm = math.sqrt(squares.item())
    if math.isfinite(norm) and norm > limit:
        for gradient in (*shares, *others):
            gradient.mul_(limit / (norm + 1e-6))
    return norm
