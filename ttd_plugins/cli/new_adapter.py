"""``ttd new-adapter``: write a project for a new adapter, which passes the conformance kit as written."""

from __future__ import annotations

import re
import shlex
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated

import typer

from ttd_plugins.cli.help_pages import examples

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

SUFFIX = ".in"
NAME = re.compile(r"[a-z][a-z0-9_]*")


@examples(
    ("Write the project ./ttd-my-clip", "ttd new-adapter my_clip"),
    ("Into another folder", "ttd new-adapter my_clip --out projects"),
)
def command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Name of the family: lower-case letters, digits and _.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Folder to write.  [default: ./ttd-NAME]", show_default=False),
    ] = None,
) -> None:
    """Write a project for an adapter of your own.

    It adapts a toy model and passes its own tests; the parts to fill in are marked BLANK.
    """
    folder = write_project(name, out)
    # Quoted where a shell needs it, so that the lines can be copied.
    shown = shlex.quote(str(folder))
    typer.echo(f"wrote {folder}; next:")
    typer.echo(f"  python -m pip install -e {shlex.quote(f'{folder}[test]')}")
    typer.echo(f"  python -m pytest {shown}")
    typer.echo(f"  ttd check-adapter {name}:toy@random")
    typer.echo(f"  grep -rn BLANK {shown}")


def write_project(name: str, out: Path | None = None) -> Path:
    """Write the project of a family ``name`` into the folder ``out``, all of it or nothing, and return the folder.

    Raises:
        InputError: the name is invalid or taken, or the folder cannot be written or is not empty.
    """
    from ttd_plugins.adapter import API_VERSION
    from ttd_plugins.utils.output_folder import new_folder

    _require_free(name)
    distribution = f"ttd-{name.replace('_', '-')}"
    folder = Path(distribution) if out is None else out
    values = {
        "family": name,
        "package": f"ttd_{name}",
        "class_name": "".join(part[:1].upper() + part[1:] for part in name.split("_")),
        "distribution": distribution,
        "api_version": str(API_VERSION),
    }
    with new_folder(folder, parents=False) as inner:
        _render(files("ttd_plugins.cli") / "adapter_template", inner, values)
    return folder


def _require_free(name: str) -> None:
    from ttd_plugins.errors import InputError
    from ttd_plugins.plugins import list_plugins

    if not NAME.fullmatch(name):
        better = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        hint = f"; did you mean {better!r}?" if NAME.fullmatch(better) else ""
        raise InputError(
            f"{name!r} cannot name a family, which takes lower-case letters, digits and _, a letter first{hint}"
        )
    for plugin in list_plugins():
        if name in (*plugin.families, plugin.name):
            raise InputError(
                f"{name!r} is taken by plugin {plugin.name!r} of {plugin.distribution or 'no distribution'}; choose "
                "another name"
            )
    if find_spec(f"ttd_{name}") is not None:
        raise InputError(f"the project's package would be ttd_{name}, which is installed already; choose another name")


def _render(source: Traversable, target: Path, values: dict[str, str]) -> None:
    """Copy a tree of templates and fill in names and contents."""
    target.mkdir(exist_ok=True)
    for item in source.iterdir():
        if item.is_dir():
            _render(item, target / (values["package"] if item.name == "package" else item.name), values)
        elif item.name.endswith(SUFFIX):
            text = Template(item.read_text(encoding="utf-8")).substitute(values)
            (target / item.name.removesuffix(SUFFIX)).write_text(text, encoding="utf-8")
