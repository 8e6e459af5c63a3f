"""The command ``ttd``. Each command is a short file around a function that Python users can call too.

Heavy modules are imported inside the commands, so that ``ttd --help`` is quick.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ttd_plugins._version import __version__
from ttd_plugins.cli import app as page
from ttd_plugins.cli import (
    backbones,
    bench,
    calibrate,
    check_adapter,
    compare,
    completion,
    demo,
    eval,
    export,
    heatmap,
    new_adapter,
    plugins,
    prune,
    segment,
    tags,
    train,
)
from ttd_plugins.cli.command_line import ARGUMENTS, refuse_empty_values
from ttd_plugins.cli.help_pages import (
    COMPARE,
    EVALUATE,
    EXTEND,
    TRAIN,
    TRY,
    Command,
    Group,
    examples,
    examples_of,
    examples_text,
)
from ttd_plugins.errors import InputWarning, PluginWarning, TTDError, is_out_of_memory, one_sentence, printable
from ttd_plugins.utils.allocator import keep_freed_memory

USER_ERROR = 2
DENY = "TTD_PLUGINS_DENY"
INTERRUPTED = 130

BY_PURPOSE: dict[str, dict[str, Callable[..., None]]] = {
    TRY: {
        "demo": demo.command,
        "tags": tags.command,
        "heatmap": heatmap.command,
        "segment": segment.command,
        "app": page.command,
    },
    TRAIN: {"train": train.command, "prune": prune.command, "export": export.command},
    EVALUATE: {"calibrate": calibrate.command},
    COMPARE: {"compare": compare.command, "bench": bench.command},
    EXTEND: {
        "backbones": backbones.command,
        "plugins": plugins.command,
        "new-adapter": new_adapter.command,
        "check-adapter": check_adapter.command,
    },
}
"""Every command by its purpose, in the order of ``ttd --help``; its help is the docstring."""

COMMANDS = {name: command for group in BY_PURPOSE.values() for name, command in group.items()}
"""Every command that is not in a group."""

GROUPS: dict[str, tuple[str, str, dict[str, Callable[..., None]]]] = {
    "eval": ("Measure tags, masks, labels and retrieval.", EVALUATE, eval.COMMANDS),
}
"""Groups of commands: the help of the group, its purpose, and its commands."""


class _MessageHandler(logging.Handler):
    """Prints the messages of the package as plain sentences on standard error, which ``--json`` leaves alone."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "reported", False):
            return
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        typer.echo(f"{prefix}{_one_line(record.getMessage())}", err=True)


@contextmanager
def _messages_on_stderr() -> Iterator[None]:
    """Route the logger ``ttd_plugins`` to standard error, unless the host program has configured it."""
    logger = logging.getLogger("ttd_plugins")
    if logger.handlers or logging.getLogger().handlers:
        yield
        return
    handler, level = _MessageHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Group(Group):
    """Prints errors that users can cause as one sentence and sets the exit status; a bug keeps its traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name not in GROUPS)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            # File names need not be valid text; they are shown with their bytes escaped.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        with warnings.catch_warnings(), _messages_on_stderr():
            # The error about such an image says the same.
            warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
            others = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
                if issubclass(category, PluginWarning | InputWarning):
                    typer.echo(f"warning: {_one_line(message)}", err=True)
                else:
                    others(message, category, *where, **more)

            warnings.showwarning = show
            try:
                refuse_empty_values(ctx.meta[ARGUMENTS])
                return super().invoke(ctx)
            except TTDError as error:
                typer.echo(f"error: {_one_line(error)}", err=True)
                raise typer.Exit(USER_ERROR) from error
            except (Exception, SystemExit) as error:
                blamed = _plugin_error(error) or _system_error(error)
                if blamed is None:
                    raise
                typer.echo(f"error: {_one_line(blamed)}", err=True)
                raise typer.Exit(USER_ERROR) from error
            except KeyboardInterrupt as error:
                typer.echo("interrupted", err=True)
                raise typer.Exit(INTERRUPTED) from error


def _plugin_error(error: BaseException) -> TTDError | None:
    # Where this module is not loaded, no plugin is.
    plugins_module = sys.modules.get("ttd_plugins.plugins")
    return plugins_module.explain(error) if plugins_module is not None else None


def _system_error(error: BaseException) -> TTDError | None:
    """What the operating system refused, or that memory ran out, as one sentence; ``None`` for any other exception."""
    if is_out_of_memory(error):
        return TTDError(f"memory ran out ({one_sentence(error, 160)}); use a smaller batch, image or backbone")
    # A reader of the output that has gone is no error: click ends the process quietly.
    if not isinstance(error, OSError) or error.errno in (None, errno.EPIPE):
        return None
    names = [one_sentence(ValueError(repr(name)), 120) for name in (error.filename, error.filename2) if name]
    where = f" ({', '.join(names)})" if names else ""
    reason = error.strerror or one_sentence(error)
    return TTDError(f"the system refused an operation: {reason[:1].lower()}{reason[1:]}{where}")


def _one_line(message: object) -> str:
    return printable(message)


app = typer.Typer(
    name="ttd",
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _add(group: typer.Typer, name: str, command: Callable[..., None], purpose: str | None = None) -> None:
    epilog = examples_text(examples_of(command))
    group.command(name, cls=Command, epilog=epilog, rich_help_panel=purpose)(command)


for _name, (_help, _purpose, _commands) in GROUPS.items():
    _group = typer.Typer(cls=Group, help=_help, rich_markup_mode=None, pretty_exceptions_enable=False)
    for _own, _command in _commands.items():
        _add(_group, _own, _command)
    app.add_typer(_group, name=_name, rich_help_panel=_purpose)
for _purpose, _commands in BY_PURPOSE.items():
    for _name, _command in _commands.items():
        _add(app, _name, _command, _purpose)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ttd-plugins {__version__}")
        raise typer.Exit


@app.callback()
@examples(
    ("See what TTD does", "ttd demo"),
    ("Try it on your own photograph", 'ttd tags photo.jpg "a dog beside an umbrella on the grass"'),
    ("Help of a command, with examples", "ttd train -h"),
)
def _ttd(
    context: typer.Context,
    deny_plugin: Annotated[
        list[str] | None,
        typer.Option(
            "--deny-plugin",
            metavar="NAME",
            help="Do not load this plugin or distribution, as TTD_PLUGINS_DENY does; repeatable.",
            autocompletion=completion.plugin_names,
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Text-Tag Self-Distillation (TTD, arXiv 2404.00384) for any CLIP-like backbone."""
    if deny_plugin:
        _deny(context, deny_plugin)


def _deny(context: typer.Context, names: list[str]) -> None:
    """Add plugins to the environment variable, which child processes inherit, until the command ends."""
    before = os.environ.get(DENY)

    def restore() -> None:
        if before is None:
            os.environ.pop(DENY, None)
        else:
            os.environ[DENY] = before

    os.environ[DENY] = ",".join([*([before] if before else []), *names])
    context.call_on_close(restore)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``ttd`` and end the process: status 0, 2 after an error that users can cause, 130 after Ctrl-C."""
    keep_freed_memory()
    try:
        with completion.colons_joined():
            app(args=arguments, prog_name="ttd")
    except SystemExit as ended:
        if "ttd_plugins.utils.distributed" in sys.modules and isinstance(ended.code, int | None):
            from ttd_plugins.utils.distributed import end_process

            end_process(ended.code or 0)
        raise
