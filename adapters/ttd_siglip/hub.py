"""SigLIP models of transformers, from its hub or from a folder: configuration, weights, tokenizer, image processor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from ttd_plugins.errors import (
    BackboneNameError,
    InputError,
    MissingDependencyError,
    TTDError,
    UnsupportedModelError,
    choices_sentence,
    one_sentence,
)
from ttd_plugins.toolkit.hub import (
    SMALL_FILES,
    HubProblem,
    cannot_load,
    fetch,
    fetch_transformers_model,
    hub_offline,
)
from ttd_plugins.toolkit.open_clip_models import OWN_WEIGHTS, RANDOM
from ttd_plugins.toolkit.tokenizing import MissingTokenizer
from ttd_siglip.building import fresh_model, start_logits
from ttd_siglip.configs import KNOWN
from ttd_siglip.library import import_transformers
from ttd_siglip.structure import refusal_of_transformers_config

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_from_transformers(
    model: str, weights: str, *, tokenizer: Any, precision: str, cache_dir: str | None
) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor, the model in evaluation mode and on the CPU.

    A known architecture with random weights needs no network: its tokenizer is then looked for where it can be had, and
    missed once texts are tokenised. A folder without an image processor gets SigLIP's own preprocessing (``None``).

    Args:
        model: a name on the hub, or the path of a folder.
        weights: ``own`` or ``random``.
        tokenizer: instead of the model's own.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        cache_dir: where downloads are kept; the hub client's own place by default.

    Raises:
        BackboneNameError: the weights are unknown.
        InputError: the precision is unknown.
        UnsupportedModelError: the model is of another kind.
        MissingDependencyError: transformers, or what its tokenizer needs, is not installed.
        TTDError: something cannot be read or downloaded.
    """
    if weights not in (OWN_WEIGHTS, RANDOM):
        raise BackboneNameError(choices_sentence(f"weights of siglip:{model}", weights, [OWN_WEIGHTS, RANDOM]))
    if precision not in PRECISIONS:
        raise InputError(choices_sentence("precision", precision, PRECISIONS))
    transformers = import_transformers()
    folder = Path(model).expanduser()
    is_folder = folder.is_dir()
    source = str(folder) if is_folder else model
    full = f"siglip:{model}@{weights}"
    known = weights == RANDOM and model in KNOWN and not is_folder
    problem: HubProblem | None = None
    options = {"cache_dir": cache_dir, "local_files_only": True}
    dtype = PRECISIONS[precision]
    try:
        if known:
            built, processor = fresh_model(KNOWN[model]).to(dtype), None
            if tokenizer is None:
                problem = fetch(source, SMALL_FILES, cache_dir=cache_dir)
        else:
            if not is_folder:
                problem = fetch_transformers_model(
                    source, partial(_require_served, full), weights=weights == OWN_WEIGHTS, cache_dir=cache_dir
                )
            with hub_offline(not is_folder):
                built = _build(transformers, source, full, weights, dtype, options)
                processor = _image_processor(transformers, source, folder if is_folder else None, options)
    except TTDError:
        raise
    except Exception as error:  # transformers and the libraries below it raise nearly anything
        raise TTDError(cannot_load(full, problem, error, _way_out(is_folder))) from error
    if tokenizer is None:
        with hub_offline(not is_folder):
            tokenizer = _tokenizer(transformers, source, full, weights, is_folder, problem, options)
    return built.eval(), tokenizer, processor


def _require_served(full: str, config: dict[str, Any]) -> None:
    reason = refusal_of_transformers_config(config)
    if reason is not None:
        raise UnsupportedModelError(f"{full} cannot be adapted: {reason}")


def _build(transformers: Any, source: str, full: str, weights: str, dtype: Any, options: dict[str, Any]) -> Any:
    raw, _ = transformers.SiglipConfig.get_config_dict(source, **options)
    if not raw:
        raise ValueError("there is no config.json in it")
    _require_served(full, raw)
    config = transformers.SiglipConfig.from_dict(raw)
    if weights == RANDOM:
        model = transformers.SiglipModel(config)
        start_logits(model)
        return model.to(dtype)
    model, report = transformers.SiglipModel.from_pretrained(
        source, config=config, dtype=dtype, output_loading_info=True, **options
    )
    # transformers fills in what a checkpoint lacks with random values, and only warns.
    absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if absent:
        raise ValueError(f"{len(absent)} tensors of the model are absent or of another shape, such as {absent[0]}")
    return model


def _image_processor(transformers: Any, source: str, folder: Path | None, options: dict[str, Any]) -> Any:
    if folder is not None and not any((folder / name).exists() for name in PROCESSOR_FILES):
        return None
    return transformers.AutoImageProcessor.from_pretrained(source, **options)


def _tokenizer(
    transformers: Any,
    source: str,
    full: str,
    weights: str,
    is_folder: bool,
    problem: HubProblem | None,
    options: dict[str, Any],
) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        if isinstance(error, ImportError):
            reason = (
                f"the tokenizer of {full} needs a library that cannot be imported ({one_sentence(error)}); run: "
                "pip install 'ttd-plugins[siglip]'"
            )
        else:
            way_out = f"{_way_out(is_folder)}, or pass tokenizer="
            reason = cannot_load(f"the tokenizer of {full}", problem, error, way_out)
        if weights == RANDOM:
            return MissingTokenizer(reason)
        if isinstance(error, ImportError):
            raise MissingDependencyError(reason) from error
        raise TTDError(reason) from error


def _way_out(is_folder: bool) -> str:
    """The end of a sentence about what cannot be loaded, by where the files come from."""
    if is_folder:
        return "the folder must hold a model and its tokenizer as transformers' save_pretrained writes them"
    return "give the path of a folder in the place of the model's name"
