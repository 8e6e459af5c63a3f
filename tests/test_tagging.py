"""Tags of a vocabulary: `find_tags`, `tag_folder`, `ttd tags --vocabulary`; and the forms of a vocabulary."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeFamily, FakePlugin
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_backbone import toy
from typer.testing import CliRunner

import ttd_plugins.tagging as module
from ttd_plugins import TTD, cli, find_tags
from ttd_plugins.errors import InputError, InputWarning, TTDError
from ttd_plugins.evaluation.vocabulary import BUILT_IN, read_vocabulary
from ttd_plugins.plugins import temporary_plugin
from ttd_plugins.tagging import Tagger, tag_folder

NAMES = ["dog", "grass", "sky", "cat", "umbrella", "car"]


def photo(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 40, 3), np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "photos"
    (place / "trip").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "trip/c.png")):
        photo(number).save(place / name)
    return place


# Vocabularies --------------------------------------------------------------------------------------------------------


def names_of(found: Any) -> list[tuple[str, tuple[str, ...]]]:
    return [(one.name, one.texts) for one in found]


DOG_GRASS = [("dog", ("dog", "puppy")), ("grass", ("grass",))]


@pytest.mark.parametrize(
    "names",
    [
        "dog|puppy, grass",
        " dog | puppy ;grass, ",
        ["dog", "grass", ["dog", "puppy"]],
        [{"name": "dog", "aliases": ["puppy"]}, {"name": "grass", "id": 3}],
        {"dog": ["puppy"], "grass": []},
        {"dog": "puppy", "grass": 7},
        {"categories": [{"name": "dog", "synonyms": "puppy"}, "grass"]},
        {"0": ["dog", "puppy"], "1": "grass"},
    ],
)
def test_a_vocabulary_has_many_forms(names: Any, tmp_path: Path) -> None:
    assert names_of(read_vocabulary(names)) == DOG_GRASS
    if not isinstance(names, str):
        file = tmp_path / "names.json"
        file.write_text(json.dumps(names))
        assert names_of(read_vocabulary(file)) == names_of(read_vocabulary(str(file))) == DOG_GRASS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"# comment\ndog, puppy\n\ngrass\n"),
        ("a.txt", "\ufeffdog|puppy\r\ngrass\r\n".encode()),
        ("a.txt", "dog, puppy\ngrass\n".encode("utf-16")),
        ("a.tsv", b"dog\tpuppy\ngrass\t\n"),
        ("a.csv", b"dog,puppy\ngrass,\n"),
        ("names", b"dog, puppy\ngrass\n"),
        ("one.txt", b"dog|puppy, grass"),
        ("classes.csv", b"id,name,aliases,colour\n1,dog,puppy,#ff0000\n2,grass,,#00ff00\n255,void,,\n"),
        ("classes.txt", b"1: dog, puppy\n2: grass\n"),
    ],
)
def test_a_vocabulary_file_has_a_class_a_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert names_of(read_vocabulary(tmp_path / name)) == DOG_GRASS


def test_underscores_are_spaces_in_texts() -> None:
    assert names_of(read_vocabulary("dining_table, _")) == [("dining_table", ("dining table",))]


def test_built_in_lists_have_plain_names() -> None:
    sizes = {name: len(read_vocabulary(name)) for name in BUILT_IN}
    assert sizes["coco_panoptic"] == 133 and sizes["ade20k"] == 150 and min(sizes.values()) >= 19
    names = [one.name for one in read_vocabulary("coco_panoptic")]
    assert "mountain" in names and len(set(names)) == 133


def test_an_alias_of_two_classes_warns() -> None:
    with pytest.warns(InputWarning, match="'bat' is a name of the classes 'animal' and 'club'; the first of them wins"):
        read_vocabulary({"animal": ["bat"], "club": ["bat"]})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "contains no names"),
        (["dog", 3], "contains 3, which is no name"),
        (7, "must be a list of names, not int"),
        ({"dog": {"a": 1}}, "aliases that are no list"),
        ("missing.txt", "the file 'missing.txt' does not exist"),
    ],
)
def test_other_vocabularies_are_refused(names: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_vocabulary(names)


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.none() | st.text(max_size=5) | st.integers(), lambda one: st.lists(one, max_size=3)
                    | st.dictionaries(st.text(max_size=3), one, max_size=3), max_leaves=6))  # fmt: skip
@pytest.mark.filterwarnings("ignore::ttd_plugins.errors.InputWarning")
def test_any_json_is_a_vocabulary_or_refused_in_one_sentence(content: Any) -> None:
    if isinstance(content, str):
        return
    try:
        found = read_vocabulary(content)
    except InputError as error:
        message = str(error)
    else:
        message = ""
        assert found and all(
            one.texts and one.texts[0] == " ".join(one.name.replace("_", " ").split()) for one in found
        )
    assert "\n" not in message


# Scores --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["minmax", "absolute", "probability"])
def test_scores_are_the_pixel_scores_of_the_engine(monkeypatch: pytest.MonkeyPatch, rule: Any) -> None:
    monkeypatch.setattr(module, "CHUNK_VALUES", 1)  # one map at a time
    adapter, image = toy(), photo()
    found = find_tags(adapter, image, NAMES, rule=rule, threshold=0.4, templates="none", top=None)
    expected = TTD(adapter, rule=rule, threshold=0.4).maps(image, "a caption", tags=NAMES)
    assert list(found.names) == NAMES
    assert np.allclose(found.scores, expected.scores, atol=1e-6)
    assert np.allclose(found.probabilities, expected.probabilities, atol=1e-6)
    assert (found.selected == expected.selected).all()


def test_an_alias_counts_for_its_class_and_top_limits() -> None:
    adapter, image = toy(), photo()
    single = find_tags(adapter, image, NAMES, templates="none", top=None)
    joint = find_tags(adapter, image, [["animal", "dog", "cat"], "grass"], templates="none", top=None)
    animal = find_tags(adapter, image, ["animal"], templates="none").scores[0]
    assert joint.scores[0] == pytest.approx(max(animal, single.scores[0], single.scores[3]), abs=1e-6)
    best = find_tags(adapter, image, NAMES, rule="absolute", threshold=-1, templates="none", top=2)
    assert best.tags == [NAMES[i] for i in np.argsort(-single.scores)[:2]]
    assert [row["tag"] for row in best.rows()] == best.tags and "2 of 6 names" in repr(best)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, "unknown rule 'best'"),
        ({"threshold": 2.0}, "threshold must be at least 0"),
        ({"threshold": float("nan")}, "finite"),
        ({"top": 0}, "top must be a whole number of 1 or more"),
        ({"templates": "prose"}, "unknown templates 'prose'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_tags(toy(), photo(), NAMES, **options)


# Folders -------------------------------------------------------------------------------------------------------------


def rows_of(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    return pytest.importorskip("pyarrow.parquet").read_table(file).to_pylist()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_folder_becomes_one_file_and_is_resumed(folder: Path, tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    (folder / "broken.png").write_bytes(b"no image")
    out, tagger = tmp_path / f"tags{suffix}", Tagger(toy(), NAMES)
    whole = tag_folder(tagger, folder, out)
    assert (whole.images, whole.done, list(whole.failed)) == (4, 3, ["broken.png"])
    rows = rows_of(out)
    assert [row["image"] for row in rows] == ["a.png", "b.png", "broken.png", "trip/c.png"]
    assert "is not an image" in rows[2]["error"]
    found = tagger(folder / "a.png")
    tags = [tag["tag"] for tag in rows[0]["tags"]] if suffix == ".jsonl" else rows[0]["tags"]
    assert tags == found.tags
    # New images, and those that failed, are added; the others are not tagged again.
    photo(5).save(folder / "d.png")
    photo(6).save(folder / "broken.png")
    seen: list[str] = []
    again = tag_folder(tagger, folder, out, on_result=lambda image, _: seen.append(image.key))
    assert (again.images, again.done, again.failed, seen) == (5, 2, {}, ["broken.png", "d.png"])
    assert len(rows_of(out)) == 5 and rows_of(out)[0] == rows[0]
    assert tag_folder(tagger, folder, out).done == 0
    with pytest.raises(InputError, match="tags of another vocabulary, backbone or option"):
        tag_folder(Tagger(toy(), NAMES, top=1), folder, out)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", out.name}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_an_image_whose_name_is_not_utf_8_has_one_row(folder: Path, tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    name = os.fsdecode(b"caf\xe9.png")
    try:
        photo(7).save(folder / name)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    out, tagger = tmp_path / f"tags{suffix}", Tagger(toy(), NAMES)
    assert tag_folder(tagger, folder, out).done == 4
    assert tag_folder(tagger, folder, out).done == 0
    photo(8).save(folder / "new.png")
    assert tag_folder(tagger, folder, out).done == 1
    stored = [row["image"] for row in rows_of(out)]
    if suffix == ".parquet":
        stored = [json.loads(key) for key in stored]
    assert stored == sorted(["a.png", "b.png", "trip/c.png", name, "new.png"])


def test_a_row_of_a_replaced_name_is_tagged_again(folder: Path, tmp_path: Path) -> None:
    """Earlier releases stored U+FFFD for bytes of a name that are not UTF-8."""
    pq = pytest.importorskip("pyarrow.parquet")
    out, tagger = tmp_path / "tags.parquet", Tagger(toy(), NAMES)
    tag_folder(tagger, folder, out)
    table = pq.read_table(out)
    replaced = table.set_column(0, "image", [["caf\ufffd.png", "b.png", "trip/c.png"]])
    pq.write_table(replaced.replace_schema_metadata(table.schema.metadata), out)
    assert tag_folder(tagger, folder, out).done == 1
    assert [row["image"] for row in rows_of(out)] == ["a.png", "b.png", "trip/c.png"]


def test_a_call_that_was_killed_is_resumed_at_its_last_image(folder: Path, tmp_path: Path) -> None:
    out, tagger = tmp_path / "tags.jsonl", Tagger(toy(), NAMES)

    def stop(image: Any, _: Any) -> None:
        if image.key == "b.png":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tag_folder(tagger, folder, out, on_result=stop)
    part = tmp_path / "tags.jsonl.part"
    assert not out.exists() and part.exists()
    with part.open("a") as stream:
        stream.write('{"image": "b.pn')  # a line that was cut short
    assert tag_folder(tagger, folder, out).done == 2
    tag_folder(tagger, folder, tmp_path / "fresh.jsonl")
    assert out.read_text() == (tmp_path / "fresh.jsonl").read_text() and not part.exists()


@pytest.mark.parametrize("name", ["tags.jsonl", "tags.jsonl.part"])
def test_a_file_of_something_else_is_left_alone(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a letter\nof mine\n")
    with pytest.raises(TTDError, match=r"is not (a|an incomplete) file of tags"):
        tag_folder(Tagger(toy(), NAMES), folder, tmp_path / "tags.jsonl")
    assert (tmp_path / name).read_text() == "a letter\nof mine\n"


# The command ---------------------------------------------------------------------------------------------------------


def run(*arguments: Any) -> Any:
    with temporary_plugin(FakePlugin(FakeFamily()), name="fake_plugin"):
        return CliRunner().invoke(cli.app, ["tags", *map(str, arguments), "--backbone", "fake:small"])


def test_the_command_prints_the_best_names_of_a_vocabulary(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("\n".join(NAMES))
    table = run(folder / "a.png", "--vocabulary", file, "--rule", "absolute", "--threshold", "-1", "--top", 3)
    assert table.exit_code == 0 and "3 of 6 names are selected" in table.output, table.output
    assert table.output.split().count("selected") == 4
    content = json.loads(run(folder / "a.png", "--vocabulary", ",".join(NAMES), "--json").stdout)
    assert content["vocabulary"] == 6 and {tag["tag"] for tag in content["tags"]} <= set(NAMES)
    out = tmp_path / "tags.jsonl"
    many = run(folder, "--vocabulary", "coco_object", "--template", "{}", "--template", "a {}.", "--out", out)
    assert many.exit_code == 0 and "3 images: 3 tagged" in many.output and len(rows_of(out)) == 3
    assert "0 tagged, 3 were done before" in run(
        folder, "--vocabulary", "coco_object", "--template", "{}", "--template", "a {}.", "--out", out
    ).output  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("PHOTO",), "there is no CAPTION"),
        (("PHOTO", "a dog", "--vocabulary", "dog"), "--vocabulary replaces the caption"),
        (("PHOTO", "a dog", "--top", "0"), "--top applies to --vocabulary only"),
        (("PHOTO", "a dog", "--top", "3"), "--top applies to --vocabulary only"),
        (("FOLDER", "--vocabulary", "dog"), "is a folder; name a file for its tags with --out"),
        (("FOLDER", "--vocabulary", "dog", "--out", "tags.txt"), "must end in .jsonl or .parquet"),
        (("PHOTO", "--vocabulary", "dog", "--template", "a photo"), "must contain {} for the name"),
        (("missing.png", "--vocabulary", "dog"), "does not exist"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(folder: Path, arguments: Any, message: str) -> None:
    places = {"PHOTO": folder / "a.png", "FOLDER": folder}
    answer = run(*(places.get(one, one) for one in arguments))
    assert answer.exit_code == 2 and message in answer.output and "Traceback" not in answer.output
