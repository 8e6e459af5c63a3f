"""What an observer that knows every picture could reach on scenes: the bounds that the figures of a model are read by.

    python examples/scene_limits.py --split validation --scenes 512

The observer knows which noun each pixel shows. Its caption map gives a patch the weighted share of each named noun in
it. ``likely`` weighs a noun by its log-odds, ``log p(named | pictured) / p(named | absent)``, counted on training
captions: the optimum of a contrastive loss, which no training can leave less biased. ``even`` weighs all alike: the
union that TTD teaches. Retrieval adds the same weights over the nouns of caption and picture.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ttd_plugins.embedded.scenes import NOUNS, Scene, Scenes
from ttd_plugins.evaluation.metrics import intersection_over_union, tag_balance, upsample_map
from ttd_plugins.evaluation.scene_protocol import CAPTION_MAP_THRESHOLD
from ttd_plugins.method.similarity import minmax_normalize

PATCH = 8


@dataclass(frozen=True)
class Limits:
    """Figures of one observer, defined as in :class:`ttd_plugins.evaluation.scene_protocol.SceneMetrics`."""

    caption_iou: float
    tag_balance: float
    retrieval_r1: float


def log_odds(scenes: Sequence[Scene]) -> dict[str, float]:
    """``log p(named | pictured) / p(named | absent)`` of every noun, with one half added to each count."""
    pictured, named, in_vain = Counter[str](), Counter[str](), Counter[str]()
    for scene in scenes:
        pictured.update(scene.masks.keys())
        named.update(scene.true_tags)
        in_vain.update(scene.absent_tags)
    return {
        noun: float(
            np.log((named[noun] + 0.5) / (pictured[noun] + 1))
            - np.log((in_vain[noun] + 0.5) / (len(scenes) - pictured[noun] + 1))
        )
        for noun in NOUNS
    }


def caption_map(scene: Scene, weights: Mapping[str, float], patch: int = PATCH) -> NDArray[np.float32]:
    """The observer's caption map over patches, ``[side / patch, side / patch]`` in [0, 1]."""
    pixels = np.zeros(scene.image.shape[:2], np.float32)
    for tag in scene.true_tags:
        pixels[scene.masks[tag]] = weights[tag]
    rows, columns = (side // patch for side in pixels.shape)
    patches = torch.from_numpy(pixels.reshape(rows, patch, columns, patch).mean((1, 3)))
    return minmax_normalize(patches.flatten()).reshape(rows, columns).numpy()


def retrieval(scenes: Sequence[Scene], weights: Mapping[str, float], seed: int = 0) -> float:
    """R@1, the mean of both directions, identical captions both right; ties are broken by chance."""
    scores = np.array(
        [
            [sum(weights[n] for n in (*text.true_tags, *text.absent_tags) if n in image.masks) for text in scenes]
            for image in scenes
        ]
    )
    scores += 1e-6 * np.random.default_rng(seed).random(scores.shape)
    captions = np.array([scene.caption for scene in scenes])
    found = [captions[scores.argmax(1)] == captions, captions[scores.argmax(0)] == captions]
    return float(np.mean(found))


def limits(scenes: Sequence[Scene], weights: Mapping[str, float], patch: int = PATCH) -> Limits:
    """What an observer with these weights reaches on ``scenes``."""
    ious, balances = [], []
    for scene in scenes:
        heat = upsample_map(caption_map(scene, weights, patch), *scene.image.shape[:2])
        ious.append(intersection_over_union(heat > CAPTION_MAP_THRESHOLD, scene.named_region))
        if len(scene.true_tags) > 1:
            balances.append(tag_balance(heat, [scene.masks[tag] for tag in scene.true_tags]))
    return Limits(float(np.mean(ious)), float(np.mean(balances)), retrieval(scenes, weights))


def main(arguments: list[str] | None = None) -> dict[str, Limits]:
    """Print the bounds as a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--scenes", type=int, default=512)
    parser.add_argument("--counted", type=int, default=20_000, help="training scenes that the log-odds are counted on")
    parser.add_argument("--patch", type=int, default=PATCH, help="side of a patch in pixels; 1 for a map of pixels")
    options = parser.parse_args(arguments)
    odds = log_odds(list(Scenes("train", options.counted, seed=1, bare_captions=0.0)))
    scenes = list(Scenes(options.split, options.scenes))
    found = {
        "likely": limits(scenes, odds, options.patch),
        "even": limits(scenes, dict.fromkeys(NOUNS, 1.0), options.patch),
    }
    table = Table("observer", "caption IoU", "tag balance", "retrieval R@1", title=f"{options.scenes} scenes")
    for name, own in found.items():
        table.add_row(name, *(f"{value:.3f}" for value in (own.caption_iou, own.tag_balance, own.retrieval_r1)))
    Console().print(table)
    return found


if __name__ == "__main__":
    main()
