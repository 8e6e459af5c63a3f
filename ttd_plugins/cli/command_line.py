"""The command line that the user entered."""

from __future__ import annotations

import shlex
from typing import Any

ARGUMENTS = "ttd_plugins.arguments"
"""Key of the arguments of ``ttd`` in the metadata of the click context."""


def command_line(context: Any) -> str:
    """Return the command that runs now, quoted for a POSIX shell."""
    return shlex.join(["ttd", *context.meta[ARGUMENTS]])
