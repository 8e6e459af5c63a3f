"""TTD on a CLIPModel of transformers with its Trainer, as it is; the added lines are marked (1) and (2).

    python examples/transformers_training.py --pairs pairs.csv --model openai/clip-vit-base-patch16 --out tuned

``pairs.csv`` has the columns ``image`` and ``caption``; a ``.jsonl`` file has objects with these keys. Image paths are
relative to the file. ``--model`` is a name on the model hub or a folder. Trainer needs accelerate, which the extra
``lora`` installs.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import CLIPModel, CLIPProcessor, Trainer, TrainingArguments, set_seed

from ttd_plugins import TTD, wrap
from ttd_plugins.data.images import read_image


class Pairs(Dataset):
    """Images and captions listed in a CSV or JSON-lines file."""

    def __init__(self, file: Path, transform: Callable[[Any], torch.Tensor]) -> None:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines) if file.suffix == ".csv" else map(json.loads, lines))
        self.pairs = [(file.parent / row["image"], row["caption"]) for row in rows]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        path, caption = self.pairs[index]
        return self.transform(read_image(path)), caption


def collate(pairs: list[tuple[torch.Tensor, str]]) -> dict[str, Any]:
    """Batch pixels and plain captions, by the names of the engine's arguments; the engine tokenises them."""
    images, captions = zip(*pairs, strict=True)
    return {"images": torch.stack(images), "captions": list(captions)}


def train(
    model: CLIPModel,
    processor: CLIPProcessor,
    pairs: Path,
    arguments: TrainingArguments,
    *,
    rank: int = 8,
    size: int | None = None,
) -> tuple[list[float], Any]:
    """Fine-tune ``model``.

    Args:
        model: the model; changed in place.
        processor: its tokenizer and image processor.
        pairs: file of images and captions.
        arguments: arguments of Trainer, with ``remove_unused_columns=False``.
        rank: rank of LoRA; 0 trains all weights.
        size: side of the square that images are resized to, in pixels; by default the model's input size.

    Returns:
        The logged losses, and the wrapped backbone.
    """
    backbone = wrap(  # (1)
        model, tokenizer=processor.tokenizer, preprocess=processor.image_processor, lora=rank or None
    )
    dataset = Pairs(pairs, backbone.dense_transform(size))
    if arguments.dataloader_drop_last and len(dataset) < arguments.train_batch_size:
        raise SystemExit(
            f"{pairs} has {len(dataset)} pairs, fewer than a batch of {arguments.train_batch_size}; lower --batch-size"
        )
    trainer = Trainer(
        model=TTD(backbone),  # (2)
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], backbone


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--model", default="openai/clip-vit-base-patch16")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8, help="rank of LoRA; 0 trains all weights")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--size", type=int, help="side in pixels  [default: the model's input size]")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tuned model")
    parser.add_argument("--cpu", action="store_true", help="do not use accelerators")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    set_seed(args.seed)
    model = CLIPModel.from_pretrained(args.model)
    processor = CLIPProcessor.from_pretrained(args.model)
    losses, backbone = train(
        model,
        processor,
        args.pairs,
        TrainingArguments(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            logging_steps=1,
            remove_unused_columns=False,
            dataloader_drop_last=True,
            save_strategy="no",
            report_to="none",
            use_cpu=args.cpu,
            seed=args.seed,
        ),
        rank=args.rank,
        size=args.size,
    )
    # merge() folds LoRA in and returns the CLIPModel, so from_pretrained() loads the folder like any other.
    # backbone.unload() would return it bitwise as it was before.
    backbone.merge().save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; the tuned model is in {args.out}")
    return losses


if __name__ == "__main__":
    main()
