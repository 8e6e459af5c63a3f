"""The vocabulary of the scenes: nouns with their frequencies, and filler words of captions.

Frequencies are skewed as on the web (Zipf-Mandelbrot), so that a caption's rare word is more informative than its
common ones. Each unordered pair of nouns is visible together in one split only.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
LAYOUT_SHARES: tuple[float, ...] = (0.5, 0.25, 0.25)
GROUPS = 20
NounKind = Literal["background", "common", "middle", "rare"]

# Emoji whose English name is one word, distinguishable at 20 pixels; most frequent first.
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

# Filler words, which name nothing in the image.
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
    """Return Zipf-Mandelbrot probabilities ``(rank + offset) ** -exponent`` of ``count`` words, normalised."""
    weights = (np.arange(1, count + 1) + offset) ** -exponent
    return weights / weights.sum()


def kind_of_noun(noun: str) -> NounKind:
    """Return ``"background"``, or the third of the frequency ranking of an object."""
    if noun in BACKGROUNDS:
        return "background"
    third = 3 * OBJECTS.index(noun) // len(OBJECTS)
    kinds: tuple[NounKind, ...] = ("common", "middle", "rare")
    return kinds[third]


def split_of_layout(signature: str) -> Split:
    """Return the split of a layout, by a hash, in the proportions of :data:`LAYOUT_SHARES`."""
    position = int.from_bytes(hashlib.sha256(signature.encode()).digest()[:8], "big") / 2**64
    for split, share in zip(SPLITS, LAYOUT_SHARES, strict=True):
        if position < share:
            return split
        position -= share
    return SPLITS[-1]


def split_of_pair(first: str, second: str) -> Split:
    """Return the split in which two nouns are visible together.

    Objects form groups of about five, common and rare ones mixed, by one rule for the test split and by another for the
    validation split. Each group has one background. Pairs outside a group are in the training split. Only a tenth is
    held out: with half of the pairs held out, a model learns which objects never occur together, and generalises badly.
    """
    objects = [OBJECTS.index(noun) for noun in (first, second) if noun not in BACKGROUNDS]
    if not objects:
        return "train"
    if len(objects) == 2:
        own = {split: [_group(rank, split) for rank in objects] for split in SPLITS[1:]}
    else:
        background = BACKGROUNDS.index(first if first in BACKGROUNDS else second)
        # Shifted, so that a group's background differs between test and validation.
        shift = {"test": 0, "validation": 5}
        own = {
            split: [background, (_group(objects[0], split) + shift[split]) % len(BACKGROUNDS)] for split in SPLITS[1:]
        }
    held_out: list[Split] = [split for split in ("test", "validation") if own[split][0] == own[split][1]]
    return held_out[0] if held_out else "train"


def _group(rank: int, split: Split) -> int:
    """Return the group of an object by rank; no two objects share both a test group and a validation group."""
    return (rank + (7 * (rank // GROUPS) if split == "validation" else 0)) % GROUPS


@lru_cache(maxsize=len(SPLITS))
def compatible_nouns(split: Split) -> NDArray[np.bool_]:
    """Return a symmetric bool table ``[N, N]`` over :data:`NOUNS`: pairs that may be visible together in ``split``."""
    table = np.zeros((len(NOUNS), len(NOUNS)), dtype=bool)
    for i, first in enumerate(NOUNS):
        for j in range(i):
            table[i, j] = table[j, i] = split_of_pair(first, NOUNS[j]) == split
    return table
