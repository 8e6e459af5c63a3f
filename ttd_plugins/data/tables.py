"""Tables of paths and captions: CSV, TSV, JSON lines, JSON lists and Parquet."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
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
    encoding_of,
    escaped,
    is_missing,
    load_json_bytes,
    parse_captions,
    parse_tags,
)
from ttd_plugins.data.delimited_text import open_delimited
from ttd_plugins.data.image_paths import find_image_folder, is_image_name, with_slashes, without_number
from ttd_plugins.data.pair_source import MapSource, RawPair, TextArray, refuse_empty
from ttd_plugins.errors import InputError, MissingDependencyError, choices_sentence, listed, one_sentence
from ttd_plugins.utils.user_files import open_regular

TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".txt", ".token", ".parquet", ".pq", ".jsonl", ".ndjson"})
Row = tuple[int, dict[str, Any] | None, str]
"""Row number (from 1, without the header), cells by column or ``None``, and the problem if there are no cells."""
Table = tuple[list[str], Iterator[Row]]
"""Names of columns, and rows."""


class TablePairs(MapSource):
    """Rows with a path and a caption; rows with the same path are one image with several captions.

    Paths are relative to ``images``, by default the table's folder, or else a folder near it that contains the images;
    ``\\`` in a path is a ``/``. A caption may be a list, written as JSON in CSV and TSV, or a conversation. Ready-made
    tags are lists, or texts with ``|``, ``;`` or ``,`` between tags. Rows that are broken or have no path are listed as
    skipped, with their numbers.

    Args:
        file: the table.
        images: the folder of relative paths.
        fields: names of the columns.
        delimiter: the delimiter of CSV; by default it is detected.
        table: columns and rows, if the file was read already.

    Raises:
        InputError: the table cannot be read or is empty, or a column is missing or cannot be identified.
        MissingDependencyError: pyarrow, needed for Parquet, is not installed.
    """

    kind = "table"

    def __init__(
        self,
        file: Path,
        *,
        images: Path | None = None,
        fields: Fields | None = None,
        delimiter: str | None = None,
        table: Table | None = None,
    ) -> None:
        self.name = str(file)
        columns, ahead = open_table(file, fields or Fields(), delimiter, table)
        image, caption, tags = _choose_columns(file, columns, fields or Fields(), ahead)
        self.images = images or folder_of_images(file, ahead.paths(image))
        groups: dict[str, int] = {}
        places: list[int] = []
        texts: list[Text] = []
        tag_texts: dict[int, str] = {}
        self._problems: dict[int, str] = {}
        for number, cells, wrong in ahead:
            path = "" if cells is None else image_path_of(cells.get(image))
            if not path:
                group = groups.setdefault(f"{file.name}:row {number}", len(groups))
                self._problems[group] = wrong or f"row {number} has no path in column {image!r}"
                places.append(group)
                texts.append("")
                continue
            assert cells is not None
            group = groups.setdefault(with_slashes(self.images, path), len(groups))
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
        self._keys = TextArray(groups)
        order = np.argsort(np.asarray(places), kind="stable")
        self._texts = TextArray(texts[index] for index in order)
        self._starts: NDArray[np.int64] = np.searchsorted(np.asarray(places)[order], np.arange(len(groups) + 1))
        self._tags = TextArray(tag_texts.get(group, "") for group in range(len(groups))) if tag_texts else None

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


def image_path_of(value: Any) -> str:
    """Return the path of an image in a cell; empty if there is none."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    return without_number(value.strip()) if isinstance(value, str) and not is_missing(value) else ""


def _cell_captions(value: Any, *, plural: bool) -> list[Text]:
    if plural and isinstance(value, str) and value.lstrip().startswith("["):
        value = load_json_bytes(as_bytes(value))
    return parse_captions(value)


def _choose_columns(file: Path, columns: Sequence[str], fields: Fields, rows: TableRows) -> tuple[str, str, str | None]:
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


class TableRows:
    """Rows of a table whose first rows are read ahead, to identify columns."""

    def __init__(self, rows: Iterator[Row], ahead: int = 20) -> None:
        self._rest = rows
        self._first = list(islice(rows, ahead))

    def __iter__(self) -> Iterator[Row]:
        yield from self._first
        yield from self._rest

    def paths(self, column: str) -> list[str]:
        """Return the paths in the first rows."""
        return [path for _, cells, _ in self._first if cells and (path := image_path_of(cells.get(column)))]

    def looks_like_url(self, column: str) -> bool:
        values = self.paths(column)
        return bool(values) and all(value.startswith(("http://", "https://")) for value in values)


def folder_of_images(file: Path, paths: Sequence[str]) -> Path:
    """Return the folder of a table's relative paths: its own, or the one near it that contains the images."""
    if any(os.path.isfile(file.parent / path) for path in paths):
        return file.parent
    found, _ = find_image_folder(file, paths)
    return found or file.parent


def open_table(file: Path, fields: Fields, delimiter: str | None, table: Table | None) -> tuple[list[str], TableRows]:
    """Return the columns of a table and its rows, in any of :data:`TABLE_SUFFIXES`.

    Raises:
        InputError: the table cannot be read or is empty.
        MissingDependencyError: pyarrow, needed for Parquet, is not installed.
    """
    suffix = file.suffix.lower()
    if table is not None:
        columns, rows = table
    elif suffix in (".parquet", ".pq"):
        columns, rows = _parquet(file)
    elif suffix in (".jsonl", ".ndjson"):
        columns, rows = _json_lines(file)
    else:
        columns, rows = _delimited(file, fields, delimiter)
    return columns, TableRows(rows)


def _parquet(file: Path) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError(
            f"the Parquet table {str(file)!r} needs pyarrow; pip install 'ttd-plugins[data]'"
        ) from error
    # pyarrow takes no path that is not UTF-8.
    stream = open_regular(file, f"the table {str(file)!r}")
    try:
        table = pq.ParquetFile(stream)
    # Thrift and Arrow raise exceptions of several types for a broken file.
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{str(file)!r} is not a Parquet table: {one_sentence(error)}") from error
    names = list(table.schema_arrow.names)
    embedded = next((name for name in names if name.lower() in IMAGE_NAMES and _has_images(table, name)), None)
    if embedded is not None:
        raise InputError(
            f"column {embedded!r} of {str(file)!r} contains images, not paths; open it with Hugging Face datasets: the "
            f"source 'hf:parquet' with the option data_files={str(file)!r}"
        )

    def rows() -> Iterator[Row]:
        number = 0
        try:
            for batch in table.iter_batches(8192):
                values = {name: arrow_values(batch.column(name)) for name in names}
                for index in range(batch.num_rows):
                    number += 1
                    yield number, {name: column[index] for name, column in values.items()}, ""
        except (pa.ArrowException, OSError, ValueError) as error:
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


def json_records(records: Iterable[Any], problems: Mapping[int, str] | None = None) -> Table:
    """Return JSON objects as a table.

    Args:
        records: the objects; anything else is a row with a problem.
        problems: problems of records by their row number, from 1.
    """
    first, rest = _ahead(iter(records), 20)
    columns: dict[str, None] = {}
    for record in first:
        columns.update(dict.fromkeys(record if isinstance(record, dict) else ()))

    def rows() -> Iterator[Row]:
        for number, record in enumerate(chain(first, rest), 1):
            problem = (problems or {}).get(number)
            if isinstance(record, dict) and problem is None:
                yield number, record, ""
            else:
                yield number, None, problem or f"row {number} is not a JSON object"

    return list(columns), rows()


def _ahead(items: Iterator[Any], count: int) -> tuple[list[Any], Iterator[Any]]:
    return list(islice(items, count)), items


def _json_lines(file: Path) -> Table:
    problems: dict[int, str] = {}

    def records() -> Iterator[Any]:
        with open_regular(file, f"the table {str(file)!r}") as binary:
            encoding, start = encoding_of(binary.read(4))
            binary.seek(start)
            # Lines of UTF-16 cannot be split as bytes.
            lines = binary if encoding == "utf-8" else io.TextIOWrapper(binary, encoding, "replace", newline="\n")
            number = 0
            for line in lines:
                if not line.strip():
                    continue
                number += 1
                try:
                    yield load_json_bytes(line if isinstance(line, bytes) else line.encode())
                except BadPairError as error:
                    problems[number] = f"row {number}: {error}"
                    yield None

    return json_records(records(), problems)


def _delimited(file: Path, fields: Fields, delimiter: str | None) -> Table:
    names = {name.lower() for name in (*IMAGE_NAMES, *CAPTION_NAMES, *TAGS_NAMES)}
    given = {name for name in (fields.image, fields.caption, fields.tags) if name is not None}

    def tells(cell: str) -> bool:
        cell = cell.strip()
        return cell in given or cell.lower() in names or is_image_name(cell)

    text = open_delimited(file, delimiter, tells)
    header = [cell.strip() for cell in text.first]
    paths = [number for number, cell in enumerate(header) if is_image_name(cell)]
    urls = [number for number, cell in enumerate(header) if cell.startswith(("http://", "https://"))]
    headed = bool(given & set(header) or {cell.lower() for cell in header} & names)
    if not headed and len(header) == 2 and (paths or urls):
        # Two columns without a header, as in many caption lists: the one with an image's file name is the path.
        place = (paths or urls)[0]
        columns = ["caption", "caption"]
        columns[place] = "image"
    else:
        headed, columns = True, header

    def is_row(cells: list[str]) -> bool:
        return len(cells) == len(columns) and any(map(is_image_name, cells))

    def rows() -> Iterator[Row]:
        lines = text.lines(is_row)
        if headed:
            next(lines, None)
        for number, line in enumerate(lines, 1):
            if line.problem:
                yield number, None, f"row {number}: {line.problem}"
            elif len(line.cells) != len(columns):
                yield (
                    number,
                    None,
                    (f"row {number} has {len(line.cells)} columns; the table has {len(columns)}"),
                )
            else:
                yield number, dict(zip(columns, line.cells, strict=True)), ""

    return columns, rows()
