"""Text embeddings of a batch: each distinct text is encoded once, and as few tokens as possible.

The cost of a text tower is proportional to its tokens. A tag has about 3 tokens, a caption 12, the context 77.

- A causal tower whose adapter packs texts (:mod:`ttd_plugins.packed_texts`) encodes all texts in one call, and tokens
  that texts have in common at their start once.
- Otherwise texts are sorted by length into a few chunks, each trimmed to its longest text, if the backbone allows it
  (``text_needs_full_context``). The number of chunks balances tokens against the cost of a call of the tower.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ttd_plugins.adapter import (
    DenseAdapter,
    Tokens,
    named_tower_parameters,
    require_shape,
    text_embeddings,
    text_tokens,
)
from ttd_plugins.method.similarity import normalize
from ttd_plugins.packed_texts import (
    PackedTextEncoder,
    PackedTexts,
    on_device,
    pack_texts,
    packed_text_encoder,
    rounded_count,
    sorted_texts,
)
from ttd_plugins.utils.deprecation import renamed_keyword, renamed_names

if not TYPE_CHECKING:
    __getattr__ = renamed_names(
        __name__,
        {
            "TextMemory": "TextEmbeddingCache",
            "TokenMemory": "TokenCache",
            "computed_twice": "checkpointed_text_blocks",
        },
    )

CPU_CALL_COST = 80
"""Cost of one more call of a text tower on a CPU, in tokens: its weights are read once more."""
GPU_CALL_WORK = 400e9
"""Cost of one more call on another device, in tokens times weights. The host launches about 700 more kernels per step,
which takes about 10 ms; an H200 does this much work in that time."""


MAX_POSITIONS = 32_768
"""Text positions whose activations a step stores; with more, the tower runs again in the backward pass, in chunks."""


def plan_chunks(lengths: Sequence[int], call_cost: int) -> list[list[int]]:
    """Split texts into chunks of minimal total cost; each text is padded to the longest of its chunk.

    Args:
        lengths: number of positions of each text up to and including its end token.
        call_cost: cost of one more chunk, in tokens.

    Returns:
        Indices of the texts of each chunk, ascending; earlier chunks have shorter texts.
    """
    counts = Counter(lengths)
    sizes = sorted(counts)
    # best[j]: the least cost of all texts of the j shortest sizes, and the start of their last chunk.
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(sizes) + 1):
        texts, choices = 0, []
        for start in range(end - 1, -1, -1):
            texts += counts[sizes[start]]
            choices.append((best[start][0] + texts * sizes[end - 1] + call_cost, start))
        best.append(min(choices))
    chunks: list[list[int]] = []
    end = len(sizes)
    while end:
        start = best[end][1]
        low, high = sizes[start], sizes[end - 1]
        chunks.insert(0, [number for number, length in enumerate(lengths) if low <= length <= high])
        end = start
    return chunks


@contextmanager
def checkpointed_text_blocks(adapter: DenseAdapter) -> Iterator[None]:
    """Use activation checkpointing (arXiv 1604.06174) in the text tower within a ``with`` block.

    Blocks store their input only, and run again in the backward pass with the same random numbers. The model is
    restored at the end. A tower that checkpoints its blocks itself is not changed.
    """
    blocks = list(dict.fromkeys(adapter.tower_blocks("text")))
    if _are_checkpointed(adapter.model, blocks):
        blocks = []
    # torch calls a block that was compiled in place through its compiled call.
    names = ["forward" if block._compiled_call_impl is None else "_compiled_call_impl" for block in blocks]
    own = [vars(block).get(name) for block, name in zip(blocks, names, strict=True)]
    try:
        for block, name in zip(blocks, names, strict=True):
            setattr(block, name, partial(checkpoint, getattr(block, name), use_reentrant=False))
        yield
    finally:
        for block, name, call in zip(blocks, names, own, strict=True):
            vars(block).pop(name, None)
            # Other libraries set a forward on an object too.
            if call is not None:
                setattr(block, name, call)


def _padded_shape(count: int, length: int, context: int, device: torch.device) -> tuple[int, int]:
    """Return the padded number and length of the texts of a call: on a GPU both are rounded up, for fewer shapes.

    GPU libraries prepare kernels for each new shape; cuDNN's attention takes some 100 ms. The count grows by an eighth
    at most, the length by seven positions.
    """
    if device.type == "cpu":
        return count, length
    return rounded_count(count), min(-(-length // 8) * 8, context)


def _are_checkpointed(model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Whether the library's own activation checkpointing of blocks is on; a second one would cost a forward pass."""
    modules, wanted = dict(model.named_modules()), set(blocks)
    names = [name.split(".") for name, module in modules.items() if module in wanted]
    above = {".".join(name[:depth]) for name in names for depth in range(len(name) + 1)}
    return any(
        modules[name].training and getattr(modules[name], switch, False) is True
        for name in above
        for switch in ("grad_checkpointing", "gradient_checkpointing")
    )


class TokenCache:
    """Cache of the token rows of short texts, across batches.

    Tags repeat in many batches, captions once an epoch, and a GPU waits while the host tokenises. The cache is cleared
    when the adapter's ``tokenizer`` or context length changes. An adapter without an attribute ``tokenizer`` is not
    cached.

    Attributes:
        limit: maximal number of rows; the least recently used one is removed first.
        longest: maximal number of characters of a cached text.
    """

    def __init__(self, limit: int = 16_384, longest: int = 32) -> None:
        self.limit = limit
        self.longest = longest
        self._rows: OrderedDict[str, tuple[Tensor, int, bool]] = OrderedDict()
        self._valid_for: tuple[object, int] | None = None
        self._ahead: dict[str, tuple[Tensor, int, bool]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def tokenize(self, adapter: DenseAdapter, texts: Sequence[str]) -> Tokens:
        """Return the result of :meth:`~ttd_plugins.adapter.DenseAdapter.tokenize`; ``texts`` are distinct."""
        valid_for = getattr(adapter, "tokenizer", None), adapter.description.context_length
        if valid_for[0] is None:
            return text_tokens(adapter, texts)
        if self._valid_for is None or valid_for[0] is not self._valid_for[0] or valid_for[1] != self._valid_for[1]:
            self._rows.clear()
            self._ahead.clear()
            self._valid_for = valid_for
        rows = {text: row for text in texts if (row := self._rows.get(text) or self._ahead.get(text)) is not None}
        new = [text for text in texts if text not in rows]
        if new:
            tokens = text_tokens(adapter, new)
            # Copies, because a view would keep the memory of its whole batch.
            rows |= {
                text: (ids.clone(), length, cut)
                for text, ids, length, cut in zip(
                    new, tokens.ids, tokens.lengths.tolist(), tokens.truncated, strict=True
                )
            }
        for text, row in rows.items():
            if len(text) <= self.longest:
                self._rows[text] = row
                self._rows.move_to_end(text)
        while len(self._rows) > self.limit:
            self._rows.popitem(last=False)
        ids, lengths, truncated = zip(*(rows[text] for text in texts), strict=True)
        return Tokens(torch.stack(ids), torch.tensor(lengths), list(truncated))

    def tokenize_ahead(self, adapter: DenseAdapter, texts: Sequence[str]) -> None:
        """Tokenise the texts of a later call of :meth:`tokenize`, of any length; replaces those of the last such call.

        An adapter without an attribute ``tokenizer`` is left alone, since its rows cannot be cached.
        """
        if not texts or getattr(adapter, "tokenizer", None) is None:
            return
        distinct = list(dict.fromkeys(texts))
        found = self.tokenize(adapter, distinct)
        rows = zip(found.ids, found.lengths.tolist(), found.truncated, strict=True)
        self._ahead = dict(zip(distinct, rows, strict=True))


def _call_cost(adapter: DenseAdapter) -> int:
    """Return the cost of one more call of the text tower, in tokens."""
    if adapter.device.type == "cpu":
        return CPU_CALL_COST
    blocks = [parameter for block in adapter.tower_blocks("text") for parameter in block.parameters()]
    weights = sum(p.numel() for p in blocks or [parameter for _, parameter in named_tower_parameters(adapter, "text")])
    return int(GPU_CALL_WORK / weights)


def _split(chunk: list[int], length: int) -> list[list[int]]:
    """Split a chunk into parts of at most a quarter of :data:`MAX_POSITIONS`."""
    step = max(MAX_POSITIONS // 4 // length, 1)
    return [chunk[start : start + step] for start in range(0, len(chunk), step)]


@renamed_keyword("recompute", "activation_checkpointing")
@renamed_keyword("memory", "token_cache")
def encode_texts(
    adapter: DenseAdapter,
    texts: Sequence[str],
    *,
    activation_checkpointing: bool = False,
    token_cache: TokenCache | None = None,
) -> tuple[Tensor, list[bool]]:
    """Encode texts: L2-normalised embeddings ``[N, D]`` in at least float32.

    Equal texts are encoded once: packed if the backbone can do it, or else in chunks whose positions after the last end
    token are trimmed if the backbone allows it. Lengths come from tokens on the CPU, without host synchronisation. With
    gradients, more than :data:`MAX_POSITIONS` positions are encoded in parts with activation checkpointing of the whole
    tower.

    Args:
        adapter: the backbone.
        texts: N strings.
        activation_checkpointing: whether the blocks of the text tower store their input only and run again in the
            backward pass; without effect if gradients are disabled.
        token_cache: cache of token rows; by default every text is tokenised.

    Returns:
        The embeddings, and for each text whether it was longer than the context.
    """
    if not texts:
        width = adapter.description.embedding_width
        return torch.zeros(0, width, device=adapter.device), []
    distinct = list(dict.fromkeys(texts))
    tokens = text_tokens(adapter, distinct) if token_cache is None else token_cache.tokenize(adapter, distinct)
    encoder = packed_text_encoder(adapter)
    pooled = None if encoder is None else encoder.pooling_positions(tokens.ids)
    if encoder is None or pooled is None:
        found, order = _encode_in_chunks(adapter, tokens, activation_checkpointing)
    else:
        found, order = _encode_packed(adapter, encoder, tokens.ids, pooled, activation_checkpointing)
    embeddings = normalize(found)
    place = {distinct[number]: row for row, number in enumerate(order)}
    rows = [place[text] for text in texts]
    if rows != list(range(len(distinct))):
        embeddings = embeddings.index_select(0, on_device(torch.tensor(rows), adapter.device))
    truncated = dict(zip(distinct, tokens.truncated, strict=True))
    return embeddings, [truncated[text] for text in texts]


def _packed_embeddings(adapter: DenseAdapter, encoder: PackedTextEncoder, packed: PackedTexts) -> Tensor:
    embeddings = encoder.encode_packed_texts(packed)
    require_shape(adapter, "encode_packed_texts", embeddings, (len(packed), adapter.description.embedding_width))
    return embeddings


def _encode_packed(
    adapter: DenseAdapter, encoder: PackedTextEncoder, ids: Tensor, pooled: Tensor, activation_checkpointing: bool
) -> tuple[Tensor, list[int]]:
    """Encode packed texts; returns embeddings, and the number of the text of each row."""
    texts = sorted_texts(ids, pooled)
    positions = sum(len(text) for _, text in texts)
    large = positions > MAX_POSITIONS
    checkpointed = large and torch.is_grad_enabled()
    parts = [texts]
    if large:
        step = max(len(texts) * MAX_POSITIONS // (4 * positions), 1)
        parts = [texts[start : start + step] for start in range(0, len(texts), step)]
    found = []
    checkpointing = activation_checkpointing and torch.is_grad_enabled() and not large
    with checkpointed_text_blocks(adapter) if checkpointing else nullcontext():
        for part in parts:
            renumbered = [(number, text) for number, (_, text) in enumerate(part)]
            packed = pack_texts(renumbered, few_shapes=adapter.device.type != "cpu").to(adapter.device)
            call = partial(_packed_embeddings, adapter, encoder)
            embeddings = checkpoint(call, packed, use_reentrant=False) if checkpointed else call(packed)
            found.append(embeddings[: len(part)])
    return torch.cat(found) if len(found) > 1 else found[0], [number for number, _ in texts]


def _encode_in_chunks(
    adapter: DenseAdapter, tokens: Tokens, activation_checkpointing: bool
) -> tuple[Tensor, list[int]]:
    """Encode chunks of texts of similar length; returns embeddings, and the number of the text of each row."""
    device = adapter.device
    if adapter.description.text_needs_full_context:
        lengths = [tokens.ids.shape[1]] * len(tokens.ids)
        chunks = [list(range(len(tokens.ids)))]
    else:
        lengths = tokens.lengths.tolist()
        chunks = plan_chunks(lengths, _call_cost(adapter))
    parts = []
    longest = [max(lengths[text] for text in chunk) for chunk in chunks]
    positions = sum(len(chunk) * length for chunk, length in zip(chunks, longest, strict=True))
    large = torch.is_grad_enabled() and positions > MAX_POSITIONS
    if large:
        # Thousands of tags: only tokens are stored, so that memory does not grow with the tower's depth and width.
        chunks = [part for chunk, length in zip(chunks, longest, strict=True) for part in _split(chunk, length)]
    checkpointing = activation_checkpointing and torch.is_grad_enabled() and not large
    with checkpointed_text_blocks(adapter) if checkpointing else nullcontext():
        for chunk in chunks:
            count, length = _padded_shape(len(chunk), max(lengths[text] for text in chunk), tokens.ids.shape[1], device)
            ids = on_device(tokens.ids[chunk + chunk[:1] * (count - len(chunk)), :length], device)
            call = partial(text_embeddings, adapter)
            found = checkpoint(call, ids, use_reentrant=False) if large else call(ids)
            parts.append(found[: len(chunk)])
    return torch.cat(parts) if len(parts) > 1 else parts[0], [number for chunk in chunks for number in chunk]


class TextEmbeddingCache:
    """Cache of token rows, and of embeddings that need no gradient, across batches.

    A frozen text tower, and the teacher ``"frozen"``, always return the same embedding of a text. The cache is cleared
    when a weight of the tower changes or moves, or when the precision changes. Embeddings are not cached if the tower
    needs a gradient or applies dropout.

    Attributes:
        limit: maximal number of embeddings; the least recently used one is removed first. 0 caches none.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._rows: OrderedDict[str, tuple[Tensor, bool]] = OrderedDict()
        self._valid_for: Hashable = None
        self._tokens = TokenCache()

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """Remove all embeddings."""
        self._rows.clear()

    def tokenize_ahead(self, adapter: DenseAdapter, texts: Sequence[str]) -> None:
        """Tokenise the texts of a later call of :meth:`encode`; see :meth:`TokenCache.tokenize_ahead`."""
        self._tokens.tokenize_ahead(adapter, texts)

    @renamed_keyword("recompute", "activation_checkpointing")
    def encode(
        self, adapter: DenseAdapter, texts: Sequence[str], *, activation_checkpointing: bool = False
    ) -> tuple[Tensor, list[bool]]:
        """Return the result of :func:`encode_texts`, equal to rounding: new texts are in chunks of other lengths."""
        state = _state_of_text_tower(adapter) if self.limit and texts else None
        if state is None:
            self._rows.clear()
            return encode_texts(
                adapter, texts, activation_checkpointing=activation_checkpointing, token_cache=self._tokens
            )
        if state != self._valid_for:
            self._rows.clear()
            self._valid_for = state
        distinct = list(dict.fromkeys(texts))
        found = {text: self._rows[text] for text in distinct if text in self._rows}
        new = [text for text in distinct if text not in found]
        if new:
            with torch.no_grad():
                embeddings, truncated = encode_texts(adapter, new, token_cache=self._tokens)
            # Copies, because a view would keep the memory of its whole batch.
            found |= {text: (row.clone(), cut) for text, row, cut in zip(new, embeddings, truncated, strict=True)}
        for text in distinct:
            self._rows[text] = found[text]
            self._rows.move_to_end(text)
        while len(self._rows) > self.limit:
            self._rows.popitem(last=False)
        return torch.stack([found[text][0] for text in texts]), [found[text][1] for text in texts]


def _state_of_text_tower(adapter: DenseAdapter) -> Hashable:
    """Return everything but the text that determines an embedding; ``None`` if embeddings cannot be cached."""
    parameters = [parameter for _, parameter in named_tower_parameters(adapter, "text")]
    if torch.is_inference_mode_enabled():
        return None
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        return None
    if any(module.training and _has_dropout(module) for module in adapter.model.modules()):
        return None
    device = adapter.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # In-place changes raise a tensor's version; moving and casting change its address.
    return (precision, *((p.data_ptr(), p._version, p.dtype, p.device) for p in parameters))


def _has_dropout(module: nn.Module) -> bool:
    share = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0.0)
    return isinstance(share, int | float) and share > 0
