"""Snapshots of a module tree: find what changed since then, and restore it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name)
"""Attributes of every module that store hooks."""
PLAIN = (bool, int, float, str, bytes, type(None))


def plain(value: Any) -> bool:
    """Return whether ``==`` compares ``value``: a number, a text, or tuples, lists and dicts of these."""
    if isinstance(value, PLAIN):
        return True
    if isinstance(value, tuple | list):
        return all(plain(item) for item in value)
    return isinstance(value, dict) and all(plain(item) for pair in value.items() for item in pair)


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list | set) else value


class ModuleSnapshot:
    """A snapshot of a module and its submodules: tensors, modes, flags, hooks and attributes.

    It copies every tensor, so it takes as much memory as the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parts = list(module.named_modules())
        self.attributes = [{key: _copied(value) for key, value in vars(part).items()} for _, part in self.parts]
        self.named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        # Tensors that are neither parameters nor buffers, such as attention masks in plain attributes.
        for (name, _), attributes in zip(self.parts, self.attributes, strict=True):
            for key, value in attributes.items():
                if isinstance(value, Tensor):
                    self.named[f"{name}.{key}".lstrip(".")] = value
        self.values = {name: (t, t.detach().clone(), t.requires_grad, t.grad) for name, t in self.named.items()}

    def changes(self, *, buffers: bool = True) -> list[str]:
        """Return a phrase for each change since the snapshot.

        Args:
            buffers: whether values of buffers count; those of batch norms change in training mode.
        """
        found: list[str] = []
        now = dict(self.module.named_modules())
        before = dict(self.parts)
        if list(now) != list(before) or any(now[name] is not part for name, part in self.parts):
            names = sorted(set(now) ^ set(before)) or [n for n, p in before.items() if now.get(n) is not p]
            found.append(f"modules were added, removed or replaced ({', '.join(names[:3])})")
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        replaced = [name for name, tensor in tensors.items() if self.named.get(name) is not tensor]
        replaced += [name for name in self.named if name not in tensors and not self._is_attribute(name)]
        if replaced:
            found.append(f"tensors were replaced ({', '.join(sorted(set(replaced))[:3])})")
        own = dict(self.module.named_buffers())
        for name, (tensor, value, flag, _) in self.values.items():
            if tensor.shape != value.shape or (not same(tensor, value) and (buffers or name not in own)):
                found.append(f"the values of {name} changed")
            if tensor.requires_grad != flag:
                found.append(f"requires_grad of {name} became {tensor.requires_grad}")
        for (name, part), attributes in zip(self.parts, self.attributes, strict=True):
            found += _differences(name or "the model", attributes, vars(part))
        return found

    def _is_attribute(self, name: str) -> bool:
        owner, _, key = name.rpartition(".")
        part = dict(self.parts).get(owner)
        return part is not None and vars(part).get(key) is self.named[name]

    def restore(self) -> None:
        """Restore attributes, hooks, submodules, flags, gradients and the values of tensors."""
        for (_, part), attributes in zip(self.parts, self.attributes, strict=True):
            vars(part).clear()
            vars(part).update({key: _copied(value) for key, value in attributes.items()})
        with torch.no_grad():
            for tensor, value, flag, gradient in self.values.values():
                if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
                    tensor.data = value.clone()
                elif not same(tensor, value):
                    tensor.copy_(value)
                if tensor.is_leaf:
                    tensor.requires_grad_(flag)
                    tensor.grad = gradient


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, counting NaN as equal to NaN."""
    if a.device.type == "meta":
        return a.shape == b.shape
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _differences(where: str, before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    added, gone = sorted(set(now) - set(before)), sorted(set(before) - set(now))
    if added or gone:
        yield f"attributes of {where} were added or removed ({', '.join((added + gone)[:3])})"
    for key in sorted(set(before) & set(now)):
        old, new = before[key], now[key]
        if key in HOOKS:
            if list(old) != list(new):
                yield f"a hook was added to or removed from {where}"
        elif key == "training":
            if old != new:
                yield f"{where} changed to {'training' if new else 'evaluation'} mode"
        elif key in ("_parameters", "_buffers", "_modules"):
            continue
        elif plain(old) and plain(new) and old != new:
            yield f"the attribute {key} of {where} changed"
        elif new is not old and (isinstance(old, Tensor) or isinstance(new, Tensor) or type(old) is not type(new)):
            yield f"the attribute {key} of {where} was replaced"
