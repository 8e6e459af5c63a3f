"""``open_clip:photo``, the embedded model for photographs. Its folder has the files of ``tiny``, weights in shards."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ttd_open_clip.recognition import import_open_clip
from ttd_open_clip.tiny import CONFIG_FILE
from ttd_plugins.embedded import model_folder
from ttd_plugins.embedded.tokenizer import TinyTokenizer
from ttd_plugins.toolkit.open_clip_models import set_preprocessing
from ttd_plugins.toolkit.tiny_models import build_from_config, load_tiny_model

EMBEDDED_FOLDER = model_folder("open_clip_photo")


def build_photo(folder_or_config: str | Path | Mapping[str, Any]) -> nn.Module:
    """Build an ``open_clip.model.CustomTextCLIP`` with fresh float32 weights, on the CPU and in train mode.

    Args:
        folder_or_config: a folder with ``open_clip_config.json``, or the content of that file; see
            :func:`ttd_open_clip.tiny.build_tiny`.

    Raises:
        MissingDependencyError: open_clip is not installed.
        TTDError: the configuration cannot be read.
    """
    open_clip = import_open_clip()

    def build(config: Mapping[str, Any]) -> nn.Module:
        settings = {name: value for name, value in config["model_cfg"].items() if name != "custom_text"}
        model = open_clip.model.CustomTextCLIP(**settings)
        set_preprocessing(open_clip, model, config.get("preprocess_cfg", {}))
        return model

    needs = "a model_cfg with embed_dim, vision_cfg and text_cfg of open_clip's CustomTextCLIP"
    return build_from_config(folder_or_config, CONFIG_FILE, build, needs)


def _text_sizes(model: Any) -> tuple[int, int]:
    return model.text.context_length, model.text.vocab_size


load_photo = partial(
    load_tiny_model, build=build_photo, tokenizer_class=TinyTokenizer, name="open_clip:photo", sizes=_text_sizes
)
