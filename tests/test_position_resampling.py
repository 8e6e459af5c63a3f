"""Position embeddings at other grids: the published formulas, the option of every family, and protocols that use it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")
pytest.importorskip("transformers", reason="needs the extra 'siglip'")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ttd_plugins import load, wrap
from ttd_plugins.errors import InputError, UnsupportedModelError
from ttd_plugins.evaluation.dense_inference import dense_features
from ttd_plugins.evaluation.protocol_options import SEGMENT_PRESETS, TAG_PRESETS, TEXT_PRESETS, DenseOptions
from ttd_plugins.evaluation.protocols.runner import run_settings
from ttd_plugins.options import Resampling
from ttd_plugins.toolkit.position_embeddings import resampled_positions

VISION_TRANSFORMERS = ("openai_clip:tiny@random", "open_clip:tiny@random", "siglip:tiny@random", "eva_clip:tiny@random")


def cubic(distance: float, a: float = -0.75) -> float:
    """Weight of a sample at a distance, by the cubic convolution of Keys (1981) with torch's coefficient."""
    t = abs(distance)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def interpolation(before: int, after: int, extra: float) -> Tensor:
    """Matrix ``[after, before]`` of bicubic interpolation with the scale ``(after + extra) / before``."""
    matrix = torch.zeros(after, before, dtype=torch.float64)
    for row in range(after):
        centre = (row + 0.5) * before / (after + extra) - 0.5
        for sample in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[row, min(max(sample, 0), before - 1)] += cubic(centre - sample)
    return matrix


def by_formula(own: Tensor, source: tuple[int, int], grid: tuple[int, int], prefix: int, extra: float) -> Tensor:
    weights = torch.kron(interpolation(source[0], grid[0], extra), interpolation(source[1], grid[1], extra))
    return torch.cat([own[:prefix], weights @ own[prefix:]])


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(2, 9), st.integers(2, 9)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.integers(0, 2),
    st.sampled_from([("dino", 0.1), ("bicubic", 0.0)]),
)
def test_resampling_equals_the_published_formula(
    source: tuple[int, int], grid: tuple[int, int], prefix: int, method: tuple[Any, float]
) -> None:
    own = torch.randn(prefix + math.prod(source), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = resampled_positions(own, source, grid, prefix=prefix, method=method[0])
    if grid == source:
        assert found is own
    else:
        torch.testing.assert_close(found, by_formula(own, source, grid, prefix, method[1]), atol=1e-10, rtol=0)


def test_the_three_methods_differ_at_other_grids_only() -> None:
    own = torch.randn(1 + 7 * 7, 4)
    for grid in ((5, 9), (14, 14)):
        found = [resampled_positions(own, (7, 7), grid, prefix=1, method=m) for m in get_args(Resampling)]
        assert not any(torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(found, 2))
        assert all(torch.equal(one[:1], own[:1]) for one in found)
    assert all(resampled_positions(own, (7, 7), (7, 7), prefix=1, method=m) is own for m in get_args(Resampling))


# The option ----------------------------------------------------------------------------------------------------------


def pixels(adapter: Any, rows: int, columns: int) -> Tensor:
    height, width = adapter.description.patch_size
    return torch.randn(1, 3, rows * height, columns * width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", VISION_TRANSFORMERS)
def test_every_family_of_vision_transformers_takes_the_option(name: str) -> None:
    torch.manual_seed(0)
    adapter = load(name, positions="dino")
    assert adapter.description.positions == adapter.positions == "dino"
    rows, columns = adapter.patch_grid(*adapter.description.image_size)
    own, other = pixels(adapter, rows, columns), pixels(adapter, rows + 3, columns - 1)
    with torch.no_grad():
        dino = [adapter.encode_image(images) for images in (own, other)]
        adapter.positions = "library"
        library = [adapter.encode_image(images) for images in (own, other)]
    assert torch.equal(dino[0].patches, library[0].patches) and torch.equal(dino[0].pooled, library[0].pooled)
    assert not torch.allclose(dino[1].patches, library[1].patches, atol=1e-5)
    with pytest.raises(InputError, match="resampling of positions"):
        adapter.positions = "nearest"


def test_features_are_those_of_a_model_whose_table_was_resampled_by_the_formula() -> None:
    """The library itself computes the pooled embedding of a model of the other size, whose table is the formula's."""
    from helpers_open_clip import tiny_clip

    model = tiny_clip()
    table = model.visual.positional_embedding.detach().double()
    large: Any = tiny_clip(vision={"image_size": 56})
    with torch.no_grad():
        state = model.state_dict()
        state["visual.positional_embedding"] = by_formula(table, (4, 4), (7, 7), 1, 0.1).float()
        large.load_state_dict(state)
        images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
        features = wrap(model, positions="dino").encode_image(images)
        torch.testing.assert_close(features.pooled, large.encode_image(images), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(features.patches, wrap(large).encode_image(images).patches, atol=1e-5, rtol=1e-4)


def test_a_tower_without_position_embeddings_refuses_the_option() -> None:
    with pytest.raises(UnsupportedModelError, match="no position embeddings"):
        load("open_clip:photo@random", positions="dino")


# The protocols -------------------------------------------------------------------------------------------------------


def test_presets_for_published_numbers_resample_as_their_code_does() -> None:
    assert TAG_PRESETS["paper"].dense.positions == "dino"
    assert TEXT_PRESETS["paper"].dense.positions == "dino"
    found = {name: preset.dense.positions for name, preset in SEGMENT_PRESETS.items()}
    assert found == {"paper": "dino", "tcl": "bicubic", "naclip": "dino", "fast": None}
    assert DenseOptions().positions is None


def test_dense_inference_resamples_as_its_options_say_and_restores_the_adapter() -> None:
    adapter = load("open_clip:tiny@random")
    image = Image.effect_noise((96, 64), 80).convert("RGB")
    options = DenseOptions(size=96)
    found = {
        positions: dense_features(adapter, image, replace(options, positions=positions)).patches[0][0]
        for positions in (None, "library", "dino")
    }
    assert torch.equal(found[None], found["library"]) and not torch.allclose(found[None], found["dino"], atol=1e-4)
    assert adapter.positions == "library"
    adapter.positions = "dino"
    assert torch.equal(dense_features(adapter, image, options).patches[0][0], found["dino"])
    back = dense_features(adapter, image, replace(options, positions="library"))
    assert torch.equal(back.patches[0][0], found["library"]) and adapter.positions == "dino"


def test_settings_of_results_state_the_resampling_in_use() -> None:
    adapter = load("open_clip:tiny@random")
    calibration = adapter.description.calibration
    dino = run_settings("segment", adapter, SEGMENT_PRESETS["paper"], calibration, {})
    assert dino["options"]["dense"]["positions"] == dino["backbone"]["positions"] == "dino"
    # Folders of earlier results have no such keys, and are those of the default.
    fast = run_settings("segment", adapter, SEGMENT_PRESETS["fast"], calibration, {})
    assert fast["options"]["dense"]["positions"] is None and "positions" not in fast["backbone"]
    photo = load("open_clip:photo@random")
    without = run_settings("segment", photo, SEGMENT_PRESETS["paper"], calibration, {})
    assert "positions" not in without["backbone"]


def test_the_command_has_the_option_and_its_results_state_it(tmp_path: Path) -> None:
    import numpy as np
    from typer.testing import CliRunner

    from ttd_plugins import cli

    for name in ("images", "semantic_masks"):
        (tmp_path / name).mkdir()
    Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / "images" / "1.jpg")
    Image.fromarray(np.full((64, 64), 17, np.uint8)).save(tmp_path / "semantic_masks" / "1.png")
    (tmp_path / "categories.json").write_text(json.dumps([{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]))
    arguments = ["eval", "segment", str(tmp_path), "--data", "coco_panoptic", "--backbone", "open_clip:tiny@random"]
    arguments += ["--preset", "fast", "--size", "96", "--positions", "dino", "--json"]
    answer = CliRunner().invoke(cli.app, arguments)
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)["settings"]
    assert found["backbone"]["positions"] == found["options"]["dense"]["positions"] == "dino"
    assert "--positions" in CliRunner().invoke(cli.app, ["eval", "segment", "--help"], env={"COLUMNS": "200"}).output
