"""Several sources with random access as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.data.pair_source import MapSource, RawPair


class JoinedPairs(MapSource):
    """The pairs of several sources, one after the other.

    Args:
        name: name of the whole.
        sources: what starts the keys of each source, such as ``"train/"``, and the source.
    """

    def __init__(self, name: str, sources: Sequence[tuple[str, MapSource]]) -> None:
        self.name = name
        self.kind = sources[0][1].kind
        self._sources = list(sources)
        self._starts: NDArray[np.int64] = np.cumsum([0, *(len(source) for _, source in sources)])

    @property
    def summary(self) -> str:
        return f"{len(self._sources)} {self.kind}s in {self.name}: {len(self):,} images"

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _place(self, index: int) -> tuple[str, MapSource, int]:
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return *self._sources[number], index - int(self._starts[number])

    def key(self, index: int) -> str:
        start, source, place = self._place(index)
        return start + source.key(place)

    def read(self, index: int) -> RawPair:
        start, source, place = self._place(index)
        pair = source.read(place)
        pair.key = start + pair.key
        return pair

    def caption_count(self, index: int) -> int:
        _, source, place = self._place(index)
        return source.caption_count(place)

    def caption_counts(self) -> NDArray[np.int64]:
        return np.concatenate([source.caption_counts() for _, source in self._sources])
