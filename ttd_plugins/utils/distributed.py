"""What a loss needs of the other processes: their rows, with the right gradient, and their counts.

Data-parallel training (``DistributedDataParallel``, accelerate) averages the gradients of W processes. All here is
made so that this average is the gradient of the loss of the joint batch, whatever share of it each process holds; and
no collective operation is left to the backward pass, which a process may skip. Without ``torch.distributed`` in use
every function gives its argument back.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def process_count() -> int:
    """W, the number of processes that train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(values: Tensor) -> Tensor:
    """Sum over all processes of a tensor of one shape, without gradient."""
    values = values.detach().clone()
    if process_count() > 1:
        dist.all_reduce(values)
    return values


def joint_mean(total: Tensor, count: Tensor) -> Tensor:
    """The mean over the joint batch of what each process summed and counted.

    Args:
        total: scalar sum of this process, with gradient.
        count: scalar count, or sum of weights, of this process; a joint count of zero gives a mean of zero.

    Returns:
        ``sum(totals) / sum(counts)``, the same value on every process. The gradient is that of W times this process'
        share, so that the average over processes is the gradient of the mean.
    """
    if process_count() == 1:
        return total / count.clamp_min(1e-6)
    joint_total, joint_count = summed(torch.stack([total.detach(), count.detach().to(total.dtype)])).unbind()
    joint_count = joint_count.clamp_min(1e-6)
    share = process_count() * total / joint_count
    return share + (joint_total / joint_count - share).detach()


class _OwnRows(torch.autograd.Function):
    """Rows among those of all processes; their gradient is W times what this process finds."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, everyone: Tensor, first: int) -> Tensor:
        ctx.place = slice(first, first + len(own))
        return everyone

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return process_count() * gradients[0][ctx.place], None, None


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of the processes, with gradient for this process' own.

    Every process must work out the same loss of them: the gradients that W processes would send to one row are then
    equal, and W times the own one is their sum.

    Args:
        rows: ``[b, ...]``; b may differ between processes, the other sides may not.

    Returns:
        ``[sum of b, ...]``.
    """
    if process_count() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(process_count())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    lengths = [int(count) for count in counts]
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    everyone = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
    return _OwnRows.apply(rows, everyone, sum(lengths[: dist.get_rank()])) if rows.requires_grad else everyone


def gathered(value: Any) -> list[Any]:
    """A small picklable value of every process, in the order of the processes."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def group_numbers(groups: Sequence[str], device: torch.device) -> Tensor:
    """An int64 ``[b]`` for the names of groups, equal where names are, on every process (a hash of 64 bits)."""
    digests = [hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in groups]
    numbers = [int.from_bytes(digest, "big", signed=True) for digest in digests]
    return torch.tensor(numbers, dtype=torch.long, device=device)


def end_process(status: int) -> None:
    """End this process where it is one of several that train together; alone, do nothing.

    ``DistributedDataParallel`` (torch 2.14) keeps the group of processes alive past ``destroy_process_group()`` and its
    own end, so that gloo's threads would still run while the interpreter is taken down: the likely cause of an abort
    seen once ("terminate called without an active exception"). The process ends without that, its output flushed.

    Args:
        status: the exit status. With 0 no process ends before all others have come so far.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    # Nothing here may hide the status: another process may be gone already.
    with suppress(Exception):
        if status == 0:
            dist.barrier()
    with suppress(Exception):
        dist.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status)
