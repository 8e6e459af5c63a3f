"""TTD on photographs, from nothing: pre-train a small model on Flickr8k, tune it, and measure it on dense masks.

    python examples/flickr8k_evidence.py --pairs ../shared/data/flickr8k --masks ../shared/data/coco_dense_a \\
        --work runs/flickr8k

1. A small CLIP of open_clip's architecture is pre-trained on the pairs alone, contrastively; the checkpoint with the
   best retrieval on held-out pairs is kept.
2. It is tuned with LoRA on the same pairs twice: by the contrastive term alone (the control) and with TTD. With
   ``--fitted`` TTD tunes it once more, with a calibration that is fitted to held-out pairs.
3. All are measured by the protocols of tag selection and of text-level segmentation on other photographs, whose every
   pixel is labelled (``--masks``, COCO captions with panoptic-style masks), and on a second such set, where there is
   one to choose settings by (``--validation``).

Stopped and started again, it goes on. ``evidence.json`` and a table in ``evidence.md`` are left in the working folder.
The model is weak: seven thousand pictures are sixty thousand times fewer than CLIP saw.
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
FIGURES = {
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
"""Options of TTD that each arm is tuned with; ``None`` for no tuning."""
Pairs = tuple[NDArray[np.uint8], list[list[str]]]


def read_pairs(source: StreamSource, shards: Sequence[str], cache: Path) -> Pairs:
    """Pictures ``[N, side, side, 3]`` and all captions of each; decoded once and kept in ``cache``."""
    pictures, texts = cache.with_suffix(".npy"), cache.with_suffix(".json")
    if not texts.exists():
        images, captions = [], []
        for shard in track(shards, f"reading {cache.name}"):
            for pair in source.read_shard(shard, ReadNow()):
                if pair.problem is None and isinstance(pair.image, bytes):
                    picture = read_image(pair.image, pair.where).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                    images.append(np.asarray(picture))
                    captions.append([text if isinstance(text, str) else text.decode() for text in pair.captions])
        np.save(pictures, np.stack(images))
        texts.write_text(json.dumps(captions))
    return np.load(pictures), json.loads(texts.read_text())


def build(work: Path, calibration: Calibration | None = None) -> DenseAdapter:
    """The model, with fresh weights, and the tokenizer of the working folder."""
    config = {"model_cfg": MODEL, "preprocess_cfg": {"resize_mode": "squash", "interpolation": "bicubic"}}
    tokenizer = TinyTokenizer(work / "tokenizer.json", CONTEXT)
    return wrap(build_tiny(config), tokenizer=tokenizer, dense="value_only", calibration=calibration)


def held_out_recall(adapter: DenseAdapter, pairs: Pairs) -> float:
    """R@1 of pictures by their first captions."""
    pictures, captions = pairs
    batches = (normalized_pixels(pictures[start : start + 64], adapter) for start in range(0, len(pictures), 64))
    return retrieval(adapter, batches, [own[0] for own in captions])


def pretrained(work: Path, train: Pairs, held_out: Pairs, options: argparse.Namespace) -> dict[str, Any]:
    """Pre-train, unless that was done, and report on it; the best weights are left in ``best.safetensors``."""
    finished = work / "pretrained.json"
    if finished.exists():
        return json.loads(finished.read_text())
    torch.manual_seed(options.seed)
    adapter = build(work)
    pictures, captions = train

    def draw(step: int) -> tuple[Tensor, list[list[str]]]:
        epoch, place = divmod(step * options.batch_size, len(pictures) - options.batch_size)
        order = np.random.default_rng([options.seed, epoch]).permutation(len(pictures))
        rows = order[place : place + options.batch_size]
        rng = np.random.default_rng([options.seed, 1, step])
        batch = pictures[rows]
        mirrored = rng.random(len(rows)) < 0.5
        batch[mirrored] = batch[mirrored, :, ::-1]
        # Two captions of each: a picture costs several times what a caption does.
        chosen = [[captions[row][number] for number in rng.permutation(len(captions[row]))[:2]] for row in rows]
        return normalized_pixels(batch, adapter), [[own[turn % len(own)] for own in chosen] for turn in range(2)]

    found = pretrain(
        adapter, work, options, draw=draw, recall=lambda: held_out_recall(adapter, held_out), precision=torch.float32
    )
    count = sum(parameter.numel() for parameter in adapter.model.parameters())
    report = {"parameters": count, "pairs": len(pictures), **found}
    finished.write_text(json.dumps(report, indent=1) + "\n")
    return report


def fitted_calibration(work: Path, held_out: Pairs) -> Calibration:
    """The pre-trained model's map from cosine to probability, fitted once to the held-out pairs."""
    kept = work / "calibration.json"
    if not kept.exists():
        pairs = [(Image.fromarray(image), texts[0]) for image, texts in zip(*held_out, strict=True)]
        found = fit_calibration(load_pretrained(work), pairs).calibration
        kept.write_text(json.dumps({"scale": found.scale, "shift": found.shift}) + "\n")
    return Calibration(**json.loads(kept.read_text()))


def load_pretrained(work: Path, calibration: Calibration | None = None) -> DenseAdapter:
    """The pre-trained model in evaluation mode, with the contract's default calibration unless told otherwise."""
    adapter = build(work, calibration)
    adapter.model.load_state_dict(load_file(work / "best.safetensors"))
    return adapter.eval()


def measure(adapter: DenseAdapter, masks: Path, held_out: Pairs, out: Path) -> dict[str, float]:
    """The figures of one arm."""
    data = open_captions("coco_captions", masks)
    dense = DenseOptions(size=SIDE, resize="square", flip=True)
    results = {
        "tags": evaluate_tags(adapter, data, TagProtocol(dense=dense), out=out / "tags").metrics,
        "text": evaluate_text(adapter, data, TextProtocol(dense=dense), out=out / "text").metrics,
        "retrieval_r1": held_out_recall(adapter, held_out),
    }
    figures = {}
    for path in FIGURES.values():
        value: Any = results
        for part in path.split("."):
            value = value[part]
        figures[path] = float(value)
    return figures


def markdown(found: dict[str, dict[str, float]]) -> str:
    """One line for each arm."""
    lines = [f"| | {' | '.join(FIGURES)} |", f"|---|{'---|' * len(FIGURES)}"]
    for arm, figures in found.items():
        lines.append(f"| {arm} | {' | '.join(f'{figures[path]:.3f}' for path in FIGURES.values())} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", required=True, help="folder of shards; the first one is held out")
    parser.add_argument("--masks", type=Path, required=True, help="captioned pictures with masks, in COCO's layout")
    parser.add_argument("--validation", type=Path, help="a second set of these, to choose settings by")
    parser.add_argument("--fitted", action="store_true", help="TTD once more, with a fitted calibration")
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
        parser.error(f"{options.pairs} is no folder of two shards or more; one is held out")
    train = read_pairs(source, source.shards[1:], work / "train")
    held_out = read_pairs(source, source.shards[:1], work / "held_out")
    if not (work / "tokenizer.json").exists():
        train_bpe(work / "tokenizer.json", [text for own in train[1] for text in own], vocabulary=VOCABULARY)
    report = pretrained(work, train, held_out, options)

    file = work / "evidence.json"
    sets = {"figures": options.masks} | ({"validation": options.validation} if options.validation else {})
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in sets}
    if file.exists():
        found |= {name: kept for name, kept in json.loads(file.read_text()).items() if name in sets}
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
    print(f"figures: {file}   table: {work / 'evidence.md'}")


if __name__ == "__main__":
    main()
