"""The maps of one image and caption as plain arrays, and what their reader should know about the backbone."""

from __future__ import annotations

import dataclasses
import importlib
import io
import os
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.adapter import BackboneDescription
from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.options import Rule
from ttd_plugins.utils.files import given_path, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWING = "ttd_plugins.reports.heatmaps"
"""Module that draws maps, imported by name when it is needed: it knows this class, which belongs to the engine."""


@dataclass
class CaptionMaps:
    """The maps of one image and caption as numpy arrays, for plots.

    :meth:`plot` draws them, and :meth:`save` writes them as a PNG or as arrays.

    Attributes:
        image: uint8 ``[height, width, 3]``, the input of the network.
        caption: the caption.
        tags: T candidate tags.
        scores: cosines ``[T]``.
        probabilities: calibrated scores ``[T]`` in (0, 1).
        selected: bool ``[T]``.
        tag_maps: cosines ``[T, H, W]``.
        tag_maps_normalized: ``[T, H, W]`` in [0, 1], min-max over patches, including rejected tags.
        union: ``[H, W]`` in [0, 1], the target of the caption's map.
        caption_map: cosines ``[H, W]``.
        caption_map_normalized: ``[H, W]`` in [0, 1], min-max over patches.
        truncated: whether the caption was longer than the context.
        calibrated: whether the map to probabilities was fitted to pairs; otherwise they are a rough guess.
        notes: sentences on the backbone that belong beside every result, such as what its weights know.
    """

    image: NDArray[np.uint8]
    caption: str
    tags: list[str]
    scores: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    selected: NDArray[np.bool_]
    tag_maps: NDArray[np.float32]
    tag_maps_normalized: NDArray[np.float32]
    union: NDArray[np.float32]
    caption_map: NDArray[np.float32]
    caption_map_normalized: NDArray[np.float32]
    truncated: bool
    calibrated: bool = False
    notes: tuple[str, ...] = ()

    @property
    def probability_label(self) -> str:
        """What a table calls :attr:`probabilities`."""
        return "probability" if self.calibrated else "probability (uncalibrated)"

    def __repr__(self) -> str:
        caption = self.caption if len(self.caption) <= 60 else f"{self.caption[:59]}…"
        selected = [tag for tag, kept in zip(self.tags, self.selected, strict=True) if kept]
        shown = ", ".join(selected[:8]) + (", …" if len(selected) > 8 else "")
        kept = f"{len(selected)} of {len(self.tags)} tags selected: {shown or 'none'}"
        return f"CaptionMaps({caption!r}, {kept}; grid {' x '.join(map(str, self.caption_map.shape))})"

    def plot(self, *, after: CaptionMaps | None = None) -> Figure:
        """Draw the image, the map of the caption, the union of the selected tags, and the map of each tag.

        Args:
            after: maps of the same image, caption and tags by a tuned backbone, drawn beside these.

        Returns:
            A ``matplotlib.figure.Figure``, which a notebook shows and its ``savefig(path)`` writes.

        Raises:
            InputError: ``after`` has another caption or other tags.
            MissingDependencyError: matplotlib is not installed.
        """
        figure: Figure = importlib.import_module(DRAWING).maps_figure(self, after=after)
        return figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the maps to a file, completely or not at all; an existing file is replaced.

        Args:
            path: a name that ends in ``.png``, for the drawing of :meth:`plot`, or in ``.npz``, for all attributes
                under their names as numpy arrays, without pickle; :meth:`load` reads them.

        Raises:
            InputError: the name has another ending, or the file cannot be written.
            MissingDependencyError: matplotlib, needed for ``.png``, is not installed.
        """
        path = given_path(path, "path")
        if path.suffix.lower() == ".png":
            importlib.import_module(DRAWING).draw_maps(self, path)
        elif path.suffix.lower() == ".npz":
            stream = io.BytesIO()
            arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
            np.savez_compressed(stream, allow_pickle=False, **{key: _as_array(value) for key, value in arrays.items()})
            write_atomic(path, stream.getvalue())
        else:
            raise InputError(f"{str(path)!r} must end in .png (a drawing) or .npz (arrays)")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read the maps of an ``.npz`` file that :meth:`save` wrote; nothing in it is executed.

        Raises:
            InputError: the file cannot be read, or contains no maps.
        """
        path = given_path(path, "path")
        try:
            with np.load(path, allow_pickle=False) as content:
                if not isinstance(content, np.lib.npyio.NpzFile):
                    raise ValueError("it is one array")
                values = {field.name: _as_value(field.type, content[field.name]) for field in dataclasses.fields(cls)}
            maps = cls(**values)
            count, grid = len(maps.tags), maps.caption_map.shape
            if maps.tag_maps.shape != (count, *grid) or not len(maps.scores) == len(maps.selected) == count:
                raise ValueError("its arrays do not fit each other")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{str(path)!r} contains no maps ({one_sentence(error, 100)}); name a file of CaptionMaps.save()"
            ) from error
        return maps


def _as_array(value: Any) -> NDArray[Any]:
    # Texts, not objects, which only pickle could store.
    return np.array(value, dtype=np.str_) if isinstance(value, list | tuple) else np.asarray(value)


def _as_value(kind: Any, value: NDArray[Any]) -> Any:
    """An attribute of the type ``kind``, as the source of the class writes it, from a stored array."""
    kind = str(kind)
    if kind.startswith(("list", "tuple")):
        texts = [str(text) for text in value.reshape(-1)]
        return texts if kind.startswith("list") else tuple(texts)
    return value.item() if kind in ("str", "bool") else value


def backbone_notes(
    description: BackboneDescription, *, calibrated: bool = True, rule: Rule | None = None
) -> tuple[str, ...]:
    """Sentences that belong beside every result of a backbone, for the terminal, JSON, images and pages.

    Args:
        description: the backbone.
        calibrated: whether its probabilities are calibrated.
        rule: the selection rule; ``None`` if nothing is selected.
    """
    notes = []
    if description.weights == "random":
        notes.append(f"{description.name} has random weights, so its scores and maps mean nothing.")
    if description.trained_on is not None:
        kind = description.trained_on
        notes.append(
            f"{description.family}:{description.model} was pre-trained on {kind} only; on other images, such as "
            "photographs, its scores and maps mean little unless it was fine-tuned on such images."
        )
    if rule == "probability" and not calibrated:
        notes.append("The selection uses probabilities that are not calibrated.")
    return tuple(notes)
