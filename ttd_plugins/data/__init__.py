"""Image-text pairs in common layouts: :func:`open_pairs` opens them, :class:`PairLoader` makes batches."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttd_plugins.data.images import read_image
    from ttd_plugins.data.loader import Batch, LoaderPosition, PairLoader
    from ttd_plugins.data.pair_source import PairSource
    from ttd_plugins.data.pruning import score_pairs
    from ttd_plugins.data.score_filter import PairFilter
    from ttd_plugins.data.shard_urls import allow_pipe
    from ttd_plugins.data.skipped_samples import SkipLog
    from ttd_plugins.data.source_detection import open_pairs

# Resolved on first use, so that reading one image does not import the loader.
_LAZY_EXPORTS = {
    "Batch": "ttd_plugins.data.loader",
    "LoaderPosition": "ttd_plugins.data.loader",
    "PairFilter": "ttd_plugins.data.score_filter",
    "PairLoader": "ttd_plugins.data.loader",
    "PairSource": "ttd_plugins.data.pair_source",
    "SkipLog": "ttd_plugins.data.skipped_samples",
    "allow_pipe": "ttd_plugins.data.shard_urls",
    "open_pairs": "ttd_plugins.data.source_detection",
    "read_image": "ttd_plugins.data.images",
    "score_pairs": "ttd_plugins.data.pruning",
}

__all__ = [
    "Batch",
    "LoaderPosition",
    "PairFilter",
    "PairLoader",
    "PairSource",
    "SkipLog",
    "allow_pipe",
    "open_pairs",
    "read_image",
    "score_pairs",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module 'ttd_plugins.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
