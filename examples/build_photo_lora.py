"""Train the LoRA that comes with open_clip:photo, beside a control, on photographs whose licence permits publishing.

    python examples/build_photo_lora.py --data ../shared/data --work runs/photo-lora

Training pairs: the photographs of ``coco_more`` under CC BY or CC BY-SA, with their captions (CC BY 4.0). A step takes
each photograph at most once: one of its crops with one of its captions. The control is the same training with the
contrastive term alone. LoRA is on the projection of images and on the MLPs of the text tower, where peft's own layers
suffice: peft alone can load it. The features of the frozen image trunk are computed once per crop, so the script takes
about ten minutes on one idle core.

Validation: every photograph of ``coco_instances_train``, none of which is in the training; those of the package are
among them. ``--test`` also measures ``coco_dense_a``: use it once, after every choice. ``--save`` puts the LoRA of the
first seed and ``recipe.json`` into the package. A stopped script continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from ttd_plugins import TTD, load
from ttd_plugins.adapter import DenseAdapter, image_pixels
from ttd_plugins.data.images import read_image
from ttd_plugins.embedded import model_folder
from ttd_plugins.embedded.folder import LORA_FOLDER
from ttd_plugins.evaluation.captioned_images import open_labelled
from ttd_plugins.evaluation.protocols import TAG_PRESETS, TEXT_PRESETS, evaluate_tags, evaluate_text
from ttd_plugins.lora import load_lora, save_lora, scale_lora
from ttd_plugins.options import TTDOptions
from ttd_plugins.training.step import learning_rate_factor
from ttd_plugins.utils.files import make_folder, write_atomic

BACKBONE, SIZE = "open_clip:photo", 448
PUBLISHABLE = {4: "CC BY 2.0", 5: "CC BY-SA 2.0"}
TRAINING, VALIDATION, TEST = "coco_more", "coco_instances_train", "coco_dense_a"
CONTRASTIVE = {"tag_weight": 0.0, "distill_weight": 0.0}
RECORDED = (
    "steps", "batch_size", "learning_rate", "warm_up", "rank", "modules", "size", "crops", "smallest_crop",
    "lora_scale",
)  # fmt: skip
"""Options that ``recipe.json`` states."""
Features = dict[bytes, Tensor]
METRICS = {
    "caption_iou": "Caption IoU",
    "tag_f1": "tag F1",
    "tag_map": "tag mAP",
    "tag_balance": "tag balance",
    "retrieval_r1": "R@1",
    "zero_shot_top1": "zero-shot top-1",
    "zero_shot_top5": "zero-shot top-5",
}


@dataclass(frozen=True)
class Photograph:
    """A training photograph with its captions."""

    image: Image.Image
    captions: list[str]


def publishable_photographs(folder: Path) -> list[Photograph]:
    """The photographs of a folder in COCO's layout whose licence permits publishing what was trained on them."""
    content = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    captions: dict[int, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
    return [
        Photograph(read_image(folder / "images" / image["file_name"]), captions[image["id"]])
        for image in content["images"]
        if image["license"] in PUBLISHABLE and captions.get(image["id"])
    ]


def random_crop(image: Image.Image, rng: random.Random, smallest: float) -> Image.Image:
    """A crop of the image's aspect ratio, its sides ``smallest`` to 1 of the image's, mirrored with probability 1/2."""
    side = rng.uniform(smallest, 1)
    width, height = round(image.width * side), round(image.height * side)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    crop = image.crop((left, top, left + width, top + height))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def remember_trunk(adapter: DenseAdapter, features: Features) -> DenseAdapter:
    """Let the frozen image trunk compute the feature map of equal pixels once; ``features`` keeps it by their hash."""
    trunk: Any = adapter.model.visual.trunk
    compute = trunk.forward_features

    def forward_features(pixels: Tensor) -> Tensor:
        keys = [hashlib.sha256(row.contiguous().numpy().tobytes()).digest() for row in pixels]
        for key, row in zip(keys, pixels, strict=True):
            if key not in features:
                # What is computed in inference mode could not be trained on later.
                with torch.inference_mode(False), torch.no_grad():
                    features[key] = compute(row[None].clone())[0]
        return torch.stack([features[key] for key in keys])

    trunk.forward_features = forward_features
    return adapter


def draw_crops(photograph: Photograph, rng: random.Random, options: argparse.Namespace) -> list[Image.Image]:
    """The whole photograph, and random crops of it."""
    crops = [random_crop(photograph.image, rng, options.smallest_crop) for _ in range(options.crops - 1)]
    return [photograph.image, *crops]


def train(
    photographs: Sequence[Photograph], ttd: TTDOptions, seed: int, options: argparse.Namespace, features: Features
) -> DenseAdapter:
    """Train LoRA on a fresh backbone; the arms of a seed see the same crops and captions."""
    torch.manual_seed(seed)
    # The same crops for every seed, which draws from them.
    crops_rng, rng = random.Random(0), random.Random(seed)
    adapter = remember_trunk(load(BACKBONE, lora={"rank": options.rank, "modules": options.modules}), features)
    pixels = [
        [image_pixels(adapter, crop, options.size) for crop in draw_crops(one, crops_rng, options)]
        for one in photographs
    ]
    if any(parameter.requires_grad for parameter in adapter.model.visual.trunk.parameters()):
        raise SystemExit(f"--modules {options.modules} has modules of the image trunk, which must stay frozen here")
    engine = TTD(adapter, ttd).train()
    parameters = adapter.lora_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.01)
    order: list[int] = []
    for step in range(options.steps):
        # No photograph occurs twice in a batch, where it would be its own negative.
        if len(order) < options.batch_size:
            order = rng.sample(range(len(photographs)), len(photographs))
        chosen = [order.pop() for _ in range(min(options.batch_size, len(order)))]
        images = torch.stack([rng.choice(pixels[index]) for index in chosen])
        output = engine(images, [rng.choice(photographs[index].captions) for index in chosen])
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * learning_rate_factor(step, options.steps, options.warm_up)
        optimizer.step()
        if step % 10 == 0 or step + 1 == options.steps:
            print(f"  step {step + 1} of {options.steps}: loss {float(output.loss.detach()):.3f}", flush=True)
    return adapter.eval()


def save_half(adapter: DenseAdapter, folder: Path, scale: float) -> None:
    """Write LoRA, scaled, in float16."""
    if scale != 1:
        scale_lora(adapter, scale)
    for parameter in adapter.lora_parameters():
        parameter.data = parameter.data.half()
    save_lora(adapter, folder)


def measure(adapter: DenseAdapter, folder: Path, out: Path, options: argparse.Namespace) -> dict[str, float]:
    """Metrics of tag selection, text-level segmentation, retrieval and zero-shot classification on one data set."""
    reader = open_labelled("coco_captions", folder, limit=options.limit)
    tag_protocol, text_protocol = TAG_PRESETS[options.preset], TEXT_PRESETS[options.preset]
    tag_protocol = replace(tag_protocol, dense=replace(tag_protocol.dense, size=SIZE))
    text_protocol = replace(text_protocol, dense=replace(text_protocol.dense, size=SIZE))
    tags: Any = evaluate_tags(adapter, reader, tag_protocol, out=out / "tags").metrics
    text: Any = evaluate_text(adapter, reader, text_protocol, out=out / "text").metrics
    return {
        "caption_iou": text["caption_iou"],
        "tag_f1": tags["pixel"]["f1"],
        "tag_map": tags["pixel"]["map"],
        "tag_balance": text["tag_balance"],
        "retrieval_r1": tags["retrieval"]["r1"],
        "zero_shot_top1": tags["zero_shot"]["top1"],
        "zero_shot_top5": tags["zero_shot"]["top5"],
    }


def table(runs: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a row for each arm, mean and sample standard deviation over seeds."""
    lines = ["| | " + " | ".join(METRICS.values()) + " |", "|---|" + "---|" * len(METRICS)]
    for arm, rows in runs.items():
        cells = []
        for key in METRICS:
            values = [row[key] for row in rows]
            cells.append(f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else ""))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure the arms, and put the LoRA into the package with ``--save``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the COCO photographs")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--ttd", action="append", default=[], metavar="KEY=VALUE", help="an option of TTD")
    parser.add_argument("--lora-scale", type=float, default=1.0, help="factor of LoRA after training, in every arm")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="the one whose LoRA is saved")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--modules", default=r"^visual\.head|\.mlp\.", help="modules with LoRA, a regular expression")
    parser.add_argument("--size", type=int, default=SIZE, help="side of training images in pixels")
    parser.add_argument("--limit", type=int, help="photographs that are measured of each data set, for a trial")
    parser.add_argument("--crops", type=int, default=4, help="crops of a photograph, the whole one included")
    parser.add_argument("--smallest-crop", type=float, default=0.6, help="smallest side of a crop, as a share")
    parser.add_argument("--preset", default="fast", help="preset of the protocols")
    parser.add_argument("--test", action="store_true", help=f"measure {TEST} too")
    parser.add_argument("--save", action="store_true", help="put LoRA and recipe.json into --out")
    parser.add_argument("--out", type=Path, default=model_folder("open_clip_photo") / LORA_FOLDER)
    options = parser.parse_args(arguments)
    given = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in options.ttd)}
    arms = {"control": TTDOptions(**given | CONTRASTIVE), "after": TTDOptions(**given)}
    photographs = publishable_photographs(options.data / TRAINING)
    pairs = sum(len(one.captions) for one in photographs)
    print(f"{len(photographs)} photographs with {pairs} captions are in the training", flush=True)
    make_folder(options.work)

    seeds = range(options.first_seed, options.first_seed + options.seeds)
    names = [VALIDATION, *([TEST] if options.test else [])]
    features: Features = {}
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in names}
    for name in names:
        out = options.work / "measured" / "before" / name
        found[name]["before"] = [measure(remember_trunk(load(BACKBONE), features), options.data / name, out, options)]
    for seed in seeds:
        for arm, ttd in arms.items():
            folder = options.work / f"{arm}-{seed}"
            if not folder.exists():
                print(f"{arm}, seed {seed}", flush=True)
                save_half(train(photographs, ttd, seed, options, features), folder, options.lora_scale)
            adapter = load_lora(remember_trunk(load(BACKBONE), features), folder)
            adapter.merge()
            for name in names:
                out = options.work / "measured" / f"{arm}-{seed}" / name
                found[name].setdefault(arm, []).append(measure(adapter, options.data / name, out, options))
    for name, runs in found.items():
        print(f"\n**{name}**\n\n{table(runs)}")

    settings = {
        "backbone": BACKBONE,
        "photographs": len(photographs),
        "captions": pairs,
        "licences": sorted(PUBLISHABLE.values()),
        **{
            key: getattr(options, key) for key in ("steps", "batch_size", "learning_rate", "warm_up", "rank", "modules")
        },
        **{key: getattr(options, key) for key in ("size", "crops", "smallest_crop", "lora_scale")},
        "seed": options.first_seed,
        "seeds": options.seeds,
        "ttd": {key: value for key, value in asdict(arms["after"]).items() if key in given},
    }
    recipe = {"settings": settings}
    for label, name in (("validation", VALIDATION), ("test", TEST)):
        if name in found:
            count = len(open_labelled("coco_captions", options.data / name, limit=options.limit).keys())
            # The saved LoRA and its control, and the mean over seeds.
            first = {arm: runs[0] for arm, runs in found[name].items()}
            means = {arm: {key: mean(run[key] for run in runs) for key in METRICS} for arm, runs in found[name].items()}
            recipe[label] = {"photographs": count, **first, "means": means}
    write_atomic(options.work / "recipe.json", json.dumps(recipe, indent=1) + "\n")
    if options.save:
        save_half(load_lora(load(BACKBONE), options.work / f"after-{options.first_seed}"), options.out, 1.0)
        write_atomic(options.out / "recipe.json", json.dumps(recipe, indent=1) + "\n")
    print(f"\nrecipe: {options.work / 'recipe.json'}" + (f"   LoRA: {options.out}" if options.save else ""))


if __name__ == "__main__":
    main()
