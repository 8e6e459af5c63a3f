"""Collective operations for losses: rows of all processes with the correct gradient, and sums of counts.

Data-parallel training (``DistributedDataParallel``, accelerate) averages the gradients of W processes. With these
functions the average is the gradient of the loss of the joint batch, for any share of it per process. No collective
operation runs in the backward pass, which a process may skip. Without ``torch.distributed`` every function returns its
argument.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def process_count() -> int:
    """Return W, the number of processes of the training; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(values: Tensor) -> Tensor:
    """Return the sum over all processes of a tensor of equal shape, without gradient."""
    values = values.detach().clone()
    if process_count() > 1:
        dist.all_reduce(values)
    return values


def joint_mean(total: Tensor, count: Tensor) -> Tensor:
    """Return the mean over the joint batch, from the sum and the count of each process.

    Args:
        total: scalar sum of this process, with gradient.
        count: scalar count, or sum of weights, of this process; a joint count of zero means a mean of zero.

    Returns:
        ``sum(totals) / sum(counts)``, the same value on every process. Its gradient is W times that of this process'
        share, so that the average over processes is the gradient of the mean.
    """
    if process_count() == 1:
        return total / count.clamp_min(1e-6)
    joint_total, joint_count = summed(torch.stack([total.detach(), count.detach().to(total.dtype)])).unbind()
    joint_count = joint_count.clamp_min(1e-6)
    share = process_count() * total / joint_count
    return share + (joint_total / joint_count - share).detach()


class _OwnRows(torch.autograd.Function):
    """The rows of all processes; the gradient of this process' rows is multiplied by W."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, everyone: Tensor, first: int) -> Tensor:
        ctx.place = slice(first, first + len(own))
        return everyone

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return process_count() * gradients[0][ctx.place], None, None


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes, in the order of ranks, with gradient for this process' rows.

    Every process must compute the same loss of them. The gradients of a row are then equal on all W processes, and
    W times the local one is their sum.

    Args:
        rows: ``[b, ...]``; only b may differ between processes.

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


def leaves(value: Tensor) -> set[Tensor]:
    """Return the leaf tensors that a tensor's autograd graph leads to."""
    found: set[Tensor] = set()
    seen, left = set(), [value.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        left += [following for following, _ in node.next_functions]
    return found


def gathered(value: Any) -> list[Any]:
    """Return the picklable values of all processes, in the order of ranks."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def group_numbers(groups: Sequence[Hashable], device: torch.device) -> Tensor:
    """Return a 64-bit hash of each group's id, int64 ``[b]``, equal for equal ids on every process.

    Ids are strings, numbers, tuples and frozen sets of ids, or other values whose ``repr`` identifies them.
    """
    digests = [hashlib.blake2b(_id_bytes(one), digest_size=8).digest() for one in groups]
    numbers = [int.from_bytes(digest, "big", signed=True) for digest in digests]
    return torch.tensor(numbers, dtype=torch.long, device=device)


def _id_bytes(one: Hashable) -> bytes:
    """Return bytes that are equal for equal ids; Python's own hash of a string differs between processes."""
    if isinstance(one, str):
        return one.encode("utf-8", "surrogatepass")
    if isinstance(one, tuple | frozenset):
        parts = list(map(_id_bytes, one)) if isinstance(one, tuple) else sorted(map(_id_bytes, one))
        text = b"".join(b"%d:%s" % (len(part), part) for part in parts)
    elif isinstance(one, int) or (isinstance(one, float) and one.is_integer()):
        text = b"%d" % int(one)  # as 1, 1.0 and True are equal
    else:
        text = repr(one).encode("utf-8", "surrogatepass")
    # No string begins so, unless it is made to.
    return b"\0" + type(one).__name__.encode() * (not isinstance(one, int | float)) + b"\0" + text


def end_process(status: int) -> None:
    """Exit this process if it is one of several of a distributed training; otherwise do nothing.

    ``DistributedDataParallel`` (torch 2.14) keeps the process group alive after ``destroy_process_group()``, so that
    gloo's threads still run during interpreter shutdown. This is the likely cause of an abort seen once ("terminate
    called without an active exception"). The process flushes its output and exits without that shutdown.

    Args:
        status: the exit status. With 0, all processes wait for the last one.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    # No error here may hide the status: another process may have exited already.
    with suppress(Exception):
        if status == 0:
            dist.barrier()
    with suppress(Exception):
        dist.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status)
