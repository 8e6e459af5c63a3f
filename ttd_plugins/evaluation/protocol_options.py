"""Options of dense inference and of the protocols, and their presets.

This module imports neither torch nor numpy, so that the command line can build its flags from the options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.options import Calibration, Resampling, Rule, TTDOptions, check_threshold
from ttd_plugins.utils.configuration import Flag, Float, Int, Text, configuration, option

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter

Resize = Literal["square", "short"]
MapActivation = Literal["probability", "minmax", "cosine"]
Background = Literal["constant", "auto", "words", "none"]
TemplateSet = Literal["imagenet", "photo", "none"]
ScoreActivation = Literal["softmax", "cosine", "probability"]
LabelRule = Literal["minmax", "absolute", "top"]

PAPER_SCALES = (1.0, 0.5, 1.5, 2.0)
PAMR_ITERATIONS = 10
PAMR_DILATIONS = (1, 2, 4, 8, 12, 24)
"""TCL's."""
BACKGROUND_WORDS = (
    "ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea", "railway",
    "railroad", "keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street", "valley",
    "bridge", "sign",
)  # fmt: skip
"""Words for VOC's class background from Lin et al. (CVPR 2023); words that name a class of the data set are dropped."""

Positive = Annotated[Int, option("A positive number.", ge=1)]
Scale = Annotated[Float, option("A scale.", gt=0)]


@configuration(section="Inference")
class DenseOptions:
    """Views of one image in dense inference: size, scales, flip, sliding windows and refinement."""

    size: Annotated[Int, option("Side in pixels at scale one, rounded to whole patches.", ge=1)] = 448
    resize: Annotated[Resize, option("Resize the whole image to a square of that side, or its short side to it.")] = (
        "square"
    )
    scales: Annotated[tuple[Scale, ...], option("Scales over which maps are averaged, on the finest grid.")] = (1.0,)
    flip: Annotated[Flag, option("Average with the mirrored image.")] = False
    window: Annotated[
        Int | None, option("Side of sliding windows in pixels; null means the whole image at once.", ge=1)
    ] = None
    stride: Annotated[Int | None, option("Step of the windows in pixels; null means half a window.", ge=1)] = None
    positions: Annotated[
        Resampling | None,
        option("Resampling of position embeddings, where the backbone supports it; null means the backbone's setting."),
    ] = None
    refine: Annotated[Flag, option("Refine maps with PAMR at the size of scale one.", flag="--pamr")] = False
    iterations: Annotated[Int, option("Iterations of PAMR.", flag="--pamr-iterations", ge=1)] = PAMR_ITERATIONS
    dilations: Annotated[tuple[Positive, ...], option("Dilations of PAMR.", flag="--pamr-dilations")] = PAMR_DILATIONS
    batch: Annotated[
        Int, option("Windows in one forward pass, mirrored ones included.", flag="--window-batch", ge=1)
    ] = 16

    def __post_init__(self) -> None:
        if not self.scales or not self.dilations:
            raise InputError("scales and dilations must not be empty")

    def input_size(self, adapter: DenseAdapter, width: int, height: int, scale: float = 1.0) -> tuple[int, int]:
        """Return height and width in pixels at which an image of ``width`` by ``height`` is encoded at a scale."""
        rows, columns = adapter.description.patch_size
        short = min(width, height) if self.resize == "short" else 0
        factor = (height / short, width / short) if short else (1.0, 1.0)

        def whole_patches(pixels: float, patch: int) -> int:
            return max(int(pixels / patch + 0.5), 1) * patch

        size = self.size * scale
        return whole_patches(size * factor[0], rows), whole_patches(size * factor[1], columns)


def _paper_dense() -> DenseOptions:
    return DenseOptions(size=448, scales=PAPER_SCALES, flip=True, positions="dino", refine=True)


@configuration(section="Evaluation")
class TagProtocol:
    """How tags are scored and selected; the score of a tag is the maximum of its map, averaged over views."""

    dense: Annotated[DenseOptions, option("Views of an image.")] = field(
        default_factory=lambda: DenseOptions(size=224, flip=True, positions="dino")
    )
    extractor: Annotated[Text, option("Tag extractor, see `ttd plugins`.", flag="--tags")] = "words"
    extractor_options: Annotated[dict[str, Any], option("Options of the tag extractor.", flag="--tags-option")] = field(
        default_factory=dict
    )
    template: Annotated[Text, option("Prompt around a tag, with {} for the tag.", metavar="PROMPT")] = "{}"
    rule: Annotated[Rule, option("Selection rule, for every score.")] = "minmax"
    threshold: Annotated[Float, option("Threshold of the selection rule.")] = 0.5
    calibration: Annotated[
        Calibration | None, option("Map from cosine to probability; null means the backbone's own.")
    ] = None
    nouns: Annotated[Flag, option("Measure the baseline of all nouns too, which needs Stanza.")] = False
    nouns_options: Annotated[dict[str, Any], option("Options of the extractor stanza.", flag="--nouns-option")] = field(
        default_factory=dict
    )
    retrieval: Annotated[Flag, option("Measure image-text retrieval with the captions.")] = True
    zero_shot: Annotated[
        TemplateSet | None,
        option("Templates of class names for zero-shot classification, where data have classes; null means none."),
    ] = "photo"

    def __post_init__(self) -> None:
        check_threshold(self.rule, self.threshold)


@configuration(section="Evaluation")
class TextProtocol:
    """How a caption's map is computed and thresholded."""

    dense: Annotated[DenseOptions, option("Views of an image.")] = field(default_factory=_paper_dense)
    activation: Annotated[
        MapActivation, option("How a map is scaled to [0, 1] before the threshold: minmax or probability.")
    ] = "minmax"
    threshold: Annotated[Float, option("Constant background plane; the caption's region is above it.", ge=0, le=1)] = (
        0.40
    )
    templates: Annotated[TemplateSet, option("Templates around the caption.")] = "none"
    calibration: Annotated[
        Calibration | None, option("Map from cosine to probability; null means the backbone's own.")
    ] = None


@configuration(section="Evaluation")
class SegmentProtocol:
    """How each pixel is assigned a class.

    Backgrounds: ``"constant"`` adds a plane of ``threshold``, which is the class background where the data set has one
    and no class elsewhere; ``"auto"`` adds it only where the data set has a background; ``"words"`` adds
    ``background_words`` instead; ``"none"`` adds nothing, and a class named background is a class like others.
    """

    dense: Annotated[DenseOptions, option("Views of an image.")] = field(default_factory=_paper_dense)
    activation: Annotated[
        MapActivation, option("What is compared with the background plane; probability is TCL's.")
    ] = "probability"
    templates: Annotated[TemplateSet, option("Templates of class names: imagenet (80), photo or none.")] = "imagenet"
    aliases: Annotated[Flag, option("Use the usual aliases of a class; its score is the best of them.")] = True
    background: Annotated[Background, option("Treatment of the background.")] = "constant"
    threshold: Annotated[
        Float | None, option("Constant background plane; null means the paper's for the data set.", ge=0, le=1)
    ] = None
    background_words: Annotated[tuple[Text, ...], option("Names of the background for words.")] = BACKGROUND_WORDS
    calibration: Annotated[
        Calibration | None, option("Map from cosine to probability; null means the backbone's own.")
    ] = None


@configuration(section="Evaluation")
class ClassifyProtocol:
    """How the classes of an image are scored and selected in multi-label classification.

    The score of a class is the best of its names. Activations, applied at every patch and to the pooled embedding:
    ``"softmax"`` over the classes with the backbone's logit scale, as TagCLIP does (arXiv 2312.12828); ``"cosine"``;
    ``"probability"``, the calibrated one. Rules: ``"minmax"`` selects what reaches the threshold after the scores of an
    image are scaled to [0, 1], TagCLIP's relative threshold; ``"absolute"`` the score itself; ``"top"`` the ``top``
    best classes of every image.
    """

    dense: Annotated[DenseOptions, option("Views of an image.")] = field(
        default_factory=lambda: DenseOptions(size=448, flip=True)
    )
    activation: Annotated[ScoreActivation, option("What a cosine becomes before scores are compared.")] = "softmax"
    templates: Annotated[TemplateSet, option("Templates of class names: imagenet (80), photo or none.")] = "imagenet"
    aliases: Annotated[Flag, option("Use the usual aliases of a class; its score is the best of them.")] = True
    background_words: Annotated[
        tuple[Text, ...], option("Words that compete with the classes in the softmax, and are in no metric.")
    ] = ()
    rule: Annotated[LabelRule, option("Rule that turns scores into a selection.")] = "minmax"
    threshold: Annotated[Float, option("Threshold of the selection rule.", ge=-1, le=1)] = 0.5
    top: Annotated[Int, option("Number of classes of an image that the rule top selects.", ge=1)] = 3
    calibration: Annotated[
        Calibration | None, option("Map from cosine to probability; null means the backbone's own.")
    ] = None


@configuration(section="Evaluation")
class RetrievalProtocol:
    """How images and captions are embedded for retrieval, and which losses of held-out pairs are measured."""

    size: Annotated[
        Int | None,
        option("Side in pixels of the whole image; null means the backbone's own evaluation preprocessing.", ge=1),
    ] = None
    template: Annotated[
        Text, option("Prompt around a caption, with {} for it.", flag="--caption-template", metavar="PROMPT")
    ] = "{}"
    losses: Annotated[Flag, option("Measure the losses of TTD on the pairs too.")] = False
    batch: Annotated[
        Int, option("Pairs in a batch of the contrastive loss, whose value depends on it.", flag="--loss-batch", ge=2)
    ] = 64
    ttd: Annotated[TTDOptions, option("Options of the losses.")] = field(default_factory=TTDOptions)

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise InputError(f"the template {self.template!r} must contain {{}} once, where the caption goes")


THRESHOLDS = {
    "voc": 0.40, "cityscapes": 0.40, "coco_stuff": 0.40, "coco_object": 0.45, "ade20k": 0.45, "context59": 0.45,
    "context60": 0.45,
}  # fmt: skip
"""Constant background planes of the paper's commands; :data:`PLANE` for other data sets."""
PLANE = 0.40
"""Constant background plane where the options name none; the paper's of most data sets."""

PROTOCOLS: dict[str, type] = {
    "tags": TagProtocol,
    "text": TextProtocol,
    "segment": SegmentProtocol,
    "classify": ClassifyProtocol,
    "retrieval": RetrievalProtocol,
}
"""The options of each protocol."""
TAG_PRESETS: dict[str, TagProtocol] = {
    "paper": TagProtocol(),
    "fast": TagProtocol(dense=DenseOptions(size=224)),
}
"""``"paper"``: 224 pixels, one scale, flip averaged. The selection rule is unpublished: the engine's default."""

TEXT_PRESETS: dict[str, TextProtocol] = {
    "paper": TextProtocol(),
    "fast": TextProtocol(dense=DenseOptions(size=224)),
}
"""``"paper"``: 448 pixels, scales 1, 0.5, 1.5, 2, flip, PAMR, background 0.40. Min-max before the threshold is ours."""

SEGMENT_PRESETS: dict[str, SegmentProtocol] = {
    "paper": SegmentProtocol(),
    # TCL's own evaluation: short side 448, windows of 448 every 224 pixels, one scale, no flip.
    "tcl": SegmentProtocol(
        dense=DenseOptions(size=448, resize="short", window=448, stride=224, positions="bicubic", refine=True),
        background="auto",
    ),
    # NACLIP's own evaluation: short side 336, windows of 224 every 112 pixels, no threshold.
    "naclip": SegmentProtocol(
        dense=DenseOptions(
            size=336, resize="short", window=224, stride=112, positions="dino", refine=True, dilations=(8, 16)
        ),
        activation="cosine",
        background="none",
    ),
    "fast": SegmentProtocol(dense=DenseOptions(size=224), templates="photo", background="auto"),
}
"""``"paper"``: 448 pixels, scales 1, 0.5, 1.5, 2, flip, PAMR, 80 templates, a constant plane on every data set."""

IMAGE_SEGMENT = SegmentProtocol(
    dense=DenseOptions(size=448, resize="short", scales=(1.0, 1.5), flip=True, refine=True),
    templates="photo",
    background="words",
)
"""Options of ``ttd segment``. Words for the background need no calibration, unlike a plane."""


CLASSIFY_PRESETS: dict[str, ClassifyProtocol] = {
    "paper": ClassifyProtocol(),
    "fast": ClassifyProtocol(dense=DenseOptions(size=224), templates="photo"),
}
"""``"paper"``: 448 pixels, one scale, flip averaged, 80 templates, softmax over the classes as in TagCLIP."""

RETRIEVAL_PRESETS: dict[str, RetrievalProtocol] = {
    "paper": RetrievalProtocol(),
    "fast": RetrievalProtocol(size=224),
}
"""``"paper"``: the backbone's own preprocessing, as for published results."""


def with_changes(options: Any, changes: Mapping[str, Any]) -> Any:
    """Return options with some fields changed, of themselves or of their options of dense inference.

    Raises:
        InputError: a name or a value is wrong.
    """
    own = {one.name for one in fields(options)}
    dense = {one.name for one in fields(options.dense)} if "dense" in own else set()
    for name in changes:
        if name not in own | dense:
            raise InputError(choices_sentence("option", name, sorted(own | dense), 40))
    options = replace(options, **{name: value for name, value in changes.items() if name in own})
    inner = {name: value for name, value in changes.items() if name in dense}
    return replace(options, dense=replace(options.dense, **inner)) if inner else options


def with_plane(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return changes of :data:`IMAGE_SEGMENT`; a threshold without a background means the plane of that threshold."""
    implied = changes.get("threshold") is not None and "background" not in changes
    return {**changes, "background": "constant"} if implied else dict(changes)
