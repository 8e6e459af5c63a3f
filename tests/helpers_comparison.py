"""Comparisons as a run would return them, without running one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ttd_plugins.comparison.results import Arm, BackboneResult, Comparison, GalleryImage, Metric, TagView, View

HOSTILE = (
    """<script>alert("x")</script> 'q' & <img src=http://evil.example/x onerror=alert(1)> $x^{ 狗 🐶 \x00 \ud83d"""
)

FIGURES = (
    Metric("caption_iou", "Caption IoU", "higher", "Overlap of the caption's map with what it names."),
    Metric("caption_fpr", "Caption FPR", "lower", "Share that the map lights falsely."),
    Metric("tag_f1", "tag F1", "higher", "F1 of the tags that are selected."),
    Metric("retrieval_r1", "retrieval R@1", "higher", "What fine-tuning may cost."),
    Metric("caption_map_spread", "map spread", None, "Near zero means collapse."),
)
START = {"caption_iou": 0.54, "caption_fpr": 0.31, "tag_f1": 0.93, "retrieval_r1": 0.22, "caption_map_spread": 0.4}
NAMES = ("open_clip:tiny", "siglip:tiny", "eva_clip:tiny", "openai_clip:tiny")


def make_backbone(
    name: str,
    gains: dict[str, float] | None = None,
    *,
    seeds: int = 3,
    arms: Sequence[Arm] = ("before", "control", "after"),
    noise: float = 0.002,
    shift: float = 0.0,
    steps: int = 30,
) -> BackboneResult:
    """A backbone whose metrics after TTD are the control's plus ``gains``, with ``noise`` between seeds."""
    rng = np.random.default_rng(abs(hash(name)) % 1000)
    gains = {"caption_iou": 0.09, "tag_f1": 0.01, "retrieval_r1": -0.012, "caption_fpr": -0.04} | (gains or {})
    before = {key: value + shift for key, value in START.items()}
    figures: dict[Arm, list[dict[str, float | None]]] = {}
    curves: dict[Arm, list[list[dict[str, float]]]] = {}
    for arm in arms:
        if arm == "before":
            figures[arm] = [dict(before)]
            continue
        steady = np.linspace(-1, 1, seeds) if seeds > 1 else np.zeros(1)
        figures[arm] = [
            {
                k: v + 0.003 + (gains.get(k, 0.0) + noise * float(n) if arm == "after" else 0.0)
                for k, v in before.items()
            }
            for n in steady
        ]
        parts = ("contrastive",) if arm == "control" else ("contrastive", "tag", "distill")
        curves[arm] = []
        for _ in range(seeds):
            values = {part: 2 / np.arange(1, steps + 1) ** 0.3 + rng.normal(0, 0.05, steps) for part in parts}
            total = sum(values.values())
            curves[arm].append(
                [
                    {"step": n + 1, "loss": float(total[n]), **{part: float(v[n]) for part, v in values.items()}}
                    for n in range(steps)
                ]
            )
    about = {
        "family": name.partition(":")[0],
        "parameters": 3_400_000,
        "image_size": [64, 64],
        "patch_size": [8, 8],
        "calibration": {"scale": 12.0, "shift": -3.0},
        "weights_sha256": "0123456789abcdef" * 4,
    }
    return BackboneResult(name, about, figures, curves, {"tune after 0": 31.0}, [])


def make_curve(*, ttd: bool, steps: int = 60) -> list[dict[str, float]]:
    """A training whose losses fall."""
    losses = {"contrastive": 1.0} | ({"tag": 0.7, "distill": 0.6} if ttd else {})
    return [
        {
            "step": float(step),
            "loss": sum(losses.values()),
            **{name: value / step**0.2 for name, value in losses.items()},
            "caption_map_spread": 0.4,
            "selected_per_caption": 2.0,
        }
        for step in range(1, steps + 1)
    ]


def make_view(
    seed: int, caption: str, tags: Sequence[str], *, grid: tuple[int, int] = (8, 8), iou: float | None = 0.5
) -> View:
    """Random maps."""
    rng = np.random.default_rng(seed)
    views = [
        TagView(
            tag, caption.find(tag), float(rng.random()), bool(rng.random() > 0.4), rng.random(grid, dtype=np.float32)
        )
        for tag in tags
    ]
    return View(rng.random(grid, dtype=np.float32), views, iou)


def make_picture(
    number: int,
    names: Sequence[str] = NAMES,
    *,
    arms: Sequence[Arm] = ("before", "control", "after"),
    caption: str = "a dog and a lion in a photo of grass",
    tags: Sequence[str] = ("dog", "lion", "photo", "grass"),
    size: tuple[int, int] = (64, 64),
    grid: tuple[int, int] = (8, 8),
    ious: Sequence[float] = (0.3, 0.4, 0.5),
) -> GalleryImage:
    """An image of a dog on grass; ``ious`` are those of the arms on the first backbone."""
    rng = np.random.default_rng(number)
    height, width = size
    grass, dog = np.zeros(size, bool), np.zeros(size, bool)
    grass[height // 2 :] = True
    dog[height // 4 : height // 2, width // 4 : width // 2] = True
    views = {
        name: {
            arm: make_view(100 * number + 10 * n + m, caption, tags, grid=grid, iou=ious[m] + 0.05 * n)
            for m, arm in enumerate(arms)
        }
        for n, name in enumerate(names)
    }
    image = np.linspace(60, 200, height, dtype=np.uint8)[:, None, None] + rng.integers(0, 9, (*size, 3), dtype=np.uint8)
    return GalleryImage(f"scene-{number:04d}", image, caption, {"dog": dog, "grass": grass}, views, "largest gain")


def make_comparison(names: Sequence[str] = NAMES, pictures: int = 3, **changes: Any) -> Comparison:
    """A comparison in which TTD helps all backbones but the last."""
    backbones = [
        make_backbone(name, {"caption_iou": 0.001} if n == 3 else {"caption_iou": 0.09 - 0.02 * n}, shift=0.013 * n)
        for n, name in enumerate(names)
    ]
    comparison = Comparison(
        settings={"backbones": list(names), "data": {"name": "scenes", "images": 512}, "seeds": 3, "steps": 200},
        metrics=FIGURES,
        backbones=backbones,
        gallery=[make_picture(n, names) for n in range(pictures)],
        attribution="Pictograms: OpenMoji, CC BY-SA 4.0",
    )
    return replace(comparison, **changes)
