"""Models that open_clip builds, written as a folder that open_clip loads; the module itself is passed in.

The folder is what open_clip keeps on a hub: ``open_clip_config.json``, ``open_clip_model.safetensors`` and the files of
a tokenizer where the model has one of its own. ``local-dir:PATH`` loads all of it, and the weights file alone is a
checkpoint for ``create_model(NAME, pretrained=...)`` where the architecture has a name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ttd_plugins.adapter import DenseAdapter, ExportedModel
from ttd_plugins.errors import UnsupportedModelError, one_sentence
from ttd_plugins.toolkit.exporting import TOLERANCE, WAY_OUT, difference, number_formats, save_tokenizer, write_weights
from ttd_plugins.toolkit.hub import hub_offline, quiet_root_logger
from ttd_plugins.toolkit.transforms import Normalisation

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)


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
    """Write an adapter's model as open_clip's folder, and load it again to see that the embeddings are the same.

    Which architecture it is, is found out by trial: the description's name, every registered architecture of these
    sizes, then ``inferred``; the first that open_clip loads the weights into, and that gives the same embeddings, is
    the one. That takes the memory of a second model.

    Args:
        adapter: its model has no LoRA in it.
        folder: an empty folder.
        open_clip: the module.
        tokenizer: the adapter's tokenizer.
        normalisation: of the pixels.
        inferred: a ``model_cfg`` read off the model, for architectures without a name.
        default_resize_mode: open_clip's name of how images of other shapes are fitted in, where the model does not say.
        why: the reason that is told where nothing fits.

    Raises:
        UnsupportedModelError: open_clip builds no such model.
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
    allowed = max(TOLERANCE.get(kind, 1e-5) for kind in number_formats(model))
    reasons: list[str] = []
    with quiet_root_logger("open_clip"), hub_offline():
        for name, config in _candidates(open_clip, adapter, inferred):
            content = {"model_cfg": config, "preprocess_cfg": preprocessing}
            (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            try:
                built = open_clip.create_model(f"local-dir:{folder}", precision=precision, pretrained_text=False)
                apart = difference(adapter, built)
            except Exception as error:  # whatever a wrong configuration leads to
                reasons.append(f"{name or 'a configuration read off it'}: {one_sentence(error, 120)}")
                continue
            if apart <= allowed:
                return _finish(adapter, folder, name, content, tokenizer, precision)
            reasons.append(f"{name or 'a configuration read off it'}: embeddings differ by {apart:.1e}")
    tried = f" (tried {'; '.join(reasons[:2])})" if reasons else ""
    raise UnsupportedModelError(f"open_clip cannot rebuild {adapter.description.name}: {why}{tried}; {WAY_OUT}")


def _finish(
    adapter: DenseAdapter, folder: Path, name: str | None, content: dict[str, Any], tokenizer: Any, precision: str
) -> ExportedModel:
    notes: list[str] = []
    config = content["model_cfg"]
    text = config["text_cfg"]
    # open_clip's own byte-pair tokenizer is packaged with it, and is what a configuration without a name means.
    packaged = type(tokenizer).__module__.startswith("open_clip") and not hasattr(tokenizer, "tokenizer")
    own = text.get("hf_tokenizer_name")
    if own or (not packaged and (tokenizer is not None or name is None)):
        advice = (
            f"open_clip.get_tokenizer({name!r}) gives it"
            if name and own
            else "make the one that the model was trained with"
        )
        missing = save_tokenizer(tokenizer, folder, advice)
        if missing is None and not own:
            # open_clip looks for it in the folder, whatever the name is.
            text["hf_tokenizer_name"] = adapter.description.name
            (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        notes += [missing] if missing else []
    option = "" if precision == "fp32" else f', precision="{precision}"'
    whole = f'open_clip.create_model_and_transforms("local-dir:PATH"{option})'
    more = [] if notes else ['tokenizer = open_clip.get_tokenizer("local-dir:PATH")']
    family = adapter.description.family
    back = f"{family}:local-dir:PATH"
    if name is None:
        return ExportedModel("open_clip", f"model, _, preprocess = {whole}", tuple(more), back, tuple(notes))
    if (
        tuple(content["preprocess_cfg"]["mean"]) != OPENAI_MEAN
        or content["preprocess_cfg"]["resize_mode"] != "shortest"
    ):
        notes.append(
            "Loaded by its architecture's name, open_clip prepares images as for OpenAI's models, whose mean, std or "
            "resizing are not this model's; local-dir:PATH brings the right ones."
        )
    by_name = f'model = open_clip.create_model("{name}", pretrained="PATH/{WEIGHTS}"{option})'
    return ExportedModel("open_clip", by_name, (f"model, _, preprocess = {whole}", *more), back, tuple(notes))


def _precision(model: Any) -> str:
    """open_clip's name of the number format that the model is in."""
    formats = number_formats(model)
    for kind, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        if kind in formats:
            return f"pure_{name}" if formats == {kind} else name
    return "fp32"


def _candidates(
    open_clip: Any, adapter: DenseAdapter, inferred: Mapping[str, Any] | None
) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Configurations that may be the model's, the likeliest first, with the names of those that have one."""
    own = adapter.description.model
    known = open_clip.list_models()
    if own in known:
        yield own, open_clip.get_model_config(own)
    elif own.startswith(("local-dir:", "hf-hub:")):
        try:
            yield None, open_clip.get_model_config(own)
        except Exception:  # the folder may be gone by now, and then the others are tried
            own = ""
    fitting = [(name, open_clip.get_model_config(name)) for name in known if name != own]
    fitting = [(name, config) for name, config in fitting if _fits(adapter, config)]
    yield from sorted(fitting, key=lambda pair: not _is_trunk_of(adapter, pair[1]))
    if inferred is not None:
        yield None, dict(inferred)


def _fits(adapter: DenseAdapter, config: Mapping[str, Any]) -> bool:
    """Whether the sizes that can be compared without building are the model's."""
    model: Any = adapter.model
    vision, text = config["vision_cfg"], config["text_cfg"]
    visual = model.visual
    tower = getattr(model, "text", model)
    side = vision.get("image_size", 224)
    due: list[tuple[object, object]] = [
        (config["embed_dim"], adapter.description.embedding_width),
        (tuple(side) if isinstance(side, list | tuple) else (side, side), tuple(visual.image_size)),
        (bool(vision.get("timm_model_name")), hasattr(visual, "trunk")),
    ]
    if hasattr(tower, "context_length") and not text.get("hf_model_name"):
        due += [
            (text.get("context_length", 77), tower.context_length),
            (text.get("vocab_size", 49408), tower.token_embedding.num_embeddings),
            (text.get("width", 512), tower.token_embedding.embedding_dim),
        ]
    if not hasattr(visual, "trunk"):
        due += [
            (vision.get("layers", 12), len(visual.transformer.resblocks)),
            (vision.get("width", 768), visual.conv1.out_channels),
            (vision.get("patch_size", 16), visual.conv1.kernel_size[0]),
        ]
    return all(a == b for a, b in due)


def _is_trunk_of(adapter: DenseAdapter, config: Mapping[str, Any]) -> bool:
    """Whether timm says that the trunk was built by the name that a configuration has."""
    model: Any = adapter.model
    known = getattr(getattr(model.visual, "trunk", None), "pretrained_cfg", None) or {}
    return known.get("architecture") == config["vision_cfg"].get("timm_model_name", "").partition(".")[0]
