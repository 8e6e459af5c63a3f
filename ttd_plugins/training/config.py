"""One typed configuration for a fine-tuning run, from YAML, from flags, or from both; enough to repeat the run."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ttd_plugins.engine import TTDOptions
from ttd_plugins.errors import InputError, MissingDependencyError, choices_sentence, one_sentence

TowerTuning = Literal["lora", "full", "frozen"]


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone is tuned.

    Attributes:
        name: ``family:model@weights``; ``None`` where a backbone object is given.
        options: options of its family, such as the dense mode.
    """

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """Which pairs it is tuned on, and how they are read.

    Attributes:
        source: what :func:`ttd_plugins.data.open_pairs` takes; ``None`` where a loader object is given.
        options: options of ``open_pairs``, such as names of columns.
        captions: which of several captions of an image: the ``first``, a ``random`` one, or ``all`` as pairs of one
            image, which are no negatives of each other.
        image_size: side in pixels, or height and width; ``None`` means the backbone's own.
        workers: processes that decode, for each training process.
        max_skipped: how many unusable samples (a whole number) or which share of them (a fraction) stop the run;
            ``None`` means that none do.
        loader: ``shuffle``, ``drop_last`` and ``buffer`` of :class:`ttd_plugins.data.PairLoader`.
    """

    source: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    captions: Literal["first", "random", "all"] = "first"
    image_size: int | tuple[int, int] | None = None
    workers: int = 0
    max_skipped: int | float | None = None
    loader: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TowersConfig:
    """What is trained: each tower by ``"lora"``, ``"full"`` or not at all (``"frozen"``).

    Attributes:
        image, text: how the tower is tuned.
        rank, alpha, dropout: of LoRA; alpha is twice the rank by default.
        logit_scale: whether the scale and bias of the contrastive logits are trained, fully.
    """

    image: TowerTuning = "lora"
    text: TowerTuning = "lora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    logit_scale: bool = False


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are moved: AdamW (arXiv 1711.05101), linear warm-up, a cosine to zero.

    Attributes:
        learning_rate: peak of the schedule.
        betas, eps: of AdamW.
        weight_decay: of matrices; vectors, norms and biases have none.
        warm_up: steps of linear warm-up.
        clip_norm: largest norm of the whole gradient; ``None`` means no clipping.
        batch_size: pairs in one batch of one process. The contrastive term sees those of all processes.
        accumulation: batches whose gradients are averaged into one step.
        steps: optimiser steps; ``None`` means as many as ``epochs`` make.
        epochs: passes over the data, where ``steps`` is not given.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    warm_up: int = 100
    clip_norm: float | None = 1.0
    batch_size: int = 64
    accumulation: int = 1
    steps: int | None = None
    epochs: int = 1


@dataclass(frozen=True)
class EvaluationConfig:
    """On which labelled set a run is evaluated: before its first step, after its last, and in between.

    Attributes:
        data: ``"scenes"`` or ``"scenes:N"`` for generated scenes, ``"NAME:FOLDER"`` for annotated photographs, the name
            being one that ``ttd eval tags --data`` takes, such as ``coco_captions``; ``None`` means that there is none.
        every: how often in between, in optimiser steps; 0 means not.
        most: how many pictures are taken, from the start; all by default.
        split: of the labelled set, where its layout has several.
        preset: settings of the protocols, as ``ttd eval --preset`` takes them.
        size: input side in pixels; ``None`` means the preset's.
    """

    data: str | None = None
    every: int = 0
    most: int | None = None
    split: str | None = None
    preset: str = "fast"
    size: int | None = None


@dataclass(frozen=True)
class RunConfig:
    """How the run is carried out and watched. Intervals are in optimiser steps; 0 means never.

    Attributes:
        seed: decides the order of the data, fresh LoRA weights and dropout.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``, through accelerate.
        gradient_checkpointing: whether blocks are run again in the backward pass, to save memory.
        compile: whether the blocks of the image tower are compiled, which a GPU gains from; see
            :func:`ttd_plugins.utils.compiling.compile_image_blocks`.
        cpu: whether the CPU is used though there is an accelerator.
        sharded: whether several processes share the weights, gradients and optimiser state out among them (FSDP2), as
            ``accelerate launch --use_fsdp`` asks for too.
        log_every: figures are averaged over so many steps.
        checkpoint_every, keep: how often a checkpoint is written, and how many of the newest are kept. One is always
            written at the end.
        checkpoint_minutes: a checkpoint is also written once so many minutes have passed since the last; 0 means never.
        picture_every, pictures: how often heat maps of how many fixed samples are drawn.
        evaluate_every: how often the callback that evaluates is called.
        trackers: names of accelerate's trackers, such as ``tensorboard`` and ``wandb``.
        nonfinite: whether a step whose loss or gradient is not finite is left out (``"skip"``) or ends the run
            (``"fatal"``); either way the keys of its batch are written to ``nonfinite.jsonl``.
        max_skipped_steps: so many steps may be left out before the run ends.
    """

    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    cpu: bool = False
    sharded: bool = False
    log_every: int = 10
    checkpoint_every: int = 500
    checkpoint_minutes: float = 0.0
    keep: int = 3
    picture_every: int = 0
    pictures: int = 4
    evaluate_every: int = 0
    trackers: tuple[str, ...] = ()
    nonfinite: Literal["skip", "fatal"] = "skip"
    max_skipped_steps: int = 20


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    towers: TowersConfig = field(default_factory=TowersConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ttd: TTDOptions = field(default_factory=TTDOptions)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        towers, optimizer, run, data = self.towers, self.optimizer, self.run, self.data
        evaluation = self.evaluation
        if {towers.image, towers.text} == {"frozen"} and not towers.logit_scale:
            raise InputError("nothing is trained: towers.image and towers.text are both frozen")
        least: list[tuple[str, float | None, float]] = [
            ("towers.rank", towers.rank, 1),
            ("optimizer.batch_size", optimizer.batch_size, 1),
            ("optimizer.accumulation", optimizer.accumulation, 1),
            ("optimizer.steps", optimizer.steps, 1),
            ("optimizer.epochs", optimizer.epochs, 1),
            ("optimizer.warm_up", optimizer.warm_up, 0),
            ("optimizer.learning_rate", optimizer.learning_rate, 0),
            ("optimizer.weight_decay", optimizer.weight_decay, 0),
            ("data.workers", data.workers, 0),
            ("data.max_skipped", data.max_skipped, 0),
            ("evaluation.every", evaluation.every, 0),
            ("evaluation.most", evaluation.most, 1),
            ("evaluation.size", evaluation.size, 1),
            ("run.log_every", run.log_every, 1),
            ("run.checkpoint_every", run.checkpoint_every, 0),
            ("run.checkpoint_minutes", run.checkpoint_minutes, 0),
            ("run.keep", run.keep, 1),
            ("run.picture_every", run.picture_every, 0),
            ("run.pictures", run.pictures, 0),
            ("run.evaluate_every", run.evaluate_every, 0),
            ("run.max_skipped_steps", run.max_skipped_steps, 0),
        ]
        for name, value, smallest in least:
            if value is not None and not value >= smallest:
                raise InputError(f"{name} must be {smallest:g} or more, not {value}")
        if evaluation.every and evaluation.data is None:
            raise InputError(
                "evaluation.every is set and evaluation.data is not; say on what, such as scenes (--evaluate)"
            )
        if not 0 <= towers.dropout < 1:
            raise InputError(f"towers.dropout must be at least 0 and below 1, not {towers.dropout}")
        if towers.alpha is not None and not towers.alpha > 0:
            raise InputError(f"towers.alpha must be above 0, not {towers.alpha}")
        if optimizer.clip_norm is not None and not optimizer.clip_norm > 0:
            raise InputError(f"optimizer.clip_norm must be above 0, or null for none, not {optimizer.clip_norm}")
        if not all(0 <= beta < 1 for beta in optimizer.betas):
            raise InputError(f"optimizer.betas must be at least 0 and below 1, not {list(optimizer.betas)}")

    # From and to YAML ----------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "the configuration") -> TrainConfig:
        """A configuration from nested dictionaries; what is left out has its default.

        Args:
            values: sections of keys.
            where: how messages call it, such as the file that it came from.

        Raises:
            InputError: a key is unknown or a value is of the wrong type or out of range; the message names both.
        """
        return _build(cls, values, where, "")

    @classmethod
    def read(cls, file: Path | str | None = None, changes: Sequence[str] = ()) -> TrainConfig:
        """A configuration from a YAML file, from ``section.key=value`` texts, or from both; the texts win.

        Raises:
            InputError: the file cannot be read, or as :meth:`from_dict`.
            MissingDependencyError: PyYAML is not installed.
        """
        values = _read_yaml(Path(file)) if file is not None else {}
        where = str(file) if file is not None else "the flags"
        # Alone first, so that a mistake in the file is not laid on a flag.
        _build(cls, values, where, "", complete=False)
        for change in changes:
            values = _changed(values, change)
        return _build(cls, values, f"{where} and the flags" if file is not None and changes else where, "")

    def as_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values, which YAML and JSON hold."""
        return _plain(asdict(self))

    def yaml(self) -> str:
        """The whole configuration as YAML; :meth:`read` gives it back."""
        return _yaml().safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)


def first_difference(one: TrainConfig, other: TrainConfig, *, ignore: Sequence[str] = ()) -> str | None:
    """``section.key`` of the first value in which two configurations differ, or ``None``."""
    left, right = one.as_dict(), other.as_dict()
    for section in left:
        for key in left[section]:
            if left[section][key] != right[section][key] and f"{section}.{key}" not in ignore:
                return f"{section}.{key}"
    return None


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError(
            "configurations are YAML, for which PyYAML is not installed; run: pip install 'ttd-plugins[train]'"
        ) from error
    return yaml


def _read_yaml(file: Path) -> dict[str, Any]:
    yaml = _yaml()
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"the configuration {str(file)!r} cannot be read: {error.strerror or one_sentence(error)}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no YAML: {one_sentence(error)}") from error
    if values is not None and not isinstance(values, dict):
        raise InputError(f"{file} must hold sections of keys, not {_said(values)}")
    return values or {}


def _changed(values: dict[str, Any], change: str) -> dict[str, Any]:
    """``values`` with one ``section.key=value`` in it, the value as YAML reads it."""
    path, equals, text = change.partition("=")
    *sections, key = path.strip().split(".")
    if not equals or not sections or not all((*sections, key)):
        raise InputError(f"{change!r} does not follow section.key=value, as in optimizer.learning_rate=1e-4")
    yaml = _yaml()
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"the value of {path} is no YAML: {one_sentence(error)}") from error
    values = dict(values)
    inner = values
    for section in sections:
        below = inner.get(section)
        inner[section] = dict(below) if isinstance(below, Mapping) else {}
        inner = inner[section]
    inner[key] = value
    return values


def _build(kind: Any, values: Any, where: str, path: str, *, complete: bool = True) -> Any:
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: {path or 'it'} must hold keys and values, not {_said(values)}")
    hints, known = get_type_hints(kind), [one.name for one in fields(kind)]
    arguments = {}
    for key, value in values.items():
        at = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise InputError(f"{where}: {choices_sentence('key', at, [f'{path}.{n}' if path else n for n in known])}")
        if value is None and is_dataclass(hints[key]):
            continue  # an empty section
        arguments[key] = _convert(hints[key], value, where, at)
    try:
        return kind(**arguments)
    except InputError as error:
        if not complete and not path:
            return None
        raise InputError(f"{where}: {f'{path}: ' if path else ''}{error}") from error


def _convert(hint: Any, value: Any, where: str, path: str) -> Any:
    """``value`` as the type ``hint`` says, without guessing beyond whole numbers that stand for fractions."""
    if is_dataclass(hint):
        return _build(hint, value, where, path)
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        # YAML 1.1 reads a bare no as false.
        value = "no" if value is False and "no" in arguments else value
        if value in arguments and type(value) in {type(one) for one in arguments}:
            return value
        raise InputError(f"{where}: {choices_sentence(f'value of {path}', str(value), map(str, arguments))}")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for one in arguments:
            if one is not type(None) and _fits(one, value):
                return _convert(one, value, where, path)
    elif _fits(hint, value):
        if hint is float:
            return float(value)
        if origin is tuple:
            kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
            return tuple(_convert(k, v, where, path) for k, v in zip(kinds, value, strict=True))
        return dict(value) if origin is dict else value
    raise InputError(f"{where}: {path} must be {_named(hint)}, not {_said(value)}")


def _fits(hint: Any, value: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint) or origin is dict:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if origin is tuple:
        count = arguments[-1] is Ellipsis or (isinstance(value, Sequence) and len(value) == len(arguments))
        return isinstance(value, list | tuple) and count and all(_fits(arguments[0], one) for one in value)
    if isinstance(value, bool) or hint is bool:
        return hint is bool and isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) or (isinstance(value, str) and _is_number(value))
    return isinstance(value, hint)


def _is_number(text: str) -> bool:
    """Whether a text is a number that YAML 1.1 does not know, such as 1e-4."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _named(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_named(one) for one in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list, each of it {_named(arguments[0])}"
        return f"a list of {len(arguments)}, each of it {_named(arguments[0])}"
    if origin is dict or is_dataclass(hint):
        return "keys and values"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}[hint]


def _said(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return one_sentence(ValueError(f"the text {value!r}" if isinstance(value, str) else str(value)), 80)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    return value


def replaced(config: TrainConfig, section: str, **changes: Any) -> TrainConfig:
    """``config`` with some values of one section changed."""
    part = dataclasses.replace(getattr(config, section), **changes)
    return dataclasses.replace(config, **{section: part})
