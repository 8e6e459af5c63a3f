"""Export a fine-tuned backbone: as files of its own library, as LoRA alone, or as weights alone.

An export has safetensors and JSON files and a model card. Its folder is complete or absent: everything is written to a
hidden folder beside it, which is renamed at the end.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ttd_plugins._version import __version__
from ttd_plugins.adapter import ExportedModel
from ttd_plugins.backbone_sources import load_tuned, source_kind, split_source, split_step
from ttd_plugins.engine_checks import require_adapter
from ttd_plugins.errors import InputError, TTDError, choices_sentence, one_sentence
from ttd_plugins.export_record import CARD_FILE, ExportRecord, write_record
from ttd_plugins.plugins import load
from ttd_plugins.utils.deprecation import RenamedAttribute, renamed_keyword
from ttd_plugins.utils.files import given_path, write_atomic
from ttd_plugins.utils.output_folder import new_folder, require_new
from ttd_plugins.utils.settings import flatten

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter

log = logging.getLogger(__name__)

Form = Literal["native", "lora", "weights"]
FORMS: tuple[Form, ...] = get_args(Form)
WEIGHTS_FILE = "model.safetensors"
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{1,40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

CITATION = """\
@inproceedings{jo2024ttd,
  title     = {{TTD}: Text-Tag Self-Distillation Enhancing Image-Text Alignment in {CLIP} to Alleviate Single Tag Bias},
  author    = {Jo, Sanghyun and Ryu, Soohyun and Kim, Sungyub and Yang, Eunho and Kim, Kyungsu},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year      = {2024}
}"""


@renamed_keyword("figures", "metrics")
@dataclass(frozen=True)
class ModelCard:
    """Content of a model card beyond how to load the model; missing parts are left out.

    Attributes:
        base: name of the backbone that was fine-tuned; by default the adapter's own.
        data: the training data, as a text or as named facts.
        settings: named settings of the run; a nested mapping becomes ``outer.inner``.
        metrics: metrics by name, or mappings of metrics by heading.
        licence: an identifier such as ``"apache-2.0"``, or a note; by default that the licences of the base and of the
            data apply.
        repository: ``USER/NAME`` on the hub, from which the card says how to load the model; ``None`` for a folder.
    """

    base: str | None = None
    data: str | Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    repository: str | None = None

    figures = RenamedAttribute("metrics")


@dataclass(frozen=True)
class Exported:
    """Result of :func:`export_backbone`.

    Attributes:
        folder: the folder.
        form: ``"native"``, ``"lora"`` or ``"weights"``.
        files: every file, relative to the folder, sorted.
        model: how to load it.
    """

    folder: Path
    form: Form
    files: tuple[str, ...]
    model: ExportedModel

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes as a mapping that JSON can store."""
        return {
            "folder": str(self.folder),
            "form": self.form,
            "files": list(self.files),
            "library": self.model.library,
            "load": list(self.model.at(self.folder)),
            "name": None if self.model.name is None else self.model.name.replace("PATH", str(self.folder)),
            "notes": [note.replace("PATH", str(self.folder)) for note in self.model.notes],
        }


def export_backbone(
    adapter: DenseAdapter,
    out: str | Path,
    *,
    form: Form = "native",
    card: ModelCard | None = None,
    lora_scale: float = 1.0,
) -> Exported:
    """Write a backbone in its current state, with a model card, to the new folder ``out``.

    The adapter is bitwise unchanged afterwards, with LoRA attached, so that training can continue. ``"native"`` and
    ``"weights"`` merge LoRA temporarily. ``"native"`` also loads the export with the backbone's library, if it can be
    imported, and compares embeddings; this needs the memory of a second model.

    Args:
        adapter: the backbone, with or without LoRA.
        out: the folder; it must not exist, or be empty.
        form: ``"native"`` for files that the backbone's own library loads, ``"lora"`` for LoRA alone in peft's format,
            ``"weights"`` for the state dict alone, for ``load_state_dict`` of the same model.
        card: content of the model card.
        lora_scale: factor of LoRA in the export, from 0 (the original weights) to 1 (as trained) or more; see
            :func:`ttd_plugins.lora.scale_lora`.

    Raises:
        InputError: the form is unknown, the scale is negative, or the folder is not empty or cannot be written (a full
            disk included); no file is left then.
        UnsupportedModelError: the library cannot rebuild this model, with the reason.
        TTDError: there is no LoRA to save, or it has values that are not finite.
        MissingDependencyError: the backbone's library is not installed.
    """
    out = given_path(out)
    require_adapter(adapter, "export_backbone()")
    if form not in FORMS:
        raise InputError(choices_sentence("form of export", str(form), FORMS))
    if form == "lora" and not adapter.has_lora:
        raise TTDError(f"{adapter.description.name} has no LoRA to export; use form='native' or form='weights'")
    from ttd_plugins.lora import scaled_lora

    card = card if card is not None else ModelCard()
    if lora_scale != 1:
        card = replace(card, settings={**card.settings, "lora_scale": lora_scale})
    # Before anything slow, so that a wrong path fails at once.
    require_new(out)
    with scaled_lora(adapter, lora_scale), _complete_or_absent(out) as folder:
        if form == "lora":
            model = _write_lora(adapter, folder)
        elif adapter._lora is not None:
            with adapter._lora.temporarily_merged():
                model = _write_model(adapter, folder, form)
        else:
            model = _write_model(adapter, folder, form)
        if card.repository is not None:
            from ttd_plugins.toolkit.open_clip_export import use_tokenizer_of_repository

            use_tokenizer_of_repository(folder, card.repository)
        # Names of folders need not be UTF-8.
        write_atomic(folder / CARD_FILE, render_card(adapter, model, form, card))
        write_record(folder, _record_of(adapter, model, form, card), folder.rglob("*.safetensors"))
        files = tuple(sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()))
    return Exported(out, form, files, model)


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    form: Form = "native",
    step: int | str | None = None,
    lora_scale: float | None = None,
    averaged: bool = True,
    licence: str | None = None,
    repository: str | None = None,
) -> Exported:
    """Write the backbone of a training run; see :func:`export_backbone`.

    Args:
        run: the run's folder, or ``RUN@STEP``.
        out: the folder to write.
        form: as in :func:`export_backbone`.
        step: the step of the checkpoint, or ``"best"`` for the best by the run's ``evaluation.best``; by default the
            last one.
        lora_scale: factor of LoRA as it was trained; by default the run's ``towers.lora_scale``.
        averaged: whether to export the moving average of the weights if the run has one (``run.weight_ema``).
        licence, repository: as in :class:`ModelCard`.

    Raises:
        TTDError: the run cannot be read, or as :func:`export_backbone`.
    """
    # Before anything slow, so that a wrong path fails at once.
    require_new(given_path(out))
    folder, own_step = split_step(run)
    step = int(step) if isinstance(step, str) and step.isdecimal() else step
    if step is not None and own_step not in (None, step):
        raise InputError(f"{str(run)!r} names the step {own_step}, and --step is {step}; give one of them")
    step = own_step if step is None else step
    adapter, card = read_run(folder, step, lora_scale=lora_scale, averaged=averaged)
    card = replace(card, licence=licence, repository=repository)
    return export_backbone(adapter, out, form=form, card=card)


def export_named(
    name: str,
    out: str | Path,
    *,
    form: Form = "native",
    lora_scale: float | None = None,
    averaged: bool = True,
    options: Mapping[str, Any] | None = None,
    licence: str | None = None,
    repository: str | None = None,
) -> Exported:
    """Write a backbone by name, as :func:`ttd_plugins.load` takes it: a plain name, a run, an export or ``NAME+LORA``.

    Args:
        name: the name.
        out: the folder to write.
        form: as in :func:`export_backbone`; ``"lora"`` needs a run or a folder of LoRA.
        lora_scale: factor of LoRA; by default that of the run, or 1.
        averaged: as in :func:`export_run`.
        options: options of the family, such as its dense mode.
        licence, repository: as in :class:`ModelCard`.

    Raises:
        TTDError: the backbone cannot be loaded, or as :func:`export_backbone`.
    """
    require_new(given_path(out))
    base, source = split_source(name)
    if source is None:
        if lora_scale is not None:
            raise InputError("--lora-scale needs a run or NAME+LORA, and a plain name has no LoRA; remove it")
        card = ModelCard(licence=licence, repository=repository)
        return export_backbone(load(name, **(options or {})), out, form=form, card=card)
    if base is None and source_kind(source) == "run" and not options:
        return export_run(
            source, out, form=form, lora_scale=lora_scale, averaged=averaged, licence=licence, repository=repository
        )
    adapter = load_tuned(base, source, options=options)
    tuned_from = adapter.tuned_from
    assert tuned_from is not None
    settings = {"tuned_from": str(tuned_from)}
    card = ModelCard(tuned_from.base, settings=settings, licence=licence, repository=repository)
    return export_backbone(adapter, out, form=form, card=card, lora_scale=1.0 if lora_scale is None else lora_scale)


def _record_of(adapter: DenseAdapter, model: ExportedModel, form: Form, card: ModelCard) -> ExportRecord:
    description = adapter.description
    base = card.base
    if base is None and description.weights is not None and (form != "lora" or adapter.tuned_from is None):
        base = description.name
    fitted = description.calibration
    calibration = (fitted.scale, fitted.shift) if description.calibrated else None
    positions = None if description.positions == "library" else description.positions
    name = model.name if form == "native" else None
    return ExportRecord(form, name, base, description.dense_mode, positions, calibration)


# Writing -------------------------------------------------------------------------------------------------------------


def _write_model(adapter: DenseAdapter, folder: Path, form: Form) -> ExportedModel:
    if form == "native":
        return adapter.export(folder)
    from ttd_plugins.toolkit.exporting import write_weights

    write_weights(adapter.model, folder / WEIGHTS_FILE)
    return ExportedModel(
        "safetensors",
        f'model.load_state_dict(safetensors.torch.load_file("PATH/{WEIGHTS_FILE}"))',
        notes=(f"The weights alone: `model` must be built as before, a {_class_of(adapter)}.",),
    )


def _write_lora(adapter: DenseAdapter, folder: Path) -> ExportedModel:
    from ttd_plugins.lora import save_lora

    lora = {id(parameter) for parameter in adapter.lora_parameters()}
    others = [name for name, p in adapter.model.named_parameters() if p.requires_grad and id(p) not in lora]
    lost = [name for name in others if not name.startswith("logit_")]
    if lost:
        raise TTDError(
            f"{adapter.description.name} has {len(lost)} trainable tensors beside LoRA, such as {lost[0]}, which "
            "form='lora' would leave out; use form='native'"
        )
    peft_suffices = save_lora(adapter, folder)
    description = adapter.description
    ours = f'ttd_plugins.lora.load_lora(ttd_plugins.load("{description.name}"), "PATH")'
    dense = f"load_lora needs the backbone in the dense mode {description.dense_mode}, which decides what LoRA wraps."
    left = tuple(f"{name} was trained too, and is not part of LoRA." for name in others)
    if peft_suffices:
        kind = f"`base` is the model before fine-tuning, a {_class_of(adapter)}."
        return ExportedModel(
            "peft", 'model = peft.PeftModel.from_pretrained(base, "PATH")', (ours,), None, (kind, dense, *left)
        )
    why = (
        "peft alone refuses this folder, because it has no equivalent layer for some of the modules; "
        "ttd_plugins.lora.load_lora loads it exactly, and form='native' needs neither."
    )
    return ExportedModel("ttd_plugins", ours, notes=(why, dense, *left))


def _class_of(adapter: DenseAdapter) -> str:
    return f"{type(adapter.model).__module__}.{type(adapter.model).__qualname__}"


@contextmanager
def _complete_or_absent(out: Path) -> Iterator[Path]:
    """:func:`new_folder`, with the errors of safetensors as those of the file system."""
    from safetensors import SafetensorError

    with new_folder(out) as folder:
        try:
            yield folder
        except SafetensorError as error:
            raise OSError(one_sentence(error)) from error


# The card ------------------------------------------------------------------------------------------------------------


def render_card(adapter: DenseAdapter, model: ExportedModel, form: Form, card: ModelCard) -> str:
    """Return the model card as Markdown: what it is, how to load it, and known data, settings and metrics."""
    description = adapter.description
    base = card.base or description.name
    what = {
        "native": "fine-tuned with Text-Tag Self-Distillation (TTD)",
        "lora": "the LoRA that Text-Tag Self-Distillation (TTD) trained, without its backbone",
        "weights": "the weights after Text-Tag Self-Distillation (TTD), without a configuration",
    }
    lines = [
        "---",
        f"library_name: {model.library}",
        "tags: [clip, image-text, ttd, text-tag-self-distillation]",
        *_front_matter(base, card),
        "---",
        "",
        f"# {_text(base)}, {'LoRA of TTD' if form == 'lora' else 'fine-tuned with TTD'}",
        "",
        f"`{_code(base)}`, {what[form]} by ttd-plugins {__version__}. TTD teaches the map of a whole caption "
        "to match the union of its tags' maps, from image-text pairs alone ([arXiv 2404.00384](https://arxiv.org/abs/2404.00384)).",
        "",
        "## Loading",
        "",
        _where(model, card.repository),
        "",
        "```python",
        f"import {', '.join(sorted(_packages(model)))}",
        "",
        *on_hub(model, card.repository),
        "```",
        "",
        *(f"- {_text(note)}" for note in model.notes),
        *([""] if model.notes else []),
    ]
    if model.name is not None:
        lines += [f'In ttd-plugins again: `ttd_plugins.load("{_hub_text(model.name, card.repository)}")`.', ""]
    (height, width), (rows, columns) = description.image_size, description.patch_size
    lines += _table(
        "Model",
        {
            "family": description.family,
            "architecture": description.model,
            "image size": f"{height} x {width} pixels, patches of {rows} x {columns}",
            "embedding": f"{description.embedding_width} numbers, not normalised",
            "mean, std": f"{_numbers(description.mean)}; {_numbers(description.std)}",
            "interpolation": description.interpolation,
            "context": f"{description.context_length} tokens",
            "dense mode": description.dense_mode,
        },
    )
    if isinstance(card.data, str):
        lines += ["## Data", "", _text(card.data), ""] if card.data else []
    else:
        lines += _table("Data", _without_empty(card.data))
    lines += _table("Settings", _without_empty(card.settings))
    plain = {name: value for name, value in card.metrics.items() if not isinstance(value, Mapping)}
    lines += _table("Metrics", plain)
    for heading, metrics in card.metrics.items():
        if isinstance(metrics, Mapping):
            lines += _table(f"Metrics: {_text(heading)}", _without_empty(metrics))
    licence = card.licence or (
        f"The weights come from `{_code(base)}`: its licence applies to them, and that of the data may too. "
        "ttd-plugins itself is under the MIT licence."
    )
    lines += ["## Licence", "", _text(licence) if card.licence else licence, ""]
    lines += ["## Citation", "", "```bibtex", CITATION, "```", ""]
    return "\n".join(lines)


def _front_matter(base: str, card: ModelCard) -> list[str]:
    """Licence and base model for the hub, which reads both from the head of the card."""
    found = []
    if card.licence is not None and _LICENCE.fullmatch(card.licence):
        found.append(f"license: {card.licence}")
    elif card.licence is not None or card.repository is not None:
        found.append("license: other")
    name = base.partition(":")[2].removeprefix("hf-hub:").partition("@")[0]
    if card.repository is not None and _REPOSITORY.fullmatch(name):
        found.append(f"base_model: {name}")
    return found


def on_hub(model: ExportedModel, repository: str | None) -> list[str]:
    """Return the lines of code that load a model from a repository; from ``PATH`` if it is ``None``."""
    return [_hub_text(line, repository) for line in (model.load, *model.more)]


def _hub_text(text: str, repository: str | None) -> str:
    if repository is None:
        return text
    text = text.replace("local-dir:PATH", f"hf-hub:{repository}")
    # Longer paths are files within the folder, which libraries do not read from a repository.
    return re.sub(r'(?<=[":])PATH(?=")', repository, text)


def _where(model: ExportedModel, repository: str | None) -> str:
    if repository is None:
        return "`PATH` is this folder."
    if any("PATH" in line for line in on_hub(model, repository)):
        return f'`PATH` is the folder that `huggingface_hub.snapshot_download("{repository}")` returns.'
    return "The files are downloaded from the hub."


def _packages(model: ExportedModel) -> set[str]:
    """Return the packages that the lines of code import."""
    known = ("open_clip", "transformers", "peft", "ttd_plugins", "clip", "safetensors")
    text = " ".join(line.replace("open_clip.", "open_clip .") for line in (model.load, *model.more))
    words = text.replace("(", " ").replace("=", " ").split()
    named = {name for name in known if any(word == name or word.startswith(f"{name}.") for word in words)}
    return {
        "safetensors.torch" if name == "safetensors" else "clip.model" if name == "clip" else name for name in named
    }


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flatten(values).items() if value is not None and value != {}}


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    if not rows:
        return []
    body = [f"| {_text(name)} | {_text(_value(value))} |" for name, value in rows.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *body, ""]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(_value, value)) if isinstance(value, list | tuple) else str(value)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _text(value: Any) -> str:
    """Return a text on one line, with characters of Markdown tables and HTML escaped."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _code(value: str) -> str:
    return " ".join(value.split()).replace("`", "'")


# Runs ----------------------------------------------------------------------------------------------------------------


def read_run(
    run: Path, step: int | str | None = None, *, lora_scale: float | None = None, averaged: bool = True
) -> tuple[DenseAdapter, ModelCard]:
    """Return the backbone of a run at a step, with LoRA attached, and its model card; see :func:`export_run`.

    Raises:
        TTDError: the run or the checkpoint cannot be read.
    """
    from ttd_plugins.training.checkpoints import AVERAGE, checkpoint_folder, named_step, read_state, restore_backbone
    from ttd_plugins.training.config import TrainConfig
    from ttd_plugins.training.divergence import DivergenceWatch
    from ttd_plugins.training.jsonl_log import JsonlLog

    if not (run / "config.yaml").is_file():
        raise InputError(f"{run} is not the folder of a run: it has no config.yaml")
    stored, step = TrainConfig.read(run / "config.yaml"), named_step(run, step)
    scale = stored.towers.lora_scale if lora_scale is None else lora_scale
    adapter = restore_backbone(run, step, lora_scale=scale, averaged=averaged)
    config, state = asdict(stored), read_state(run, step)
    config["towers"].pop("lora_scale")
    has_average = (checkpoint_folder(run, state["step"]) / AVERAGE).is_file()
    if DivergenceWatch(**(state.get("health") or {})).diverged:
        log.warning("the run had diverged at step %d, so its weights are most likely useless", state["step"])
    source = config["data"]["source"]
    data = {
        # The name of the folder or file: the rest of a path means nothing elsewhere.
        "source": Path(source).name if source and Path(source).is_absolute() else source,
        "captions": config["data"]["captions"],
        "image_size": config["data"]["image_size"],
    }
    how = {name: config["run"][name] for name in ("seed", "mixed_precision")}
    settings = {
        "step": state["step"],
        "towers": config["towers"],
        "optimizer": config["optimizer"],
        "ttd": config["ttd"],
    }
    if scale != 1:
        settings["lora_scale"] = scale
    if has_average:
        settings["weights"] = f"average, decay {stored.run.weight_ema:g}" if averaged else "as trained"
    metrics = {name: value for name, value in state.get("figures", {}).items() if isinstance(value, int | float)}
    logged = {"last log line of the training": metrics} if metrics else {}
    lines = [line for line in JsonlLog(run / "log.jsonl").read() if "evaluation" in line]
    for line in [one for one in lines if one["step"] <= state["step"] and isinstance(one["evaluation"], Mapping)][-1:]:
        logged[f"evaluation after step {line['step']}"] = line["evaluation"]
    name, colon, place = (config["evaluation"]["data"] or "").partition(":")
    if name:
        settings["evaluation"] = config["evaluation"] | {"data": f"{name}{colon}{Path(place).name}"}
    base = config["backbone"]["name"] or adapter.description.name
    return adapter, ModelCard(base=base, data=data, settings=settings | how, metrics=logged)
