"""The PNG of an image's maps, and the heat overlay that PNGs, reports and the app share."""

from __future__ import annotations

import base64
import io
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ttd_plugins.engine import CaptionMaps
from ttd_plugins.errors import InputError, MissingDependencyError
from ttd_plugins.evaluation.metrics import upsample_map
from ttd_plugins.reports import heat_overlay, heatmaps
from ttd_plugins.reports.heat_overlay import (
    colour_table,
    grey,
    heat_layer_uri,
    heat_levels,
    image_uri,
    overlay,
    png_data_uri,
)
from ttd_plugins.reports.heatmaps import draw_maps

pytest.importorskip("matplotlib")

HOSTILE = (
    """<script>alert("x")</script> 'q' & <img src=http://evil.example/x onerror=alert(1)> """
    "$x^{ 狗 🐶 \x00 \ud83d مرحبا"
)


def make_maps(
    caption: str,
    tags: list[str],
    *,
    size: tuple[int, int] = (40, 40),
    grid: tuple[int, int] = (5, 5),
    seed: int = 0,
    truncated: bool = False,
) -> CaptionMaps:
    """Random maps of a random picture."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    tag_maps = rng.normal(0.1, 0.1, (len(tags), *grid)).astype(np.float32)
    caption_map = rng.normal(0.1, 0.1, grid).astype(np.float32)
    selected = np.arange(len(tags)) % 2 == 0
    scores = tag_maps.reshape(len(tags), grid[0] * grid[1]).max(1)
    normalized = np.stack([_minmax(m) for m in tag_maps]) if tags else tag_maps
    union = normalized[selected].max(0) if selected.any() else np.zeros(grid, np.float32)
    return CaptionMaps(
        image=image,
        caption=caption,
        tags=tags,
        scores=scores,
        probabilities=1 / (1 + np.exp(-scores)),
        selected=selected,
        tag_maps=tag_maps,
        tag_maps_normalized=normalized,
        union=union,
        caption_map=caption_map,
        caption_map_normalized=_minmax(caption_map),
        truncated=truncated,
    )


def _minmax(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min())


# The overlay


def test_overlay_is_the_blend_of_the_grey_image_and_the_colour() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    heat = np.random.default_rng(1).random((3, 5)).astype(np.float32)
    levels = np.round(upsample_map(heat, 12, 20) * 255).astype(int)
    expected = 0.7 * grey(image).astype(float) + 0.3 * colour_table()[levels]
    drawn = overlay(image, heat, 0.3)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert np.abs(drawn - expected).max() <= 0.51
    assert (overlay(image, heat, 0.0) == grey(image)).all()
    assert (overlay(image, np.ones((2, 2)), 1.0) == colour_table()[255]).all()
    assert (overlay(image, np.zeros((2, 2)), 1.0) == colour_table()[0]).all()


def test_colour_table_grows_brighter_throughout() -> None:
    luma = colour_table() @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luma) > -1.0).all()
    assert luma[0] < 5
    assert luma[-1] > 230


@pytest.mark.parametrize(
    ("image", "heat", "alpha"),
    [
        (np.zeros((4, 4), np.uint8), np.zeros((2, 2)), 0.5),
        (np.zeros((4, 4, 3), np.float32), np.zeros((2, 2)), 0.5),
        (np.zeros((4, 4, 3), np.uint8), np.zeros(4), 0.5),
        (np.zeros((4, 4, 3), np.uint8), np.full((2, 2), np.nan), 0.5),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((2, 2)), 1.5),
    ],
)
def test_overlay_refuses_what_it_cannot_draw(image: np.ndarray, heat: np.ndarray, alpha: float) -> None:
    with pytest.raises(InputError):
        overlay(image, heat, alpha)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)])
def test_data_uri_holds_the_picture(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert (read_data_uri(png_data_uri(array)) == array).all()


def test_data_uri_with_a_palette_holds_its_colours() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    uri = png_data_uri(levels, colour_table())
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        assert (np.asarray(picture.convert("RGB")) == colour_table()[levels]).all()


def read_data_uri(uri: str) -> np.ndarray:
    assert uri.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_grey_is_the_luma_of_the_browser_filter() -> None:
    image = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 10, 10]]], np.uint8)
    assert grey(image)[0].tolist() == [[54] * 3, [182] * 3, [18] * 3, [10] * 3]


@pytest.mark.parametrize("grid", [(8, 8), (3, 5), (1, 20), (24, 24)])
def test_the_layer_of_a_page_has_the_colours_of_the_overlay(grid: tuple[int, int]) -> None:
    heat = np.random.default_rng(0).random(grid).astype(np.float32)
    uri = heat_layer_uri(heat)
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as layer:
        drawn = np.asarray(layer.convert("RGB")).astype(int)
    assert max(drawn.shape[:2]) == heat_overlay.LAYER_SIDE
    exact = colour_table()[heat_levels(heat, *drawn.shape[:2])].astype(int)
    # A page has fewer colours; the difference is below what an eye can tell.
    assert np.abs(drawn - exact).max() <= 12


def test_a_layer_refuses_what_it_cannot_draw() -> None:
    for heat in (np.full((2, 2), np.nan), np.zeros(4), np.zeros((0, 0))):
        with pytest.raises(InputError, match="finite and of shape"):
            heat_layer_uri(heat)


def test_small_images_are_png_and_photographs_jpeg_no_larger_than_shown() -> None:
    assert image_uri(np.zeros((40, 60, 3), np.uint8), 480).startswith("data:image/png")
    uri = image_uri(np.zeros((900, 600, 3), np.uint8), 480)
    assert uri.startswith("data:image/jpeg")
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (320, 480)
    with pytest.raises(InputError, match="an image must be uint8"):
        image_uri(np.zeros((4, 4), np.uint8), 480)


def test_data_uri_refuses_other_arrays() -> None:
    with pytest.raises(InputError):
        png_data_uri(np.zeros((4, 4), np.float32))  # type: ignore[arg-type]
    with pytest.raises(InputError):
        png_data_uri(np.zeros((4, 4, 2), np.uint8))


def drawn_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        return picture.size


@pytest.mark.parametrize("count", [0, 1, 5, 6, 100])
@pytest.mark.parametrize("two", [False, True])
def test_draw_maps_takes_any_number_of_tags(tmp_path: Path, count: int, two: bool) -> None:
    tags = [f"tag{n}" for n in range(count)]
    maps = make_maps("a caption", tags)
    after = make_maps("a caption", tags, seed=1) if two else None
    draw_maps(maps, tmp_path / "maps.png", after=after)
    draw_maps(make_maps("a caption", []), tmp_path / "none.png", after=make_maps("a caption", []) if two else None)
    width, height = drawn_size(tmp_path / "maps.png")
    none_width, none_height = drawn_size(tmp_path / "none.png")
    panels = min(count, heatmaps.MAX_TAGS) * (2 if two else 1)
    rows = -(-panels // (6 if two else 5))
    row = (heatmaps._PANEL + heatmaps._TITLE + heatmaps._GAP) * heatmaps.DOTS_PER_INCH
    assert width == none_width
    # A remark may take one line more.
    assert height - none_height == pytest.approx(rows * row, abs=heatmaps._LINE * heatmaps.DOTS_PER_INCH + 2)


def test_of_too_many_tags_the_highest_scores_are_kept_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = make_maps("c", [f"tag{n}" for n in range(100)])
    written = spy_on_text(monkeypatch)
    draw_maps(maps, tmp_path / "maps.png")
    shown = sorted(np.argsort(-maps.scores)[: heatmaps.MAX_TAGS])
    assert [text for text in written if text.startswith("tag")] == [f"tag{n}" for n in shown]
    assert f"{100 - heatmaps.MAX_TAGS} of 100 tags" in " ".join(written[-1].split())


def spy_on_text(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect what is written into figures from now on."""
    written: list[str] = []
    write_text = heatmaps._write

    def spy(figure: Any, left: float, above: float, text: str, **options: Any) -> None:
        written.append(text)
        write_text(figure, left, above, text, **options)

    monkeypatch.setattr(heatmaps, "_write", spy)
    return written


def test_the_picture_says_scores_selection_range_and_remarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = make_maps("a dog", ["dog", "cat"], truncated=True)
    written = spy_on_text(monkeypatch)
    draw_maps(maps, tmp_path / "maps.png")
    assert f"{maps.scores[0]:.2f} selected" in written
    assert f"{maps.scores[1]:.2f} rejected" in written
    assert "1 of 2 tags selected" in written
    assert f"cosine {maps.caption_map.min():.2f} to {maps.caption_map.max():.2f}".replace("-", "−") in written
    assert "its end was not read" in " ".join(written[-1].split())


def test_panels_hold_the_pictures_of_the_maps() -> None:
    before, after = make_maps("c", ["a", "b"]), make_maps("c", ["a", "b"], seed=1)
    panels = heatmaps._overview(before, after)
    expected = [before.caption_map_normalized, after.caption_map_normalized, before.union, after.union]
    assert (panels[0].image == before.image).all()
    for panel, heat in zip(panels[1:], expected, strict=True):
        assert (panel.image == overlay(before.image, heat)).all()
    tags = heatmaps._tag_panels(before, after, [0, 1])
    expected = [found.tag_maps_normalized[tag] for tag in (0, 1) for found in (before, after)]
    for panel, heat in zip(tags, expected, strict=True):
        assert (panel.image == overlay(before.image, heat)).all()
    assert [panel.dashed for panel in tags] == [False, False, True, True]


@pytest.mark.parametrize(
    "caption",
    ["", HOSTILE, "word " * 400, "x" * 3000, "$\\frac", "100 % _^{}", "狗" * 300, "line\nbreak\ttab", "🐶👩‍👩‍👧"],
)
def test_any_caption_is_drawn_without_a_warning(tmp_path: Path, caption: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_maps(make_maps(caption, [caption or "tag", "dog"]), tmp_path / "maps.png")
    assert drawn_size(tmp_path / "maps.png")[1] < 1200


@pytest.mark.parametrize(
    ("size", "grid"), [((30, 90), (2, 6)), ((90, 30), (6, 2)), ((8, 400), (1, 20)), ((33, 47), (3, 5))]
)
def test_pictures_need_not_be_square(tmp_path: Path, size: tuple[int, int], grid: tuple[int, int]) -> None:
    draw_maps(make_maps("c", ["a"], size=size, grid=grid), tmp_path / "maps.png")
    assert drawn_size(tmp_path / "maps.png")[0] > 1000


@pytest.mark.parametrize("width", [1, 2, 7, 40])
def test_wrapped_lines_keep_within_their_width(width: int) -> None:
    for text in ("", "a bc def ghij", "x" * 50, "狗" * 20 + " dog"):
        lines = heatmaps._wrap(text, width, 1000)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(heatmaps._columns(line) <= max(width, 2) for line in lines)
        short = heatmaps._wrap(text, max(width, 3), 2)
        assert len(short) <= 2
        assert all(heatmaps._columns(line) <= max(width, 3) for line in short)


def test_maps_of_other_tags_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="same tags"):
        draw_maps(make_maps("c", ["a"]), tmp_path / "maps.png", after=make_maps("c", ["b"]))


def test_unwritable_paths_are_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "missing" / "x", folder):
        with pytest.raises(InputError, match="cannot be written") as told:
            draw_maps(make_maps("c", ["a"]), path)
        assert str(path) in str(told.value)
        assert "\n" not in str(told.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder"]


def test_without_matplotlib_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    colour_table.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"pip install 'ttd-plugins\[demo\]'"):
        draw_maps(make_maps("c", ["a"]), tmp_path / "maps.png")
    assert not list(tmp_path.iterdir())


def test_drawing_leaves_pyplot_and_settings_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_maps(make_maps("c", ["a"]), tmp_path / "maps.png")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(("old", "new"), [("HEAT_ALPHA", "HEAT_OPACITY"), ("greyed", "grey"), ("png_data_uri",) * 2])
def test_names_that_moved_to_the_overlay_work_and_warn(old: str, new: str) -> None:
    with pytest.warns(FutureWarning, match=f"heatmaps.{old} is now ttd_plugins.reports.heat_overlay.{new}"):
        assert getattr(heatmaps, old) is getattr(heat_overlay, new)


# A photograph, and several captions


@pytest.mark.parametrize("size", [(300, 200), (200, 500), (37, 90)])
def test_panels_have_the_aspect_ratio_and_the_pixels_of_the_photograph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    photograph = np.random.default_rng(5).integers(0, 256, (*size, 3), dtype=np.uint8)
    maps, panels = make_maps("c", ["a", "b"]), []
    draw_panel = heatmaps._draw_panel

    def spy(figure: Any, panel: Any, left: float, above: float, height: float) -> None:
        panels.append((panel, height))
        draw_panel(figure, panel, left, above, height)

    monkeypatch.setattr(heatmaps, "_draw_panel", spy)
    written = spy_on_text(monkeypatch)
    draw_maps(maps, tmp_path / "maps.png", image=photograph)
    drawn = panels[-5:]
    assert (drawn[0][0].image == photograph).all()
    assert (drawn[1][0].image == overlay(photograph, maps.caption_map_normalized)).all()
    assert all(panel.image.shape[:2] == size for panel, _ in drawn)
    assert drawn[0][1] == pytest.approx(min(max(2.0 * size[0] / size[1], 0.6), 4.0))
    assert f"{size[1]} × {size[0]} pixels" in written
    width = drawn_size(tmp_path / "maps.png")[0]
    dots = max(size[1] / heatmaps._PANEL, heatmaps.DOTS_PER_INCH)
    assert width == pytest.approx(dots * (5 * heatmaps._PANEL + 4 * heatmaps._GAP + 2 * heatmaps._MARGIN), abs=2)


def test_the_png_of_a_large_photograph_stays_below_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heatmaps, "MAX_PIXELS", 2_000_000)
    written = spy_on_text(monkeypatch)
    draw_maps(make_maps("c", ["a"]), tmp_path / "maps.png", image=np.zeros((1500, 2000, 3), np.uint8))
    width, height = drawn_size(tmp_path / "maps.png")
    assert 1_800_000 < width * height < 2_050_000
    assert "2000 × 1500 pixels" in written


def test_several_captions_are_drawn_below_each_other(tmp_path: Path) -> None:
    first, second = make_maps("one caption", ["a"]), make_maps("another", ["b", "c", "d", "e", "f", "g"])
    sizes = []
    for number, maps in enumerate((first, second, [first, second])):
        draw_maps(maps, tmp_path / f"{number}.png")
        sizes.append(drawn_size(tmp_path / f"{number}.png"))
    assert sizes[2] == (sizes[0][0], sizes[0][1] + sizes[1][1])
    with Image.open(tmp_path / "0.png") as one, Image.open(tmp_path / "2.png") as both:
        assert (np.asarray(both.convert("RGB"))[: one.height] == np.asarray(one.convert("RGB"))).all()
    with pytest.raises(InputError, match="no maps"):
        draw_maps([], tmp_path / "none.png")
