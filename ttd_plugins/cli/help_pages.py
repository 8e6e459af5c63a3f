"""Help of the commands: options in sections, commands by purpose, and examples that can be pasted into a shell.

The sections are the ``rich_help_panel`` of options and commands, and the examples are an attribute of the click
command, so that other tools, such as the command reference of the documentation, read both from the structure.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

MODEL, DATA, TAGS = "Model", "Data", "Tags"
OBJECTIVE, OPTIMIZER, TRAINING = "Objective", "Optimizer", "Training"
INFERENCE, EVALUATION, PAGE = "Inference", "Evaluation", "Page"
OUTPUT, RUN = "Output", "Run"
SECTIONS = (DATA, MODEL, TAGS, OBJECTIVE, OPTIMIZER, TRAINING, INFERENCE, EVALUATION, PAGE, OUTPUT, RUN)
"""Sections of options, in the order of the help. The last section has what belongs to none, such as ``--help``."""

TRY, TRAIN, EVALUATE, COMPARE, EXTEND = "Try", "Train", "Evaluate", "Compare", "Extend"
PURPOSES = (TRY, TRAIN, EVALUATE, COMPARE, EXTEND)
"""Groups of commands in ``ttd --help``, in order."""

ARGUMENTS, OTHERS = "Arguments", "Options"
NAME_COLUMN = 30
"""Widest first column of a section, in characters; a longer name has its help in the next line."""

NO_BREAK = "\N{NO-BREAK SPACE}"
SHORT_DEFAULT = re.compile(r"\[default: [^\]]{1,20}\]")

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Example:
    """A command line that users can paste, and one line that says what it does.

    Attributes:
        purpose: one line, without a full stop.
        command: the command line; it may continue on further lines after a backslash.
    """

    purpose: str
    command: str


def examples(*pairs: tuple[str, str]) -> Callable[[_F], _F]:
    """Decorator that adds examples to the function of a command.

    Args:
        *pairs: purpose and command line of each example.
    """

    def decorate(command: _F) -> _F:
        command.examples = tuple(Example(purpose, line) for purpose, line in pairs)  # type: ignore[attr-defined]
        return command

    return decorate


def examples_text(found: Iterable[Example]) -> str | None:
    """Return examples as lines of a shell script, for the epilog of a command; ``None`` if there are none."""
    return "\n\n".join(f"# {one.purpose}\n{one.command}" for one in found) or None


def examples_of(command: Callable[..., Any]) -> tuple[Example, ...]:
    """Return the examples of a command's function."""
    return getattr(command, "examples", ())


class SectionedHelp:
    """Mixin of click commands: the help has sections of options, then the examples, which are never wrapped."""

    @property
    def examples(self) -> tuple[Example, ...]:
        """The examples of the command."""
        return examples_of(getattr(self, "callback", None) or (lambda: None))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then options by section, and the commands of a group before both."""
        sections: dict[str, list[tuple[str, str]]] = {}
        # Switches at the end of their section.
        for parameter in sorted(self.get_params(ctx), key=_is_switch):  # type: ignore[attr-defined]
            record = parameter.get_help_record(ctx)
            if record is not None:
                argument = parameter.param_type_name == "argument"
                first = parameter.metavar or record[0] if argument else record[0]
                rest = ARGUMENTS if argument else OTHERS
                section = getattr(parameter, "rich_help_panel", None) or rest
                sections.setdefault(section, []).append((first, record[1]))
        if isinstance(self, TyperGroup):
            self.format_commands(ctx, formatter)
        _write_sections(formatter, sections, (ARGUMENTS, *SECTIONS, OTHERS))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the pieces of the usage line, in which only what is optional is in brackets."""
        pieces = super().collect_usage_pieces(ctx)  # type: ignore[misc]
        return [re.sub(r"^\{(.*)\}(\.\.\.)?$", r"\1\2", piece) for piece in pieces]

    def get_help(self, ctx: Any) -> str:
        """Return the help text, in which no short default is broken over two lines."""
        return super().get_help(ctx).replace(NO_BREAK, " ")  # type: ignore[misc, no-any-return]

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are."""
        for number, one in enumerate(self.examples):
            formatter.write("\n" if number else f"\n{_styled('Examples:', bold=True)}\n")
            for line in (_styled(f"# {one.purpose}", dim=True), *one.command.splitlines()):
                formatter.write(f"  {line}\n")


class Command(SectionedHelp, TyperCommand):
    """A command with sections and examples in its help."""


class Group(SectionedHelp, TyperGroup):
    """A group of commands, whose help lists them by purpose. Without arguments it prints its help, with status 0."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # Click exits with 2 here and typer's versions differ; a question for help is no error.
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the summaries of the commands, never cut."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                summary = " ".join((command.help or "").split("\n\n")[0].split())
                panel = getattr(command, "rich_help_panel", None)
                sections.setdefault(panel if isinstance(panel, str) else "Commands", []).append((name, summary))
        _write_sections(formatter, sections, (*PURPOSES, "Commands"))


def _write_sections(formatter: Any, sections: dict[str, list[tuple[str, str]]], order: tuple[str, ...]) -> None:
    """Write definition lists under headings, with one first column for all."""
    widths = [len(first) for rows in sections.values() for first, _ in rows]
    width = max((one for one in widths if one <= NAME_COLUMN), default=0)
    for title in sorted(sections, key=order.index):
        rows = [(f"{first:<{width}}", text) for first, text in sections[title]]
        with formatter.section(_styled(title, bold=True)):
            whole = [(_styled(first, fg="cyan"), SHORT_DEFAULT.sub(_unbroken, text)) for first, text in rows]
            formatter.write_dl(whole, col_max=max(width, 1))


def _is_switch(parameter: Any) -> bool:
    return bool(getattr(parameter, "is_flag", False)) and not parameter.secondary_opts


def _unbroken(match: re.Match[str]) -> str:
    return match[0].replace(" ", NO_BREAK)


def _styled(text: str, **style: Any) -> str:
    """Return the text with a style on a terminal that shows colours, and else as it is."""
    if "NO_COLOR" in os.environ or not sys.stdout.isatty():
        return text
    return typer.style(text, **style)
