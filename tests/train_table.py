"""Training of full-size backbones of every family on photographs: `python tests/train_table.py --work FOLDER`.

Twenty steps of TTD on COCO pairs, with LoRA and with all weights, with and without gradient checkpointing, each in a
fresh process for its peak memory. Prints a table as markdown; what FOLDER holds is not done again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from helpers_full_size import BACKBONES
from rich.progress import track

from ttd_plugins import fine_tune

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_instances_train" / "captions.json"
NAMES = ("open_clip", "transformers_clip", "siglip", "eva02")


def measure(
    name: str, tuning: str, checkpointing: bool, work: Path, *, source: Path, steps: int, batch: int, full: bool = True
) -> dict[str, Any]:
    """Train one backbone in this process.

    Returns:
        Losses of each step, seconds a step (median, the first step left out), images a second, and the largest
        resident size of the process in GiB.
    """
    torch.manual_seed(0)
    adapter = BACKBONES[name].adapter(full)
    config = {
        "data": {"source": str(source)},
        "towers": {"image": tuning, "text": tuning, "rank": 8},
        # Fresh weights learn at ten times the rate that suits pretrained ones.
        "optimizer": {"learning_rate": 1e-3 if tuning == "lora" else 1e-4, "warm_up": 5, "batch_size": batch},
        "run": {"log_every": 1, "gradient_checkpointing": checkpointing, "cpu": True, "checkpoint_every": steps},
    }
    config["optimizer"]["steps"] = steps
    started = time.perf_counter()
    fine_tune(config, work / "run", backbone=adapter, progress=False)
    rows = [json.loads(line) for line in (work / "run" / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    rates = sorted(row["images_per_second"] for row in rows[1:])
    return {
        "losses": [row["loss"] for row in rows],
        "images_per_second": rates[len(rates) // 2],
        "seconds": time.perf_counter() - started,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """One line for each run."""
    lines = [
        "| backbone | trained | gradient checkpointing | loss, first and last three steps | images/s | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for key, row in found.items():
        name, tuning, checkpointing = key.split("-")
        first, last = sum(row["losses"][:3]) / 3, sum(row["losses"][-3:]) / 3
        cells = [BACKBONES[name].title, tuning, checkpointing, f"{first:.2f}, {last:.2f}"]
        cells += [f"{row['images_per_second']:.2f}", f"{row['peak_gib']:.2f} GiB"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--small", action="store_true", help="small models of the same kinds")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        name, tuning, checkpointing = options.one.split("-")
        settings = {"source": options.data, "steps": options.steps, "batch": options.batch_size}
        row = measure(name, tuning, checkpointing == "on", options.work, full=not options.small, **settings)
        (options.work / "result.json").write_text(json.dumps(row))
        return
    keys = [f"{name}-{tuning}-{switch}" for name in NAMES for tuning in ("lora", "full") for switch in ("off", "on")]
    found = {}
    for key in track(keys, "training", disable=not sys.stderr.isatty()):
        folder = options.work / key
        result = folder / "result.json"
        if not result.exists():
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, __file__, "--one", key, "--work", str(folder), "--data", str(options.data)]
            command += ["--steps", str(options.steps), "--batch-size", str(options.batch_size)]
            subprocess.run(command + ["--small"] * options.small, check=True)
        found[key] = json.loads(result.read_text())
        print(key, found[key]["images_per_second"], file=sys.stderr, flush=True)
    print(markdown(found))


if __name__ == "__main__":
    main()
