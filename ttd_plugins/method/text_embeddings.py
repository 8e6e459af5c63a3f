"""Text embeddings of a batch: each distinct text once, together with others of about its length, and cut to that.

A tag is three tokens where a caption is twelve and the context 77, and the text tower's cost is that of its tokens. So
texts are sorted by length into a few chunks, each cut to its own longest text, where the backbone says that positions
after the end token cannot matter. How many chunks pay is decided by what one more call of the tower costs.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ttd_plugins.adapter import DenseAdapter, Tokens, text_embeddings, text_tokens
from ttd_plugins.method.similarity import normalize

CPU_CALL_COST = 80
"""What one more call of a text tower costs on a CPU, in tokens: its weights are read once more."""
GPU_CALL_WORK = 400e9
"""What it costs elsewhere, in tokens times weights: some 700 kernels more are launched in a step, which takes the host
about ten milliseconds, in which an H200 does as much."""


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on ``device``; one from the CPU without waiting for what the device is busy with."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def plan_chunks(lengths: Sequence[int], call_cost: int) -> list[list[int]]:
    """Split texts into chunks such that tokens, each text padded to the longest of its chunk, and calls cost least.

    Args:
        lengths: positions of each text up to and including its end token.
        call_cost: cost of one more chunk, in tokens.

    Returns:
        Numbers of the texts of each chunk, in their order; shorter texts in earlier chunks.
    """
    counts = Counter(lengths)
    sizes = sorted(counts)
    # best[j]: the least cost of all texts of the j shortest sizes, and where the last chunk of them begins.
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
    """Within it, blocks of the text tower keep their input alone, and run again in the backward pass.

    This is arXiv 1604.06174. What draws random numbers draws the same ones again. The model is left as it was found,
    and a tower that checkpoints its blocks itself is not touched.
    """
    blocks = list(dict.fromkeys(adapter.tower_blocks("text")))
    if _are_checkpointed(adapter.model, blocks):
        blocks = []
    # A block that was compiled in place is called by its compiled call.
    names = ["forward" if block._compiled_call_impl is None else "_compiled_call_impl" for block in blocks]
    own = [vars(block).get(name) for block, name in zip(blocks, names, strict=True)]
    try:
        for block, name in zip(blocks, names, strict=True):
            setattr(block, name, partial(checkpoint, getattr(block, name), use_reentrant=False))
        yield
    finally:
        for block, name, call in zip(blocks, names, own, strict=True):
            vars(block).pop(name, None)
            # Other libraries put a forward of theirs into an object too.
            if call is not None:
                setattr(block, name, call)


def _shape(count: int, length: int, context: int, device: torch.device) -> tuple[int, int]:
    """How many texts of which length a call is given: on a GPU a little more than there are, so that few shapes occur.

    Libraries of GPU kernels prepare themselves for each new shape; cuDNN's attention, for one, takes some hundred
    milliseconds. No more than an eighth is added to the count, and seven positions to the length.
    """
    if device.type == "cpu":
        return count, length
    step = max(2 ** (count.bit_length() - 4), 1)
    return -(-count // step) * step, min(-(-length // 8) * 8, context)


def _are_checkpointed(model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Whether a library's own gradient checkpointing of blocks is on; once more would cost one more forward pass."""
    modules, wanted = dict(model.named_modules()), set(blocks)
    names = [name.split(".") for name, module in modules.items() if module in wanted]
    above = {".".join(name[:depth]) for name in names for depth in range(len(name) + 1)}
    return any(
        modules[name].training and getattr(modules[name], switch, False) is True
        for name in above
        for switch in ("grad_checkpointing", "gradient_checkpointing")
    )


class TokenCache:
    """Token rows of short texts, kept from one batch to the next.

    A tag comes in many batches, a caption once an epoch; and what the host spends on tokenising, a GPU waits for. Rows
    are forgotten with the adapter's ``tokenizer`` and its context length; an adapter that keeps its tokenizer under
    another name is asked every time.

    Attributes:
        limit: how many rows are kept; the one that was not used for longest gives way.
        longest: characters of the longest text that is kept.
    """

    def __init__(self, limit: int = 16_384, longest: int = 32) -> None:
        self.limit = limit
        self.longest = longest
        self._rows: OrderedDict[str, tuple[Tensor, int, bool]] = OrderedDict()
        self._valid_for: tuple[object, int] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def tokenize(self, adapter: DenseAdapter, texts: Sequence[str]) -> Tokens:
        """What the backbone's :meth:`~ttd_plugins.adapter.DenseAdapter.tokenize` gives; no text twice in ``texts``."""
        valid_for = getattr(adapter, "tokenizer", None), adapter.description.context_length
        if valid_for[0] is None:
            return text_tokens(adapter, texts)
        if self._valid_for is None or valid_for[0] is not self._valid_for[0] or valid_for[1] != self._valid_for[1]:
            self._rows.clear()
            self._valid_for = valid_for
        new = [text for text in texts if text not in self._rows]
        rows = {text: self._rows[text] for text in texts if text in self._rows}
        if new:
            tokens = text_tokens(adapter, new)
            # A row of its own each, or one that is kept would keep its whole batch.
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


def _call_cost(adapter: DenseAdapter) -> int:
    """What one more call of the text tower costs, in tokens."""
    if adapter.device.type == "cpu":
        return CPU_CALL_COST
    blocks = [parameter for block in adapter.tower_blocks("text") for parameter in block.parameters()]
    weights = sum(p.numel() for p in blocks or [parameter for _, parameter in adapter.tower_parameters("text")])
    return int(GPU_CALL_WORK / weights)


def encode_texts(
    adapter: DenseAdapter, texts: Sequence[str], *, recompute: bool = False, memory: TokenCache | None = None
) -> tuple[Tensor, list[bool]]:
    """L2-normalised embeddings ``[N, D]`` of texts in at least float32, and which texts were longer than the context.

    Equal texts are encoded once. Positions after the last end token of a chunk are cut where the backbone says that
    they cannot matter. Lengths are read from tokens on the CPU, so that nothing waits for the device.

    Args:
        adapter: the backbone.
        texts: N strings.
        recompute: where a gradient is wanted, keep what enters each block of the text tower alone, and compute the rest
            again in the backward pass, one block at a time.
        memory: token rows of earlier batches; by default every text is tokenised.
    """
    if not texts:
        width = adapter.description.embedding_width
        return torch.zeros(0, width, device=adapter.device), []
    distinct = list(dict.fromkeys(texts))
    tokens = text_tokens(adapter, distinct) if memory is None else memory.tokenize(adapter, distinct)
    device = adapter.device
    if adapter.description.text_needs_full_context:
        lengths = [tokens.ids.shape[1]] * len(distinct)
        chunks = [list(range(len(distinct)))]
    else:
        lengths = tokens.lengths.tolist()
        chunks = plan_chunks(lengths, _call_cost(adapter))
    parts = []
    with checkpointed_text_blocks(adapter) if recompute and torch.is_grad_enabled() else nullcontext():
        for chunk in chunks:
            count, length = _shape(len(chunk), max(lengths[text] for text in chunk), tokens.ids.shape[1], device)
            ids = tokens.ids[chunk + chunk[:1] * (count - len(chunk)), :length]
            parts.append(text_embeddings(adapter, on_device(ids, device))[: len(chunk)])
    embeddings = normalize(torch.cat(parts) if len(parts) > 1 else parts[0])
    place = {distinct[number]: row for row, number in enumerate(number for chunk in chunks for number in chunk)}
    rows = [place[text] for text in texts]
    if rows != list(range(len(distinct))):
        embeddings = embeddings.index_select(0, on_device(torch.tensor(rows), device))
    truncated = dict(zip(distinct, tokens.truncated, strict=True))
    return embeddings, [truncated[text] for text in texts]


class TextEmbeddingCache:
    """What is known of texts from one batch to the next: token rows, and embeddings whose gradient nobody wants.

    A frozen text tower, and the teacher ``"frozen"``, give the same embedding of a word whenever it comes again. What
    is kept is forgotten once a weight of the tower changes or moves, or the precision does, and a tower whose gradient
    is wanted, or that draws dropout, is asked every time.

    Attributes:
        limit: how many embeddings are kept; the one that was not used for longest gives way. 0 keeps none.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._rows: OrderedDict[str, tuple[Tensor, bool]] = OrderedDict()
        self._valid_for: Hashable = None
        self._tokens = TokenCache()

    def __len__(self) -> int:
        return len(self._rows)

    def encode(
        self, adapter: DenseAdapter, texts: Sequence[str], *, recompute: bool = False
    ) -> tuple[Tensor, list[bool]]:
        """What :func:`encode_texts` gives, to rounding: texts that are new share chunks of another length."""
        state = _state_of_text_tower(adapter) if self.limit and texts else None
        if state is None:
            self._rows.clear()
            return encode_texts(adapter, texts, recompute=recompute, memory=self._tokens)
        if state != self._valid_for:
            self._rows.clear()
            self._valid_for = state
        distinct = list(dict.fromkeys(texts))
        found = {text: self._rows[text] for text in distinct if text in self._rows}
        new = [text for text in distinct if text not in found]
        if new:
            with torch.no_grad():
                embeddings, truncated = encode_texts(adapter, new, memory=self._tokens)
            # A row of its own each, or one that is kept would keep its whole batch.
            found |= {text: (row.clone(), cut) for text, row, cut in zip(new, embeddings, truncated, strict=True)}
        for text in distinct:
            self._rows[text] = found[text]
            self._rows.move_to_end(text)
        while len(self._rows) > self.limit:
            self._rows.popitem(last=False)
        return torch.stack([found[text][0] for text in texts]), [found[text][1] for text in texts]


def _state_of_text_tower(adapter: DenseAdapter) -> Hashable:
    """What an embedding is a function of beside the text; ``None`` where it is not one, or is wanted with gradient."""
    parameters = [parameter for _, parameter in adapter.tower_parameters("text")]
    if torch.is_inference_mode_enabled():
        return None
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        return None
    if any(module.training and _drops(module) for module in adapter.model.modules()):
        return None
    device = adapter.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # Loading and averaging change a tensor's version, and moving or casting its address.
    return (precision, *((p.data_ptr(), p._version, p.dtype, p.device) for p in parameters))


def _drops(module: nn.Module) -> bool:
    share = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0.0)
    return isinstance(share, int | float) and share > 0
