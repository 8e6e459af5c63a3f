"""Measure published dense modes alone, after more contrastive training, and after TTD, on test scenes.

    python examples/dense_modes.py --out runs/dense_modes.jsonl
    python examples/dense_modes.py --out runs/dense_modes.jsonl --modes maskclip,sclip

MaskCLIP, SCLIP, ClearCLIP and NACLIP change how the last block computes patch features and train nothing. TTD trains
the backbone, in any of these modes. For each mode the script measures the untuned backbone, a control (contrastive term
alone) and TTD, with the same scenes, steps and seed. A finished arm is a line of the output and is not run again.
docs/why-ttd.md has the results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttd_plugins import TTD, load
from ttd_plugins.embedded.scenes import Scene, Scenes
from ttd_plugins.evaluation.scene_protocol import measure_on_scenes
from ttd_plugins.toolkit.dense_modes import PRESETS
from ttd_plugins.training.scene_tuning import KeptScenes, SceneTuning, training_scenes, tune_on_scenes

METRICS = {
    "tag AP": "tag_ap",
    "tag F1": "tag_f1",
    "caption IoU": "caption_iou",
    "tag IoU": "tag_iou",
    "tag balance": "tag_balance",
    "R@1": "retrieval_r1",
}
SHOWN = ("caption_iou", "tag_iou", "tag_balance", "retrieval_r1")
ARMS = ("before", "control", "after")
Row = dict[str, Any]


def measure(backbone: str, mode: str, arm: str, tuning: SceneTuning, train: KeptScenes, test: Sequence[Scene]) -> Row:
    """Train one arm of a mode on a fresh backbone, if it is trained, and measure it."""
    started = time.perf_counter()
    adapter = load(backbone, dense=mode)
    if arm != "before":
        tune_on_scenes(adapter, tuning if arm == "after" else tuning.control(), scenes=train)
    metrics = measure_on_scenes(TTD(adapter, tuning.ttd), test).as_dict()
    values = {name: metrics[name] for name in METRICS.values()}
    return {"backbone": backbone, "mode": mode, "arm": arm, "metrics": values} | {
        "steps": tuning.steps,
        "seed": tuning.seed,
        "scenes": len(test),
        "seconds": round(time.perf_counter() - started, 1),
    }


def markdown(rows: Sequence[Row]) -> str:
    """A table with the alone, control and TTD values of each mode, in the order of the rows."""
    by_arm = {(row["mode"], row["arm"]): row["metrics"] for row in rows}
    labels = {value: label for label, value in METRICS.items()}
    lines = [
        "| `dense=` | " + " | ".join(f"{labels[name]}: alone, control, **TTD**" for name in SHOWN) + " |",
        "|---" * (len(SHOWN) + 1) + "|",
    ]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        found = [by_arm.get((mode, arm)) for arm in ARMS]
        if None in found:
            continue
        cells = [", ".join(f"{values[name]:.3f}" for values in found if values) for name in SHOWN]
        lines.append(f"| `{mode}` | " + " | ".join(_bold_last(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _bold_last(cell: str) -> str:
    first, last = cell.rsplit(", ", 1)
    return f"{first}, **{last}**"


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure the arms that the output lacks; return all rows of these settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backbone", default="open_clip:tiny", help="a vision transformer of a family with dense modes"
    )
    parser.add_argument("--modes", default=",".join(PRESETS), help="dense modes, comma-separated")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one per mode and arm")
    parser.add_argument("--steps", type=int, default=SceneTuning.steps)
    parser.add_argument("--batch-size", type=int, default=SceneTuning.batch_size)
    parser.add_argument("--scenes", type=int, default=512, help="test scenes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    options.out.parent.mkdir(parents=True, exist_ok=True)
    tuning = SceneTuning(options.steps, options.batch_size, seed=options.seed)
    settings = {
        "backbone": options.backbone,
        "steps": options.steps,
        "seed": options.seed,
        "scenes": options.scenes,
    }
    lines = options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []
    rows = [row for row in map(json.loads, lines) if settings.items() <= row.items()]
    finished = {(row["mode"], row["arm"]) for row in rows}
    side = load(options.backbone).description.image_size[0]
    test, train = list(Scenes("test", options.scenes, side=side)), KeptScenes(training_scenes(tuning, side))
    for mode in options.modes.split(","):
        for arm in ARMS:
            if (mode, arm) in finished:
                continue
            rows.append(measure(options.backbone, mode, arm, tuning, train, test))
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(f"{mode} {arm}: caption IoU {rows[-1]['metrics']['caption_iou']:.3f} ({rows[-1]['seconds']:.0f} s)")
    print(markdown(rows))
    print(f"every arm is a line of {options.out}")
    return rows


if __name__ == "__main__":
    main()
