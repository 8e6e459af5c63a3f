"""``benchmarks/gpu.py`` of docs/speed.md: rows, resuming, what does not fit into memory, and bars of the table."""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

for package in ("open_clip", "accelerate", "yaml"):
    pytest.importorskip(package, reason=f"the benchmark uses {package}")

import torch

from ttd_plugins.benchmark.gpu_results import LOOP, Results, Row, markdown, table_row
from ttd_plugins.benchmark.random_pairs import MARKER, RandomPairs, draw_captions, write_pairs
from ttd_plugins.benchmark.step_variants import VARIANTS, Bench
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.plugins import make_tag_extractor

PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module
    spec.loader.exec_module(module)
    return module


gpu = program()


def call(out: Path, *arguments: str) -> None:
    gpu.main(["--device", "cpu", "--quick", "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that two calls have filled: the first measures a row, the second the other, whose baseline fails."""
    from accelerate.state import AcceleratorState

    # Another test of this process may have set another precision, which accelerate keeps.
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("gpu") / "results"
    call(folder, "--only", "tiny`, 4")
    own = Bench.loss

    def loss(self: Bench, variant: str) -> torch.Tensor:
        if variant == "unshared":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, variant)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "loss", loss)
        call(folder)
    return folder


@pytest.fixture(scope="module")
def content(out: Path) -> dict[str, Any]:
    return json.loads((out / gpu.RESULTS).read_text(encoding="utf-8"))


def test_every_row_has_its_measurements(out: Path, content: dict[str, Any]) -> None:
    first, second = content["rows"]
    assert [Row(**record["row"]) for record in (first, second)] == [Row("open_clip:tiny", 4), Row("open_clip:tiny", 6)]
    assert set(first["seconds"]) == {*VARIANTS, LOOP} and first["out_of_memory"] == []
    assert first["images_per_second"][LOOP] == 4 / first["seconds"][LOOP]["median"]
    for record in (first, second):
        assert record["precision"] == "bfloat16" and record["tags_per_caption"] > 4
        assert record["ratios"]["ttd_over_open_clip_loop"] > 0 < record["ratios"]["ttd_over_contrastive"]
        assert record["train"]["images_per_second"] > 0 <= record["train"]["data_seconds_per_step"]
        assert record["environment"]["torch"] == torch.__version__ and record["environment"]["code"]
    assert not (out / "train").exists()


def test_a_variant_that_does_not_fit_is_recorded_and_a_finished_row_is_not_measured_again(
    out: Path, content: dict[str, Any]
) -> None:
    # The second call fails in "unshared", which the first row, of the first call, still has.
    first, second = content["rows"]
    assert "unshared" in first["seconds"]
    assert second["out_of_memory"] == ["unshared"] and set(second["seconds"]) == {*VARIANTS, LOOP} - {"unshared"}
    assert second["ratios"]["unshared_over_ttd"] is None and second["train"] is not None
    assert "6: out of memory: unshared." in (out / gpu.TABLE).read_text(encoding="utf-8")


def test_both_rows_are_profiled(content: dict[str, Any]) -> None:
    profiles = content["profiles"]
    assert {record["row"]["batch_size"] for record in profiles} == {4, 6}
    for record in profiles:
        for step in (record["ttd"], record["contrastive"]):
            assert 0 < step["host_seconds"] <= step["seconds"]
            assert step["kernels"] == 0 == len(step["longest_kernels"])
            seconds = [one["seconds"] for one in step["longest_operators"]]
            assert seconds == sorted(seconds, reverse=True) and "aten::mm" in str(step["longest_operators"])


def test_a_call_without_anything_to_do_measures_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (out / gpu.RESULTS).read_bytes()
    for name in ("measure_row", "profile_row"):
        monkeypatch.setattr(gpu, name, lambda *_: pytest.fail("a finished row was measured again"))
    call(out)
    assert (out / gpu.RESULTS).read_bytes() == before


def test_other_settings_versions_or_code_measure_a_row_again(out: Path, content: dict[str, Any]) -> None:
    record, row = content["rows"][0], Row("open_clip:tiny", 4)
    settings, environment = record["settings"], record["environment"]
    assert Results(out / gpu.RESULTS, settings, environment).find("rows", row) == record
    for changed in ({"repeats": 9}, {"pairs": None}):
        assert Results(out / gpu.RESULTS, settings | changed, environment).find("rows", row) is None
    for changed in ({"device": "other"}, {"torch": "0"}, {"code": "0"}):
        assert Results(out / gpu.RESULTS, settings, environment | changed).find("rows", row) is None


def test_rows_that_would_start_after_the_budget_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "measure_row", lambda *_: pytest.fail("a row started after the budget"))
    call(tmp_path / "none", "--minutes", "0")
    assert "2 rows or profiles are left; run the same command again" in capsys.readouterr().err
    assert not (tmp_path / "none" / gpu.RESULTS).exists()


def test_a_row_that_fails_is_recorded_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def fails(row: Row, *_: Any) -> dict[str, Any]:
        tried.append(row.batch_size)
        if row.batch_size == 4:
            raise TTDError("compiling needs a C compiler")
        return {"out_of_memory": ["building"]}

    monkeypatch.setattr(gpu, "measure_row", fails)
    for _ in range(2):
        call(tmp_path / "some")
        assert "1 rows or profiles are left" in capsys.readouterr().err
    assert tried == [4, 6, 4]
    table = (tmp_path / "some" / gpu.TABLE).read_text(encoding="utf-8")
    assert "4: not measured: compiling needs a C compiler." in table and "6: out of memory: building." in table


def test_memory_that_runs_out_in_training_is_recorded(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise TTDError("the memory ran out; lower the batch size") from torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "fine_tune", fails)
    with pytest.raises(gpu.DoesNotFitError):
        gpu.measure_training(Row("open_clip:tiny", 4), gpu.quick_plan("cpu"), None, out)

    def is_wrong(*_: Any, **__: Any) -> None:
        raise TTDError("the data is wrong")

    monkeypatch.setattr(gpu, "fine_tune", is_wrong)
    with pytest.raises(TTDError, match="the data is wrong"):
        gpu.measure_training(Row("open_clip:tiny", 4), gpu.quick_plan("cpu"), None, out)


# The table -----------------------------------------------------------------------------------------------------------


def record_of(contrastive: float, loop: float) -> dict[str, Any]:
    """A record whose TTD step takes these ratios of the contrastive step and of open_clip's."""
    ratios = {"ttd_over_contrastive": contrastive, "ttd_over_open_clip_loop": loop}
    return {
        "row": {"backbone": "open_clip:ViT-B-16", "batch_size": 64, "compile": True},
        "settings": {"precision": "bfloat16", "repeats": 3},
        "environment": {"device": "A GPU", "driver": "1.2"},
        "images_per_second": {"ttd": 1000.0, "contrastive": 1000 * contrastive, LOOP: 1000 * loop},
        "ratios": ratios,
        "limits": {"ttd_over_contrastive": 0.95},
        "train": None,
    }


def test_the_table_marks_each_missed_bar() -> None:
    cells = [cell.strip() for cell in table_row(record_of(1.0, 1.0)).split("|")]
    assert cells[1:4] == ["`open_clip:ViT-B-16`, 64, `--compile`", "1,000", "1,000"] and cells[6] == "1.000 (0.95)"
    cells = [cell.strip() for cell in table_row(record_of(1.13, 0.9)).split("|")]
    assert cells[2] == "1,000" and cells[4] == "900" and cells[6] == "1.130 (0.95) ✗"
    cells = [cell.strip() for cell in table_row(record_of(0.9, 1.001)).split("|")]
    assert cells[2] == "1,000 ✗" and cells[6] == "0.900 (0.95)"


def test_the_page_has_the_device_and_earlier_rows_after_those_of_today(tmp_path: Path) -> None:
    old, new = record_of(1.13, 1.1), record_of(0.98, 0.97)
    old["environment"] = {"device": "A GPU", "driver": "1.0"}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"rows": [old, new], "profiles": []}))
    text = markdown(Results(file, new["settings"], new["environment"]))
    assert text.index("driver 1.2") < text.index("0.980") < text.index("driver 1.0") < text.index("1.130")
    assert "missed by 13.0%: TTD / contrastive at most 1.00." in text and text.count("## A GPU") == 2
    heads = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in heads} == {heads[0].count("|")}


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [{}], "profiles": []}', '{"rows": [1], "profiles": []}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=r"results\.json is no result"):
        Results(tmp_path / "results.json", {}, {})


# Pairs and arguments -------------------------------------------------------------------------------------------------


def test_pairs_are_deterministic_and_complete(tmp_path: Path) -> None:
    pairs = RandomPairs(count=6, images=2, width=32, height=24, shards=2)
    for name in ("a", "b"):
        write_pairs(tmp_path / name, pairs)
    shards = sorted((tmp_path / "a").glob("*.tar"))
    assert len(shards) == 2
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "b" / shard.name).read_bytes()
        with tarfile.open(shard) as archive:
            assert len(archive.getnames()) == 6
    shards[0].write_bytes(b"unchanged")
    write_pairs(tmp_path / "a", pairs)
    assert shards[0].read_bytes() == b"unchanged"
    write_pairs(tmp_path / "a", RandomPairs(count=6, images=2, width=32, height=24, shards=3))
    assert len(list((tmp_path / "a").glob("*.tar"))) == 3 and shards[0].read_bytes() != b"unchanged"
    (tmp_path / "b" / MARKER).write_bytes(b"caf\xe9")
    write_pairs(tmp_path / "b", pairs)
    assert (tmp_path / "b" / MARKER).read_bytes() == json.dumps(asdict(pairs), sort_keys=True).encode()


def test_captions_have_as_many_candidates_as_those_of_photographs() -> None:
    captions = draw_captions(256)
    assert captions[:64] == draw_captions(64) != draw_captions(64, seed=1)
    tags = make_tag_extractor("words")(captions)
    assert 5.5 < sum(map(len, tags)) / 256 < 6.0
    # docs/speed.md: 229, 383 and 623 distinct ones of Flickr8k.
    for batch, count in ((64, 229), (128, 383), (256, 623)):
        assert abs(len({tag for names in tags[:batch] for tag in names}) / count - 1) < 0.1


def test_the_rows_are_those_that_the_page_has() -> None:
    rows = gpu.full_plan().rows
    assert len(rows) == len(set(rows)) == 12 and sum(row.compile for row in rows) == 6
    assert {row.batch_size for row in rows if "ViT-L" in row.backbone} == {64, 128}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "add --quick"),
        (["--device", "cpu", "--quick", "--only", "nothing"], "no row has 'nothing'"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="error: "):
        call(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
