"""``siglip:tiny``: a small SigLIP of transformers that comes with the package.

The folder holds ``config.json`` (of ``SiglipModel``), ``model.safetensors`` (float16), ``tokenizer.json`` (byte-level
BPE of the ``tokenizers`` library) and ``ttd.json`` (dense mode and calibration).
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ttd_plugins.embedded import model_folder
from ttd_plugins.embedded.tokenizer import TinyTokenizer
from ttd_plugins.toolkit.tiny_models import build_from_config, load_tiny_model
from ttd_plugins.toolkit.transformers_blocks import text_sizes
from ttd_siglip.fresh_model import fresh_model

EMBEDDED_FOLDER = model_folder("siglip_tiny")
CONFIG_FILE = "config.json"


def load_tiny(folder: str | Path, *, weights: bool = True) -> tuple[nn.Module, TinyTokenizer]:
    """Load model and tokenizer of a folder; see :func:`ttd_plugins.toolkit.tiny_models.load_tiny_model`."""
    name = "siglip:tiny"
    return load_tiny_model(folder, _build, TinyTokenizer, name=name, weights=weights, sizes=text_sizes)


def _build(folder: Path) -> nn.Module:
    needs = "text_config and vision_config of transformers' SiglipConfig"
    return build_from_config(
        folder,
        CONFIG_FILE,
        lambda config: fresh_model({key: config[key] for key in ("text_config", "vision_config")}),
        needs,
    )
