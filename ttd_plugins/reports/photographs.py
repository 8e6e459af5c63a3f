"""The photographs that a report shows first, as plain data for ``templates/photographs.html.j2``."""

from __future__ import annotations

from typing import Any

from ttd_plugins.comparison.results import GalleryImage, PhotographExamples
from ttd_plugins.embedded.photo_examples import credit
from ttd_plugins.reports.comparison_gallery import CAPTION, UNION, image_view


def photographs_view(photographs: PhotographExamples) -> dict[str, Any]:
    """Everything that the template of the photographs shows.

    Raises:
        InputError: a map or an image has a wrong shape or value, or a photograph is not of the package.
        MissingDependencyError: matplotlib is not installed.
    """
    return {
        "before": photographs.before,
        "after": photographs.after,
        "images": [_view(n, image, photographs) for n, image in enumerate(photographs.images, start=1)],
        "chosen": photographs.chosen,
        "evidence": photographs.evidence,
    }


def _view(number: int, image: GalleryImage, photographs: PhotographExamples) -> dict[str, Any]:
    view = image_view(number, image, [photographs.before])
    (card,) = view["cards"]
    height, width = image.image.shape[:2]
    frames = {
        frame["arm"]: {layer["map"]: layer for layer in frame["layers"] if layer["map"] in (CAPTION, UNION)}
        | {"notes": {note["map"]: note for note in frame["notes"]}}
        for frame in card["frames"]
    }
    return {
        **{key: view[key] for key in ("number", "uri", "ratio", "caption", "why", "outlines")},
        "width": width,
        "height": height,
        "frames": frames,
        "rows": card["rows"],
        "credit": credit(f"{image.key}.jpg"),
        "balance": photographs.balance[image.key],
    }
