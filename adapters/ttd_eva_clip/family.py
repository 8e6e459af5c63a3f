"""The family ``eva_clip``: what can be loaded by name, and how; no library is imported before that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ttd_eva_clip.library import import_open_clip
from ttd_eva_clip.structure import is_eva_clip, refusal_of_config
from ttd_plugins.adapter import AdapterFamily, Calibration
from ttd_plugins.errors import BackboneNameError, choices_sentence
from ttd_plugins.toolkit.open_clip_models import FOLDER, HUB, OWN_WEIGHTS, RANDOM, OpenCLIPModels, is_whole

if TYPE_CHECKING:
    from ttd_eva_clip.adapter import EvaCLIPAdapter
    from ttd_plugins.toolkit.dense_modes import DenseMode

TINY = "tiny"
EMBEDDED = "embedded"
HINT = f"{HUB}ORG/NAME and {FOLDER}PATH are taken too"


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
        return [TINY, *self._named().architectures()]

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
        named = self._named()
        return named.tags(named.architecture(model, self.models(), HINT))

    def default_weights(self, model: str) -> str | None:
        """``embedded`` for ``tiny``, ``own`` for a hub model or a folder; an architecture has no default."""
        if model == TINY:
            return EMBEDDED
        return OWN_WEIGHTS if is_whole(model) else None

    def _named(self) -> OpenCLIPModels:
        return OpenCLIPModels(import_open_clip(), self.name, refusal_of_config)

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
        named = self._named()
        if not is_whole(model):
            model = named.architecture(model, self.models(), HINT)
        built, tokenizer = named.load(model, weights, tokenizer=tokenizer, precision=precision, cache_dir=cache_dir)
        return self._adapt(
            built, tokenizer=tokenizer, dense=dense, calibration=calibration, name=model, weights=weights
        )

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
