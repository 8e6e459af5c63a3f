"""What a benchmark is run on: captions with their pictures left out, since no cost depends on what pixels show."""

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
"""Captions of about eight candidate words each."""

ADJECTIVES = (
    "red blue green yellow black white brown grey small large old new wet dry open empty round square tall short "
    "bright dark warm cold soft hard clean dirty heavy light quiet loud young wild broken wooden"
).split()
NOUNS = (
    "dog cat horse bird fish cow sheep bear boat train car bus bike plane truck road bridge house tower church school "
    "table chair bed lamp door window wall roof floor tree flower grass leaf stone river lake beach hill snow rain "
    "cloud sun moon star man woman boy girl child hand face eye hat coat shoe bag book phone clock cup bowl plate"
).split()


def open_captions(spec: str, most: int = 4096) -> list[str]:
    """One usable caption of each picture, of whatever ``ttd train --data`` takes; no picture is decoded.

    Args:
        spec: see :func:`ttd_plugins.data.open_pairs`; a folder that holds ``captions.json`` in COCO's format means it.
        most: pictures that are looked at.

    Raises:
        InputError: there is no such data, or it holds no captions.
        MissingDependencyError: its layout needs a package that is not installed.
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
    for pair in islice(pairs(), most):
        with suppress(BadPairError, IndexError):
            captions.append(usable_caption(pair.captions[0]))
    if not captions:
        raise InputError(f"{spec} holds no caption that can be used; give other pairs with --data")
    return captions


def batch_of_captions(captions: Sequence[str], batch: int) -> list[str]:
    """The first ``batch`` captions, from the beginning again where there are fewer."""
    return list(islice(cycle(captions), batch))


def made_up_tags(batch: int, tags: int) -> list[list[str]]:
    """``tags`` candidate tags for each of ``batch`` captions, no two the same; two or three words each."""
    pairs = [f"{adjective} {noun}" for noun in NOUNS for adjective in ADJECTIVES]
    names = pairs + [f"{adjective} {pair}" for adjective in ADJECTIVES for pair in pairs]
    if batch * tags > len(names):
        raise InputError(f"there are {len(names)} made-up tags, and {batch} captions of {tags} were asked for")
    return [names[number * tags : (number + 1) * tags] for number in range(batch)]


def made_up_captions(batch: int, tags: int) -> list[str]:
    """Captions that name so many made-up tags each, no two alike."""
    return [f"a {', a '.join(names[:-1])} and a {names[-1]}" for names in made_up_tags(batch, tags)]


class StandInTokenizer:
    """A tokenizer of the right size for random weights whose own vocabulary is not on this machine.

    One id a word or punctuation mark, and one more for every further eight letters, which is about what byte-pair
    vocabularies give for English; ids are hashes. Called as open_clip's are.
    """

    def __init__(self, context_length: int, vocabulary: int) -> None:
        self.context_length = context_length
        self.vocabulary = vocabulary

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Rows of ids ``[N, context]``: start token, words, end token (the last id of the vocabulary), zeros."""
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
