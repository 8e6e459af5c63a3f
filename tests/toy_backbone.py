"""A differentiable backbone of a few hundred parameters and no library, for tests of the engine.

Unlike :mod:`fakes`, which serves the tests of plugins, it has a pooled embedding that is no mean of the patches,
optional dropout, logits of both forms, a text tower that text after the end may or may not matter to, works in any
dtype (so that gradients can be checked in float64), and keeps a record of what it was asked.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttd_plugins.adapter import (
    BackboneDescription,
    Calibration,
    DenseAdapter,
    ImageFeatures,
    ImageTransform,
    Size,
    Tokens,
    Tower,
)

PATCH, SIDE, CONTEXT, VOCABULARY = 4, 16, 8, 97
PAD, END = 0, 1
MEAN, STD = (0.4, 0.5, 0.6), (0.25, 0.3, 0.35)


def token_of(word: str) -> int:
    """The id of a word: a hash, the same everywhere, neither padding nor the end."""
    return 2 + zlib.crc32(word.encode()) % (VOCABULARY - 2)


class ToyModel(nn.Module):
    """Two towers: strided convolution, tanh, linear; and a weighted bag of word embeddings, tanh, linear."""

    def __init__(self, width: int = 5, dropout: float = 0.0, *, sigmoid: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.patch_head = nn.Linear(width, width)
        self.pool_head = nn.Linear(width, width)
        self.words = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.rand(CONTEXT) + 0.5)
        self.text_head = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.log_scale = nn.Parameter(torch.tensor(1.2))
        self.bias = nn.Parameter(torch.tensor(-1.5)) if sigmoid else None
        self.register_buffer("steps", torch.zeros(()))


class ToyAdapter(DenseAdapter):
    """The contract over :class:`ToyModel`.

    Attributes:
        images: shapes of the pixels of every call of :meth:`encode_image`, and whether the pooled embedding was wanted.
        texts: the ids of every call of :meth:`encode_text`.
        tokenized: the texts of every call of :meth:`tokenize`.
        outputs: the features returned so far, each with its gradient kept, where ``keep_outputs`` is set.
    """

    def __init__(
        self, model: nn.Module, *, text_needs_full_context: bool = False, logits: Literal["softmax", "sigmoid"]
    ) -> None:
        super().__init__(model)
        self.text_needs_full_context = text_needs_full_context
        self.logits: Literal["softmax", "sigmoid"] = logits
        self.calibration = Calibration(8.0, -2.0)
        self.keep_outputs = False
        self.forget()

    def forget(self) -> None:
        """Empty the record."""
        self.images: list[tuple[tuple[int, ...], bool]] = []
        self.texts: list[Tensor] = []
        self.tokenized: list[list[str]] = []
        self.outputs: list[Tensor] = []

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model."""
        return self.model.patch.weight.dtype

    @property
    def description(self) -> BackboneDescription:
        return BackboneDescription(
            family="toy",
            model="ToyModel",
            weights=None,
            embedding_width=self.model.text_head.out_features,
            patch_size=(PATCH, PATCH),
            image_size=(SIDE, SIDE),
            mean=MEAN,
            std=STD,
            interpolation="bilinear",
            context_length=CONTEXT,
            text_needs_full_context=self.text_needs_full_context,
            logits=self.logits,
            dense_mode="plain",
            calibration=self.calibration,
        )

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        self.patch_grid(*pixels.shape[-2:])
        self.images.append((tuple(pixels.shape), pooled))
        hidden = self.model.dropout(torch.tanh(self.model.patch(pixels.to(self.dtype))).permute(0, 2, 3, 1))
        patches = self._kept(self.model.patch_head(hidden))
        whole = self._kept(self.model.pool_head(hidden.square().mean((1, 2)))) if pooled else None
        return ImageFeatures(patches, whole)

    def encode_text(self, ids: Tensor) -> Tensor:
        self.texts.append(ids.clone())
        weights = self.model.positions[: ids.shape[1]].expand(ids.shape)
        if self.text_needs_full_context:
            assert ids.shape[1] == CONTEXT, "this tower must see the whole context"
        else:
            # Positions up to the end token, itself included.
            ended = (ids == END).long().cumsum(1) - (ids == END).long()
            weights = weights * (ended == 0)
            assert bool((ids == END).any(1).all()), "a row lost its end token"
        bag = (weights[:, :, None] * self.model.words(ids)).sum(1)
        return self._kept(self.model.text_head(self.model.dropout(torch.tanh(bag))))

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        self.tokenized.append(list(texts))
        words = [[token_of(word) for word in text.split()] for text in texts]
        rows = [[*row[: CONTEXT - 1], END] for row in words]
        return Tokens(
            torch.tensor([row + [PAD] * (CONTEXT - len(row)) for row in rows]),
            torch.tensor([len(row) for row in rows]),
            [len(row) > CONTEXT - 1 for row in words],
        )

    def dense_transform(self, size: Size | None = None) -> ImageTransform:
        height, width = (SIDE, SIDE) if size is None else (size, size) if isinstance(size, int) else size

        def transform(image: Any) -> Tensor:
            picture = image.convert("RGB")
            pixels = torch.tensor(list(picture.tobytes())).view(picture.height, picture.width, 3).permute(2, 0, 1) / 255
            pixels = F.interpolate(pixels[None], (height, width), mode="bilinear", align_corners=False)[0]
            return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)

        return transform

    def native_transform(self) -> ImageTransform:
        return self.dense_transform()

    def logit_scale(self) -> Tensor:
        return self.model.log_scale.exp()

    def logit_bias(self) -> Tensor | None:
        return self.model.bias

    def lora_targets(self, tower: Tower) -> list[str]:
        return ["patch_head"] if tower == "image" else ["text_head"]

    def tower_parameters(self, tower: Tower) -> Iterable[tuple[str, nn.Parameter]]:
        image = ("patch.", "patch_head.", "pool_head.")
        text = ("words.", "positions", "text_head.")
        return [
            item for item in self.model.named_parameters() if item[0].startswith(image if tower == "image" else text)
        ]

    def _kept(self, features: Tensor) -> Tensor:
        if self.keep_outputs and features.requires_grad:
            features.retain_grad()
            self.outputs.append(features)
        return features


class AutocastProof(ToyAdapter):
    """A backbone whose features are the same under autocast as without it, so that only our own arithmetic can vary."""

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        with torch.autocast(pixels.device.type, enabled=False):
            return super().encode_image(pixels, pooled=pooled)

    def encode_text(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, enabled=False):
            return super().encode_text(ids)


def toy(
    seed: int = 0,
    *,
    kind: type[ToyAdapter] = ToyAdapter,
    dtype: torch.dtype = torch.float32,
    sigmoid: bool = False,
    dropout: float = 0.0,
    width: int = 5,
    text_needs_full_context: bool = False,
) -> ToyAdapter:
    """A toy in evaluation mode with weights that ``seed`` decides; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ToyModel(width, dropout, sigmoid=sigmoid).to(dtype).eval()
    logits: Literal["softmax", "sigmoid"] = "sigmoid" if sigmoid else "softmax"
    return kind(model, text_needs_full_context=text_needs_full_context, logits=logits)


def toy_images(batch: int, height: int = SIDE, width: int = SIDE, *, seed: int = 0) -> Tensor:
    """Random normalised pixels ``[batch, 3, height, width]``."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))
