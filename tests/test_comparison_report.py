"""The report and plots of a comparison: what they say, what they survive, and that the words follow the figures."""

from __future__ import annotations

import base64
import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_comparison import FIGURES, HOSTILE, NAMES, make_backbone, make_comparison, make_picture
from helpers_pages import Page, assert_self_contained
from PIL import Image

from ttd_plugins.comparison import results
from ttd_plugins.comparison.results import Arm, BackboneResult, Comparison, Metric
from ttd_plugins.errors import InputError, MissingDependencyError
from ttd_plugins.reports.comparison_findings import change, describe_comparison
from ttd_plugins.reports.comparison_html import write_comparison_report
from ttd_plugins.reports.comparison_plots import draw_comparison_plots
from ttd_plugins.reports.heat_overlay import colour_table, heat_levels

pytest.importorskip("matplotlib")

IOU = FIGURES[0]
FPR = FIGURES[1]
RAISES, FREE = "TTD raises Caption IoU on", "at no clear cost in retrieval R@1"


def write(tmp_path: Path, comparison: Comparison) -> str:
    path = tmp_path / "report.html"
    write_comparison_report(path, comparison)
    return path.read_text(encoding="utf-8")


# The finding


def backbone(before: float, control: list[float], after: list[float], key: str = "caption_iou") -> BackboneResult:
    return BackboneResult(
        "b",
        metrics={
            "before": [{key: before}],
            "control": [{key: value} for value in control],
            "after": [{key: value} for value in after],
        },
    )


@pytest.mark.parametrize(
    ("control", "after", "figure", "mean", "spread", "verdict"),
    [
        ([0.5, 0.6], [0.6, 0.7], IOU, 0.1, 0.0, "better"),
        ([0.5, 0.6], [0.4, 0.5], IOU, -0.1, 0.0, "worse"),
        ([0.5, 0.6], [0.4, 0.5], FPR, -0.1, 0.0, "better"),
        ([0.5, 0.5], [0.504, 0.504], IOU, 0.004, 0.0, "same"),
        ([0.5, 0.5], [0.5046, 0.5046], IOU, 0.0046, 0.0, "better"),
        # Gains of +0.1 and 0: their spread of 0.071 is more than their mean of 0.05.
        ([0.5, 0.5], [0.6, 0.5], IOU, 0.05, 0.1 / 2**0.5, "spread"),
        ([0.5], [0.6], IOU, 0.1, None, "better"),
        ([0.5], [0.6], FIGURES[4], 0.1, None, "none"),
    ],
)
def test_a_change_is_taken_seed_by_seed_and_judged_by_its_spread(
    control: list[float], after: list[float], figure: Metric, mean: float, spread: float | None, verdict: str
) -> None:
    found = change(backbone(0.1, control, after, figure.key), figure)
    assert found is not None
    assert found.mean == pytest.approx(mean)
    assert found.spread == (None if spread is None else pytest.approx(spread, abs=1e-12))
    assert (found.verdict, found.baseline) == (verdict, "control")


def test_without_a_control_the_change_is_to_before() -> None:
    one = backbone(0.5, [], [0.6, 0.8])
    found = change(replace(one, metrics={arm: rows for arm, rows in one.metrics.items() if rows}), IOU)
    assert found is not None
    assert (found.mean, found.baseline) == (pytest.approx(0.2), "before")
    assert found.spread == pytest.approx(0.2 / 2**0.5)


@pytest.mark.parametrize("hole", [None, float("nan")])
def test_a_figure_that_is_not_defined_for_a_seed_has_no_change(hole: float | None) -> None:
    one = backbone(0.5, [0.5, 0.5], [0.6, 0.6])
    one.metrics["after"][1]["caption_iou"] = hole
    assert change(one, IOU) is None


def headline(*gains: float, retrieval: float = -0.012) -> str:
    names = NAMES[: len(gains)]
    backbones = [
        make_backbone(name, {"caption_iou": gain, "retrieval_r1": retrieval})
        for name, gain in zip(names, gains, strict=True)
    ]
    return describe_comparison(make_comparison(names, 0, backbones=backbones)).headline


@pytest.mark.parametrize(
    ("gains", "retrieval", "words"),
    [
        ((0.05, 0.09, 0.0), -0.012, f"{RAISES} 2 of 3 backbones, most on siglip:tiny, at a cost in retrieval R@1"),
        ((0.05, 0.02), 0.0, f"{RAISES} both backbones, most on open_clip:tiny, at no clear cost in retrieval R@1"),
        ((0.05, 0.02, 0.03), 0.03, f"{RAISES} all 3 backbones, most on open_clip:tiny, {FREE}"),
        ((0.05,), -0.1, "TTD raises Caption IoU of open_clip:tiny by 0.050, at a cost in retrieval R@1"),
        ((0.001, -0.09), -0.012, "TTD does not help here: Caption IoU worsens on 1 of 2 backbones"),
        ((-0.08, -0.09), -0.012, "TTD does not help here: Caption IoU worsens on both backbones"),
        ((-0.08,), -0.012, "TTD does not help here: Caption IoU of open_clip:tiny worsens by 0.080"),
        ((0.001, 0.0), -0.012, "TTD makes no clear difference to Caption IoU here"),
    ],
)  # fmt: skip
def test_the_headline_follows_the_figures(gains: tuple[float, ...], retrieval: float, words: str) -> None:
    assert headline(*gains, retrieval=retrieval) == words


def sentences(comparison: Comparison) -> str:
    return " ".join(describe_comparison(comparison).sentences)


def test_the_sentences_name_the_best_the_cost_and_where_it_does_not_help() -> None:
    told = sentences(make_comparison())
    assert "Caption IoU: open_clip:tiny gains most over the control, +0.090 ± 0.002 (0.543 to 0.633)." in told
    assert "Retrieval R@1: TTD costs open_clip:tiny −0.012 ± 0.002, siglip:tiny" in told
    assert "TTD does not help Caption IoU on openai_clip:tiny (+0.001 ± 0.002, no change)." in told
    assert "One seed" not in told


def test_a_gain_smaller_than_the_spread_is_called_so() -> None:
    noisy = make_backbone("noisy", {"caption_iou": 0.03}, noise=0.05)
    told = describe_comparison(make_comparison(("noisy",), 0, backbones=[noisy]))
    assert told.headline == "TTD makes no clear difference to Caption IoU here"
    assert told.sentences[0].startswith("Caption IoU changes by +0.030 ± 0.050, which is within the spread over seeds:")
    told = describe_comparison(make_comparison(("noisy", "n2"), 0, backbones=[noisy, replace(noisy, name="n2")]))
    assert told.sentences[1].startswith("Tag F1: no backbone gains 0.005 over the control and more than its spread")
    assert not any(sentence.startswith("Caption IoU:") for sentence in told.sentences)
    assert told.sentences[0].startswith(
        "TTD does not help Caption IoU on noisy (+0.030 ± 0.050, within the spread), n2"
    )


def test_what_lies_below_before_is_told_although_it_beats_the_control() -> None:
    one = backbone(0.6, [0.4, 0.4], [0.5, 0.5])
    told = sentences(make_comparison(("b",), 0, backbones=[one]))
    assert (
        "b gains over its control, but its Caption IoU is still worse than before training: 0.500 against 0.600" in told
    )


def test_what_is_not_known_is_told() -> None:
    one = make_backbone("one", seeds=1)
    words = "One seed was run, so the spread is unknown: every verdict is tentative."
    assert words in sentences(make_comparison(("one",), 0, backbones=[one]))
    bare = make_backbone("bare", arms=("before", "after"))
    told = sentences(make_comparison(("bare",), 0, backbones=[bare]))
    assert "over the backbone before training" in told
    assert "Where no control was run, any further training may explain the gain." in told
    hole = make_backbone("hole")
    hole.metrics["after"][0]["caption_iou"] = None
    told = sentences(make_comparison(("hole", "one"), 0, backbones=[hole, one]))
    assert "Caption IoU is not defined in every arm of hole." in told
    warned = replace(one, warnings=["the maps may be collapsing"])
    told = sentences(make_comparison(("one",), 0, backbones=[warned], failures={"gone": "no such weights"}))
    assert "1 backbone failed and was left out: gone." in told
    assert "The run raised 1 warning; see the section Warnings." in told


def test_without_fine_tuning_the_best_as_loaded_is_named() -> None:
    backbones = [make_backbone(name, arms=("before",), shift=0.1 * n) for n, name in enumerate(NAMES[:2])]
    finding = describe_comparison(make_comparison(NAMES[:2], 0, backbones=backbones))
    assert finding.headline == "As loaded, siglip:tiny has the best Caption IoU: 0.640"
    assert "Nothing was fine-tuned" in finding.sentences[0]
    assert "Caption FPR: open_clip:tiny 0.310 is best, siglip:tiny 0.410 is last." in finding.sentences


# The page


def test_the_page_is_well_formed_accessible_and_self_contained(tmp_path: Path) -> None:
    text = write(tmp_path, make_comparison(failures={"gone": "no such weights"}))
    page = Page(text)
    assert_self_contained(page, text)
    assert "default-src 'none'" in text
    assert all(address.startswith(("data:image/", "#")) for address in re.findall(r"url\(([^)]*)\)", text))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    referenced = {a[name] for _, a in page.tags for name in ("aria-labelledby", "for") if name in a}
    referenced |= {(a["href"] or "")[1:] for a in page.all("a") if (a["href"] or "").startswith("#")}
    assert referenced <= set(ids)
    assert all(img.get("alt") for img in page.all("img"))
    assert all(
        (svg.get("role") == "img" and svg.get("aria-label")) or svg.get("aria-hidden") for svg in page.all("svg")
    )
    assert all(th.get("scope") for th in page.all("th"))
    assert len(page.all("h1")) == len(page.all("main")) == 1


def test_the_page_shows_everything(tmp_path: Path) -> None:
    text = write(tmp_path, make_comparison(failures={"gone": "no such weights"}))
    page = Page(text)
    assert page.text.index("TTD raises Caption IoU on 3 of 4 backbones") < page.text.index("Mean ± sample")
    for words in (
        "0.633", "± 0.002", "+0.090 ± 0.002", "better", "worse", "no change", "Caption FPR", "Image 3 of 3",
        "Largest gain", "scene-0002", "True tags:", "union of selected tags", "no such weights", "3.4 M", "64 × 64",
        "results.json", "OpenMoji", "Distillation loss", "0123456789…",
    ):  # fmt: skip
        assert words in page.text, words
    assert len(page.all("article")) == 3
    heat = [img for img in page.all("img") if img.get("class") == "ttd-heat"]
    # Three images, four backbones, three arms, the caption, the union and four tags; none where no tag is selected.
    views = [v for image in make_comparison().gallery for arms in image.views.values() for v in arms.values()]
    shown = sum(5 + any(tag.selected for tag in view.tags) for view in views)
    # The scene below the tiles has the caption of four backbones, before and after.
    assert len(heat) == shown + 4 * 2 and shown > 3 * 4 * 3 * 5
    rows = re.findall(r'<tr class="row"', text)
    assert len(rows) == len(NAMES) * len(FIGURES)


def test_every_value_of_the_table_can_be_sorted_by(tmp_path: Path) -> None:
    comparison = make_comparison()
    text = write(tmp_path, comparison)
    table = re.search(r'<table class="metrics sortable">(.*?)</table>', text, re.S)
    assert table is not None
    groups = re.findall(r'<tbody data-better="(.*?)">(.*?)</tbody>', table[1], re.S)
    assert [better for better, _ in groups] == [figure.better or "" for figure in FIGURES]
    arms: tuple[Arm, ...] = ("before", "control", "after")
    for figure, (_, body) in zip(FIGURES, groups, strict=True):
        rows = [re.findall(r'data-sort="([^"]*)"', row) for row in body.split('<tr class="row">')[1:]]
        for row, b in zip(rows, comparison.backbones, strict=True):
            found = change(b, figure)
            assert found is not None
            assert row == [b.name, *(repr(b.mean(arm, figure.key)) for arm in arms), repr(found.mean)]


def test_layers_hold_the_maps_interpolated_before_they_are_coloured(tmp_path: Path) -> None:
    comparison = make_comparison()
    page = Page(write(tmp_path, comparison))
    sources = {img["alt"]: img["src"] for img in page.all("img")}
    views = comparison.gallery[2].views["siglip:tiny"]
    wanted = {
        "After TTD: map of the caption by siglip:tiny, IoU 0.550": views["after"].caption,
        f"Control: map of “lion” by siglip:tiny, score {views['control'].tags[1].score:.2f}, "
        f"{'selected' if views['control'].tags[1].selected else 'rejected'}": views["control"].tags[1].heat,
        "Before: union of the maps of the selected tags by siglip:tiny": np.max(
            [tag.heat for tag in views["before"].tags if tag.selected], axis=0
        ),
    }
    for alt, heat in wanted.items():
        uri = sources[alt]
        assert uri is not None
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))
        assert drawn.shape == (56, 56, 3)
        assert np.abs(drawn - colour_table()[heat_levels(heat, 56, 56)].astype(int)).max() <= 12


def test_tags_are_marked_where_they_start_and_selections_judged(tmp_path: Path) -> None:
    picture = make_picture(0, ("b",), caption="A <dog> & a dog", tags=("dog", "a dog"))
    picture = replace(picture, truth={"dog": picture.truth["dog"]}, absent=("a dog",))
    text = write(tmp_path, make_comparison(("b",), 0, backbones=[make_backbone("b")], gallery=[picture]))
    caption = re.search(r'<p class="caption">(.*?)</p>', text)
    assert caption is not None
    assert caption[1] == ('“A &lt;<mark class="true">dog</mark>&gt; &amp; <mark class="absent">a dog</mark>”')
    for tag in picture.views["b"]["after"].tags:
        verdict = "selected" if tag.selected else "rejected"
        right = tag.selected == (tag.text == "dog")
        assert f"{tag.score:.2f} {'✓' if right else '✗'} {'' if right else 'wrongly '}{verdict}" in Page(text).text


@pytest.mark.parametrize("pictures", [0, 1])
def test_hostile_strings_are_escaped(tmp_path: Path, pictures: int) -> None:
    names = (HOSTILE,)
    picture = make_picture(0, names, caption=HOSTILE, tags=("script", HOSTILE))
    picture = replace(picture, key=HOSTILE, why=HOSTILE, truth={HOSTILE: picture.truth["dog"]})
    one = make_backbone(HOSTILE)
    one.about[HOSTILE] = HOSTILE
    one.warnings.append(HOSTILE)
    comparison = make_comparison(
        names,
        backbones=[one],
        gallery=[picture] * pictures,
        metrics=[Metric(key, HOSTILE, "higher", HOSTILE) for key in ("caption_iou", "retrieval_r1")],
        settings={HOSTILE: {HOSTILE: HOSTILE}, "command": f"ttd {HOSTILE}"},
        failures={HOSTILE: HOSTILE},
        attribution=HOSTILE,
    )
    page = Page(write(tmp_path, comparison))
    assert len(page.all("script")) == 1
    assert not [img for img in page.all("img") if not (img.get("src") or "").startswith("data:")]
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert '<script>alert("x")</script>' in page.text
    assert [p.name for p in draw_comparison_plots(tmp_path, comparison)] == ["trade-off.png", "gains.png", "curves.png"]


ARMS_GIVEN: list[tuple[Any, ...]] = [("before",), ("before", "after"), ("control", "after"), ("before", "control"), ()]


@pytest.mark.parametrize("arms", ARMS_GIVEN)
def test_missing_arms_are_no_error(tmp_path: Path, arms: tuple[Any, ...]) -> None:
    names = NAMES[:2]
    backbones = [make_backbone(name, arms=arms) for name in names]
    gallery = [make_picture(0, names, arms=arms)]
    comparison = make_comparison(names, backbones=backbones, gallery=gallery)
    page = Page(write(tmp_path, comparison))
    assert "nan" not in page.text.lower().split()
    assert ("After TTD" in page.text) == ("after" in arms)
    assert "open_clip:" in page.text
    drawn = {path.stem for path in draw_comparison_plots(tmp_path, comparison)}
    assert drawn == {name for name, on in (
        ("trade-off", bool(arms)), ("gains", "after" in arms and len(arms) > 1), ("curves", bool({*arms} - {"before"})),
    ) if on}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"gallery": []},
        {"backbones": [], "gallery": []},
        {"metrics": [], "gallery": []},
        {"settings": {}, "attribution": "", "gallery": []},
        {"trade_off": ("nothing", "retrieval_r1"), "gallery": []},
        {"gallery": [replace(make_picture(0), views={}, truth={}, why="")]},
        {"gallery": [make_picture(0, tags=(), caption="")]},
    ],
)
def test_parts_that_are_missing_are_said_to_be_so(tmp_path: Path, changes: dict[str, Any]) -> None:
    page = Page(write(tmp_path, make_comparison(**changes)))
    assert len(page.all("h1")) == 1


@pytest.mark.parametrize("changes", [{"backbones": []}, {"metrics": []}])
def test_plots_without_data_are_left_out(tmp_path: Path, changes: dict[str, Any]) -> None:
    one = make_backbone("one", arms=("before",))
    assert draw_comparison_plots(tmp_path, make_comparison(**({"backbones": [one], "gallery": []} | changes))) == []


def test_figures_that_are_none_are_said_to_be_so(tmp_path: Path) -> None:
    one = make_backbone("one")
    for rows in one.metrics.values():
        for row in rows:
            row["caption_iou"] = None
            row["tag_f1"] = float("nan")
    comparison = make_comparison(("one",), 0, backbones=[one])
    page = Page(write(tmp_path, comparison))
    assert "The effect of TTD on Caption IoU could not be measured" in page.text
    assert page.text.count("n/a") >= 6
    assert "nan" not in page.text.lower().split()
    assert "trade-off.png" not in [path.name for path in draw_comparison_plots(tmp_path, comparison)]


def test_four_backbones_and_twelve_photographs_stay_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = []
    for number in range(12):
        picture = make_picture(
            number, size=(288, 384), grid=(14, 14), tags=("dog", "lion", "photo", "grass", "a", "of")
        )
        # Noise at the grain of a photograph; white noise is like no photograph, and does not compress.
        coarse = Image.fromarray(rng.integers(0, 256, (72, 96, 3), dtype=np.uint8)).resize((384, 288))
        pictures.append(replace(picture, image=np.asarray(coarse)))
    backbones = [make_backbone(name, seeds=10, steps=200) for name in NAMES]
    write_comparison_report(tmp_path / "report.html", make_comparison(backbones=backbones, gallery=pictures))
    assert (tmp_path / "report.html").stat().st_size < 6_000_000


def test_masks_of_another_size_and_broken_maps_are_refused(tmp_path: Path) -> None:
    picture = make_picture(0)
    other = replace(picture, truth={"dog": np.zeros((3, 3), bool)})
    with pytest.raises(InputError, match=r"the mask of 'dog' is \[3, 3\]"):
        write(tmp_path, make_comparison(gallery=[other]))
    view = replace(picture.views[NAMES[0]]["before"], caption=np.full((2, 2), np.nan, np.float32))
    with pytest.raises(InputError, match="finite"):
        write(tmp_path, make_comparison(gallery=[replace(picture, views={NAMES[0]: {"before": view}})]))
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    colour_table.cache_clear()
    for call in (
        lambda: draw_comparison_plots(tmp_path, make_comparison()),
        lambda: write_comparison_report(tmp_path / "report.html", make_comparison()),
    ):
        with pytest.raises(MissingDependencyError, match=r"pip install 'ttd-plugins\[demo\]'"):
            call()
    assert not list(tmp_path.iterdir())


def test_unwritable_paths_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write_comparison_report(tmp_path / "missing" / "x", make_comparison(pictures=0))
    with pytest.raises(InputError, match="cannot be written"):
        draw_comparison_plots(tmp_path / "missing", make_comparison(pictures=0))


def test_the_old_names_of_metrics_work_and_warn() -> None:
    comparison = make_comparison()
    with pytest.warns(FutureWarning, match="Comparison.figures is now Comparison.metrics"):
        assert comparison.figures is comparison.metrics
    with pytest.warns(FutureWarning, match="BackboneResult.figures is now BackboneResult.metrics"):
        assert comparison.backbones[0].figures is comparison.backbones[0].metrics
    with pytest.warns(FutureWarning, match=r"results\.Figure is now .*results\.Metric"):
        assert results.Figure is Metric
    with pytest.warns(FutureWarning, match=r"results\.Picture is now .*results\.GalleryImage"):
        assert results.Picture is results.GalleryImage
