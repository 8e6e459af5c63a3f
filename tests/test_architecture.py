"""docs/architecture.md: the drawing is that of the import test, and every path and name on the page exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from layers import drawing

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def path_rows() -> list[tuple[Path, list[str]]]:
    """Rows of the table that follows a batch: a file, and the names that it defines."""
    rows = re.findall(r"^\| \d+ \| `([^`]+)` \| (.+?) \|", TEXT, re.MULTILINE)
    return [(ROOT / file, re.findall(r"`([^`]+)`", names)) for file, names in rows]


def defined_names(file: Path) -> set[str]:
    """Names of classes, functions and methods (``Class.method``) that a file defines."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def test_the_drawing_is_that_of_the_import_test() -> None:
    match = re.search(r"<!-- layers -->\n```text\n(.*?)```\n<!-- end -->", TEXT, re.DOTALL)
    assert match is not None
    assert match[1] == drawing(), f"draw these layers:\n{drawing()}"


def test_the_path_of_a_batch_is_long_enough_to_be_read() -> None:
    rows = path_rows()
    assert len(rows) >= 12
    assert rows[0][0].parent.name == "cli" and rows[-1][0].name == "losses.py"


@pytest.mark.parametrize(
    ("file", "names"), path_rows(), ids=lambda value: value.name if isinstance(value, Path) else ""
)
def test_a_file_on_the_path_defines_the_names(file: Path, names: list[str]) -> None:
    assert file.is_file(), f"{file.relative_to(ROOT)} does not exist"
    assert names and set(names) <= defined_names(file)


def test_every_linked_or_quoted_path_exists() -> None:
    paths = [ROOT / "docs" / link for link in re.findall(r"\]\(([^)#:]+)\)", TEXT)]
    paths += [ROOT / quoted for quoted in re.findall(r"`((?:ttd_plugins|tests|adapters)/[\w/.]+)`", TEXT)]
    assert len(paths) > 20
    assert not [str(path) for path in paths if not path.exists()]
