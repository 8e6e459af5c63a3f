"""Delimited text (CSV, TSV and their relatives), read so that one broken line costs one row.

A quote that is never closed would let a CSV reader swallow the rows after it. Here a broken row is reported with its
line, and reading goes on with the next line.
"""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ttd_plugins.data.caption_parsing import encoding_of
from ttd_plugins.errors import InputError
from ttd_plugins.utils.user_files import open_regular

MAX_ROW_LINES = 1000
"""Lines of the longest row; a quote that stays open for longer counts as not closed."""
_MARKS = "\t|;,"
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?', re.IGNORECASE)


@dataclass(frozen=True)
class Line:
    """A row: the number of its first line in the file, and its cells, or what is wrong with it."""

    number: int
    cells: list[str]
    problem: str = ""


@dataclass(frozen=True)
class DelimitedText:
    """A text file of rows.

    Attributes:
        file: the file.
        mark: the delimiter.
        encoding: the encoding.
        start: number of lines before the first row (Excel's ``sep=`` line).
        first: cells of the first row.
    """

    file: Path
    mark: str
    encoding: str
    start: int
    first: list[str]

    def lines(self, is_row: Callable[[list[str]], bool]) -> Iterator[Line]:
        """Yield all rows, the first one included, without blank ones.

        Args:
            is_row: whether cells look like a complete row of this table. A cell that contains such a line has swallowed
                it, and its quote is not closed.
        """
        with _opened(self.file, self.encoding) as stream:
            source = enumerate(stream, 1)
            for _ in range(self.start):
                next(source)
            if self.mark == "\t":
                yield from _tab_rows(source)
            else:
                yield from _quoted_rows(source, self.mark, is_row)


def open_delimited(file: Path, delimiter: str | None, score: Callable[[str], bool]) -> DelimitedText:
    """Find the encoding and the delimiter of a text file.

    Args:
        file: the file.
        delimiter: the delimiter, if it is known.
        score: whether a cell of the first row is a known column name or the path of an image, which shows that the
            delimiter is right.

    Raises:
        InputError: the file cannot be read, is empty, or is UTF-16 without a byte order mark.
    """
    with open_regular(file, f"the table {str(file)!r}") as stream:
        head = stream.read(4)
    encoding, _ = encoding_of(head)
    if encoding == "utf-8" and b"\0" in head:
        raise InputError(
            f"the table {str(file)!r} contains NUL characters; if it is UTF-16, save it as UTF-8 or with a byte order "
            "mark"
        )
    with _opened(file, encoding) as text:
        first = text.readline().rstrip("\r\n")
        start = 0
        separator = _SEPARATOR_LINE.fullmatch(first.strip(" "))
        if separator:
            first, start = text.readline().rstrip("\r\n"), 1
            delimiter = delimiter or separator[1]
    if not first.strip():
        raise InputError(f"the table {str(file)!r} is empty" + (" in its first line" if file.stat().st_size else ""))
    if delimiter is None and file.suffix.lower() == ".tsv":
        delimiter = "\t"
    marks = delimiter or max(
        _MARKS, key=lambda mark: (sum(map(score, _cells(first, mark))) if mark in first else 0, first.count(mark))
    )
    return DelimitedText(file, marks, encoding, start, _cells(first, marks))


def _opened(file: Path, encoding: str) -> IO[str]:
    binary = open_regular(file, f"the table {str(file)!r}")
    mark = encoding_of(binary.read(4))[1]
    binary.seek(mark)
    errors = "surrogateescape" if encoding == "utf-8" else "replace"
    return io.TextIOWrapper(binary, encoding, errors, newline="")


def _cells(line: str, mark: str) -> list[str]:
    if mark == "\t":
        return [_unquoted(cell) for cell in line.split("\t")]
    try:
        return next(csv.reader([line], delimiter=mark), [])
    except csv.Error:
        return line.split(mark)


def _tab_rows(lines: Iterator[tuple[int, str]]) -> Iterator[Line]:
    # Web captions contain stray quotes, and in TSV a quote rarely starts a cell of several lines.
    for number, line in lines:
        row = line.rstrip("\r\n")
        if row:
            yield Line(number, [_unquoted(cell) for cell in row.split("\t")])


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


def _quoted_rows(lines: Iterator[tuple[int, str]], mark: str, is_row: Callable[[list[str]], bool]) -> Iterator[Line]:
    # The limit is one of the process; captions and lists of captions in a cell may be longer than 128 KiB.
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))
    waiting: deque[tuple[int, str]] = deque()
    while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
        number, text = line
        if '"' not in text:
            row = text.rstrip("\r\n")
            if row:
                yield Line(number, row.split(mark))
            continue
        taken: list[tuple[int, str]] = []

        def row_lines(first: str = text, taken: list[tuple[int, str]] = taken) -> Iterator[str]:
            yield first
            # The reader asks for another line only while a quote is open.
            while len(taken) < MAX_ROW_LINES and (more := waiting.popleft() if waiting else next(lines, None)):
                taken.append(more)
                if is_row(_cells(more[1].rstrip("\r\n"), mark)):
                    break
                yield more[1]
            raise _NotClosedError

        try:
            cells = next(csv.reader(row_lines(), delimiter=mark))
            if taken:
                cells = next(csv.reader([text, *(line for _, line in taken)], delimiter=mark, strict=True))
            yield Line(number, cells)
            continue
        except _NotClosedError:
            problem = f"the quote that opens in line {number} is not closed"
        except csv.Error as error:
            problem = f"the quotes of line {number} are wrong ({error})"
        # Whatever follows the first line may be sound.
        waiting.extendleft(reversed(taken))
        yield Line(number, [], problem)


class _NotClosedError(Exception):
    """A quote is still open where it should be closed."""
