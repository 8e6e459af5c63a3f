"""TTD on photographs: open_clip:photo after contrastive training, then tuned with and without TTD, three seeds.

    python examples/photographs_evidence.py --pairs ../shared/data/flickr8k_224 --data ../shared/data \\
        --work runs/photographs

1. ``base``: LoRA of the backbone by the contrastive loss alone, until retrieval on held-out pairs no longer rises. TTD
   starts from a model that is contrastively trained, as CLIP is: where plain contrastive steps still teach much, its
   losses compete with them.
2. For each seed, from the base: ``control`` (more contrastive steps) and ``after`` (the same steps with TTD).
3. All are measured with the protocols of tag selection and text-level segmentation, with open-vocabulary segmentation,
   and by retrieval in one gallery of all photographs that have captions.

``--choose`` measures on the validation photographs alone, for choosing settings; without it the test photographs are
measured too. ``--ttd KEY=VALUE`` and ``--name`` add an arm with other options of TTD. A stopped script resumes.
The image trunk is frozen, so the script computes its feature map of each image once and stores it.
Flickr8k is for research only: the weights stay in ``--work``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from ttd_plugins import TTD, fine_tune, load, restore_backbone
from ttd_plugins.adapter import DenseAdapter, image_pixels
from ttd_plugins.data import open_pairs
from ttd_plugins.data.images import read_image
from ttd_plugins.data.pair_source import ReadNow, StreamSource
from ttd_plugins.evaluation.datasets import open_captions, open_segmentation
from ttd_plugins.evaluation.metrics import retrieval_recalls
from ttd_plugins.evaluation.protocols import (
    SEGMENT_PRESETS,
    TAG_PRESETS,
    TEXT_PRESETS,
    evaluate_segment,
    evaluate_tags,
    evaluate_text,
)
from ttd_plugins.lora import scale_lora
from ttd_plugins.method.text_embeddings import encode_texts
from ttd_plugins.training.jsonl_log import JsonlLog
from ttd_plugins.utils.files import make_folder, write_atomic

BACKBONE, SIZE = "open_clip:photo", 448
VALIDATION, TEST = ("coco_instances_train",), ("coco_dense_a",)
GALLERY = ("coco_dense_a", "coco_more", "coco_instances_train")
SEGMENTATION = ("coco_dense_a", "coco_dense_c")
CONTRASTIVE = {"tag_weight": 0.0, "distill_weight": 0.0}
METRICS = {
    "tag F1": "f1",
    "tag mAP": "map",
    "Caption IoU": "caption_iou",
    "tag balance": "balance",
    "zero-shot top-1": "top1",
    "zero-shot top-5": "top5",
    "R@1": "r1",
    "mIoU": "miou",
}
Held = list[tuple[Any, list[str]]]


class TrunkCache:
    """Feature maps of a frozen image trunk, by the SHA-1 of the pixels of an image."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.maps: dict[str, Tensor] = load_file(path) if path.exists() else {}
        self.stored = len(self.maps)

    def attach(self, adapter: Any) -> DenseAdapter:
        """Let the trunk of an adapter return stored feature maps; return the adapter."""
        trunk = adapter.model.visual.trunk
        compute = trunk.forward_features

        def forward_features(pixels: Tensor) -> Tensor:
            active = [module for module in trunk.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
            trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in trunk.parameters())
            if active or trained:
                raise RuntimeError("the trunk is trained, so its feature maps cannot be stored")
            keys = [hashlib.sha1(image.numpy().tobytes()).hexdigest() for image in pixels]
            missing = [row for row, key in enumerate(keys) if key not in self.maps]
            if missing:
                # Tensors of the inference mode could not be used in a later backward pass.
                with torch.inference_mode(False), torch.no_grad():
                    for row, features in zip(missing, compute(pixels[missing].clone()), strict=True):
                        self.maps[keys[row]] = features.clone()
            return torch.stack([self.maps[key] for key in keys])

        trunk.forward_features = forward_features
        return adapter

    def save(self) -> None:
        """Write the feature maps if there are new ones."""
        if len(self.maps) > self.stored:
            save_file(self.maps, self.path)
            self.stored = len(self.maps)


def held_out_pairs(source: StreamSource, limit: int) -> Held:
    """The first images of the first shard with all their captions."""
    pairs: Held = []
    for pair in source.read_shard(source.shards[0], ReadNow()):
        if pair.problem is None and isinstance(pair.image, bytes) and len(pairs) < limit:
            texts = [text if isinstance(text, str) else text.decode() for text in pair.captions]
            pairs.append((read_image(pair.image, pair.where), texts))
    return pairs


@torch.inference_mode()
def recall(adapter: DenseAdapter, pairs: Held, size: int) -> float:
    """R@1, mean of both directions, with every caption of each image."""
    adapter.eval()
    images = []
    for start in range(0, len(pairs), 32):
        pixels = torch.stack([image_pixels(adapter, image, size) for image, _ in pairs[start : start + 32]])
        features = adapter.encode_image(pixels).pooled
        assert features is not None
        images.append(normalize(features.float(), dim=-1))
    texts = [text for _, own in pairs for text in own]
    owner = [row for row, (_, own) in enumerate(pairs) for _ in own]
    embeddings, _ = encode_texts(adapter, texts)
    return retrieval_recalls(torch.cat(images), embeddings, owner, texts, (1,))["r1"]


def config(options: argparse.Namespace, shards: Sequence[str], ttd: dict[str, Any], seed: int, steps: int) -> Any:
    """A training configuration; every arm differs in ``ttd`` and the seed alone."""
    return {
        "data": {"source": "::".join(shards), "captions": "random", "image_size": options.size},
        "towers": {"rank": options.rank, "modules": options.modules or None},
        "optimizer": {
            "steps": steps,
            "batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "warm_up": 20,
        },
        "run": {"seed": seed, "cpu": True, "checkpoint_minutes": 1, "keep": 1},
        "ttd": ttd,
    }


def base_run(options: argparse.Namespace, shards: Sequence[str], held: Held) -> int:
    """Train the base and return the step with the best R@1 on held-out pairs; step 0 is the untrained backbone."""
    run, record = options.work / "base", options.work / "base.json"
    if not record.exists():
        found = {"0": recall(untrained(options), held, options.size)}

        def evaluate(ttd: TTD, step: int) -> dict[str, float]:
            return {"r1": recall(ttd.backbone, held, options.size)}

        content = config(options, shards, CONTRASTIVE, options.first_seed, options.base_steps)
        steps = options.base_steps // options.every
        content["run"] |= {"evaluate_every": options.every, "checkpoint_every": options.every, "keep": steps + 1}
        fine_tune(content, run, backbone=untrained(options), resume=run.exists(), evaluate=evaluate)
        for line in JsonlLog(run / "log.jsonl").read():
            if "evaluation" in line:
                found[str(line["step"])] = line["evaluation"]["r1"]
        write_atomic(record, json.dumps(found) + "\n")
    found = json.loads(record.read_text())
    print(
        "base, held-out R@1 by step: " + ", ".join(f"{step} {value:.3f}" for step, value in found.items()), flush=True
    )
    return int(max(found, key=found.__getitem__))


def untrained(options: argparse.Namespace) -> DenseAdapter:
    """The shipped backbone; the feature maps of its trunk are stored."""
    return options.cache.attach(load(BACKBONE))


def load_base(options: argparse.Namespace, step: int) -> DenseAdapter:
    """The base in evaluation mode, its LoRA merged."""
    adapter = untrained(options)
    if step:
        adapter = restore_backbone(options.work / "base", step, backbone=adapter)
        adapter.merge()
    return adapter.eval()


def tuned(options: argparse.Namespace, shards: Sequence[str], arm: str, seed: int, base: int) -> DenseAdapter:
    """The backbone of an arm and seed, trained unless that is done."""
    run = options.work / f"{arm}-{seed}"
    if not (run / "seconds.json").exists():
        ttd = CONTRASTIVE if arm == "control" else options.ttd
        content = config(options, shards, ttd, seed, options.steps)
        began = time.monotonic()
        fine_tune(content, run, backbone=load_base(options, base), resume=run.exists())
        write_atomic(run / "seconds.json", json.dumps(time.monotonic() - began) + "\n")
    adapter = restore_backbone(run, backbone=load_base(options, base))
    if options.lora_scale != 1:
        scale_lora(adapter, options.lora_scale)
    return adapter.eval()


def gallery_recall(adapter: DenseAdapter, data: Path, size: int) -> float:
    """R@1 in one gallery of every photograph with captions."""
    pairs: Held = []
    for name in GALLERY:
        content = json.loads((data / name / "captions.json").read_text())
        captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        for image in content["images"]:
            path = next((data / name).rglob(image["file_name"]))
            pairs.append((read_image(path), captions[image["id"]]))
    return recall(adapter, pairs, size)


def measure(adapter: DenseAdapter, options: argparse.Namespace, label: str) -> dict[str, dict[str, float]]:
    """Metrics by data set; each protocol resumes from the records of its folder."""
    found: dict[str, dict[str, float]] = {}
    names = VALIDATION if options.choose else (*VALIDATION, *TEST)
    for name in names:
        out = options.work / "measured" / label / name
        reader = open_captions("coco_captions", options.data / name)
        tag_protocol, text_protocol = TAG_PRESETS[options.preset], TEXT_PRESETS[options.preset]
        tag_protocol = replace(tag_protocol, dense=replace(tag_protocol.dense, size=SIZE))
        text_protocol = replace(text_protocol, dense=replace(text_protocol.dense, size=SIZE))
        tags: Any = evaluate_tags(adapter, reader, tag_protocol, out=out / "tags").metrics
        text: Any = evaluate_text(adapter, reader, text_protocol, out=out / "text").metrics
        found[name] = {
            "f1": tags["pixel"]["f1"],
            "map": tags["pixel"]["map"],
            "caption_iou": text["caption_iou"],
            "balance": text["tag_balance"],
            "top1": tags["zero_shot"]["top1"],
            "top5": tags["zero_shot"]["top5"],
        }
    found["all photographs"] = {"r1": gallery_recall(adapter, options.data, SIZE)}
    for name in () if options.choose else SEGMENTATION:
        protocol = SEGMENT_PRESETS[options.preset]
        protocol = replace(protocol, dense=replace(protocol.dense, size=SIZE))
        segments = open_segmentation("coco_panoptic", options.data / name)
        out = options.work / "measured" / label / f"{name}-segment"
        metrics: Any = evaluate_segment(adapter, segments, protocol, out=out).metrics
        found.setdefault(name, {})["miou"] = metrics["miou"]
    return found


def table(found: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    """Markdown: for each data set one row an arm, mean and sample standard deviation over seeds."""
    lines: list[str] = []
    for name in next(iter(found.values()))[0]:
        columns = [(label, key) for label, key in METRICS.items() if key in found["before"][0][name]]
        lines += [
            f"**{name}**",
            "",
            f"| | {' | '.join(label for label, _ in columns)} |",
            f"|---|{'---|' * len(columns)}",
        ]
        for arm, runs in found.items():
            cells = []
            for _, key in columns:
                values = [run[name][key] for run in runs]
                spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{mean(values):.3f}{spread}")
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, measure every arm, and write ``evidence.json`` and ``evidence.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", required=True, help="folder of shards; the first one is held out")
    parser.add_argument("--data", type=Path, required=True, help="folder of the COCO photographs")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--choose", action="store_true", help="measure on validation photographs alone")
    parser.add_argument("--name", default="after", help="name of the arm with TTD")
    parser.add_argument("--ttd", action="append", default=[], metavar="KEY=VALUE", help="an option of TTD")
    parser.add_argument("--lora-scale", type=float, default=1.0, help="factor of LoRA after training, in every arm")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--base-steps", type=int, default=800)
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations of the base")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--modules", default=r"^visual\.head|^text", help="modules with LoRA; empty means all")
    parser.add_argument("--size", type=int, default=224, help="side of training images in pixels")
    parser.add_argument("--preset", default="fast", help="preset of the protocols")
    parser.add_argument("--held-out", type=int, default=500, help="images of the held-out shard that are used")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    options.ttd = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in options.ttd)}
    torch.set_num_threads(options.threads)
    make_folder(options.work)
    source = open_pairs(options.pairs)
    if not isinstance(source, StreamSource) or len(source.shards) < 2:
        parser.error(f"{options.pairs} must be a folder with two or more shards, because the first one is held out")
    shards = source.shards[1:]
    options.cache = TrunkCache(options.work / "trunk.safetensors")
    base = base_run(options, shards, held_out_pairs(source, options.held_out))

    scale = "" if options.lora_scale == 1 else f"-scale{options.lora_scale:g}"
    kind = "chosen" if options.choose else "evidence"
    options.cache.save()
    found: dict[str, list[dict[str, dict[str, float]]]] = {}
    found["untrained"] = [measure(untrained(options).eval(), options, "untrained")]
    found["before"] = [measure(load_base(options, base), options, "before")]
    for arm in ("control", options.name):
        found[arm] = []
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            adapter = tuned(options, shards, arm, seed, base)
            found[arm].append(measure(adapter, options, f"{arm}{scale}-{seed}"))
            options.cache.save()
    settings = {name: str(value) for name, value in vars(options).items() if name != "cache"}
    stem = f"{kind}-{options.name}{scale}"
    content = {"metrics": found, "base_step": base, "settings": settings}
    write_atomic(options.work / f"{stem}.json", json.dumps(content, indent=1) + "\n")
    write_atomic(options.work / f"{stem}.md", table(found))
    print(table(found))
    print(f"metrics: {options.work / f'{stem}.json'}   table: {options.work / f'{stem}.md'}")


if __name__ == "__main__":
    main()
