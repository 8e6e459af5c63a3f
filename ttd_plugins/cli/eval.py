"""``ttd eval``: the paper's three protocols on annotated data sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttd_plugins.cli import image_maps
from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.utils.settings import flatten

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter
    from ttd_plugins.evaluation.dense_inference import DenseOptions
    from ttd_plugins.evaluation.protocols import EvaluationResult
    from ttd_plugins.utils.progress import Stage

RootArgument = Annotated[Path, typer.Argument(help="The data set's folder.", show_default=False)]
PresetOption = Annotated[str, typer.Option("--preset", help="Named settings; the options below change single ones.")]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for records and results.json; the same command goes on where it was stopped."),
]
SplitOption = Annotated[str | None, typer.Option("--split", help="val or train.  [default: val]")]
LimitOption = Annotated[int | None, typer.Option("--limit", help="Only the first pictures.")]
SizeOption = Annotated[int | None, typer.Option("--size", help="Input side in pixels at scale one.")]
ResizeOption = Annotated[str | None, typer.Option("--resize", help="square, or short for the short side.")]
ScalesOption = Annotated[str | None, typer.Option("--scales", metavar="N,N,...", help="Scales that are averaged.")]
FlipOption = Annotated[bool | None, typer.Option("--flip/--no-flip", help="Average with the mirrored picture.")]
WindowOption = Annotated[int | None, typer.Option("--window", help="Side of sliding windows in pixels.")]
StrideOption = Annotated[int | None, typer.Option("--stride", help="Step of sliding windows in pixels.")]
RefineOption = Annotated[bool | None, typer.Option("--pamr/--no-pamr", help="Refine maps with PAMR.")]
ActivationOption = Annotated[
    str | None, typer.Option("--activation", help="Maps before the threshold: probability, minmax or cosine.")
]
TemplatesOption = Annotated[str | None, typer.Option("--templates", help="imagenet (80), photo or none.")]
RankOption = Annotated[int | None, typer.Option("--rank", help="This process among several.  [default: RANK or 0]")]
WorldOption = Annotated[
    int | None, typer.Option("--world", help="How many processes share --out.  [default: WORLD_SIZE or 1]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a JSON object instead.")]


def tags(
    root: RootArgument,
    data: Annotated[str, typer.Option("--data", help="coco_captions or cc3m_tagmask.")] = "coco_captions",
    backbone: image_maps.BackboneOption = image_maps.DEFAULT_BACKBONE,
    backbone_option: image_maps.BackboneSettings = None,
    preset: PresetOption = "paper",
    out: OutOption = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    tags: image_maps.TagsOption = "words",
    tags_option: image_maps.TagsSettings = None,
    rule: image_maps.RuleOption = None,
    threshold: image_maps.ThresholdOption = None,
    template: Annotated[str | None, typer.Option("--template", help="Text around a tag, with {} for it.")] = None,
    nouns: Annotated[bool, typer.Option("--nouns", help="Measure the baseline of all nouns too (Stanza).")] = False,
    nouns_option: Annotated[
        list[str] | None, typer.Option("--nouns-option", metavar="KEY=VALUE", help="An option of Stanza; repeatable.")
    ] = None,
    size: SizeOption = None,
    resize: ResizeOption = None,
    scales: ScalesOption = None,
    flip: FlipOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    rank: RankOption = None,
    world: WorldOption = None,
    device: image_maps.DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure which words of captions are found in their pictures.

    Baselines: the image score, the text score, and all nouns.
    """
    from ttd_plugins.evaluation.datasets import open_captions
    from ttd_plugins.evaluation.protocols import TAG_PRESETS, evaluate_tags

    options = _preset(TAG_PRESETS, preset)
    changes: dict[str, Any] = {"rule": rule, "threshold": threshold, "template": template}
    options = replace(
        options,
        extractor=tags,
        extractor_options=image_maps.parse_settings(tags_option),
        nouns=nouns,
        nouns_options=image_maps.parse_settings(nouns_option),
        dense=_dense(options.dense, size, resize, scales, flip, window, stride, None),
        **{name: value for name, value in changes.items() if value is not None},
    )
    reader = open_captions(data, root, **_given(split=split, limit=limit))
    _run(
        lambda adapter, **more: evaluate_tags(adapter, reader, options, **more),
        backbone, backbone_option, device, out, rank, world, as_json, preset,
    )  # fmt: skip


def text(
    root: RootArgument,
    data: Annotated[str, typer.Option("--data", help="coco_captions or cc3m_tagmask.")] = "coco_captions",
    backbone: image_maps.BackboneOption = image_maps.DEFAULT_BACKBONE,
    backbone_option: image_maps.BackboneSettings = None,
    preset: PresetOption = "paper",
    out: OutOption = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    threshold: Annotated[float | None, typer.Option("--threshold", help="The constant background plane.")] = None,
    activation: ActivationOption = None,
    templates: TemplatesOption = None,
    size: SizeOption = None,
    resize: ResizeOption = None,
    scales: ScalesOption = None,
    flip: FlipOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    refine: RefineOption = None,
    rank: RankOption = None,
    world: WorldOption = None,
    device: image_maps.DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how captions' maps fit what the captions name.

    A caption's map is set against the union of the masks of its true tags.
    """
    from ttd_plugins.evaluation.datasets import open_captions
    from ttd_plugins.evaluation.protocols import TEXT_PRESETS, evaluate_text

    options = _preset(TEXT_PRESETS, preset)
    changes = _given(threshold=threshold, activation=activation, templates=templates)
    dense = _dense(options.dense, size, resize, scales, flip, window, stride, refine)
    options = replace(options, dense=dense, **changes)
    reader = open_captions(data, root, **_given(split=split, limit=limit))
    _run(
        lambda adapter, **more: evaluate_text(adapter, reader, options, **more),
        backbone, backbone_option, device, out, rank, world, as_json, preset,
    )  # fmt: skip


def segment(
    root: RootArgument,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="voc, coco_object, context59, context60, ade20k, cityscapes, coco_stuff or coco_panoptic.",
            show_default=False,
        ),
    ],
    backbone: image_maps.BackboneOption = image_maps.DEFAULT_BACKBONE,
    backbone_option: image_maps.BackboneSettings = None,
    preset: PresetOption = "paper",
    out: OutOption = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    background: Annotated[
        str | None, typer.Option("--background", help="constant, auto (where there is one), words or none.")
    ] = None,
    threshold: Annotated[float | None, typer.Option("--threshold", help="The constant background plane.")] = None,
    activation: ActivationOption = None,
    templates: TemplatesOption = None,
    aliases: Annotated[bool | None, typer.Option("--aliases/--no-aliases", help="Other names of classes too.")] = None,
    size: SizeOption = None,
    resize: ResizeOption = None,
    scales: ScalesOption = None,
    flip: FlipOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    refine: RefineOption = None,
    rank: RankOption = None,
    world: WorldOption = None,
    device: image_maps.DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure open-vocabulary segmentation.

    Every pixel is given one of the data set's classes by the names of these.
    """
    from ttd_plugins.evaluation.datasets import open_segmentation
    from ttd_plugins.evaluation.protocols import SEGMENT_PRESETS, evaluate_segment

    options = _preset(SEGMENT_PRESETS, preset)
    changes = _given(
        background=background, threshold=threshold, activation=activation, templates=templates, aliases=aliases
    )
    dense = _dense(options.dense, size, resize, scales, flip, window, stride, refine)
    options = replace(options, dense=dense, **changes)
    reader = open_segmentation(data, root, **_given(split=split, limit=limit))
    _run(
        lambda adapter, **more: evaluate_segment(adapter, reader, options, **more),
        backbone, backbone_option, device, out, rank, world, as_json, preset,
    )  # fmt: skip


COMMANDS: dict[str, Callable[..., None]] = {"tags": tags, "text": text, "segment": segment}


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _preset(presets: dict[str, Any], name: str) -> Any:
    if name not in presets:
        raise InputError(choices_sentence("preset", name, presets))
    return presets[name]


def _dense(
    dense: DenseOptions,
    size: int | None,
    resize: str | None,
    scales: str | None,
    flip: bool | None,
    window: int | None,
    stride: int | None,
    refine: bool | None,
) -> DenseOptions:
    numbers = None
    if scales is not None:
        try:
            numbers = tuple(float(scale) for scale in scales.split(","))
        except ValueError:
            raise InputError(f"--scales takes numbers such as 1,0.5 with commas between, not {scales!r}") from None
    changes = _given(size=size, resize=resize, scales=numbers, flip=flip, window=window, stride=stride, refine=refine)
    return replace(dense, **changes)


def _run(
    evaluate: Callable[..., EvaluationResult],
    backbone: str,
    backbone_option: list[str] | None,
    device: str | None,
    out: Path | None,
    rank: int | None,
    world: int | None,
    as_json: bool,
    preset: str,
) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ttd_plugins.evaluation.protocols import process_place
    from ttd_plugins.plugins import load

    own_rank, own_world = process_place()
    adapter: DenseAdapter = load(backbone, device=device, **image_maps.parse_settings(backbone_option))
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Progress goes to standard error, so that a JSON object stands alone.
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def announce(name: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(name, total=total)
            return lambda done: progress.advance(task, done)

        stage: Stage = announce
        result = evaluate(
            adapter,
            out=out,
            rank=own_rank if rank is None else rank,
            world=own_world if world is None else world,
            stage=stage,
        )
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        print_result(result, preset)


def print_result(result: EvaluationResult, preset: str) -> None:
    """Print the figures, every setting behind them, and where the results are."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    content = result.as_dict()
    console = Console(highlight=False, soft_wrap=True)
    settings = content["settings"]
    if content["figures"] is not None:
        table = Table(box=SIMPLE, title=f"{settings['backbone']['name']} on {settings['data']['name']}")
        table.add_column("figure")
        table.add_column("", justify="right")
        for name, value in flatten(content["figures"]).items():
            table.add_row(name, _number(value))
        console.print(table)
    console.print(f"settings (preset {preset}):", markup=False)
    for name, value in flatten({key: value for key, value in settings.items() if key != "names"}).items():
        console.print(f"  {name}: {json.dumps(value)}", markup=False)
    seconds, peak = content["seconds_per_image"], content["peak_memory_bytes"]
    cost = f"{seconds:.2f} s an image, " if seconds is not None else ""
    console.print(f"{content['done']} of {content['images']} images; {cost}peak memory {peak / 2**30:.2f} GiB")
    if content["figures"] is None:
        console.print("other processes have images to do; the last one writes results.json, or run this again")
    elif content["path"]:
        console.print(f"results: {content['path']}", markup=False)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
