"""The frontier of gain and cost: a comparison measures its backbones with LoRA scaled after training."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_comparison import NAMES, make_backbone, make_comparison

from ttd_plugins.comparison.lora_scales import cost_metrics, scale_sentences, scaled_results
from ttd_plugins.comparison.options import CompareOptions
from ttd_plugins.comparison.results import BackboneResult, Comparison
from ttd_plugins.comparison.running import compare
from ttd_plugins.comparison.tables import markdown, scale_rows, write_csv
from ttd_plugins.errors import InputError
from ttd_plugins.reports.comparison_html import write_comparison_report
from ttd_plugins.reports.comparison_plots import draw_comparison_plots
from ttd_plugins.reports.lora_scale_charts import scale_charts

SCALES = (0.25, 0.5, 0.75)


def scaled_backbone(name: str, **more: Any) -> BackboneResult:
    """A backbone whose metrics move with the square root of the factor."""
    backbone = make_backbone(name, **more)
    before, after = backbone.metrics["before"][0], backbone.metrics["after"]
    scaled: dict[str, list[dict[str, float | None]]] = {
        f"{scale:g}": [{key: before[key] + scale**0.5 * (row[key] - before[key]) for key in row} for row in after]  # type: ignore[operator]
        for scale in SCALES
    }
    return replace(backbone, scaled=scaled)


def scaled_comparison(*backbones: BackboneResult) -> Comparison:
    return replace(make_comparison(), backbones=list(backbones) or [scaled_backbone(name) for name in NAMES])


def test_gains_are_taken_over_the_control_of_the_same_seed() -> None:
    comparison = scaled_comparison()
    backbone = comparison.backbones[1]
    found = scaled_results(backbone, comparison.metrics)
    assert [one.scale for one in found] == [0, *SCALES, 1]
    for one in found:
        rows = {0.0: backbone.metrics["before"] * 3, 1.0: backbone.metrics["after"]}.get(one.scale)
        rows = backbone.scaled[f"{one.scale:g}"] if rows is None else rows
        for key in ("caption_iou", "retrieval_r1"):
            values = np.array([row[key] for row in rows], float)
            control = np.array([row[key] for row in backbone.metrics["control"]], float)
            assert one.means[key] == pytest.approx(values.mean())
            assert one.gains[key] == pytest.approx(((values - control).mean(), (values - control).std(ddof=1)))


def test_a_seed_without_a_value_has_no_gain_and_an_incomplete_factor_no_row() -> None:
    comparison = scaled_comparison()
    backbone = comparison.backbones[0]
    backbone.scaled["0.5"][1]["caption_iou"] = None
    del backbone.scaled["0.75"][-1]
    found = {one.scale: one for one in scaled_results(backbone, comparison.metrics)}
    assert set(found) == {0, 0.25, 0.5, 1}
    assert "caption_iou" not in found[0.5].gains
    assert found[0.5].means["caption_iou"] is None
    assert "retrieval_r1" in found[0.5].gains


def test_sentences_say_what_half_of_lora_keeps() -> None:
    comparison = scaled_comparison(scaled_backbone("a:b", gains={"caption_iou": 0.1, "retrieval_r1": -0.02}, noise=0))
    gain = 0.5**0.5 * 0.103 - 0.003
    cost = 0.5**0.5 * -0.017 - 0.003
    assert scale_sentences(comparison) == [
        f"a:b: LoRA scaled by 0.5 has a gain of {gain:+.3f} in Caption IoU ({gain / 0.1:.0%} of +0.100), "
        f"at retrieval R@1 {cost:+.3f} instead of -0.020."
    ]
    assert not scale_sentences(scaled_comparison(scaled_backbone("a:b", gains={"caption_iou": 0.001})))


def test_tables_charts_and_the_page_show_every_factor(tmp_path: Path) -> None:
    comparison = scaled_comparison()
    assert [metric.key for metric in cost_metrics(comparison)] == ["retrieval_r1"]
    columns, rows = scale_rows(comparison)
    assert [metric.key for metric in columns] == ["caption_iou", "retrieval_r1"]
    assert len(rows) == 5 * len(NAMES)
    text = markdown(comparison)
    assert "| open_clip:tiny | 0.5 | " + " | ".join(rows[2][2]) + " |" in text
    write_csv(tmp_path / "results.csv", comparison)
    with open(tmp_path / "results.csv", newline="") as file:
        sheet = [row for row in csv.DictReader(file) if row["arm"] == "after x 0.5"]
    assert len(sheet) == 3 * len(NAMES)
    assert float(sheet[0]["caption_iou"]) == comparison.backbones[0].scaled["0.5"][0]["caption_iou"]
    (chart,) = scale_charts(comparison)
    assert "siglip:tiny: x 0 " in chart.description
    assert tmp_path / "lora-scale.png" in draw_comparison_plots(tmp_path, comparison)
    write_comparison_report(tmp_path / "report.html", comparison)
    page = (tmp_path / "report.html").read_text()
    assert 'href="#lora-scale"' in page
    assert all(text in page for text in rows[7][2])
    assert "siglip:tiny, LoRA x 0.5" in page


def test_without_other_factors_nothing_is_shown(tmp_path: Path) -> None:
    comparison = make_comparison()
    assert scale_rows(comparison)[1] == []
    assert not scale_charts(comparison)
    assert "LoRA scaled" not in markdown(comparison)
    write_comparison_report(tmp_path / "report.html", comparison)
    assert "lora-scale" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "scales"),
    [
        ({}, SCALES),
        ({"rank": 0}, ()),
        ({"tune": False}, ()),
        ({"lora_scales": (1.0,)}, ()),
        ({"lora_scales": (2.0, 0.5, 1.0, 0.5)}, (0.5, 2.0)),
    ],
)
def test_the_factors_that_are_measured(options: dict[str, Any], scales: tuple[float, ...]) -> None:
    assert CompareOptions(("a:b",), **options).scales == scales


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_scales": (0.0,)}, "lora_scales must be above 0 .*, not 0"),
        ({"lora_scales": (float("nan"),)}, "lora_scales"),
        ({"lora_scales": (0.5,), "rank": 0}, "lora_scales needs LoRA: set rank above 0"),
    ],
)
def test_factors_that_cannot_be_used(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        CompareOptions(("a:b",), **options)


def test_factors_are_added_to_a_finished_comparison_from_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("emoji", reason="comparisons on scenes need the extra 'demo'")
    small: dict[str, Any] = {"steps": 2, "batch_size": 4, "limit": 8, "gallery": 0, "seeds": 2, "progress": False}
    compare("open_clip:tiny", out=tmp_path, lora_scales=(1.0,), **small)
    before = json.loads((tmp_path / "results.json").read_text())["backbones"]["open_clip:tiny"]
    assert before["scaled"] == {}
    from ttd_plugins.comparison.scene_data import SceneData

    def no_training(*arguments: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(SceneData, "tune", no_training)
    result = compare("open_clip:tiny", out=tmp_path, lora_scales=(0.5,), **small).backbones[0]
    after = json.loads((tmp_path / "results.json").read_text())["backbones"]["open_clip:tiny"]
    assert after["figures"] == before["figures"]
    assert len(result.scaled["0.5"]) == 2

    # An independent measurement of the stored weights.
    from ttd_plugins import TTD, load
    from ttd_plugins.backbone_sources import load_trained_weights
    from ttd_plugins.embedded.scenes import Scenes
    from ttd_plugins.evaluation.scene_protocol import measure_on_scenes
    from ttd_plugins.lora import scale_lora

    tuned = load_trained_weights(load("open_clip:tiny"), tmp_path / after["weights"]["after"][1])
    scale_lora(tuned, 0.5)
    side = tuned.description.image_size[0]
    expected = measure_on_scenes(TTD(tuned), list(Scenes("test", 8, side=side))).as_dict()
    assert result.scaled["0.5"][1]["caption_iou"] == pytest.approx(expected["caption_iou"], abs=1e-6)
    assert result.scaled["0.5"][1]["retrieval_r1"] == pytest.approx(expected["retrieval_r1"], abs=1e-6)
