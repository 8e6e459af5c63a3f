"""webdataset shards as img2dataset writes them: tar files with ``KEY.jpg``, ``KEY.txt`` and ``KEY.json``."""

from __future__ import annotations

import contextlib
import glob
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ttd_plugins.data.caption_parsing import Fields
from ttd_plugins.data.pair_source import IMAGE_SUFFIXES, RawPair, ReadNow, StreamSource, TarSlice
from ttd_plugins.data.shard_urls import pipe_is_allowed, require_permitted
from ttd_plugins.data.sidecar import add_sidecar
from ttd_plugins.errors import InputError, MissingDependencyError, one_sentence

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_IMAGES = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES)


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
        group: dict[str, bytes | TarSlice] = {}
        current = ""
        count = 0
        try:
            for stem, suffix, content in self._members(shard, eager):
                if stem != current and group:
                    yield self._pair(name, current, group)
                    count += 1
                    group = {}
                current = stem
                group[suffix] = content
        # Raised by tarfile, gzip, zlib or the stream; the rest of the shard is lost.
        except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
            reason = f"the shard cannot be read after {count} samples: {one_sentence(error)}"
            yield RawPair(name, problem=reason)
            # The sample before the error may be incomplete.
            if not (set(group) & _IMAGES and set(group) & {"txt", "json"}):
                return
        if group:
            yield self._pair(name, current, group)

    def _members(self, shard: str, eager: ReadNow) -> Iterator[tuple[str, str, bytes | TarSlice]]:
        with contextlib.ExitStack() as stack:
            plain = _is_local(shard) and shard.endswith(".tar")
            if _is_local(shard):
                stream: IO[bytes] = stack.enter_context(open(shard, "rb"))
            else:
                require_permitted([shard], pipe_allowed=self._pipe_allowed)
                stream = stack.enter_context(contextlib.closing(_gopen(shard)))
            mode: Any = "r:" if plain else "r|*"
            tar = stack.enter_context(tarfile.open(fileobj=stream, mode=mode))
            for member in tar:
                # Otherwise tarfile stores every member.
                tar.members = []  # type: ignore[attr-defined]
                if not member.isreg():
                    continue
                path = PurePosixPath(member.name)
                stem, _, suffix = path.name.partition(".")
                suffix = suffix.lower()
                if not stem or (suffix not in _IMAGES and suffix not in ("txt", "json")):
                    continue
                stem = str(path.with_name(stem))
                if plain and suffix in _IMAGES and not eager.on:
                    yield stem, suffix, TarSlice(shard, member.offset_data, member.size)
                    continue
                content = tar.extractfile(member)
                assert content is not None
                yield stem, suffix, content.read()
            if plain:
                # tarfile treats a header that it cannot parse as the end of the file.
                stream.seek(tar.offset)  # type: ignore[attr-defined]
                if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError("a header is broken or truncated")

    def _pair(self, shard: str, key: str, group: dict[str, bytes | TarSlice]) -> RawPair:
        pair = RawPair(f"{shard}/{key}")
        suffix = next((suffix for suffix in group if suffix in _IMAGES), None)
        if suffix is None:
            files = ", ".join(f"{key}.{name}" for name in group)
            pair.problem = f"its shard has no image of it, only {files}"
        else:
            pair.image = group[suffix]
            pair.where = f"{shard}/{key}.{suffix}"
        text, record = group.get("txt"), group.get("json")
        assert not isinstance(text, TarSlice)
        assert not isinstance(record, TarSlice)
        return add_sidecar(pair, text, record, self.fields, lines=False, missing="its shard has no caption of it")


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
    parts = [spec] if Path(spec).exists() else spec.split("::")
    if not all(map(str.strip, parts)):
        raise InputError(f"the shards {spec!r} have an empty part next to '::'")
    shards = [shard for part in parts for shard in _expand_part(part.strip())]
    remote = [shard for shard in shards if not _is_local(shard)]
    require_permitted(remote, pipe_allowed=pipe_is_allowed())
    if remote:
        # Fail here rather than later in a worker.
        _webdataset(spec)
    missing = [name for name in shards if _is_local(name) and not Path(name).is_file()]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"the shard {missing[0]!r} does not exist{more} (of {len(shards)} in {spec!r})")
    return tuple(shards)


def _expand_part(part: str) -> list[str]:
    path = Path(part)
    if _is_local(part) and path.is_dir():
        found = sorted(str(file) for file in path.iterdir() if file.name.endswith(SHARD_SUFFIXES))
        if not found:
            raise InputError(f"the folder {part!r} contains no tar files")
        return found
    names = [part]
    if not path.exists() and "{" in part:
        try:
            names = list(_webdataset(part).shardlists.expand_urls(part))
        # braceexpand raises its own ValueError; an unset variable raises an AssertionError.
        except (ValueError, AssertionError) as error:
            raise InputError(f"the pattern {part!r} cannot be expanded: {one_sentence(error)}") from error
    shards: list[str] = []
    for name in names:
        if _is_local(name) and not Path(name).exists() and any(mark in name for mark in "*?["):
            matching = sorted(glob.glob(name))
            if not matching:
                raise InputError(f"no file matches {name!r}")
            shards += matching
        else:
            shards.append(name)
    return shards
