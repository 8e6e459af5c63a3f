"""The names that users import from ttd_plugins, the version, and the marker of type hints."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ttd_plugins

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "TTD", "Calibration", "DenseAdapter", "TTDOptions", "compare", "evaluate", "export_backbone", "find_tags",
    "fine_tune", "hookimpl", "load", "load_lora", "optimize_for_inference", "restore_backbone",
    "save_lora", "segment", "ttd_loss", "wrap",
}  # fmt: skip


def test_the_public_names_are_exactly_these() -> None:
    assert set(ttd_plugins.__all__) == set(dir(ttd_plugins)) == NAMES | {"__version__"}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_public_name_is_imported_on_first_use(name: str) -> None:
    """In a fresh process, so that no other import has resolved it."""
    code = f"from ttd_plugins import {name}; assert callable({name}); print(getattr({name}, '__name__', '{name}'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == name


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(ttd_plugins.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == ttd_plugins._MODULES


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ttd_plugins' has no attribute 'train'"):
        _ = ttd_plugins.train


def test_the_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"] and "version" in project["project"]["dynamic"]
    module, _, attribute = project["tool"]["setuptools"]["dynamic"]["version"]["attr"].rpartition(".")
    assert getattr(importlib.import_module(module), attribute) == ttd_plugins.__version__
    written = re.compile(rf"""["']{re.escape(ttd_plugins.__version__)}["']""")
    files = [file for file in ROOT.glob("ttd_plugins/**/*.py") if written.search(file.read_text(encoding="utf-8"))]
    assert [file.name for file in files] == ["_version.py"]


# An editable installation writes a folder NAME.egg-info beside the package.
PACKAGES = [
    folder
    for place in ("ttd_plugins", "adapters/ttd_*", "examples/ttd-*/ttd_*")
    for folder in sorted(ROOT.glob(place))
    if folder.suffix != ".egg-info"
]


@pytest.mark.parametrize(
    "folder",
    PACKAGES,
    ids=lambda folder: folder.name,
)
def test_a_package_is_marked_as_typed(folder: Path) -> None:
    assert (folder / "__init__.py").is_file() and (folder / "py.typed").is_file()
