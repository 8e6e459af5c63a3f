"""Segmentation of users' images by any words: :func:`segment` for one image, :func:`segment_folder` for many."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttd_plugins.caption_maps import backbone_notes
from ttd_plugins.data.image_folders import ImageFile, find_images
from ttd_plugins.data.images import read_image, to_rgb
from ttd_plugins.engine import evaluation_mode
from ttd_plugins.engine_checks import require_adapter
from ttd_plugins.errors import InputError, TTDError, one_sentence
from ttd_plugins.evaluation.image_segmentation import (
    ClassResult,
    ClassTexts,
    encode_classes,
    segment_image,
    with_calibration,
)
from ttd_plugins.evaluation.protocol_options import IMAGE_SEGMENT, SegmentProtocol, with_changes, with_plane
from ttd_plugins.evaluation.protocols.runner import describe_backbone
from ttd_plugins.evaluation.vocabulary import Names, read_vocabulary
from ttd_plugins.plugins import load
from ttd_plugins.reports.label_overlay import LegendEntry, class_colours, draw_labels, mask_image, with_legend
from ttd_plugins.utils.configuration import plain_values
from ttd_plugins.utils.files import given_path, make_folder, write_atomic
from ttd_plugins.utils.output_folder import FolderKind, output_folder
from ttd_plugins.utils.progress import Stage, no_progress
from ttd_plugins.utils.settings import first_difference, settings_digest

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter

SEGMENTS_FOLDER = FolderKind("segments", "the folder of ttd segment")
MASKS, OVERLAYS, RESULTS = "masks", "overlays", "results"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segmentation:
    """The classes of the pixels of one image.

    Attributes:
        image: uint8 ``[height, width, 3]``, the upright image at its own size.
        labels: int32 ``[height, width]``, indices into :attr:`classes`; 0 is the background.
        classes: what the segmentation says about each index.
        backbone: name of the backbone.
        calibrated: whether probabilities come from a fitted calibration; otherwise they are a rough guess.
        notes: sentences that belong beside the result.
    """

    image: NDArray[np.uint8] = field(repr=False)
    labels: NDArray[np.int32] = field(repr=False)
    classes: tuple[ClassResult, ...]
    backbone: str
    calibrated: bool
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        height, width = self.labels.shape
        shown = ", ".join(f"{one.name} {one.share:.0%}" for one in self.present[:5])
        return f"Segmentation({width}x{height}: {shown}{', …' if len(self.present) > 5 else ''})"

    @property
    def present(self) -> list[ClassResult]:
        """The classes with at least one pixel, the largest first."""
        return sorted((one for one in self.classes if one.pixels), key=lambda one: (-one.pixels, one.index))

    def mask(self, name: str) -> NDArray[np.bool_]:
        """Return the pixels of a class, bool ``[height, width]``.

        Raises:
            InputError: no class has this name.
        """
        index = next((one.index for one in self.classes if one.name == name), None)
        if index is None:
            raise InputError(f"no class is named {name!r}; classes: {', '.join(one.name for one in self.classes[:20])}")
        return self.labels == index

    def mask_image(self) -> Image.Image:
        """Return the mask for a PNG: 8 bits with a palette, or 16 bits of grey for more than 256 indices."""
        return mask_image(self.labels, len(self.classes))

    def overlay(self, *, legend: bool = True) -> NDArray[np.uint8]:
        """Return the image with its classes in colour, uint8 ``[height, width, 3]``; a legend makes it higher."""
        drawn = draw_labels(self.image, self.labels, len(self.classes))
        if not legend:
            return drawn
        colours = class_colours(len(self.classes))
        entries = [
            LegendEntry(f"{one.name} {one.share:.0%}", tuple(colours[one.index].tolist()) if one.index else (255,) * 3)
            for one in self.present
        ]
        return with_legend(drawn, entries, " ".join(self.notes))

    def as_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON: size, backbone, and index, name, colour, share and probabilities of classes.

        Probabilities without a fitted calibration have other keys, so that no script takes a guess for a probability.
        """
        prefix = "" if self.calibrated else "uncalibrated_"
        colours = class_colours(len(self.classes)).tolist()
        return {
            "width": self.labels.shape[1],
            "height": self.labels.shape[0],
            "backbone": self.backbone,
            "calibrated": self.calibrated,
            "notes": list(self.notes),
            "classes": [
                {
                    "index": one.index,
                    "name": one.name,
                    "texts": list(one.texts),
                    "colour": "#" + bytes(colours[one.index]).hex(),
                    "pixels": one.pixels,
                    "share": one.share,
                    f"{prefix}mean_probability": one.mean_probability,
                    f"{prefix}max_probability": one.max_probability,
                }
                for one in self.classes
            ],
        }

    def save(self, folder: Path | str, stem: str, more: Mapping[str, Any] | None = None) -> dict[str, Path]:
        """Write ``masks/STEM.png``, ``overlays/STEM.png`` and ``results/STEM.json`` into a folder.

        Args:
            folder: the folder; it is made where it is missing.
            stem: name of the files; it may contain subfolders.
            more: further keys of the JSON, before its own.

        Returns:
            The three paths, by folder name.

        Raises:
            InputError: a file cannot be written.
        """
        files = {kind: Path(folder) / kind / f"{stem}.{end}" for kind, end in
                 ((MASKS, "png"), (OVERLAYS, "png"), (RESULTS, "json"))}  # fmt: skip
        for file in files.values():
            make_folder(file.parent)
        write_atomic(files[MASKS], _png(self.mask_image()))
        write_atomic(files[OVERLAYS], _png(Image.fromarray(self.overlay())))
        # Last, since a complete result has a JSON.
        write_atomic(files[RESULTS], json.dumps({**(more or {}), **self.as_dict()}, indent=1) + "\n")
        return files


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def default_size(adapter: DenseAdapter) -> int:
    """Return the side in pixels at scale one: 448, or twice the preferred size where that is smaller."""
    return min(IMAGE_SEGMENT.dense.size, 2 * min(adapter.description.image_size))


class Segmenter:
    """Segments images by one list of names, which is encoded once.

    Args:
        backbone: an adapter, or a name for :func:`ttd_plugins.load`.
        names: any form of :func:`ttd_plugins.evaluation.vocabulary.read_vocabulary`.
        options: options of the segmentation; by default
            :data:`~ttd_plugins.evaluation.protocol_options.IMAGE_SEGMENT` with the size of :func:`default_size`.
        prompts: prompt templates with ``{}`` for the name, instead of the named set of the options.
        device: where a backbone given by name computes.
        stage: starts a subtask, for a progress bar.
        **changes: fields of :class:`~ttd_plugins.evaluation.protocol_options.SegmentProtocol` or of its
            :class:`~ttd_plugins.evaluation.protocol_options.DenseOptions`.

    Raises:
        InputError: the names, an option or a template are wrong.
        TTDError: the backbone cannot be loaded.
    """

    def __init__(
        self,
        backbone: DenseAdapter | str,
        names: Names,
        options: SegmentProtocol | None = None,
        *,
        prompts: Sequence[str] | None = None,
        device: str | None = None,
        stage: Stage | None = None,
        **changes: Any,
    ) -> None:
        classes = read_vocabulary(names)
        given = options is not None or "size" in changes
        options = with_changes(options or IMAGE_SEGMENT, changes if options else with_plane(changes))
        self.prompts = None if prompts is None else _checked_prompts(prompts)
        adapter = load(backbone, device=device) if isinstance(backbone, str) else require_adapter(backbone, "segment()")
        self.adapter = adapter
        if not given:
            options = with_changes(options, {"size": default_size(adapter)})
        self.options, self.calibrated = with_calibration(options, adapter)
        self.notes = backbone_notes(adapter.description)
        with evaluation_mode(adapter):
            self.texts: ClassTexts = encode_classes(adapter, classes, self.options, self.prompts, stage)

    def __call__(self, image: Image.Image | Path | str | bytes) -> Segmentation:
        """Segment one image: a PIL image, a path, or the bytes of an image file.

        Raises:
            InputError: the image cannot be read, or it is too large for the options.
        """
        pixels = read_image(image) if isinstance(image, Path | str | bytes) else to_rgb(image)
        with evaluation_mode(self.adapter):
            labels, classes = segment_image(self.adapter, pixels, self.texts, self.options)
        return Segmentation(
            np.asarray(pixels), labels, tuple(classes), self.adapter.description.name, self.calibrated, self.notes
        )

    def settings(self) -> dict[str, Any]:
        """Return everything that a result depends on, besides the image."""
        return {
            "backbone": describe_backbone(self.adapter),
            "classes": [[name, *texts] for name, texts in zip(self.texts.names, self.texts.texts, strict=True)],
            "options": plain_values(self.options),
            "prompts": None if self.prompts is None else list(self.prompts),
        }


def _checked_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(prompts, str):
        prompts = [prompts]
    wrong = next((one for one in prompts if not isinstance(one, str) or "{}" not in one), None)
    if wrong is not None or not prompts:
        raise InputError(
            f"a prompt template must contain {{}} for the name, such as 'a photo of a {{}}.', not {wrong!r}"
        )
    return tuple(prompts)


def segment(
    backbone: DenseAdapter | str,
    image: Image.Image | Path | str | bytes,
    names: Names,
    *,
    options: SegmentProtocol | None = None,
    prompts: Sequence[str] | None = None,
    device: str | None = None,
    **changes: Any,
) -> Segmentation:
    """Assign one of the named classes to each pixel of one image.

    Example::

        result = segment(load("family:model@weights"), "photo.jpg", "dog, grass, sky")
        result.mask("dog")                                        # bool [height, width]
        Image.fromarray(result.overlay()).save("overlay.png")

    Args:
        backbone: an adapter, or a name for :func:`ttd_plugins.load`.
        image: a PIL image, a path, or the bytes of an image file.
        names: ``"dog, grass, sky"``, a list, a file, or a built-in list; see
            :func:`ttd_plugins.evaluation.vocabulary.read_vocabulary`.
        options: options of the segmentation; by default
            :data:`~ttd_plugins.evaluation.protocol_options.IMAGE_SEGMENT` with the size of :func:`default_size`.
        prompts: prompt templates with ``{}`` for the name, instead of the named set of the options.
        device: where a backbone given by name computes.
        **changes: single options by name, such as ``background="none"``, ``size=640``, ``window=448`` or
            ``refine=False``. A ``threshold`` alone means a constant background plane.

    Returns:
        Labels at the image's own size, and share and probabilities of each class.

    Raises:
        InputError: the image, the names or an option are wrong.
        TTDError: the backbone cannot be loaded.
    """
    return Segmenter(backbone, names, options, prompts=prompts, device=device, **changes)(image)


@dataclass(frozen=True)
class FolderResult:
    """Result of :func:`segment_folder`.

    Attributes:
        out: the folder of the results.
        images: number of images found.
        done: number of images segmented by this call.
        failed: reason of each image that could not be segmented, by key.
    """

    out: Path
    images: int
    done: int
    failed: dict[str, str]


def segment_folder(
    segmenter: Segmenter,
    source: Path | str,
    out: Path | str,
    *,
    stage: Stage | None = None,
    on_result: Callable[[ImageFile, Segmentation], object] | None = None,
) -> FolderResult:
    """Segment an image, or all images of a folder and its subfolders, and write the results into a folder.

    Files are those of :meth:`Segmentation.save`, with the images' own paths. For a folder of images,
    ``settings.json``, ``classes.json`` (a list of names that :func:`~ttd_plugins.evaluation.vocabulary.read_vocabulary`
    accepts) and, if images fail, ``failed.json`` are written too. The same call resumes: images with a result are
    skipped, unless their file has changed. A single image is always segmented again.

    Args:
        segmenter: the names, the options and the backbone.
        source: an image file or a folder.
        out: the folder of the results; images inside it are left out.
        stage: starts subtasks, for progress bars.
        on_result: called with each new result.

    Raises:
        InputError: there are no images, the folder of the results belongs to another command or to other settings, or
            it cannot be written; or no image can be segmented.
    """
    out = given_path(out)
    images, whole = find_images(source, outside=out), Path(source).is_dir()
    settings = segmenter.settings()
    digest = settings_digest(settings)
    failed: dict[str, str] = {}
    with output_folder(out, SEGMENTS_FOLDER):
        _require_settings(out, settings, digest, whole)
        pending = [image for image in images if not (whole and _is_done(out, image, digest))]
        advance = (stage or no_progress)("images", len(images))
        advance(len(images) - len(pending))
        for image in pending:
            try:
                stamp = image.stamp()
                found = segmenter(image.path)
            except TTDError as error:
                if not whole:
                    raise
                failed[image.key] = one_sentence(error)
                log.warning("%s", one_sentence(error))
            else:
                if whole:
                    _write_settings(out, settings)
                found.save(out, image.stem, {"image": image.key, "settings": digest, "file": stamp})
                if on_result is not None:
                    on_result(image, found)
            advance(1)
        if failed and len(failed) == len(images):
            key, reason = next(iter(failed.items()))
            raise InputError(f"none of the {len(images)} images can be segmented; the first, {key!r}: {reason}")
        if whole:
            (out / "failed.json").unlink(missing_ok=True)
        if failed:
            write_atomic(out / "failed.json", json.dumps(failed, indent=1) + "\n")
    return FolderResult(out, len(images), len(pending) - len(failed), failed)


def _require_settings(out: Path, settings: dict[str, Any], digest: str, whole: bool) -> None:
    """Check that earlier results of a folder have the same settings.

    Raises:
        InputError: they have others.
    """
    file = out / "settings.json"
    advice = "choose another --out, or delete that folder"
    if file.exists():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{str(file)!r} cannot be read ({one_sentence(error)}); {advice}") from error
        difference = first_difference(before, json.loads(json.dumps(settings)))
        if difference is not None:
            raise InputError(f"the folder {str(out)!r} contains results with other settings ({difference}); {advice}")
        return
    if not whole:
        return
    other = next((name for name, found in _results(out) if found != digest), None)
    if other is not None:
        raise InputError(f"the folder {str(out)!r} contains results with other settings, such as {other!r}; {advice}")


def _write_settings(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings and the names of a folder of images, unless they are there."""
    if (out / "settings.json").exists():
        return
    names = [{"index": i, "name": one[0], "aliases": one[1:]} for i, one in enumerate(settings["classes"])]
    write_atomic(out / "classes.json", json.dumps(names, indent=1) + "\n")
    write_atomic(out / "settings.json", json.dumps(settings, indent=1) + "\n")


def _results(out: Path) -> Iterator[tuple[str, Any]]:
    for file in sorted((out / RESULTS).rglob("*.json")):
        yield file.name, (_read_result(file) or {}).get("settings")


def _read_result(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_done(out: Path, image: ImageFile, digest: str) -> bool:
    """Whether an image has a complete result of these settings, and has not changed since."""
    found = _read_result(out / RESULTS / f"{image.stem}.json")
    if found is None or found.get("settings") != digest:
        return False
    try:
        return bool(found.get("file") == image.stamp()) and (out / MASKS / f"{image.stem}.png").is_file()
    except InputError:
        return False
