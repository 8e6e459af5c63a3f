"""Scenes: generated pictures with captions and exact masks, for training and measuring small models offline.

A scene is a composition of OpenMoji pictograms on one or two textured backgrounds. Its caption names some of what is
there, often something that is not, and words that name nothing; the rest of the picture stays unnamed.
"""

from __future__ import annotations

from ttd_plugins.embedded.scenes.compose import Scene, Scenes, Split
from ttd_plugins.embedded.scenes.pictograms import ATTRIBUTION
from ttd_plugins.embedded.scenes.vocabulary import BACKGROUNDS, NOUNS, OBJECTS, kind_of_noun

__all__ = ["ATTRIBUTION", "BACKGROUNDS", "NOUNS", "OBJECTS", "Scene", "Scenes", "Split", "kind_of_noun"]
