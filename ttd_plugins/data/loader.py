"""Batches of image-text pairs for one process of several, in a deterministic order that can be resumed anywhere.

The order depends only on (seed, epoch, rank, world size) and, for shards, on the number of workers. Resuming needs no
generator state: :class:`LoaderPosition` is enough. Workers yield chunks of decoded samples in a fixed order. Unusable
samples are removed from chunks and logged, and batches are cut from the rest, so that every batch is full.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ttd_plugins.data.chunks import (
    Captions,
    Chunk,
    ChunkReader,
    LoaderPosition,
    MapChunks,
    StreamChunks,
    Worker,
    map_units,
)
from ttd_plugins.data.pair_source import MapSource, PairSource, StreamSource
from ttd_plugins.data.skipped_samples import SkipLog
from ttd_plugins.data.worker_processes import WorkerKilledError, ignore_first_signals, read_from_workers
from ttd_plugins.errors import InputError, TTDError, choices_sentence, one_sentence

if TYPE_CHECKING:
    from ttd_plugins.adapter import ImageTransform

MIN_SAMPLES_FOR_FRACTION = 1000
"""Smallest denominator of a fraction of skipped samples in a stream, so that an early one does not end the run."""


@dataclass(frozen=True)
class Batch:
    """A batch of samples for the engine.

    Attributes:
        images: float32 ``[B, 3, H, W]``, normalised by the transform.
        captions: B texts.
        tags: ready-made candidate tags of each caption, or ``None`` if no sample of the batch has any. If some samples
            have tags, the others have an empty list.
        keys: stable id of each sample for messages and logs: a path, a row, or a shard and a key; with
            ``captions="all"`` followed by ``#`` and the index of the caption.
        groups: id of each sample's image. Samples of the same group show the same image, so that they are not
            contrastive negatives of each other.
        choices: index of each caption among those of its image, from 0.
    """

    images: Tensor
    captions: list[str]
    tags: list[list[str]] | None
    keys: list[str]
    groups: list[str]
    choices: list[int]

    def __len__(self) -> int:
        return len(self.captions)


class _ChunkDataset(IterableDataset[Chunk]):
    """Chunks as a dataset of torch's loader."""

    def __init__(self, chunks: Callable[[Worker], Iterator[Chunk]]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        return self._chunks(Worker(0, 1) if info is None else Worker(info.id, info.num_workers))


class PairLoader:
    """Loads batches of image-text pairs in one process of several, one epoch at a time.

    Args:
        source: the result of :func:`ttd_plugins.data.open_pairs`.
        transform: maps an RGB image to float pixels ``[3, H, W]`` of a fixed shape, such as
            ``backbone.dense_transform()``. It may use the generators of torch, NumPy and Python, which are seeded for
            each sample.
        batch_size: samples per batch in this process.
        seed: determines every order and choice.
        captions: for images with several captions: the ``"first"`` usable one, a ``"random"`` one in each epoch, or
            ``"all"``, each as a separate sample.
        workers: number of processes that decode images; 0 decodes in this process.
        rank, world_size: index of this process, and number of processes. Each sample belongs to one process.
        shuffle: whether to shuffle the order in each epoch; otherwise it is the source's order.
        drop_last: whether to drop the samples of an incomplete last batch; otherwise the last batch is smaller.
        skipped: log of unusable samples, or its file (``skipped.jsonl`` of a run).
        max_skipped: maximum of skipped samples as a number (int), or as a fraction (float) of the source's size or, in
            a stream, of the samples seen in the epoch; ``None`` means no limit.
        buffer: size of the shuffle buffer of a stream, in undecoded samples per worker.
        pin_memory: whether to place images in page-locked memory, so that copies to a GPU are asynchronous.

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
        self._reader = ChunkReader(
            source=source,
            transform=transform,
            captions=captions,
            seed=seed,
            rank=rank,
            world_size=world_size,
            streams=max(workers, 1) if stream else 1,
            shuffle=shuffle,
            chunk_size=batch_size,
            buffer=buffer,
        )
        self._units: tuple[NDArray[np.int64], NDArray[np.int64] | None] | None = None
        if isinstance(source, MapSource):
            self._units = map_units(source, captions)
            count = len(self._units[0])
            if count < (batch_size * world_size if drop_last else world_size):
                raise InputError(
                    f"{source.name!r} has {count} samples, too few for a batch of {batch_size} in "
                    f"{'each of ' + str(world_size) + ' processes' if world_size > 1 else 'one process'}; "
                    "use a smaller batch size"
                )
            self._size = count
        else:
            self._size = len(cast("StreamSource", source).shards)

    def batches_per_epoch(self) -> int | None:
        """Return the number of batches per epoch, if no sample is skipped, or ``None`` for streams.

        The number is that of the process with the fewest samples.
        """
        if self._units is None:
            return None
        if self.drop_last:
            return self._size // self._reader.world_size // self.batch_size
        return -(-(self._size // self._reader.world_size) // self.batch_size)

    def epoch(self, epoch: int, start: LoaderPosition | None = None) -> Iterator[tuple[Batch, LoaderPosition]]:
        """Yield the batches of an epoch, each with the position after it.

        The number of batches may differ between processes, since each skips its unusable samples. A training loop
        with collective operations must end the epoch in all processes when the first one ends.

        Args:
            epoch: index of the epoch, from 0.
            start: position in this epoch to resume from; by default the start of the epoch.

        Yields:
            A batch, and the position from which :meth:`epoch` continues after it.

        Raises:
            InputError: the position belongs to another epoch, other data or another number of workers.
            TTDError: more samples were skipped than ``max_skipped`` allows, or a whole epoch has no full batch.
        """
        position = self._position(epoch, start)
        self._require_few_skipped(position)
        queue: deque[tuple[Chunk, int]] = deque()
        ready = 0
        chunks = self._chunks(position)
        with contextlib.closing(chunks):
            for chunk in chunks:
                self._log_skipped(chunk, position)
                if chunk.error is not None:
                    raise InputError(chunk.error)
                queue.append((chunk, 0))
                ready += len(chunk.offsets)
                while ready >= self.batch_size:
                    batch, position = self._cut(queue, position, self.batch_size)
                    ready -= self.batch_size
                    yield batch, position
        if ready and not self.drop_last:
            yield self._cut(queue, position, ready)
        elif start is None and not position["batches"]:
            reason = next(iter(self.skipped.reasons.items()), None)
            skipped = f"; {len(self.skipped)} were skipped, such as {reason[0]!r}: {reason[1]}" if reason else ""
            raise TTDError(
                f"{self.source.name!r} has {ready} usable samples, too few for a batch of {self.batch_size}{skipped}"
            )

    def _position(self, epoch: int, start: LoaderPosition | None) -> LoaderPosition:
        streams = self._reader.streams
        if start is None:
            return LoaderPosition(epoch=epoch, batches=0, units=[0] * streams, turn=0, size=self._size)
        if start["epoch"] != epoch:
            raise InputError(f"the position belongs to epoch {start['epoch']}, not to epoch {epoch}")
        if start["size"] != self._size:
            what = "shards" if self._units is None else "samples"
            raise InputError(
                f"{self.source.name!r} has {self._size} {what}, but had {start['size']} when the position was saved; "
                "resume with the same data"
            )
        if len(start["units"]) != streams:
            raise InputError(
                f"the position was saved with {len(start['units'])} workers, and the order of shards depends on their "
                f"number; resume with {len(start['units'])} workers, not with {streams}"
            )
        return start

    def _chunks(self, position: LoaderPosition) -> Generator[Chunk, None, None]:
        chunks: Callable[[Worker], Iterator[Chunk]]
        if self._units is None:
            chunks = StreamChunks(self._reader, position)
        else:
            index, caption = self._units
            order = np.arange(len(index))
            if self._reader.shuffle:
                order = np.random.default_rng([self._reader.seed, position["epoch"]]).permutation(len(index))
            order = order[self._reader.rank :: self._reader.world_size]
            chosen = None if caption is None else caption[order]
            chunks = MapChunks(self._reader, position["epoch"], position["units"][0], index[order], chosen)
        if not self.workers:
            yield from chunks(Worker(0, 1))
            return
        loader = DataLoader(
            _ChunkDataset(chunks),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            collate_fn=_identity,
            worker_init_fn=ignore_first_signals,
            # By default torch draws a number from the global generator, which would differ after resuming.
            generator=torch.Generator().manual_seed(0),
        )
        try:
            yield from read_from_workers(loader)
        except WorkerKilledError as error:
            raise TTDError(
                f"a worker process that decodes images of {self.source.name!r} was killed ({one_sentence(error, 100)}),"
                " most likely because memory ran out; use fewer workers or a smaller batch"
            ) from error

    def _cut(
        self, queue: deque[tuple[Chunk, int]], position: LoaderPosition, count: int
    ) -> tuple[Batch, LoaderPosition]:
        """Remove ``count`` usable samples from the front of the queue of chunks."""
        parts: list[tuple[Chunk, slice]] = []
        units, turn = list(position["units"]), position["turn"]
        missing = count
        while missing:
            chunk, first = queue.popleft()
            last = min(first + missing, len(chunk.offsets))
            missing -= last - first
            parts.append((chunk, slice(first, last)))
            if last > first:
                units[chunk.stream], turn = chunk.offsets[last - 1] + 1, chunk.stream
            if last < len(chunk.offsets):
                queue.appendleft((chunk, last))
            elif len(units) > 1:
                units[chunk.stream], turn = chunk.stop, (chunk.stream + 1) % len(units)
        images = [chunk.images[part] for chunk, part in parts if chunk.images is not None]
        tags = [names for chunk, part in parts for names in chunk.tags[part]]
        batch = Batch(
            images=_concatenate(images),
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

    def _log_skipped(self, chunk: Chunk, position: LoaderPosition) -> None:
        for key, reason in chunk.skipped:
            if self.skipped.add(key, reason):
                self._require_few_skipped(position, key, reason)

    def _require_few_skipped(self, position: LoaderPosition, key: str = "", reason: str = "") -> None:
        if self.max_skipped is None:
            return
        limit: float = self.max_skipped
        if isinstance(self.max_skipped, float):
            seen = sum(position["units"]) * self._reader.world_size
            total = len(self.source) if isinstance(self.source, MapSource) else max(seen, MIN_SAMPLES_FOR_FRACTION)
            limit = self.max_skipped * total
        if len(self.skipped) > limit:
            last = f"; the last one is {key!r}: {reason}" if key else ""
            where = f"; all are listed in {str(self.skipped.file)!r}" if self.skipped.file else ""
            raise TTDError(
                f"{len(self.skipped)} samples of {self.source.name!r} are unusable, more than "
                f"max_skipped={self.max_skipped} allows{last}{where}"
            )


def _concatenate(images: list[Tensor]) -> Tensor:
    """Concatenate images of several chunks, in pinned memory if they are pinned."""
    if len(images) == 1:
        return images[0]
    shape = (sum(map(len, images)), *images[0].shape[1:])
    return torch.cat(images, out=torch.empty(shape, dtype=images[0].dtype, pin_memory=images[0].is_pinned()))


def _identity(chunk: Any) -> Any:
    return chunk


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
            raise InputError(f"{name} must be at least {least}, not {value}")
    if captions not in get_args(Captions):
        raise InputError(choices_sentence("captions", captions, get_args(Captions)))
    if not 0 <= rank < world_size:
        raise InputError(f"rank must be from 0 to {world_size - 1} for {world_size} processes, not {rank}")
    if max_skipped is None:
        return
    if isinstance(max_skipped, float) and not 0 <= max_skipped <= 1:
        raise InputError(
            f"max_skipped must be an integer, or a fraction from 0.0 to 1.0 written as a float, not {max_skipped}"
        )
    if max_skipped < 0:
        raise InputError(f"max_skipped must be at least 0, not {max_skipped}")
