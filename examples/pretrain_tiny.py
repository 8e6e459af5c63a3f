"""Pre-train an embedded model contrastively on scenes, with checkpoints from which it resumes.

    python examples/pretrain_tiny.py --backbone open_clip:tiny --work runs/open_clip_tiny

Writes ``model.safetensors`` (float16) and ``recipe.json`` into the embedded model's folder, or into ``--out``. The
number of steps is fixed. The checkpoint with the best retrieval on validation scenes is selected; metrics of single tag
bias play no part in the selection.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.pos_embed import get_2d_sincos_pos_embed
from open_clip.transformer import PatchDropout
from rich.progress import track
from safetensors.torch import load_file, save_file
from timm.layers import PatchDropoutWithIndices
from torch import Tensor, nn
from torch.nn.functional import normalize

from ttd_plugins import load
from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.embedded import model_folder
from ttd_plugins.embedded.scenes import Scenes
from ttd_plugins.embedded.tokenizer import train_tokenizer
from ttd_plugins.evaluation.metrics import retrieval_recall
from ttd_plugins.evaluation.scene_protocol import normalized_pixels, scene_pixels
from ttd_plugins.method.losses import contrastive_loss
from ttd_plugins.method.text_embeddings import encode_texts

VALIDATION_SCENES = 512
CAPTIONS_OF_A_KIND = 4
WARM_UP = 100
MAX_LOGIT_SCALE = 100.0
CHUNK = 250
POSITION_SCALE = 0.3
HIDDEN_LAYER = re.compile(r"\.(resblocks|layers|blocks)\.\d+\.")


@dataclass
class Pool:
    """Rendered training scenes: uint8 images ``[N, side, side, 3]``, with bare and full captions for each."""

    images: NDArray[np.uint8]
    bare: list[list[str]]
    sentences: list[list[str]]


def _render(job: tuple[int, int, int]) -> tuple[NDArray[np.uint8], list[list[str]], list[list[str]]]:
    start, count, seed = job
    kinds = [Scenes("train", count, seed=seed, bare_captions=share) for share in (1.0, 0.0)]
    images: list[NDArray[np.uint8]] = []
    captions: tuple[list[list[str]], list[list[str]]] = ([], [])
    for index in range(start, min(start + CHUNK, count)):
        scene = kinds[0][index]
        images.append(scene.image)
        for kind, (scenes, texts) in enumerate(zip(kinds, captions, strict=True)):
            draws = range(kind * CAPTIONS_OF_A_KIND, (kind + 1) * CAPTIONS_OF_A_KIND)
            texts.append([scenes.recaption(index, scene, draw).caption for draw in draws])
    return np.stack(images), *captions


def render_pool(folder: Path, count: int, seed: int) -> Pool:
    """Render ``count`` scenes on all cores and cache them in ``folder``; later runs read the cache."""
    image_file, caption_file = folder / "pictures.npy", folder / "captions.json"
    if not caption_file.exists():
        jobs = [(start, count, seed) for start in range(0, count, CHUNK)]
        with ProcessPoolExecutor() as workers:
            parts = list(track(workers.map(_render, jobs), "rendering scenes", total=len(jobs)))
        np.save(image_file, np.concatenate([images for images, _, _ in parts]))
        captions = {
            "bare": [own for _, bare, _ in parts for own in bare],
            "sentences": [own for _, _, sentences in parts for own in sentences],
        }
        caption_file.write_text(json.dumps(captions))
    return Pool(np.load(image_file), **json.loads(caption_file.read_text()))


def draw_batch(pool: Pool, step: int, batch_size: int, seed: int) -> tuple[NDArray[np.uint8], list[list[str]]]:
    """Images and three captions of each, two bare and one full; a pure function of its arguments.

    Encoding an image costs several times more than encoding a caption, so each image is used with three captions.
    """
    batches = len(pool.images) // batch_size
    epoch, position = divmod(step, batches)
    order = np.random.default_rng([seed, epoch]).permutation(len(pool.images))
    rows = order[position * batch_size : (position + 1) * batch_size]
    rng = np.random.default_rng([seed, epoch, position])
    sets = [
        [kind[row][rng.integers(len(kind[row]))] for row in rows] for kind in (pool.bare, pool.bare, pool.sentences)
    ]
    return pool.images[rows], sets


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz iterations (https://kellerjordan.github.io/posts/muon/), in float32.

    torch.optim.Muon and timm's Muon compute in bfloat16, which many CPUs only emulate. This one also treats the query,
    key and value projections of a fused matrix as three matrices, and batches equal shapes.

    Args:
        params: matrices ``[out, in]``.
        lr: step length, in units of the spectral norm.
        momentum: coefficient of the Nesterov momentum.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    ITERATIONS = 5

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for parameter in group["params"]:
                state = self.state[parameter]
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(mean, group["momentum"])
                fused = 3 if parameter.shape[0] == 3 * parameter.shape[1] else 1
                for part, own in zip(update.chunk(fused), parameter.chunk(fused), strict=True):
                    by_shape.setdefault(part.shape, []).append((part, own))
            for shape, pairs in by_shape.items():
                length = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for direction, (_, own) in zip(
                    self._orthogonal(torch.stack([part for part, _ in pairs])), pairs, strict=True
                ):
                    own.sub_(direction, alpha=length)

    def _orthogonal(self, matrices: torch.Tensor) -> torch.Tensor:
        """Approximate the nearest semi-orthogonal matrices ``[N, out, in]``."""
        a, b, c = self.COEFFICIENTS
        tall = matrices.shape[-2] > matrices.shape[-1]
        x = matrices.mT if tall else matrices
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
        for _ in range(self.ITERATIONS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.mT if tall else x


def prepare_image_tower(model: nn.Module, patch_dropout: float) -> None:
    """Initialise position embeddings as sines and cosines, and use patch dropout in training mode (arXiv 2212.00794).

    Both make patch features local: neighbours are known from the start, and no patch can rely on another one.
    """
    visual = getattr(model, "visual", None)
    if visual is None:
        embeddings = model.vision_model.embeddings
        positions = embeddings.position_embedding.weight
    else:
        positions = visual.trunk.pos_embed if hasattr(visual, "trunk") else visual.positional_embedding
    tokens, width = positions.shape[-2:]
    side = math.isqrt(tokens)
    has_class_token = tokens > side * side
    table = torch.from_numpy(get_2d_sincos_pos_embed(width, side, cls_token=has_class_token))
    with torch.no_grad():
        positions.copy_(POSITION_SCALE * table)
    drop = PatchDropout(patch_dropout, exclude_first_token=has_class_token)
    if visual is None:
        # transformers has no patch dropout. As a child module it follows the tower's training mode.
        embeddings.add_module("patch_dropout", drop)
        embeddings.register_forward_hook(lambda module, inputs, output: drop(output))
    elif hasattr(visual, "trunk"):
        visual.trunk.patch_drop = PatchDropoutWithIndices(patch_dropout, num_prefix_tokens=int(has_class_token))
    else:
        visual.patch_dropout = drop


def pooled_embedding(model: nn.Module, pixels: Tensor) -> Tensor:
    """The library's pooled embedding ``[B, D]``, with patch dropout, which the adapters skip."""
    if hasattr(model, "encode_image"):
        return model.encode_image(pixels)
    return model.get_image_features(pixel_values=pixels).pooler_output


@torch.no_grad()
def retrieval(adapter: DenseAdapter, batches: Iterable[Tensor], captions: Sequence[str]) -> float:
    """R@1 between images (batches of normalised pixels) and captions; switches the backbone to evaluation mode."""
    adapter.eval()
    images = [adapter.encode_image(pixels).pooled for pixels in batches]
    texts, _ = encode_texts(adapter, captions)
    return retrieval_recall(normalize(torch.cat(images), dim=-1), texts, captions)


def schedule(step: int, steps: int) -> float:
    """Learning-rate factor: linear warm-up, then cosine decay to zero."""
    warm = min(1.0, (step + 1) / WARM_UP)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def build_optimizers(
    model: nn.Module, muon_learning_rate: float, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices in the blocks of both towers, AdamW for all other parameters."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and HIDDEN_LAYER.search(name)]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or not HIDDEN_LAYER.search(name)]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [Muon(hidden, lr=muon_learning_rate), torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))]


def pretrain(
    adapter: DenseAdapter,
    work: Path,
    options: argparse.Namespace,
    *,
    draw: Callable[[int], tuple[Tensor, list[list[str]]]],
    recall: Callable[[], float],
    precision: torch.dtype = torch.float16,
) -> dict[str, Any]:
    """Pre-train a backbone contrastively; writes the weights with the best recall to ``best.safetensors``.

    Args:
        adapter: backbone with random weights.
        work: folder for the checkpoint from which a stopped run resumes.
        options: ``steps``, ``every``, ``seed``, ``patch_dropout``, ``weight_decay`` and the two learning rates.
        draw: returns normalised pixels and sets of captions for a step number, deterministically.
        recall: returns retrieval R@1 on held-out pairs.
        precision: dtype of the saved weights.

    Returns:
        ``kept``, the selected step and its recall; ``log``; ``seconds``.
    """
    adapter.train()
    model = adapter.model
    prepare_image_tower(model, options.patch_dropout)
    optimizers = build_optimizers(model, options.muon_learning_rate, options.learning_rate, options.weight_decay)
    rates = [options.muon_learning_rate, options.learning_rate]
    step, best, seconds, log = 0, {"step": 0, "retrieval_r1": 0.0}, 0.0, []
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, own in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        step, best, seconds, log = state["step"], state["best"], state["seconds"], state["log"]
        print(f"resumed at step {step}", flush=True)

    started = time.perf_counter() - seconds
    losses: list[float] = []
    while step < options.steps:
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(step, options.steps)
        pixels, caption_sets = draw(step)
        # Patch dropout depends only on the step, so that a resumed run drops the same patches.
        torch.manual_seed(options.seed * options.steps + step)
        pooled = pooled_embedding(model, pixels)
        loss = torch.stack(
            [
                contrastive_loss(
                    pooled,
                    encode_texts(adapter, captions)[0],
                    scale=adapter.logit_scale().clamp(max=MAX_LOGIT_SCALE),
                    bias=adapter.logit_bias(),
                    form=adapter.description.logits,
                )
                for captions in caption_sets
            ]
        ).mean()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        losses.append(loss.item())
        if step % options.every == 0 or step == options.steps:
            found = recall()
            adapter.train()
            seconds = time.perf_counter() - started
            log.append({"step": step, "loss": round(sum(losses) / len(losses), 4)})
            log[-1] |= {"retrieval_r1": round(found, 4), "seconds": round(seconds)}
            losses.clear()
            print(json.dumps(log[-1]), flush=True)
            if found >= best["retrieval_r1"]:
                best = {"step": step, "retrieval_r1": found}
                weights = {name: value.to(precision).contiguous() for name, value in model.state_dict().items()}
                save_file(weights, work / "best.safetensors")
            state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            state |= {"step": step, "best": best, "seconds": seconds, "log": log}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
    return {"kept": best, "log": log, "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="open_clip:tiny")
    parser.add_argument("--work", type=Path, required=True, help="folder for rendered scenes, checkpoints and the log")
    parser.add_argument("--out", type=Path, help="folder for the weights  [default: the embedded model's folder]")
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--muon-learning-rate", type=float, default=0.015, help="of Muon, for the matrices in the blocks of both towers"
    )
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="of AdamW, for all other parameters")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of AdamW, for matrices")
    parser.add_argument("--patch-dropout", type=float, default=0.5, help="share of patches dropped in training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    folder = model_folder(args.backbone.replace(":", "_"))
    args.work.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        config = json.loads((folder / "open_clip_config.json").read_text())
        train_tokenizer(folder / "tokenizer.json", vocabulary=config["model_cfg"]["text_cfg"]["vocab_size"])
    pool = render_pool(args.work, args.scenes, args.seed)
    validation = list(Scenes("validation", VALIDATION_SCENES, seed=args.seed))

    adapter = load(f"{args.backbone}@random")

    def draw(step: int) -> tuple[Tensor, list[list[str]]]:
        images, caption_sets = draw_batch(pool, step, args.batch_size, args.seed)
        return normalized_pixels(images, adapter), caption_sets

    def recall() -> float:
        batches = (scene_pixels(validation[start : start + 64], adapter) for start in range(0, len(validation), 64))
        return retrieval(adapter, batches, [scene.caption for scene in validation])

    found = pretrain(adapter, args.work, args, draw=draw, recall=recall)
    best = found["kept"]

    out = args.out or folder
    out.mkdir(parents=True, exist_ok=True)
    save_file(load_file(args.work / "best.safetensors"), out / "model.safetensors")
    settings = {name: value for name, value in vars(args).items() if name not in ("work", "out")}
    parameters = sum(p.numel() for p in adapter.model.parameters())
    recipe = {"settings": settings, "parameters": parameters, "kept": best, "log": found["log"]}
    (out / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    print(f"selected step {best['step']} with validation retrieval R@1 {best['retrieval_r1']:.3f}; written to {out}")


if __name__ == "__main__":
    main()
