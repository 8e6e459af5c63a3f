"""The configuration of a fine-tuning run: one class for YAML files, ``--set``, flags and Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.options import TTDOptions
from ttd_plugins.utils import configuration as configurations
from ttd_plugins.utils.configuration import MAX_SEED, Flag, Float, Int, Text, configuration, option

Schedule = Literal["cosine", "linear", "constant"]
TowerTuning = Literal["lora", "full", "frozen"]
# YAML 1.1 reads a bare no as false.
Precision = Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(lambda value: "no" if value is False else value)]


@configuration(section="Model")
class BackboneConfig:
    """The backbone that is tuned."""

    name: Annotated[
        Text | None,
        option(
            "Name, family:model@weights, or a run, NAME+LORA or an export; null where a backbone object is passed.",
            flag="--backbone",
        ),
    ] = None
    options: Annotated[dict[str, Any], option("Options of its family.", flag="--backbone-option")] = field(
        default_factory=dict
    )


@configuration(section="Data")
class DataConfig:
    """The image-text pairs, and how they are read."""

    source: Annotated[
        Text | None,
        option(
            "Folder, table, COCO JSON, shards or dataset; null where a loader is passed.",
            flag="--data",
            metavar="PAIRS",
        ),
    ] = None
    options: Annotated[
        dict[str, Any],
        option("Options of ttd_plugins.data.open_pairs, such as names of columns.", flag="--data-option"),
    ] = field(default_factory=dict)
    captions: Annotated[
        Literal["first", "random", "all"],
        option(
            "Which captions of an image: its first, a random one, or all as pairs that are no negatives of each other."
        ),
    ] = "first"
    image_size: Annotated[
        Int | tuple[Int, Int] | None,
        option("Input size in pixels, a side or (height, width); null means the backbone's own.", flag="--size"),
    ] = None
    workers: Annotated[Int, option("Processes that decode images, for each training process.", ge=0)] = 0
    max_skipped: Annotated[
        Int | Float | None,
        option(
            "Stop past this many unusable samples (a whole number) or this share of them (a fraction); null means "
            "never.",
            ge=0,
        ),
    ] = None
    loader: Annotated[
        dict[str, Any],
        option("Options shuffle, drop_last and buffer of ttd_plugins.data.PairLoader.", flag="--loader-option"),
    ] = field(default_factory=dict)


@configuration()
class LoaderConfig:
    """The keys of ``data.loader``; see :class:`ttd_plugins.data.PairLoader`."""

    shuffle: Annotated[Flag, option("Shuffle the order in each epoch.")] = True
    drop_last: Annotated[Flag, option("Drop the samples of an incomplete last batch.")] = True
    buffer: Annotated[Int, option("Undecoded samples in the shuffle buffer of a stream.", ge=1)] = 1000


@configuration(section="Model")
class TowersConfig:
    """What is trained of each tower: LoRA, all weights (``"full"``) or nothing (``"frozen"``)."""

    image: Annotated[TowerTuning, option("Tuning of the image tower.", flag="--image-tower")] = "lora"
    text: Annotated[TowerTuning, option("Tuning of the text tower.", flag="--text-tower")] = "lora"
    rank: Annotated[Int, option("LoRA rank.", ge=1)] = 16
    alpha: Annotated[Float | None, option("LoRA alpha; null means twice the rank.", gt=0)] = None
    dropout: Annotated[Float, option("LoRA dropout.", ge=0, lt=1)] = 0.0
    modules: Annotated[
        Text | None,
        option(
            "Regular expression: of the modules that LoRA can wrap, only those in whose names it is found; null means "
            "all.",
            flag="--lora-modules",
            metavar="REGEX",
        ),
    ] = None
    logit_scale: Annotated[Flag, option("Train the scale and bias of the contrastive logits.")] = False
    lora_from: Annotated[
        Text | None,
        option(
            "Folder of a LoRA to start from, of peft or of `ttd export --form lora`; its towers, rank, alpha, dropout "
            "and modules replace those given here; null means new LoRA.",
            metavar="FOLDER",
        ),
    ] = None
    lora_scale: Annotated[
        Float,
        option(
            "Factor of LoRA in the backbone that the run yields, in its evaluations and its export: 1 is as trained, "
            "less keeps more of the original model. Checkpoints store LoRA as trained.",
            ge=0,
        ),
    ] = 1.0


@configuration(section="Optimizer")
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) with linear warm-up and a learning-rate schedule."""

    learning_rate: Annotated[Float, option("Peak learning rate.", flag="--lr", ge=0)] = 1e-4
    betas: Annotated[
        tuple[
            Annotated[Float, option("A decay rate.", ge=0, lt=1)], Annotated[Float, option("A decay rate.", ge=0, lt=1)]
        ],
        option("Decay rates of AdamW's moments."),
    ] = (0.9, 0.98)
    eps: Annotated[Float, option("Epsilon of AdamW.", ge=0)] = 1e-6
    weight_decay: Annotated[Float, option("Weight decay of matrices; vectors, norms and biases have none.", ge=0)] = (
        0.01
    )
    warm_up: Annotated[Int, option("Steps of linear warm-up; a tenth of the training if it is no shorter.", ge=0)] = 100
    schedule: Annotated[
        Schedule,
        option(
            "Learning rate after the warm-up: a cosine to zero (cosine), a straight line to zero (linear) or constant."
        ),
    ] = "cosine"
    clip_norm: Annotated[Float | None, option("Largest global gradient norm; null means no clipping.", gt=0)] = 1.0
    batch_size: Annotated[
        Int, option("Pairs in a batch of one process; the contrastive loss sees those of all processes.", ge=1)
    ] = 64
    accumulation: Annotated[Int, option("Batches whose gradients are averaged into one step.", ge=1)] = 1
    steps: Annotated[Int | None, option("Optimizer steps; null means as many as the epochs make.", ge=1)] = None
    epochs: Annotated[Int, option("Passes over the data, where steps is not set.", ge=1)] = 1


@configuration(renamed={"most": "limit"}, section="Evaluation")
class EvaluationConfig:
    """The labelled set on which a run is evaluated: before its first step, after its last, and in between."""

    data: Annotated[
        Text | None,
        option(
            "Held-out set: scenes, scenes:N, pairs:SPEC, or NAME:FOLDER with a data set of ttd eval, such as "
            "coco_captions:FOLDER; null means no evaluation.",
            flag="--evaluate",
            metavar="SET",
        ),
    ] = None
    every: Annotated[
        Int, option("Steps between evaluations; 0 means none in between.", flag="--evaluate-every", ge=0)
    ] = 0
    limit: Annotated[Int | None, option("Only the first images; null means all.", flag="--evaluate-limit", ge=1)] = None
    split: Annotated[
        Text | None, option("Split of the set; null means the set's default.", flag="--evaluate-split")
    ] = None
    preset: Annotated[Text, option("Preset of the protocols, as in ttd eval.", flag="--evaluate-preset")] = "fast"
    size: Annotated[
        Int | None, option("Input side in pixels; null means the preset's.", flag="--evaluate-size", ge=1)
    ] = None
    best: Annotated[
        Text | None,
        option(
            "Metric of the evaluation, such as retrieval/r1, whose best checkpoint is kept; null means none.",
            flag="--best",
            metavar="METRIC",
        ),
    ] = None
    best_mode: Annotated[
        Literal["max", "min"] | None,
        option(
            "Whether the best value is the largest or the smallest; null means the smallest for losses, mfpr and mfnr, "
            "and else the largest.",
            flag="--best-mode",
        ),
    ] = None
    patience: Annotated[
        Int | None,
        option(
            "Stop early after this many evaluations without a better value; null means never.", flag="--patience", ge=1
        ),
    ] = None


@configuration(renamed={"picture_every": "heatmap_every", "pictures": "heatmap_samples"}, section="Run")
class RunConfig:
    """How the run is carried out and watched. Intervals are in optimizer steps; 0 means never."""

    seed: Annotated[
        Int, option("Decides the order of the data, fresh LoRA weights and dropout.", ge=0, le=MAX_SEED)
    ] = 0
    mixed_precision: Annotated[Precision, option("Mixed precision through accelerate.", flag="--precision")] = "no"
    gradient_checkpointing: Annotated[
        Flag, option("Use activation checkpointing: less memory, more time.", flag="--grad-checkpointing")
    ] = False
    compile: Annotated[Flag, option("Compile the blocks of the image tower; faster on GPUs.")] = False
    cpu: Annotated[Flag, option("Use the CPU although there is an accelerator.")] = False
    sharded: Annotated[Flag, option("Shard weights, gradients and optimizer state over the processes (FSDP2).")] = False
    weight_ema: Annotated[
        Float | None,
        option(
            "Decay of a moving average of the trained weights, such as 0.999, which is evaluated and exported; null "
            "means no average.",
            gt=0,
            lt=1,
        ),
    ] = None
    log_every: Annotated[
        Int, option("Steps between log lines, which average metrics over them.", ge=1, section="Output")
    ] = 10
    checkpoint_every: Annotated[
        Int, option("Steps between checkpoints; one is always written at the end.", ge=0, section="Output")
    ] = 500
    checkpoint_minutes: Annotated[
        Float, option("Minutes after which a checkpoint is written as well.", ge=0, section="Output")
    ] = 0.0
    keep: Annotated[Int, option("How many of the newest checkpoints are kept.", ge=1, section="Output")] = 3
    heatmap_every: Annotated[Int, option("Steps between heat maps of fixed samples.", ge=0, section="Output")] = 0
    heatmap_samples: Annotated[Int, option("How many fixed samples.", ge=0, section="Output")] = 4
    evaluate_every: Annotated[
        Int, option("Steps between calls of the callback that evaluates.", flag="--callback-every", ge=0)
    ] = 0
    trackers: Annotated[
        tuple[Text, ...],
        option(
            "Trackers of accelerate, such as tensorboard and wandb; repeatable.", flag="--tracker", section="Output"
        ),
    ] = ()
    nonfinite: Annotated[
        Literal["skip", "fatal"],
        option("Skip a step whose loss or gradient is not finite, or end the run; its keys go to nonfinite.jsonl."),
    ] = "skip"
    max_skipped_steps: Annotated[Int, option("Largest number of skipped steps; with more, the run ends.", ge=0)] = 20
    max_skipped_share: Annotated[
        Float,
        option(
            "Largest share of skipped steps; with more, the run ends. Every share allows three skipped steps.",
            ge=0,
            le=1,
        ),
    ] = 0.1


@configuration()
class TrainConfig:
    """Everything that decides a run.

    Raises:
        InputError: nothing is trained, or an interval is set for an evaluation that has no data.
    """

    backbone: Annotated[BackboneConfig, option("The backbone.")] = field(default_factory=BackboneConfig)
    data: Annotated[DataConfig, option("The pairs.")] = field(default_factory=DataConfig)
    towers: Annotated[TowersConfig, option("What is trained.")] = field(default_factory=TowersConfig)
    optimizer: Annotated[OptimizerConfig, option("The optimizer and its schedule.")] = field(
        default_factory=OptimizerConfig
    )
    ttd: Annotated[TTDOptions, option("The method.")] = field(default_factory=TTDOptions)
    evaluation: Annotated[EvaluationConfig, option("Evaluation during the run.")] = field(
        default_factory=EvaluationConfig
    )
    run: Annotated[RunConfig, option("Logs, checkpoints and devices.")] = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        configurations.from_mapping(LoaderConfig, self.data.loader, "data.loader")
        # Both are given apart, and twice would be a TypeError.
        for section, reserved in (("backbone", "name"), ("data", "spec")):
            if reserved in getattr(self, section).options:
                raise InputError(f"{section}.options cannot have the key {reserved!r}; remove it")
        if {self.towers.image, self.towers.text} == {"frozen"} and not self.towers.logit_scale:
            raise InputError("nothing is trained: towers.image and towers.text are both frozen")
        if "lora" not in (self.towers.image, self.towers.text):
            for name, unused in (("lora_from", None), ("lora_scale", 1)):
                if getattr(self.towers, name) != unused:
                    raise InputError(f"towers.{name} needs LoRA, and neither towers.image nor towers.text is lora")
        if self.evaluation.patience is not None and self.evaluation.best is None:
            raise InputError(
                "evaluation.patience needs the metric to watch; name it in evaluation.best (--best), as in retrieval/r1"
            )
        if self.evaluation.every and self.evaluation.data is None:
            raise InputError(
                "evaluation.every is set and evaluation.data is not; name a labelled set, such as scenes (--evaluate)"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "the configuration") -> TrainConfig:
        """Return a configuration from nested dictionaries; missing keys have their defaults.

        Args:
            values: sections of keys.
            where: name of the source for messages, such as its file.

        Raises:
            InputError: a key is unknown, or a value has the wrong type or range; the message names both.
        """
        return configurations.from_mapping(cls, values, where)

    @classmethod
    def read(cls, file: Path | str | None = None, changes: Sequence[str] | Mapping[str, Any] = ()) -> TrainConfig:
        """Return a configuration from a YAML file, from changes, or from both; changes take precedence.

        Args:
            file: the YAML file.
            changes: ``section.key=value`` texts, or a mapping from ``section.key`` to values.

        Raises:
            InputError: the file cannot be read, or as :meth:`from_dict`.
            MissingDependencyError: PyYAML is not installed.
        """
        values = _read_file(Path(file)) if file is not None else {}
        where = str(file) if file is not None else "the flags"
        # The file alone first, so that its mistakes are not blamed on a flag.
        if not configurations.has_only_joint_mistakes(cls, values):
            cls.from_dict(values, where=where)
        if not isinstance(changes, Mapping):
            changes = dict(parse_change(change) for change in changes)
        for path, value in changes.items():
            values = _with_value(values, path.split("."), value)
        return cls.from_dict(values, where=f"{where} and the flags" if file is not None and changes else where)

    def as_dict(self) -> dict[str, Any]:
        """Return nested dictionaries of values that YAML and JSON can store."""
        plain: dict[str, Any] = configurations.plain_values(self)
        return plain

    def yaml(self) -> str:
        """Return the whole configuration as YAML, which :meth:`read` reads."""
        text: str = configurations.import_yaml().safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)
        return text


def replaced(config: TrainConfig, section: str, **changes: Any) -> TrainConfig:
    """Return ``config`` with some values of one section changed."""
    part = dataclasses.replace(getattr(config, section), **changes)
    return dataclasses.replace(config, **{section: part})


def _read_file(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_sentence(error)
        raise InputError(f"the configuration {str(file)!r} cannot be read: {reason}") from error
    try:
        values = configurations.read_yaml(text)
    except InputError as error:
        raise InputError(f"{file} is {error}") from error
    if values is not None and not isinstance(values, dict):
        raise InputError(f"{file} must have sections of keys, not {configurations.describe_value(values)}")
    return values or {}


def parse_change(change: str) -> tuple[str, Any]:
    """Split ``section.key=value`` and read the value as YAML."""
    path, equals, text = change.partition("=")
    names = path.strip().split(".")
    if not equals or len(names) < 2 or not all(names):
        raise InputError(f"{change!r} does not follow section.key=value, as in optimizer.learning_rate=1e-4")
    try:
        return path.strip(), configurations.read_yaml(text)
    except InputError as error:
        raise InputError(f"the value of {path} is {error}") from error


def _with_value(values: Mapping[str, Any], names: Sequence[str], value: Any) -> dict[str, Any]:
    """Return a copy of nested mappings with one value set."""
    copied = dict(values)
    if len(names) == 1:
        copied[names[0]] = value
        return copied
    inner = copied.get(names[0])
    copied[names[0]] = _with_value(inner if isinstance(inner, Mapping) else {}, names[1:], value)
    return copied
