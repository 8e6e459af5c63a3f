"""Pre-train an embedded model contrastively on scenes, as CLIP is pre-trained on the web; checkpoints and resumes.

    python examples/pretrain_tiny.py --backbone open_clip:tiny --work runs/open_clip_tiny

Writes ``model.safetensors`` (float16) and ``recipe.json`` into the embedded model's folder. The end is set by a fixed
number of steps; of the checkpoints, the one with the best retrieval on validation scenes is kept. No figure of single
tag bias has a say.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from ttd_plugins import load
from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.embedded import model_folder
from ttd_plugins.embedded.scenes import Scenes
from ttd_plugins.embedded.tokenizer import train_tokenizer
from ttd_plugins.evaluation.metrics import retrieval_recall
from ttd_plugins.losses import contrastive_loss

VALIDATION_SCENES = 512
WARM_UP = 100
MAX_LOGIT_SCALE = 100.0
CHUNK = 250


@dataclass
class Pool:
    """Rendered training scenes: uint8 pictures ``[N, side, side, 3]`` and several captions of each."""

    images: NDArray[np.uint8]
    captions: list[list[str]]


def _render(job: tuple[int, int, int, int]) -> tuple[NDArray[np.uint8], list[list[str]]]:
    start, count, captions, seed = job
    scenes = Scenes("train", count, seed=seed)
    images, texts = [], []
    for index in range(start, min(start + CHUNK, count)):
        scene = scenes[index]
        images.append(scene.image)
        texts.append([scenes.recaption(index, scene, draw).caption for draw in range(captions)])
    return np.stack(images), texts


def render_pool(folder: Path, count: int, captions: int, seed: int) -> Pool:
    """Render ``count`` scenes with every core, once; a later run reads them from ``folder``."""
    pictures, texts = folder / "pictures.npy", folder / "captions.json"
    if not texts.exists():
        jobs = [(start, count, captions, seed) for start in range(0, count, CHUNK)]
        with ProcessPoolExecutor() as workers:
            parts = list(track(workers.map(_render, jobs), "rendering scenes", total=len(jobs)))
        np.save(pictures, np.concatenate([images for images, _ in parts]))
        texts.write_text(json.dumps([names for _, part in parts for names in part]))
    return Pool(np.load(pictures), json.loads(texts.read_text()))


def draw_batch(pool: Pool, step: int, batch_size: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """The pictures and captions of one step; a pure function of its arguments."""
    batches = len(pool.images) // batch_size
    epoch, position = divmod(step, batches)
    order = np.random.default_rng([seed, epoch]).permutation(len(pool.images))
    rows = order[position * batch_size : (position + 1) * batch_size]
    rng = np.random.default_rng([seed, epoch, position])
    images = torch.from_numpy(pool.images[rows]).permute(0, 3, 1, 2)
    captions = [pool.captions[row][rng.integers(len(pool.captions[row]))] for row in rows]
    return images, captions


def pixels(images: torch.Tensor, adapter: DenseAdapter) -> torch.Tensor:
    """uint8 pictures to normalised float32 pixels."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (adapter.description.mean, adapter.description.std))
    return (images.float() / 255 - mean) / std


def encode_captions(adapter: DenseAdapter, captions: list[str]) -> torch.Tensor:
    """Text embeddings, the rows cut to the longest caption where that is exact."""
    tokens = adapter.tokenize(captions)
    width = tokens.ids.shape[1] if adapter.description.text_after_end_matters else int(tokens.lengths.max())
    return adapter.encode_text(tokens.ids[:, :width])


@torch.no_grad()
def validation_retrieval(adapter: DenseAdapter, pictures: torch.Tensor, captions: list[str]) -> float:
    """Retrieval R@1 on validation scenes."""
    adapter.eval()
    images = [adapter.encode_image(pixels(part, adapter)).pooled for part in pictures.split(64)]
    texts = encode_captions(adapter, captions)
    adapter.train()
    return retrieval_recall(normalize(torch.cat(images), dim=-1), normalize(texts, dim=-1), captions)


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / WARM_UP)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="open_clip:tiny")
    parser.add_argument("--work", type=Path, required=True, help="folder for rendered scenes, checkpoints and the log")
    parser.add_argument("--scenes", type=int, default=24_000)
    parser.add_argument("--captions", type=int, default=4, help="captions a scene")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    folder = model_folder(args.backbone.replace(":", "_"))
    args.work.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        config = json.loads((folder / "open_clip_config.json").read_text())
        train_tokenizer(folder / "tokenizer.json", vocabulary=config["model_cfg"]["text_cfg"]["vocab_size"])
    pool = render_pool(args.work, args.scenes, args.captions, args.seed)
    validation = list(Scenes("validation", VALIDATION_SCENES, seed=args.seed))
    pictures = torch.from_numpy(np.stack([scene.image for scene in validation])).permute(0, 3, 1, 2)
    names = [scene.caption for scene in validation]

    adapter = load(f"{args.backbone}@random")
    adapter.train()
    model = adapter.model
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": args.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    step, best, seconds, log = 0, {"step": 0, "retrieval_r1": 0.0}, 0.0, []
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, best, seconds, log = state["step"], state["best"], state["seconds"], state["log"]
        print(f"resumed at step {step}", flush=True)

    started = time.perf_counter() - seconds
    losses: list[float] = []
    while step < args.steps:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(step, args.steps)
        images, captions = draw_batch(pool, step, args.batch_size, args.seed)
        pooled = adapter.encode_image(pixels(images, adapter)).pooled
        assert pooled is not None
        loss = contrastive_loss(
            pooled,
            encode_captions(adapter, captions),
            scale=adapter.logit_scale().clamp(max=MAX_LOGIT_SCALE),
            bias=adapter.logit_bias(),
            form=adapter.description.logits,
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        if step % args.every == 0 or step == args.steps:
            recall = validation_retrieval(adapter, pictures, names)
            seconds = time.perf_counter() - started
            log.append({"step": step, "loss": round(sum(losses) / len(losses), 4)})
            log[-1] |= {"retrieval_r1": round(recall, 4), "seconds": round(seconds)}
            losses.clear()
            print(json.dumps(log[-1]), flush=True)
            if recall >= best["retrieval_r1"]:
                best = {"step": step, "retrieval_r1": recall}
                halves = {name: value.half().contiguous() for name, value in model.state_dict().items()}
                save_file(halves, args.work / "best.safetensors")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step, "best": best, "seconds": seconds, "log": log}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)

    save_file(load_file(args.work / "best.safetensors"), folder / "model.safetensors")
    settings = {name: value for name, value in vars(args).items() if name != "work"}
    parameters = sum(p.numel() for p in model.parameters())
    recipe = {"settings": settings, "parameters": parameters, "kept": best, "log": log}
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    print(f"kept step {best['step']} with validation retrieval R@1 {best['retrieval_r1']:.3f}; written to {folder}")


if __name__ == "__main__":
    main()
