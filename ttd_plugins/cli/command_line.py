"""The command line that the user entered."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ttd_plugins.errors import InputError

ARGUMENTS = "ttd_plugins.arguments"
"""Key of the arguments of ``ttd`` in the metadata of the click context."""

PATHS = ("--out", "--root", "--images", "--data", "--pairs", "--backbone", "--backbones", "--device")
"""Options whose value may not be empty: an empty path would mean the current folder."""


def command_line(context: Any) -> str:
    """Return the command that runs now, quoted for a POSIX shell."""
    return shlex.join(["ttd", *context.meta[ARGUMENTS]])


def refuse_empty_values(arguments: Sequence[str]) -> None:
    """Check the values of the options in :data:`PATHS`.

    Raises:
        InputError: one is empty.
    """
    for name, value in pairwise([*arguments, "--"]):
        empty = name if value == "" else name.removesuffix("=") if name.endswith("=") else None
        if empty in PATHS:
            advice = "; give a path, '.' for the current folder" if empty == "--out" else ""
            raise InputError(f"{empty} is empty{advice}")
