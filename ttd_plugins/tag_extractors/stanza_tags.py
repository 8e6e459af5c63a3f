"""Candidate tags by part of speech: the nouns of a caption, through Stanza (Qi et al., ACL 2020).

This module is the plugin of the entry point ``stanza``. Stanza is imported when :class:`StanzaTags` is built.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ttd_plugins.errors import MissingDependencyError, TagExtractionError, one_sentence
from ttd_plugins.hookspecs import hookimpl
from ttd_plugins.tags import check_captions, distinct, split_words, without_symbols
from ttd_plugins.utils.numbers import whole_number

if TYPE_CHECKING:
    from types import ModuleType

    from ttd_plugins.tags import TagExtractor

PROCESSORS = "tokenize,mwt,pos"
_NOUNS = frozenset({"NOUN", "PROPN"})
_HYPHEN = "-"


class _Unit(NamedTuple):
    """A word of a sentence, or words joined by hyphens; ``start`` and ``end`` are positions in the caption."""

    text: str
    upos: str
    start: int | None
    end: int | None


class StanzaTags:
    """Nouns and proper nouns of a caption, in lower case, in order, each once.

    Adjacent nouns are one compound tag (``traffic light``), and their parts are not tags: the light of a traffic light
    is not a light. A possessive ends a compound (``dog's house`` yields ``dog`` and ``house``). Words joined by hyphens
    are one word with the part of speech of the last (``t-shirt``). Emoji and other symbols are dropped, as by
    :class:`~ttd_plugins.tag_extractors.word_tags.WordTags`. Line breaks count as spaces.

    Args:
        resources: Stanza's resources folder; by default the environment variable ``STANZA_RESOURCES_DIR``, or else
            Stanza's own default.
        adjectives: whether each adjective is a tag too.
        compounds: whether adjacent nouns are joined; otherwise every noun is a tag.
        download: whether Stanza may download missing models. Otherwise the network is not used.
        batch_size: number of captions that Stanza processes at once.
        language: Stanza's code of the captions' language.
        cache_size: number of captions whose tags are cached; the oldest are removed first.

    Raises:
        MissingDependencyError: Stanza cannot be imported.
        TagExtractionError: its models are missing or cannot be read; the message names the folder.
        InputError: a size is not positive.
    """

    name = "stanza"

    def __init__(
        self,
        resources: str | Path | None = None,
        adjectives: bool = False,
        compounds: bool = True,
        download: bool = False,
        batch_size: int = 256,
        language: str = "en",
        cache_size: int = 100_000,
    ) -> None:
        batch_size = whole_number("batch_size", batch_size, at_least=1)
        cache_size = whole_number("cache_size", cache_size, at_least=1)
        self.upos = _NOUNS | ({"ADJ"} if adjectives else frozenset())
        self.compounds = compounds
        self.batch_size = batch_size
        self.cache_size = cache_size
        self._cache: dict[str, tuple[str, ...]] = {}
        self._pipeline = _pipeline(resources, language, download)

    def __call__(self, captions: Sequence[str]) -> list[list[str]]:
        """Return the candidate tags of each caption; see :meth:`ttd_plugins.tags.TagExtractor.__call__`.

        Raises:
            InputError: ``captions`` is not a sequence of strings.
            TagExtractionError: Stanza failed on one of them.
        """
        check_captions(captions)
        texts = [without_symbols(caption) for caption in captions]
        # Stanza cannot process a text without words.
        tags: dict[str, tuple[str, ...]] = {text: () for text in texts if not split_words(text)}
        tags |= {text: self._cache[text] for text in texts if text in self._cache}
        new = [text for text in dict.fromkeys(texts) if text not in tags]
        for first in range(0, len(new), self.batch_size):
            batch = new[first : first + self.batch_size]
            for text, found in zip(batch, self._extract(batch), strict=True):
                tags[text] = self._cache[text] = found
        while len(self._cache) > self.cache_size:
            del self._cache[next(iter(self._cache))]
        return [list(tags[text]) for text in texts]

    def _extract(self, texts: list[str]) -> list[tuple[str, ...]]:
        try:
            with _isolated_stanza():
                documents = self._pipeline.bulk_process(texts)
        except Exception as error:
            raise TagExtractionError(
                f"Stanza failed on a batch of {len(texts)} captions, the first of them {texts[0][:60]!r}: "
                f"{type(error).__name__}: {one_sentence(error)}"
            ) from error
        return [
            tuple(distinct(tag for sentence in document.sentences for tag in self._tags(document.text, sentence)))
            for document in documents
        ]

    def _tags(self, text: str, sentence: Any) -> Iterator[str]:
        run: list[_Unit] = []
        for unit in [*_units(text, sentence), _Unit("", "", None, None)]:
            if run and not (self.compounds and unit.upos in _NOUNS):
                yield _joined(run)
                run = []
            if unit.upos in self.upos and split_words(unit.text):
                if unit.upos in _NOUNS:
                    run.append(unit)
                else:
                    yield _joined([unit])


def _units(text: str, sentence: Any) -> Iterator[_Unit]:
    """Yield the words of a sentence; words around a hyphen are joined as they are written."""
    current: _Unit | None = None
    for word in sentence.words:
        start, end = word.start_char, word.end_char
        glued = current is not None and start is not None and start == current.end
        if current is not None and glued and (word.text == _HYPHEN or current.text.endswith(_HYPHEN)):
            upos = current.upos if word.text == _HYPHEN else word.upos
            current = _Unit(text[current.start : end], upos, current.start, end)
            continue
        if current is not None:
            yield current
        current = _Unit(word.text, word.upos, start, end)
    if current is not None:
        yield current


def _joined(run: list[_Unit]) -> str:
    """Return the words of a run in lower case, with a space where the caption has one."""
    text = run[0].text
    for left, right in pairwise(run):
        text += ("" if left.end is not None and left.end == right.start else " ") + right.text
    return text.lower().strip(".,;:!?'\"-_/ ")


def _stanza() -> ModuleType:
    try:
        return importlib.import_module("stanza")
    except ImportError as error:
        raise MissingDependencyError(
            f"the tag extractor 'stanza' needs Stanza ({one_sentence(error)}); run: pip install 'ttd-plugins[stanza]'"
        ) from error


def _pipeline(resources: str | Path | None, language: str, download: bool) -> Any:
    stanza = _stanza()
    default = os.environ.get("STANZA_RESOURCES_DIR") or stanza.resources.common.DEFAULT_MODEL_DIR
    folder = str(resources if resources is not None else default)
    if not download and not os.path.isfile(os.path.join(folder, "resources.json")):
        raise TagExtractionError(_missing_models(folder, language, "resources.json does not exist"))
    try:
        with _isolated_stanza():
            return stanza.Pipeline(
                language,
                model_dir=folder,
                processors=PROCESSORS,
                download_method=stanza.DownloadMethod.REUSE_RESOURCES if download else None,
            )
    except (OSError, ValueError, KeyError) as error:
        if download:
            raise TagExtractionError(
                f"Stanza's models for {language!r} could not be downloaded to {folder!r}: {one_sentence(error)}"
            ) from error
        raise TagExtractionError(_missing_models(folder, language, one_sentence(error))) from error
    except Exception as error:
        raise TagExtractionError(
            f"Stanza's models for {language!r} in {folder!r} cannot be loaded: {type(error).__name__}: "
            f"{one_sentence(error)}"
        ) from error


def _missing_models(folder: str, language: str, reason: str) -> str:
    return (
        f"Stanza's models for {language!r} are not in {folder!r} ({reason}); build the extractor with download=True, "
        f"run stanza.download({language!r}, model_dir={folder!r}), or pass a resources folder that has them"
    )


@contextmanager
def _isolated_stanza() -> Iterator[None]:
    """Silence Stanza's log messages, and restore torch's random state."""
    import torch

    logger = logging.getLogger("stanza")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        logger.setLevel(level)


@hookimpl
def register_tag_extractors(register: Callable[[str, Callable[..., TagExtractor]], None]) -> None:
    """Register Stanza's nouns."""
    register(StanzaTags.name, StanzaTags)
