"""The same image-text pairs in every layout that ``open_pairs`` takes."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

WORDS = "dog cat boat tree house horse bridge lamp kite bicycle".split()


@dataclass(frozen=True)
class Pair:
    """One picture file and what is said of it."""

    name: str
    picture: bytes
    captions: tuple[str, ...]
    tags: tuple[str, ...] | None = None


def picture_bytes(seed: int, side: int = 12) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (side, side + 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "jpeg")
    return stream.getvalue()


def make_pairs(count: int, captions: int = 1, *, tags: bool = False) -> list[Pair]:
    """Pairs whose captions differ, hold what CSV has to quote, and are not all ASCII."""
    pairs = []
    for number in range(count):
        texts = tuple(
            f'a "{WORDS[number % 10]}", nº {number}; view {view} — 犬' for view in range(captions)
        )  # fmt: skip
        named = (WORDS[number % 10], f"number {number}") if tags else None
        pairs.append(Pair(f"{number:05d}.jpg", picture_bytes(number), texts, named))
    return pairs


def raw(text: str) -> bytes:
    """A text as bytes; escaped bytes that are not UTF-8 come back."""
    return text.encode("utf-8", "surrogateescape")


def digest(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16]


def tiny(image: Image.Image) -> Tensor:
    """A transform that keeps enough of a picture to tell it from every other one."""
    return torch.from_numpy(np.array(image.resize((4, 4)))).permute(2, 0, 1).float()


def _record(pair: Pair) -> dict[str, Any]:
    record: dict[str, Any] = {"captions": list(pair.captions)}
    return record | ({"tags": list(pair.tags)} if pair.tags is not None else {})


def as_folder(root: Path, pairs: Sequence[Pair], *, form: str = "json") -> Path:
    """``form`` is ``json``, ``txt`` (one caption a line) or ``paper`` (``image/`` and ``json/``)."""
    images, captions = (root / "image", root / "json") if form == "paper" else (root, root)
    images.mkdir(parents=True, exist_ok=True)
    captions.mkdir(parents=True, exist_ok=True)
    for pair in pairs:
        (images / pair.name).write_bytes(pair.picture)
        stem = Path(pair.name).stem
        if form == "txt":
            (captions / f"{stem}.txt").write_bytes(raw("\n".join(pair.captions) + "\n"))
        else:
            (captions / f"{stem}.json").write_text(json.dumps(_record(pair)), encoding="utf-8")
    return root


def _pictures(root: Path, pairs: Sequence[Pair]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for pair in pairs:
        (root / pair.name).write_bytes(pair.picture)


def as_table(root: Path, pairs: Sequence[Pair], suffix: str) -> Path:
    """One row a caption; ready-made tags joined by ``|``, in Parquet as a list."""
    _pictures(root / "pictures", pairs)
    rows = [(f"pictures/{pair.name}", caption, pair.tags) for pair in pairs for caption in pair.captions]
    file = root / f"pairs.{suffix}"
    tagged = any(tags is not None for _, _, tags in rows)
    header = ["image", "caption", *(["tags"] if tagged else [])]
    if suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [pa.array([row[n] for row in rows]) for n in (0, 2)[: len(header) - 1]]
        # Texts that are not UTF-8 get into Parquet files by writers that do not look.
        captions = pa.array([raw(caption) for _, caption, _ in rows], pa.binary()).view(pa.string())
        pq.write_table(pa.table([columns[0], captions, *columns[1:]], names=header), file)
        return file
    cells = [[path, caption, *(["|".join(tags or ())] if tagged else [])] for path, caption, tags in rows]
    if suffix == "jsonl":
        lines = [json.dumps(dict(zip(header, row, strict=True))) for row in cells]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return file
    with open(file, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t" if suffix == "tsv" else ",")
        writer.writerows([header, *cells])
    return file


def as_coco(root: Path, pairs: Sequence[Pair]) -> Path:
    _pictures(root / "train2017", pairs)
    annotations = [
        {"id": 10 * number + view, "image_id": 7 * number, "caption": caption}
        | ({"tags": list(pair.tags)} if pair.tags is not None else {})
        for number, pair in enumerate(pairs)
        for view, caption in enumerate(pair.captions)
    ]
    images = [{"id": 7 * number, "file_name": pair.name} for number, pair in enumerate(pairs)]
    file = root / "annotations" / "captions_train2017.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8")
    return file


def tar_of(file: Path, members: Sequence[tuple[str, bytes]], mode: Any = "w") -> None:
    with tarfile.open(file, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def shard_members(pair: Pair) -> list[tuple[str, bytes]]:
    stem = Path(pair.name).stem
    return [
        (pair.name, pair.picture),
        (f"{stem}.txt", pair.captions[0].encode()),
        (f"{stem}.json", json.dumps({"key": stem, "status": "success"} | _record(pair)).encode()),
    ]


def as_shards(root: Path, pairs: Sequence[Pair], shards: int = 3, suffix: str = "tar") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        members = [m for pair in pairs[number * len(pairs) // shards : (number + 1) * len(pairs) // shards]
                   for m in shard_members(pair)]  # fmt: skip
        tar_of(root / f"{number:05d}.{suffix}", members, "w:gz" if suffix.endswith("gz") else "w")
    return root


def as_dataset(root: Path, pairs: Sequence[Pair]) -> Path:
    import datasets

    columns: dict[str, Any] = {
        "image": [{"bytes": pair.picture, "path": pair.name} for pair in pairs],
        "captions": [list(pair.captions) for pair in pairs],
    }
    features = {"image": datasets.Image(), "captions": datasets.Sequence(datasets.Value("string"))}
    if any(pair.tags is not None for pair in pairs):
        columns["tags"] = [list(pair.tags or ()) for pair in pairs]
        features["tags"] = datasets.Sequence(datasets.Value("string"))
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(str(root))
    return root
