"""Models of open_clip by name: look-up, download and loading. The module ``open_clip`` is passed in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ttd_plugins.errors import BackboneNameError, TTDError, UnsupportedModelError, choices_sentence
from ttd_plugins.toolkit.clip_family import OWN_WEIGHTS, RANDOM
from ttd_plugins.toolkit.hub import (
    SMALL_FILES,
    HubProblem,
    cannot_load,
    fetch,
    fetch_url,
    first_of,
    hub_offline,
    quiet_root_logger,
)
from ttd_plugins.toolkit.tokenizing import MissingTokenizer
from ttd_plugins.utils.deprecation import RenamedAttribute, renamed_keyword, renamed_names

HUB, FOLDER = "hf-hub:", "local-dir:"
CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def bundles_weights(model: str) -> bool:
    """Whether a name is that of a repository or folder, which bundles configuration and weights."""
    return model.startswith((HUB, FOLDER))


@renamed_keyword("refusal", "unsupported_reason")
@dataclass(frozen=True)
class OpenCLIPModels:
    """The models that a family loads through open_clip.

    Attributes:
        open_clip: the module.
        family: name of the family, for messages.
        unsupported_reason: from a ``model_cfg`` to the reason why the model cannot be adapted, or ``None``.
        preprocessing: open_clip's preprocessing settings for models whose tag or folder does not bring any; by default
            those that all tags of the architecture share.
    """

    open_clip: Any
    family: str
    unsupported_reason: Callable[[Mapping[str, Any]], str | None]
    preprocessing: Mapping[str, Any] | None = None
    refusal = RenamedAttribute("unsupported_reason")

    # Names ---------------------------------------------------------------------------------------------------------

    def architectures(self) -> list[str]:
        """Names of the architectures that the family supports."""
        known = self.open_clip.list_models()
        return [name for name in known if self.unsupported_reason(self.open_clip.get_model_config(name)) is None]

    def architecture(self, model: str, choices: list[str], hint: str) -> str:
        """Resolve the name of an architecture that the family supports to open_clip's spelling.

        Raises:
            BackboneNameError: open_clip does not know it; the message lists ``choices`` and ends with ``hint``.
            UnsupportedModelError: open_clip knows it, but the family does not support it, with the reason.
        """
        name = model.replace("/", "-")
        config = self.open_clip.get_model_config(name) if name in self.open_clip.list_models() else None
        if config is None:
            raise BackboneNameError(f"{choices_sentence(f'{self.family} model', model, choices)}; {hint}")
        self._require_supported(f"{self.family}:{model}", config)
        return name

    def tags(self, architecture: str) -> list[str]:
        """Names of the pretrained weights of an architecture."""
        return list(self.open_clip.list_pretrained_tags_by_model(architecture))

    def _require_supported(self, full: str, config: Mapping[str, Any]) -> None:
        reason = self.unsupported_reason(config)
        if reason is not None:
            raise UnsupportedModelError(f"{full} cannot be adapted: {reason}")

    def _preprocessing_of(self, architecture: str) -> Mapping[str, Any] | None:
        """Preprocessing settings of an architecture without a tag: those of the family, or those that all tags share.

        open_clip itself would prepare images as for OpenAI's models.
        """
        if self.preprocessing is not None:
            return self.preprocessing
        places = [self.open_clip.get_pretrained_cfg(architecture, tag) for tag in self.tags(architecture)]
        settings = [{name: place[name] for name in PREPROCESSING if place.get(name) is not None} for place in places]
        return settings[0] if settings and all(one == settings[0] for one in settings) else None

    def _weight_source(self, name: str, weights: str) -> str | None:
        """open_clip's argument ``pretrained``: a tag, the path of a file, or ``None`` for random weights."""
        if weights == RANDOM:
            return None
        if self.open_clip.get_pretrained_cfg(name, weights):
            return weights
        if Path(weights).is_file():
            return str(weights)
        if weights.endswith(CHECKPOINT_SUFFIXES) or len(Path(weights).parts) > 1:
            raise TTDError(f"there is no checkpoint file {weights}; give the path of a file, or one of `ttd backbones`")
        what = choices_sentence(f"weights of {self.family}:{name}", weights, [*self.tags(name), RANDOM])
        raise BackboneNameError(f"{what}; the path of a checkpoint file is accepted too")

    # Loading -------------------------------------------------------------------------------------------------------

    def load(
        self, model: str, weights: str, *, tokenizer: Any, precision: str, cache_dir: str | None
    ) -> tuple[Any, Any]:
        """Load model and tokenizer, the model in evaluation mode and on the CPU.

        With random weights a tokenizer that cannot be loaded raises only when texts are tokenised.

        Args:
            model: an architecture as :meth:`architecture` returns it, ``hf-hub:ORG/NAME`` or ``local-dir:PATH``.
            weights: a pretrained tag, the path of a checkpoint or ``random``; ``own`` or ``random`` for the other two.
            tokenizer: replaces the model's own.
            precision: open_clip's name of the number format.
            cache_dir: folder for downloads; open_clip's own by default.

        Raises:
            BackboneNameError: the weights are unknown; the message lists the choices.
            UnsupportedModelError: the family does not support the model, with the reason.
            TTDError: something cannot be read or downloaded.
        """
        full = f"{self.family}:{model}@{weights}"
        if bundles_weights(model):
            if weights not in (OWN_WEIGHTS, RANDOM):
                what = choices_sentence(f"weights of {self.family}:{model}", weights, [OWN_WEIGHTS, RANDOM])
                raise BackboneNameError(what)
            source = None
        else:
            source = self._weight_source(model, weights)
        on_disk = source is not None and Path(source).is_file()
        brings_preprocessing = bundles_weights(model) or (source is not None and not on_disk)
        problem: HubProblem | None = None
        with quiet_root_logger("open_clip"):
            try:
                if model.startswith(HUB):
                    problem = fetch(model.removeprefix(HUB), first_of(CONFIG), cache_dir=cache_dir)
                config = self._configuration(model, cache_dir)
                if bundles_weights(model):
                    self._require_supported(full, config)
                if weights != RANDOM and not on_disk:
                    problem = self._fetch_weights(model, source, cache_dir, full) or problem
                text_tower = config.get("text_cfg", {}).get("hf_model_name")
                if text_tower and not Path(text_tower).is_dir():
                    # open_clip reads it without a cache_dir.
                    problem = fetch(text_tower, first_of("config.json")) or problem
                with hub_offline():
                    built = self.open_clip.create_model(
                        model_name=model,
                        pretrained=source,
                        load_weights=weights != RANDOM,
                        pretrained_text=False,
                        require_pretrained=weights != RANDOM,
                        precision=precision,
                        force_preprocess_cfg=None if brings_preprocessing else self._preprocessing_of(model),
                        cache_dir=cache_dir,
                    )
            except TTDError:
                raise
            except Exception as error:  # open_clip and the libraries below it raise nearly anything
                alternative = _alternative(model, checkpoint=on_disk)
                raise TTDError(cannot_load(full, problem, error, alternative)) from error
            if tokenizer is None:
                tokenizer = self._tokenizer(model, weights, config, cache_dir)
        return built.eval(), tokenizer

    def _configuration(self, model: str, cache_dir: str | None) -> dict[str, Any]:
        """The ``model_cfg`` of a model; errors of open_clip and of the hub's client are not caught."""
        if model.startswith(HUB):
            from huggingface_hub import hf_hub_download

            path = hf_hub_download(model.removeprefix(HUB), CONFIG, cache_dir=cache_dir, local_files_only=True)
            config = json.loads(Path(path).read_text(encoding="utf-8")).get("model_cfg")
        else:
            config = self.open_clip.get_model_config(model)
        if not isinstance(config, dict) or not isinstance(config.get("vision_cfg"), dict):
            raise ValueError(f"{CONFIG} has no model_cfg with a vision_cfg")
        return config

    def _fetch_weights(self, model: str, tag: str | None, cache_dir: str | None, full: str) -> HubProblem | None:
        if model.startswith(FOLDER):
            return None
        if tag is None:
            return fetch(model.removeprefix(HUB), first_of(*WEIGHTS), cache_dir=cache_dir)
        place = self.open_clip.get_pretrained_cfg(model, tag)
        if "file" in place:
            return None
        if not place.get("hf_hub"):
            problem = fetch_url(place["url"], cache_dir) if place.get("url") else None
            if problem is not None:
                # open_clip would download it itself, and leave a partial file where it looks first.
                alternative = _alternative(model, checkpoint=False)
                raise TTDError(f"{full} cannot be loaded: {problem.reason}; {problem.advice}, or {alternative}")
            return None
        # "ORG/NAME/" means open_clip's usual names, "ORG/NAME/FILE" a file, a safetensors twin of which comes first.
        repository, _, file = place["hf_hub"].rpartition("/")
        names = (str(PurePosixPath(file).with_suffix(".safetensors")), file) if file else WEIGHTS
        return fetch(repository, first_of(*dict.fromkeys(names)), cache_dir=cache_dir)

    def _tokenizer(self, model: str, weights: str, config: Mapping[str, Any], cache_dir: str | None) -> Any:
        problem = None
        try:
            repository = config.get("text_cfg", {}).get("hf_tokenizer_name")
            if repository and not model.startswith(FOLDER) and not Path(repository).is_dir():
                problem = fetch(repository, SMALL_FILES, cache_dir=cache_dir)
            with hub_offline():
                return self.open_clip.get_tokenizer(model_name=model, cache_dir=cache_dir)
        except Exception as error:
            what = f"the tokenizer of {self.family}:{model}@{weights}"
            reason = cannot_load(what, problem, error, "pass tokenizer= when you load the model")
            if weights != RANDOM:
                raise TTDError(reason) from error
            return MissingTokenizer(reason)


def set_preprocessing(open_clip: Any, model: Any, settings: Mapping[str, Any]) -> None:
    """Store preprocessing settings in a model, as open_clip does for the models that it builds by name.

    Args:
        open_clip: the module.
        model: a model with ``visual.image_size``.
        settings: ``mean``, ``std``, ``interpolation`` and ``resize_mode``; open_clip's defaults where absent.
    """
    transform = open_clip.transform
    merged = transform.merge_preprocess_dict(transform.PreprocessCfg(), dict(settings))
    open_clip.model.set_model_preprocess_cfg(model, {**merged, "size": model.visual.image_size})


def _alternative(model: str, *, checkpoint: bool) -> str:
    """What the user can do about a model that cannot be loaded, by where its weights come from."""
    if checkpoint:
        return f"give a safetensors file or a state dict of tensors that was saved for open_clip's {model}"
    if model.startswith(FOLDER):
        return f"give a folder with {CONFIG} and a weights file, as open_clip saves them"
    return "give the path of a checkpoint file after an architecture's name and @"


if not TYPE_CHECKING:
    __getattr__ = renamed_names(__name__, {"is_whole": "bundles_weights"})
