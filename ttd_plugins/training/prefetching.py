"""Everything between a loader and the training step: epochs, positions, and the next batch ahead of its use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.method.text_embeddings import on_device
from ttd_plugins.utils.rng import preserved_rng

_BATCH, _END, _FAILED = range(3)


class PairBatch(Protocol):
    """A batch of image-text pairs; :class:`ttd_plugins.data.Batch` is one."""

    images: Tensor
    captions: list[str]
    tags: list[list[str]] | None
    keys: list[str]
    groups: list[str]


class PairBatches(Protocol):
    """A loader of one process; :class:`ttd_plugins.data.PairLoader` is one."""

    def epoch(self, epoch: int, start: Any = None) -> Iterator[tuple[Any, Any]]:
        """Batches of an epoch, each with the position after it: a value that JSON can store."""
        ...

    def batches_per_epoch(self) -> int | None:
        """Batches of this process in an epoch, or ``None`` where a stream does not know."""
        ...


@dataclass(frozen=True)
class DeviceBatch:
    """A batch, its images on the device, its candidate tags, and the loader's position after it."""

    batch: PairBatch
    images: Tensor
    tags: list[list[str]] | None
    position: Any


PrepareTexts = Callable[[Tensor, list[str], list[list[str]] | None], list[list[str]]]
"""Images, captions and ready-made tags of a batch to its candidate tags."""


class StopRequested(Exception):  # noqa: N818  (control flow, not an error)
    """A process received a signal, and every process stops before the next step."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class LoaderFailedError(TTDError):
    """The loader of this or of another process failed; the cause is chained where it is this one's."""


class BatchPrefetcher:
    """Batches of all epochs, on the device; the next one is loaded, and its texts prepared, while the device computes.

    Random state is left as it was by every read, since a ``DataLoader`` draws a seed that a resumed run would draw
    once more.

    Attributes:
        epoch: epoch of the last batch that :meth:`next` returned, from 0.
        position: the loader's position after that batch; ``None`` at the start of an epoch.
        seconds: time spent in the loader since :meth:`take_seconds` was called.
    """

    def __init__(
        self,
        loader: PairBatches,
        device: torch.device,
        *,
        prepare_texts: PrepareTexts | None = None,
        processes: int = 1,
        empty_epoch_advice: str = "",
    ) -> None:
        """Read from a loader.

        Args:
            loader: of this process.
            device: where images are copied to.
            prepare_texts: :meth:`ttd_plugins.engine.TTD.prepare_texts`; by default the step does this work.
            processes: how many processes train together.
            empty_epoch_advice: what the message about an epoch without a batch adds.
        """
        self.loader = loader
        self.device = device
        self.prepare_texts = prepare_texts
        self.processes = processes
        self.empty_epoch_advice = empty_epoch_advice
        self.epoch = 0
        self.position: Any = None
        self.seconds = 0.0
        self._stream: Iterator[tuple[Any, Any]] | None = None
        # A batch, the end of the epoch (None), or what the loader raised.
        self._ahead: list[DeviceBatch | Exception | None] = []
        self._epoch_has_batch = False

    def seek(self, epoch: int, position: Any) -> None:
        """Continue after ``position`` of ``epoch``."""
        self.epoch, self.position = epoch, position
        self._epoch_has_batch = position is not None

    def next(self, stop_signal: int | None, *, first: bool) -> DeviceBatch:
        """Return the next batch, from the next epoch where one has ended; all processes end an epoch together.

        Args:
            stop_signal: the signal that this process received, if any.
            first: whether this is the first batch of a step; only there can a run stop.

        Raises:
            StopRequested: a process received a signal.
            LoaderFailedError: the loader of a process failed.
            InputError: a whole epoch holds no batch.
        """
        started = time.perf_counter()
        while True:
            code, found, error = self._read_unless_stopping(stop_signal, first)
            stop = stop_signal or 0
            if self.processes > 1:
                worst = torch.tensor([code, stop], device=self.device)
                torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
                code, stop = (int(value) for value in worst)
            # Within a step there is nothing to save yet, unless its data will not come any more.
            if stop and (first or code == _FAILED):
                raise StopRequested(stop)
            if code == _FAILED:
                what = "the data of another process failed; see its own message" if error is None else str(error)
                raise LoaderFailedError(what) from error
            if code == _BATCH:
                assert found is not None
                self.position, self._epoch_has_batch = found.position, True
                self.seconds += time.perf_counter() - started
                return found
            if not self._epoch_has_batch:
                raise InputError(
                    f"epoch {self.epoch + 1} of the data holds no batch of usable pairs{self.empty_epoch_advice}"
                )
            self.epoch, self.position, self._stream, self._epoch_has_batch = self.epoch + 1, None, None, False

    def prefetch(self) -> None:
        """Load the next batch and start its copy to the device, while the device computes."""
        started = time.perf_counter()
        try:
            found: DeviceBatch | Exception | None = self._read()
        # The current step is complete and is saved before this is raised.
        except Exception as failure:
            found = failure
        self.seconds += time.perf_counter() - started
        self._ahead.append(found)

    def peek(self) -> DeviceBatch | None:
        """Return the next batch without consuming it; ``None`` where the epoch ends or the loader fails.

        :meth:`next` raises what the loader raised, so that the state is saved first.
        """
        self.prefetch()
        found = self._ahead[-1]
        return None if isinstance(found, Exception) else found

    def take_seconds(self) -> float:
        """Return and reset :attr:`seconds`."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def close(self) -> None:
        """End the loader's workers."""
        # A failure here must not hide why the run ended.
        with suppress(Exception):
            if self._stream is not None and hasattr(self._stream, "close"):
                self._stream.close()

    def _read_unless_stopping(
        self, stop_signal: int | None, first: bool
    ) -> tuple[int, DeviceBatch | None, Exception | None]:
        if stop_signal is not None and first:
            return _BATCH, None, None
        try:
            found = self._read()
        # Ctrl-C reaches the workers of a loader too, and they fail in their own ways.
        except Exception as failure:
            return _FAILED, None, failure
        return (_END if found is None else _BATCH), found, None

    def _read(self) -> DeviceBatch | None:
        with preserved_rng():
            if self._ahead:
                found = self._ahead.pop()
                if isinstance(found, Exception):
                    raise found
                return found
            if self._stream is None:
                self._stream = iter(self.loader.epoch(self.epoch, self.position))
            read = next(self._stream, None)
            if read is None:
                return None
            batch, position = read
            images = on_device(batch.images, self.device)
            return DeviceBatch(batch, images, self._prepared_tags(batch, images), position)

    def _prepared_tags(self, batch: PairBatch, images: Tensor) -> list[list[str]] | None:
        """Candidate tags of a batch whose texts are prepared, or else its own tags."""
        if self.prepare_texts is not None:
            # The step does the same work and raises the same error, after the step before it was completed and saved.
            with suppress(Exception):
                return self.prepare_texts(images, batch.captions, batch.tags)
        return batch.tags
