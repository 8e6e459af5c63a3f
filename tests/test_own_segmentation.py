"""Segmentation and label sets of one's own, made by the documentation's words, and folders in every usual form."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_backbone import toy
from typer.testing import CliRunner

from ttd_plugins import cli
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation import evaluate
from ttd_plugins.evaluation.datasets import DatasetError, open_labels, open_segmentation
from ttd_plugins.evaluation.dense_inference import DenseOptions
from ttd_plugins.evaluation.metrics import IGNORE
from ttd_plugins.evaluation.protocols import SegmentProtocol, evaluate_segment

DOCS = Path(__file__).resolve().parents[1] / "docs" / "own-data.md"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
HEIGHT, WIDTH = 4, 6
VALUES = np.array([[0, 0, 1, 1, 2, 2]] * 3 + [[0, 0, 1, 1, 2, 255]], np.uint8)
LIST = "background\ndog, puppy\nsofa, couch\n"


def picture(file: Path, height: int = HEIGHT, width: int = WIDTH) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    return file


def mask(file: Path, values: Any = VALUES) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(file)
    return file


def write(file: Path, content: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    return file


def own_set(root: Path, names: tuple[str, ...] = ("one", "two"), listed: str = LIST) -> Path:
    for name in names:
        picture(root / f"images/{name}.jpg")
        mask(root / f"masks/{name}.png")
    write(root / "classes.txt", listed)
    return root


# By the documentation alone -------------------------------------------------------------------------------------------


def documented(heading: str) -> list[tuple[str, str]]:
    """Language and content of the code blocks of a section."""
    text = DOCS.read_text(encoding="utf-8")
    section = re.split(r"^#{2,3} ", text.split(f"## {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^```(\w+)\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)


def run(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    program, *arguments = command.split()
    assert program == "ttd"
    result = CliRunner().invoke(cli.app, [*arguments, "--backbone", "open_clip:tiny", "--json"])
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout[result.stdout.index("{") :]))


def test_a_segmentation_set_is_made_by_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, tree), (_, classes), (_, command) = documented("Masks")
    files = [line.strip() for line in tree.splitlines()[1:]]
    assert tree.splitlines()[0] == "my_set/"
    ids = [int(line.split(",")[1]) for line in classes.splitlines()[1:]]
    for name in files:
        if name.startswith("images/"):
            picture(tmp_path / "my_set" / name, 30, 40)
        elif name.startswith("masks/"):
            values = np.repeat(np.repeat(np.array([ids], np.uint8), 10, axis=1), 30, axis=0)
            mask(tmp_path / "my_set" / name, values)
    (listed,) = (name for name in files if "/" not in name)
    write(tmp_path / "my_set" / listed, classes)
    found = run(command.strip(), tmp_path, monkeypatch)
    assert found["images"] == 2 and set(found["figures"]["classes"]) == {"background", "dog", "sofa"}
    assert found["figures"]["present"] == 3 and 0 <= found["figures"]["miou"] <= 1
    assert found["settings"]["names"]["dog"] == ["dog", "puppy", "hound"]


def test_colours_are_listed_by_the_documentation(tmp_path: Path) -> None:
    (_, classes) = documented("The list of classes")[0]
    codes = [line.split("#")[1] for line in classes.splitlines()[1:]]
    colours = np.array([[[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in codes] * 2] * 4, np.uint8)
    picture(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/a.png", colours)
    write(tmp_path / "classes.csv", classes)
    data = open_segmentation("folder", tmp_path)
    data.check()
    assert data.labels("a").tolist() == [[0, 1, IGNORE, 0, 1, IGNORE]] * 4


def test_a_table_of_labels_is_made_by_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, table), (_, command) = documented("Labels of images")
    for line in table.splitlines()[1:]:
        picture(tmp_path / line.split(",")[0], 30, 40)
    write(tmp_path / "my_labels.csv", table)
    found = run(command.strip(), tmp_path, monkeypatch)
    assert found["images"] == 3 and list(found["figures"]["classes"]) == ["cat", "dog", "sofa"]
    assert found["figures"]["classes"]["dog"]["positives"] == 1
    assert 0 < found["figures"]["pixel"]["map"] <= 1


# Forms of a folder ----------------------------------------------------------------------------------------------------


def test_a_folder_of_grey_masks(tmp_path: Path) -> None:
    data = open_segmentation("folder", own_set(tmp_path))
    data.check()
    data.require_truth()
    assert list(data.keys()) == ["one", "two"] and data.background == 0
    assert [item.texts for item in data.classes] == [("background",), ("dog", "puppy"), ("sofa", "couch")]
    np.testing.assert_array_equal(data.labels("one"), VALUES)
    assert len(open_segmentation("folder", tmp_path, limit=1)) == 1
    assert [item.name for item in open_labels("folder", tmp_path).classes] == ["dog", "sofa"]


def palette_mask(file: Path) -> None:
    image = Image.fromarray(VALUES, mode="P")
    image.putpalette(list(range(256)) * 3)
    image.save(file)


@pytest.mark.parametrize(
    ("images", "masks", "name", "save"),
    [
        ("image", "mask", "one_mask.png", mask),
        ("img", "annotations", "one.bmp", mask),
        ("JPEGImages", "SegmentationClass", "one.png", lambda file: palette_mask(file)),
        ("images", "labels", "one_gt.tif", mask),
        ("images", "masks", "one.png", lambda file: mask(file, np.stack([VALUES] * 3, axis=2))),
    ],
)
def test_usual_names_and_formats_say_the_same(tmp_path: Path, images: str, masks: str, name: str, save: Any) -> None:
    picture(tmp_path / images / "one.jpg")
    (tmp_path / masks).mkdir()
    save(tmp_path / masks / name)
    write(tmp_path / "classes.txt", LIST)
    data = open_segmentation("folder", tmp_path)
    data.check()
    np.testing.assert_array_equal(data.labels("one"), VALUES)


def test_ids_ignored_values_and_a_class_of_the_value_255(tmp_path: Path) -> None:
    root = own_set(tmp_path, ("one",), "5: dog\n9: sofa\n")
    mask(root / "masks/one.png", np.where(VALUES == 1, 5, np.where(VALUES == 2, 9, 255)))
    data = open_segmentation("folder", root)
    assert data.background is None
    np.testing.assert_array_equal(np.unique(data.labels("one")), [0, 1, IGNORE])
    write(root / "classes.txt", "0: background\n255: dog\n")
    mask(root / "masks/one.png", np.where(VALUES == 1, 255, 0))
    np.testing.assert_array_equal(open_segmentation("folder", root).labels("one"), VALUES == 1)
    mask(root / "masks/one.png", np.where(VALUES == 1, 255, 7))
    data = open_segmentation("folder", root, ignore=7)
    np.testing.assert_array_equal(data.labels("one"), np.where(VALUES == 1, 1, IGNORE))


def test_splits_are_subfolders_or_lists_of_names(tmp_path: Path) -> None:
    root = own_set(tmp_path / "lists", ("one", "two", "three"))
    write(root / "val.txt", "two\nimages.jpg\n".replace("images.jpg", "three.jpg"))
    assert list(open_segmentation("folder", root, split="val").keys()) == ["three", "two"]
    assert len(open_segmentation("folder", root)) == 3
    write(root / "val.txt", "four\n")
    with pytest.raises(DatasetError, match="'four'"):
        open_segmentation("folder", root, split="val")
    with pytest.raises(DatasetError, match="no split 'test'"):
        open_segmentation("folder", root, split="test")
    with pytest.raises(InputError, match="no name"):
        open_segmentation("folder", root, split="../x")
    root = tmp_path / "folders"
    for split, name in (("train", "one"), ("val", "two")):
        picture(root / f"images/{split}/{name}.jpg")
        mask(root / f"masks/{split}/{name}.png")
    write(root / "classes.txt", LIST)
    assert list(open_segmentation("folder", root).keys()) == ["two"]
    assert list(open_segmentation("folder", root, split="train").keys()) == ["one"]


def test_the_list_of_classes_may_be_elsewhere_or_a_known_one(tmp_path: Path) -> None:
    root = own_set(tmp_path / "set")
    (root / "classes.txt").rename(tmp_path / "names.txt")
    with pytest.raises(DatasetError, match=r"classes\.txt with one name a line"):
        open_segmentation("folder", root)
    assert len(open_segmentation("folder", root, classes=tmp_path / "names.txt").classes) == 3
    assert [item.name for item in open_segmentation("folder", root, classes="voc").classes][:2] == [
        "background", "aeroplane",
    ]  # fmt: skip
    # With a list of its own, --classes selects from it.
    own_set(root)
    picked = open_segmentation("folder", root, classes=write(tmp_path / "few.txt", "sofa\n"))
    np.testing.assert_array_equal(picked.labels("one"), np.where(VALUES == 2, 0, IGNORE))


def test_wrong_folders_are_refused_with_the_path(tmp_path: Path) -> None:
    root = own_set(tmp_path)

    def refused(reason: str, **options: Any) -> None:
        with pytest.raises(InputError, match=reason) as caught:
            open_segmentation("folder", root, **options).check()
        assert "\n" not in str(caught.value)

    refused("limit must be", limit=0)
    refused("ignore must be", ignore=-1)
    mask(root / "masks/one.png", np.full((HEIGHT, WIDTH), 3))
    refused(r"one\.png.*contains the id 3")
    mask(root / "masks/one.png", np.zeros((2, 2)))
    refused(r"is 2 x 2 pixels, but its image")
    (root / "masks/one.png").unlink()
    refused(r"one\.jpg' has no mask")
    Image.fromarray(VALUES).save(root / "masks/one.jpg")
    refused("JPEG")
    mask(root / "masks/one.png")
    mask(root / "masks/one.bmp")
    refused("have one name")
    (root / "masks/one.bmp").unlink()
    picture(root / "images/one.png")
    refused("have the same mask")
    (root / "images/one.png").unlink()
    write(root / "classes.json", "[]")
    refused("several lists of classes")
    (root / "classes.json").unlink()
    write(root / "classes.csv", "name,colour\nbackground,#000000\n")
    (root / "classes.txt").unlink()
    refused("contains the colour #010101")
    write(root / "classes.csv", "name,id\n" + "".join(f"c{number},{number}\n" for number in range(300)))
    refused("more than 255")
    write(root / "classes.csv", "name\nbackground\n")
    (root / "masks").rename(root / "elsewhere")
    refused("no masks; looked for masks")


# Selected classes -----------------------------------------------------------------------------------------------------


def test_selected_classes_are_the_same_as_masks_painted_anew(tmp_path: Path) -> None:
    """Metrics of drawn classes equal those of a set whose masks were mapped by hand."""
    root = own_set(tmp_path / "a", listed="background\ndog\nsofa\n")
    names = write(tmp_path / "pets.csv", "name,aliases,from\nbackground,,\nanimal,dog;creature,\nseat,,sofa\n")
    other = own_set(tmp_path / "b", listed="background\nanimal, dog, creature\nseat\n")
    options = SegmentProtocol(dense=DenseOptions(size=16), templates="none", background="auto")
    drawn = evaluate_segment(toy(), open_segmentation("folder", root, classes=names), options)
    painted = evaluate_segment(toy(), open_segmentation("folder", other), options)
    assert drawn.metrics == painted.metrics and drawn.metrics is not None and drawn.metrics["present"] == 3
    assert drawn.settings["data"]["selected_classes"] == str(names)
    with pytest.raises(InputError, match="is a class of folder"):
        open_segmentation("folder", root, classes=write(tmp_path / "none.txt", "zebra\n"))


def test_evaluate_draws_classes_for_data_by_name_only(tmp_path: Path) -> None:
    root = own_set(tmp_path)
    options: dict[str, Any] = {"size": 16, "preset": "fast", "templates": "none"}
    result = evaluate(toy(), f"folder:{root}", protocol="segment", classes="voc", **options)
    assert result.metrics is not None and len(result.metrics["classes"]) == 21
    labels = evaluate(toy(), f"folder:{root}", protocol="classify", classes="voc", **options)
    assert labels.metrics is not None and labels.metrics["present"] == 2
    with pytest.raises(InputError, match="by name"):
        evaluate(toy(), open_segmentation("folder", root), protocol="segment", classes="voc", **options)
    with pytest.raises(InputError, match="segment and classify"):
        evaluate(toy(), f"coco_captions:{root}", protocol="tags", classes="voc")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
def test_classes_of_voc_on_photographs_with_the_masks_of_coco() -> None:
    data = open_segmentation("coco_panoptic", SHARED / "coco_dense_a", classes="voc")
    data.check()
    seen = {int(index) for key in data.keys() for index in np.unique(data.labels(key))}  # noqa: SIM118
    names = [item.name for item in data.classes]
    assert {"background", "person", "sofa", "tvmonitor"} <= {names[index] for index in seen - {IGNORE}}
