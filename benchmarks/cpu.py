"""Speed on a CPU: start of the commands, images/s of the default backbone with each step of ``--fast``, peak memory.

    python benchmarks/cpu.py                         # all tables, a few minutes
    python benchmarks/cpu.py start encode --rounds 5 --json cpu.json

Each row is the best of several rounds, since other programs only ever add time. Photographs are those of the package,
unless ``--images`` names a folder. Threads are those of torch; ``OMP_NUM_THREADS=2`` limits them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import ttd_plugins

PHOTOGRAPHS = Path(ttd_plugins.__file__).parent / "embedded" / "photographs" / "images"
BACKBONE = "open_clip:photo"
TABLES = ("start", "encode", "folder", "tags")
STARTED = ("tags", "heatmap", "segment")
NAME_COUNTS = (8, 64, 512)
STEP_TAGS = (8, 64, 512)

# Runs a command, and prints when its model is called for the first time: monotonic time is that of the whole system.
_STARTED = """
import sys, time
started, arguments = float(sys.argv[1]), sys.argv[2:]
from ttd_plugins.cli import image_maps, main
load = image_maps.load_backbone
def timed(*names, **options):
    adapter = load(*names, **options)
    def report(*_):
        if handles:
            print(f"first forward {time.monotonic() - started:.3f} {time.process_time():.3f}", file=sys.stderr)
            for handle in handles: handle.remove()
            handles.clear()
    handles = [module.register_forward_pre_hook(report) for module in adapter.model.modules()]
    return adapter
image_maps.load_backbone = timed
main(arguments)
"""


def measure_start(
    images: list[Path], rounds: int, fast: bool, commands: Sequence[str] = STARTED
) -> list[dict[str, Any]]:
    """Seconds from the start of the process to the first forward pass, and to its end, of commands.

    ``seconds`` are wall time, and ``cpu`` is the processor time of the process, which other programs influence less.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        known = {
            "tags": ["tags", str(images[0]), "a dog on the grass"],
            "heatmap": ["heatmap", str(images[0]), "a dog on the grass", "--out", f"{folder}/maps.png"],
            "segment": ["segment", str(images[0]), "dog, grass", "--out", f"{folder}/segments"],
        }
        for name in commands:
            arguments, runs = known[name], []
            for _ in range(rounds):
                start = time.monotonic()
                call = [sys.executable, "-c", _STARTED, str(start), *arguments, *(["--fast"] if fast else [])]
                done = subprocess.run(call, capture_output=True, text=True, check=True)
                whole = time.monotonic() - start
                line = next(line for line in done.stderr.splitlines() if line.startswith("first forward"))
                seconds, cpu = map(float, line.split()[2:])
                runs.append((seconds, cpu, whole))
            seconds, cpu, whole = (min(column) for column in zip(*runs, strict=True))
            rows.append({"command": f"ttd {name}", "first_forward": seconds, "cpu": cpu, "end": whole})
    started = []
    for _ in range(rounds):
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        started.append(time.monotonic() - start)
    rows.append({"command": "import torch", "first_forward": None, "cpu": None, "end": min(started)})
    return rows


def measure_encode(images: list[Path], rounds: int) -> list[dict[str, Any]]:
    """Images/s of dense features at the preferred size, batch by batch of one image, with each step of the switch.

    ``difference`` is the largest difference of a cosine between a patch and a name, and of an element of a normalised
    feature, from those of the backbone as it is.
    """
    import torch
    import torch.nn.functional as F

    from ttd_plugins import load, optimize_for_inference
    from ttd_plugins.adapter import image_pixels
    from ttd_plugins.data.images import read_image
    from ttd_plugins.toolkit.fast_inference import has_bfloat16
    from ttd_plugins.utils.allocator import keep_freed_memory

    plain = load(BACKBONE)
    pixels = torch.stack([image_pixels(plain, read_image(image)) for image in images[:8]])
    names = "dog cat person car bus tree grass sky bench bird boat pizza chair train horse sheep".split()
    with torch.no_grad():
        texts = F.normalize(plain.encode_text(plain.tokenize([f"a photo of a {name}." for name in names]).ids), dim=-1)
    channels_last = copy.deepcopy(plain)
    channels_last.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fast = optimize_for_inference(plain)
    steps: list[tuple[str, Any, Callable[[], AbstractContextManager[Any]]]] = [
        ("as it is", plain, torch.no_grad),
        ("memory kept", plain, torch.no_grad),
        ("+ inference_mode", plain, torch.inference_mode),
        ("+ channels last", channels_last, torch.no_grad),
        ("+ folded norms (--fast)", fast, nullcontext),
    ]
    if has_bfloat16(torch.device("cpu")):
        steps.append(("+ bfloat16 (--bfloat16)", optimize_for_inference(plain, precision="bfloat16"), nullcontext))
    rows: list[dict[str, Any]] = []
    reference = None
    for name, adapter, context in steps:
        if name == "memory kept":
            # Once set, it stays for the process, as in every command.
            keep_freed_memory()

        def encode(adapter: Any = adapter, context: Any = context) -> Any:
            with context():
                return torch.cat([adapter.encode_image(one[None], pooled=False).patches for one in pixels])

        found = F.normalize(encode().float().clone(), dim=-1)
        wall, cpu = _best(encode, rounds)
        reference = found if reference is None else reference
        rows.append(
            {
                "step": name,
                "images_per_second": len(pixels) / wall,
                "cpu_ms_per_image": cpu / len(pixels) * 1000,
                "cosine_difference": float(((found - reference) @ texts.T).abs().max()),
                "feature_difference": float((found - reference).abs().max()),
            }
        )
    return rows


def measure_folder(images: list[Path], rounds: int) -> list[dict[str, Any]]:
    """Images/s of ``ttd tags --vocabulary`` and ``ttd segment`` after their start, decoding and resizing included."""
    from ttd_plugins import load
    from ttd_plugins.segmenting import Segmenter
    from ttd_plugins.tagging import Tagger
    from ttd_plugins.utils.allocator import keep_freed_memory

    keep_freed_memory()
    some = images[:8]
    rows = []
    for fast in (False, True):
        adapter = load(BACKBONE, fast=fast)
        calls: dict[str, Any] = {
            "tags --vocabulary coco_panoptic": Tagger(adapter, "coco_panoptic"),
            "segment 'dog, grass, sky, person'": Segmenter(adapter, "dog, grass, sky, person"),
            "the same, --scales 1 --no-flip --no-pamr": Segmenter(
                adapter, "dog, grass, sky, person", scales=(1.0,), flip=False, refine=False
            ),
        }
        for name, call in calls.items():
            wall, cpu = _best(lambda call=call: [call(image) for image in some], max(rounds // 2, 1))  # type: ignore[misc]
            shown = f"ttd {name}, --fast" if fast else f"ttd {name}"
            rows.append(
                {"command": shown, "images_per_second": len(some) / wall, "cpu_ms_per_image": cpu / len(some) * 1000}
            )
    return rows


def measure_tags(images: list[Path]) -> list[dict[str, Any]]:
    """Peak memory and seconds with more and more names or tags, each in a new process."""
    rows = []
    for what, counts in (("tags", NAME_COUNTS), ("segment", NAME_COUNTS), ("TTD step", STEP_TAGS)):
        for count in counts:
            call = [sys.executable, __file__, "--child", what, str(count), "--images", str(images[0].parent)]
            done = subprocess.run(call, capture_output=True, text=True, check=True)
            rows.append({"what": what, "names": count, **json.loads(done.stdout.splitlines()[-1])})
    return rows


def _measure_names(what: str, count: int, images: list[Path]) -> dict[str, float]:
    """Seconds of the second call, and the growth of the resident size since the backbone is loaded, in MiB."""
    import torch

    from ttd_plugins import TTD, load
    from ttd_plugins.benchmark.captions import synthetic_captions, synthetic_tags
    from ttd_plugins.data.images import read_image
    from ttd_plugins.segmenting import Segmenter
    from ttd_plugins.tagging import Tagger

    adapter = load(BACKBONE)
    names = [f"thing number {index}" for index in range(count)]
    image = read_image(images[0])
    call: Callable[[], object]
    if what == "TTD step":
        ttd, captions = TTD(adapter), synthetic_captions(4, 8)
        pixels = torch.randn(4, 3, 448, 448, generator=torch.Generator().manual_seed(0))
        given = synthetic_tags(4, count)

        def step() -> None:
            adapter.zero_grad()
            ttd(pixels, captions, tags=given).loss.backward()

        call = step
    else:
        made: Any = Tagger(adapter, names, top=10) if what == "tags" else Segmenter(adapter, names)
        call = lambda: made(image)  # noqa: E731
    before = _resident()
    call()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_mib": (peak - before) / 2**20}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _best(call: Callable[[], object], rounds: int) -> tuple[float, float]:
    """The least wall time and the least processor time of several calls, in seconds, after one that is not counted."""
    call()
    walls, cpus = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table, numbers with three digits."""

    def shown(value: Any) -> str:
        return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    titles = list(rows[0])
    lines = [titles, ["---"] * len(titles), *([shown(row[title]) for title in titles] for row in rows)]
    return "".join(f"| {' | '.join(title.replace('_', ' ') for title in line)} |\n" for line in lines)


def device() -> dict[str, Any]:
    """Return what the numbers depend on."""
    import torch

    found = torch.cpu.get_capabilities()
    return {
        "processor": found.get("cpu_name", "unknown"),
        "bfloat16": bool(found.get("avx512_bf16") or found.get("amx_bf16")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "ttd_plugins": ttd_plugins.__version__,
    }


def main() -> None:
    """Measure the named tables, print them, and write them as JSON where ``--json`` names a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)}; all by default")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement (default: 5)")
    parser.add_argument("--images", type=Path, default=PHOTOGRAPHS, help="folder of JPEG photographs")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "COUNT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    images = sorted(given.images.glob("*.jpg"))
    wrong = [table for table in given.tables if table not in TABLES]
    if wrong or not images:
        parser.error(f"no table is named {wrong[0]!r}" if wrong else f"{given.images} has no .jpg file")
    if given.child:
        print(json.dumps(_measure_names(given.child[0], int(given.child[1]), images)))
        return
    measure: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "start": lambda: measure_start(images, given.rounds, fast=False),
        "encode": lambda: measure_encode(images, given.rounds),
        "folder": lambda: measure_folder(images, given.rounds),
        "tags": lambda: measure_tags(images),
    }
    found: dict[str, Any] = {"device": device()}
    print(json.dumps(found["device"]), flush=True)
    for table in given.tables or TABLES:
        found[table] = measure[table]()
        print(f"\n{table}\n\n{markdown(found[table])}", flush=True)
        if given.json:
            given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
