"""Parsing of captions and tags from text files, JSON objects and columns of tables."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from typing import Any

from ttd_plugins.errors import one_sentence
from ttd_plugins.tags import unescape_entities

CAPTION_NAMES = (
    *("captions", "caption", "text", "txt", "sentence", "sentences", "title", "description", "raw_caption"),
    *("comment", "conversations", "messages"),
)
IMAGE_NAMES = (
    *("image", "images", "image_path", "image_file", "path", "filepath", "file_path", "filename", "file_name"),
    *("file", "img", "img_path", "image_name", "jpg"),
)
TAGS_NAMES = ("tags", "tag", "candidate_tags", "keywords", "nouns")
MISSING_VALUES = frozenset(
    r"nan -nan none null nil undefined na n/a #na #n/a <na> nat <null> (null) [null] \n -1.#ind 1.#ind 1.#qnan".split()
)
"""What pandas, R, spreadsheets and databases write for a missing value, case-folded."""

Text = str | bytes
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    # UTF-32 first: its little-endian mark begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class BadPairError(Exception):
    """A pair is unusable; the message becomes its reason in the list of skipped samples."""


def as_bytes(text: str) -> bytes:
    """Encode as UTF-8; bytes that a lenient reader escaped are restored."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def encoding_of(head: bytes) -> tuple[str, int]:
    """Return the encoding that the byte order mark of a text names, and the mark's length; UTF-8 without a mark."""
    return next(((name, len(mark)) for mark, name in _MARKS if head.startswith(mark)), ("utf-8", 0))


def decode_text(data: bytes, errors: str = "strict") -> str:
    """Decode a text by its byte order mark, or as UTF-8.

    Raises:
        UnicodeDecodeError: the text is invalid and ``errors`` is ``"strict"``.
    """
    encoding, start = encoding_of(data)
    if encoding == "utf-8" or errors == "strict":
        return data[start:].decode(encoding, errors)
    try:
        return data[start:].decode(encoding)
    except UnicodeDecodeError:
        # Only UTF-8 has a decoder that escapes bytes. A lone surrogate marks the text as invalid in the same way.
        return data[start:].decode(encoding, "replace").replace("\ufffd", "\udcff")


def is_missing(text: str) -> bool:
    """Return whether a text is blank, or stands for a missing value, as ``nan`` and ``NULL`` do."""
    return not (text := text.strip()) or text.casefold() in MISSING_VALUES


def usable_caption(caption: Text | None) -> str:
    """Return a caption as one line of text.

    Raises:
        BadPairError: the caption is empty, stands for a missing value, or is not text in UTF-8 or UTF-16 with a mark.
    """
    try:
        text = decode_text(caption or b"") if not isinstance(caption, str) else caption
        text.encode()
    except UnicodeError as error:
        where = ""
        if isinstance(error, UnicodeDecodeError) and error.encoding == "utf-8":
            where = f" (byte 0x{error.object[error.start]:02x} at position {error.start})"
        raise BadPairError(f"the caption is not UTF-8{where}") from error
    text = " ".join(text.split())
    if not text:
        raise BadPairError("the caption is empty")
    if is_missing(text):
        raise BadPairError(f"the caption is {text!r}, which stands for a missing value")
    if "\0" in text:
        raise BadPairError("the caption contains NUL characters; if it is UTF-16, save it with a byte order mark")
    return text


def parse_tags(value: Any) -> list[str] | None:
    """Parse ready-made tags: a list, a JSON list, or a text with ``|``, ``;`` or ``,`` between tags.

    Blank and repeated tags are removed, and HTML entities are unescaped. ``None`` stays ``None``; a text that stands
    for a missing value, such as ``nan``, is no tags.

    Raises:
        BadPairError: the value has another form.
    """
    if value is None:
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise BadPairError("the tags are not UTF-8") from error
    if isinstance(value, str):
        # Before the text is split at the ";" of an entity.
        text = unescape_entities(value.strip())
        if is_missing(text):
            return []
        if text.startswith("["):
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise BadPairError(f"the tags are not a valid JSON list: {one_sentence(error)}") from error
        else:
            value = text.split(next((mark for mark in "|;," if mark in text), ","))
    if not isinstance(value, list | tuple) or not all(isinstance(tag, str | bytes) for tag in value):
        raise BadPairError("the tags are neither a list of texts nor one text")
    names = [unescape_entities(tag.decode("utf-8", "replace") if isinstance(tag, bytes) else tag) for tag in value]
    return list(dict.fromkeys(name for name in (" ".join(name.split()) for name in names) if name))


def parse_captions(value: Any) -> list[Text]:
    """Parse captions: one text, a list of texts or of ``{"raw": ...}`` objects (Karpathy splits), or a conversation.

    The caption of a conversation (LLaVA's ``from`` and ``value``, or ``role`` and ``content``) is its first answer.

    Raises:
        BadPairError: the value has another form.
    """
    if value is None:
        return []
    if isinstance(value, str | bytes):
        return [value]
    if isinstance(value, list | tuple):
        for speaker, text in (("from", "value"), ("role", "content")):
            if value and all(isinstance(turn, dict) and speaker in turn and text in turn for turn in value):
                return _first_answer([(_plain(turn[speaker]), _plain(turn[text])) for turn in value])
        texts = [item.get("raw", item.get("caption")) if isinstance(item, dict) else item for item in value]
        if all(isinstance(text, str | bytes) or text is None for text in texts):
            return [text or "" for text in texts]
    raise BadPairError("the captions are neither a text nor a list of texts")


def _first_answer(turns: list[tuple[Any, Any]]) -> list[Text]:
    answers = [text for speaker, text in turns if speaker in ("gpt", "assistant", "model", "bot")]
    if not answers or not isinstance(answers[0], str):
        raise BadPairError("its conversation has no answer that is a text")
    return [answers[0]]


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def load_json_bytes(data: bytes) -> Any:
    """Parse JSON leniently: bytes that are not UTF-8 are escaped, and :func:`as_bytes` restores them.

    Raises:
        BadPairError: the JSON is invalid.
    """
    try:
        return json.loads(decode_text(data, "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise BadPairError(f"its JSON cannot be parsed: {one_sentence(error)}") from error


@dataclass(frozen=True)
class Fields:
    """Field names of a JSON object, or column names of a table; ``None`` means the usual names."""

    image: str | None = None
    caption: str | None = None
    tags: str | None = None

    def captions_of(self, record: dict[str, Any]) -> list[Text] | None:
        """Return the captions of a JSON object, or ``None`` if it has no such field.

        Raises:
            BadPairError: the field is neither a text nor a list of texts.
        """
        names = CAPTION_NAMES if self.caption is None else (self.caption,)
        found = next((name for name in names if record.get(name) is not None), None)
        return None if found is None else [escaped(text) for text in parse_captions(record[found])]

    def tags_of(self, record: dict[str, Any]) -> list[str] | None:
        """Return the tags of a JSON object.

        If the field is missing, returns ``None``, or an empty list if the user named the field.

        Raises:
            BadPairError: the field does not contain tags.
        """
        names = TAGS_NAMES if self.tags is None else (self.tags,)
        found = next((name for name in names if record.get(name) is not None), None)
        if found is None:
            return None if self.tags is None else []
        return parse_tags(record[found])


def escaped(text: Text) -> Text:
    """Return a text as bytes if a lenient reader may have escaped some of it."""
    return text if isinstance(text, bytes) or text.isascii() else as_bytes(text)
