"""The family ``convnext``: what can be loaded by name, and how; open_clip is not imported before that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ttd_convnext.structure import is_convnext_clip, refusal_of_config
from ttd_plugins.adapter import AdapterFamily, Calibration
from ttd_plugins.errors import BackboneNameError, MissingDependencyError, choices_sentence, one_sentence
from ttd_plugins.toolkit.open_clip_models import FOLDER, HUB, OWN_WEIGHTS, RANDOM, OpenCLIPModels, is_whole

if TYPE_CHECKING:
    from ttd_convnext.adapter import ConvNeXtAdapter

TINY = "tiny"
HINT = f"{HUB}ORG/NAME and {FOLDER}PATH are taken too, and wrap() takes any object"


class ConvNeXtFamily(AdapterFamily):
    """ConvNeXt CLIP models of open_clip, by name or as objects.

    Names: an architecture of open_clip with one of its pretrained tags, a path to a checkpoint, or ``random``;
    ``hf-hub:ORG/NAME`` and ``local-dir:PATH``, which bring their weights; and ``tiny@random``, which needs no network.
    """

    name = "convnext"
    summary = "ConvNeXt CLIP models of open_clip and timm"
    api_version = 1

    def models(self) -> list[str]:
        """``tiny``, and the architectures of open_clip that this adapter takes.

        Raises:
            MissingDependencyError: open_clip is not installed.
        """
        return [TINY, *self._named().architectures()]

    def weights(self, model: str) -> list[str]:
        """Pretrained tags of ``model``; a path to a checkpoint of an architecture is taken as well.

        Raises:
            BackboneNameError: the model is unknown.
            UnsupportedModelError: open_clip knows the model, but this adapter cannot serve it.
            MissingDependencyError: open_clip is not installed.
        """
        if model == TINY:
            return []
        if is_whole(model):
            return [OWN_WEIGHTS]
        named = self._named()
        return named.tags(named.architecture(model, self.models(), HINT))

    def default_weights(self, model: str) -> str | None:
        """``own`` for a hub model or a folder; nothing else has a default."""
        return OWN_WEIGHTS if is_whole(model) else None

    def _named(self) -> OpenCLIPModels:
        return OpenCLIPModels(import_open_clip(), self.name, refusal_of_config)

    def load(  # type: ignore[override]
        self,
        model: str,
        weights: str,
        *,
        calibration: Calibration | None = None,
        tokenizer: Any = None,
        precision: str = "fp32",
        cache_dir: str | None = None,
    ) -> ConvNeXtAdapter:
        """Build a model, load its weights, and wrap it, in evaluation mode and on the CPU.

        Args:
            model: an architecture of open_clip, ``hf-hub:ORG/NAME``, ``local-dir:PATH``, or ``tiny``.
            weights: a pretrained tag, a path to a checkpoint, or ``random``; ``own`` or ``random`` for a hub model or
                a folder.
            calibration: map from cosine to probability; the family's default where none is given.
            tokenizer: instead of the model's own.
            precision: open_clip's name of the number format (``fp32``, ``bf16``, ``pure_bf16``, ...).
            cache_dir: where downloads are kept; open_clip's own place by default.

        Raises:
            BackboneNameError: a part of the name is unknown; the message lists the choices.
            UnsupportedModelError: this adapter cannot serve the model, with the reason.
            MissingDependencyError: open_clip is not installed.
            TTDError: the weights cannot be read or downloaded.
        """
        if model == TINY:
            return self._load_tiny(weights, tokenizer, calibration)
        named = self._named()
        name = model if is_whole(model) else named.architecture(model, self.models(), HINT)
        built, tokenizer = named.load(name, weights, tokenizer=tokenizer, precision=precision, cache_dir=cache_dir)
        return self._adapt(built, tokenizer=tokenizer, calibration=calibration, name=name, weights=weights)

    def _load_tiny(self, weights: str, tokenizer: Any, calibration: Calibration | None) -> ConvNeXtAdapter:
        if weights != RANDOM:
            raise BackboneNameError(choices_sentence("weights of convnext:tiny", weights, [RANDOM]))
        open_clip = import_open_clip()
        from ttd_convnext.tiny import CONTEXT, build_tiny

        tokenizer = tokenizer if tokenizer is not None else open_clip.SimpleTokenizer(context_length=CONTEXT)
        return self._adapt(build_tiny(), tokenizer=tokenizer, calibration=calibration, name=TINY, weights=weights)

    def claims(self, model: object) -> bool:
        """Whether ``model`` is a CLIP model of open_clip's around a timm ConvNeXt trunk."""
        return is_convnext_clip(model)

    def wrap(  # type: ignore[override]
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        preprocess: Any = None,
        calibration: Calibration | None = None,
    ) -> ConvNeXtAdapter:
        """Adapt a model that the caller already has, without changing it.

        Args:
            model: ``open_clip.CLIP`` or ``CustomTextCLIP`` whose ``visual.trunk`` is a timm ``ConvNeXt``.
            tokenizer: ``open_clip.get_tokenizer(NAME)``; it may be left out where no text is going to be tokenised.
            preprocess: the evaluation preprocessing that open_clip gave with the model; by default what the model
                says itself.
            calibration: map from cosine to probability; the family's default where none is given.

        Raises:
            UnsupportedModelError: a part of the model cannot be served, with the reason.
        """
        return self._adapt(model, tokenizer=tokenizer, preprocess=preprocess, calibration=calibration)

    def _adapt(self, model: nn.Module, **options: Any) -> ConvNeXtAdapter:
        from ttd_convnext.adapter import ConvNeXtAdapter

        return ConvNeXtAdapter(model, **options)


def import_open_clip() -> Any:
    """open_clip, or one sentence.

    Raises:
        MissingDependencyError: it is not installed, or its torchvision is of another build.
    """
    try:
        import open_clip
    except Exception as error:  # a torchvision of another build fails with RuntimeError or AttributeError
        raise MissingDependencyError(
            f"ConvNeXt backbones need open_clip_torch, which cannot be imported ({type(error).__name__}: "
            f"{one_sentence(error)}); run: pip install open_clip_torch"
        ) from error
    return open_clip
