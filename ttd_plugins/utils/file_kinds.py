"""What a file is, judged by its first bytes: for messages about a file that is not what its name says."""

from __future__ import annotations

import os
import re
from pathlib import Path

HEAD_BYTES = 512
"""How many bytes :func:`describe_kind` needs."""

_HTML = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%!PS", "a PostScript file"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript file"),
    (b"%PDF", "a PDF file"),
    (b"8BPS", "a Photoshop file"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"SIMPLE  =", "a FITS file"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip file"),
    (b"PK\x03\x04", "a ZIP file"),
    (b"PAR1", "a Parquet file"),
    (b"GGUF", "a GGUF file"),
)
_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF", b"avif": "AVIF", b"avis": "AVIF"}


def describe_kind(head: bytes) -> str | None:
    """Return what a file with these first bytes is, with its article, or ``None`` if that is not known.

    Args:
        head: the first :data:`HEAD_BYTES` bytes, or all of a shorter file.
    """
    if not head:
        return "an empty file"
    for start, kind in _KINDS:
        if head.startswith(start):
            return kind
    if _HTML.match(head.removeprefix(b"\xef\xbb\xbf")):
        return "an HTML page, such as a web server sends instead of a file that it refuses"
    if head[257:262] == b"ustar":
        return "a tar file"
    if head[4:8] == b"ftyp":
        brand = _BRANDS.get(head[8:12])
        return f"an image in the format {brand}" if brand else "a video or an image in a format of its kind"
    if re.match(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<(!DOCTYPE\s+)?svg\b", head, re.IGNORECASE | re.DOTALL):
        return "an SVG drawing"
    return None


def read_head(path: str | os.PathLike[str]) -> bytes:
    """Return the first :data:`HEAD_BYTES` bytes of a regular file; empty for any other, or one that cannot be read."""
    try:
        if not Path(path).is_file():
            return b""
        with open(path, "rb") as stream:
            return stream.read(HEAD_BYTES)
    except (OSError, ValueError):
        return b""
