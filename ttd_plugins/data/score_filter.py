"""Which pairs are used: the scores of an earlier run over all of them, and a threshold or a quantile."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.errors import InputError, MissingDependencyError, one_sentence


def key_hash(key: str) -> int:
    """64 bits of a key, the same in every process."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class PairScores:
    """What a scoring of pairs wrote: one entry a caption of a picture.

    Attributes:
        settings: of the scoring: ``backbone``, ``spec``, ``size``.
        keys: the pictures' keys; also those of samples that could not be scored.
        captions: int64 ``[N]``: which of the picture's captions; -1 for what could not be scored.
        similarity: float64 ``[N]``: cosines of pooled image and caption embedding; NaN for what could not be scored.
    """

    settings: dict[str, Any]
    keys: list[str]
    captions: NDArray[np.int64]
    similarity: NDArray[np.float64]

    def threshold(self, quantile: float) -> float:
        """The similarity below which a share ``quantile`` of the pairs lies."""
        if not 0 <= quantile <= 1:
            raise InputError(f"a quantile is from 0 to 1, not {quantile}")
        values = self.similarity[np.isfinite(self.similarity)]
        return float(np.quantile(values, quantile)) if len(values) else math.nan


def read_scores(file: str | Path) -> PairScores:
    """Read a file of scores, JSON lines or Parquet.

    Raises:
        InputError: it does not exist, is not finished, or is something else.
    """
    path = Path(file)
    if not path.is_file():
        unfinished = path.with_name(path.name + ".part").is_file()
        hint = "is not finished; run `ttd prune` again to go on" if unfinished else "does not exist"
        raise InputError(f"the file of scores {str(path)!r} {hint}")
    try:
        settings, keys, captions, similarity = _parquet(path) if path.suffix == ".parquet" else _json_lines(path)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(
            f"{str(path)!r} is no file of scores as `ttd prune` writes it: {one_sentence(error)}"
        ) from error
    numbers = [math.nan if value is None else value for value in similarity]
    return PairScores(settings, keys, np.asarray(captions, np.int64), np.asarray(numbers, np.float64))


def _json_lines(path: Path) -> tuple[dict[str, Any], list[str], list[int], list[float | None]]:
    with open(path, "rb") as stream:
        settings = json.loads(next(stream, b"{}"))["scores"]
        rows = [json.loads(line) for line in stream]
    rows = [row for row in rows if "key" in row]
    return settings, *([row[name] for row in rows] for name in ("key", "caption", "similarity"))  # type: ignore[return-value]


def _parquet(path: Path) -> tuple[dict[str, Any], Any, Any, Any]:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError(f"{str(path)!r} needs pyarrow; pip install 'ttd-plugins[data]'") from error
    table = pq.read_table(path)
    settings = json.loads((table.schema.metadata or {})[b"scores"])
    return settings, *(table.column(name).to_pylist() for name in ("key", "caption", "similarity"))


class PairFilter:
    """The pairs whose similarity is at least a threshold.

    Args:
        scores: every pair's score.
        threshold: smallest cosine that is kept.
        quantile: in place of a threshold: the share of all scored pairs that is dropped, those of lowest similarity.

    Raises:
        InputError: not exactly one of the two is given, or nothing is kept.
    """

    def __init__(self, scores: PairScores, *, threshold: float | None = None, quantile: float | None = None) -> None:
        if (threshold is None) == (quantile is None):
            raise InputError("pruning takes a threshold (a cosine) or a quantile (the share to drop), one of the two")
        self.threshold = threshold if threshold is not None else scores.threshold(quantile or 0.0)
        kept = scores.similarity >= self.threshold
        if not kept.any():
            best = np.nanmax(scores.similarity, initial=-1.0)
            raise InputError(f"a threshold of {self.threshold:g} keeps no pair; the highest similarity is {best:.4f}")
        self.kept, self.dropped = int(kept.sum()), int((~kept & (scores.captions >= 0)).sum())
        # Hashes in place of keys: a few bytes a pair, so that millions of pairs fit every worker.
        hashes = np.fromiter((key_hash(key) for key in scores.keys), np.uint64, len(scores.keys))
        pictures = (
            key.rpartition("#")[0] for key, number in zip(scores.keys, scores.captions, strict=True) if number < 0
        )
        self._known = np.unique(np.append(hashes, np.fromiter((key_hash(key) for key in pictures), np.uint64)))
        order = np.lexsort((scores.captions[kept], hashes[kept]))
        self._hashes = hashes[kept][order]
        self._captions = scores.captions[kept][order]

    @classmethod
    def read(cls, file: str | Path, *, threshold: float | None = None, quantile: float | None = None) -> PairFilter:
        """Make a filter from a file of scores; see :func:`read_scores`."""
        return cls(read_scores(file), threshold=threshold, quantile=quantile)

    def captions(self, key: str) -> list[int] | None:
        """Which captions of a picture are kept, ascending; ``None`` where it was never scored."""
        wanted = np.uint64(key_hash(key))
        start, stop = np.searchsorted(self._hashes, wanted, "left"), np.searchsorted(self._hashes, wanted, "right")
        if stop > start:
            return [int(caption) for caption in self._captions[start:stop]]
        place = np.searchsorted(self._known, wanted)
        return [] if place < len(self._known) and self._known[place] == wanted else None
