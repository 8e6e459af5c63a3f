"""Compare backbones under one loss: the same pairs, steps and options of TTD for each, before and after, in one table.

    python examples/compare_backbones.py open_clip:tiny siglip:tiny eva_clip:tiny --out runs/compare
    python examples/compare_backbones.py open_clip:ViT-B-16@openai siglip:google/siglip2-base-patch16-224 \\
        --pairs captions.jsonl --out runs/compare

Without ``--pairs`` backbones are tuned and measured on generated scenes of 48 to 128 pixels with exact ground truth.
With it, on your own pictures (``.csv`` with the columns ``image`` and ``caption``, or ``.jsonl``), a quarter of them
held out. Nothing says what they show, so ``word_ap`` asks how well words of a caption are told from words of others.

Each backbone's calibration is fitted first, since cosines of different families live on different scales. ``control``
takes the same steps with the contrastive term alone, so that more training is not mistaken for TTD. The output folder
gets ``comparison.json``, written again after every backbone, and pictures of maps before and after.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from ttd_plugins import TTD, load
from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.calibration import fit_calibration
from ttd_plugins.data.images import read_image
from ttd_plugins.embedded.scenes import Scenes
from ttd_plugins.engine import CaptionMaps
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.evaluation.metrics import average_precision, retrieval_recall
from ttd_plugins.evaluation.scenes import measure_on_scenes
from ttd_plugins.reports.heatmaps import draw_maps
from ttd_plugins.training.loop import train
from ttd_plugins.training.scenes import SceneTuning, tune_on_scenes

Pair = tuple[Image.Image, str]


class Data(Protocol):
    """What backbones are compared on."""

    columns: tuple[str, ...]

    def calibration(self, backbone: DenseAdapter) -> list[Pair]: ...
    def pictures(self, backbone: DenseAdapter, count: int) -> list[Pair]: ...
    def tune(self, backbone: DenseAdapter, tuning: SceneTuning) -> None: ...
    def measure(self, ttd: TTD) -> dict[str, Any]: ...


@dataclass
class SceneData:
    """Generated scenes at each backbone's own size; tuned on training scenes, measured on ``count`` test scenes."""

    count: int
    columns = ("tag_ap", "tag_ap_blind", "tag_f1", "caption_iou", "tag_iou", "tag_balance", "retrieval_r1")

    def _scenes(self, split: Any, count: int, backbone: DenseAdapter) -> Scenes:
        return Scenes(split, count, side=backbone.description.image_size[0])

    def calibration(self, backbone: DenseAdapter) -> list[Pair]:
        return [(Image.fromarray(s.image), s.caption) for s in self._scenes("validation", 400, backbone)]

    def pictures(self, backbone: DenseAdapter, count: int) -> list[Pair]:
        return [(Image.fromarray(s.image), s.caption) for s in self._scenes("test", count, backbone)]

    def tune(self, backbone: DenseAdapter, tuning: SceneTuning) -> None:
        tune_on_scenes(backbone, tuning)

    def measure(self, ttd: TTD) -> dict[str, Any]:
        return measure_on_scenes(ttd, self._scenes("test", self.count, ttd.backbone)).as_dict()


class PairData:
    """Pairs of one's own; the last quarter of the file is held out, so the same image should not be in both parts."""

    columns = ("word_ap", "retrieval_r1", "caption_map_spread")

    def __init__(self, file: Path) -> None:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines) if file.suffix == ".csv" else map(json.loads, lines))
        pairs = [(file.parent / row["image"], row["caption"]) for row in rows]
        cut = len(pairs) * 3 // 4
        self.training, self.held_out = pairs[:cut], pairs[cut:]

    def calibration(self, backbone: DenseAdapter) -> list[Pair]:
        return [(read_image(path), caption) for path, caption in self.training[:400]]

    def pictures(self, backbone: DenseAdapter, count: int) -> list[Pair]:
        return [(read_image(path), caption) for path, caption in self.held_out[:count]]

    def tune(self, backbone: DenseAdapter, tuning: SceneTuning) -> None:
        torch.manual_seed(tuning.seed)
        if tuning.rank:
            backbone.add_lora(tuning.rank)
        train(TTD(backbone, tuning.ttd), self._batches(backbone, tuning), tuning.steps, tuning.optimizer)

    def _batches(self, backbone: DenseAdapter, tuning: SceneTuning) -> Iterator[tuple[torch.Tensor, list[str]]]:
        if len(self.training) < tuning.batch_size:
            raise InputError(f"{len(self.training)} training pairs are fewer than a batch of {tuning.batch_size}")
        rng, transform = np.random.default_rng(tuning.seed), backbone.dense_transform()
        while True:
            order = rng.permutation(len(self.training))
            for start in range(0, len(order) - tuning.batch_size + 1, tuning.batch_size):
                chosen = [self.training[index] for index in order[start : start + tuning.batch_size]]
                pixels = torch.stack([transform(read_image(path)) for path, _ in chosen])
                yield pixels.to(backbone.device), [caption for _, caption in chosen]

    @torch.no_grad()
    def measure(self, ttd: TTD) -> dict[str, Any]:
        transform, captions = ttd.backbone.dense_transform(), [caption for _, caption in self.held_out]
        own = ttd.extractor(captions)
        # As many words as the caption has, drawn from other captions and none of its own.
        everything, rng = [word for words in own for word in words], np.random.default_rng(0)
        others = [[word for word in everything if word not in words] for words in own]
        borrowed = [
            rng.choice(other, len(words)).tolist() if other else [] for other, words in zip(others, own, strict=True)
        ]
        alignments = []
        ttd.eval()
        for start in range(0, len(captions), 16):
            part = slice(start, start + 16)
            pixels = torch.stack([transform(read_image(path)) for path, _ in self.held_out[part]])
            pixels = pixels.to(ttd.backbone.device)
            tags = [[*words, *more] for words, more in zip(own[part], borrowed[part], strict=True)]
            alignments.append(ttd.align(pixels, captions[part], ttd.candidates(pixels, captions[part], tags)))
        scores = torch.cat([alignment.tag_maps.amax(-1) for alignment in alignments]).cpu().numpy()
        labels = [
            is_own for words, more in zip(own, borrowed, strict=True) for is_own in [1] * len(words) + [0] * len(more)
        ]
        images, texts, maps = (
            torch.cat([getattr(alignment, part) for alignment in alignments])
            for part in ("pooled", "captions", "caption_maps")
        )
        return {
            "word_ap": average_precision(scores, np.array(labels, bool)),
            "retrieval_r1": retrieval_recall(images, texts, captions),
            "caption_map_spread": float((maps.amax(-1) - maps.amin(-1)).mean()),
            "pairs": len(captions),
        }


def compare(
    name: str,
    data: Data,
    tuning: SceneTuning,
    pictures: Path,
    *,
    count: int = 4,
    control: bool = True,
    fit: bool = True,
) -> dict[str, Any]:
    """Measure one backbone before, after the control and after TTD; draw ``count`` pictures before and after.

    Args:
        name: ``family:model@weights``.
        data: what it is tuned and measured on.
        tuning: steps, batch size, rank, seed and the options of the engine, the same for every backbone.
        pictures: folder for the pictures.
        count: how many there are.
        control: whether the control is run.
        fit: whether a calibration is fitted; otherwise the backbone's own is used.

    Raises:
        TTDError: the backbone cannot be loaded, calibrated or trained.
    """
    started = time.perf_counter()
    row: dict[str, Any] = {"backbone": name}

    def fresh() -> DenseAdapter:
        torch.manual_seed(tuning.seed)  # for names that end in @random
        return load(name)

    backbone = fresh()
    if fit:
        fitted = fit_calibration(backbone, data.calibration(backbone), seed=tuning.seed)
        row["calibration"] = fitted.as_dict()
        tuning = replace(tuning, ttd=replace(tuning.ttd, calibration=fitted.calibration))
    shown = data.pictures(backbone, count)

    def maps() -> list[CaptionMaps]:
        return [TTD(backbone, tuning.ttd).maps(image, caption) for image, caption in shown]

    row["before"], before = data.measure(TTD(backbone, tuning.ttd)), maps()
    if control:
        other = fresh()
        data.tune(other, tuning.control())
        row["control"] = data.measure(TTD(other, tuning.ttd))
    data.tune(backbone, tuning)
    row["after"], after = data.measure(TTD(backbone, tuning.ttd)), maps()
    folder = pictures / re.sub(r"[^\w.-]+", "_", name)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (one, two) in enumerate(zip(before, after, strict=True), 1):
        draw_maps(one, folder / f"{number:02d}.png", after=two)
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def table(rows: list[dict[str, Any]], columns: tuple[str, ...], title: str) -> Table:
    """One line for each backbone and arm."""
    drawn = Table("backbone", "", *(column.replace("_", " ") for column in columns), title=title)
    for row in rows:
        for arm in ("before", "control", "after"):
            if arm in row:
                drawn.add_row(row["backbone"], arm, *(f"{row[arm][column]:.3f}" for column in columns))
        drawn.add_section()
    return drawn


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbones", nargs="+", help="family:model@weights, see `ttd backbones`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, help="your own pictures and captions in place of scenes")
    parser.add_argument("--scenes", type=int, default=512, help="test scenes")
    parser.add_argument("--steps", type=int, default=SceneTuning.steps)
    parser.add_argument("--batch-size", type=int, default=SceneTuning.batch_size)
    parser.add_argument("--rank", type=int, default=SceneTuning.rank, help="of LoRA; 0 trains all weights")
    parser.add_argument("--pictures", type=int, default=4, help="pictures of maps for each backbone")
    parser.add_argument("--control", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--calibration", choices=("fitted", "own"), default="fitted", help="own: the backbone's default"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    data: Data = PairData(args.pairs) if args.pairs else SceneData(args.scenes)
    tuning = SceneTuning(steps=args.steps, batch_size=args.batch_size, rank=args.rank, seed=args.seed)
    settings = {"data": str(args.pairs or f"{args.scenes} scenes"), "calibration": args.calibration} | tuning.as_dict()
    args.out.mkdir(parents=True, exist_ok=True)
    console, rows = Console(), []
    for name in args.backbones:
        try:
            with console.status(name):
                row = compare(
                    name, data, tuning, args.out / "pictures",
                    count=args.pictures, control=args.control, fit=args.calibration == "fitted",
                )  # fmt: skip
        except TTDError as error:
            # One backbone that cannot be had is no reason to lose the others.
            row = {"backbone": name, "error": str(error)}
            console.print(f"{name} is left out: {error}", markup=False)
        rows.append(row)
        (args.out / "comparison.json").write_text(
            json.dumps({"settings": settings, "backbones": rows}, indent=1) + "\n"
        )
    console.print(table(rows, data.columns, f"{settings['data']}, {args.steps} steps of {args.batch_size} pairs"))
    console.print(f"figures in {args.out / 'comparison.json'}, maps in {args.out / 'pictures'}", markup=False)
    return rows


if __name__ == "__main__":
    raise SystemExit(any("error" in row for row in main()))
