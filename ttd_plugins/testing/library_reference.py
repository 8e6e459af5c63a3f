"""The library's own image and text embeddings, with which an adapter's are compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ttd_plugins.adapter import DenseAdapter, LibraryReference

Reference = Callable[..., "Tensor | None"]
"""Maps an adapter and pixels to the library's own embeddings, or to ``None`` if there are none. One of texts takes an
adapter, ids ``[N, L]`` and, if it has a third parameter, their mask ``[N, L]``."""

IMAGE_NAMES = ("encode_image", "get_image_features")
TEXT_NAMES = ("encode_text", "get_text_features")


def stated_reference(adapter: DenseAdapter) -> LibraryReference:
    """Return the references that the adapter states; one without functions if it states none.

    Raises:
        TypeError: ``library_reference`` is something else.
    """
    found = getattr(adapter, "library_reference", None)
    if found is None:
        return LibraryReference()
    if not isinstance(found, LibraryReference):
        raise TypeError(f"library_reference is a {type(found).__name__}, not a LibraryReference")
    return found


def library_image_embedding(adapter: DenseAdapter, pixels: Tensor) -> Tensor | None:
    """Return the library's image embeddings ``[B, D]``.

    They are from ``adapter.library_reference.image``, otherwise from ``model.encode_image`` or
    ``model.get_image_features``. Returns ``None`` if there is none of these.
    """
    stated = stated_reference(adapter).image
    if stated is not None:
        return _embedding(stated(adapter.model, pixels))
    function = _function(adapter.model, IMAGE_NAMES)
    return None if function is None else _embedding(function(pixels))


def library_text_embedding(adapter: DenseAdapter, ids: Tensor, mask: Tensor | None = None) -> Tensor | None:
    """Return the library's text embeddings ``[N, D]``.

    They are from ``adapter.library_reference.text``, otherwise from ``model.encode_text`` or
    ``model.get_text_features``, with the mask if the function takes an ``attention_mask``. Returns ``None`` if there
    is none of these.

    Args:
        adapter: the adapter.
        ids: int64 ``[N, L]``.
        mask: int64 ``[N, L]``, 1 up to and including the end token; ones if it is not given.
    """
    stated = stated_reference(adapter).text
    if stated is not None:
        return _embedding(stated(adapter.model, ids, torch.ones_like(ids) if mask is None else mask))
    function = _function(adapter.model, TEXT_NAMES)
    if function is None:
        return None
    return _embedding(function(ids, attention_mask=mask) if mask is not None and takes_mask(adapter) else function(ids))


def takes_mask(adapter: DenseAdapter) -> bool:
    """Return whether the library's own function of texts takes an ``attention_mask``."""
    function = _function(adapter.model, TEXT_NAMES)
    try:
        return function is not None and "attention_mask" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def call_text_reference(reference: Reference, adapter: DenseAdapter, ids: Tensor, mask: Tensor) -> Tensor | None:
    """Call a reference of texts, with the mask if it has a third parameter."""
    try:
        parameters = [p for p in inspect.signature(reference).parameters.values() if p.kind != p.KEYWORD_ONLY]
        with_mask = len(parameters) > 2
    except (TypeError, ValueError):
        with_mask = False
    return reference(adapter, ids, mask) if with_mask else reference(adapter, ids)


def _function(model: Any, names: tuple[str, ...]) -> Callable[..., Any] | None:
    return next((getattr(model, name) for name in names if callable(getattr(model, name, None))), None)


def _embedding(found: Any) -> Any:
    found = getattr(found, "pooler_output", found)
    return found[0] if isinstance(found, tuple) else found
