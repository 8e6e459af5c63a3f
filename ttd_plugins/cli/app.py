"""``ttd app``: a page for one's own picture and caption, before and after TTD."""

from __future__ import annotations

from typing import Annotated

import typer

from ttd_plugins.cli import maps
from ttd_plugins.errors import InputError


def command(
    backbones: Annotated[
        str | None,
        typer.Option("--backbones", "--backbone", help="Names joined by commas.  [default: the embedded ones]"),
    ] = None,
    tuned: Annotated[
        list[str] | None,
        typer.Option(
            "--tuned",
            metavar="NAME=PATH",
            help="What a backbone became: a run of `ttd train`, exported LoRA, a demo, or weights; repeatable.",
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0 for the network.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option("--port", help="Port.  [default: a free one from 7860]")] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open the browser.")] = False,
    tags: maps.TagsOption = "words",
    tags_option: maps.TagsSettings = None,
    rule: maps.RuleOption = None,
    threshold: maps.ThresholdOption = None,
    device: maps.DeviceOption = None,
) -> None:
    """Open a page for a picture of your own.

    Drop a picture, type a caption, choose backbones: tags with scores, what is selected, and the maps, before and after
    TTD. It works offline, and nothing leaves the machine.
    """
    twins = parse_tuned(tuned)
    names = [name.strip() for name in backbones.split(",")] if backbones is not None else None
    if names is not None and not all(names):
        raise InputError(f"--backbones {backbones!r} has an empty name; join names by single commas")
    if port is not None and not 1 <= port <= 65535:
        raise InputError(f"--port must be from 1 to 65535, not {port}")
    from ttd_plugins.app.gradio_page import import_gradio, serve

    # Before anything slow, so that its absence is told at once.
    import_gradio()
    from ttd_plugins.app.studio import Studio, embedded_backbones
    from ttd_plugins.engine import TTDOptions

    changes = {"rule": rule, "threshold": threshold}
    options = TTDOptions(
        extractor=tags,
        extractor_options=maps.parse_settings(tags_option),
        **{name: value for name, value in changes.items() if value is not None},  # type: ignore[arg-type]
    )
    if names is None:
        names = list(twins) or sorted(embedded_backbones(), key=lambda name: name != maps.DEFAULT_BACKBONE)
    studio = Studio(list(dict.fromkeys([*names, *twins])), twins, options=options, device=device)
    serve(studio, host=host, port=port, browser=not no_browser, announce=typer.echo)


def parse_tuned(given: list[str] | None) -> dict[str, str]:
    """``NAME=PATH`` pairs by name.

    Raises:
        InputError: an item has no ``=``, or a name comes twice.
    """
    found: dict[str, str] = {}
    for item in given or []:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise InputError(f"--tuned {item!r} is not of the form NAME=PATH, such as open_clip:tiny=runs/mine")
        if name in found:
            raise InputError(f"--tuned gives {name} twice; one page shows one tuned backbone of each name")
        found[name] = path
    return found
