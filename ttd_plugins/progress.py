"""How long work is announced: in stages of so many steps, whoever shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

Stage = Callable[[str, int], Callable[[int], None]]
"""Called with a stage's name and its number of steps; gives the function to call with each number of steps done."""
_T = TypeVar("_T")


def silent(name: str, steps: int) -> Callable[[int], None]:
    """A stage that announces nothing."""
    return lambda done: None


def counted(items: Iterable[_T], advance: Callable[[int], None]) -> list[_T]:
    """The items as a list, each announced as a step once it is there."""
    found = []
    for item in items:
        found.append(item)
        advance(1)
    return found
