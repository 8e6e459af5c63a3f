"""How open_clip says that pixels are normalised."""

from __future__ import annotations

from typing import Any

from ttd_plugins.toolkit import transforms
from ttd_plugins.toolkit.transforms import Normalisation, three_channels


def read_normalisation(visual: Any, preprocess: Any) -> Normalisation:
    """Find out how pixels are normalised, by default with OpenAI's mean and std, which are open_clip's default.

    Raises:
        InputError: ``preprocess`` is neither a torchvision ``Compose`` nor a mapping, or it does not normalise.
    """
    from ttd_open_clip.library import import_open_clip

    open_clip = import_open_clip()
    default = Normalisation(
        three_channels(open_clip.OPENAI_DATASET_MEAN), three_channels(open_clip.OPENAI_DATASET_STD), "bicubic"
    )
    return transforms.read_normalisation(visual, preprocess, default, "open_clip's preprocess_val")
