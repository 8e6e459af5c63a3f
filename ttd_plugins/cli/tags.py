"""``ttd tags``: which words of a caption, or which names of a vocabulary, are in the image."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttd_plugins.cli import image_maps
from ttd_plugins.cli.help_pages import OUTPUT, TAGS, examples
from ttd_plugins.errors import InputError
from ttd_plugins.utils.quick_start import collection_paused

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter
    from ttd_plugins.engine import CaptionMaps
    from ttd_plugins.tagging import VocabularyTags


@examples(
    ("Which words of a caption the image shows", 'ttd tags photo.jpg "a dog beside an umbrella on the grass"'),
    ("Which names of a list it shows", "ttd tags photo.jpg --vocabulary names.txt"),
    ("A folder of images, for a program", "ttd tags photos/ --vocabulary coco_things --out tags.jsonl"),
)
def command(
    image: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGE", help="An image file; with --vocabulary also a folder of images.", show_default=False
        ),
    ],
    caption: Annotated[
        str | None, typer.Argument(metavar="CAPTION", help="Its caption, unless --vocabulary.", show_default=False)
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(
            "--vocabulary",
            metavar="FILE|NAMES",
            rich_help_panel=TAGS,
            help="Candidate tags instead of a caption's: a file, names with commas, or a built-in list such as "
            "coco_panoptic.  [default: the words of CAPTION]",
        ),
    ] = None,
    backbone: image_maps.BackboneOption = image_maps.DEFAULT_BACKBONE,
    backbone_option: image_maps.BackboneSettings = None,
    tags: image_maps.TagsOption = "words",
    tags_option: image_maps.TagsSettings = None,
    tag: image_maps.TagOption = None,
    size: image_maps.SizeOption = None,
    rule: image_maps.RuleOption = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            metavar="NUMBER",
            rich_help_panel=TAGS,
            help="Threshold of the selection rule.  [default: 0.5; with --vocabulary 0.7 for minmax, 0.2 for absolute, "
            "0.5 for probability]",
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            "--top",
            metavar="N",
            help="With --vocabulary: the most tags of an image.  [default: 10]",
            rich_help_panel=TAGS,
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template",
            metavar="PROMPT",
            rich_help_panel=TAGS,
            help="With --vocabulary: a prompt with {} for the name, repeatable, or imagenet, photo or none.  "
            "[default: photo]",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="With --vocabulary: a .jsonl or .parquet file for the tags.  [default: print them]",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    device: image_maps.DeviceOption = None,
    fast: image_maps.FastOption = False,
    bfloat16: image_maps.BFloat16Option = False,
    as_json: image_maps.JsonOption = False,
) -> None:
    """Select the words of CAPTION that IMAGE shows.

    With --vocabulary, the names of a list instead of the words.

    Each candidate tag is scored by its nearest patch, and the selection rule decides.
    """
    if vocabulary is not None:
        if caption is not None or tag or tags != "words" or tags_option:
            raise InputError("--vocabulary replaces the caption and its tags; leave out CAPTION, --tag and --tags")
        chosen: dict[str, Any] = {"rule": rule, "threshold": threshold, "top": top, "templates": _templates(template)}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        chosen["size"] = image_maps.parse_size(size)
        load_backbone = partial(
            image_maps.load_backbone,
            backbone,
            image_maps.parse_settings(backbone_option),
            device=device,
            fast=fast,
            bfloat16=bfloat16,
        )
        _tag_by_vocabulary(image, vocabulary, out, load_backbone, backbone, as_json, chosen)
        return
    if caption is None:
        raise InputError("there is no CAPTION; describe the image, or name candidate tags with --vocabulary")
    options = (("--top", top), ("--template", template), ("--out", out))
    given = next((name for name, value in options if value not in (None, [])), None)
    if given is not None:
        raise InputError(f"{given} applies to --vocabulary only; leave it out")
    _tag_by_caption(
        image,
        caption,
        as_json,
        backbone=backbone,
        backbone_options=image_maps.parse_settings(backbone_option),
        extractor=tags,
        extractor_options=image_maps.parse_settings(tags_option),
        tags=tag,
        size=image_maps.parse_size(size),
        rule=rule,
        threshold=threshold,
        device=device,
        fast=fast,
        bfloat16=bfloat16,
    )


def _tag_by_caption(image: Path, caption: str, as_json: bool, **options: Any) -> None:
    found = image_maps.compute_maps(image, caption, **options)
    # Another key, so that no script takes a guess for a probability.
    key = "probability" if found.calibrated else "uncalibrated_probability"
    rows = [
        {"tag": name, "score": float(score), key: float(probability), "selected": bool(selected)}
        for name, score, probability, selected in zip(
            found.tags, found.scores, found.probabilities, found.selected, strict=True
        )
    ]
    if as_json:
        answer = {
            "image": str(image),
            "caption": caption,
            "backbone": options["backbone"],
            "truncated": found.truncated,
            "calibrated": found.calibrated,
            "notes": list(found.notes),
        }
        typer.echo(json.dumps({**answer, "tags": rows}, indent=2))
    elif rows:
        _print_table(found)
    else:
        typer.echo(f"no candidate tags: the tag extractor {options['extractor']!r} finds none in {caption!r}")


def _print_table(found: CaptionMaps) -> None:
    rows = [
        (tag, found.scores[i], found.probabilities[i], "selected" if found.selected[i] else "rejected")
        for i, tag in enumerate(found.tags)
    ]
    _print_rows(found.probability_label, rows)


def _print_rows(label: str, rows: list[tuple[str, float, float, str]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE)
    table.add_column("tag")
    for column in ("score", label, "selection"):
        table.add_column(column, justify="right")
    for tag, score, probability, selected in rows:
        # A tag may contain what rich takes for markup.
        table.add_row(Text(tag), f"{score:.3f}", f"{probability:.3f}", selected)
    Console().print(table)


def _templates(given: list[str] | None) -> Any:
    """A named set of templates, or the templates themselves; ``None`` for the default.

    Raises:
        InputError: a template has no ``{}``.
    """
    if not given:
        return None
    if len(given) == 1 and "{}" not in given[0]:
        from ttd_plugins.evaluation.dense_inference import TEMPLATE_SETS

        if given[0] in TEMPLATE_SETS:
            return given[0]
    wrong = next((one for one in given if "{}" not in one), None)
    if wrong is not None:
        raise InputError(f"--template {wrong!r} must contain {{}} for the name, or be imagenet, photo or none")
    return given


def _tag_by_vocabulary(
    image: Path,
    vocabulary: str,
    out: Path | None,
    load_backbone: Callable[[], DenseAdapter],
    backbone: str,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    folder = image.is_dir()
    if folder and out is None:
        raise InputError(f"{str(image)!r} is a folder; name a file for its tags with --out, such as tags.jsonl")
    with collection_paused():
        from ttd_plugins.data.images import read_image
        from ttd_plugins.evaluation.vocabulary import read_vocabulary

    # Before anything slow, so that a wrong path and a wrong file of names are reported at once.
    pixels = None if folder else read_image(image)
    classes = read_vocabulary(vocabulary)
    if out is not None:
        from ttd_plugins.tagging import require_tags_file

        require_tags_file(out)
    adapter = load_backbone()
    from ttd_plugins.tagging import Tagger, tag_folder
    from ttd_plugins.utils.progress import progress_bars

    latest: list[VocabularyTags] = []
    with progress_bars(terminal_only=True) as stage:
        tagger = Tagger(adapter, classes, stage=stage, **options)
        image_maps.warn_of(tagger.notes)
        if out is None:
            assert pixels is not None
            latest.append(tagger(pixels))
        else:
            result = tag_folder(tagger, image, out, stage=stage)
    if as_json and latest:
        answer = {"image": str(image), "vocabulary": len(classes), "backbone": backbone, "notes": list(tagger.notes)}
        typer.echo(json.dumps({**answer, "calibrated": latest[0].calibrated, "tags": latest[0].rows()}, indent=2))
    elif as_json:
        answer = {"file": str(result.file), "images": result.images, "done": result.done, "failed": result.failed}
        typer.echo(json.dumps(answer, indent=2))
    elif latest:
        found = latest[0]
        label = "probability" if found.calibrated else "probability (uncalibrated)"
        shown = [i for i in found.order if found.selected[i]]
        _print_rows(label, [(found.names[i], found.scores[i], found.probabilities[i], "selected") for i in shown])
        typer.echo(f"{len(shown)} of {len(classes):,} names are selected")
    else:
        skipped = result.images - result.done - len(result.failed)
        already = f", {skipped:,} were done before" if skipped else ""
        wrong = f", {len(result.failed):,} cannot be read (their rows say why)" if result.failed else ""
        typer.echo(f"{result.images:,} images: {result.done:,} tagged{already}{wrong}")
        typer.echo(f"tags: {result.file}")
