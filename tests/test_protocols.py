"""The three protocols on miniatures: figures against slow ones, resuming, many processes, and the commands."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slow_reference as slow
import torch
from helpers_photographs import HEIGHT, WIDTH, write_photographs
from PIL import Image
from toy_backbone import ToyAdapter, toy
from typer.testing import CliRunner

from ttd_plugins import cli
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation import evaluate
from ttd_plugins.evaluation.datasets import DatasetError, open_captions, open_segmentation
from ttd_plugins.evaluation.dense_inference import DenseOptions
from ttd_plugins.evaluation.pamr import pamr
from ttd_plugins.evaluation.protocols import (
    SEGMENT_PRESETS,
    TAG_PRESETS,
    TEXT_PRESETS,
    SegmentProtocol,
    TagProtocol,
    TextProtocol,
    evaluate_segment,
    evaluate_tags,
    evaluate_text,
)
from ttd_plugins.evaluation.protocols.runner import weights_hash

CAPTIONS = {
    "a": ["a man and his dog on green grass", "two cats in the snow", "nothing of note"],
    "b": ["a dog", "a dog under the blue sky"],
    "c": ["a woman sits beside a car"],
    "d": ["it is there"],
}
SHOWN = {"a": (1, 18, 193), "b": (18, 187), "c": (1,), "d": (0,)}
PLAIN = DenseOptions(size=16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four photographs of noise, dense masks of blocks, and captions."""
    return write_photographs(tmp_path / "data", CAPTIONS, SHOWN)


def maps_of(
    backbone: ToyAdapter, root: Path, name: str, texts: list[str]
) -> tuple[list[list[list[float]]], list[float]]:
    """Cosine maps of texts on one picture at 16 pixels, and the pooled embedding, by loops."""
    with Image.open(root / f"images/{name}.png") as image:
        seen = backbone.encode_image(backbone.dense_transform(16)(image)[None])
    assert seen.pooled is not None
    grid = [[slow.unit(seen.patches[0, y, x].tolist()) for x in range(4)] for y in range(4)]
    vectors = [text_of(backbone, text) for text in texts]
    return [[[slow.dot(p, v) for p in row] for row in grid] for v in vectors], slow.unit(seen.pooled[0].tolist())


def text_of(backbone: ToyAdapter, text: str) -> list[float]:
    return slow.unit(backbone.encode_text(backbone.tokenize([text]).ids)[0].tolist())


# Tags -----------------------------------------------------------------------------------------------------------------

TRUE = {"man", "dog", "grass", "sky", "woman"}
UNKNOWN: set[str] = set()


@pytest.mark.parametrize(("rule", "threshold"), [("minmax", 0.5), ("probability", 0.3)])
@torch.no_grad()
def test_tag_figures_agree_with_a_slow_count(folder: Path, rule: Any, threshold: float) -> None:
    backbone = toy()
    options = TagProtocol(dense=PLAIN, rule=rule, threshold=threshold, template="the {}")
    result = evaluate_tags(backbone, open_captions("coco_captions", folder), options)
    assert result.metrics is not None and result.done == result.images == 4

    from ttd_plugins.tag_extractors.word_tags import WordTags

    rows: dict[str, list[tuple[float, bool, bool]]] = {"pixel": [], "image": [], "text": []}
    for name, captions in CAPTIONS.items():
        for caption in captions:
            (tags,) = WordTags()([caption])
            maps, pooled = maps_of(backbone, folder, name, [f"the {tag}" for tag in tags])
            vectors = [text_of(backbone, f"the {tag}") for tag in tags]
            scores = {
                "pixel": [max(max(row) for row in one) for one in maps],
                "image": [slow.dot(pooled, v) for v in vectors],
                "text": [slow.dot(text_of(backbone, caption), v) for v in vectors],
            }
            shown = {"a": {"man", "dog", "grass"}, "b": {"dog", "sky"}, "c": {"woman"}, "d": set()}[name]
            labels = [tag in shown for tag in tags]
            for kind, values in scores.items():
                chosen = slow.select(values, rule, threshold, 8.0, -2.0)
                rows[kind] += list(zip(values, chosen, labels, strict=True))
    for kind, entries in rows.items():
        found = result.metrics[kind]
        tp = sum(c and t for _, c, t in entries)
        assert found["precision"] == pytest.approx(tp / max(sum(c for _, c, _ in entries), 1))
        assert found["recall"] == pytest.approx(tp / sum(t for *_, t in entries))
        assert found["accuracy"] == pytest.approx(sum(c == t for _, c, t in entries) / len(entries))
        hits, total = 0, 0.0
        for rank, (_, _, label) in enumerate(sorted(entries, key=lambda e: -round(e[0], 5)), 1):
            hits += label
            total += hits / rank if label else 0
        if len({round(score, 5) for score, *_ in entries}) == len(entries):
            assert found["map"] == pytest.approx(total / hits)
    assert result.metrics["candidates"] == len(rows["pixel"])
    assert result.metrics["positives"] == sum(t for *_, t in rows["pixel"])
    assert 0 <= result.metrics["retrieval"]["r1"] <= result.metrics["retrieval"]["r10"] <= 1


@torch.no_grad()
def test_zero_shot_classification_beside_tags_agrees_with_a_slow_search(folder: Path) -> None:
    backbone, data = toy(), open_captions("coco_captions", folder)
    figures = evaluate_tags(backbone, data, TagProtocol(dense=PLAIN)).metrics
    assert figures is not None and len(data.classes) == 133
    # Some of the 133 names are one text to the toy, so that either of two classes may be the nearer one.
    certain, possible = {1: 0, 5: 0}, {1: 0, 5: 0}
    for name in "abc":  # the mask of d is void
        _, pooled = maps_of(backbone, folder, name, [])
        nearest = {
            item.id: max(slow.dot(pooled, text_of(backbone, f"a photo of a {text}.")) for text in item.texts)
            for item in data.classes
        }
        for k in (1, 5):
            shown = [nearest[number] for number in SHOWN[name]]
            certain[k] += any(sum(value >= one - 1e-5 for value in nearest.values()) <= k for one in shown)
            possible[k] += any(sum(value > one + 1e-5 for value in nearest.values()) < k for one in shown)
    assert figures["zero_shot"]["images"] == 3 and possible[5] > 0 and certain[5] < 3
    for k in (1, 5):
        assert certain[k] <= round(3 * figures["zero_shot"][f"top{k}"]) <= possible[k]
    without = evaluate_tags(backbone, data, TagProtocol(dense=PLAIN, zero_shot=None)).metrics
    assert without is not None and "zero_shot" not in without


def test_retrieval_can_be_left_out_and_unknown_words_are_not_counted(folder: Path) -> None:
    from ttd_plugins.evaluation.true_tags import Vocabulary

    words = Vocabulary({"dog": ["dog"], "man": ["person"], "grass": ["no class of theirs"]})
    data = open_captions("coco_captions", folder, vocabulary=words)
    figures = evaluate_tags(toy(), data, TagProtocol(dense=PLAIN, retrieval=False)).metrics
    assert figures is not None
    assert figures["unknown"] == 1 and figures["positives"] == 4 and "retrieval" not in figures


# Text -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_text_figures_agree_with_slow_ones(folder: Path) -> None:
    backbone = toy()
    data = open_captions("coco_captions", folder)
    figures = evaluate_text(backbone, data, TextProtocol(dense=PLAIN)).metrics
    assert figures is not None
    rows, balances = [], []
    for name, caption, classes in (
        ("a", CAPTIONS["a"][0], (1, 18, 193)), ("b", "a dog", (18,)), ("b", CAPTIONS["b"][1], (18, 187)),
        ("c", CAPTIONS["c"][0], (1,)),
    ):  # fmt: skip
        mask = np.asarray(Image.open(folder / f"semantic_masks/{name}.png"))
        ((cosines,), _) = maps_of(backbone, folder, name, [caption])
        flat = slow.minmax([v for row in cosines for v in row], constant=0.0)
        heat = np.array(slow.upsample([flat[4 * y : 4 * y + 4] for y in range(4)], HEIGHT, WIDTH))
        truth, valid = np.isin(mask, classes), mask != 0
        prediction = (heat > 0.4) & valid
        both, union = (prediction & truth).sum(), (prediction | truth).sum()
        rows.append((both / union, (prediction & ~truth).sum() / union, (truth & ~prediction).sum() / union))
        if len(classes) > 1:
            means = [heat[mask == c].mean() for c in classes]
            balances.append(min(means) / max(means))
    for name, index in (("caption_iou", 0), ("mfpr", 1), ("mfnr", 2)):
        assert figures[name] == pytest.approx(np.mean([row[index] for row in rows]), abs=1e-6)
    assert figures["caption_iou"] + figures["mfpr"] + figures["mfnr"] == pytest.approx(1)
    assert figures["tag_balance"] == pytest.approx(np.mean(balances), abs=1e-5)
    assert (figures["captions"], figures["left_out"], figures["balanced_captions"]) == (4, 3, 2)


def test_a_man_and_a_woman_of_one_mask_are_no_balance(folder: Path) -> None:
    content = json.loads((folder / "captions.json").read_text())
    content["annotations"] = [{"id": 1, "image_id": 2, "caption": "a man and a woman"}]
    (folder / "captions.json").write_text(json.dumps(content))
    figures = evaluate_text(toy(), open_captions("coco_captions", folder), TextProtocol(dense=PLAIN)).metrics
    assert figures is not None and figures["captions"] == 1 and figures["balanced_captions"] == 0
    assert math.isnan(figures["tag_balance"])


# Segmentation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", ["constant", "none", "words"])
@torch.no_grad()
def test_segmentation_figures_agree_with_slow_ones(folder: Path, background: Any) -> None:
    backbone = toy()
    data = open_segmentation("coco_panoptic", folder)
    options = SegmentProtocol(
        dense=PLAIN, templates="none", background=background, threshold=0.5, background_words=("fog", "dog", "smoke")
    )
    figures = evaluate_segment(backbone, data, options).metrics
    assert figures is not None
    names = [(text, i) for i, item in enumerate(data.classes) for text in item.texts]
    # "dog" names a class, and so is no word of the background.
    names += [("fog", 133), ("smoke", 133)] if background == "words" else []
    counts = np.zeros((3, 134), int)
    top1 = images = 0
    for name in CAPTIONS:
        truth = data.labels(name)
        maps, pooled = maps_of(backbone, folder, name, [text for text, _ in names])
        low = 1 / (1 + np.exp(-(8 * np.array(maps) - 2)))
        score = np.array([slow.upsample(one, HEIGHT, WIDTH) for one in low.tolist()]).reshape(len(names), -1)
        label = np.array([i for _, i in names])[score.argmax(0)]
        if background == "constant":
            label = np.where(score.max(0) > 0.5, label, 133)
        for p, t in zip(label.tolist(), truth.ravel().tolist(), strict=True):
            if t != 255:
                counts[0, t] += p == t
                counts[1, p] += 1
                counts[2, t] += 1
        shown = set(truth.ravel().tolist()) - {255}
        if shown:
            images += 1
            near = max(((slow.dot(pooled, text_of(backbone, text)), i) for text, i in names if i != 133))
            top1 += near[1] in shown
    union = (counts[1] + counts[2] - counts[0])[:133]
    used = union > 0
    assert figures["present"] == used.sum()
    assert figures["miou"] == pytest.approx((counts[0, :133][used] / union[used]).mean(), abs=1e-6)
    assert figures["miou"] + figures["mfpr"] + figures["mfnr"] == pytest.approx(1)
    assert figures["pixel_accuracy"] == pytest.approx(counts[0].sum() / counts[2].sum(), abs=1e-6)
    assert figures["zero_shot_top1"] == pytest.approx(top1 / images) and figures["zero_shot_images"] == images == 3
    assert set(figures["classes"]) == {item.name for item in data.classes}


def test_a_background_class_is_the_plane_and_is_not_named(tmp_path: Path) -> None:
    base = tmp_path / "validation"
    for kind in ("image", "mask"):
        (base / kind).mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(base / "image/x.jpg")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(base / "mask/x.png")
    data = open_segmentation("voc", tmp_path)
    run = {
        name: evaluate_segment(
            toy(), data, SegmentProtocol(dense=PLAIN, templates="none", background=name, threshold=threshold)
        )
        for name, threshold in (("constant", 1.0), ("auto", 1.0), ("none", 0.0), ("words", None))
    }
    for name in ("constant", "auto"):
        figures = run[name].metrics
        assert figures is not None
        # Above every probability, so all is background: the only class that occurs.
        assert figures["miou"] == 1 and figures["present"] == 1
        assert run[name].settings["names"]["background"] == [] and figures["zero_shot_images"] == 0
        assert run[name].as_dict()["figures"]["zero_shot_top1"] is None
    assert run["none"].settings["names"]["background"] == ["background"]
    assert "sky" in run["words"].settings["names"]["background"]
    assert run["words"].settings["options"]["threshold"] == 0.40
    with pytest.raises(InputError, match="unknown value of background 'sky'"):
        evaluate_segment(toy(), data, SegmentProtocol(background="sky"))  # type: ignore[arg-type]


def test_the_papers_settings() -> None:
    tags, text, segment = TAG_PRESETS["paper"], TEXT_PRESETS["paper"], SEGMENT_PRESETS["paper"]
    assert (tags.dense.size, tags.dense.scales, tags.dense.flip, tags.dense.refine) == (224, (1.0,), True, False)
    for dense in (text.dense, segment.dense):
        assert (dense.size, dense.scales, dense.flip, dense.refine) == (448, (1.0, 0.5, 1.5, 2.0), True, True)
        assert (dense.iterations, dense.dilations) == (10, (1, 2, 4, 8, 12, 24))
    assert text.threshold == 0.40 and segment.templates == "imagenet" and segment.background == "constant"


# Running --------------------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_and_ends_as_one_that_was_not(folder: Path, tmp_path: Path) -> None:
    data, options = open_captions("coco_captions", folder), TagProtocol(dense=PLAIN)
    whole = evaluate_tags(toy(), data, options)
    out = tmp_path / "out"

    def stage(name: str, total: int) -> Any:
        left = [2]

        def advance(done: int) -> None:
            if name.endswith("images"):
                left[0] -= done
                if not left[0]:
                    raise StoppedError

        return advance

    with pytest.raises(StoppedError):
        evaluate_tags(toy(), data, options, out=out, stage=stage)
    records = out / "images-0.jsonl"
    assert len(records.read_text().splitlines()) == 2 and not (out / "results.json").exists()
    # The interruption came in the middle of a line.
    records.write_text(records.read_text() + '{"key":"c","capti')
    backbone, seen = toy(), []
    result = evaluate_tags(
        backbone, data, options, out=out, stage=lambda name, total: seen.append((name, total)) or (lambda done: None)
    )
    assert seen == [("check files", 2), ("tags: images", 2)] and len(backbone.images) == 2
    assert result.metrics == whole.metrics
    content = json.loads((out / "results.json").read_text())
    assert content["figures"] == whole.as_dict()["figures"] and content["settings"] == whole.settings
    assert content["done"] == 4 and content["seconds_per_image"] > 0 and content["peak_memory_bytes"] > 2**20
    assert {"torch", "ttd_plugins", "device"} <= set(content["environment"])
    # All is done, so nothing is computed again.
    again = toy()
    assert evaluate_tags(again, data, options, out=out).metrics == whole.metrics and not again.images


@pytest.mark.parametrize("protocol", ["tags", "text", "segment"])
def test_two_processes_agree_with_one(protocol: str, folder: Path, tmp_path: Path) -> None:
    def run(**more: Any) -> Any:
        if protocol == "segment":
            data = open_segmentation("coco_panoptic", folder)
            return evaluate_segment(toy(), data, SegmentProtocol(dense=PLAIN, templates="photo"), **more)
        captions = open_captions("coco_captions", folder)
        if protocol == "tags":
            return evaluate_tags(toy(), captions, TagProtocol(dense=PLAIN), **more)
        return evaluate_text(toy(), captions, TextProtocol(dense=PLAIN), **more)

    alone = run()
    first = run(out=tmp_path / "out", rank=0, world=2)
    assert first.metrics is None and first.path is None and (first.done, first.images) == (2, 4)
    second = run(out=tmp_path / "out", rank=1, world=2)
    found, expected = second.as_dict()["figures"], alone.as_dict()["figures"]
    assert json.dumps(found, sort_keys=True) != "null" and found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value), name
        else:
            assert found[name] == value, name
    assert {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")} == {
        "settings.json", "images-0.jsonl", "images-1.jsonl", "results.json",
    }  # fmt: skip


def test_other_settings_weights_or_places_are_refused(folder: Path, tmp_path: Path) -> None:
    data, out = open_captions("coco_captions", folder), tmp_path / "out"
    evaluate_tags(toy(), data, TagProtocol(dense=PLAIN), out=out)
    with pytest.raises(InputError, match=r"results with other settings .options.threshold: 0.5 there, 0.4 now"):
        evaluate_tags(toy(), data, TagProtocol(dense=PLAIN, threshold=0.4), out=out)
    with pytest.raises(InputError, match=r"contains results with other settings .backbone.weights_sha256: "):
        evaluate_tags(toy(1), data, TagProtocol(dense=PLAIN), out=out)
    with pytest.raises(InputError, match="rank must be from 0 to 1 for 2 processes, not 2"):
        evaluate_tags(toy(), data, TagProtocol(dense=PLAIN), out=out, rank=2, world=2)
    with pytest.raises(InputError, match="several processes need a common folder"):
        evaluate_tags(toy(), data, TagProtocol(dense=PLAIN), rank=0, world=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"the folder .*out cannot be made .*choose another --out"):
        evaluate_tags(toy(), data, TagProtocol(dense=PLAIN), out=tmp_path / "file" / "out")


def test_a_wrong_layout_is_told_before_the_backbone_is_asked_anything(folder: Path) -> None:
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(folder / "semantic_masks/d.png")
    backbone = toy()
    for run in (
        lambda: evaluate_tags(backbone, open_captions("coco_captions", folder)),
        lambda: evaluate_text(backbone, open_captions("coco_captions", folder)),
        lambda: evaluate_segment(backbone, open_segmentation("coco_panoptic", folder)),
    ):
        with pytest.raises(DatasetError, match=r"d\.png"):
            run()
    assert not backbone.images and not backbone.texts


def test_the_hash_of_weights_sees_every_one() -> None:
    one, other = toy(), toy()
    assert weights_hash(one) == weights_hash(other)
    with torch.no_grad():
        other.model.patch.bias[0] += 1e-6
    assert weights_hash(one) != weights_hash(other)


def test_modes_and_gradients_stay_as_they_were(folder: Path) -> None:
    backbone = toy()
    backbone.train()
    evaluate_text(backbone, open_captions("coco_captions", folder), TextProtocol(dense=PLAIN))
    assert backbone.training and backbone.model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in backbone.parameters())


# Commands -------------------------------------------------------------------------------------------------------------


def ttd(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_help_of_the_group_lists_its_commands() -> None:
    result = ttd("eval", "--help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("tags", "text", "segment"))
    assert "eval" in ttd("--help").stdout


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def load(name: str, **options: Any) -> ToyAdapter:
        asked.append(name)
        return toy()

    monkeypatch.setattr("ttd_plugins.plugins.load", load)
    return asked


def test_commands_print_figures_settings_and_where_the_results_are(
    folder: Path, tmp_path: Path, loaded: list[str]
) -> None:
    common = ("--preset", "fast", "--size", "16", "--backbone", "toy:x")
    for name, more, figure in (
        ("tags", ("--rule", "absolute", "--threshold", "0.1", "--template", "a {}"), "pixel.map"),
        ("text", ("--scales", "1,2", "--flip", "--pamr", "--limit", "2"), "caption_iou"),
        ("segment", ("--data", "coco_panoptic", "--background", "none", "--no-aliases", "--templates", "none"), "miou"),
    ):
        out = tmp_path / name
        result = ttd("eval", name, folder, *common, *more, "--out", out)
        assert result.exit_code == 0, result.output
        flat = " ".join(result.stdout.split())
        for part in (
            figure,
            "settings (preset fast):",
            "options.dense.size: 16",
            "backbone.weights_sha256",
            "s an image",
        ):
            assert part in flat, part
        assert f"results: {out / 'results.json'}" in flat
        settings = json.loads((out / "results.json").read_text())["settings"]
        assert settings["protocol"] == name
    assert loaded == ["toy:x"] * 3
    assert json.loads((tmp_path / "tags/results.json").read_text())["settings"]["options"]["rule"] == "absolute"
    dense = json.loads((tmp_path / "text/results.json").read_text())["settings"]["options"]["dense"]
    assert (dense["scales"], dense["flip"], dense["refine"]) == ([1.0, 2.0], True, True)


def test_json_stands_alone_and_ranks_come_from_the_environment(
    folder: Path, tmp_path: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("eval", "text", folder, "--preset", "fast", "--size", "16", "--json")
    found = json.loads(ttd(*arguments).stdout)
    assert found["figures"]["captions"] == 4 and found["path"] is None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    half = json.loads(ttd(*arguments, "--out", tmp_path / "out").stdout)
    assert half["figures"] is None and half["done"] == 2
    assert "other processes are not done" in ttd(*arguments[:-1], "--out", tmp_path / "out").stdout
    full = json.loads(ttd(*arguments, "--out", tmp_path / "out", "--rank", "0").stdout)
    assert full["figures"] == pytest.approx(found["figures"])


@pytest.mark.parametrize(("arguments", "message"), [
    (("tags", "nowhere"), "the folder 'nowhere' of coco_captions does not exist"),
    (("text", ".", "--preset", "papre"), "unknown preset 'papre'; did you mean 'paper'"),
    (("segment", ".", "--data", "vocc"), "unknown segmentation data set 'vocc'"),
    (("text", ".", "--scales", "1,x"), "--scales takes numbers"),
    (("tags", ".", "--data", "coco"), "unknown captioned data set 'coco'"),
])  # fmt: skip
def test_what_a_user_can_mend_is_one_sentence(arguments: tuple[str, ...], message: str, loaded: list[str]) -> None:
    result = ttd("eval", *arguments)
    assert result.exit_code == cli.USER_ERROR
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not loaded, "nothing is loaded before the layout is known to be right"


def test_a_small_model_takes_the_three_protocols(folder: Path) -> None:
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    from ttd_plugins.plugins import load

    backbone = load("open_clip:tiny")
    dense = DenseOptions(size=64, scales=(1.0, 1.5), flip=True, refine=True)
    captions = open_captions("coco_captions", folder)
    with pytest.raises(InputError, match="PAMR does not apply"):
        evaluate_tags(backbone, captions, TagProtocol(dense=dense))
    tags = evaluate_tags(backbone, captions, TagProtocol(dense=replace(dense, refine=False))).metrics
    text = evaluate_text(backbone, captions, TextProtocol(dense=dense)).metrics
    data = open_segmentation("coco_panoptic", folder)
    segment = evaluate_segment(backbone, data, SegmentProtocol(dense=dense, templates="none", aliases=False)).metrics
    assert tags is not None and text is not None and segment is not None
    assert 0 < tags["pixel"]["map"] <= 1 and 0 <= text["caption_iou"] <= 1
    assert segment["miou"] + segment["mfpr"] + segment["mfnr"] == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coco_dense_a", "coco_instances_train"])
def test_all_photographs_by_a_small_and_a_full_size_model(name: str, tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    root = Path(__file__).resolve().parents[2] / "shared" / "data" / name
    if not root.is_dir():
        pytest.skip(f"there are no photographs in {root}")
    from ttd_plugins.plugins import load

    captions = open_captions("coco_captions", root)
    for backbone, side in (("open_clip:tiny", 128), ("open_clip:ViT-B-16@random", 224)):
        adapter = load(backbone)
        dense = DenseOptions(size=side, flip=True)
        tags = evaluate_tags(adapter, captions, TagProtocol(dense=dense), out=tmp_path / f"tags-{side}")
        text = evaluate_text(
            adapter, captions, TextProtocol(dense=replace(dense, refine=True)), out=tmp_path / f"t-{side}"
        )
        assert tags.metrics is not None and text.metrics is not None
        assert tags.done == len(captions) and 0.2 < tags.metrics["positives"] / tags.metrics["candidates"] < 0.5
        assert text.metrics["caption_iou"] + text.metrics["mfpr"] + text.metrics["mfnr"] == pytest.approx(1)
        print(f"{backbone} on {name}: tags {tags.seconds_per_image:.2f} s an image, text {text.seconds_per_image:.2f}")
        if name == "coco_dense_a":
            data = open_segmentation("coco_panoptic", root)
            options = SegmentProtocol(dense=dense, templates="photo", background="auto")
            found = evaluate_segment(adapter, data, options, out=tmp_path / f"segment-{side}")
            assert found.metrics is not None and found.done == len(data)
            assert found.metrics["miou"] + found.metrics["mfpr"] + found.metrics["mfnr"] == pytest.approx(1)
            print(f"  segment {found.seconds_per_image:.2f} s an image, {found.peak_memory_bytes / 2**30:.2f} GiB")


# The function for Python users ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "data", "options", "command"),
    [
        ("tags", "coco_captions", {"rule": "absolute", "threshold": 0.1}, ("--rule", "absolute", "--threshold", "0.1")),
        ("text", "coco_captions", {"scales": (1, 2), "flip": True, "limit": 2},
         ("--scales", "1,2", "--flip", "--limit", "2")),
        ("segment", "coco_panoptic", {"background": "none", "templates": "none"},
         ("--data", "coco_panoptic", "--background", "none", "--templates", "none")),
    ],
)  # fmt: skip
def test_the_function_does_what_the_command_does(
    folder: Path, tmp_path: Path, loaded: list[str], protocol: Any, data: str, options: Any, command: tuple[str, ...]
) -> None:
    arguments = ("eval", protocol, folder, "--preset", "fast", "--size", "16", "--backbone", "toy:x", *command)
    assert ttd(*arguments, "--out", tmp_path / "command").exit_code == 0
    result = evaluate(
        "toy:x", f"{data}:{folder}", protocol=protocol, preset="fast", size=16, out=tmp_path / "function", **options
    )
    assert loaded == ["toy:x"] * 2
    written, own = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("command", "function"))
    for name in ("settings", "figures", "done", "images"):
        assert written[name] == own[name], name
    assert result.path == tmp_path / "function" / "results.json" and result.metrics is not None


def test_the_function_takes_an_adapter_and_a_reader(folder: Path) -> None:
    reader = open_captions("coco_captions", folder, limit=2)
    expected = evaluate_tags(toy(), reader, TagProtocol(dense=PLAIN)).metrics
    assert evaluate(toy(), reader, size=16, flip=False).metrics == expected


def test_the_function_shares_the_work_between_processes(folder: Path, tmp_path: Path) -> None:
    more: Any = {"protocol": "text", "preset": "fast", "size": 16, "out": tmp_path / "out"}
    first = evaluate(toy(), f"coco_captions:{folder}", rank=0, world=2, **more)
    second = evaluate(toy(), f"coco_captions:{folder}", rank=1, world=2, **more)
    assert first.metrics is None and second.metrics is not None and second.done == second.images == 4


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("coco_captions:nowhere", {}, "the folder 'nowhere' of coco_captions does not exist"),
        ("coco_captions", {}, "the data set 'coco_captions' needs a folder; write coco_captions:FOLDER"),
        ("vocc:.", {"protocol": "segment"}, "unknown segmentation data set 'vocc'; did you mean 'voc'"),
        ("voc:.", {}, "unknown captioned data set 'voc'"),
        ("coco_captions:.", {"protocol": "tag"}, "unknown protocol 'tag'; did you mean 'tags'"),
        ("coco_captions:.", {"preset": "papre"}, "unknown preset 'papre'; did you mean 'paper'"),
        ("coco_captions:.", {"threshhold": 0.1}, "unknown option 'threshhold'; did you mean 'threshold'"),
        ("coco_captions:.", {"resize": "long"}, "unknown value of resize 'long'"),
    ],
)
def test_wrong_arguments_of_the_function_are_one_sentence(
    data: str, options: dict[str, Any], message: str, loaded: list[str]
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        evaluate("toy:x", data, **options)
    assert not loaded, "the backbone is loaded after the arguments were checked"


def test_a_record_that_cannot_be_written_is_one_sentence_and_the_others_stay(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reader = open_captions("coco_captions", folder)
    progress: list[int] = []

    def stage(name: str, steps: int) -> Any:
        def advance(count: int) -> None:
            progress.append(count)
            # After the first record, the file becomes one that nothing can be written to.
            if "images" in name and len(progress) == 5:
                (out / "images-0.jsonl").rename(out / "images-9.jsonl")
                (out / "images-0.jsonl").symlink_to("/dev/full")

        return advance

    with pytest.raises(
        InputError, match=r"images-0.jsonl' cannot be written \(No space left on device\); fix the cause"
    ):
        evaluate_tags(toy(), reader, TagProtocol(dense=PLAIN), out=out, stage=stage)
    (out / "images-0.jsonl").unlink()
    again = evaluate_tags(toy(), reader, TagProtocol(dense=PLAIN), out=out)
    assert again.done == 4
    assert len((out / "images-9.jsonl").read_text().splitlines()) == 1
    assert len((out / "images-0.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("damage", [b'{"key": "\xff"}\n', b"{}\n", b"[\n"])
def test_a_damaged_record_is_named(damage: bytes, folder: Path, tmp_path: Path) -> None:
    reader, options = open_captions("coco_captions", folder), TagProtocol(dense=PLAIN)
    evaluate_tags(toy(), reader, options, out=tmp_path / "out")
    with (tmp_path / "out" / "images-0.jsonl").open("ab") as file:
        file.write(damage)
    with pytest.raises(InputError, match=r"a line of .*images-0.jsonl' is damaged .*; delete that line"):
        evaluate_tags(toy(), reader, options, out=tmp_path / "out")


def test_options_of_a_reader_do_not_apply_to_an_open_one(folder: Path) -> None:
    with pytest.raises(InputError, match="split, limit and classes apply to a data set by name; pass"):
        evaluate(toy(), open_captions("coco_captions", folder), limit=2)


def test_the_package_is_light() -> None:
    code = "import sys, ttd_plugins.evaluation; print([n for n in ('torch', 'numpy', 'PIL') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Old names ------------------------------------------------------------------------------------------------------------


def test_old_names_work_and_warn(folder: Path) -> None:
    result = evaluate_text(toy(), open_captions("coco_captions", folder), TextProtocol(dense=PLAIN))
    with pytest.warns(FutureWarning, match="EvaluationResult.figures is now EvaluationResult.metrics"):
        assert result.figures is result.metrics
    assert "figures" in result.as_dict() and "metrics" not in result.as_dict(), "results.json keeps its keys"
    for module, old, new in (
        ("evaluation.metrics", "class_figures", "class_overlaps"),
        ("evaluation.scene_protocol", "picture_pixels", "normalized_pixels"),
        ("evaluation.protocols.tags", "tag_figures", "tag_metrics"),
        ("evaluation.protocols.text", "text_figures", "text_metrics"),
        ("evaluation.protocols.segment", "segment_figures", "segment_metrics"),
        ("evaluation.datasets.annotation_files", "picture_size", "image_size"),
        ("benchmark.captions", "made_up_tags", "synthetic_tags"),
    ):
        found = importlib.import_module(f"ttd_plugins.{module}")
        with pytest.warns(FutureWarning, match=f"{old} is now .*{new}; the old name goes with the next minor release"):
            assert getattr(found, old) is getattr(found, new)
    with pytest.warns(FutureWarning, match=r"pamr\(picture=...\) is now pamr\(image=...\)"):
        pamr(torch.zeros(1, 4, 4), picture=torch.zeros(3, 4, 4))
