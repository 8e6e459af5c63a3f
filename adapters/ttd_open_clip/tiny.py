"""``open_clip:tiny``: a small OpenCLIP-architecture model that comes with the package.

The folder holds ``open_clip_config.json`` (``model_cfg`` and ``preprocess_cfg``), ``model.safetensors`` (float16),
``tokenizer.json`` (byte-level BPE of the ``tokenizers`` library) and ``ttd.json`` (dense mode and calibration).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ttd_open_clip.recognition import import_open_clip
from ttd_plugins.embedded import model_folder
from ttd_plugins.embedded.tokenizer import TinyTokenizer
from ttd_plugins.toolkit.open_clip_models import set_preprocessing
from ttd_plugins.toolkit.text_tower import text_module
from ttd_plugins.toolkit.tiny_models import build_from_config, load_tiny_model

EMBEDDED_FOLDER = model_folder("open_clip_tiny")
CONFIG_FILE = "open_clip_config.json"


def build_tiny(folder_or_config: str | Path | Mapping[str, Any]) -> nn.Module:
    """Build an ``open_clip.model.CLIP`` or ``CustomTextCLIP`` with fresh float32 weights, on the CPU and in train mode.

    Args:
        folder_or_config: a folder with ``open_clip_config.json``, or the content of that file: ``model_cfg`` (keyword
            arguments of ``CLIP``: ``embed_dim``, ``vision_cfg``, ``text_cfg``, ``quick_gelu``; of ``CustomTextCLIP``
            where ``custom_text`` is true) and, optionally, ``preprocess_cfg`` (``mean``, ``std``, ``interpolation``,
            ``resize_mode``).

    Raises:
        MissingDependencyError: open_clip is not installed.
        TTDError: the configuration cannot be read.
    """
    open_clip = import_open_clip()

    def build(config: Mapping[str, Any]) -> nn.Module:
        settings = dict(config["model_cfg"])
        kind = open_clip.model.CustomTextCLIP if settings.pop("custom_text", False) else open_clip.model.CLIP
        model = kind(**settings)
        set_preprocessing(open_clip, model, config.get("preprocess_cfg", {}))
        return model

    needs = "a model_cfg with embed_dim, vision_cfg and text_cfg of open_clip's CLIP"
    return build_from_config(folder_or_config, CONFIG_FILE, build, needs)


def _text_sizes(model: Any) -> tuple[int, int]:
    tower = text_module(model)
    return tower.context_length, tower.vocab_size


load_tiny = partial(
    load_tiny_model, build=build_tiny, tokenizer_class=TinyTokenizer, name="open_clip:tiny", sizes=_text_sizes
)
