"""Parsing of captions and tags from text files, JSON objects and columns of tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ttd_plugins.errors import one_sentence

CAPTION_NAMES = ("captions", "caption", "text", "txt", "sentence", "sentences", "title", "description", "raw_caption")
IMAGE_NAMES = (
    *("image", "images", "image_path", "image_file", "path", "filepath", "file_path", "filename", "file_name"),
    *("file", "img", "img_path", "image_name", "jpg"),
)
TAGS_NAMES = ("tags", "tag", "candidate_tags", "keywords", "nouns")

Text = str | bytes


class BadPairError(Exception):
    """A pair is unusable; the message becomes its reason in the list of skipped samples."""


def as_bytes(text: str) -> bytes:
    """Encode as UTF-8; bytes that a lenient reader escaped are restored."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def usable_caption(caption: Text | None) -> str:
    """Return a caption as one line of text.

    Raises:
        BadPairError: the caption is empty or not UTF-8.
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
    """Parse ready-made tags: a list, a JSON list, or a text with ``|``, ``;`` or ``,`` between tags.

    Blank and repeated tags are removed. ``None`` stays ``None``.

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
        text = value.strip()
        if text.startswith("["):
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise BadPairError(f"the tags are not a valid JSON list: {one_sentence(error)}") from error
        else:
            value = text.split(next((mark for mark in "|;," if mark in text), ","))
    if not isinstance(value, list | tuple) or not all(isinstance(tag, str | bytes) for tag in value):
        raise BadPairError("the tags are neither a list of texts nor one text")
    names = [tag.decode("utf-8", "replace") if isinstance(tag, bytes) else tag for tag in value]
    return list(dict.fromkeys(name for name in (" ".join(name.split()) for name in names) if name))


def parse_captions(value: Any) -> list[Text]:
    """Parse captions: one text, or a list of texts or of ``{"raw": ...}`` objects (COCO and Karpathy splits).

    Raises:
        BadPairError: the value has another form.
    """
    if value is None:
        return []
    if isinstance(value, str | bytes):
        return [value]
    if isinstance(value, list | tuple):
        texts = [item.get("raw", item.get("caption")) if isinstance(item, dict) else item for item in value]
        if all(isinstance(text, str | bytes) or text is None for text in texts):
            return [text or "" for text in texts]
    raise BadPairError("the captions are neither a text nor a list of texts")


def load_json_bytes(data: bytes) -> Any:
    """Parse JSON leniently: bytes that are not UTF-8 are escaped, and :func:`as_bytes` restores them.

    Raises:
        BadPairError: the JSON is invalid.
    """
    try:
        return json.loads(data.decode("utf-8-sig", "surrogateescape"))
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
