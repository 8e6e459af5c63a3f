"""True tags of a caption: the classes that it names and its picture shows.

Which words name which class is data: ``coco_synonyms.json`` beside this file, for the 133 classes of COCO panoptic (the
80 things among them). ``classes`` gives for each class what names it, besides its own name; ``several`` gives words
that may name any of several classes, so that an "animal" is true where a dog is shown; ``not`` gives phrases in which
such a word names something else ("light blue", "orange juice"); ``plurals`` the irregular ones.
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
    """Words ``start`` to ``end`` (exclusive) of a caption, which name any of ``classes``."""

    start: int
    end: int
    text: str
    classes: tuple[str, ...]


def plain_name(name: str) -> str:
    """A class name as people write it: ``"door-stuff"`` is a door and ``"wall-brick"`` a wall brick."""
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name.replace("-", " ")


def caption_words(caption: str) -> list[str]:
    """Words of a caption in the form in which they are compared: folded, hyphens apart, possessives taken off."""
    words = []
    for word in split_words(caption):
        for part in fold(word).replace("-", " ").split():
            words.append(part.removesuffix("'s").removesuffix("'"))
    return words


def plurals(phrase: str, irregular: Mapping[str, str]) -> list[str]:
    """Plural forms of a phrase, of its last word; a phrase that is one already gains nothing that would harm."""
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
    """Which phrases name which classes.

    Args:
        names: for each phrase the classes that it may name; phrases without a class hide what lies inside them.
    """

    def __init__(self, names: Mapping[str, Sequence[str]]) -> None:
        self._phrases = {tuple(caption_words(phrase)): tuple(classes) for phrase, classes in names.items()}
        self._longest = max(map(len, self._phrases), default=0)

    @property
    def classes(self) -> frozenset[str]:
        """Every class that can be named."""
        return frozenset(name for names in self._phrases.values() for name in names)

    def mentions(self, caption: str) -> list[Mention]:
        """What a caption names, from left to right, the longest phrase first; positions count :func:`caption_words`."""
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
    """The table of ``coco_synonyms.json``, with plurals."""
    table = json.loads(
        resources.files("ttd_plugins.evaluation").joinpath("coco_synonyms.json").read_text(encoding="utf-8")
    )
    names: dict[str, list[str]] = {}
    for name, synonyms in table["classes"].items():
        for phrase in (plain_name(name), *synonyms):
            names.setdefault(phrase, []).append(name)
    # A word of several classes names all of them, whatever else was said of it.
    names |= table["several"]
    for phrase in list(names):
        for plural in plurals(phrase, table["plurals"]):
            names.setdefault(plural, names[phrase])
    return Vocabulary(names | {phrase: [] for phrase in table["not"]})


def mentions_of_tags(caption: str, tags: Iterable[str]) -> list[Mention]:
    """Where the tags of a caption stand in it, each a class of its own, the longest first."""
    return Vocabulary({tag: (tag,) for tag in tags}).mentions(caption)


def label_candidates(
    caption: str, candidates: Sequence[str], mentions: Sequence[Mention], true: Sequence[bool | None]
) -> list[bool | None]:
    """Whether each candidate tag is a true tag.

    A candidate names a mention where, somewhere in the caption, it ends where that ends: "light" of "traffic light",
    and "baseball player" of "player". It is true if any mention that it names is true, and unknown (``None``) if none
    is true and one is unknown. A word inside a mention, short of its end, qualifies what is shown and names nothing by
    itself ("stop" of "stop sign"); it is unknown where the picture may show the whole.

    Args:
        caption: the caption.
        candidates: its candidate tags.
        mentions: what the caption names.
        true: for each mention whether the picture shows it; ``None`` where nothing tells.
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
