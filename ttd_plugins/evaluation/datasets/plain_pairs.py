"""Image-text pairs without annotations, as data of an evaluation: any source of ``open_pairs``, by key."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, cast

from PIL import Image

from ttd_plugins.data.caption_parsing import BadPairError, usable_caption
from ttd_plugins.data.chunks import decode_image
from ttd_plugins.data.pair_source import MapSource, PairSource, RawPair, ReadNow, StreamSource
from ttd_plugins.data.source_detection import open_pairs
from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.utils.user_files import shown


class PlainPairs:
    """Images with one or more captions each, and no annotation.

    Images are decoded one at a time. An image that cannot be decoded or has no usable caption is left out and counted,
    as in training. Undecoded images of compressed shards and URLs stay in memory.

    Args:
        spec: whatever :func:`ttd_plugins.data.open_pairs` accepts, or an opened source.
        limit: number of images, from the start; by default all.
        split: split of the source, where its layout has some.
        **options: further options of :func:`~ttd_plugins.data.open_pairs`.

    Attributes:
        name: ``"pairs"``.
        root: the source as the user named it.

    Raises:
        InputError: there are no pairs at ``spec``, or an option does not apply to its layout.
        MissingDependencyError: the layout needs a package that is not installed.
    """

    name = "pairs"

    def __init__(self, spec: Any, limit: int | None = None, split: str | None = None, **options: Any) -> None:
        if limit is not None and limit < 1:
            raise InputError(f"limit must be at least 1, not {limit}")
        if isinstance(spec, PairSource):
            self.source = spec
        else:
            self.source = open_pairs(spec, **options | ({} if split is None else {"split": split}))
        self.root = os.fspath(spec) if isinstance(spec, str | os.PathLike) else self.source.name
        self.limit = limit
        self._indices: dict[str, int] = {}
        self._raw: dict[str, RawPair] = {}
        if isinstance(self.source, MapSource):
            keys = ((self.source.key(index), index) for index in range(len(self.source)))
            self._indices = dict(islice(((key, i) for key, i in keys if _selected(self.source, key)), limit))
        else:
            for raw in islice(_stream(cast("StreamSource", self.source)), limit):
                key, number = raw.key, 1
                while key in self._raw:
                    number += 1
                    key = f"{raw.key}#{number}"
                self._raw[key] = raw
        if not len(self):
            raise InputError(f"there are no image-text pairs at {shown(str(self.root))}")

    def keys(self) -> Sequence[str]:
        """Return the distinct keys of the images, in the order of the source."""
        return list(self._raw or self._indices)

    def __len__(self) -> int:
        return len(self._raw or self._indices)

    def _pair(self, key: str) -> RawPair:
        return self._raw[key] if self._raw else cast("MapSource", self.source).read(self._indices[key])

    def captions(self, key: str) -> list[str]:
        """Return the usable captions of an image, each once, in their order."""
        raw = self._pair(key)
        found: dict[str, None] = {}
        for caption in () if raw.problem is not None else raw.captions:
            try:
                found[usable_caption(caption)] = None
            except BadPairError:
                continue
        return list(found)

    def tags(self, key: str) -> list[str] | None:
        """Return the ready-made candidate tags of an image, or ``None``."""
        return self._pair(key).tags

    def image(self, key: str) -> Image.Image:
        """Return an RGB image.

        Raises:
            InputError: it cannot be decoded.
        """
        raw = self._pair(key)
        try:
            if raw.problem is not None:
                raise BadPairError(raw.problem)
            found: Image.Image = decode_image(raw)
        except BadPairError as error:
            raise InputError(f"the image {shown(raw.where or raw.key)} cannot be used: {error}") from error
        return found

    def problem(self, key: str) -> str | None:
        """Return why an image cannot be used, without decoding it; ``None`` if nothing is known to be wrong."""
        raw = self._pair(key)
        if raw.problem is not None:
            return raw.problem
        if self.captions(key):
            return None
        try:
            usable_caption(next(iter(raw.captions), None))
        except BadPairError as error:
            return str(error)
        return "it has no usable caption"

    def check(self, keys: Any = None, progress: Any = None) -> None:
        """Check that some image has a usable caption.

        Raises:
            InputError: none has.
        """
        wrong = None
        for key in self.keys() if keys is None else keys:
            wrong = self.problem(key)
            if wrong is None:
                break
        if wrong is not None:
            reason = one_sentence(BadPairError(wrong))
            raise InputError(f"no pair of {shown(str(self.root))} can be used; the last one: {reason}")
        if progress is not None:
            progress(len(self.keys() if keys is None else keys))

    def require_truth(self) -> None:
        """Pairs need no annotation."""

    def describe(self) -> dict[str, Any]:
        """Return what identifies the data: the reader, its source and size."""
        return {
            "name": self.name,
            "reader": type(self).__name__,
            "root": str(self.root),
            "images": len(self),
            "limit": self.limit,
        }


def _stream(source: StreamSource) -> Iterator[RawPair]:
    """Yield the pairs of all shards; images of uncompressed local shards are not read."""
    for shard in source.shards:
        for raw in source.read_shard(shard, ReadNow(False)):
            if _selected(source, raw.key):
                yield raw


def _selected(source: PairSource, key: str) -> bool:
    """Return whether the scores of an earlier ``ttd prune``, if there are any, select an image."""
    return source.keep is None or source.keep.captions(key) is not None
