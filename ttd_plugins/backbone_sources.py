"""Open a backbone in any form that users have: a name, a run, an export, a comparison, or a file of weights.

A *source* is a path that contains a tuned backbone. Commands that accept tuned backbones, such as ``ttd app`` and
``ttd compare``, accept every form here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ttd_plugins.errors import BackboneNameError, InputError, choices_sentence, one_sentence
from ttd_plugins.plugins import get_family, load, parse_name
from ttd_plugins.utils.configuration import check_seed

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter

SourceKind = Literal["run", "lora", "comparison", "demo", "weights", "name"]
RANDOM = "random"
COMPARISON_RESULTS = "results.json"
OLD_DEMO_WEIGHTS = Path("weights/after.safetensors")
"""Weights in a folder of ``ttd demo`` up to version 0.1, whose backbone is named in ``metrics.json``."""
EXPORTED = "*model.safetensors"
"""Weights in the folder of an export, in the library's own format or as a state dict."""
FORMS = (
    "the folder of a run of `ttd train`, of `ttd export` in any form, of `ttd compare` or of `ttd demo`; a "
    "*.safetensors file of weights; or a backbone name"
)


# Names and sources -------------------------------------------------------------------------------------------------


def check_backbone(name: str) -> None:
    """Check that :func:`open_backbone` knows a name, without loading any weights.

    Raises:
        InputError: the source does not exist, is not recognised, or belongs to another backbone.
        TTDError: the family, model or weights are unknown.
    """
    base, source = _split(name)
    if source is not None:
        check_backbone(untuned_name(source, base))
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
    base, source = _split(name)
    torch.manual_seed(seed)
    if source is None:
        return load(name, device=device).eval()
    backbone = load_tuned(base, source, device=device)
    backbone.merge()
    return backbone.eval()


def _split(name: str) -> tuple[str | None, str | None]:
    """Split into the name of the untuned backbone and the path of the source; at most one is ``None``."""
    # An existing path may contain a colon.
    if os.path.exists(name):
        return None, name
    if os.path.exists(name.rpartition("@")[2]):
        return name, None
    splits = [(name[:place], name[place + 1 :]) for place, letter in enumerate(name) if letter == "+"]
    splits = [(base, source) for base, source in splits if ":" in base and source]
    for base, source in splits:
        if os.path.exists(source):
            return base, source
    if splits:
        base, source = splits[0]
        raise InputError(f"{source!r} does not exist; after {base!r} and '+', name {FORMS}")
    return name, None


# Sources -------------------------------------------------------------------------------------------------------------


def source_kind(source: str) -> SourceKind:
    """Return the form of a source, judged by file names alone.

    Raises:
        InputError: the source does not exist or has none of the known forms.
    """
    path = Path(source)
    # Unlike the methods of Path, these functions raise nothing for a name that is too long.
    if os.path.isfile(path):
        if path.suffix == ".safetensors":
            return "weights"
        raise InputError(f"{source!r} is a file and not *.safetensors; name {FORMS}")
    if os.path.isdir(path):
        if (path / "adapter_config.json").is_file():
            return "lora"
        if (path / "config.yaml").is_file():
            return "run"
        if (path / COMPARISON_RESULTS).is_file():
            return "comparison"
        if (path / OLD_DEMO_WEIGHTS).is_file():
            return "demo"
        if any(path.glob(EXPORTED)):
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

    Raises:
        InputError: the source belongs to another backbone than ``name``, contains no weights yet, or neither the
            source nor ``name`` names the backbone.
    """
    kind, path = source_kind(source), Path(source)
    if kind == "comparison":
        return _comparison_arm(path, name)[0]
    own = source if kind == "name" else None
    if kind == "run":
        own = _run_name(path)
    elif kind == "demo":
        own = str(_read(path / "metrics.json", lambda content: content["settings"]["backbone"]))
    if own is None and name is None:
        what = {"lora": "only LoRA", "run": "a run of a model object"}.get(kind, "only weights")
        raise InputError(f"{source!r} contains {what} and no backbone name; name the backbone too, as NAME+PATH")
    if own is not None and name is not None and kind != "name" and parse_name(own) != parse_name(name):
        raise InputError(f"{source} is a {kind} of {own} and not of {name}; use it with {own}")
    return own or str(name)


def load_tuned(name: str | None, source: str, *, device: str | None = None) -> DenseAdapter:
    """Load a tuned backbone in evaluation mode; LoRA is kept in place if it was tuned with LoRA.

    Args:
        name: the untuned backbone, or ``None`` if the source names it.
        source: any form of :func:`source_kind`.
        device: device of the backbone; the library's default if ``None``.

    Raises:
        InputError: the source cannot be read or belongs to another backbone.
        TTDError: the backbone cannot be loaded.
    """
    kind, path, base = source_kind(source), Path(source), untuned_name(source, name)
    if kind == "name":
        return load(source, device=device)
    if kind == "run":
        from ttd_plugins.training.checkpoints import restore_backbone

        # A run of a model object does not know how to build the model.
        adapter = restore_backbone(path, backbone=load(base) if _run_name(path) is None else None)
    elif kind == "lora":
        from ttd_plugins.lora import load_lora

        adapter = load_lora(load(base), path)
    elif kind == "comparison":
        own, file, seed = _comparison_arm(path, name)
        adapter = load_trained_weights(open_backbone(own, seed=seed), file)
    else:
        if path.is_dir():
            path = next(file for file in (path / OLD_DEMO_WEIGHTS, *sorted(path.glob(EXPORTED))) if file.is_file())
        adapter = load_trained_weights(load(base), path)
    return (adapter if device is None else adapter.to(device)).eval()


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


def _run_name(run: Path) -> str | None:
    from ttd_plugins.training.checkpoints import checkpoint_steps
    from ttd_plugins.training.config import TrainConfig

    own = TrainConfig.read(run / "config.yaml").backbone.name
    if not checkpoint_steps(run):
        raise InputError(f"{run} has no checkpoint yet; wait for the first one, or name another run")
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
        if name is None or own == name or (_is_plain(own) and parse_name(own) == parse_name(name)):
            return own, folder / "weights" / Path(stored).name, seed
    raise InputError(f"{folder} is a comparison of {', '.join(weights)} and not of {name}; use it with one of these")


def _is_plain(name: str) -> bool:
    return _split(name)[1] is None


def _read(file: Path, extract: Callable[[Any], Any]) -> Any:
    """Apply ``extract`` to the content of a JSON file; whatever is missing there is the user's error."""
    try:
        return extract(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{file} does not name its backbone ({one_sentence(error)}); use another folder") from error
