"""Keys in Parquet: names of files need not be UTF-8, while texts of Parquet are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence


def is_utf8(text: str) -> bool:
    """Return whether a text, such as the name of a file, can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encode_keys(keys: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return keys as Parquet can store them, and the metadata that :func:`decode_keys` needs.

    If one key is not UTF-8, all are stored as JSON, and the metadata are ``{"keys": "json"}``.
    """
    if all(is_utf8(key) for key in keys):
        return list(keys), {}
    return [json.dumps(key) for key in keys], {"keys": "json"}


def decode_keys(stored: Sequence[str], metadata: Mapping[bytes, bytes]) -> list[str]:
    """Return the keys that :func:`encode_keys` stored.

    Raises:
        ValueError: the metadata say JSON, and a key is none.
    """
    return [json.loads(key) for key in stored] if b"keys" in metadata else list(stored)
