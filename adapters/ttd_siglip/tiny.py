"""``siglip:tiny``: a small SigLIP of transformers that comes with the package.

The folder holds ``config.json`` (of ``SiglipModel``), ``model.safetensors`` (float16), ``tokenizer.json`` (byte-level
BPE of the ``tokenizers`` library) and ``ttd.json`` (dense mode and calibration).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ttd_plugins.embedded import model_folder
from ttd_plugins.embedded.folder import TOKENIZER_FILE, WEIGHTS_FILE, load_weights, read_json
from ttd_plugins.embedded.tokenizer import TinyTokenizer
from ttd_plugins.errors import TTDError, one_sentence
from ttd_siglip.building import fresh_model

EMBEDDED_FOLDER = model_folder("siglip_tiny")
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
    config = read_json(folder / CONFIG_FILE)
    if weights and not (folder / WEIGHTS_FILE).exists():
        raise TTDError(
            f"the weights {folder / WEIGHTS_FILE} are not there; make them with examples/pretrain_tiny.py, or take "
            "siglip:tiny@random"
        )
    try:
        model: Any = fresh_model({part: config[part] for part in ("text_config", "vision_config")})
    except (KeyError, TypeError, ValueError) as error:
        raise TTDError(
            f"no model can be built from {folder / CONFIG_FILE} ({type(error).__name__}: {one_sentence(error)}); it "
            "needs text_config and vision_config of transformers' SiglipConfig"
        ) from error
    if weights:
        load_weights(model, folder)
    embeddings = model.text_model.embeddings
    tokenizer = TinyTokenizer(
        folder / TOKENIZER_FILE, context_length=int(embeddings.position_embedding.weight.shape[0])
    )
    vocabulary = int(embeddings.token_embedding.weight.shape[0])
    if tokenizer.vocab_size != vocabulary:
        raise TTDError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} ids and the model's vocabulary {vocabulary}; the "
            "files of the folder do not belong together"
        )
    return model.eval(), tokenizer
