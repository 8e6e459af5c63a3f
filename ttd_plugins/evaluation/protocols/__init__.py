"""The paper's three protocols (arXiv 2404.00384), multi-label classification, and retrieval on plain pairs.

Each is a function that resumes and is shared among processes.
"""

from __future__ import annotations

from ttd_plugins.evaluation.protocol_options import (
    CLASSIFY_PRESETS,
    RETRIEVAL_PRESETS,
    SEGMENT_PRESETS,
    TAG_PRESETS,
    TEXT_PRESETS,
    ClassifyProtocol,
    RetrievalProtocol,
    SegmentProtocol,
    TagProtocol,
    TextProtocol,
)
from ttd_plugins.evaluation.protocols.classify import evaluate_classify
from ttd_plugins.evaluation.protocols.retrieval import evaluate_retrieval
from ttd_plugins.evaluation.protocols.runner import EvaluationResult, process_place
from ttd_plugins.evaluation.protocols.segment import evaluate_segment
from ttd_plugins.evaluation.protocols.tags import evaluate_tags
from ttd_plugins.evaluation.protocols.text import evaluate_text

__all__ = [
    "CLASSIFY_PRESETS",
    "RETRIEVAL_PRESETS",
    "SEGMENT_PRESETS",
    "TAG_PRESETS",
    "TEXT_PRESETS",
    "ClassifyProtocol",
    "EvaluationResult",
    "RetrievalProtocol",
    "SegmentProtocol",
    "TagProtocol",
    "TextProtocol",
    "evaluate_classify",
    "evaluate_retrieval",
    "evaluate_segment",
    "evaluate_tags",
    "evaluate_text",
    "process_place",
]
