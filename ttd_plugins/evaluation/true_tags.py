"""True tags of a caption: the classes that the caption names and the image shows.

``coco_synonyms.json`` defines which phrases name which of the 133 classes of COCO panoptic (including the 80 things):
``classes`` lists synonyms of each class; ``several`` lists words for any of several classes, so that "animal" is true
if a dog is shown; ``not`` lists phrases in which such a word means something else ("light blue", "orange juice");
``plurals`` lists irregular plurals.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from ttd_plugins.tags import fold, split_words

_SUFFIXES = ("-other-merged", "-merged", "-stuff", "-other")


@dataclass(frozen=True)
class Mention:
    """A phrase of a caption, words ``start`` to ``end`` (exclusive), which names any of ``classes``."""

    start: int
    end: int
    text: str
    classes: tuple[str, ...]


def plain_name(name: str) -> str:
    """Return a class name in plain English: ``"door-stuff"`` becomes "door" and ``"wall-brick"`` "wall brick"."""
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name.replace("-", " ")


def caption_words(caption: str) -> list[str]:
    """Return the words of a caption for comparison: folded, split at hyphens, without possessive endings."""
    words = []
    for word in split_words(caption):
        for part in fold(word).replace("-", " ").split():
            words.append(part.removesuffix("'s").removesuffix("'"))
    return words


def plurals(phrase: str, irregular: Mapping[str, str]) -> list[str]:
    """Return the plural forms of a phrase, formed from its last word; harmless for a phrase that is plural already."""
    before, _, last = phrase.rpartition(" ")
    lead = f"{before} " if before else ""
    if last in irregular:
        return [lead + irregular[last]]
    for singular in ("man", "woman"):
        if last.endswith(singular):
            return [lead + last.removesuffix("an") + "en"]
    if last.endswith("y") and last[-2:-1] not in "aeiou":
        return [f"{lead}{last[:-1]}ies"]
    return [f"{lead}{last}es" if last.endswith(("s", "x", "z", "ch", "sh")) else f"{lead}{last}s"]


class Vocabulary:
    """Phrases that name classes.

    Args:
        names: for each phrase the classes that it may name; a phrase without classes masks the phrases inside it.
    """

    def __init__(self, names: Mapping[str, Sequence[str]]) -> None:
        self._phrases = {tuple(caption_words(phrase)): tuple(classes) for phrase, classes in names.items()}
        self._longest = max(map(len, self._phrases), default=0)

    @property
    def classes(self) -> frozenset[str]:
        """All classes of the vocabulary."""
        return frozenset(name for names in self._phrases.values() for name in names)

    def mentions(self, caption: str) -> list[Mention]:
        """Return the mentions of a caption from left to right, preferring longer phrases.

        Positions are indices into :func:`caption_words`.
        """
        words, found, start = caption_words(caption), [], 0
        while start < len(words):
            for length in range(min(self._longest, len(words) - start), 0, -1):
                phrase = tuple(words[start : start + length])
                if phrase in self._phrases:
                    if self._phrases[phrase]:
                        found.append(Mention(start, start + length, " ".join(phrase), self._phrases[phrase]))
                    start += length
                    break
            else:
                start += 1
        return found


@cache
def coco_vocabulary() -> Vocabulary:
    """Return the vocabulary of ``coco_synonyms.json``, with plurals."""
    table = json.loads(
        resources.files("ttd_plugins.evaluation").joinpath("coco_synonyms.json").read_text(encoding="utf-8")
    )
    names: dict[str, list[str]] = {}
    for name, synonyms in table["classes"].items():
        for phrase in (plain_name(name), *synonyms):
            names.setdefault(phrase, []).append(name)
    # A word of several classes names all of them; this overrides its synonyms.
    names |= table["several"]
    for phrase in list(names):
        for plural in plurals(phrase, table["plurals"]):
            names.setdefault(plural, names[phrase])
    return Vocabulary(names | {phrase: [] for phrase in table["not"]})


def mentions_of_tags(caption: str, tags: Iterable[str]) -> list[Mention]:
    """Return the positions of tags in their caption; each tag is a class, and longer tags are preferred."""
    return Vocabulary({tag: (tag,) for tag in tags}).mentions(caption)


def label_candidates(
    caption: str, candidates: Sequence[str], mentions: Sequence[Mention], true: Sequence[bool | None]
) -> list[bool | None]:
    """Return whether each candidate tag is a true tag, or ``None`` if unknown.

    A candidate refers to a mention if both end at the same word of the caption: "light" refers to "traffic light", and
    "baseball player" to "player". It is true if any mention that it refers to is true, and unknown if none is true and
    one is unknown. A word inside a mention, before its end, is a qualifier and refers to nothing by itself ("stop" of
    "stop sign"); it is unknown unless the mention is false.

    Args:
        caption: the caption.
        candidates: its candidate tags.
        mentions: mentions of classes in the caption.
        true: for each mention whether the image shows it; ``None`` if the annotations do not say.
    """
    words = caption_words(caption)
    labels: list[bool | None] = []
    for candidate in candidates:
        own = caption_words(candidate)
        verdicts: list[bool | None] = []
        for start in range(len(words) - len(own) + 1 if own else 0):
            end = start + len(own)
            if words[start:end] == own:
                for mention, verdict in zip(mentions, true, strict=True):
                    if end == mention.end and mention.end > mention.start:
                        verdicts.append(verdict)
                    elif mention.start <= start and end < mention.end:
                        verdicts.append(None if verdict is not False else False)
        labels.append(True if True in verdicts else None if None in verdicts else False)
    return labels
