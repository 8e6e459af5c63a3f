"""Draw what `ttd segment` finds on photographs of the package beside their true masks.

    python examples/segment_gallery.py --out docs/images/segmenting.jpg

Each photograph is segmented by the names of its own classes, with the default options. The true masks are those of
COCO's instances; everything else is background. The script prints pixel accuracy and mean IoU of each photograph.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttd_plugins.embedded import PHOTOGRAPHS_FOLDER
from ttd_plugins.evaluation.datasets.coco_masks import annotation_mask
from ttd_plugins.reports.label_overlay import LegendEntry, class_colours, draw_labels, with_legend
from ttd_plugins.segmenting import segment
from ttd_plugins.utils.files import write_atomic

PHOTOGRAPHS = (
    "000000078499.jpg", "000000121647.jpg", "000000252639.jpg", "000000358083.jpg", "000000084284.jpg",
    "000000525891.jpg", "000000442450.jpg", "000000408805.jpg", "000000174632.jpg", "000000216794.jpg",
)  # fmt: skip
COLUMNS, WIDTH, QUALITY = 2, 240, 80


def true_labels(content: dict[str, Any], name: str) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the classes of a photograph, and the index of each pixel: 0, or that of the class plus one."""
    image = next(one for one in content["images"] if one["file_name"] == name)
    titles = {one["id"]: one["name"] for one in content["categories"]}
    own = [one for one in content["annotations"] if one["image_id"] == image["id"]]
    names = list(dict.fromkeys(titles[one["category_id"]] for one in own))
    labels = np.zeros((image["height"], image["width"]), np.int64)
    # Large objects first, so that they do not hide small ones.
    for one in sorted(own, key=lambda one: -one["area"]):
        mask = annotation_mask(one["segmentation"], *labels.shape)
        labels[mask] = 1 + names.index(titles[one["category_id"]])
    return names, labels


def scores(found: NDArray[np.integer], truth: NDArray[np.integer], count: int) -> tuple[float, float]:
    """Pixel accuracy, and mean IoU over the classes and the background."""
    ious = []
    for index in range(count):
        union = ((found == index) | (truth == index)).sum()
        if (truth == index).any():
            ious.append(((found == index) & (truth == index)).sum() / union)
    return float((found == truth).mean()), float(np.mean(ious))


def scaled(image: NDArray[np.uint8], width: int) -> Image.Image:
    """An image at a width."""
    whole = Image.fromarray(image)
    return whole.resize((width, round(whole.height * width / whole.width)), Image.Resampling.LANCZOS)


def block(
    image: NDArray[np.uint8], truth: NDArray[np.integer], found: NDArray[np.integer], names: list[str]
) -> Image.Image:
    """A photograph, its true masks and those of the segmentation side by side, with a legend."""
    count = len(names) + 1
    parts = [image, draw_labels(image, truth, count), draw_labels(image, found, count)]
    images = [scaled(part, WIDTH) for part in parts]
    row = Image.new("RGB", (3 * WIDTH + 8, images[0].height), "white")
    for number, one in enumerate(images):
        row.paste(one, (number * (WIDTH + 4), 0))
    colours = class_colours(count)
    entries = [LegendEntry(name, tuple(colours[index].tolist())) for index, name in enumerate(names, 1)]
    return Image.fromarray(with_legend(np.asarray(row), entries))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the drawing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("segmenting.jpg"))
    parser.add_argument("--backbone", default="open_clip:photo")
    parser.add_argument("--photographs", type=int, default=len(PHOTOGRAPHS), help="number of photographs")
    options = parser.parse_args(arguments)
    from ttd_plugins import load

    backbone = load(options.backbone)
    content = json.loads((PHOTOGRAPHS_FOLDER / "instances.json").read_text(encoding="utf-8"))
    blocks = []
    totals = []
    for name in PHOTOGRAPHS[: options.photographs]:
        names, truth = true_labels(content, name)
        start = time.process_time()
        found = segment(backbone, PHOTOGRAPHS_FOLDER / "images" / name, names)
        accuracy, miou = scores(found.labels, truth, len(names) + 1)
        totals.append((accuracy, miou))
        seconds = time.process_time() - start
        print(f"{name}: accuracy {accuracy:.2f}, mIoU {miou:.2f}, {seconds:.1f} s of CPU time; {', '.join(names)}")
        blocks.append(block(found.image, truth, found.labels, names))
    print("mean: accuracy {:.2f}, mIoU {:.2f}".format(*np.mean(totals, 0)))
    # Blocks go to the shorter column.
    heights = [0] * COLUMNS
    places = []
    for one in blocks:
        column = int(np.argmin(heights))
        places.append((column, heights[column]))
        heights[column] += one.height + 10
    sheet = Image.new("RGB", (COLUMNS * (3 * WIDTH + 8) + (COLUMNS - 1) * 24, max(heights)), "white")
    for one, (column, top) in zip(blocks, places, strict=True):
        sheet.paste(one, (column * (3 * WIDTH + 8 + 24), top))
    buffer = BytesIO()
    sheet.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    write_atomic(options.out, buffer.getvalue())
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
