"""Evaluation data: each image has its own key and masks, annotations are matched or refused, and truth is needed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_evaluation_data import HEIGHT, WIDTH, grey, ids, picture, runs_of, text
from toy_backbone import toy

from ttd_plugins.data.images import read_image, turn_upright
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.datasets import DatasetError, open_captions, open_segmentation
from ttd_plugins.evaluation.datasets.coco_masks import polygon_mask, rle_mask
from ttd_plugins.evaluation.dense_inference import DenseOptions
from ttd_plugins.evaluation.protocols import TagProtocol, TextProtocol, evaluate_segment, evaluate_tags, evaluate_text

NAMES = ["a/1.jpg", "b/1.jpg", "a/2.jpg", "b/2.jpg"]
SHOWN = dict(zip(NAMES, (1, 18, 17, 3), strict=True))
WORDS = {1: "person", 18: "dog", 17: "cat", 3: "car"}


def annotations_of(number: int, name: str, category: int) -> dict[str, Any]:
    return {
        "id": number, "image_id": number, "caption": f"a {WORDS[category]}", "category_id": category, "iscrowd": 0,
        "segmentation": [[0, 0, number, 0, number, HEIGHT, 0, HEIGHT]], "file_name": name.replace(".jpg", ".png"),
        "segments_info": [{"id": 7, "category_id": category}],
    }  # fmt: skip


def content(names: dict[str, int]) -> dict[str, Any]:
    size = {"height": HEIGHT, "width": WIDTH}
    return {
        "images": [{"id": number, "file_name": name, **size} for number, name in enumerate(names, 1)],
        "annotations": [annotations_of(number, *pair) for number, pair in enumerate(names.items(), 1)],
        "categories": [{"id": number, "name": word} for number, word in WORDS.items()],
    }


def nested(root: Path, kind: str, names: dict[str, int] = SHOWN) -> dict[str, Any]:
    """Captions of images in folders, with masks of a kind."""
    whole = content(names)
    for name, category in names.items():
        folder = "val2017" if kind == "panoptic" else "images"
        picture(root / folder / name)
        if kind == "dense":
            grey((root / "semantic_masks" / name).with_suffix(".png"), ids(category))
        if kind == "panoptic":
            grey((root / "annotations/panoptic_val2017" / name).with_suffix(".png"), ids(7))
    if kind == "panoptic":
        text(root / "annotations/captions_val2017.json", json.dumps(whole))
        text(root / "annotations/panoptic_val2017.json", json.dumps(whole))
    else:
        text(root / "captions.json", json.dumps(whole))
    if kind == "instances":
        text(root / "instances.json", json.dumps(whole))
    return whole


@pytest.mark.parametrize("kind", ["dense", "panoptic", "instances"])
def test_images_of_one_name_in_two_folders(tmp_path: Path, kind: str) -> None:
    nested(tmp_path, kind)
    data = open_captions("coco_captions", tmp_path)
    data.check()
    assert len(data) == len(set(data.keys())) == 4
    for key in data.keys():  # noqa: SIM118
        item = data.read(key)
        name = str(item.path.relative_to(item.path.parents[1]))
        word = WORDS[SHOWN[name]]
        assert item.captions[0].caption == f"a {word}" and item.captions[0].true_tags() == [word] == list(item.masks)
        assert item.shown == {word}
    names = {"dense": "coco_panoptic", "panoptic": "coco_panoptic", "instances": "coco_object"}
    segmentation = open_segmentation(names[kind], tmp_path)
    segmentation.check()
    assert set(segmentation.keys()) == set(data.keys())
    for key in segmentation.keys():  # noqa: SIM118
        classes = {segmentation.classes[label].name for label in np.unique(segmentation.labels(key)) if label < 200}
        name = str(segmentation.image_path(key).relative_to(segmentation.image_path(key).parents[1]))
        assert classes - {"background"} == {WORDS[SHOWN[name]]}
    part = open_captions("coco_captions", tmp_path, limit=2)
    assert list(part.keys()) == list(data.keys())[:2]
    result = evaluate_tags(toy(), data, TagProtocol(dense=DenseOptions(size=16)))
    assert result.done == 4 and result.metrics is not None and result.metrics["positives"] == 4


def test_keys_of_a_flat_folder_stay(tmp_path: Path) -> None:
    nested(tmp_path, "dense", {"2.jpg": 1, "1.jpg": 18})
    assert list(open_captions("coco_captions", tmp_path).keys()) == ["1", "2"]


def test_two_images_with_one_mask_are_refused(tmp_path: Path) -> None:
    nested(tmp_path, "dense", {"1.jpg": 1, "2.jpg": 18})
    picture(tmp_path / "images/1.PNG")
    with pytest.raises(DatasetError, match=r"images .*1\.PNG' and .*1\.jpg' of coco_panoptic have the same mask"):
        open_segmentation("coco_panoptic", tmp_path)


def test_other_suffixes_are_not_left_out(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.JPEG", "3.Png", "4.webp", "5.bmp"):
        picture(tmp_path / "images" / name)
        grey(tmp_path / "semantic_masks" / f"{name[0]}.png", ids(1))
    data = open_segmentation("coco_panoptic", tmp_path)
    data.check()
    assert list(data.keys()) == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("kind", ["dense", "panoptic", "instances"])
def test_ids_that_are_strings_are_matched(tmp_path: Path, kind: str) -> None:
    whole = nested(tmp_path, kind)
    for annotation in whole["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    for file in tmp_path.rglob("*.json"):
        file.write_text(json.dumps(whole))
    data = open_captions("coco_captions", tmp_path)
    data.check()
    assert [len(data.read(key).captions[0].true_tags()) for key in data.keys()] == [1] * 4  # noqa: SIM118


@pytest.mark.parametrize("file", ["captions.json", "instances.json"])
@pytest.mark.parametrize(("value", "said"), [(99, "refers to the image 99"), ([1], "neither a number nor a text")])
def test_annotations_of_no_image_are_refused(tmp_path: Path, file: str, value: Any, said: str) -> None:
    whole = nested(tmp_path, "instances")
    whole["annotations"][2]["image_id"] = value
    (tmp_path / file).write_text(json.dumps(whole))
    with pytest.raises(DatasetError, match=said):
        open_captions("coco_captions", tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": [{"id": 1, "file_name": "a.jpg"}] * 2}, "two images have the id 1"),
        ({"images": [{"id": n, "file_name": "a.jpg"} for n in (1, 2, 3, 4)]}, r"lists the image 'a\.jpg' twice"),
        ({"images": [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2, 3, 4)]}, "states no valid height and width"),
        ({"annotations": []}, "has no annotation"),
        ({"annotations": {}}, "not a COCO instances file"),
    ],
)
def test_instances_that_are_otherwise_are_told(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    whole = nested(tmp_path, "instances")
    (tmp_path / "instances.json").write_text(json.dumps(whole | change))
    for number in (1, 2, 3, 4):
        picture(tmp_path / "images" / f"{number}.jpg")
    with pytest.raises(DatasetError, match=said):
        open_segmentation("coco_object", tmp_path).check()


def test_an_image_without_panoptic_annotation_is_told(tmp_path: Path) -> None:
    whole = nested(tmp_path, "panoptic")
    whole["annotations"].pop()
    text(tmp_path / "annotations/panoptic_val2017.json", json.dumps(whole))
    with pytest.raises(DatasetError, match=r"has no annotation of 1 of its images, such as 'b/2\.jpg'"):
        open_segmentation("coco_panoptic", tmp_path)


def test_captions_that_are_no_texts_are_told(tmp_path: Path) -> None:
    whole = nested(tmp_path, "dense")
    whole["annotations"][1]["caption"] = None
    text(tmp_path / "captions.json", json.dumps(whole))
    with pytest.raises(DatasetError, match="the caption of annotation 2 is not a text"):
        open_captions("coco_captions", tmp_path)


def test_tag_masks_in_folders(tmp_path: Path) -> None:
    for name in ("a/1", "b/1"):
        picture(tmp_path / f"image/{name}.jpg")
        text(
            tmp_path / f"json_refined/{name}.json",
            json.dumps({"caption": f"a {name[0]}dog", "tags": [f"{name[0]}dog"]}),
        )
        grey(tmp_path / f"mask_using_HQ-SAM/{name}.png", ids(1, 0))
    data = open_captions("cc3m_tagmask", tmp_path)
    data.check()
    assert {key: data.read(key).captions[0].true_tags() for key in data.keys()} == {"a/1": ["adog"], "b/1": ["bdog"]}  # noqa: SIM118
    picture(tmp_path / "image/a/1.png")
    with pytest.raises(DatasetError, match=r"1\.jpg' and .*1\.png' have the same annotations"):
        open_captions("cc3m_tagmask", tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_named_pipes_and_loops_block_no_evaluation(tmp_path: Path) -> None:
    nested(tmp_path, "dense")
    (tmp_path / "images" / "loop").symlink_to(".")
    assert len(open_segmentation("coco_panoptic", tmp_path)) == 4
    for place in ("images/a/1.jpg", "semantic_masks/a/1.png", "captions.json"):
        (tmp_path / place).unlink()
        os.mkfifo(tmp_path / place)
        with pytest.raises(DatasetError, match="is a named pipe, not a regular file"):
            open_captions("coco_captions", tmp_path).check()


# Truth ---------------------------------------------------------------------------------------------------------------


def test_captions_without_truth_are_an_error(tmp_path: Path) -> None:
    nested(tmp_path, "dense")
    for name in NAMES:
        grey((tmp_path / "semantic_masks" / name).with_suffix(".png"), ids(200))
    data = open_captions("coco_captions", tmp_path)
    for evaluation in (
        lambda: evaluate_tags(toy(), data, TagProtocol(dense=DenseOptions(size=16))),
        lambda: evaluate_text(toy(), data, TextProtocol(dense=DenseOptions(size=16))),
    ):
        with pytest.raises(DatasetError, match=r"no caption of the 4 images .* names anything that its image shows"):
            evaluation()


def test_masks_without_truth_are_an_error(tmp_path: Path) -> None:
    nested(tmp_path, "dense")
    for name in NAMES:
        grey((tmp_path / "semantic_masks" / name).with_suffix(".png"), ids(0))
    with pytest.raises(DatasetError, match="no pixel of the 4 images of coco_panoptic"):
        evaluate_segment(toy(), open_segmentation("coco_panoptic", tmp_path))


def test_tags_without_a_true_candidate_are_an_error(tmp_path: Path) -> None:
    nested(tmp_path, "dense")
    options = TagProtocol(dense=DenseOptions(size=16), extractor_options={"stop_words": list(WORDS.values())})
    with pytest.raises(InputError, match=r"none of the .* candidate tags of 4 captions is a true tag"):
        evaluate_tags(toy(), open_captions("coco_captions", tmp_path), options)


# Turned photographs --------------------------------------------------------------------------------------------------


def turned(file: Path, orientation: int) -> None:
    """A picture, stored as HEIGHT by WIDTH, of which the first two columns are white."""
    values = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    values[:, :2] = 255
    values[0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(file, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_turn_with_their_image(tmp_path: Path, orientation: int) -> None:
    turned(tmp_path / "images/1.png", orientation)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, :2] = mask[0] = True
    polygons = [[0, 0, 2, 0, 2, HEIGHT, 0, HEIGHT], [0, 0, WIDTH, 0, WIDTH, 1, 0, 1]]
    seen = np.asarray(read_image(tmp_path / "images/1.png"))[..., 0] > 0
    np.testing.assert_array_equal(turn_upright(mask, orientation), seen)
    stored = {"height": HEIGHT, "width": WIDTH}
    for segmentation in (polygons, {"size": [HEIGHT, WIDTH], "counts": runs_of(mask)}):
        annotation = annotations_of(1, "1.png", 1) | {"segmentation": segmentation}
        whole = content({"1.png": 1}) | {
            "annotations": [annotation],
            "images": [{"id": 1, "file_name": "1.png", **stored}],
        }
        for name in ("captions.json", "instances.json"):
            text(tmp_path / name, json.dumps(whole))
        captions = open_captions("coco_captions", tmp_path)
        captions.check()
        np.testing.assert_array_equal(captions.read("1").masks["person"], seen)
        segments = open_segmentation("coco_object", tmp_path)
        segments.check()
        np.testing.assert_array_equal(segments.labels("1") > 0, seen)


def test_masks_of_the_upright_size_are_upright(tmp_path: Path) -> None:
    turned(tmp_path / "images/1.png", 6)
    whole = content({"1.png": 1})
    whole["images"][0] |= {"height": WIDTH, "width": HEIGHT}
    whole["annotations"][0]["segmentation"] = [[0, 0, 2, 0, 2, 3, 0, 3]]
    text(tmp_path / "instances.json", json.dumps(whole))
    labels = open_segmentation("coco_object", tmp_path).labels("1")
    assert labels.shape == (WIDTH, HEIGHT) and np.argwhere(labels).tolist() == [
        [y, x] for y in range(3) for x in range(2)
    ]


def test_impossible_outlines_are_refused() -> None:
    for wrong in ([0, 0, 1e12, 0, 1, 1], [0, 0, float("nan"), 0, 1, 1], [0, 0, float("inf"), 0, 1, 1]):
        with pytest.raises(ValueError, match="far outside"):
            polygon_mask(wrong, 4, 6)
    with pytest.raises(ValueError, match="more than 60 bits"):
        rle_mask("o" * 100_000, 4, 6)


@pytest.mark.parametrize("name", ["", ".", "/", "x" * 300 + ".jpg", "a\0.jpg", "../..", None, 5])
def test_file_names_that_no_file_can_have_are_told(tmp_path: Path, name: Any) -> None:
    for kind in ("instances", "dense", "panoptic"):
        whole = nested(tmp_path / kind, kind)
        whole["images"][0]["file_name"] = name
        for file in (tmp_path / kind).rglob("*.json"):
            file.write_text(json.dumps(whole))
        with pytest.raises(DatasetError):
            open_captions("coco_captions", tmp_path / kind).check()


@pytest.mark.parametrize("tag", ["x" * 300, "a\0b", "../dog"])
def test_tags_that_no_file_can_be_named_after_are_told(tmp_path: Path, tag: str) -> None:
    picture(tmp_path / "image/1.jpg")
    text(tmp_path / "json_refined/1.json", json.dumps({"caption": "a dog", "tags": [tag]}))
    (tmp_path / "mask_using_HQ-SAM").mkdir()
    with pytest.raises(DatasetError, match=r"the mask of the tag .* is missing"):
        open_captions("cc3m_tagmask", tmp_path).check()
