"""``ttd plugins``: list the plugins that are loaded, and those that are not, with the reason."""

from __future__ import annotations

import dataclasses
import json

import typer

from ttd_plugins.cli import image_maps
from ttd_plugins.cli.help_pages import examples
from ttd_plugins.errors import printable


@examples(
    ("Installed plugins, and why one is not loaded", "ttd plugins"),
    ("The same for a program", "ttd plugins --json"),
    ("Without one of them", "ttd --deny-plugin stanza plugins"),
)
def command(
    as_json: image_maps.JsonOption = False,
) -> None:
    """List plugins and their problems.

    Shows the families, tag extractors and hooks of each.
    """
    from ttd_plugins.plugins import list_plugins

    found = list_plugins()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(plugin) for plugin in found], indent=2))
        return
    for plugin in found:
        origin = f"  {printable(f'{plugin.distribution} {plugin.version}')}" if plugin.distribution else ""
        typer.echo(f"{printable(plugin.name)}{origin}")
        hooks = [hook + (" (deprecated, ignored)" if hook in plugin.deprecated_hooks else "") for hook in plugin.hooks]
        for label, names in (
            ("families", plugin.families),
            ("tag extractors", plugin.tag_extractors),
            ("hooks", hooks),
        ):
            if names:
                typer.echo(f"  {label}: {printable(', '.join(names))}")
        if plugin.error:
            typer.echo(f"  error: {printable(plugin.error)}")
