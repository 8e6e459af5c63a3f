"""What a caption names, and which of its words are true tags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ttd_plugins.evaluation.datasets import SEGMENTATION
from ttd_plugins.evaluation.true_tags import (
    caption_words,
    coco_vocabulary,
    label_candidates,
    mentions_of_tags,
    plain_name,
)

TABLE = Path(__file__).resolve().parents[1] / "ttd_plugins" / "evaluation" / "coco_synonyms.json"


def named(caption: str) -> dict[str, tuple[str, ...]]:
    return {mention.text: mention.classes for mention in coco_vocabulary().mentions(caption)}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man and two women with their children", {"man": "person", "women": "person", "children": "person"}),
        ("the boy's puppies", {"boy": "person", "puppies": "dog"}),
        ("A TRAFFIC LIGHT at night", {"traffic light": "traffic light"}),
        ("Teddy bears on a couch", {"teddy bears": "teddy bear", "couch": "couch"}),
        ("hot dogs and knives", {"hot dogs": "hot dog", "knives": "knife"}),
        ("geese by the buses", {"geese": "bird", "buses": "bus"}),
        ("a cell-phone near a t-shirt", {"cell phone": "cell phone"}),
        ("sheep, a giraffe; zebras!", {"sheep": "sheep", "giraffe": "giraffe", "zebras": "zebra"}),
        ("a wine glass on the dining table", {"wine glass": "wine glass", "dining table": "dining table"}),
        ("motorbikes and an aeroplane", {"motorbikes": "motorcycle", "aeroplane": "airplane"}),
        ("a television over the fridge", {"television": "tv", "fridge": "refrigerator"}),
    ],
)
def test_classes_are_named_by_synonyms_plurals_and_several_words(caption: str, expected: dict[str, str]) -> None:
    found = named(caption)
    assert {text: classes[0] for text, classes in found.items()} == expected
    assert all(len(classes) == 1 for classes in found.values())


@pytest.mark.parametrize(
    "caption",
    ["a light blue sky-high thing", "some orange juice", "a tennis match", "the train station", "a remote control car"],
)
def test_words_that_mean_something_else_name_nothing_of_it(caption: str) -> None:
    wrong = {"light", "orange", "sports ball", "tennis racket", "train", "remote", "car"}
    assert not wrong & {name for classes in named(caption).values() for name in classes}


def test_the_longest_phrase_counts_and_hides_what_lies_inside() -> None:
    assert set(named("a fire truck by a stop sign near a parking meter")) == {
        "fire truck",
        "stop sign",
        "parking meter",
    }
    assert named("a fire truck") == {"fire truck": ("truck",)}


def test_words_of_several_classes_may_name_any() -> None:
    assert set(named("an animal")["animal"]) >= {"dog", "cat", "zebra"}
    assert set(named("tables")["tables"]) == {"dining table", "table-merged"}
    assert named("walls")["walls"] == named("wall")["wall"]


def test_every_coco_class_can_be_named_by_its_own_name() -> None:
    classes = [names.name for names in SEGMENTATION["coco_panoptic"].classes]
    assert coco_vocabulary().classes == set(classes) and len(classes) == 133
    for name in classes:
        assert name in {c for own in named(f"a photo of the {plain_name(name)}").values() for c in own}, name
    things = [names.name for names in SEGMENTATION["coco_object"].classes[1:]]
    assert len(things) == 80 and set(things) <= set(classes)


def test_the_table_is_tidy() -> None:
    table = json.loads(TABLE.read_text())
    seen: dict[str, str] = {}
    for name, phrases in table["classes"].items():
        for phrase in phrases:
            assert phrase == phrase.lower().strip() and phrase not in table["not"], phrase
            assert phrase not in table["several"], f"{phrase} is said twice"
            assert seen.setdefault(phrase, name) == name, f"{phrase} names {name} and {seen[phrase]}"
    for classes in table["several"].values():
        assert set(classes) <= set(table["classes"])


def test_words_of_captions() -> None:
    assert caption_words("A dog's T-shirt, NAÏVE café’s") == ["a", "dog", "t", "shirt", "naïve", "café"]


def test_candidates_are_labelled_by_what_they_name() -> None:
    caption = "a baseball player and a traffic light near a bench"
    mentions = coco_vocabulary().mentions(caption)
    assert [mention.text for mention in mentions] == ["baseball player", "traffic light", "bench"]
    candidates = [
        "baseball",
        "player",
        "baseball player",
        "traffic",
        "light",
        "traffic light",
        "bench",
        "near",
        "absent",
    ]
    labels = label_candidates(caption, candidates, mentions, [True, False, None])
    assert labels == [None, True, True, False, False, False, None, False, False]
    # A compound is named by the noun that it ends with, and not by one that it begins with.
    mentions = mentions_of_tags("a tall woman photographer", ["woman"])
    assert label_candidates("a tall woman photographer", ["tall woman", "woman photographer"], mentions, [True]) == [
        True,
        False,
    ]


def test_a_candidate_is_true_if_any_of_its_places_is() -> None:
    caption = "an orange cat beside an orange"
    mentions = coco_vocabulary().mentions(caption)
    assert [mention.text for mention in mentions] == ["orange cat", "orange"]
    assert label_candidates(caption, ["orange", "cat"], mentions, [False, True]) == [True, False]


def test_tags_are_found_in_their_caption_however_spelt() -> None:
    found = mentions_of_tags("Two Ice-Creams, one ice cream!", ["ice cream", "spoon"])
    assert [(m.start, m.end, m.classes) for m in found] == [(4, 6, ("ice cream",))]
