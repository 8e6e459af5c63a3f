"""Open the data of a comparison."""

from __future__ import annotations

from ttd_plugins.comparison.captioned_data import CaptionedData
from ttd_plugins.comparison.data_interface import ComparisonData
from ttd_plugins.comparison.options import SCENES, CompareOptions
from ttd_plugins.comparison.scene_data import SceneData


def open_data(options: CompareOptions) -> ComparisonData:
    """Open the data that ``options.data`` names.

    Raises:
        InputError, DatasetError: the data are unknown, missing or incomplete.
        MissingDependencyError: a package that draws scenes is not installed.
    """
    return SceneData(options) if options.data == SCENES else CaptionedData(options)
