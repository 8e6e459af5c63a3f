"""``openai_clip:tiny``: a small model of transformers' ``CLIPModel`` that comes with the package.

The folder holds ``config.json`` (transformers' ``CLIPConfig``), ``model.safetensors`` (float16), ``tokenizer.json``
(byte-level BPE of the ``tokenizers`` library) and ``ttd.json`` (dense mode and calibration).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ttd_openai_clip.download import build
from ttd_openai_clip.library import import_transformers
from ttd_plugins.embedded import model_folder
from ttd_plugins.embedded.folder import TOKENIZER_FILE, WEIGHTS_FILE, load_weights, read_json
from ttd_plugins.embedded.tokenizer import TinyTokenizer
from ttd_plugins.errors import TTDError, one_sentence

EMBEDDED_FOLDER = model_folder("openai_clip_tiny")
CONFIG_FILE = "config.json"


def load_tiny(folder: str | Path, *, weights: bool = True) -> tuple[nn.Module, TinyTokenizer]:
    """Build the model of a folder, in evaluation mode and float32, and its tokenizer.

    Args:
        folder: a folder as described at the top of this module.
        weights: whether ``model.safetensors`` is loaded; otherwise the weights are fresh.

    Raises:
        MissingDependencyError: transformers or tokenizers is not installed.
        TTDError: a file is absent, damaged, or does not fit the others.
    """
    folder = Path(folder)
    if weights and not (folder / WEIGHTS_FILE).is_file():
        raise TTDError(
            f"the weights {folder / WEIGHTS_FILE} are absent; load openai_clip:tiny@random for fresh ones, or train "
            "them with examples/pretrain_tiny.py --backbone openai_clip:tiny"
        )
    transformers = import_transformers()
    content = read_json(folder / CONFIG_FILE)
    try:
        for part in ("text_config", "vision_config"):
            if not isinstance(content[part], dict):
                raise TypeError(f"{part} is no object")
        config = transformers.CLIPConfig.from_dict(content)
    except Exception as error:  # configurations are checked by several libraries
        raise TTDError(
            f"{folder / CONFIG_FILE} is no configuration of transformers' CLIPModel ({type(error).__name__}: "
            f"{one_sentence(error)}); reinstall ttd-plugins or give a complete model folder"
        ) from error
    model: Any = build(config, f"the model of {folder}")
    if weights:
        load_weights(model, folder)
    tokenizer = TinyTokenizer(folder / TOKENIZER_FILE, context_length=config.text_config.max_position_embeddings)
    if tokenizer.vocab_size != config.text_config.vocab_size:
        raise TTDError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} ids and the model's vocabulary "
            f"{config.text_config.vocab_size}; the files of the folder do not belong together"
        )
    return model, tokenizer
