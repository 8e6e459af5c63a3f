"""``siglip:tiny``: a small SigLIP of transformers that comes with the package.

The folder holds ``config.json`` (of ``SiglipModel``), ``model.safetensors`` (float16), ``tokenizer.json`` (byte-level
BPE of the ``tokenizers`` library) and ``ttd.json`` (dense mode and calibration).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import nn

from ttd_plugins.embedded import model_folder
from ttd_plugins.embedded.tokenizer import TinyTokenizer
from ttd_plugins.toolkit.tiny_models import build_from_config, load_tiny_model
from ttd_plugins.toolkit.transformers_blocks import text_sizes
from ttd_siglip.fresh_model import fresh_model

EMBEDDED_FOLDER = model_folder("siglip_tiny")
CONFIG_FILE = "config.json"


def _build(folder: Path) -> nn.Module:
    needs = "text_config and vision_config of transformers' SiglipConfig"
    return build_from_config(
        folder,
        CONFIG_FILE,
        lambda config: fresh_model({key: config[key] for key in ("text_config", "vision_config")}),
        needs,
    )


load_tiny = partial(load_tiny_model, build=_build, tokenizer_class=TinyTokenizer, name="siglip:tiny", sizes=text_sizes)
