"""``ttd check-adapter``: check the adapter of a backbone against the contract."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ttd_plugins.cli import image_maps

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter
    from ttd_plugins.testing import Report

FAILED = 1


def command(
    name: Annotated[str, typer.Argument(help="family:model@weights, see `ttd backbones`.", show_default=False)],
    backbone_option: image_maps.BackboneSettings = None,
    check: Annotated[
        list[str] | None, typer.Option("--check", help="Only this check and those that it needs; repeatable.")
    ] = None,
    device: image_maps.DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead.")] = False,
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
