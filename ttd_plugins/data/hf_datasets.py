"""Hugging Face ``datasets``, from disk or by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.data.caption_parsing import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    TAGS_NAMES,
    BadPairError,
    Fields,
    escaped,
    parse_captions,
    parse_tags,
)
from ttd_plugins.data.image_paths import with_slashes
from ttd_plugins.data.pair_source import MapSource, RawPair, ReadNow, StreamSource, refuse_empty
from ttd_plugins.data.tables import arrow_values
from ttd_plugins.errors import InputError, MissingDependencyError, choices_sentence, listed, one_sentence


def saved_dataset(folder: Path) -> bool:
    """Return whether a folder was written by ``save_to_disk``."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def is_dataset(value: Any) -> bool:
    """Return whether a value is a ``Dataset`` or an ``IterableDataset``, or a dictionary of them by split."""
    loaded = sys.modules.get("datasets")
    if loaded is None:
        return False
    kinds = (loaded.Dataset, loaded.IterableDataset, loaded.DatasetDict, loaded.IterableDatasetDict)
    return isinstance(value, kinds)


def open_dataset(
    spec: Any,
    *,
    split: str | None = None,
    config: str | None = None,
    images: Path | None = None,
    fields: Fields | None = None,
    **options: Any,
) -> DatasetPairs | DatasetStream:
    """Open a dataset with a column of images (or paths) and a column of captions (or lists of captions).

    Args:
        spec: a folder written by ``save_to_disk``, ``hf:NAME`` for ``datasets.load_dataset``, or a dataset.
        split: the split, if there are several; by default ``"train"``.
        config: configuration of a dataset by name.
        images: root of relative paths, for a column of paths.
        fields: names of the columns.
        **options: passed to ``load_dataset``, such as ``data_files``, ``data_dir`` or ``streaming``.

    Returns:
        A source with random access, or for a streamed dataset a source of shards.

    Raises:
        InputError: the dataset, the split or a column is not found.
        MissingDependencyError: ``datasets`` is not installed.
    """
    name = spec if isinstance(spec, str) else f"a {type(spec).__name__}"
    data = _load(spec, name, split, config, options)
    reader = _RowReader(*_columns(name, data, fields or Fields()), images)
    if hasattr(data, "__len__"):
        return DatasetPairs(name, data, reader)
    return DatasetStream(name, data, reader)


@dataclass(frozen=True)
class _RowReader:
    """Which columns hold image, caption and tags, and how a value of them is read."""

    image: str
    caption: str
    tags: str | None
    binary: bool
    images: Path | None

    def image_of(self, value: Any) -> Path | bytes | None:
        if isinstance(value, dict):
            if value.get("bytes") is not None:
                return bytes(value["bytes"])
            value = value.get("path")
        elif isinstance(value, bytes) and self.binary:
            return value
        if isinstance(value, bytes):
            value = value.decode("utf-8", "surrogateescape")
        if value is not None and not isinstance(value, str):
            raise BadPairError(f"the image is a {type(value).__name__}, neither the bytes of an image file nor a path")
        if not value:
            return None
        root = self.images or Path()
        return root / with_slashes(root, value)

    def fill(self, pair: RawPair, value: Callable[[str], Any]) -> RawPair:
        """Store image, captions and tags of a row in ``pair``, and return it; ``value`` returns a column's value."""
        try:
            pair.image = self.image_of(value(self.image))
            pair.captions = [escaped(text) for text in parse_captions(value(self.caption))]
            if self.tags is not None:
                pair.tags = parse_tags(value(self.tags)) or []
        except BadPairError as error:
            pair.problem = str(error)
        pair.problem = pair.problem or ("the image is missing" if pair.image is None else None)
        return pair


class DatasetPairs(MapSource):
    """A ``datasets.Dataset``; see :func:`open_dataset`."""

    kind = "datasets"

    def __init__(self, name: str, data: Any, reader: _RowReader) -> None:
        self.name = name
        self._data = data.with_format("arrow")
        self._reader = reader
        self._caption = reader.caption
        refuse_empty(len(self._data), f"the dataset {name!r}")

    @property
    def summary(self) -> str:
        return f"dataset {self.name}: {len(self):,} rows"

    def __len__(self) -> int:
        return len(self._data)

    def key(self, index: int) -> str:
        return f"row {index}"

    def read(self, index: int) -> RawPair:
        row = self._data[index]
        return self._reader.fill(
            RawPair(self.key(index)), lambda column: arrow_values(row.column(column).combine_chunks())[0]
        )

    def caption_count(self, index: int) -> int:
        value = arrow_values(self._data[index].column(self._caption).combine_chunks())[0]
        return max(len(value), 1) if isinstance(value, list) else 1

    def caption_counts(self) -> NDArray[np.int64]:
        captions = self._data.select_columns([self._caption])
        counts: list[int] = []
        for start in range(0, len(captions), 10_000):
            values = captions[start : start + 10_000].column(self._caption).combine_chunks()
            counts += [max(len(v), 1) if isinstance(v, list) else 1 for v in arrow_values(values)]
        return np.asarray(counts, np.int64)


class DatasetStream(StreamSource):
    """A ``datasets.IterableDataset``, whose shards are those of the dataset; see :func:`open_dataset`."""

    kind = "datasets"

    def __init__(self, name: str, data: Any, reader: _RowReader) -> None:
        self.name = name
        self._data = data
        self._reader = reader
        self.shards = tuple(f"shard {number}" for number in range(max(data.num_shards, 1)))

    @property
    def summary(self) -> str:
        return f"streamed dataset {self.name}: {len(self.shards):,} shards"

    def read_shard(self, shard: str, eager: ReadNow) -> Iterator[RawPair]:
        number, row = int(shard.rpartition(" ")[2]), 0
        try:
            data = self._data if len(self.shards) == 1 else self._data.shard(len(self.shards), number)
            for cells in data:
                yield self._reader.fill(RawPair(f"{shard}/row {row}"), cells.get)
                row += 1
        # Dataset scripts, decoders and the network raise exceptions of many types; the rest of the shard is lost.
        except Exception as error:
            reason = f"the shard cannot be read after {row} rows: {one_sentence(error)}"
            yield RawPair(shard, problem=reason)


def _load(spec: Any, name: str, split: str | None, config: str | None, options: dict[str, Any]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"{name!r} needs Hugging Face datasets; pip install 'ttd-plugins[data]'"
        ) from error
    by_name = isinstance(spec, str) and spec.startswith("hf:")
    if not by_name and (config is not None or options):
        given = "config" if config is not None else next(iter(options))
        kind = "the folder " if isinstance(spec, str) else ""
        raise InputError(f"the option {given!r} applies to datasets by name (hf:NAME), not to {kind}{name!r}")
    if "trust_remote_code" in options:
        raise InputError(f"the dataset {name!r}: trust_remote_code is refused, because code of a dataset is never run")
    if by_name and spec.partition(":")[2].strip().lower() == "pandas":
        raise InputError(f"the dataset {name!r} reads pickles, which can run code; save the table as Parquet")
    if by_name and int(datasets.__version__.partition(".")[0]) < 4:
        # Otherwise these releases ask on the terminal whether to run a dataset's script.
        options = {**options, "trust_remote_code": False}
    try:
        if not isinstance(spec, str):
            data: Any = spec
        elif by_name:
            data = datasets.load_dataset(spec.removeprefix("hf:"), config, **options)
        else:
            data = datasets.load_from_disk(spec)
    # Dataset scripts and the network raise exceptions of many types.
    except Exception as error:
        raise InputError(f"the dataset {name!r} cannot be loaded: {one_sentence(error)}") from error
    if hasattr(data, "keys"):
        splits = list(data)
        wanted = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
        if wanted not in splits:
            raise InputError(f"the dataset {name!r}: {choices_sentence('split', wanted, splits)}")
        data = data[wanted]
    elif split is not None:
        raise InputError(f"the dataset {name!r} has no splits; leave out split={split!r}")
    try:
        for column, feature in (data.features or {}).items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
    except Exception as error:
        raise InputError(f"the dataset {name!r} cannot be read: {one_sentence(error)}") from error
    return data


def _columns(spec: str, data: Any, fields: Fields) -> tuple[str, str, str | None, bool]:
    import datasets

    try:
        # A stream may not know its columns before its first row is read.
        features = data.features or dict.fromkeys(next(iter(data), {}))
    except Exception as error:
        raise InputError(f"the dataset {spec!r} cannot be read: {one_sentence(error)}") from error
    refuse_empty(len(features), f"the dataset {spec!r}")
    names = list(features)
    decoded = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]

    def choose(given: str | None, usual: tuple[str, ...], what: str) -> str | None:
        if given is not None and given not in names:
            raise InputError(f"the dataset {spec!r}: {choices_sentence(f'column for {what}', given, names)}")
        return given or next((name for name in usual if name in names), None)

    image = choose(fields.image, (*decoded, *IMAGE_NAMES), "images")
    caption = choose(fields.caption, CAPTION_NAMES, "captions")
    for found, what, option in ((image, "images", "image_column"), (caption, "captions", "caption_column")):
        if found is None:
            raise InputError(
                f"the dataset {spec!r} has no column with a usual name for {what} (columns: {listed(names)}); name it "
                f"with {option}"
            )
    assert image is not None
    assert caption is not None
    dtype = getattr(features[image], "dtype", "")
    return image, caption, choose(fields.tags, TAGS_NAMES, "tags"), dtype in ("binary", "large_binary")
