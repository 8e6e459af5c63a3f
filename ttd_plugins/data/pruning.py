"""Scoring of all pairs by image-text similarity, for the paper's sample-level pruning (arXiv 2404.00384).

The score of a pair is the cosine of the backbone's pooled image embedding and the caption's embedding. The threshold is
chosen later, with ``open_pairs(spec, keep=FILE, threshold=...)``, so that one file serves many runs.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttd_plugins.adapter import DenseAdapter, ImageTransform, Size, image_features
from ttd_plugins.data.loader import LoaderPosition, PairLoader
from ttd_plugins.data.pair_source import MapSource, PairSource
from ttd_plugins.data.score_filter import PairScores, read_scores
from ttd_plugins.data.skipped_samples import SkipLog
from ttd_plugins.engine import evaluation_mode
from ttd_plugins.errors import InputError, MissingDependencyError, TTDError, one_sentence
from ttd_plugins.method import similarity
from ttd_plugins.method.text_embeddings import encode_texts
from ttd_plugins.toolkit.weights_hash import weights_hash
from ttd_plugins.utils.files import atomic_path, given_path
from ttd_plugins.utils.output_folder import locked
from ttd_plugins.utils.parquet_keys import encode_keys
from ttd_plugins.utils.settings import first_difference

HEADER = b'{"scores": {'
"""How a file of scores begins."""
NEWER_SETTINGS = ("weights_sha256", "positions", "keep", "transform")
"""Settings that older files lack."""
SKIPPED = b'{"key": '
"""How a line of a list of skipped samples begins."""


@dataclass(frozen=True)
class PruningResult:
    """Result of :func:`score_pairs`.

    Attributes:
        file: the file of scores.
        scores: its content.
        skipped: reason of each sample that could not be scored, by key.
    """

    file: Path
    scores: PairScores
    skipped: dict[str, str]


@torch.no_grad()
def score_pairs(
    source: PairSource,
    backbone: DenseAdapter,
    out: str | os.PathLike[str],
    *,
    transform: ImageTransform | None = None,
    size: Size | None = None,
    batch_size: int = 64,
    workers: int = 0,
    max_skipped: int | float | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> PruningResult:
    """Score every caption of every image.

    Scores are appended to ``OUT.part``. An interrupted call resumes there when it is repeated with the same arguments.
    ``OUT`` is complete or absent. A complete ``OUT`` of the same pairs, filter, weights and size is read and returned.
    With ``transform``, no earlier file is resumed or returned, because functions cannot be compared.

    Args:
        source: the pairs; its filter ``keep`` applies.
        backbone: the backbone, which is in evaluation mode meanwhile.
        out: a ``.jsonl`` or ``.parquet`` file.
        transform: preprocessing; by default ``backbone.native_transform()``, or ``dense_transform(size)`` if a size is
            given.
        size: input (height, width) in pixels.
        batch_size: pairs per batch.
        workers: number of processes that decode images.
        max_skipped: see :class:`ttd_plugins.data.PairLoader`.
        on_batch: callback, called with the number of samples scored since the last call.

    Raises:
        InputError: ``out`` cannot be written, another process writes it, it contains scores of other pairs or of
            another backbone, it exists and ``transform`` is given, or a file beside it that would be replaced is not
            of an earlier call.
        TTDError: no pair can be scored, or too many samples are skipped.
        MissingDependencyError: pyarrow, needed for ``.parquet``, is not installed.
    """
    file = given_path(out)
    settings: dict[str, Any] = {
        "backbone": backbone.description.name,
        "spec": source.name,
        "size": list(size) if isinstance(size, tuple) else size,
        "pictures": len(source) if isinstance(source, MapSource) else None,
        "weights_sha256": weights_hash(backbone),
        "positions": backbone.description.positions,
        "keep": None if source.keep is None else source.keep.settings(),
        "transform": None if transform is None else "own",
    }
    if backbone.tuned_from is not None:
        settings["tuned_from"] = backbone.tuned_from.as_dict()
    require_scores_file(file)
    with locked(file.with_name(f".{file.name}.lock"), f"the scores {file}"):
        return _score_pairs(
            source, backbone, file, settings, transform, size, batch_size, workers, max_skipped, on_batch
        )


def _score_pairs(
    source: PairSource,
    backbone: DenseAdapter,
    file: Path,
    settings: dict[str, Any],
    transform: ImageTransform | None,
    size: Size | None,
    batch_size: int,
    workers: int,
    max_skipped: int | float | None,
    on_batch: Callable[[int], None] | None,
) -> PruningResult:
    """:func:`score_pairs` with the lock of its file."""
    skips_file = file.with_name(f"{file.name}.skipped.jsonl")
    if file.exists():
        _refuse_own_transform(file, transform)
        done = read_scores(file)
        _require_same(done.settings, settings, file)
        return PruningResult(file, done, dict(SkipLog(skips_file if skips_file.exists() else None).reasons))
    part = file.with_name(f"{file.name}.part")
    if part.exists():
        _refuse_own_transform(part, transform)
    start = _resume(part, settings)
    if start is None and skips_file.exists():
        _require_skip_log(skips_file)
        skips_file.unlink()
    skipped = SkipLog(skips_file)
    loader = PairLoader(
        source,
        transform or (backbone.native_transform() if size is None else backbone.dense_transform(size)),
        batch_size=batch_size,
        captions="all",
        workers=workers,
        shuffle=False,
        drop_last=False,
        skipped=skipped,
        max_skipped=max_skipped,
    )
    if on_batch is not None and start is not None:
        on_batch(sum(start["units"]))
    try:
        with evaluation_mode(backbone), open(part, "ab") as stream:
            for batch, position in loader.epoch(0, start):
                pooled = image_features(backbone, batch.images.to(backbone.device)).pooled
                assert pooled is not None
                captions, _ = encode_texts(backbone, batch.captions)
                cosines = (similarity.normalize(pooled) * captions).sum(-1).double().cpu().tolist()
                rows = zip(batch.groups, batch.choices, cosines, strict=True)
                lines = [{"key": key, "caption": choice, "similarity": value} for key, choice, value in rows]
                # The position completes its batch: lines after the last position are discarded when resuming.
                for line in (*lines, {"position": position}):
                    stream.write(json.dumps(line).encode() + b"\n")
                stream.flush()
                if on_batch is not None:
                    on_batch(len(batch))
        _finish(part, file, skipped)
    except OSError as error:
        raise TTDError(f"the scores cannot be written to {str(file)!r}: {error.strerror or error}") from error
    return PruningResult(file, read_scores(file), dict(skipped.reasons))


def require_scores_file(file: Path) -> None:
    """Check that scores can be written to ``file``, before any slow work.

    Raises:
        InputError: the file has another suffix, is a folder, or its folder does not exist or is read-only.
        MissingDependencyError: pyarrow, needed for ``.parquet``, is not installed.
    """
    if file.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"the file of scores {str(file)!r} must end in .jsonl or .parquet")
    if file.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(f"{str(file)!r} needs pyarrow; pip install 'ttd-plugins[data]'") from error
    if file.is_dir():
        raise InputError(f"the file of scores {str(file)!r} is a folder")
    if not file.parent.is_dir():
        raise InputError(f"the file of scores {str(file)!r} cannot be written: its folder does not exist")
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        reason = (error.strerror or one_sentence(error)).lower()
        raise InputError(f"the file of scores {str(file)!r} cannot be written: {reason}") from error


def _refuse_own_transform(file: Path, transform: ImageTransform | None) -> None:
    if transform is not None:
        raise InputError(
            f"{str(file)!r} contains scores of an earlier call, whose transform cannot be compared with this one; "
            "choose another file, or delete it"
        )


def _require_same(found: dict[str, Any], wanted: dict[str, Any], file: Path) -> None:
    # Older files do not have the newer settings.
    unknown = () if "weights_sha256" in found else NEWER_SETTINGS
    difference = first_difference(found, wanted, ignore=unknown)
    if difference is not None:
        raise InputError(
            f"{str(file)!r} contains scores with another setting ({difference}); choose another file, or delete it"
        )


def _resume(part: Path, settings: dict[str, Any]) -> LoaderPosition | None:
    """Truncate an incomplete file after its last whole batch and return the position there; or start a new file."""
    try:
        position: LoaderPosition | None = None
        end = 0
        if part.is_symlink():
            raise ValueError
        if part.exists():
            with open(part, "rb") as stream:
                for number, line in enumerate(stream):
                    record = json.loads(line) if line.endswith(b"\n") else {}
                    if not isinstance(record, dict):
                        raise ValueError
                    if not number and "scores" in record:
                        if not isinstance(record["scores"], dict):
                            raise ValueError
                        _require_same(record["scores"], settings, part)
                        end = len(line)
                    # A first line that was cut short is of a call that was killed at its start.
                    if not end and not (not number and HEADER.startswith(line[: len(HEADER)])):
                        raise ValueError
                    if "position" in record:
                        position, end = record["position"], stream.tell()
                _require_position(position)
            os.truncate(part, end)
        if not end:
            part.write_bytes(json.dumps({"scores": settings}).encode() + b"\n")
        return position
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(part)!r} is not an incomplete file of scores; delete it to start again") from error
    except OSError as error:
        raise TTDError(f"the scores cannot be written to {str(part)!r}: {error.strerror}") from error


def _require_position(position: Any) -> None:
    """Raise ValueError unless a position is one of the loader, or ``None``."""
    if position is None:
        return
    whole = isinstance(position, dict) and set(position) == set(LoaderPosition.__annotations__)
    numbers = [one for key, one in position.items() if key != "units"] + position["units"] if whole else [None]
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in numbers):
        raise ValueError


def _require_skip_log(file: Path) -> None:
    """Check that a file is a list of skipped samples, before it is deleted.

    Raises:
        InputError: it is another file.
    """
    try:
        with open(file, "rb") as stream:
            # A last line that was cut short is of a call that was killed.
            whole = [line for line in stream if line.endswith(b"\n") or not line.startswith(SKIPPED[: len(line)])]
        lines = [json.loads(line) for line in whole]
        foreign = file.is_symlink() or not all(isinstance(one, dict) and set(one) == {"key", "reason"} for one in lines)
    except (OSError, ValueError, RecursionError):
        foreign = True
    if foreign:
        raise InputError(f"{str(file)!r} is not a list of skipped samples and would be replaced; move it away")


def _finish(part: Path, file: Path, skipped: SkipLog) -> None:
    """Write the complete file: the scores without positions, and the skipped samples. Then delete the part."""
    with open(part, "rb") as stream:
        settings = json.loads(next(stream))["scores"]
        rows = [row for row in map(json.loads, stream) if "key" in row]
    # A skipped caption is listed with its image's key, # and its index.
    rows += [{"key": key, "caption": -1, "similarity": None, "reason": why} for key, why in skipped.reasons.items()]
    with atomic_path(file) as temporary:
        if file.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            keys, stored_as = encode_keys([row["key"] for row in rows])
            columns = {
                "key": pa.array(keys, pa.string()),
                "caption": pa.array([row["caption"] for row in rows], pa.int32()),
                "similarity": pa.array([row["similarity"] for row in rows], pa.float64()),
                "reason": pa.array([row.get("reason") for row in rows], pa.string()),
            }
            metadata = {"scores": json.dumps(settings)} | stored_as
            table = pa.table(columns).replace_schema_metadata(metadata)
            # pyarrow takes no path that is not UTF-8.
            with open(temporary, "wb") as stream:
                pq.write_table(table, stream)
        else:
            with open(temporary, "wb") as stream:
                for row in ({"scores": settings}, *rows):
                    stream.write(json.dumps(row).encode() + b"\n")
    part.unlink()


def quantiles(scores: PairScores, fractions: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 0.75)) -> dict[float, float]:
    """Return the similarities below which these fractions of the scored pairs lie."""
    values = scores.similarity[np.isfinite(scores.similarity)]
    return {part: float(np.quantile(values, part)) for part in fractions} if len(values) else {}
