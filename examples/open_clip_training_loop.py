"""TTD inside a stock open_clip training loop: the three added lines are marked (1), (2) and (3).

    python examples/open_clip_training_loop.py --captions captions.json --images images/ --model ViT-B-32 \\
        --pretrained laion2b_s34b_b79k --steps 200 --out tuned.pt

``captions.json`` is in COCO's caption format. Without ``--pretrained`` the weights are random and no network is needed.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ttd_plugins import TTD, wrap
from ttd_plugins.data.images import read_image


class CocoCaptions(Dataset):
    """Images with one caption each, from a file in COCO's caption format."""

    def __init__(self, captions: Path, images: Path, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        content = json.loads(captions.read_text(encoding="utf-8"))
        first: dict[int, str] = {}
        for annotation in content["annotations"]:
            first.setdefault(annotation["image_id"], annotation["caption"])
        self.pairs = [
            (images / item["file_name"], first[item["id"]]) for item in content["images"] if item["id"] in first
        ]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        path, caption = self.pairs[index]
        return self.transform(read_image(path)), caption


def endless(loader: DataLoader) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Repeat the loader without end; a loader without batches ends the program with a sentence."""
    if not len(loader):
        raise SystemExit("there are fewer pairs than --batch-size, so there is no whole batch; lower --batch-size")
    while True:
        for images, captions in loader:
            yield images, list(captions)


def train(
    model: nn.Module,
    tokenizer: Any,
    dataset: Callable[[Callable[[Image.Image], torch.Tensor]], Dataset],
    *,
    steps: int,
    batch_size: int = 16,
    rank: int = 8,
    learning_rate: float = 1e-3,
) -> tuple[list[float], Any]:
    """Fine-tune ``model``.

    Args:
        model: an open_clip model.
        tokenizer: open_clip's tokenizer for it.
        dataset: builds a dataset of (pixels, caption) from an image transform.
        steps: optimizer steps.
        batch_size: pairs per step.
        rank: rank of LoRA; 0 trains all weights.
        learning_rate: learning rate of AdamW.

    Returns:
        The loss of every step, and the wrapped backbone.
    """
    backbone = wrap(model, tokenizer=tokenizer, lora=rank or None)  # (1)
    ttd = TTD(backbone)  # (2)

    data = endless(DataLoader(dataset(backbone.dense_transform()), batch_size=batch_size, shuffle=True, drop_last=True))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    model.train()
    losses = []
    for step in range(steps):
        images, captions = next(data)
        loss = ttd(images, captions).loss  # (3)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step + 1}/{steps}  loss {losses[-1]:.4f}", flush=True)
    return losses, backbone


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pretrained", help="a pretrained tag of open_clip  [default: random weights]")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8, help="rank of LoRA; 0 trains all weights")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="file for the tuned open_clip weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    model = open_clip.create_model(model_name=args.model, pretrained=args.pretrained)
    losses, backbone = train(
        model,
        open_clip.get_tokenizer(model_name=args.model),
        lambda transform: CocoCaptions(args.captions, args.images, transform),
        steps=args.steps,
        batch_size=args.batch_size,
        rank=args.rank,
        learning_rate=args.learning_rate,
    )
    # Resident memory is reported in KiB on Linux and in bytes on macOS.
    unit = 2**30 if sys.platform == "darwin" else 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; peak memory {peak:.2f} GiB")
    if args.out:
        # merge() folds LoRA into the weights, so the file loads in open_clip like any checkpoint.
        torch.save(backbone.merge().state_dict(), args.out)
        print(f"weights written to {args.out}")
    return losses


if __name__ == "__main__":
    main()
