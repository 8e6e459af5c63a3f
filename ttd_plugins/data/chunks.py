"""Chunks of decoded samples, as the loader's workers make them.

A stream is a sequence of samples: the whole epoch of this process or, for shards, the part of one worker. A chunk is a
run of consecutive samples of one stream. Workers yield chunks in a fixed order. A chunk lists its unusable samples with
their reasons, and stores the decoded ones.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttd_plugins.data.caption_parsing import BadPairError, usable_caption
from ttd_plugins.data.images import read_image
from ttd_plugins.data.pair_source import MapSource, PairSource, RawPair, ReadNow, StreamSource, TarSlice
from ttd_plugins.data.score_filter import key_hash
from ttd_plugins.errors import InputError
from ttd_plugins.utils.rng import preserved_rng, seed_everything

if TYPE_CHECKING:
    from ttd_plugins.adapter import ImageTransform

Captions = Literal["first", "random", "all"]


class LoaderPosition(TypedDict):
    """Position between two batches of an epoch: a plain dictionary that can be stored as JSON.

    Keys:
        epoch: the epoch.
        batches: number of batches yielded so far in the epoch.
        units: number of samples consumed from each stream, including skipped ones. There is one stream, or for shards
            one per worker.
        turn: index of the next stream.
        size: number of samples of the epoch over all processes, or of shards; used to detect changed data.
    """

    epoch: int
    batches: int
    units: list[int]
    turn: int
    size: int


class Unit(NamedTuple):
    """One future sample: an undecoded image and the index of its caption, or -1 to choose one."""

    raw: RawPair
    caption: int


@dataclass
class Chunk:
    """Decoded samples of the consecutive units ``start`` to ``stop`` of a stream.

    Attributes:
        stream: index of the stream.
        start, stop: range of units.
        images: float32 ``[N, 3, H, W]`` of the N usable samples, or ``None`` if there are none.
        captions, tags, keys, groups, choices: N entries each; see :class:`~ttd_plugins.data.loader.Batch`.
        offsets: unit of each usable sample.
        skipped: key and reason of each unusable sample.
        error: why the chunk cannot be used at all, or ``None``.
    """

    stream: int
    start: int
    stop: int
    images: Tensor | None = None
    captions: list[str] = field(default_factory=list)
    tags: list[list[str] | None] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    error: str | None = None

    def pin_memory(self) -> Chunk:
        """Return the chunk with images in page-locked memory; called by torch's loader in a thread."""
        return self if self.images is None else replace(self, images=self.images.pin_memory())


@dataclass(frozen=True)
class ChunkReader:
    """Reads and decodes chunks from any position of a stream. It is immutable, so that workers can share it.

    Attributes:
        source: the image-text pairs.
        transform: from an RGB image to float pixels ``[3, H, W]``.
        captions: how captions of an image are chosen; see :class:`~ttd_plugins.data.loader.PairLoader`.
        seed: determines every order and choice.
        rank, world_size: index of this process, and number of processes.
        streams: number of streams of this process.
        shuffle: whether the order is shuffled in each epoch.
        chunk_size: units per chunk.
        buffer: size of the shuffle buffer of a stream, in units.
    """

    source: PairSource
    transform: ImageTransform
    captions: Captions
    seed: int
    rank: int
    world_size: int
    streams: int
    shuffle: bool
    chunk_size: int
    buffer: int

    def map_chunks(
        self, epoch: int, start: int, index: NDArray[np.int64], caption: NDArray[np.int64] | None, worker: Worker
    ) -> Iterator[Chunk]:
        """Yield this worker's chunks of a source with random access.

        Args:
            epoch: the epoch.
            start: first unit.
            index: int64 ``[N]``, index of the image of each unit in the source.
            caption: int64 ``[N]``, index of the caption of each unit, or ``None`` to choose.
            worker: this worker.
        """
        source = cast("MapSource", self.source)
        for first in range(start + worker.number * self.chunk_size, len(index), worker.total * self.chunk_size):
            last = min(first + self.chunk_size, len(index))
            numbers = [-1] * (last - first) if caption is None else caption[first:last].tolist()
            units = [Unit(source.read(i), j) for i, j in zip(index[first:last].tolist(), numbers, strict=True)]
            yield self._decoded(Chunk(0, first, last), units, epoch)

    def stream_chunks(self, position: LoaderPosition, worker: Worker) -> Iterator[Chunk]:
        """Yield the chunks of this worker's stream of shards, starting at a position."""
        stream = (worker.number + position["turn"]) % self.streams
        start = position["units"][stream]
        units = self._stream(position["epoch"], stream, start)
        while True:
            # Chunks end at multiples of their size wherever they start, so that the streams keep their turns.
            found = list(islice(units, self.chunk_size - start % self.chunk_size))
            if not found:
                return
            yield self._decoded(Chunk(stream, start, start + len(found)), found, position["epoch"])
            start += len(found)

    def _stream(self, epoch: int, stream: int, skip: int) -> Iterator[Unit]:
        eager = ReadNow(skip == 0)
        units = self._incoming(epoch, stream, eager)
        if self.shuffle:
            units = _shuffled(units, random.Random(key_hash(f"{self.seed}/{epoch}/{self.rank}/{stream}")), self.buffer)
        for number, unit in enumerate(units):
            if number >= skip:
                yield unit
            elif number == skip - 1:
                # Images that were skipped over and are still in the buffer are read later, from their tar slices.
                eager.on = True

    def _incoming(self, epoch: int, stream: int, eager: ReadNow) -> Iterator[Unit]:
        source = cast("StreamSource", self.source)
        shards = list(source.shards)
        if self.shuffle:
            random.Random(key_hash(f"{self.seed}/{epoch}/shards")).shuffle(shards)
        # With fewer shards than processes, every process reads all shards and takes its part of the samples.
        by_sample = len(shards) < self.world_size
        mine = shards if by_sample else shards[self.rank :: self.world_size]
        number = 0
        for shard in mine[stream :: self.streams]:
            for raw in source.read_shard(shard, eager):
                for caption in self._captions_of(raw):
                    if not by_sample or number % self.world_size == self.rank:
                        yield Unit(raw, caption)
                    number += 1

    def _captions_of(self, raw: RawPair) -> Iterable[int]:
        if raw.problem is not None:
            return (-1,)
        selected = None if self.source.keep is None else self.source.keep.captions(raw.key)
        if self.source.keep is not None and selected is None:
            raw.problem = "it is not in the file of scores"
            return (-1,)
        if self.captions != "all":
            return (-1,) if selected is None or selected else ()
        return range(max(len(raw.captions), 1)) if selected is None else selected

    def _decoded(self, chunk: Chunk, units: Sequence[Unit], epoch: int) -> Chunk:
        images: list[Tensor] = []
        with warnings.catch_warnings(), preserved_rng():
            # Pillow warns about every image that is refused or repaired here anyway.
            warnings.filterwarnings("ignore", module="PIL")
            for number, (raw, wanted) in enumerate(units, chunk.start):
                sample = raw.key if wanted < 0 else f"{raw.key}#{wanted}"
                # An unusable image is listed once, not once per caption.
                blamed = raw.key
                try:
                    if raw.problem is not None:
                        raise BadPairError(raw.problem)
                    if wanted < 0:
                        choice, caption = self._choose(raw, epoch)
                    else:
                        blamed = sample
                        choice, caption = wanted, _caption(raw, wanted)
                        blamed = raw.key
                    image = decode_image(raw)
                except (BadPairError, InputError) as error:
                    chunk.skipped.append((blamed, str(error)))
                    continue
                seed_everything(key_hash(f"{self.seed}/{epoch}/{sample}"), accelerators=False)
                images.append(self.transform(image).to(torch.float32))
                chunk.captions.append(caption)
                chunk.tags.append(raw.tags)
                chunk.keys.append(sample)
                chunk.groups.append(raw.key)
                chunk.choices.append(choice)
                chunk.offsets.append(number)
        shapes = sorted({tuple(image.shape) for image in images})
        if len(shapes) > 1:
            chunk.error = f"the transform must return images of one shape, not {shapes[0]} and {shapes[1]}"
        elif images:
            chunk.images = torch.stack(images)
        return chunk

    def _choose(self, raw: RawPair, epoch: int) -> tuple[int, str]:
        """Return the index and the text of the first or of a random usable caption."""
        selected = None if self.source.keep is None else self.source.keep.captions(raw.key)
        usable: list[tuple[int, str]] = []
        problem = BadPairError("it has no caption")
        for number in range(len(raw.captions)) if selected is None else selected:
            try:
                usable.append((number, _caption(raw, number)))
            except BadPairError as error:
                problem = error
                continue
            if self.captions == "first":
                break
        if not usable:
            raise problem
        return usable[key_hash(f"{self.seed}/{epoch}/caption/{raw.key}") % len(usable)]


class Worker(NamedTuple):
    """Index of a worker, from 0, and the number of workers."""

    number: int
    total: int


@dataclass(frozen=True)
class MapChunks:
    """:meth:`ChunkReader.map_chunks` of an epoch as a picklable function of the worker."""

    reader: ChunkReader
    epoch: int
    start: int
    index: NDArray[np.int64]
    caption: NDArray[np.int64] | None

    def __call__(self, worker: Worker) -> Iterator[Chunk]:
        return self.reader.map_chunks(self.epoch, self.start, self.index, self.caption, worker)


@dataclass(frozen=True)
class StreamChunks:
    """:meth:`ChunkReader.stream_chunks` from a position as a picklable function of the worker."""

    reader: ChunkReader
    position: LoaderPosition

    def __call__(self, worker: Worker) -> Iterator[Chunk]:
        return self.reader.stream_chunks(self.position, worker)


def map_units(source: MapSource, captions: Captions) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """List the samples of a source with random access.

    Returns:
        The index of each sample's image, int64 ``[N]``; and with ``"all"`` the index of its caption, int64 ``[N]``.

    Raises:
        InputError: the source has a filter, and images of the source were never scored.
    """
    if source.keep is None:
        if captions != "all":
            return np.arange(len(source)), None
        counts = source.caption_counts()
        index = np.repeat(np.arange(len(source)), counts)
        return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    found: list[tuple[int, int]] = []
    unknown: list[str] = []
    for number in range(len(source)):
        selected = source.keep.captions(source.key(number))
        if selected is None:
            unknown.append(source.key(number))
        elif captions == "all":
            found += [(number, caption) for caption in selected]
        elif selected:
            found.append((number, -1))
    if unknown:
        raise InputError(
            f"{len(unknown)} of {len(source)} images of {source.name!r} are not in the file of scores, such as "
            f"{unknown[0]!r}; score them with `ttd prune`"
        )
    pairs = np.asarray(found, np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1] if captions == "all" else None


def _shuffled(units: Iterator[Unit], generator: random.Random, size: int) -> Iterator[Unit]:
    buffer: list[Unit] = []
    for unit in units:
        if len(buffer) < size:
            buffer.append(unit)
            continue
        place = generator.randrange(size)
        out, buffer[place] = buffer[place], unit
        yield out
    generator.shuffle(buffer)
    yield from buffer


def _caption(raw: RawPair, number: int) -> str:
    if number >= len(raw.captions):
        raise BadPairError(f"it has {len(raw.captions)} captions, but caption {number + 1} is needed")
    return usable_caption(raw.captions[number])


def decode_image(raw: RawPair) -> Any:
    """Return the RGB image of a pair.

    Raises:
        BadPairError, InputError: there is none, or it cannot be decoded.
    """
    if raw.image is None:
        raise BadPairError("the image is missing")
    source = raw.image.read() if isinstance(raw.image, TarSlice) else raw.image
    name = raw.where or (str(source) if not isinstance(source, bytes) else raw.key)
    return read_image(source, name)
