"""The family ``siglip``: what can be loaded by name, and how; no backbone library is imported before that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ttd_plugins.adapter import AdapterFamily, Calibration
from ttd_plugins.errors import BackboneNameError, MissingDependencyError, TTDError, choices_sentence
from ttd_plugins.toolkit.open_clip_models import OWN_WEIGHTS, RANDOM, OpenCLIPModels, is_whole
from ttd_siglip.configs import KNOWN
from ttd_siglip.hub import load_from_transformers
from ttd_siglip.library import import_open_clip
from ttd_siglip.structure import is_siglip, refusal_of_open_clip_config
from ttd_siglip.tokens import pad_right
from ttd_siglip.transforms import HALF

if TYPE_CHECKING:
    from ttd_siglip.adapter import SiglipAdapter
    from ttd_siglip.dense import SiglipMode

TINY = "tiny"
EMBEDDED = "embedded"
HINT = "ORG/NAME on transformers' hub, the path of a folder, hf-hub:ORG/NAME and local-dir:PATH are taken too"
# What every SigLIP was trained with; open_clip knows it for its tags only, and gives OpenAI's to checkpoints on disk.
PREPROCESSING = {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "squash"}


class SiglipFamily(AdapterFamily):
    """SigLIP and SigLIP 2 of fixed resolution, by name or as objects, from transformers or from open_clip.

    Names: ``ORG/NAME`` on transformers' hub, or the path of a folder that transformers saved; an architecture of
    open_clip with one of its pretrained tags, a path to a checkpoint, or ``random``; ``hf-hub:ORG/NAME`` and
    ``local-dir:PATH`` in open_clip's format; and ``tiny``, which comes with the package.
    """

    name = "siglip"
    summary = "SigLIP and SigLIP 2 (transformers' SiglipModel, open_clip's SigLIP architectures with timm)"
    api_version = 1

    # Names ---------------------------------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """``tiny``, the known models of transformers' hub, and, where it is installed, open_clip's architectures."""
        try:
            named = self._named().architectures()
        except MissingDependencyError:
            named = []
        return [TINY, *KNOWN, *named]

    def weights(self, model: str) -> list[str]:
        """Names of the weights of ``model``; a path to a checkpoint of an architecture is taken as well.

        Raises:
            BackboneNameError: the model is unknown.
            UnsupportedModelError: open_clip knows the model, but this adapter cannot serve it.
            MissingDependencyError: it can only be an architecture of open_clip, which is not installed.
        """
        default = self.default_weights(model)
        if default is not None:
            return [default]
        named = self._named()
        return named.tags(named.architecture(model, self.models(), HINT))

    def default_weights(self, model: str) -> str | None:
        """``embedded`` for ``tiny``, ``own`` for hub models and folders; open_clip's architectures have no default."""
        if model == TINY:
            return EMBEDDED
        return OWN_WEIGHTS if is_whole(model) or _is_path_or_hub_name(model) else None

    def _named(self) -> OpenCLIPModels:
        return OpenCLIPModels(import_open_clip(), self.name, refusal_of_open_clip_config, PREPROCESSING)

    # Loading -------------------------------------------------------------------------------------------------------

    def load(  # type: ignore[override]
        self,
        model: str,
        weights: str,
        *,
        dense: str | SiglipMode | None = None,
        last_block: str | None = None,
        calibration: Calibration | None = None,
        tokenizer: Any = None,
        precision: str = "fp32",
        cache_dir: str | None = None,
    ) -> SiglipAdapter:
        """Build a model, load its weights, and wrap it, in evaluation mode and on the CPU.

        Args:
            model: ``tiny``, ``ORG/NAME``, the path of a folder, an architecture of open_clip, ``hf-hub:ORG/NAME`` or
                ``local-dir:PATH``.
            weights: ``own`` or ``random``; for an architecture of open_clip a pretrained tag, a path to a checkpoint,
                or ``random``.
            dense: the dense mode, a name or a ``SiglipMode``; by default what suits the model.
            last_block: ``"plain"`` or ``"value"``; by default what the dense mode says.
            calibration: map from cosine to probability; by default the model's.
            tokenizer: instead of the model's own.
            precision: ``fp32``, ``bf16`` or ``fp16``; for open_clip any of its names.
            cache_dir: where downloads are kept; the library's own place by default.

        Raises:
            BackboneNameError: a part of the name is unknown; the message lists the choices.
            InputError: an option is unknown.
            UnsupportedModelError: this adapter cannot serve the model, with the reason.
            MissingDependencyError: the library that the model needs is not installed.
            TTDError: the weights cannot be read or downloaded.
        """
        if model == TINY:
            return self._load_tiny(
                weights, dense=dense, last_block=last_block, calibration=calibration, tokenizer=tokenizer
            )
        processor = None
        if not is_whole(model) and _is_path_or_hub_name(model):
            _require_folder(model)
            built, tokenizer, processor = load_from_transformers(
                model, weights, tokenizer=tokenizer, precision=precision, cache_dir=cache_dir
            )
        else:
            named = self._named()
            if not is_whole(model):
                model = named.architecture(model, self.models(), HINT)
            given = tokenizer
            built, tokenizer = named.load(model, weights, tokenizer=given, precision=precision, cache_dir=cache_dir)
            if given is None:
                pad_right(tokenizer)
        return self._adapt(
            built,
            tokenizer=tokenizer,
            preprocess=processor,
            dense=dense,
            last_block=last_block,
            calibration=calibration,
            name=model,
            weights=weights,
        )

    def _load_tiny(
        self,
        weights: str,
        *,
        dense: str | SiglipMode | None,
        last_block: str | None,
        calibration: Calibration | None,
        tokenizer: Any,
    ) -> SiglipAdapter:
        from ttd_plugins.embedded.folder import read_settings
        from ttd_siglip.tiny import EMBEDDED_FOLDER, load_tiny

        if weights not in (EMBEDDED, RANDOM):
            raise BackboneNameError(choices_sentence("weights of siglip:tiny", weights, [EMBEDDED, RANDOM]))
        built, own_tokenizer = load_tiny(EMBEDDED_FOLDER, weights=weights == EMBEDDED)
        settings = read_settings(EMBEDDED_FOLDER)
        return self._adapt(
            built,
            tokenizer=tokenizer if tokenizer is not None else own_tokenizer,
            dense=dense if dense is not None else settings.dense_mode,
            last_block=last_block,
            calibration=calibration if calibration is not None else settings.calibration,
            name=TINY,
            weights=weights,
        )

    # Wrapping ------------------------------------------------------------------------------------------------------

    def claims(self, model: object) -> bool:
        """Whether ``model`` has an image tower that pools with one learnt probe, as SigLIP's do."""
        return is_siglip(model)

    def wrap(  # type: ignore[override]
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        preprocess: Any = None,
        dense: str | SiglipMode | None = None,
        last_block: str | None = None,
        calibration: Calibration | None = None,
    ) -> SiglipAdapter:
        """Adapt a model that the caller already has, without changing it.

        Args:
            model: transformers' ``SiglipModel``, or open_clip's ``CustomTextCLIP`` around a SigLIP trunk of timm.
            tokenizer: the model's tokenizer or processor; it may be left out where no text is going to be tokenised.
            preprocess: the model's image processor, processor or ``preprocess_val``, or a mapping with ``mean`` and
                ``std``; by default what the model says itself, or else SigLIP's.
            dense: the dense mode, a name or a ``SiglipMode``; ``value`` by default.
            last_block: ``"plain"`` or ``"value"``; by default what the dense mode says.
            calibration: map from cosine to probability; by default from the model's own logits.

        Raises:
            UnsupportedModelError: a part of the model cannot be served, with the reason.
            InputError: an option is unknown.
        """
        return self._adapt(
            model,
            tokenizer=tokenizer,
            preprocess=preprocess,
            dense=dense,
            last_block=last_block,
            calibration=calibration,
        )

    def _adapt(self, model: nn.Module, *, dense: str | SiglipMode | None, **options: Any) -> SiglipAdapter:
        from ttd_siglip.wrapping import adapt

        return adapt(model, dense="value" if dense is None else dense, **options)


def _is_path_or_hub_name(model: str) -> bool:
    return "/" in model or "\\" in model or model.startswith(("~", ".")) or Path(model).is_dir()


def _require_folder(model: str) -> None:
    """Raise TTDError if ``model`` can only be the path of a folder, and there is none."""
    is_path = model.startswith(("/", "~", ".")) or "\\" in model or model.count("/") > 1
    if is_path and not Path(model).expanduser().is_dir():
        raise TTDError(
            f"there is no folder {model}; give the path of one that transformers' save_pretrained wrote, or ORG/NAME "
            "on its hub"
        )
