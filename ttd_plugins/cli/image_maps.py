"""Options that commands share, and the maps of one image and caption for ``ttd tags`` and ``ttd heatmap``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ttd_plugins.cli import completion
from ttd_plugins.cli.help_pages import DATA, INFERENCE, MODEL, OUTPUT, RUN, TAGS
from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.options import Rule
from ttd_plugins.utils.quick_start import collection_paused

if TYPE_CHECKING:
    from PIL.Image import Image

    from ttd_plugins.adapter import DenseAdapter
    from ttd_plugins.engine import CaptionMaps
    from ttd_plugins.toolkit.fast_inference import Precision

DEFAULT_BACKBONE = "open_clip:photo"

RULES = get_args(Rule)
DEVICES = ("cpu", "cuda")

ImageArgument = Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.", show_default=False)]
BACKBONE_FORMS = (
    "family:model@weights, see `ttd backbones`; the folder of a run (RUN or RUN@STEP) or of an export; or NAME+LORA."
)
BackboneArgument = Annotated[
    str,
    typer.Argument(metavar="BACKBONE", help=BACKBONE_FORMS, show_default=False, autocompletion=completion.backbones),
]
BackboneOption = Annotated[
    str,
    typer.Option(
        "--backbone",
        metavar="NAME",
        help=BACKBONE_FORMS,
        rich_help_panel=MODEL,
        autocompletion=completion.backbones,
    ),
]
BackboneSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--backbone-option", metavar="KEY=VALUE", help="An option of the family; repeatable.", rich_help_panel=MODEL
    ),
]
TagsOption = Annotated[
    str,
    typer.Option(
        "--tags",
        metavar="NAME",
        help="The tag extractor, see `ttd plugins`.",
        rich_help_panel=TAGS,
        autocompletion=completion.TAG_EXTRACTORS,
    ),
]
TagsSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--tags-option",
        metavar="KEY=VALUE",
        help="An option of the tag extractor; repeatable.",
        rich_help_panel=TAGS,
    ),
]
TagOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tag",
        metavar="TAG",
        help="A candidate tag, instead of those extracted from the caption; repeatable.",
        rich_help_panel=TAGS,
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="N|HxW",
        help="Input size in pixels.  [default: the backbone's]",
        rich_help_panel=INFERENCE,
    ),
]
RuleOption = Annotated[
    str | None,
    typer.Option(
        "--rule",
        metavar="|".join(RULES),
        help="Selection rule.  [default: minmax]",
        rich_help_panel=TAGS,
        autocompletion=completion.one_of(RULES),
    ),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        metavar="NUMBER",
        help="Threshold of the selection rule.  [default: 0.5]",
        rich_help_panel=TAGS,
    ),
]
AllowPipeOption = Annotated[
    bool,
    typer.Option("--allow-pipe", help="Permit shards pipe:COMMAND, which run a shell command.", rich_help_panel=DATA),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where to compute, such as cpu or cuda.  [default: the family's choice]",
        rich_help_panel=RUN,
        autocompletion=completion.one_of(DEVICES),
    ),
]
FastOption = Annotated[
    bool,
    typer.Option(
        "--fast",
        help="Fold batch norms and use a faster memory layout; scores agree to 1e-3.",
        rich_help_panel=RUN,
    ),
]
BFloat16Option = Annotated[
    bool,
    typer.Option(
        "--bfloat16",
        help="As --fast, and encode images in bfloat16; cosines change by up to 0.04.",
        rich_help_panel=RUN,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a JSON object instead.", rich_help_panel=OUTPUT)]


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """Return ``KEY=VALUE`` texts as a dict; a value that is JSON (``true``, ``3``, ``null``) is parsed.

    Raises:
        InputError: an item has no ``=``.
    """
    found: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise InputError(f"{setting!r} is not of the form KEY=VALUE")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def parse_size(size: str | None) -> int | tuple[int, int] | None:
    """Return 224 for ``"224"`` and (224, 320), height and width, for ``"224x320"``.

    Raises:
        InputError: the text has neither form.
    """
    if size is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,5})(?:x([1-9][0-9]{0,5}))?", size)
    if match is None:
        shown = one_sentence(ValueError(size), 40)
        raise InputError(f"size {shown!r} is neither a number of pixels nor HEIGHTxWIDTH, such as 224 or 224x320")
    height, width = match.groups()
    return int(height) if width is None else (int(height), int(width))


def warn_of(notes: Iterable[str]) -> None:
    """Print notes on a backbone, such as those of :func:`ttd_plugins.caption_maps.backbone_notes`, on stderr."""
    for note in notes:
        typer.echo(f"warning: {note}", err=True)


def load_backbone(
    name: str,
    options: dict[str, Any] | None = None,
    *,
    device: str | None = None,
    fast: bool = False,
    bfloat16: bool = False,
) -> DenseAdapter:
    """Load a backbone for a command: :func:`ttd_plugins.load`, with fewer pauses of Python's garbage collector.

    Raises:
        TTDError: the backbone cannot be loaded, or not in this form.
    """
    with collection_paused():
        from ttd_plugins.plugins import load

        return load(name, device=device, fast=fast_precision(fast, bfloat16), **(options or {}))


def fast_precision(fast: bool, bfloat16: bool) -> bool | Precision:
    """The argument ``fast`` of :func:`ttd_plugins.load` for the flags of a command."""
    return "bfloat16" if bfloat16 else fast


def compute_maps(image: Path, caption: str, **options: Any) -> CaptionMaps:
    """Return the maps of one image and caption; see :func:`compute_all_maps`."""
    (maps,) = compute_all_maps(image, [caption], **options)[1]
    return maps


def compute_all_maps(
    image: Path,
    captions: Sequence[str],
    *,
    backbone: str = DEFAULT_BACKBONE,
    backbone_options: dict[str, Any] | None = None,
    extractor: str = "words",
    extractor_options: dict[str, Any] | None = None,
    tags: list[str] | None = None,
    size: int | tuple[int, int] | None = None,
    rule: str | None = None,
    threshold: float | None = None,
    device: str | None = None,
    fast: bool = False,
    bfloat16: bool = False,
) -> tuple[Image, list[CaptionMaps]]:
    """Return an image, and its maps for each caption: :meth:`ttd_plugins.engine.TTD.maps` with names.

    Raises:
        InputError: the image cannot be read, a caption is empty, or an option is unknown.
        TTDError: the backbone or the tag extractor cannot be loaded.
    """
    if not all(caption.strip() for caption in captions):
        raise InputError("the caption is empty; describe the image")
    from ttd_plugins.data.images import read_image

    # Before anything slow, so that a wrong path is reported at once.
    pixels = read_image(image)
    adapter = load_backbone(backbone, backbone_options, device=device, fast=fast, bfloat16=bfloat16)
    from ttd_plugins.engine import TTD, TTDOptions

    changes: dict[str, Any] = {"rule": rule, "threshold": threshold}
    options = TTDOptions(
        extractor=extractor,
        extractor_options=extractor_options or {},
        **{name: value for name, value in changes.items() if value is not None},
    )
    ttd = TTD(adapter, options)
    found = [ttd.maps(pixels, caption, size=size, tags=tags) for caption in captions]
    warn_of(dict.fromkeys(note for maps in found for note in maps.notes))
    for maps in found:
        if maps.truncated:
            which = "the caption" if len(captions) == 1 else f"the caption {maps.caption[:40]!r}"
            length = ttd.backbone.description.context_length
            typer.echo(f"warning: {which} is longer than {length} tokens; its end was cut off", err=True)
    return pixels, found
