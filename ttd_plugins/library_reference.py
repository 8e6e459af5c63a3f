"""What a backbone's own library computes, stated by an adapter for the conformance kit to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class LibraryReference:
    """Functions that call the library as its own documentation does. ``None`` where the library has no such function.

    ``model`` is the adapter's model in its current state; the kit also passes copies of other precision and other
    weights. Do not call the adapter in these functions, since a comparison with itself finds nothing. An exception of
    ``image`` or ``patches`` at a size other than the preferred one means that the library cannot compute that size.

    Attributes:
        image: ``image(model, pixels)``: pixels ``[B, 3, height, width]`` to pooled embeddings ``[B, D]``.
        text: ``text(model, ids, mask)``: ids and mask, both int64 ``[N, L]``, to text embeddings ``[N, D]``. The mask
            is 1 up to and including the end token, and 0 at padding; a library that attends to padding ignores it.
        patches: ``patches(model, pixels)``: patch features ``[B, H, W, D]`` or ``[B, H * W, D]``, row by row, in the
            dense mode of the adapter.
        tokens: ``tokens(texts)``: ids ``[N, L]`` of the library's own tokenizer, as a tensor or as lists. Without
            padding, or padded as in training.
        pixels: ``pixels(image)``: the library's own preprocessing of an RGB image, ``[3, height, width]``.
    """

    image: Callable[[Any, Tensor], Tensor] | None = None
    text: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    patches: Callable[[Any, Tensor], Tensor] | None = None
    tokens: Callable[[list[str]], Tensor | Sequence[Sequence[int]]] | None = None
    pixels: Callable[[Image], Tensor] | None = None
