"""Many texts in few rows: causal text towers encode captions and tags in one call, almost without padding.

In a causal tower a token depends on the tokens before it only. So the tokens that texts have in common at their start
are computed once: all texts share the start token, and ``a dog`` and ``a dog runs`` share two more. A row holds a tree
of tokens. Each token attends to itself and to its ancestors, and its position is its depth. The result of every text is
that of the text alone, to rounding.

An adapter whose tower can do this implements :class:`PackedTextEncoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise, takewhile
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

ROW_TOKENS = 128
"""Tokens in a row. Longer rows need fewer start tokens, but attention costs more: 4 % of a row at this length."""

LONG_ROW_TOKENS = 160
"""Tokens in a row on a GPU if captions are long: two texts of 77 tokens."""


@dataclass(frozen=True)
class PackedTexts:
    """N texts in R rows of L tokens, with the tensors that a tower needs to encode them.

    Attributes:
        ids: token ids, int64 ``[R, L]``; unused places have id 0.
        positions: position of each token in its text, int64 ``[R, L]``.
        visible: bool ``[R, L, L]``: whether the token at the second index attends to the token at the third one. An
            unused place attends to itself.
        text_token: the token at which each text is pooled, index into the R * L tokens, int64 ``[N]``.
        text_slot: the slot of each text, index into the R * M slots, int64 ``[N]``; M is the largest number of texts of
            a row.
        slot_text: the text of each slot, int64 ``[R, M]``; 0 in unused slots.
        slot_token: the token of each slot, index into the R * L tokens, int64 ``[R, M]``.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    text_token: Tensor
    text_slot: Tensor
    slot_text: Tensor
    slot_token: Tensor

    def __len__(self) -> int:
        return len(self.text_token)

    def to(self, device: torch.device) -> Self:
        """Return the same on ``device``; copies from the CPU to a GPU need no host synchronisation."""
        return type(self)(*(on_device(getattr(self, field.name), device) for field in fields(self)))

    def additive_mask(self, dtype: torch.dtype, heads: int | None = None) -> Tensor:
        """Return the mask that is added to attention logits: 0 or minus infinity.

        Args:
            dtype: that of the tokens.
            heads: for ``[R * heads, L, L]``, as ``nn.MultiheadAttention`` takes it; by default ``[R, L, L]``.
        """
        mask = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
        mask = mask.masked_fill(~self.visible, float("-inf"))
        return mask if heads is None else mask.repeat_interleave(heads, dim=0)

    def pooled(self, tokens: Tensor) -> Tensor:
        """Return the pooled token of each text, ``[N, W]``, of ``tokens`` ``[R, L, W]``."""
        return tokens.flatten(0, 1).index_select(0, self.text_token)


@runtime_checkable
class PackedTextEncoder(Protocol):
    """What an adapter implements beside :class:`~ttd_plugins.adapter.DenseAdapter` to encode packed texts.

    Texts of a subclass that overrides ``encode_text`` and not ``encode_packed_texts`` are never packed.
    """

    def pooling_positions(self, ids: Tensor) -> Tensor | None:
        """Position of the token at which each row of ``ids`` ``[N, L]`` is pooled, int64 ``[N]``.

        Return ``None`` if the tower cannot encode packed texts: it is not causal, or something wraps its parts.
        """
        ...

    def encode_packed_texts(self, packed: PackedTexts) -> Tensor:
        """Text embeddings ``[N, D]``, not L2-normalised: to rounding those of ``encode_text`` for each text alone."""
        ...


def packed_text_encoder(adapter: object) -> PackedTextEncoder | None:
    """Return the adapter as an encoder of packed texts; ``None`` if it does not implement it.

    An adapter that overrides ``encode_text`` and not ``encode_packed_texts`` counts as one that does not, since packed
    texts would bypass its own embeddings.
    """
    if not isinstance(adapter, PackedTextEncoder) or "encode_text" in vars(adapter):
        return None
    classes = type(adapter).__mro__
    own, packed = (
        next(place for place, kind in enumerate(classes) if name in vars(kind))
        for name in ("encode_text", "encode_packed_texts")
    )
    return adapter if packed <= own else None


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on ``device``; a copy from the CPU to a GPU needs no host synchronisation."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def rounded_count(count: int) -> int:
    """Return a number of rows rounded up by an eighth at most, so that a GPU sees few shapes."""
    step = max(2 ** (count.bit_length() - 4), 1)
    return -(-count // step) * step


def sorted_texts(ids: Tensor, pooled: Tensor) -> list[tuple[int, tuple[int, ...]]]:
    """Return number and tokens of each text, up to the pooled one, in the order in which neighbours share most tokens.

    Args:
        ids: int64 ``[N, L]`` on the CPU.
        pooled: the pooled position of each text, int64 ``[N]`` on the CPU.
    """
    rows = zip(ids.tolist(), pooled.tolist(), strict=True)
    texts = [(number, tuple(row[: end + 1])) for number, (row, end) in enumerate(rows)]
    return sorted(texts, key=lambda text: (text[1], text[0]))


def pack_texts(texts: Sequence[tuple[int, tuple[int, ...]]], *, few_shapes: bool) -> PackedTexts:
    """Pack texts into rows, in the given order, on the CPU.

    Args:
        texts: number and tokens of each text, from :func:`sorted_texts`; numbers are 0 to N - 1 in any order.
        few_shapes: whether to round the shapes up, for a GPU, whose libraries prepare kernels for each new shape. The
            result then has up to an eighth more texts; the additional ones repeat the first.
    """
    shared = [0, *(_common(one, other) for (_, one), (_, other) in pairwise(texts))]
    sizes = [len(tokens) for _, tokens in texts]
    rows, length = _rows_of_few_shapes(sizes, shared) if few_shapes else _rows(sizes, shared)
    count, slots = len(rows), max(map(len, rows))
    texts_made = len(texts)
    if few_shapes:
        count, texts_made, slots = rounded_count(count), rounded_count(len(texts)), -(-slots // 16) * 16
    # Lists of a fixed length become one tensor each, which costs the host less than one for every row.
    ids, positions = ([[0] * length for _ in range(count)] for _ in range(2))
    parents = [list(range(length)) for _ in range(count)]
    text_token, text_slot = [0] * texts_made, [0] * texts_made
    slot_text = [[0] * slots for _ in range(count)]
    # An unused slot has the first token of its own row.
    slot_token = [[number * length] * slots for number in range(count)]
    for number, row in enumerate(rows):
        used = 0
        path: list[int] = []
        for slot, place in enumerate(row):
            text, tokens = texts[place]
            first = shared[place] if slot else 0
            for depth in range(first, len(tokens)):
                ids[number][used], positions[number][used] = tokens[depth], depth
                if depth:
                    parents[number][used] = path[depth - 1]
                path[depth:] = [used]
                used += 1
            token = number * length + path[len(tokens) - 1]
            text_token[text], text_slot[text] = token, number * slots + slot
            slot_text[number][slot], slot_token[number][slot] = text, token
    for repeated in range(len(texts), texts_made):
        text_token[repeated], text_slot[repeated] = text_token[0], text_slot[0]
    return PackedTexts(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        visible=_visible(torch.tensor(parents), max(sizes)),
        text_token=torch.tensor(text_token),
        text_slot=torch.tensor(text_slot),
        slot_text=torch.tensor(slot_text),
        slot_token=torch.tensor(slot_token),
    )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens that two texts have in common at their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _fill(sizes: Sequence[int], shared: Sequence[int], length: int) -> list[list[int]]:
    """Return the texts of each row; a text that does not fit starts the next row, where it shares nothing."""
    rows: list[list[int]] = []
    left = 0
    for place, size in enumerate(sizes):
        if rows and size - shared[place] <= left:
            rows[-1].append(place)
            left -= size - shared[place]
        else:
            rows.append([place])
            left = length - size
    return rows


def _rows(sizes: Sequence[int], shared: Sequence[int]) -> tuple[list[list[int]], int]:
    """Return rows of about :data:`ROW_TOKENS` tokens, and the least length that holds them."""
    total = sum(sizes) - sum(shared)
    count = max(round(total / ROW_TOKENS), 1)
    length = max(-(-total // count), *sizes)
    while len(rows := _fill(sizes, shared, length)) > count:
        length += 1
    return rows, length


def _rows_of_few_shapes(sizes: Sequence[int], shared: Sequence[int]) -> tuple[list[list[int]], int]:
    """Return rows of :data:`ROW_TOKENS` tokens, or of a longer length if that leaves many fewer places unused."""
    longest = -(-max(sizes) // 8) * 8
    lengths = [length for length in (ROW_TOKENS, LONG_ROW_TOKENS) if length >= longest] or [longest]
    filled = [(_fill(sizes, shared, length), length) for length in lengths]
    places = [rounded_count(len(rows)) * length for rows, length in filled]
    return filled[-1] if places[-1] < 0.9 * places[0] else filled[0]


def _visible(parents: Tensor, depth: int) -> Tensor:
    """Return whether each token is an ancestor of another, or itself: bool ``[R, L, L]``.

    Args:
        parents: the index in its row of the token before each token, int64 ``[R, L]``; its own for the first one.
        depth: tokens of the longest text.
    """
    count, length = parents.shape
    visible = torch.eye(length, dtype=torch.bool).repeat(count, 1, 1)
    ancestors = parents
    for _ in range(depth - 1):
        visible.scatter_(2, ancestors[:, :, None], True)
        ancestors = parents.gather(1, ancestors)
    return visible
