"""What ``ttd app`` computes: maps of an image and a caption by several backbones, before and after TTD.

This module knows nothing of the page. A :class:`Studio` loads each backbone on its first use and keeps it in memory.
One visitor at a time uses a model, and a visitor's fine-tuned backbone is visible to that visitor only.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.data.images import read_image
from ttd_plugins.engine import TTD, CaptionMaps, TTDOptions
from ttd_plugins.errors import InputError, TTDError, one_sentence
from ttd_plugins.plugins import RANDOM_WEIGHTS, explain, families, load, make_tag_extractor, parse_name
from ttd_plugins.toolkit.clip_family import AFTER_TTD
from ttd_plugins.toolkit.fast_inference import faster_copy
from ttd_plugins.utils.deprecation import RenamedAttribute, renamed_names

if TYPE_CHECKING:
    from ttd_plugins.segmenting import Segmentation
    from ttd_plugins.toolkit.fast_inference import Precision
    from ttd_plugins.training.loop import StepReport

log = logging.getLogger(__name__)
_S = TypeVar("_S")

MAX_CAPTION_CHARACTERS = 1000
MAX_TAGS = 40
IMAGE_SIDE = 720
MAX_STEPS = 400
MAX_TUNED = 16
"""Backbones of visitors that stay in memory; the oldest is dropped first."""


@dataclass(frozen=True)
class BackboneView:
    """The maps of one backbone for an image and its caption.

    Attributes:
        name: the backbone's name.
        before: maps of the backbone as loaded; ``None`` if it failed.
        after: maps of the fine-tuned backbone; ``None`` if there is none.
        after_title: where the fine-tuned backbone comes from.
        stage: what is being done now, such as "loading open_clip:photo"; empty when the view is complete.
        notes: sentences that the reader should know.
        error: why the backbone, or the fine-tuned one, failed, in one sentence.
    """

    name: str
    before: CaptionMaps | None = None
    after: CaptionMaps | None = None
    after_title: str | None = None
    stage: str = ""
    notes: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class AppResult:
    """What the page shows.

    Attributes:
        image: uint8 ``[height, width, 3]``, the upright image, its longer side at most :data:`IMAGE_SIDE`.
        caption: the caption.
        tags: its T candidate tags, the same for every backbone.
        views: one for each backbone, in the order of the request.
    """

    image: NDArray[np.uint8]
    caption: str
    tags: list[str]
    views: list[BackboneView]

    picture = RenamedAttribute("image")


@dataclass(frozen=True)
class SegmentationStage:
    """What is being done for a segmentation.

    Attributes:
        image: uint8 ``[height, width, 3]``, the upright image, its longer side at most :data:`IMAGE_SIDE`.
        names: the names to look for.
        backbone: name of the backbone.
        stage: what is being done now, such as "loading open_clip:photo".
    """

    image: NDArray[np.uint8]
    names: list[str]
    backbone: str
    stage: str


class TuningStoppedError(TTDError):
    """A visitor stopped a fine-tuning."""


@dataclass
class _Loaded:
    """A backbone in memory; its lock is held while it is used."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    adapter: DenseAdapter | None = None
    title: str = ""


def embedded_backbones() -> list[str]:
    """Names of the backbones that need no download: those for photographs first, then in alphabetical order."""
    known = families()
    names = [f"{family}:{model}" for family in sorted(known) for model in known[family].embedded_models]
    return sorted(filter(is_embedded, names), key=lambda name: (knows_scenes(name), name))


def is_embedded(name: str) -> bool:
    """Whether ``name`` is an embedded backbone with its own weights."""
    try:
        parsed = parse_name(name)
    except TTDError:
        return False
    family = families().get(parsed.family)
    if family is None or parsed.model not in family.embedded_models:
        return False
    # A small model that comes with random weights only has no default.
    return parsed.weights != RANDOM_WEIGHTS and family.default_weights(parsed.model) is not None


def shipped_tuning(names: Iterable[str]) -> dict[str, str]:
    """For each of ``names`` that has weights after TTD in the package, the name with these weights."""
    found = {}
    for name in filter(is_embedded, names):
        parsed = parse_name(name)
        family = families()[parsed.family]
        if parsed.weights == family.default_weights(parsed.model) and AFTER_TTD in family.weights(parsed.model):
            found[name] = f"{parsed.family}:{parsed.model}@{AFTER_TTD}"
    return found


def knows_scenes(name: str) -> bool:
    """Whether ``name`` is an embedded backbone for generated scenes, small enough to be tuned in a page."""
    return is_embedded(name) and parse_name(name).model == "tiny"


class Studio:
    """The backbones of a page and their results; thread-safe.

    Args:
        backbones: names for :func:`ttd_plugins.load`, in the order in which the page shows them.
        tuned: for some names, the path of a fine-tuned backbone; see :func:`ttd_plugins.backbone_sources.load_tuned`.
        options: options of the engine.
        device: device of the models.
        fast: whether the page shows faster copies of the backbones, as :func:`ttd_plugins.load` makes them; those that
            visitors tune are as they are.

    Raises:
        InputError: ``backbones`` is empty, or a path in ``tuned`` does not exist or belongs to no backbone.
        TTDError: a name is unknown, or the tag extractor cannot be made.
    """

    def __init__(
        self,
        backbones: Sequence[str],
        tuned: Mapping[str, str] | None = None,
        *,
        options: TTDOptions | None = None,
        device: str | None = None,
        fast: bool | Precision = False,
    ) -> None:
        from ttd_plugins.backbone_sources import check_backbone, untuned_name

        self.backbones = list(dict.fromkeys(backbones))
        self.tuned = dict(tuned or {})
        self.options = options or TTDOptions()
        self.device, self.fast = device, fast
        if not self.backbones:
            raise InputError("no backbone is named; name one that `ttd backbones` lists")
        for name in self.backbones:
            check_backbone(name)
        for name, source in self.tuned.items():
            if name not in self.backbones:
                raise InputError(f"a tuned {name} is named, which is none of the backbones {', '.join(self.backbones)}")
            untuned_name(source, name)
        self._extractor = make_tag_extractor(self.options.extractor, **self.options.extractor_options)
        self._guard = threading.Lock()
        self._before = {name: _Loaded() for name in self.backbones}
        self._after = {name: _Loaded(title=f"after: {source}") for name, source in self.tuned.items()}
        self._own: dict[tuple[str, str], _Loaded] = {}
        self._tuning = threading.Lock()
        self._stops: dict[str, threading.Event] = {}

    @property
    def tunable(self) -> list[str]:
        """Names of the backbones that can be fine-tuned in the page: the embedded ones for scenes."""
        return [name for name in self.backbones if knows_scenes(name)]

    # Maps ------------------------------------------------------------------------------------------------------------

    def view(
        self, image: str | Path | bytes | Image.Image | None, caption: str, names: Sequence[str], visitor: str = ""
    ) -> AppResult:
        """The complete result of :meth:`watch`, with its arguments and errors."""
        *_, result = self.watch(image, caption, names, visitor)
        return result

    def watch(
        self, image: str | Path | bytes | Image.Image | None, caption: str, names: Sequence[str], visitor: str = ""
    ) -> Iterator[AppResult]:
        """Maps of an image and its caption by each of ``names``, before and, if there is a fine-tuned backbone, after.

        A view states the error of a backbone that fails; the other backbones are shown.

        Args:
            image: a path, the bytes of a file, or a PIL image.
            caption: what the image shows.
            names: some of :attr:`backbones`.
            visitor: id of the visitor, whose own fine-tuned backbones are "after".

        Yields:
            The result whenever a stage begins or ends, first without maps; the last one is complete.

        Raises:
            InputError: the image, the caption, its candidate tags or ``names`` are missing or cannot be used.
        """
        if image is None:
            raise InputError("there is no image yet; drop one in, or take an example")
        if not caption or not caption.strip():
            raise InputError("the caption is empty; write what the image shows, such as “a dog on the grass”")
        caption = " ".join(caption.split())
        if len(caption) > MAX_CAPTION_CHARACTERS:
            raise InputError(f"the caption has {len(caption)} characters; write at most {MAX_CAPTION_CHARACTERS}")
        if not names:
            raise InputError("no backbone is chosen; choose one or more")
        unknown = [name for name in names if name not in self._before]
        if unknown:
            raise InputError(f"{unknown[0]!r} is none of the backbones of this page: {', '.join(self.backbones)}")
        with self._guard:  # an extractor may contain a model
            tags = self._extractor([caption])[0]
        if not tags:
            raise InputError(
                f"the caption “{one_sentence(ValueError(caption), 60)}” has no word that could be a tag; name "
                "something that can be seen, such as “a dog on the grass”"
            )
        if len(tags) > MAX_TAGS:
            raise InputError(f"the caption has {len(tags)} candidate tags; write one with at most {MAX_TAGS}")
        opened = self._open_image(image)
        shown = opened.copy()
        shown.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
        order = list(dict.fromkeys(names))
        views = [self._waiting(name, visitor) for name in order]
        for number, name in enumerate(order):
            for view in self._view(opened, caption, tags, name, visitor):
                views[number] = view
                yield AppResult(np.asarray(shown), caption, tags, list(views))

    def segment(
        self, image: str | Path | bytes | Image.Image | None, names: str, backbone: str, background: str = "words"
    ) -> Segmentation:
        """The segmentation of :meth:`watch_segmentation`, with its arguments and errors."""
        *_, found = self.watch_segmentation(image, names, backbone, background)
        assert not isinstance(found, SegmentationStage)
        return found

    def watch_segmentation(
        self, image: str | Path | bytes | Image.Image | None, names: str, backbone: str, background: str = "words"
    ) -> Iterator[SegmentationStage | Segmentation]:
        """Segment an image by names, as ``ttd segment`` does, without reading files that the names could denote.

        Args:
            image: a path, the bytes of a file, or a PIL image; it is reduced to a longer side of :data:`IMAGE_SIDE`.
            names: names with commas.
            backbone: one of :attr:`backbones`.
            background: ``"words"`` or ``"none"``; see
                :class:`~ttd_plugins.evaluation.protocol_options.SegmentProtocol`.

        Yields:
            Each stage when it begins, and last the segmentation.

        Raises:
            InputError: the image, the names or the backbone are missing or cannot be used.
            TTDError: the backbone cannot be loaded.
        """
        from ttd_plugins.evaluation.vocabulary import parse_names
        from ttd_plugins.segmenting import Segmenter

        if image is None:
            raise InputError("there is no image yet; drop one in, or take an example")
        if not names or not names.strip():
            raise InputError("there are no names; write what to look for, such as “dog, grass, sky”")
        if len(names) > MAX_CAPTION_CHARACTERS:
            raise InputError(f"the names have {len(names)} characters; write at most {MAX_CAPTION_CHARACTERS}")
        classes = parse_names(names)
        if len(classes) > MAX_TAGS:
            raise InputError(f"there are {len(classes)} names; write at most {MAX_TAGS}")
        if backbone not in self._before:
            raise InputError(f"{backbone!r} is none of the backbones of this page: {', '.join(self.backbones)}")
        opened = self._open_image(image)
        opened.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
        shown, loaded = np.asarray(opened), self._before[backbone]
        words = [one.name for one in classes]
        make = partial(self._load, backbone)
        yield from self._loading(loaded, make, SegmentationStage(shown, words, backbone, f"loading {backbone}"))
        yield SegmentationStage(shown, words, backbone, "comparing each pixel with the names")
        with self._using(loaded, make) as adapter:
            found = Segmenter(adapter, classes, background=background)(opened)
        yield found

    def _open_image(self, image: str | Path | bytes | Image.Image) -> Image.Image:
        if isinstance(image, Image.Image):
            from ttd_plugins.data.images import to_rgb

            return to_rgb(image, "the image")
        # The full path is one of a temporary folder, which means nothing to a visitor.
        return read_image(image, "the image" if isinstance(image, bytes) else Path(image).name)

    def has_own(self, visitor: str) -> bool:
        """Whether the visitor has fine-tuned a backbone in the page."""
        with self._guard:
            return any(owner == visitor for owner, _ in self._own)

    def _tuned_for(self, name: str, visitor: str) -> _Loaded | None:
        with self._guard:
            return self._own.get((visitor, name)) or self._after.get(name)

    def _waiting(self, name: str, visitor: str) -> BackboneView:
        tuned = self._tuned_for(name, visitor)
        return BackboneView(name, after_title=None if tuned is None else tuned.title, stage="waiting")

    def _view(
        self, image: Image.Image, caption: str, tags: list[str], name: str, visitor: str
    ) -> Iterator[BackboneView]:
        """The view of one backbone when a stage begins, and the complete view. No lock is held while it waits."""
        tuned, loaded = self._tuned_for(name, visitor), self._before[name]
        title = None if tuned is None else tuned.title
        view = BackboneView(name, after_title=title)
        try:
            make = partial(self._load, name)
            yield from self._loading(loaded, make, replace(view, stage=f"loading {name}"))
            yield replace(view, stage="computing the maps before TTD" if tuned else "computing the maps")
            with self._using(loaded, make) as adapter:
                before = TTD(adapter, self.options).maps(image, caption, tags=tags)
                view = replace(view, before=before, notes=tuple(_notes(adapter, before)))
        except Exception as error:
            yield BackboneView(name, error=error_sentence(error, name))
            return
        if tuned is None:
            yield view
            return
        try:
            make = partial(self._load_tuned, name)
            yield from self._loading(tuned, make, replace(view, stage=f"loading {name} after TTD"))
            yield replace(view, stage="computing the maps after TTD")
            with self._using(tuned, make) as adapter:
                after = TTD(adapter, self.options).maps(image, caption, tags=tags)
        except Exception as error:
            yield replace(view, after_title=None, error=error_sentence(error, f"the tuned {name}"))
            return
        yield replace(view, after=after)

    def _load(self, name: str) -> DenseAdapter:
        return load(name, device=self.device, fast=self.fast)

    def _load_tuned(self, name: str) -> DenseAdapter:
        from ttd_plugins.backbone_sources import load_tuned

        adapter = load_tuned(name, self.tuned[name], device=self.device)
        return faster_copy(adapter, self.fast)

    def _loading(self, loaded: _Loaded, make: Callable[[], DenseAdapter], stage: _S) -> Iterator[_S]:
        """Load a backbone that is not in memory yet, and yield the stage before."""
        if loaded.adapter is None:
            yield stage
            with self._using(loaded, make):
                pass

    @contextmanager
    def _using(self, loaded: _Loaded, make: Callable[[], DenseAdapter]) -> Iterator[DenseAdapter]:
        with loaded.lock:
            if loaded.adapter is None:
                loaded.adapter = make()
            yield loaded.adapter

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
        """Fine-tune a fresh copy of an embedded backbone with TTD on scenes; it becomes the visitor's "after".

        One fine-tuning runs at a time, and others wait. The visitor's earlier result stays until this one is complete.

        Args:
            name: one of :attr:`tunable`.
            steps: optimizer steps, 1 to :data:`MAX_STEPS`.
            visitor: id of the visitor.
            on_step: called with a report after each step.
            **settings: settings of :class:`~ttd_plugins.training.scene_tuning.SceneTuning`.

        Raises:
            InputError: the backbone is not embedded, the steps are out of range, or the visitor is tuning already.
            TuningStoppedError: :meth:`stop` was called; the result is discarded.
            TTDError: it cannot be tuned, for example because a package that draws scenes is not installed.
        """
        if name not in self.tunable:
            raise InputError(f"{name!r} cannot be fine-tuned here; choose an embedded one: {', '.join(self.tunable)}")
        if not 1 <= steps <= MAX_STEPS:
            raise InputError(f"fine-tuning takes 1 to {MAX_STEPS} steps, not {steps}")
        from ttd_plugins.training.scene_tuning import SceneTuning, tune_on_scenes
        from ttd_plugins.training.step import warm_up_warning

        stop = threading.Event()
        with self._guard:
            if visitor in self._stops:
                raise InputError("your fine-tuning is running; wait for it, or stop it first")
            self._stops[visitor] = stop

        def after_step(report: StepReport) -> None:
            if stop.is_set():
                raise TuningStoppedError(f"stopped after {report.step} of {steps} steps; the result is discarded")
            if on_step is not None:
                on_step(report)

        try:
            while not self._tuning.acquire(timeout=0.2):
                if stop.is_set():
                    raise TuningStoppedError("stopped before the first step; nothing has changed")
            try:
                adapter = load(name, device=self.device)
                tuning = SceneTuning(steps=steps, ttd=self.options, **settings)
                tune_on_scenes(adapter, tuning, on_step=after_step)
            finally:
                self._tuning.release()
            with self._guard:
                self._own.pop((visitor, name), None)
                while len(self._own) >= MAX_TUNED:
                    self._own.pop(next(iter(self._own)))
                count = f"{steps} step" + "s" * (steps != 1)
                short = warm_up_warning(tuning.optimizer.warm_up, steps) is not None
                title = f"after: {count} of TTD on scenes" + ", too few to judge it" * short
                self._own[visitor, name] = _Loaded(adapter=adapter.eval(), title=title)
        except TTDError:
            raise
        except Exception as error:
            raise TTDError(error_sentence(error, f"fine-tuning {name}")) from error
        finally:
            with self._guard:
                self._stops.pop(visitor, None)

    def stop(self, visitor: str = "") -> bool:
        """Stop the visitor's fine-tuning after the current step; returns whether one was running."""
        with self._guard:
            event = self._stops.get(visitor)
        if event is not None:
            event.set()
        return event is not None

    def forget(self, visitor: str) -> None:
        """Stop the visitor's fine-tuning and drop the visitor's backbones."""
        self.stop(visitor)
        with self._guard:
            self._own = {key: loaded for key, loaded in self._own.items() if key[0] != visitor}

    @staticmethod
    def example(number: int) -> tuple[Image.Image, str]:
        """Image and caption of the ``number``-th test scene, from 0, with two true tags or more.

        Raises:
            MissingDependencyError: a package that draws scenes is not installed.
        """
        from ttd_plugins.embedded.scenes import Scenes

        fitting = (scene for scene in Scenes("test", 100_000) if len(scene.true_tags) > 1)
        for _ in range(number):
            next(fitting)
        scene = next(fitting)
        return Image.fromarray(scene.image), scene.caption


def _notes(adapter: DenseAdapter, maps: CaptionMaps) -> list[str]:
    notes = list(maps.notes)
    if not maps.calibrated:
        notes.append("Not calibrated, so probabilities are left out; “ttd calibrate” shows how to fit a calibration.")
    if maps.truncated:
        length = adapter.description.context_length
        notes.append(f"The caption is longer than {length} tokens, so its end was not read.")
    return notes


def error_sentence(error: BaseException, what: str) -> str:
    """One sentence for the page; an error of neither the user nor a plugin is logged with its traceback."""
    known = error if isinstance(error, TTDError) else explain(error)
    if known is not None:
        return one_sentence(known)
    log.error("%s failed", what, exc_info=error)
    return f"{what} failed ({type(error).__name__}: {one_sentence(error, 120)}); the traceback is in the terminal"


__getattr__ = renamed_names(
    __name__,
    {
        "LONGEST_CAPTION": "MAX_CAPTION_CHARACTERS",
        "MOST_STEPS": "MAX_STEPS",
        "MOST_TAGS": "MAX_TAGS",
        "MOST_TUNED": "MAX_TUNED",
        "SHOWN_SIDE": "IMAGE_SIDE",
        "told": "error_sentence",
    },
)
