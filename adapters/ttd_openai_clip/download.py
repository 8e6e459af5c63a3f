"""From a name to configuration, weights, tokenizer and preprocessing: the hub, its cache, or a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ttd_openai_clip.library import import_transformers
from ttd_plugins.errors import TTDError, UnsupportedModelError, one_sentence
from ttd_plugins.toolkit.hub import hub_problem

MODEL_TYPE = "clip"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
PREPROCESSING_FILES = ("preprocessor_config.json", "processor_config.json")
FEWEST_TOKENS = 16
"""A tokenizer with fewer ids was built without its vocabulary, as transformers does when the files are missing."""


@dataclass(frozen=True)
class Source:
    """Where the files of a model are.

    Attributes:
        full: the backbone's name, for messages.
        where: a name on the hub, or the path of a folder.
        cache_dir: where downloads are kept; the hub's own place by default.
    """

    full: str
    where: str
    cache_dir: str | None = None

    @property
    def is_folder(self) -> bool:
        """Whether the files are in a folder."""
        return Path(self.where).is_dir()

    def options(self, problem: str | None) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained``; where the hub is out of reach, its cache may still do."""
        return {"cache_dir": self.cache_dir, "local_files_only": problem is not None or self.is_folder}

    def problem(self) -> str | None:
        """Why the hub cannot be reached; ``None`` if it might be, or is not needed."""
        return None if self.is_folder else hub_problem()

    def error(self, error: Exception, problem: str | None) -> TTDError:
        """One sentence on what failed and what to do."""
        if self.is_folder:
            return TTDError(
                f"{self.full} cannot be loaded ({type(error).__name__}: {one_sentence(error)}); the folder needs "
                "config.json and model.safetensors, as transformers' save_pretrained writes them"
            )
        reason = f"{self.full} cannot be loaded ({type(error).__name__}: {one_sentence(error)})"
        if problem is not None:
            reason = f"{self.full} cannot be loaded: {problem}, and the download cache does not hold all of it"
        return TTDError(
            f"{reason}; connect to the network once, or set HF_HUB_OFFLINE=1 where the download cache is warm, or give "
            "the path of a folder after openai_clip:"
        )


@dataclass(frozen=True)
class HubTokenizer:
    """The tokenizer of a model, fetched when a text is tokenised first, so that fresh weights need no network."""

    source: Source

    def load(self) -> Any:
        """Return the tokenizer.

        Raises:
            MissingDependencyError: transformers is not installed.
            TTDError: it cannot be had.
        """
        transformers = import_transformers()
        problem = self.source.problem()
        try:
            if self.source.is_folder and not has_any(self.source.where, TOKENIZER_FILES):
                raise FileNotFoundError(f"no {' and no '.join(TOKENIZER_FILES)}")
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.source.where, **self.source.options(problem))
            if len(tokenizer) < FEWEST_TOKENS:
                raise ValueError(f"it has {len(tokenizer)} tokens")
        except Exception as error:  # transformers and the libraries below it raise nearly anything
            advice = "connect to the network once" if problem is not None else "check the files of the model"
            raise TTDError(
                f"the tokenizer of {self.source.full} cannot be loaded ({problem or one_sentence(error)}); {advice}, "
                "or pass tokenizer= when you load the model"
            ) from error
        return tokenizer


def has_any(folder: str, files: tuple[str, ...]) -> bool:
    """Whether one of the files is in the folder."""
    return any((Path(folder) / file).is_file() for file in files)


def read_config(source: Source) -> Any:
    """The ``CLIPConfig`` of a model, before any of its weights is fetched.

    Raises:
        UnsupportedModelError: the configuration is another model's.
        TTDError: it cannot be had.
    """
    transformers = import_transformers()
    problem = source.problem()
    try:
        content, _ = transformers.PretrainedConfig.get_config_dict(source.where, **source.options(problem))
        if not content:
            raise FileNotFoundError("no config.json")
        kind = content.get("model_type")
        if kind != MODEL_TYPE:
            raise UnsupportedModelError(
                f"{source.full} cannot be adapted: its configuration is of model type {kind!r}, and this family takes "
                f"{MODEL_TYPE!r} alone"
            )
        return transformers.CLIPConfig.from_dict(content)
    except TTDError:
        raise
    except Exception as error:
        raise source.error(error, problem) from error


def build(config: Any, full: str) -> nn.Module:
    """A ``CLIPModel`` with fresh float32 weights, in evaluation mode.

    Raises:
        TTDError: no model can be built from the configuration.
    """
    transformers = import_transformers()
    try:
        return transformers.CLIPModel(config).float().eval()
    except Exception as error:
        raise TTDError(
            f"{full} cannot be built from its configuration ({type(error).__name__}: {one_sentence(error)}); give a "
            "config.json of transformers' CLIPModel"
        ) from error


def load_model(source: Source, config: Any) -> nn.Module:
    """A ``CLIPModel`` with its own weights, in evaluation mode.

    transformers only warns where weights are missing, and makes up the rest; here that is an error.

    Raises:
        TTDError: the weights cannot be had, or are not all there.
    """
    transformers = import_transformers()
    problem = source.problem()
    try:
        # Otherwise weights of another shape are an error that does not name them.
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True, **source.options(problem)}
        model, found = transformers.CLIPModel.from_pretrained(source.where, config=config, **options)
        # Of a weight of another shape the two shapes are told as well.
        mismatched = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
        absent = sorted([*found["missing_keys"], *mismatched])
        if absent:
            raise ValueError(f"{len(absent)} weights are absent or of another shape, such as {absent[0]}")
    except Exception as error:
        raise source.error(error, problem) from error
    return model.eval()


def load_image_processor(source: Source) -> Any:
    """The image processor of a model; ``None`` for a folder that has none, whose pixels are then OpenAI's.

    Raises:
        TTDError: it cannot be had.
    """
    transformers = import_transformers()
    if source.is_folder and not has_any(source.where, PREPROCESSING_FILES):
        return None
    problem = source.problem()
    try:
        return transformers.CLIPImageProcessor.from_pretrained(source.where, **source.options(problem))
    except Exception as error:
        raise source.error(error, problem) from error
