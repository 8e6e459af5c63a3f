"""Small models and generated scenes that are part of the package."""

from __future__ import annotations

from pathlib import Path

MODELS_FOLDER = Path(__file__).parent / "models"


def model_folder(name: str) -> Path:
    """Return the folder of the embedded model ``name``, such as ``"open_clip_tiny"``."""
    return MODELS_FOLDER / name
