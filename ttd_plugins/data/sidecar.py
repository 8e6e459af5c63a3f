"""Captions and tags of an image from its sidecar files, ``.txt`` and ``.json``."""

from __future__ import annotations

from typing import Any

from ttd_plugins.data.caption_parsing import (
    BadPairError,
    Fields,
    Text,
    decode_text,
    encoding_of,
    load_json_bytes,
)
from ttd_plugins.data.pair_source import RawPair


def caption_lines(text: bytes) -> list[Text]:
    """Return the lines of a text that are not blank; as bytes, unless a byte order mark names another encoding."""
    if encoding_of(text)[0] == "utf-8":
        return [row for row in text.splitlines() if row.strip()]
    return [row for row in decode_text(text, "replace").splitlines() if row.strip()]


def add_sidecar(
    pair: RawPair, text: bytes | None, record: bytes | None, fields: Fields, *, lines: bool, missing: str
) -> RawPair:
    """Store the captions and tags of sidecar files in ``pair``, and return it.

    Precedence: a list of captions in the JSON, then the text, then a single caption in the JSON.

    Args:
        pair: the pair to fill in.
        text, record: contents of the ``.txt`` and the ``.json``, or ``None`` if the file is missing.
        fields: names of the JSON fields.
        lines: whether each line of the text is a caption; otherwise the whole text is one caption.
        missing: the problem of a pair that has neither file.
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
        rows = caption_lines(text) if lines else [text]
        pair.captions = rows or [b""]
    elif listed is not None:
        pair.captions = listed
    elif record is not None:
        name = f"field {fields.caption!r}" if fields.caption else "caption"
        pair.problem = pair.problem or f"its JSON has no {name}"
    else:
        pair.problem = pair.problem or missing
    return pair
