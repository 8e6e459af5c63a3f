"""``ttd app``: a local web page for your own image and caption, before and after TTD."""

from __future__ import annotations

from typing import Annotated

import typer

from ttd_plugins.cli import completion, image_maps
from ttd_plugins.cli.help_pages import MODEL, PAGE, examples
from ttd_plugins.errors import InputError


@examples(
    ("Open the page with the embedded backbones", "ttd app"),
    ("Only two backbones, on another port", "ttd app --backbones open_clip:photo,siglip:tiny --port 8080"),
    ("A run of your own as after TTD", "ttd app --tuned open_clip:tiny=runs/mine"),
)
def command(
    backbones: Annotated[
        str | None,
        typer.Option(
            "--backbones",
            "--backbone",
            metavar="NAME,NAME,...",
            rich_help_panel=MODEL,
            autocompletion=completion.backbone_list,
            help="Comma-separated names, folders of runs or exports, or NAME+LORA.  [default: the embedded ones]",
        ),
    ] = None,
    tuned: Annotated[
        list[str] | None,
        typer.Option(
            "--tuned",
            metavar="NAME=PATH",
            rich_help_panel=MODEL,
            help="A tuned backbone to show beside NAME: a run, an export, a demo or a file of weights; repeatable.",
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="ADDRESS",
            help="Address to listen on; 0.0.0.0 for the network.",
            rich_help_panel=PAGE,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            "--port", metavar="N", help="Port.  [default: the first free one from 7860]", rich_help_panel=PAGE
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            rich_help_panel=PAGE,
            help="A further host name under which the page may be opened, such as a proxy's; repeatable.",
        ),
    ] = None,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Do not open the browser.", rich_help_panel=PAGE)
    ] = False,
    tags: image_maps.TagsOption = "words",
    tags_option: image_maps.TagsSettings = None,
    rule: image_maps.RuleOption = None,
    threshold: image_maps.ThresholdOption = None,
    device: image_maps.DeviceOption = None,
    fast: image_maps.FastOption = False,
    bfloat16: image_maps.BFloat16Option = False,
) -> None:
    """Open a local web page for your own images.

    Upload an image, type a caption and choose backbones. The page shows tags with scores, the selected tags, and the
    maps, before and after TTD: `open_clip:photo` has weights after TTD in the package, `--tuned` names your own, and
    small backbones can be trained in the page. It works offline; no data leave the machine.
    """
    sources = parse_tuned(tuned)
    names = [name.strip() for name in backbones.split(",")] if backbones is not None else None
    if names is not None and not all(names):
        raise InputError(f"--backbones {backbones!r} contains an empty name; separate names by single commas")
    if port is not None and not 1 <= port <= 65535:
        raise InputError(f"--port must be from 1 to 65535, not {port}")
    from ttd_plugins.app.gradio_page import import_gradio, serve
    from ttd_plugins.app.request_guard import check_allowed_host, check_listening

    # First, so that a missing package and a wrong address are reported at once.
    import_gradio()
    for name in allow_host or ():
        check_allowed_host(name)
    check_listening(host, port)
    from ttd_plugins.app.studio import Studio, embedded_backbones, shipped_tuning
    from ttd_plugins.engine import TTDOptions

    changes = {"rule": rule, "threshold": threshold}
    options = TTDOptions(
        extractor=tags,
        extractor_options=image_maps.parse_settings(tags_option),
        **{name: value for name, value in changes.items() if value is not None},  # type: ignore[arg-type]
    )
    if names is None:
        names = list(sources) or sorted(embedded_backbones(), key=lambda name: name != image_maps.DEFAULT_BACKBONE)
    names = list(dict.fromkeys([*names, *sources]))
    precision = image_maps.fast_precision(fast, bfloat16)
    studio = Studio(names, shipped_tuning(names) | sources, options=options, device=device, fast=precision)
    serve(studio, host=host, port=port, browser=not no_browser, allow_hosts=allow_host or (), announce=typer.echo)


def parse_tuned(given: list[str] | None) -> dict[str, str]:
    """Parse ``NAME=PATH`` items into a mapping.

    Raises:
        InputError: an item has no ``=``, or a name occurs twice.
    """
    found: dict[str, str] = {}
    for item in given or []:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise InputError(f"--tuned {item!r} is not NAME=PATH, such as open_clip:tiny=runs/mine")
        if name in found:
            raise InputError(f"--tuned names {name} twice; name each backbone at most once")
        found[name] = path
    return found
