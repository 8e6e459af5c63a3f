"""Lists of class names: from one text, a file, a list of Python, or built in; each class may have aliases."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ttd_plugins.errors import InputError, InputWarning, listed, one_sentence, printable
from ttd_plugins.evaluation.datasets.class_lists import plain_text, read_class_list
from ttd_plugins.evaluation.datasets.reader import ClassNames, class_names
from ttd_plugins.utils.user_files import read_regular

BUILT_IN = ("voc", "context", "coco_object", "coco_panoptic", "coco_stuff", "ade20k", "cityscapes")
"""Lists that come with the package: the classes of labelled data sets, with the usual aliases."""
SUFFIXES = (".txt", ".csv", ".tsv", ".json")
MAX_BYTES = 32 << 20
MAX_CHARACTERS = 300
"""Longest name."""
_NAME_COLUMNS = {"name", "class", "label", "category"}
_NUMBERED = re.compile(r"\d{1,8}\s*:\s*\S")
_LABELMAP = re.compile(r"[^:]+:\s*\d{1,3}\s*,\s*\d{1,3}\s*,\s*\d{1,3}")
_ALIAS_KEYS = ("texts", "aliases", "synonyms")

Names = str | os.PathLike[str] | Sequence[Any] | Mapping[str, Any]


def read_vocabulary(names: Names) -> tuple[ClassNames, ...]:
    """Return the classes of a list of names.

    Accepted forms:

    - a text with commas, as ``"dog, grass, sky"``; ``|`` adds aliases, as ``"dog|puppy, grass"``;
    - a built-in list of :data:`BUILT_IN`;
    - a path. ``.txt``, ``.csv`` and ``.tsv`` have one class per line, then its aliases after commas, ``|`` or tabs;
      lines that start with ``#`` are comments; a file of one line is read as a text with commas. Lists with ids or
      colours are read too (:func:`~ttd_plugins.evaluation.datasets.class_lists.read_class_list`). ``.json`` has any
      form below;
    - a list of names, of lists of a name and its aliases, or of objects with ``name`` and ``aliases``;
    - a mapping from names to aliases, from numbers to names, or an object with such a list under ``classes`` or
      ``categories``.

    Underscores of names are spaces in their texts. A class that occurs twice is one class with the aliases of both. An
    alias of two classes raises a warning.

    Raises:
        InputError: there is no name, the file cannot be read, or an item has another form.
    """
    if isinstance(names, str | os.PathLike):
        text = os.fspath(names)
        if isinstance(names, os.PathLike) or _is_path(text):
            return _checked(_read_file(Path(text)), f"the file {text!r}")
        if text.strip() in BUILT_IN:
            return _in_plain_english(class_names(text.strip()))
        return parse_names(text)
    if isinstance(names, list | tuple) and names and all(isinstance(one, ClassNames) for one in names):
        return tuple(names)
    return _checked(_of_object(names, "the list of names"), "the list of names")


def parse_names(text: str) -> tuple[ClassNames, ...]:
    """Return the classes of a text with commas, as ``"dog|puppy, grass"``; no file is read.

    Raises:
        InputError: there is no name, or one is too long.
    """
    return _checked(_of_line(text), "the list of names")


def _in_plain_english(classes: tuple[ClassNames, ...]) -> tuple[ClassNames, ...]:
    """Name each class by its first text, as "mountain" instead of "mountain-merged", where that is unique."""
    count = Counter(one.texts[0] for one in classes)
    return tuple(replace(one, name=one.texts[0] if count[one.texts[0]] == 1 else one.name) for one in classes)


def _is_path(text: str) -> bool:
    if "\n" in text or len(text) > 4096:
        return False
    if Path(text.strip()).suffix.lower() in SUFFIXES and "," not in text:
        return True
    # "tv/monitor" is a name, unless such a file exists.
    return (os.sep in text or "/" in text) and os.path.exists(text)


def _of_line(text: str) -> list[list[str]]:
    return [item.split("|") for item in re.split(r"[,;\n]", text) if item.strip()]


def _read_file(path: Path) -> list[list[str]]:
    title = f"the file {str(path)!r}"
    data = read_regular(path, title, MAX_BYTES)
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{title} is not UTF-8 text ({one_sentence(error, 80)}); save it as UTF-8") from error
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{title} is not JSON ({one_sentence(error, 80)})") from error
        return _of_object(content, title)
    if _has_columns(path, text):
        return [[one.name, *one.texts[1:]] for one in read_class_list(path) if not one.ignored]
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if len(lines) == 1:
        return _of_line(lines[0])
    return [re.split(r"[,|\t;]", line) for line in lines]


def _has_columns(path: Path, text: str) -> bool:
    """Whether a file is a list of classes with ids or colours, as data sets have it."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if path.suffix.lower() in (".csv", ".tsv"):
        header = [cell.strip().strip('"').casefold() for cell in re.split(r"[,;\t]", lines[0])] if lines else []
        return bool(_NAME_COLUMNS & set(header)) and (len(header) > 1 or len(lines) > 1)
    return len(lines) > 1 and all(_NUMBERED.match(line) or _LABELMAP.match(line) for line in lines)


def _of_object(content: Any, title: str) -> list[list[str]]:
    if isinstance(content, Mapping):
        inner = next((content[key] for key in ("classes", "categories", "names") if key in content), None)
        if isinstance(inner, list | tuple | dict):
            return _of_object(inner, title)
        if content and all(str(key).isdecimal() for key in content):
            return _of_object(list(content.values()), title)
        return [[str(name), *_aliases(aliases, title)] for name, aliases in content.items()]
    if not isinstance(content, Iterable) or isinstance(content, str | bytes):
        raise InputError(f"{title} must be a list of names, not {type(content).__name__}")
    return [_of_item(item, title) for item in content]


def _of_item(item: Any, title: str) -> list[str]:
    if isinstance(item, ClassNames):
        return [item.name, *item.texts]
    if isinstance(item, str):
        return [item]
    if isinstance(item, Mapping) and isinstance(item.get("name"), str):
        return [item["name"], *(alias for key in _ALIAS_KEYS for alias in _aliases(item.get(key), title))]
    if isinstance(item, list | tuple) and item and all(isinstance(one, str) for one in item):
        return list(item)
    raise InputError(
        f"{title} contains {one_sentence(ValueError(repr(item)), 60)}, which is no name; an item is a name, a list "
        'of a name and its aliases, or an object with "name" and "aliases"'
    )


def _aliases(value: Any, title: str) -> list[str]:
    # A mapping from names to ids or colours has no aliases.
    if value is None or isinstance(value, int | float):
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list | tuple):
        return [one for one in value if isinstance(one, str)]
    raise InputError(f"{title} contains aliases that are no list of names: {one_sentence(ValueError(repr(value)), 60)}")


def _checked(items: Iterable[Sequence[str]], title: str) -> tuple[ClassNames, ...]:
    classes: dict[str, dict[str, None]] = {}
    for item in items:
        texts = [printable(text) for text in item]
        texts = [text for text in texts if text]
        if not texts:
            continue
        long = next((text for text in texts if len(text) > MAX_CHARACTERS), None)
        if long is not None:
            raise InputError(
                f"{title} contains a name of {len(long)} characters ({long[:40]!r}…); the limit is {MAX_CHARACTERS}"
            )
        if not plain_text(texts[0]):
            continue
        classes.setdefault(texts[0], {}).update(dict.fromkeys(filter(None, map(plain_text, texts))))
    if not classes:
        raise InputError(
            f'{title} contains no names; write some, as in "dog, grass, sky", or name one of the '
            f"built-in lists {listed(BUILT_IN)}"
        )
    owners: dict[str, str] = {}
    for name, aliases in classes.items():
        for text in aliases:
            other = owners.setdefault(text.casefold(), name)
            if other != name:
                warnings.warn(
                    f"{text!r} is a name of the classes {other!r} and {name!r}; the first of them wins",
                    InputWarning,
                    stacklevel=3,
                )
    return tuple(ClassNames(name, tuple(aliases)) for name, aliases in classes.items())
