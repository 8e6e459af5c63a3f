"""Compose scenes. Each is a pure function of (split, seed, index), so indexing is deterministic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttd_plugins.embedded.scenes import captions
from ttd_plugins.embedded.scenes.pictograms import sprite
from ttd_plugins.embedded.scenes.textures import SIDE, plain, texture
from ttd_plugins.embedded.scenes.vocabulary import (
    BACKGROUNDS,
    NOUNS,
    OBJECTS,
    SPLITS,
    Split,
    compatible_nouns,
    split_of_layout,
    zipf_weights,
)
from ttd_plugins.errors import InputError

IMAGE_SIDE = 64
# Sizes and positions are multiples of a patch, so that a model of a million weights learns 100 objects in minutes.
STEP = 8
OBJECT_SIDES = (16, 24, 40)
LAYOUT_CELLS = 4
MIN_SIDE = 48
MIN_VISIBLE = 0.7
_FIRST_OBJECT = len(BACKGROUNDS)
_BACKGROUND_WEIGHTS = zipf_weights(len(BACKGROUNDS))
_OBJECT_WEIGHTS = zipf_weights(len(OBJECTS))


@dataclass(frozen=True)
class Scene:
    """One image and its caption.

    Attributes:
        image: uint8 ``[side, side, 3]``.
        caption: the caption.
        masks: the visible pixels of every visible noun, named or not, bool ``[side, side]``.
        true_tags: nouns of the caption that are visible, in the order of the caption.
        absent_tags: nouns of the caption that are not.
    """

    image: NDArray[np.uint8]
    caption: str
    masks: dict[str, NDArray[np.bool_]]
    true_tags: tuple[str, ...]
    absent_tags: tuple[str, ...]

    @property
    def named_region(self) -> NDArray[np.bool_]:
        """Union of the masks of the true tags, bool ``[side, side]``."""
        return np.logical_or.reduce([self.masks[tag] for tag in self.true_tags])


@dataclass(frozen=True)
class _Placement:
    noun: str
    left: int
    top: int
    drawn: Image.Image


class Scenes(Sequence[Scene]):
    """The scenes of one split; indexing is deterministic, on every machine.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``; no two splits share a pair of visible nouns or a layout.
        length: number of scenes.
        seed: seed of the scenes within the split.
        side: side of the square images in pixels, 48 to 128.
        bare_captions: share of captions that are bare nouns, from which a text tower learns single words; the rest are
            sentences.

    Raises:
        InputError: the side is out of range.
    """

    def __init__(
        self, split: Split, length: int, *, seed: int = 0, side: int = IMAGE_SIDE, bare_captions: float | None = None
    ) -> None:
        if not MIN_SIDE <= side <= SIDE:
            raise InputError(
                f"scenes are {MIN_SIDE} to {SIDE} pixels wide, not {side}; use a backbone with a smaller preferred "
                "image size, such as open_clip:tiny"
            )
        self.split = split
        self.length = length
        self.seed = seed
        self.side = side
        self.bare_captions = (0.5 if split == "train" else 0.0) if bare_captions is None else bare_captions
        self._compatible = compatible_nouns(split)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in range(self.length))

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # Sequence overloads int and slice
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        index %= self.length
        image, masks = self._draw(self._rng(index, 0))
        return self._captioned(image, masks, self._rng(index, 1))

    def recaption(self, index: int, scene: Scene, draw: int) -> Scene:
        """Return ``scene``, which is ``self[index]``, with another caption; draw 0 is its own caption."""
        return self._captioned(scene.image, scene.masks, self._rng(index % self.length, 1 + draw))

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([SPLITS.index(self.split), self.seed, index, stream])

    def _pick(self, rng: np.random.Generator, chosen: list[int], *, background: bool) -> int | None:
        """Sample a noun that may be visible with all of ``chosen``, by Zipf frequency; ``None`` if there is none."""
        weights = np.zeros(len(NOUNS))
        if background:
            weights[:_FIRST_OBJECT] = _BACKGROUND_WEIGHTS
        else:
            weights[_FIRST_OBJECT:] = _OBJECT_WEIGHTS
        for noun in chosen:
            weights *= self._compatible[noun]
        total = weights.sum()
        return int(rng.choice(len(NOUNS), p=weights / total)) if total > 0 else None

    def _nouns(self, rng: np.random.Generator) -> tuple[list[str], list[str | None]]:
        """Sample one to three objects, and the texture of each background region (``None``: plain)."""
        first = self._pick(rng, [], background=False)
        assert first is not None
        chosen = [first]
        backgrounds: list[str | None] = []
        for _ in range(2 if rng.random() < 0.7 else 1):
            noun = self._pick(rng, chosen, background=True) if rng.random() < 0.65 else None
            backgrounds.append(None if noun is None else NOUNS[noun])
            if noun is not None:
                chosen.append(noun)
        for _ in range(int(rng.choice(3, p=[0.25, 0.5, 0.25]))):
            noun = self._pick(rng, chosen, background=False)
            if noun is not None:
                chosen.append(noun)
        return [NOUNS[noun] for noun in chosen if noun >= _FIRST_OBJECT], backgrounds

    def _draw(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.bool_]]]:
        objects, backgrounds = self._nouns(rng)
        regions = self._regions(rng, len(backgrounds))
        canvas = np.empty((self.side, self.side, 3), np.uint8)
        for name, region in zip(backgrounds, regions, strict=True):
            fill = plain(self.side, rng) if name is None else texture(name, self.side, rng)
            canvas[region] = fill[region]
        placements, visible = self._place(rng, objects)
        image = Image.fromarray(canvas)
        for placement in placements:
            image.paste(placement.drawn, (placement.left, placement.top), placement.drawn)
        covered = np.logical_or.reduce(visible)
        masks = {name: region & ~covered for name, region in zip(backgrounds, regions, strict=True) if name is not None}
        masks |= {p.noun: mask for p, mask in zip(placements, visible, strict=True)}
        gain = rng.uniform(0.9, 1.05, size=3)
        lit = np.clip(np.asarray(image, np.float32) * gain, 0, 255).astype(np.uint8)
        return lit, {noun: mask for noun, mask in masks.items() if mask.any()}

    def _regions(self, rng: np.random.Generator, count: int) -> list[NDArray[np.bool_]]:
        """Return the mask of the whole image, or masks of the two sides of a tilted line."""
        if count == 1:
            return [np.ones((self.side, self.side), bool)]
        rows, columns = np.mgrid[0 : self.side, 0 : self.side] / self.side
        across, along = (rows, columns) if rng.random() < 0.75 else (columns, rows)
        side = across < rng.uniform(0.35, 0.65) + rng.uniform(-0.15, 0.15) * (along - 0.5)
        return [side, ~side] if rng.random() < 0.5 else [~side, side]

    def _place(self, rng: np.random.Generator, objects: list[str]) -> tuple[list[_Placement], list[NDArray[np.bool_]]]:
        """Sample sizes and positions, back to front, until enough of every object is visible.

        The layout, that is the cells of the centres in a 4 x 4 grid, is hashed to a split: no layout is in two splits.
        """
        while True:
            drawn = [sprite(noun, int(rng.choice(OBJECT_SIDES))) for noun in objects]
            room = self.side - np.array([d.size for d in drawn])
            for _ in range(8):
                corners = STEP * rng.integers(0, room // STEP + 1)
                centres = (corners + (self.side - room) / 2) * LAYOUT_CELLS // self.side
                cells = sorted((centres @ [1, LAYOUT_CELLS]).astype(int).tolist())
                if split_of_layout(str(cells)) == self.split:
                    break
            else:
                continue
            placements = [
                _Placement(noun, int(left), int(top), d)
                for noun, (left, top), d in zip(objects, corners, drawn, strict=True)
            ]
            alphas = [self._alpha(p) for p in placements]
            visible: list[NDArray[np.bool_]] = []
            covered = np.zeros((self.side, self.side), bool)
            for alpha in reversed(alphas):
                visible.insert(0, alpha & ~covered)
                covered |= alpha
            if all(v.sum() >= MIN_VISIBLE * a.sum() for v, a in zip(visible, alphas, strict=True)):
                return placements, visible

    def _alpha(self, placement: _Placement) -> NDArray[np.bool_]:
        opaque = np.asarray(placement.drawn.getchannel("A")) > 127
        mask = np.zeros((self.side, self.side), bool)
        mask[placement.top : placement.top + opaque.shape[0], placement.left : placement.left + opaque.shape[1]] = (
            opaque
        )
        return mask

    def _captioned(
        self, image: NDArray[np.uint8], masks: dict[str, NDArray[np.bool_]], rng: np.random.Generator
    ) -> Scene:
        """Add a caption that names some of the visible nouns, and in more than half of the cases absent nouns."""
        visible = list(masks)
        rng.shuffle(visible)
        named = [noun for noun in visible if rng.random() < 0.75] or visible[:1]
        # Caption IoU is uninformative if the union is the whole image.
        while len(named) > 1 and np.logical_or.reduce([masks[n] for n in named]).mean() > 0.7:
            named.remove(max(named, key=lambda noun: masks[noun].sum()))
        absent: list[str] = []
        if rng.random() < 0.6:
            others = [noun for noun in NOUNS if noun not in masks]
            weights = np.array([_ABSENT_WEIGHT[noun] for noun in others])
            count = int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))
            absent = [str(n) for n in rng.choice(others, size=count, replace=False, p=weights / weights.sum())]
        if rng.random() < self.bare_captions:
            # Mostly one word, the length of a tag.
            keep = 1 if rng.random() < 0.7 else len(named)
            named, absent = named[:keep], absent[: keep - 1]
            order = [*named, *absent]
            rng.shuffle(order)
            caption = captions.bare(order)
        else:
            order = [*named, *absent]
            rng.shuffle(order)
            caption = captions.sentence(order, rng, frozenset(BACKGROUNDS))
        true_tags = tuple(noun for noun in order if noun in masks)
        return Scene(image, caption, masks, true_tags, tuple(noun for noun in order if noun not in masks))


# A noun is absent about as often as it is visible, so that an image-blind scorer cannot separate the two. The rule that
# splits pairs flattens the frequencies of visible nouns, hence the exponents.
_ABSENT_WEIGHT = dict(
    zip(
        NOUNS,
        np.concatenate(
            [0.25 * zipf_weights(len(BACKGROUNDS), exponent=0.7), 0.75 * zipf_weights(len(OBJECTS), exponent=0.75)]
        ),
        strict=True,
    )
)
