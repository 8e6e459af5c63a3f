"""PAMR against loops, and dense inference over scales, flips and windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import slow_reference as slow
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_backbone import PATCH, ToyAdapter, toy

from ttd_plugins.adapter import Calibration, ImageFeatures
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.dense_inference import (
    DenseOptions,
    activate,
    class_embeddings,
    dense_features,
    imagenet_templates,
    label_map,
    refine_maps,
    resize_maps,
    templates_by_name,
)
from ttd_plugins.evaluation.pamr import affinity, pamr
from ttd_plugins.method.text_embeddings import encode_texts

few = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


def slow_pamr(
    planes: list[list[list[float]]], picture: list[list[list[float]]], iterations: int, dilations: tuple[int, ...]
) -> list[list[list[float]]]:
    """The published formula, one pixel and one neighbour at a time."""
    height, width = len(picture[0]), len(picture[0][0])
    ring = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]

    def at(plane: list[list[float]], y: int, x: int) -> float:
        return plane[min(max(y, 0), height - 1)][min(max(x, 0), width - 1)]

    weights: dict[tuple[int, int], list[tuple[int, int, float]]] = {}
    for y in range(height):
        for x in range(width):
            kernel: list[tuple[int, int, float]] = []
            sigmas = []
            for plane in picture:
                values = [at(plane, y + d * dy, x + d * dx) for d in dilations for dy, dx in ring]
                mean = sum(values) / len(values)
                sigmas.append(math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)))
            for d in dilations:
                for dy, dx in ring:
                    if (dy, dx) != (0, 0):
                        distance = 0.0
                        for plane, sigma in zip(picture, sigmas, strict=True):
                            distance += abs(at(plane, y + d * dy, x + d * dx) - plane[y][x]) / (1e-8 + 0.1 * sigma)
                        kernel.append((d * dy, d * dx, -distance / len(picture)))
            top = max(k for _, _, k in kernel)
            total = sum(math.exp(k - top) for _, _, k in kernel)
            weights[y, x] = [(dy, dx, math.exp(k - top) / total) for dy, dx, k in kernel]
    for _ in range(iterations):
        planes = [
            [
                [sum(w * at(plane, y + dy, x + dx) for dy, dx, w in weights[y, x]) for x in range(width)]
                for y in range(height)
            ]
            for plane in planes
        ]
    return planes


@few
@given(st.integers(0, 2**31), st.integers(3, 7), st.integers(3, 7), st.sampled_from([(1,), (1, 2), (1, 4)]))
def test_pamr_agrees_with_loops(seed: int, height: int, width: int, dilations: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    planes, picture = rng.random((2, height, width)), rng.random((3, height, width))
    found = pamr(torch.from_numpy(planes), torch.from_numpy(picture), iterations=2, dilations=dilations)
    expected = slow_pamr(planes.tolist(), picture.tolist(), 2, dilations)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


def test_pamr_leaves_constant_planes_alone_on_any_picture() -> None:
    rng = np.random.default_rng(0)
    planes = torch.tensor([0.0, 0.4, 1.0])[:, None, None].expand(3, 12, 14)
    for picture in (torch.from_numpy(rng.random((3, 12, 14))), torch.full((3, 12, 14), 0.3)):
        torch.testing.assert_close(pamr(planes, picture), planes.contiguous(), atol=1e-5, rtol=0)


def test_a_constant_picture_weighs_all_neighbours_alike() -> None:
    weights = affinity(torch.full((3, 9, 9), 0.25))
    torch.testing.assert_close(weights, torch.full((48, 9, 9), 1 / 48))


def test_pamr_keeps_to_edges_and_commutes_with_a_mirror() -> None:
    picture = torch.zeros(3, 32, 32)
    picture[:, :, 16:] = 1
    plane = torch.zeros(1, 32, 32)
    plane[:, :, 12:] = 1  # four columns too far to the left
    noise = 0.02 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    refined = pamr(plane, picture + noise)
    assert float(refined[..., 24:].min()) > 0.95
    assert float(refined[..., 12:16].mean()) < 0.5 < float(refined[..., 16:20].mean())
    mirrored = pamr(plane.flip(-1), (picture + noise).flip(-1)).flip(-1)
    torch.testing.assert_close(refined, mirrored, atol=1e-5, rtol=0)


def test_pamr_refuses_another_size() -> None:
    with pytest.raises(ValueError, match="differ in size"):
        pamr(torch.zeros(1, 4, 4), torch.zeros(3, 4, 5))


# Templates ------------------------------------------------------------------------------------------------------------


def test_imagenet_has_eighty_templates_with_one_place() -> None:
    templates = imagenet_templates()
    assert len(templates) == len(set(templates)) == 80
    assert all(template.count("{}") == 1 for template in templates)
    assert {"a bad photo of a {}.", "itap of my {}.", "a tattoo of the {}."} <= set(templates)
    with pytest.raises(InputError, match="unknown templates 'imagnet'; did you mean 'imagenet'"):
        templates_by_name("imagnet")


def test_class_embeddings_are_normalised_means_of_normalised_texts() -> None:
    backbone = toy()
    found = class_embeddings(backbone, ["dog", "cat"], ["a {}", "{} here", "{}"], batch_size=2)
    for row, name in zip(found, ("dog", "cat"), strict=True):
        texts, _ = encode_texts(backbone, [f"a {name}", f"{name} here", name])
        expected = slow.unit([sum(column) / 3 for column in zip(*texts.tolist(), strict=True)])
        np.testing.assert_allclose(row.detach().numpy(), expected, atol=1e-6)
    assert class_embeddings(backbone, []).shape == (0, 5)


# Dense inference ------------------------------------------------------------------------------------------------------


def photograph(seed: int = 0, width: int = 40, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def texts_of(backbone: ToyAdapter) -> torch.Tensor:
    return class_embeddings(backbone, ["dog", "cat", "grass"]).detach()


class Symmetric(ToyAdapter):
    """A backbone that sees a picture and its mirror image alike."""

    def encode_image(self, pixels: torch.Tensor, *, pooled: bool = True) -> ImageFeatures:
        one, other = super().encode_image(pixels, pooled=True), super().encode_image(pixels.flip(-1), pooled=True)
        assert one.pooled is not None and other.pooled is not None
        return ImageFeatures(
            (one.patches + other.patches.flip(2)) / 2, (one.pooled + other.pooled) / 2 if pooled else None
        )


@pytest.mark.parametrize("resize", ["square", "short"])
@pytest.mark.parametrize("window", [None, 16])
def test_a_mirrored_picture_of_a_symmetric_backbone_has_mirrored_maps(resize: str, window: int | None) -> None:
    options = DenseOptions(size=32, resize=resize, scales=(1.0, 0.5, 1.5), flip=True, window=window, refine=True)
    backbone = toy(kind=Symmetric)
    # Symmetric by its flip alone too: averaging a view and its mirror image is what makes any backbone symmetric.
    for adapter in (backbone, toy(1)):
        found = []
        for picture in (photograph(), photograph().transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
            features = dense_features(adapter, picture, options, pooled=True)
            maps = features.maps(texts_of(adapter))
            found.append((maps, features.pooled, refine_maps(maps, features, options)))
        (maps, pooled, refined), (mirrored, pooled_too, refined_too) = found
        torch.testing.assert_close(mirrored.flip(-1), maps, atol=1e-5, rtol=0)
        torch.testing.assert_close(pooled, pooled_too, atol=1e-5, rtol=0)
        torch.testing.assert_close(refined_too.flip(-1), refined, atol=1e-4, rtol=0)


def test_one_view_is_the_plain_cosine_map() -> None:
    backbone = toy()
    picture = photograph()
    features = dense_features(backbone, picture, DenseOptions(size=16), pooled=True)
    seen = backbone.encode_image(backbone.dense_transform(16)(picture)[None])
    assert features.grid == (4, 4)
    texts = texts_of(backbone)
    for k, text in enumerate(texts.tolist()):
        for y in range(4):
            for x in range(4):
                expected = slow.dot(slow.unit(seen.patches[0, y, x].tolist()), text)
                assert float(features.maps(texts)[k, y, x]) == pytest.approx(expected, abs=1e-5)
    assert seen.pooled is not None
    np.testing.assert_allclose(features.pooled, slow.unit(seen.pooled[0].tolist()), atol=1e-6)
    pixels = np.asarray(picture.resize((16, 16), Image.Resampling.BILINEAR), np.float32) / 255
    assert (
        features.picture.shape == (3, 16, 16)
        and 0 <= float(features.picture.min()) <= float(features.picture.max()) <= 1
    )
    assert abs(float(features.picture.mean()) - float(pixels.mean())) < 0.02


def test_scales_are_averaged_on_the_finest_grid() -> None:
    backbone, picture, texts = toy(), photograph(), texts_of(toy())
    both = dense_features(backbone, picture, DenseOptions(size=16, scales=(1.0, 2.0)))
    assert both.grid == (8, 8)
    alone = [dense_features(backbone, picture, DenseOptions(size=side)).maps(texts) for side in (16, 32)]
    enlarged = [slow.upsample(one.tolist(), 8, 8) for one in alone[0]]
    np.testing.assert_allclose(both.maps(texts), (np.array(enlarged) + alone[1].numpy()) / 2, atol=1e-5)


def test_the_short_side_gets_the_size_and_the_long_one_keeps_the_aspect() -> None:
    backbone = toy()
    options = DenseOptions(size=16, resize="short")
    assert options.input_size(backbone, 40, 24) == (16, 28)  # 26.7 is nearest to seven patches of four
    assert options.input_size(backbone, 24, 40) == (28, 16)
    assert options.input_size(backbone, 40, 24, 0.1) == (PATCH, PATCH)
    assert DenseOptions(size=16).input_size(backbone, 40, 24, 1.5) == (24, 24)


def test_windows_cover_everything_and_overlaps_are_averaged() -> None:
    backbone, picture, texts = toy(), photograph(), texts_of(toy())
    # Patches of the toy see nothing beyond themselves, so that windows cannot matter.
    whole = dense_features(backbone, picture, DenseOptions(size=40)).maps(texts)
    backbone.forget()
    cut = dense_features(backbone, picture, DenseOptions(size=40, window=16, stride=8), pooled=True)
    torch.testing.assert_close(cut.maps(texts), whole, atol=1e-5, rtol=0)
    assert cut.pooled is not None
    # Sixteen windows, as one batch beside the whole picture.
    assert [shape for shape, _ in backbone.images] == [(1, 3, 40, 40), (16, 3, 16, 16)]
    with pytest.raises(InputError, match="leaves gaps"):
        dense_features(backbone, picture, DenseOptions(size=40, window=8, stride=16))


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_windows_are_batched_without_a_change(batch: int) -> None:
    backbone, picture, texts = toy(), photograph(), texts_of(toy())
    options = {"size": 40, "scales": (1.0, 0.5), "flip": True, "window": 16, "stride": 8}
    one_by_one = dense_features(backbone, picture, DenseOptions(**options, batch=2)).maps(texts)
    calls = len(backbone.images)
    backbone.forget()
    found = dense_features(backbone, picture, DenseOptions(**options, batch=batch)).maps(texts)
    torch.testing.assert_close(found, one_by_one, atol=1e-6, rtol=0)
    assert max(shape[0] for shape, _ in backbone.images) <= max(batch, 2)
    assert (len(backbone.images) < calls) == (batch > 3)


def test_activations() -> None:
    cosines = torch.tensor([[[0.1, 0.3], [0.2, 0.1]], [[0.5, 0.5], [0.5, 0.5]]])
    calibration = Calibration(10.0, -2.5)
    torch.testing.assert_close(activate(cosines, "probability", calibration), torch.sigmoid(10 * cosines - 2.5))
    scaled = activate(cosines, "minmax", calibration)
    torch.testing.assert_close(scaled[0], torch.tensor([[0.0, 1.0], [0.5, 0.0]]))
    assert not scaled[1].any()
    assert activate(cosines, "cosine", calibration) is cosines
    with pytest.raises(InputError, match="unknown activation"):
        activate(cosines, "softmax", calibration)  # type: ignore[arg-type]


@few
@given(st.integers(0, 2**31), st.integers(0, 9), st.integers(1, 4), st.booleans())
def test_label_map_agrees_with_a_search_over_all_names(seed: int, names: int, chunk: int, plane: bool) -> None:
    rng = np.random.default_rng(seed)
    maps, owner = torch.from_numpy(rng.random((names, 3, 4))).float(), torch.from_numpy(rng.integers(0, 5, names))
    found = label_map(maps, owner, (6, 5), background=0.6 if plane else None, background_class=7, chunk=chunk)
    enlarged = [slow.upsample(one.tolist(), 6, 5) for one in maps]
    for y in range(6):
        for x in range(5):
            best, label = (0.6 if plane else -math.inf), 7
            for one, number in zip(enlarged, owner.tolist(), strict=True):
                if one[y][x] > best + 1e-7:
                    best, label = one[y][x], number
            assert found[y, x] == label


def test_wrong_options_are_refused() -> None:
    for wrong in (
        {"size": 0},
        {"scales": ()},
        {"scales": (0.0,)},
        {"window": 0},
        {"batch": 0},
        {"iterations": 0},
        {"resize": "long"},
    ):
        with pytest.raises(InputError):
            DenseOptions(**wrong)  # type: ignore[arg-type]


def test_resizing_nothing_gives_nothing() -> None:
    assert resize_maps(torch.zeros(0, 2, 2), (5, 6)).shape == (0, 5, 6)
