"""One three-valued labelling of tags: protocols, comparisons and the report agree on every word."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers_comparison import make_backbone, make_comparison, make_view
from helpers_photographs import write_photographs
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib")

from ttd_plugins.comparison.data_interface import Sample
from ttd_plugins.comparison.gallery import choose_gallery
from ttd_plugins.evaluation.datasets import CaptionTruth, open_captions
from ttd_plugins.evaluation.true_tags import coco_vocabulary, label_candidates
from ttd_plugins.plugins import make_tag_extractor
from ttd_plugins.reports.comparison_html import write_comparison_report

CASES = {
    # Animals are annotated as bears: the protocol counts "stuffed animals" as true.
    ("two stuffed animals on a bed", ("teddy bear", "bed")): {"stuffed animals": True, "bed": True, "stuffed": None},
    # A word inside a longer name is unknown by itself if the name is true.
    ("a kitchen sink", ("sink",)): {"kitchen": None, "sink": True, "kitchen sink": True},
    ("a kitchen sink ", ()): {"kitchen": False, "sink": False, "kitchen sink": False},
    ("a dog that runs", ("dog",)): {"dog": True, "runs": False},
}
KINDS = {True: "true", False: "absent", None: "other"}


def truth_of(caption: str, shown: tuple[str, ...]) -> CaptionTruth:
    mentions = coco_vocabulary().mentions(caption)
    return CaptionTruth(caption, tuple(mentions), tuple(any(c in shown for c in m.classes) for m in mentions))


def page_of(tmp_path: Path, sample: Sample, tags: list[str], *, selected: bool) -> str:
    view = make_view(0, sample.caption, tags)
    view = replace(view, tags=[replace(tag, selected=selected) for tag in view.tags])
    gallery = choose_gallery([sample], {"b": [{"before": view}]}, 1)
    file = tmp_path / "report.html"
    comparison = make_comparison(("b",), 0, backbones=[make_backbone("b")], gallery=gallery)
    write_comparison_report(file, comparison)
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize("selected", [True, False])
@pytest.mark.parametrize(("caption", "shown"), list(CASES))
def test_the_report_judges_as_the_protocol(
    tmp_path: Path, caption: str, shown: tuple[str, ...], selected: bool
) -> None:
    truth, expected = truth_of(caption, shown), CASES[caption, shown]
    tags = list(expected)
    assert dict(zip(tags, truth.labels(tags), strict=True)) == expected
    assert truth.labels(tags) == label_candidates(caption, tags, truth.mentions, truth.true)
    mask = np.zeros((16, 16), bool)
    mask[:8] = True
    sample = Sample(
        "one", np.zeros((16, 16, 3), np.uint8), caption, dict.fromkeys(truth.true_tags(), mask), caption_truth=truth
    )
    text = page_of(tmp_path, sample, tags, selected=selected)
    rows = re.findall(r"<tr data-tag=.*?</tr>", text, re.S)
    assert len(rows) == len(tags)
    for row in rows:
        tag = re.sub(r"<[^>]+>", "", re.search(r'<th scope="row">(.*?)</th>', row).group(1))  # type: ignore[union-attr]
        label = expected[tag]
        assert f'<mark class="{KINDS[label]}">' in row
        right = None if label is None else label == selected
        (selection,) = re.findall(r'class="selection (\w+) (\w*)"', row)
        assert selection == ("selected" if selected else "rejected", {None: "", False: "wrong", True: "right"}[right])


WORDS = ["kitchen", "sink", "dog", "hot", "dog house", "stuffed animals", "red", "stop", "sign", "light", "blue"]


@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join), st.sets(st.sampled_from(["sink", "dog"]))
)
def test_every_tag_of_a_gallery_has_the_label_of_the_protocol(caption: str, shown: set[str]) -> None:
    truth, tags = truth_of(caption, tuple(shown)), make_tag_extractor("words")([caption])[0]
    sample = Sample("one", np.zeros((4, 4, 3), np.uint8), caption, {}, caption_truth=truth)
    view = make_view(0, caption, tags)
    (image,) = choose_gallery([sample], {"b": [{"before": view}]}, 1)
    assert image.labels == dict(zip(tags, label_candidates(caption, tags, truth.mentions, truth.true), strict=True))


def test_samples_of_a_labelled_set_bring_their_labels(tmp_path: Path) -> None:
    from ttd_plugins.comparison.captioned_data import CaptionedData
    from ttd_plugins.comparison.options import CompareOptions

    captions = {"a": ["a person and a bicycle near a kitchen sink"]}
    root = write_photographs(tmp_path / "data", captions, {"a": [1, 2]})
    data = CaptionedData(CompareOptions(("open_clip:tiny",), data="coco_captions", root=root, tune=False))
    (sample,) = data.samples(5)
    (truth,) = open_captions("coco_captions", root).read("a").captions
    assert sample.caption_truth == truth
    assert truth.labels(["person", "bicycle", "sink", "near"]) == [True, True, False, False]
