"""The family ``eva_clip``: what can be loaded by name, and how; no library is imported before that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ttd_eva_clip.download import FOLDER, HUB, own_config, uses_hub
from ttd_eva_clip.library import import_open_clip
from ttd_eva_clip.structure import is_eva_clip, refusal_of_config
from ttd_plugins.adapter import AdapterFamily, Calibration
from ttd_plugins.errors import BackboneNameError, TTDError, UnsupportedModelError, choices_sentence, one_sentence
from ttd_plugins.toolkit.hub import hub_offline, hub_problem, quiet_root_logger

if TYPE_CHECKING:
    from ttd_eva_clip.adapter import EvaCLIPAdapter
    from ttd_plugins.toolkit.dense import DenseMode

TINY = "tiny"
EMBEDDED = "embedded"
OWN_WEIGHTS = "own"
RANDOM = "random"
CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


class EvaCLIPFamily(AdapterFamily):
    """EVA-CLIP models (EVA01 and EVA02) of open_clip and timm, by name or as objects.

    Names: an architecture of open_clip with one of its pretrained tags, a path to a checkpoint, or ``random``;
    ``hf-hub:ORG/NAME`` and ``local-dir:PATH``, which bring weights of their own; and ``tiny``, which comes with the
    package.
    """

    name = "eva_clip"
    summary = "EVA01 and EVA02 CLIP models of open_clip and timm"
    api_version = 1

    # Names ---------------------------------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """``tiny``, and the architectures of open_clip that this adapter takes.

        Raises:
            MissingDependencyError: open_clip is not installed.
        """
        open_clip = import_open_clip()
        known = open_clip.list_models()
        return [TINY, *(name for name in known if refusal_of_config(open_clip.get_model_config(name)) is None)]

    def weights(self, model: str) -> list[str]:
        """Names of the weights of ``model``; a path to a checkpoint of an architecture is taken as well.

        Raises:
            BackboneNameError: the model is unknown.
            UnsupportedModelError: open_clip knows the model, but this adapter cannot serve it.
            MissingDependencyError: open_clip is not installed.
        """
        default = self.default_weights(model)
        if default is not None:
            return [default]
        open_clip = import_open_clip()
        return list(open_clip.list_pretrained_tags_by_model(self._architecture(open_clip, model)))

    def default_weights(self, model: str) -> str | None:
        """``embedded`` for ``tiny``, ``own`` for a hub model or a folder; an architecture has no default."""
        if model == TINY:
            return EMBEDDED
        return OWN_WEIGHTS if model.startswith((HUB, FOLDER)) else None

    def _architecture(self, open_clip: Any, model: str) -> str:
        """The name under which open_clip knows an architecture that this adapter takes."""
        name = model.replace("/", "-")
        config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
        if config is None:
            hint = f"; {HUB}ORG/NAME and {FOLDER}PATH are taken too"
            raise BackboneNameError(choices_sentence("eva_clip model", model, self.models()) + hint)
        _require_served(f"eva_clip:{model}", config)
        return name

    # Loading -------------------------------------------------------------------------------------------------------

    def load(  # type: ignore[override]
        self,
        model: str,
        weights: str,
        *,
        dense: str | DenseMode | None = None,
        calibration: Calibration | None = None,
        tokenizer: Any = None,
        precision: str = "fp32",
        cache_dir: str | None = None,
    ) -> EvaCLIPAdapter:
        """Build a model, load its weights, and wrap it, in evaluation mode and on the CPU.

        Args:
            model: an architecture, ``tiny``, ``hf-hub:ORG/NAME`` or ``local-dir:PATH``.
            weights: a pretrained tag, a path to a checkpoint, ``random``, or the model's default.
            dense: the dense mode, a preset's name or a ``DenseMode``; by default what suits the model.
            calibration: map from cosine to probability; by default the model's, or else the contract's.
            tokenizer: instead of the model's own, which some architectures download.
            precision: open_clip's name of the number format (``fp32``, ``bf16``, ``pure_bf16``, ...).
            cache_dir: where downloads are kept; open_clip's own place by default.

        Raises:
            BackboneNameError: a part of the name is unknown; the message lists the choices.
            UnsupportedModelError: this adapter cannot serve the model, with the reason.
            MissingDependencyError: open_clip is not installed.
            TTDError: the weights cannot be read or downloaded.
        """
        if model == TINY:
            return self._load_tiny(weights, dense, calibration, tokenizer)
        open_clip = import_open_clip()
        own = self.default_weights(model)
        full = f"eva_clip:{model}@{weights}"
        if own is None:
            name = self._architecture(open_clip, model)
            source = self._weight_source(open_clip, name, weights)
            model = name
        elif weights in (own, RANDOM):
            name, source = model, None
        else:
            raise BackboneNameError(choices_sentence(f"weights of {model}", weights, [own, RANDOM]))
        config = open_clip.get_model_config(name) if own is None else None
        on_disk = weights == RANDOM or (source is not None and Path(source).is_file())
        remote = model.startswith(HUB) if config is None else not on_disk or uses_hub(config)
        problem = hub_problem() if remote else None
        try:
            with quiet_root_logger("open_clip"), hub_offline(problem is not None):
                if config is None:
                    _require_served(full, own_config(open_clip, model, cache_dir))
                built = open_clip.create_model(
                    model_name=name,
                    pretrained=source,
                    load_weights=weights != RANDOM,
                    pretrained_text=False,
                    require_pretrained=weights != RANDOM,
                    precision=precision,
                    cache_dir=cache_dir,
                )
                if tokenizer is None:
                    tokenizer = open_clip.get_tokenizer(model_name=name, cache_dir=cache_dir)
        except TTDError:
            raise
        except Exception as error:  # open_clip and the libraries below it raise nearly anything
            raise TTDError(_cannot_load(full, source, model, problem, error)) from error
        return self._adapt(
            built.eval(), tokenizer=tokenizer, dense=dense, calibration=calibration, name=model, weights=weights
        )

    def _weight_source(self, open_clip: Any, name: str, weights: str) -> str | None:
        """What open_clip calls ``pretrained``: a tag, the path of a file, or nothing for random weights."""
        if weights == RANDOM:
            return None
        if open_clip.get_pretrained_cfg(name, weights):
            return weights
        if Path(weights).is_file():
            return str(weights)
        if weights.endswith(CHECKPOINT_SUFFIXES) or len(Path(weights).parts) > 1:
            raise TTDError(f"there is no checkpoint file {weights}; give the path of a file, or one of `ttd backbones`")
        tags = [*open_clip.list_pretrained_tags_by_model(name), RANDOM]
        hint = "; the path of a checkpoint file is taken too"
        raise BackboneNameError(choices_sentence(f"weights of eva_clip:{name}", weights, tags) + hint)

    def _load_tiny(
        self, weights: str, dense: str | DenseMode | None, calibration: Calibration | None, tokenizer: Any
    ) -> EvaCLIPAdapter:
        from ttd_eva_clip.tiny import EMBEDDED_FOLDER, load_tiny
        from ttd_plugins.embedded.folder import read_settings

        if weights not in (EMBEDDED, RANDOM):
            raise BackboneNameError(choices_sentence("weights of eva_clip:tiny", weights, [EMBEDDED, RANDOM]))
        built, own_tokenizer = load_tiny(EMBEDDED_FOLDER, weights=weights == EMBEDDED)
        settings = read_settings(EMBEDDED_FOLDER)
        return self._adapt(
            built,
            tokenizer=tokenizer if tokenizer is not None else own_tokenizer,
            dense=dense if dense is not None else settings.dense_mode,
            calibration=calibration if calibration is not None else settings.calibration,
            name=TINY,
            weights=weights,
        )

    # Wrapping ------------------------------------------------------------------------------------------------------

    def claims(self, model: object) -> bool:
        """Whether ``model`` is a CLIP model around a timm EVA trunk without attentional pooling."""
        return is_eva_clip(model)

    def wrap(  # type: ignore[override]
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        preprocess: Any = None,
        dense: str | DenseMode | None = None,
        calibration: Calibration | None = None,
    ) -> EvaCLIPAdapter:
        """Adapt a model that the caller already has, without changing it.

        Args:
            model: ``open_clip.CustomTextCLIP`` whose ``visual.trunk`` is a timm ``Eva``, or an object built alike.
            tokenizer: ``open_clip.get_tokenizer(NAME)``; it may be left out where no text is going to be tokenised,
                since nothing in a model says which tokenizer it was trained with.
            preprocess: the evaluation preprocessing that open_clip gave with the model; by default what the model
                says itself.
            dense: the dense mode, a preset's name or a ``DenseMode``; ``maskclip`` by default.
            calibration: map from cosine to probability; the contract's by default.

        Raises:
            UnsupportedModelError: a part of the model cannot be served, with the reason.
        """
        return self._adapt(model, tokenizer=tokenizer, preprocess=preprocess, dense=dense, calibration=calibration)

    def _adapt(self, model: nn.Module, *, dense: str | DenseMode | None, **options: Any) -> EvaCLIPAdapter:
        from ttd_eva_clip.adapter import EvaCLIPAdapter

        return EvaCLIPAdapter(model, dense="maskclip" if dense is None else dense, **options)


def _require_served(full: str, config: Mapping[str, Any]) -> None:
    reason = refusal_of_config(config)
    if reason is not None:
        raise UnsupportedModelError(f"{full} cannot be adapted: {reason}")


def _cannot_load(full: str, source: str | None, model: str, problem: str | None, error: Exception) -> str:
    """One sentence on what failed and what to do, by where the weights come from."""
    reason = f"{full} cannot be loaded ({type(error).__name__}: {one_sentence(error)})"
    if problem is not None:
        reason = f"{full} cannot be loaded: {problem}, and the download cache does not hold all of it"
    if source is not None and Path(source).is_file():
        return f"{reason}; give a safetensors file or a state dict of tensors that was saved for open_clip's {model}"
    if model.startswith(FOLDER):
        return f"{reason}; the folder needs open_clip_config.json and a weights file, as open_clip saves them"
    return (
        f"{reason}; connect to the network once, or set HF_HUB_OFFLINE=1 where the download cache is warm, or give "
        "the path of a checkpoint file after @"
    )
