"""The paper's three protocols (arXiv 2404.00384), each a function that resumes and is shared among processes."""

from __future__ import annotations

from ttd_plugins.evaluation.protocol_options import (
    SEGMENT_PRESETS,
    TAG_PRESETS,
    TEXT_PRESETS,
    SegmentProtocol,
    TagProtocol,
    TextProtocol,
)
from ttd_plugins.evaluation.protocols.runner import EvaluationResult, process_place
from ttd_plugins.evaluation.protocols.segment import evaluate_segment
from ttd_plugins.evaluation.protocols.tags import evaluate_tags
from ttd_plugins.evaluation.protocols.text import evaluate_text

__all__ = [
    "SEGMENT_PRESETS",
    "TAG_PRESETS",
    "TEXT_PRESETS",
    "EvaluationResult",
    "SegmentProtocol",
    "TagProtocol",
    "TextProtocol",
    "evaluate_segment",
    "evaluate_tags",
    "evaluate_text",
    "process_place",
]
