"""Models of transformers by name: configuration, weights, tokenizer and image processor, from a hub or a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ttd_plugins.errors import MissingDependencyError, TTDError, UnsupportedModelError, one_sentence
from ttd_plugins.toolkit.hub import (
    CONFIG,
    SMALL_FILES,
    HubProblem,
    cached_folder,
    cannot_load,
    fetch,
    fetch_transformers_model,
)
from ttd_plugins.toolkit.remote_code import load_auto, refuse_code
from ttd_plugins.utils.loading_lock import LOADING_LOCK
from ttd_plugins.utils.state_dicts import foreign_files

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def has_any(folder: str, files: tuple[str, ...]) -> bool:
    """Whether one of the files is in the folder."""
    return any((Path(folder) / file).is_file() for file in files)


@dataclass
class TransformersModel:
    """A model of transformers by name.

    Attributes:
        import_transformers: returns the module ``transformers``, or raises MissingDependencyError.
        backbone: the backbone's name, for messages.
        where: a name on the hub, or the path of a folder.
        kind: prefix of the model's classes, such as ``"CLIP"`` in ``CLIPModel`` and ``CLIPConfig``.
        kinds: the same by ``model_type`` of ``config.json``, for models that are loaded; :attr:`kind` for others.
        unsupported_config_reason: from the content of ``config.json`` to the reason why the model cannot be adapted, or
            ``None``.
        initialise: called with a model that was built with fresh weights.
        processor_class: class of transformers that loads the image processor.
        processor_classes: the same by ``model_type`` of ``config.json``; :attr:`processor_class` for others.
        cache_dir: folder for downloads; the hub client's own by default.
        tokenizer_files: one of these must be in a folder that has a tokenizer; empty for no check.
        fewest_tokens: a tokenizer with fewer ids was built without its vocabulary, as transformers does for some
            classes when files are missing.
        fetched: whether the model's files were requested from the hub before.
        problem: why they could not be downloaded.
    """

    import_transformers: Callable[[], Any]
    backbone: str
    where: str
    kind: str
    unsupported_config_reason: Callable[[Mapping[str, Any]], str | None]
    initialise: Callable[[Any], object] | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)
    processor_class: str = "AutoImageProcessor"
    processor_classes: Mapping[str, str] = field(default_factory=dict)
    cache_dir: str | None = None
    tokenizer_files: tuple[str, ...] = ()
    fewest_tokens: int = 0
    fetched: bool = False
    problem: HubProblem | None = None

    @property
    def is_folder(self) -> bool:
        """Whether the files are in a folder."""
        return Path(self.where).is_dir()

    @property
    def has_tokenizer_files(self) -> bool:
        """Whether a tokenizer may be where the model is."""
        return not (self.is_folder and self.tokenizer_files) or has_any(self.where, self.tokenizer_files)

    @property
    def _options(self) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained``, which reads the files downloaded before."""
        return {"cache_dir": self.cache_dir, "local_files_only": True}

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """A model with fresh float32 weights from keyword arguments of its configuration class; in evaluation mode."""
        with LOADING_LOCK:
            return self._fresh(getattr(self.import_transformers(), f"{self.kind}Config")(**config), self.kind)

    def load(self, *, weights: bool) -> tuple[nn.Module, Any]:
        """The model in evaluation mode, and its image processor.

        Args:
            weights: whether its own weights are loaded; otherwise they are fresh.

        Returns:
            The model, and the image processor or ``None`` for a folder without one.

        Raises:
            UnsupportedModelError: the configuration is that of another kind of model.
            MissingDependencyError: transformers is not installed.
            TTDError: something cannot be read or downloaded, or the weights are incomplete.
        """
        transformers = self.import_transformers()
        try:
            if not self.is_folder:
                self.problem = fetch_transformers_model(
                    self.where, self._require_supported, weights=weights, cache_dir=self.cache_dir
                )
                self.fetched = True
            with LOADING_LOCK:
                kind, config = self._config(transformers)
                processor = None
                if not self.is_folder or has_any(self.where, PROCESSOR_FILES):
                    loader = getattr(transformers, self.processor_classes.get(config.model_type, self.processor_class))
                    what = f"the image processor of {self.backbone}"
                    processor = load_auto(loader, self.where, what, **self._options)
                model = self._pretrained(transformers, config, kind) if weights else self._fresh(config, kind)
                return model, processor
        except TTDError:
            raise
        except Exception as error:  # transformers and the libraries below it raise nearly anything
            if self.is_folder:
                advice = (
                    "the folder needs config.json and model.safetensors, as transformers' save_pretrained writes them"
                )
            else:
                advice = f"give the path of a folder after {self.backbone.partition(':')[0]}:"
            foreign = foreign_files(Path(self.where)) if self.is_folder else None
            if foreign is not None:
                raise TTDError(f"{self.backbone} cannot be loaded ({foreign}); {advice}") from error
            raise TTDError(cannot_load(self.backbone, self.problem, error, advice)) from error

    def _require_supported(self, config: Mapping[str, Any]) -> None:
        reason = self.unsupported_config_reason(config)
        if reason is not None:
            raise UnsupportedModelError(f"{self.backbone} cannot be adapted: {reason}")

    def _config(self, transformers: Any) -> tuple[str, Any]:
        """The prefix of the model's classes, and its configuration."""
        content, _ = transformers.PretrainedConfig.get_config_dict(self.where, **self._options)
        if not content:
            raise FileNotFoundError("no config.json")
        self._require_supported(content)
        refuse_code(content, f"{self.backbone} ({CONFIG})")
        kind = self.kinds.get(str(content.get("model_type")), self.kind)
        return kind, getattr(transformers, f"{kind}Config").from_dict(content)

    def _fresh(self, config: Any, kind: str) -> nn.Module:
        model = getattr(self.import_transformers(), f"{kind}Model")(config).float().eval()
        if self.initialise is not None:
            self.initialise(model)
        return model

    def _pretrained(self, transformers: Any, config: Any, kind: str) -> nn.Module:
        # Without ignore_mismatched_sizes the error does not name the weights.
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True, **self._options}
        loader = getattr(transformers, f"{kind}Model")
        # By name, transformers would also ask the hub to convert weights that are not safetensors.
        folder = self.where if self.is_folder else cached_folder(self.where, CONFIG, cache_dir=self.cache_dir)
        model, report = loader.from_pretrained(folder, config=config, **options)
        # transformers replaces absent weights by random ones and only warns. Mismatched keys may come with shapes.
        mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
        absent = sorted([*report["missing_keys"], *mismatched])
        if absent:
            raise ValueError(f"{len(absent)} weights are absent or of another shape, such as {absent[0]}")
        model.name_or_path = model.config._name_or_path = self.where
        return model.eval()

    def load_tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            MissingDependencyError: transformers, or what the tokenizer needs, is not installed.
            TTDError: it cannot be read or downloaded.
        """
        transformers = self.import_transformers()
        what = f"the tokenizer of {self.backbone}"
        problem = self.problem
        try:
            if not self.is_folder and not self.fetched:
                problem = fetch(self.where, SMALL_FILES, cache_dir=self.cache_dir)
            if not self.has_tokenizer_files:
                raise FileNotFoundError(f"no {' and no '.join(self.tokenizer_files)}")
            with LOADING_LOCK:
                tokenizer = load_auto(transformers.AutoTokenizer, self.where, what, **self._options)
            if self.fewest_tokens and len(tokenizer) < self.fewest_tokens:
                raise ValueError(f"it has {len(tokenizer)} tokens")
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{error}, or pass tokenizer= when you load the model") from error
        except ImportError as error:
            raise MissingDependencyError(
                f"{what} needs a library that cannot be imported ({one_sentence(error)}); run: pip install "
                f"'ttd-plugins[{self.backbone.partition(':')[0]}]'"
            ) from error
        except Exception as error:  # transformers and the libraries below it raise nearly anything
            advice = "pass tokenizer= when you load the model"
            raise TTDError(cannot_load(what, problem, error, advice)) from error
        return tokenizer


@dataclass(frozen=True)
class LazyTokenizer:
    """A tokenizer that is loaded when texts are first tokenised, so that fresh weights need no network."""

    source: TransformersModel

    def load(self) -> Any:
        """Return the tokenizer; raises as :meth:`TransformersModel.load_tokenizer`."""
        return self.source.load_tokenizer()
