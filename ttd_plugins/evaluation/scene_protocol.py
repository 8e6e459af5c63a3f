"""The scene protocol: tag selection, maps and retrieval of a backbone on generated scenes with exact labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.embedded.scenes import NOUNS, Scene, Scenes, kind_of_noun
from ttd_plugins.engine import TTD, Alignment, evaluation_mode
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.datasets import CaptionTruth
from ttd_plugins.evaluation.metrics import (
    average_precision,
    f1_score,
    intersection_over_union,
    retrieval_recall,
    tag_balance,
    upsample_map,
    zero_shot_accuracy,
)
from ttd_plugins.evaluation.true_tags import mentions_of_tags
from ttd_plugins.method.similarity import minmax_normalize
from ttd_plugins.method.text_embeddings import encode_texts
from ttd_plugins.utils.deprecation import renamed_names

CAPTION_MAP_THRESHOLD = 0.40
TAG_MAP_THRESHOLD = 0.50


@dataclass(frozen=True)
class SceneMetrics:
    """Metrics over a set of scenes, in [0, 1] unless stated otherwise.

    Attributes:
        tag_ap: average precision of the pixel score, pooled over candidate words.
        tag_ap_blind: average precision of the image-blind baseline, which scores each word by its mean over all images.
        tag_ap_image, tag_ap_text: average precision of the image score and of the text score.
        tag_f1: F1 of the engine's selection.
        caption_iou: mean IoU of the caption's map (min-max-normalised, resized bilinearly, above 0.40) with the union
            of the regions of the caption's true tags.
        tag_iou: mean over true tags of the IoU of the tag's map (likewise, above 0.50) with the tag's region.
        tag_balance: over captions with at least two true tags, the mean ratio of the lowest to the highest mean of the
            normalised caption map inside a true tag's mask.
        retrieval_r1: image-text retrieval R@1, mean of both directions; identical captions are both correct.
        zero_shot_top1: fraction of scenes that show the noun whose embedding, in the engine's template, is nearest to
            the pooled image embedding, mentioned by the caption or not.
        caption_map_in_tag: for each kind of noun, the mean of the normalised caption map inside the masks of true
            tags of that kind: the bias by kind of word.
        caption_map_spread: mean of max - min over patches of the caption's cosines; near zero means collapse.
        selected_per_caption: mean number of selected tags (a count).
        true_per_caption: mean number of true tags (a count).
        scenes: number of scenes (a count).
    """

    tag_ap: float
    tag_ap_blind: float
    tag_ap_image: float
    tag_ap_text: float
    tag_f1: float
    caption_iou: float
    tag_iou: float
    tag_balance: float
    retrieval_r1: float
    zero_shot_top1: float
    caption_map_in_tag: dict[str, float]
    caption_map_spread: float
    selected_per_caption: float
    true_per_caption: float
    scenes: int

    def as_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON."""
        return asdict(self)


def normalized_pixels(images: NDArray[np.uint8], adapter: DenseAdapter) -> Tensor:
    """Normalise images ``[B, H, W, 3]`` to float32 pixels ``[B, 3, H, W]`` on the adapter's device."""
    description = adapter.description
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (description.mean, description.std))
    return ((pixels - mean) / std).to(adapter.device)


__getattr__ = renamed_names(__name__, {"picture_pixels": "normalized_pixels"})


def scene_truth(scene: Scene) -> CaptionTruth:
    """Return the mentions of a scene's caption and whether the image shows them; a scene leaves none unknown."""
    mentions = mentions_of_tags(scene.caption, (*scene.true_tags, *scene.absent_tags))
    return CaptionTruth(scene.caption, tuple(mentions), tuple(m.classes[0] in scene.true_tags for m in mentions))


def scene_pixels(scenes: Sequence[Scene], adapter: DenseAdapter) -> Tensor:
    """Normalise the images of equally large scenes to float32 pixels ``[B, 3, side, side]`` on the adapter's device."""
    return normalized_pixels(np.stack([scene.image for scene in scenes]), adapter)


@dataclass
class _Collected:
    """Results collected over batches."""

    words: list[str] = field(default_factory=list)
    labels: list[bool | None] = field(default_factory=list)
    selected: list[bool] = field(default_factory=list)
    scores: dict[str, list[NDArray[np.float32]]] = field(default_factory=lambda: defaultdict(list))
    patches: list[Tensor] = field(default_factory=list)
    pooled: list[Tensor] = field(default_factory=list)
    captions: list[Tensor] = field(default_factory=list)
    caption_iou: list[float] = field(default_factory=list)
    tag_iou: list[float] = field(default_factory=list)
    balance: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    in_tag: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


@torch.no_grad()
def measure_on_scenes(
    ttd: TTD,
    scenes: Sequence[Scene],
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> SceneMetrics:
    """Evaluate the engine's backbone, with the engine's extractor, score and selection rule.

    Args:
        ttd: the engine; its backbone is in evaluation mode meanwhile.
        scenes: scenes of the same size.
        batch_size: scenes per batch.
        progress: callback, called with the number of scenes just done.
    """
    pool = _Collected()
    with evaluation_mode(ttd.backbone):
        for start in range(0, len(scenes), batch_size):
            batch = list(scenes[start : start + batch_size])
            _measure_batch(ttd, batch, pool)
            if progress is not None:
                progress(len(batch))
        blind = _image_blind_scores(ttd, pool)
        nouns, _ = encode_texts(ttd.backbone, [ttd.options.template.format(noun) for noun in NOUNS])

    known = np.array([label is not None for label in pool.labels], bool)
    labels = np.array([label for label in pool.labels if label is not None], bool)
    ap = {name: average_precision(np.concatenate(parts)[known], labels) for name, parts in pool.scores.items()}
    return SceneMetrics(
        tag_ap=ap["pixel"],
        tag_ap_blind=average_precision(np.array([blind[word] for word in pool.words])[known], labels),
        tag_ap_image=ap["image"],
        tag_ap_text=ap["text"],
        tag_f1=f1_score(np.array(pool.selected, bool)[known], labels),
        caption_iou=float(np.mean(pool.caption_iou)),
        tag_iou=float(np.mean(pool.tag_iou)),
        tag_balance=float(np.mean(pool.balance)),
        retrieval_r1=retrieval_recall(
            torch.cat(pool.pooled), torch.cat(pool.captions), [scene.caption for scene in scenes]
        ),
        zero_shot_top1=zero_shot_accuracy(torch.cat(pool.pooled), nouns, _shown(scenes).to(nouns.device), (1,))[1],
        caption_map_in_tag={kind: float(np.mean(values)) for kind, values in sorted(pool.in_tag.items())},
        caption_map_spread=float(np.mean(pool.spread)),
        selected_per_caption=float(np.sum(pool.selected)) / len(scenes),
        true_per_caption=sum(len(scene.true_tags) for scene in scenes) / len(scenes),
        scenes=len(scenes),
    )


def check_scenes_fit(backbone: DenseAdapter) -> None:
    """Check that scenes can be drawn at a backbone's input size.

    Raises:
        InputError: the input is not square, or scenes do not support its side.
    """
    height, width = backbone.description.image_size
    if height != width:
        name = backbone.description.name
        raise InputError(f"scenes are square, but {name} takes images of {height} x {width} pixels")
    Scenes("validation", 1, side=height)


def _shown(scenes: Sequence[Scene]) -> Tensor:
    """Return which nouns each scene shows, mentioned or not: bool ``[N, C]``."""
    return torch.tensor([[noun in scene.masks for noun in NOUNS] for scene in scenes])


def _measure_batch(ttd: TTD, scenes: list[Scene], pool: _Collected) -> None:
    images = scene_pixels(scenes, ttd.backbone)
    captions = [scene.caption for scene in scenes]
    candidates = ttd.candidates(images, captions)
    alignment = ttd.align(images, captions, candidates, pooled=True)
    targets = ttd.targets(alignment)
    assert alignment.pooled is not None
    pool.words += [tag for tags in candidates.tags for tag in tags]
    for scene, tags in zip(scenes, candidates.tags, strict=True):
        pool.labels += scene_truth(scene).labels(tags)
    pool.selected += targets.selected.tolist()
    embeddings = alignment.tags
    image_index, tag_index = candidates.image_index, candidates.tag_index
    pool.scores["pixel"].append(alignment.tag_maps.amax(-1).cpu().numpy())
    pool.scores["image"].append((alignment.pooled[image_index] * embeddings[tag_index]).sum(-1).cpu().numpy())
    pool.scores["text"].append((alignment.captions[image_index] * embeddings[tag_index]).sum(-1).cpu().numpy())
    pool.patches.append(alignment.patches)
    pool.pooled.append(alignment.pooled)
    pool.captions.append(alignment.captions)
    _measure_maps(scenes, alignment, pool)


def _measure_maps(scenes: list[Scene], alignment: Alignment, pool: _Collected) -> None:
    """Collect caption IoU, tag IoU, balance and spread of a batch."""
    caption_maps = minmax_normalize(alignment.caption_maps).reshape(-1, *alignment.grid).cpu().numpy()
    tag_maps = minmax_normalize(alignment.tag_maps).reshape(-1, *alignment.grid).cpu().numpy()
    pool.spread += (alignment.caption_maps.amax(-1) - alignment.caption_maps.amin(-1)).tolist()
    position = 0
    for scene, tags, caption_map in zip(scenes, alignment.candidates.tags, caption_maps, strict=True):
        height, width = scene.image.shape[:2]
        heat = upsample_map(caption_map, height, width)
        pool.caption_iou.append(intersection_over_union(heat > CAPTION_MAP_THRESHOLD, scene.named_region))
        masks = [scene.masks[tag] for tag in scene.true_tags]
        if len(masks) > 1:
            pool.balance.append(tag_balance(heat, masks))
        for tag, mask in zip(scene.true_tags, masks, strict=True):
            pool.in_tag[kind_of_noun(tag)].append(float(heat[mask].mean()))
        for tag, tag_map in zip(tags, tag_maps[position : position + len(tags)], strict=True):
            if tag in scene.true_tags:
                heat = upsample_map(tag_map, height, width)
                pool.tag_iou.append(intersection_over_union(heat > TAG_MAP_THRESHOLD, scene.masks[tag]))
        position += len(tags)


def _image_blind_scores(ttd: TTD, pool: _Collected) -> dict[str, float]:
    """Return the mean pixel score of every candidate word over all images."""
    words = sorted(set(pool.words))
    embeddings, _ = encode_texts(ttd.backbone, [ttd.options.template.format(word) for word in words])
    total = torch.zeros(len(words), device=embeddings.device)
    for patches in pool.patches:
        total += torch.einsum("bpd,kd->bkp", patches, embeddings).amax(-1).sum(0)
    means = (total / sum(len(patches) for patches in pool.patches)).tolist()
    return dict(zip(words, means, strict=True))
