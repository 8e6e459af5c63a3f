"""Any bytes in the place of data: an error is one sentence, nothing hangs, and nothing is written outside."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import struct
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_pairs import picture_bytes, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ttd_plugins.data import PairLoader, open_pairs, read_image
from ttd_plugins.errors import TTDError
from ttd_plugins.evaluation.datasets import open_captions, open_segmentation
from ttd_plugins.tag_extractors.word_tags import WordTags
from ttd_plugins.tags import split_words, without_symbols

SECONDS = 20
"""An example that takes longer counts as hanging."""


def fuzz(quick: int, slow: int, *strategies: Any) -> Callable[[Any], Any]:
    """The same test twice: with a few examples, and with many where slow tests are asked for."""

    def both(test: Any) -> Any:
        @pytest.mark.parametrize("examples", [quick, pytest.param(slow, marks=pytest.mark.slow)])
        def test_any_bytes(examples: int) -> None:
            def one(given_values: tuple[Any, ...]) -> None:
                test(*given_values)

            settings(
                max_examples=examples,
                derandomize=examples == quick,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
            )(given(st.tuples(*strategies))(one))()

        test_any_bytes.__name__ = test.__name__
        return test_any_bytes

    return both


@contextlib.contextmanager
def sandbox() -> Iterator[Path]:
    """A folder, around which nothing may change, and a time limit."""

    def late(*_: Any) -> None:
        raise AssertionError(f"it takes longer than {SECONDS} s")

    with tempfile.TemporaryDirectory() as outer, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = Path(outer) / "data"
        inner.mkdir()
        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(SECONDS)
        try:
            yield inner
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        assert os.listdir(outer) == ["data"]


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """Errors of users may be raised, each as one sentence; anything else may not."""
    told = None
    try:
        yield
    except TTDError as error:
        told = str(error)
    assert told is None or (told and "\n" not in told), told


def read_all(spec: Path, **options: Any) -> None:
    before = sorted(os.walk(spec.parent))
    with sentences():
        loader = PairLoader(open_pairs(spec, **options), tiny, batch_size=1, captions="all", drop_last=False)
        with sentences():
            for batch, _ in loader.epoch(0):
                assert batch.captions[0].strip()
        assert all(reason and "\n" not in reason for reason in loader.skipped.reasons.values())
    assert sorted(os.walk(spec.parent)) == before


def damage(data: bytes, places: list[tuple[int, bytes]], cut: int) -> bytes:
    """Bytes with some replaced, and the end cut off."""
    changed = bytearray(data)
    for place, content in places:
        start = place % max(len(changed), 1)
        changed[start : start + len(content)] = content
    return bytes(changed[: len(changed) - cut % (len(changed) + 1)] if cut else changed)


damages = st.tuples(
    st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(max_size=12)), max_size=4), st.integers(0, 400)
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a.jpg", "b.jpg", "nan", "../x.jpg", "/etc/passwd", "a\\b.jpg", "\0", "x" * 300, 1, "1", 1.0])
)


def nested(inner: Any) -> Any:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)


values = st.recursive(scalars, nested, max_leaves=6)

# Images --------------------------------------------------------------------------------------------------------------


def encoded(kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


PACKED = zlib.compress(bytes(3 << 20))
LONG = [b"a\0\0" + PACKED, b"a\0\1\0\0\0" + PACKED]
EXIF = Image.Exif()
EXIF[0x0112] = 6
IMAGES = [
    encoded("png"),
    encoded("jpeg", exif=EXIF),
    encoded("webp"),
    encoded("gif"),
    encoded("bmp"),
    encoded("tiff"),
    encoded("ppm"),
    encoded("tiff", compression="tiff_lzw"),
    encoded("jpeg", progressive=True),
]


@fuzz(150, 8_000, st.sampled_from(IMAGES) | st.binary(max_size=60), damages)
def test_images(data: bytes, harm: tuple[list[tuple[int, bytes]], int]) -> None:
    with sandbox() as folder, sentences():
        (folder / "a.jpg").write_bytes(damage(data, *harm))
        assert read_image(folder / "a.jpg").mode == "RGB"


@fuzz(
    100,
    2_000,
    st.lists(
        st.tuples(
            st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"tIME"]),
            st.binary(max_size=40) | st.sampled_from(LONG),
        ),
        max_size=4,
    ),
    st.booleans(),
)
def test_png_texts_cost_no_picture(texts: list[tuple[bytes, bytes]], late: bool) -> None:
    data = encoded("png")
    place = data.index(b"IEND") - 4 if late else 33
    known = [(kind, content) for kind, content in texts if kind not in (b"eXIf", b"tIME")]
    with sandbox():
        blob = data[:place] + b"".join(chunk(*one) for one in texts) + data[place:]
        with sentences():
            read_image(blob)
        # Long texts alone are no reason to refuse a picture.
        long = data[:place] + b"".join(chunk(*one) for one in known if len(one[1]) > 1000) + data[place:]
        assert read_image(long).size == (24, 16)


# Shards --------------------------------------------------------------------------------------------------------------


def shard(members: list[tuple[str, bytes]], form: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz" if form == "gzip" else "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


names = st.sampled_from(
    [
        "0.jpg",
        "0.txt",
        "0.json",
        "1.jpg",
        "1.txt",
        "1.a.jpg",
        "1.a.txt",
        "../x.jpg",
        "/x.jpg",
        "a/0.jpg",
        "a/0.txt",
        ".jpg",
        "é.jpg",
    ]
)
contents = st.sampled_from([picture_bytes(0), b"a dog", b'{"caption": "a dog"}', b"[", b""]) | st.binary(max_size=20)


@fuzz(
    80,
    4_000,
    st.lists(st.tuples(names, contents), max_size=6),
    st.sampled_from(["plain", "gzip"]),
    damages,
    st.booleans(),
)
def test_shards(members: list[Any], form: str, harm: Any, whole: bool) -> None:
    data = shard(members, form)
    with sandbox() as folder:
        (folder / "s.tar").write_bytes(data if whole else damage(data, *harm))
        read_all(folder / "s.tar")


@fuzz(60, 4_000, st.integers(0, 511), st.binary(min_size=1, max_size=12), st.sampled_from(["plain", "gzip"]))
def test_tar_headers_with_a_right_checksum(place: int, content: bytes, form: str) -> None:
    data = bytearray(shard([("0.jpg", picture_bytes(0)), ("0.txt", b"a dog")], "plain"))
    data[place : place + len(content)] = content[: 512 - place]
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    with sandbox() as folder:
        (folder / "s.tar").write_bytes(bytes(data) if form == "plain" else zlib.compress(bytes(data), wbits=31))
        read_all(folder / "s.tar")


# Tables and lists ----------------------------------------------------------------------------------------------------

pieces = st.sampled_from(
    [
        "image",
        "caption",
        "tags",
        ",",
        ",",
        "\t",
        ";",
        "|",
        '"',
        '"',
        '""',
        "\n",
        "\n",
        "\r\n",
        "a.jpg",
        "b.jpg",
        "a dog",
        "nan",
        "\0",
        "sep=;",
        "#0",
        "é",
        "\ufeff",
        "[",
        "{",
        "http://x.org/a.jpg",
    ]
)


@fuzz(
    150,
    8_000,
    st.lists(pieces | st.text(max_size=4), max_size=30).map("".join),
    st.sampled_from(["t.csv", "t.tsv", "t.txt", "t.jsonl", "a.txt", "a.json", "t.json"]),
    st.sampled_from(["utf-8", "utf-16", "latin-1"]),
    st.booleans(),
)
def test_text_tables(text: str, name: str, encoding: str, headed: bool) -> None:
    with sandbox() as folder:
        (folder / "a.jpg").write_bytes(picture_bytes(0))
        start = "image,caption\n" if headed else ""
        (folder / name).write_bytes(
            (start + text).encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")
        )
        read_all(folder if name.startswith("a.") else folder / name)


@fuzz(
    100,
    6_000,
    st.lists(
        st.dictionaries(st.sampled_from(["image", "caption", "captions", "tags", "conversations", "split"]), values),
        max_size=4,
    )
    | st.dictionaries(st.sampled_from(["images", "annotations", "a.jpg", "data"]), values),
    st.sampled_from(["t.json", "dataset_x.json", "t.jsonl"]),
)
def test_json_lists(content: Any, name: str) -> None:
    with sandbox() as folder:
        (folder / "a.jpg").write_bytes(picture_bytes(0))
        text = (
            "\n".join(map(json.dumps, content))
            if name.endswith("l") and isinstance(content, list)
            else json.dumps(content)
        )
        (folder / name).write_text(text)
        read_all(folder / name)


@fuzz(60, 2_500, damages)
def test_parquet(harm: Any) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.table({"image": ["a.jpg"] * 50, "caption": ["a dog"] * 50, "tags": [["a"]] * 50}), stream)
    with sandbox() as folder:
        (folder / "a.jpg").write_bytes(picture_bytes(0))
        (folder / "t.parquet").write_bytes(damage(stream.getvalue(), *harm))
        read_all(folder / "t.parquet")


# COCO ----------------------------------------------------------------------------------------------------------------

POLYGON = [[1, 1, 5, 1, 5, 5]]


def coco() -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 12, "width": 16}],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "caption": "a dog",
                "category_id": 18,
                "segmentation": POLYGON,
                "iscrowd": 0,
                "file_name": "a.png",
                "segments_info": [{"id": 1, "category_id": 18}],
            },
        ],
    }


paths = st.sampled_from(
    [
        ("images",),
        ("categories",),
        ("annotations",),
        *(("images", 0, key) for key in ("id", "file_name", "height", "width")),
        *(("categories", 0, key) for key in ("id", "name")),
        ("images", 0),
        ("annotations", 0),
        *(
            ("annotations", 0, key)
            for key in (
                "id",
                "image_id",
                "caption",
                "category_id",
                "segmentation",
                "iscrowd",
                "segments_info",
                "file_name",
            )
        ),
        ("annotations", 0, "segmentation", 0),
        ("annotations", 0, "segmentation", 0, 2),
    ]
)
runs = st.fixed_dictionaries(
    {"size": st.just([12, 16]) | values, "counts": st.text(max_size=40) | st.lists(st.integers(), max_size=6)}
)


@fuzz(150, 5_000, st.lists(st.tuples(paths, values | runs | st.sampled_from([1e300, -1, 10**9, 10**30])), max_size=3))
def test_coco_files(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    content = coco()
    for path, value in changes:
        place: Any = content
        with contextlib.suppress(KeyError, IndexError, TypeError):
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = value
    with sandbox() as folder:
        (folder / "images").mkdir()
        (folder / "images" / "a.jpg").write_bytes(picture_bytes(0))
        for name in ("captions.json", "instances.json"):
            (folder / name).write_text(json.dumps(content))
        read_all(folder / "captions.json")
        for reader, name in ((open_captions, "coco_captions"), (open_segmentation, "coco_object")):
            with sentences():
                data = reader(name, folder)
                data.check()
                data.require_truth()
        (folder / "annotations").mkdir()
        (folder / "annotations" / "panoptic_val2017").mkdir()
        (folder / "annotations" / "panoptic_val2017.json").write_text(json.dumps(content))
        (folder / "images").rename(folder / "val2017")
        with sentences():
            open_segmentation("coco_panoptic", folder).check()


# Captions ------------------------------------------------------------------------------------------------------------

texts = st.text(max_size=60) | st.lists(
    st.sampled_from(
        ["&amp;", "&", ";", "&#39;", "&#x110000;", "\u00ad", "\u200b", "\u200d", "dog", " ", "'", "-", "é", "\ud800"]
    ),
    max_size=12,
).map("".join)


@fuzz(150, 10_000, texts)
def test_captions(text: str) -> None:
    with sandbox():
        words = split_words(text)
        assert all(words) and WordTags()([text]) == WordTags()([text])
        assert "\n" not in without_symbols(text)
        # Invisible format characters change no word.
        assert split_words("\u00ad".join(text)) == words or "&" in text
