"""The library's own image and text embeddings, with which an adapter's are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ttd_plugins.adapter import DenseAdapter

Reference = Callable[[DenseAdapter, Tensor], "Tensor | None"]
"""Maps an adapter and pixels (or token ids) to the library's own embeddings, or to ``None`` if there are none."""


def library_image_embedding(adapter: DenseAdapter, pixels: Tensor) -> Tensor | None:
    """Return the library's image embeddings ``[B, D]`` from ``model.encode_image`` or ``model.get_image_features``.

    Returns ``None`` if the model has neither; a conformance class can then override the reference.
    """
    return _library_embedding(adapter.model, ("encode_image", "get_image_features"), pixels)


def library_text_embedding(adapter: DenseAdapter, ids: Tensor) -> Tensor | None:
    """Return the library's text embeddings ``[N, D]`` from ``model.encode_text`` or ``model.get_text_features``.

    Returns ``None`` if the model has neither.

    Args:
        adapter: the adapter.
        ids: int64 ``[N, context]``.
    """
    return _library_embedding(adapter.model, ("encode_text", "get_text_features"), ids)


def _library_embedding(model: Any, names: tuple[str, str], given: Tensor) -> Tensor | None:
    for name in names:
        function = getattr(model, name, None)
        if callable(function):
            found = function(given)
            found = getattr(found, "pooler_output", found)
            return found[0] if isinstance(found, tuple) else found
    return None
