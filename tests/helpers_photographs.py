"""Photographs of noise with dense masks, in the layout of COCO captions with masks of category ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 12, 20


def write_photographs(root: Path, captions: Mapping[str, Sequence[str]], shown: Mapping[str, Sequence[int]]) -> Path:
    """A picture of 12 x 20 pixels for each name, its classes as blocks side by side that are darker than the rest."""
    (root / "images").mkdir(parents=True)
    (root / "semantic_masks").mkdir()
    rng = np.random.default_rng(0)
    for name, classes in shown.items():
        noise = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        for number, class_id in enumerate(classes):
            mask[2 * number : 12 - number, 6 * number : 6 * number + 9] = class_id
            noise[mask == class_id] //= number + 2
        Image.fromarray(noise).save(root / f"images/{name}.png")
        Image.fromarray(mask).save(root / f"semantic_masks/{name}.png")
    images = [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate(captions)]
    annotations = [
        {"id": 10 * i + j, "image_id": i, "caption": caption}
        for i, texts in enumerate(captions.values())
        for j, caption in enumerate(texts)
    ]
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return root
