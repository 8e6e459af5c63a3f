"""The processes of a run: accelerate's set-up, and agreement among them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ttd_plugins.errors import InputError, MissingDependencyError, TTDError, one_sentence
from ttd_plugins.training.config import TrainConfig
from ttd_plugins.utils import distributed

_T = TypeVar("_T")


def main_process_first(action: Callable[[], _T], *, is_main: bool) -> _T:
    """Run ``action`` on the main process and return its result on every process.

    Raises:
        TTDError: on the other processes, where ``action`` failed; the main process raises the exception itself.
    """
    failure: BaseException | None = None
    value = None
    if is_main:
        try:
            value = action()
        except Exception as error:
            failure = error
    message = distributed.gathered(None if failure is None else one_sentence(failure))[0]
    if failure is not None:
        raise failure
    if message is not None:
        raise TTDError(f"the main process failed: {message}")
    return distributed.gathered(value)[0]  # type: ignore[no-any-return]


def is_main_process() -> bool:
    """Whether this is rank 0."""
    from accelerate.state import PartialState

    return bool(PartialState().is_main_process)


def start_accelerate(config: TrainConfig, out: Path) -> Any:
    """Return the ``Accelerator`` of a run.

    Raises:
        InputError: accelerate cannot start as configured, or is set up for a kind of training that is not supported.
        MissingDependencyError: accelerate or a tracker is not installed.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, DistributedType
    except ImportError as error:
        raise MissingDependencyError(
            "training needs accelerate, which is not installed; run: pip install 'ttd-plugins[train]'"
        ) from error
    for tracker in config.run.trackers:
        if importlib.util.find_spec(tracker) is None:
            package = "'ttd-plugins[tensorboard]'" if tracker == "tensorboard" else tracker
            raise MissingDependencyError(f"the tracker {tracker!r} is not installed; run: pip install {package}")
    options: dict[str, Any] = {
        "mixed_precision": config.run.mixed_precision,
        "log_with": list(config.run.trackers) or None,
        "project_dir": str(out),
        # A batch without tags, or without a contrastive term, leaves some weights without gradient.
        "kwargs_handlers": [DistributedDataParallelKwargs(find_unused_parameters=True)],
    }
    try:
        accelerator = Accelerator(cpu=config.run.cpu, **options)
        if accelerator.num_processes == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Without a GPU accelerate joins the launcher's processes only with cpu=True; otherwise each
            # process would train a model of its own into the same folder.
            reset_accelerate(processes=True)
            accelerator = Accelerator(cpu=True, **options)
    except (ValueError, ImportError) as error:
        raise InputError(f"accelerate cannot start: {one_sentence(error)}") from error
    supported = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP)
    refusal = _refusal(config, accelerator, accelerator.distributed_type in supported)
    if refusal is not None:
        reset_accelerate()
        raise InputError(refusal)
    return accelerator


def reset_accelerate(*, processes: bool = False) -> None:
    """Clear accelerate's global state, so that the next run can choose other settings."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=processes)
    GradientState._reset_state()


def sharding_is_requested(config: TrainConfig) -> bool:
    """Whether weights are to be sharded, by ``run.sharded`` or by ``accelerate launch --use_fsdp``."""
    return config.run.sharded or _fsdp_is_requested()


def _fsdp_is_requested() -> bool:
    # Without a GPU accelerate's own state does not show it.
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _refusal(config: TrainConfig, accelerator: Any, supported: bool) -> str | None:
    """Why the settings of accelerate and of the run do not go together, or ``None``."""
    fp16 = config.run.mixed_precision == "fp16"
    if fp16 and accelerator.device.type == "cpu":
        return "run.mixed_precision fp16 scales its loss on a GPU only; choose bf16 or no on the CPU"
    if not supported:
        kind = str(accelerator.distributed_type).rpartition(".")[2]
        return (
            f"accelerate is set up for {kind}, whose checkpoints are not supported; choose data-parallel training or "
            "FSDP in `accelerate config`"
        )
    reason = _fsdp_refusal() if _fsdp_is_requested() else None
    if reason is None and fp16 and sharding_is_requested(config):
        reason = "run.mixed_precision fp16 scales its loss, which sharded weights do not support; choose bf16 or no"
    return reason


def _fsdp_refusal() -> str | None:
    """Which of accelerate's FSDP settings, which it passes in the environment, is not supported."""
    enabled = {
        name: os.environ.get(f"FSDP_{name}", "").lower() in ("true", "1")
        for name in ("OFFLOAD_PARAMS", "ACTIVATION_CHECKPOINTING")
    }
    if os.environ.get("FSDP_VERSION", "1") != "2":
        return "accelerate is set up for FSDP version 1, and only version 2 is supported; set fsdp_version: 2"
    if enabled["OFFLOAD_PARAMS"]:
        return "weights are not moved to the CPU between steps; set fsdp_offload_params: false"
    if enabled["ACTIVATION_CHECKPOINTING"]:
        return (
            "gradient checkpointing is the backbone's own here: set run.gradient_checkpointing (--grad-checkpointing), "
            "and fsdp_activation_checkpointing: false"
        )
    return None
