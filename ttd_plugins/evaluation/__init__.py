"""Evaluation: metrics, protocols, readers of annotated data sets, and :func:`evaluate`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch

    from ttd_plugins.adapter import DenseAdapter
    from ttd_plugins.evaluation.datasets import CaptionData, LabelData, PlainPairs, SegmentationData
    from ttd_plugins.evaluation.protocols import EvaluationResult
    from ttd_plugins.utils.progress import Stage

ProtocolName = Literal["tags", "text", "segment", "classify", "retrieval"]

_LAZY_EXPORTS = {"EvaluationResult": "ttd_plugins.evaluation.protocols.runner"}

__all__ = ["EvaluationResult", "ProtocolName", "evaluate"]


def evaluate(
    backbone: DenseAdapter | str,
    data: CaptionData | SegmentationData | LabelData | PlainPairs | str,
    *,
    protocol: ProtocolName = "tags",
    out: Path | str | None = None,
    preset: str = "paper",
    split: str | None = None,
    limit: int | None = None,
    classes: Path | str | None = None,
    device: torch.device | str | None = None,
    rank: int | None = None,
    world: int | None = None,
    stage: Stage | None = None,
    **options: Any,
) -> EvaluationResult:
    """Evaluate a backbone with one of the paper's protocols (arXiv 2404.00384) or another one, as ``ttd eval`` does.

    Example::

        result = evaluate("FAMILY:MODEL@WEIGHTS", "coco_captions:photos/", protocol="text", size=336)
        print(result.metrics["caption_iou"])

    Args:
        backbone: an adapter, or a name, run or export for :func:`ttd_plugins.load`.
        data: a reader of :mod:`ttd_plugins.evaluation.datasets`, or ``"NAME:FOLDER"`` such as
            ``"coco_captions:photos/"``, ``"voc:VOC2012/"`` or ``"folder:my_masks/"``; for ``"retrieval"`` image-text
            pairs as :func:`ttd_plugins.data.open_pairs` accepts them.
        protocol: ``"tags"`` (which words of captions the images show), ``"text"`` (caption maps against masks),
            ``"segment"`` (a class for every pixel), ``"classify"`` (which classes an image shows) or ``"retrieval"``
            (images and captions of plain pairs).
        out: folder of the records and of ``results.json``. A call with the same arguments resumes an interrupted one.
            ``None`` writes nothing.
        preset: a preset of the protocol: ``"paper"``, ``"fast"``, or ``"tcl"`` for ``"segment"``.
        split, limit: the split and the number of images, if ``data`` is a name; by default the reader's.
        classes: for ``"segment"`` and ``"classify"``, if ``data`` is a name: a list of classes that are drawn from the
            data set's own, by name or as a file; see :func:`ttd_plugins.evaluation.datasets.open_segmentation`.
        device: where a backbone given by name computes.
        rank, world: this process does every ``world``-th image, starting with ``rank``; by default from the environment
            variables ``RANK`` and ``WORLD_SIZE``, or all images.
        stage: starts subtasks, for progress bars.
        **options: changes of the preset: fields of :class:`~ttd_plugins.evaluation.protocols.TagProtocol`,
            :class:`~ttd_plugins.evaluation.protocols.TextProtocol`,
            :class:`~ttd_plugins.evaluation.protocols.SegmentProtocol`,
            :class:`~ttd_plugins.evaluation.protocols.ClassifyProtocol` or
            :class:`~ttd_plugins.evaluation.protocols.RetrievalProtocol`, or of their
            :class:`~ttd_plugins.evaluation.dense_inference.DenseOptions`.

    Returns:
        The metrics, every setting, and the cost.

    Raises:
        InputError: a name or an option is unknown or invalid, or ``out`` contains results of other settings.
        DatasetError: the data set has another layout than expected; the message names the path.
        TTDError: the backbone cannot be loaded.
    """
    from ttd_plugins.engine_checks import require_adapter
    from ttd_plugins.errors import InputError, choices_sentence
    from ttd_plugins.evaluation import protocols
    from ttd_plugins.evaluation.datasets import open_named

    functions: dict[str, tuple[Any, Any, Any]] = {
        "tags": (protocols.evaluate_tags, protocols.TAG_PRESETS, "captions"),
        "text": (protocols.evaluate_text, protocols.TEXT_PRESETS, "captions"),
        "segment": (protocols.evaluate_segment, protocols.SEGMENT_PRESETS, "segmentation"),
        "classify": (protocols.evaluate_classify, protocols.CLASSIFY_PRESETS, "labels"),
        "retrieval": (protocols.evaluate_retrieval, protocols.RETRIEVAL_PRESETS, "pairs"),
    }
    if protocol not in functions:
        raise InputError(choices_sentence("protocol", protocol, get_args(ProtocolName)))
    function, presets, kind = functions[protocol]
    chosen = _options(presets, preset, options)
    if classes is not None and protocol not in ("segment", "classify"):
        raise InputError(f"classes applies to the protocols segment and classify, not to {protocol}")
    if isinstance(data, str):
        reader: Any = open_named(data, kind=kind, split=split, limit=limit, classes=classes)
    elif split is not None or limit is not None or classes is not None:
        raise InputError("split, limit and classes apply to a data set by name; pass them to the reader")
    else:
        reader = data
    own_rank, own_world = protocols.process_place()
    if isinstance(backbone, str):
        from ttd_plugins.plugins import load

        backbone = load(backbone, device=device)
    return function(
        require_adapter(backbone, "evaluate()"),
        reader,
        chosen,
        out=out,
        rank=own_rank if rank is None else rank,
        world=own_world if world is None else world,
        stage=stage,
    )


def _options(presets: Any, preset: str, changes: dict[str, Any]) -> Any:
    """Return a preset with some fields changed, of itself or of its options of dense inference."""
    from dataclasses import fields, replace

    from ttd_plugins.errors import InputError, choices_sentence

    if preset not in presets:
        raise InputError(choices_sentence("preset", preset, presets))
    options = presets[preset]
    own = {field.name for field in fields(options)}
    dense = {field.name for field in fields(options.dense)} if "dense" in own else set()
    for name in changes:
        if name not in own | dense:
            raise InputError(choices_sentence("option", name, sorted(own | dense), 40))
    options = replace(options, **{name: value for name, value in changes.items() if name in own})
    inner = {name: value for name, value in changes.items() if name in dense}
    return replace(options, dense=replace(options.dense, **inner)) if inner else options


def __getattr__(name: str) -> Any:
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module 'ttd_plugins.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY_EXPORTS[name]), name)
