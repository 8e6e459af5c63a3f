"""Scoring every pair once by image-text similarity: the paper's sample-level pruning (arXiv 2404.00384).

The score of a pair is the cosine of the backbone's own pooled image embedding and its caption's embedding. Which
scores are enough is decided later, by ``open_pairs(spec, keep=FILE, threshold=...)``, so one file serves many runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttd_plugins.adapter import DenseAdapter, ImageTransform, Size, image_features
from ttd_plugins.data.loader import LoaderPosition, PairLoader
from ttd_plugins.data.pairs import MapSource, PairSource
from ttd_plugins.data.score_filter import PairScores, read_scores
from ttd_plugins.data.skipped_samples import SkipLog
from ttd_plugins.engine import evaluation_mode
from ttd_plugins.errors import InputError, MissingDependencyError, TTDError
from ttd_plugins.method import similarity
from ttd_plugins.method.text_embeddings import encode_texts


@dataclass(frozen=True)
class PruningResult:
    """What a scoring of pairs came to.

    Attributes:
        file: where the scores are.
        scores: what is in it.
        skipped: reasons of the samples that could not be scored, by key.
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
    """Score every caption of every picture, once.

    While it works it appends to ``OUT.part``; stopped and called again with the same arguments it goes on where it
    was. ``OUT`` is complete or absent. A complete ``OUT`` of the same pairs and backbone is read and returned.

    Args:
        source: the pairs; a ``keep`` of theirs counts.
        backbone: gives the embeddings; it is put into evaluation mode for the time being.
        out: a ``.jsonl`` or ``.parquet`` file.
        transform: preprocessing; by default ``backbone.native_transform()``, or ``dense_transform(size)`` where a
            size is given.
        size: input (height, width) in pixels.
        batch_size: pairs that go through the backbone at once.
        workers: processes that decode.
        max_skipped: see :class:`ttd_plugins.data.PairLoader`.
        on_batch: called with the number of samples scored since it was last called.

    Raises:
        InputError: ``out`` cannot be written, or holds scores of other pairs or of another backbone.
        TTDError: no pair can be scored, or too many are skipped.
        MissingDependencyError: a ``.parquet`` file without pyarrow.
    """
    file = Path(out)
    settings = {
        "backbone": backbone.description.name,
        "spec": source.name,
        "size": list(size) if isinstance(size, tuple) else size,
        "pictures": len(source) if isinstance(source, MapSource) else None,
    }
    require_scores_file(file)
    skips_file = file.with_name(f"{file.name}.skipped.jsonl")
    if file.exists():
        done = read_scores(file)
        _require_same(done.settings, settings, file)
        return PruningResult(file, done, dict(SkipLog(skips_file if skips_file.exists() else None).reasons))
    part = file.with_name(f"{file.name}.part")
    start = _resume(part, settings)
    if start is None:
        skips_file.unlink(missing_ok=True)
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
                # The position closes its batch: what comes after the last one is written anew.
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
    """Raise InputError where scores cannot be written to ``file``, before anything slow."""
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
    if not os.access(file.parent, os.W_OK):
        raise InputError(f"the file of scores {str(file)!r} cannot be written: permission denied")


def _require_same(found: dict[str, Any], wanted: dict[str, Any], file: Path) -> None:
    other = next((name for name in wanted if found.get(name) != wanted[name]), None)
    if other is not None:
        raise InputError(
            f"{str(file)!r} holds scores for another {other} ({found.get(other)!r}, not {wanted[other]!r}); give "
            "another file, or delete it"
        )


def _resume(part: Path, settings: dict[str, Any]) -> LoaderPosition | None:
    """Cut an unfinished file behind its last whole batch and return where that ended; begin a file that is new."""
    try:
        position: LoaderPosition | None = None
        keep = 0
        if part.exists():
            with open(part, "rb") as stream:
                for number, line in enumerate(stream):
                    record = json.loads(line) if line.endswith(b"\n") else {}
                    if not number and "scores" in record:
                        _require_same(record["scores"], settings, part)
                        keep = len(line)
                    if "position" in record:
                        position, keep = record["position"], stream.tell()
            os.truncate(part, keep)
        if not keep:
            part.write_bytes(json.dumps({"scores": settings}).encode() + b"\n")
        return position
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(part)!r} is no unfinished file of scores; delete it to begin anew") from error
    except OSError as error:
        raise TTDError(f"the scores cannot be written to {str(part)!r}: {error.strerror}") from error


def _finish(part: Path, file: Path, skipped: SkipLog) -> None:
    """Turn the unfinished file into the finished one: positions out, skipped samples in, then renamed."""
    whole = file.with_name(f"{file.name}.whole")
    rows: list[dict[str, Any]] = []
    with open(part, "rb") as stream:
        settings = json.loads(next(stream))["scores"]
        rows = [row for row in map(json.loads, stream) if "key" in row]
    # A caption that was skipped is listed as its picture's key, # and its number.
    rows += [{"key": key, "caption": -1, "similarity": None, "reason": why} for key, why in skipped.reasons.items()]
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {
            "key": pa.array([row["key"] for row in rows], pa.string()),
            "caption": pa.array([row["caption"] for row in rows], pa.int32()),
            "similarity": pa.array([row["similarity"] for row in rows], pa.float64()),
            "reason": pa.array([row.get("reason") for row in rows], pa.string()),
        }
        table = pa.table(columns).replace_schema_metadata({"scores": json.dumps(settings)})
        pq.write_table(table, whole)
    else:
        with open(whole, "wb") as stream:
            for row in ({"scores": settings}, *rows):
                stream.write(json.dumps(row).encode() + b"\n")
    os.replace(whole, file)
    part.unlink()


def quantiles(scores: PairScores, shares: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 0.75)) -> dict[float, float]:
    """Similarities below which these shares of the scored pairs lie."""
    values = scores.similarity[np.isfinite(scores.similarity)]
    return {share: float(np.quantile(values, share)) for share in shares} if len(values) else {}
