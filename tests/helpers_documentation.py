"""Code blocks of README.md and docs/*.md: where they are, how they are marked, and a runner for what they say.

A block of commands or Python runs in a folder of its page, after the page's earlier blocks and with their names. A
block that does not run there has a mark in the line above it, which a page never shows:

    <!-- run by tests/test_NAME.py -->   another test runs it; that test names the page
    <!-- not run: REASON -->             nothing can run it here

``<!-- all blocks run by tests/test_NAME.py -->`` anywhere on a page marks all of its blocks.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
from helpers_examples import ROOT, example
from typer.testing import CliRunner

from ttd_plugins import cli

PAGES = ("README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")))
SHELL, DATA = ("bash", "console"), ("text", "csv", "toml", "yaml", "bibtex", "diff", "json")
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<content>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
ALL_ELSEWHERE = re.compile(r"<!-- all blocks (run by tests/test_\w+\.py) -->")
ELSEWHERE, SKIPPED = re.compile(r"run by (tests/test_\w+\.py)"), re.compile(r"not run: (.{15,})")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: path of the page in the repository.
        line: line of the fence.
        language: the word after the fence.
        content: text of the block.
        mark: text of the comment in the line above, or an empty string.
    """

    page: str
    line: int
    language: str
    content: str
    mark: str

    @property
    def where(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether it is for the runner."""
        return self.language not in DATA and not ELSEWHERE.match(self.mark) and not SKIPPED.match(self.mark)


def blocks(page: str, text: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    whole = ALL_ELSEWHERE.search(text)
    found_blocks = []
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        mark = whole[1] if whole else found["mark"] or ""
        found_blocks.append(Block(page, line, found["language"], found["content"], mark))
    return found_blocks


@dataclass
class Runner:
    """Runs the blocks of one page in its folder.

    Attributes:
        folder: the working folder.
        monkeypatch: undoes what commands of the page replace.
        replaced: texts of the page and what stands for them here: pretrained weights, which need a network, and sizes.
        names: names that the page's Python takes for granted.
        extra: arguments after those of a command of ttd, which keep it small.
        elsewhere: words of a command line, and the test that runs such lines.
        heavy: words of commands of ttd whose arguments are parsed and which are not run.
    """

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    replaced: Mapping[str, str] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)
    extra: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    heavy: tuple[str, ...] = ()
    done: list[str] = field(default_factory=list)

    def run(self, block: Block) -> None:
        """Run a block; its first failure is that of the test."""
        text = block.content
        for old, new in self.replaced.items():
            text = text.replace(old, new)
        if block.language == "python":
            exec(compile(text, block.where, "exec"), self.names)
            self.done.append(block.where)
            return
        for line in text.replace("\\\n", " ").splitlines():
            for command in line.removeprefix("$ ").split(" && "):
                words = shlex.split(command, comments=True)
                if words and not any(word in command for word in self.elsewhere):
                    self.command(words, block.where)
                    self.done.append(command)

    def command(self, words: list[str], where: str) -> None:
        """Run one command in this process."""
        words = list(words)
        while "=" in words[0]:
            self.monkeypatch.setenv(*words.pop(0).split("=", 1))
        program, arguments = Path(words[0]).name, words[1:]
        runner: Callable[[list[str], str], None] | None = {
            "ttd": self.ttd, "pip": check_pip, "python": self.python, "python3": self.python, "cd": self.change_folder,
            "pytest": ignore, "source": ignore,
        }.get(program)  # fmt: skip
        assert runner is not None, f"{where}: nothing runs {program}; mark the block"
        runner(arguments, where)

    def ttd(self, arguments: list[str], where: str) -> None:
        """A command of ttd, with the arguments that keep it small."""
        name = next((word for word in arguments if word in self.extra), "")
        if name == "train" and "--out" not in arguments and "--resume" not in arguments:
            arguments = [*arguments, "--out", f"run-{len(self.done)}"]
        arguments = [*arguments, *shlex.split(self.extra.get(name, ""))]
        if any(word in shlex.join(["ttd", *arguments]) for word in self.heavy):
            parse_only(arguments)
            return
        result = CliRunner().invoke(cli.app, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, f"{where}: ttd {shlex.join(arguments)}\n{result.output}"

    def change_folder(self, arguments: list[str], where: str) -> None:
        """Later commands of the page run there."""
        assert Path(arguments[0]).is_dir(), f"{where}: no command of the page makes {arguments[0]}"
        self.monkeypatch.chdir(arguments[0])

    def python(self, arguments: list[str], where: str) -> None:
        """``-m venv`` and ``-m pytest`` are the reader's own; a program of ``examples/`` must take its arguments."""
        if arguments[0] == "-m":
            assert arguments[1] in ("venv", "pytest", "pip"), f"{where}: nothing runs python -m {arguments[1]}"
            return
        path = ROOT / arguments[0]
        assert path.is_file() and path.parent.name == "examples", f"{where}: {arguments[0]} is no program of examples/"
        check_arguments(path.stem, arguments[1:], self.monkeypatch)


def ignore(arguments: list[str], where: str) -> None:
    """The reader's own tests, and their virtual environment."""


def parse_only(arguments: list[str]) -> None:
    """Parse the arguments of a command of ttd without running it."""
    group: Any = typer.main.get_command(cli.app)
    with group.make_context("ttd", list(arguments), resilient_parsing=True) as context:
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        command.make_context(name, rest, parent=None)


class ParsedError(Exception):
    """The arguments of a program are valid."""


def check_arguments(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a program of ``examples/`` once it has read its arguments; its own test runs the rest."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        parse(parser, args, namespace)
        raise ParsedError

    program = example(name)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(ParsedError):
            program.main()


def check_pip(arguments: list[str], where: str) -> None:
    """An installation names extras of pyproject.toml, and folders that exist or that a command before has made."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert arguments[0] == "install", f"{where}: pip {arguments[0]}"
    for word in arguments[1:]:
        name, _, extras = word.rstrip("]").partition("[")
        for extra in filter(None, extras.split(",")):
            assert extra in project["optional-dependencies"], f"{where}: there is no extra {extra!r}"
        if name.startswith((".", "/", "examples/")) or Path(name).is_dir():
            folder = Path(name) if Path(name).is_absolute() else ROOT / name
            assert (folder / "pyproject.toml").is_file() or (Path(name) / "pyproject.toml").is_file(), (
                f"{where}: {word}"
            )
