"""Scenes: generated images with captions and exact masks, for training and evaluating small models offline.

A scene shows OpenMoji pictograms on one or two textured backgrounds. Its caption names some of the nouns that are
visible, often an absent noun too, and contains filler words. Some visible nouns are not named.
"""

from __future__ import annotations

from ttd_plugins.embedded.scenes.compose import Scene, Scenes, Split
from ttd_plugins.embedded.scenes.pictograms import ATTRIBUTION
from ttd_plugins.embedded.scenes.vocabulary import BACKGROUNDS, NOUNS, OBJECTS, kind_of_noun

__all__ = ["ATTRIBUTION", "BACKGROUNDS", "NOUNS", "OBJECTS", "Scene", "Scenes", "Split", "kind_of_noun"]
