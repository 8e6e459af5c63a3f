"""CHANGELOG.md lists every deprecated name under "Deprecated", with its new name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ttd_plugins._renamed_modules import RENAMED_MODULES

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "ttd_plugins").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")])


def _strings(node: ast.AST) -> dict[str, str]:
    """The pairs of a dictionary of strings, old name to new name; empty for any other expression."""
    if not isinstance(node, ast.Dict):
        return {}
    pairs = zip(node.keys, node.values, strict=True)
    return {
        key.value: value.value
        for key, value in pairs
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
    }


def _renamed_in(source: str) -> Iterator[tuple[str, str]]:
    """Old and new names of a file: those given to the helpers of ``utils/deprecation.py``, as literals."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                match part:
                    case ast.Assign([ast.Name(old)], ast.Call(ast.Name("RenamedAttribute"), [ast.Constant(new)])):
                        yield f"{node.name}.{old}", f"{node.name}.{new}"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        literals = [each.value for each in node.args if isinstance(each, ast.Constant)]
        if name in ("renamed_keyword", "warn_renamed") and len(literals) == 2:
            yield literals[0], literals[1]
        if name in ("renamed_names", "old_flags"):
            yield from _strings(node.args[1]).items()
        for keyword in node.keywords:
            if name == "configuration" and keyword.arg == "renamed":
                yield from _strings(keyword.value).items()


def renamed() -> list[tuple[str, str]]:
    found = {pair for file in FILES for pair in _renamed_in(file.read_text(encoding="utf-8"))}
    for old, new in RENAMED_MODULES.items():
        found.add((old, new if isinstance(new, str) else new[0]))
    return sorted(found)


def deprecated_section() -> str:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^### Deprecated\n(.*?)^### ", text, re.MULTILINE | re.DOTALL)
    return section


@pytest.mark.parametrize(("old", "new"), renamed())
def test_a_deprecated_name_is_listed_with_its_new_name(old: str, new: str) -> None:
    lines = [line for line in deprecated_section().splitlines() if f"`{old}`" in line]
    assert lines, f"add to CHANGELOG.md under Deprecated: `{old}` → `{new}`"
    assert any(f"`{new}`" in line for line in lines)


def test_deprecated_names_are_found() -> None:
    source = (
        "class A:\n    old = RenamedAttribute('new')\n"
        "@renamed_keyword('a', 'b')\n@configuration(renamed={'c': 'd'})\nclass B: ...\n"
        "__getattr__ = renamed_names(__name__, {'e': 'f'})\n"
        "FLAGS = old_flags(X, {'--g': '--h'})\nwarn_renamed('i', 'j')\n"
    )
    expected = {("A.old", "A.new"), ("a", "b"), ("c", "d"), ("e", "f"), ("--g", "--h"), ("i", "j")}
    assert set(_renamed_in(source)) == expected
