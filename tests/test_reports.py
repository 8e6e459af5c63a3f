"""Pictures of maps and the demo's page: what they show, what they survive, and that the words follow the figures."""

from __future__ import annotations

import base64
import io
import re
import sys
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ttd_plugins.embedded.scenes import Scene
from ttd_plugins.engine import CaptionMaps
from ttd_plugins.errors import InputError, MissingDependencyError
from ttd_plugins.evaluation.metrics import upsample_map
from ttd_plugins.reports import demo_html, heatmaps, page
from ttd_plugins.reports.demo_html import DemoResult, GalleryItem, describe, write_demo_report
from ttd_plugins.reports.heatmaps import colour_table, draw_maps, overlay, png_data_uri
from ttd_plugins.training.loop import StepReport

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


def make_item(
    caption: str = "a dog and a lion on grass", iou: tuple[float, float, float] = (0.4, 0.5, 0.7)
) -> GalleryItem:
    """A scene with a dog on grass and no lion, and its maps under the three arms."""
    tags = [word for word in ("dog", "lion", "grass", "photo") if word in caption] or caption.split()
    grass = np.zeros((40, 40), bool)
    grass[24:] = True
    dog = np.zeros((40, 40), bool)
    dog[8:20, 10:30] = True
    maps = [make_maps(caption, tags, seed=seed) for seed in range(3)]
    scene = Scene(maps[0].image, caption, {"dog": dog, "grass": grass}, ("dog", "grass"), ("lion",))
    return GalleryItem(scene, *maps, dict(zip(("before", "control", "after"), iou, strict=True)))


def make_metrics(**changes: Any) -> dict[str, Any]:
    """What SceneMetrics.as_dict() returns."""
    return {
        "tag_ap": 0.93,
        "tag_ap_blind": 0.55,
        "tag_ap_image": 0.71,
        "tag_ap_text": 0.64,
        "tag_f1": 0.84,
        "caption_iou": 0.58,
        "tag_iou": 0.62,
        "tag_balance": 0.46,
        "retrieval_r1": 0.95,
        "caption_map_in_tag": {"background": 0.31, "common": 0.55, "middle": 0.60, "rare": 0.68},
        "caption_map_spread": 0.40,
        "selected_per_caption": 2.3,
        "true_per_caption": 1.9,
        "scenes": 512,
        **changes,
    }


def make_curve(*, ttd: bool, steps: int = 60) -> list[StepReport]:
    """A falling training."""
    losses = {"contrastive": 1.0} | ({"tag": 0.7, "distill": 0.6} if ttd else {})
    return [
        StepReport(
            step,
            sum(losses.values()),
            {name: value / step**0.2 for name, value in losses.items()},
            {"caption_map_spread": 0.4, "selected_per_caption": 2.0},
            1.0,
        )
        for step in range(1, steps + 1)
    ]


def make_result(**changes: Any) -> DemoResult:
    """A result in which TTD wins."""
    result = DemoResult(
        settings={
            "backbone": "open_clip:tiny",
            "seed": 0,
            "steps": 60,
            "versions": {"torch": "2"},
            "learning rate": 5e-4,
        },
        before=make_metrics(),
        control=make_metrics(tag_f1=0.96, caption_iou=0.575),
        after=make_metrics(caption_iou=0.66, tag_balance=0.54, tag_f1=0.99),
        curves={"control": make_curve(ttd=False), "ttd": make_curve(ttd=True)},
        gallery=[make_item(), make_item(iou=(0.5, 0.6, 0.3)), make_item(iou=(0.6, 0.6, 0.6))],
        attribution="Pictograms: OpenMoji, CC BY-SA 4.0",
    )
    return replace(result, **changes)


def write(tmp_path: Path, **changes: Any) -> str:
    """The page of :func:`make_result` with changes."""
    path = tmp_path / "report.html"
    write_demo_report(path, make_result(**changes))
    return path.read_text(encoding="utf-8")


# Pictures


def test_overlay_is_the_blend_of_picture_and_colour() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    heat = np.random.default_rng(1).random((3, 5)).astype(np.float32)
    levels = np.round(upsample_map(heat, 12, 20) * 255).astype(int)
    expected = 0.7 * image + 0.3 * colour_table()[levels]
    drawn = overlay(image, heat, 0.3)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert np.abs(drawn - expected).max() <= 0.51
    assert (overlay(image, heat, 0.0) == image).all()
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
    grey = heatmaps.greyed(before.image)
    panels = heatmaps._overview(before, after)
    expected = [before.caption_map_normalized, after.caption_map_normalized, before.union, after.union]
    assert (panels[0].picture == before.image).all()
    for panel, heat in zip(panels[1:], expected, strict=True):
        assert (panel.picture == overlay(grey, heat)).all()
    tags = heatmaps._tag_panels(before, after, [0, 1])
    expected = [found.tag_maps_normalized[tag] for tag in (0, 1) for found in (before, after)]
    for panel, heat in zip(tags, expected, strict=True):
        assert (panel.picture == overlay(grey, heat)).all()
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


@pytest.mark.parametrize("kind", ["maps", "report"])
def test_unwritable_paths_are_one_sentence(tmp_path: Path, kind: str) -> None:
    maps, result = make_maps("c", ["a"]), make_result(gallery=[])
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "missing" / "x", folder):
        with pytest.raises(InputError, match="cannot be written") as told:
            draw_maps(maps, path) if kind == "maps" else write_demo_report(path, result)
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
    with pytest.raises(MissingDependencyError, match=r"pip install 'ttd-plugins\[demo\]'"):
        write_demo_report(tmp_path / "report.html", make_result())
    assert not list(tmp_path.iterdir())


def test_drawing_leaves_pyplot_and_settings_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_maps(make_maps("c", ["a"]), tmp_path / "maps.png")
    assert dict(matplotlib.rcParams) == before


# The finding


def arms(
    before: dict[str, Any] | None = None, control: dict[str, Any] | None = None, after: dict[str, Any] | None = None
) -> dict[Any, dict[str, Any]]:
    return {
        "before": make_metrics(**before or {}),
        "control": make_metrics(**control or {}),
        "after": make_metrics(**after or {}),
    }


@pytest.mark.parametrize(
    ("after", "control", "headline"),
    [
        (
            {"caption_iou": 0.66, "tag_balance": 0.54},
            {},
            "TTD repaired part of the single tag bias, at no cost in tag selection and retrieval",
        ),
        (
            {"caption_iou": 0.66, "tag_balance": 0.54, "retrieval_r1": 0.94},
            {},
            "TTD repaired part of the single tag bias, at a small cost in retrieval",
        ),
        (
            {"caption_iou": 0.66, "tag_balance": 0.54, "retrieval_r1": 0.5, "tag_f1": 0.8},
            {},
            "TTD repaired part of the single tag bias, at a cost in tag selection and retrieval",
        ),
        ({}, {}, "TTD made no difference to single tag bias here"),
        ({"caption_iou": 0.583}, {}, "TTD made no difference to single tag bias here"),
        ({"caption_iou": 0.66}, {"caption_iou": 0.66}, "TTD made no difference to single tag bias here"),
        ({"caption_iou": 0.5, "tag_balance": 0.4}, {}, "TTD did not help here: Caption IoU and tag balance fell"),
        ({"caption_iou": 0.62}, {"caption_iou": 0.7}, "TTD did not help here: Caption IoU fell"),
        ({"caption_iou": 0.66, "tag_balance": 0.4}, {}, "A mixed result: Caption IoU rose, tag balance fell"),
        (
            {"tag_balance": 0.6},
            {},
            "TTD helped by one measure: tag balance rose, at no cost in tag selection and retrieval",
        ),
        (
            {"caption_iou": float("nan"), "tag_balance": float("nan")},
            {},
            "These scenes do not let single tag bias be measured",
        ),
    ],
)
def test_the_headline_follows_the_figures(after: dict[str, Any], control: dict[str, Any], headline: str) -> None:
    assert describe(arms(after=after, control=control)).headline == headline


@pytest.mark.parametrize(
    ("before", "control", "after", "words"),
    [
        (0.5, 0.55, 0.65, "rises by 0.100"),
        (0.5, 0.55, 0.551, "gains no more than contrastive training alone brings"),
        (0.5, 0.65, 0.6, "falls 0.050 short of what contrastive training alone reaches"),
        (0.6, 0.5, 0.5, "falls by 0.100"),
        (0.5, 0.6, 0.45, "falls by 0.050, and lies 0.150 below the control"),
        (0.6, 0.5, 0.601, "does not change"),
    ],
)
def test_sentences_tell_ttd_from_further_training(before: float, control: float, after: float, words: str) -> None:
    metrics = arms({"caption_iou": before}, {"caption_iou": control}, {"caption_iou": after})
    sentence = describe(metrics).sentences[0]
    assert sentence == (
        f"Caption IoU {words}: {after:.3f} after TTD, {before:.3f} before, {control:.3f} in the control."
    )


def test_the_finding_tells_bias_and_collapse() -> None:
    even = {"background": 0.6, "common": 0.6, "middle": 0.6, "rare": 0.65}
    sentences = " ".join(describe(arms(after={"caption_map_in_tag": even})).sentences)
    assert "favours rare words over background words by 0.370" in sentences
    assert "shrinks to 0.050" in sentences
    assert "collaps" not in sentences
    assert "collaps" in " ".join(describe(arms(after={"caption_map_spread": 0.1})).sentences)
    assert "stays at" in " ".join(describe(arms()).sentences)
    assert not any("favours" in s for s in describe(arms(before={"caption_map_in_tag": {"rare": 0.5}})).sentences)


# The page


class Page(HTMLParser):
    """Checks nesting while reading, and collects what a page is made of."""

    VOID = frozenset("meta img br input link hr wbr".split())

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.stack or self.stack[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def assert_self_contained(page: Page, text: str) -> None:
    """Nothing is fetched from anywhere, and the only link that leads away is the paper's."""
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "poster", "data", "action", "background"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, name)
        if tag != "a":
            assert "href" not in attributes
    assert not page.all("link")
    assert "@import" not in text
    assert {a["href"] for a in page.all("a") if not (a["href"] or "").startswith("#")} == {
        "https://arxiv.org/abs/2404.00384"
    }


def test_the_page_is_well_formed_and_self_contained(tmp_path: Path) -> None:
    text = write(tmp_path)
    page = Page(text)
    assert_self_contained(page, text)
    assert all(address.startswith("data:image/png;base64,") for address in re.findall(r"url\(([^)]*)\)", text))
    assert "default-src 'none'" in text


def test_the_page_is_accessible(tmp_path: Path) -> None:
    page = Page(write(tmp_path))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    referenced = {a[name] for _, a in page.tags for name in ("aria-labelledby", "for", "headers") if name in a}
    referenced |= {(a["href"] or "")[1:] for a in page.all("a") if (a["href"] or "").startswith("#")}
    assert referenced <= set(ids)
    assert all(img.get("alt") for img in page.all("img"))
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in page.all("svg"))
    assert all(th.get("scope") for th in page.all("th"))
    assert len(page.all("h1")) == len(page.all("main")) == 1
    assert page.all("html") == [{"lang": "en"}]
    assert page.all("button")[0]["type"] == "button"


def test_the_page_shows_everything(tmp_path: Path) -> None:
    page = Page(write(tmp_path))
    assert page.text.index("TTD repaired part of the single tag bias") < page.text.index("Figures")
    for words in (
        "Caption IoU",
        "0.660",
        "+0.080",
        "Tag AP, blind",
        "Backgrounds",
        "Contrastive loss",
        "Distillation loss",
        "Scene 3 of 3",
        "Improved",
        "Worse than the control",
        "Failure: IoU below 0.5",
        "No change",
        "open_clip:tiny",
        "0.0005",
        "torch",
        "OpenMoji, CC BY-SA 4.0",
        "arXiv 2404.00384",
        "Jo, Ryu, Kim, Yang, Kim",
    ):
        assert words in page.text, words
    assert len(page.all("article")) == 3
    assert len(page.all("svg")) == len(demo_html._PANELS)
    heat = [img for img in page.all("img") if img.get("class") == "heat"]
    # Union, three caption maps, and before and after of three tags and of the union.
    assert len(heat) == 3 * (4 + 2 * (3 + 1))


def test_tags_are_marked_by_what_they_are(tmp_path: Path) -> None:
    text = write(tmp_path, gallery=[make_item("A Dog and a lion in a photo of grassland, dog")])
    caption = re.search(r'<p class="caption">(.*?)</p>', text)
    assert caption is not None
    assert '<mark class="absent">lion</mark>' in caption[1]
    assert '<mark class="filler">photo</mark>' in caption[1]
    assert '<mark class="true">Dog</mark>' in caption[1]
    assert '<mark class="true">dog</mark>' in caption[1]
    assert " grassland" in caption[1]


def test_selections_are_told_right_from_wrong(tmp_path: Path) -> None:
    item = make_item()
    item = replace(item, after=replace(item.after, selected=~item.after.selected))
    page = Page(write(tmp_path, gallery=[item]))
    verdicts = [
        alt.rpartition(": ")[2].partition(", ")[2] for img in page.all("img") if ": score" in (alt := img["alt"] or "")
    ]
    assert verdicts == ["kept", "dropped, wrongly", "dropped", "kept, wrongly", "kept", "dropped, wrongly"]


def test_layers_hold_the_maps(tmp_path: Path) -> None:
    item = make_item()
    page = Page(write(tmp_path, gallery=[item]))
    layers = {img["alt"]: img["src"] for img in page.all("img")}
    uri = layers["Map of the caption, after TTD, IoU 0.700"]
    side = demo_html.HEAT_SIDE
    expected = heatmaps.heat_levels(item.after.caption_map_normalized, side, side)
    assert uri is not None
    assert (read_data_uri(uri) == expected).all()
    truth = layers["True region of dog, grass"]
    assert truth is not None
    assert ((read_data_uri(truth)[..., 3] == 0) == item.scene.named_region).all()


def test_outline_runs_along_the_region_and_not_along_the_edge_of_the_picture() -> None:
    region = np.zeros((6, 8), bool)
    region[2:] = True
    drawn = page.outline(region)
    assert drawn.shape == (12, 16, 4)
    white = (drawn == 255).all(-1)
    assert np.flatnonzero(white.any(1)).tolist() == [4]
    assert not page.outline(np.ones((6, 8), bool)).any()


def test_hostile_strings_are_escaped(tmp_path: Path) -> None:
    item = make_item(HOSTILE)
    item = replace(item, scene=replace(item.scene, absent_tags=("<script>",)))
    text = write(
        tmp_path,
        gallery=[item],
        settings={HOSTILE: HOSTILE, "backbone": HOSTILE, "more": {HOSTILE: [HOSTILE]}},
        attribution=HOSTILE,
    )
    page = Page(text)
    assert len(page.all("script")) == 1
    assert not [img for img in page.all("img") if not (img.get("src") or "").startswith("data:")]
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert '<script>alert("x")</script>' in page.text


@pytest.mark.parametrize(
    "changes",
    [
        {"gallery": []},
        {"curves": {}},
        {"curves": {"control": [], "ttd": make_curve(ttd=True, steps=1)}},
        {"settings": {}},
        {"after": make_metrics(tag_balance=float("nan"), caption_map_in_tag={})},
    ],
)
def test_a_page_with_parts_missing_still_reads(tmp_path: Path, changes: dict[str, Any]) -> None:
    page = Page(write(tmp_path, **changes))
    assert "Caption IoU" in page.text
    assert "nan" not in page.text.lower().split()


def test_maps_of_another_caption_are_refused(tmp_path: Path) -> None:
    item = make_item()
    with pytest.raises(InputError, match="scene 1"):
        write(tmp_path, gallery=[replace(item, after=make_maps("another", item.before.tags))])


def test_a_full_gallery_stays_small(tmp_path: Path) -> None:
    write(tmp_path, gallery=[make_item("a photo of a dog and a lion on grass") for _ in range(12)])
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.31), (-2, 5), (7, 7), (0, 0), (1e-8, 3e-8), (0.2, 4321)])
def test_ticks_are_few_round_and_enclose(low: float, high: float) -> None:
    ticks = page.ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert ticks[-1] > ticks[0]


def test_colours_have_contrast_in_light_and_dark() -> None:
    css = resources.files("ttd_plugins.reports").joinpath("base.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    )
    assert light.keys() == dark.keys()
    for theme in (light, dark):
        for text, grounds in {
            "ink": ("page", "card", "same-soft"),
            "muted": ("page", "card"),
            "better": ("page", "card", "better-soft"),
            "worse": ("page", "card", "worse-soft"),
            "control": ("page", "card"),
        }.items():
            for ground in grounds:
                assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        for bar in ("before", "control", "after"):
            assert contrast(theme[bar], theme["page"]) >= 3, bar


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        channels = np.array([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)
