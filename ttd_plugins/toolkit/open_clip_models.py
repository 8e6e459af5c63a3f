"""Models of open_clip by name: look-up, download and loading. The module ``open_clip`` is passed in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from ttd_plugins.errors import BackboneNameError, InputError, TTDError, UnsupportedModelError, choices_sentence
from ttd_plugins.toolkit.clip_family import OWN_WEIGHTS, RANDOM
from ttd_plugins.toolkit.hub import (
    SMALL_FILES,
    HubProblem,
    cached_file,
    cached_folder,
    cannot_load,
    fetch,
    fetch_url,
    first_of,
    quiet_root_logger,
)
from ttd_plugins.toolkit.remote_code import OWN_CODE, load_auto, needs_code, refuse_code
from ttd_plugins.toolkit.tokenizing import MissingTokenizer
from ttd_plugins.utils.deprecation import RenamedAttribute, renamed_keyword, renamed_names
from ttd_plugins.utils.loading_lock import LOADING_LOCK
from ttd_plugins.utils.state_dicts import StateDict, describe_mismatch, foreign_files, read_state_dict

HUB, FOLDER = "hf-hub:", "local-dir:"
CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
NUMPY_SUFFIXES = (".npz", ".npy")
TEXT_TOWERS = ("roberta", "xlm-roberta", "mt5", "bert", "m2m_100")
"""Model types of the text towers of transformers that open_clip builds."""
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
        stored: StateDict | None = None
        checkpoint = source
        with ExitStack() as stack, quiet_root_logger("open_clip"):
            try:
                if model.startswith(HUB):
                    problem = fetch(model.removeprefix(HUB), first_of(CONFIG), cache_dir=cache_dir)
                config = model_config(self.open_clip, model, cache_dir)
                if bundles_weights(model):
                    refuse_code(config, f"{full} ({CONFIG})")
                    self._require_supported(full, config)
                if weights != RANDOM and not on_disk:
                    problem = self._fetch_weights(model, source, cache_dir, full) or problem
                text_tower = config.get("text_cfg", {}).get("hf_model_name")
                if text_tower and not Path(text_tower).is_dir():
                    problem = fetch(text_tower, first_of("config.json")) or problem
                if source is not None and on_disk and Path(source).suffix not in NUMPY_SUFFIXES:
                    stored = self._stored(full, model, source)
                    if not stored.is_plain:
                        folder = stack.enter_context(TemporaryDirectory(prefix="ttd-"))
                        source = str(Path(folder) / "weights.pt")
                        torch.save(stored.tensors, source)
                preprocessing = None if brings_preprocessing else self._preprocessing_of(model)
                tag = self.open_clip.get_pretrained_cfg(model, source) if source and not on_disk else None
                if tag and tag.get("hf_hub"):
                    # open_clip would look for a newer file on the hub.
                    source = str(cached_file(*self._place_of(tag), cache_dir=cache_dir))
                    preprocessing = {key: value for key, value in tag.items() if key != "size"}
                with LOADING_LOCK:
                    built = self.open_clip.create_model(
                        model_name=_local_name(model, cache_dir, weights=weights != RANDOM),
                        pretrained=source,
                        load_weights=weights != RANDOM,
                        pretrained_text=False,
                        require_pretrained=weights != RANDOM,
                        precision=precision,
                        force_preprocess_cfg=preprocessing,
                        cache_dir=cache_dir,
                        **local_text_tower(config, full),
                    )
            except TTDError:
                raise
            except Exception as error:  # open_clip and the libraries below it raise nearly anything
                if needs_code(error):
                    raise UnsupportedModelError(f"{full} needs {OWN_CODE}") from error
                alternative = _alternative(model, checkpoint=on_disk)
                wrong = self._what_is_wrong(model, checkpoint, stored)
                if wrong is not None:
                    raise TTDError(f"{full} cannot be loaded ({wrong}); {alternative}") from error
                raise TTDError(cannot_load(full, problem, error, alternative)) from error
            if tokenizer is None:
                tokenizer = self._tokenizer(model, weights, config, cache_dir)
        return built.eval(), tokenizer

    def _stored(self, full: str, model: str, checkpoint: str) -> StateDict:
        try:
            return read_state_dict(Path(checkpoint))
        except InputError as error:
            raise TTDError(f"{full} cannot be loaded ({error}); {_alternative(model, checkpoint=True)}") from error

    def _what_is_wrong(self, model: str, checkpoint: str | None, stored: StateDict | None) -> str | None:
        """The fault of a checkpoint or folder that open_clip could not load, as a clause, or ``None``."""
        if model.startswith(FOLDER):
            return foreign_files(Path(model.removeprefix(FOLDER)))
        if stored is None:
            return None
        try:
            built = self.open_clip.create_model(model_name=model, load_weights=False, pretrained_text=False)
        except Exception:  # then the checkpoint is not at fault
            return None
        names = list(built.state_dict())
        image = [name for name in names if name.startswith("visual.")]
        what = describe_mismatch(stored.tensors, names, image)
        return None if what is None else f"{checkpoint} {what}"

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
        repository, *names = self._place_of(place)
        return fetch(repository, first_of(*names), cache_dir=cache_dir)

    @staticmethod
    def _place_of(tag: Mapping[str, Any]) -> list[str]:
        """The repository of a tag's weights, and the possible names of their file, the preferred one first."""
        # "ORG/NAME/" means open_clip's usual names, "ORG/NAME/FILE" a file, a safetensors twin of which comes first.
        repository, _, file = tag["hf_hub"].rpartition("/")
        names = (str(PurePosixPath(file).with_suffix(".safetensors")), file) if file else WEIGHTS
        return [repository, *dict.fromkeys(names)]

    def _tokenizer(self, model: str, weights: str, config: Mapping[str, Any], cache_dir: str | None) -> Any:
        problem = None
        what = f"the tokenizer of {self.family}:{model}@{weights}"
        text = config.get("text_cfg", {})
        repository = text.get("hf_tokenizer_name")
        try:
            if not repository:
                with LOADING_LOCK:
                    name = _local_name(model, cache_dir, weights=False)
                    return self.open_clip.get_tokenizer(model_name=name, cache_dir=cache_dir)
            # A repository by its name, since only the cache knows which files it does not have.
            folder = model.removeprefix(FOLDER) if model.startswith(FOLDER) else repository
            if not Path(folder).is_dir():
                problem = fetch(repository, SMALL_FILES, cache_dir=cache_dir)
            # As open_clip.get_tokenizer does, which has no way to read local files only.
            tokenizer = partial(
                self.open_clip.tokenizer.HFTokenizer,
                context_length=text.get("context_length", 77),
                tokenizer_mode=text.get("tokenizer_mode"),
            )
            options = {**text.get("tokenizer_kwargs", {}), "local_files_only": True}
            with LOADING_LOCK:
                return load_auto(tokenizer, folder, what, cache_dir=cache_dir, **options)
        except Exception as error:
            advice = "pass tokenizer= when you load the model"
            kind, reason = TTDError, cannot_load(what, problem, error, advice)
            if isinstance(error, UnsupportedModelError):
                kind, reason = UnsupportedModelError, f"{error}, or {advice}"
            if weights != RANDOM:
                raise kind(reason) from error
            return MissingTokenizer(reason)


def model_config(open_clip: Any, model: str, cache_dir: str | None = None) -> dict[str, Any]:
    """Return the ``model_cfg`` of a model, without network: for ``hf-hub:`` from the download cache.

    Args:
        open_clip: the module.
        model: an architecture, ``hf-hub:ORG/NAME`` or ``local-dir:PATH``.
        cache_dir: folder for downloads; the hub client's own by default.

    Raises:
        OSError, ValueError: its file is absent or has no ``model_cfg`` with a ``vision_cfg``.
    """
    config = open_clip.get_model_config(_local_name(model, cache_dir, weights=False))
    if not isinstance(config, dict) or not all(isinstance(config.get(key), dict) for key in ("vision_cfg", "text_cfg")):
        raise ValueError(f"{CONFIG} has no model_cfg with a vision_cfg and a text_cfg")
    return config


def local_text_tower(config: Mapping[str, Any], full: str) -> dict[str, Any]:
    """Return keyword arguments of ``open_clip.create_model`` that make it read a text tower of transformers locally.

    Args:
        config: a ``model_cfg``.
        full: the backbone, for messages.

    Raises:
        UnsupportedModelError: the text tower needs Python code of its own.
        FileNotFoundError: its configuration is not in the download cache.
    """
    text = config.get("text_cfg", {})
    name = text.get("hf_model_name")
    if not name:
        return {}
    folder = name if Path(name).is_dir() else cached_folder(name, "config.json")
    content = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    refuse_code(content, f"{full} ({name}/config.json)")
    # For these kinds transformers has all classes, so that it does not read auto_map.
    if content.get("model_type") not in TEXT_TOWERS:
        raise UnsupportedModelError(
            f"{full} has a text tower of the model type {content.get('model_type')!r} ({name}); supported: "
            f"{', '.join(TEXT_TOWERS)}"
        )
    return {"text_cfg": {**text, "hf_model_name": folder, "hf_model_pretrained": False}}


def _local_name(model: str, cache_dir: str | None, *, weights: bool) -> str:
    """The name under which open_clip finds a model without network; with ``weights`` they must be there too."""
    if not model.startswith(HUB):
        return model
    repository = model.removeprefix(HUB)
    if weights:
        cached_file(repository, *WEIGHTS, cache_dir=cache_dir)
    return FOLDER + cached_folder(repository, CONFIG, cache_dir=cache_dir)


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
