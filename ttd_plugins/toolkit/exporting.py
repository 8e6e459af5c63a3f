"""Writing a model for its own library, and checking that the written model returns the same embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.errors import TTDError, UnsupportedModelError
from ttd_plugins.utils.deprecation import renamed_names
from ttd_plugins.utils.files import follow_umask

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest relative difference of embeddings between a model and the one that its library loads, by dtype."""
ALTERNATIVES = "export the weights alone with form='weights', or LoRA with form='lora'"


def exportable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict on the CPU; no two tensors share memory, as safetensors requires.

    Raises:
        TTDError: LoRA is still in the model.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if "lora_" in name:
            raise TTDError(
                f"LoRA is still in the model ({name}); merge() it, or call ttd_plugins.export.export_backbone"
            )
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        state[name] = plain.clone() if storage in seen or plain.untyped_storage().nbytes() > plain.nbytes else plain
        seen.add(storage)
    return state


def write_weights(model: nn.Module, path: Path) -> None:
    """Write the model's state dict as safetensors, in the dtypes that it has.

    Raises:
        TTDError: LoRA is still in the model.
        OSError, safetensors.SafetensorError: the file cannot be written.
    """
    from safetensors.torch import save_file

    save_file(exportable_state_dict(model), str(path), metadata={"format": "pt"})
    # safetensors writes files that only their owner can read.
    follow_umask(path)


def parameter_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Floating-point dtypes of the model's parameters."""
    return {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}


def embedding_difference(adapter: DenseAdapter, rebuilt: nn.Module) -> float:
    """Largest relative difference of pooled image and text embeddings between an adapter's model and another.

    An adapter of the same class wraps the other model; both run in evaluation mode, on the adapter's device.

    Args:
        adapter: the adapter of the original model.
        rebuilt: the model that its library loaded.

    Returns:
        The larger of the two norms of the difference, each divided by the norm of the embedding; infinity where shapes
        differ or a value is NaN.
    """
    twin = type(adapter)(rebuilt.eval().to(adapter.device))
    pixels, ids = _probe(adapter)
    worst = 0.0
    with torch.no_grad(), _evaluation_mode(adapter.model):
        for a, b in (
            (adapter.encode_image(pixels).pooled, twin.encode_image(pixels).pooled),
            (adapter.encode_text(ids), twin.encode_text(ids)),
        ):
            assert a is not None
            assert b is not None
            if a.shape != b.shape:
                return float("inf")
            gap = (a.float() - b.float()).norm(dim=-1) / a.float().norm(dim=-1).clamp_min(1e-12)
            # A NaN proves nothing, so it counts as different.
            worst = max(worst, float(gap.nan_to_num(float("inf")).max()))
    return worst


def require_same_embeddings(adapter: DenseAdapter, rebuilt: nn.Module, library: str) -> None:
    """Check that the model that the library loaded returns the embeddings of the adapter's model.

    Raises:
        UnsupportedModelError: it returns others.
    """
    gap = embedding_difference(adapter, rebuilt)
    allowed = max(TOLERANCE.get(kind, 1e-5) for kind in parameter_dtypes(adapter.model))
    if not gap <= allowed:
        raise UnsupportedModelError(
            f"{adapter.description.name} cannot be exported for {library}: the model that it loads returns embeddings "
            f"that differ by {gap:.1e}, so it does not rebuild all of the model; {ALTERNATIVES}"
        )


def _probe(adapter: DenseAdapter) -> tuple[Tensor, Tensor]:
    """Two noise images, and two rows of token ids that any text tower with this vocabulary accepts."""
    description = adapter.description
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, *description.image_size, generator=generator)
    text: Any = getattr(adapter.model, "text_model", getattr(adapter.model, "text", adapter.model))
    embedding = next(module for module in text.modules() if isinstance(module, nn.Embedding))
    ids = torch.randint(3, embedding.num_embeddings, (2, description.context_length), generator=generator)
    # Towers with argmax pooling pool at the largest id.
    ids[:, -1] = embedding.num_embeddings - 1
    return pixels.to(adapter.device), ids.to(adapter.device)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def save_tokenizer(tokenizer: Any, folder: Path, advice: str) -> str | None:
    """Save a tokenizer's files into ``folder`` if it has a ``save_pretrained``.

    Returns:
        ``None`` where it was saved, or a sentence on what is absent that ends with ``advice``.
    """
    if tokenizer is None:
        return f"No tokenizer was known, so none is saved; {advice}."
    if not hasattr(tokenizer, "save_pretrained"):
        return f"The tokenizer, a {type(tokenizer).__name__}, cannot be saved as files; {advice}."
    tokenizer.save_pretrained(str(folder))
    return None


if not TYPE_CHECKING:
    __getattr__ = renamed_names(
        __name__,
        {
            "WAY_OUT": "ALTERNATIVES",
            "state_of": "exportable_state_dict",
            "number_formats": "parameter_dtypes",
            "difference": "embedding_difference",
            "require_same": "require_same_embeddings",
        },
    )
