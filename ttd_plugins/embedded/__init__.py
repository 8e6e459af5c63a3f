"""Small models, generated scenes and photographs that are part of the package."""

from __future__ import annotations

from pathlib import Path

MODELS_FOLDER = Path(__file__).parent / "models"
PHOTOGRAPHS_FOLDER = Path(__file__).parent / "photographs"
"""Photographs with captions and masks in COCO's format; ``ATTRIBUTION.md`` has source and licence of each."""


def model_folder(name: str) -> Path:
    """Return the folder of the embedded model ``name``, such as ``"open_clip_tiny"``."""
    return MODELS_FOLDER / name
