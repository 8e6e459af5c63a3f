"""Captions to candidate tags: the first step of TTD (arXiv 2404.00384, section 3.1), which starts from a word split.

A tag extractor is any callable that follows :class:`TagExtractor`. The one here, :class:`WordTags`, is the paper's
"plain word split, optionally dropping stop words" and needs no model, no network and no torch; it is registered by a
hook as anybody's would be. Which candidates are in the picture is decided later, from pixels.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

from ttd_plugins.errors import InputError, listed, one_sentence
from ttd_plugins.hookspecs import hookimpl


@runtime_checkable
class TagExtractor(Protocol):
    """What the engine asks of a tag extractor.

    Attributes:
        name: the name under which it is registered.
    """

    name: str

    def __call__(self, captions: Sequence[str]) -> list[list[str]]:
        """For each caption its candidate tags, in the order of the caption, each distinct tag once.

        Two tags are the same when their case-folded forms are. A caption that names nothing gives an empty list.
        """


_ENGLISH = """
a an the
this that these those some any each every both all another other such
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers herself
it its itself they them their theirs themselves one's who whom whose which what someone something there
and or but nor so yet if than as because while although though unless until since whether when where
of in on at by to from with without into onto upon off out up down over under above below behind beside besides between
among amongst along across around about against after before during through throughout toward towards near inside
outside within beneath underneath beyond past per via for
am is are was were be been being do does did doing done have has had having will would shall should can could may might
must not no
i'm you're he's she's it's we're they're i've you've we've they've i'd you'd he'd she'd we'd they'd i'll you'll he'll
she'll it'll we'll they'll that's there's who's what's where's here's let's
isn't aren't wasn't weren't don't doesn't didn't haven't hasn't hadn't won't wouldn't shan't shouldn't can't cannot
couldn't mayn't mightn't mustn't
"""

STOP_WORDS: dict[str, frozenset[str]] = {"english": frozenset(_ENGLISH.split())}
"""Built-in lists: articles and other determiners, pronouns, conjunctions, prepositions, auxiliaries."""

_ASCII_WORD = re.compile(r"[A-Za-z0-9]+(?:['-][A-Za-z0-9]+)*")
_SAME_MARK = str.maketrans({"’": "'", "ʼ": "'", "＇": "'", "‐": "-", "‑": "-", "－": "-"})
_JOINERS = "'-"
_LETTER, _MARK, _JOINER, _SEPARATOR = range(4)
# Zero-width joiners shape letters in Persian and Indic scripts, and glue emoji together elsewhere.
_ZERO_WIDTH_JOINERS = "\u200c\u200d"


_SYMBOLS = frozenset({"So", "Sk", "Cc", "Cs", "Co", "Cn"})


def _dresses(character: str) -> bool:
    # Variation selectors and the keycap ring are marks to Unicode, but they only ever dress an emoji or a digit.
    return "\ufe00" <= character <= "\ufe0f" or character == "\u20e3"


@lru_cache(maxsize=4096)
def _kind(character: str) -> int:
    if character in _JOINERS:
        return _JOINER
    category = unicodedata.category(character)
    if category[0] in "LN":
        return _LETTER
    if category[0] == "M" and not _dresses(character):
        return _MARK
    return _MARK if character in _ZERO_WIDTH_JOINERS else _SEPARATOR


def split_words(text: str) -> list[str]:
    """Words of ``text`` in order, repetitions and case kept.

    A word is a run of letters, marks and digits of any script, with single apostrophes and hyphens inside it
    (``dog's``, ``t-shirt``); typographic ones become ``'`` and ``-``. Punctuation is dropped, and so are emoji and
    other symbols: in captions they are decoration far more often than names, and they are never glued to a word.
    A script that is written without spaces (Chinese, Japanese, Thai) is not segmented: each run between punctuation
    marks stays one word.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text)
    text = unicodedata.normalize("NFC", text).translate(_SAME_MARK)
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


def without_symbols(text: str) -> str:
    """``text`` on one line in Unicode's composed form, typographic apostrophes plain, emoji and other symbols blank."""
    text = unicodedata.normalize("NFC", text).translate(_SAME_MARK)
    return " ".join("".join(" " if unicodedata.category(c) in _SYMBOLS or _dresses(c) else c for c in text).split())


def fold(tag: str) -> str:
    """The form in which tags are compared: case-folded, in Unicode's composed form."""
    return unicodedata.normalize("NFC", tag.casefold())


def distinct(tags: Iterable[str]) -> list[str]:
    """``tags`` in order, each once by :func:`fold`, the first spelling kept."""
    first: dict[str, str] = {}
    for tag in tags:
        first.setdefault(fold(tag), tag)
    return list(first.values())


def check_captions(captions: Sequence[str]) -> None:
    """Refuse what is not a sequence of strings.

    Raises:
        InputError: a lone string, or an item that is not a string, with its position.
    """
    if isinstance(captions, str):
        raise InputError("tag extractors take a list of captions, not one string; write [caption]")
    for position, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise InputError(f"caption {position} is a {type(caption).__name__}, not a string")


def read_stop_words(stop_words: str | Path | Iterable[str] | None) -> frozenset[str]:
    """Stop words in the form of :func:`fold`.

    Args:
        stop_words: the name of a built-in list, the path of a UTF-8 text file with words between white space, the
            words themselves, or ``None`` for no list.

    Raises:
        InputError: there is no such list and no such file, the file cannot be read, or a word is not a string.
    """
    if stop_words is None:
        return frozenset()
    if isinstance(stop_words, str) and stop_words in STOP_WORDS:
        return STOP_WORDS[stop_words]
    if isinstance(stop_words, str | Path):
        try:
            words: list[str] = Path(stop_words).read_text(encoding="utf-8").split()
        except FileNotFoundError:
            raise InputError(
                f"stop words {str(stop_words)!r} are neither a file nor a built-in list; built in: {listed(STOP_WORDS)}"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"stop words cannot be read from {str(stop_words)!r}: {one_sentence(error)}") from error
    else:
        words = list(stop_words)
    for word in words:
        if not isinstance(word, str):
            raise InputError(f"stop words must be strings, not {type(word).__name__}")
    return frozenset(fold(word.translate(_SAME_MARK)) for word in words)


class WordTags:
    """The default extractor: the distinct words of a caption, in lower case (:func:`split_words`).

    Args:
        stop_words: words that are never tags: ``"english"`` (the default), the path of a text file, the words
            themselves, or ``None`` to keep every word.

    Raises:
        InputError: the stop words cannot be read.
    """

    name = "words"

    def __init__(self, stop_words: str | Path | Iterable[str] | None = "english") -> None:
        self.stop_words = read_stop_words(stop_words)

    def __call__(self, captions: Sequence[str]) -> list[list[str]]:
        """Candidate tags of each caption; see :meth:`TagExtractor.__call__`."""
        check_captions(captions)
        return [
            [tag for tag in distinct(word.lower() for word in split_words(caption)) if fold(tag) not in self.stop_words]
            for caption in captions
        ]


@hookimpl
def register_tag_extractors(register: Callable[[str, Callable[..., TagExtractor]], None]) -> None:
    """Register the plain word split."""
    register(WordTags.name, WordTags)
