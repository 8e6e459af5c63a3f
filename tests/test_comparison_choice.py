"""Which backbone a comparison picks, and what a backbone costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_comparison import NAMES, make_backbone, make_comparison
from toy_backbone import ToyAdapter, toy

from ttd_plugins.adapter import ImageFeatures
from ttd_plugins.comparison.choice import choose
from ttd_plugins.comparison.cost import BATCH, measure_cost
from ttd_plugins.comparison.results import BackboneResult, Comparison
from ttd_plugins.comparison.tables import markdown
from ttd_plugins.reports.comparison_choice import choice_view, cost_chart
from ttd_plugins.reports.comparison_html import write_comparison_report

MIB = 2**20


def comparison(*rows: tuple[str, float, float | None], seeds: int = 3, noise: float = 0.002) -> Comparison:
    """Backbones by name, with a gain of Caption IoU over one start, and images per second."""
    backbones = []
    for name, gain, speed in rows:
        backbone = make_backbone(name, {"caption_iou": gain}, seeds=seeds, noise=noise)
        if speed is not None:
            backbone.cost = {"images_per_second": speed, "memory_bytes": 3 * MIB, "batch": 8}
        backbones.append(backbone)
    return make_comparison([row[0] for row in rows], 0, backbones=backbones)


def test_a_clear_winner_is_chosen_whatever_it_costs() -> None:
    found = choose(comparison(("fast", 0.02, 900.0), ("good", 0.09, 100.0), ("slow", 0.01, 50.0)))
    assert found is not None
    assert (found.best, found.cheapest, found.chosen, found.tentative) == ("good", "fast", "good", False)
    assert found.sentences == (
        "Choice: good, with Caption IoU 0.633 ± 0.002 after TTD, at 100 images/s and 3 MiB; no backbone is better.",
        "Cheapest: fast, 900 images/s and 3 MiB, Caption IoU 0.563 ± 0.002, 0.070 ± 0.000 behind the best.",
    )


def test_a_faster_one_that_is_not_clearly_worse_is_chosen() -> None:
    close = comparison(("good", 0.09, 100.0), ("fast", 0.087, 250.0))
    found = choose(close)
    assert found is not None and (found.best, found.chosen, found.tentative) == ("good", "fast", True)
    assert (
        "it is 2.5 times as fast as the best, good, and not clearly worse (0.003 ± 0.000 behind)." in found.sentences[0]
    )
    assert found.sentences[0].startswith("Tentative choice: fast, with Caption IoU 0.630")
    assert found.sentences[1].startswith("Best after TTD: good, Caption IoU 0.633")
    assert "they may be equal" in found.sentences[-1]
    # Hardly faster is no reason.
    barely = choose(comparison(("good", 0.09, 100.0), ("fast", 0.087, 105.0)))
    assert barely is not None and barely.chosen == "good"


def test_a_difference_within_the_spread_of_the_seeds_is_not_clear() -> None:
    noisy = comparison(("good", 0.09, 100.0), ("fast", 0.08, 250.0), noise=0.0)
    rows = noisy.backbones[1].metrics["after"]
    for row, change in zip(rows, (-0.03, 0.0, 0.03), strict=True):
        row["caption_iou"] = (row["caption_iou"] or 0.0) + change
    found = choose(noisy)
    assert found is not None and found.chosen == "fast" and found.tentative
    assert "0.010 ± 0.030" in found.sentences[0]


def test_one_seed_is_tentative() -> None:
    found = choose(comparison(("good", 0.09, 100.0), ("fast", 0.02, 900.0), seeds=1))
    assert found is not None and found.tentative and found.chosen == "good"
    assert found.sentences[0].startswith("Tentative choice: good, with Caption IoU 0.633 after TTD")
    assert found.sentences[-1] == (
        "One seed was run, so it is not known by how much the seeds differ: the choice is tentative."
    )


def test_without_fine_tuning_the_backbones_as_loaded_are_judged() -> None:
    backbones = [make_backbone(name, arms=("before",), shift=shift) for name, shift in (("a", 0.0), ("b", 0.2))]
    found = choose(make_comparison(["a", "b"], 0, backbones=backbones))
    assert found is not None and found.arm == "before" and found.best == found.chosen == "b"
    assert found.cheapest is None and "as loaded" in found.sentences[0]
    assert found.sentences[-1] == "The cost of a, b was not measured." and not found.tentative


def test_a_metric_where_less_is_better() -> None:
    part = comparison(("a", 0.0, 100.0), ("b", 0.0, 50.0))
    for backbone, value in zip(part.backbones, (0.4, 0.2), strict=True):
        for row in backbone.metrics["after"]:
            row["caption_fpr"] = value
    found = choose(replace(part, trade_off=("caption_fpr", "retrieval_r1")))
    assert found is not None and found.metric.key == "caption_fpr" and found.chosen == "b"


@pytest.mark.parametrize(
    "part",
    [
        make_comparison(NAMES[:1], 0),
        make_comparison([], 0, backbones=[]),
        make_comparison(["a", "b"], 0, backbones=[BackboneResult("a"), BackboneResult("b")]),
        make_comparison(NAMES[:2], 0, metrics=()),
    ],
)
def test_without_two_measured_backbones_there_is_no_choice(part: Comparison) -> None:
    assert choose(part) is None and choice_view(part) is None and cost_chart(part) is None


# Reports -------------------------------------------------------------------------------------------------------------


def test_every_report_names_the_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ttd_plugins.cli.compare import print_summary
    from ttd_plugins.reports.comparison_plots import draw_comparison_plots

    part = comparison(("good", 0.09, 100.0), ("fast", 0.02, 900.0), ("<b>x</b>", 0.01, None))
    found = choose(part)
    assert found is not None
    text = markdown(part)
    assert "| good | 0.633 ± 0.002 | 100 | 3 MiB |" in text and "| <b>x</b> | 0.553 ± 0.002 | - | - |" in text
    assert all(f"- {sentence}" in text for sentence in found.sentences)
    print_summary(part, tmp_path)
    assert found.sentences[0] in " ".join(capsys.readouterr().out.split())
    write_comparison_report(tmp_path / "report.html", part)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<a href="#choice">Choice</a>' in page and "chosen, best" in page and "cheapest" in page
    assert "900 images/s" in page and "<b>x</b>" not in page and page.count("mark cost") >= 4
    (tmp_path / "plots").mkdir()
    assert tmp_path / "plots" / "cost.png" in draw_comparison_plots(tmp_path / "plots", part)
    json.dumps(found.as_dict())


def test_a_report_without_cost_has_the_table_alone(tmp_path: Path) -> None:
    part = comparison(("good", 0.09, None), ("fast", 0.02, None))
    write_comparison_report(tmp_path / "report.html", part)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Quality against speed" not in page and "The cost of fast, good was not measured." in page


# Cost ----------------------------------------------------------------------------------------------------------------


class Hungry(ToyAdapter):
    """Allocates a tensor of 64 MiB in every pass, frees it, and then one of 16 MiB."""

    def encode_image(self, pixels: torch.Tensor, *, pooled: bool = True) -> ImageFeatures:
        torch.ones(16 * MIB).sum()
        torch.ones(4 * MIB).sum()
        return super().encode_image(pixels, pooled=pooled)


def test_memory_is_weights_and_the_peak_of_one_pass() -> None:
    small, hungry = measure_cost(toy()), measure_cost(toy(kind=Hungry))
    weights = sum(p.numel() * p.element_size() for p in toy().model.parameters())
    assert small["batch"] == BATCH and small["images_per_second"] > 0
    assert weights < small["memory_bytes"] < 16 * MIB
    assert 64 * MIB < hungry["memory_bytes"] < 74 * MIB


def test_measuring_changes_nothing_of_a_backbone() -> None:
    backbone = toy(dropout=0.3).train()
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    measure_cost(backbone)
    assert backbone.training and all(p.grad is None for p in backbone.parameters())
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.state_dict().items())


def test_a_comparison_stores_cost_and_choice(tmp_path: Path) -> None:
    from ttd_plugins import compare

    options: dict[str, Any] = {"tune": False, "limit": 4, "gallery": 0, "progress": False}
    names = ["open_clip:tiny", "openai_clip:tiny"]
    found = compare(names, out=tmp_path, **options)
    content = json.loads((tmp_path / "results.json").read_text())
    assert [content["backbones"][name]["cost"] for name in names] == [one.cost for one in found.backbones]
    assert content["choice"]["chosen"] in names and content["choice"]["metric"] == "caption_iou"
    # A continued comparison keeps what was measured.
    again = compare(names, out=tmp_path, **options)
    assert [one.cost for one in again.backbones] == [one.cost for one in found.backbones]
