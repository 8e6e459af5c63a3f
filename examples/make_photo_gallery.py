"""Make the photographs that come with the package from a folder of COCO captions and instances.

    python examples/make_photo_gallery.py COCO_FOLDER

Takes the photographs under CC BY or CC BY-SA (ids 4 and 5 of COCO's licences), scales them to at most 360 pixels, and
writes them with their captions and masks in COCO's format, and ``ATTRIBUTION.md`` with source and licence of each.
"""

from __future__ import annotations

import argparse
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttd_plugins.embedded import PHOTOGRAPHS_FOLDER
from ttd_plugins.embedded.photo_examples import source_page
from ttd_plugins.utils.files import make_folder, write_atomic

SIDE, QUALITY = 360, 85
LICENCES = {
    4: ("CC BY 2.0", "https://creativecommons.org/licenses/by/2.0/"),
    5: ("CC BY-SA 2.0", "https://creativecommons.org/licenses/by-sa/2.0/"),
}


def decoded(counts: list[int], height: int, width: int) -> NDArray[np.uint8]:
    """Mask ``[height, width]`` of COCO's uncompressed run lengths, which run down the columns."""
    values = np.repeat(np.arange(len(counts)) % 2, counts).astype(np.uint8)
    return values.reshape(width, height).T


def encoded(mask: NDArray[np.uint8]) -> list[int]:
    """COCO's uncompressed run lengths of a mask; the first run is of zeros."""
    flat = mask.T.reshape(-1)
    borders = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], borders, [len(flat)]])).tolist()
    return [0, *runs] if flat[0] else runs


def scaled(segmentation: Any, factor: float, size: tuple[int, int]) -> Any:
    """A polygon or run-length segmentation for the image scaled by ``factor`` to ``size`` (width, height)."""
    if isinstance(segmentation, list):
        return [[round(value * factor, 1) for value in polygon] for polygon in segmentation]
    height, width = segmentation["size"]
    mask = Image.fromarray(decoded(segmentation["counts"], height, width))
    small = np.asarray(mask.resize(size, Image.Resampling.NEAREST))
    return {"size": [size[1], size[0]], "counts": encoded(small)}


def main() -> None:
    """Write the folder of photographs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with images/, captions.json and instances.json")
    parser.add_argument("--out", type=Path, default=PHOTOGRAPHS_FOLDER)
    options = parser.parse_args()
    captions = json.loads((options.source / "captions.json").read_text(encoding="utf-8"))
    instances = json.loads((options.source / "instances.json").read_text(encoding="utf-8"))
    chosen = sorted((image for image in captions["images"] if image["license"] in LICENCES), key=lambda i: i["id"])
    make_folder(options.out / "images")
    sizes: dict[int, tuple[float, tuple[int, int]]] = {}
    images, rows = [], []
    for image in chosen:
        with Image.open(options.source / "images" / image["file_name"], formats=("JPEG",)) as opened:
            factor = min(1.0, SIDE / max(opened.size))
            size = (round(opened.width * factor), round(opened.height * factor))
            buffer = BytesIO()
            opened.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=QUALITY)
        write_atomic(options.out / "images" / image["file_name"], buffer.getvalue())
        sizes[image["id"]] = (factor, size)
        kept = {key: image[key] for key in ("id", "file_name", "license", "flickr_url")}
        images.append({**kept, "width": size[0], "height": size[1]})
        name, url = LICENCES[image["license"]]
        rows.append(f"| `{image['file_name']}` | [Flickr]({source_page(image['flickr_url'])}) | [{name}]({url}) |")

    texts = [
        {"image_id": a["image_id"], "id": a["id"], "caption": a["caption"].strip()}
        for a in captions["annotations"]
        if a["image_id"] in sizes
    ]
    masks = []
    for annotation in instances["annotations"]:
        if annotation["image_id"] not in sizes:
            continue
        factor, size = sizes[annotation["image_id"]]
        masks.append(
            {
                "image_id": annotation["image_id"],
                "id": annotation["id"],
                "category_id": annotation["category_id"],
                "iscrowd": annotation["iscrowd"],
                "segmentation": scaled(annotation["segmentation"], factor, size),
                "bbox": [round(value * factor, 1) for value in annotation["bbox"]],
                "area": round(annotation["area"] * factor**2, 1),
            }
        )
    licenses = [{"id": number, "name": name, "url": url} for number, (name, url) in LICENCES.items()]
    head = {"licenses": licenses, "images": images}
    write_atomic(options.out / "captions.json", json.dumps({**head, "annotations": texts}, separators=(",", ":")))
    content = {**head, "categories": instances["categories"], "annotations": masks}
    write_atomic(options.out / "instances.json", json.dumps(content, separators=(",", ":")))
    lines = [
        "# Photographs",
        "",
        f"{len(images)} photographs of COCO train2017, scaled to at most {SIDE} pixels by",
        "`examples/make_photo_gallery.py`. Each is under the licence in its row; its page on Flickr names the author.",
        "Captions and masks: COCO (https://cocodataset.org), CC BY 4.0; the masks are scaled with the photographs.",
        "",
        "| file | source and author | licence |",
        "|---|---|---|",
        *rows,
    ]
    write_atomic(options.out / "ATTRIBUTION.md", "\n".join(lines) + "\n")
    print(f"{len(images)} photographs, {len(texts)} captions and {len(masks)} masks are in {options.out}")


if __name__ == "__main__":
    main()
