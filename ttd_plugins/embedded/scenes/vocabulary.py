"""The words of the scenes: what can be pictured, how often, and what merely fills a caption.

Frequencies are skewed as on the web (Zipf-Mandelbrot), so that a caption's rare word tells more than its common ones.
Every unordered pair of nouns belongs to one split, and is pictured together in that split alone.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SPLIT_SHARES: tuple[float, ...] = (0.5, 0.25, 0.25)
NounKind = Literal["background", "common", "middle", "rare"]

# Emoji whose English name is one word, chosen to be told apart at 20 pixels; most frequent first.
OBJECTS: tuple[str, ...] = tuple(
    """
    dog cat automobile horse bird bicycle bus sailboat house cow umbrella chair bread books tulip banana
    bed fish train guitar pizza tent rose balloon duck key kite taxi bell candle
    rabbit tomato lemon ship camera pear monkey owl egg cherries cactus carrot stopwatch lion bear
    elephant drum butterfly penguin mushroom flashlight fox pineapple watermelon basket scissors snail airplane
    backpack helicopter giraffe crown turtle strawberry ladder frog harp raccoon violin broccoli whale teapot
    cupcake zebra lobster anchor robot trumpet eggplant octopus camel rocket peach dolphin doughnut
    swan ghost spider tractor goat magnet snowman panda accordion crab trophy unicorn flamingo
    avocado saxophone sunflower skateboard
    """.split()
)

# Textures drawn by ttd_plugins.embedded.scenes.textures; most frequent first.
BACKGROUNDS: tuple[str, ...] = tuple("grass water sand snow brick sky wood gravel leaves tiles mud marble".split())

NOUNS: tuple[str, ...] = BACKGROUNDS + OBJECTS

# Words and phrases that name nothing in the picture.
LEADS: tuple[str, ...] = (
    "a photo of",
    "a picture of",
    "an image showing",
    "a close view of",
    "here is",
    "there is",
    "we found",
    "my favorite shot of",
    "just another day with",
    "a scene featuring",
    "stock illustration with",
    "vintage postcard of",
    "looking at",
    "a drawing of",
    "happy to see",
)
TAILS: tuple[str, ...] = (
    "on a quiet morning",
    "for sale",
    "last summer",
    "in the evening",
    "at the weekend",
    "in high resolution",
    "during our holiday",
    "by an unknown artist",
    "ready to download",
    "with lots of details",
    "before the party",
    "from above",
)
ADJECTIVES: tuple[str, ...] = tuple(
    "old lovely small big nice colorful cute funny beautiful new strange simple famous bright".split()
)
POSITIONS: tuple[str, ...] = ("near", "with", "and", "beside", "next to", "behind", "under", "against", "along with")


def zipf_weights(count: int, offset: float = 3.0, exponent: float = 1.0) -> NDArray[np.float64]:
    """Zipf-Mandelbrot probabilities ``(rank + offset) ** -exponent`` of ``count`` ranked words; they add to one."""
    weights = (np.arange(1, count + 1) + offset) ** -exponent
    return weights / weights.sum()


def kind_of_noun(noun: str) -> NounKind:
    """``"background"``, or the third of the frequency ranking that an object is in."""
    if noun in BACKGROUNDS:
        return "background"
    third = 3 * OBJECTS.index(noun) // len(OBJECTS)
    kinds: tuple[NounKind, ...] = ("common", "middle", "rare")
    return kinds[third]


def share_of_split(signature: str) -> Split:
    """The split that ``signature`` falls into, by a hash: the same everywhere, in :data:`SPLIT_SHARES` proportion."""
    position = int.from_bytes(hashlib.sha256(signature.encode()).digest()[:8], "big") / 2**64
    for split, share in zip(SPLITS, SPLIT_SHARES, strict=True):
        if position < share:
            return split
        position -= share
    return SPLITS[-1]


@lru_cache(maxsize=len(SPLITS))
def compatible_nouns(split: Split) -> NDArray[np.bool_]:
    """Symmetric ``[N, N]`` table over :data:`NOUNS`: which pairs may be pictured together in ``split``."""
    table = np.zeros((len(NOUNS), len(NOUNS)), dtype=bool)
    for i, first in enumerate(NOUNS):
        for j in range(i):
            pair = "+".join(sorted((first, NOUNS[j])))
            table[i, j] = table[j, i] = share_of_split(f"pair:{pair}") == split
    return table
