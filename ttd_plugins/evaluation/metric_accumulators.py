"""Metrics that accumulate over batches, built on the functions of :mod:`ttd_plugins.evaluation.metrics`.

Each metric has two pure steps: the contribution of a batch to named states, and the values of the states. The protocols
use these classes; :mod:`ttd_plugins.evaluation.torchmetrics_classes` derives torchmetrics classes from them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttd_plugins.evaluation import metrics
from ttd_plugins.utils.distributed import group_numbers

State = NDArray[Any] | Tensor
States = Mapping[str, State]


class MetricAccumulator(ABC):
    """A metric over batches.

    Attributes:
        summed: names of the states that are sums; the other states are concatenated along their first axis.
    """

    summed: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        self._sums = {name: value for name, value in self.initial().items() if name in self.summed}
        self._parts: dict[str, list[State]] = {name: [] for name in self.initial() if name not in self.summed}

    @abstractmethod
    def initial(self) -> dict[str, NDArray[Any]]:
        """Return the states before the first batch: zeros, or arrays of length 0."""

    @abstractmethod
    def contribution(self, *args: Any, **kwargs: Any) -> dict[str, State]:
        """Return what a batch adds to each state."""

    @abstractmethod
    def values(self, states: States) -> Any:
        """Return the metrics of states: a number, or numbers by name; NaN where nothing was added."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add a batch; the arguments are those of :meth:`contribution`."""
        self.add(self.contribution(*args, **kwargs))

    def add(self, contribution: States) -> None:
        """Add the contribution of a batch."""
        for name, value in contribution.items():
            if name in self.summed:
                self._sums[name] = self._sums[name] + value
            else:
                self._parts[name].append(value)

    def states(self) -> dict[str, State]:
        """Return the states of all batches so far."""
        found: dict[str, State] = dict(self._sums)
        for name, parts in self._parts.items():
            if parts and isinstance(parts[0], Tensor):
                found[name] = torch.cat([torch.as_tensor(part) for part in parts])
            else:
                found[name] = np.concatenate([self.initial()[name], *parts]) if parts else self.initial()[name]
        return found

    def compute(self) -> Any:
        """Return the metrics of all batches so far; see :meth:`values`."""
        return self.values(self.states())


def _array(values: Any) -> NDArray[Any]:
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _bools(values: Any) -> NDArray[np.bool_]:
    return _array(values).astype(bool)


class TagSelectionAccumulator(MetricAccumulator):
    """Precision, recall, F1 and accuracy of selected tags, pooled over candidates."""

    summed = frozenset({"counts"})

    def initial(self) -> dict[str, NDArray[Any]]:
        return {"counts": np.zeros(4, np.int64)}

    def contribution(self, selected: Any, labels: Any) -> dict[str, State]:
        """Count candidates: bool ``[N]`` each."""
        found = metrics.selection_counts(_bools(selected), _bools(labels))
        counts = (found.true_positives, found.false_positives, found.false_negatives, found.true_negatives)
        return {"counts": np.array(counts, np.int64)}

    def values(self, states: States) -> dict[str, float]:
        """Return ``precision``, ``recall``, ``f1`` and ``accuracy``."""
        return metrics.SelectionCounts(*_array(states["counts"]).tolist()).as_dict()


class AveragePrecisionAccumulator(MetricAccumulator):
    """Average precision of scores pooled over candidates (:func:`metrics.average_precision`), the paper's mAP."""

    def initial(self) -> dict[str, NDArray[Any]]:
        return {"scores": np.zeros(0), "labels": np.zeros(0, bool)}

    def contribution(self, scores: Any, labels: Any) -> dict[str, State]:
        """Collect candidates: float ``[N]`` and bool ``[N]``."""
        return {"scores": _array(scores).astype(np.float64), "labels": _bools(labels)}

    def values(self, states: States) -> float:
        """Return a value in [0, 1]; NaN without a positive."""
        return metrics.average_precision(_array(states["scores"]), _array(states["labels"]))


class MultiLabelAccumulator(MetricAccumulator):
    """mAP and F1 of multi-label classification (:func:`metrics.multilabel_metrics`).

    Args:
        classes: C.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        super().__init__()

    def initial(self) -> dict[str, NDArray[Any]]:
        shape = (0, self.classes)
        return {"scores": np.zeros(shape), "labels": np.zeros(shape, np.int8), "selected": np.zeros(shape, bool)}

    def contribution(self, scores: Any, labels: Any, selected: Any) -> dict[str, State]:
        """Collect images: float, int (1 shown, 0 not shown, -1 unknown) and bool ``[N, C]``."""
        return {
            "scores": _array(scores).astype(np.float64),
            "labels": _array(labels).astype(np.int8),
            "selected": _bools(selected),
        }

    def values(self, states: States) -> dict[str, Any]:
        """Return the result of :func:`metrics.multilabel_metrics`."""
        return metrics.multilabel_metrics(
            _array(states["scores"]), _array(states["labels"]), _array(states["selected"])
        )


class CaptionOverlapAccumulator(MetricAccumulator):
    """Caption IoU, FPR and FNR, each the mean over captions (:func:`metrics.mean_overlap`). The three add up to one."""

    def initial(self) -> dict[str, NDArray[Any]]:
        return {"overlaps": np.zeros((0, 3))}

    def contribution(self, prediction: Any, truth: Any, valid: Any = None) -> dict[str, State]:
        """Measure one caption: bool masks ``[height, width]``."""
        found = metrics.mask_overlap(_bools(prediction), _bools(truth), None if valid is None else _bools(valid))
        return {"overlaps": np.array([(found.iou, found.fpr, found.fnr)])}

    def values(self, states: States) -> dict[str, float]:
        """Return ``iou``, ``fpr`` and ``fnr``; NaN without a caption."""
        mean = metrics.mean_overlap(metrics.Overlap(*row) for row in _array(states["overlaps"]).tolist())
        return {"iou": mean.iou, "fpr": mean.fpr, "fnr": mean.fnr}


class ClassOverlapAccumulator(MetricAccumulator):
    """IoU, FPR and FNR of each class, and their means over the classes that occur (:func:`metrics.class_overlaps`).

    Args:
        classes: C.
        ignore: class index of pixels without a label.
    """

    summed = frozenset({"counts"})

    def __init__(self, classes: int, ignore: int = metrics.IGNORE) -> None:
        self.classes, self.ignore = classes, ignore
        super().__init__()

    def initial(self) -> dict[str, NDArray[Any]]:
        return {"counts": np.zeros((3, self.classes), np.int64)}

    def contribution(self, prediction: Any, truth: Any) -> dict[str, State]:
        """Count the pixels of class indices of one shape."""
        return {"counts": metrics.class_counts(_array(prediction), _array(truth), self.classes, self.ignore)}

    def values(self, states: States) -> dict[str, Any]:
        """Return the result of :func:`metrics.class_overlaps`."""
        return metrics.class_overlaps(_array(states["counts"]))


class TagBalanceAccumulator(MetricAccumulator):
    """Mean of :func:`metrics.tag_balance` over captions with at least two true tags."""

    def initial(self) -> dict[str, NDArray[Any]]:
        return {"balances": np.zeros(0)}

    def contribution(self, similarity: Any, masks: Sequence[Any]) -> dict[str, State]:
        """Measure one caption: its map in [0, 1] and the masks of its true tags. One mask contributes nothing."""
        used = [_bools(mask) for mask in masks] if len(masks) > 1 else []
        return {"balances": np.array([metrics.tag_balance(_array(similarity), used)] if used else [], np.float64)}

    def values(self, states: States) -> float:
        """Return a value in [0, 1]; NaN without a caption."""
        balances = _array(states["balances"])
        return float(np.mean(balances)) if len(balances) else float("nan")


class RetrievalAccumulator(MetricAccumulator):
    """Image-text retrieval R@k over all batches (:func:`metrics.retrieval_recalls`).

    Args:
        ks: values of k.
    """

    def __init__(self, ks: Sequence[int] = (1, 5, 10)) -> None:
        self.ks = tuple(ks)
        super().__init__()

    def initial(self) -> dict[str, NDArray[Any]]:
        empty = np.zeros(0, np.int64)
        embeddings = np.zeros((0, 0), np.float32)
        return {"images": embeddings, "texts": embeddings, "keys": empty, "owners": empty, "groups": empty}

    def contribution(
        self, images: Tensor, texts: Tensor, keys: Sequence[int], owners: Sequence[int], captions: Sequence[str]
    ) -> dict[str, State]:
        """Collect a batch.

        Args:
            images: ``[N, D]``, L2-normalised.
            texts: ``[M, D]``, L2-normalised.
            keys: N integers, one per image, distinct over all batches and processes.
            owners: for each text the key of its image.
            captions: M texts. Identical captions are correct for each other's images.
        """
        groups = group_numbers(captions, torch.device("cpu")).numpy()
        return {
            "images": images,
            "texts": texts,
            "keys": np.asarray(keys, np.int64),
            "owners": np.asarray(owners, np.int64),
            "groups": groups,
        }

    def values(self, states: States) -> dict[str, float]:
        """Return ``image_to_text_rK``, ``text_to_image_rK`` and ``rK`` for every K."""
        rows = {key: row for row, key in enumerate(_array(states["keys"]).tolist())}
        return metrics.retrieval_recalls(
            torch.as_tensor(states["images"]),
            torch.as_tensor(states["texts"]),
            [rows[owner] for owner in _array(states["owners"]).tolist()],
            _array(states["groups"]).tolist(),
            self.ks,
        )


class ZeroShotAccumulator(MetricAccumulator):
    """Zero-shot classification accuracy at each k (:func:`metrics.zero_shot_accuracy`).

    Args:
        ks: values of k.
    """

    summed = frozenset({"hits", "images"})

    def __init__(self, ks: Sequence[int] = (1, 5)) -> None:
        self.ks = tuple(ks)
        super().__init__()

    def initial(self) -> dict[str, NDArray[Any]]:
        return {"hits": np.zeros(len(self.ks), np.int64), "images": np.zeros((), np.int64)}

    def contribution(self, images: Tensor, classes: Tensor, labels: Tensor) -> dict[str, State]:
        """Count hits; shapes as in :func:`metrics.zero_shot_hits`."""
        if not len(images):
            return {}
        found = metrics.zero_shot_hits(images, classes, labels, self.ks)
        return {
            "hits": np.array([found[k] for k in self.ks], np.int64),
            "images": np.array(metrics.classified_images(labels), np.int64),
        }

    def values(self, states: States) -> dict[str, float]:
        """Return ``top1``, ``top5``, ...; NaN without an image that shows a class."""
        hits = dict(zip(self.ks, _array(states["hits"]).tolist(), strict=True))
        return {f"top{k}": rate for k, rate in metrics.hit_rates(hits, int(states["images"])).items()}
