"""Tags of users' images from a vocabulary: :func:`find_tags` for one image, :func:`tag_folder` for many."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ttd_plugins.adapter import DenseAdapter, Size, image_features, image_pixels
from ttd_plugins.caption_maps import backbone_notes
from ttd_plugins.data.image_folders import ImageFile, find_images
from ttd_plugins.data.images import read_image, to_rgb
from ttd_plugins.engine import evaluation_mode
from ttd_plugins.engine_checks import require_adapter
from ttd_plugins.errors import InputError, MissingDependencyError, TTDError, choices_sentence, one_sentence
from ttd_plugins.evaluation.image_segmentation import encode_names
from ttd_plugins.evaluation.protocol_options import TemplateSet
from ttd_plugins.evaluation.protocols.runner import describe_backbone
from ttd_plugins.evaluation.vocabulary import Names, read_vocabulary
from ttd_plugins.method import selection, similarity
from ttd_plugins.options import Rule, check_threshold
from ttd_plugins.plugins import load
from ttd_plugins.utils.files import atomic_path, given_path, write_atomic
from ttd_plugins.utils.output_folder import locked
from ttd_plugins.utils.parquet_keys import decode_keys, encode_keys
from ttd_plugins.utils.progress import Stage, no_progress
from ttd_plugins.utils.settings import settings_digest
from ttd_plugins.utils.user_files import read_regular

if TYPE_CHECKING:
    from ttd_plugins.evaluation.datasets.reader import ClassNames

DEFAULT_TOP = 10
DEFAULT_THRESHOLDS: dict[str, float] = {"minmax": 0.7, "absolute": 0.2, "probability": 0.5}
"""Threshold of each rule over a vocabulary, where most names are absent."""
CHUNK_VALUES = 8 << 20
_HEADER = '{"tags_of_vocabulary": '

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VocabularyTags:
    """The scores of all names of a vocabulary on one image.

    Attributes:
        names: K names.
        scores: cosines ``[K]``: the nearest patch to the nearest alias of each name (the paper's pixel score).
        probabilities: calibrated scores ``[K]`` in (0, 1).
        selected: bool ``[K]``: reaches the threshold, and is one of the ``top`` best.
        calibrated: whether probabilities come from a fitted calibration; otherwise they are a rough guess.
    """

    names: tuple[str, ...] = field(repr=False)
    scores: NDArray[np.float32] = field(repr=False)
    probabilities: NDArray[np.float32] = field(repr=False)
    selected: NDArray[np.bool_] = field(repr=False)
    calibrated: bool

    def __repr__(self) -> str:
        return f"VocabularyTags({', '.join(self.tags)}; {int(self.selected.sum())} of {len(self.names)} names)"

    @property
    def order(self) -> list[int]:
        """Indices of the names, the highest score first."""
        return [int(index) for index in np.argsort(-self.scores, kind="stable")]

    @property
    def tags(self) -> list[str]:
        """The selected names, the highest score first."""
        return [self.names[index] for index in self.order if self.selected[index]]

    def rows(self) -> list[dict[str, Any]]:
        """Return name, score and probability of each selected name, the highest score first."""
        key = "probability" if self.calibrated else "uncalibrated_probability"
        return [
            {"tag": self.names[i], "score": float(self.scores[i]), key: float(self.probabilities[i])}
            for i in self.order
            if self.selected[i]
        ]


class Tagger:
    """Finds the names of one vocabulary in images; the names are encoded once.

    Args:
        backbone: an adapter, or a name for :func:`ttd_plugins.load`.
        vocabulary: any form of :func:`ttd_plugins.evaluation.vocabulary.read_vocabulary`.
        rule: what must reach the threshold; see :func:`ttd_plugins.method.selection.select_tags`. The candidates of an
            image are all names.
        threshold: by default that of :data:`DEFAULT_THRESHOLDS`.
        top: the largest number of selected names; ``None`` for no limit.
        templates: prompt templates of names: a named set, or templates with ``{}`` for the name.
        size: input (height, width) in pixels, or the side of a square; by default the backbone's preferred size.
        device: where a backbone given by name computes.
        stage: starts a subtask, for a progress bar.

    Raises:
        InputError: the vocabulary or an option is wrong.
        TTDError: the backbone cannot be loaded.
    """

    def __init__(
        self,
        backbone: DenseAdapter | str,
        vocabulary: Names,
        *,
        rule: Rule = "minmax",
        threshold: float | None = None,
        top: int | None = DEFAULT_TOP,
        templates: TemplateSet | Sequence[str] = "photo",
        size: Size | None = None,
        device: str | None = None,
        stage: Stage | None = None,
    ) -> None:
        if rule not in get_args(Rule):
            raise InputError(choices_sentence("rule", str(rule), get_args(Rule)))
        self.rule: Rule = rule
        self.threshold = DEFAULT_THRESHOLDS[rule] if threshold is None else float(threshold)
        if not math.isfinite(self.threshold):
            raise InputError(f"the threshold must be a finite number, not {threshold}")
        check_threshold(rule, self.threshold)
        if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
            raise InputError(f"top must be a whole number of 1 or more, not {top!r}")
        self.top, self.size, self.templates = top, size, templates
        self.classes: tuple[ClassNames, ...] = read_vocabulary(vocabulary)
        self.adapter = (
            load(backbone, device=device) if isinstance(backbone, str) else require_adapter(backbone, "find_tags()")
        )
        description = self.adapter.description
        self.notes = backbone_notes(description, calibrated=description.calibrated, rule=rule)
        texts = [text for one in self.classes for text in one.texts]
        owners = [index for index, one in enumerate(self.classes) for _ in one.texts]
        advance = (stage or no_progress)("names", len(texts))
        with evaluation_mode(self.adapter), torch.no_grad():
            self._embeddings = encode_names(self.adapter, texts, templates, advance)
        self._owners = torch.tensor(owners, device=self._embeddings.device)

    @torch.no_grad()
    def __call__(self, image: Image.Image | Path | str | bytes) -> VocabularyTags:
        """Score all names on one image, in chunks of maps.

        Raises:
            InputError: the image cannot be read.
            ImageSizeError: the size does not fit the patch grid.
        """
        opened = read_image(image) if isinstance(image, Path | str | bytes) else to_rgb(image)
        adapter, count = self.adapter, len(self.classes)
        with evaluation_mode(adapter):
            pixels = image_pixels(adapter, opened, self.size)[None].to(adapter.device)
            patches = similarity.normalize(image_features(adapter, pixels, pooled=False).patches.flatten(1, 2))[0]
        step = max(CHUNK_VALUES // len(patches), 1)
        parts = [
            selection.pixel_scores(self._embeddings[start : start + step].to(patches) @ patches.T)
            for start in range(0, len(self._embeddings), step)
        ]
        scores = torch.full((count,), -torch.inf, device=patches.device)
        scores = scores.scatter_reduce(0, self._owners, torch.cat(parts).float(), reduce="amax")
        selected = selection.select_tags(
            scores,
            torch.zeros(count, dtype=torch.long, device=scores.device),
            1,
            rule=self.rule,
            threshold=self.threshold,
            calibration=adapter.description.calibration,
        )
        if self.top is not None and self.top < count:
            best = torch.zeros_like(selected)
            best[scores.argsort(descending=True, stable=True)[: self.top]] = True
            selected &= best
        return VocabularyTags(
            tuple(one.name for one in self.classes),
            scores.cpu().numpy(),
            adapter.description.calibration.probability(scores).cpu().numpy(),
            selected.cpu().numpy(),
            adapter.description.calibrated,
        )

    def settings(self) -> dict[str, Any]:
        """Return everything that a result depends on, besides the image."""
        return {
            "backbone": describe_backbone(self.adapter),
            "names": [[one.name, *one.texts] for one in self.classes],
            "rule": self.rule,
            "threshold": self.threshold,
            "top": self.top,
            "templates": self.templates if isinstance(self.templates, str) else list(self.templates),
            "size": list(self.size) if isinstance(self.size, tuple) else self.size,
        }


def find_tags(
    backbone: DenseAdapter | str, image: Image.Image | Path | str | bytes, vocabulary: Names, **options: Any
) -> VocabularyTags:
    """Find which names of a vocabulary one image shows, by the paper's pixel score.

    Example::

        find_tags(load("family:model@weights"), "photo.jpg", "coco_panoptic", top=5).tags

    Args:
        backbone: an adapter, or a name for :func:`ttd_plugins.load`.
        image: a PIL image, a path, or the bytes of an image file.
        vocabulary: a list, a file, or a built-in list; see
            :func:`ttd_plugins.evaluation.vocabulary.read_vocabulary`.
        **options: keyword arguments of :class:`Tagger`: ``rule``, ``threshold``, ``top``, ``templates``, ``size`` and
            ``device``.

    Raises:
        InputError: the image, the vocabulary or an option is wrong.
        TTDError: the backbone cannot be loaded.
    """
    return Tagger(backbone, vocabulary, **options)(image)


@dataclass(frozen=True)
class TaggedFolder:
    """Result of :func:`tag_folder`.

    Attributes:
        file: the file of tags.
        images: number of images found.
        done: number of images tagged by this call.
        failed: reason of each image that could not be tagged, by key.
    """

    file: Path
    images: int
    done: int
    failed: dict[str, str]


def tag_folder(
    tagger: Tagger,
    source: Path | str,
    out: Path | str,
    *,
    stage: Stage | None = None,
    on_result: Callable[[ImageFile, VocabularyTags], object] | None = None,
) -> TaggedFolder:
    """Tag an image, or all images of a folder and its subfolders, and write one file.

    JSON lines: one object per image with ``image`` (its path in the folder) and ``tags`` (objects with ``tag``,
    ``score`` and ``probability``), or ``error``. Parquet: columns ``image``, ``tags``, ``scores``, ``probabilities``
    and ``error``; the metadata contain the settings, and ``keys`` is ``json`` where a path is not UTF-8 and all are
    stored as JSON. Rows are sorted by path. Records are appended to ``OUT.part``, and
    ``OUT`` is complete or absent. The same call resumes, and adds images that are new in the folder.

    Args:
        tagger: the vocabulary, the options and the backbone.
        source: an image file or a folder.
        out: a ``.jsonl`` or ``.parquet`` file.
        stage: starts subtasks, for progress bars.
        on_result: called with each new result.

    Raises:
        InputError: there are no images, no image can be read, ``out`` cannot be written, another process writes it, or
            it has other settings.
        MissingDependencyError: pyarrow, needed for ``.parquet``, is not installed.
    """
    file = given_path(out)
    require_tags_file(file)
    images = find_images(source)
    settings = tagger.settings()
    digest = settings_digest(settings)
    part = file.with_name(f"{file.name}.part")
    failed: dict[str, str] = {}
    with locked(file.with_name(f".{file.name}.lock"), f"the tags {file}"):
        records = _read_records(file, part, digest)
        pending = [image for image in images if image.key not in records or "error" in records[image.key]]
        advance = (stage or no_progress)("images", len(images))
        advance(len(images) - len(pending))
        if not pending and not part.exists():
            return TaggedFolder(file, len(images), 0, {})
        try:
            before = [f"{_HEADER}{json.dumps(digest)}}}", *map(json.dumps, records.values())]
            # Complete or unchanged, so that an interruption here loses no record.
            write_atomic(part, "".join(f"{line}\n" for line in before))
            with open(part, "a", encoding="utf-8") as stream:
                for image in pending:
                    record: dict[str, Any] = {"image": image.key}
                    try:
                        found = tagger(image.path)
                        record["tags"] = found.rows()
                        if on_result is not None:
                            on_result(image, found)
                    except TTDError as error:
                        record["error"] = failed[image.key] = one_sentence(error)
                        log.warning("%s", one_sentence(error))
                    records[image.key] = record
                    stream.write(json.dumps(record) + "\n")
                    stream.flush()
                    advance(1)
            if len(failed) == len(images):
                key, reason = next(iter(failed.items()))
                part.unlink()
                raise InputError(f"none of the {len(images)} images can be tagged; the first, {key!r}: {reason}")
            rows = [records[key] for key in sorted(records)]
            _write(file, rows, settings, digest, tagger.adapter.description.calibrated)
            part.unlink()
        except OSError as error:
            raise InputError(
                f"the tags cannot be written to {str(file)!r}: {error.strerror or one_sentence(error)}"
            ) from error
    return TaggedFolder(file, len(images), len(pending) - len(failed), failed)


def require_tags_file(file: Path) -> None:
    """Check that tags can be written to ``file``, before any slow work.

    Raises:
        InputError: the file has another suffix, is a folder, or its folder does not exist or is read-only.
        MissingDependencyError: pyarrow, needed for ``.parquet``, is not installed.
    """
    title = f"the file of tags {str(file)!r}"
    if file.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"{title} must end in .jsonl or .parquet")
    if file.suffix == ".parquet":
        _import_pyarrow(file)
    if file.is_dir():
        raise InputError(f"{title} is a folder")
    if not file.parent.is_dir():
        raise InputError(f"{title} cannot be written: its folder does not exist")
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise InputError(f"{title} cannot be written: {(error.strerror or one_sentence(error)).lower()}") from error


def _import_pyarrow(file: Path) -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError(f"{str(file)!r} needs pyarrow; pip install 'ttd-plugins[data]'") from error
    return pa, pq


def _read_records(file: Path, part: Path, digest: str) -> dict[str, dict[str, Any]]:
    """Return the records of an interrupted or an earlier call by key.

    Raises:
        InputError: they have other settings, or a file is not of an earlier call.
    """
    if part.exists() or part.is_symlink():
        lines = _lines(part)
        # A file that was cut short at its start is of a call that was killed.
        head = lines[0] if lines else ""
        if part.is_symlink() or not (head.startswith(_HEADER) or _HEADER.startswith(head.strip())):
            raise InputError(f"{str(part)!r} is not an incomplete file of tags; move it away")
        if lines:
            _require_digest(_parsed(part, head).get("tags_of_vocabulary"), digest, part)
        return {one["image"]: one for one in (_parsed(part, line) for line in lines[1:])}
    if not file.exists():
        return {}
    if file.suffix == ".parquet":
        return _read_parquet(file, digest)
    records = [_parsed(file, line) for line in _lines(file)]
    for one in records:
        _require_digest(one.pop("settings", None), digest, file)
    return {one["image"]: one for one in records}


def _lines(file: Path) -> list[str]:
    """The complete lines of a text file."""
    text = read_regular(file, f"the file {str(file)!r}").decode("utf-8", "surrogateescape")
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _parsed(file: Path, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
        if isinstance(found, dict) and ("tags_of_vocabulary" in found or isinstance(found.get("image"), str)):
            return found
    except (ValueError, RecursionError):
        pass
    raise InputError(f"{str(file)!r} is not a file of tags; choose another file, or move it away")


def _require_digest(found: Any, digest: str, file: Path) -> None:
    if found is None:
        raise InputError(f"{str(file)!r} is not a file of tags; choose another file, or move it away")
    if found != digest:
        raise InputError(
            f"{str(file)!r} contains tags of another vocabulary, backbone or option; choose another file, or delete it"
        )


def _read_parquet(file: Path, digest: str) -> dict[str, dict[str, Any]]:
    _, pq = _import_pyarrow(file)
    try:
        with open(file, "rb") as stream:
            table = pq.read_table(stream)
        metadata = table.schema.metadata or {}
        _require_digest(metadata.get(b"settings_digest", b"").decode() or None, digest, file)
        key = metadata[b"probability_key"].decode()
        records = {}
        images = decode_keys(table.column("image").to_pylist(), metadata)
        for image, row in zip(images, table.to_pylist(), strict=True):
            # Older files have replaced bytes that are not UTF-8, so the image of such a row is unknown.
            if "\ufffd" in image and b"keys" not in metadata:
                continue
            if row["error"] is not None:
                records[image] = {"image": image, "error": row["error"]}
                continue
            rows = zip(row["tags"], row["scores"], row["probabilities"], strict=True)
            tags = [{"tag": tag, "score": score, key: probability} for tag, score, probability in rows]
            records[image] = {"image": image, "tags": tags}
    except InputError:
        raise
    except Exception as error:  # pyarrow raises exceptions of many types
        raise InputError(f"{str(file)!r} is not a file of tags ({one_sentence(error, 100)}); move it away") from error
    return records


def _write(file: Path, records: list[dict[str, Any]], settings: dict[str, Any], digest: str, calibrated: bool) -> None:
    with atomic_path(file) as temporary, open(temporary, "wb") as stream:
        if file.suffix == ".jsonl":
            for one in records:
                stream.write(json.dumps(one | {"settings": digest}).encode() + b"\n")
            return
        pa, pq = _import_pyarrow(file)
        key = "probability" if calibrated else "uncalibrated_probability"
        tags = [one.get("tags") for one in records]

        def column(name: str) -> list[Any]:
            return [None if of_image is None else [tag[name] for tag in of_image] for of_image in tags]

        keys, stored_as = encode_keys([one["image"] for one in records])
        columns = {
            "image": pa.array(keys, pa.string()),
            "tags": pa.array(column("tag"), pa.list_(pa.string())),
            "scores": pa.array(column("score"), pa.list_(pa.float32())),
            "probabilities": pa.array(column(key), pa.list_(pa.float32())),
            "error": pa.array([one.get("error") for one in records], pa.string()),
        }
        metadata = {"settings": json.dumps(settings), "settings_digest": digest, "probability_key": key}
        metadata |= stored_as
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), stream)
