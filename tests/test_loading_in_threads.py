"""Eight threads load backbones of several families at once, in a fresh process where no library is imported yet."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("timm")
pytest.importorskip("transformers")

import huggingface_hub
import torch
from helpers_hub import HUB_NAMES, architectures, write
from hub_server import point_at, serving

from ttd_plugins.plugins import load
from ttd_plugins.toolkit.optional_library import import_library

ROOT = Path(__file__).parents[1]
FRESH = """
import os, threading, warnings
from ttd_plugins.plugins import load
before = dict(os.environ)
names = ["siglip:tiny", "openai_clip:tiny", "open_clip:tiny", "eva_clip:tiny"] * 2
start, failed, loaded = threading.Barrier(len(names)), [], {}
def work(number):
    start.wait()
    try:
        adapter = load(names[number], lora=2)
        adapter.tokenize(["a cat"])
        loaded[number] = sum(float(p.double().sum()) for n, p in adapter.model.named_parameters() if "lora" not in n)
    except BaseException as error:
        failed.append(f"{names[number]}: {type(error).__name__}: {error}")
threads = [threading.Thread(target=work, args=[number]) for number in range(len(names))]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
import torch
from huggingface_hub import constants
print("failed", failed)
print("equal", all(loaded[number] == loaded[number + 4] for number in range(4)) if len(loaded) == 8 else None)
print("offline", constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE"))
print("dtype", torch.get_default_dtype())
"""


def test_eight_threads_load_four_families_in_a_fresh_process() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB_OFFLINE")}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'adapters'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout.splitlines() == ["failed []", "equal True", "offline False None", "dtype torch.float32"], (
        done.stdout + done.stderr[-2000:]
    )


def test_threads_that_download_see_no_offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads from a hub and from its cache at once; the setting of the hub's client never changes."""
    seen: set[bool] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.add(huggingface_hub.constants.HF_HUB_OFFLINE)
            stop.wait(0.0005)

    served = [HUB_NAMES["open_clip"], HUB_NAMES["siglip"], HUB_NAMES["openai_clip"]]
    results: dict[int, Any] = {}
    with architectures(tmp_path, tags=False), serving() as server:
        for seed, one in enumerate(served):
            write(one, tmp_path / one.repository, seed)
            server.add(one.repository, tmp_path / one.repository)
        point_at(server.url, tmp_path / "cache", monkeypatch)

        def work(number: int) -> None:
            try:
                results[number] = load(served[number % 3].name)
            except Exception as error:
                results[number] = error

        threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
        watcher = threading.Thread(target=watch)
        watcher.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        stop.set()
        watcher.join()
    assert [result for result in results.values() if isinstance(result, Exception)] == []
    assert len(results) == 8
    assert seen == {False}
    for number in range(3, 8):
        first, second = results[number % 3].model.state_dict(), results[number].model.state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_thread_at_a_time_imports_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two modules that import parts of each other late, as transformers' do."""
    package = tmp_path / "late_parts"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import importlib, time\n"
        "running = []\n"
        "def __getattr__(name):\n"
        "    running.append(name)\n"
        "    time.sleep(0.02)\n"
        "    assert running == [name], 'two threads import parts at once'\n"
        "    running.remove(name)\n"
        "    return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    failed: list[BaseException] = []

    def work(name: str) -> None:
        try:
            import_library("late_parts", "tests", distribution="x", install="x", attributes=[name, name])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=[f"part_{number}"]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failed == []
