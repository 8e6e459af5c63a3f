"""Photographs of the package that the app and the demo show: captions, authors and licences."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache

from PIL import Image

from ttd_plugins.embedded import PHOTOGRAPHS_FOLDER
from ttd_plugins.errors import InputError

EXAMPLES: tuple[tuple[str, str], ...] = (
    ("000000196393.jpg", "A cat and a canary are sharing dinner together."),
    ("000000442450.jpg", "Two men stand in the woods holding frisbees near a dog."),
    ("000000121647.jpg", "Pizza on a plate next to a wine glass and a book."),
    ("000000525891.jpg", "A stop sign on a street beside some red flowers."),
    ("000000408805.jpg", "A small kitchen with yellow walls, a microwave and sink."),
    ("000000078499.jpg", "Horses standing and laying in grass near a body of water and a mountain."),
    ("000000252639.jpg", "A bus and cars driving down the road."),
    ("000000358083.jpg", "A cat is looking at his reflection in the mirror."),
    ("000000084284.jpg", "A desk has a laptop and a lamp on it."),
)
"""File name and caption of the examples of ``ttd app``."""


@dataclass(frozen=True)
class Credit:
    """The attribution of a photograph, as its licence requires.

    Attributes:
        name: file name of the photograph.
        page: address of its page on Flickr, which names the author.
        licence: name of the licence.
        licence_url: address of the licence.
    """

    name: str
    page: str
    licence: str
    licence_url: str


def photograph(number: int) -> tuple[Image.Image, str]:
    """Return image and caption of an example; numbers from 0 repeat after the last."""
    name, caption = EXAMPLES[number % len(EXAMPLES)]
    return open_photograph(name), caption


def open_photograph(name: str) -> Image.Image:
    """Return a photograph of the package as an RGB image.

    Args:
        name: its file name, such as that of a :class:`Credit`.
    """
    with Image.open(PHOTOGRAPHS_FOLDER / "images" / name, formats=("JPEG",)) as image:
        return image.convert("RGB")


def photograph_credit(number: int) -> Credit:
    """Return the attribution of an example; numbers repeat as in :func:`photograph`."""
    return credit(EXAMPLES[number % len(EXAMPLES)][0])


def credit(name: str) -> Credit:
    """Return the attribution of a photograph of the package.

    Raises:
        InputError: the package has no photograph of this file name.
    """
    found = _credits().get(name)
    if found is None:
        raise InputError(f"{name!r} is no photograph of the package; ATTRIBUTION.md in {PHOTOGRAPHS_FOLDER} lists them")
    return found


def source_page(flickr_url: str) -> str:
    """Return the address of a photograph's page, which names its author; COCO stores only that of the file.

    Raises:
        InputError: the address is not that of a photograph on Flickr.
    """
    found = re.search(r"/(\d+)_[0-9a-f]+_\w\.jpg$", flickr_url)
    if found is None:
        raise InputError(f"{flickr_url} is not the address of a photograph on Flickr")
    return f"https://www.flickr.com/photo.gne?id={found.group(1)}"


@cache
def _credits() -> dict[str, Credit]:
    content = json.loads((PHOTOGRAPHS_FOLDER / "captions.json").read_text(encoding="utf-8"))
    licences = {licence["id"]: (licence["name"], licence["url"]) for licence in content["licenses"]}
    return {
        image["file_name"]: Credit(image["file_name"], source_page(image["flickr_url"]), *licences[image["license"]])
        for image in content["images"]
    }
