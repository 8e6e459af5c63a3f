"""What a source of image-text pairs is: pictures not yet decoded, each with its captions and perhaps tags."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.errors import InputError, one_sentence

if TYPE_CHECKING:
    from ttd_plugins.data.score_filter import PairFilter

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .avif .jp2".split()  # what Pillow reads
)
CAPTION_NAMES = ("captions", "caption", "text", "txt", "sentence", "sentences", "title", "description", "raw_caption")
IMAGE_NAMES = (
    *("image", "images", "image_path", "image_file", "path", "filepath", "file_path", "filename", "file_name"),
    *("file", "img", "img_path", "image_name", "jpg"),
)
TAGS_NAMES = ("tags", "tag", "candidate_tags", "keywords", "nouns")

Text = str | bytes


class BadPairError(Exception):
    """Why a pair cannot be used, for the list of skipped samples; never shown as a traceback."""


@dataclass(frozen=True)
class TarSlice:
    """``size`` bytes of an uncompressed tar file from ``offset`` on: a picture that nobody has read yet."""

    tar: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes.

        Raises:
            BadPairError: the tar file ends before them, or cannot be read.
        """
        try:
            with open(self.tar, "rb") as stream:
                stream.seek(self.offset)
                data = stream.read(self.size)
        except OSError as error:
            raise BadPairError(f"the shard {self.tar!r} cannot be read: {one_sentence(error)}") from error
        if len(data) < self.size:
            raise BadPairError(f"the shard {self.tar!r} is cut short")
        return data


@dataclass
class RawPair:
    """One picture, undecoded, with what is said of it.

    Attributes:
        key: its stable id within the source: a path, a row, a shard and its key.
        image: a path, the bytes of a picture file, a place in a tar file, or ``None`` where there is no picture.
        captions: as found, in order; bytes where the file may not be UTF-8.
        tags: ready-made candidate tags, or ``None``.
        problem: why the pair cannot be used, where reading it told already.
        where: how messages call the picture; by default its path or key.
    """

    key: str
    image: Path | bytes | TarSlice | None = None
    captions: Sequence[Text] = ()
    tags: list[str] | None = None
    problem: str | None = None
    where: str | None = None


class PairSource(ABC):
    """Image-text pairs.

    Attributes:
        name: what the user called it, for messages and logs.
        kind: ``"folder"``, ``"table"``, ``"coco"``, ``"shards"`` or ``"datasets"``.
        keep: which pairs are used, from an earlier scoring; ``None`` means all.
    """

    name: str
    kind: str
    keep: PairFilter | None = None

    @property
    @abstractmethod
    def summary(self) -> str:
        """One line for a log: what it is, and how much where that is known."""


class MapSource(PairSource):
    """Pairs with a number each: folders, tables, COCO JSON, ``datasets``. Equal numbers mean equal pairs for ever."""

    @abstractmethod
    def __len__(self) -> int:
        """Distinct pictures, unusable ones included."""

    @abstractmethod
    def key(self, index: int) -> str:
        """The stable id of a picture."""

    @abstractmethod
    def read(self, index: int) -> RawPair:
        """One picture, undecoded, and its captions; what is wrong with it is told in its ``problem``."""

    @abstractmethod
    def caption_count(self, index: int) -> int:
        """How many captions a picture has, unusable ones included, without reading the picture."""

    def caption_counts(self) -> NDArray[np.int64]:
        """:meth:`caption_count` of all."""
        return np.fromiter((self.caption_count(index) for index in range(len(self))), np.int64, len(self))


class StreamSource(PairSource):
    """Pairs that come in shards, each read from its beginning.

    Attributes:
        shards: paths or URLs.
    """

    shards: tuple[str, ...]

    @abstractmethod
    def read_shard(self, shard: str, eager: ReadNow) -> Iterator[RawPair]:
        """The pairs of one shard in order. What is wrong with a pair is told in its ``problem``, and so is a shard
        that ends too early: as a pair with the shard's name for its key.

        Args:
            shard: one of :attr:`shards`.
            eager: asked before each picture whether its bytes are wanted now, or a :class:`TarSlice` will do.
        """


class ReadNow:
    """A switch that a reader of shards looks at: whether pictures are read as they pass, or passed over."""

    def __init__(self, on: bool = True) -> None:
        self.on = on


class PackedTexts:
    """Many texts in two arrays: no object a text, so that millions of them are cheap to hold, fork and pickle."""

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
        """One text as bytes."""
        return self._blob[self._ends[index] : self._ends[index + 1]]

    def __getitem__(self, index: int) -> str:
        return self.raw(index).decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    """UTF-8; what a lenient reader kept of bytes that are none comes back as those bytes."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def usable_caption(caption: Text | None) -> str:
    """A caption as one line of text.

    Raises:
        BadPairError: it is empty or not UTF-8.
    """
    try:
        text = (caption or b"").decode("utf-8-sig") if not isinstance(caption, str) else caption
        text.encode()
    except UnicodeError as error:
        if isinstance(error, UnicodeDecodeError):
            where = f" (byte 0x{error.object[error.start]:02x} at position {error.start})"
        else:
            where = ""
        raise BadPairError(f"the caption is not UTF-8{where}") from error
    text = " ".join(text.split())
    if not text:
        raise BadPairError("the caption is empty")
    return text


def parse_tags(value: Any) -> list[str] | None:
    """Ready-made tags from a list, a JSON list, or a text whose tags are parted by ``|``, ``;`` or ``,``.

    Blank tags are dropped, and repeated ones kept once. ``None`` stays ``None``.

    Raises:
        BadPairError: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise BadPairError("the tags are not UTF-8") from error
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise BadPairError(f"the tags are no JSON list: {one_sentence(error)}") from error
        else:
            value = text.split(next((mark for mark in "|;," if mark in text), ","))
    if not isinstance(value, list | tuple) or not all(isinstance(tag, str | bytes) for tag in value):
        raise BadPairError("the tags are neither a list of texts nor one text")
    names = [tag.decode("utf-8", "replace") if isinstance(tag, bytes) else tag for tag in value]
    return list(dict.fromkeys(name for name in (" ".join(name.split()) for name in names) if name))


def parse_captions(value: Any) -> list[Text]:
    """Captions from one text or a list of them (COCO's and Karpathy's ``{"raw": ...}`` objects too).

    Raises:
        BadPairError: it is something else.
    """
    if value is None:
        return []
    if isinstance(value, str | bytes):
        return [value]
    if isinstance(value, list | tuple):
        texts = [one.get("raw", one.get("caption")) if isinstance(one, dict) else one for one in value]
        if all(isinstance(text, str | bytes) or text is None for text in texts):
            return [text or "" for text in texts]
    raise BadPairError("the captions are neither a text nor a list of texts")


def load_json_bytes(data: bytes) -> Any:
    """JSON whose texts may hold bytes that are not UTF-8; those come out by :func:`as_bytes` as they were.

    Raises:
        BadPairError: it is no JSON.
    """
    try:
        return json.loads(data.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise BadPairError(f"its JSON cannot be parsed: {one_sentence(error)}") from error


@dataclass(frozen=True)
class Fields:
    """Names of the fields of a JSON object or the columns of a table; ``None`` means the usual names."""

    image: str | None = None
    caption: str | None = None
    tags: str | None = None

    def captions_of(self, record: dict[str, Any]) -> list[Text] | None:
        """The captions of a JSON object, or ``None`` where it has no such field.

        Raises:
            BadPairError: the field is neither a text nor a list of texts.
        """
        names = CAPTION_NAMES if self.caption is None else (self.caption,)
        found = next((name for name in names if record.get(name) is not None), None)
        return None if found is None else [escaped(text) for text in parse_captions(record[found])]

    def tags_of(self, record: dict[str, Any]) -> list[str] | None:
        """The tags of a JSON object; where it has no such field, ``None``, or none if the field was named.

        Raises:
            BadPairError: the field holds no tags.
        """
        names = TAGS_NAMES if self.tags is None else (self.tags,)
        found = next((name for name in names if record.get(name) is not None), None)
        if found is None:
            return None if self.tags is None else []
        return parse_tags(record[found])


def escaped(text: Text) -> Text:
    """A text that a lenient reader may have escaped, as bytes where it did."""
    return text if isinstance(text, bytes) or text.isascii() else as_bytes(text)


def sidecar(
    pair: RawPair, text: bytes | None, record: bytes | None, fields: Fields, *, lines: bool, missing: str
) -> RawPair:
    """Put the captions and tags of a picture's ``.txt`` and ``.json`` into ``pair``.

    A list of captions in the JSON comes first, then the text, then a single caption in the JSON.

    Args:
        pair: what is filled in.
        text, record: contents of the ``.txt`` and the ``.json``, or ``None`` where there is none.
        fields: names of the JSON's fields.
        lines: whether each line of the text is a caption; otherwise the text is one.
        missing: the problem of a pair that has neither.
    """
    try:
        parsed: Any = {} if record is None else load_json_bytes(record)
        if isinstance(parsed, list):
            parsed = {fields.caption or "captions": parsed}
        elif isinstance(parsed, str):
            parsed = {fields.caption or "caption": parsed}
        if not isinstance(parsed, dict):
            raise BadPairError("its JSON is neither an object nor a list of captions")
        listed = fields.captions_of(parsed)
        pair.tags = fields.tags_of(parsed)
    except BadPairError as error:
        pair.problem = pair.problem or str(error)
        return pair
    if text is not None and (listed is None or (len(listed) < 2 and fields.caption is None)):
        rows = [row for row in text.splitlines() if row.strip()] if lines else [text]
        pair.captions = rows or [b""]
    elif listed is not None:
        pair.captions = listed
    elif record is not None:
        name = f"field {fields.caption!r}" if fields.caption else "caption"
        pair.problem = pair.problem or f"its JSON has no {name}"
    else:
        pair.problem = pair.problem or missing
    return pair


def refuse_empty(count: int, what: str) -> None:
    """Raise InputError where a source holds nothing."""
    if not count:
        raise InputError(f"{what} holds no image-text pairs")
