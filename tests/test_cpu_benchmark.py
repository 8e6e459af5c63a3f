"""``benchmarks/cpu.py``, of which ``docs/speed.md`` shows the tables: what it measures, without a bound on time."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ttd_plugins.toolkit.fast_inference import TOLERANCE

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "cpu.py"
PAGE = FILE.parents[1] / "docs" / "speed.md"


@pytest.fixture
def benchmark() -> Iterator[ModuleType]:
    pytest.importorskip("open_clip")
    spec = importlib.util.spec_from_file_location("cpu_benchmark", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_the_page_names_the_file() -> None:
    assert "python benchmarks/cpu.py" in PAGE.read_text(encoding="utf-8")


def test_every_step_of_the_switch_is_measured_with_its_differences(benchmark: ModuleType) -> None:
    images = sorted(benchmark.PHOTOGRAPHS.glob("*.jpg"))[:1]
    rows: list[dict[str, Any]] = benchmark.measure_encode(images, 1)
    steps = [row["step"] for row in rows]
    assert steps[:2] == ["as it is", "memory kept"] and any("--fast" in step for step in steps)
    for row in rows:
        assert row["images_per_second"] > 0 and row["cpu_ms_per_image"] > 0
        if "bfloat16" not in row["step"]:
            assert max(row["cosine_difference"], row["feature_difference"]) < TOLERANCE
    table = benchmark.markdown(rows).splitlines()
    assert len(table) == len(rows) + 2
    assert table[0].startswith("| step | images per second |")
    assert all(line.count("|") == table[0].count("|") for line in table)


def test_the_start_of_a_command_ends_with_the_first_forward_pass(benchmark: ModuleType) -> None:
    rows = benchmark.measure_start(sorted(benchmark.PHOTOGRAPHS.glob("*.jpg"))[:1], 1, fast=False, commands=("tags",))
    assert [row["command"] for row in rows] == ["ttd tags", "import torch"]
    assert 0 < rows[0]["first_forward"] < rows[0]["end"]


def test_memory_is_measured_in_a_new_process() -> None:
    pytest.importorskip("open_clip")
    call = [sys.executable, str(FILE), "--child", "tags", "8"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert '"peak_mib": ' in done.stdout


def test_a_wrong_table_is_refused() -> None:
    done = subprocess.run([sys.executable, str(FILE), "speed"], capture_output=True, text=True)
    assert done.returncode == 2 and "no table is named 'speed'" in done.stderr
