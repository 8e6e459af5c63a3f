"""The examples of ``ttd app``: photographs of the package and generated scenes, their thumbnails and their answers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
from PIL import Image, ImageOps

from ttd_plugins.app.studio import AppResult, Studio, error_sentence, knows_scenes
from ttd_plugins.embedded.photo_examples import EXAMPLES as PHOTOGRAPHS
from ttd_plugins.embedded.photo_examples import Credit, credit, open_photograph
from ttd_plugins.reports.heat_overlay import image_uri

log = logging.getLogger(__name__)

SCENES = 4
THUMBNAIL = (176, 132)
"""Width and height of a thumbnail in pixels, about twice its size on the page."""
MAX_ANSWERS = 32
"""Answers that stay in memory; the oldest is dropped first."""

NAMES: tuple[tuple[str, str], ...] = (
    ("000000078499.jpg", "horse, grass, mountain, water, sky"),
    ("000000121647.jpg", "pizza, wine glass, book, table"),
    ("000000252639.jpg", "bus, car, road, sky, tree"),
    ("000000358083.jpg", "cat, mirror, wall"),
    ("000000196393.jpg", "cat, bird, bowl, floor"),
    ("000000525891.jpg", "stop sign, flower, tree, building"),
)
"""File name of a photograph of the package, and names to look for in it."""


@dataclass(frozen=True)
class Example:
    """An image of a gallery.

    Attributes:
        key: unique in all galleries; the id of its button ends with it.
        label: what the image shows, for the name of its button.
        open: returns the RGB image, and its caption or names to look for in it.
        backbones: the backbones of the page that know such images.
        credit: author and licence of a photograph; ``None`` for a scene.
    """

    key: str
    label: str
    open: Callable[[], tuple[Image.Image, str]]
    backbones: tuple[str, ...]
    credit: Credit | None = None

    def fitting(self, chosen: Sequence[str]) -> list[str]:
        """``chosen``, or the first backbone that knows the image where none of them does."""
        return list(chosen) if set(chosen) & set(self.backbones) else list(self.backbones[:1])


def caption_examples(studio: Studio) -> dict[str, list[Example]]:
    """Title of each group to its examples with captions: what the backbones of the page know."""
    others = tuple(name for name in studio.backbones if not knows_scenes(name))
    groups: dict[str, list[Example]] = {}
    if others:
        groups["Photographs"] = [_photograph("photo", name, caption, others) for name, caption in PHOTOGRAPHS]
    if studio.tunable:
        known = tuple(studio.tunable)
        groups["Generated scenes"] = [
            Example(f"scene-{number}", f"Generated scene {number + 1}", partial(scene, number), known)
            for number in range(SCENES)
        ]
    return groups


def name_examples(studio: Studio) -> dict[str, list[Example]]:
    """Title of each group to its examples with names to look for; they are photographs for every backbone."""
    return {"Photographs": [_photograph("names", name, names, tuple(studio.backbones)) for name, names in NAMES]}


def _photograph(kind: str, name: str, text: str, backbones: tuple[str, ...]) -> Example:
    return Example(
        f"{kind}-{name.removesuffix('.jpg').lstrip('0')}", text, partial(_open, name, text), backbones, credit(name)
    )


def _open(name: str, text: str) -> tuple[Image.Image, str]:
    return open_photograph(name), text


@cache
def scene(number: int) -> tuple[Image.Image, str]:
    """:meth:`Studio.example`, drawn once."""
    return Studio.example(number)


def thumbnails_css(examples: Sequence[Example]) -> str:
    """Rules that show a thumbnail on the button of each example; an example that cannot be drawn has none."""
    rules = []
    for one in examples:
        try:
            # Twice the size, because image_uri stores what it need not reduce as a PNG, which is large.
            width, height = THUMBNAIL
            image = ImageOps.fit(one.open()[0], (2 * width, 2 * height))
        except Exception as error:
            # The button says why when it is pressed.
            log.debug("no thumbnail of %s: %s", one.key, error)
            continue
        rules.append(f"#ttd-example-{one.key} {{ background-image: url({image_uri(np.asarray(image), width)}); }}")
    return "\n".join(rules)


@dataclass(eq=False)
class _Answer:
    """An answer that one visitor's request computes and others may follow."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    latest: AppResult | None = None
    steps: int = 0
    ended: bool = False
    complete: bool = False


class ExampleAnswers:
    """Answers to examples, computed once for all visitors; thread-safe.

    Args:
        studio: the backbones of the page.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._guard = threading.Lock()
        self._answers: dict[tuple[str, ...], _Answer] = {}

    def watch(self, example: Example, names: Sequence[str], visitor: str = "") -> Iterator[AppResult]:
        """:meth:`Studio.watch` for an example, from memory where the visitor has no backbone of their own.

        Raises:
            TTDError: as :meth:`Studio.watch`, or the example cannot be drawn.
        """
        if self.studio.has_own(visitor):
            yield from self.studio.watch(*example.open(), names, visitor)
            return
        key = (example.key, *names)
        while True:
            with self._guard:
                answer = self._answers.get(key)
                first = answer is None or (answer.ended and not answer.complete)
                if first:
                    answer = self._answers[key] = _Answer()
                    self._drop_oldest()
            assert answer is not None
            yield from self._lead(answer, example, names) if first else self._follow(answer)
            if answer.complete or first:
                return

    def _lead(self, answer: _Answer, example: Example, names: Sequence[str]) -> Iterator[AppResult]:
        result: AppResult | None = None
        try:
            for result in self.studio.watch(*example.open(), names):
                with answer.changed:
                    answer.latest, answer.steps = result, answer.steps + 1
                    answer.complete = not any(view.stage or view.error for view in result.views)
                    answer.changed.notify_all()
                yield result
        finally:
            # The visitor may have left, or a backbone failed: who asks next computes it anew.
            with answer.changed:
                answer.ended = True
                answer.changed.notify_all()

    def _follow(self, answer: _Answer) -> Iterator[AppResult]:
        seen = 0
        while True:
            with answer.changed:
                while answer.steps == seen and not answer.ended:
                    answer.changed.wait()
                latest, seen_before, seen = answer.latest, seen, answer.steps
                last = answer.complete or answer.ended
            if latest is not None and seen > seen_before:
                yield latest
            if last:
                return

    def _drop_oldest(self) -> None:
        for key in list(self._answers)[:-MAX_ANSWERS]:
            self._answers.pop(key)

    def prepare(self, example: Example, names: Sequence[str]) -> None:
        """Compute an answer before a visitor asks; an error is logged, and the visitor who asks reads it."""
        try:
            for _ in self.watch(example, names):
                pass
        except Exception as error:
            log.debug("%s", error_sentence(error, "preparing an example"))
