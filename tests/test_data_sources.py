"""Image-text pairs in the layouts that users have: all give the same samples, and a wrong layout is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_pairs import (
    Pair,
    as_coco,
    as_dataset,
    as_folder,
    as_shards,
    as_table,
    digest,
    make_pairs,
    picture_bytes,
    tiny,
)

from ttd_plugins.data import PairLoader, allow_pipe, open_pairs, read_image
from ttd_plugins.errors import InputError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

Sample = tuple[str, str, tuple[str, ...] | None]


def layout(kind: str, root: Path, pairs: list[Pair]) -> str:
    if kind in ("csv", "tsv", "parquet", "jsonl"):
        if kind == "parquet":
            pytest.importorskip("pyarrow")
        return str(as_table(root / kind, pairs, kind))
    if kind == "datasets":
        pytest.importorskip("datasets")
    makers: dict[str, Callable[[], Path]] = {
        "folder-json": lambda: as_folder(root / kind, pairs),
        "folder-txt": lambda: as_folder(root / kind, pairs, form="txt"),
        "paper": lambda: as_folder(root / kind, pairs, form="paper"),
        "coco": lambda: as_coco(root / kind, pairs),
        "shards": lambda: as_shards(root / kind, pairs),
        "shards-gz": lambda: as_shards(root / kind, pairs, suffix="tar.gz"),
        "datasets": lambda: as_dataset(root / kind, pairs),
    }
    return str(makers[kind]())


MAPS = ("folder-json", "folder-txt", "paper", "csv", "tsv", "parquet", "jsonl", "coco", "datasets")
STREAMS = ("shards", "shards-gz")


def epoch_of(spec: str, epoch: int = 0, **options: Any) -> list[Sample]:
    loader = PairLoader(open_pairs(spec), tiny, batch_size=4, seed=5, drop_last=False, **options)
    samples = []
    for batch, _ in loader.epoch(epoch):
        tags = batch.tags or [None] * len(batch)
        rows = zip(batch.images, batch.captions, tags, strict=True)
        samples += [(digest(image), caption, None if t is None else tuple(t)) for image, caption, t in rows]
    assert not len(loader.skipped), loader.skipped.reasons
    return samples


def due(pairs: list[Pair], tmp_path: Path, views: slice, *, tags: bool) -> set[Sample]:
    samples = set()
    for pair in pairs:
        (tmp_path / "one.jpg").write_bytes(pair.picture)
        pixels = digest(tiny(read_image(tmp_path / "one.jpg")))
        samples |= {(pixels, caption, pair.tags if tags else None) for caption in pair.captions[views]}
    return samples


@pytest.mark.parametrize("captions", ["first", "all"])
def test_every_layout_gives_the_same_epoch(tmp_path: Path, captions: Any) -> None:
    pairs = make_pairs(10, 3, tags=True)
    epochs = {kind: epoch_of(layout(kind, tmp_path, pairs), captions=captions) for kind in (*MAPS, *STREAMS)}
    views = slice(0, 1) if captions == "first" else slice(None)
    for kind, samples in epochs.items():
        tagged = kind != "folder-txt"
        assert set(samples) == due(pairs, tmp_path, views, tags=tagged), kind
        assert len(samples) == len(set(samples)), kind
    order = [sample[:2] for sample in epochs["csv"]]
    for kind in MAPS:
        assert [sample[:2] for sample in epochs[kind]] == order, kind
    assert epochs["shards"] == epochs["shards-gz"]


@pytest.mark.parametrize("kind", ["coco", "shards"])
def test_a_random_caption_changes_with_epoch_and_seed_alone(tmp_path: Path, kind: str) -> None:
    pairs = make_pairs(12, 4)
    spec = layout(kind, tmp_path, pairs)
    epochs = [epoch_of(spec, epoch, captions="random") for epoch in range(12)]
    assert epochs[3] == epoch_of(spec, 3, captions="random")
    drawn: dict[str, set[str]] = {}
    for samples in epochs:
        assert len({pixels for pixels, _, _ in samples}) == 12
        for pixels, caption, _ in samples:
            drawn.setdefault(pixels, set()).add(caption)
    known = {(pixels, caption) for pixels, caption, _ in due(pairs, tmp_path, slice(None), tags=False)}
    assert {(pixels, caption) for pixels, texts in drawn.items() for caption in texts} <= known
    assert sum(len(texts) for texts in drawn.values()) > 40


def test_all_captions_of_a_picture_share_a_group(tmp_path: Path) -> None:
    for kind in ("csv", "shards"):
        loader = PairLoader(open_pairs(layout(kind, tmp_path, make_pairs(4, 3))), tiny, batch_size=12, captions="all")
        ((batch, _),) = loader.epoch(0)
        assert len(set(batch.groups)) == 4 and len(set(batch.keys)) == 12
        shown: dict[str, set[str]] = {}
        for group, image in zip(batch.groups, batch.images, strict=True):
            shown.setdefault(group, set()).add(digest(image))
        assert sorted(map(len, shown.values())) == [1] * 4 and len(set.union(*shown.values())) == 4
        assert sorted(zip(batch.groups, batch.choices, strict=True)) == [
            (group, view) for group in sorted(set(batch.groups)) for view in range(3)
        ]


# Folders -------------------------------------------------------------------------------------------------------------


def captions_of(spec: Any, **options: Any) -> list[str]:
    loader = PairLoader(open_pairs(spec, **options), tiny, batch_size=1, captions="all", shuffle=False)
    return [caption for batch, _ in loader.epoch(0) for caption in batch.captions]


def test_folders_below_and_json_of_other_shapes(tmp_path: Path) -> None:
    for name, content in {
        "a/one.JSON": ["first", "second"],
        "b/c/two.json": {"text": "third"},
        "three.json": {"sentences": [{"raw": "fourth"}]},
        "four.json": "fifth",
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".PNG" if name == "three.json" else ".jpeg").write_bytes(picture_bytes(1))
        file.write_text(json.dumps(content))
    (tmp_path / ".hidden.jpg").write_bytes(b"")
    assert captions_of(tmp_path) == ["first", "second", "third", "fifth", "fourth"]


def test_a_json_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture_bytes(0))
    (tmp_path / "a.json").write_text(json.dumps({"caption": "no", "alt": "yes", "nouns2": "cat; dog"}))
    (tmp_path / "a.txt").write_text("no")
    source = open_pairs(tmp_path, caption_column="alt", tags_column="nouns2")
    ((batch, _),) = PairLoader(source, tiny, batch_size=1).epoch(0)
    assert (batch.captions, batch.tags) == (["yes"], [["cat", "dog"]])


def test_metadata_beside_pictures_is_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture_bytes(0))
    (tmp_path / "metadata.csv").write_text("file_name,text\na.jpg,a dog\n")
    assert captions_of(tmp_path) == ["a dog"]


# Tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("semicolons.csv", "path;title\na.jpg;one, two\n"),
        ("bom.csv", "\ufeffFilename,Caption\r\na.jpg,\"one, two\"\r\n"),
        ("headless.tsv", "one, two\ta.jpg\n"),
        ("headless.csv", 'a.jpg,"one, two"\n'),
        ("quotes.tsv", 'image\tcaption\na.jpg\t"one, two"\n'),
        ("list.csv", 'image,captions\na.jpg,"[""one, two""]"\n'),
        ("lines.csv", 'image,caption\na.jpg,"one,\n two"\n'),
        ("flickr.txt", "image,caption\na.jpg,\"one, two\"\n"),
    ],
)  # fmt: skip
def test_tables_as_they_come(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "a.jpg").write_bytes(picture_bytes(0))
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert captions_of(tmp_path / name) == ["one, two"]


def test_a_stray_quote_in_tsv_swallows_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture_bytes(0))
    (tmp_path / "t.tsv").write_text('image\tcaption\na.jpg\t"quoted" start\na.jpg\t7" of snow\na.jpg\t"open\n')
    assert captions_of(tmp_path / "t.tsv") == ['"quoted" start', '7" of snow', '"open']


def test_columns_and_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(picture_bytes(0))
    (tmp_path / "t.csv").write_text("photo,de,en\na.jpg,ein Hund,a dog\n")
    options = {"images": tmp_path / "pictures", "image_column": "photo"}
    assert captions_of(tmp_path / "t.csv", caption_column="en", **options) == ["a dog"]
    with pytest.raises(InputError, match=r"t\.csv' has no column with a usual name for captions .*caption_column"):
        open_pairs(tmp_path / "t.csv", **options)
    with pytest.raises(InputError, match="unknown column for captions 'em'; did you mean 'en'"):
        open_pairs(tmp_path / "t.csv", caption_column="em", **options)


# COCO, datasets, shards ----------------------------------------------------------------------------------------------


def test_coco_without_its_pictures_or_captions_is_told(tmp_path: Path) -> None:
    file = as_coco(tmp_path, make_pairs(2))
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"none of the images of .* is in .*images="):
        open_pairs(file)
    assert len(captions_of(file, images=tmp_path / "elsewhere")) == 2
    file.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1}]}))
    with pytest.raises(InputError, match=r"no annotation in .* has a field 'caption'"):
        open_pairs(file)


def test_a_dataset_by_name_and_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    for number, split in enumerate(("validation", "test")):
        as_folder(tmp_path / "data" / split, make_pairs(3)[number : number + 1], form="txt")
        (tmp_path / "data" / split / "metadata.csv").write_text(f"file_name,text\n0000{number}.jpg,{split}\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    options = {"data_dir": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")}
    assert captions_of("hf:imagefolder", split="test", **options) == ["test"]
    with pytest.raises(InputError, match="unknown split 'train'; known: test, validation"):
        open_pairs("hf:imagefolder", **options)
    with pytest.raises(InputError, match=r"the dataset 'hf:.*nothing' cannot be loaded"):
        open_pairs(f"hf:{tmp_path}/nothing")


def test_shards_of_one_name_in_two_folders_have_keys_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    pairs = make_pairs(8)
    for folder, part in (("a", pairs[:4]), ("b", pairs[4:])):
        as_shards(tmp_path / folder, part, 1)
    loader = PairLoader(open_pairs(f"{tmp_path}/{{a,b}}/00000.tar"), tiny, batch_size=8)
    ((batch, _),) = loader.epoch(0)
    assert len(set(batch.keys)) == len(set(batch.groups)) == 8


def test_patterns_of_shards(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    as_shards(tmp_path, make_pairs(6))
    everything = captions_of(tmp_path)
    assert len(everything) == 6
    assert captions_of(f"{tmp_path}/{{00000..00002}}.tar") == everything
    assert captions_of(f"{tmp_path}/*.tar") == everything
    assert captions_of(f"{tmp_path}/00001.tar") == everything[2:4]
    with allow_pipe():
        assert captions_of(f"pipe:cat {tmp_path}/00001.tar") == everything[2:4]
    with pytest.raises(InputError, match=r"00003\.tar' does not exist \(of 4"):
        open_pairs(f"{tmp_path}/{{00000..00003}}.tar")
    with pytest.raises(InputError, match="no file matches"):
        open_pairs(f"{tmp_path}/1*.tar")


def test_several_sets_of_shards_are_one(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    pairs = make_pairs(12)
    for folder, part in (("a", pairs[:6]), ("b", pairs[6:])):
        as_shards(tmp_path / folder, part)
    a, b = tmp_path / "a", tmp_path / "b"
    everything = captions_of(a) + captions_of(b)
    assert len(set(everything)) == 12
    for spec in (
        f"{a}::{b}",
        f"{a}/*.tar::{b}/{{00000..00002}}.tar",
        f"{a}/::pipe:cat {b}/00000.tar::{b}/00001.tar::{b}/*2.tar",
        f"{a} :: {b}/",
    ):
        with allow_pipe():
            assert captions_of(spec) == everything, spec
    assert captions_of(f"{b}/00001.tar::{a}::{b}/00000.tar") == everything[8:10] + everything[:6] + everything[6:8]
    # The order is shuffled over both, and each pair is somebody's.
    shares = [
        [caption for batch, _ in PairLoader(
            open_pairs(f"{a}::{b}"), tiny, batch_size=1, seed=1, rank=rank, world_size=2, drop_last=False
        ).epoch(0) for caption in batch.captions]
        for rank in range(2)
    ]  # fmt: skip
    assert sorted(shares[0] + shares[1]) == sorted(everything)
    assert any({caption in everything[:6] for caption in share} == {True, False} for share in shares)
    for spec, said in (
        (f"{a}::{tmp_path}/c", r"the shard '.*/c' does not exist \(of 4 in"),
        (f"{a}::", "have an empty part next to '::'"),
        (f"{tmp_path}::{a}", "contains no tar files"),
    ):
        with pytest.raises(InputError, match=said):
            open_pairs(spec)


@pytest.mark.parametrize(
    ("files", "spec", "options", "said"),
    [
        ({}, "{}/none", {}, "it does not exist"),
        ({}, "org/name", {}, "is named 'hf:org/name'"),
        ({}, "{}", {}, "it is empty"),
        ({"a.py": "1"}, "{}", {}, "it contains 'a.py'"),
        ({"a.docx": "1"}, "{}/a.docx", {}, "is not recognised"),
        ({"a.jpg": "1"}, "{}", {}, "'photo.txt' or 'photo.json'"),
        ({"a.csv": ""}, "{}/a.csv", {}, "is empty"),
        ({"a.csv": "image,caption\n"}, "{}/a.csv", {}, "contains no image-text pairs"),
        ({"a.tsv": "a dog\thttp://x.org/a.jpg\n"}, "{}/a.tsv", {}, "img2dataset"),
        ({"a.csv": "url,caption\nhttp://x.org/a,dog\n"}, "{}/a.csv", {}, "column 'url' of the table"),
        ({"a.parquet": "PAR"}, "{}/a.parquet", {}, "is not a Parquet table"),
        ({"a.json": "[1]"}, "{}/a.json", {}, "is not in COCO's format"),
        ({"a.json": "{"}, "{}/a.json", {}, "its JSON cannot be parsed"),
        ({"captions_a.json": "", "captions_b.json": ""}, "{}", {}, "open one of them"),
        ({"a.csv": "image,caption\na,b\n"}, "{}/a.csv", {"split": "train"}, "'split' does not apply to tables"),
        ({"a.csv": "image,caption\na,b\n"}, "{}/a.csv", {"images": "none"}, "'none' does not exist"),
        ({"a.csv": "image,caption\na,b\n"}, "{}/a.csv", {"threshold": 0.1}, "need keep=FILE"),
        ({"a.csv": "image,caption\na,b\n"}, "{}/a.csv", {"keep": "none.jsonl", "quantile": 0.1}, "does not exist"),
    ],
)
def test_what_is_wrong_with_a_layout_is_one_sentence(
    tmp_path: Path, files: dict[str, str], spec: str, options: dict[str, Any], said: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    if any(name.endswith(".parquet") for name in files):
        pytest.importorskip("pyarrow")
    with pytest.raises(InputError) as caught:
        open_pairs(spec.format(tmp_path), **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# Real data -----------------------------------------------------------------------------------------------------------


def test_a_shard_of_flickr8k(tmp_path: Path) -> None:
    shard = SHARED / "flickr8k" / "00007.tar"
    if not shard.is_file():
        pytest.skip(f"there is no {shard}")
    loader = PairLoader(open_pairs(shard), tiny, batch_size=10, captions="all", drop_last=False)
    batches = [batch for batch, _ in loader.epoch(0)]
    groups = {group for batch in batches for group in batch.groups}
    assert not len(loader.skipped)
    assert sum(map(len, batches)) == 5 * len(groups) > 400


def test_coco_on_disk() -> None:
    folder = SHARED / "coco_instances_train"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    source = open_pairs(folder)
    assert source.kind == "coco" and "80 images, 4" in source.summary
    with pytest.raises(InputError, match="'caption'"):
        open_pairs(folder / "instances.json")
    with pytest.raises(InputError, match="img2dataset"):
        open_pairs(SHARED / "cc3m_captions_a.tsv")
