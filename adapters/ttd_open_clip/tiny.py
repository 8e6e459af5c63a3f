"""``open_clip:tiny``: a small OpenCLIP-architecture model that comes with the package, and its subword tokenizer.

The folder holds ``open_clip_config.json`` (``model_cfg`` and ``preprocess_cfg``), ``model.safetensors`` (float16),
``tokenizer.json`` (byte-level BPE of the ``tokenizers`` library) and ``ttd.json`` (dense mode and calibration).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttd_open_clip.library import import_open_clip
from ttd_plugins.adapter import Calibration
from ttd_plugins.embedded import model_folder
from ttd_plugins.errors import MissingDependencyError, TTDError, one_sentence

EMBEDDED_FOLDER = model_folder("open_clip_tiny")
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "ttd.json"


class TinyTokenizer:
    """A byte-level BPE tokenizer with open_clip's calling convention; it encodes any string.

    Ids: 0 pads, the last two ids of the vocabulary are the start and the end token, so that the end token is the
    largest id of its row, which is where a tower with argmax pooling looks.
    """

    def __init__(self, path: str | Path, context_length: int) -> None:
        """Read ``tokenizer.json``.

        Args:
            path: the file that ``tokenizers.Tokenizer.save`` wrote.
            context_length: positions of the text tower, the start and end token included.

        Raises:
            MissingDependencyError: the ``tokenizers`` library is not installed.
            TTDError: the file cannot be read.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingDependencyError(
                "the tokenizer of open_clip:tiny needs the library tokenizers; run: pip install 'ttd-plugins[demo]'"
            ) from error
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for all that is wrong with a file
            raise TTDError(
                f"the tokenizer {path} cannot be read ({one_sentence(error)}); give the tokenizer.json that belongs "
                "to the model"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # A caption that spells a special token is text like any other.
        self._tokenizer.encode_special_tokens = True
        self.context_length = context_length
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.pad_token_id = 0
        self.sot_token_id = self.vocab_size - 2
        self.eot_token_id = self.vocab_size - 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The library leaves this setting out of its pickles.
        self._tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without start and end token, of any length."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Tokenise; a text that is too long loses its last words and keeps the end token.

        Args:
            texts: one string, or N of them.
            context_length: positions a row; by default the tokenizer's own.

        Returns:
            int64 ``[N, context_length]``: start token, text, end token, padding.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = context_length or self.context_length
        rows = torch.full((len(texts), length), self.pad_token_id, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.sot_token_id, *self.encode(text)[: length - 2], self.eot_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows


@dataclass(frozen=True)
class TinySettings:
    """What ``ttd.json`` says of a model: the dense mode that suits it, and its map from cosine to probability."""

    dense_mode: str
    calibration: Calibration


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise TTDError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TTDError(
            f"{path} cannot be read ({one_sentence(error)}); reinstall ttd-plugins or give a complete model folder"
        ) from error
    if not isinstance(content, dict):
        raise TTDError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def read_settings(folder: Path) -> TinySettings:
    """Read ``ttd.json`` of a model folder.

    Raises:
        TTDError: the file is absent, or an entry is missing.
    """
    content = read_json(folder / SETTINGS_FILE)
    try:
        calibration = Calibration(
            scale=float(content["calibration"]["scale"]), shift=float(content["calibration"]["shift"])
        )
        return TinySettings(dense_mode=str(content["dense_mode"]), calibration=calibration)
    except (KeyError, TypeError, ValueError) as error:
        raise TTDError(
            f"{folder / SETTINGS_FILE} must hold dense_mode and calibration (scale, shift): {one_sentence(error)}"
        ) from error


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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    model: Any = build_tiny(folder)
    if weights:
        path = folder / WEIGHTS_FILE
        try:
            state = {name: tensor.float() for name, tensor in load_file(path).items()}
            model.load_state_dict(state)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise TTDError(
                f"the weights {path} cannot be loaded ({one_sentence(error)}); reinstall ttd-plugins or give a "
                "complete model folder"
            ) from error
    tokenizer = TinyTokenizer(folder / TOKENIZER_FILE, context_length=model.context_length)
    if tokenizer.vocab_size != model.vocab_size:
        raise TTDError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} ids and the model's vocabulary {model.vocab_size}; "
            "the files of the folder do not belong together"
        )
    return model.eval(), tokenizer
