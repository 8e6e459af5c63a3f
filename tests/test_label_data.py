"""Data of multi-label classification and lists of classes: downloads and tables of one's own, right and wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.evaluation.datasets import DatasetError, LabelData, open_labels
from ttd_plugins.evaluation.datasets.class_lists import BUILT_IN, assign_sources, open_classes, read_class_list

VOC = [item.name for item in open_classes("voc20")]


def picture(file: Path, height: int = 4, width: int = 6) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    return file


def write(file: Path, content: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    return file


def shown(data: LabelData) -> dict[str, list[str]]:
    """The names of the classes that each image shows."""
    return {
        key: [item.name for item, label in zip(data.classes, data.labels(key), strict=True) if label == 1]
        for key in data.keys()  # noqa: SIM118
    }


# PASCAL VOC -----------------------------------------------------------------------------------------------------------


def voc(root: Path, year: str, split: str, labels: dict[str, dict[str, int]]) -> Path:
    base = root / f"VOCdevkit/VOC{year}"
    for name in labels:
        picture(base / f"JPEGImages/{name}.jpg")
    for item in VOC:
        lines = "".join(f"{name} {row.get(item, -1):>2}\n" for name, row in labels.items())
        write(base / f"ImageSets/Main/{item}_{split}.txt", lines)
    return root


def test_voc_has_twenty_classes_and_leaves_difficult_objects_open(tmp_path: Path) -> None:
    root = voc(tmp_path, "2007", "test", {"000001": {"dog": 1, "person": 0}, "000002": {"sofa": 1}, "000003": {}})
    for place in (root, root / "VOCdevkit/VOC2007"):
        data = open_labels("voc2007", place)
        data.check()
        assert shown(data) == {"000001": ["dog"], "000002": ["sofa"], "000003": []}
        assert data.labels("000001")[VOC.index("person")] == -1
        assert data.labels("000002")[VOC.index("person")] == 0
    assert list(open_labels("voc2007", root, limit=2).keys()) == ["000001", "000002"]
    assert "couch" in {text for item in data.classes for text in item.texts}
    with pytest.raises(DatasetError, match="VOC2012"):
        open_labels("voc2012", root)
    with pytest.raises(DatasetError, match=r"aeroplane_val\.txt"):
        open_labels("voc2007", root, split="val")


def test_lists_of_voc_that_disagree_are_refused(tmp_path: Path) -> None:
    root = voc(tmp_path, "2012", "val", {"a": {"dog": 1}, "b": {}})
    file = root / "VOCdevkit/VOC2012/ImageSets/Main/cow_val.txt"
    for content, reason in (("a 1\n", "other images"), ("a 2\nb 1\n", "not the name of an image"), ("a\nb\n", "1, 0")):
        file.write_text(content)
        with pytest.raises(DatasetError, match=reason):
            open_labels("voc2012", root)
    voc(tmp_path, "2012", "val", {"a": {}, "b": {}})
    with pytest.raises(DatasetError, match="none of the 2 images"):
        open_labels("voc2012", root).require_truth()
    (root / "VOCdevkit/VOC2012/JPEGImages/b.jpg").unlink()
    with pytest.raises(DatasetError, match=r"b\.jpg"):
        open_labels("voc2012", root).check()


# COCO -----------------------------------------------------------------------------------------------------------------


def coco(root: Path, categories: Sequence[tuple[int, str]], annotations: Sequence[dict[str, Any]]) -> Path:
    content = {
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}, {"id": 9, "file_name": "c.jpg"}],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "annotations": [{"id": index, **one} for index, one in enumerate(annotations)],
    }
    return write(root, json.dumps(content))


def test_coco_instances_and_crowds_are_labels_and_masks_are_not_needed(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / f"images/{name}.jpg")
    coco(
        tmp_path / "instances.json",
        [(18, "dog"), (1, "person"), (5, "my robot")],
        [
            {"image_id": 7, "category_id": 18},
            {"image_id": "7", "category_id": 1, "iscrowd": 1},
            {"image_id": 3, "category_id": 5, "segmentation": "nonsense"},
        ],
    )
    data = open_labels("coco", tmp_path)
    data.check()
    assert [item.name for item in data.classes] == ["person", "my robot", "dog"]
    assert shown(data) == {"a": ["my robot"], "b": ["person", "dog"], "c": []}
    assert data.classes[0].texts[:2] == ("person", "man") and data.classes[1].texts == ("my robot",)
    picked = open_labels("coco", tmp_path, classes=write(tmp_path / "few.txt", "pet, dog\n"))
    assert shown(picked) == {"a": [], "b": ["pet"], "c": []}


def test_the_coco_download_of_both_years(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / f"val2014/{name}.jpg")
    coco(tmp_path / "annotations/instances_val2014.json", [(18, "dog")], [{"image_id": 9, "category_id": 18}])
    assert shown(open_labels("coco", tmp_path)) == {"a": [], "b": [], "c": ["dog"]}
    with pytest.raises(DatasetError, match="instances_train2017"):
        open_labels("coco", tmp_path, split="train")
    coco(tmp_path / "annotations/instances_val2014.json", [(18, "dog")], [{"image_id": 9, "category_id": 4}])
    with pytest.raises(DatasetError, match="category id 4"):
        open_labels("coco", tmp_path)


def test_masks_are_labels_too_and_classes_can_be_drawn_from_them(tmp_path: Path) -> None:
    for name, values in (("a", (1, 18, 0)), ("b", (62, 63, 187)), ("c", (189, 189, 189))):
        picture(tmp_path / f"images/{name}.png", 1, 3)
        (tmp_path / "semantic_masks").mkdir(exist_ok=True)
        Image.fromarray(np.array([values], np.uint8)).save(tmp_path / f"semantic_masks/{name}.png")
    data = open_labels("coco_panoptic", tmp_path)
    assert len(data.classes) == 133
    assert shown(data) == {"a": ["person", "dog"], "b": ["chair", "couch", "sky-other-merged"], "c": ["table-merged"]}
    things = open_labels("coco_panoptic", tmp_path, classes="coco_things")
    assert len(things.classes) == 80 and shown(things) == {"a": ["person", "dog"], "b": ["chair", "couch"], "c": []}
    # COCO's stuff "table" is no dining table, although VOC's class has that alias.
    assert shown(open_labels("coco_panoptic", tmp_path, classes="voc"))["c"] == []
    assert shown(open_labels("coco_panoptic", tmp_path, classes="voc"))["b"] == ["chair", "sofa"]


# NUS-WIDE -------------------------------------------------------------------------------------------------------------


def nus_wide(root: Path) -> Path:
    write(root / "ConceptsList/Concepts81.txt", "sky\nnighttime\nplants\n")
    write(root / "ImageList/TestImagelist.txt", "actor\\0001_21.jpg\nbeach\\0002_22.jpg\nbeach\\0003_23.jpg\n\n")
    for concept, values in (("sky", "1 0 1"), ("nighttime", "0 0 1"), ("plants", "0 1 0")):
        write(root / f"Groundtruth/TrainTestLabels/Labels_{concept}_Test.txt", values.replace(" ", "\n") + "\n")
    picture(root / "Flickr/actor/0001_21.jpg")
    picture(root / "Flickr/beach/0003_23.jpg")
    return root


def test_nus_wide_and_its_lost_images(tmp_path: Path) -> None:
    root = nus_wide(tmp_path)
    with pytest.raises(DatasetError, match=r"0002_22\.jpg"):
        open_labels("nus_wide", root).check()
    data = open_labels("nus_wide", root, skip_missing=True)
    data.check()
    assert shown(data) == {"actor/0001_21": ["sky"], "beach/0003_23": ["sky", "nighttime"]}
    assert data.describe()["missing"] == 1
    with pytest.raises(InputError, match="split"):
        open_labels("nus_wide", root, split="val")
    (root / "Groundtruth/TrainTestLabels/Labels_sky_Test.txt").write_text("1\n0\n")
    with pytest.raises(DatasetError, match="2 lines"):
        open_labels("nus_wide", root)


# Tables ---------------------------------------------------------------------------------------------------------------


def table(folder: Path, content: str, name: str = "labels.csv") -> Path:
    for number in "123":
        picture(folder / f"{number}.jpg")
    return write(folder / name, content)


EXPECTED = {"1": ["Cat", "dog"], "2": ["Cat"], "3": []}
FORMS = {
    "labels.csv": "image,labels\n1.jpg,dog;Cat\n2.jpg,Cat\n3.jpg,\n",
    "bars.csv": 'file_name,tags\n1.jpg,dog|Cat|dog\n2.jpg," cat "\n3.jpg,nan\n',
    "commas.csv": "image;label\n1.jpg;dog,Cat\n2.jpg;Cat\n3.jpg;\n",
    "python.csv": "filepath,label\n1.jpg,\"['dog', 'Cat']\"\n2.jpg,['Cat']\n3.jpg,[]\n",
    "json.csv": 'path,classes\n1.jpg,"[""dog"", ""Cat""]"\n2.jpg,"[""Cat""]"\n3.jpg,\n',
    "long.csv": "image,label\n1.jpg,dog\n2.jpg,Cat\n1.jpg,CAT\n3.jpg,\n",
    "tabs.tsv": "image\tlabels\n1.jpg\tdog;Cat\n2.jpg\tCat\n3.jpg\t\n",
    "bare.tsv": "1.jpg\tdog;Cat\n2.jpg\tCat\n3.jpg\t\n",
    "wide.csv": "image,dog,Cat\n1.jpg,1,1\n2.jpg,0,1\n3.jpg,0,0\n",
    "truth.csv": "image,dog,Cat\n1.jpg,True,True\n2.jpg,False,True\n3.jpg,False,False\n",
    "lines.jsonl": '{"image": "1.jpg", "labels": ["dog", "Cat"]}\n{"image": "2.jpg", "labels": "Cat"}\n'
    '{"image": "3.jpg", "labels": []}\n',
    "ids.jsonl": '{"image": "1.jpg", "labels": ["dog", "Cat"], "score": 1}\n{"image": "2.jpg", "labels": ["Cat"]}\n'
    '{"image": "3.jpg", "labels": null}\n',
    "excel.csv": "\ufeffsep=;\nimage;labels\n1.jpg;dog|Cat\n2.jpg;Cat\n3.jpg;\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_tables_in_every_form_say_the_same(tmp_path: Path, name: str) -> None:
    data = open_labels("table", table(tmp_path, FORMS[name], name))
    data.check()
    data.require_truth()
    assert {key: [label.casefold() for label in labels] for key, labels in shown(data).items()} == {
        key: [label.casefold() for label in labels] for key, labels in EXPECTED.items()
    }


def test_a_folder_with_labels_csv_and_a_table_of_parquet(tmp_path: Path) -> None:
    table(tmp_path, FORMS["labels.csv"])
    assert shown(open_labels("table", tmp_path)) == EXPECTED
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    columns = {"image": ["1.jpg", "2.jpg", "3.jpg"], "labels": [["dog", "Cat"], ["Cat"], []]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert shown(open_labels("table", tmp_path / "t.parquet")) == EXPECTED


def test_an_empty_cell_of_a_column_of_a_class_is_unknown(tmp_path: Path) -> None:
    data = open_labels("table", table(tmp_path, "image,dog,cat\n1.jpg,1,\n2.jpg,,0\n3.jpg,0,1\n"))
    assert [data.labels(key).tolist() for key in "123"] == [[-1, 1], [0, -1], [1, 0]]


def test_a_list_of_classes_orders_them_and_knows_aliases_and_ids(tmp_path: Path) -> None:
    names = write(tmp_path / "names.csv", "name,id,aliases\nlynx,4,\ndog,7,hound;puppy\ncat,9,\nbackground,0,\n")
    data = open_labels("table", table(tmp_path, "image,label\n1.jpg,Puppy;9\n2.jpg,CAT\n3.jpg,\n"), classes=names)
    assert [item.name for item in data.classes] == ["lynx", "dog", "cat"]
    assert shown(data) == {"1": ["dog", "cat"], "2": ["cat"], "3": []}
    with pytest.raises(DatasetError, match="'horse', which is not in the list"):
        open_labels("table", table(tmp_path, "image,label\n1.jpg,horse\n"), classes=names)


def test_splits_of_a_table_are_chosen_and_never_mixed(tmp_path: Path) -> None:
    file = table(tmp_path, "filepath,label,split_name\n1.jpg,dog,train\n2.jpg,cat,val\n3.jpg,cat,val\n")
    assert list(open_labels("table", file, split="val").keys()) == ["2", "3"]
    assert len(open_labels("table", file, split="all")) == 3
    with pytest.raises(InputError, match="choose one"):
        open_labels("table", file)
    with pytest.raises(InputError, match=r"did you mean|known: train, val"):
        open_labels("table", file, split="test")
    with pytest.raises(InputError, match="no column of splits"):
        open_labels("table", table(tmp_path, FORMS["labels.csv"]), split="val")


def test_images_of_a_table_elsewhere_missing_and_in_windows_paths(tmp_path: Path) -> None:
    for number in "12":
        picture(tmp_path / f"photos/deep/{number}.jpg")
    file = write(tmp_path / "lists/labels.csv", "image,labels\ndeep\\1.jpg,dog\ndeep\\2.jpg,cat\ndeep\\3.jpg,cat\n")
    for more in ({}, {"images": tmp_path / "photos"}):
        data = open_labels("table", file, skip_missing=True, **more)
        data.check()
        assert len(data) == 2 and data.describe()["missing"] == 1
        with pytest.raises(DatasetError, match=r"3\.jpg"):
            open_labels("table", file, **more).check()
    with pytest.raises(InputError, match="does not exist"):
        open_labels("table", file, images=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("image,labels\n", "no rows"),
        ("image,labels\n1.jpg,\n2.jpg,\n", "no label in any row"),
        ("photo,labels\n1.jpg,dog\n", "image-column"),
        ("image,comment\n1.jpg,nice dog\n", "label-column"),
        ("image,labels\n,dog\n", "row 1 has no path"),
        ("image,labels\n1.jpg,dog,cat\n", "row 1 has 3 columns"),
        ("image,dog,cat\n1.jpg,1,2\n", "neither 0 nor 1"),
        ('image,labels\n1.jpg,"[{1: 2}]"\n', "row 1"),
        ("image\n1.jpg\n", "column of labels"),
    ],
)
def test_wrong_tables_are_refused_in_one_sentence(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        open_labels("table", table(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        open_labels("table", tmp_path / "none.csv")
    with pytest.raises(DatasetError, match="looked for"):
        open_labels("table", tmp_path)
    with pytest.raises(DatasetError, match="no table"):
        open_labels("table", picture(tmp_path / "a.png"))
    with pytest.raises(InputError, match="unknown data set of labels"):
        open_labels("tabel", tmp_path)
    with pytest.raises(InputError, match="does not accept"):
        open_labels("coco_panoptic", tmp_path, label_column="x")


anything = st.text(st.characters(codec="utf-8"), max_size=60)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=anything, suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".txt"]))
def test_a_table_of_anything_is_read_or_refused(tmp_path: Path, content: str, suffix: str) -> None:
    file = tmp_path / f"t{suffix}"
    file.write_text(f"image,labels\n{content}", encoding="utf-8")
    data, reason = None, ""
    try:
        data = open_labels("table", file)
    except TTDError as error:
        reason = str(error)
    assert "\n" not in reason
    assert data is None or (len(data) and len(data.classes))


# Lists of classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "# pets\nbackground\n\ndog, puppy\nsofa_bed, couch\n"),
        ("b.csv", "name,aliases\nbackground,\ndog,puppy\nsofa_bed,couch\n"),
        ("c.tsv", "class\tsynonyms\nbackground\t\ndog\tpuppy\nsofa_bed\tcouch\n"),
        ("d.json", '["background", {"name": "dog", "aliases": ["puppy"]}, {"name": "sofa_bed", "aliases": "couch"}]'),
        ("e.csv", "\ufeffname;aliases\nbackground;\ndog;puppy\nsofa_bed;couch\n"),
    ],
)
def test_lists_of_classes_in_every_form(tmp_path: Path, name: str, content: str) -> None:
    found = read_class_list(write(tmp_path / name, content))
    assert [item.name for item in found] == ["background", "dog", "sofa_bed"]
    assert [item.texts for item in found] == [("background",), ("dog", "puppy"), ("sofa bed", "couch")]
    assert all(item.id is None and item.colour is None for item in found)


def test_ids_and_colours_in_every_form(tmp_path: Path) -> None:
    for name, content in {
        "a.txt": "0: background\n7: dog, puppy\n255: void\n",
        "b.csv": "name,id,aliases\nbackground,0,\ndog,7,puppy\nvoid,255,\n",
        "c.json": '{"background": 0, "dog": 7, "void": 255}',
        "d.json": '{"categories": [{"id": 0, "name": "background"}, {"id": 7, "name": "dog"}, '
        '{"id": 255, "name": "void"}]}',
    }.items():
        found = read_class_list(write(tmp_path / name, content))
        assert [(item.name, item.id, item.ignored) for item in found] == [
            ("background", 0, False), ("dog", 7, False), ("void", 255, True),
        ]  # fmt: skip
    for name, content in {
        "labelmap.txt": "# label:color_rgb:parts:actions\nbackground:0,0,0::\ndog:128,192,0::\n",
        "f.csv": "name,color\nbackground,#000000\ndog,80C000\n",
        "g.csv": 'name,colour\nbackground,0 0 0\ndog,"128,192,0"\n',
        "h.json": '[{"name": "background", "color": [0, 0, 0]}, {"name": "dog", "color": [128, 192, 0]}]',
    }.items():
        found = read_class_list(write(tmp_path / name, content))
        assert [(item.name, item.colour) for item in found] == [("background", (0, 0, 0)), ("dog", (128, 192, 0))]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", "", "no class"),
        ("a.txt", "void\n", "no class"),
        ("a.txt", "dog\nDOG\n", "twice"),
        ("a.txt", ", puppy\n", "has no name"),
        ("a.csv", "names\ndog\n", "column name"),
        ("a.csv", "name,id\ndog,1\ncat,1\n", "id 1 twice"),
        ("a.csv", "name,id\ndog,one\n", "whole number"),
        ("a.csv", "name,id\ndog,-1\n", "negative"),
        ("a.csv", "name,colour\ndog,red\n", "no|colour"),
        ("a.csv", "name,colour\ndog,300 0 0\n", "colour"),
        ("a.csv", "name,id\ndog,1,2\n", "3 cells"),
        ("a.json", "{", "cannot be read"),
        ("a.json", "[1]", "neither a name"),
        ("a.json", '{"dog": "one"}', "names to ids"),
        ("a.json", '[{"id": 1}]', "has no name"),
    ],
)
def test_wrong_lists_of_classes_are_refused(tmp_path: Path, name: str, content: str, reason: str) -> None:
    with pytest.raises(DatasetError, match=reason) as caught:
        read_class_list(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=anything, suffix=st.sampled_from([".txt", ".csv", ".tsv", ".json"]), head=st.sampled_from(["", "name,id\n"])
)
def test_a_list_of_anything_is_read_or_refused(tmp_path: Path, content: str, suffix: str, head: str) -> None:
    file = write(tmp_path / f"list{suffix}", head + content)
    found, reason = (), ""
    try:
        found = read_class_list(file)
    except DatasetError as error:
        reason = str(error)
    assert "\n" not in reason and bool(reason) != bool(found)
    assert all(item.texts and item.texts[0] for item in found if not item.ignored)


def test_known_lists_have_their_sizes_and_unknown_ones_are_refused() -> None:
    sizes = {name: len(open_classes(name)) for name in BUILT_IN}
    assert sizes == {
        "voc": 21, "voc20": 20, "context60": 60, "context59": 59, "ade20k": 150, "cityscapes": 19, "coco_stuff": 171,
        "coco_object": 81, "coco_things": 80, "coco_panoptic": 133,
    }  # fmt: skip
    with pytest.raises(InputError, match="neither a file"):
        open_classes("vocc")


def test_every_class_of_voc_is_drawn_from_one_of_coco() -> None:
    coco_names = [item.name for item in open_classes("coco_panoptic")]
    taken = assign_sources(open_classes("voc"), coco_names)
    assert len(taken) == 20 and sorted(taken.values()) == list(range(1, 21))
    voc_names = [item.name for item in open_classes("voc")]
    pairs = {voc_names[index]: coco_names[source] for source, index in taken.items()}
    renamed = {name: source for name, source in pairs.items() if name != source}
    assert renamed == {
        "aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle", "sofa": "couch",
        "pottedplant": "potted plant", "tvmonitor": "tv",
    }  # fmt: skip
    with pytest.raises(InputError, match="takes 'wolf'"):
        assign_sources([*open_classes("voc"), read_class_list_of("name,from\npet,dog;wolf\n")], coco_names)


def read_class_list_of(content: str) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return read_class_list(write(Path(folder) / "a.csv", content))[0]


def test_categories_of_one_name_are_refused_and_labels_may_be_numbers(tmp_path: Path) -> None:
    coco(tmp_path / "c/instances.json", [(1, "dog"), (2, "dog")], [{"image_id": 7, "category_id": 1}])
    (tmp_path / "c/images").mkdir()
    with pytest.raises(DatasetError, match="one name"):
        open_labels("coco", tmp_path / "c")
    lines = '{"image": "1.jpg", "labels": [0, 2]}\n{"image": "2.jpg", "labels": 1}\n{"image": "3.jpg", "labels": []}\n'
    names = write(tmp_path / "names.txt", "lynx\ndog\ncat\n")
    data = open_labels("table", table(tmp_path, lines, "t.jsonl"), classes=names)
    assert shown(data) == {"1": ["lynx", "cat"], "2": ["dog"], "3": []}
