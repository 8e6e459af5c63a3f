"""The report of one backbone, as ``ttd demo`` writes it: tiles, bias, all curves, and words that follow the metrics."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_comparison import HOSTILE, make_curve, make_picture
from helpers_pages import Page, assert_self_contained
from PIL import Image

from ttd_plugins.comparison.results import Arm, BackboneResult, Comparison, Metric
from ttd_plugins.reports.comparison_findings import describe_comparison
from ttd_plugins.reports.comparison_gallery import region_outline
from ttd_plugins.reports.comparison_html import write_comparison_report
from ttd_plugins.reports.heat_overlay import LAYER_SIDE, colour_table, heat_levels

pytest.importorskip("matplotlib")

NAME = "open_clip:tiny"
KEYS = ("caption_iou", "tag_balance", "tag_f1", "tag_ap", "tag_ap_blind", "retrieval_r1", "caption_map_spread")
LABELS = ("Caption IoU", "tag balance", "tag F1", "tag AP", "tag AP, image-blind", "retrieval R@1", "map spread")
METRICS = tuple(
    Metric(key, label, None if key in ("tag_ap_blind", "caption_map_spread") else "higher", f"What {label} means.")
    for key, label in zip(KEYS, LABELS, strict=True)
)
BIAS = {"background": 0.31, "common": 0.55, "middle": 0.60, "rare": 0.68}


def values(**changes: float) -> dict[str, Any]:
    """Metrics of one arm."""
    return dict(zip(KEYS, (0.58, 0.46, 0.84, 0.93, 0.55, 0.95, 0.4), strict=True)) | changes


def make_result(
    before: dict[str, Any] | None = None,
    control: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
    bias: dict[Arm, list[dict[str, Any]]] | None = None,
    **changes: Any,
) -> Comparison:
    """A comparison of one backbone and one seed; by default TTD wins."""
    arms: dict[Arm, dict[str, Any]] = {
        "before": values(**before or {}),
        "control": values(**({"tag_f1": 0.96, "caption_iou": 0.575} if control is None else control)),
        "after": values(**({"caption_iou": 0.66, "tag_balance": 0.54, "tag_f1": 0.99} if after is None else after)),
    }
    backbone = BackboneResult(
        NAME,
        {"parameters": 1_404_769},
        {arm: [found] for arm, found in arms.items()},
        {"control": [make_curve(ttd=False)], "after": [make_curve(ttd=True)]},
        bias={"before": [BIAS], "control": [BIAS], "after": [BIAS | {"background": 0.5}]} if bias is None else bias,
    )
    gallery = [
        make_picture(0, (NAME,), ious=(0.4, 0.5, 0.7)),
        make_picture(1, (NAME,), ious=(0.5, 0.6, 0.3)),
        make_picture(2, (NAME,), ious=(0.6, 0.6, 0.6)),
    ]
    settings = {"backbone": NAME, "seed": 0, "steps": 60, "versions": {"torch": "2"}, "learning rate": 5e-4}
    comparison = Comparison(settings, METRICS, [backbone], gallery, attribution="Pictograms: OpenMoji, CC BY-SA 4.0")
    return replace(comparison, **changes)


def write(tmp_path: Path, comparison: Comparison | None = None) -> str:
    path = tmp_path / "report.html"
    write_comparison_report(path, make_result() if comparison is None else comparison)
    return path.read_text(encoding="utf-8")


# The finding


@pytest.mark.parametrize(
    ("control", "after", "headline"),
    [
        ({}, {"caption_iou": 0.66, "tag_balance": 0.54},
         "TTD seems to raise Caption IoU of open_clip:tiny by 0.080, at no clear cost in retrieval R@1"),
        ({}, {"caption_iou": 0.66, "tag_balance": 0.54, "retrieval_r1": 0.94},
         "TTD seems to raise Caption IoU of open_clip:tiny by 0.080, at a cost in retrieval R@1"),
        ({}, {}, "TTD makes no clear difference to Caption IoU here"),
        ({}, {"caption_iou": 0.583}, "TTD makes no clear difference to Caption IoU here"),
        ({"caption_iou": 0.66}, {"caption_iou": 0.66}, "TTD makes no clear difference to Caption IoU here"),
        ({}, {"caption_iou": 0.5, "tag_balance": 0.4},
         "TTD does not seem to help here: Caption IoU of open_clip:tiny worsens by 0.080"),
        ({"caption_iou": 0.7}, {"caption_iou": 0.62},
         "TTD does not seem to help here: Caption IoU of open_clip:tiny worsens by 0.080"),
        ({}, {"caption_iou": 0.66, "tag_balance": 0.4},
         "TTD seems to raise Caption IoU of open_clip:tiny by 0.080, at no clear cost in retrieval R@1, but it seems "
         "to lower tag balance"),
        ({}, {"tag_balance": 0.6},
         "TTD makes no clear difference to Caption IoU here, but it seems to raise tag balance"),
        ({}, {"caption_iou": float("nan"), "tag_balance": float("nan")},
         "The effect of TTD on Caption IoU could not be measured"),
    ],
)  # fmt: skip
def test_the_headline_follows_the_metrics(control: dict[str, Any], after: dict[str, Any], headline: str) -> None:
    found = describe_comparison(make_result(control=control, after=after)).headline
    assert found == f"{headline} (only 60 steps, one seed)"


@pytest.mark.parametrize(
    ("before", "control", "after", "words"),
    [
        (0.5, 0.55, 0.65, "rises by 0.100 over the control"),
        (0.5, 0.55, 0.551, "does not change against the control"),
        (0.5, 0.65, 0.6, "falls by 0.050 against the control"),
        (0.6, 0.5, 0.5, "does not change against the control"),
        (0.5, 0.6, 0.45, "falls by 0.150 against the control"),
        (0.6, 0.5, 0.601, "rises by 0.101 over the control"),
    ],
)
def test_sentences_separate_ttd_from_further_training(before: float, control: float, after: float, words: str) -> None:
    arms = ({"caption_iou": value} for value in (before, control, after))
    sentence = describe_comparison(make_result(*arms)).sentences[0]
    assert sentence == (
        f"Caption IoU {words}: {after:.3f} after TTD, {control:.3f} in the control, {before:.3f} before training."
    )


def test_the_finding_states_each_main_metric_the_bias_and_the_single_seed() -> None:
    sentences = describe_comparison(make_result()).sentences
    starts = (
        "Caption IoU rises by 0.085",
        "Tag F1 rises by 0.030",
        "Tag balance rises",
        "Retrieval R@1 does not change",
    )
    for sentence, start in zip(sentences, starts, strict=False):
        assert sentence.startswith(start)
    assert any("favours rare words over background words by 0.370" in sentence for sentence in sentences)
    assert any(sentence.startswith("One seed was run") for sentence in sentences)


@pytest.mark.parametrize(
    ("after", "words"),
    [({"background": 0.63}, "shrinks to 0.130"), ({}, "stays at 0.370"), ({"background": 0.1}, "grows to 0.580")],
)
def test_the_finding_states_the_bias(after: dict[str, float], words: str) -> None:
    bias: Any = {"before": [BIAS], "control": [BIAS], "after": [BIAS | after]}
    (sentence,) = (s for s in describe_comparison(make_result(bias=bias)).sentences if "favours" in s)
    assert words in sentence
    for unknown in ({"before": [{"rare": 0.5}], "after": [BIAS]}, {}):
        found = describe_comparison(make_result(bias=unknown)).sentences  # type: ignore[arg-type]
        assert not any("favours" in one for one in found)


def test_the_finding_warns_of_collapse() -> None:
    assert "collaps" not in " ".join(describe_comparison(make_result()).sentences)
    (warning,) = (
        s for s in describe_comparison(make_result(after={"caption_map_spread": 0.1})).sentences if "collaps" in s
    )
    assert "fell from 0.400 to 0.100" in warning and NAME in warning


# The page


def test_the_page_is_well_formed_accessible_and_self_contained(tmp_path: Path) -> None:
    text = write(tmp_path)
    page = Page(text)
    assert_self_contained(page, text)
    assert "default-src 'none'" in text
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
    assert all(button["type"] == "button" for button in page.all("button"))


def test_the_page_shows_everything(tmp_path: Path) -> None:
    text = write(tmp_path)
    page = Page(text)
    for words in (
        "0.660", "△ +0.085 better, one seed", "tag AP, image-blind", "What tag AP means.", "Contrastive loss",
        "Distillation loss", "Spread of the caption map", "Selected tags per caption", "Bias by kind of word",
        "Image 3 of 3", "▲ Improved", "▼ Worse than the control", "Failure: IoU below 0.5", "No change",
        "open_clip:tiny", "0.0005", "torch", "OpenMoji, CC BY-SA 4.0", "arXiv 2404.00384", "Jo, Ryu, Kim, Yang, Kim",
        "True tags: dog, grass", "Control",
    ):  # fmt: skip
        assert words in page.text, words
    headline = page.text.rindex("TTD seems to raise Caption IoU of open_clip:tiny by 0.085")
    assert headline < page.text.index("before 0.580, control 0.575") < page.text.index("Single tag bias")
    assert len(page.all("article")) == 3
    labels = [svg["aria-label"] or "" for svg in page.all("svg")]
    # Two sizes of the trade-off, the bias, and six curves.
    assert len(labels) == 2 + 1 + 6
    assert any("After TTD: Backgrounds (grass, snow …) 0.500, Common things 0.550" in one for one in labels)
    assert any(one.startswith("Tag loss of open_clip:tiny") for one in labels)
    # Nothing to choose among: no curves, no backbones.
    assert not page.all("select") and "chooser" not in re.sub(
        r"<style>.*?</style>|<script>.*?</script>", "", text, flags=re.S
    )


def test_the_tiles_are_the_main_metrics_with_their_gain(tmp_path: Path) -> None:
    text = write(tmp_path)
    tiles = re.search(r'<ul class="tiles">(.*?)</ul>', text, re.S)
    assert tiles is not None
    words = [Page(f"<div>{tile}</div>").text for tile in re.findall(r"<li>(.*?)</li>", tiles[1], re.S)]
    assert words == [
        "Caption IoU 0.660 △ +0.085 better, one seed before 0.580, control 0.575",
        "Tag F1 0.990 △ +0.030 better, one seed before 0.840, control 0.960",
        "Tag balance 0.540 △ +0.080 better, one seed before 0.460, control 0.460",
        "Retrieval R@1 0.950 0.000 no change before 0.950, control 0.950",
    ]


def test_tags_are_marked_by_what_they_are(tmp_path: Path) -> None:
    image = make_picture(0, (NAME,), caption="a dog and a lion in a photo of grassland", tags=("dog", "lion", "photo"))
    text = write(tmp_path, make_result(gallery=[replace(image, absent=("lion",))]))
    caption = re.search(r'<p class="caption">(.*?)</p>', text)
    assert caption is not None
    assert '<mark class="absent">lion</mark>' in caption[1]
    assert '<mark class="other">photo</mark>' in caption[1]
    assert '<mark class="true">dog</mark>' in caption[1]
    assert caption[1].endswith(" of grassland”")
    assert "tags that are absent" in Page(text).text
    assert "tags that are absent" not in Page(write(tmp_path)).text


def test_selections_are_told_right_from_wrong(tmp_path: Path) -> None:
    image = make_picture(0, (NAME,), arms=("before",))
    view = image.views[NAME]["before"]
    selected = {"dog": True, "lion": True, "photo": False, "grass": False}
    view = replace(view, tags=[replace(tag, selected=selected[tag.text]) for tag in view.tags])
    labels = {"dog": True, "lion": False, "photo": False, "grass": True}
    text = write(tmp_path, make_result(gallery=[replace(image, views={NAME: {"before": view}}, labels=labels)]))
    rows = re.findall(r"<tr data-tag=.*?</tr>", text, re.S)
    words = [" ".join(re.sub(r"<[^>]+>", " ", row).split()[2:]) for row in rows]
    assert words == ["✓ selected", "✗ wrongly selected", "✓ rejected", "✗ wrongly rejected"]


@pytest.mark.parametrize("selected", [True, False])
def test_a_tag_of_unknown_truth_is_neither_right_nor_wrong(tmp_path: Path, selected: bool) -> None:
    image = make_picture(0, (NAME,), arms=("before",))
    view = image.views[NAME]["before"]
    view = replace(view, tags=[replace(tag, selected=selected) for tag in view.tags])
    labels = {tag.text: None for tag in view.tags}
    text = write(tmp_path, make_result(gallery=[replace(image, views={NAME: {"before": view}}, labels=labels)]))
    rows = "".join(re.findall(r"<tr data-tag=.*?</tr>", text, re.S))
    assert "wrong" not in rows and 'class="right"' not in rows and 'class="absent"' not in rows
    assert rows.count('<mark class="other">') == len(view.tags)


def test_layers_hold_the_maps(tmp_path: Path) -> None:
    comparison = make_result()
    page = Page(write(tmp_path, comparison))
    layers = {img["alt"]: img["src"] for img in page.all("img")}
    view = comparison.gallery[0].views[NAME]["after"]
    uri = layers["After TTD: map of the caption by open_clip:tiny, IoU 0.700"]
    assert uri is not None
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as layer:
        drawn = np.asarray(layer.convert("RGB")).astype(int)
    expected = colour_table()[heat_levels(view.caption, LAYER_SIDE, LAYER_SIDE)].astype(int)
    assert np.abs(drawn - expected).max() <= 12


def test_outline_runs_along_the_region_and_not_along_the_edge_of_the_image() -> None:
    region = np.zeros((6, 8), bool)
    region[2:] = True
    drawn = region_outline(region)
    assert drawn.shape == (12, 16, 4)
    white = (drawn == 255).all(-1)
    assert np.flatnonzero(white.any(1)).tolist() == [4]
    assert not region_outline(np.ones((6, 8), bool)).any()


def test_a_caption_that_was_cut_is_said_to_be_so(tmp_path: Path) -> None:
    assert "its end was not read" not in Page(write(tmp_path)).text
    image = make_picture(0, (NAME,))
    views = {NAME: {arm: replace(view, truncated=arm == "after") for arm, view in image.views[NAME].items()}}
    assert "its end was not read" in Page(write(tmp_path, make_result(gallery=[replace(image, views=views)]))).text


def test_hostile_strings_are_escaped(tmp_path: Path) -> None:
    image = replace(make_picture(0, (NAME,), caption=HOSTILE, tags=("script", "<script>")), absent=("<script>",))
    settings = {HOSTILE: HOSTILE, "backbone": HOSTILE, "more": {HOSTILE: [HOSTILE]}}
    bias: Any = {"before": [{HOSTILE: 0.4}], "after": [{HOSTILE: 0.5}]}
    text = write(tmp_path, make_result(bias=bias, gallery=[image], settings=settings, attribution=HOSTILE))
    page = Page(text)
    assert len(page.all("script")) == 1
    assert not [img for img in page.all("img") if not (img.get("src") or "").startswith("data:")]
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert '<script>alert("x")</script>' in page.text


@pytest.mark.parametrize(
    "changes",
    [
        {"gallery": []},
        {"settings": {}},
        {"bias": {}},
        {"after": {"tag_balance": float("nan")}, "bias": {"after": [{}]}},
        {"trade_off": ("caption_iou", "caption_iou")},
    ],
)
def test_a_page_with_parts_missing_still_reads(tmp_path: Path, changes: dict[str, Any]) -> None:
    page = Page(write(tmp_path, make_result(**changes)))
    assert "Caption IoU" in page.text
    assert "nan" not in page.text.lower().split()


@pytest.mark.parametrize("steps", [0, 1])
def test_curves_of_few_steps_still_read(tmp_path: Path, steps: int) -> None:
    comparison = make_result()
    curves: Any = {"control": [[]], "after": [make_curve(ttd=True, steps=steps)]}
    comparison.backbones = [replace(comparison.backbones[0], curves=curves)]
    assert ("Tag loss" in Page(write(tmp_path, comparison)).text) == (steps == 1)


def test_a_full_gallery_stays_small(tmp_path: Path) -> None:
    write(tmp_path, make_result(gallery=[make_picture(n, (NAME,)) for n in range(12)]))
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
