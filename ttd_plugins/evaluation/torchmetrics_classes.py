"""torchmetrics classes, derived from :mod:`ttd_plugins.evaluation.metric_accumulators`; they agree over processes.

This module needs torchmetrics; nothing else in the package does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttd_plugins.errors import MissingDependencyError, one_sentence
from ttd_plugins.evaluation import metric_accumulators as accumulators
from ttd_plugins.evaluation.metrics import IGNORE
from ttd_plugins.utils.deprecation import renamed_names

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except ImportError as error:
    raise MissingDependencyError(
        f"the torchmetrics classes need torchmetrics ({one_sentence(error)}); run: pip install torchmetrics"
    ) from error

__getattr__ = renamed_names(__name__, {"TagSelectionFigures": "TagSelectionMetrics"})


class _AccumulatorMetric(Metric):
    """A torchmetrics metric with the states, contributions and values of an accumulator."""

    full_state_update = False

    def __init__(self, accumulator: accumulators.MetricAccumulator, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.accumulator = accumulator
        for name, value in accumulator.initial().items():
            if name in accumulator.summed:
                self.add_state(name, torch.from_numpy(value), dist_reduce_fx="sum")
            else:
                self.add_state(name, [], dist_reduce_fx="cat")

    def _add(self, *args: Any) -> None:
        for name, value in self.accumulator.contribution(*args).items():
            tensor = torch.as_tensor(value, device=self.device)
            if name in self.accumulator.summed:
                setattr(self, name, getattr(self, name) + tensor)
            else:
                getattr(self, name).append(tensor)

    def compute(self) -> Any:
        """Return the metrics as tensors: a scalar, or scalars by name; NaN where nothing was added."""
        states: dict[str, Any] = self.accumulator.initial()
        for name in states:
            state = getattr(self, name)
            if isinstance(state, Tensor) or len(state):
                states[name] = dim_zero_cat(state)
        values = self.accumulator.values(states)
        named = values if isinstance(values, dict) else {"": values}
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in named.items()}
        return tensors if isinstance(values, dict) else tensors[""]


class TagSelectionMetrics(_AccumulatorMetric):
    """Precision, recall, F1 and accuracy of selected tags, pooled over candidates."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(accumulators.TagSelectionAccumulator(), **kwargs)

    def update(self, selected: Any, labels: Any) -> None:
        """Add candidates: bool ``[N]`` each."""
        self._add(selected, labels)


class TagAveragePrecision(_AccumulatorMetric):
    """Average precision of scores pooled over candidates, the paper's mAP: a scalar, NaN without a positive."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(accumulators.AveragePrecisionAccumulator(), **kwargs)

    def update(self, scores: Any, labels: Any) -> None:
        """Add candidates: float ``[N]`` and bool ``[N]``."""
        self._add(scores, labels)


class MultiLabelClassification(_AccumulatorMetric):
    """``map``, ``f1``, ``class_f1`` and more of multi-label classification, and ``ap`` of each class (``[C]``).

    Args:
        classes: C.
    """

    def __init__(self, classes: int, **kwargs: Any) -> None:
        super().__init__(accumulators.MultiLabelAccumulator(classes), **kwargs)

    def update(self, scores: Any, labels: Any, selected: Any) -> None:
        """Add images: float, int (1 shown, 0 not shown, -1 unknown) and bool ``[N, C]``."""
        self._add(scores, labels, selected)


class CaptionOverlap(_AccumulatorMetric):
    """Caption ``iou``, ``fpr`` and ``fnr``, each the mean over captions. The three add up to one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(accumulators.CaptionOverlapAccumulator(), **kwargs)

    def update(self, prediction: Any, truth: Any, valid: Any = None) -> None:
        """Add one caption: bool masks ``[height, width]``."""
        self._add(prediction, truth, valid)


class ClassOverlap(_AccumulatorMetric):
    """``iou``, ``fpr`` and ``fnr`` of each class (``[C]``), ``miou``, ``mfpr``, ``mfnr`` and ``present``.

    Args:
        classes: C.
        ignore: class index of pixels without a label.
    """

    def __init__(self, classes: int, ignore: int = IGNORE, **kwargs: Any) -> None:
        super().__init__(accumulators.ClassOverlapAccumulator(classes, ignore), **kwargs)

    def update(self, prediction: Any, truth: Any) -> None:
        """Add class indices of one shape."""
        self._add(prediction, truth)


class TagBalance(_AccumulatorMetric):
    """Mean tag balance over captions with at least two true tags: a scalar, NaN without a caption."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(accumulators.TagBalanceAccumulator(), **kwargs)

    def update(self, similarity: Any, masks: Sequence[Any]) -> None:
        """Add one caption: its map in [0, 1], ``[height, width]``, and the masks of its true tags."""
        self._add(similarity, masks)


class RetrievalRecall(_AccumulatorMetric):
    """Image-text retrieval: ``image_to_text_rK``, ``text_to_image_rK`` and ``rK`` for every K.

    Args:
        ks: values of k.
    """

    def __init__(self, ks: Sequence[int] = (1, 5, 10), **kwargs: Any) -> None:
        super().__init__(accumulators.RetrievalAccumulator(ks), **kwargs)

    def update(
        self, images: Tensor, texts: Tensor, keys: Sequence[int], owners: Sequence[int], captions: Sequence[str]
    ) -> None:
        """Add a batch; arguments as in :meth:`metric_accumulators.RetrievalAccumulator.contribution`."""
        self._add(images, texts, keys, owners, captions)


class ZeroShotAccuracy(_AccumulatorMetric):
    """Zero-shot classification accuracy ``top1``, ``top5``, ...; NaN without an image that shows a class.

    Args:
        ks: values of k.
    """

    def __init__(self, ks: Sequence[int] = (1, 5), **kwargs: Any) -> None:
        super().__init__(accumulators.ZeroShotAccumulator(ks), **kwargs)

    def update(self, images: Tensor, classes: Tensor, labels: Tensor) -> None:
        """Add images; shapes as in :func:`metrics.zero_shot_hits`."""
        self._add(images, classes, labels)
