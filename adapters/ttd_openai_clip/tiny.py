"""``openai_clip:tiny``: a small model of transformers' ``CLIPModel`` that comes with the package.

The folder holds ``config.json`` (transformers' ``CLIPConfig``), ``model.safetensors`` (float16), ``tokenizer.json``
(byte-level BPE of the ``tokenizers`` library) and ``ttd.json`` (dense mode and calibration).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ttd_openai_clip.recognition import import_transformers
from ttd_plugins.embedded import model_folder
from ttd_plugins.embedded.tokenizer import TinyTokenizer
from ttd_plugins.toolkit.tiny_models import build_from_config, load_tiny_model
from ttd_plugins.toolkit.transformers_blocks import text_sizes

EMBEDDED_FOLDER = model_folder("openai_clip_tiny")
CONFIG_FILE = "config.json"


def _build(folder: Path) -> nn.Module:
    transformers = import_transformers()

    def build(config: Mapping[str, Any]) -> nn.Module:
        for part in ("text_config", "vision_config"):
            if not isinstance(config[part], Mapping):
                raise TypeError(f"{part} is no object")
        return transformers.CLIPModel(transformers.CLIPConfig.from_dict(config)).float()

    return build_from_config(folder, CONFIG_FILE, build, "a configuration of transformers' CLIPModel")


load_tiny = partial(
    load_tiny_model, build=_build, tokenizer_class=TinyTokenizer, name="openai_clip:tiny", sizes=text_sizes
)
