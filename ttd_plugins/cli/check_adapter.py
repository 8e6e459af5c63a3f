"""``ttd check-adapter``: check the adapter of a backbone against the contract."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ttd_plugins.cli import image_maps
from ttd_plugins.cli.help_pages import RUN, examples

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter
    from ttd_plugins.testing import Report

FAILED = 1


@examples(
    ("Every check of one model", "ttd check-adapter open_clip:tiny"),
    (
        "Two checks of an architecture, with random weights",
        "ttd check-adapter siglip:tiny@random --check logits --check joint_space",
    ),
    ("For a program", "ttd check-adapter openai_clip:tiny --json"),
)
def command(
    name: image_maps.BackboneArgument,
    backbone_option: image_maps.BackboneSettings = None,
    check: Annotated[
        list[str] | None,
        typer.Option(
            "--check",
            metavar="CHECK",
            help="Only this check and those that it needs; repeatable.  [default: all]",
            rich_help_panel=RUN,
        ),
    ] = None,
    device: image_maps.DeviceOption = None,
    as_json: image_maps.JsonOption = False,
) -> None:
    """Check the adapter of a backbone against the contract.

    Prints every check, and for each failure the expected and the actual result and its usual cause. The status is 0 if
    none failed and 1 otherwise. Random weights (@random) are sufficient.
    """
    report = run_checks(name, backbone_option, check, device)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        print_report(report)
    if not report.ok:
        raise typer.Exit(FAILED)


def run_checks(name: str, settings: list[str] | None, only: list[str] | None, device: str | None) -> Report:
    """Return the report on a backbone by name; what the adapter raises becomes a failed check.

    Raises:
        BackboneNameError, InputError, MissingDependencyError: a name or an option is unknown, or a library is not
            installed.
    """
    from ttd_plugins.errors import BackboneNameError, InputError, MissingDependencyError
    from ttd_plugins.plugins import load
    from ttd_plugins.testing import check_adapter

    options = image_maps.parse_settings(settings)
    adapter: DenseAdapter | None = None
    problem: BaseException | None = None
    try:
        adapter = load(name, device=device, **options)
    except (BackboneNameError, InputError, MissingDependencyError):
        raise
    except (Exception, SystemExit) as error:
        problem = error

    def make_adapter() -> DenseAdapter:
        if problem is not None:
            raise problem
        assert adapter is not None
        return adapter

    return check_adapter(make_adapter, only=only, family=name.strip().partition(":")[0])


def print_report(report: Report) -> None:
    """Print a table of the checks, then each failure in full, then the counts."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=SIMPLE, title=Text(report.adapter))
    for column in ("check", "", "what"):
        table.add_column(column)
    styles = {"passed": "green", "failed": "bold red", "skipped": "yellow"}
    for result in report.results:
        # An adapter's text may contain what rich takes for markup.
        what = Text(result.what if result.status != "skipped" else f"skipped: {result.reason}")
        table.add_row(Text(result.name), Text(result.status, style=styles[result.status]), what)
    console.print(table)
    for result in report.results:
        if result.status == "failed":
            console.print(Text(str(result)), soft_wrap=True)
            console.print()
    counts = f"{len(report.passed)} passed, {len(report.failed)} failed, {len(report.skipped)} skipped"
    console.print(Text(counts), soft_wrap=True)
