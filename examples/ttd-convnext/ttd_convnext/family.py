"""The family ``convnext``: what can be loaded by name, and how; open_clip is not imported before that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ttd_convnext.structure import is_convnext_clip, refusal_of_config
from ttd_plugins.adapter import AdapterFamily, Calibration
from ttd_plugins.errors import (
    BackboneNameError,
    MissingDependencyError,
    TTDError,
    UnsupportedModelError,
    choices_sentence,
    one_sentence,
)
from ttd_plugins.toolkit.hub import hub_offline, hub_problem, quiet_root_logger

if TYPE_CHECKING:
    from ttd_convnext.adapter import ConvNeXtAdapter

TINY = "tiny"
RANDOM = "random"


class ConvNeXtFamily(AdapterFamily):
    """ConvNeXt CLIP models of open_clip, by name or as objects.

    Names: an architecture of open_clip with one of its pretrained tags, a path to a checkpoint, or ``random``; and
    ``tiny@random``, which needs no network.
    """

    name = "convnext"
    summary = "ConvNeXt CLIP models of open_clip and timm"
    api_version = 1

    def models(self) -> list[str]:
        """``tiny``, and the architectures of open_clip that this adapter takes.

        Raises:
            MissingDependencyError: open_clip is not installed.
        """
        open_clip = _import_open_clip()
        known = open_clip.list_models()
        return [TINY, *(name for name in known if refusal_of_config(open_clip.get_model_config(name)) is None)]

    def weights(self, model: str) -> list[str]:
        """Pretrained tags of ``model``; a path to a checkpoint of an architecture is taken as well.

        Raises:
            BackboneNameError: the model is unknown.
            UnsupportedModelError: open_clip knows the model, but this adapter cannot serve it.
            MissingDependencyError: open_clip is not installed.
        """
        if model == TINY:
            return []
        open_clip = _import_open_clip()
        return list(open_clip.list_pretrained_tags_by_model(self._architecture(open_clip, model)))

    def _architecture(self, open_clip: Any, model: str) -> str:
        """The name of an architecture of open_clip's that this adapter takes."""
        if model not in open_clip.list_models():
            raise BackboneNameError(choices_sentence("convnext model", model, self.models()))
        reason = refusal_of_config(open_clip.get_model_config(model))
        if reason is not None:
            raise UnsupportedModelError(f"convnext:{model} cannot be adapted: {reason}")
        return model

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
            model: an architecture of open_clip, or ``tiny``.
            weights: a pretrained tag, a path to a checkpoint, or ``random``.
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
        open_clip = _import_open_clip()
        if model == TINY:
            if weights != RANDOM:
                raise BackboneNameError(choices_sentence("weights of convnext:tiny", weights, [RANDOM]))
            from ttd_convnext.tiny import CONTEXT, build_tiny

            built: Any = build_tiny()
            tokenizer = tokenizer if tokenizer is not None else open_clip.SimpleTokenizer(context_length=CONTEXT)
        else:
            name = self._architecture(open_clip, model)
            source = self._weight_source(open_clip, name, weights)
            on_disk = source is None or Path(source).is_file()
            problem = None if on_disk else hub_problem()
            try:
                with quiet_root_logger("open_clip"), hub_offline(problem is not None):
                    built = open_clip.create_model(
                        model_name=name,
                        pretrained=source,
                        load_weights=source is not None,
                        require_pretrained=source is not None,
                        precision=precision,
                        cache_dir=cache_dir,
                    ).eval()
                    if tokenizer is None:
                        tokenizer = open_clip.get_tokenizer(model_name=name, cache_dir=cache_dir)
            except Exception as error:  # open_clip and the libraries below it raise nearly anything
                raise TTDError(_cannot_load(f"convnext:{model}@{weights}", on_disk, problem, error)) from error
        return self._adapt(built, tokenizer=tokenizer, calibration=calibration, name=model, weights=weights)

    def _weight_source(self, open_clip: Any, name: str, weights: str) -> str | None:
        """What open_clip calls ``pretrained``: a tag, the path of a file, or nothing for random weights."""
        if weights == RANDOM:
            return None
        if open_clip.get_pretrained_cfg(name, weights) or Path(weights).is_file():
            return weights
        tags = [*open_clip.list_pretrained_tags_by_model(name), RANDOM]
        hint = "; the path of a checkpoint file is taken too"
        raise BackboneNameError(choices_sentence(f"weights of convnext:{name}", weights, tags) + hint)

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


def _import_open_clip() -> Any:
    try:
        import open_clip
    except Exception as error:  # a torchvision of another build fails with RuntimeError or AttributeError
        raise MissingDependencyError(
            f"ConvNeXt backbones need open_clip_torch, which cannot be imported ({type(error).__name__}: "
            f"{one_sentence(error)}); run: pip install open_clip_torch"
        ) from error
    return open_clip


def _cannot_load(full: str, on_disk: bool, problem: str | None, error: Exception) -> str:
    """One sentence on what failed and what to do."""
    if problem is not None:
        reason = f"{full} cannot be loaded: {problem}, and the download cache does not hold all of it"
    else:
        reason = f"{full} cannot be loaded ({type(error).__name__}: {one_sentence(error)})"
    if on_disk:
        return f"{reason}; give a state dict or safetensors file that was saved for this architecture"
    return (
        f"{reason}; connect to the network once, or set HF_HUB_OFFLINE=1 where the download cache is warm, or give "
        "the path of a checkpoint file after @"
    )
