"""TTD on photographs: pre-train a small model on Flickr8k, tune it, and measure it on dense masks.

    python examples/flickr8k_evidence.py --pairs ../shared/data/flickr8k --masks ../shared/data/coco_dense_a \\
        --work runs/flickr8k

1. Pre-train a small CLIP of open_clip's architecture contrastively on the pairs. The checkpoint with the best retrieval
   on held-out pairs is used.
2. Tune it with LoRA on the same pairs twice: with only the contrastive term (the control), and with TTD. ``--fitted``
   adds a run of TTD with a calibration that is fitted to held-out pairs.
3. Measure all of them with the protocols of tag selection and text-level segmentation on other photographs with a label
   for every pixel (``--masks``, COCO captions with panoptic-style masks). ``--validation`` is a second such set, for
   choosing settings.

A stopped script resumes when it is started again. It writes ``evidence.json`` and a table, ``evidence.md``, into the
working folder. The model is weak: seven thousand images are sixty thousand times fewer than CLIP was trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pretrain_tiny import pretrain, retrieval
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor
from ttd_open_clip.tiny import build_tiny

from ttd_plugins import fine_tune, wrap
from ttd_plugins.adapter import Calibration, DenseAdapter
from ttd_plugins.calibration import fit_calibration
from ttd_plugins.data import open_pairs
from ttd_plugins.data.images import read_image
from ttd_plugins.data.pair_source import ReadNow, StreamSource
from ttd_plugins.embedded.tokenizer import TinyTokenizer, train_bpe
from ttd_plugins.evaluation.datasets import open_captions
from ttd_plugins.evaluation.dense_inference import DenseOptions
from ttd_plugins.evaluation.protocols import TagProtocol, TextProtocol, evaluate_tags, evaluate_text
from ttd_plugins.evaluation.scene_protocol import normalized_pixels

SIDE, VOCABULARY, CONTEXT = 128, 4096, 32
MODEL = {
    "embed_dim": 192,
    "vision_cfg": {
        "image_size": SIDE, "patch_size": 16, "layers": 4, "width": 256, "head_width": 32, "pool_type": "avg",
    },
    "text_cfg": {"context_length": CONTEXT, "vocab_size": VOCABULARY, "layers": 3, "width": 192, "heads": 6},
}  # fmt: skip
METRICS = {
    "tag F1": "tags.pixel.f1",
    "precision": "tags.pixel.precision",
    "recall": "tags.pixel.recall",
    "tag mAP": "tags.pixel.map",
    "Caption IoU": "text.caption_iou",
    "mFPR": "text.mfpr",
    "mFNR": "text.mfnr",
    "tag balance": "text.tag_balance",
    "R@1, held-out pairs": "retrieval_r1",
}
FITTED = "after, calibration fitted"
ARMS: dict[str, dict[str, float] | None] = {
    "before": None, "control": {"tag_weight": 0.0, "distill_weight": 0.0}, "after": {}, FITTED: {},
}  # fmt: skip
"""Options of TTD for each arm; ``None`` means no tuning."""
Pairs = tuple[NDArray[np.uint8], list[list[str]]]


def read_pairs(source: StreamSource, shards: Sequence[str], cache: Path) -> Pairs:
    """Images ``[N, side, side, 3]`` and all captions of each; decoded once and cached in ``cache``."""
    image_file, caption_file = cache.with_suffix(".npy"), cache.with_suffix(".json")
    if not caption_file.exists():
        images, captions = [], []
        for shard in track(shards, f"reading {cache.name}"):
            for pair in source.read_shard(shard, ReadNow()):
                if pair.problem is None and isinstance(pair.image, bytes):
                    image = read_image(pair.image, pair.where).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                    images.append(np.asarray(image))
                    captions.append([text if isinstance(text, str) else text.decode() for text in pair.captions])
        np.save(image_file, np.stack(images))
        caption_file.write_text(json.dumps(captions))
    return np.load(image_file), json.loads(caption_file.read_text())


def build(work: Path, calibration: Calibration | None = None) -> DenseAdapter:
    """Build the model with random weights and the tokenizer of the working folder."""
    config = {"model_cfg": MODEL, "preprocess_cfg": {"resize_mode": "squash", "interpolation": "bicubic"}}
    tokenizer = TinyTokenizer(work / "tokenizer.json", CONTEXT)
    return wrap(build_tiny(config), tokenizer=tokenizer, dense="value_only", calibration=calibration)


def held_out_recall(adapter: DenseAdapter, pairs: Pairs) -> float:
    """R@1 between images and their first captions."""
    images, captions = pairs
    batches = (normalized_pixels(images[start : start + 64], adapter) for start in range(0, len(images), 64))
    return retrieval(adapter, batches, [own[0] for own in captions])


def pretrained(work: Path, train: Pairs, held_out: Pairs, options: argparse.Namespace) -> dict[str, Any]:
    """Pre-train unless that is done; writes the best weights to ``best.safetensors`` and returns a report."""
    finished = work / "pretrained.json"
    if finished.exists():
        return json.loads(finished.read_text())
    torch.manual_seed(options.seed)
    adapter = build(work)
    images, captions = train

    def draw(step: int) -> tuple[Tensor, list[list[str]]]:
        epoch, place = divmod(step * options.batch_size, len(images) - options.batch_size)
        order = np.random.default_rng([options.seed, epoch]).permutation(len(images))
        rows = order[place : place + options.batch_size]
        rng = np.random.default_rng([options.seed, 1, step])
        batch = images[rows]
        mirrored = rng.random(len(rows)) < 0.5
        batch[mirrored] = batch[mirrored, :, ::-1]
        # Two captions per image, because encoding an image costs several times more than encoding a caption.
        chosen = [[captions[row][number] for number in rng.permutation(len(captions[row]))[:2]] for row in rows]
        return normalized_pixels(batch, adapter), [[own[turn % len(own)] for own in chosen] for turn in range(2)]

    found = pretrain(
        adapter, work, options, draw=draw, recall=lambda: held_out_recall(adapter, held_out), precision=torch.float32
    )
    count = sum(parameter.numel() for parameter in adapter.model.parameters())
    report = {"parameters": count, "pairs": len(images), **found}
    finished.write_text(json.dumps(report, indent=1) + "\n")
    return report


def fitted_calibration(work: Path, held_out: Pairs) -> Calibration:
    """The pre-trained model's map from cosine to probability, fitted once to the held-out pairs."""
    file = work / "calibration.json"
    if not file.exists():
        pairs = [(Image.fromarray(image), texts[0]) for image, texts in zip(*held_out, strict=True)]
        found = fit_calibration(load_pretrained(work), pairs).calibration
        file.write_text(json.dumps({"scale": found.scale, "shift": found.shift}) + "\n")
    return Calibration(**json.loads(file.read_text()))


def load_pretrained(work: Path, calibration: Calibration | None = None) -> DenseAdapter:
    """The pre-trained model in evaluation mode, by default with the calibration of the contract."""
    adapter = build(work, calibration)
    adapter.model.load_state_dict(load_file(work / "best.safetensors"))
    return adapter.eval()


def measure(adapter: DenseAdapter, masks: Path, held_out: Pairs, out: Path) -> dict[str, float]:
    """Metrics of one arm, by their path in the results."""
    data = open_captions("coco_captions", masks)
    dense = DenseOptions(size=SIDE, resize="square", flip=True)
    results = {
        "tags": evaluate_tags(adapter, data, TagProtocol(dense=dense), out=out / "tags").metrics,
        "text": evaluate_text(adapter, data, TextProtocol(dense=dense), out=out / "text").metrics,
        "retrieval_r1": held_out_recall(adapter, held_out),
    }
    metrics = {}
    for path in METRICS.values():
        value: Any = results
        for part in path.split("."):
            value = value[part]
        metrics[path] = float(value)
    return metrics


def markdown(found: dict[str, dict[str, float]]) -> str:
    """Markdown table with one row per arm."""
    lines = [f"| | {' | '.join(METRICS)} |", f"|---|{'---|' * len(METRICS)}"]
    for arm, metrics in found.items():
        lines.append(f"| {arm} | {' | '.join(f'{metrics[path]:.3f}' for path in METRICS.values())} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", required=True, help="folder of shards; the first one is held out")
    parser.add_argument("--masks", type=Path, required=True, help="captioned images with masks, in COCO's layout")
    parser.add_argument("--validation", type=Path, help="a second such set, for choosing settings")
    parser.add_argument("--fitted", action="store_true", help="also run TTD with a fitted calibration")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--muon-learning-rate", type=float, default=0.015)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--patch-dropout", type=float, default=0.5)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--tuning-steps", type=int, default=200)
    parser.add_argument("--tuning-batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)

    source = open_pairs(options.pairs)
    if not isinstance(source, StreamSource) or len(source.shards) < 2:
        parser.error(f"{options.pairs} must be a folder with two or more shards, because the first one is held out")
    train = read_pairs(source, source.shards[1:], work / "train")
    held_out = read_pairs(source, source.shards[:1], work / "held_out")
    if not (work / "tokenizer.json").exists():
        train_bpe(work / "tokenizer.json", [text for own in train[1] for text in own], vocabulary=VOCABULARY)
    report = pretrained(work, train, held_out, options)

    file = work / "evidence.json"
    sets = {"figures": options.masks} | ({"validation": options.validation} if options.validation else {})
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in sets}
    if file.exists():
        found |= {name: arms for name, arms in json.loads(file.read_text()).items() if name in sets}
    for arm, ttd in ARMS.items():
        due = [name for name in sets if arm not in found[name]]
        if not due or (arm == FITTED and not options.fitted):
            continue
        adapter = load_pretrained(work, fitted_calibration(work, held_out) if arm == FITTED else None)
        if ttd is not None:
            config = {
                "data": {"source": "::".join(source.shards[1:]), "captions": "random"},
                "optimizer": {
                    "steps": options.tuning_steps,
                    "batch_size": options.tuning_batch_size,
                    "warm_up": 20,
                    "learning_rate": 5e-4,
                },
                "run": {"seed": options.seed, "cpu": True, "checkpoint_minutes": 1},
                "ttd": ttd,
            }
            adapter = fine_tune(config, work / arm, backbone=adapter, resume=True).backbone
        for name in due:
            found[name][arm] = measure(adapter, sets[name], held_out, work / "measured" / name / arm)
        settings = {name: str(value) for name, value in vars(options).items()}
        content = {**found, "pretraining": report, "model": MODEL, "settings": settings}
        file.write_text(json.dumps(content, indent=1) + "\n")
    table = "\n\n".join(f"{sets[name]}:\n\n{markdown(arms)}" for name, arms in found.items()) + "\n"
    (work / "evidence.md").write_text(table)
    print(table)
    print(f"metrics: {file}   table: {work / 'evidence.md'}")


if __name__ == "__main__":
    main()
