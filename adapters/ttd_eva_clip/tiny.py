"""``eva_clip:tiny``: a small EVA02-architecture CLIP that comes with the package.

The folder holds ``eva_clip_config.json`` (``model_cfg`` and ``preprocess_cfg``), ``model.safetensors`` (float16),
``tokenizer.json`` (byte-level BPE of the ``tokenizers`` library) and ``ttd.json`` (dense mode and calibration).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ttd_eva_clip.recognition import import_open_clip
from ttd_plugins.embedded import model_folder
from ttd_plugins.embedded.tokenizer import TinyTokenizer
from ttd_plugins.toolkit.open_clip_models import set_preprocessing
from ttd_plugins.toolkit.tiny_models import build_from_config, load_tiny_model

EMBEDDED_FOLDER = model_folder("eva_clip_tiny")
CONFIG_FILE = "eva_clip_config.json"
# Any small trunk that open_clip can build by name; the EVA trunk replaces it.
PLACEHOLDER = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160}


def build_tiny(folder_or_config: str | Path | Mapping[str, Any]) -> nn.Module:
    """Build an ``open_clip.CustomTextCLIP`` around a timm ``Eva``, with fresh float32 weights, on the CPU.

    open_clip 3 passes only a name to timm, so a small trunk is built here and put into the model.

    Args:
        folder_or_config: a folder with ``eva_clip_config.json``, or the content of that file: ``model_cfg``
            (``embed_dim``, ``text_cfg`` of open_clip, and ``trunk_cfg``, keyword arguments of ``timm.create_model``
            with ``model_name``, ``img_size`` and others) and, optionally, ``preprocess_cfg`` (``mean``, ``std``,
            ``interpolation``, ``resize_mode``).

    Raises:
        MissingDependencyError: open_clip is not installed.
        TTDError: the configuration cannot be read.
    """
    open_clip = import_open_clip()
    import timm

    def build(config: Mapping[str, Any]) -> nn.Module:
        settings = config["model_cfg"]
        width = settings["embed_dim"]
        trunk: Any = timm.create_model(pretrained=False, num_classes=width, **settings["trunk_cfg"])
        model: Any = open_clip.CustomTextCLIP(embed_dim=width, vision_cfg=PLACEHOLDER, text_cfg=settings["text_cfg"])
        model.visual.trunk = trunk
        model.visual.image_size = tuple(trunk.patch_embed.img_size)
        set_preprocessing(open_clip, model, config.get("preprocess_cfg", {}))
        return model

    needs = "a model_cfg with embed_dim, trunk_cfg of timm's Eva and text_cfg of open_clip"
    return build_from_config(folder_or_config, CONFIG_FILE, build, needs)


load_tiny = partial(load_tiny_model, build=build_tiny, tokenizer_class=TinyTokenizer, name="eva_clip:tiny")
