"""Captions of scenes, of different lengths, with filler words and often with absent nouns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ttd_plugins.embedded.scenes.vocabulary import ADJECTIVES, LEADS, POSITIONS, TAILS

_AN = frozenset("aeiou")


def _phrase(noun: str, rng: np.random.Generator, mass_nouns: frozenset[str]) -> str:
    """Return the noun, sometimes with an article or an adjective."""
    words = [str(rng.choice(ADJECTIVES)), noun] if rng.random() < 0.3 else [noun]
    if noun in mass_nouns or noun.endswith("s"):
        article = "the" if rng.random() < 0.2 else ""
    else:
        article = "the" if rng.random() < 0.2 else ("an" if words[0][0] in _AN else "a")
    return " ".join([article, *words]).strip()


def bare(nouns: Sequence[str]) -> str:
    """Return the nouns alone, such as ``dog grass``."""
    return " ".join(nouns)


def sentence(nouns: Sequence[str], rng: np.random.Generator, mass_nouns: frozenset[str]) -> str:
    """Return a caption that names ``nouns`` in order, between filler words."""
    parts = [str(rng.choice(LEADS))] if rng.random() < 0.6 else []
    for position, noun in enumerate(nouns):
        if position:
            parts.append(str(rng.choice(POSITIONS)))
        parts.append(_phrase(noun, rng, mass_nouns))
    if rng.random() < 0.35:
        parts.append(str(rng.choice(TAILS)))
    return " ".join(parts)
