"""Export of models that open_clip builds as a folder that open_clip loads. The module ``open_clip`` is passed in.

The folder has the layout of open_clip's repositories on a hub: ``open_clip_config.json``,
``open_clip_model.safetensors`` and, where the model has its own, the tokenizer's files. ``local-dir:PATH`` loads all of
it. For an architecture with a name the weights file is also a checkpoint for ``create_model(NAME, pretrained=...)``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ttd_plugins.adapter import DenseAdapter, ExportedModel
from ttd_plugins.errors import UnsupportedModelError, one_sentence
from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.exporting import (
    ALTERNATIVES,
    TOLERANCE,
    embedding_difference,
    parameter_dtypes,
    save_tokenizer,
    write_weights,
)
from ttd_plugins.toolkit.hub import quiet_root_logger
from ttd_plugins.toolkit.modified_resnet import resnet_layers
from ttd_plugins.toolkit.open_clip_models import local_text_tower, model_config
from ttd_plugins.toolkit.transforms import OPENAI_NORMALISATION, Normalisation
from ttd_plugins.utils.loading_lock import LOADING_LOCK

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def export_open_clip(
    adapter: DenseAdapter,
    folder: Path,
    *,
    open_clip: Any,
    tokenizer: Any,
    normalisation: Normalisation,
    inferred: Mapping[str, Any] | None = None,
    default_resize_mode: str = "shortest",
    why: str = "none of its architectures is this model",
) -> ExportedModel:
    """Write an adapter's model as open_clip's folder, then load it again and check that its embeddings are the same.

    The architecture is found by trial: first the description's name, then every registered architecture of these sizes,
    then ``inferred``. The first one that loads the weights and returns the same embeddings is used. This needs the
    memory of a second model.

    Args:
        adapter: adapter of a model without LoRA.
        folder: an empty folder.
        open_clip: the module.
        tokenizer: the adapter's tokenizer.
        normalisation: normalisation of the pixels.
        inferred: a ``model_cfg`` read from the model, for architectures without a name.
        default_resize_mode: open_clip's name for how images of other aspect ratios are resized, where the model does
            not say.
        why: reason for the message where no architecture fits.

    Raises:
        UnsupportedModelError: open_clip cannot build this model.
        OSError, safetensors.SafetensorError: the folder cannot be written.
    """
    model: Any = adapter.model
    own = getattr(model.visual, "preprocess_cfg", None) or {}
    write_weights(model, folder / WEIGHTS)
    preprocessing = {
        "mean": list(normalisation.mean),
        "std": list(normalisation.std),
        "interpolation": normalisation.interpolation,
        "resize_mode": own.get("resize_mode", default_resize_mode),
    }
    precision = _precision(model)
    allowed = max(TOLERANCE.get(kind, 1e-5) for kind in parameter_dtypes(model))
    reasons: list[str] = []
    with quiet_root_logger("open_clip"), LOADING_LOCK:
        for name, config in _candidates(open_clip, adapter, inferred):
            content = {"model_cfg": config, "preprocess_cfg": preprocessing}
            (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            try:
                text_tower = local_text_tower(config, name or "a configuration")
                built = open_clip.create_model(
                    f"local-dir:{folder}", precision=precision, pretrained_text=False, **text_tower
                )
                gap = embedding_difference(adapter, built)
            except Exception as error:  # a wrong configuration raises nearly anything
                reasons.append(f"{name or 'a configuration read from it'}: {one_sentence(error, 120)}")
                continue
            if gap <= allowed:
                return _finish(adapter, folder, name, content, tokenizer, precision)
            reasons.append(f"{name or 'a configuration read from it'}: embeddings differ by {gap:.1e}")
    tried = f" (tried {'; '.join(reasons[:2])})" if reasons else ""
    raise UnsupportedModelError(f"open_clip cannot rebuild {adapter.description.name}: {why}{tried}; {ALTERNATIVES}")


def _finish(
    adapter: DenseAdapter, folder: Path, name: str | None, content: dict[str, Any], tokenizer: Any, precision: str
) -> ExportedModel:
    notes: list[str] = []
    config = content["model_cfg"]
    text = config["text_cfg"]
    # A configuration without a tokenizer name means the byte-pair tokenizer that comes with open_clip.
    packaged = type(tokenizer).__module__.startswith("open_clip") and not hasattr(tokenizer, "tokenizer")
    own = text.get("hf_tokenizer_name")
    if own or (not packaged and (tokenizer is not None or name is None)):
        advice = (
            f"open_clip.get_tokenizer({name!r}) returns it"
            if name and own
            else "use the one that the model was trained with"
        )
        missing = save_tokenizer(tokenizer, folder, advice)
        if missing is None and not own:
            # With local-dir open_clip reads the tokenizer from the folder, whatever the name.
            text["hf_tokenizer_name"] = adapter.description.name
            (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        notes += [missing] if missing else []
    option = "" if precision == "fp32" else f', precision="{precision}"'
    load_folder = f'open_clip.create_model_and_transforms("local-dir:PATH"{option})'
    more = [] if notes else ['tokenizer = open_clip.get_tokenizer("local-dir:PATH")']
    own_name = f"{adapter.description.family}:local-dir:PATH"
    if name is None:
        return ExportedModel("open_clip", f"model, _, preprocess = {load_folder}", tuple(more), own_name, tuple(notes))
    if (
        tuple(content["preprocess_cfg"]["mean"]) != OPENAI_NORMALISATION.mean
        or content["preprocess_cfg"]["resize_mode"] != "shortest"
    ):
        notes.append(
            "If loaded by the name of its architecture, open_clip prepares images as for OpenAI's models, with another "
            "mean, std or resizing than this model's; local-dir:PATH uses the right ones."
        )
    by_name = f'model = open_clip.create_model("{name}", pretrained="PATH/{WEIGHTS}"{option})'
    return ExportedModel("open_clip", by_name, (f"model, _, preprocess = {load_folder}", *more), own_name, tuple(notes))


def _precision(model: Any) -> str:
    """open_clip's name of the model's number format."""
    formats = parameter_dtypes(model)
    for kind, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        if kind in formats:
            return f"pure_{name}" if formats == {kind} else name
    return "fp32"


def _candidates(
    open_clip: Any, adapter: DenseAdapter, inferred: Mapping[str, Any] | None
) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Candidate configurations, most likely first, each with its name or ``None``."""
    own = adapter.description.model
    known = open_clip.list_models()
    if own in known:
        yield own, open_clip.get_model_config(own)
    elif own.startswith(("local-dir:", "hf-hub:")):
        try:
            yield None, model_config(open_clip, own)
        except Exception:  # the folder may be gone; then the others are tried
            own = ""
    fitting = [(name, open_clip.get_model_config(name)) for name in known if name != own]
    fitting = [(name, config) for name, config in fitting if _fits(adapter, config)]
    yield from sorted(fitting, key=lambda pair: not _is_trunk_of(adapter, pair[1]))
    if inferred is not None:
        yield None, dict(inferred)


def _fits(adapter: DenseAdapter, config: Mapping[str, Any]) -> bool:
    """Whether the sizes in a configuration, as far as they show without building, are those of the model."""
    model: Any = adapter.model
    vision, text = config["vision_cfg"], config["text_cfg"]
    visual = model.visual
    tower = getattr(model, "text", model)
    side = vision.get("image_size", 224)
    due: list[tuple[object, object]] = [
        (config["embed_dim"], adapter.description.embedding_width),
        (_pair(side), _pair(visual.image_size)),
        (bool(vision.get("timm_model_name")), hasattr(visual, "trunk")),
        ("multimodal_cfg" in config, hasattr(model, "text_decoder")),
        (bool(text.get("hf_model_name")), not text_tower.is_native(model)),
    ]
    if text_tower.is_native(model) and hasattr(tower, "context_length"):
        due += [
            (text.get("context_length", 77), tower.context_length),
            (text.get("vocab_size", 49408), tower.token_embedding.num_embeddings),
            (text.get("width", 512), tower.token_embedding.embedding_dim),
        ]
    if hasattr(visual, "attnpool"):
        due += [
            (vision.get("layers"), [len(layer) for layer in resnet_layers(visual)]),
            (vision.get("width", 64), visual.conv3.out_channels),
        ]
    elif not hasattr(visual, "trunk"):
        due += [
            (vision.get("layers", 12), len(visual.transformer.resblocks)),
            (vision.get("width", 768), visual.conv1.out_channels),
            (vision.get("patch_size", 16), visual.conv1.kernel_size[0]),
        ]
    return all(a == b for a, b in due)


def _pair(side: Any) -> tuple[int, int]:
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return int(height), int(width)


def _is_trunk_of(adapter: DenseAdapter, config: Mapping[str, Any]) -> bool:
    """Whether the trunk was built by the timm name in a configuration."""
    model: Any = adapter.model
    known = getattr(getattr(model.visual, "trunk", None), "pretrained_cfg", None) or {}
    return known.get("architecture") == config["vision_cfg"].get("timm_model_name", "").partition(".")[0]


def use_tokenizer_of_repository(folder: Path, repository: str) -> None:
    """Name a repository as the place of the tokenizer whose files an export for it contains.

    open_clip reads a tokenizer of a folder from the folder itself, and that of a repository from the name in the
    configuration.
    """
    file = folder / CONFIG
    if not file.is_file() or not (folder / "tokenizer_config.json").is_file():
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    text = content.get("model_cfg", {}).get("text_cfg", {})
    if "hf_tokenizer_name" in text:
        text["hf_tokenizer_name"] = repository
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
