"""Snapshots of global state of the process: find what changed since then, and restore it."""

from __future__ import annotations

import locale
import os
import random
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

from ttd_plugins.utils.torch_settings import matmul_precision

GLOBAL_HOOKS = tuple(
    name for name, value in vars(nn.modules.module).items() if name.startswith("_global_") and isinstance(value, dict)
)
"""Names of the dictionaries of torch that hold hooks of all modules."""

RANDOM = ("torch's random state", "NumPy's random state", "the random state of random")


class ProcessState:
    """A snapshot of random states, torch's global modes and flags, global hooks, environment and folder."""

    def __init__(self) -> None:
        self.values = _values()
        self.hooks = {name: dict(getattr(nn.modules.module, name)) for name in GLOBAL_HOOKS}
        self.environment = dict(os.environ)
        self.filters = list(warnings.filters)

    def changes(self, *, random_states: bool = True) -> list[str]:
        """Return a phrase for each change since the snapshot; ``random_states``: whether those count."""
        now = _values()
        found = [
            f"{name} changed" + (f" from {old} to {now[name]}" if name not in RANDOM else "")
            for name, old in self.values.items()
            if now[name] != old and (random_states or name not in RANDOM)
        ]
        for name, hooks in self.hooks.items():
            if list(getattr(nn.modules.module, name)) != list(hooks):
                found.append("a hook of all torch modules was added or removed")
        names = sorted(n for n in {*os.environ, *self.environment} if os.environ.get(n) != self.environment.get(n))
        # pytest sets this variable itself.
        names = [name for name in names if name != "PYTEST_CURRENT_TEST"]
        if names:
            found.append(f"the environment variable {names[0]} changed")
        if list(warnings.filters) != self.filters:
            found.append("the filters of warnings changed")
        return found

    def torch_changes(self) -> list[str]:
        """Return a phrase for each change of torch's global modes, flags and hooks since the snapshot."""
        return [change for change in self.changes(random_states=False) if "torch" in change or "auto" in change]

    def restore_torch(self) -> None:
        """Restore torch's global modes, flags and hooks."""
        now = _values()
        for name, value in self.values.items():
            if name in SETTERS and now[name] != value:
                SETTERS[name](value)
        for name, hooks in self.hooks.items():
            own = getattr(nn.modules.module, name)
            own.clear()
            own.update(hooks)

    def restore(self) -> None:
        """Restore everything but random states, which :func:`~ttd_plugins.utils.rng.preserved_rng` restores."""
        self.restore_torch()
        for name in set(os.environ) - set(self.environment) - {"PYTEST_CURRENT_TEST"}:
            del os.environ[name]
        os.environ.update(self.environment)
        warnings.filters[:] = self.filters  # type: ignore[index]


def _values() -> dict[str, Any]:
    return {
        RANDOM[0]: torch.get_rng_state().numpy().tobytes(),
        RANDOM[1]: str(np.random.get_state(legacy=False)),
        RANDOM[2]: random.getstate(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": str(torch.get_default_device()),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled(),
        "autograd's anomaly mode": torch.is_anomaly_enabled(),
        "autocast on the CPU": torch.is_autocast_enabled("cpu"),
        "autocast on the GPU": torch.is_autocast_enabled("cuda"),
        "torch's precision of float32 matrix products": matmul_precision(),
        "TF32 of torch's cuDNN": torch.backends.cudnn.allow_tf32,
        "torch.backends.cudnn.benchmark": torch.backends.cudnn.benchmark,
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "the number of torch's threads": torch.get_num_threads(),
        "torch's flash attention": torch.backends.cuda.flash_sdp_enabled(),
        "the working folder": _folder(),
        "the locale": locale.setlocale(locale.LC_ALL),
    }


def _folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


SETTERS: dict[str, Any] = {
    "torch's default dtype": torch.set_default_dtype,
    "torch's default device": lambda value: torch.set_default_device(None if value == "cpu" else value),
    "torch.is_grad_enabled()": torch._C._set_grad_enabled,
    "autograd's anomaly mode": torch.autograd.set_detect_anomaly,
    "autocast on the CPU": lambda value: torch.set_autocast_enabled("cpu", value),
    "autocast on the GPU": lambda value: torch.set_autocast_enabled("cuda", value),
    "torch's precision of float32 matrix products": torch.set_float32_matmul_precision,
    "TF32 of torch's cuDNN": lambda value: setattr(torch.backends.cudnn, "allow_tf32", value),
    "torch.backends.cudnn.benchmark": lambda value: setattr(torch.backends.cudnn, "benchmark", value),
    "torch's deterministic mode": torch.use_deterministic_algorithms,
    "the number of torch's threads": torch.set_num_threads,
    "torch's flash attention": torch.backends.cuda.enable_flash_sdp,
    "the working folder": os.chdir,
    "the locale": lambda value: locale.setlocale(locale.LC_ALL, value),
}
"""How a value is restored; only changed values are set."""
