"""The default tag extractor: the words of a caption, without stop words.

This is the paper's "plain word split, optionally dropping stop words" (arXiv 2404.00384, section 3.1). It needs no
model, no network and no torch, and is registered by a hook like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ttd_plugins.errors import InputError, listed, one_sentence
from ttd_plugins.hookspecs import hookimpl
from ttd_plugins.tags import TagExtractor, check_captions, distinct, fold, plain_punctuation, split_words

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


class WordTags:
    """The distinct words of a caption, in lower case (:func:`~ttd_plugins.tags.split_words`).

    Args:
        stop_words: words that are never tags: ``"english"`` (the default), the path of a text file, the words
            themselves, or ``None`` for no stop words.

    Raises:
        InputError: the stop words cannot be read.
    """

    name = "words"

    def __init__(self, stop_words: str | Path | Iterable[str] | None = "english") -> None:
        self.stop_words = read_stop_words(stop_words)

    def __call__(self, captions: Sequence[str]) -> list[list[str]]:
        """Return the candidate tags of each caption; see :meth:`ttd_plugins.tags.TagExtractor.__call__`."""
        check_captions(captions)
        return [
            [tag for tag in distinct(word.lower() for word in split_words(caption)) if fold(tag) not in self.stop_words]
            for caption in captions
        ]


def read_stop_words(stop_words: str | Path | Iterable[str] | None) -> frozenset[str]:
    """Return stop words, each in the form of :func:`~ttd_plugins.tags.fold`.

    Args:
        stop_words: the name of a built-in list, the path of a UTF-8 text file with words separated by white space, the
            words themselves, or ``None`` for no stop words.

    Raises:
        InputError: neither a list nor a file of that name exists, the file cannot be read, or a word is not a string.
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
    return frozenset(fold(plain_punctuation(word)) for word in words)


@hookimpl
def register_tag_extractors(register: Callable[[str, Callable[..., TagExtractor]], None]) -> None:
    """Register the word split."""
    register(WordTags.name, WordTags)
