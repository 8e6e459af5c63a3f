"""A backbone of some thousand parameters that does all that the contract asks, to be broken in one way at a time.

Unlike :mod:`toy_backbone`, it is built like the real ones: a class token, position embeddings that are resampled, a
last block whose attention dense features replace by the value path, a shared projection, a causal text tower, and the
library's own ``encode_image`` and ``encode_text`` to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hashed_words import HashedWords
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ttd_plugins.adapter import (
    AdapterFamily,
    BackboneDescription,
    Calibration,
    DenseAdapter,
    ExportedModel,
    ImageFeatures,
    ImageTransform,
    LibraryReference,
    Size,
    Tokens,
    Tower,
)
from ttd_plugins.hookspecs import hookimpl
from ttd_plugins.toolkit.position_embeddings import resampled_positions
from ttd_plugins.toolkit.transforms import DenseTransform, NativeTransform, Normalisation

PATCH, GRID, WIDTH, CONTEXT, VOCABULARY = 8, 4, 16, 10, 101
PAD, START, END = 0, 1, 2
NORMALISATION = Normalisation((0.45, 0.5, 0.4), (0.25, 0.3, 0.2), "bilinear")


class Block(nn.Module):
    """Single-head attention and a feed-forward network, each with a norm before it and a skip around it."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.act, self.dropout = nn.GELU(), nn.Dropout(0.1)
        self.checkpointing = False

    def forward(self, x: Tensor, *, value: bool = False) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(self.run, x, value, use_reentrant=False)
        return self.run(x, value)

    def run(self, x: Tensor, value: bool) -> Tensor:
        normed = self.norm1(x)
        mixed = self.v(normed)
        if not value:
            mixed = F.scaled_dot_product_attention(self.q(normed), self.k(normed), mixed)
        x = x + self.dropout(self.out(mixed))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class ConformingModel(nn.Module):
    """The "library's" model: two towers with a joint space of :data:`WIDTH` dimensions."""

    def __init__(self, *, causal: bool = True) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.randn(WIDTH))
        self.shape = GRID, GRID
        self.positions = nn.Parameter(0.3 * torch.randn(1 + GRID * GRID, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH, bias=False)
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.text_positions = nn.Parameter(0.3 * torch.randn(CONTEXT, WIDTH))
        self.text_mlp = nn.Linear(WIDTH, WIDTH)
        self.text_norm = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Linear(WIDTH, WIDTH, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.causal = causal
        self.register_buffer("calls", torch.zeros(()))
        self.mask: Tensor | None = None

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        for block in self.blocks:
            block.checkpointing = enabled

    def embed(self, pixels: Tensor) -> Tensor:
        """Tokens ``[B, 1 + P, W]`` that enter the first block, for any grid."""
        x = self.patch(pixels.to(self.patch.weight.dtype))
        grid = (x.shape[2], x.shape[3])
        positions = resampled_positions(self.positions, self.shape, grid, prefix=1).to(x.dtype)
        x = x.flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1) + positions

    def encode_image(self, pixels: Tensor) -> Tensor:
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.projection(self.norm(x[:, 0]))

    def encode_text(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.text_positions[: ids.shape[1]]
        counts = torch.arange(1, ids.shape[1] + 1, device=ids.device).to(x.dtype)
        mixed = x.cumsum(1) / counts[:, None] if self.causal else x.mean(1, keepdim=True)
        x = self.text_norm(x + F.gelu(self.text_mlp(mixed)))
        end = (ids == END).int().argmax(-1)
        return self.text_projection(x[torch.arange(len(ids), device=ids.device), end])


def toy_tokenizer() -> HashedWords:
    """The toy's tokenizer."""
    return HashedWords(START, END, PAD, context=CONTEXT, vocabulary=VOCABULARY)


class ConformingAdapter(DenseAdapter):
    """The contract over :class:`ConformingModel`; the parts that broken adapters replace are methods of their own."""

    model: Any
    calibration: Any = Calibration(8.0, -2.0)
    family = "conforming"
    normalisation = NORMALISATION

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.tokenizer = toy_tokenizer()

    @property
    def description(self) -> BackboneDescription:
        return BackboneDescription(
            family=self.family,
            model="toy",
            weights="random",
            embedding_width=WIDTH,
            patch_size=(PATCH, PATCH),
            image_size=(GRID * PATCH, GRID * PATCH),
            mean=NORMALISATION.mean,
            std=NORMALISATION.std,
            interpolation=NORMALISATION.interpolation,
            context_length=CONTEXT,
            text_needs_full_context=False,
            logits="softmax",
            dense_mode="value",
            calibration=self.calibration,
        )

    def embed(self, pixels: Tensor) -> Tensor:
        return self.model.embed(pixels)

    def dense(self, x: Tensor) -> Tensor:
        """Tokens ``[B, 1 + P, W]`` of the last block on the value path."""
        return self.model.blocks[-1](x, value=True)

    def place(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """``[B, 1 + P, W]`` to ``[B, H, W, D]``."""
        return self.project(tokens[:, 1:]).unflatten(1, grid)

    def project(self, tokens: Tensor) -> Tensor:
        return self.model.projection(self.model.norm(tokens))

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        grid = self.patch_grid(*pixels.shape[-2:])
        x = self.embed(pixels)
        x = self.model.blocks[0](x)
        patches = self.place(self.dense(x), grid)
        if not pooled:
            return ImageFeatures(patches)
        return ImageFeatures(patches, self.model.projection(self.model.norm(self.model.blocks[-1](x)[:, 0])))

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        return self.tokenizer(texts)

    def dense_transform(self, size: Size | None = None) -> ImageTransform:
        height, width = (GRID * PATCH,) * 2 if size is None else (size, size) if isinstance(size, int) else size
        return DenseTransform((height, width), self.normalisation)

    def native_transform(self) -> ImageTransform:
        return NativeTransform(DenseTransform((GRID * PATCH, GRID * PATCH), self.normalisation))

    def logit_scale(self) -> Tensor:
        return self.model.logit_scale.exp()

    def lora_targets(self, tower: Tower) -> list[str]:
        if tower == "text":
            return ["text_mlp"]
        return [
            *(f"blocks.0.{name}" for name in ("q", "k", "v", "out", "fc1", "fc2")),
            *(f"blocks.1.{name}" for name in ("v", "out", "fc1", "fc2")),
        ]

    def tower_parameters(self, tower: Tower) -> Iterable[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            text = name.startswith(("words.", "text_"))
            if name != "logit_scale" and text == (tower == "text"):
                yield name, parameter

    def export(self, folder: Path) -> ExportedModel:
        save_file(self.model.state_dict(), str(folder / "model.safetensors"))
        return ExportedModel("toy", "load_file('PATH/model.safetensors')")


class ReferencedAdapter(ConformingAdapter):
    """The toy with all references, each written without the adapter's own methods."""

    @property
    def library_reference(self) -> LibraryReference:  # type: ignore[override]
        def patches(model: Any, pixels: Tensor) -> Tensor:
            x, last = model.blocks[0](model.embed(pixels)), model.blocks[1]
            x = x + last.out(last.v(last.norm1(x)))
            x = x + last.fc2(F.gelu(last.fc1(last.norm2(x))))
            return model.projection(model.norm(x))[:, 1:]

        return LibraryReference(
            image=lambda model, pixels: model.encode_image(pixels),
            text=lambda model, ids, mask: model.encode_text(ids),
            patches=patches,
            tokens=lambda texts: toy_tokenizer()(texts).ids,
            pixels=DenseTransform((GRID * PATCH, GRID * PATCH), NORMALISATION),
        )


def conforming(kind: type[ConformingAdapter] = ConformingAdapter, *, seed: int = 0, causal: bool = True) -> Any:
    """A toy in training mode, as some authors would hand it over; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ConformingModel(causal=causal)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name != "logit_scale":
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return kind(model)


class ConformingFamily(AdapterFamily):
    """The family of the toy: one model, random weights."""

    name = "conforming"
    api_version = 1
    kind: type[ConformingAdapter] = ConformingAdapter

    def models(self) -> list[str]:
        return ["toy"]

    def weights(self, model: str) -> list[str]:
        return ["fixed"]

    def load(self, model: str, weights: str, *, seed: int = 0) -> DenseAdapter:
        return conforming(self.kind, seed=seed)

    def claims(self, model: object) -> bool:
        return hasattr(model, "text_mlp") and hasattr(model, "class_token")

    def wrap(self, model: nn.Module, *, tokenizer: Any = None, preprocess: Any = None) -> DenseAdapter:
        return self.kind(model)


class ConformingPlugin:
    """A plugin that registers families."""

    def __init__(self, *families: AdapterFamily) -> None:
        self.families = families or (ConformingFamily(),)

    @hookimpl
    def register_adapters(self, register: Callable[[AdapterFamily], None]) -> None:
        for family in self.families:
            register(family)
