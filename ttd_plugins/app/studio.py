"""What ``ttd app`` computes: maps of a picture and a caption by several backbones, before and after TTD.

Nothing here knows of a page. A :class:`Studio` loads each backbone when it is first asked for and keeps it; every
model is used by one visitor at a time, and what a visitor fine-tunes is that visitor's alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttd_plugins.adapter import Calibration, DenseAdapter
from ttd_plugins.data.images import read_image
from ttd_plugins.engine import TTD, CaptionMaps, TTDOptions
from ttd_plugins.errors import InputError, TTDError, one_sentence
from ttd_plugins.plugins import explain, families, load, make_tag_extractor, parse_name

if TYPE_CHECKING:
    from ttd_plugins.training.loop import StepReport

log = logging.getLogger(__name__)

LONGEST_CAPTION = 1000
MOST_TAGS = 40
SHOWN_SIDE = 720
MOST_STEPS = 400
MOST_TUNED = 16
"""Backbones fine-tuned by visitors that are kept; the oldest goes first."""


@dataclass(frozen=True)
class BackboneView:
    """What one backbone makes of a picture and its caption.

    Attributes:
        name: the backbone's name.
        before: its maps as it was loaded; ``None`` where it failed.
        after: the maps of the tuned backbone; ``None`` where there is none.
        after_title: where ``after`` comes from.
        notes: whole sentences on what the reader should know.
        error: why it, or its tuned twin, failed, in one sentence.
    """

    name: str
    before: CaptionMaps | None = None
    after: CaptionMaps | None = None
    after_title: str | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class AppResult:
    """What the page shows.

    Attributes:
        picture: uint8 ``[height, width, 3]``, the upright picture, its longer side at most :data:`SHOWN_SIDE`.
        caption: the caption.
        tags: its T candidate tags, the same for every backbone.
        views: one for each backbone, in the order asked for.
    """

    picture: NDArray[np.uint8]
    caption: str
    tags: list[str]
    views: list[BackboneView]


class TuningStoppedError(TTDError):
    """A visitor stopped a fine-tuning."""


@dataclass
class _Kept:
    """A backbone that was loaded, used by one caller at a time."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    adapter: DenseAdapter | None = None
    title: str = ""


def embedded_backbones() -> list[str]:
    """Names of the backbones that come with their packages and need no download, in alphabetical order."""
    return [name for name in (f"{family}:tiny" for family in sorted(families())) if is_embedded(name)]


def is_embedded(name: str) -> bool:
    """Whether ``name`` is an embedded backbone with its own weights."""
    try:
        parsed = parse_name(name)
    except TTDError:
        return False
    return parsed.model == "tiny" and parsed.weights != "random"


class Studio:
    """The backbones of a page and all that is asked of them; safe to be called from several threads.

    Args:
        backbones: names, in the order in which they are shown.
        tuned: for some of them, where their tuned twin is; see :func:`ttd_plugins.backbone_sources.load_tuned`.
        options: the engine's.
        device: where the models go.

    Raises:
        InputError: there is no backbone, a tuned twin is of none of them, or is not there.
        TTDError: a name is no backbone's, or the tag extractor cannot be had.
    """

    def __init__(
        self,
        backbones: Sequence[str],
        tuned: Mapping[str, str] | None = None,
        *,
        options: TTDOptions | None = None,
        device: str | None = None,
    ) -> None:
        from ttd_plugins.backbone_sources import untuned_name

        self.backbones = list(dict.fromkeys(backbones))
        self.tuned = dict(tuned or {})
        self.options = options or TTDOptions()
        self.device = device
        if not self.backbones:
            raise InputError("no backbone is named; give one of those that `ttd backbones` lists")
        for name in self.backbones:
            parse_name(name)
        for name, source in self.tuned.items():
            if name not in self.backbones:
                raise InputError(f"a tuned {name} is given, which is none of the backbones {', '.join(self.backbones)}")
            untuned_name(source, name)
        self._extractor = make_tag_extractor(self.options.extractor, **self.options.extractor_options)
        self._guard = threading.Lock()
        self._before = {name: _Kept() for name in self.backbones}
        self._after = {name: _Kept(title=f"after: {source}") for name, source in self.tuned.items()}
        self._own: dict[tuple[str, str], _Kept] = {}
        self._tuning = threading.Lock()
        self._stops: dict[str, threading.Event] = {}

    @property
    def tunable(self) -> list[str]:
        """Those that can be fine-tuned on scenes here: the embedded ones."""
        return [name for name in self.backbones if is_embedded(name)]

    # Maps ------------------------------------------------------------------------------------------------------------

    def view(
        self, image: str | Path | bytes | Image.Image | None, caption: str, names: Sequence[str], visitor: str = ""
    ) -> AppResult:
        """Maps of a picture and its caption by each of ``names``, before and, where there is a tuned twin, after.

        A backbone that fails is told in its view, and the others are shown.

        Args:
            image: a path, the bytes of a file, or a PIL image.
            caption: what the picture shows.
            names: some of :attr:`backbones`.
            visitor: whose fine-tuned backbones count as "after".

        Raises:
            InputError: there is no picture, caption, candidate tag or backbone, or one of them cannot be used.
        """
        if image is None:
            raise InputError("there is no picture yet; drop one in, or take an example")
        if not caption or not caption.strip():
            raise InputError("the caption is empty; say what the picture shows, such as “a dog on the grass”")
        caption = " ".join(caption.split())
        if len(caption) > LONGEST_CAPTION:
            raise InputError(f"the caption has {len(caption)} characters; write at most {LONGEST_CAPTION}")
        if not names:
            raise InputError("no backbone is chosen; choose one or several")
        unknown = [name for name in names if name not in self._before]
        if unknown:
            raise InputError(f"{unknown[0]!r} is none of the backbones of this page: {', '.join(self.backbones)}")
        with self._guard:  # an extractor may hold a model
            tags = self._extractor([caption])[0]
        if not tags:
            raise InputError(
                f"the caption “{one_sentence(ValueError(caption), 60)}” has no word that could be a tag; name "
                "something that can be seen, such as “a dog on the grass”"
            )
        if len(tags) > MOST_TAGS:
            raise InputError(f"the caption has {len(tags)} candidate tags; write one with at most {MOST_TAGS}")
        picture = self._picture(image)
        shown = picture.copy()
        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        views = [self._view(picture, caption, tags, name, visitor) for name in dict.fromkeys(names)]
        return AppResult(np.asarray(shown), caption, tags, views)

    def _picture(self, image: str | Path | bytes | Image.Image) -> Image.Image:
        if isinstance(image, Image.Image):
            from ttd_plugins.data.images import to_rgb

            return to_rgb(image, "the picture")
        # Its own name is one of a temporary folder, which says nothing to a visitor.
        return read_image(image, "the picture" if isinstance(image, bytes) else Path(image).name)

    def _view(self, picture: Image.Image, caption: str, tags: list[str], name: str, visitor: str) -> BackboneView:
        notes: list[str] = []
        try:
            with self._using(self._before[name], lambda: load(name, device=self.device)) as adapter:
                before = TTD(adapter, self.options).maps(picture, caption, tags=tags)
                notes += _notes(adapter, before, self.options)
        except Exception as error:
            return BackboneView(name, error=told(error, name))
        with self._guard:
            kept = self._own.get((visitor, name)) or self._after.get(name)
        if kept is None:
            return BackboneView(name, before, notes=tuple(notes))
        try:
            with self._using(kept, lambda: self._load_tuned(name)) as adapter:
                after = TTD(adapter, self.options).maps(picture, caption, tags=tags)
        except Exception as error:
            return BackboneView(name, before, notes=tuple(notes), error=told(error, f"the tuned {name}"))
        return BackboneView(name, before, after, kept.title, tuple(notes))

    def _load_tuned(self, name: str) -> DenseAdapter:
        from ttd_plugins.backbone_sources import load_tuned

        return load_tuned(name, self.tuned[name], device=self.device)

    @contextmanager
    def _using(self, kept: _Kept, make: Callable[[], DenseAdapter]) -> Iterator[DenseAdapter]:
        with kept.lock:
            if kept.adapter is None:
                kept.adapter = make()
            yield kept.adapter

    # Fine-tuning -----------------------------------------------------------------------------------------------------

    def tune(
        self,
        name: str,
        steps: int,
        visitor: str = "",
        *,
        on_step: Callable[[StepReport], None] | None = None,
        **settings: Any,
    ) -> None:
        """Fine-tune a fresh copy of an embedded backbone with TTD on generated scenes; it is the visitor's "after".

        One fine-tuning runs at a time, and others wait. What the visitor had tuned before stays until it is complete.

        Args:
            name: one of :attr:`tunable`.
            steps: optimiser steps, 1 to :data:`MOST_STEPS`.
            visitor: whose it is.
            on_step: called after each step.
            **settings: of :class:`~ttd_plugins.training.scene_tuning.SceneTuning`.

        Raises:
            InputError: the backbone is not embedded, the steps are out of range, or the visitor is tuning already.
            TuningStoppedError: :meth:`stop` was called; nothing of it is kept.
            TTDError: it cannot be tuned, as where a package that draws scenes is not installed.
        """
        if name not in self.tunable:
            raise InputError(f"{name!r} cannot be fine-tuned here; choose an embedded one: {', '.join(self.tunable)}")
        if not 1 <= steps <= MOST_STEPS:
            raise InputError(f"fine-tuning takes 1 to {MOST_STEPS} steps, not {steps}")
        from ttd_plugins.training.scene_tuning import SceneTuning, tune_on_scenes

        stop = threading.Event()
        with self._guard:
            if visitor in self._stops:
                raise InputError("a fine-tuning of yours is running; wait for it, or stop it first")
            self._stops[visitor] = stop

        def stepped(report: StepReport) -> None:
            if stop.is_set():
                raise TuningStoppedError(f"stopped after {report.step} of {steps} steps; nothing of it was kept")
            if on_step is not None:
                on_step(report)

        try:
            while not self._tuning.acquire(timeout=0.2):
                if stop.is_set():
                    raise TuningStoppedError("stopped before the first step; nothing was changed")
            try:
                adapter = load(name, device=self.device)
                tune_on_scenes(adapter, SceneTuning(steps=steps, ttd=self.options, **settings), on_step=stepped)
            finally:
                self._tuning.release()
            with self._guard:
                self._own.pop((visitor, name), None)
                while len(self._own) >= MOST_TUNED:
                    self._own.pop(next(iter(self._own)))
                count = f"{steps} step" + "s" * (steps != 1)
                self._own[visitor, name] = _Kept(adapter=adapter.eval(), title=f"after: {count} of TTD on scenes")
        except TTDError:
            raise
        except Exception as error:
            raise TTDError(told(error, f"fine-tuning {name}")) from error
        finally:
            with self._guard:
                self._stops.pop(visitor, None)

    def stop(self, visitor: str = "") -> bool:
        """Stop the visitor's fine-tuning after its present step; whether there was one."""
        with self._guard:
            event = self._stops.get(visitor)
        if event is not None:
            event.set()
        return event is not None

    def forget(self, visitor: str) -> None:
        """Stop and drop all that is the visitor's."""
        self.stop(visitor)
        with self._guard:
            self._own = {key: kept for key, kept in self._own.items() if key[0] != visitor}

    @staticmethod
    def example(number: int) -> tuple[Image.Image, str]:
        """Picture and caption of the ``number``-th (from 0) test scene that truly names two things or more.

        Raises:
            MissingDependencyError: a package that draws scenes is not installed.
        """
        from ttd_plugins.embedded.scenes import Scenes

        fitting = (scene for scene in Scenes("test", 100_000) if len(scene.true_tags) > 1)
        for _ in range(number):
            next(fitting)
        scene = next(fitting)
        return Image.fromarray(scene.image), scene.caption


def _notes(adapter: DenseAdapter, maps: CaptionMaps, options: TTDOptions) -> list[str]:
    description = adapter.description
    notes = []
    if description.weights == "random":
        notes.append("Its weights are random, so its maps mean nothing.")
    if (options.calibration or description.calibration) == Calibration():
        notes.append("Not calibrated: its percentages come from the default map; “ttd calibrate” fits one from pairs.")
    if maps.truncated:
        notes.append(f"The caption is longer than {description.context_length} tokens; its end was not read.")
    return notes


def told(error: BaseException, what: str) -> str:
    """One sentence for the page; what is neither the user's nor a plugin's fault goes to the log with its traceback."""
    known = error if isinstance(error, TTDError) else explain(error)
    if known is not None:
        return one_sentence(known)
    log.error("%s failed", what, exc_info=error)
    return f"{what} failed ({type(error).__name__}: {one_sentence(error, 120)}); the terminal says more"
