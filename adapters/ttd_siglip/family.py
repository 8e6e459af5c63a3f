"""The family ``siglip``: models by name and as objects; backbone libraries are imported only when they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ttd_plugins.adapter import Calibration, DenseAdapter
from ttd_plugins.errors import (
    BackboneNameError,
    InputError,
    MissingDependencyError,
    TTDError,
    UnsupportedModelError,
    choices_sentence,
)
from ttd_plugins.options import Resampling
from ttd_plugins.toolkit.clip_family import OWN_WEIGHTS, PRECISIONS, RANDOM, TINY
from ttd_plugins.toolkit.open_clip_family import OpenCLIPModelFamily
from ttd_plugins.toolkit.open_clip_models import bundles_weights
from ttd_plugins.toolkit.tokenizing import MissingTokenizer
from ttd_plugins.toolkit.transformers_models import TransformersModel
from ttd_siglip.adapter import SiglipAdapter
from ttd_siglip.architectures import KNOWN
from ttd_siglip.fresh_model import initialise_logits
from ttd_siglip.normalisation import HALF
from ttd_siglip.recognition import (
    import_transformers,
    is_timm_siglip,
    is_transformers_siglip,
    unclaimed_reason,
    unsupported_reason,
    unsupported_transformers_config_reason,
)
from ttd_siglip.siglip_modes import SiglipMode
from ttd_siglip.siglip_tokenizing import pad_right
from ttd_siglip.timm_adapter import TimmSiglipAdapter
from ttd_siglip.transformers_adapter import TransformersSiglipAdapter


class SiglipFamily(OpenCLIPModelFamily):
    """SigLIP and SigLIP 2 of fixed resolution, by name or as objects, from transformers or from open_clip.

    Beside the names of :class:`OpenCLIPModelFamily`: ``ORG/NAME`` on transformers' hub, or the path of a folder that
    transformers saved.
    """

    summary = "SigLIP and SigLIP 2 (transformers' SiglipModel, open_clip's SigLIP architectures with timm)"
    api_version = 1
    adapter_class = TimmSiglipAdapter
    name_hint = (
        "ORG/NAME on transformers' hub, the path of a folder, hf-hub:ORG/NAME and local-dir:PATH are accepted too"
    )
    # open_clip knows the preprocessing for its tags only, and uses OpenAI's for checkpoint files.
    preprocessing = {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "squash"}  # noqa: RUF012

    def models(self) -> list[str]:
        """``tiny``, the known models of transformers' hub and, where open_clip is installed, its architectures."""
        try:
            architectures = self._open_clip_models().architectures()
        except MissingDependencyError:
            architectures = []
        return [TINY, *KNOWN, *architectures]

    def _bundles_weights(self, model: str) -> bool:
        return bundles_weights(model) or _is_path_or_hub_name(model)

    def load(  # type: ignore[override]
        self,
        model: str,
        weights: str,
        *,
        dense: str | SiglipMode | None = None,
        last_block: str | None = None,
        calibration: Calibration | None = None,
        positions: Resampling = "library",
        tokenizer: Any = None,
        precision: str = "fp32",
        cache_dir: str | None = None,
    ) -> DenseAdapter:
        """Build a model, load its weights and wrap it; further arguments and errors as in :class:`OpenCLIPModelFamily`.

        Args:
            model: ``tiny``, ``ORG/NAME``, the path of a folder, an architecture of open_clip, ``hf-hub:ORG/NAME`` or
                ``local-dir:PATH``.
            weights: ``own`` or ``random``; for an architecture of open_clip a pretrained tag, the path of a checkpoint,
                or ``random``.
            dense: the dense mode, a name or a ``SiglipMode``; by default that of the model.
            last_block: ``"plain"`` or ``"value"``; by default that of the dense mode.
            calibration: map from cosine to probability; by default that of the model.
            positions: how position embeddings are resampled at other image sizes: ``library``, ``bicubic`` or ``dino``.
            tokenizer: replaces the model's own.
            precision: ``fp32``, ``bf16`` or ``fp16``; for models of open_clip any of its names.
            cache_dir: folder for downloads; the library's own by default.
        """
        options: dict[str, Any] = {
            "dense": dense,
            "last_block": last_block,
            "calibration": calibration,
            "positions": positions,
        }
        if model in self.embedded:
            return self._load_embedded(model, weights, tokenizer=tokenizer, **options)
        if bundles_weights(model) or not _is_path_or_hub_name(model):
            return self._load_open_clip(model, weights, options, tokenizer, precision, cache_dir)
        _require_folder(model)
        if weights not in (OWN_WEIGHTS, RANDOM):
            raise BackboneNameError(choices_sentence(f"weights of siglip:{model}", weights, [OWN_WEIGHTS, RANDOM]))
        if precision not in PRECISIONS:
            raise InputError(choices_sentence("precision", precision, PRECISIONS))
        folder = Path(model).expanduser()
        source = TransformersModel(
            import_transformers,
            f"siglip:{model}@{weights}",
            str(folder) if folder.is_dir() else model,
            "Siglip",
            unsupported_transformers_config_reason,
            initialise=initialise_logits,
            cache_dir=cache_dir,
        )
        processor = None
        if weights == RANDOM and model in KNOWN and not source.is_folder:
            built = source.build(KNOWN[model])
        else:
            built, processor = source.load(weights=weights == OWN_WEIGHTS)
        if tokenizer is None:
            tokenizer = self._tokenizer(source, required=weights == OWN_WEIGHTS)
        built = built.to(PRECISIONS[precision])
        return self._adapt(built, tokenizer=tokenizer, preprocess=processor, name=model, weights=weights, **options)

    def _tokenizer(self, source: TransformersModel, *, required: bool) -> Any:
        try:
            return source.load_tokenizer()
        except TTDError as error:
            if required:
                raise
            return MissingTokenizer(str(error))

    def _prepare_tokenizer(self, tokenizer: Any) -> None:
        pad_right(tokenizer)

    def wrap(  # type: ignore[override]
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        preprocess: Any = None,
        dense: str | SiglipMode | None = None,
        last_block: str | None = None,
        calibration: Calibration | None = None,
        positions: Resampling = "library",
    ) -> DenseAdapter:
        """Adapt a model that the caller already has, without changing it; see :class:`CLIPFamily`.

        Args:
            model: transformers' ``SiglipModel``, or open_clip's ``CustomTextCLIP`` around a SigLIP trunk of timm.
            tokenizer: the model's tokenizer or processor; it may be left out where no text is tokenised.
            preprocess: the model's image processor, processor or ``preprocess_val``, or a mapping with ``mean`` and
                ``std``; by default what the model says itself, or else SigLIP's.
            dense: the dense mode, a name or a ``SiglipMode``; ``value`` by default.
            last_block: ``"plain"`` or ``"value"``; by default that of the dense mode.
            calibration: map from cosine to probability; by default from the model's own logits.
            positions: how position embeddings are resampled at other image sizes: ``library``, ``bicubic`` or ``dino``.
        """
        return self._adapt(
            model,
            tokenizer=tokenizer,
            preprocess=preprocess,
            dense=dense,
            last_block=last_block,
            calibration=calibration,
            positions=positions,
        )

    def unclaimed_reason(self, model: object) -> str | None:
        """Why one tower of a SigLIP model is not claimed; ``None`` for other objects."""
        return unclaimed_reason(model)

    def _adapt(self, model: nn.Module, **options: Any) -> SiglipAdapter:
        return adapt(model, **options)


def adapt(model: nn.Module, **options: Any) -> SiglipAdapter:
    """Wrap ``model`` in the adapter of its library; ``options`` are those of :class:`SiglipAdapter`.

    Raises:
        UnsupportedModelError: no adapter fits, or a part of the model is not supported, with the reason.
    """
    if is_transformers_siglip(model):
        return TransformersSiglipAdapter(model, **options)
    if is_timm_siglip(model):
        return TimmSiglipAdapter(model, **options)
    raise UnsupportedModelError(f"this {type(model).__name__} cannot be adapted: {unsupported_reason(model)}")


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
