"""Open the data of a comparison."""

from __future__ import annotations

from ttd_plugins.comparison.captioned_data import CaptionedData
from ttd_plugins.comparison.data_interface import ComparisonData
from ttd_plugins.comparison.options import PAIRS, SCENES, CompareOptions
from ttd_plugins.comparison.own_data import ImageLabelData, PairData, SegmentedData
from ttd_plugins.comparison.scene_data import SceneData
from ttd_plugins.errors import InputError, choices_sentence


def open_data(options: CompareOptions) -> ComparisonData:
    """Open the data that ``options.data`` names.

    Raises:
        InputError, DatasetError: the data are unknown, missing or incomplete.
        MissingDependencyError: a package that draws scenes is not installed.
    """
    from ttd_plugins.evaluation.datasets import CAPTIONS, LABELS, SEGMENTATION

    name = options.data.partition(":")[0]
    if options.classes is not None and name not in SEGMENTATION | LABELS:
        raise InputError(f"classes applies to data with masks or labels of classes, not to {name}")
    if options.data == SCENES:
        return SceneData(options)
    if name == PAIRS:
        return PairData(options)
    if name in SEGMENTATION:
        return SegmentedData(options)
    if name in LABELS:
        return ImageLabelData(options)
    if name in CAPTIONS:
        return CaptionedData(options)
    raise InputError(choices_sentence("data set", name, [SCENES, PAIRS, *CAPTIONS, *SEGMENTATION, *LABELS], 20))
