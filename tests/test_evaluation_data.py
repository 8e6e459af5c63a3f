"""Readers of data sets on miniatures in exactly the layouts and encodings of the downloads, right and wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.datasets import (
    SEGMENTATION,
    CocoCaptions,
    DatasetError,
    SegmentationData,
    TagMask,
    open_captions,
    open_segmentation,
)
from ttd_plugins.evaluation.datasets.coco_masks import annotation_mask, decode_counts, polygon_mask, rle_mask
from ttd_plugins.evaluation.datasets.segmentation import voc_palette
from ttd_plugins.evaluation.metrics import IGNORE

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
HEIGHT, WIDTH = 4, 6
Array = np.ndarray[Any, Any]


def picture(file: Path, height: int = HEIGHT, width: int = WIDTH) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    return file


def grey(file: Path, values: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(file)
    return file


def palette(file: Path, values: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8), mode="P")
    image.putpalette(voc_palette().ravel().tolist())
    image.save(file)
    return file


def text(file: Path, content: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return file


def ids(*values: int) -> Array:
    """A mask that begins with these pixel values and repeats the last."""
    flat = np.full(HEIGHT * WIDTH, values[-1])
    flat[: len(values)] = values
    return flat.reshape(HEIGHT, WIDTH)


# Each miniature writes its layout below a folder and returns the reader's name, the mask file, and what the first
# pixels of the mask mean: (value written, class name, or None for void).
Miniature = Callable[[Path], tuple[str, Path, list[tuple[int, str | None]]]]


def voc(root: Path) -> tuple[str, Path, list[tuple[int, str | None]]]:
    base = root / "VOCdevkit" / "VOC2012"
    text(base / "ImageSets/Segmentation/val.txt", "2007_000033\n")
    picture(base / "JPEGImages/2007_000033.jpg")
    mask = palette(base / "SegmentationClass/2007_000033.png", ids(0, 1, 15, 20, 255))
    return "voc", mask, [(0, "background"), (1, "aeroplane"), (15, "person"), (20, "tvmonitor"), (255, None)]


def voc_repackaged(root: Path) -> tuple[str, Path, list[tuple[int, str | None]]]:
    base = root / "validation"
    picture(base / "image/2007_000033.jpg")
    text(base / "xml/2007_000033.xml", "<annotation><object><name>person</name></object></annotation>")
    mask = palette(base / "mask/2007_000033.png", ids(0, 9, 11, 255))
    return "voc", mask, [(0, "background"), (9, "chair"), (11, "diningtable"), (255, None)]


def context60(root: Path) -> tuple[str, Path, list[tuple[int, str | None]]]:
    base = root / "VOC2010"
    text(base / "ImageSets/SegmentationContext/val.txt", "2008_000002\n")
    picture(base / "JPEGImages/2008_000002.jpg")
    mask = grey(base / "SegmentationClassContext/2008_000002.png", ids(0, 1, 2, 6, 59))
    return "context60", mask, [(0, "background"), (1, "aeroplane"), (2, "bag"), (6, "bicycle"), (59, "wood")]


def context59(root: Path) -> tuple[str, Path, list[tuple[int, str | None]]]:
    _, mask, meant = context60(root)
    return "context59", mask, [(0, None), *meant[1:]]


def ade20k(root: Path) -> tuple[str, Path, list[tuple[int, str | None]]]:
    base = root / "ADEChallengeData2016"
    picture(base / "images/validation/ADE_val_00000001.jpg")
    mask = grey(base / "annotations/validation/ADE_val_00000001.png", ids(0, 1, 13, 150))
    return "ade20k", mask, [(0, None), (1, "wall"), (13, "person"), (150, "flag")]


def cityscapes(root: Path) -> tuple[str, Path, list[tuple[int, str | None]]]:
    stem = "frankfurt_000000_000294"
    picture(root / f"leftImg8bit/val/frankfurt/{stem}_leftImg8bit.png")
    mask = grey(root / f"gtFine/val/frankfurt/{stem}_gtFine_labelIds.png", ids(0, 7, 8, 16, 24, 33))
    return "cityscapes", mask, [
        (0, None), (7, "road"), (8, "sidewalk"), (16, None), (24, "person"), (33, "bicycle"),
    ]  # fmt: skip


def cityscapes_converted(root: Path) -> tuple[str, Path, list[tuple[int, str | None]]]:
    cityscapes(root)
    mask = root / "gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelTrainIds.png"
    return "cityscapes", grey(mask, ids(0, 11, 18, 255)), [(0, "road"), (11, "person"), (18, "bicycle"), (255, None)]


def coco_stuff(root: Path) -> tuple[str, Path, list[tuple[int, str | None]]]:
    picture(root / "val2017/000000000139.jpg")
    mask = grey(root / "stuffthingmaps_trainval2017/val2017/000000000139.png", ids(0, 12, 89, 91, 181, 255))
    # Values are ids less one, and the ids skip eleven numbers.
    return "coco_stuff", mask, [
        (0, "person"), (12, "stop sign"), (89, "toothbrush"), (91, "banner"), (181, "wood"), (255, None),
    ]  # fmt: skip


def coco_stuff_converted(root: Path) -> tuple[str, Path, list[tuple[int, str | None]]]:
    picture(root / "images/val2017/000000000139.jpg")
    grey(root / "annotations/val2017/000000000139.png", ids(0, 12, 181))
    mask = grey(root / "annotations/val2017/000000000139_labelTrainIds.png", ids(0, 11, 80, 170, 255))
    return "coco_stuff", mask, [(0, "person"), (11, "stop sign"), (80, "banner"), (170, "wood"), (255, None)]


def coco_object(root: Path) -> tuple[str, Path, list[tuple[int, str | None]]]:
    picture(root / "images/val2017/000000000139.jpg")
    mask = grey(root / "annotations/val2017/000000000139_instanceTrainIds.png", ids(0, 1, 12, 80))
    return "coco_object", mask, [(0, "background"), (1, "person"), (12, "stop sign"), (80, "toothbrush")]


def coco_object_of_stuff(root: Path) -> tuple[str, Path, list[tuple[int, str | None]]]:
    _, mask, _ = coco_stuff(root)
    return "coco_object", mask, [
        (0, "person"), (12, "stop sign"), (89, "toothbrush"), (91, "background"), (255, "background"),
    ]  # fmt: skip


def coco_panoptic(root: Path) -> tuple[str, Path, list[tuple[int, str | None]]]:
    picture(root / "images/000000000139.jpg")
    mask = grey(root / "semantic_masks/000000000139.png", ids(0, 1, 90, 92, 200))
    return "coco_panoptic", mask, [(0, None), (1, "person"), (90, "toothbrush"), (92, "banner"), (200, "rug-merged")]


MINIATURES: list[Miniature] = [
    voc, voc_repackaged, context60, context59, ade20k, cityscapes, cityscapes_converted, coco_stuff,
    coco_stuff_converted, coco_object, coco_object_of_stuff, coco_panoptic,
]  # fmt: skip


@pytest.mark.parametrize("miniature", MINIATURES)
def test_the_encodings_of_a_layout_are_read_as_its_classes(miniature: Miniature, tmp_path: Path) -> None:
    name, mask, meant = miniature(tmp_path)
    with Image.open(mask) as image:
        size, mode = image.size, image.mode
    values = ids(*(value for value, _ in meant))
    (palette if mode == "P" else grey)(mask, values)
    data = open_segmentation(name, tmp_path)
    done: list[int] = []
    data.check(progress=done.append)
    assert len(data) == 1 and sum(done) == 1 and size == (WIDTH, HEIGHT)
    (key,) = data.keys()
    labels = data.labels(key)
    assert labels.dtype == np.uint8 and labels.shape == (HEIGHT, WIDTH)
    names = [None if label == IGNORE else data.classes[label].name for label in labels.ravel()[: len(meant)]]
    assert names == [name for _, name in meant]
    assert data.image_path(key).is_file()
    assert data.describe()["images"] == 1
    background = [names.name for names in data.classes].index("background") if data.background is not None else None
    assert data.background == background


@pytest.mark.parametrize("miniature", MINIATURES)
def test_an_unknown_id_is_told_with_the_path(miniature: Miniature, tmp_path: Path) -> None:
    name, mask, _ = miniature(tmp_path)
    grey(mask, ids(0, 222))
    with pytest.raises(DatasetError, match=f"{mask.name}' contains the id 222, which is not an id of {name}"):
        open_segmentation(name, tmp_path).check()


@pytest.mark.parametrize("miniature", MINIATURES)
def test_a_mask_of_another_size_is_told_with_both_paths(miniature: Miniature, tmp_path: Path) -> None:
    name, mask, _ = miniature(tmp_path)
    grey(mask, np.full((HEIGHT, WIDTH + 1), 1))
    with pytest.raises(DatasetError, match=rf"{mask.name}' is 7 x 4 pixels, but its image .* is 6 x 4"):
        open_segmentation(name, tmp_path).check()


@pytest.mark.parametrize("miniature", [voc, voc_repackaged, context60, ade20k, cityscapes, coco_panoptic])
def test_a_missing_mask_is_told_with_its_path(miniature: Miniature, tmp_path: Path) -> None:
    name, mask, _ = miniature(tmp_path)
    mask.unlink()
    with pytest.raises(DatasetError, match=f"the mask .*{mask.name}' of {name} is missing"):
        open_segmentation(name, tmp_path).check()


@pytest.mark.parametrize("name", sorted(SEGMENTATION))
def test_an_empty_folder_and_an_absent_one_are_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=str(tmp_path)):
        open_segmentation(name, tmp_path)
    with pytest.raises(DatasetError, match=r"the folder .* does not exist"):
        open_segmentation(name, tmp_path / "absent")
    if name == "folder":  # the layout of one's own data has no such split
        return
    (tmp_path / "validation/image").mkdir(parents=True)
    (tmp_path / "validation/mask").mkdir()
    with pytest.raises(DatasetError, match=f"the split 'val' of {name} in .* has no images"):
        open_segmentation(name, tmp_path)


def test_an_empty_list_and_a_missing_picture_are_told(tmp_path: Path) -> None:
    voc(tmp_path)
    listed = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    listed.write_text("2007_000033\n2007_000042\n")
    with pytest.raises(DatasetError, match=r"the image .*2007_000042.jpg' of voc is missing"):
        open_segmentation("voc", tmp_path).check()
    assert list(open_segmentation("voc", tmp_path, limit=1).keys()) == ["2007_000033"]
    listed.write_text("\n")
    with pytest.raises(DatasetError, match=r"the split 'val' of voc .* has no images"):
        open_segmentation("voc", tmp_path)
    with pytest.raises(DatasetError, match=r"the list .*train.txt' of the split 'train' of voc cannot be read"):
        open_segmentation("voc", tmp_path, split="train")
    listed.write_bytes("café".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"the list .*val.txt' .* of voc cannot be read: it is not UTF-8"):
        open_segmentation("voc", tmp_path)
    listed.write_bytes("2007_000033".encode("utf-8-sig"))
    assert list(open_segmentation("voc", tmp_path).keys()) == ["2007_000033"]


def test_colours_of_the_voc_palette_are_taken_for_their_indices(tmp_path: Path) -> None:
    _, mask, _ = voc(tmp_path)
    assert voc_palette()[[0, 1, 15, 255]].tolist() == [[0, 0, 0], [128, 0, 0], [192, 128, 128], [224, 224, 192]]
    values = ids(0, 1, 15, 20, 255)
    Image.fromarray(voc_palette()[values]).save(mask)
    data = open_segmentation("voc", tmp_path)
    assert data.labels("2007_000033").ravel()[:5].tolist() == [0, 1, 15, 20, IGNORE]
    # Without blue or green a colour's number is as small as an index.
    Image.fromarray(voc_palette()[ids(0, 1)]).save(mask)
    assert data.labels("2007_000033").ravel()[:2].tolist() == [0, 1]
    strange = voc_palette()[values]
    strange[0, 0] = (5, 0, 0)
    Image.fromarray(strange).save(mask)
    with pytest.raises(DatasetError, match="contains the id"):
        data.check()


def test_unknown_names_and_options_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown segmentation data set 'vocc'; did you mean 'voc'"):
        open_segmentation("vocc", tmp_path)
    with pytest.raises(InputError, match="does not accept these options"):
        open_segmentation("voc", tmp_path, splits="val")
    with pytest.raises(InputError, match="unknown split 'foo'"):
        open_segmentation("voc", tmp_path, split="foo")


@pytest.mark.parametrize(("name", "count"), [
    ("voc", 21), ("context59", 59), ("context60", 60), ("ade20k", 150), ("cityscapes", 19), ("coco_stuff", 171),
    ("coco_object", 81), ("coco_panoptic", 133),
])  # fmt: skip
def test_class_lists_are_complete(name: str, count: int) -> None:
    classes = SEGMENTATION[name].classes
    assert len(classes) == len({names.name for names in classes}) == count
    for names in classes:
        assert names.texts and len(set(names.texts)) == len(names.texts)
        assert all(t and t == t.strip() and "-" not in t for t in names.texts), names


def test_panoptic_segment_ids_are_read_through_their_json(tmp_path: Path) -> None:
    picture(tmp_path / "val2017/000000000139.jpg")
    segments = {3226956: 1, 65793: 200}
    code = ids(0, 3226956, 65793)
    rgb = np.stack([code % 256, code // 256 % 256, code // 65536], -1).astype(np.uint8)
    mask = tmp_path / "annotations/panoptic_val2017/000000000139.png"
    mask.parent.mkdir(parents=True)
    Image.fromarray(rgb).save(mask)
    content = {
        "images": [{"id": 139, "file_name": "000000000139.jpg"}],
        "annotations": [
            {
                "image_id": 139,
                "file_name": "000000000139.png",
                "segments_info": [{"id": i, "category_id": c} for i, c in segments.items()],
            }
        ],
    }
    file = text(tmp_path / "annotations/panoptic_val2017.json", json.dumps(content))
    data = open_segmentation("coco_panoptic", tmp_path)
    data.check()
    labels = data.labels("000000000139").ravel()[:3]
    assert labels[0] == IGNORE
    assert [data.classes[label].name for label in labels[1:]] == ["person", "rug-merged"]
    content["annotations"][0]["segments_info"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"contains the segment id 65793, which its JSON does not list"):
        open_segmentation("coco_panoptic", tmp_path).check()


# COCO's masks ---------------------------------------------------------------------------------------------------------


def runs_of(mask: Array) -> list[int]:
    """Uncompressed runs of a mask, down the columns, starting outside."""
    runs, inside, count = [], False, 0
    for value in mask.T.ravel().tolist():
        if value != inside:
            runs.append(count)
            inside, count = value, 0
        count += 1
    return [*runs, count]


def compressed(runs: list[int]) -> str:
    """The string of COCO's API: differences to the run before last, in digits of five bits, low ones first."""
    out = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            digit, value = value & 0x1F, value >> 5
            more = value != -1 if digit & 0x10 else value != 0
            out += chr(48 + (digit | 0x20 if more else digit))
            if not more:
                break
    return out


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1))
def test_run_length_encodings_give_back_their_mask(seed: int, height: int, width: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    mask = np.repeat(rng.random((height, width)) < share, rng.integers(1, 4), axis=0)[:height]
    runs = runs_of(mask)
    np.testing.assert_array_equal(rle_mask(runs, height, width), mask)
    assert decode_counts(compressed(runs)) == runs
    np.testing.assert_array_equal(
        annotation_mask({"size": [height, width], "counts": compressed(runs)}, height, width), mask
    )


def test_a_string_of_coco_is_decoded() -> None:
    # Rows 1 to 2, columns 2 to 4 of 4 x 6: nine pixels outside, then two inside and two outside, three times over.
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    assert runs_of(mask) == [9, 2, 2, 2, 2, 2, 5]
    assert compressed([9, 2, 2, 2, 2, 2, 5]) == "9220003"
    np.testing.assert_array_equal(rle_mask("9220003", 4, 6), mask)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9), st.integers(1, 9))
def test_a_rectangle_covers_its_pixels(left: int, top: int, width: int, height: int) -> None:
    right, bottom = left + width, top + height
    mask = polygon_mask([left, top, right, top, right, bottom, left, bottom], 20, 20)
    expected = np.zeros((20, 20), bool)
    expected[top:bottom, left:right] = True
    np.testing.assert_array_equal(mask, expected)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**31))
def test_a_polygon_agrees_with_asking_each_pixel_away_from_the_border(seed: int) -> None:
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
    corners = 12 + rng.uniform(4, 11, 7)[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    mask = polygon_mask(corners.ravel().tolist(), 24, 24)
    for y in range(24):
        for x in range(24):
            point, crossings, nearest = np.array([x + 0.5, y + 0.5]), 0, np.inf
            for a, b in zip(corners, np.roll(corners, -1, 0), strict=True):
                along = np.clip(((point - a) @ (b - a)) / ((b - a) @ (b - a)), 0, 1)
                nearest = min(nearest, float(np.linalg.norm(a + along * (b - a) - point)))
                if (a[1] > point[1]) != (b[1] > point[1]):
                    crossings += a[0] + (point[1] - a[1]) / (b[1] - a[1]) * (b[0] - a[0]) > point[0]
            if nearest > 1.0:
                assert mask[y, x] == bool(crossings % 2), (x, y)


@pytest.mark.parametrize(("wrong", "match"), [
    ({"size": [3, 6], "counts": [24]}, "has size"),
    ({"size": [4, 6], "counts": [23]}, "cover 23 pixels, and the image has 6 x 4"),
    ({"size": [4, 6], "counts": "P"}, "end inside a number"),
    ([[0, 0, 1, 1]], "three corners"),
    ("9220003", "not a str"),
])  # fmt: skip
def test_what_is_no_segmentation_is_refused(wrong: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        annotation_mask(wrong, 4, 6)


def test_areas_agree_with_those_that_coco_publishes() -> None:
    file = SHARED / "coco_instances_train" / "instances.json"
    if not file.is_file():
        pytest.skip(f"there are no COCO instances in {file.parent}")
    content = json.loads(file.read_text())
    sizes = {info["id"]: (info["height"], info["width"]) for info in content["images"]}
    checked = crowds = 0
    for annotation in content["annotations"][::3] + [a for a in content["annotations"] if a["iscrowd"]]:
        mask = annotation_mask(annotation["segmentation"], *sizes[annotation["image_id"]])
        x, y, w, h = annotation["bbox"]
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        if annotation["iscrowd"]:
            # The areas of crowds are of what the runs were made from; their boxes are exact.
            assert [columns[0], rows[0], columns[-1] - columns[0], rows[-1] - rows[0]] == [x, y, w, h]
        else:
            assert abs(int(mask.sum()) - annotation["area"]) <= 8 + 0.05 * annotation["area"]
            # Slivers narrower than a pixel may fall short of the box, and nothing goes beyond it.
            assert not len(rows) or (columns[0] >= x - 1 and rows[0] >= y - 1)
            assert not len(rows) or (columns[-1] <= x + w and rows[-1] <= y + h)
        checked, crowds = checked + 1, crowds + annotation["iscrowd"]
    assert checked > 200 and crowds == 8 + sum(a["iscrowd"] for a in content["annotations"][::3])


# COCO with instances --------------------------------------------------------------------------------------------------


def instances(root: Path, split: str = "val2017") -> dict[str, Any]:
    """A picture with a person as polygon, a dog inside it, a crowd of cars as RLE, in the layout of the download."""
    picture(root / split / "000000000139.jpg")
    crowd = np.zeros((HEIGHT, WIDTH), bool)
    crowd[:, 3:] = True
    content = {
        "images": [{"id": 139, "file_name": "000000000139.jpg", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 139, "category_id": 18, "iscrowd": 0, "segmentation": [[1, 1, 2, 1, 2, 2, 1, 2]]},
            {"id": 2, "image_id": 139, "category_id": 1, "iscrowd": 0, "segmentation": [[0, 0, 4, 0, 4, 3, 0, 3]]},
            {
                "id": 3, "image_id": 139, "category_id": 3, "iscrowd": 1,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": runs_of(crowd)},
            },
        ],
    }  # fmt: skip
    text(root / f"annotations/instances_{split}.json", json.dumps(content))
    return content


@pytest.mark.parametrize("flat", [False, True])
def test_instances_are_painted_small_over_large_over_crowds(tmp_path: Path, flat: bool) -> None:
    instances(tmp_path)
    if flat:
        (tmp_path / "val2017").rename(tmp_path / "images")
        (tmp_path / "annotations/instances_val2017.json").rename(tmp_path / "instances.json")
    data = open_segmentation("coco_object", tmp_path)
    data.check()
    index = {names.name: i for i, names in enumerate(data.classes)}
    p, d, c = index["person"], index["dog"], index["car"]
    expected = [[p, p, p, p, c, c], [p, d, p, p, c, c], [p, p, p, p, c, c], [0, 0, 0, c, c, c]]
    assert data.labels("000000000139").tolist() == expected


def test_wrong_instances_are_told(tmp_path: Path) -> None:
    content = instances(tmp_path)
    file = tmp_path / "annotations/instances_val2017.json"
    content["annotations"][0]["category_id"] = 99
    file.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"annotation 1 .* has the category id 99, which the file does not list"):
        open_segmentation("coco_object", tmp_path).check()
    content["annotations"][0] |= {"category_id": 1, "segmentation": [[0, 0, 1, 1]]}
    file.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"segmentation of annotation 1 in .* cannot be decoded"):
        open_segmentation("coco_object", tmp_path).check()
    file.write_text("[]")
    with pytest.raises(DatasetError, match="not a COCO instances file"):
        open_segmentation("coco_object", tmp_path)
    file.write_text("{")
    with pytest.raises(DatasetError, match="cannot be read"):
        open_segmentation("coco_object", tmp_path)


# Captions ------------------------------------------------------------------------------------------------------------


def captions(root: Path, *texts: str) -> None:
    content = {
        "images": [{"id": 139, "file_name": "000000000139.jpg"}],
        "annotations": [{"id": i, "image_id": 139, "caption": t} for i, t in enumerate(texts)],
    }
    text(root / "annotations/captions_val2017.json", json.dumps(content))


def test_captions_with_instances(tmp_path: Path) -> None:
    instances(tmp_path)
    captions(tmp_path, "A man walks his dog\non the grass.", "A cat and some animals by a car")
    data = open_captions("coco_captions", tmp_path)
    data.check()
    item = data.read("000000000139")
    first, second = item.captions
    assert first.caption == "A man walks his dog on the grass."
    verdicts = [{m.text: t for m, t in zip(c.mentions, c.true, strict=True)} for c in (first, second)]
    # Grass is no class of instances, and cats are not listed in this file.
    assert verdicts[0] == {"man": True, "dog": True, "grass": None}
    assert verdicts[1] == {"cat": None, "animals": True, "car": True}
    assert first.true_tags() == ["man", "dog"]
    assert int(item.masks["man"].sum()) == 12 and int(item.masks["dog"].sum()) == 1
    assert item.valid is None
    np.testing.assert_array_equal(item.masks["animals"], item.masks["dog"])


def dense_captions(root: Path) -> None:
    picture(root / "images/000000000139.jpg")
    grey(root / "semantic_masks/000000000139.png", ids(0, 1, 1, 18, 193))
    content = {
        "images": [{"id": 139, "file_name": "000000000139.jpg"}],
        "annotations": [{"id": 5, "image_id": 139, "caption": "A woman with a dog and a cat on green grass"}],
    }
    text(root / "captions.json", json.dumps(content))


def test_captions_with_dense_masks(tmp_path: Path) -> None:
    dense_captions(tmp_path)
    data = open_captions("coco_captions", tmp_path)
    data.check()
    item = data.read("000000000139")
    (truth,) = item.captions
    assert {m.text: t for m, t in zip(truth.mentions, truth.true, strict=True)} == {
        "woman": True, "dog": True, "cat": False, "grass": True,
    }  # fmt: skip
    assert item.valid is not None and int((~item.valid).sum()) == 1
    assert int(item.masks["woman"].sum()) == 2 and set(item.masks) == {"woman", "dog", "grass"}
    few = CocoCaptions(tmp_path, min_pixels=2).read("000000000139")
    assert few.captions[0].true_tags() == ["woman", "grass"]


def test_captions_without_masks_or_with_wrong_ones_are_told(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"neither captions.json nor annotations/captions_val2017.json"):
        open_captions("coco_captions", tmp_path)
    dense_captions(tmp_path)
    mask = tmp_path / "semantic_masks/000000000139.png"
    grey(mask, np.ones((HEIGHT + 1, WIDTH)))
    with pytest.raises(DatasetError, match=r"semantic_masks.*states 6 x 5 pixels for the image .* 6 x 4"):
        open_captions("coco_captions", tmp_path).check()
    mask.unlink()
    picture(tmp_path / "images/000000000200.jpg")
    with pytest.raises(DatasetError, match=r"the mask .* is missing"):
        open_captions("coco_captions", tmp_path).check()
    picture(tmp_path / "images/000000000139.jpg").unlink()
    with pytest.raises(DatasetError, match=r"the image .* of coco_captions is missing"):
        open_captions("coco_captions", tmp_path).check()
    (tmp_path / "semantic_masks").rmdir()
    with pytest.raises(DatasetError, match="has captions but no masks"):
        open_captions("coco_captions", tmp_path)
    text(tmp_path / "captions.json", json.dumps({"images": [], "annotations": []}))
    with pytest.raises(DatasetError, match="has no caption"):
        open_captions("coco_captions", tmp_path)


# CC3M-TagMask --------------------------------------------------------------------------------------------------------


def tag_mask(root: Path, key: str = "000012", tags: Any = ("woman", "traffic light")) -> None:
    picture(root / f"image/{key}.jpg")
    content = {"caption": "a woman near a traffic light", "tags": list(tags) if isinstance(tags, tuple) else tags}
    text(root / f"json_refined/{key}.json", json.dumps(content))


@pytest.mark.parametrize("layout", ["folders", "flat", "map"])
def test_tag_mask_in_its_assumed_layouts(layout: str, tmp_path: Path) -> None:
    tag_mask(tmp_path)
    masks = tmp_path / "mask_using_HQ-SAM"
    if layout == "map":
        grey(masks / "000012.png", ids(1, 1, 2, 0))
    else:
        grey(masks / ("000012/woman.png" if layout == "folders" else "000012_woman.png"), ids(255, 255, 0))
        grey(
            masks / ("000012/traffic light.png" if layout == "folders" else "000012_traffic_light.png"), ids(0, 0, 1, 0)
        )
    data = open_captions("cc3m_tagmask", tmp_path)
    data.check()
    item = data.read("000012")
    assert item.captions[0].true_tags() == ["woman", "traffic light"]
    assert {tag: int(mask.sum()) for tag, mask in item.masks.items()} == {"woman": 2, "traffic light": 1}


def test_tag_mask_that_is_otherwise_is_told(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="has no folder 'image'"):
        TagMask(tmp_path)
    for folder in (TagMask.IMAGES, TagMask.JSON, TagMask.MASKS):
        (tmp_path / folder).mkdir()
    with pytest.raises(DatasetError, match=r"has no .json file"):
        TagMask(tmp_path)
    tag_mask(tmp_path, tags={"woman": True, "sky": False})
    data = TagMask(tmp_path)
    with pytest.raises(DatasetError, match=r"the mask of the tag 'woman' is missing; looked for .*woman.png"):
        data.check()
    grey(tmp_path / TagMask.MASKS / "000012/woman.png", np.ones((HEIGHT, 2)))
    with pytest.raises(DatasetError, match=r"mask of 'woman' .* is 2 x 4 pixels, but its image .* is 6 x 4"):
        data.check()
    grey(tmp_path / TagMask.MASKS / "000012.png", ids(0, 2))
    with pytest.raises(DatasetError, match="contains 2, but there are only 1 tags"):
        data.check()
    for content, match in (
        ("[]", "must contain an object"),
        ('{"tags": []}', "no text under"),
        ('{"caption": "a"}', "no list of strings"),
    ):
        text(tmp_path / "json_refined/000012.json", content)
        with pytest.raises(DatasetError, match=match):
            data.check()
    (tmp_path / "image/000012.jpg").unlink()
    with pytest.raises(DatasetError, match=r"the image of .*000012.json' is missing"):
        TagMask(tmp_path)


# Real data -----------------------------------------------------------------------------------------------------------


def test_the_photographs_at_hand_are_read() -> None:
    if not (SHARED / "coco_dense_a").is_dir():
        pytest.skip(f"there are no photographs in {SHARED}")
    data: SegmentationData = open_segmentation("coco_panoptic", SHARED / "coco_dense_a", limit=5)
    data.check()
    assert len(data) == 5
    for name in ("coco_dense_a", "coco_instances_train"):
        reader = open_captions("coco_captions", SHARED / name, limit=5)
        reader.check()
        shown = [truth.true_tags() for key in reader.keys() for truth in reader.read(key).captions]  # noqa: SIM118
        assert len(shown) >= 25 and sum(map(bool, shown)) > 15
