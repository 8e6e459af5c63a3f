"""Selection of pairs by the scores of an earlier run, with a threshold or a quantile."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.errors import InputError, MissingDependencyError, one_sentence
from ttd_plugins.utils.deprecation import RenamedAttribute, renamed_names
from ttd_plugins.utils.numbers import number
from ttd_plugins.utils.parquet_keys import decode_keys

if not TYPE_CHECKING:
    __getattr__ = renamed_names(__name__, {"is_utf8": "ttd_plugins.utils.parquet_keys.is_utf8"})


def key_hash(key: str) -> int:
    """Return a 64-bit hash of a key that is the same in every process."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class PairScores:
    """Scores of pairs: one entry per caption of an image.

    Attributes:
        settings: settings of the scoring: ``backbone``, ``spec``, ``size``, ``weights_sha256``, ``keep`` and others.
        keys: N keys of images, including samples that could not be scored.
        captions: int64 ``[N]``, index of the caption among those of its image; -1 if it could not be scored.
        similarity: float64 ``[N]``, cosine of pooled image and caption embedding; NaN if it could not be scored.
    """

    settings: dict[str, Any]
    keys: list[str]
    captions: NDArray[np.int64]
    similarity: NDArray[np.float64]

    def threshold(self, quantile: float) -> float:
        """Return the similarity below which a fraction ``quantile`` of the scored pairs lies.

        Raises:
            InputError: the quantile is outside [0, 1].
        """
        if not 0 <= quantile <= 1:
            raise InputError(f"a quantile must be from 0 to 1, not {quantile}")
        values = self.similarity[np.isfinite(self.similarity)]
        return float(np.quantile(values, quantile)) if len(values) else math.nan


def read_scores(file: str | Path) -> PairScores:
    """Read a file of scores in JSON lines or Parquet.

    Raises:
        InputError: the file does not exist, is incomplete, or has another format.
        MissingDependencyError: pyarrow, needed for Parquet, is not installed.
    """
    path = Path(file)
    if not os.path.isfile(path):
        unfinished = os.path.isfile(path.with_name(path.name + ".part"))
        hint = "is incomplete; run `ttd prune` again to continue" if unfinished else "does not exist"
        raise InputError(f"the file of scores {str(path)!r} {hint}")
    try:
        settings, keys, captions, similarity = _parquet(path) if path.suffix == ".parquet" else _json_lines(path)
        numbers = [math.nan if value is None else value for value in similarity]
        if not isinstance(settings, dict) or not all(isinstance(key, str) for key in keys):
            raise ValueError("its settings or keys have another type")
        return PairScores(settings, keys, np.asarray(captions, np.int64), np.asarray(numbers, np.float64))
    # Reading a damaged file raises nearly anything.
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        NotImplementedError,
        OSError,
        OverflowError,
        RecursionError,
    ) as error:
        raise InputError(f"{str(path)!r} is not a file of scores of `ttd prune`: {one_sentence(error)}") from error


def _json_lines(path: Path) -> tuple[dict[str, Any], list[str], list[int], list[float | None]]:
    with open(path, "rb") as stream:
        settings = json.loads(next(stream, b"{}"))["scores"]
        rows = [json.loads(line) for line in stream]
    rows = [row for row in rows if isinstance(row, dict) and "key" in row]
    return settings, *([row[name] for row in rows] for name in ("key", "caption", "similarity"))  # type: ignore[return-value]


def _parquet(path: Path) -> tuple[dict[str, Any], Any, Any, Any]:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError(f"{str(path)!r} needs pyarrow; pip install 'ttd-plugins[data]'") from error
    # pyarrow takes no path that is not UTF-8.
    with open(path, "rb") as stream:
        table = pq.read_table(stream)
    metadata = table.schema.metadata or {}
    settings = json.loads(metadata[b"scores"])
    keys, captions, similarity = (table.column(name).to_pylist() for name in ("key", "caption", "similarity"))
    return settings, decode_keys(keys, metadata), captions, similarity


class PairFilter:
    """Selects the pairs whose similarity is at least a threshold.

    Attributes:
        threshold: the smallest selected cosine.
        selected, rejected: numbers of captions.

    Args:
        scores: the score of every pair.
        threshold: smallest selected cosine.
        quantile: alternative to a threshold: the fraction of the scored pairs to reject, lowest similarity first.

    Raises:
        InputError: not exactly one of the two is given, or no pair is selected.
    """

    kept = RenamedAttribute("selected")
    dropped = RenamedAttribute("rejected")

    def __init__(self, scores: PairScores, *, threshold: float | None = None, quantile: float | None = None) -> None:
        if (threshold is None) == (quantile is None):
            raise InputError("pruning needs either a threshold (a cosine) or a quantile (the fraction to reject)")
        if threshold is not None:
            threshold = number("the threshold", threshold, low=-1, high=1)
        self.threshold = threshold if threshold is not None else scores.threshold(quantile or 0.0)
        selected = scores.similarity >= self.threshold
        if not selected.any():
            best = np.nanmax(scores.similarity, initial=-1.0)
            raise InputError(f"a threshold of {self.threshold:g} selects no pair; the highest similarity is {best:.4f}")
        self.selected, self.rejected = int(selected.sum()), int((~selected & (scores.captions >= 0)).sum())
        # Hashes instead of keys: a few bytes per pair, so that millions of pairs fit in every worker.
        hashes = np.fromiter((key_hash(key) for key in scores.keys), np.uint64, len(scores.keys))
        # A caption that could not be scored is listed as its image's key, # and its index.
        images = (
            key.rpartition("#")[0] for key, number in zip(scores.keys, scores.captions, strict=True) if number < 0
        )
        self._known = np.unique(np.append(hashes, np.fromiter((key_hash(key) for key in images), np.uint64)))
        order = np.lexsort((scores.captions[selected], hashes[selected]))
        self._hashes = hashes[selected][order]
        self._captions = scores.captions[selected][order]

    def settings(self) -> dict[str, Any]:
        """Return what identifies the selected pairs: the threshold, their number, and a hash of keys and captions."""
        digest = hashlib.sha256(self._hashes.tobytes() + self._captions.tobytes()).hexdigest()[:16]
        return {"threshold": self.threshold, "selected": self.selected, "sha256": digest}

    @classmethod
    def read(cls, file: str | Path, *, threshold: float | None = None, quantile: float | None = None) -> PairFilter:
        """Create a filter from a file of scores; see :func:`read_scores`."""
        return cls(read_scores(file), threshold=threshold, quantile=quantile)

    def captions(self, key: str) -> list[int] | None:
        """Return the indices of an image's selected captions, ascending; ``None`` if it was never scored."""
        wanted = np.uint64(key_hash(key))
        start, stop = np.searchsorted(self._hashes, wanted, "left"), np.searchsorted(self._hashes, wanted, "right")
        if stop > start:
            return [int(caption) for caption in self._captions[start:stop]]
        place = np.searchsorted(self._known, wanted)
        return [] if place < len(self._known) and self._known[place] == wanted else None
