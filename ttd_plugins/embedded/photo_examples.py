"""Photographs of the package that the app and the demo show, each with one of its captions."""

from __future__ import annotations

from PIL import Image

from ttd_plugins.embedded import PHOTOGRAPHS_FOLDER

EXAMPLES: tuple[tuple[str, str], ...] = (
    ("000000442450.jpg", "Two men stand in the woods holding frisbees near a dog."),
    ("000000121647.jpg", "Pizza on a plate next to a wine glass and a book."),
    ("000000525891.jpg", "A stop sign on a street beside some red flowers."),
    ("000000408805.jpg", "A small kitchen with yellow walls, a microwave and sink."),
    ("000000078499.jpg", "Horses standing and laying in grass near a body of water and a mountain."),
    ("000000252639.jpg", "A bus and cars driving down the road."),
    ("000000358083.jpg", "A cat is looking at his reflection in the mirror."),
    ("000000084284.jpg", "A desk has a laptop and a lamp on it."),
)
"""File name and caption."""


def photograph(number: int) -> tuple[Image.Image, str]:
    """Return image and caption of an example; numbers from 0 repeat after the last."""
    name, caption = EXAMPLES[number % len(EXAMPLES)]
    with Image.open(PHOTOGRAPHS_FOLDER / "images" / name, formats=("JPEG",)) as image:
        return image.convert("RGB"), caption
