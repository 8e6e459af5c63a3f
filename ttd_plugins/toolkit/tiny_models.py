"""Building and loading of embedded models: a folder with a configuration, weights, a tokenizer and ``ttd.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ttd_plugins.embedded.folder import TOKENIZER_FILE, WEIGHTS_FILE, has_weights, load_weights, read_json
from ttd_plugins.errors import TTDError, one_sentence


def build_from_config(
    source: str | Path | Mapping[str, Any], file: str, build: Callable[[Mapping[str, Any]], nn.Module], needs: str
) -> nn.Module:
    """Build a model with fresh weights from a configuration.

    Args:
        source: a folder that holds ``file``, or the content of the file.
        file: name of the configuration file.
        build: builds the model from the content of the file.
        needs: what the configuration needs, for the message.

    Raises:
        MissingDependencyError: a library is not installed.
        TTDError: the configuration cannot be read, or no model can be built from it.
    """
    if isinstance(source, Mapping):
        where, config = "the configuration", source
    else:
        path = Path(source) / file
        where, config = str(path), read_json(path)
    try:
        return build(config)
    except TTDError:
        raise
    except Exception as error:  # configurations are checked by several libraries
        raise TTDError(
            f"no model can be built from {where} ({type(error).__name__}: {one_sentence(error)}); it needs {needs}"
        ) from error


def load_tiny_model(
    folder: str | Path,
    *,
    build: Callable[[Path], nn.Module],
    tokenizer_class: Callable[..., Any],
    name: str,
    weights: bool = True,
    sizes: Callable[[Any], tuple[int, int]] = lambda model: (model.context_length, model.vocab_size),
) -> tuple[nn.Module, Any]:
    """Build the model of a folder, in evaluation mode and float32, and its tokenizer.

    Args:
        folder: a folder with the configuration that ``build`` reads, ``model.safetensors`` and ``tokenizer.json``.
        build: builds the model with fresh weights from the folder.
        tokenizer_class: class of the tokenizer; called with the path and ``context_length``.
        name: name of the backbone, for messages.
        weights: whether ``model.safetensors`` is loaded; otherwise the weights are fresh.
        sizes: returns context length and vocabulary size of the text tower.

    Raises:
        MissingDependencyError: a library is not installed.
        TTDError: a file is absent, damaged, or does not fit the others.
    """
    folder = Path(folder)
    if weights and not has_weights(folder):
        raise TTDError(
            f"the weights {folder / WEIGHTS_FILE} are absent; reinstall ttd-plugins, make them with the "
            f"script that the README of the folder names, or load {name}@random"
        )
    model = build(folder)
    if weights:
        load_weights(model, folder)
    context_length, vocabulary = sizes(model)
    tokenizer = tokenizer_class(folder / TOKENIZER_FILE, context_length=context_length)
    if tokenizer.vocab_size != vocabulary:
        raise TTDError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} ids and the model's vocabulary {vocabulary}; the "
            "files of the folder do not belong together"
        )
    return model.eval(), tokenizer
