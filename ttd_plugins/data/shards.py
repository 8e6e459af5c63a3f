"""webdataset shards as img2dataset writes them: tar files with ``KEY.jpg``, ``KEY.txt`` and ``KEY.json``.

:mod:`ttd_plugins.data.shard_samples` says which members are one sample.
"""

from __future__ import annotations

import contextlib
import glob
import lzma
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ttd_plugins.data.caption_parsing import Fields
from ttd_plugins.data.folders import MAX_SIDECAR_BYTES
from ttd_plugins.data.pair_source import RawPair, ReadNow, StreamSource, TarSlice
from ttd_plugins.data.shard_samples import IMAGES, TEXTS, Group, Name, Sample, parse_name
from ttd_plugins.data.shard_urls import pipe_is_allowed, require_permitted
from ttd_plugins.data.sidecar import add_sidecar
from ttd_plugins.data.tar_reading import Member, is_compressed, members, open_tar
from ttd_plugins.errors import InputError, MissingDependencyError, one_sentence
from ttd_plugins.utils.user_files import open_regular, require_regular, shown

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_IMAGE_BYTES = 1 << 30
"""Size of the largest image file in a shard that is read."""
MAX_STREAM_BYTES = 4 << 30
"""Size of the largest member that is passed over in a compressed shard or a URL."""
MAX_WAITING_BYTES = 2 << 30
"""Most bytes of samples that wait for the rest of them in a compressed shard or a URL."""
_SHARD_ERRORS = (
    *(OSError, EOFError, ValueError, OverflowError, RecursionError),
    *(tarfile.TarError, zlib.error, lzma.LZMAError),
)


def looks_like_shards(spec: str) -> bool:
    """Return whether a text names shards: a tar file, a brace or glob pattern, a URL, or several joined with ``::``."""
    url = not _is_local(spec) and not spec.startswith("hf:")
    return url or "::" in spec or spec.rstrip().endswith(SHARD_SUFFIXES)


class ShardPairs(StreamSource):
    """Tar files in the given order.

    Args:
        spec: a tar file, a folder of tar files, a pattern (``{00000..00331}.tar``, ``*.tar``), or URLs that
            ``webdataset`` opens (``https:``; ``pipe:`` within :func:`~ttd_plugins.data.shard_urls.allow_pipe`).
            Several of these, joined with ``::``, make one set.
        fields: names of the JSON fields.

    Raises:
        InputError: a file does not exist, a part of ``spec`` is empty, or a shard is a shell command that is not
            permitted.
        MissingDependencyError: ``webdataset``, needed for brace patterns and URLs, is not installed.
    """

    kind = "shards"

    def __init__(self, spec: str, fields: Fields | None = None) -> None:
        self.name = spec
        self.fields = fields or Fields()
        # Stored, since worker processes open the shards.
        self._pipe_allowed = pipe_is_allowed()
        self.shards = _expand(spec)
        # Keys start with the shard's name, or with its path if several folders have a shard of that name.
        names = Counter(map(_name, self.shards))
        self._names = {shard: _name(shard) if names[_name(shard)] == 1 else shard for shard in self.shards}

    @property
    def summary(self) -> str:
        return f"shards {self.name}: {len(self.shards):,} tar files"

    def read_shard(self, shard: str, eager: ReadNow) -> Iterator[RawPair]:
        name = self._names[shard]
        count = 0
        samples = self._samples(shard, eager)
        while True:
            try:
                sample = next(samples, None)
            # Raised by tarfile, gzip, zlib, lzma or the stream; the rest of the shard is lost.
            except _SHARD_ERRORS as error:
                reason = f"the shard cannot be read after {count} samples: {one_sentence(error)}"
                yield RawPair(name, problem=reason)
                return
            if sample is None:
                return
            yield self._pair(name, sample)
            count += 1

    def _samples(self, shard: str, eager: ReadNow) -> Iterator[Sample[bytes | TarSlice]]:
        with contextlib.ExitStack() as stack:
            if _is_local(shard):
                stream = stack.enter_context(open_regular(shard, f"the shard {shown(shard)}"))
                if not is_compressed(stream):
                    yield from _indexed_samples(shard, stream, eager)
                    return
            else:
                require_permitted([shard], pipe_allowed=self._pipe_allowed)
                stream = stack.enter_context(contextlib.closing(_gopen(shard)))
            yield from _streamed_samples(stack.enter_context(open_tar(stream, seekable=False)))

    def _pair(self, shard: str, sample: Sample[bytes | TarSlice]) -> RawPair:
        pair = RawPair(f"{shard}/{sample.key}", problem=sample.problem)
        if sample.image is not None:
            suffix, pair.image = sample.image
            pair.where = f"{shard}/{sample.key}.{suffix}"
        if sample.problem is not None:
            return pair
        texts = {suffix: content for suffix, content in sample.texts.items() if isinstance(content, bytes)}
        text = next((texts[suffix] for suffix in TEXTS if suffix in texts), None)
        missing = "its shard has no caption of it"
        return add_sidecar(pair, text, texts.get("json"), self.fields, lines=False, missing=missing)


def _indexed_samples(shard: str, stream: IO[bytes], eager: ReadNow) -> Iterator[Sample[bytes | TarSlice]]:
    """Yield the samples of an uncompressed tar file, whose members may be in any order."""
    size = os.fstat(stream.fileno()).st_size
    groups: dict[str, Group[Member]] = {}
    last: Group[Member] | None = None
    failure: Exception | None = None
    try:
        with open_tar(stream, seekable=True) as tar:
            for member in members(tar):
                name = parse_name(member.name)
                if member.offset + member.size > size and not member.sparse:
                    raise tarfile.ReadError(f"{member.name!r} states a size of {member.size:,} bytes, beyond the end")
                if name is not None:
                    last = groups.setdefault(name.group, Group(name.group))
                    last.add(name, member)
    except _SHARD_ERRORS as error:
        failure = error
    for group in groups.values():
        # The sample before an error may be incomplete.
        if failure is None or group is not last or group.complete:
            yield from (_read(sample, shard, stream, eager) for sample in group.samples())
    if failure is not None:
        raise failure


def _read(sample: Sample[Member], shard: str, stream: IO[bytes], eager: ReadNow) -> Sample[bytes | TarSlice]:
    """Read the caption files of a sample, and its image unless images are skipped over."""
    found: Sample[bytes | TarSlice] = Sample(sample.key, problem=sample.problem)
    if found.problem is not None:
        return found
    for suffix, member in ((sample.image,) if sample.image else ()) + tuple(sample.texts.items()):
        found.problem = found.problem or _refusal(member, suffix)
        if found.problem is not None:
            continue
        if suffix in IMAGES and not eager.on:
            found.image = (suffix, TarSlice(shard, member.offset, member.size))
            continue
        stream.seek(member.offset)
        content = stream.read(member.size)
        if suffix in IMAGES:
            found.image = (suffix, content)
        else:
            found.texts[suffix] = content
    return found


def _refusal(member: Member, suffix: str) -> str | None:
    limit = MAX_IMAGE_BYTES if suffix in IMAGES else MAX_SIDECAR_BYTES
    if member.sparse:
        return f"its member {member.name!r} is a sparse file, which is not read"
    return f"its member {member.name!r} is larger than {limit:,} bytes" if member.size > limit else None


def _streamed_samples(tar: tarfile.TarFile) -> Iterator[Sample[bytes | TarSlice]]:
    """Yield the samples of a tar file that is read once, in the order in which they are complete.

    An incomplete sample waits for members that are not next to it; the images that wait are in memory.
    """
    waiting: dict[str, Group[bytes | TarSlice]] = {}
    done: dict[str, frozenset[Name]] = {}
    refused: list[Sample[bytes | TarSlice]] = []
    current: Group[bytes | TarSlice] | None = None
    held = 0

    def finished(group: Group[bytes | TarSlice]) -> Iterator[Sample[bytes | TarSlice]]:
        done[group.name] = group.seen | frozenset(group.members)
        yield from group.samples()

    failure: Exception | None = None
    found = members(tar)
    while True:
        try:
            member = next(found, None)
            if member is None:
                break
            if member.size > MAX_STREAM_BYTES:
                raise tarfile.ReadError(f"{member.name!r} states a size of {member.size:,} bytes")
            name = parse_name(member.name)
            if name is None:
                continue
            refusal = _refusal(member, name.suffix)
            content = b"" if refusal is not None else tar.extractfile(member.info).read()  # type: ignore[union-attr]
        except _SHARD_ERRORS as error:
            failure = error
            break
        if current is not None and current.name != name.group:
            if current.complete:
                yield from finished(current)
            else:
                waiting[current.name] = current
                held += sum(len(content) for content in current.members.values() if isinstance(content, bytes))
            current = None
        if current is None:
            current = waiting.pop(name.group, None) or Group(name.group, done.get(name.group, frozenset()))
            held -= sum(len(content) for content in current.members.values() if isinstance(content, bytes))
        if held > MAX_WAITING_BYTES:
            failure = tarfile.ReadError(
                f"images and captions are too far apart: {len(waiting)} incomplete samples take more than "
                f"{MAX_WAITING_BYTES:,} bytes; a tar file that is local and not compressed is read in any order"
            )
            break
        if refusal is not None:
            refused.append(Sample(f"{name.stem} ({name.suffix})", problem=refusal))
        else:
            current.add(name, content)
    last = current
    for group in [*waiting.values(), *([current] if current is not None else [])]:
        # The sample before an error may be incomplete.
        if failure is None or group is not last or group.complete:
            yield from finished(group)
    yield from refused
    if failure is not None:
        raise failure


def _name(shard: str) -> str:
    return PurePosixPath(shard.replace("\\", "/")).name


def _is_local(shard: str) -> bool:
    return not re.match(r"^[a-z][a-z0-9+]+:", shard)


def _webdataset(spec: str) -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise MissingDependencyError(f"{spec!r} needs webdataset; pip install 'ttd-plugins[data]'") from error
    return webdataset


def _gopen(shard: str) -> Any:
    return _webdataset(shard).gopen(shard)


def _expand(spec: str) -> tuple[str, ...]:
    parts = [spec] if os.path.exists(spec) else spec.split("::")
    if not all(map(str.strip, parts)):
        raise InputError(f"the shards {shown(spec)} have an empty part next to '::'")
    shards = [_local_path(shard) for part in parts for shard in _expand_part(part.strip())]
    remote = [shard for shard in shards if not _is_local(shard)]
    require_permitted(remote, pipe_allowed=pipe_is_allowed())
    if remote:
        # Fail here rather than later in a worker.
        _webdataset(spec)
    missing = [name for name in shards if _is_local(name) and not os.path.exists(name)]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"the shard {shown(missing[0])} does not exist{more} (of {len(shards)} in {shown(spec)})")
    for name in shards:
        if _is_local(name):
            require_regular(name, f"the shard {shown(name)}")
    return tuple(shards)


def _local_path(shard: str) -> str:
    """Return the path that a ``file:`` URL names; any other shard as it is."""
    return url2pathname(urlsplit(shard).path) if shard.startswith("file:") else shard


def _expand_part(part: str) -> list[str]:
    path = Path(part)
    if _is_local(part) and os.path.isdir(path):
        found = sorted(str(file) for file in path.iterdir() if file.name.endswith(SHARD_SUFFIXES))
        if not found:
            raise InputError(f"the folder {shown(part)} contains no tar files")
        return found
    names = [part]
    if not os.path.exists(path) and "{" in part:
        try:
            names = list(_webdataset(part).shardlists.expand_urls(part))
        # braceexpand raises its own ValueError; an unset variable raises an AssertionError.
        except (ValueError, AssertionError) as error:
            raise InputError(f"the pattern {shown(part)} cannot be expanded: {one_sentence(error)}") from error
    shards: list[str] = []
    for name in names:
        if _is_local(name) and not os.path.exists(name) and any(mark in name for mark in "*?["):
            matching = sorted(glob.glob(name))
            if not matching:
                raise InputError(f"no file matches {shown(name)}")
            shards += matching
        else:
            shards.append(name)
    return shards
