"""``open_clip:tiny``: a small OpenCLIP-architecture model that comes with the package.

The folder holds ``open_clip_config.json`` (``model_cfg`` and ``preprocess_cfg``), ``model.safetensors`` (float16),
``tokenizer.json`` (byte-level BPE of the ``tokenizers`` library) and ``ttd.json`` (dense mode and calibration).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ttd_open_clip.library import import_open_clip
from ttd_plugins.embedded import model_folder
from ttd_plugins.embedded.folder import TOKENIZER_FILE, load_weights, read_json
from ttd_plugins.embedded.tokenizer import TinyTokenizer
from ttd_plugins.errors import TTDError, one_sentence

EMBEDDED_FOLDER = model_folder("open_clip_tiny")
CONFIG_FILE = "open_clip_config.json"


def build_tiny(folder_or_config: str | Path | Mapping[str, Any]) -> nn.Module:
    """Build an ``open_clip.model.CLIP`` with fresh float32 weights, on the CPU and in train mode.

    Args:
        folder_or_config: a folder with ``open_clip_config.json``, or that file's content: ``model_cfg`` (keyword
            arguments of ``CLIP``: ``embed_dim``, ``vision_cfg``, ``text_cfg``, ``quick_gelu``) and, optionally,
            ``preprocess_cfg`` (``mean``, ``std``, ``interpolation``, ``resize_mode``).

    Raises:
        MissingDependencyError: open_clip is not installed.
        TTDError: the configuration cannot be read.
    """
    open_clip = import_open_clip()
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    if isinstance(folder_or_config, Mapping):
        where, config = "the configuration", folder_or_config
    else:
        path = Path(folder_or_config) / CONFIG_FILE
        where, config = str(path), read_json(path)
    try:
        model = open_clip.model.CLIP(**config["model_cfg"])
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise TTDError(
            f"no model can be built from {where} ({type(error).__name__}: {one_sentence(error)}); it needs a model_cfg "
            "with embed_dim, vision_cfg and text_cfg of open_clip's CLIP"
        ) from error
    preprocess = merge_preprocess_dict(PreprocessCfg(), dict(config.get("preprocess_cfg", {})))
    set_model_preprocess_cfg(model, {**preprocess, "size": model.visual.image_size})
    return model


def load_tiny(folder: str | Path, *, weights: bool = True) -> tuple[nn.Module, TinyTokenizer]:
    """Build the model of a folder, in evaluation mode and float32, and its tokenizer.

    Args:
        folder: a folder as described at the top of this module.
        weights: whether ``model.safetensors`` is loaded; otherwise the weights are fresh.

    Raises:
        MissingDependencyError: open_clip or tokenizers is not installed.
        TTDError: a file is absent, damaged, or does not fit the others.
    """
    folder = Path(folder)
    model: Any = build_tiny(folder)
    if weights:
        load_weights(model, folder)
    tokenizer = TinyTokenizer(folder / TOKENIZER_FILE, context_length=model.context_length)
    if tokenizer.vocab_size != model.vocab_size:
        raise TTDError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} ids and the model's vocabulary {model.vocab_size}; "
            "the files of the folder do not belong together"
        )
    return model.eval(), tokenizer
