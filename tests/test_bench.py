"""``ttd bench``: what it reports, the yardstick, and the arithmetic of ratios and growth."""

from __future__ import annotations

import json
import math
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")

import numpy as np
import torch
from toy_backbone import toy, toy_images
from typer.testing import CliRunner

from ttd_plugins import TTD, cli
from ttd_plugins.benchmark import memory
from ttd_plugins.benchmark.captions import (
    BUILT_IN,
    SubstituteTokenizer,
    batch_of_captions,
    open_captions,
    synthetic_captions,
    synthetic_tags,
)
from ttd_plugins.benchmark.growth import axis_result, fit_exponent, run_growth
from ttd_plugins.benchmark.measure import run_benchmark, summary
from ttd_plugins.benchmark.step_variants import RATIOS, VARIANTS, Bench, BenchOptions
from ttd_plugins.benchmark.unshared_baseline import unshared_losses
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.export import export_backbone
from ttd_plugins.plugins import load, make_tag_extractor
from ttd_plugins.training.compiling import compile_image_blocks

TINY = "open_clip:tiny@random"
DUE = (
    "ttd_over_contrastive",
    "ttd_over_trimmed_contrastive",
    "unshared_over_ttd",
    "dense_over_encode_image",
    "memory_ttd_over_contrastive",
)
COCO = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_instances_train"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", *arguments])


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    answer = run("--backbone", TINY, "--batch-size", "2", "--repeats", "2", "--no-memory", "--json")
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)


def test_an_exported_folder_is_measured_with_its_weights(tmp_path: Path) -> None:
    export_backbone(load("open_clip:tiny"), tmp_path / "mine")
    bench = Bench(BenchOptions(str(tmp_path / "mine"), batch_size=2))
    assert "@random" not in bench.options.name
    expected = load("open_clip:tiny").model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in bench.adapter.model.state_dict().items())
    assert BenchOptions("open_clip:tiny").name == TINY


def test_the_report_has_every_ratio_beside_its_counted_limit(report: dict[str, Any]) -> None:
    assert report["backbone"] == TINY and report["batch_size"] == 2 and report["repeats"] == 2
    assert set(report["ratios"]) == {*RATIOS, "memory_ttd_over_contrastive"} >= set(DUE)
    assert report["ratios"]["memory_ttd_over_contrastive"] is None and report["memory"] is None
    for name, (above, below) in RATIOS.items():
        low, high = report["spread"][name]
        assert 0 < low <= report["ratios"][name] <= high
        assert report["limits"][name] == report["operations"][above] / report["operations"][below]
        assert math.isclose(report["over_limit"][name], report["ratios"][name] / report["limits"][name])
    assert set(report["seconds"]) == set(report["operations"]) == set(VARIANTS)
    assert all(0 < one["low"] <= one["median"] <= one["high"] for one in report["seconds"].values())
    # The first two built-in captions share no word.
    tags = make_tag_extractor("words")(BUILT_IN[:2])
    assert report["tags_per_caption"] * 2 == report["distinct_tags"] == sum(map(len, tags))
    assert math.isclose(sum(report["share"].values()), 1)
    assert report["tokenizer"] == "the backbone's own"
    counted = report["operations"]
    assert counted["unshared"] > counted["ttd"] > counted["ttd_alone"] > counted["dense"] > 0
    assert counted["contrastive"] > counted["contrastive_trimmed"]
    assert report["peak_source"] == "measured"
    for variant, share in report["model_flops_utilisation"].items():
        rate = counted[variant] / report["seconds"][variant]["median"]
        assert math.isclose(share, rate / report["peak_operations_per_second"])


def test_the_same_as_tables(report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from ttd_plugins.cli.bench import print_report

    axis = axis_result([2, 4], [{"seconds": {"ttd": s}, "operations": {"ttd": s * 1e9}} for s in (1.0, 2.0)])
    print_report(report | {"growth": {"tags_per_caption": axis}})
    shown = capsys.readouterr().out
    assert TINY in shown and "Growth with tags per caption" in shown and "1.00" in shown
    assert f"{report['share']['backward']:.1%}" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch-size", "1"], "batch_size must be at least 2"),
        (["--repeats", "0"], "repeats must be at least 1"),
        (["--peak-tflops", "0"], "peak_tflops must be positive"),
        (["--precision", "bfloat"], "did you mean 'bfloat16'"),
        (["--data", "nowhere.json"], "nowhere.json"),
        (["--image-size", "65"], "multiple of"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(arguments: list[str], said: str) -> None:
    answer = run("--backbone", TINY, *arguments)
    assert answer.exit_code == 2
    assert said in answer.output and len(answer.output.strip().splitlines()) == 1


def test_a_step_that_does_not_fit_is_left_out_or_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ttd_plugins.cli.bench import print_report

    too_large = "unshared"
    own = Bench.loss

    def loss(self: Bench, variant: str) -> torch.Tensor:
        if variant == too_large:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, variant)

    monkeypatch.setattr(Bench, "loss", loss)
    options = BenchOptions(TINY, batch_size=2, repeats=1, peak_tflops=2.0)
    found = run_benchmark(options, memory=False)
    assert set(found["seconds"]) == set(found["operations"]) == set(VARIANTS) - {"unshared"}
    for kind in ("ratios", "spread", "limits", "over_limit"):
        assert {name for name in RATIOS if found[kind][name] is None} == {"unshared_over_ttd"}
    assert (found["peak_operations_per_second"], found["peak_source"]) == (2e12, "given")
    print_report(found)
    assert "shares nothing was skipped" in capsys.readouterr().out
    too_large = "ttd"
    with pytest.raises(TTDError, match=r"ttd with a batch of 2 does not fit .* smaller --batch-size"):
        run_benchmark(options, memory=False)


def test_compiled_blocks_serve_all_variants_and_are_counted_as_they_were_written(
    monkeypatch: pytest.MonkeyPatch, report: dict[str, Any]
) -> None:
    # Without inductor, so that no C compiler is needed.
    monkeypatch.setattr(
        "ttd_plugins.benchmark.step_variants.compile_image_blocks", partial(compile_image_blocks, backend="eager")
    )
    bench = Bench(BenchOptions(TINY, batch_size=2, repeats=1, compile=True))
    blocks = bench.adapter.tower_blocks("image")
    assert blocks and all(block._compiled_call_impl is not None for block in blocks)
    found = run_benchmark(bench.options, bench=bench, memory=False)
    assert found["compiled"] and found["operations"] == report["operations"]
    assert all(block._compiled_call_impl is not None for block in blocks)


def test_captions_come_from_whatever_training_takes(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)]
    annotations = [{"image_id": i // 2, "caption": f"c{i}"} for i in range(6)]
    (tmp_path / "0.jpg").touch()
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    assert open_captions(str(path)) == open_captions(str(tmp_path)) == ["c0", "c2", "c4"]
    assert batch_of_captions(["a", "b"], 5) == ["a", "b", "a", "b", "a"]
    table = tmp_path / "pairs.tsv"
    table.write_text("image\tcaption\n0.jpg\ta dog\n1.jpg\t\n2.jpg\ta cat\n")
    assert open_captions(str(table)) == ["a dog", "a cat"]
    assert open_captions(str(table), limit=1) == ["a dog"]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jpg").write_bytes(b"not looked at")
        (folder / f"{name}.txt").write_text(f"caption {name}")
    assert open_captions(str(folder)) == ["caption a", "caption b"]
    with tarfile.open(tmp_path / "00000.tar", "w") as shard:
        for file in sorted(folder.iterdir()):
            shard.add(file, file.name)
    assert open_captions(str(tmp_path / "00000.tar")) == ["caption a", "caption b"]
    table.write_text("image\tcaption\n0.jpg\t\n")
    for wrong in (tmp_path / "nowhere", table):
        with pytest.raises(InputError, match=wrong.name):
            open_captions(str(wrong))


@pytest.mark.skipif(not COCO.is_dir(), reason=f"needs {COCO}")
def test_captions_of_coco_are_one_a_picture() -> None:
    captions = open_captions(str(COCO))
    assert len(captions) == 80 and all(len(caption.split()) > 3 for caption in captions)


def test_built_in_captions_have_about_eight_candidates() -> None:
    counts = [len(tags) for tags in make_tag_extractor("words")(BUILT_IN)]
    assert 7.5 <= sum(counts) / len(counts) <= 8.5 and len(set(BUILT_IN)) == len(BUILT_IN)


def test_made_up_tags_are_all_distinct() -> None:
    names = [name for one in synthetic_tags(64, 64) for name in one]
    assert len(set(names)) == 64 * 64
    assert len(set(synthetic_captions(8, 4))) == 8
    with pytest.raises(InputError, match="synthetic tags"):
        synthetic_tags(10**6, 64)


def test_the_stand_in_tokenizer_keeps_its_end_token() -> None:
    tokenizer = SubstituteTokenizer(6, 100)
    rows = tokenizer(["a dog.", "extraordinarily long words here", ""])
    assert rows.shape == (3, 6) and int(rows.max()) == 99
    assert rows.argmax(-1).tolist() == [4, 5, 1]
    assert torch.equal(tokenizer("a dog.", context_length=8)[0, :5], rows[0, :5])


# The yardstick -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigmoid", [False, True])
def test_the_yardstick_has_the_losses_of_the_engine_where_captions_have_no_tags_too(sigmoid: bool) -> None:
    backbone, images = toy(3, sigmoid=sigmoid), toy_images(4)
    captions, tags = ["dog cat grass", "owl", "", "dog"], [["dog", "cat", "grass"], ["owl"], [], ["dog"]]
    ours = TTD(backbone)(images, captions, tags)
    theirs = unshared_losses(backbone, images, captions, tags)
    for name, value in ours.losses.items():
        torch.testing.assert_close(theirs[name].detach(), value, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(theirs["loss"], ours.loss, atol=1e-6, rtol=1e-5)
    nothing = unshared_losses(backbone, images, ["", "dog", "owl", "cat"], [[]] * 4)
    assert nothing["tag"].item() == nothing["distill"].item() == 0.0 < nothing["contrastive"].item()


def test_the_yardstick_encodes_every_candidate_of_every_caption_at_the_full_context() -> None:
    backbone = toy()
    unshared_losses(backbone, toy_images(2), ["a dog", "dog dog"], [["dog"], ["dog"]])
    assert [tuple(ids.shape) for ids in backbone.texts] == [(4, backbone.description.context_length)]
    assert len(backbone.images) == 1


def test_variants_train_and_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(BenchOptions("toy:toy", batch_size=3), adapter=toy(), captions=["a dog", "a cat", "an owl"])
    for variant in VARIANTS:
        before = [p.detach().clone() for p in bench.parameters]
        bench.call(variant, keep_gradients=True)
        moved = any(not torch.equal(p, q) for p, q in zip(bench.parameters, before, strict=True))
        assert moved == (variant in ("contrastive", "contrastive_trimmed", "ttd", "ttd_alone", "unshared"))
        assert bench.adapter.model.training == moved
    order: list[str] = []
    monkeypatch.setattr(bench, "call", order.append)
    monkeypatch.setattr(bench, "count", lambda _: 1)
    run_benchmark(BenchOptions("toy:toy", batch_size=3, repeats=2), bench=bench, memory=False)
    rounds = [order[: len(VARIANTS)], order[len(VARIANTS) :]]
    assert rounds[0] == list(VARIANTS) and rounds[1] == [*VARIANTS[1:], VARIANTS[0]]


# Arithmetic ----------------------------------------------------------------------------------------------------------


def test_ratios_are_medians_of_the_rounds_own() -> None:
    rounds = [dict.fromkeys(VARIANTS, 1.0) | {"ttd": ttd, "contrastive": c} for ttd, c in ((2, 1), (9, 3), (8, 2))]
    found = summary(rounds, dict.fromkeys(VARIANTS, 10) | {"ttd": 20})
    assert found["ratios"]["ttd_over_contrastive"] == 3.0
    assert found["spread"]["ttd_over_contrastive"] == [2.0, 4.0]
    assert found["limits"]["ttd_over_contrastive"] == 2.0
    assert found["over_limit"]["ttd_over_contrastive"] == 1.5
    assert found["seconds"]["ttd"] == {"median": 8, "low": 2, "high": 9}


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 0.7, 1.0, 2.0])
def test_exponents_of_synthetic_times_are_found(exponent: float) -> None:
    sizes = [2, 4, 8, 16, 32, 64]
    assert math.isclose(fit_exponent(sizes, [3.5 * size**exponent for size in sizes]), exponent, abs_tol=1e-9)
    noise = np.random.default_rng(0).normal(0, 0.02, len(sizes))
    noisy = [3.5 * size**exponent * math.exp(e) for size, e in zip(sizes, noise, strict=True)]
    assert abs(fit_exponent(sizes, noisy) - exponent) < 0.05
    slope = np.polyfit(np.log(sizes), np.log(noisy), 1)[0]
    assert math.isclose(fit_exponent(sizes, noisy), slope, abs_tol=1e-9)


@pytest.mark.parametrize(("sizes", "values"), [([2], [1]), ([2, 2], [1, 1]), ([2, 4], [1, 0]), ([2, 4], [1])])
def test_an_exponent_needs_two_positive_points(sizes: list[int], values: list[float]) -> None:
    with pytest.raises(InputError, match="two different sizes"):
        fit_exponent(sizes, values)


def test_growth_of_a_tiny_backbone_in_operations() -> None:
    # From a batch on whose texts fill a row: within one row, attention to packed texts grows faster.
    found = run_growth(BenchOptions(TINY, repeats=1), batches=(8, 16), tags=(2, 8))
    assert found["batch"]["sizes"] == [8, 16] and found["tags_per_caption"]["sizes"] == [2, 8]
    tokens = found["image_tokens"]["sizes"]
    assert tokens == sorted(set(tokens)) and len(tokens) > 2
    for axis, highest in (("batch", 1.02), ("tags_per_caption", 1.0)):
        assert 0 < found[axis]["exponents"]["operations"]["ttd"] <= highest
    grown = found["image_tokens"]["exponents"]["operations"]
    assert grown["ttd"] <= grown["contrastive"] + 0.05
    assert all(seconds > 0 for axis in found.values() for row in axis["seconds"].values() for seconds in row)


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="only Linux tells peak memory of a CPU")
def test_peak_memory_sees_what_a_step_needs() -> None:
    few = memory.measure(Bench(BenchOptions(TINY, batch_size=2)), "ttd")
    many = memory.measure(Bench(BenchOptions(TINY, batch_size=24)), "ttd")
    assert few is not None and many is not None and few["resident"] > 0
    assert many["peak"] > few["peak"] + 2**21


@pytest.mark.slow
@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="only Linux tells peak memory of a CPU")
def test_the_whole_command_with_memory_in_fresh_processes() -> None:
    answer = run("--backbone", TINY, "--batch-size", "16", "--repeats", "2", "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert all(isinstance(found["ratios"][name], float) for name in DUE)
    assert found["memory"]["unshared"]["peak"] > found["memory"]["ttd"]["peak"]


def test_times_are_kept_where_memory_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(options: BenchOptions, variant: str) -> None:
        raise TTDError(f"the process that measures {variant} ended with -9")

    monkeypatch.setattr("ttd_plugins.benchmark.measure.peak_memory", fails)
    answer = run("--backbone", TINY, "--batch-size", "2", "--repeats", "1")
    assert answer.exit_code == 0
    assert "measures ttd ended with -9" in answer.output and "images/s" in answer.output
