"""Batches of one epoch for one process of many: the same whenever they are asked for, from any place in the epoch.

The order is a function of (seed, epoch, rank, world size), for shards of the number of workers too, and of nothing
else: no generator has to be saved, and :class:`LoaderPosition` is all that resuming needs. Workers give *chunks* of
decoded samples in a fixed turn; what cannot be used is left out of them with its reason, and the batches are cut from
what is left, so that they are always full.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ttd_plugins.data.images import read_image
from ttd_plugins.data.pairs import (
    BadPairError,
    MapSource,
    PairSource,
    RawPair,
    ReadNow,
    StreamSource,
    TarSlice,
    usable_caption,
)
from ttd_plugins.data.score_filter import key_hash
from ttd_plugins.data.skipped_samples import SkipLog
from ttd_plugins.errors import InputError, TTDError, one_sentence

if TYPE_CHECKING:
    from ttd_plugins.adapter import ImageTransform

Captions = Literal["first", "random", "all"]

ENOUGH_FOR_A_SHARE = 1000
"""Samples of a stream that a share of skipped ones is taken of at least, so that an early one does not end the run."""


@dataclass(frozen=True)
class Batch:
    """Samples ready for the engine.

    Attributes:
        images: float32 ``[B, 3, H, W]``, normalised by the transform.
        captions: B texts.
        tags: ready-made candidate tags of each caption, or ``None`` where no sample of the batch has any; a sample
            without tags beside others that have some has an empty list.
        keys: a stable id of each sample (path, row, shard and key; with ``captions="all"`` followed by ``#`` and the
            caption's number), for messages and logs.
        groups: identity of each picture: samples of equal groups show the same one, and are no contrastive negatives.
        choices: which of its picture's captions each one is, from 0.
    """

    images: Tensor
    captions: list[str]
    tags: list[list[str]] | None
    keys: list[str]
    groups: list[str]
    choices: list[int]

    def __len__(self) -> int:
        return len(self.captions)


class LoaderPosition(TypedDict):
    """A place between two batches of an epoch; a plain dictionary that JSON can hold.

    Keys:
        epoch: the epoch.
        batches: batches yielded in it so far.
        units: samples taken from each of the loader's streams, skipped ones included (one stream, but for shards one a
            worker).
        turn: the stream that comes next.
        size: samples of the epoch in all processes, or shards; tells whether the data are still the same.
    """

    epoch: int
    batches: int
    units: list[int]
    turn: int
    size: int


class _Unit(NamedTuple):
    """What becomes one sample: a picture, and the number of a caption or -1 where one is to be chosen."""

    raw: RawPair
    caption: int


@dataclass
class _Chunk:
    """Consecutive units ``start`` to ``stop`` of a stream, decoded; ``offsets`` are the units of the good ones."""

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

    def pin_memory(self) -> _Chunk:
        """The same with pixels in page-locked memory; torch's loader calls it, in a thread of its own."""
        return self if self.images is None else replace(self, images=self.images.pin_memory())


@dataclass(frozen=True)
class _Reader:
    """All that a worker needs: from a place in a stream to decoded chunks. Holds nothing that changes."""

    source: PairSource
    transform: ImageTransform
    captions: Captions
    seed: int
    rank: int
    world_size: int
    streams: int
    shuffle: bool
    chunk: int
    buffer: int

    def map_chunks(
        self, epoch: int, start: int, index: NDArray[np.int64], caption: NDArray[np.int64] | None, worker: Worker
    ) -> Iterator[_Chunk]:
        source = cast("MapSource", self.source)
        for first in range(start + worker.number * self.chunk, len(index), worker.total * self.chunk):
            last = min(first + self.chunk, len(index))
            numbers = [-1] * (last - first) if caption is None else caption[first:last].tolist()
            units = [_Unit(source.read(i), j) for i, j in zip(index[first:last].tolist(), numbers, strict=True)]
            yield self._decoded(_Chunk(0, first, last), units, epoch)

    def stream_chunks(self, position: LoaderPosition, worker: Worker) -> Iterator[_Chunk]:
        stream = (worker.number + position["turn"]) % self.streams
        start = position["units"][stream]
        units = self._stream(position["epoch"], stream, start)
        while True:
            # Chunks end at multiples of their size wherever they start, so that the turns of the streams stay.
            found = list(islice(units, self.chunk - start % self.chunk))
            if not found:
                return
            yield self._decoded(_Chunk(stream, start, start + len(found)), found, position["epoch"])
            start += len(found)

    def _stream(self, epoch: int, stream: int, skip: int) -> Iterator[_Unit]:
        eager = ReadNow(skip == 0)
        units = self._incoming(epoch, stream, eager)
        if self.shuffle:
            units = _shuffled(units, random.Random(key_hash(f"{self.seed}/{epoch}/{self.rank}/{stream}")), self.buffer)
        for number, unit in enumerate(units):
            if number >= skip:
                yield unit
            elif number == skip - 1:
                # Pictures that were passed over and are still in the buffer are read where they lie.
                eager.on = True

    def _incoming(self, epoch: int, stream: int, eager: ReadNow) -> Iterator[_Unit]:
        source = cast("StreamSource", self.source)
        shards = list(source.shards)
        if self.shuffle:
            random.Random(key_hash(f"{self.seed}/{epoch}/shards")).shuffle(shards)
        # With fewer shards than processes, every process reads all of them and takes its share of the samples.
        by_sample = len(shards) < self.world_size
        mine = shards if by_sample else shards[self.rank :: self.world_size]
        number = 0
        for shard in mine[stream :: self.streams]:
            for raw in source.read_shard(shard, eager):
                for caption in self._captions_of(raw):
                    if not by_sample or number % self.world_size == self.rank:
                        yield _Unit(raw, caption)
                    number += 1

    def _captions_of(self, raw: RawPair) -> Iterable[int]:
        if raw.problem is not None:
            return (-1,)
        kept = None if self.source.keep is None else self.source.keep.captions(raw.key)
        if self.source.keep is not None and kept is None:
            raw.problem = "it is not in the file of scores"
            return (-1,)
        if self.captions != "all":
            return (-1,) if kept is None or kept else ()
        return range(max(len(raw.captions), 1)) if kept is None else kept

    def _decoded(self, chunk: _Chunk, units: Sequence[_Unit], epoch: int) -> _Chunk:
        images: list[Tensor] = []
        with warnings.catch_warnings(), _randomness_kept():
            # Pillow warns of what is refused or mended anyway, once a picture.
            warnings.filterwarnings("ignore", module="PIL")
            for number, (raw, wanted) in enumerate(units, chunk.start):
                sample = raw.key if wanted < 0 else f"{raw.key}#{wanted}"
                # A picture that cannot be used is listed once, and not once for each of its captions.
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
                    image = _image(raw)
                except (BadPairError, InputError) as error:
                    chunk.skipped.append((blamed, str(error)))
                    continue
                _seed_all(key_hash(f"{self.seed}/{epoch}/{sample}"))
                images.append(self.transform(image).to(torch.float32))
                chunk.captions.append(caption)
                chunk.tags.append(raw.tags)
                chunk.keys.append(sample)
                chunk.groups.append(raw.key)
                chunk.choices.append(choice)
                chunk.offsets.append(number)
        shapes = sorted({tuple(image.shape) for image in images})
        if len(shapes) > 1:
            chunk.error = f"the transform must give pixels of one shape, not {shapes[0]} and {shapes[1]}"
        elif images:
            chunk.images = torch.stack(images)
        return chunk

    def _choose(self, raw: RawPair, epoch: int) -> tuple[int, str]:
        """The number and the text of the caption that ``first`` or ``random`` means, among those that can be used."""
        kept = None if self.source.keep is None else self.source.keep.captions(raw.key)
        usable: list[tuple[int, str]] = []
        problem = BadPairError("it has no caption")
        for number in range(len(raw.captions)) if kept is None else kept:
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
    """Worker ``number`` of ``total``."""

    number: int
    total: int


class _ChunkDataset(IterableDataset[_Chunk]):
    def __init__(self, chunks: Callable[[Worker], Iterator[_Chunk]]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[_Chunk]:
        info = get_worker_info()
        return self._chunks(Worker(0, 1) if info is None else Worker(info.id, info.num_workers))


class PairLoader:
    """Batches of image-text pairs for one process of many, one epoch at a time.

    Args:
        source: what :func:`ttd_plugins.data.open_pairs` returned.
        transform: from an RGB picture to float pixels ``[3, H, W]`` of one shape, such as
            ``backbone.dense_transform()``. It may draw from torch's, numpy's or Python's generator, which are seeded
            for each sample.
        batch_size: samples of a batch in this process.
        seed: decides every order and choice.
        captions: of a picture with several: the ``"first"`` that can be used, a ``"random"`` one in each epoch, or
            ``"all"``, each with the picture as a sample of its own.
        workers: processes that decode; 0 decodes in this one.
        rank, world_size: which process this is, of how many; each sample goes to one of them.
        shuffle: whether the order is drawn anew in each epoch; otherwise it is the source's.
        drop_last: whether samples that fill no batch at the end of an epoch are left out; otherwise they are one
            shorter batch.
        skipped: list of samples that cannot be used, or the file for it (``skipped.jsonl`` of a run).
        max_skipped: how many samples may be skipped (an integer), or which share of them (a float, of the source's
            size, or of the samples seen in an epoch of a stream); ``None`` means any number.
        buffer: samples of a stream that are shuffled among each other, undecoded, in each worker.
        pin_memory: whether pixels are put into page-locked memory as they come from the workers, from where a GPU
            fetches them by itself.

    Raises:
        InputError: an option is out of range, or the source has too few samples for one batch.
    """

    def __init__(
        self,
        source: PairSource,
        transform: ImageTransform,
        *,
        batch_size: int,
        seed: int = 0,
        captions: Captions = "first",
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
        skipped: SkipLog | str | os.PathLike[str] | None = None,
        max_skipped: int | float | None = None,
        buffer: int = 1000,
        pin_memory: bool = False,
    ) -> None:
        _require_options(batch_size, captions, workers, rank, world_size, max_skipped, buffer)
        self.source = source
        self.batch_size = batch_size
        self.workers = workers
        self.pin_memory = pin_memory
        self.drop_last = drop_last
        self.max_skipped = max_skipped
        self.skipped = skipped if isinstance(skipped, SkipLog) else SkipLog(skipped)
        stream = isinstance(source, StreamSource)
        self._reader = _Reader(
            source=source,
            transform=transform,
            captions=captions,
            seed=seed,
            rank=rank,
            world_size=world_size,
            streams=max(workers, 1) if stream else 1,
            shuffle=shuffle,
            chunk=batch_size,
            buffer=buffer,
        )
        self._units: tuple[NDArray[np.int64], NDArray[np.int64] | None] | None = None
        if isinstance(source, MapSource):
            self._units = _map_units(source, captions)
            count = len(self._units[0])
            if count < (batch_size * world_size if drop_last else world_size):
                raise InputError(
                    f"{source.name!r} has {count} samples, too few for a batch of {batch_size} in "
                    f"{'each of ' + str(world_size) + ' processes' if world_size > 1 else 'one process'}; "
                    "give a smaller batch size"
                )
            self._size = count
        else:
            self._size = len(cast("StreamSource", source).shards)

    def batches_per_epoch(self) -> int | None:
        """Batches of an epoch in the process that has fewest, where no sample is skipped; ``None`` for streams."""
        if self._units is None:
            return None
        if self.drop_last:
            return self._size // self._reader.world_size // self.batch_size
        return -(-(self._size // self._reader.world_size) // self.batch_size)

    def epoch(self, epoch: int, start: LoaderPosition | None = None) -> Iterator[tuple[Batch, LoaderPosition]]:
        """Batches of an epoch, each with the position after it.

        Processes may end an epoch at different batches, since each skips what it cannot use: whoever gathers over
        processes has to end the epoch in all of them when the first one ends.

        Args:
            epoch: number of the epoch, from 0.
            start: a position in this epoch, where to go on; by default its beginning.

        Raises:
            InputError: the position is of another epoch, other data or another number of workers.
            TTDError: more samples were skipped than ``max_skipped`` allows, or a whole epoch gave no batch.
        """
        position = self._position(epoch, start)
        self._require_few_skipped(position)
        held: deque[tuple[_Chunk, int]] = deque()
        ready = 0
        chunks = self._chunks(position)
        with contextlib.closing(chunks):
            for chunk in chunks:
                self._list_skipped(chunk, position)
                if chunk.error is not None:
                    raise InputError(chunk.error)
                held.append((chunk, 0))
                ready += len(chunk.offsets)
                while ready >= self.batch_size:
                    batch, position = self._cut(held, position, self.batch_size)
                    ready -= self.batch_size
                    yield batch, position
        if ready and not self.drop_last:
            yield self._cut(held, position, ready)
        elif start is None and not position["batches"]:
            reason = next(iter(self.skipped.reasons.items()), None)
            skipped = f"; {len(self.skipped)} were skipped, such as {reason[0]!r}: {reason[1]}" if reason else ""
            raise TTDError(
                f"{self.source.name!r} gave {ready} samples that can be used, too few for a batch of "
                f"{self.batch_size}{skipped}"
            )

    def _position(self, epoch: int, start: LoaderPosition | None) -> LoaderPosition:
        streams = self._reader.streams
        if start is None:
            return LoaderPosition(epoch=epoch, batches=0, units=[0] * streams, turn=0, size=self._size)
        if start["epoch"] != epoch:
            raise InputError(f"the position is of epoch {start['epoch']}, not of epoch {epoch}")
        if start["size"] != self._size:
            what = "shards" if self._units is None else "samples"
            raise InputError(
                f"{self.source.name!r} has {self._size} {what}, and had {start['size']} when the position was saved; "
                "a run goes on exactly with the data that it began with"
            )
        if len(start["units"]) != streams:
            raise InputError(
                f"the position in the shards was saved with {len(start['units'])} workers, which decide their order; "
                f"go on with as many, not with {streams}"
            )
        return start

    def _chunks(self, position: LoaderPosition) -> Generator[_Chunk, None, None]:
        chunks: Callable[[Worker], Iterator[_Chunk]]
        if self._units is None:
            chunks = _StreamChunks(self._reader, position)
        else:
            index, caption = self._units
            order = np.arange(len(index))
            if self._reader.shuffle:
                order = np.random.default_rng([self._reader.seed, position["epoch"]]).permutation(len(index))
            order = order[self._reader.rank :: self._reader.world_size]
            chosen = None if caption is None else caption[order]
            chunks = _MapChunks(self._reader, position["epoch"], position["units"][0], index[order], chosen)
        if not self.workers:
            yield from chunks(Worker(0, 1))
            return
        loader = DataLoader(
            _ChunkDataset(chunks),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            collate_fn=_as_it_is,
            worker_init_fn=_let_the_parent_save,
            # By default a number is drawn from the global generator, which would not be the same after resuming.
            generator=torch.Generator().manual_seed(0),
        )
        try:
            yield from loader
        except RuntimeError as error:
            # An error inside a worker comes with its traceback and is a bug; this is a worker that is gone.
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise TTDError(
                f"a process that decodes pictures of {self.source.name!r} has ended ({one_sentence(error, 100)}), "
                "mostly because memory ran out; take fewer workers or a smaller batch"
            ) from error

    def _cut(
        self, held: deque[tuple[_Chunk, int]], position: LoaderPosition, count: int
    ) -> tuple[Batch, LoaderPosition]:
        """Take ``count`` good samples off the front of the chunks."""
        parts: list[tuple[_Chunk, slice]] = []
        units, turn = list(position["units"]), position["turn"]
        missing = count
        while missing:
            chunk, first = held.popleft()
            last = min(first + missing, len(chunk.offsets))
            missing -= last - first
            parts.append((chunk, slice(first, last)))
            if last > first:
                units[chunk.stream], turn = chunk.offsets[last - 1] + 1, chunk.stream
            if last < len(chunk.offsets):
                held.appendleft((chunk, last))
            elif len(units) > 1:
                units[chunk.stream], turn = chunk.stop, (chunk.stream + 1) % len(units)
        images = [chunk.images[part] for chunk, part in parts if chunk.images is not None]
        tags = [names for chunk, part in parts for names in chunk.tags[part]]
        batch = Batch(
            images=_joined(images),
            captions=[text for chunk, part in parts for text in chunk.captions[part]],
            tags=None if all(names is None for names in tags) else [names or [] for names in tags],
            keys=[key for chunk, part in parts for key in chunk.keys[part]],
            groups=[group for chunk, part in parts for group in chunk.groups[part]],
            choices=[choice for chunk, part in parts for choice in chunk.choices[part]],
        )
        after = LoaderPosition(
            epoch=position["epoch"], batches=position["batches"] + 1, units=units, turn=turn, size=position["size"]
        )
        return batch, after

    def _list_skipped(self, chunk: _Chunk, position: LoaderPosition) -> None:
        for key, reason in chunk.skipped:
            if self.skipped.add(key, reason):
                self._require_few_skipped(position, key, reason)

    def _require_few_skipped(self, position: LoaderPosition, key: str = "", reason: str = "") -> None:
        if self.max_skipped is None:
            return
        limit: float = self.max_skipped
        if isinstance(self.max_skipped, float):
            seen = sum(position["units"]) * self._reader.world_size
            total = len(self.source) if isinstance(self.source, MapSource) else max(seen, ENOUGH_FOR_A_SHARE)
            limit = self.max_skipped * total
        if len(self.skipped) > limit:
            last = f"; the last one is {key!r}: {reason}" if key else ""
            where = f"; all are listed in {str(self.skipped.file)!r}" if self.skipped.file else ""
            raise TTDError(
                f"{len(self.skipped)} samples of {self.source.name!r} cannot be used, more than "
                f"max_skipped={self.max_skipped} allows{last}{where}"
            )


@dataclass(frozen=True)
class _MapChunks:
    reader: _Reader
    epoch: int
    start: int
    index: NDArray[np.int64]
    caption: NDArray[np.int64] | None

    def __call__(self, worker: Worker) -> Iterator[_Chunk]:
        return self.reader.map_chunks(self.epoch, self.start, self.index, self.caption, worker)


@dataclass(frozen=True)
class _StreamChunks:
    reader: _Reader
    position: LoaderPosition

    def __call__(self, worker: Worker) -> Iterator[_Chunk]:
        return self.reader.stream_chunks(self.position, worker)


def _map_units(source: MapSource, captions: Captions) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Numbers of the pictures of all samples, and with ``"all"`` the numbers of their captions."""
    if source.keep is None:
        if captions != "all":
            return np.arange(len(source)), None
        counts = source.caption_counts()
        index = np.repeat(np.arange(len(source)), counts)
        return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    found: list[tuple[int, int]] = []
    unknown: list[str] = []
    for number in range(len(source)):
        kept = source.keep.captions(source.key(number))
        if kept is None:
            unknown.append(source.key(number))
        elif captions == "all":
            found += [(number, caption) for caption in kept]
        elif kept:
            found.append((number, -1))
    if unknown:
        raise InputError(
            f"{len(unknown)} of {len(source)} pictures of {source.name!r} are not in the file of scores, such as "
            f"{unknown[0]!r}; score these data with `ttd prune`"
        )
    pairs = np.asarray(found, np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1] if captions == "all" else None


def _shuffled(units: Iterator[_Unit], generator: random.Random, size: int) -> Iterator[_Unit]:
    held: list[_Unit] = []
    for unit in units:
        if len(held) < size:
            held.append(unit)
            continue
        place = generator.randrange(size)
        out, held[place] = held[place], unit
        yield out
    generator.shuffle(held)
    yield from held


def _caption(raw: RawPair, number: int) -> str:
    if number >= len(raw.captions):
        raise BadPairError(f"it has {len(raw.captions)} captions, and caption {number + 1} was asked for")
    return usable_caption(raw.captions[number])


def _image(raw: RawPair) -> Any:
    if raw.image is None:
        raise BadPairError("its picture is missing")
    source = raw.image.read() if isinstance(raw.image, TarSlice) else raw.image
    name = raw.where or (str(source) if not isinstance(source, bytes) else raw.key)
    return read_image(source, name)


def _seed_all(seed: int) -> None:
    """Seed the generators that transforms draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed % 2**63)


@contextlib.contextmanager
def _randomness_kept() -> Iterator[None]:
    """Give the global generators their states back."""
    python, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def _joined(images: list[Tensor]) -> Tensor:
    """Images of several chunks in one tensor, which is pinned where they are."""
    if len(images) == 1:
        return images[0]
    shape = (sum(map(len, images)), *images[0].shape[1:])
    return torch.cat(images, out=torch.empty(shape, dtype=images[0].dtype, pin_memory=images[0].is_pinned()))


def _as_it_is(chunk: Any) -> Any:
    return chunk


def _let_the_parent_save(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM go to workers too; the training still needs them while it saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def once(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, once)


def _require_options(
    batch_size: int,
    captions: str,
    workers: int,
    rank: int,
    world_size: int,
    max_skipped: int | float | None,
    buffer: int,
) -> None:
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("buffer", buffer, 1)):
        if value < least:
            raise InputError(f"{name} must be {least} or more, not {value}")
    if captions not in get_args(Captions):
        raise InputError(f"unknown captions {captions!r}; known: {', '.join(get_args(Captions))}")
    if not 0 <= rank < world_size:
        raise InputError(f"rank {rank} is none of {world_size} processes, which count from 0")
    if max_skipped is None:
        return
    if isinstance(max_skipped, float) and not 0 <= max_skipped <= 1:
        raise InputError(f"max_skipped as a share is from 0.0 to 1.0, not {max_skipped}; as a number it is an integer")
    if max_skipped < 0:
        raise InputError(f"max_skipped must be 0 or more, not {max_skipped}")
