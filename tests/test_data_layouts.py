"""Layouts of image-text pairs that other projects write, and files that are not what their names say."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers_pairs import make_pairs, picture_bytes, tar_of, tiny

from ttd_plugins.data import PairLoader, open_pairs
from ttd_plugins.errors import InputError, TTDError

PICTURE = picture_bytes(0)


def read(spec: Any, **options: Any) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The captions of each image that is read, and what is listed as skipped."""
    loader = PairLoader(open_pairs(spec, **options), tiny, batch_size=1, captions="all", shuffle=False)
    found: dict[str, list[str]] = {}
    # Nothing usable is an error; what was skipped is listed all the same.
    with contextlib.suppress(TTDError):
        for batch, _ in loader.epoch(0):
            found.setdefault(batch.groups[0], []).append(batch.captions[0])
    return found, loader.skipped.reasons


def pictures(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture_bytes(number))


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


# Lists of images -----------------------------------------------------------------------------------------------------


def test_karpathy_splits(tmp_path: Path) -> None:
    pictures(tmp_path, "val2014/a.jpg", "val2014/b.jpg", "train2014/c.jpg")
    images = [
        {"filepath": folder, "filename": name, "split": split, "sentences": [{"raw": f"{name} {n}"} for n in range(2)]}
        for folder, name, split in (
            ("val2014", "a.jpg", "test"), ("val2014", "b.jpg", "restval"), ("train2014", "c.jpg", "train"),
        )
    ]  # fmt: skip
    file = write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    train = {"val2014/b.jpg": ["b.jpg 0", "b.jpg 1"], "train2014/c.jpg": ["c.jpg 0", "c.jpg 1"]}
    assert read(file) == (train, {})
    assert read(tmp_path) == (train, {})
    assert read(file, split="test")[0] == {"val2014/a.jpg": ["a.jpg 0", "a.jpg 1"]}
    assert len(read(file, split="all")[0]) == 3
    with pytest.raises(InputError, match="unknown split 'vol'"):
        open_pairs(file, split="vol")
    write(file, {"images": [image | {"split": s} for image, s in zip(images, ("test", "val", "val"), strict=True)]})
    with pytest.raises(InputError, match=r"the splits test, val; choose one with split="):
        open_pairs(file)


def test_karpathy_splits_without_a_folder_find_the_images_near_them(tmp_path: Path) -> None:
    pictures(tmp_path, "Flicker8k_Dataset/a.jpg")
    images = [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "one"}]}]
    assert read(write(tmp_path / "text" / "dataset_flickr8k.json", {"images": images}))[0] == {"a.jpg": ["one"]}


@pytest.mark.parametrize(
    "content",
    [
        [{"image": "a.jpg", "caption": "one"}, {"image": "b.jpg", "caption": ["two", "three"]}],
        [{"image": name, "caption": text} for name, text in (("a.jpg", "one"), ("b.jpg", "two"), ("b.jpg", "three"))],
        {"a.jpg": "one", "b.jpg": ["two", "three"]},
        {"info": {}, "data": [{"file_name": "a.jpg", "text": "one"}, {"file_name": "b.jpg", "text": ["two", "three"]}]},
    ],
)  # fmt: skip
def test_json_lists(tmp_path: Path, content: Any) -> None:
    pictures(tmp_path, "a.jpg", "b.jpg")
    expected = {"a.jpg": ["one"], "b.jpg": ["two", "three"]}
    assert read(write(tmp_path / "train.json", content)) == (expected, {})
    assert read(tmp_path) == (expected, {})


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_conversations(tmp_path: Path, suffix: str) -> None:
    pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    rows: list[Any] = [
        {"id": "1", "image": "a.jpg", "conversations": [
            {"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "one"},
            {"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "Yes."},
        ]},
        {"id": "2", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"id": "3", "image": "b.jpg", "conversations": [{"from": "human", "value": "What?"}]},
        {"id": "4", "image": "c.jpg", "conversations": []},
    ]  # fmt: skip
    content = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
    found, skipped = read(write(tmp_path / f"llava.{suffix}", content))
    assert found == {"a.jpg": ["one"]}
    assert set(skipped) == {f"llava.{suffix}:row 2", "b.jpg", "c.jpg#0"}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "two"}]
    assert read(write(tmp_path / "chat.json", [{"image": "b.jpg", "messages": turns}]))[0] == {"b.jpg": ["two"]}


@pytest.mark.parametrize("name", ["Flickr8k.token.txt", "results_20130124.token", "captions.tsv"])
def test_flickr_token_lists(tmp_path: Path, name: str) -> None:
    pictures(tmp_path, "Flicker8k_Dataset/1_a.jpg", "Flicker8k_Dataset/2_b.jpg")
    lines = '1_a.jpg#0\tA child in, a, "pink" dress\n1_a.jpg#1\tA girl ; going , in\n2_b.jpg#0\tA dog\n'
    file = write(tmp_path / "Flickr8k_text" / name, lines)
    found = {"1_a.jpg": ['A child in, a, "pink" dress', "A girl ; going , in"], "2_b.jpg": ["A dog"]}
    assert read(file) == (found, {})
    assert read(file.parent, images=tmp_path / "Flicker8k_Dataset") == (found, {})


def test_flickr30k_results(tmp_path: Path) -> None:
    pictures(tmp_path, "flickr30k_images/10.jpg", "flickr30k_images/20.jpg")
    rows = ("image_name| comment_number| comment", "10.jpg| 0| Two men .", "10.jpg| 1|  Two boys , in a yard .")
    lines = "\n".join((*rows, "20.jpg| 4   A dog ."))
    file = write(tmp_path / "results.csv", lines)
    assert read(file) == (
        {"10.jpg": ["Two men .", "Two boys , in a yard ."]},
        {"results.csv:row 3": "row 3 has 2 columns; the table has 3"},
    )


def test_a_list_beside_a_folder_of_images(tmp_path: Path) -> None:
    pictures(tmp_path, "Images/a.jpg")
    write(tmp_path / "captions.txt", "image,caption\na.jpg,a dog\n")
    assert read(tmp_path)[0] == {"a.jpg": ["a dog"]}
    write(tmp_path / "captions.txt", "All images are in the public domain.\n")
    with pytest.raises(InputError, match=r"has a caption file; 'photo\.jpg' needs"):
        open_pairs(tmp_path)


def test_backslashes_in_paths(tmp_path: Path) -> None:
    pictures(tmp_path, "img/a.jpg", "img/b.jpg")
    write(tmp_path / "t.csv", "image,caption\nimg\\a.jpg,one\nimg/a.jpg,two\nimg\\b.jpg,three\n")
    assert read(tmp_path / "t.csv") == ({"img/a.jpg": ["one", "two"], "img/b.jpg": ["three"]}, {})
    coco = {
        "images": [{"id": 1, "file_name": "img\\a.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "one"}],
    }
    assert read(write(tmp_path / "captions.json", coco))[0] == {"img/a.jpg": ["one"]}
    if os.sep == "/":
        pictures(tmp_path, "img\\c.jpg")
        assert read(write(tmp_path / "u.csv", "image,caption\nimg\\c.jpg,one\n"))[0] == {"img\\c.jpg": ["one"]}


# Folders -------------------------------------------------------------------------------------------------------------


def test_caption_files_of_other_names(tmp_path: Path) -> None:
    pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg", "c.png", "d.jpg")
    for name in ("a.caption", "b.txt", "c.jpg.txt", "c.png.txt", "d.txt"):
        write(tmp_path / name, name)
    write(tmp_path / "b.caption", "not this one")
    expected = {"a.jpg": "a.caption", "b.jpg": "b.txt", "c.jpg": "c.jpg.txt", "c.png": "c.png.txt", "d.jpg": "d.txt"}
    assert read(tmp_path) == ({key: [text] for key, text in expected.items()}, {})


def test_metadata_in_nested_folders(tmp_path: Path) -> None:
    pictures(tmp_path, "train/cats/1.jpg", "train/dogs/1.jpg", "test/1.jpg")
    write(tmp_path / "train/cats/metadata.csv", "file_name,text\n1.jpg,a cat\n")
    write(tmp_path / "train/dogs/metadata.jsonl", '{"file_name": "1.jpg", "text": "a dog"}\n')
    write(tmp_path / "test/metadata.csv", "file_name,text\n1.jpg,a bird\n,\n")
    found = {"test/1.jpg": ["a bird"], "train/cats/1.jpg": ["a cat"], "train/dogs/1.jpg": ["a dog"]}
    skipped = {"test/metadata.csv:row 2": "row 2 has no path in column 'file_name'"}
    assert read(tmp_path) == (found, skipped)
    assert "3 tables" in open_pairs(tmp_path).summary
    assert read(tmp_path / "train" / "cats") == ({"1.jpg": ["a cat"]}, {})


# Shards --------------------------------------------------------------------------------------------------------------

Members = list[tuple[str, bytes]]


def pairs_of(*stems: str) -> Members:
    return [m for stem in stems for m in ((f"{stem}.jpg", PICTURE), (f"{stem}.txt", stem.encode()))]


def as_tar(file: Path, members: Members, form: str) -> Path:
    tar_of(file, members)
    if form != "plain":
        file.write_bytes(gzip.compress(file.read_bytes()))
    return file


FORMS = pytest.mark.parametrize("form", ["plain", "gzip"])


@FORMS
def test_dots_in_the_names_of_members(tmp_path: Path, form: str) -> None:
    stems = ("0", "1", "shoe.v1", "shoe.v2", "a/b.c/x.y.z", "A.B")
    found, skipped = read(as_tar(tmp_path / "s.tar", pairs_of(*stems), form))
    assert found == {f"s.tar/{stem}": [stem] for stem in stems} and not skipped


@FORMS
def test_images_and_captions_of_different_parts(tmp_path: Path, form: str) -> None:
    members = [
        ("1.input.jpg", PICTURE),
        ("1.outputs.txt", b"one"),
        ("2.outputs.json", b'["two"]'),
        ("2.input.jpg", PICTURE),
    ]
    assert read(as_tar(tmp_path / "s.tar", members, form)) == ({"s.tar/1": ["one"], "s.tar/2": ["two"]}, {})
    members = [
        ("1.jpg", PICTURE),
        ("1.seg.png", PICTURE),
        ("1.txt", b"one"),
        ("2.a.jpg", PICTURE),
        ("2.b.jpg", PICTURE),
        ("2.txt", b"x"),
    ]
    found, skipped = read(as_tar(tmp_path / "s.tar", members, form))
    assert found == {"s.tar/1": ["one"]}
    assert set(skipped) == {"s.tar/1.seg", "s.tar/2.a", "s.tar/2.b", "s.tar/2"}
    assert "several images of it (2.a.jpg, 2.b.jpg)" in skipped["s.tar/2.a"]


@FORMS
def test_members_of_a_sample_that_are_apart(tmp_path: Path, form: str) -> None:
    members = pairs_of("0", "1", "shoe.v1", "shoe.v2")
    apart = sorted(members, key=lambda member: member[0].endswith("txt")) + pairs_of("last") + [("lost.jpg", PICTURE)]
    found, skipped = read(as_tar(tmp_path / "s.tar", apart, form))
    assert found == {f"s.tar/{stem}": [stem] for stem in ("0", "1", "shoe.v1", "shoe.v2", "last")}
    assert skipped == {"s.tar/lost": "its shard has no caption of it"}


@FORMS
def test_members_of_one_name_are_listed(tmp_path: Path, form: str) -> None:
    members = [*pairs_of("0"), ("0.jpg", picture_bytes(1)), ("0.txt", b"again"), *pairs_of("1"), *pairs_of("0")]
    found, skipped = read(as_tar(tmp_path / "s.tar", members, form))
    assert found == {"s.tar/0": ["0"], "s.tar/1": ["1"]}
    assert len(skipped) >= 2 and all("the first one is read" in reason for reason in skipped.values())
    assert {name.split(" ")[0] for name in skipped} == {"s.tar/0.jpg", "s.tar/0.txt"}


def test_a_tar_that_is_compressed_and_a_compressed_name_that_is_not(tmp_path: Path) -> None:
    as_tar(tmp_path / "a.tar", pairs_of("0", "1"), "gzip")
    tar_of(tmp_path / "b.tar.gz", pairs_of("0", "1"))
    for name in ("a.tar", "b.tar.gz"):
        assert read(tmp_path / name) == ({f"{name}/0": ["0"], f"{name}/1": ["1"]}, {})


def test_caption_members(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", [("0.jpg", PICTURE), ("0.caption", b"a dog")])
    assert read(tmp_path / "a.tar")[0] == {"a.tar/0": ["a dog"]}


# Datasets ------------------------------------------------------------------------------------------------------------


def table_of(root: Path, count: int = 6) -> Path:
    """A Parquet file with a column of image bytes."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pairs = make_pairs(count)
    columns = {"image": [pair.picture for pair in pairs], "caption": [pair.captions[0] for pair in pairs]}
    pq.write_table(pa.table(columns), root / "images.parquet")
    return root / "images.parquet"


def test_the_advice_for_images_in_parquet_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = table_of(tmp_path)
    with pytest.raises(InputError) as caught:
        open_pairs(file)
    advice = f"the source 'hf:parquet' with the option data_files={str(file)!r}"
    assert advice in str(caught.value)
    found, skipped = read("hf:parquet", data_files=str(file), cache_dir=str(tmp_path / "cache"))
    assert list(found.values()) == [[pair.captions[0]] for pair in make_pairs(6)] and not skipped


def test_streamed_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    shutil.copy(table_of(tmp_path), tmp_path / "more.parquet")
    files = [str(tmp_path / "images.parquet"), str(tmp_path / "more.parquet")]
    found, skipped = read("hf:parquet", data_files=files, streaming=True, split="train")
    assert len(found) == 12 and not skipped
    stream = datasets.load_dataset("parquet", data_files=files, streaming=True, split="train")
    shares = []
    for rank in range(2):
        loader = PairLoader(open_pairs(stream), tiny, batch_size=1, rank=rank, world_size=2)
        shares.append([key for batch, _ in loader.epoch(0) for key in batch.keys])
    assert sorted(shares[0] + shares[1]) == sorted(found) and all(shares)
    loader = PairLoader(open_pairs(stream), tiny, batch_size=2, seed=1)
    epoch = [(batch.keys, position) for batch, position in loader.epoch(0)]
    rest = [batch.keys for batch, _ in loader.epoch(0, epoch[2][1])]
    assert rest == [keys for keys, _ in epoch[3:]]


def test_datasets_in_memory_and_what_is_no_source(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures(tmp_path, "a.jpg")
    columns = {"image": ["a.jpg", "b.jpg", None], "caption": ["one", "two", "three"]}
    data = datasets.Dataset.from_dict(columns)
    for given in (data, data.to_iterable_dataset(), datasets.DatasetDict(train=data)):
        found, skipped = read(given, images=tmp_path)
        assert list(found.values()) == [["one"]] and len(skipped) == 2
    for wrong in (5, None, data.to_list()):
        with pytest.raises(InputError, match="a source of pairs is a path, a text or a dataset"):
            open_pairs(wrong)
