"""Upper bounds for the metrics on scenes, from an oracle that knows every image.

    python examples/scene_limits.py --split validation --scenes 512

The oracle knows which noun each pixel shows. The value of a patch in its caption map is the weighted share of the named
nouns in it. ``likely`` weights a noun by its log-odds ``log p(named | shown) / p(named | absent)``, counted on training
captions. This is the optimum of a contrastive loss, so contrastive training cannot reach a lower bias. ``even`` weights
all nouns equally, like the union that TTD teaches. Retrieval sums the same weights over the nouns of caption and image.
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
    """Metrics of one oracle, defined as in :class:`ttd_plugins.evaluation.scene_protocol.SceneMetrics`."""

    caption_iou: float
    tag_balance: float
    retrieval_r1: float


def log_odds(scenes: Sequence[Scene]) -> dict[str, float]:
    """``log p(named | shown) / p(named | absent)`` of every noun, with one half added to each count."""
    shown, named, named_absent = Counter[str](), Counter[str](), Counter[str]()
    for scene in scenes:
        shown.update(scene.masks.keys())
        named.update(scene.true_tags)
        named_absent.update(scene.absent_tags)
    return {
        noun: float(
            np.log((named[noun] + 0.5) / (shown[noun] + 1))
            - np.log((named_absent[noun] + 0.5) / (len(scenes) - shown[noun] + 1))
        )
        for noun in NOUNS
    }


def caption_map(scene: Scene, weights: Mapping[str, float], patch: int = PATCH) -> NDArray[np.float32]:
    """The oracle's caption map over patches, ``[side / patch, side / patch]`` in [0, 1]."""
    pixels = np.zeros(scene.image.shape[:2], np.float32)
    for tag in scene.true_tags:
        pixels[scene.masks[tag]] = weights[tag]
    rows, columns = (side // patch for side in pixels.shape)
    patches = torch.from_numpy(pixels.reshape(rows, patch, columns, patch).mean((1, 3)))
    return minmax_normalize(patches.flatten()).reshape(rows, columns).numpy()


def retrieval(scenes: Sequence[Scene], weights: Mapping[str, float], seed: int = 0) -> float:
    """R@1, mean of both directions. Identical captions both count as correct; ties break at random."""
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
    """Metrics of an oracle with these weights on ``scenes``."""
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
    parser.add_argument("--counted", type=int, default=20_000, help="number of training scenes for the log-odds")
    parser.add_argument("--patch", type=int, default=PATCH, help="side of a patch in pixels; 1 for one value per pixel")
    options = parser.parse_args(arguments)
    odds = log_odds(list(Scenes("train", options.counted, seed=1, bare_captions=0.0)))
    scenes = list(Scenes(options.split, options.scenes))
    found = {
        "likely": limits(scenes, odds, options.patch),
        "even": limits(scenes, dict.fromkeys(NOUNS, 1.0), options.patch),
    }
    table = Table("oracle", "caption IoU", "tag balance", "retrieval R@1", title=f"{options.scenes} scenes")
    for name, own in found.items():
        table.add_row(name, *(f"{value:.3f}" for value in (own.caption_iou, own.tag_balance, own.retrieval_r1)))
    Console().print(table)
    return found


if __name__ == "__main__":
    main()
