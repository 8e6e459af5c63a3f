"""``eva_clip:tiny``: a small EVA02-architecture CLIP that comes with the package.

The folder holds ``eva_clip_config.json`` (``model_cfg`` and ``preprocess_cfg``), ``model.safetensors`` (float16),
``tokenizer.json`` (byte-level BPE of the ``tokenizers`` library) and ``ttd.json`` (dense mode and calibration).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ttd_eva_clip.library import import_open_clip
from ttd_plugins.embedded import model_folder
from ttd_plugins.embedded.folder import TOKENIZER_FILE, WEIGHTS_FILE, load_weights, read_json
from ttd_plugins.embedded.tokenizer import TinyTokenizer
from ttd_plugins.errors import TTDError, one_sentence

EMBEDDED_FOLDER = model_folder("eva_clip_tiny")
CONFIG_FILE = "eva_clip_config.json"
# Any small trunk that open_clip can build by name; the EVA trunk takes its place.
PLACEHOLDER = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160}


def build_tiny(folder_or_config: str | Path | Mapping[str, Any]) -> nn.Module:
    """Build an ``open_clip.CustomTextCLIP`` around a timm ``Eva``, with fresh float32 weights, on the CPU.

    open_clip 3 passes nothing but a name to timm, so a small trunk is built here and put into its place.

    Args:
        folder_or_config: a folder with ``eva_clip_config.json``, or that file's content: ``model_cfg`` (``embed_dim``,
            ``text_cfg`` of open_clip, and ``trunk_cfg``, keyword arguments of ``timm.create_model`` with
            ``model_name``, ``img_size`` and whatever else) and, optionally, ``preprocess_cfg`` (``mean``, ``std``,
            ``interpolation``, ``resize_mode``).

    Raises:
        MissingDependencyError: open_clip is not installed.
        TTDError: the configuration cannot be read.
    """
    open_clip = import_open_clip()
    import timm
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    if isinstance(folder_or_config, Mapping):
        where, config = "the configuration", folder_or_config
    else:
        path = Path(folder_or_config) / CONFIG_FILE
        where, config = str(path), read_json(path)
    try:
        settings = config["model_cfg"]
        width = settings["embed_dim"]
        trunk: Any = timm.create_model(pretrained=False, num_classes=width, **settings["trunk_cfg"])
        model: Any = open_clip.CustomTextCLIP(embed_dim=width, vision_cfg=PLACEHOLDER, text_cfg=settings["text_cfg"])
        model.visual.trunk = trunk
        model.visual.image_size = tuple(trunk.patch_embed.img_size)
    except (KeyError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise TTDError(
            f"no model can be built from {where} ({type(error).__name__}: {one_sentence(error)}); it needs a model_cfg "
            "with embed_dim, trunk_cfg of timm's Eva and text_cfg of open_clip"
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
    if weights and not (folder / WEIGHTS_FILE).exists():
        raise TTDError(
            f"the weights {folder / WEIGHTS_FILE} are absent; make them with examples/pretrain_tiny.py --backbone "
            "eva_clip:tiny, or load eva_clip:tiny@random"
        )
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
