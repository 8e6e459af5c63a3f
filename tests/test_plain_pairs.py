"""Held-out pairs without annotations: retrieval, losses, evaluation while training, comparison and calibration."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slow_reference as slow
import torch
from helpers_pairs import as_folder, as_shards, make_pairs
from PIL import Image
from toy_backbone import toy
from typer.testing import CliRunner

from ttd_plugins import cli
from ttd_plugins.engine import TTD, TTDOptions
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation import evaluate
from ttd_plugins.evaluation.datasets import PlainPairs
from ttd_plugins.evaluation.protocols import RetrievalProtocol, evaluate_retrieval


def pairs_folder(root: Path, captions: dict[str, list[str]], side: int = 40) -> Path:
    """A picture of noise and a text with a caption a line for each name."""
    root.mkdir(parents=True)
    for number, (name, texts) in enumerate(captions.items()):
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 256, (side, side + 8, 3), dtype=np.uint8)).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text("\n".join(texts) + "\n")
    return root


CAPTIONS = {
    "a": ["a man and his dog", "two friends outside"],
    "b": ["a red boat on the lake"],
    "c": ["a dog", "a red boat on the lake", "green grass"],
    "d": ["someone reads a book"],
    "e": ["a cat under the table"],
}


# Retrieval ------------------------------------------------------------------------------------------------------------


def test_records_that_lack_a_newer_option_continue(tmp_path: Path) -> None:
    data, options = PlainPairs(pairs_folder(tmp_path / "p", CAPTIONS)), RetrievalProtocol(size=16, losses=True)
    first = evaluate_retrieval(toy(), data, options, out=tmp_path / "out")
    file = tmp_path / "out/settings.json"
    settings = json.loads(file.read_text())
    del settings["options"]["ttd"]["target_power"], settings["options"]["batch"]
    file.write_text(json.dumps(settings))
    assert evaluate_retrieval(toy(), data, options, out=tmp_path / "out").metrics == first.metrics
    other = replace(options, ttd=TTDOptions(target_power=2.0))
    with pytest.raises(InputError, match=r"options.ttd.target_power: 1.0 there, 2.0 now"):
        evaluate_retrieval(toy(), data, other, out=tmp_path / "out")


@torch.no_grad()
@pytest.mark.parametrize("anchor_weight", [0.0, 4.0])
def test_recall_and_losses_agree_with_slow_ones(tmp_path: Path, anchor_weight: float) -> None:
    root = pairs_folder(tmp_path / "p", CAPTIONS)
    backbone = toy()
    options = TTDOptions(tag_weight=2.0, distill_weight=3.0, contrastive_weight=0.5)
    result = evaluate_retrieval(
        backbone,
        PlainPairs(root),
        RetrievalProtocol(
            size=16, losses=True, batch=3, template="see {}", ttd=replace(options, anchor_weight=anchor_weight)
        ),
    )
    found = result.metrics
    assert found is not None and (found["images"], found["captions"], found["skipped"]) == (5, 8, 0)
    images, texts, owners, words = [], [], [], []
    tags, distills = [], []
    for number, (name, captions) in enumerate(CAPTIONS.items()):
        with Image.open(root / f"{name}.png") as opened:
            pixels = backbone.dense_transform(16)(opened)[None]
        pooled = backbone.encode_image(pixels).pooled
        assert pooled is not None
        images.append(slow.unit(pooled[0].tolist()))
        for caption in captions:
            text = backbone.encode_text(backbone.tokenize([f"see {caption}"]).ids)[0]
            texts.append(slow.unit(text.tolist()))
            owners.append(number)
            words.append(caption)
        output = TTD(backbone, options)(pixels, captions[:1])
        tags.append(float(output.losses["tag"]))
        distills.append(float(output.losses["distill"]))
    for k in (1, 5):
        by_image = by_text = 0
        for i, image in enumerate(images):
            near = sorted(range(len(texts)), key=lambda j: -slow.dot(image, texts[j]))[:k]
            own = {words[j] for j in range(len(texts)) if owners[j] == i}
            by_image += any(words[j] in own for j in near)
        for j, text in enumerate(texts):
            near = sorted(range(len(images)), key=lambda i: -slow.dot(text, images[i]))[:k]
            by_text += any(words[j] in CAPTIONS["abcde"[i]] for i in near)
        assert found[f"image_to_text_r{k}"] == pytest.approx(by_image / 5)
        assert found[f"text_to_image_r{k}"] == pytest.approx(by_text / 8)
        assert found[f"r{k}"] == pytest.approx((by_image / 5 + by_text / 8) / 2)
    firsts = [texts[words.index(captions[0])] for captions in CAPTIONS.values()]
    scale = float(backbone.logit_scale())
    parts = [slow.contrastive(images[a:b], firsts[a:b], scale, 0.0, "softmax") * (b - a) for a, b in ((0, 3), (3, 5))]
    loss = found["loss"]
    assert loss["contrastive"] == pytest.approx(sum(parts) / 5, rel=1e-4)
    assert loss["tag"] == pytest.approx(sum(tags) / 5, rel=1e-5)
    assert loss["distill"] == pytest.approx(sum(distills) / 5, rel=1e-5)
    total = 2 * loss["tag"] + 3 * loss["distill"] + 0.5 * loss["contrastive"]
    assert loss["total"] == pytest.approx(total)


def test_unusable_pairs_are_left_out_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = pairs_folder(
        tmp_path / "p", CAPTIONS | {"broken": ["a dog"], "mute": ["nan"], "two": ["", "a cat", "a cat"]}
    )
    (root / "broken.png").write_bytes(b"no image")
    result = evaluate_retrieval(toy(), PlainPairs(root), RetrievalProtocol(size=16))
    assert result.metrics is not None and result.metrics["skipped"] == 2 and result.metrics["images"] == 6
    assert result.metrics["captions"] == 9
    assert any("2 of 8 images are left out" in message for message in caplog.messages)
    with pytest.raises(InputError, match="can be used"):
        evaluate_retrieval(
            toy(), PlainPairs(pairs_folder(tmp_path / "q", {"mute": ["nan"]})), RetrievalProtocol(size=16)
        )
    lost = pairs_folder(tmp_path / "r", {"broken": ["a dog"]})
    (lost / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="nothing can be measured"):
        evaluate_retrieval(toy(), PlainPairs(lost), RetrievalProtocol(size=16))


def test_every_layout_of_pairs_has_the_same_metrics(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    pairs = make_pairs(6, captions=2)
    options = RetrievalProtocol(size=16)
    expected = evaluate_retrieval(toy(), PlainPairs(as_folder(tmp_path / "folder", pairs)), options).metrics
    shards = as_shards(tmp_path / "shards", pairs)
    assert evaluate_retrieval(toy(), PlainPairs(shards), options).metrics == expected
    assert expected is not None and expected["captions"] == 12
    assert len(PlainPairs(shards, limit=2)) == 2
    assert evaluate(toy(), str(tmp_path / "folder"), protocol="retrieval", size=16).metrics == expected


def test_an_evaluation_of_pairs_is_shared_among_processes(tmp_path: Path) -> None:
    data = PlainPairs(pairs_folder(tmp_path / "p", CAPTIONS))
    options = RetrievalProtocol(size=16, losses=True, batch=2)
    whole = evaluate_retrieval(toy(), data, options).metrics
    assert evaluate_retrieval(toy(), data, options, out=tmp_path / "out", rank=1, world=2).metrics is None
    shared = evaluate_retrieval(toy(), data, options, out=tmp_path / "out", rank=0, world=2).metrics
    assert shared is not None and whole is not None
    assert shared.pop("loss") == pytest.approx(whole.pop("loss"))
    assert shared == whole


def test_the_command_measures_retrieval(tmp_path: Path) -> None:
    root = pairs_folder(tmp_path / "p", CAPTIONS)
    more = ["--backbone", "open_clip:tiny", "--losses", "--preset", "fast", "--size", "64"]
    result = CliRunner().invoke(cli.app, ["eval", "retrieval", str(root), *more])
    assert result.exit_code == 0, result.output
    for words in ("image_to_text_r1", "text_to_image_r10", "loss.contrastive", "loss.total", "captions"):
        assert words in result.output
    table = tmp_path / "t.csv"
    table.write_text("photo,words\n" + "".join(f"p/{name}.png,{texts[0]}\n" for name, texts in CAPTIONS.items()))
    columns = ["--image-column", "photo", "--caption-column", "words"]
    result = CliRunner().invoke(cli.app, ["eval", "retrieval", str(table), *columns, *more, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout[result.stdout.index("{") :])["figures"]["captions"] == 5
    missing = CliRunner().invoke(cli.app, ["eval", "retrieval", str(tmp_path / "none")])
    assert missing.exit_code == 2 and "does not exist" in missing.output


# While training -------------------------------------------------------------------------------------------------------


def test_a_run_is_evaluated_on_pairs_masks_and_labels(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs the extra 'train'")
    from helpers_training import log_of, run_toy, toy_config

    root = pairs_folder(tmp_path / "p", CAPTIONS)
    config = toy_config(optimizer={"steps": 3}, evaluation={"data": f"pairs:{root}", "every": 2, "size": 16})
    result = run_toy(tmp_path / "out", config)
    found = {line["step"]: line["evaluation"] for line in log_of(tmp_path / "out") if "evaluation" in line}
    assert list(found) == [0, 2, 3] and result.evaluations == list(found.items())
    assert {"retrieval/r1", "retrieval/text_to_image_r5", "loss/contrastive", "loss/tag", "loss/total"} <= set(found[3])
    assert found[0]["loss/total"] != found[3]["loss/total"]
    assert not list((tmp_path / "out").rglob("images-*.jsonl"))
    assert (tmp_path / "out/evaluation/step-00000003/results.json").is_file()

    own = tmp_path / "own"
    (own / "masks").mkdir(parents=True)
    shutil.copytree(root, own / "images", ignore=shutil.ignore_patterns("*.txt"))
    for name in CAPTIONS:
        Image.fromarray(np.tile(np.array([0, 1], np.uint8), (40, 24))).save(own / f"masks/{name}.png")
    (own / "classes.txt").write_text("background\ndog\n")
    (tmp_path / "labels.csv").write_text("image,labels\np/a.png,dog\np/b.png,cat\np/c.png,\n")
    for data, metric in ((f"folder:{own}", "segment/miou"), (f"table:{tmp_path / 'labels.csv'}", "labels/map")):
        config = toy_config(optimizer={"steps": 1}, evaluation={"data": data, "size": 16})
        run_toy(tmp_path / metric, config)
        lines = [line for line in log_of(tmp_path / metric) if "evaluation" in line]
        assert [line["step"] for line in lines] == [0, 1]
        assert all(math.isfinite(line["evaluation"][metric]) for line in lines)


def test_wrong_held_out_sets_are_refused_before_training(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs the extra 'train'")
    from helpers_training import run_toy, toy_config

    for data, reason in (
        ("pairs:", "pairs:SPEC"),
        (f"pairs:{tmp_path / 'none'}", "does not exist"),
        ("pears:x", "did you mean 'pairs'"),
        (f"folder:{tmp_path}", "list of classes"),
    ):
        with pytest.raises(InputError, match=reason):
            run_toy(tmp_path / "out", toy_config(evaluation={"data": data}))


# Comparison -----------------------------------------------------------------------------------------------------------


def compare(tmp_path: Path, data: str, pairs: Path, **options: Any) -> Any:
    from ttd_plugins.comparison.options import CompareOptions
    from ttd_plugins.comparison.running import run_comparison

    chosen = CompareOptions(
        ("open_clip:tiny",), data=data, pairs=str(pairs), seeds=1, steps=1, batch_size=2, rank=2, gallery=2,
        device="cpu", **options,
    )  # fmt: skip
    out = tmp_path / f"out-{data.partition(':')[0]}"
    comparison = run_comparison(out, chosen)
    page = (out / "report.html").read_text(encoding="utf-8")
    (backbone,) = comparison.backbones
    for arm in ("before", "control", "after"):
        assert {metric.key for metric in comparison.metrics} == set(backbone.metrics[arm][0])
    assert not comparison.failures and not (out / "work").exists()
    return comparison, page


def test_a_comparison_on_pairs_has_a_gallery_without_masks(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs the extra 'train'")
    root = pairs_folder(tmp_path / "p", CAPTIONS, side=64)
    comparison, page = compare(tmp_path, f"pairs:{root}", root)
    keys = [metric.key for metric in comparison.metrics]
    assert keys[0] == "retrieval_r1" and {"image_to_text_r1", "loss_contrastive", "loss_tag"} <= set(keys)
    assert len(comparison.gallery) == 2
    for image in comparison.gallery:
        assert not image.truth and set(image.views["open_clip:tiny"]) == {"before", "control", "after"}
        assert image.views["open_clip:tiny"]["after"].iou is None and image.views["open_clip:tiny"]["after"].tags
    assert (
        "validation loss" in page and comparison.gallery[0].caption in page.replace("</span>", "").replace("<span>", "")
    ) or "gallery" in page


def test_comparisons_on_masks_and_labels_of_ones_own(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs the extra 'train'")
    root = pairs_folder(tmp_path / "p", CAPTIONS, side=64)
    own = tmp_path / "own"
    (own / "masks").mkdir(parents=True)
    shutil.copytree(root, own / "images", ignore=shutil.ignore_patterns("*.txt"))
    for name in CAPTIONS:
        Image.fromarray(np.tile(np.repeat(np.array([0, 1, 2], np.uint8), 24), (64, 1))).save(own / f"masks/{name}.png")
    (own / "classes.txt").write_text("background\ndog, puppy\ndining table\n")
    comparison, page = compare(tmp_path, "folder", root, root=own)
    assert [metric.key for metric in comparison.metrics][:2] == ["miou", "mfpr"] and "mIoU" in page
    shown = comparison.gallery[0]
    assert shown.caption == "dog, dining table" and set(shown.truth) == {"dog", "dining table"}
    assert shown.views["open_clip:tiny"]["after"].iou is not None
    assert shown.labels is not None and shown.labels["dog"] is True
    (tmp_path / "labels.csv").write_text("image,labels\n" + "".join(f"p/{name}.png,dog;cat\n" for name in CAPTIONS))
    comparison, page = compare(tmp_path, f"table:{tmp_path / 'labels.csv'}", root)
    assert comparison.backbones[0].metrics["after"][0]["label_map"] == 1
    assert comparison.gallery[0].caption == "cat, dog" and not comparison.gallery[0].truth


def test_data_of_a_comparison_are_named_once(tmp_path: Path) -> None:
    root = pairs_folder(tmp_path / "p", CAPTIONS)
    for data, options, reason in (
        ("pairs", {}, "--root"),
        (f"pairs:{root}", {"root": root}, "leave --root out"),
        ("pears", {"root": root}, "did you mean 'pairs'"),
        ("pairs", {"root": root, "classes": "voc"}, "not to pairs"),
        ("pairs", {"root": root, "preset": "quick"}, "unknown preset"),
    ):
        with pytest.raises(InputError, match=reason):
            compare(tmp_path, data, root, **options)


# Calibration ----------------------------------------------------------------------------------------------------------


def test_the_command_fits_on_pairs_of_ones_own(tmp_path: Path) -> None:
    from ttd_plugins.embedded.scenes import Scenes

    root = tmp_path / "p"
    root.mkdir()
    for number, scene in enumerate(Scenes("validation", 60)):
        Image.fromarray(scene.image).save(root / f"{number:03d}.png")
        (root / f"{number:03d}.txt").write_text(scene.caption)
    (root / "000.png").write_bytes(b"broken")
    run = CliRunner().invoke(cli.app, ["calibrate", "open_clip:tiny", "--data", str(root), "--json"])
    assert run.exit_code == 0, run.output
    answer = json.loads(run.stdout[run.stdout.index("{") :])
    assert (answer["data"], answer["pairs"], answer["skipped"]) == (str(root), 59, 1)
    assert answer["images"] + answer["held_out_images"] <= 59
    assert answer["log_loss"] < answer["default_log_loss"]
    assert "1 pairs are left out" in run.output or "1 pairs are left out" in run.stderr
    few = CliRunner().invoke(cli.app, ["calibrate", "open_clip:tiny", "--data", str(root), "--limit", "30"])
    assert few.exit_code == 0 and "use it: TTDOptions" in few.output
    for wrong, reason in (
        (["--data", str(root), "--scenes", "4"], "--scenes does not apply"),
        (["--limit", "4"], "--limit does not apply"),
        (["--data", str(root), "--limit", "0"], "1 or more"),
        (["--data", str(tmp_path / "none")], "does not exist"),
        (["--caption-column", "x"], "without --data"),
    ):
        refused = CliRunner().invoke(cli.app, ["calibrate", "open_clip:tiny", *wrong])
        assert refused.exit_code == 2 and reason in refused.output


def test_a_sample_of_pairs_is_drawn_by_its_seed_and_read_from_shards(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    from ttd_plugins.data import open_pairs
    from ttd_plugins.data.pair_sample import sample_pairs

    pairs = make_pairs(12)
    source = open_pairs(as_folder(tmp_path / "folder", pairs))
    first, skipped = sample_pairs(source, 5, seed=1)
    assert not skipped and len({path for path, _ in first}) == 5
    assert sample_pairs(source, 5, seed=1)[0] == first != sample_pairs(source, 5, seed=2)[0]
    assert len(sample_pairs(source, 50)[0]) == 12
    streamed, _ = sample_pairs(open_pairs(as_shards(tmp_path / "shards", pairs)), 5)
    assert [image for image, _ in streamed] == [pair.picture for pair in pairs[:5]]
