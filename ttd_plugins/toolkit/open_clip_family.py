"""Base class of families whose models open_clip builds: names, weights and loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ttd_plugins.adapter import Calibration, DenseAdapter
from ttd_plugins.options import Resampling
from ttd_plugins.toolkit.clip_family import CLIPFamily
from ttd_plugins.toolkit.open_clip_adapter import OpenCLIPModelAdapter
from ttd_plugins.toolkit.open_clip_models import FOLDER, HUB, OpenCLIPModels, bundles_weights


class OpenCLIPModelFamily(CLIPFamily):
    """A family of models of open_clip, by name or as objects.

    Names are

    - an architecture of open_clip, with one of its pretrained tags, the path of a checkpoint, or ``random``;
    - ``hf-hub:ORG/NAME`` and ``local-dir:PATH``, which bundle their weights;
    - ``tiny`` and other embedded models.

    Attributes:
        adapter_class: class of the adapter, whose ``recognition`` says which models are supported.
        name_hint: further names, for messages about unknown models.
        preprocessing: open_clip's preprocessing settings for models whose tag or folder does not bring any.
    """

    adapter_class: ClassVar[type[OpenCLIPModelAdapter]]
    name_hint: ClassVar[str] = f"{HUB}ORG/NAME and {FOLDER}PATH are accepted too"
    preprocessing: ClassVar[Mapping[str, Any] | None] = None

    def _open_clip_models(self) -> OpenCLIPModels:
        recognition = self.adapter_class.recognition
        unsupported = recognition.unsupported_config_reason
        return OpenCLIPModels(recognition.import_open_clip(), self.name, unsupported, self.preprocessing)

    def _bundles_weights(self, model: str) -> bool:
        return bundles_weights(model)

    def claims(self, model: object) -> bool:
        """Whether the family supports ``model``, by its structure; see the module ``recognition`` of the adapter."""
        return self.adapter_class.recognition.claims(model)

    def models(self) -> list[str]:
        """The embedded models, and the architectures of open_clip that this family supports.

        Raises:
            MissingDependencyError: open_clip is not installed.
        """
        return [*self.embedded, *self._open_clip_models().architectures()]

    def weights(self, model: str) -> list[str]:
        """Names of the weights of ``model``; an architecture also takes the path of a checkpoint.

        Raises:
            BackboneNameError: the model is unknown.
            UnsupportedModelError: open_clip knows the model, but this family does not support it.
            MissingDependencyError: open_clip is not installed.
        """
        if model in self.embedded:
            return self._embedded_weights(model)
        default = self.default_weights(model)
        if default is not None:
            return [default]
        models = self._open_clip_models()
        return models.tags(models.architecture(model, self.models(), self.name_hint))

    def load(  # type: ignore[override]
        self,
        model: str,
        weights: str,
        *,
        dense: Any = None,
        calibration: Calibration | None = None,
        positions: Resampling = "library",
        tokenizer: Any = None,
        precision: str = "fp32",
        cache_dir: str | None = None,
    ) -> DenseAdapter:
        """Build a model, load its weights and wrap it, in evaluation mode and on the CPU.

        Args:
            model: an architecture, an embedded model, ``hf-hub:ORG/NAME`` or ``local-dir:PATH``.
            weights: a pretrained tag, the path of a checkpoint, ``random``, or the model's default.
            dense: the dense mode, a name or a mode object; by default that of the model.
            calibration: map from cosine to probability; by default that of the model, or else of the contract.
            positions: how position embeddings are resampled at other image sizes: ``library``, ``bicubic`` or ``dino``.
            tokenizer: replaces the model's own, which some architectures download.
            precision: open_clip's name of the number format (``fp32``, ``bf16``, ``pure_bf16``, ...).
            cache_dir: folder for downloads; open_clip's own by default.

        Raises:
            BackboneNameError: a part of the name is unknown; the message lists the choices.
            UnsupportedModelError: the family does not support the model, with the reason.
            InputError: an option is unknown.
            MissingDependencyError: open_clip is not installed.
            TTDError: the weights cannot be read or downloaded.
        """
        options = {"dense": dense, "calibration": calibration, "positions": positions}
        if model in self.embedded:
            return self._load_embedded(model, weights, tokenizer=tokenizer, **options)
        return self._load_open_clip(model, weights, options, tokenizer, precision, cache_dir)

    def _load_open_clip(
        self,
        model: str,
        weights: str,
        options: Mapping[str, Any],
        tokenizer: Any,
        precision: str,
        cache_dir: str | None,
    ) -> DenseAdapter:
        """:meth:`load` through open_clip; ``options`` are those of the adapter."""
        models = self._open_clip_models()
        if not bundles_weights(model):
            architecture = models.architecture(model, self.models(), self.name_hint)
            model = self._architecture(models.open_clip, architecture, weights)
        built, own_tokenizer = models.load(
            model, weights, tokenizer=tokenizer, precision=precision, cache_dir=cache_dir
        )
        if tokenizer is None:
            self._prepare_tokenizer(own_tokenizer)
        return self._adapt(built, tokenizer=own_tokenizer, name=model, weights=weights, **options)

    def _architecture(self, open_clip: Any, name: str, weights: str) -> str:
        """The architecture that is built for a name and weights."""
        return name

    def _prepare_tokenizer(self, tokenizer: Any) -> None:
        """Set options that open_clip leaves unset in its tokenizer; by default none."""
