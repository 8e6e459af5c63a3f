"""Shell completion of names, quick: without torch, without a backbone library, and without loading a plugin.

Only the entry points and the embedded models are read, so the pretrained models of a family are not offered;
``ttd backbones FAMILY`` lists them.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.resources import files

GROUP = "ttd_plugins"
WORDS = "COMP_WORDS"
CURRENT = "COMP_CWORD"

Completer = Callable[[str], list[str]]


def one_of(names: Iterable[str]) -> Completer:
    """Return a completer of fixed names."""
    known = tuple(names)
    return lambda incomplete: _matching(known, incomplete)


TAG_EXTRACTORS = one_of(("words", "stanza"))
"""Completer of the tag extractors of the package."""


def plugin_names(incomplete: str) -> list[str]:
    """Complete the name of an installed plugin."""
    return _matching((point.name for point in _entry_points()), incomplete)


def families(incomplete: str) -> list[str]:
    """Complete the name of a family of backbones."""
    return _matching(_families(), incomplete)


def backbones(incomplete: str) -> list[str]:
    """Complete the name of a backbone: an embedded one, or a family with its colon."""
    return _matching([*_embedded(), *(f"{family}:" for family in _families())], incomplete)


def backbone_list(incomplete: str) -> list[str]:
    """Complete the last of several names with commas between them."""
    done, comma, last = incomplete.rpartition(",")
    return [f"{done}{comma}{name}" for name in backbones(last)]


@contextmanager
def colons_joined() -> Iterator[None]:
    """Undo that bash splits words at colons, so that the value ``open_clip:ph`` is one word inside the block.

    Bash inserts a completion after the last colon. What is printed in the block loses the part before it.
    """
    joined = _joined(os.environ)
    if joined is None:
        yield
        return
    prefix = joined[-1][: joined[-1].rindex(":") + 1]
    os.environ[WORDS], os.environ[CURRENT] = shlex.join(joined), str(len(joined) - 1)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        print("\n".join(line.removeprefix(prefix) for line in printed.getvalue().splitlines()))


def _joined(environment: Mapping[str, str]) -> list[str] | None:
    """The words up to the completed one with colons joined; ``None`` if the completed one has none, or none is."""
    try:
        words, current = shlex.split(environment[WORDS]), int(environment[CURRENT])
    except (KeyError, ValueError):
        return None  # no completion in bash, or an open quotation mark, which typer reads in its own way
    joined: list[str] = []
    for word in words[: current + 1]:
        if joined and (word.startswith(":") or joined[-1].endswith(":")):
            joined[-1] += word
        else:
            joined.append(word)
    return joined if len(words) > current and ":" in joined[-1] else None


def _matching(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})


def _entry_points() -> Sequence[importlib.metadata.EntryPoint]:
    return tuple(importlib.metadata.entry_points(group=GROUP))


def _families() -> list[str]:
    """Names of the plugins, except those of tag extractors: a plugin is named after its family."""
    return [point.name for point in _entry_points() if ".tag_extractors." not in point.value]


def _embedded() -> list[str]:
    """Names of the models that ship with the package: their folders are FAMILY_MODEL."""
    folders = [folder.name for folder in (files("ttd_plugins.embedded") / "models").iterdir()]
    return [
        f"{family}:{folder.removeprefix(f'{family}_')}"
        for family in _families()
        for folder in folders
        if folder.startswith(f"{family}_")
    ]
