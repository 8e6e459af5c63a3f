"""Base classes of sources of image-text pairs: undecoded images, each with its captions and optional tags."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.data.caption_parsing import BadPairError, Text, as_bytes
from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.utils.deprecation import renamed_names

if TYPE_CHECKING:
    from ttd_plugins.data.score_filter import PairFilter
else:
    __getattr__ = renamed_names(__name__, {"PackedTexts": "TextArray"})

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .avif .jp2".split()  # of data.images.IMAGE_FORMATS
)


@dataclass(frozen=True)
class TarSlice:
    """An image that was not read yet: ``size`` bytes of an uncompressed tar file, starting at ``offset``."""

    tar: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Read the bytes.

        Raises:
            BadPairError: the tar file cannot be read, or ends too early.
        """
        try:
            with open(self.tar, "rb") as stream:
                stream.seek(self.offset)
                data = stream.read(self.size)
        except OSError as error:
            raise BadPairError(f"the shard {self.tar!r} cannot be read: {one_sentence(error)}") from error
        if len(data) < self.size:
            raise BadPairError(f"the shard {self.tar!r} is truncated")
        return data


@dataclass
class RawPair:
    """One undecoded image with its captions.

    Attributes:
        key: stable id within the source: a path, a row, or a shard and a key.
        image: a path, the bytes of an image file, a slice of a tar file, or ``None`` if there is no image.
        captions: the captions in their original order; bytes if the file may not be UTF-8.
        tags: ready-made candidate tags, or ``None``.
        problem: why the pair is unusable, if reading it already failed.
        where: name of the image in messages; by default its path or key.
    """

    key: str
    image: Path | bytes | TarSlice | None = None
    captions: Sequence[Text] = ()
    tags: list[str] | None = None
    problem: str | None = None
    where: str | None = None


class PairSource(ABC):
    """A source of image-text pairs.

    Attributes:
        name: the source as the user named it, for messages and logs.
        kind: ``"folder"``, ``"table"``, ``"coco"``, ``"shards"`` or ``"datasets"``.
        keep: filter by the scores of an earlier run; ``None`` selects all pairs.
    """

    name: str
    kind: str
    keep: PairFilter | None = None

    @property
    @abstractmethod
    def summary(self) -> str:
        """One line for a log: the kind of source, and its size if known."""


class MapSource(PairSource):
    """A source with random access: folders, tables, COCO JSON and ``datasets``. Indexing is deterministic."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of distinct images, including unusable ones."""

    @abstractmethod
    def key(self, index: int) -> str:
        """Return the stable id of an image."""

    @abstractmethod
    def read(self, index: int) -> RawPair:
        """Return one undecoded image with its captions. Errors are stored in its ``problem``."""

    @abstractmethod
    def caption_count(self, index: int) -> int:
        """Return the number of captions of an image, including unusable ones, without reading the image."""

    def caption_counts(self) -> NDArray[np.int64]:
        """Return :meth:`caption_count` of all images, int64 ``[N]``."""
        return np.fromiter((self.caption_count(index) for index in range(len(self))), np.int64, len(self))


class StreamSource(PairSource):
    """A source of shards, each read sequentially.

    Attributes:
        shards: paths or URLs.
    """

    shards: tuple[str, ...]

    @abstractmethod
    def read_shard(self, shard: str, eager: ReadNow) -> Iterator[RawPair]:
        """Yield the pairs of one shard in order.

        Errors are stored in the ``problem`` of a pair. A truncated shard ends with a pair whose key is the shard's
        name.

        Args:
            shard: one of :attr:`shards`.
            eager: read before each image: whether to read its bytes now, or to yield a :class:`TarSlice`.
        """


class ReadNow:
    """A switch for readers of shards: while it is on, images are read; otherwise they are skipped over."""

    def __init__(self, on: bool = True) -> None:
        self.on = on


class TextArray:
    """Many texts packed into two arrays, so that millions of texts are cheap to store, fork and pickle."""

    def __init__(self, texts: Iterable[Text]) -> None:
        blob, ends = bytearray(), [0]
        for text in texts:
            blob += text if isinstance(text, bytes) else as_bytes(text)
            ends.append(len(blob))
        self._blob = bytes(blob)
        self._ends = np.asarray(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def raw(self, index: int) -> bytes:
        """Return one text as bytes."""
        return self._blob[self._ends[index] : self._ends[index + 1]]

    def __getitem__(self, index: int) -> str:
        return self.raw(index).decode("utf-8", "surrogateescape")


def refuse_empty(count: int, what: str) -> None:
    """Raise InputError if a source has no pairs."""
    if not count:
        raise InputError(f"{what} contains no image-text pairs")
