"""The photographs that come with the package: complete, small, attributed, and readable as a dataset."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from ttd_plugins.embedded import PHOTOGRAPHS_FOLDER
from ttd_plugins.embedded.photo_examples import EXAMPLES, photograph
from ttd_plugins.evaluation.datasets import open_captions


def test_every_photograph_is_small_and_attributed() -> None:
    content = json.loads((PHOTOGRAPHS_FOLDER / "captions.json").read_text(encoding="utf-8"))
    attribution = (PHOTOGRAPHS_FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    names = {"CC BY 2.0", "CC BY-SA 2.0"}
    assert {licence["name"] for licence in content["licenses"]} == names
    licences = {licence["id"]: licence["name"] for licence in content["licenses"]}
    files = sorted(path.name for path in (PHOTOGRAPHS_FOLDER / "images").iterdir())
    assert files == sorted(image["file_name"] for image in content["images"])
    assert len(files) >= 24
    for image in content["images"]:
        with Image.open(PHOTOGRAPHS_FOLDER / "images" / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"])
            assert max(opened.size) <= 360
        (row,) = [line for line in attribution.splitlines() if f"`{image['file_name']}`" in line]
        assert f"[{licences[image['license']]}]" in row and "https://www.flickr.com/photo.gne?id=" in row


def test_captions_and_masks_are_read_by_the_evaluation() -> None:
    reader = open_captions("coco_captions", PHOTOGRAPHS_FOLDER)
    instances = json.loads((PHOTOGRAPHS_FOLDER / "instances.json").read_text(encoding="utf-8"))
    keys = reader.keys()
    images = [reader.read(key) for key in keys]
    assert len(images) >= 24
    assert all(len(image.captions) == 5 and all(image.captions) for image in images)
    # Scaling keeps the polygons on the image, and their area.
    sizes = {image["id"]: (image["width"], image["height"]) for image in instances["images"]}
    for annotation in instances["annotations"]:
        width, height = sizes[annotation["image_id"]]
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, dict):
            assert sum(segmentation["counts"]) == width * height
            assert segmentation["size"] == [height, width]
            continue
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in segmentation])
        assert (points >= 0).all() and (points <= (width + 1, height + 1)).all()
        assert 0 < annotation["area"] <= width * height


def test_the_examples_are_photographs_of_the_package_with_captions_of_theirs() -> None:
    content = json.loads((PHOTOGRAPHS_FOLDER / "captions.json").read_text(encoding="utf-8"))
    ids = {image["file_name"]: image["id"] for image in content["images"]}
    for number, (name, caption) in enumerate(EXAMPLES):
        assert caption in [a["caption"] for a in content["annotations"] if a["image_id"] == ids[name]]
        image, shown = photograph(number + len(EXAMPLES))
        assert (image.mode, shown) == ("RGB", caption)
