"""A callback for Lightning: logs the parts of the loss, watches for collapse, and makes checkpoints small."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import torch
from torch import nn

from ttd_plugins.engine import TTD
from ttd_plugins.errors import InputError, InputWarning, MissingDependencyError
from ttd_plugins.training.collapse_watch import CollapseWatch, MetricAverager
from ttd_plugins.training.own_loop import trained_state_dict

LIBRARIES = ("lightning.pytorch", "pytorch_lightning")


def lightning_callback(*, prefix: str = "ttd/", trained_only: bool = True) -> Any:
    """Return a ``lightning.pytorch.Callback`` for a ``LightningModule`` that contains a :class:`~ttd_plugins.TTD`.

    It sets the engine to training mode, since Lightning leaves modules in their mode and a loaded backbone is in
    evaluation mode. In training it logs the losses and statistics of the engine's output through ``pl_module.log``, and
    warns once where the maps or the selection collapse, as ``ttd train`` does. Lightning's checkpoints hold the tensors
    that training changes only: LoRA, and the moving average of ``teacher="ema"``. Resuming therefore needs a module
    that is built as before, with the original weights.

    Args:
        prefix: put before the names of metrics.
        trained_only: whether checkpoints leave out the frozen weights of the backbone.

    Raises:
        MissingDependencyError: Lightning is not installed.
    """
    library = _lightning()

    class TTDCallback(library.Callback):  # type: ignore[name-defined,misc]
        """See :func:`lightning_callback`."""

        def __init__(self) -> None:
            super().__init__()
            self.averager, self.watch = MetricAverager(), CollapseWatch()
            self._metrics: dict[str, float | torch.Tensor] = {}
            self._hooks: list[Any] = []

        @property
        def state_key(self) -> str:
            return "ttd_plugins.lightning_callback"

        def state_dict(self) -> dict[str, Any]:
            return {"watch": self.watch.as_dict()}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.watch = CollapseWatch.from_dict(state_dict["watch"])

        def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
            engines = _engines(pl_module)
            if trained_only:
                # The frozen weights are missing in a checkpoint; _check_complete() requires all others.
                pl_module.strict_loading = False  # type: ignore[assignment]
            if stage == "fit":
                # Lightning leaves modules in their mode, and a loaded backbone is in evaluation mode.
                for engine in engines.values():
                    engine.train()
            for hook in self._hooks:
                hook.remove()
            self._hooks = [engine.register_forward_hook(self._store) for engine in engines.values()]

        def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

        def _store(self, engine: nn.Module, inputs: Any, output: Any) -> None:
            # On the device: reading them here would synchronise before the backward pass.
            self._metrics = {**output.losses, **output.device_statistics}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            metrics, self._metrics = self._metrics, {}
            if not metrics:
                return
            pl_module.log_dict({f"{prefix}{name}": value for name, value in metrics.items()}, batch_size=1)
            if trainer.global_step % max(trainer.log_every_n_steps, 1) == 0:
                self.averager.add({name: float(value) for name, value in metrics.items()})
                means, self.averager = self.averager.means(), MetricAverager()
                for sentence in self.watch.check(means) if trainer.is_global_zero else []:
                    warnings.warn(f"step {trainer.global_step}: {sentence}", InputWarning, stacklevel=2)

        def on_save_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
            if not trained_only:
                return
            state = checkpoint["state_dict"]
            for name, engine in _engines(pl_module).items():
                kept = {f"{name}{key}" for key in trained_state_dict(engine)}
                for key in [key for key in state if key.startswith(name) and key not in kept]:
                    del state[key]

        def on_load_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
            if trained_only:
                _check_complete(pl_module, checkpoint.get("state_dict", {}))

    return TTDCallback()


def _engines(module: nn.Module) -> dict[str, TTD]:
    """The engines in a module, by the prefix of their names in its state dict."""
    found = {f"{name}." if name else "": part for name, part in module.named_modules() if isinstance(part, TTD)}
    if not found:
        raise InputError(
            f"{type(module).__name__} contains no TTD, which lightning_callback() needs; store it as an attribute, "
            "as in self.ttd = TTD(backbone)"
        )
    return found


def _check_complete(module: nn.Module, state: dict[str, Any]) -> None:
    """Check that a checkpoint has every tensor that training changes, of the right shape.

    Raises:
        InputError: it has not.
    """
    for name, engine in _engines(module).items():
        expected = {f"{name}{key}": value for key, value in trained_state_dict(engine).items()}
        wrong = sorted(k for k, value in expected.items() if k not in state or state[k].shape != value.shape)
        if wrong:
            raise InputError(
                f"the checkpoint lacks {len(wrong)} of {len(expected)} trained tensors, such as {wrong[0]}; build the "
                "module as it was saved, with the same LoRA"
            )


def _lightning() -> Any:
    """The library that the caller imported, or else the one that is installed."""
    for name in sorted(LIBRARIES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise MissingDependencyError(
        "lightning_callback() needs Lightning, which is not installed; run: pip install lightning"
    )
