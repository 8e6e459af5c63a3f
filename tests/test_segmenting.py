"""Segmentation of users' images by any words: `segment`, `segment_folder`, `ttd segment` and the app's tab."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeFamily, FakePlugin
from PIL import Image
from toy_backbone import toy
from typer.testing import CliRunner

import ttd_plugins.evaluation.image_segmentation as module
from ttd_plugins import cli, segment
from ttd_plugins.app.studio import Studio
from ttd_plugins.data.image_folders import find_images
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.datasets.reader import ClassNames
from ttd_plugins.evaluation.dense_inference import (
    activate,
    class_embeddings,
    dense_features,
    label_map,
    refine_maps,
    templates_by_name,
)
from ttd_plugins.evaluation.image_segmentation import encode_classes, segment_image
from ttd_plugins.evaluation.pamr import affinity, pamr
from ttd_plugins.evaluation.protocol_options import BACKGROUND_WORDS, DenseOptions, SegmentProtocol
from ttd_plugins.plugins import temporary_plugin
from ttd_plugins.reports.label_overlay import (
    LegendEntry,
    class_colours,
    draw_labels,
    mask_image,
    with_legend,
)
from ttd_plugins.segmenting import Segmenter, segment_folder

SMALL: dict[str, Any] = {"size": 32, "iterations": 2, "dilations": (1, 2), "scales": (1.0,)}
NAMES = "dog|puppy, grass, sky, cat"


def photo(width: int = 40, height: int = 24, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "photos"
    (place / "trip").mkdir(parents=True)
    photo(seed=1).save(place / "a.png")
    photo(30, 50, seed=2).save(place / "trip" / "b.jpg")
    photo(seed=3).save(place / "a.jpg")
    return place


# One image -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", ["constant", "words", "none", "auto"])
@pytest.mark.parametrize("activation", ["probability", "minmax", "cosine"])
def test_labels_are_those_of_the_protocol_with_all_maps_in_memory(
    monkeypatch: pytest.MonkeyPatch, background: Any, activation: Any
) -> None:
    monkeypatch.setattr(module, "CHUNK_VALUES", 3 * 40 * 24)  # three maps at a time
    adapter, image = toy(), photo()
    classes = [ClassNames("dog", ("dog", "puppy")), *(ClassNames(n, (n,)) for n in ("grass", "cat", "umbrella", "car"))]
    dense = DenseOptions(size=32, flip=True, scales=(1.0, 1.5), refine=True, iterations=2, dilations=(1, 2))
    options = SegmentProtocol(
        dense=dense, activation=activation, templates="photo", background=background, threshold=0.3
    )
    names = encode_classes(adapter, classes, options)
    labels, results = segment_image(adapter, image, names, options)

    words = [word for word in BACKGROUND_WORDS if word != "grass"] if background == "words" else []
    texts = ["dog", "puppy", "grass", "cat", "umbrella", "car", *words]
    owners = torch.tensor([1, 1, 2, 3, 4, 5] + [0] * len(words))
    embeddings = class_embeddings(adapter, texts, templates_by_name("photo"))
    features = dense_features(adapter, image, dense)
    calibration = adapter.description.calibration
    cosines = features.maps(embeddings)
    maps = refine_maps(activate(cosines, activation, calibration), features, dense)
    plane = 0.3 if background == "constant" else None
    expected = label_map(maps, owners, (24, 40), background=plane)
    assert (labels == expected).all()
    chance = refine_maps(calibration.probability(cosines), features, dense)
    large = torch.nn.functional.interpolate(chance[None], size=(24, 40), mode="bilinear", align_corners=False)[0]
    scores = torch.nn.functional.interpolate(maps[None], size=(24, 40), mode="bilinear", align_corners=False)[0]
    best = large.gather(0, scores.argmax(0)[None])[0].numpy()
    assert sum(one.share for one in results) == pytest.approx(1)
    for one in results:
        own = expected == one.index
        assert one.pixels == own.sum() and one.share == pytest.approx(own.mean())
        if one.texts:
            top = calibration.probability(cosines[owners == one.index]).max()
            assert one.max_probability == pytest.approx(float(top), abs=1e-6)
        if own.any() and one.texts:
            assert one.mean_probability == pytest.approx(float(best[own].mean()), abs=1e-5)
        else:
            assert one.mean_probability is None


def test_pamr_takes_an_affinity_that_is_computed_once() -> None:
    planes, image = torch.rand(3, 9, 7), torch.rand(3, 9, 7)
    assert torch.equal(pamr(planes, image, weights=affinity(image)), pamr(planes, image))


def test_a_result_has_the_size_of_the_image_and_says_the_share_of_each_class() -> None:
    image = photo(61, 33)
    found = segment(toy(), image, NAMES, **SMALL)
    assert found.labels.shape == (33, 61) and (found.image == np.asarray(image)).all()
    assert [one.name for one in found.classes] == ["background", "dog", "grass", "sky", "cat"]
    assert found.classes[1].texts == ("dog", "puppy")
    assert all((found.mask(one.name).sum()) == one.pixels for one in found.classes)
    assert "61x33" in repr(found) and "%" in repr(found)
    with pytest.raises(InputError, match="no class is named 'horse'; classes: background, dog"):
        found.mask("horse")
    with Image.open(_bytes(found.mask_image())) as stored:
        assert stored.mode == "P" and (np.asarray(stored) == found.labels).all()
    legend = found.overlay()
    assert legend.shape[0] > 33 and (legend[:33, :61] == found.overlay(legend=False)).all()


def _bytes(image: Image.Image) -> Any:
    import io

    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    buffer.seek(0)
    return buffer


def test_the_background_is_left_out_by_words_by_a_plane_or_not_at_all() -> None:
    adapter, image = toy(), photo()
    none = segment(adapter, image, NAMES, background="none", **SMALL)
    assert none.classes[0].pixels == 0
    everything = segment(adapter, image, NAMES, threshold=1.0, **SMALL)
    assert everything.classes[0].share == 1 and everything.present[0].mean_probability is None
    words = segment(adapter, image, "grass, background", background_words=("tree", "grass"), **SMALL)
    assert [one.name for one in words.classes] == ["background", "grass"]
    assert words.classes[0].texts == ("tree",)
    plain = segment(adapter, image, "grass, background", background="none", **SMALL)
    assert [one.name for one in plain.classes] == ["background", "grass", "background"]


def test_the_default_size_is_at_most_twice_the_preferred_one() -> None:
    adapter = toy()  # of 16 pixels
    options = Segmenter(adapter, NAMES).options
    assert options.dense.size == 32 and Segmenter(adapter, NAMES, size=64).options.dense.size == 64
    assert Segmenter(adapter, NAMES, SegmentProtocol()).options.dense.size == 448


def test_prompts_replace_the_templates() -> None:
    adapter, image = toy(), photo()
    expected = segment(adapter, image, NAMES, templates="photo", **SMALL)
    found = segment(adapter, image, NAMES, templates="none", prompts=["a photo of a {}."], **SMALL)
    assert found.classes == expected.classes
    with pytest.raises(InputError, match=r"must contain \{\} for the name"):
        segment(adapter, image, NAMES, prompts=["a photo"])


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (300, 2)])
def test_images_of_any_size_are_segmented(size: tuple[int, int]) -> None:
    found = segment(toy(), photo(*size), NAMES, **SMALL)
    assert found.labels.shape == (size[1], size[0])
    assert found.overlay().shape[1] >= size[0]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("", {}, "contains no names"),
        (" , ;", {}, "contains no names"),
        ("background", {"threshold": 0.4}, "the only name is the background"),
        ("dog", {"sise": 3}, "did you mean 'size'"),
        ("dog", {"background": "grey"}, "background"),
        ("dog", {"stride": 64, "window": 8, "size": 64}, "leaves gaps between windows"),
        ("x" * 400, {}, "a name of 400 characters"),
    ],
)
def test_mistakes_are_one_sentence(names: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        segment(toy(), photo(), names, **options)
    assert "\n" not in str(error.value)


def test_a_long_strip_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(InputError, match="more than 16,777,216 pixels; use a smaller size, or the resize square"):
        segment(toy(), photo(30_000, 2), "dog", size=448)
    found = segment(toy(), photo(30_000, 2), "dog, sky", resize="square", **SMALL)
    assert found.labels.shape == (2, 30_000)


def test_a_mask_of_many_classes_has_16_bits() -> None:
    names = [f"thing {n}" for n in range(300)]
    found = segment(toy(), photo(), names, background="none", refine=False, **SMALL)
    with Image.open(_bytes(found.mask_image())) as stored:
        assert stored.mode.startswith("I") and (np.asarray(stored) == found.labels).all()
    assert found.overlay().shape[0] > 24
    assert len(found.as_dict()["classes"]) == 301


def test_memory_does_not_grow_with_the_number_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_VALUES", 4 * 40 * 24)
    resize, seen = module.resize_maps, []

    def spy(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        seen.append(len(maps))
        return resize(maps, size)

    monkeypatch.setattr(module, "resize_maps", spy)
    for count in (8, 512):
        seen.clear()
        segment(toy(), photo(), [f"thing {n}" for n in range(count)], background="none", refine=False, **SMALL)
        # Each map is enlarged once, four at a time.
        assert max(seen) <= 4 and sum(seen) == count


# Colours and overlays ------------------------------------------------------------------------------------------------


def test_colours_differ_and_do_not_depend_on_their_number() -> None:
    many = class_colours(64).astype(int)
    assert (class_colours(5) == many[:5]).all() and not many[0].any()
    near = np.abs(many[1:, None] - many[None, 1:]).sum(-1) + 1000 * np.eye(63, dtype=int)
    assert near[:12, :12].min() >= 60 and near.min() > 0


def test_the_overlay_leaves_the_background_and_draws_borders() -> None:
    image = np.full((20, 30, 3), 100, np.uint8)
    labels = np.zeros((20, 30), int)
    labels[5:15, 5:15] = 1
    drawn = draw_labels(image, labels, 2, 0.5)
    assert (drawn[labels == 0] == 100).all()
    assert (drawn[10, 10] == np.round((100 + class_colours(2)[1].astype(float)) / 2)).all()
    assert (drawn[5, 5:15] == class_colours(2)[1]).all()
    with pytest.raises(InputError, match="differ in size"):
        draw_labels(image, labels[:-1], 2)
    with pytest.raises(InputError, match="has another"):
        mask_image(labels, 1)


@pytest.mark.parametrize("text", ["", "x" * 500, "狗", "<b>\x00$\\frac", "مرحبا", "🐶", "\ud83d"])
def test_any_name_fits_into_a_legend(text: str) -> None:
    image = np.zeros((10, 20, 3), np.uint8)
    found = with_legend(image, [LegendEntry(text, (255, 0, 0))] * 60, text)
    assert found.shape[1] == 240 and (found[:10, :20] == 0).all() and (found == (255, 0, 0)).all(-1).any()


# Folders -------------------------------------------------------------------------------------------------------------


def test_a_folder_is_written_and_resumed(folder: Path, tmp_path: Path) -> None:
    out, adapter = tmp_path / "out", toy()
    segmenter = Segmenter(adapter, NAMES, **SMALL)
    steps: list[int] = []
    result = segment_folder(segmenter, folder, out, stage=lambda name, count: steps.append)
    assert (result.images, result.done, result.failed, sum(steps)) == (3, 3, {}, 3)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.name[0] != "."}
    stems = ("a.png", "a.jpg", "trip/b")  # two images would have the name "a"
    kinds = (("masks", "png"), ("overlays", "png"), ("results", "json"))
    expected = {f"{kind}/{stem}.{end}" for stem in stems for kind, end in kinds}
    assert files == expected | {"settings.json", "classes.json"}
    content = json.loads((out / "results/trip/b.json").read_text())
    assert content["image"] == "trip/b.jpg" and (content["width"], content["height"]) == (30, 50)
    dog = content["classes"][1]
    assert dog["name"] == "dog" and dog["texts"] == ["dog", "puppy"] and 0 <= dog["share"] <= 1
    assert "uncalibrated_mean_probability" in dog or "mean_probability" in dog
    mask = np.asarray(Image.open(out / "masks/trip/b.png"))
    assert mask.shape == (50, 30) and dog["pixels"] == (mask == 1).sum()
    with Image.open(out / "overlays/trip/b.png") as overlay:
        assert overlay.height > 50

    (out / "masks/a.png.png").unlink()
    photo(30, 50, seed=9).save(folder / "trip" / "b.jpg")
    seen: list[str] = []
    again = segment_folder(segmenter, folder, out, on_result=lambda image, _: seen.append(image.key))
    assert again.done == 2 and seen == ["a.png", "trip/b.jpg"]
    with pytest.raises(InputError, match=r"results with other settings \(classes: .*choose another --out"):
        segment_folder(Segmenter(adapter, "dog, horse", **SMALL), folder, out)


def test_each_image_has_files_of_its_own(tmp_path: Path) -> None:
    place, out = tmp_path / "photos", tmp_path / "out"
    place.mkdir()
    names = ["a.jpg", "a.png", "a.jpg.png", "b.png", "C.jpg.png", "c.JPG", "d.png"]
    for seed, name in enumerate(names):
        photo(seed=seed).save(place / name)
    found = find_images(place)
    assert {one.key for one in found} == set(names)
    assert len({one.stem.casefold() for one in found}) == len(names), "also where a file system ignores case"
    stems = {one.key: one.stem for one in found}
    assert (stems["a.jpg.png"], stems["a.jpg"], stems["b.png"], stems["d.png"]) == ("a.jpg.png", "a.jpg", "b", "d")
    segment_folder(Segmenter(toy(), NAMES, **SMALL), place, out)
    assert len(list((out / "masks").rglob("*.png"))) == len(names)


def test_whole_names_that_differ_in_case_have_files_of_their_own(tmp_path: Path) -> None:
    names = ["a.jpg", "A.jpg", "a.png"]
    for name in names:
        photo().save(tmp_path / name)
    if len(list(tmp_path.iterdir())) < len(names):
        pytest.skip("this file system ignores case")
    assert len({one.stem.casefold() for one in find_images(tmp_path)}) == len(names)


def test_unreadable_images_are_listed_and_the_others_segmented(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"no image")
    segmenter, out = Segmenter(toy(), NAMES, **SMALL), tmp_path / "out"
    result = segment_folder(segmenter, folder, out)
    assert result.done == 3 and "is not an image" in result.failed["broken.jpg"]
    assert json.loads((out / "failed.json").read_text()) == result.failed
    (folder / "broken.jpg").unlink()
    assert segment_folder(segmenter, folder, out).done == 0
    assert not (out / "failed.json").exists()
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "x.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"none of the 1 images can be segmented; the first, 'x\.png'"):
        segment_folder(segmenter, alone, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_results_inside_the_folder_of_the_images_are_no_images(folder: Path) -> None:
    segmenter = Segmenter(toy(), NAMES, **SMALL)
    for done in (3, 0):
        result = segment_folder(segmenter, folder, folder / "segments")
        assert (result.images, result.done) == (3, done)


def test_a_single_image_is_segmented_again_with_other_names(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for names in ("dog, sky", "cat, grass"):
        assert segment_folder(Segmenter(toy(), names, **SMALL), folder / "a.png", out).done == 1
    assert json.loads((out / "results/a.json").read_text())["classes"][1]["name"] == "cat"
    with pytest.raises(InputError, match=r"results with other settings, such as 'a.json'"):
        segment_folder(Segmenter(toy(), "dog, sky", **SMALL), folder, out)


def test_a_folder_of_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not empty and is not the folder of ttd segment"):
        segment_folder(Segmenter(toy(), NAMES, **SMALL), folder, folder / "trip")
    assert os.listdir(folder / "trip") == ["b.jpg"]


# The command and the app ---------------------------------------------------------------------------------------------


def run(*arguments: Any) -> Any:
    with temporary_plugin(FakePlugin(FakeFamily()), name="fake_plugin"):
        return CliRunner().invoke(cli.app, ["segment", *map(str, arguments), "--backbone", "fake:small"])


def test_the_command_prints_the_classes_and_where_its_files_are(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = ("--size", 32, "--no-pamr", "--scales", "1")
    one = run(folder / "a.png", NAMES, "--out", out, *small)
    assert one.exit_code == 0, one.output
    assert "share" in one.output and "masks, overlays and results: " in one.output
    answer = run(folder / "a.png", NAMES, "--out", out, *small, "--json")
    content = json.loads(answer.stdout)
    assert content["images"] == 1 and [c["name"] for c in content["classes"]][1:] == ["dog", "grass", "sky", "cat"]
    names = tmp_path / "names.txt"
    names.write_text("dog, puppy\ngrass\n")
    many = run(folder, names, "--out", tmp_path / "all", *small)
    assert many.exit_code == 0 and "3 images: 3 segmented" in many.output
    again = run(folder, names, "--out", tmp_path / "all", *small)
    assert "3 images: 0 segmented, 3 were done before" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.png", "dog"), "image 'missing.png' does not exist"),
        (("PHOTO", "names.txt"), "file 'names.txt' does not exist"),
        (("PHOTO", ","), "contains no names"),
        (("PHOTO", "dog", "--size", "0"), "size must be 1 or more"),
        (("PHOTO", "dog", "--template", "a photo"), "must contain {} for the name"),
        (("PHOTO", "dog", "--background", "grey"), "background"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(folder: Path, arguments: Any, message: str) -> None:
    answer = run(*(folder / "a.png" if one == "PHOTO" else one for one in arguments), "--out", folder / "out")
    assert answer.exit_code == 2 and message in answer.output and "Traceback" not in answer.output
    assert not (folder / "out").exists()


def test_the_app_segments_by_names_and_reads_no_file_that_they_denote(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from ttd_plugins.app.rendering import render_segmentation

    secret = tmp_path / "names.txt"
    secret.write_text("secret\nother\n")
    with temporary_plugin(FakePlugin(FakeFamily()), name="fake_plugin"):
        studio = Studio(["fake:small"])
        found = studio.segment(folder / "a.png", f"dog, <b>sky</b>, {secret}", "fake:small")
        assert [one.name for one in found.classes] == ["background", "dog", "<b>sky</b>", str(secret)]
        named = studio.segment(folder / "a.png", str(secret), "fake:small")
        assert [one.name for one in named.classes[1:]] == [str(secret)]
        page = render_segmentation(found)
        assert "data:image/" in page and "<b>sky" not in page
        for image, names, message in (
            (None, "dog", "there is no image yet"),
            (folder / "a.png", " ", "there are no names"),
            (folder / "a.png", ",".join(f"n{i}" for i in range(50)), "there are 50 names"),
            (folder / "a.png", "x" * 2000, "2000 characters"),
        ):
            with pytest.raises(InputError, match=message):
                studio.segment(image, names, "fake:small")
        with pytest.raises(InputError, match="none of the backbones"):
            studio.segment(folder / "a.png", "dog", "fake:other")
