"""How EVA-CLIP models say that pixels are normalised."""

from __future__ import annotations

from typing import Any

from ttd_plugins.toolkit import transforms
from ttd_plugins.toolkit.transforms import Normalisation

# The mean and std of OpenAI's CLIP, which every published EVA-CLIP was trained with.
DEFAULT = Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "bicubic")


def read_normalisation(visual: Any, preprocess: Any) -> Normalisation:
    """Find out how pixels are normalised, by default with the mean and std of OpenAI's CLIP.

    Raises:
        InputError: ``preprocess`` is neither a torchvision ``Compose`` nor a mapping, or it does not normalise.
    """
    return transforms.read_normalisation(visual, preprocess, DEFAULT, "open_clip's preprocess_val")
