"""Candidate tags of captions: what a tag extractor is, and the text functions that extractors share.

Extracting candidates is the first step of TTD (arXiv 2404.00384, section 3.1). Which candidates are in the image is
decided later, from patch features. The extractors themselves are plugins, ours in :mod:`ttd_plugins.tag_extractors`.
This module does not import torch.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ttd_plugins.errors import InputError
from ttd_plugins.utils.deprecation import renamed_names

if not TYPE_CHECKING:
    __getattr__ = renamed_names(
        __name__,
        {
            name: f"ttd_plugins.tag_extractors.word_tags.{name}"
            for name in ("STOP_WORDS", "WordTags", "read_stop_words")
        },
    )


@runtime_checkable
class TagExtractor(Protocol):
    """Splits captions into candidate tags.

    Attributes:
        name: the name under which it is registered.
    """

    name: str

    def __call__(self, captions: Sequence[str]) -> list[list[str]]:
        """Return the candidate tags of each caption, in the order of the caption, each distinct tag once.

        Two tags are equal if their :func:`fold` forms are. A caption without tags has an empty list.
        """


_ASCII_WORD = re.compile(r"[A-Za-z0-9]+(?:['-][A-Za-z0-9]+)*")
_PLAIN_PUNCTUATION = str.maketrans({"’": "'", "ʼ": "'", "＇": "'", "‐": "-", "‑": "-", "－": "-"})
_JOINERS = "'-"
_LETTER, _MARK, _JOINER, _SEPARATOR = range(4)
# Zero-width joiners shape letters in Persian and Indic scripts, and join emoji elsewhere.
_ZERO_WIDTH_JOINERS = "\u200c\u200d"
# By Unicode's rule of word boundaries (UAX #29) a zero-width space separates words; other format characters do not.
_SEPARATING_FORMATS = "\u200b"
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_SYMBOLS = frozenset({"So", "Sk", "Cc", "Cs", "Co", "Cn"})


def split_words(text: str) -> list[str]:
    """Return the words of ``text`` in order, with repetitions and in their case.

    A word is a run of letters, marks and digits of any script, with single apostrophes and hyphens inside it
    (``dog's``, ``t-shirt``); typographic ones become ``'`` and ``-``. Punctuation, emoji and other symbols are dropped:
    in captions, symbols are mostly decoration. Scripts without spaces (Chinese, Japanese, Thai) are not segmented: each
    run between punctuation marks is one word. HTML entities are unescaped first (``&amp;``), and soft hyphens and other
    invisible format characters do not split words.
    """
    text = unescape_entities(text)
    if text.isascii():
        return _ASCII_WORD.findall(text)
    text = plain_punctuation(unicodedata.normalize("NFC", _without_formats(text)))
    words: list[str] = []
    word = joiner = ""
    for character in text:
        kind = _kind(character)
        if kind == _LETTER:
            word, joiner = word + joiner + character, ""
        elif kind == _MARK and word and not joiner:
            word += character
        elif kind == _JOINER and word and not joiner:
            joiner = character
        else:
            words.append(word)
            word = joiner = ""
    words.append(word)
    return [cleaned for cleaned in (word.rstrip(_ZERO_WIDTH_JOINERS) for word in words) if cleaned]


@lru_cache(maxsize=4096)
def _kind(character: str) -> int:
    if character in _JOINERS:
        return _JOINER
    category = unicodedata.category(character)
    if category[0] in "LN":
        return _LETTER
    if category[0] == "M" and not _is_emoji_modifier(character):
        return _MARK
    return _MARK if character in _ZERO_WIDTH_JOINERS else _SEPARATOR


def _is_emoji_modifier(character: str) -> bool:
    # Variation selectors and the keycap ring are marks in Unicode, but only ever modify an emoji or a digit.
    return "\ufe00" <= character <= "\ufe0f" or character == "\u20e3"


def unescape_entities(text: str) -> str:
    """Replace HTML entities by their characters, also those that were escaped twice (``&amp;quot;``).

    An entity ends in ``;``. Anything else with an ampersand, such as ``AT&T``, stays.
    """
    for _ in range(2):
        if "&" not in text or ";" not in text:
            break
        text = _ENTITY.sub(lambda entity: html.unescape(entity.group()), text)
    return text


def _without_formats(text: str) -> str:
    """Remove invisible format characters, except joiners, which are part of a word, and those that separate words."""
    kept = _ZERO_WIDTH_JOINERS + _SEPARATING_FORMATS
    return "".join(c for c in text if c in kept or unicodedata.category(c) != "Cf")


def plain_punctuation(text: str) -> str:
    """Replace typographic apostrophes and hyphens by ``'`` and ``-``."""
    return text.translate(_PLAIN_PUNCTUATION)


def without_symbols(text: str) -> str:
    """Return ``text`` on one line, in Unicode's composed form, with plain apostrophes and without symbols or emoji.

    HTML entities are unescaped, and invisible format characters are removed.
    """
    text = _without_formats(unescape_entities(text)).replace(_SEPARATING_FORMATS, " ")
    text = plain_punctuation(unicodedata.normalize("NFC", text))
    dropped = (" " if unicodedata.category(c) in _SYMBOLS or _is_emoji_modifier(c) else c for c in text)
    return " ".join("".join(dropped).split())


def fold(tag: str) -> str:
    """Return the form in which tags are compared: case-folded, in Unicode's composed form."""
    return unicodedata.normalize("NFC", tag.casefold())


def distinct(tags: Iterable[str]) -> list[str]:
    """Return ``tags`` in order, each once by :func:`fold`, in its first spelling."""
    first: dict[str, str] = {}
    for tag in tags:
        first.setdefault(fold(tag), tag)
    return list(first.values())


def check_captions(captions: Sequence[str]) -> None:
    """Check that ``captions`` is a sequence of strings.

    Raises:
        InputError: it is one string, or an item is not a string, with its position.
    """
    if isinstance(captions, str):
        raise InputError("tag extractors take a list of captions, not one string; write [caption]")
    for position, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise InputError(f"caption {position} is a {type(caption).__name__}, not a string")
