"""A backbone of a few hundred parameters and its family, for tests that need one of known behaviour."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttd_plugins.adapter import (
    AdapterFamily,
    BackboneDescription,
    DenseAdapter,
    ImageFeatures,
    ImageTransform,
    Size,
    Tokens,
    Tower,
)
from ttd_plugins.errors import BackboneNameError, choices_sentence
from ttd_plugins.hookspecs import hookimpl

PATCH = 8
CONTEXT = 32


class FakeModel(nn.Module):
    """Patches through one linear map, bytes through an embedding and another."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.image = nn.Linear(3 * PATCH * PATCH, width)
        self.table = nn.Embedding(256, width)
        self.text = nn.Linear(width, width)


class OtherModel(nn.Module):
    """A model that no fake family takes by itself."""


class FakeAdapter(DenseAdapter):
    """The contract over :class:`FakeModel`."""

    name = "fake"
    weights: str | None = None

    @property
    def description(self) -> BackboneDescription:
        return BackboneDescription(
            family=self.name,
            model="FakeModel",
            weights=self.weights,
            embedding_width=self.model.text.out_features,
            patch_size=(PATCH, PATCH),
            image_size=(32, 32),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            interpolation="bicubic",
            context_length=CONTEXT,
            text_needs_full_context=True,
            logits="softmax",
            dense_mode="plain",
        )

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        rows, columns = self.patch_grid(*pixels.shape[-2:])
        cut = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5)
        patches = self.model.image(cut.reshape(len(pixels), rows, columns, -1))
        return ImageFeatures(patches, patches.mean((1, 2)) if pooled else None)

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.model.text(self.model.table(ids).mean(1))

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        coded = [text.encode() for text in texts]
        ids = torch.zeros(len(texts), CONTEXT, dtype=torch.int64)
        for row, text in zip(ids, coded, strict=True):
            row[: len(text)] = torch.tensor(list(text[:CONTEXT]), dtype=torch.int64)
        lengths = torch.tensor([max(1, min(len(text), CONTEXT)) for text in coded], dtype=torch.int64)
        return Tokens(ids, lengths, [len(text) > CONTEXT for text in coded])

    def dense_transform(self, size: Size | None = None) -> ImageTransform:
        height, width = (32, 32) if size is None else (size, size) if isinstance(size, int) else size

        def transform(image: Any) -> Tensor:
            data = torch.frombuffer(
                bytearray(image.convert("RGB").resize((width, height)).tobytes()), dtype=torch.uint8
            )
            return data.view(height, width, 3).permute(2, 0, 1).float() / 127.5 - 1

        return transform

    def native_transform(self) -> ImageTransform:
        return self.dense_transform()

    def logit_scale(self) -> Tensor:
        return torch.tensor(10.0)

    def lora_targets(self, tower: Tower) -> list[str]:
        return [tower]

    def tower_parameters(self, tower: Tower) -> Iterable[tuple[str, nn.Parameter]]:
        return [item for item in self.model.named_parameters() if item[0].startswith("image") == (tower == "image")]


class FakeFamily(AdapterFamily):
    """Models ``small`` (weights ``good``, the default) and ``hub:org/model`` (weights ``a`` and ``b``)."""

    summary = "a fake"

    def __init__(self, name: str = "fake", takes: type[nn.Module] = FakeModel) -> None:
        self.name = name
        self.takes = takes
        self.loaded: list[tuple[str, str]] = []

    def models(self) -> list[str]:
        return ["small", "hub:org/model"]

    def weights(self, model: str) -> list[str]:
        if model not in self.models():
            raise BackboneNameError(choices_sentence(f"model of {self.name}", model, self.models()))
        return ["good"] if model == "small" else ["a", "b"]

    def default_weights(self, model: str) -> str | None:
        return "good" if model == "small" else None

    def load(self, model: str, weights: str, *, width: int = 6) -> DenseAdapter:
        self.loaded.append((model, weights))
        torch.manual_seed(0)
        adapter = self.wrap(FakeModel(width).train())
        assert isinstance(adapter, FakeAdapter)
        adapter.weights = weights
        return adapter

    def claims(self, model: object) -> bool:
        return isinstance(model, self.takes)

    def wrap(self, model: nn.Module, *, tokenizer: Any = None, preprocess: Any = None) -> DenseAdapter:
        adapter = FakeAdapter(model)
        adapter.name = self.name
        return adapter


class FakePlugin:
    """A plugin that registers families."""

    def __init__(self, *families: AdapterFamily) -> None:
        self.families = families or (FakeFamily(),)

    @hookimpl
    def register_adapters(self, register: Callable[[AdapterFamily], None]) -> None:
        for family in self.families:
            register(family)
