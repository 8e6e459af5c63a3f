"""``ttd new-adapter``: the project that it writes passes its own tests, and what it refuses is one sentence."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fakes import FakeFamily, FakePlugin
from helpers_projects import ROOT, environment, run, ttd
from typer.testing import CliRunner, Result

from ttd_plugins import cli
from ttd_plugins.cli import new_adapter
from ttd_plugins.errors import InputError
from ttd_plugins.plugins import temporary_plugin

FILES = {
    "README.md",
    "pyproject.toml",
    "tests/test_blanks.py",
    "tests/test_conformance.py",
    *(f"ttd_ink_blot/{name}.py" for name in ("__init__", "plugin", "family", "adapter", "toy")),
}


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["new-adapter", *(str(argument) for argument in arguments)])


def written(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return new_adapter.write_project("ink_blot", tmp_path / "project")


def test_the_generated_tests_pass_but_for_the_blanks_and_the_kit_finds_nothing(project: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the kit tries LoRA")
    seen = environment(project, tmp_path / "site")
    done = run("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", environment=seen, folder=project)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d\d passed, 7 skipped", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"SKIPPED .* \d+ blanks to fill in: pyproject.toml:\d+, .*adapter.py:\d+", done.stdout)
    listed = ttd("check-adapter", "ink_blot:toy@random", environment=seen, folder=tmp_path)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    assert re.search(r"^\d\d passed, 0 failed, 6 skipped$", listed.stdout, re.MULTILINE)


def test_once_no_blank_is_left_the_test_of_them_passes(project: Path) -> None:
    for file in (project / name for name in written(project) - {"tests/test_blanks.py"}):
        file.write_text(file.read_text().replace("# BLANK:", "#"))
    done = run("-m", "pytest", "-q", "tests/test_blanks.py", environment=environment(project, project), folder=project)
    assert "1 passed" in done.stdout


@pytest.mark.parametrize("name", ["plain", "it's mine", "$HOME & more"])
def test_the_printed_commands_can_be_copied(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    result = command("ink_blot", "--out", folder)
    assert result.exit_code == 0, result.output
    commands = [shlex.split(line) for line in result.stdout.split("next:\n")[1].splitlines()]
    assert [one[-1] for one in commands] == [f"{folder}[test]", str(folder), "ink_blot:toy@random", str(folder)]


def test_every_file_is_written_and_nothing_is_left_to_substitute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = command("ink_blot")
    assert result.exit_code == 0, result.output
    assert "wrote ttd-ink-blot; next:" in result.stdout
    # The extra brings pytest and peft, which the printed tests need.
    assert "python -m pip install -e 'ttd-ink-blot[test]'\n" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"ttd-ink-blot"}
    assert written(tmp_path / "ttd-ink-blot") == FILES
    for name in FILES:
        text = (tmp_path / "ttd-ink-blot" / name).read_text()
        assert "${" not in text and "$package" not in text and "$family" not in text
        if name.endswith(".py"):
            ast.parse(text)
    family = (tmp_path / "ttd-ink-blot/ttd_ink_blot/family.py").read_text()
    assert "class InkBlotFamily(AdapterFamily)" in family
    assert "api_version = 1\n" in family


def test_what_is_written_satisfies_the_linter(project: Path) -> None:
    pytest.importorskip("ruff", reason="needs the extra 'test'")
    settings = ["--config", str(ROOT / "pyproject.toml"), str(project)]
    for arguments in (["check", "--ignore", "I001"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, *settings], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ink-blot", "did you mean 'ink_blot'?"),
        ("Ink", "did you mean 'ink'?"),
        ("3d", "a letter first"),
        ("", "a letter first"),
        ("тушь", "cannot name a family"),
        ("../ink", "cannot name a family"),
        ("fake", "'fake' is taken by plugin 'fake_plugin'"),
        ("plugins", "ttd_plugins, which is installed already"),
    ],
)
def test_bad_names_are_one_sentence_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with temporary_plugin(FakePlugin(FakeFamily()), name="fake_plugin"):
        result = command("--", name)
    assert result.exit_code == cli.USER_ERROR
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone_and_an_empty_one_is_filled(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for out, said in (("full", "is not empty"), ("file", "is a file"), ("none/deeper", "does not exist")):
        result = command("ink_blot", "--out", tmp_path / out)
        assert result.exit_code == cli.USER_ERROR
        assert said in result.stderr and result.stderr.count("\n") == 1
    assert written(tmp_path) == {"full/notes", "file"}
    assert command("ink_blot", "--out", tmp_path / "empty").exit_code == 0
    assert written(tmp_path / "empty") == FILES


def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(**_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", no)
    with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"):
        new_adapter.write_project("ink_blot", tmp_path / "project")


def test_half_a_project_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        new_adapter.write_project("ink_blot", tmp_path / "project")
    assert not list(tmp_path.iterdir())
