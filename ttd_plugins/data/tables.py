"""Tables of paths and captions: CSV, TSV, JSON lines and Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
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
    Text,
    as_bytes,
    escaped,
    load_json_bytes,
    parse_captions,
    parse_tags,
)
from ttd_plugins.data.pair_source import IMAGE_SUFFIXES, MapSource, PackedTexts, RawPair, refuse_empty
from ttd_plugins.errors import InputError, MissingDependencyError, choices_sentence, listed, one_sentence

TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".txt", ".parquet", ".pq", ".jsonl", ".ndjson"})
Row = tuple[int, dict[str, Any] | None, str]
"""Row number (from 1, without the header), cells by column or ``None``, and the problem if there are no cells."""


class TablePairs(MapSource):
    """Rows with a path and a caption; rows with the same path are one image with several captions.

    Paths are relative to ``images``, by default the table's folder. A caption may be a list, written as JSON in CSV and
    TSV. Ready-made tags are lists, or texts with ``|``, ``;`` or ``,`` between tags.

    Raises:
        InputError: the table cannot be read or is empty, or a column is missing or cannot be identified.
        MissingDependencyError: pyarrow, needed for Parquet, is not installed.
    """

    kind = "table"

    def __init__(
        self, file: Path, *, images: Path | None = None, fields: Fields | None = None, delimiter: str | None = None
    ) -> None:
        self.name = str(file)
        self.images = images or file.parent
        columns, rows = _open_table(file, fields or Fields(), delimiter)
        image, caption, tags = _choose_columns(file, columns, fields or Fields(), rows)
        groups: dict[str, int] = {}
        places: list[int] = []
        texts: list[Text] = []
        tag_texts: dict[int, str] = {}
        self._problems: dict[int, str] = {}
        for number, cells, wrong in rows:
            path = "" if cells is None else _text(cells.get(image))
            if not path:
                group = groups.setdefault(f"{file.name}:row {number}", len(groups))
                self._problems[group] = wrong or f"row {number} has no path in column {image!r}"
                places.append(group)
                texts.append("")
                continue
            assert cells is not None
            group = groups.setdefault(path, len(groups))
            try:
                found = _cell_captions(cells.get(caption), plural=caption.endswith("s")) or [""]
                given = parse_tags(cells.get(tags)) if tags is not None else None
            except BadPairError as error:
                found, given = [""], None
                self._problems.setdefault(group, f"row {number}: {error}")
            places += [group] * len(found)
            texts += [escaped(text) for text in found]
            if given is not None:
                known = json.loads(tag_texts[group]) if group in tag_texts else []
                tag_texts[group] = json.dumps(list(dict.fromkeys([*known, *given])))
        refuse_empty(len(groups), f"the table {str(file)!r}")
        self._keys = PackedTexts(groups)
        order = np.argsort(np.asarray(places), kind="stable")
        self._texts = PackedTexts(texts[index] for index in order)
        self._starts: NDArray[np.int64] = np.searchsorted(np.asarray(places)[order], np.arange(len(groups) + 1))
        self._tags = PackedTexts(tag_texts.get(group, "") for group in range(len(groups))) if tag_texts else None

    @property
    def summary(self) -> str:
        return f"table {self.name}: {len(self):,} images, {len(self._texts):,} captions"

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def read(self, index: int) -> RawPair:
        key = self._keys[index]
        captions = [self._texts.raw(row) for row in range(self._starts[index], self._starts[index + 1])]
        tags = None if self._tags is None else json.loads(self._tags.raw(index) or b"[]")
        problem = self._problems.get(index)
        return RawPair(key, self.images / key, captions, tags, problem)

    def caption_count(self, index: int) -> int:
        return int(self._starts[index + 1] - self._starts[index])

    def caption_counts(self) -> NDArray[np.int64]:
        return np.diff(self._starts)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    return value.strip() if isinstance(value, str) else ""


def _cell_captions(value: Any, *, plural: bool) -> list[Text]:
    if plural and isinstance(value, str) and value.lstrip().startswith("["):
        value = load_json_bytes(as_bytes(value))
    return parse_captions(value)


def _choose_columns(file: Path, columns: Sequence[str], fields: Fields, rows: _Rows) -> tuple[str, str, str | None]:
    lowered = {column.lower(): column for column in reversed(columns)}

    def choose(given: str | None, usual: Iterable[str], what: str) -> str | None:
        if given is not None:
            if given not in columns:
                raise InputError(f"{file.name}: {choices_sentence(f'column for {what}', given, columns)}")
            return given
        return next((lowered[name] for name in usual if name in lowered), None)

    image = choose(fields.image, IMAGE_NAMES, "images")
    caption = choose(fields.caption, CAPTION_NAMES, "captions")
    tags = choose(fields.tags, TAGS_NAMES, "tags")
    for found, what, option in ((image, "image paths", "image_column"), (caption, "captions", "caption_column")):
        if found is None:
            urls = next((column for column in columns if rows.looks_like_url(column)), None)
            if urls is not None and option == "image_column":
                raise InputError(
                    f"column {urls!r} of the table {str(file)!r} contains URLs, not image paths; download the images "
                    "first, for instance with img2dataset, and open the shards that it writes"
                )
            raise InputError(
                f"the table {str(file)!r} has no column with a usual name for {what} (columns: {listed(columns)}); "
                f"name it with {option}"
            )
    assert image is not None
    assert caption is not None
    if image == caption:
        raise InputError(f"{str(file)!r}: column {image!r} cannot be both image and caption; name the other column")
    if rows.looks_like_url(image):
        raise InputError(
            f"column {image!r} of the table {str(file)!r} contains URLs, not image paths; download the images first, "
            "for instance with img2dataset, and open the shards that it writes"
        )
    return image, caption, tags


class _Rows:
    """Rows of a table whose first rows are read ahead, to identify columns."""

    def __init__(self, rows: Iterator[Row], ahead: int = 20) -> None:
        self._rest = rows
        self._first = list(islice(rows, ahead))

    def __iter__(self) -> Iterator[Row]:
        yield from self._first
        yield from self._rest

    def looks_like_url(self, column: str) -> bool:
        values = [_text(cells.get(column)) for _, cells, _ in self._first if cells]
        return bool(values) and all(value.startswith(("http://", "https://")) for value in values if value)


def _open_table(file: Path, fields: Fields, delimiter: str | None) -> tuple[list[str], _Rows]:
    suffix = file.suffix.lower()
    try:
        if suffix in (".parquet", ".pq"):
            columns, rows = _parquet(file)
        elif suffix in (".jsonl", ".ndjson"):
            columns, rows = _json_lines(file)
        else:
            columns, rows = _delimited(file, fields, delimiter)
    except OSError as error:
        raise InputError(f"the table {str(file)!r} cannot be read: {error.strerror or one_sentence(error)}") from error
    return columns, _Rows(rows)


def _parquet(file: Path) -> tuple[list[str], Iterator[Row]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError(
            f"the Parquet table {str(file)!r} needs pyarrow; pip install 'ttd-plugins[data]'"
        ) from error
    try:
        table = pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise InputError(f"{str(file)!r} is not a Parquet table: {one_sentence(error)}") from error
    names = list(table.schema_arrow.names)
    embedded = next((name for name in names if name.lower() in IMAGE_NAMES and _has_images(table, name)), None)
    if embedded is not None:
        raise InputError(
            f"column {embedded!r} of {str(file)!r} contains images, not paths; open it with Hugging Face datasets: "
            f"'hf:parquet' with data_files={str(file)!r}"
        )

    def rows() -> Iterator[Row]:
        number = 0
        try:
            for batch in table.iter_batches(8192):
                values = {name: arrow_values(batch.column(name)) for name in names}
                for index in range(batch.num_rows):
                    number += 1
                    yield number, {name: column[index] for name, column in values.items()}, ""
        except pa.ArrowException as error:
            raise InputError(f"{str(file)!r} cannot be read after row {number}: {one_sentence(error)}") from error

    return names, rows()


def _has_images(table: Any, name: str) -> bool:
    import pyarrow as pa

    kind = table.schema_arrow.field(name).type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind))


def arrow_values(column: Any) -> list[Any]:
    """Return the values of an Arrow array; texts and lists of texts as bytes, since they may not be UTF-8."""
    import pyarrow as pa

    def is_text(kind: Any) -> bool:
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    kind = column.type
    if is_text(kind):
        return list(column.cast(pa.large_binary()).to_pylist())
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_text(kind.value_type):
        return list(column.cast(pa.large_list(pa.large_binary())).to_pylist())
    return list(column.to_pylist())


def _json_lines(file: Path) -> tuple[list[str], Iterator[Row]]:
    def rows() -> Iterator[Row]:
        with open(file, "rb") as stream:
            number = 0
            for line in stream:
                if not line.strip():
                    continue
                number += 1
                try:
                    record = load_json_bytes(line)
                except BadPairError as error:
                    yield number, None, f"row {number}: {error}"
                    continue
                if isinstance(record, dict):
                    yield number, record, ""
                else:
                    yield number, None, f"row {number} is not a JSON object"

    columns: dict[str, None] = {}
    for _, cells, _ in islice(rows(), 20):
        columns.update(dict.fromkeys(cells or ()))
    return list(columns), rows()


def _delimited(file: Path, fields: Fields, delimiter: str | None) -> tuple[list[str], Iterator[Row]]:
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as stream:
        first = stream.readline().rstrip("\r\n")
    if not first:
        raise InputError(f"the table {str(file)!r} is empty" + (" in its first line" if file.stat().st_size else ""))
    mark = delimiter or ("\t" if file.suffix.lower() == ".tsv" else max(",\t;|", key=first.count))
    header = next(_cells(iter([first]), mark, file))
    names = {name.lower() for name in (*IMAGE_NAMES, *CAPTION_NAMES, *TAGS_NAMES)}
    given = {name for name in (fields.image, fields.caption, fields.tags) if name is not None}
    paths = [number for number, cell in enumerate(header) if Path(cell.strip()).suffix.lower() in IMAGE_SUFFIXES]
    urls = [number for number, cell in enumerate(header) if cell.startswith(("http://", "https://"))]
    headed = bool(given & set(header) or {cell.strip().lower() for cell in header} & names)
    if not headed and len(header) == 2 and (paths or urls):
        # Two columns without a header, as in many caption lists: the one with an image's file name is the path.
        place = (paths or urls)[0]
        columns = ["caption", "caption"]
        columns[place] = "image"
    else:
        headed, columns = True, [cell.strip() for cell in header]

    def rows() -> Iterator[Row]:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            found = _cells(stream, mark, file)
            if headed:
                next(found)
            number = 0
            for cells in found:
                if not cells:
                    continue
                number += 1
                if len(cells) != len(columns):
                    yield number, None, f"row {number} has {len(cells)} columns; the table has {len(columns)}"
                else:
                    yield number, dict(zip(columns, cells, strict=True)), ""

    return columns, rows()


def _cells(lines: Iterator[str] | Any, mark: str, file: Path) -> Iterator[list[str]]:
    if mark == "\t":
        # Web captions contain stray quotes, and in TSV a quote rarely starts a cell of several lines.
        for line in lines:
            row = line.rstrip("\r\n")
            yield [_unquoted(cell) for cell in row.split("\t")] if row else []
        return
    csv.field_size_limit(1 << 30)
    reader = csv.reader(lines, delimiter=mark)
    try:
        yield from reader
    except csv.Error as error:
        raise InputError(f"{str(file)!r} cannot be read at line {reader.line_num}: {error}") from error


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell
