"""SigLIP models of open_clip: architectures with a tag, a checkpoint on disk or fresh weights, and whole folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttd_plugins.errors import BackboneNameError, TTDError, UnsupportedModelError, choices_sentence, one_sentence
from ttd_plugins.toolkit.hub import hub_offline, hub_problem, quiet_root_logger
from ttd_siglip.hub import OWN_WEIGHTS, RANDOM
from ttd_siglip.structure import refusal_of_open_clip_config
from ttd_siglip.tokens import MissingTokenizer
from ttd_siglip.transforms import HALF

HUB, FOLDER = "hf-hub:", "local-dir:"
CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# What every SigLIP was trained with; open_clip knows it for its tags only, and gives OpenAI's to checkpoints on disk.
PREPROCESSING = {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "squash"}


def architectures(open_clip: Any) -> list[str]:
    """Names of open_clip's architectures that this family takes."""
    names = open_clip.list_models()
    return [name for name in names if refusal_of_open_clip_config(open_clip.get_model_config(name)) is None]


def require_architecture(open_clip: Any, model: str, choices: list[str]) -> None:
    """Raise unless ``model`` is an architecture of open_clip that this family takes.

    Raises:
        BackboneNameError: open_clip does not know it; the message lists ``choices``.
        UnsupportedModelError: open_clip knows it, but it cannot be served, with the reason.
    """
    config = open_clip.get_model_config(model) if model in open_clip.list_models() else None
    if config is None:
        hint = "; ORG/NAME on transformers' hub, the path of a folder, hf-hub:ORG/NAME and local-dir:PATH are taken too"
        raise BackboneNameError(choices_sentence("siglip model", model, choices) + hint)
    _require_served(f"siglip:{model}", config)


def load_from_open_clip(
    open_clip: Any, model: str, weights: str, *, tokenizer: Any, precision: str, cache_dir: str | None
) -> tuple[Any, Any]:
    """Model and tokenizer, the model in evaluation mode and on the CPU.

    With random weights a tokenizer that cannot be had is missed only once texts are tokenised.

    Args:
        open_clip: the module.
        model: an architecture, ``hf-hub:ORG/NAME`` or ``local-dir:PATH``.
        weights: a pretrained tag, a path to a checkpoint or ``random``; ``own`` or ``random`` for the other two.
        tokenizer: instead of the model's own.
        precision: open_clip's name of the number format.
        cache_dir: where downloads are kept; open_clip's own place by default.

    Raises:
        BackboneNameError: the weights are unknown; the message lists the choices.
        UnsupportedModelError: the model cannot be served, with the reason.
        TTDError: something cannot be read or downloaded.
    """
    whole = model.startswith((HUB, FOLDER))
    full = f"siglip:{model}@{weights}"
    if whole and weights not in (OWN_WEIGHTS, RANDOM):
        raise BackboneNameError(choices_sentence(f"weights of siglip:{model}", weights, [OWN_WEIGHTS, RANDOM]))
    source = None if whole else _weight_source(open_clip, model, weights)
    on_disk = source is not None and Path(source).is_file()
    tagged = source is not None and not on_disk
    problem = None if model.startswith(FOLDER) else hub_problem()
    with quiet_root_logger("open_clip"), hub_offline(problem is not None):
        try:
            if whole:
                _require_served(full, _own_config(open_clip, model, cache_dir))
            built = open_clip.create_model(
                model_name=model,
                pretrained=source,
                load_weights=weights != RANDOM,
                pretrained_text=False,
                require_pretrained=weights != RANDOM,
                precision=precision,
                force_preprocess_cfg=None if tagged or whole else PREPROCESSING,
                cache_dir=cache_dir,
            )
        except TTDError:
            raise
        except Exception as error:  # open_clip and the libraries below it raise nearly anything
            raise TTDError(_cannot_load(full, source if on_disk else None, model, problem, error)) from error
        if tokenizer is None:
            try:
                tokenizer = open_clip.get_tokenizer(model_name=model, cache_dir=cache_dir)
                _pad_right(tokenizer)
            except Exception as error:
                reason = "the tokenizer of " + _cannot_load(full, None, model, problem, error) + ", or pass tokenizer="
                if weights != RANDOM:
                    raise TTDError(reason) from error
                tokenizer = MissingTokenizer(reason)
    return built.eval(), tokenizer


def _pad_right(tokenizer: Any) -> None:
    """SigLIP is trained with padding at the right, and open_clip does not say so to the tokenizer inside its own."""
    inner = getattr(tokenizer, "tokenizer", None)
    if hasattr(inner, "padding_side"):
        inner.padding_side = "right"  # type: ignore[union-attr]


def _weight_source(open_clip: Any, name: str, weights: str) -> str | None:
    """What open_clip calls ``pretrained``: a tag, the path of a file, or nothing for random weights."""
    if weights == RANDOM:
        return None
    if open_clip.get_pretrained_cfg(name, weights):
        return weights
    if Path(weights).is_file():
        return str(weights)
    if weights.endswith(CHECKPOINT_SUFFIXES) or len(Path(weights).parts) > 1:
        raise TTDError(f"there is no checkpoint file {weights}; give the path of a file, or one of `ttd backbones`")
    tags = [*open_clip.list_pretrained_tags_by_model(name), RANDOM]
    hint = "; the path of a checkpoint file is taken too"
    raise BackboneNameError(choices_sentence(f"weights of siglip:{name}", weights, tags) + hint)


def _own_config(open_clip: Any, model: str, cache_dir: str | None) -> dict[str, Any]:
    """The ``model_cfg`` of a hub model or a local folder; whatever open_clip raises comes through."""
    if model.startswith(HUB):
        from open_clip.pretrained import download_pretrained_from_hf

        name = model.removeprefix(HUB)
        path = download_pretrained_from_hf(name, filename="open_clip_config.json", cache_dir=cache_dir)
        config = json.loads(Path(path).read_text(encoding="utf-8")).get("model_cfg")
    else:
        config = open_clip.get_model_config(model)
    if not isinstance(config, dict) or not isinstance(config.get("vision_cfg"), dict):
        raise ValueError("open_clip_config.json has no model_cfg with a vision_cfg")
    return config


def _require_served(full: str, config: Mapping[str, Any]) -> None:
    reason = refusal_of_open_clip_config(config)
    if reason is not None:
        raise UnsupportedModelError(f"{full} cannot be adapted: {reason}")


def _cannot_load(full: str, checkpoint: str | None, model: str, problem: str | None, error: Exception) -> str:
    """One sentence on what failed and what to do, by where the weights come from."""
    reason = f"{full} cannot be loaded ({type(error).__name__}: {one_sentence(error)})"
    if checkpoint is not None:
        return f"{reason}; give a safetensors file or a state dict of tensors that was saved for open_clip's {model}"
    if problem is not None:
        reason = f"{full} cannot be loaded: {problem}, and the download cache does not hold all of it"
    if model.startswith(FOLDER):
        return f"{reason}; the folder needs open_clip_config.json and a weights file, as open_clip saves them"
    return (
        f"{reason}; connect to the network once, or set HF_HUB_OFFLINE=1 where the download cache is warm, or give "
        "the path of a checkpoint file after @"
    )
