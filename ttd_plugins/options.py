"""Options of the method: every choice of TTD with its default, and the map from cosine to probability.

This module imports neither torch nor numpy, so that the command line can build its flags from the options.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ttd_plugins.errors import InputError
from ttd_plugins.utils.configuration import Flag, Float, Int, Text, configuration, option

if TYPE_CHECKING:
    from torch import Tensor

Score = Literal["pixel", "image", "text"]
Rule = Literal["minmax", "absolute", "probability"]
Distance = Literal["bce", "mse", "l1"]
Activation = Literal["sigmoid", "minmax", "none"]
Teacher = Literal["self", "frozen", "ema"]
Anchor = Literal["embeddings", "similarities"]
Resampling = Literal["library", "bicubic", "dino"]
"""How position embeddings are resampled at another grid: as the backbone's library does, by bicubic interpolation
without antialiasing (TCL), or by that with DINO's scale (SCLIP, ClearCLIP, NACLIP)."""


def check_threshold(rule: Rule, threshold: float) -> None:
    """Check the threshold of a selection rule.

    Raises:
        InputError: it is outside the range of the scores of the rule.
    """
    low = -1 if rule == "absolute" else 0
    if not low <= threshold <= 1:
        raise InputError(f"threshold must be at least {low} and at most 1 with the rule {rule}, not {threshold:g}")


@configuration()
class Calibration:
    """An affine map from cosine to probability, ``sigmoid(scale * cosine + shift)``.

    Cosines of different families have different ranges, so a threshold that suits one is wrong for another. The
    default is TCL's initialisation (10, -2.5), under which a cosine of 0.25 has probability one half.
    """

    scale: Annotated[Float, option("Multiplier of the cosine.")] = 10.0
    shift: Annotated[Float, option("Added to the scaled cosine.")] = -2.5

    def logit(self, cosine: Tensor) -> Tensor:
        """Return ``scale * cosine + shift``, in the shape and dtype of ``cosine``."""
        return self.scale * cosine + self.shift

    def probability(self, cosine: Tensor) -> Tensor:
        """Return ``sigmoid(scale * cosine + shift)``, in the shape and dtype of ``cosine``, values in (0, 1)."""
        return self.logit(cosine).sigmoid()


@configuration(
    renamed={
        "caption_weight": "distill_weight",
        "remembered_texts": "text_cache_size",
        "recompute_texts": "text_activation_checkpointing",
    },
    section="Objective",
)
class TTDOptions:
    """Every choice of the method (arXiv 2404.00384). Choices that the paper leaves unknown say so.

    ``examples/ablation.py`` measures them; ``docs/choices.md`` lists the results.

    Raises:
        InputError: an option has the wrong type or range.
    """

    extractor: Annotated[
        Text, option("Tag extractor that splits captions into candidate tags, see `ttd plugins`.", flag="--tags")
    ] = "words"
    extractor_options: Annotated[dict[str, Any], option("Options of the tag extractor.", flag="--tags-option")] = field(
        default_factory=dict
    )
    template: Annotated[
        Text, option("Prompt around a tag, with {} for the tag (unknown; the bare word).", metavar="PROMPT")
    ] = "{}"
    score: Annotated[Score, option("Score of a tag; pixel is the paper's, image and text are its baselines.")] = "pixel"
    rule: Annotated[Rule, option("Rule that turns scores into a selection (unknown).")] = "minmax"
    threshold: Annotated[
        Float, option("Threshold of the selection rule (unknown), from 0 to 1; from -1 to 1 for the rule absolute.")
    ] = 0.5
    target_power: Annotated[
        Float,
        option(
            "Power to which min-max-normalised maps are raised in the targets; above 1 makes targets sharper (ours).",
            gt=0,
        ),
    ] = 1.0
    distance: Annotated[Distance, option("Distance between a map and its target (unknown).")] = "bce"
    activation: Annotated[Activation, option("What is applied to a map before the distance (unknown).")] = "sigmoid"
    tag_weight: Annotated[Float, option("Weight of L_tag (unknown).", ge=0)] = 1.0
    distill_weight: Annotated[Float, option("Weight of L_distill (unknown).", ge=0)] = 10.0
    contrastive_weight: Annotated[
        Float, option("Weight of the backbone's own contrastive loss, which keeps global alignment (ours).", ge=0)
    ] = 1.0
    rejected_weight: Annotated[
        Float, option("Weight, within L_tag, of rejected tags, whose target is zero (unknown).", ge=0)
    ] = 1.0
    teacher: Annotated[
        Teacher,
        option(
            "Source of the targets: self (the paper's, gradients stopped), frozen (the backbone without LoRA, before "
            "any step) or ema (a moving average, updated while the model is in training mode)."
        ),
    ] = "self"
    ema_decay: Annotated[Float, option("Share of the moving average that a step keeps.", ge=0, le=1)] = 0.99
    anchor_weight: Annotated[
        Float,
        option(
            "Weight of the distance to the frozen model (the backbone without LoRA, before any step), which keeps "
            "retrieval and zero-shot classification (ours).",
            ge=0,
        ),
    ] = 0.0
    anchor: Annotated[
        Anchor,
        option(
            "What the anchor compares with the frozen model: embeddings (pooled image and caption embeddings) or "
            "similarities (the batch's matrix of images and captions)."
        ),
    ] = "embeddings"
    calibration: Annotated[
        Calibration | None, option("Map from cosine to probability; null means the backbone's own.")
    ] = None
    text_cache_size: Annotated[
        Int,
        option(
            "Text embeddings that are cached where no step changes their tower (frozen text tower, frozen teacher); a "
            "resumed run is then equal to rounding and not bitwise.",
            ge=0,
        ),
    ] = 0
    text_activation_checkpointing: Annotated[
        Flag | None,
        option(
            "Whether to use activation checkpointing in the text tower; null means only where texts cannot be trimmed "
            "to their length and the tower names its blocks."
        ),
    ] = None

    def contrastive_alone(self) -> TTDOptions:
        """Return the same options with the contrastive term as the only loss: the control of a comparison."""
        return replace(self, tag_weight=0.0, distill_weight=0.0, anchor_weight=0.0)

    def __post_init__(self) -> None:
        check_threshold(self.rule, self.threshold)
        before, _, after = self.template.partition("{}")
        if "{}" not in self.template or set("{}") & set(before + after):
            raise InputError(
                f"the template {self.template!r} must contain {{}} once, where the tag goes, and no other brace"
            )
        if self.distance == "bce" and self.activation == "none":
            raise InputError("the distance bce needs maps in [0, 1]; set the activation to sigmoid or minmax")
