"""Pairs that are broken or hostile: each sample is read or listed, nothing hangs, and each error is one sentence."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeFamily, FakePlugin
from helpers_pairs import as_folder, make_pairs, picture_bytes, tar_of
from test_data_layouts import pairs_of, pictures, read, write

from ttd_plugins.data import PairFilter, open_pairs, read_image
from ttd_plugins.data.caption_parsing import parse_tags
from ttd_plugins.data.pruning import score_pairs
from ttd_plugins.errors import InputError
from ttd_plugins.plugins import load, temporary_plugin
from ttd_plugins.utils.user_files import walk_files

PICTURE = picture_bytes(0)
fifos = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")


# Walks ---------------------------------------------------------------------------------------------------------------


def test_links_that_form_loops(tmp_path: Path) -> None:
    root = as_folder(tmp_path / "photos", make_pairs(3))
    as_folder(root / "a", make_pairs(2))
    as_folder(root / "b", make_pairs(2))
    as_folder(tmp_path / "outside", make_pairs(1))
    for link, target in (
        ("loop", "."), ("up", ".."), ("top", "/"), ("a/b", "../b"), ("b/a", "../a"), ("b/self", "."), ("a/root", ".."),
        ("self", "self"), ("more", "../outside"), ("gone", "nowhere"),
    ):  # fmt: skip
        (root / link).symlink_to(target)
    (tmp_path / "outside" / "back").symlink_to(root)
    found, skipped = read(root)
    assert len(found) == 8 and not skipped
    assert {key.rpartition("/")[0] for key in found} == {"", "a", "b", "more"}


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    as_folder(tmp_path / "real", make_pairs(2))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "real")
    assert sorted(read(tmp_path / "photos")[0]) == ["linked/00000.jpg", "linked/00001.jpg"]
    (tmp_path / "whole").symlink_to(tmp_path / "real")
    assert len(read(tmp_path / "whole")[0]) == 2


@fifos
def test_named_pipes_block_nothing(tmp_path: Path) -> None:
    as_folder(tmp_path / "f", make_pairs(2))
    for name in ("00000.json", "pipe.jpg", "pipe.json", "t.csv", "s.tar", "c.json", "x.parquet", "y.jsonl", "z.bin"):
        (tmp_path / "f" / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / "f" / name)
    with pytest.raises(InputError, match=r"pipe\.jpg' is a named pipe, not a regular file"):
        read_image(tmp_path / "f" / "pipe.jpg")
    for name in ("t.csv", "s.tar", "c.json", "x.parquet", "y.jsonl", "z.bin"):
        with pytest.raises(InputError, match=r"' is a named pipe, not a regular file"):
            open_pairs(tmp_path / "f" / name)
        (tmp_path / "f" / name).unlink()
    found, skipped = read(tmp_path / "f")
    assert list(found) == ["00001.jpg"]
    assert skipped == dict.fromkeys(("00000.jpg", "pipe.jpg"), "the caption file is a named pipe, not a regular file")
    table = write(tmp_path / "f" / "t.csv", "image,caption\npipe.jpg,a\n/dev/zero,b\n/dev/stdin,c\n")
    assert all("regular file" in reason for reason in read(table)[1].values())


def latin(root: Path, count: int = 2) -> Path:
    """A folder whose names are not UTF-8, with pairs."""
    folder = Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system wants UTF-8")
    for number, pair in enumerate(make_pairs(count)):
        stem = os.fsdecode(b"na\xefve%d" % number)
        (folder / f"{stem}.jpg").write_bytes(pair.picture)
        (folder / f"{stem}.txt").write_text(pair.captions[0])
    return folder


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_names_that_are_not_utf8(tmp_path: Path, suffix: str) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    folder = latin(tmp_path)
    found, skipped = read(folder)
    assert len(found) == 2 and not skipped
    (folder / "broken.jpg").write_bytes(b"")
    (folder / "broken.txt").write_text("a dog")
    with temporary_plugin(FakePlugin(FakeFamily("fake"))):
        backbone = load("fake:small")
    result = score_pairs(open_pairs(folder), backbone, folder / f"scores.{suffix}", batch_size=2)
    assert set(result.scores.keys) == {*found, "broken.jpg"}
    source = open_pairs(folder, keep=folder / f"scores.{suffix}", threshold=-1.0)
    assert isinstance(source.keep, PairFilter) and source.keep.selected == 2
    assert {len(source.keep.captions(key) or ()) for key in found} == {1}
    tar_of(folder / "s.tar", [(os.fsdecode(b"\xff.jpg"), PICTURE), (os.fsdecode(b"\xff.txt"), b"a dog")])
    assert list(read(folder / "s.tar")[0].values()) == [["a dog"]]


TRAIN = ["--backbone", "open_clip:tiny", "--steps", "2", "--batch-size", "2", "--cpu"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "{}/none", "--out", "{}/scores.jsonl"],
        pytest.param(
            ["prune", "{}", "--out", "{}/scores.jsonl", "--batch-size", "2", "--backbone", "open_clip:tiny"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["train", "--data", "{}", "--out", "{}/run", *TRAIN], marks=pytest.mark.slow),
    ],
)
def test_names_that_are_not_utf8_on_the_command_line(tmp_path: Path, arguments: list[str]) -> None:
    folder = latin(tmp_path, 4)
    (folder / "broken.jpg").write_bytes(b"")
    command = [sys.executable, "-m", "ttd_plugins.cli", *(argument.format(folder) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=240)
    output = (done.stdout + done.stderr).decode()
    assert "Traceback" not in output, output
    assert done.returncode == (2 if "{}/none" in arguments else 0), output


@pytest.mark.parametrize(
    "name", ["x" * 5000, "a\0b.csv", "a/" * 3000, "*" * 300, "{a..", "a{1..3}\0.tar", "x" * 5000 + ".tar"]
)
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(InputError) as caught:
        open_pairs(name)
    assert len(str(caught.value)) < 1000
    with pytest.raises(InputError):
        read_image(name)


# Shards --------------------------------------------------------------------------------------------------------------


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


KINDS = {
    "file": tarfile.REGTYPE, "pax": tarfile.XHDTYPE, "global": tarfile.XGLTYPE, "name": tarfile.GNUTYPE_LONGNAME,
    "link": tarfile.GNUTYPE_LONGLINK,
}  # fmt: skip


@pytest.mark.parametrize("form", ["plain", "gzip"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [10**12, 10**19, -512, -(10**9)])
def test_a_header_with_an_impossible_size(tmp_path: Path, form: str, kind: str, size: int) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in pairs_of("0", "1"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        end = tar.offset
    data = stream.getvalue()[:end] + header("2.jpg", size, KINDS[kind]) + b"x" * 2000
    (tmp_path / "s.tar").write_bytes(data if form == "plain" else gzip.compress(data))
    tracemalloc.start()
    found, skipped = read(tmp_path / "s.tar")
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()
    assert set(found) == {"s.tar/0", "s.tar/1"}
    assert list(skipped) == ["s.tar"] and "the shard cannot be read after 2 samples" in skipped["s.tar"]


@pytest.mark.parametrize("form", ["plain", "gzip"])
def test_extended_headers_that_lead_in_circles(tmp_path: Path, form: str) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0.jpg")
        info.pax_headers = {"size": "-1024"}
        info.size = 0
        tar.addfile(info)
    many = header("a", 10, tarfile.GNUTYPE_LONGNAME) + b"name".ljust(512, b"\0")
    for name, data in (("pax", stream.getvalue()), ("deep", many * 3000)):
        file = tmp_path / f"{name}.tar"
        file.write_bytes(data if form == "plain" else gzip.compress(data))
        found, skipped = read(file)
        assert not found and all("cannot be read" in reason for reason in skipped.values())


@pytest.mark.parametrize("start", [b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"])
def test_a_compressed_shard_that_is_cut_anywhere(tmp_path: Path, start: bytes) -> None:
    whole = start + gzip.compress(bytes(2048))[2:]
    for length in range(len(start), 12):
        (tmp_path / "s.tar").write_bytes(whole[:length])
        found, skipped = read(tmp_path / "s.tar")
        assert not found and "cannot be read after 0 samples" in skipped["s.tar"]


def test_a_broken_header_in_a_compressed_shard_is_told(tmp_path: Path) -> None:
    tar_of(tmp_path / "s.tar", pairs_of("0", "1", "2"))
    data = bytearray((tmp_path / "s.tar").read_bytes())
    data[data.index(b"2.jpg") + 150] ^= 1
    for name, content in (("s.tar", bytes(data)), ("s.tgz", gzip.compress(bytes(data)))):
        (tmp_path / name).write_bytes(content)
        found, skipped = read(tmp_path / name)
        assert len(found) == 2 and "a header is broken" in skipped[name]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gs://", "names no bucket; write gs://BUCKET/PATH.tar"),
        ("gs:///x.tar", "names no bucket"),
        ("gs:x.tar", "names no bucket"),
        ("gs://bucket", "names no file"),
        ("https://", "names no host"),
        ("http:///a/{0..3}.tar", "names no host"),
        ("https://:80/a.tar", "names no host"),
        ("https://x:port/a.tar", "is no valid URL"),
        ("https://[::1/a.tar", "is no valid URL|have"),
        ("https://x.org/a';touch y;'.tar", "is no valid URL; write other characters"),
        ("https://x.org/a b.tar", "is no valid URL"),
        ("s4://bucket/a.tar", "an unknown scheme; known: http"),
        ("file:///none/a.tar", "the shard '/none/a.tar' does not exist"),
    ],
)
def test_urls_that_cannot_be_opened_are_refused_at_once(spec: str, said: str) -> None:
    pytest.importorskip("webdataset")
    with pytest.raises(InputError, match=said):
        open_pairs(spec)


# Tables --------------------------------------------------------------------------------------------------------------


def csv(root: Path, content: str | bytes, name: str = "t.csv") -> Path:
    pictures(root, *(f"{letter}.jpg" for letter in "abcdef"))
    (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root / name


ROWS = ["image,caption", "a.jpg,a dog", "b.jpg,a cat", "c.jpg,a bird", 'd.jpg,"two, ""both"" red"', "e.jpg,last"]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('b.jpg,"a cat', "row 2: the quote that opens in line 3 is not closed"),
        ('b.jpg,"a cat""', "row 2: the quote that opens in line 3 is not closed"),
        ('b.jpg,a "cat, big', "row 2 has 3 columns; the table has 2"),
        ('"b.jpg,a cat', "row 2: the quote"),
    ],
)
def test_a_broken_quote_costs_one_row(tmp_path: Path, broken: str, reason: str) -> None:
    rows = [*ROWS[:2], broken, *ROWS[3:]]
    found, skipped = read(csv(tmp_path, "\n".join(rows)))
    assert found == {"a.jpg": ["a dog"], "c.jpg": ["a bird"], "d.jpg": ['two, "both" red'], "e.jpg": ["last"]}
    ((key, said),) = skipped.items()
    assert key == "t.csv:row 2" and said.startswith(reason)


def test_a_quote_that_a_later_row_closes(tmp_path: Path) -> None:
    rows = ["image,caption", 'a.jpg,"a 7', "b.jpg,a cat", 'c.jpg,a screen of 7"', 'd.jpg,"one', ' two"', "e.jpg,last"]
    found, skipped = read(csv(tmp_path, "\n".join(rows)))
    assert found == {"b.jpg": ["a cat"], "c.jpg": ['a screen of 7"'], "d.jpg": ["one two"], "e.jpg": ["last"]}
    assert skipped == {"t.csv:row 1": "row 1: the quote that opens in line 2 is not closed"}


def test_a_thousand_open_quotes_end_soon(tmp_path: Path) -> None:
    rows = ["image,caption", *(f'a{n}.jpg,"open {n}' for n in range(1000)), "a.jpg,a dog"]
    found, skipped = read(csv(tmp_path, "\n".join(rows)))
    assert found == {"a.jpg": ["a dog"]} and len(skipped) == 1000


MISSING = ["nan", "NaN", "None", "NULL", "null", "N/A", "n/a", "<NA>", "#N/A", "NaT", "", "  "]


@pytest.mark.parametrize("value", MISSING)
def test_values_that_stand_for_nothing(tmp_path: Path, value: str) -> None:
    rows = [f"a.jpg,{value}", "b.jpg,a nan bread", f"{value},no image", f"{value},no image either", f"c.jpg,{value}"]
    found, skipped = read(csv(tmp_path, "\n".join(["image,caption", *rows])))
    assert found == {"b.jpg": ["a nan bread"]}
    assert set(skipped) == {"a.jpg#0", "c.jpg#0", "t.csv:row 3", "t.csv:row 4"}
    for name in ("a.txt", "a.json"):
        folder = tmp_path / name
        pictures(folder, "a.jpg", "b.jpg")
        write(folder / "b.txt", "a dog")
        write(folder / name, json.dumps({"caption": value}) if name.endswith("json") else value)
        found, skipped = read(folder)
        assert found == {"b.jpg": ["a dog"]} and list(skipped) == ["a.jpg#0"]
    assert parse_tags(value) == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.json", "captions.json", "a.txt", "a.json"])
def test_encodings_with_a_byte_order_mark(tmp_path: Path, encoding: str, name: str) -> None:
    rows = [{"image": "a.jpg", "caption": "a café 犬"}]
    coco = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a café 犬"}]}
    text = {
        "t.csv": "image,caption\r\na.jpg,a café 犬\r\n", "t.tsv": "image\tcaption\r\na.jpg\ta café 犬\r\n",
        "t.jsonl": json.dumps(rows[0], ensure_ascii=False) + "\n", "t.json": json.dumps(rows, ensure_ascii=False),
        "captions.json": json.dumps(coco, ensure_ascii=False), "a.txt": "a café 犬\n",
        "a.json": json.dumps("a café 犬", ensure_ascii=False),
    }[name]  # fmt: skip
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    pictures(tmp_path, "a.jpg")
    (tmp_path / name).write_bytes(mark + text.encode(encoding))
    spec = tmp_path if name.startswith("a.") else tmp_path / name
    assert read(spec) == ({"a.jpg": ["a café 犬"]}, {})


def test_utf16_without_a_mark_is_told(tmp_path: Path) -> None:
    file = csv(tmp_path, "image,caption\na.jpg,a dog\n".encode("utf-16-le"))
    with pytest.raises(InputError, match="NUL characters; if it is UTF-16"):
        open_pairs(file)
    pictures(tmp_path / "f", "a.jpg")
    (tmp_path / "f" / "a.txt").write_bytes("a dog".encode("utf-16-le"))
    assert "NUL characters" in read(tmp_path / "f")[1]["a.jpg#0"]


@pytest.mark.parametrize("mark", [";", "|", "\t", ","])
@pytest.mark.parametrize("line", ["sep={}", "SEP={}", '"sep={}"'])
def test_the_separator_line_of_spreadsheets(tmp_path: Path, mark: str, line: str) -> None:
    rows = [line.format(mark), f"image{mark}caption", f"a.jpg{mark}a dog: red"]
    for encoding in ("utf-8-sig", "utf-16"):
        found, skipped = read(csv(tmp_path, "\r\n".join(rows).encode(encoding)))
        assert found == {"a.jpg": ["a dog: red"]} and not skipped


def test_line_ends_of_three_systems(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        assert read(csv(tmp_path, end.join([*ROWS, ""])))[0]["d.jpg"] == ['two, "both" red']


def test_a_corrupt_page_of_parquet_is_told(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    file = tmp_path / "t.parquet"
    columns = {"image": [f"{n}.jpg" for n in range(2000)], "caption": [f"a dog {n}" for n in range(2000)]}
    pq.write_table(pa.table(columns), file, compression="snappy")
    data = bytearray(file.read_bytes())
    data[200:2000] = os.urandom(1800)
    file.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"t\.parquet' (cannot be read after row 0|is not a Parquet table)"):
        open_pairs(file)


# COCO ----------------------------------------------------------------------------------------------------------------


def coco(root: Path, ids: list[Any], refers: list[Any], names: list[str] | None = None) -> Path:
    names = names or [f"{letter}.jpg" for letter in "abcdef"[: len(ids)]]
    pictures(root, *names)
    content = {
        "images": [{"id": number, "file_name": name} for number, name in zip(ids, names, strict=True)],
        "annotations": [{"id": n, "image_id": number, "caption": f"caption {n}"} for n, number in enumerate(refers)],
    }
    return write(root / "captions.json", content)


@pytest.mark.parametrize(
    ("ids", "refers"),
    [([1, 2], ["1", "2"]), (["1", "2"], [1, 2]), (["01", "02"], [1, 2]), ([1, 2], [1.0, 2.0]), (["x", 5], ["x", "5"])],
)
def test_ids_of_different_types_are_matched(tmp_path: Path, ids: list[Any], refers: list[Any]) -> None:
    assert read(coco(tmp_path, ids, refers)) == ({"a.jpg": ["caption 0"], "b.jpg": ["caption 1"]}, {})


def test_ids_that_look_alike_stay_apart(tmp_path: Path) -> None:
    found, skipped = read(coco(tmp_path, ["7", "007"], ["007", "7", 7.5, 8]))
    assert found == {"a.jpg": ["caption 1"], "b.jpg": ["caption 0"]}
    assert set(skipped) == {"image_id 7.5", "image_id 8"}
    assert "image_id 7" in read(coco(tmp_path, ["7", "007"], ["7", "007", 7]))[1]


@pytest.mark.parametrize(
    ("ids", "refers", "said"),
    [
        ([1, 1], [1], "two images have the id 1"),
        ([[1], 2], [2], r"an image has the id \[1\], which is neither a number nor a text"),
        ([1, 2], [[1]], r"annotation 0: the image_id \[1\] is neither"),
        ([1, None], [1], "an image has the id None"),
    ],
)
def test_ids_that_are_none_are_told(tmp_path: Path, ids: list[Any], refers: list[Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        open_pairs(coco(tmp_path, ids, refers))


def test_images_of_one_name_are_one(tmp_path: Path) -> None:
    found, skipped = read(coco(tmp_path, [1, 2, 3], [1, 2, 3], ["a/1.jpg", "a/1.jpg", "b/1.jpg"]))
    assert found == {"a/1.jpg": ["caption 0", "caption 1"], "b/1.jpg": ["caption 2"]} and not skipped


def test_a_caption_that_is_no_text_is_listed(tmp_path: Path) -> None:
    file = coco(tmp_path, [1], [1, 1])
    content = json.loads(file.read_text())
    content["annotations"][0]["caption"] = None
    assert read(write(file, content)) == ({"a.jpg": ["caption 1"]}, {"a.jpg#0": "the caption is empty"})


def test_walks_yield_nothing_hidden(tmp_path: Path) -> None:
    pictures(tmp_path, "a.jpg", ".b.jpg", ".c/d.jpg", "e/f.jpg")
    assert sorted(walk_files(tmp_path)) == ["a.jpg", "e/f.jpg"]


def test_a_damaged_utf_16_caption_is_listed_and_never_trained_on(tmp_path: Path) -> None:
    pictures(tmp_path / "f", "a.jpg", "b.jpg")
    (tmp_path / "f" / "a.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "f" / "b.txt").write_bytes("a dog".encode("utf-16"))
    captions, skipped = read(tmp_path / "f")
    assert len(captions) == 1
    assert skipped == {"a.jpg#0": skipped["a.jpg#0"]}
    assert "is not UTF-8" in skipped["a.jpg#0"]
