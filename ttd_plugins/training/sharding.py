"""Sharded training by ``torch.distributed.fsdp.fully_shard`` (FSDP2): every process keeps a share of each weight.

Weights, their gradients and what the optimiser keeps for them are shared out by rows at rest. A step gathers the
weights when it begins, works with them whole as an unsharded one does, and averages each gradient into its shares.
Scalars cannot be shared out: they stay whole, and :func:`limit_gradients` averages their gradients.
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


def is_shared_out(tensor: Tensor) -> bool:
    """Whether a tensor is a process' share of one."""
    # By what it has, since without a group of processes the class need not even be there.
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the rows of all processes; one that is whole already as it is. Every process must call it."""
    return tensor.full_tensor() if is_shared_out(tensor) else tensor  # type: ignore[attr-defined]


def shared_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process' share of a tensor that every process has, where ``like`` is of a share; else the tensor itself."""
    if not is_shared_out(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    shares: DTensor = like  # type: ignore[assignment]
    return distribute_tensor(
        tensor.to(like.device, like.dtype), shares.device_mesh, shares.placements, src_data_rank=None
    )


def gathered_on_main(tensors: Mapping[str, Tensor], main: bool) -> dict[str, Tensor]:
    """Whole copies of named tensors in the memory of the main process, one after the other; nothing on others."""
    found = {}
    for name, tensor in tensors.items():
        one = whole(tensor.detach())
        if main:
            found[name] = one.cpu() if is_shared_out(tensor) else one
    return found


class Shards:
    """A model whose parameters are shared out among the processes.

    Args:
        root: the module whose forward pass gathers them; changed in place.
        device: where they are.

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

        # fully_shard adds to them with the first step, and takes nothing away.
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
        # The parameter objects that others know are kept empty, and are filled and put back in the end.
        self._places: list[tuple[nn.Module, str, nn.Parameter, Tensor]] = []
        for (module, name), parameter in zip(names, before, strict=True):
            if parameter is not None and parameter not in scalars:
                self._places.append((module, name, parameter, getattr(module, name)))
        self._empty()

    @contextmanager
    def whole(self, here: bool) -> Iterator[None]:
        """Whole parameters in the model of this process for a time, where ``here``. Every process must enter it."""
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
        """Give every process the whole parameters for good, in the objects that they were before."""
        self._reshard()
        self._fill(True)
        for module in self.root.modules():
            for hooks, known in zip(_state_hooks(module), self._hooks[module], strict=True):
                for key in [key for key in hooks if key not in known]:
                    del hooks[key]
            for mark in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
                module.__dict__.pop(mark, None)

    def _reshard(self) -> None:
        """Put shares in their places after a step without a backward pass, or ``state_dict`` would do so later."""
        self.root.reshard()  # type: ignore[operator]

    def _fill(self, here: bool) -> None:
        done: set[int] = set()
        for module, name, parameter, share in self._places:
            if id(parameter) not in done:  # one that two modules have in common is gathered once
                done.add(id(parameter))
                rows = whole(share.detach())
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
    """Groups of an optimiser with shares and whole parameters apart, which it cannot move in one call."""
    split = []
    for group in groups:
        for shares in (True, False):
            parameters = [parameter for parameter in group["params"] if is_shared_out(parameter) == shares]
            if parameters:
                split.append({**group, "params": parameters})
    return split


@torch.no_grad()
def limit_gradients(parameters: Iterable[Tensor], limit: float) -> float:
    """Average the gradients of whole parameters over the processes, and scale all down to a norm of ``limit``.

    Returns:
        The norm of the whole gradient before that. Every process must call it.
    """
    shares, others = [], []
    for parameter in parameters:
        if parameter.grad is not None and is_shared_out(parameter.grad):
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
