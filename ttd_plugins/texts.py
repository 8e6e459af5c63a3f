"""Text embeddings of a batch: each distinct text once, together with others of about its length, and cut to that.

A tag is three tokens where a caption is twelve and the context 77, and the text tower's cost is that of its tokens. So
texts are sorted by length into a few chunks, each cut to its own longest text, where the backbone says that positions
after the end token cannot matter. How many chunks pay is decided by what one more call of the tower costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ttd_plugins.adapter import DenseAdapter, text_embeddings, text_tokens
from ttd_plugins.similarity import normalize

CALL_COST = {"cpu": 80}
OTHER_CALL_COST = 2048
"""What one more call of a text tower costs, in tokens: on a CPU the weights are read once more; on other devices
kernels are launched that have too little to do."""


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on ``device``, without waiting for what the device is busy with."""
    if device.type != "cuda":
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


def encode_texts(adapter: DenseAdapter, texts: Sequence[str]) -> tuple[Tensor, list[bool]]:
    """L2-normalised embeddings ``[N, D]`` of texts in at least float32, and which texts were longer than the context.

    Equal texts are encoded once. Positions after the last end token of a chunk are cut where the backbone says that
    they cannot matter. Lengths are read from tokens on the CPU, so that nothing waits for the device.
    """
    if not texts:
        width = adapter.description.embedding_width
        return torch.zeros(0, width, device=adapter.device), []
    distinct = list(dict.fromkeys(texts))
    tokens = text_tokens(adapter, distinct)
    device = adapter.device
    if adapter.description.text_after_end_matters:
        chunks = [list(range(len(distinct)))]
        embeddings = text_embeddings(adapter, on_device(tokens.ids, device))
    else:
        lengths = tokens.lengths.tolist()
        chunks = plan_chunks(lengths, CALL_COST.get(device.type, OTHER_CALL_COST))
        parts = []
        for chunk in chunks:
            ids = tokens.ids[chunk, : max(lengths[number] for number in chunk)]
            parts.append(text_embeddings(adapter, on_device(ids, device)))
        embeddings = torch.cat(parts) if len(parts) > 1 else parts[0]
    embeddings = normalize(embeddings)
    place = {distinct[number]: row for row, number in enumerate(number for chunk in chunks for number in chunk)}
    rows = [place[text] for text in texts]
    if rows != list(range(len(distinct))):
        embeddings = embeddings.index_select(0, on_device(torch.tensor(rows), device))
    truncated = dict(zip(distinct, tokens.truncated, strict=True))
    return embeddings, [truncated[text] for text in texts]
