"""Measure the choices that the paper leaves open, on validation scenes, against a contrastive-only control.

    python examples/ablation.py --backbone open_clip:tiny --out runs/ablation.jsonl
    python examples/ablation.py --backbone open_clip:tiny --out runs/ablation.jsonl --only rank

Every arm runs the same steps on the same scenes. A finished arm is a line of the output and is not run again. The
defaults of the package come from these metrics. Test scenes are not used.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ttd_plugins import TTD, TTDOptions, load
from ttd_plugins.embedded.scenes import Scenes
from ttd_plugins.evaluation.scene_protocol import SceneMetrics, measure_on_scenes
from ttd_plugins.training.scene_tuning import SceneTuning, tune_on_scenes

COLUMNS = ("tag_ap", "tag_ap_blind", "tag_f1", "caption_iou", "tag_iou", "tag_balance", "retrieval_r1")

Changes = dict[str, Any]


def arms() -> dict[str, Changes]:
    """Changes of each arm against the default settings, by name; the part before the colon is the group."""
    return {
        "default": {},
        "control": {"tag_weight": 0.0, "distill_weight": 0.0},
        "distance:mse-sigmoid": {"distance": "mse"},
        "distance:mse-raw": {"distance": "mse", "activation": "none"},
        "distance:l1-sigmoid": {"distance": "l1"},
        "distance:mse-minmax": {"distance": "mse", "activation": "minmax"},
        "distance:bce-minmax": {"activation": "minmax"},
        "weight:caption-only": {"tag_weight": 0.0},
        "weight:tag-only": {"distill_weight": 0.0},
        "weight:caption-2": {"distill_weight": 2.0},
        "weight:contrastive-0": {"contrastive_weight": 0.0},
        "weight:contrastive-half": {"contrastive_weight": 0.5},
        "anchor:embeddings": {"anchor_weight": 10.0},
        "anchor:similarities": {"anchor_weight": 1.0, "anchor": "similarities"},
        "target:power-2": {"target_power": 2.0},
        "target:power-3": {"target_power": 3.0, "threshold": 0.3},
        "rejected:0": {"rejected_weight": 0.0},
        "selection:minmax-0.3": {"rule": "minmax", "threshold": 0.3},
        "selection:minmax-0.6": {"rule": "minmax", "threshold": 0.6},
        "selection:absolute-0.2": {"rule": "absolute", "threshold": 0.2},
        "selection:probability-0.5": {"rule": "probability", "threshold": 0.5},
        "selection:image-score": {"score": "image"},
        "teacher:frozen": {"teacher": "frozen"},
        "teacher:ema": {"teacher": "ema"},
        "rank:4": {"rank": 4},
        "rank:full": {"rank": 0},
        "lr:low": {"learning_rate": 0.5},
        "lr:high": {"learning_rate": 2.0},
    }


def settings(base: SceneTuning, changes: Changes) -> SceneTuning:
    """Return ``base`` with the changes of an arm; ``learning_rate`` multiplies the default."""
    tuning, options = base, {}
    for name, value in changes.items():
        if name == "rank":
            tuning = replace(tuning, rank=value)
        elif name == "learning_rate":
            rate = value * tuning.optimizer.learning_rate
            tuning = replace(tuning, optimizer=replace(tuning.optimizer, learning_rate=rate))
        else:
            options[name] = value
    return replace(tuning, ttd=replace(tuning.ttd, **options))


def run_arm(backbone: str, tuning: SceneTuning, scenes: Scenes) -> tuple[SceneMetrics, float]:
    """Fine-tune a fresh backbone and measure it with the arm's selection; returns metrics and seconds."""
    started = time.perf_counter()
    adapter = load(backbone)
    tune_on_scenes(adapter, tuning)
    metrics = measure_on_scenes(TTD(adapter, tuning.ttd), scenes)
    return metrics, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="open_clip:tiny")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one per arm")
    parser.add_argument("--only", default="", help="names of arms or groups, comma-separated")
    parser.add_argument("--steps", type=int, default=SceneTuning.steps)
    parser.add_argument("--scenes", type=int, default=512, help="validation scenes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings_of_run = {"backbone": args.backbone, "steps": args.steps, "scenes": args.scenes}
    lines = args.out.read_text(encoding="utf-8").splitlines() if args.out.exists() else []
    # Rows of other settings stay in the file. Older rows have no backbone and no scenes.
    done = [row for row in map(json.loads, lines) if settings_of_run.items() <= (settings_of_run | row).items()]
    finished = {(row["arm"], row["seed"]) for row in done}
    wanted = [name for name in args.only.split(",") if name]
    scenes = Scenes("validation", args.scenes, seed=1)
    base = SceneTuning(steps=args.steps, seed=args.seed, ttd=TTDOptions())
    console = Console()
    if ("before", args.seed) not in finished:
        done.append(_row("before", args, measure_on_scenes(TTD(load(args.backbone)), scenes), 0.0))
        _append(args.out, done[-1])
    for name, changes in arms().items():
        if (name, args.seed) in finished or (wanted and not {name, name.split(":")[0]} & set(wanted)):
            continue
        with console.status(f"{name} {changes}"):
            metrics, seconds = run_arm(args.backbone, settings(base, changes), scenes)
        done.append(_row(name, args, metrics, seconds))
        _append(args.out, done[-1])

    table = Table("arm", "seed", *COLUMNS, "seconds", title=f"{args.backbone}, {args.steps} steps, validation scenes")
    for row in done:
        cells = [f"{row['metrics'][column]:.3f}" for column in COLUMNS]
        table.add_row(row["arm"], str(row["seed"]), *cells, f"{row['seconds']:.0f}")
    console.print(table)
    console.print(f"every arm is a line of {args.out}")


def _row(arm: str, args: argparse.Namespace, metrics: SceneMetrics, seconds: float) -> dict[str, Any]:
    return {
        "arm": arm,
        "backbone": args.backbone,
        "seed": args.seed,
        "steps": args.steps,
        "scenes": args.scenes,
        "metrics": metrics.as_dict(),
        "seconds": round(seconds, 1),
    }


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
