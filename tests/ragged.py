"""Random batches with ragged numbers of tags, ties and constant maps, for comparison with :mod:`slow_reference`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from ttd_plugins.method.similarity import normalize


@dataclass(frozen=True)
class Ragged:
    """A batch in the flat form that the engine uses; features are not normalised, unless by :meth:`normalized`.

    Attributes:
        counts: how many tags each image has.
        patches: ``[B, P, D]``; ``captions`` and ``pooled`` are ``[B, D]``, ``tags`` is ``[K, D]``.
        image_index, tag_index: ``[N]``.
    """

    counts: tuple[int, ...]
    patches: Tensor
    captions: Tensor
    pooled: Tensor
    tags: Tensor
    image_index: Tensor
    tag_index: Tensor

    @property
    def batch(self) -> int:
        """B."""
        return len(self.counts)

    def normalized(self) -> Ragged:
        """The same with all features of length one."""
        parts = (self.patches, self.captions, self.pooled, self.tags)
        return Ragged(self.counts, *(normalize(part) for part in parts), self.image_index, self.tag_index)

    def to(self, dtype: torch.dtype) -> Ragged:
        """The same in another dtype."""
        parts = (self.patches, self.captions, self.pooled, self.tags)
        return Ragged(self.counts, *(part.to(dtype) for part in parts), self.image_index, self.tag_index)

    def tags_by_image(self) -> list[list[list[float]]]:
        """Embeddings of the tags of each image."""
        return by_image(self.tags[self.tag_index], self.counts)


def by_image(flat: Tensor, counts: Sequence[int]) -> list[list[Any]]:
    """Flat values, one a candidate, as a list for each image."""
    return [part.tolist() for part in flat.split(list(counts))]


def flat(nested: Sequence[Sequence[Any]]) -> list[Any]:
    """The lists of all images one after the other."""
    return [item for items in nested for item in items]


def make_ragged(
    seed: int, counts: Sequence[int], *, patches: int = 6, width: int = 4, distinct: int = 5, coarse: bool = False
) -> Ragged:
    """A batch that ``seed`` decides; where ``coarse``, from few values, so that ties and constant maps are common."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Tensor:
        values = rng.standard_normal(shape)
        return torch.from_numpy(np.round(values) + 0.0 if coarse else values)

    batch, total = len(counts), sum(counts)
    features = [draw(batch, patches, width), draw(batch, width), draw(batch, width), draw(distinct, width)]
    if coarse and batch > 1:
        # One picture that is the same everywhere: its maps are constant.
        features[0][0] = features[0][0, :1]
    return Ragged(
        tuple(counts),
        *features,
        torch.repeat_interleave(torch.arange(batch), torch.tensor(counts)),
        torch.from_numpy(rng.integers(0, distinct, total)),
    )


@st.composite
def ragged_batches(draw: st.DrawFn) -> Ragged:
    """Batches of one to four images with no, one, some or a hundred tags each."""
    count = st.one_of(st.integers(0, 4), st.sampled_from([0, 1, 100]))
    return make_ragged(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.lists(count, min_size=1, max_size=4)),
        patches=draw(st.integers(1, 7)),
        width=draw(st.integers(1, 5)),
        distinct=draw(st.integers(1, 6)),
        coarse=draw(st.booleans()),
    )
