"""Figures over scenes agree with loops over single pictures, single words and single pixels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import slow_reference as slow
import torch
from mutants import assert_caught, mutant
from toy_backbone import MEAN, SIDE, STD, ToyAdapter, toy

from ttd_plugins.embedded.scenes import NOUNS, Scene, kind_of_noun
from ttd_plugins.engine import TTD
from ttd_plugins.evaluation import scene_protocol as measuring
from ttd_plugins.evaluation.scene_protocol import SceneMetrics, measure_on_scenes, scene_pixels

# Words that name nothing are candidates too. The caption that comes twice has none: equal scores of one tag differ in
# their last bit with the batch that they come from, and then a tie is none.
NAMES: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("a photo of a dog on grass", ("dog", "grass"), ()),
    ("A photo of a dog on grass", ("dog", "grass"), ()),
    ("dog, cat and kite near water", ("dog", "kite", "water"), ("cat",)),
    ("kite", ("kite",), ()),
    ("it is there", ("kite",), ()),
    ("it is there", ("kite", "cat"), ()),
    ("lovely owl with a dog", ("owl",), ("dog",)),
    ("water and snow and an owl for sale", ("snow", "owl"), ("water",)),
]


def make_scenes(seed: int = 0) -> list[Scene]:
    """Noise with blocks of noise of another colour as objects; one object is pictured and never named."""
    rng = np.random.default_rng(seed)
    scenes = []
    for caption, true, absent in NAMES:
        image = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        masks = {}
        for noun in (*true, "umbrella"):
            mask = np.zeros((SIDE, SIDE), bool)
            top, left = rng.integers(0, SIDE - 5, 2)
            mask[top : top + rng.integers(3, 12), left : left + rng.integers(3, 12)] = True
            image[mask] = (image[mask] // 4 + rng.integers(0, 192, 3)).astype(np.uint8)
            masks[noun] = mask
        scenes.append(Scene(image, caption, masks, true, absent))
    return scenes


@torch.no_grad()
def measured_slowly(ttd: TTD, scenes: list[Scene]) -> dict[str, Any]:
    """Every figure by its definition: one picture, one text, one pixel at a time."""
    backbone, options = ttd.backbone, ttd.options
    assert isinstance(backbone, ToyAdapter)

    def text(one: str) -> list[float]:
        return slow.unit(backbone.encode_text(backbone.tokenize([one]).ids)[0].tolist())

    pictures: list[list[list[float]]] = []
    wholes: list[list[float]] = []
    for scene in scenes:
        pixels = torch.tensor(
            [
                [[(scene.image[y, x, c] / 255 - MEAN[c]) / STD[c] for x in range(SIDE)] for y in range(SIDE)]
                for c in range(3)
            ]
        )
        seen = backbone.encode_image(pixels[None])
        pictures.append([slow.unit(patch) for patch in seen.patches[0].flatten(0, 1).tolist()])
        assert seen.pooled is not None
        wholes.append(slow.unit(seen.pooled[0].tolist()))

    def enlarged(values: list[float]) -> list[list[float]]:
        side = SIDE // 4
        rows = [values[row * side : (row + 1) * side] for row in range(side)]
        return slow.upsample(rows, SIDE, SIDE)

    def nearest(patches: list[list[float]], word: list[float]) -> float:
        return max(slow.dot(patch, word) for patch in patches)

    pooled: dict[str, list[Any]] = {name: [] for name in ("pixel", "blind", "image", "text", "label", "selected")}
    caption_ious, tag_ious, balances, spreads = [], [], [], []
    in_tag: dict[str, list[float]] = {}
    nouns = {noun: text(options.template.replace("{}", noun)) for noun in NOUNS}
    zero_shots: list[float] = []
    for scene, patches, whole in zip(scenes, pictures, wholes, strict=True):
        best = max(nouns, key=lambda noun: slow.dot(whole, nouns[noun]))
        zero_shots.append(float(best in scene.masks))
        caption = text(scene.caption)
        (tags,) = ttd.extractor([scene.caption])
        words = [text(options.template.replace("{}", tag)) for tag in tags]
        scores = {
            "pixel": [nearest(patches, word) for word in words],
            "image": [slow.dot(whole, word) for word in words],
            "text": [slow.dot(caption, word) for word in words],
            "blind": [sum(nearest(other, word) for other in pictures) / len(pictures) for word in words],
        }
        for name, values in scores.items():
            pooled[name] += values
        pooled["label"] += [tag in scene.true_tags for tag in tags]
        calibration = ttd.calibration
        pooled["selected"] += slow.select(
            scores[options.score], options.rule, options.threshold, calibration.scale, calibration.shift
        )
        caption_map = [slow.dot(patch, caption) for patch in patches]
        spreads.append(max(caption_map) - min(caption_map))
        heat = enlarged(slow.minmax(caption_map, constant=0.0))
        region = [[any(scene.masks[t][y, x] for t in scene.true_tags) for x in range(SIDE)] for y in range(SIDE)]
        caption_ious.append(slow.iou([[value > 0.40 for value in line] for line in heat], region))
        means = [slow.mean_inside(heat, scene.masks[tag].tolist()) for tag in scene.true_tags]
        if len(means) > 1:
            balances.append(min(means) / max(means))
        for tag, mean in zip(scene.true_tags, means, strict=True):
            in_tag.setdefault(kind_of_noun(tag), []).append(mean)
        for tag, word in zip(tags, words, strict=True):
            if tag in scene.true_tags:
                tag_heat = enlarged(slow.minmax([slow.dot(patch, word) for patch in patches], constant=0.0))
                tag_ious.append(
                    slow.iou([[value > 0.50 for value in line] for line in tag_heat], scene.masks[tag].tolist())
                )

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    right = sum(s and t for s, t in zip(pooled["selected"], pooled["label"], strict=True))
    captions = [scene.caption for scene in scenes]
    return {
        "tag_ap": slow.average_precision(pooled["pixel"], pooled["label"]),
        "tag_ap_blind": slow.average_precision(pooled["blind"], pooled["label"]),
        "tag_ap_image": slow.average_precision(pooled["image"], pooled["label"]),
        "tag_ap_text": slow.average_precision(pooled["text"], pooled["label"]),
        "tag_f1": 2 * right / (sum(pooled["selected"]) + sum(pooled["label"])),
        "caption_iou": mean(caption_ious),
        "tag_iou": mean(tag_ious),
        "tag_balance": mean(balances),
        "retrieval_r1": slow.retrieval(wholes, [text(caption) for caption in captions], captions),
        "zero_shot_top1": mean(zero_shots),
        "caption_map_in_tag": {kind: mean(values) for kind, values in in_tag.items()},
        "caption_map_spread": mean(spreads),
        "selected_per_caption": sum(pooled["selected"]) / len(scenes),
        "true_per_caption": sum(len(scene.true_tags) for scene in scenes) / len(scenes),
        "scenes": len(scenes),
    }


def check_measurement(seed: int = 0, batch_size: int = 3, **options: Any) -> None:
    ttd, scenes = TTD(toy(seed, dtype=torch.float64), threshold=0.4137, **options), make_scenes(seed)
    found = measure_on_scenes(ttd, scenes, batch_size=batch_size).as_dict()
    expected = measured_slowly(ttd, scenes)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert found[name] == pytest.approx(value, rel=1e-5), name
        else:
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize(
    "options",
    [{}, {"score": "image"}, {"score": "text", "rule": "probability"}, {"rule": "absolute", "template": "a {} there"}],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_figure_agrees_with_its_loop(options: dict[str, Any], seed: int) -> None:
    check_measurement(seed, **options)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("_measure_batch", "alignment.tag_maps.amax(-1)", "alignment.tag_maps.mean(-1)"),
        ("_measure_batch", "scene_truth(scene).labels(tags)", "[not tag for tag in tags]"),
        ("_measure_batch", "targets.selected.tolist()", "(~targets.selected).tolist()"),
        ("_measure_maps", "heat > CAPTION_MAP_THRESHOLD", "heat > TAG_MAP_THRESHOLD"),
        ("_measure_maps", "scene.named_region", "next(iter(scene.masks.values()))"),
        ("_measure_maps", "heat > TAG_MAP_THRESHOLD", "heat > CAPTION_MAP_THRESHOLD"),
        ("_measure_maps", "position += len(tags)", "position += 0"),
        ("_measure_maps", "tag_balance(heat, masks)", "tag_balance(heat, masks[:1])"),
        ("_image_blind_scores", "amax(-1)", "mean(-1)"),
        ("_shown", "noun in scene.masks", "noun not in scene.masks"),
    ],
)
def test_a_broken_figure_is_noticed(name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        for seed in range(3):
            check_measurement(seed)

    monkeypatch.setattr(measuring, name, mutant(getattr(measuring, name), old, new))
    assert_caught(check)


def test_the_figures_do_not_depend_on_how_scenes_are_batched() -> None:
    ttd, scenes = TTD(toy(4, dtype=torch.float64)), make_scenes(4)
    one, all_at_once = (measure_on_scenes(ttd, scenes, batch_size=size).as_dict() for size in (1, 64))
    in_tag = one.pop("caption_map_in_tag"), all_at_once.pop("caption_map_in_tag")
    assert one == pytest.approx(all_at_once, rel=1e-6)
    assert in_tag[0] == pytest.approx(in_tag[1], rel=1e-6)


def test_progress_is_told_and_the_mode_comes_back() -> None:
    scenes = make_scenes()
    for training in (False, True):
        ttd = TTD(toy(dropout=0.5)).train(training)
        done: list[int] = []
        first = measure_on_scenes(ttd, scenes, batch_size=3, progress=done.append)
        assert done == [3, 3, 2]
        assert [module.training for module in ttd.modules()] == [training] * len(list(ttd.modules()))
        # Dropout is off while measuring.
        assert measure_on_scenes(ttd, scenes, batch_size=3) == first


def test_nothing_is_trained_while_measuring() -> None:
    ttd = TTD(toy())
    before = [p.detach().clone() for p in ttd.parameters()]
    measure_on_scenes(ttd, make_scenes())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, ttd.parameters(), strict=True))
    assert ttd.backbone._originals is None


def test_the_figures_are_json() -> None:
    import json

    metrics = measure_on_scenes(TTD(toy()), make_scenes())
    assert SceneMetrics(**json.loads(json.dumps(metrics.as_dict()))) == metrics


def test_pixels_are_normalised_as_the_backbone_wants() -> None:
    scene = make_scenes()[0]
    pixels = scene_pixels([scene, scene], toy())
    assert pixels.shape == (2, 3, SIDE, SIDE)
    assert pixels.dtype == torch.float32
    for y, x, channel in ((0, 0, 0), (3, 7, 1), (SIDE - 1, 2, 2)):
        expected = (int(scene.image[y, x, channel]) / 255 - MEAN[channel]) / STD[channel]
        assert math.isclose(pixels[1, channel, y, x].item(), expected, rel_tol=1e-5, abs_tol=1e-6)
