"""Batches of image-text pairs: order, splitting, resuming from every place, and what is left out."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import signal
import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_pairs import (
    Pair,
    as_coco,
    as_dataset,
    as_folder,
    as_shards,
    as_table,
    digest,
    make_pairs,
    shard_members,
    tar_of,
    tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ttd_plugins.data import PairLoader, PairSource, SkipLog, open_pairs
from ttd_plugins.data.caption_parsing import BadPairError, parse_tags
from ttd_plugins.data.pair_source import MapSource, RawPair, ReadNow, StreamSource
from ttd_plugins.errors import InputError, TTDError


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


PIXEL = encoded(Image.new("RGB", (1, 1)))


def one_pixel(image: Image.Image) -> Tensor:
    return torch.full((3, 1, 1), float(image.width))


def rows_of(batches: Any) -> list[tuple[Any, ...]]:
    return [
        (batch.keys, batch.captions, batch.tags, batch.groups, batch.choices, [digest(image) for image in batch.images])
        for batch, _ in batches
    ]


# What cannot be used -------------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of a few bytes that says that it has 40,000 by 40,000 pixels."""
    data = bytearray(PIXEL)
    start = data.index(b"IHDR")
    data[start + 4 : start + 12] = struct.pack(">II", 40_000, 40_000)
    data[start + 17 : start + 21] = struct.pack(">I", zlib.crc32(data[start : start + 17]))
    return bytes(data)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "truncated": ({}, "truncated"),
    "zero bytes": ({"picture": b""}, "is empty"),
    "text": ({"picture": b"hello, I am no picture"}, "is not an image"),
    "missing": ({"picture": None}, "missing|does not exist|no image of it"),
    "bomb": ({"picture": bomb()}, "safe to decode|is refused"),
    "empty caption": ({"captions": (" \t ",)}, "the caption is empty"),
    "caption not UTF-8": ({"captions": ("caf\udce9",)}, "the caption is not UTF-8"),
}


def salted(count: int, share: float) -> tuple[list[Pair], dict[str, str]]:
    """Pairs of which a share is broken in each way, and what is to be said of each."""
    pairs = make_pairs(count)
    reasons: dict[str, str] = {}
    places = np.random.default_rng(3).permutation(count)
    each = round(share * count)
    for number, (changes, reason) in enumerate(BROKEN.values()):
        for place in places[number * each : (number + 1) * each].tolist():
            pair = pairs[place]
            cut = {"picture": pair.picture[: len(pair.picture) * 6 // 10]}
            pairs[place] = replace(pair, **(changes or cut))
            reasons[Path(pair.name).stem] = reason
    return pairs, reasons


def write_salted(kind: str, root: Path, pairs: list[Pair]) -> Path:
    present = [replace(pair, picture=pair.picture or b"") for pair in pairs]
    gone = [pair.name for pair in pairs if pair.picture is None]
    if kind == "shards":
        for shard in range(4):
            members = [m for pair in present[shard::4] for m in broken_members(pair) if m[0] not in gone]
            tar_of(root / f"{shard:05d}.tar", members)
        return root
    if kind == "datasets":
        pytest.importorskip("datasets")
        return as_dataset(
            root / "saved", [p for p in present if p.captions[0].isprintable() or not p.captions[0].strip()]
        )
    makers: dict[str, Any] = {
        "folder": lambda: as_folder(root, present, form="txt"),
        "json": lambda: as_folder(root, present, form="paper"),
        "csv": lambda: as_table(root, present, "csv"),
        "parquet": lambda: as_table(root, present, "parquet"),
        "coco": lambda: as_coco(root, present),
    }
    spec: Path = makers[kind]()
    for name in gone:
        next(iter(root.rglob(name))).unlink()
    return spec


def broken_members(pair: Pair) -> list[tuple[str, bytes]]:
    picture, _, record = shard_members(replace(pair, captions=("x",)))
    record = (record[0], json.dumps({"key": Path(pair.name).stem}).encode())
    return [picture, (f"{Path(pair.name).stem}.txt", pair.captions[0].encode("utf-8", "surrogateescape")), record]


@pytest.mark.parametrize("kind", ["folder", "json", "csv", "parquet", "coco", "shards", "datasets"])
def test_broken_samples_are_listed_once_and_all_others_come_through(tmp_path: Path, kind: str) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    pairs, reasons = salted(60, 0.05)
    spec = write_salted(kind, tmp_path, pairs)
    log = tmp_path / "run" / "skipped.jsonl"
    loader = PairLoader(open_pairs(spec), tiny, batch_size=4, skipped=log, seed=1, drop_last=False)
    for epoch in range(2):
        batches = [batch for batch, _ in loader.epoch(epoch)]
        good = {pair.captions[0] for pair in pairs if Path(pair.name).stem not in reasons}
        assert {caption for batch in batches for caption in batch.captions} == good
        assert sum(map(len, batches)) == len(good) == 60 - 7 * 3
        assert all(len(batch) == 4 for batch in batches[:-1]), "a batch is filled up with the next good sample"
    listed = [json.loads(line) for line in log.read_text().splitlines()]
    found = {entry["key"]: entry["reason"] for entry in listed}
    assert len(listed) == len(found)
    if kind == "datasets":
        # Rows have numbers for keys, pictures are inside, and the library itself refuses texts that are not UTF-8.
        named = [
            Path(pair.name).stem for pair in pairs if reasons.get(Path(pair.name).stem) != "the caption is not UTF-8"
        ]
        reasons = {f"row {named.index(stem)}": why for stem, why in reasons.items() if stem in named}
        reasons = {key: "missing|is empty" if "missing" in why else why for key, why in reasons.items()}
        assert set(found) == set(reasons)
    else:
        found = {re.search(r"\d{5}(?=(\.jpg)?$)", key).group(): why for key, why in found.items()}  # type: ignore[union-attr]
        assert set(found) == set(reasons)
    for key, reason in reasons.items():
        assert re.search(reason, found[key]), found[key]
        assert "\n" not in found[key]


def test_a_picture_that_is_broken_is_listed_once_for_all_its_captions(tmp_path: Path) -> None:
    pairs = make_pairs(4, 3)
    pairs[1] = replace(pairs[1], picture=b"")
    pairs[2] = replace(pairs[2], captions=("good", " ", "good too"))
    loader = PairLoader(open_pairs(as_coco(tmp_path, pairs)), tiny, batch_size=8, captions="all")
    ((batch, _),) = loader.epoch(0)
    assert set(loader.skipped.reasons) == {"00001.jpg", "00002.jpg#1"}
    assert {key for key in batch.keys if key.startswith("00002")} == {"00002.jpg#0", "00002.jpg#2"}


def test_an_unusable_caption_among_others_is_no_candidate(tmp_path: Path) -> None:
    pairs = [replace(make_pairs(1)[0], captions=(" ", "second", "caf\udce9"))]
    source = open_pairs(as_coco(tmp_path, pairs))
    for captions in ("first", "random"):
        loader = PairLoader(source, tiny, batch_size=1, captions=captions)
        assert [batch.captions for epoch in range(8) for batch, _ in loader.epoch(epoch)] == [["second"]] * 8
        assert not len(loader.skipped)


def test_rows_that_are_no_pairs_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PIXEL)
    (tmp_path / "t.csv").write_text("image,caption\na.png,a dog\na.png\n,a cat\nb.png,one,two\n")
    loader = PairLoader(open_pairs(tmp_path / "t.csv"), tiny, batch_size=1)
    assert [batch.captions for batch, _ in loader.epoch(0)] == [["a dog"]]
    assert loader.skipped.reasons == {
        "t.csv:row 2": "row 2 has 1 columns; the table has 2",
        "t.csv:row 3": "row 3 has no path in column 'image'",
        "t.csv:row 4": "row 4 has 3 columns; the table has 2",
    }


@pytest.mark.parametrize(("cut", "least"), [(0.5, 1), (0.02, 0)])
def test_a_shard_that_is_cut_short_is_listed_and_the_others_are_read(tmp_path: Path, cut: float, least: int) -> None:
    for suffix in ("tar", "tar.gz"):
        folder = as_shards(tmp_path / suffix, make_pairs(16), 2, suffix)
        shard = folder / f"00001.{suffix}"
        shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * cut)])
        loader = PairLoader(open_pairs(folder), tiny, batch_size=1)
        assert 8 + least <= sum(1 for _ in loader.epoch(0)) < 16
        ((key, reason),) = loader.skipped.reasons.items()
        assert key == f"00001.{suffix}" and "the shard cannot be read after" in reason


def test_a_header_that_is_garbage_does_not_end_a_shard_silently(tmp_path: Path) -> None:
    shard = as_shards(tmp_path, make_pairs(6), 1) / "00000.tar"
    data = bytearray(shard.read_bytes())
    place = data.index(b"00003.jpg")
    data[place : place + 200] = b"?" * 200
    shard.write_bytes(data)
    loader = PairLoader(open_pairs(shard), tiny, batch_size=1)
    assert sum(1 for _ in loader.epoch(0)) == 2 + 1
    assert "a header is broken" in loader.skipped.reasons["00000.tar"]


@pytest.mark.parametrize(
    ("limit", "allowed"), [(None, True), (6, True), (5, False), (0, False), (0.6, True), (0.5, False), (1.0, True)]
)
def test_a_run_stops_past_the_limit_and_not_before(tmp_path: Path, limit: Any, allowed: bool) -> None:
    pairs = [replace(pair, picture=b"") if n < 6 else pair for n, pair in enumerate(make_pairs(10))]
    source = open_pairs(as_table(tmp_path, pairs, "csv"))
    loader = PairLoader(source, tiny, batch_size=4, max_skipped=limit, skipped=tmp_path / "skipped.jsonl")
    if allowed:
        assert [len(batch) for batch, _ in loader.epoch(0)] == [4]
        return
    with pytest.raises(TTDError, match=r"samples of .* are unusable, more than max_skipped=.*skipped\.jsonl"):
        list(loader.epoch(0))
    again = PairLoader(source, tiny, batch_size=4, max_skipped=limit, skipped=tmp_path / "skipped.jsonl")
    with pytest.raises(TTDError, match="are unusable, more than"):
        next(again.epoch(0))


def test_an_epoch_without_a_batch_is_told(tmp_path: Path) -> None:
    pairs = [replace(pair, picture=b"") for pair in make_pairs(3)]
    for spec in (as_table(tmp_path / "t", pairs, "csv"), as_shards(tmp_path / "s", pairs)):
        with pytest.raises(TTDError, match="has 0 usable samples, too few for a batch of 2; 3 were skipped"):
            list(PairLoader(open_pairs(spec), tiny, batch_size=2).epoch(0))
    with pytest.raises(InputError, match="has 3 samples, too few for a batch of 4"):
        PairLoader(open_pairs(as_table(tmp_path, pairs, "csv")), tiny, batch_size=4)


def test_the_list_of_skipped_samples_is_shared_and_survives_a_kill(tmp_path: Path) -> None:
    file = tmp_path / "run" / "skipped.jsonl"
    first, second = SkipLog(file), SkipLog(file)
    assert first.add("a", "why")
    assert not second.add("a", "another reason")
    with open(file, "a") as stream:
        stream.write('{"key": "half a l')
    third = SkipLog(file)
    assert third.add("b\udcff", "because") and second.add("c", "x") and not first.add("c", "x")
    assert SkipLog(file).reasons == {"a": "why", "b\udcff": "because", "c": "x"}
    with pytest.raises(TTDError, match="cannot be read or written"):
        SkipLog(tmp_path).add("a", "b")


# Order, splitting and resuming ---------------------------------------------------------------------------------------


class Listed(MapSource):
    """Pictures of one pixel; those in ``broken`` cannot be used."""

    name, kind, summary = "listed", "listed", ""

    def __init__(self, counts: list[int], broken: set[int]) -> None:
        self.counts, self.broken = counts, broken

    def __len__(self) -> int:
        return len(self.counts)

    def key(self, index: int) -> str:
        return f"p{index}"

    def read(self, index: int) -> RawPair:
        captions = [f"{index}.{view}" for view in range(self.counts[index])]
        return RawPair(self.key(index), b"" if index in self.broken else PIXEL, captions)

    def caption_count(self, index: int) -> int:
        return self.counts[index]


class Streamed(StreamSource):
    """The same in shards of ``length``."""

    name, kind, summary = "streamed", "streamed", ""

    def __init__(self, listed: Listed, length: int) -> None:
        self.listed, self.length = listed, length
        self.shards = tuple(map(str, range(-(-len(listed) // length))))

    def read_shard(self, shard: str, eager: ReadNow) -> Iterator[RawPair]:
        first = int(shard) * self.length
        yield from map(self.listed.read, range(first, min(first + self.length, len(self.listed))))


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 3), min_size=5, max_size=24),
    broken=st.sets(st.integers(0, 23), max_size=4),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 7),
    shuffle=st.booleans(),
    captions=st.sampled_from(["first", "random", "all"]),
    shard=st.integers(0, 6),
    buffer=st.integers(1, 9),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_every_sample_comes_once_over_all_processes_and_resuming_changes_nothing(
    counts: list[int],
    broken: set[int],
    world_size: int,
    batch_size: int,
    shuffle: bool,
    captions: Any,
    shard: int,
    buffer: int,
    seed: int,
    data: st.DataObject,
) -> None:
    listed = Listed(counts, {index for index in broken if index < len(counts) - 1})
    source: PairSource = Streamed(listed, shard) if shard else listed
    options: dict[str, Any] = {"batch_size": batch_size, "shuffle": shuffle, "captions": captions, "buffer": buffer}
    options |= {"seed": seed, "drop_last": False, "world_size": world_size}
    keys: list[str] = []
    for rank in range(world_size):
        loader = PairLoader(source, one_pixel, rank=rank, **options)
        batches = []
        # A process may get none but broken samples.
        with contextlib.suppress(TTDError):
            batches = list(loader.epoch(2))
        if not batches:
            continue
        assert all(len(batch) == batch_size for batch, _ in batches[:-1])
        keys += [key for batch, _ in batches for key in batch.keys]
        place = data.draw(st.integers(0, len(batches) - 1))
        position = json.loads(json.dumps(batches[place][1]))
        again = PairLoader(source, one_pixel, rank=rank, **options).epoch(2, position)
        assert rows_of(again) == rows_of(batches[place + 1 :])
        if not shard and not listed.broken:
            due = loader.batches_per_epoch()
            assert due is not None and due <= len(batches) <= due + 1
    usable = [index for index in range(len(counts)) if index not in listed.broken]
    if captions == "all":
        assert Counter(keys) == Counter(f"p{index}#{view}" for index in usable for view in range(counts[index]))
    else:
        assert Counter(keys) == Counter(f"p{index}" for index in usable)


def noisy(image: Image.Image) -> Tensor:
    """A transform that draws from all three generators."""
    import random

    return tiny(image) + torch.rand(3, 1, 1) + random.random() + np.random.rand()


def broken_spec(kind: str, root: Path) -> Path:
    pairs = [replace(pair, picture=b"") if n in (3, 4, 11) else pair for n, pair in enumerate(make_pairs(20, 2))]
    return as_shards(root, pairs, 5) if kind == "shards" else as_table(root, pairs, "csv")


@pytest.mark.parametrize("kind", ["table", "shards"])
@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_goes_on_from_every_place(tmp_path: Path, kind: str, drop_last: bool) -> None:
    spec = broken_spec(kind, tmp_path)
    options: dict[str, Any] = {"batch_size": 3, "captions": "all", "seed": 9, "drop_last": drop_last, "buffer": 7}
    whole = list(PairLoader(open_pairs(spec), noisy, **options).epoch(1))
    assert len(whole) == 34 // 3 + (not drop_last)
    for place, (_, position) in enumerate(whole):
        state = torch.get_rng_state()
        loader = PairLoader(open_pairs(spec), noisy, **options)
        rest = list(loader.epoch(1, json.loads(json.dumps(position))))
        assert rows_of(rest) == rows_of(whole[place + 1 :])
        assert [after for _, after in rest] == [after for _, after in whole[place + 1 :]]
        assert bool((torch.get_rng_state() == state).all()), "the training's own generator is left alone"


def test_epochs_seeds_and_the_order_of_the_source(tmp_path: Path) -> None:
    for kind in ("table", "shards"):
        source = open_pairs(broken_spec(kind, tmp_path / kind))

        def keys(epoch: int, *, source: PairSource = source, **options: Any) -> list[str]:
            loader = PairLoader(source, tiny, batch_size=1, buffer=6, **options)
            return [key for batch, _ in loader.epoch(epoch) for key in batch.keys]

        orders = [keys(0, seed=0), keys(1, seed=0), keys(0, seed=1), keys(0, shuffle=False)]
        assert keys(0, seed=0) == orders[0]
        assert len({tuple(order) for order in orders}) == 4
        assert len({frozenset(order) for order in orders}) == 1
        assert orders[3] == sorted(orders[3]) == keys(7, shuffle=False)


@pytest.mark.parametrize("kind", ["table", "shards"])
def test_workers_change_nothing_but_the_time(tmp_path: Path, kind: str) -> None:
    source = open_pairs(broken_spec(kind, tmp_path))
    options: dict[str, Any] = {"batch_size": 3, "seed": 4, "drop_last": False, "buffer": 4}
    state = torch.get_rng_state()
    loader = PairLoader(source, noisy, workers=2, **options)
    whole = list(loader.epoch(0))
    assert bool((torch.get_rng_state() == state).all())
    assert len(loader.skipped) == 3
    assert Counter(key for batch, _ in whole for key in batch.keys) == Counter(
        key for batch, _ in PairLoader(source, noisy, **options).epoch(0) for key in batch.keys
    )
    if kind == "table":
        assert rows_of(whole) == rows_of(PairLoader(source, noisy, **options).epoch(0))
    for place in (0, 3):
        again = PairLoader(source, noisy, workers=2, **options).epoch(0, json.loads(json.dumps(whole[place][1])))
        assert rows_of(again) == rows_of(whole[place + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("kind", ["table", "shards"])
def test_an_epoch_goes_on_from_every_place_with_workers(tmp_path: Path, kind: str, workers: int) -> None:
    source = open_pairs(broken_spec(kind, tmp_path))
    options: dict[str, Any] = {"batch_size": 3, "captions": "all", "workers": workers, "buffer": 5}
    whole = list(PairLoader(source, noisy, **options).epoch(0))
    for place, (_, position) in enumerate(whole):
        assert rows_of(PairLoader(source, noisy, **options).epoch(0, position)) == rows_of(whole[place + 1 :])


def test_workers_outlive_a_signal_that_is_sent_to_all(tmp_path: Path) -> None:
    source = open_pairs(as_table(tmp_path, make_pairs(40), "csv"))
    epoch = PairLoader(source, tiny, batch_size=2, workers=1, seed=1).epoch(0)
    first = next(epoch)
    (worker,) = multiprocessing.active_children()
    for sent in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid or 0, sent)
    assert rows_of([first, *epoch]) == rows_of(PairLoader(source, tiny, batch_size=2, seed=1).epoch(0))


def killing(_: Image.Image) -> Tensor:
    """A transform that ends its worker as the system does when memory runs out."""
    assert multiprocessing.parent_process() is not None
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_worker_that_is_killed_is_told() -> None:
    loader = PairLoader(Listed([1] * 4, set()), killing, batch_size=2, workers=1)
    with pytest.raises(
        TTDError, match=r"a worker process that decodes images of .* was killed .* fewer workers"
    ) as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)


def test_a_position_of_something_else_is_refused(tmp_path: Path) -> None:
    source = open_pairs(as_shards(tmp_path / "a", make_pairs(8), 4))
    loader = PairLoader(source, tiny, batch_size=2)
    _, position = next(loader.epoch(0))
    for start, other, said in (
        (position, loader.epoch(1, position), "belongs to epoch 0, not to epoch 1"),
        (position, PairLoader(source, tiny, batch_size=2, workers=2).epoch(0, position), "saved with 1 workers"),
        ({**position, "size": 3}, loader.epoch(0, {**position, "size": 3}), "has 4 shards, but had 3"),  # type: ignore[typeddict-item]
    ):
        with pytest.raises(InputError, match=said):
            next(other)
        assert start["batches"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"captions": "last"}, "unknown captions 'last'"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1"),
        ({"max_skipped": 1.5}, "a fraction from 0.0 to 1.0"),
        ({"max_skipped": -1}, "must be at least 0"),
        ({"buffer": 0}, "buffer must be at least 1"),
        ({"batch_size": 4, "world_size": 2}, "has 5 samples, too few for a batch of 4 in each of 2 processes"),
    ],
)
def test_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        PairLoader(Listed([1] * 5, set()), one_pixel, **({"batch_size": 1} | options))


def test_a_transform_of_many_shapes_is_told() -> None:
    sizes = iter(range(1, 9))
    loader = PairLoader(Listed([1] * 4, set()), lambda image: torch.zeros(3, next(sizes), 1), batch_size=2)
    with pytest.raises(InputError, match="images of one shape"):
        next(loader.epoch(0))


# Ready-made tags ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "tags"),
    [
        (None, None),
        ("", []),
        ("a dog", ["a dog"]),
        ("cat, dog ,cat", ["cat", "dog"]),
        ("cat; dog, black", ["cat", "dog, black"]),
        (b"cat|a; b", ["cat", "a; b"]),
        ('["cat", " a  dog "]', ["cat", "a dog"]),
        ([b"cat", "dog", ""], ["cat", "dog"]),
    ],
)
def test_tags_are_read_from_lists_and_texts(value: Any, tags: Any) -> None:
    assert parse_tags(value) == tags


@pytest.mark.parametrize("value", [3, [1], '["cat"', b"\xff", {"cat": 1}])
def test_what_holds_no_tags_is_told(value: Any) -> None:
    with pytest.raises(BadPairError, match="the tags are"):
        parse_tags(value)


def test_a_sample_without_tags_beside_others_has_none(tmp_path: Path) -> None:
    pairs = [replace(pair, tags=("cat",) if n == 1 else None) for n, pair in enumerate(make_pairs(4))]
    loader = PairLoader(open_pairs(as_folder(tmp_path, pairs)), tiny, batch_size=2, shuffle=False)
    assert [batch.tags for batch, _ in loader.epoch(0)] == [[[], ["cat"]], None]
    named = PairLoader(open_pairs(tmp_path, tags_column="tags"), tiny, batch_size=2, shuffle=False)
    assert [batch.tags for batch, _ in named.epoch(0)] == [[[], ["cat"]], [[], []]]


# Pictures as they come -----------------------------------------------------------------------------------------------


def test_odd_pictures_come_through_from_files_and_shards_alike(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, moving = io.BytesIO(), io.BytesIO()
    image.save(turned, "jpeg", exif=exif)
    image.save(moving, "gif", save_all=True, append_images=[Image.new("RGB", image.size)])
    pictures = {
        "deep.png": encoded(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)),
        "cmyk.jpg": encoded(image.convert("CMYK"), "jpeg"),
        "turned.jpg": turned.getvalue(),
        "moving.gif": moving.getvalue(),
        "palette.png": encoded(image.quantize(16)),
        "clear.png": encoded(image.convert("RGBA")),
    }
    pairs = [Pair(name, data, (f"{name} caption",)) for name, data in sorted(pictures.items())]
    seen = []
    for spec in (as_folder(tmp_path / "f", pairs), as_shards(tmp_path / "s", pairs, 1)):
        loader = PairLoader(open_pairs(spec), tiny, batch_size=6, shuffle=False)
        ((batch, _),) = loader.epoch(0)
        seen.append((batch.captions, [digest(pixels) for pixels in batch.images]))
    assert seen[0] == seen[1]
