"""Texts of a benchmark: captions without their images, since costs do not depend on the content of pixels."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from ttd_plugins.errors import InputError
from ttd_plugins.utils.deprecation import renamed_keyword, renamed_names

BUILT_IN = (
    "a small brown dog carries a wooden stick along the wet beach near two children",
    "an old man in a red coat feeds grey pigeons beside a stone fountain",
    "three white boats lie in the calm harbour under a cloudy evening sky",
    "a woman rides a black bicycle past a yellow tram on a busy street",
    "a bowl of fresh strawberries and a glass of milk stand on the kitchen table",
    "a striped cat sleeps on a green sofa next to an open book",
    "two football players jump for the ball while a large crowd watches",
    "a tall lighthouse on a rocky island with waves and seagulls around it",
    "a young girl blows out candles on a chocolate cake at her birthday party",
    "a train with blue carriages crosses an iron bridge over a deep valley",
    "fresh snow covers the roofs of wooden houses in a quiet mountain village",
    "a chef in a white hat slices onions and carrots on a metal counter",
    "an elephant and her calf drink from a muddy river in the savanna",
    "a guitar, a drum and a microphone wait on an empty stage with purple lights",
    "a boy in yellow boots kicks a puddle while his brother holds an umbrella",
    "horses graze in a sunny meadow behind a broken wooden fence",
)
"""Captions with about eight candidate words each."""

ADJECTIVES = (
    "red blue green yellow black white brown grey small large old new wet dry open empty round square tall short "
    "bright dark warm cold soft hard clean dirty heavy light quiet loud young wild broken wooden"
).split()
NOUNS = (
    "dog cat horse bird fish cow sheep bear boat train car bus bike plane truck road bridge house tower church school "
    "table chair bed lamp door window wall roof floor tree flower grass leaf stone river lake beach hill snow rain "
    "cloud sun moon star man woman boy girl child hand face eye hat coat shoe bag book phone clock cup bowl plate"
).split()


@renamed_keyword("most", "limit")
def open_captions(spec: str, limit: int = 4096) -> list[str]:
    """Return one usable caption per image of any data that ``ttd train --data`` accepts, without decoding images.

    Args:
        spec: see :func:`ttd_plugins.data.open_pairs`; for a folder with ``captions.json`` it is that file.
        limit: number of images to read.

    Raises:
        InputError: the data do not exist or contain no usable caption.
        MissingDependencyError: the layout needs a package that is not installed.
    """
    from ttd_plugins.data.caption_parsing import BadPairError, usable_caption
    from ttd_plugins.data.pair_source import MapSource, RawPair, ReadNow, StreamSource
    from ttd_plugins.data.source_detection import open_pairs

    own = Path(spec) / "captions.json"
    source = open_pairs(own if own.is_file() else spec)

    def pairs() -> Iterator[RawPair]:
        if isinstance(source, MapSource):
            yield from map(source.read, range(len(source)))
        elif isinstance(source, StreamSource):
            for shard in source.shards:
                yield from source.read_shard(shard, ReadNow(False))

    captions = []
    for pair in islice(pairs(), limit):
        with suppress(BadPairError, IndexError):
            captions.append(usable_caption(pair.captions[0]))
    if not captions:
        raise InputError(f"{spec} contains no usable caption; choose other pairs with --data")
    return captions


def batch_of_captions(captions: Sequence[str], batch: int) -> list[str]:
    """Return the first ``batch`` captions, repeated from the start if there are fewer."""
    return list(islice(cycle(captions), batch))


def synthetic_tags(batch: int, tags: int) -> list[list[str]]:
    """Return ``tags`` candidate tags for each of ``batch`` captions, all distinct, of two or three words.

    Raises:
        InputError: there are not enough distinct tags.
    """
    pairs = [f"{adjective} {noun}" for noun in NOUNS for adjective in ADJECTIVES]
    names = pairs + [f"{adjective} {pair}" for adjective in ADJECTIVES for pair in pairs]
    if batch * tags > len(names):
        raise InputError(f"{batch} captions of {tags} tags exceed the {len(names)} synthetic tags; use fewer")
    return [names[number * tags : (number + 1) * tags] for number in range(batch)]


def synthetic_captions(batch: int, tags: int) -> list[str]:
    """Return distinct captions that mention ``tags`` synthetic tags each."""
    return [f"a {', a '.join(names[:-1])} and a {names[-1]}" for names in synthetic_tags(batch, tags)]


__getattr__ = renamed_names(
    __name__,
    {
        "made_up_tags": "synthetic_tags",
        "made_up_captions": "synthetic_captions",
        "StandInTokenizer": "SubstituteTokenizer",
    },
)


class SubstituteTokenizer:
    """A tokenizer for models with random weights whose own vocabulary is not on this machine.

    It returns one id per word or punctuation mark, and one more for each further eight letters, which is about the
    number of tokens of byte-pair vocabularies for English. Ids are hashes. The interface is that of open_clip.
    """

    def __init__(self, context_length: int, vocabulary: int) -> None:
        self.context_length = context_length
        self.vocabulary = vocabulary

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Return ids, int64 ``[N, context]``: start token, words, end token (the last id), zeros."""
        length = context_length or self.context_length
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.zeros(len(texts), length, dtype=torch.long)
        start, end = self.vocabulary - 2, self.vocabulary - 1
        for row, text in zip(rows, texts, strict=True):
            words = re.findall(r"\w+|[^\w\s]", text.lower())
            pieces = [word[i : i + 8] for word in words for i in range(0, len(word), 8)]
            ids = [3 + zlib.crc32(piece.encode()) % (self.vocabulary - 5) for piece in pieces]
            ids = [start, *ids[: length - 2], end]
            row[: len(ids)] = torch.tensor(ids)
        return rows
