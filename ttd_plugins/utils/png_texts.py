"""Text chunks of PNG files: Pillow refuses a sound image because of a long comment or colour profile in it."""

from __future__ import annotations

import struct
import zlib
from typing import IO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Pillow's own limits are PngImagePlugin.MAX_TEXT_CHUNK (1 MiB) and MAX_TEXT_MEMORY (64 MiB).
_MAX_TEXT = 1 << 20
_MAX_TEXTS = 32 << 20
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def without_long_texts(stream: IO[bytes]) -> bytes | None:
    """Return a PNG file without the texts and the colour profile that Pillow would refuse as too long.

    Args:
        stream: a seekable file; its position afterwards is undefined.

    Returns:
        The shortened file, or ``None`` if the file is no PNG, is broken, or has no such text.
    """
    stream.seek(0)
    if stream.read(len(SIGNATURE)) != SIGNATURE:
        return None
    removed: list[tuple[int, int]] = []
    total, start = 0, len(SIGNATURE)
    size = stream.seek(0, 2)
    while start + 12 <= size:
        stream.seek(start)
        length, kind = struct.unpack(">I4s", stream.read(8))
        end = start + 12 + length
        if end > size:
            break
        if kind in _TEXTS:
            text = _text_length(kind, stream, length)
            total += text
            if text > _MAX_TEXT or total > _MAX_TEXTS:
                removed.append((start, end))
                total -= text
        if kind == b"IEND":
            break
        start = end
    if not removed:
        return None
    stream.seek(0)
    data = stream.read()
    kept, place = bytearray(), 0
    for start, end in removed:
        kept += data[place:start]
        place = end
    return bytes(kept + data[place:])


def _text_length(kind: bytes, stream: IO[bytes], length: int) -> int:
    """Return the length of a text once it is decompressed, at most a little above the limit."""
    if kind == b"tEXt":
        return length
    # The keyword has at most 79 bytes; an iTXt chunk has two more names after it.
    data = stream.read(length)
    _, _, rest = data.partition(b"\0")
    if kind == b"iTXt":
        compressed = rest[:1] == b"\1"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
        if not compressed:
            return length
    else:
        if rest[:1] != b"\0":
            # Pillow refuses the whole image for an unknown compression of a text.
            return _MAX_TEXT + 1
        rest = rest[1:]
    try:
        return len(zlib.decompressobj().decompress(rest, _MAX_TEXT + 1))
    except zlib.error:
        return length
