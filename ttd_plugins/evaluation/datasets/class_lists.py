"""Lists of classes: files of names with aliases, ids and colours, and the lists of known data sets by name."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttd_plugins.data.caption_parsing import decode_text
from ttd_plugins.errors import InputError, listed, one_sentence
from ttd_plugins.evaluation.datasets.annotation_files import DatasetError
from ttd_plugins.evaluation.datasets.reader import ClassNames, class_names
from ttd_plugins.tags import fold
from ttd_plugins.utils.user_files import read_regular

Colour = tuple[int, int, int]

MAX_LIST_BYTES = 16 << 20
BACKGROUND = "background"
IGNORED_NAMES = frozenset({"ignore", "ignored", "void", "unlabeled", "unlabelled"})
"""Names of rows in a list of classes whose pixels have no label."""
LIST_FILES = ("classes.txt", "classes.csv", "classes.tsv", "classes.json", "labelmap.txt")
"""Names of a list of classes in the folder of a data set."""
BUILT_IN = {
    "voc": "voc",
    "voc20": "voc",
    "context60": "context",
    "context59": "context",
    "ade20k": "ade20k",
    "cityscapes": "cityscapes",
    "coco_stuff": "coco_stuff",
    "coco_object": "coco_object",
    "coco_things": "coco_object",
    "coco_panoptic": "coco_panoptic",
}
"""Lists by name. ``voc20``, ``context59`` and ``coco_things`` are ``voc``, ``context60`` and ``coco_object`` without
background."""
_WITHOUT_BACKGROUND = frozenset({"voc20", "context59", "coco_things"})

_NUMBERED = re.compile(r"(\d{1,8})\s*:\s*(.+)")
# CVAT's labelmap.txt: name:red,green,blue:parts:actions
_LABELMAP = re.compile(r"([^:]+):\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*(?::.*)?")
_HEX = re.compile(r"#?([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})")
_DECIMAL = re.compile(r"\(?\s*(\d{1,3})\s*[,;\s]\s*(\d{1,3})\s*[,;\s]\s*(\d{1,3})\s*\)?")
_COLUMNS = {
    "name": ("name", "class", "label", "category"),
    "id": ("id", "index", "value", "number"),
    "colour": ("colour", "color", "rgb", "hex"),
    "aliases": ("aliases", "alias", "synonyms", "texts", "prompts"),
    "sources": ("from", "sources", "source"),
}


@dataclass(frozen=True)
class ListedClass:
    """A row of a list of classes.

    Attributes:
        name: its name.
        texts: texts for prompt templates: the name in plain English, then the aliases.
        id: its id, or ``None`` if the list has colours or its order.
        colour: red, green and blue in 0 to 255, or ``None``.
        sources: names of the classes of another data set that it takes, besides those of its own texts.
    """

    name: str
    texts: tuple[str, ...]
    id: int | None = None
    colour: Colour | None = None
    sources: tuple[str, ...] = ()

    @property
    def ignored(self) -> bool:
        """Whether its pixels have no label."""
        return fold(self.name) in IGNORED_NAMES

    @property
    def names(self) -> ClassNames:
        """Name and texts for a data set."""
        return ClassNames(self.name, self.texts, self.id)


def plain_text(name: str) -> str:
    """Return a class name in plain English: ``"dining_table"`` becomes "dining table"."""
    return " ".join(name.replace("_", " ").split())


def listed_class(name: str, aliases: Sequence[str] = (), **more: Any) -> ListedClass:
    """Return a class with its name in plain English before its aliases, each text once."""
    texts = dict.fromkeys(text for text in map(plain_text, (name, *aliases)) if text)
    return ListedClass(name, tuple(texts), **more)


def open_classes(spec: str | os.PathLike[str]) -> tuple[ListedClass, ...]:
    """Open a list of classes.

    Args:
        spec: a name of :data:`BUILT_IN`, or a file; see :func:`read_class_list`.

    Raises:
        InputError: there is no list of that name and no such file.
        DatasetError: the file is not a list of classes.
    """
    text = os.fspath(spec)
    if text in BUILT_IN:
        names = class_names(BUILT_IN[text])
        names = names[1:] if text in _WITHOUT_BACKGROUND else names
        return tuple(ListedClass(item.name, item.texts, item.id) for item in names)
    if not os.path.exists(text):
        raise InputError(
            f"there is no list of classes {text!r}: neither a file nor one of the lists {listed(BUILT_IN)}"
        )
    return read_class_list(Path(text))


def read_class_list(file: Path) -> tuple[ListedClass, ...]:
    """Read a list of classes.

    The form is that of the file's suffix. ``.txt``: one class a line, ``name, alias, alias`` (``;``, ``|`` and tabs
    separate too), or ``id: name, alias``, or CVAT's ``name:red,green,blue::``; blank lines and lines that start with
    ``#`` are left out. ``.csv`` and ``.tsv``: a header with ``name`` and any of ``id``, ``colour``, ``aliases`` and
    ``from``. ``.json``: a list of objects with the same keys, or of names, or an object from names to ids.

    Raises:
        DatasetError: the file has another form, has no class, or names a class, an id or a colour twice.
    """
    title = f"the list of classes {str(file)!r}"
    try:
        text = decode_text(read_regular(file, title, MAX_LIST_BYTES))
    except UnicodeDecodeError as error:
        raise DatasetError(f"{title} is not UTF-8") from error
    except InputError as error:
        raise DatasetError(str(error)) from error
    suffix = file.suffix.lower()
    try:
        if suffix == ".json":
            found = _from_json(json.loads(text))
        elif suffix in (".csv", ".tsv"):
            found = _from_table(text, "\t" if suffix == ".tsv" else None)
        else:
            found = _from_lines(text)
    except (ValueError, RecursionError, csv.Error) as error:
        raise DatasetError(f"{title} cannot be read: {one_sentence(error)}") from error
    _check(title, found)
    return tuple(found)


def _check(title: str, classes: Sequence[ListedClass]) -> None:
    if not any(not item.ignored for item in classes):
        raise DatasetError(f"{title} has no class")
    for what, values in (
        ("name", [fold(item.name) for item in classes if not item.ignored]),
        ("id", [item.id for item in classes if item.id is not None]),
        ("colour", [item.colour for item in classes if item.colour is not None]),
    ):
        twice = next((value for value in values if values.count(value) > 1), None)  # type: ignore[arg-type]
        if twice is not None:
            raise DatasetError(f"{title} has the {what} {twice!r} twice")


def _from_lines(text: str) -> list[ListedClass]:
    found = []
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    numbered = bool(lines) and all(_NUMBERED.fullmatch(line) for line in lines)
    for line in lines:
        coloured = _LABELMAP.fullmatch(line)
        if coloured is not None:
            name, *channels = coloured.groups()
            found.append(listed_class(name.strip(), colour=_colour(",".join(channels))))
            continue
        number = None
        if numbered:
            match = _NUMBERED.fullmatch(line)
            assert match is not None
            number, line = int(match[1]), match[2]
        name, *aliases = (part.strip() for part in re.split(r"[,;|\t]", line))
        if not name:
            raise ValueError(f"the line {line!r} has no name")
        found.append(listed_class(name, aliases, id=number))
    return found


def _from_table(text: str, delimiter: str | None) -> list[ListedClass]:
    rows = list(csv.reader(io.StringIO(text), delimiter=delimiter or _delimiter(text)))
    rows = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
    if not rows:
        raise ValueError("it is empty")
    header = [cell.lower() for cell in rows[0]]
    if not set(header) & set(_COLUMNS["name"]):
        raise ValueError(f"its header has no column name (columns: {', '.join(rows[0])})")
    for number, row in enumerate(rows[1:], 2):
        if len(row) > len(header):
            raise ValueError(f"row {number} has {len(row)} cells, and the header {len(header)}")
    return [_from_record(dict(zip(header, row, strict=False)), number) for number, row in enumerate(rows[1:], 2)]


def _delimiter(text: str) -> str:
    first = text.lstrip().splitlines()[0] if text.strip() else ""
    return max(",;\t", key=first.count)


def _from_json(content: Any) -> list[ListedClass]:
    if isinstance(content, Mapping) and isinstance(content.get("categories"), list):
        content = content["categories"]
    if isinstance(content, Mapping):
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in content.values()):
            raise ValueError("an object of classes maps names to ids")
        content = [{"name": name, "id": value} for name, value in content.items()]
    if not isinstance(content, list):
        raise ValueError("it is not a list of classes")
    found = []
    for number, item in enumerate(content, 1):
        if isinstance(item, str):
            item = {"name": item}
        if not isinstance(item, Mapping):
            raise ValueError(f"item {number} is neither a name nor an object")
        found.append(_from_record({str(key).lower(): value for key, value in item.items()}, number))
    return found


def _from_record(record: Mapping[str, Any], number: int) -> ListedClass:
    def value(field: str) -> Any:
        return next((record[key] for key in _COLUMNS[field] if record.get(key) not in (None, "")), None)

    name = value("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"row {number} has no name")
    given = value("id")
    try:
        index = None if given is None else int(str(given))
    except ValueError:
        raise ValueError(f"the id {given!r} of the class {name!r} is not a whole number") from None
    if index is not None and index < 0:
        raise ValueError(f"the id {index} of the class {name!r} is negative")
    colour = value("colour")
    return listed_class(
        name.strip(),
        _several(value("aliases")),
        id=index,
        colour=None if colour is None else _colour(colour, name),
        sources=tuple(_several(value("sources"))),
    )


def _several(value: Any) -> list[str]:
    """Return a list of texts, or a text with ``;`` or ``|`` between them."""
    if value is None:
        return []
    if isinstance(value, str):
        value = re.split(r"[;|]", value)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{value!r} is neither a text nor a list of texts")
    return [item.strip() for item in value if item.strip()]


def _colour(value: Any, name: str = "") -> Colour:
    if isinstance(value, str):
        text = value.strip()
        match, base = (_HEX.fullmatch(text), 16) if _HEX.fullmatch(text) else (_DECIMAL.fullmatch(text), 10)
        value = [int(part, base) for part in match.groups()] if match else None
    if (
        not isinstance(value, list | tuple)
        or len(value) != 3
        or not all(isinstance(part, int) and not isinstance(part, bool) and 0 <= part <= 255 for part in value)
    ):
        raise ValueError(
            f"the colour of the class {name!r} is not a colour; write #rrggbb, or red, green and blue from 0 to 255"
        )
    return (value[0], value[1], value[2])


def assign_sources(classes: Sequence[ListedClass], sources: Sequence[str]) -> dict[int, int]:
    """Return the index in ``classes`` of each class of a data set that one of them takes.

    A class takes those that its ``sources`` name, or else those whose name is its own name or one of its texts. A class
    of the data set goes to the first that takes it, ``sources`` and equal names before texts.

    Args:
        classes: the list.
        sources: names of the data set's classes.

    Raises:
        InputError: a class of the list names a source that the data set does not have.
    """
    known = {fold(name): place for place, name in enumerate(sources)}
    found: dict[int, int] = {}
    for index, item in enumerate(classes):
        for name in item.sources:
            if fold(name) not in known:
                raise InputError(
                    f"the class {item.name!r} of the list takes {name!r}, which is no class of the data set"
                )
            found.setdefault(known[fold(name)], index)
    for exact in (True, False):
        for index, item in enumerate(classes):
            for name in (item.name,) if exact else item.texts:
                if fold(name) in known and not item.sources:
                    found.setdefault(known[fold(name)], index)
    return found
