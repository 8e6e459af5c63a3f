"""Hugging Face ``datasets``, from disk or by name."""

from __future__ import annotations

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
from ttd_plugins.data.pair_source import MapSource, RawPair, refuse_empty
from ttd_plugins.data.tables import arrow_values
from ttd_plugins.errors import InputError, MissingDependencyError, choices_sentence, listed, one_sentence


def saved_dataset(folder: Path) -> bool:
    """Return whether a folder was written by ``save_to_disk``."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


class DatasetPairs(MapSource):
    """A ``datasets.Dataset`` with a column of images (or paths) and a column of captions (or lists of captions).

    Args:
        spec: a folder written by ``save_to_disk``, or ``hf:NAME`` for ``datasets.load_dataset``.
        split: the split, if there are several; by default ``"train"``.
        config: configuration of a dataset by name.
        images: root of relative paths, for a column of paths.
        fields: names of the columns.
        **options: passed to ``load_dataset``, such as ``data_files`` or ``data_dir``.

    Raises:
        InputError: the dataset, the split or a column is not found.
        MissingDependencyError: ``datasets`` is not installed.
    """

    kind = "datasets"

    def __init__(
        self,
        spec: str,
        *,
        split: str | None = None,
        config: str | None = None,
        images: Path | None = None,
        fields: Fields | None = None,
        **options: Any,
    ) -> None:
        self.name = spec
        self.images = images
        self._data = _load(spec, split, config, options)
        self._image, self._caption, self._tags = _columns(spec, self._data, fields or Fields())
        refuse_empty(len(self._data), f"the dataset {spec!r}")

    @property
    def summary(self) -> str:
        return f"dataset {self.name}: {len(self):,} rows"

    def __len__(self) -> int:
        return len(self._data)

    def key(self, index: int) -> str:
        return f"row {index}"

    def read(self, index: int) -> RawPair:
        pair = RawPair(self.key(index))
        try:
            row = self._data[index]
            pair.image = self._image_of(arrow_values(row.column(self._image).combine_chunks())[0])
            caption = arrow_values(row.column(self._caption).combine_chunks())[0]
            pair.captions = [escaped(text) for text in parse_captions(caption)]
            if self._tags is not None:
                pair.tags = parse_tags(arrow_values(row.column(self._tags).combine_chunks())[0]) or []
        except BadPairError as error:
            pair.problem = str(error)
        pair.problem = pair.problem or ("the image is missing" if pair.image is None else None)
        return pair

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

    def _image_of(self, value: Any) -> Path | bytes | None:
        if isinstance(value, dict):
            if value.get("bytes") is not None:
                return bytes(value["bytes"])
            value = value.get("path")
        if isinstance(value, bytes):
            value = value.decode("utf-8", "surrogateescape")
        return None if not value else (self.images or Path()) / value


def _load(spec: str, split: str | None, config: str | None, options: dict[str, Any]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"{spec!r} needs Hugging Face datasets; pip install 'ttd-plugins[data]'"
        ) from error
    by_name = spec.startswith("hf:")
    if not by_name and (config is not None or options):
        given = "config" if config is not None else next(iter(options))
        raise InputError(f"the option {given!r} applies to datasets by name (hf:NAME), not to the folder {spec!r}")
    if "trust_remote_code" in options:
        raise InputError(f"the dataset {spec!r}: trust_remote_code is refused, because code of a dataset is never run")
    if by_name and spec.partition(":")[2].strip().lower() == "pandas":
        raise InputError(f"the dataset {spec!r} reads pickles, which can run code; save the table as Parquet")
    if by_name and int(datasets.__version__.partition(".")[0]) < 4:
        # Otherwise these releases ask on the terminal whether to run a dataset's script.
        options = {**options, "trust_remote_code": False}
    try:
        if by_name:
            data: Any = datasets.load_dataset(spec.removeprefix("hf:"), config, **options)
        else:
            data = datasets.load_from_disk(spec)
    # Dataset scripts and the network raise exceptions of many types.
    except Exception as error:
        raise InputError(f"the dataset {spec!r} cannot be loaded: {one_sentence(error)}") from error
    if hasattr(data, "keys"):
        splits = list(data)
        wanted = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
        if wanted not in splits:
            raise InputError(f"the dataset {spec!r}: {choices_sentence('split', wanted, splits)}")
        data = data[wanted]
    elif split is not None:
        raise InputError(f"the dataset {spec!r} has no splits; leave out split={split!r}")
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    return data.with_format("arrow")


def _columns(spec: str, data: Any, fields: Fields) -> tuple[str, str, str | None]:
    import datasets

    names = list(data.features)
    decoded = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]

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
    return image, caption, choose(fields.tags, TAGS_NAMES, "tags")
