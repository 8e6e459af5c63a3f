"""A table of labels of one's own: ``image, label;label`` in CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.data.caption_parsing import IMAGE_NAMES, TAGS_NAMES, BadPairError, Fields, as_bytes, parse_tags
from ttd_plugins.data.image_paths import with_slashes
from ttd_plugins.data.tables import TABLE_SUFFIXES, folder_of_images, image_path_of, open_table
from ttd_plugins.errors import InputError, choices_sentence, listed
from ttd_plugins.evaluation.datasets.annotation_files import DatasetError, unique_keys
from ttd_plugins.evaluation.datasets.class_lists import BACKGROUND, ListedClass, listed_class, open_classes
from ttd_plugins.evaluation.datasets.image_labels import StoredLabels
from ttd_plugins.evaluation.datasets.reader import UNKNOWN
from ttd_plugins.tags import distinct, fold

LABEL_NAMES = (
    *("labels", "label", "classes", "class", "categories", "category", "concepts", "objects"),
    *TAGS_NAMES,
)
SPLIT_NAMES = ("split", "split_name", "subset", "partition")
FILE_NAMES = tuple(f"labels{suffix}" for suffix in (".csv", ".tsv", ".jsonl", ".parquet"))
_VALUES = {"1": 1, "1.0": 1, "true": 1, "yes": 1, "0": 0, "0.0": 0, "false": 0, "no": 0, "": UNKNOWN}
"""Cells of a column of one class; an empty one is unknown."""


class LabelTable(StoredLabels):
    """A table with a column of image paths and one of labels; rows of one image are joined.

    Labels in a cell are separated by ``;``, ``|`` or ``,``, or are a list in JSON or Python; an empty cell means that
    the image shows no class. Without a column of labels, every other column is a class with cells 0 and 1, and empty
    cells are unknown. Columns are found by their usual names, or named.

    The classes are those of ``class_list``, or else all labels of the table in alphabetical order. Labels are compared
    without regard to case; with a list they may also be aliases or ids.

    Args:
        root: the table; or a folder with ``labels.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``.
        split: value of the column ``split``, if the table has one; ``"all"`` takes all rows.
        limit: number of images, from the start; by default all.
        class_list: list of classes: a file, or the name of a known list.
        images: folder of relative paths; by default the table's folder, or the one near it that has the images.
        image_column, label_column: names of the columns.
        skip_missing: whether to leave out images that are missing, and count them.

    Raises:
        DatasetError: the table has another form, a label is not in the list of classes, or images are missing.
        InputError: a column or the folder of images does not exist, or the table has several splits and none is named.
        MissingDependencyError: pyarrow, needed for Parquet, is not installed.
    """

    name = "table"

    def __init__(
        self,
        root: Path | str,
        split: str | None = None,
        limit: int | None = None,
        *,
        class_list: str | os.PathLike[str] | None = None,
        images: Path | str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        skip_missing: bool = False,
    ) -> None:
        if limit is not None and limit < 1:
            raise InputError(f"limit must be at least 1, not {limit}")
        self.root, self.split, self.limit = _table_of(Path(root)), split, limit
        columns, rows = open_table(self.root, Fields(image_column, label_column), None, None)
        image, label, split_column = self._columns(columns, image_column, label_column)
        found: dict[str, dict[str, int]] = {}
        spellings: list[str] = []
        splits: dict[str, None] = {}
        self._labels_of = self._cell_labels(label, [name for name in columns if name not in (image, split_column)])
        for number, cells, problem in rows:
            path = "" if cells is None else image_path_of(cells.get(image))
            if cells is None or not path:
                raise DatasetError(
                    f"the table {str(self.root)!r} is wrong: {problem or f'row {number} has no path in {image!r}'}"
                )
            if split_column is not None:
                own = _text(cells.get(split_column))
                splits[own] = None
                if split not in (None, "all", own):
                    continue
            labels = self._labels_of(cells, number)
            spellings += labels
            shown = found.setdefault(path, {})
            for name, value in labels.items():
                shown[fold(name)] = max(shown.get(fold(name), UNKNOWN), value)
        self._check_split(split_column, splits)
        if not found:
            raise DatasetError(f"the table {str(self.root)!r} has no rows" + (f" of the split {split!r}" * bool(split)))
        if images is not None and not os.path.isdir(images):
            raise InputError(f"the folder of images {os.fspath(images)!r} does not exist")
        self.images = Path(images) if images is not None else folder_of_images(self.root, list(found)[:50])
        listed_classes = self._classes(class_list, spellings)
        self.classes = tuple(item.names for item in listed_classes)
        self._keep(found, self._indices(listed_classes, known=class_list is not None), skip_missing)

    def _keep(self, found: Mapping[str, Mapping[str, int]], index: Callable[[str], int], skip_missing: bool) -> None:
        """Store files and labels of the images."""
        # Keys do not depend on the limit, so that results of a part belong to results of the whole.
        keys = unique_keys(list(found))
        files: dict[str, Path] = {}
        rows: list[NDArray[np.int8]] = []
        self.missing = 0
        for key, (path, labels) in zip(keys, found.items(), strict=True):
            file = self.images / with_slashes(self.images, path)
            if skip_missing and not os.path.isfile(file):
                self.missing += 1
                continue
            row = np.zeros(len(self.classes), np.int8)
            for name, value in labels.items():
                place = index(name)
                both = (int(row[place]), value)
                row[place] = 1 if 1 in both else UNKNOWN if UNKNOWN in both else 0
            files[key] = file
            rows.append(row)
            if len(files) == self.limit:
                break
        if not files:
            raise DatasetError(f"none of the {self.missing} images of the table {str(self.root)!r} exists")
        self._store(files, np.stack(rows))

    def _columns(
        self, columns: Sequence[str], image: str | None, label: str | None
    ) -> tuple[str, str | None, str | None]:
        """Return the columns of images, labels and splits."""
        lowered = {column.lower(): column for column in reversed(columns)}

        def choose(given: str | None, usual: Sequence[str], what: str) -> str | None:
            if given is not None and given not in columns:
                raise InputError(f"{self.root.name}: {choices_sentence(f'column for {what}', given, columns)}")
            return given or next((lowered[name] for name in usual if name in lowered), None)

        found = choose(image, IMAGE_NAMES, "images")
        if found is None:
            raise DatasetError(
                f"the table {str(self.root)!r} has no column with a usual name for image paths (columns: "
                f"{listed(columns)}); name it with image_column (--image-column)"
            )
        # A table of two columns without a header has the second one under the name of captions.
        headerless = ("caption",) if set(columns) == {"image", "caption"} else ()
        labels = choose(label, (*LABEL_NAMES, *headerless), "labels")
        return found, labels, choose(None, SPLIT_NAMES, "splits")

    def _cell_labels(
        self, label: str | None, others: Sequence[str]
    ) -> Callable[[Mapping[str, Any], int], dict[str, int]]:
        """Return the function from the cells of a row, and its number, to its labels and their values."""
        if label is not None:

            def from_cell(cells: Mapping[str, Any], number: int) -> dict[str, int]:
                try:
                    return dict.fromkeys(_several(cells.get(label)), 1)
                except BadPairError as error:
                    raise DatasetError(f"row {number} of the table {str(self.root)!r}: {error}") from error

            return from_cell
        if not others:
            raise DatasetError(
                f"the table {str(self.root)!r} has no column of labels; add one, such as labels, with ; between them"
            )

        def from_columns(cells: Mapping[str, Any], number: int) -> dict[str, int]:
            values = {}
            for name in others:
                text = _text(cells.get(name)).lower()
                if text not in _VALUES:
                    raise DatasetError(
                        f"the table {str(self.root)!r} has no column with a usual name for labels, and the cell "
                        f"{text!r} of the column {name!r} in row {number} is neither 0 nor 1; name the column of "
                        "labels with label_column (--label-column)"
                    )
                values[name] = _VALUES[text]
            return values

        return from_columns

    def _check_split(self, column: str | None, splits: Mapping[str, None]) -> None:
        if self.split is not None and column is None and self.split != "all":
            raise InputError(f"the table {str(self.root)!r} has no column of splits, so that split cannot select rows")
        if self.split is None and len(splits) > 1:
            raise InputError(
                f"the table {str(self.root)!r} has the splits {listed(splits)}; choose one with split (--split), or all"
            )
        if self.split not in (None, "all") and self.split not in splits:
            raise InputError(choices_sentence("split", str(self.split), splits))

    def _classes(self, class_list: str | os.PathLike[str] | None, spellings: Sequence[str]) -> list[ListedClass]:
        if class_list is not None:
            kept = [item for item in open_classes(class_list) if not item.ignored and fold(item.name) != BACKGROUND]
            if kept:
                return kept
        names = sorted(distinct(spellings), key=fold)
        if not names:
            raise DatasetError(f"the table {str(self.root)!r} has no label in any row")
        return [listed_class(name) for name in names]

    def _indices(self, classes: Sequence[ListedClass], *, known: bool) -> Callable[[str], int]:
        """Return the function from a label to its class index."""
        places: dict[str, int] = {fold(item.name): place for place, item in enumerate(classes)}
        if known:
            for place, item in enumerate(classes):
                for text in item.texts:
                    places.setdefault(fold(text), place)
            for place, item in enumerate(classes):
                places.setdefault(str(place if item.id is None else item.id), place)

        def index(label: str) -> int:
            if label not in places:
                raise DatasetError(
                    f"the table {str(self.root)!r} has the label {label!r}, which is not in the list of classes"
                )
            return places[label]

        return index

    def describe(self) -> dict[str, Any]:
        more = {"split": self.split, "limit": self.limit, "missing": self.missing}
        return super().describe() | more | {"images_folder": str(self.images)}


def _table_of(path: Path) -> Path:
    """Return the table in a folder, or the table itself.

    Raises:
        DatasetError: there is none.
    """
    if not path.is_dir():
        if not os.path.exists(path):
            raise DatasetError(f"the table {str(path)!r} does not exist")
        if path.suffix.lower() not in TABLE_SUFFIXES:
            raise DatasetError(f"the file {str(path)!r} is no table; supported: {', '.join(sorted(TABLE_SUFFIXES))}")
        return path
    found = [path / name for name in FILE_NAMES if os.path.isfile(path / name)]
    if len(found) != 1:
        raise DatasetError(
            f"the folder {str(path)!r} must have one table of labels, and has {len(found)}; looked for "
            f"{', '.join(FILE_NAMES)}"
        )
    return found[0]


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return "" if value is None else str(value).strip()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _several(value: Any) -> list[str]:
    """Return the labels of a cell.

    Raises:
        BadPairError: the cell has no labels.
    """
    if isinstance(value, str | bytes):
        text = (
            as_bytes(value).decode("utf-8", "replace") if isinstance(value, str) else value.decode("utf-8", "replace")
        )
        if text.lstrip().startswith("["):
            try:
                # A literal is parsed and never run.
                value = ast.literal_eval(text.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                value = text
        else:
            value = text
    elif _is_number(value):
        value = str(value)
    if isinstance(value, list | tuple):
        value = [str(item) if _is_number(item) else item for item in value]
    return parse_tags(value) or []
