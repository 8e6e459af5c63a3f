"""The bounds of scenes: an observer that knows every picture, against cases that can be worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from helpers_examples import example

from ttd_plugins.embedded.scenes import NOUNS, Scene


@pytest.fixture(scope="module")
def program() -> Any:
    return example("scene_limits")


def scene(true: tuple[str, ...], absent: tuple[str, ...] = (), *, caption: str | None = None) -> Scene:
    """Two squares of 16 pixels, left and right of the middle, in a picture of 64; the left one is the first tag's."""
    masks = {}
    for column, tag in zip((8, 40), true, strict=False):
        mask = np.zeros((64, 64), bool)
        mask[24:40, column : column + 16] = True
        masks[tag] = mask
    return Scene(np.zeros((64, 64, 3), np.uint8), caption or " ".join((*true, *absent)), masks, true, absent)


def test_log_odds_are_counted_as_their_formula_says(program: Any) -> None:
    scenes = [scene(("dog", "cat"), ("owl",)), scene(("dog",), ("cat",)), scene(("kite",))]
    odds = program.log_odds(scenes)
    assert odds["dog"] == pytest.approx(math.log(2.5 / 3) - math.log(0.5 / 2))
    assert odds["cat"] == pytest.approx(math.log(1.5 / 2) - math.log(1.5 / 3))
    assert odds["owl"] == pytest.approx(math.log(0.5 / 1) - math.log(1.5 / 4))
    assert set(odds) == set(NOUNS)


def test_a_map_of_patches_is_the_weighted_share_of_each_noun(program: Any) -> None:
    found = program.caption_map(scene(("dog", "cat")), {"dog": 4.0, "cat": 1.0})
    expected = np.zeros((8, 8))
    expected[3:5, 1:3], expected[3:5, 5:7] = 1.0, 0.25
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_weights_are_the_balance_of_pixels_and_even_ones_are_even(program: Any) -> None:
    scenes = [scene(("dog", "cat")), scene(("kite", "owl"))]
    uneven = program.limits(scenes, {"dog": 4.0, "cat": 1.0, "kite": 2.0, "owl": 1.0}, patch=1)
    assert uneven.tag_balance == pytest.approx((0.25 + 0.5) / 2)
    assert uneven.caption_iou == pytest.approx((0.5 + 1.0) / 2), "a quarter is below the threshold, one half is not"
    even = program.limits(scenes, dict.fromkeys(NOUNS, 1.0), patch=1)
    assert (even.tag_balance, even.caption_iou, even.retrieval_r1) == (1.0, 1.0, 1.0)


def test_retrieval_counts_identical_captions_as_right_and_ties_by_chance(program: Any) -> None:
    even = dict.fromkeys(NOUNS, 1.0)
    same = [scene(("dog",), caption="dog") for _ in range(4)]
    assert program.retrieval(same, even) == 1.0
    blind = [scene(("dog",), caption=f"dog {number}") for number in range(8)]
    found = [program.retrieval(blind, even, seed) for seed in range(40)]
    assert 0.05 < np.mean(found) < 0.25 and len(set(found)) > 1


def test_the_table_is_printed_for_either_split(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("resvg_py", reason="needs the extra 'demo'")
    found = program.main(["--split", "test", "--scenes", "12", "--counted", "40"])
    assert "tag balance" in capsys.readouterr().out
    assert 0 < found["likely"].tag_balance <= found["even"].tag_balance <= 1
