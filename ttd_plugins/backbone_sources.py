"""Open a backbone in any form that users have: a name, a run, an export, LoRA, a comparison, or a file of weights.

A *source* is a path that contains a tuned backbone. :func:`ttd_plugins.load` opens every form through
:func:`open_source`, and so does every command with ``--backbone``. Nothing in a source is executed: configurations are
YAML and JSON, weights are safetensors, and checksums are compared where the source has them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ttd_plugins.errors import BackboneNameError, InputError, choices_sentence, one_sentence
from ttd_plugins.export_record import ExportRecord, check_files, read_record
from ttd_plugins.options import Calibration
from ttd_plugins.plugins.listing import get_family
from ttd_plugins.plugins.loading import load
from ttd_plugins.plugins.names import parse_name
from ttd_plugins.utils.configuration import check_seed
from ttd_plugins.utils.contract_types import TunedFrom
from ttd_plugins.utils.files import file_sha256
from ttd_plugins.utils.rng import seeded_torch

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter

log = logging.getLogger(__name__)

SourceKind = Literal["run", "lora", "comparison", "demo", "weights", "name"]
RANDOM, BEST = "random", "best"
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")
COMPARISON_RESULTS = "results.json"
OLD_DEMO_WEIGHTS = Path("weights/after.safetensors")
"""Weights in a folder of ``ttd demo`` without ``results.json``, whose backbone is named in ``metrics.json``."""
EXPORTED = "*model.safetensors"
"""Weights in the folder of an export, in the library's own format or as a state dict."""
FORMS = (
    "the folder of a run of `ttd train` (RUN or RUN@STEP), of `ttd export` in any form, of LoRA, of `ttd compare` or "
    "of `ttd demo`; a *.safetensors file of weights; or a backbone name"
)
_CHECKPOINT = re.compile(r"step-([0-9]{8,12})")
_STEP = re.compile(r"[0-9]{1,12}")
_opening: ContextVar[tuple[str, ...]] = ContextVar("_opening", default=())


# Names and sources -------------------------------------------------------------------------------------------------


def check_backbone(name: str) -> None:
    """Check that :func:`open_backbone` knows a name, without loading any weights.

    Raises:
        InputError: the source does not exist, is not recognised, or belongs to another backbone.
        TTDError: the family, model or weights are unknown.
    """
    base, source = split_source(name)
    if source is not None:
        with _no_circle(source):
            loaded = untuned_name(source, base)
            # An export with a whole backbone has no other name.
            if loaded != source or source_kind(source) == "run":
                check_backbone(loaded)
        return
    parsed = parse_name(name)
    family = get_family(parsed.family)
    known = [*family.weights(parsed.model), RANDOM]
    # Families also accept the path of a checkpoint file as weights.
    if parsed.weights not in (*known, family.default_weights(parsed.model)) and not os.path.exists(parsed.weights):
        raise BackboneNameError(choices_sentence(f"weights of {parsed.model}", parsed.weights, known))


def open_backbone(name: str, *, seed: int = 0, device: str | None = None) -> DenseAdapter:
    """Open a backbone in evaluation mode, without LoRA: earlier tuning is merged into its weights.

    Args:
        name: ``family:model@weights``; a source that names its backbone, such as the folder of a run; or a name and a
            source joined by ``+``, such as ``family:model+exported/lora``.
        seed: decides the weights of a name that ends in ``@random``.
        device: device of the backbone; the library's default if ``None``.

    Raises:
        InputError, TTDError: as in :func:`check_backbone`, or the backbone cannot be loaded.
    """
    check_backbone(name)
    check_seed(seed)
    with seeded_torch(seed):
        return load(name, device=device)


def open_source(name: str, options: Mapping[str, Any]) -> DenseAdapter | None:
    """Open a tuned backbone with its tuning merged into the weights, in evaluation mode.

    Args:
        name: as in :func:`open_backbone`.
        options: options of the family; they replace those that a run was trained with.

    Returns:
        The backbone, or ``None`` if ``name`` is a plain ``family:model@weights``.

    Raises:
        InputError: as in :func:`load_tuned`.
    """
    base, source = split_source(name)
    if source is None:
        return None
    return load_tuned(base, source, options=options, merge=True)


def split_step(source: str | os.PathLike[str]) -> tuple[Path, int | str | None]:
    """Split ``RUN@STEP``, or the folder of a checkpoint of a run, into the run and the step; ``None`` for the newest.

    STEP is a number, or ``best`` for the best checkpoint by the metric of the run.

    Raises:
        InputError: RUN is a folder, and what follows ``@`` is no step.
    """
    source = os.fspath(source)
    if not os.path.exists(source):
        run, at, step = source.rpartition("@")
        if at and os.path.isdir(run):
            if step == BEST:
                return Path(run), BEST
            if not _STEP.fullmatch(step):
                raise InputError(
                    f"{source!r}: after the run and '@', write the step of a checkpoint, as in RUN@200, or {BEST}"
                )
            return Path(run), int(step)
    path = Path(source)
    found = _CHECKPOINT.fullmatch(path.name)
    if found and path.parent.name == "checkpoints" and os.path.isfile(path.parent.parent / "config.yaml"):
        return path.parent.parent, int(found[1])
    return path, None


def split_source(name: str) -> tuple[str | None, str | None]:
    """Split ``NAME+PATH`` into the name of the untuned backbone and the path of the source; at most one is ``None``.

    Raises:
        InputError: the path does not exist.
    """
    # An existing path may contain a colon.
    if _exists(name):
        return None, name
    if os.path.exists(name.rpartition("@")[2]):
        return name, None
    splits = [(name[:place], name[place + 1 :]) for place, letter in enumerate(name) if letter == "+"]
    splits = [(base, source) for base, source in splits if source and (":" in base or _exists(base))]
    for base, source in splits:
        if _exists(source):
            return base, source
    if splits:
        base, source = splits[0]
        raise InputError(f"{source!r} does not exist; after {base!r} and '+', name {FORMS}")
    if ":" not in name and ("/" in name or os.sep in name or name.startswith((".", "~"))):
        raise InputError(f"{name!r} does not exist; name {FORMS}")
    return name, None


def _exists(source: str) -> bool:
    """Whether a path exists, or is ``RUN@STEP`` of a folder that exists."""
    run, at, _ = source.rpartition("@")
    return os.path.exists(source) or bool(at and os.path.isdir(run))


@contextmanager
def _no_circle(source: str) -> Iterator[None]:
    """Raise InputError if a source is opened while it is being opened: it names itself as its backbone."""
    place, opening = os.path.realpath(source), _opening.get()
    if place in opening:
        raise InputError(f"{source} names itself as the backbone that it was tuned from; it cannot be loaded")
    token = _opening.set((*opening, place))
    try:
        yield
    finally:
        _opening.reset(token)


# Sources -------------------------------------------------------------------------------------------------------------


def source_kind(source: str) -> SourceKind:
    """Return the form of a source, judged by file names alone.

    Raises:
        InputError: the source does not exist or has none of the known forms.
    """
    path, _ = split_step(source)
    # Unlike the methods of Path, these functions raise nothing for a name that is too long.
    if os.path.isfile(path):
        if path.suffix == ".safetensors":
            return "weights"
        raise InputError(f"{source!r} is a file and not *.safetensors; name {FORMS}")
    if os.path.isdir(path):
        if (path / LORA_FILES[0]).is_file():
            return "lora"
        if (path / "config.yaml").is_file():
            return "run"
        if (path / COMPARISON_RESULTS).is_file():
            return "comparison"
        if (path / OLD_DEMO_WEIGHTS).is_file():
            return "demo"
        if any(path.glob(EXPORTED)) or ((record := read_record(path)) is not None and record.name is not None):
            return "weights"
        raise InputError(f"the folder {source!r} contains no tuned backbone of a known form; name {FORMS}")
    if ":" in source and not source.startswith((".", "/")):
        return "name"
    raise InputError(f"{source!r} does not exist; name {FORMS}")


def untuned_name(source: str, name: str | None = None) -> str:
    """Return the name of the backbone that a source was tuned from, without loading any weights.

    Args:
        source: any form of :func:`source_kind`.
        name: the backbone that the user expects; ``None`` if the source must say it, as runs and comparisons do.

    Returns:
        The name; ``source`` itself if it is an export that contains a whole backbone and ``name`` is ``None``.

    Raises:
        InputError: the source belongs to another backbone than ``name``, contains no weights yet, or neither the
            source nor ``name`` names the backbone.
    """
    kind, (path, step) = source_kind(source), split_step(source)
    if step is not None and kind != "run":
        raise InputError(f"{source!r}: only runs have steps, and {str(path)!r} is no run; leave '@{step}' out")
    if kind == "comparison":
        return _comparison_arm(path, name)[0]
    own = source if kind == "name" else None
    if kind == "run":
        own = _run_name(path, step)
    elif kind == "demo":
        own = str(_read(path / "metrics.json", lambda content: content["settings"]["backbone"]))
    elif name is None and (record := _export_record(path)) is not None:
        if record.form == "native" and record.name is not None:
            return source
        own = record.base
    if own is None and name is None:
        what = {"lora": "only LoRA", "run": "a run of a model object"}.get(kind, "only weights")
        raise InputError(f"{source!r} contains {what} and no backbone name; name the backbone too, as NAME+PATH")
    if own is not None and name is not None and kind != "name" and not _same_backbone(own, name):
        raise InputError(f"{source} is a {kind} of {own} and not of {name}; use it with {own}")
    return own or str(name)


def load_tuned(
    name: str | None,
    source: str,
    *,
    device: str | None = None,
    options: Mapping[str, Any] | None = None,
    merge: bool = False,
) -> DenseAdapter:
    """Load a tuned backbone in evaluation mode.

    Args:
        name: the untuned backbone, or ``None`` if the source names it.
        source: any form of :func:`source_kind`.
        device: device of the backbone; the library's default if ``None``.
        options: options of the family; they replace those that a run was trained with.
        merge: whether to merge LoRA into the weights; otherwise LoRA stays in place.

    Returns:
        The backbone, whose ``tuned_from`` identifies the source.

    Raises:
        InputError: the source cannot be read, is damaged, or belongs to another backbone.
        TTDError: the backbone cannot be loaded.
    """
    with _no_circle(source):
        adapter = _load_tuned(name, source, dict(options or {}), merge=merge)
    if merge:
        adapter.merge()
    return (adapter if device is None else adapter.to(device)).eval()


def _load_tuned(name: str | None, source: str, options: dict[str, Any], *, merge: bool) -> DenseAdapter:
    kind, (path, step), base = source_kind(source), split_step(source), untuned_name(source, name)
    if kind == "name":
        return load(source, **options)
    if kind == "run":
        from ttd_plugins.training.checkpoints import restore_backbone

        # A run of a model object does not know how to build the model.
        given = load(base, **options) if _run_name(path, step) is None else None
        return restore_backbone(path, step, backbone=given, options=options, merge=merge)
    if kind == "comparison":
        own, file, seed = _comparison_arm(path, name)
        with seeded_torch(seed):
            adapter, files = load_trained_weights(load(own, **options), file), [file]
    elif kind == "lora":
        from ttd_plugins.lora import load_lora

        _check_export(path)
        adapter, files = load_lora(load(base, **options), path), [path / file for file in LORA_FILES]
    elif path.is_dir():
        record = _check_export(path)
        if base == source:
            assert record is not None
            assert record.name is not None
            name = record.name.replace("PATH", str(path))
            try:
                adapter = load(name, **_stored_options(name, record) | options)
            # A mode that was given as an object has a name that no family knows; a warning follows.
            except InputError:
                adapter = load(name, **options)
            _warn_of_dense_mode(source, adapter, record)
            files, base = sorted(path.glob("*.safetensors")), ""
        else:
            file = next(file for file in (path / OLD_DEMO_WEIGHTS, *sorted(path.glob(EXPORTED))) if file.is_file())
            adapter, files = load_trained_weights(load(base, **options), file), [file]
    else:
        adapter, files = load_trained_weights(load(base, **options), path), [path]
    label = "export" if kind == "weights" and not base else kind
    adapter.tuned_from = TunedFrom(label, os.path.basename(os.path.realpath(path)), _sha256(files), base=base or None)
    return adapter


def _sha256(files: list[Path]) -> str:
    """SHA-256 of the contents of files, one or more; its first 16 digits identify what was loaded."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file_sha256(file).encode())
    return digest.hexdigest()[:16]


def _export_record(path: Path) -> ExportRecord | None:
    return read_record(path) if os.path.isdir(path) else None


def _check_export(path: Path) -> ExportRecord | None:
    """Return the record of an exported folder after a check of its files; ``None`` if it has no record."""
    record = _export_record(path)
    if record is not None:
        check_files(path, record)
    return record


def _stored_options(name: str, record: ExportRecord) -> dict[str, Any]:
    """Options with which a family loads an export as it was: its dense mode and its fitted calibration."""
    known = inspect.signature(get_family(parse_name(name).family).load).parameters
    found: dict[str, Any] = {}
    if "dense" in known and record.dense_mode is not None:
        found["dense"] = record.dense_mode
    if "positions" in known and record.positions is not None:
        found["positions"] = record.positions
    if "calibration" in known and record.calibration is not None and len(record.calibration) == 2:
        found["calibration"] = Calibration(*record.calibration)
    return found


def _warn_of_dense_mode(source: str, adapter: DenseAdapter, record: ExportRecord) -> None:
    found = adapter.description.dense_mode
    if record.dense_mode not in (None, found):
        log.warning(
            "%s was exported in the dense mode %s and is loaded in the mode %s, which no library stores; choose it by "
            "an option of the family (--backbone-option)", source, record.dense_mode, found,
        )  # fmt: skip


def load_trained_weights(adapter: DenseAdapter, file: Path) -> DenseAdapter:
    """Load a file of trained tensors into an untuned backbone, after adding LoRA of the rank that the file has.

    Returns:
        ``adapter`` in evaluation mode.

    Raises:
        InputError: the file cannot be read, is incomplete, or belongs to another backbone.
    """
    from ttd_plugins.training.checkpoints import load_tensors, read_foreign_weights

    tensors = read_foreign_weights(file)
    rank = _lora_rank(tensors)
    if rank is not None:
        adapter.add_lora(rank)
        lora = {id(parameter) for parameter in adapter.lora_parameters()}
        expected = {key for key, parameter in adapter.model.named_parameters() if id(parameter) in lora}
        missing = sorted(expected - tensors.keys())
        if missing:
            raise InputError(
                f"{file} lacks {len(missing)} of {len(expected)} LoRA tensors of both towers, such as {missing[0]}; "
                "name the folder of the run or of its exported LoRA"
            )
    elif not tensors:
        raise InputError(f"{file} contains no tensors")
    # Float16 tensors are copied into float32 parameters without loss.
    load_tensors(adapter.model, tensors, str(file))
    return adapter.eval()


def _lora_rank(tensors: Mapping[str, Tensor]) -> int | None:
    """The LoRA rank of a file, from its first down-projection; ``None`` without LoRA."""
    for key, tensor in tensors.items():
        # A tensor without elements may claim any rank.
        if "lora_A" in key and tensor.ndim == 2 and tensor.numel():
            return int(tensor.shape[0])
    return None


def _run_name(run: Path, step: int | str | None = None) -> str | None:
    from ttd_plugins.training.checkpoints import checkpoint_steps, named_step
    from ttd_plugins.training.config import TrainConfig

    own = TrainConfig.read(run / "config.yaml").backbone.name
    steps = checkpoint_steps(run)
    if not steps:
        raise InputError(f"{run} has no checkpoint yet; wait for the first one, or name another run")
    step = named_step(run, step)
    if step is not None and step not in steps:
        raise InputError(f"{run} has no checkpoint of step {step}; there are those of {', '.join(map(str, steps))}")
    return own


def _comparison_arm(folder: Path, name: str | None) -> tuple[str, Path, int]:
    """Return the name, the weights and the seed of the first seed tuned by TTD, of ``name`` or the only backbone."""

    def extract(content: Any) -> tuple[dict[str, str], int]:
        stored = {own: part.get("weights", {}).get("after") for own, part in content["backbones"].items()}
        return {own: files[0] for own, files in stored.items() if files}, content["settings"].get("first_seed", 0)

    weights, seed = _read(folder / COMPARISON_RESULTS, extract)
    if not weights:
        raise InputError(f"{folder} contains no backbone tuned by TTD yet; finish `ttd compare` or `ttd demo` first")
    if name is None and len(weights) > 1:
        raise InputError(f"{folder} compares {', '.join(weights)}; name one of them too, as NAME+PATH")
    for own, stored in weights.items():
        if name is None or _same_backbone(own, name):
            return own, folder / "weights" / Path(stored).name, seed
    raise InputError(f"{folder} is a comparison of {', '.join(weights)} and not of {name}; use it with one of these")


def _same_backbone(own: str, name: str) -> bool:
    """Whether two names mean the same backbone; sources are compared as they are written."""
    return own == name or (_is_plain(own) and _is_plain(name) and parse_name(own) == parse_name(name))


def _is_plain(name: str) -> bool:
    return split_source(name)[1] is None


def _read(file: Path, extract: Callable[[Any], Any]) -> Any:
    """Apply ``extract`` to the content of a JSON file; whatever is missing there is the user's error."""
    try:
        return extract(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{file} does not name its backbone ({one_sentence(error)}); use another folder") from error
