"""``ttd eval``: the paper's three protocols, multi-label classification, and retrieval on plain pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttd_plugins.cli import completion, image_maps
from ttd_plugins.cli.config_flags import ConfigFlag, flags_of, nested, print_json, with_flags
from ttd_plugins.cli.help_pages import DATA, EVALUATION, OUTPUT, RUN, examples
from ttd_plugins.cli.train import PAIR_COLUMNS
from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.evaluation.protocol_options import (
    CLASSIFY_PRESETS,
    RETRIEVAL_PRESETS,
    SEGMENT_PRESETS,
    TAG_PRESETS,
    TEXT_PRESETS,
)
from ttd_plugins.utils.configuration import from_mapping, plain_values
from ttd_plugins.utils.settings import flatten

if TYPE_CHECKING:
    from ttd_plugins.evaluation.protocols import EvaluationResult

CAPTION_SETS = ("coco_captions", "cc3m_tagmask")
MASK_SETS = (
    "voc", "coco_object", "context59", "context60", "ade20k", "cityscapes", "coco_stuff", "coco_panoptic", "folder",
)  # fmt: skip
LABEL_SETS = ("voc2007", "voc2012", "coco", "nus_wide", "table")
PRESETS = tuple({**TAG_PRESETS, **TEXT_PRESETS, **SEGMENT_PRESETS, **CLASSIFY_PRESETS, **RETRIEVAL_PRESETS})

RootArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the data set.", show_default=False)]
CaptionDataOption = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="|".join(CAPTION_SETS),
        help="The data set: images with captions and masks.",
        rich_help_panel=DATA,
        autocompletion=completion.one_of(CAPTION_SETS),
    ),
]
SegmentationDataOption = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="NAME",
        help="voc, coco_object, context59, context60, ade20k, cityscapes, coco_stuff or coco_panoptic; or folder: "
        "images, masks and a list of classes of your own.",
        show_default=False,
        rich_help_panel=DATA,
        autocompletion=completion.one_of(MASK_SETS),
    ),
]
LabelDataOption = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="NAME",
        help="voc2007, voc2012, coco or nus_wide; or table: images and labels of your own; or any data set of "
        "`ttd eval segment`, whose masks show which classes an image has.",
        show_default=False,
        rich_help_panel=DATA,
        autocompletion=completion.one_of((*LABEL_SETS, *MASK_SETS)),
    ),
]
ClassesOption = Annotated[
    str | None,
    typer.Option(
        "--classes",
        metavar="NAME|FILE",
        help="Other classes, drawn from the data set's own: a known list, such as voc or coco_things, or a file; see "
        "docs/evaluation.md.  [default: the data set's own]",
        rich_help_panel=DATA,
    ),
]
PresetOption = Annotated[
    str,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="Named settings: paper or fast; for segment also tcl and naclip. Other flags change single ones.",
        rich_help_panel=EVALUATION,
        autocompletion=completion.one_of(PRESETS),
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Folder for records and results.json; the same command continues an interrupted one.  [default: only "
        "print]",
        rich_help_panel=OUTPUT,
    ),
]
SplitOption = Annotated[
    str | None, typer.Option("--split", metavar="NAME", help="val or train.  [default: val]", rich_help_panel=DATA)
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", help="Only the first images.  [default: all]", rich_help_panel=DATA),
]
RankOption = Annotated[
    int | None,
    typer.Option("--rank", metavar="N", help="Number of this process.  [default: RANK or 0]", rich_help_panel=RUN),
]
WorldOption = Annotated[
    int | None,
    typer.Option(
        "--world",
        metavar="N",
        help="Processes that share --out.  [default: WORLD_SIZE or 1]",
        rich_help_panel=RUN,
    ),
]


def _flags(presets: dict[str, Any]) -> list[ConfigFlag]:
    paper = presets["paper"]
    return flags_of(type(paper), defaults=paper, default_note=" in the preset paper")


@examples(
    ("COCO's validation images, with the paper's settings", "ttd eval tags coco/ --out runs/tags"),
    (
        "A pretrained backbone on a hundred images, quickly",
        "ttd eval tags coco/ --backbone open_clip:ViT-B-16@openai \\\n    --preset fast --limit 100",
    ),
    ("A run of your own", "ttd eval tags coco/ --backbone runs/mine --preset fast --limit 100"),
)
@with_flags(_flags(TAG_PRESETS))
def tags(
    root: RootArgument,
    data: CaptionDataOption = "coco_captions",
    backbone: image_maps.BackboneOption = image_maps.DEFAULT_BACKBONE,
    backbone_option: image_maps.BackboneSettings = None,
    preset: PresetOption = "paper",
    out: OutOption = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    rank: RankOption = None,
    world: WorldOption = None,
    device: image_maps.DeviceOption = None,
    fast: image_maps.FastOption = False,
    bfloat16: image_maps.BFloat16Option = False,
    as_json: image_maps.JsonOption = False,
    *,
    given: dict[str, Any],
) -> None:
    """Measure which words of captions are found in their images.

    Baselines: the image score, the text score, and all nouns.
    """
    from ttd_plugins.evaluation.datasets import open_captions
    from ttd_plugins.evaluation.protocols import evaluate_tags

    options = _options(TAG_PRESETS, preset, given)
    reader = open_captions(data, root, **_without_none(split=split, limit=limit))
    _run(
        lambda adapter, **more: evaluate_tags(adapter, reader, options, **more),
        backbone, backbone_option, device, out, rank, world, as_json, preset, fast, bfloat16,
    )  # fmt: skip


@examples(
    ("COCO's validation images, with the paper's settings", "ttd eval text coco/ --out runs/text"),
    ("Without test-time augmentation", "ttd eval text coco/ --preset fast --limit 100"),
)
@with_flags(_flags(TEXT_PRESETS))
def text(
    root: RootArgument,
    data: CaptionDataOption = "coco_captions",
    backbone: image_maps.BackboneOption = image_maps.DEFAULT_BACKBONE,
    backbone_option: image_maps.BackboneSettings = None,
    preset: PresetOption = "paper",
    out: OutOption = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    rank: RankOption = None,
    world: WorldOption = None,
    device: image_maps.DeviceOption = None,
    fast: image_maps.FastOption = False,
    bfloat16: image_maps.BFloat16Option = False,
    as_json: image_maps.JsonOption = False,
    *,
    given: dict[str, Any],
) -> None:
    """Measure how well caption maps fit what the captions name.

    A caption's map is compared with the union of the masks of its true tags.
    """
    from ttd_plugins.evaluation.datasets import open_captions
    from ttd_plugins.evaluation.protocols import evaluate_text

    options = _options(TEXT_PRESETS, preset, given)
    reader = open_captions(data, root, **_without_none(split=split, limit=limit))
    _run(
        lambda adapter, **more: evaluate_text(adapter, reader, options, **more),
        backbone, backbone_option, device, out, rank, world, as_json, preset, fast, bfloat16,
    )  # fmt: skip


@examples(
    ("Images, masks and classes of your own", "ttd eval segment my_set/ --data folder --preset fast --out masks"),
    ("Pascal VOC, as in the paper", "ttd eval segment VOCdevkit/VOC2012 --data voc --out runs/voc"),
    (
        "ADE20K on two GPUs",
        "torchrun --nproc-per-node 2 -m ttd_plugins.cli eval segment ade20k/ \\\n"
        "    --data ade20k --backbone open_clip:ViT-B-16@openai --out runs/ade20k",
    ),
)
@with_flags(_flags(SEGMENT_PRESETS))
def segment(
    root: RootArgument,
    data: SegmentationDataOption,
    backbone: image_maps.BackboneOption = image_maps.DEFAULT_BACKBONE,
    backbone_option: image_maps.BackboneSettings = None,
    preset: PresetOption = "paper",
    out: OutOption = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    classes: ClassesOption = None,
    ignore: Annotated[
        int | None,
        typer.Option(
            "--ignore",
            metavar="N",
            help="Mask value without a label, for --data folder.  [default: 255]",
            rich_help_panel=DATA,
        ),
    ] = None,
    rank: RankOption = None,
    world: WorldOption = None,
    device: image_maps.DeviceOption = None,
    fast: image_maps.FastOption = False,
    bfloat16: image_maps.BFloat16Option = False,
    as_json: image_maps.JsonOption = False,
    *,
    given: dict[str, Any],
) -> None:
    """Measure open-vocabulary segmentation.

    Each pixel is assigned one of the data set's classes by their names.
    """
    from ttd_plugins.evaluation.datasets import open_segmentation
    from ttd_plugins.evaluation.protocols import evaluate_segment

    options = _options(SEGMENT_PRESETS, preset, given)
    reader = open_segmentation(data, root, **_without_none(split=split, limit=limit, classes=classes, ignore=ignore))
    _run(
        lambda adapter, **more: evaluate_segment(adapter, reader, options, **more),
        backbone, backbone_option, device, out, rank, world, as_json, preset, fast, bfloat16,
    )  # fmt: skip


@examples(
    ("A table of images and labels", "ttd eval classify labels.csv --data table --preset fast --out labels"),
    ("The masks of your own set as labels", "ttd eval classify my_set/ --data folder --preset fast"),
    ("Pascal VOC 2007, as in TagCLIP", "ttd eval classify VOCdevkit/VOC2007 --data voc2007 --out runs/voc2007"),
)
@with_flags(_flags(CLASSIFY_PRESETS))
def classify(
    root: Annotated[
        Path,
        typer.Argument(metavar="FOLDER|FILE", help="Folder of the data set, or the table.", show_default=False),
    ],
    data: LabelDataOption,
    backbone: image_maps.BackboneOption = image_maps.DEFAULT_BACKBONE,
    backbone_option: image_maps.BackboneSettings = None,
    preset: PresetOption = "paper",
    out: OutOption = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            metavar="NAME",
            help="Split of the data set; for a table a value of its column split.  [default: the data set's]",
            rich_help_panel=DATA,
        ),
    ] = None,
    limit: LimitOption = None,
    classes: ClassesOption = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="FOLDER",
            help="Folder that relative paths of a table start from.  [default: the table's]",
            rich_help_panel=DATA,
        ),
    ] = None,
    image_column: Annotated[
        str | None,
        typer.Option(
            "--image-column",
            metavar="NAME",
            help="Column of image paths of a table.  [default: by its name]",
            rich_help_panel=DATA,
        ),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            "--label-column",
            metavar="NAME",
            help="Column of labels of a table.  [default: by its name]",
            rich_help_panel=DATA,
        ),
    ] = None,
    skip_missing: Annotated[
        bool,
        typer.Option(
            "--skip-missing", help="Leave out images of nus_wide or a table that are missing.", rich_help_panel=DATA
        ),
    ] = False,
    rank: RankOption = None,
    world: WorldOption = None,
    device: image_maps.DeviceOption = None,
    fast: image_maps.FastOption = False,
    bfloat16: image_maps.BFloat16Option = False,
    as_json: image_maps.JsonOption = False,
    *,
    given: dict[str, Any],
) -> None:
    """Measure multi-label classification by the names of classes.

    Scores: the nearest patch (pixel), the pooled embedding (image), and the mean of both (combined).
    """
    from ttd_plugins.evaluation.datasets import open_labels
    from ttd_plugins.evaluation.protocols import evaluate_classify

    options = _options(CLASSIFY_PRESETS, preset, given)
    of_table = _without_none(
        images=images, image_column=image_column, label_column=label_column, skip_missing=skip_missing or None
    )
    reader = open_labels(data, root, **_without_none(split=split, limit=limit, classes=classes), **of_table)
    _run(
        lambda adapter, **more: evaluate_classify(adapter, reader, options, **more),
        backbone, backbone_option, device, out, rank, world, as_json, preset, fast, bfloat16,
    )  # fmt: skip


@examples(
    ("Held-out pairs of your own", "ttd eval retrieval heldout/ --out runs/retrieval"),
    ("Also the losses of TTD on them", "ttd eval retrieval heldout/ --losses --json"),
    (
        "Karpathy's test split of COCO",
        "ttd eval retrieval dataset_coco.json --split test --images coco/ \\\n"
        "    --backbone siglip:ViT-B-16-SigLIP@webli",
    ),
)
@with_flags([*_flags(RETRIEVAL_PRESETS), *PAIR_COLUMNS])
def retrieval(
    pairs: Annotated[
        str,
        typer.Argument(metavar="PAIRS", help="Folder, table, COCO JSON, shards or hf:NAME.", show_default=False),
    ],
    backbone: image_maps.BackboneOption = image_maps.DEFAULT_BACKBONE,
    backbone_option: image_maps.BackboneSettings = None,
    preset: PresetOption = "paper",
    out: OutOption = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            metavar="NAME",
            help="Split of the pairs, if their layout has some.  [default: the layout's]",
            rich_help_panel=DATA,
        ),
    ] = None,
    limit: LimitOption = None,
    rank: RankOption = None,
    world: WorldOption = None,
    allow_pipe: image_maps.AllowPipeOption = False,
    device: image_maps.DeviceOption = None,
    fast: image_maps.FastOption = False,
    bfloat16: image_maps.BFloat16Option = False,
    as_json: image_maps.JsonOption = False,
    *,
    given: dict[str, Any],
) -> None:
    """Measure image-text retrieval on pairs without annotations.

    R@1, R@5 and R@10 in both directions, with all captions of an image, and the contrastive loss of held-out pairs.
    """
    from ttd_plugins.data.shard_urls import allow_pipe as pipe_permission
    from ttd_plugins.evaluation.datasets import PlainPairs
    from ttd_plugins.evaluation.protocols import evaluate_retrieval

    columns = {flag.path: given.pop(flag.path) for flag in PAIR_COLUMNS if flag.path in given}
    options = _options(RETRIEVAL_PRESETS, preset, given)
    more = {path.rpartition(".")[2]: value for path, value in columns.items()}
    with pipe_permission(allow_pipe):
        reader = PlainPairs(pairs, **_without_none(split=split, limit=limit), **more)
    _run(
        lambda adapter, **more: evaluate_retrieval(adapter, reader, options, **more),
        backbone, backbone_option, device, out, rank, world, as_json, preset, fast, bfloat16,
    )  # fmt: skip


COMMANDS: dict[str, Callable[..., None]] = {
    "tags": tags,
    "text": text,
    "segment": segment,
    "classify": classify,
    "retrieval": retrieval,
}


def _without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _options(presets: dict[str, Any], preset: str, given: dict[str, Any]) -> Any:
    """Return a preset with the values of the given flags."""
    if preset not in presets:
        raise InputError(choices_sentence("preset", preset, presets))
    values = plain_values(presets[preset])
    changes = nested(given)
    for section in (name for name in tuple(changes) if isinstance(values.get(name), dict)):
        values[section] |= changes.pop(section)
    return from_mapping(type(presets[preset]), values | changes, "the flags")


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
    fast: bool,
    bfloat16: bool,
) -> None:
    from ttd_plugins.caption_maps import backbone_notes
    from ttd_plugins.evaluation.protocols import process_place
    from ttd_plugins.utils.progress import progress_bars

    own_rank, own_world = process_place()
    settings = image_maps.parse_settings(backbone_option)
    adapter = image_maps.load_backbone(backbone, settings, device=device, fast=fast, bfloat16=bfloat16)
    # Labelled data sets are photographs.
    image_maps.warn_of(backbone_notes(adapter.description))
    with progress_bars(width=18) as stage:
        result = evaluate(
            adapter,
            out=out,
            rank=own_rank if rank is None else rank,
            world=own_world if world is None else world,
            stage=stage,
        )
    if as_json:
        print_json(result.as_dict())
    else:
        print_result(result, preset)


def print_result(result: EvaluationResult, preset: str) -> None:
    """Print the metrics, every setting, and where the results are."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    content = result.as_dict()
    console = Console(highlight=False, soft_wrap=True)
    settings = content["settings"]
    if content["figures"] is not None:
        figures = dict(content["figures"])
        classes = figures.pop("classes", {}) if content["protocol"] == "classify" else {}
        table = Table(box=SIMPLE, title=f"{settings['backbone']['name']} on {settings['data']['name']}")
        table.add_column("metric")
        table.add_column("", justify="right")
        for name, value in flatten(figures).items():
            table.add_row(name, _number(value))
        console.print(table)
        if classes:
            console.print(_class_table(classes))
    console.print(f"settings (preset {preset}):", markup=False)
    for name, value in flatten({key: value for key, value in settings.items() if key != "names"}).items():
        console.print(f"  {name}: {json.dumps(value)}", markup=False)
    seconds, peak = content["seconds_per_image"], content["peak_memory_bytes"]
    memory = f"peak memory {peak / 2**30:.2f} GiB" if peak else "peak memory unknown on this system"
    cost = f"{seconds:.2f} s an image, " if seconds is not None else ""
    console.print(f"{content['done']} of {content['images']} images; {cost}{memory}")
    if content["figures"] is None:
        console.print("other processes are not done; the last one writes results.json, or run this command again")
    elif content["path"]:
        console.print(f"results: {content['path']}", markup=False)


def _class_table(classes: dict[str, dict[str, Any]]) -> Any:
    """Return a table of the classes that occur, the worst average precision of the pixel score last."""
    from rich.box import SIMPLE
    from rich.table import Table

    occur = {name: row for name, row in classes.items() if row["positives"]}
    columns = list(next(iter(occur.values()), {}))
    table = Table(box=SIMPLE)
    table.add_column("class")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for name, row in sorted(occur.items(), key=lambda item: -item[1]["ap_pixel"]):
        table.add_row(name, *(_number(row[column]) for column in columns))
    return table


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
