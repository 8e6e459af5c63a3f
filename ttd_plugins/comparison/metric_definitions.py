"""The metrics of a comparison, on generated scenes and on captioned data sets with masks."""

from __future__ import annotations

from ttd_plugins.comparison.results import Metric

CAPTION_IOU = Metric(
    "caption_iou",
    "Caption IoU",
    "higher",
    "IoU of the caption's map, above 0.40, with the regions of the caption's true tags.",
)
TAG_BALANCE = Metric(
    "tag_balance",
    "tag balance",
    "higher",
    "Mean of the caption's map inside the weakest true tag over that inside the strongest; 1 is even.",
)
TAG_F1 = Metric("tag_f1", "tag F1", "higher", "F1 of the selected tags, over all candidate tags.")
RETRIEVAL_R1 = Metric(
    "retrieval_r1",
    "retrieval R@1",
    "higher",
    "Image-text retrieval at 1, mean of both directions; fine-tuning may lower it.",
)
ZERO_SHOT = Metric(
    "zero_shot_top1",
    "zero-shot top-1",
    "higher",
    "Share of images whose nearest class name, by the image embedding, is in the image; fine-tuning may lower it.",
)
TAG_SCORE_MEANING = "Average precision of the pixel score (nearest patch), over all candidate tags."

SCENE_METRICS = (
    CAPTION_IOU,
    Metric("tag_iou", "tag IoU", "higher", "IoU of a true tag's map, above 0.50, with that tag's region."),
    TAG_BALANCE,
    TAG_F1,
    Metric("tag_ap", "tag AP", "higher", TAG_SCORE_MEANING),
    Metric(
        "tag_ap_blind",
        "tag AP, image-blind",
        None,
        "The image-blind baseline of tag AP: each tag is scored by its mean over all images.",
    ),
    RETRIEVAL_R1,
    ZERO_SHOT,
    Metric(
        "caption_map_spread",
        "map spread",
        None,
        "Largest minus smallest cosine of the caption's map; near zero means collapse.",
    ),
)
"""Metrics of :class:`~ttd_plugins.evaluation.scene_protocol.SceneMetrics` that the table shows."""

CAPTION_METRICS = (
    CAPTION_IOU,
    Metric(
        "caption_fpr",
        "Caption FPR",
        "lower",
        "False-positive pixels of the caption's map, as a share of the union in Caption IoU.",
    ),
    Metric(
        "caption_fnr",
        "Caption FNR",
        "lower",
        "False-negative pixels of the caption's map, as a share of the union in Caption IoU.",
    ),
    TAG_BALANCE,
    TAG_F1,
    Metric("tag_map", "tag mAP", "higher", TAG_SCORE_MEANING),
    Metric(
        "tag_map_image",
        "tag mAP, image score",
        None,
        "The same for the image score, which uses the pooled image embedding: the usual baseline.",
    ),
    RETRIEVAL_R1,
    Metric("retrieval_r5", "retrieval R@5", "higher", "Image-text retrieval at 5, mean of both directions."),
)
"""Metrics of the protocols of tag selection and text-level segmentation."""

SEGMENT_METRICS = (
    Metric("miou", "mIoU", "higher", "Mean over classes of the IoU of predicted and true pixels."),
    Metric("mfpr", "mFPR", "lower", "Mean over classes of the false-positive share of the union."),
    Metric("mfnr", "mFNR", "lower", "Mean over classes of the false-negative share of the union."),
    Metric("pixel_accuracy", "pixel accuracy", "higher", "Share of labelled pixels with the right class."),
    ZERO_SHOT,
)
"""Metrics of open-vocabulary segmentation."""

LABEL_METRICS = (
    Metric("label_map", "mAP", "higher", "Mean over classes of the average precision of the pixel score."),
    Metric("label_map_combined", "mAP, combined score", "higher", "The same for the mean of pixel and image score."),
    Metric("label_f1", "label F1", "higher", "F1 of the classes selected by the pixel score, over all images."),
    Metric("label_class_f1", "label F1, per class", "higher", "The same from the means over classes."),
    Metric(
        "label_map_image",
        "mAP, image score",
        "higher",
        "Mean over classes of the average precision of the pooled image embedding; fine-tuning may lower it.",
    ),
)
"""Metrics of multi-label classification."""

PAIR_METRICS = (
    RETRIEVAL_R1,
    Metric("retrieval_r5", "retrieval R@5", "higher", "Image-text retrieval at 5, mean of both directions."),
    Metric("image_to_text_r1", "image to text R@1", "higher", "Share of images whose nearest caption is their own."),
    Metric("text_to_image_r1", "text to image R@1", "higher", "Share of captions whose nearest image is theirs."),
    Metric("loss_contrastive", "validation loss", "lower", "The backbone's own contrastive loss on held-out pairs."),
    Metric("loss_tag", "L_tag", None, "L_tag on the held-out pairs; low in a collapse too."),
    Metric("loss_distill", "L_distill", None, "L_distill on the held-out pairs; low in a collapse too."),
)
"""Metrics of held-out pairs."""
