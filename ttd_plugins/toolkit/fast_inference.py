"""Faster inference of convolutional towers: a copy of a backbone with folded batch norms in channels-last layout.

The copy is for inference only. What would treat its weights as the original's raises: training, LoRA, export, a state
dict. No family is known here: pairs of convolution and norm are found in a pass over a small image, and the features of
the copy are compared with those of the original.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ttd_plugins.adapter import DenseAdapter, ExportedModel, ImageFeatures
from ttd_plugins.errors import InputError, TTDError, UnsupportedModelError, choices_sentence

Precision = Literal["float32", "bfloat16"]

TOLERANCE = 1e-3
"""Largest difference of the L2-normalised features of a float32 copy from those of the original, by element."""
PIXELS_AT_ONCE = 448 * 448
"""Most pixels of a batch that a CPU encodes in one pass: activations of more need new memory in every layer."""

log = logging.getLogger(__name__)


class InferenceOnly(DenseAdapter):
    """What :func:`optimize_for_inference` changes in an adapter; the class of its result is derived from this one.

    Attributes:
        precision: ``"float32"``, or ``"bfloat16"`` for autocast of the image tower.
        folded_norms: number of batch norms that were folded into convolutions.
    """

    precision: Precision
    folded_norms: int

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        """Encode images without a graph; on a CPU in parts of a batch. See :meth:`DenseAdapter.encode_image`."""
        self.pixel_grid(pixels)
        step = len(pixels)
        if pixels.device.type == "cpu":
            step = max(PIXELS_AT_ONCE // (pixels.shape[2] * pixels.shape[3]), 1)
        with torch.no_grad():
            parts = [self._encode_part(part, pooled) for part in pixels.split(max(step, 1))]
        if len(parts) == 1:
            return parts[0]
        patches = torch.cat([part.patches for part in parts])
        embeddings = [part.pooled for part in parts if part.pooled is not None]
        return ImageFeatures(patches, torch.cat(embeddings) if pooled else None)

    def _encode_part(self, pixels: Tensor, pooled: bool) -> ImageFeatures:
        dtype = next(self.model.parameters()).dtype
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            # The adapter's own class comes next in the order of classes.
            found = super().encode_image(pixels, pooled=pooled)  # type: ignore[safe-super]
        embedding = found.pooled
        return ImageFeatures(found.patches.to(dtype), None if embedding is None else embedding.to(dtype))

    def train(self, mode: bool = True) -> Self:
        """Keep evaluation mode; raise UnsupportedModelError for training mode."""
        if mode:
            self._refuse("cannot be trained")
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Keep weights frozen; raise UnsupportedModelError otherwise."""
        if requires_grad:
            self._refuse("cannot be trained")
        return super().requires_grad_(False)

    def add_lora(self, *args: Any, **kwargs: Any) -> Self:
        """Raise UnsupportedModelError."""
        self._refuse("takes no LoRA")

    def snapshot_weights(self) -> None:
        """Raise UnsupportedModelError: TTD takes a snapshot before its first step."""
        self._refuse("cannot be trained")

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Raise UnsupportedModelError."""
        self._refuse("cannot be trained")

    def merge(self) -> nn.Module:
        """Raise UnsupportedModelError."""
        self._refuse("cannot be merged or saved")

    def unload(self) -> nn.Module:
        """Raise UnsupportedModelError."""
        self._refuse("cannot be undone")

    def export(self, folder: Path) -> ExportedModel:
        """Raise UnsupportedModelError."""
        self._refuse("cannot be exported")

    def _refuse(self, what: str) -> NoReturn:
        raise UnsupportedModelError(_refusal(self.description.name, what))


def optimize_for_inference(adapter: DenseAdapter, *, precision: Precision = "float32") -> DenseAdapter:
    """Return a copy of a backbone that encodes images faster; the original stays as it is.

    Batch norms are folded into the convolutions before them, and convolutions use the channels-last layout. LoRA is
    merged into the copy. In float32, normalised features agree with the original's to :data:`TOLERANCE` (usually to
    1e-6). Towers without convolutions gain little.

    Example::

        fast = optimize_for_inference(load("open_clip:photo"))
        segment(fast, "photo.jpg", "dog, grass")

    Args:
        adapter: the backbone, from :func:`ttd_plugins.load` or :func:`ttd_plugins.wrap`.
        precision: ``"bfloat16"`` computes the image tower under autocast, where the processor has bfloat16 arithmetic.
            Cosines then change by up to 0.04 (``open_clip:photo``), more than :data:`TOLERANCE`.

    Returns:
        An adapter in evaluation mode, without gradients. Training it, LoRA, export and its state dict raise
        :class:`~ttd_plugins.errors.UnsupportedModelError`.

    Raises:
        InputError: ``adapter`` is no adapter, or the precision is unknown.
        UnsupportedModelError: the backbone is such a copy already, the processor has no bfloat16 arithmetic, or the
            model cannot be copied.
        TTDError: the model has peft layers that the adapter did not add.
    """
    if not isinstance(adapter, DenseAdapter):
        raise InputError(f"optimize_for_inference() takes an adapter of load() or wrap(), not {type(adapter).__name__}")
    if precision not in get_args(Precision):
        raise InputError(choices_sentence("precision", str(precision), get_args(Precision)))
    if isinstance(adapter, InferenceOnly):
        raise UnsupportedModelError(_refusal(adapter.description.name, "is one already"))
    if precision == "bfloat16" and not has_bfloat16(adapter.device):
        raise UnsupportedModelError(
            f"the device {str(adapter.device)!r} has no bfloat16 arithmetic, so it would be slower; use float32"
        )
    name = adapter.description.name
    # A snapshot for unload() is as large as the model, and the copy cannot be undone.
    skipped = {id(adapter._originals): None} if adapter._originals is not None else {}
    try:
        fast = copy.deepcopy(adapter, skipped)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedModelError(f"{name} cannot be optimised, since its model cannot be copied: {error}") from error
    fast.merge()
    fast.eval().requires_grad_(False)
    size = _probe_size(fast)
    folded = _fold_norms(fast, size)
    for module in fast.model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    fast.model.register_state_dict_pre_hook(_StateDictRefusal(name))
    fast.__class__ = _inference_class(type(fast))
    assert isinstance(fast, InferenceOnly)
    fast.precision, fast.folded_norms = precision, folded
    return fast


def faster_copy(adapter: DenseAdapter, fast: bool | Precision) -> DenseAdapter:
    """Return the copy that the argument ``fast`` of :func:`ttd_plugins.load` asks for, or the adapter itself.

    Raises:
        InputError: ``fast`` is none of True, False, ``"float32"`` and ``"bfloat16"``.
        UnsupportedModelError: as :func:`optimize_for_inference`.
    """
    if isinstance(fast, bool):
        return optimize_for_inference(adapter) if fast else adapter
    return optimize_for_inference(adapter, precision=fast)


def inference_settings(adapter: DenseAdapter) -> str | None:
    """Return what distinguishes results of an optimised copy, such as ``"fast float32"``; ``None`` for an original."""
    return f"fast {adapter.precision}" if isinstance(adapter, InferenceOnly) else None


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 faster than in float32: AVX-512 BF16 or AMX of a CPU, or a GPU's units."""
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


class _StateDictRefusal:
    """A hook that refuses ``state_dict()`` of a folded model, whose weights are not the architecture's."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any) -> None:
        raise UnsupportedModelError(_refusal(self.name, "cannot be saved"))


def _refusal(name: str, what: str) -> str:
    return (
        f"this copy of {name} is for inference only and {what}, since its layers were changed to be faster; use the "
        "backbone that was passed to optimize_for_inference(), or load it without fast"
    )


@cache
def _inference_class(cls: type[DenseAdapter]) -> type[DenseAdapter]:
    """The class of an optimised copy: :class:`InferenceOnly` before the adapter's own class."""
    return type(f"Fast{cls.__name__}", (InferenceOnly, cls), {"__module__": cls.__module__})


def _probe_size(adapter: DenseAdapter) -> tuple[int, int]:
    """Height and width in pixels of two by two patches: the smallest image whose patches have neighbours."""
    rows, columns = adapter.description.patch_size
    return 2 * rows, 2 * columns


def _probe(adapter: DenseAdapter, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Normalised patch features and pooled embeddings of fixed pixels."""
    parameter = next(adapter.model.parameters())
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = adapter.encode_image(pixels.to(parameter), pooled=True)
    assert found.pooled is not None
    return F.normalize(found.patches.float(), dim=-1), F.normalize(found.pooled.float(), dim=-1)


def _fold_norms(adapter: DenseAdapter, size: tuple[int, int]) -> int:
    """Fold the batch norms of a model into its convolutions in place; return their number.

    Where the features would differ, the model stays as it is, and a warning is logged.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in adapter.model.modules()):
        return 0
    with _record_calls(adapter.model) as calls:
        before = _probe(adapter, size)
    pairs = _foldable_pairs(calls)
    if not pairs:
        return 0
    undo = [_fold(adapter.model, convolution, name, norm) for name, convolution, norm in pairs]
    try:
        after = _probe(adapter, size)
        problem = None if all(map(_agree, before, after)) else "its features would change"
    except (RuntimeError, AttributeError, TypeError) as error:
        problem = f"its code reads a norm ({error})"
    if problem is None:
        return len(pairs)
    for restore in undo:
        restore()
    log.warning("the batch norms of %s are not folded: %s", adapter.description.name, problem)
    return 0


def _agree(before: Tensor, after: Tensor) -> bool:
    return bool((before - after).abs().max() <= TOLERANCE)


_Call = tuple[str, nn.Module, Tensor, Tensor]
"""Name of a module, the module, its input and its output."""


@contextmanager
def _record_calls(model: nn.Module) -> Iterator[list[_Call]]:
    """Record the calls of convolutions and batch norms within a ``with`` block; outputs stay alive until its end."""
    calls: list[_Call] = []

    def recorder(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: calls.append((name, module, inputs[0], output))

    handles = [
        module.register_forward_hook(recorder(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _foldable_pairs(calls: list[_Call]) -> list[tuple[str, nn.Conv2d, nn.BatchNorm2d]]:
    """Each norm, by its name, whose input is in every call the output of one convolution, which no other norm follows.

    A norm without running statistics, or of a class with further steps that are unknown, is left out.
    """
    producers = {id(output): module for _, module, _, output in calls if isinstance(module, nn.Conv2d)}
    counts: dict[nn.Module, int] = {}
    sources: dict[tuple[str, nn.BatchNorm2d], set[nn.Module | None]] = {}
    followers: dict[nn.Module, int] = {}
    for name, module, given, _ in calls:
        counts[module] = counts.get(module, 0) + 1
        if isinstance(module, nn.BatchNorm2d):
            source = producers.get(id(given))
            sources.setdefault((name, module), set()).add(source)
            if source is not None:
                followers[source] = followers.get(source, 0) + 1
    pairs = []
    for (name, norm), found in sources.items():
        (first, *others) = found
        if others or not isinstance(first, nn.Conv2d) or norm.running_mean is None or _activation(norm) is None:
            continue
        # Every output of the convolution goes through this norm.
        if followers[first] == counts[first] == counts[norm]:
            pairs.append((name, first, norm))
    return pairs


def _activation(norm: nn.BatchNorm2d) -> nn.Module | None:
    """What remains of a norm once it is folded; ``None`` where its class is unknown.

    timm's class of norm and activation calls its modules ``drop`` and ``act`` after the norm.
    """
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    steps = [getattr(norm, name, None) for name in ("drop", "act")]
    return nn.Sequential(*steps) if all(isinstance(step, nn.Module) for step in steps) else None  # type: ignore[arg-type]


def _fold(model: nn.Module, convolution: nn.Conv2d, name: str, norm: nn.BatchNorm2d) -> Callable[[], None]:
    """Fold one norm into its convolution; return a function that undoes this."""
    weight, bias = convolution.weight, convolution.bias
    if norm.running_mean is None or norm.running_var is None:
        raise TTDError(f"the batch norm {name} has no running statistics")
    new_weight, new_bias = fuse_conv_bn_weights(
        weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    rest = _activation(norm)
    assert rest is not None
    convolution.weight, convolution.bias = new_weight.requires_grad_(False), new_bias.requires_grad_(False)
    model.set_submodule(name, rest.eval())

    def restore() -> None:
        convolution.weight, convolution.bias = weight, bias
        model.set_submodule(name, norm)

    return restore
