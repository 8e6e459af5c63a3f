"""A random sample of usable pairs, for fits that need a few hundred of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np

from ttd_plugins.data.caption_parsing import BadPairError, usable_caption
from ttd_plugins.data.chunks import decode_image
from ttd_plugins.data.pair_source import MapSource, PairSource, RawPair, ReadNow, StreamSource, TarSlice
from ttd_plugins.errors import InputError, one_sentence

SamplePair = tuple[Path | bytes, str]


def sample_pairs(source: PairSource, count: int, seed: int = 0) -> tuple[list[SamplePair], dict[str, str]]:
    """Return pairs of an image file and its first usable caption, each decoded once to see that it can be.

    Args:
        source: the pairs. With random access they are drawn without replacement; of shards and streams the first ones
            are taken.
        count: largest number of pairs.
        seed: decides which pairs are drawn.

    Returns:
        The pairs, each image a path or the bytes of a file; and the reason of each one that was left out, by key.
    """
    found: list[SamplePair] = []
    skipped: dict[str, str] = {}
    for raw in _ordered(source, seed):
        if len(found) == count:
            break
        try:
            if raw.problem is not None:
                raise BadPairError(raw.problem)
            caption = _caption(raw)
            decode_image(raw)
        except (BadPairError, InputError) as error:
            skipped[raw.key] = one_sentence(error)
            continue
        image = raw.image.read() if isinstance(raw.image, TarSlice) else raw.image
        assert image is not None
        found.append((image, caption))
    return found, skipped


def _ordered(source: PairSource, seed: int) -> Iterator[RawPair]:
    if isinstance(source, MapSource):
        for index in np.random.default_rng([seed, 2]).permutation(len(source)).tolist():
            if source.keep is None or source.keep.captions(source.key(index)) is not None:
                yield source.read(index)
        return
    stream = cast("StreamSource", source)
    for shard in stream.shards:
        for raw in stream.read_shard(shard, ReadNow(False)):
            if stream.keep is None or stream.keep.captions(raw.key) is not None:
                yield raw


def _caption(raw: RawPair) -> str:
    """Return the first usable caption.

    Raises:
        BadPairError: there is none.
    """
    reason = BadPairError("it has no caption")
    for caption in raw.captions:
        try:
            return usable_caption(caption)
        except BadPairError as error:
            reason = error
    raise reason
