"""The conforming toy, broken in one way at a time, with the checks that must notice.

Every entry of :data:`BROKEN` is ``name: (class of the adapter, names of the checks that fail)``. Where more than one
fails, one fault shows in several things that the contract asks for, and the comment says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from conforming_toy import CONTEXT, END, GRID, PAD, PATCH, WIDTH, ConformingAdapter, ReferencedAdapter
from PIL import Image
from torch import Tensor, nn

from ttd_plugins.adapter import (
    BackboneDescription,
    Calibration,
    ExportedModel,
    ImageFeatures,
    ImageTransform,
    Size,
    Tokens,
    Tower,
)
from ttd_plugins.toolkit.lora_targets import base_layer
from ttd_plugins.toolkit.transforms import DenseTransform, Normalisation

Adapter = type[ConformingAdapter]
BROKEN: dict[str, tuple[Adapter, set[str]]] = {}


def broken(*checks: str) -> Callable[[Adapter], Adapter]:
    def note(kind: Adapter) -> Adapter:
        assert kind.__name__ not in BROKEN
        BROKEN[kind.__name__] = (kind, set(checks))
        return kind

    return note


def changed_description(**changes: Any) -> Any:
    """A ``description`` property with other values."""
    own = ConformingAdapter.description

    def description(self: ConformingAdapter) -> BackboneDescription:
        return replace(own.fget(self), **changes)  # type: ignore[attr-defined]

    return property(description)


class Features(ConformingAdapter):
    """Changes the finished features."""

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        found = super().encode_image(pixels, pooled=pooled)
        return self.change(found, pixels)

    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return found


# Places --------------------------------------------------------------------------------------------------------------


@broken("patches_in_place")
class Transposed(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        rows, columns = found.patches.shape[1:3]
        return ImageFeatures(found.patches.flatten(1, 2).unflatten(1, (columns, rows)).transpose(1, 2), found.pooled)


@broken("other_sizes")
class ExchangedSides(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(found.patches.transpose(1, 2), found.pooled)


@broken("patches_in_place")
class PrefixLeftIn(ConformingAdapter):
    def place(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.project(tokens[:, :-1]).unflatten(1, grid)


@broken("patches_in_place")
class UpsideDown(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(found.patches.flip(1), found.pooled)


@broken("patches_in_place")
class Mirrored(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(found.patches.flip(2), found.pooled)


@broken("patches_in_place")
class OneColumnLate(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(found.patches.roll(1, 2), found.pooled)


class Shifting:
    def __init__(self, rest: Any) -> None:
        self.rest = rest

    def __call__(self, image: Image.Image) -> Tensor:
        return self.rest(image).roll(PATCH - 1, 1)


@broken("moving_object")
class ShiftsThePicture(ConformingAdapter):
    """Colours stay roughly where they were, and objects do not."""

    def dense_transform(self, size: Size | None = None) -> ImageTransform:
        return Shifting(super().dense_transform(size))


# Features ------------------------------------------------------------------------------------------------------------


@broken("pooled_matches_library")
class NormTwice(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        if found.pooled is None:
            return found
        x = self.model.blocks[-1](self.model.blocks[0](self.embed(pixels)))
        return ImageFeatures(found.patches, self.project(self.model.norm(x[:, 0])))


# The class token and the queries are the library's way to the pooled embedding, and here no gradient goes it.
@broken("pooled_matches_library", "gradients_to_image_parameters")
class MeanForPooled(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(found.patches, found.patches.mean((1, 2)) if found.pooled is not None else None)


@broken("joint_space")
class NotProjected(ConformingAdapter):
    def place(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.model.norm(tokens[:, 1:]).unflatten(1, grid)


@broken("joint_space")
class OtherScale(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(found.patches * 1000, found.pooled)


@broken("not_normalised")
class NormalisedPatches(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(F.normalize(found.patches, dim=-1), found.pooled)


# The library's are not, and so differ.
@broken("not_normalised", "pooled_matches_library")
class NormalisedPooled(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(found.patches, None if found.pooled is None else F.normalize(found.pooled, dim=-1))


@broken("not_normalised", "text_matches_library")
class NormalisedText(ConformingAdapter):
    def encode_text(self, ids: Tensor) -> Tensor:
        return F.normalize(super().encode_text(ids), dim=-1)


@broken("text_matches_library")
class OtherText(ConformingAdapter):
    def encode_text(self, ids: Tensor) -> Tensor:
        return 1.5 * super().encode_text(ids)


@broken("batch_independent")
class Centred(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(found.patches - 0.3 * found.patches.mean(0, keepdim=True), found.pooled)


@broken("batch_independent")
class AttendsAcrossImages(ConformingAdapter):
    def dense(self, x: Tensor) -> Tensor:
        return self.model.blocks[-1](x + F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3).transpose(0, 1))


@broken("texts_independent")
class TextsSeeEachOther(ConformingAdapter):
    def encode_text(self, ids: Tensor) -> Tensor:
        found = super().encode_text(ids)
        return found if len(ids) < 3 else found + 0.1 * found.mean(0)


@broken("deterministic")
class DropoutAlways(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(F.dropout(found.patches, 0.2, training=True), found.pooled)


@broken("pooled_on_request")
class OtherWithoutPooled(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return found if found.pooled is not None else ImageFeatures(found.patches * 1.1)


@broken("pooled_on_request")
class PooledUnasked(ConformingAdapter):
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        return super().encode_image(pixels)


# Sizes ---------------------------------------------------------------------------------------------------------------


@broken("other_sizes")
class FixedPositions(ConformingAdapter):
    def embed(self, pixels: Tensor) -> Tensor:
        x = self.model.patch(pixels.to(self.model.patch.weight.dtype)).flatten(2).transpose(1, 2)
        return torch.cat([self.model.class_token.expand(len(x), 1, -1), x], dim=1) + self.model.positions


@broken("misfit_sizes")
class DropsTheRest(ConformingAdapter):
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        height, width = pixels.shape[-2:]
        return super().encode_image(pixels[..., : height // PATCH * PATCH, : width // PATCH * PATCH], pooled=pooled)


# Types and shapes ----------------------------------------------------------------------------------------------------


@broken("image_features")
class FlatPatches(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(found.patches.flatten(1, 2), found.pooled)


@broken("image_features")
class Tuple(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return found.patches, found.pooled


@broken("image_features")
class Nothing(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return None


@broken("image_features")
class Arrays(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(found.patches.detach().numpy(), found.pooled)  # type: ignore[arg-type]


@broken("image_features")
class DoublePrecision(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(found.patches.double(), found.pooled)


@broken("image_features")
class NaNs(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(found.patches / 0, found.pooled)


@broken("image_features")
class Raises(ConformingAdapter):
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        raise ZeroDivisionError("two\nlines [bold]")


@broken("image_features")
class Leaves(ConformingAdapter):
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        raise SystemExit(3)


@broken("image_features", "text_features")  # of one wrong number
class LyingWidth(ConformingAdapter):
    description = changed_description(embedding_width=WIDTH + 1)


@broken("text_features")
class TextTuple(ConformingAdapter):
    def encode_text(self, ids: Tensor) -> Any:
        return super().encode_text(ids), None


@broken("text_features")
class TextNarrow(ConformingAdapter):
    def encode_text(self, ids: Tensor) -> Tensor:
        return super().encode_text(ids)[:, 1:]


# Who it is -----------------------------------------------------------------------------------------------------------


@broken("description")
class ListOfMeans(ConformingAdapter):
    description = changed_description(mean=[0.5, 0.5, 0.5])


@broken("description")
class MeansTo255(ConformingAdapter):
    description = changed_description(std=(58.4, 57.1, 57.4))


@broken("description")
class SizeOffTheGrid(ConformingAdapter):
    description = changed_description(image_size=(30, 30))


@broken("description")
class NoDescription(ConformingAdapter):
    @property
    def description(self) -> BackboneDescription:
        raise AttributeError("nothing known")


@broken("calibration")
class NoCalibration(ConformingAdapter):
    calibration = None


@broken("calibration")
class InfiniteCalibration(ConformingAdapter):
    # Calibration() refuses it, so a plugin must work around that.
    calibration = Calibration(10.0, 0.0)
    object.__setattr__(calibration, "scale", float("inf"))


@broken("calibration")
class FallingCalibration(ConformingAdapter):
    calibration = Calibration(-10.0, 2.5)


@broken("logits")
class NotExponentiated(ConformingAdapter):
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale


@broken("logits")
class VectorScale(ConformingAdapter):
    def logit_scale(self) -> Tensor:
        return super().logit_scale()[None]


@broken("logits")
class SigmoidWithoutBias(ConformingAdapter):
    description = changed_description(logits="sigmoid")


# Text ----------------------------------------------------------------------------------------------------------------


class Tokenizing(ConformingAdapter):
    """Changes the tokens."""

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        return self.change(super().tokenize(texts), texts)

    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        return tokens


@broken("tokens")
class PadsToLongest(Tokenizing):
    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        return Tokens(tokens.ids[:, : int(tokens.lengths.max())], tokens.lengths, tokens.truncated)


@broken("tokens")
class Int32(Tokenizing):
    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        return Tokens(tokens.ids.int(), tokens.lengths, tokens.truncated)


@broken("end_token")
class LosesTheEnd(Tokenizing):
    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        for row, cut in zip(tokens.ids, tokens.truncated, strict=True):
            if cut:
                row[-1] = 50
        return tokens


@broken("end_token")
class LengthsWithoutEnd(Tokenizing):
    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        return Tokens(tokens.ids, (tokens.lengths - 1).clamp_min(1), tokens.truncated)


@broken("end_token")
class LengthsTooLong(Tokenizing):
    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        return Tokens(tokens.ids, (tokens.lengths + 1).clamp_max(CONTEXT), tokens.truncated)


@broken("end_token")
class PadsWithNoise(Tokenizing):
    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        noise = 10 + torch.arange(CONTEXT).expand(tokens.ids.shape)
        return Tokens(torch.where(tokens.ids == PAD, noise, tokens.ids), tokens.lengths, tokens.truncated)


@broken("truncation")
class NeverTruncated(Tokenizing):
    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        return Tokens(tokens.ids, tokens.lengths, [False] * len(texts))


@broken("truncation")
class TruncatedBySpaces(Tokenizing):
    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        return Tokens(tokens.ids, tokens.lengths, [len(text.split()) > CONTEXT - 5 for text in texts])


@broken("any_string")
class RaisesOnEmpty(Tokenizing):
    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        if any(not text.strip() for text in texts):
            raise IndexError("list index out of range")
        return tokens


@broken("any_string")
class RaisesOnSurrogates(Tokenizing):
    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        for text in texts:
            text.encode()
        return tokens


@broken("any_string")
class NaNForEmpty(ConformingAdapter):
    def encode_text(self, ids: Tensor) -> Tensor:
        words = (ids > END).sum(1, keepdim=True).to(self.model.logit_scale.dtype)
        return super().encode_text(ids) * (words / words)


# The library's own tower is the same, so that only the claim is false.
@broken("text_trimming")
class Bidirectional(ConformingAdapter):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model.causal = False


@broken("text_trimming")
class FullContextOnly(ConformingAdapter):
    def encode_text(self, ids: Tensor) -> Tensor:
        return super().encode_text(ids) + 0 * self.model.text_positions[: ids.shape[1], 0].reshape(CONTEXT).sum()


# Pictures ------------------------------------------------------------------------------------------------------------


class Transforming(ConformingAdapter):
    """Changes what dense_transform makes."""

    def dense_transform(self, size: Size | None = None) -> ImageTransform:
        made = super().dense_transform(size)
        assert isinstance(made, DenseTransform)
        return self.change(made)

    def change(self, made: DenseTransform) -> ImageTransform:
        return made


@broken("dense_transform")
class OtherMeans(Transforming):
    def change(self, made: DenseTransform) -> ImageTransform:
        return DenseTransform(made.size, Normalisation((0.5,) * 3, (0.5,) * 3, "bilinear"))


class BlueFirst:
    def __init__(self, rest: DenseTransform) -> None:
        self.rest = rest

    def __call__(self, image: Image.Image) -> Tensor:
        return self.rest(Image.fromarray(np.asarray(image.convert("RGB"))[:, :, ::-1].copy()))


@broken("dense_transform")
class BlueGreenRed(Transforming):
    def change(self, made: DenseTransform) -> ImageTransform:
        return BlueFirst(made)


class Cropping:
    def __init__(self, rest: DenseTransform) -> None:
        self.rest = rest

    def __call__(self, image: Image.Image) -> Tensor:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return self.rest(image.crop((left, top, left + side, top + side)))


@broken("dense_transform")
class CropsTheMiddle(Transforming):
    def change(self, made: DenseTransform) -> ImageTransform:
        return Cropping(made)


@broken("dense_transform")
class WidthFirst(Transforming):
    def change(self, made: DenseTransform) -> ImageTransform:
        return DenseTransform((made.size[1], made.size[0]), made.normalisation)


class Rotating:
    def __init__(self, rest: DenseTransform) -> None:
        self.rest = rest

    def __call__(self, image: Image.Image) -> Tensor:
        return self.rest(image.transpose(Image.Transpose.TRANSPOSE))


@broken("dense_transform")
class TransposesThePicture(Transforming):
    def change(self, made: DenseTransform) -> ImageTransform:
        return Rotating(made)


@broken("native_transform")
class NativeOtherMeans(ConformingAdapter):
    def native_transform(self) -> ImageTransform:
        return DenseTransform((GRID * PATCH,) * 2, Normalisation((0.5,) * 3, (0.5,) * 3, "bilinear"))


class RGBOnly:
    def __init__(self, rest: ImageTransform) -> None:
        self.rest = rest

    def __call__(self, image: Image.Image) -> Tensor:
        assert np.asarray(image).shape[2:] == (3,), "needs three channels"
        return self.rest(image)


@broken("any_image_mode")
class NoConversion(Transforming):
    def change(self, made: DenseTransform) -> ImageTransform:
        return RGBOnly(made)


@broken("transforms_pickle")
class LambdaTransform(Transforming):
    def change(self, made: DenseTransform) -> ImageTransform:
        return lambda image: made(image)


# What it leaves behind -----------------------------------------------------------------------------------------------


@broken("model_unchanged")
class LeavesHooks(ConformingAdapter):
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        self.model.norm.register_forward_hook(lambda *_: None)
        return super().encode_image(pixels, pooled=pooled)


@broken("model_unchanged")
class OverwritesPositions(ConformingAdapter):
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        found = super().encode_image(pixels, pooled=pooled)
        if pixels.shape[-2:] != (GRID * PATCH, GRID * PATCH):
            with torch.no_grad():
                self.model.positions.mul_(1 + 1e-6)
        return found


@broken("model_unchanged")
class ReplacesPositions(ConformingAdapter):
    def encode_text(self, ids: Tensor) -> Tensor:
        self.model.text_positions = nn.Parameter(self.model.text_positions.detach().clone())
        return super().encode_text(ids)


@broken("model_unchanged")
class StoresAMask(ConformingAdapter):
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        self.model.mask = torch.zeros(3)
        return super().encode_image(pixels, pooled=pooled)


@broken("model_unchanged")
class CountsCalls(ConformingAdapter):
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        self.model.calls.add_(1)
        return super().encode_image(pixels, pooled=pooled)


@broken("model_unchanged")
class Evaluates(ConformingAdapter):
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        self.model.eval()
        return super().encode_image(pixels, pooled=pooled)


@broken("model_unchanged")
class ThawsWeights(ConformingAdapter):
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        self.model.class_token.requires_grad_(True)
        self.model.patch.requires_grad_(True)
        return super().encode_image(pixels, pooled=pooled)


@broken("model_unchanged")
class ChangesAnAttribute(ConformingAdapter):
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        self.model.patch.stride = [PATCH, PATCH]
        return super().encode_image(pixels, pooled=pooled)


@broken("model_unchanged")
class AddsAModule(ConformingAdapter):
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        self.model.extra = nn.Identity()
        return super().encode_image(pixels, pooled=pooled)


# Copies --------------------------------------------------------------------------------------------------------------


@broken("pickling")
class LambdaInside(ConformingAdapter):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.clean = lambda text: text


# A pickle follows the same rules as a copy, and finds the generator first.
@broken("deep_copy", "pickling")
class GeneratorInside(ConformingAdapter):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.running = (number for number in range(3))


# A lambda cannot be pickled either.
@broken("deep_copy", "pickling")
class ModelInAClosure(ConformingAdapter):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.get = lambda: model

    def dense(self, x: Tensor) -> Tensor:
        model: Any = self.get()
        return model.blocks[-1](x, value=True)

    def project(self, tokens: Tensor) -> Tensor:
        model: Any = self.get()
        return model.projection(model.norm(tokens))

    def embed(self, pixels: Tensor) -> Tensor:
        model: Any = self.get()
        return model.embed(pixels)


@broken("half_precision")
class PromotesToFloat32(ConformingAdapter):
    def embed(self, pixels: Tensor) -> Tensor:
        return super().embed(pixels) + torch.zeros(1, 1, 1, device=pixels.device)


@broken("half_precision")
class KeepsFloat32Pixels(ConformingAdapter):
    def embed(self, pixels: Tensor) -> Tensor:
        _ = self.model.patch(pixels)
        return super().embed(pixels)


@broken("description_is_cheap")
class MeasuresItself(ConformingAdapter):
    @property
    def description(self) -> BackboneDescription:
        with torch.no_grad():
            self.model.norm(torch.zeros(1, WIDTH, device=self.device, dtype=self.model.norm.weight.dtype))
        return ConformingAdapter.description.fget(self)  # type: ignore[attr-defined]


@broken("description_is_cheap")
class ReadsAWeight(ConformingAdapter):
    @property
    def description(self) -> BackboneDescription:
        assert self.model.logit_scale.item() < 10
        return ConformingAdapter.description.fget(self)  # type: ignore[attr-defined]


@broken("meta_images")
class MaskOnTheCPU(ConformingAdapter):
    def dense(self, x: Tensor) -> Tensor:
        return super().dense(x) * torch.ones(x.shape[1], 1, dtype=x.dtype)


@broken("meta_texts")
class PositionsOnTheCPU(ConformingAdapter):
    def encode_text(self, ids: Tensor) -> Tensor:
        return super().encode_text(ids) * torch.ones(len(ids), 1, dtype=self.model.logit_scale.dtype)


# Gradients -----------------------------------------------------------------------------------------------------------


@broken("gradients_to_pixels")
class DetachedPixels(ConformingAdapter):
    def embed(self, pixels: Tensor) -> Tensor:
        return super().embed(pixels.detach())


@broken("gradients_to_pixels", "gradients_to_image_parameters")  # nothing of the image tower has a gradient
class NoGradient(ConformingAdapter):
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        with torch.no_grad():
            return super().encode_image(pixels, pooled=pooled)


@broken("gradients_to_pixels", "gradients_to_image_parameters")  # neither has what is before the first block
class DetachedTokens(ConformingAdapter):
    def embed(self, pixels: Tensor) -> Tensor:
        return super().embed(pixels).detach()


@broken("gradients_to_pixels", "gradients_to_image_parameters")  # as before, for patches alone
class DetachedPatches(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(found.patches.detach(), found.pooled)


@broken("gradients_to_image_parameters")
class WeightsPastTheGraph(ConformingAdapter):
    def embed(self, pixels: Tensor) -> Tensor:
        whole = super().embed(pixels)
        patch = self.model.patch
        x = F.conv2d(pixels.to(patch.weight.dtype), patch.weight.data, patch.bias.data, stride=PATCH)
        own = self.model.patch(pixels.detach().to(patch.weight.dtype)).flatten(2).transpose(1, 2)
        first = whole[:, :1]
        rest = whole[:, 1:].detach() - own.detach() + x.flatten(2).transpose(1, 2)
        return torch.cat([first, rest], dim=1)


@broken("gradients_to_text_parameters")
class FrozenText(ConformingAdapter):
    def encode_text(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return super().encode_text(ids)


@broken("gradients_to_text_parameters")
class CachedWords(ConformingAdapter):
    def encode_text(self, ids: Tensor) -> Tensor:
        found = super().encode_text(ids)
        return found.detach() + 0 * self.model.text_projection.weight.sum()


@broken("gradients_to_text_parameters")
class BlocksOfTheOtherTower(ConformingAdapter):
    def tower_blocks(self, tower: Tower) -> list[nn.Module]:
        return list(self.model.blocks)


@broken("gradients_to_text_parameters")
class BlockThatIsNone(ConformingAdapter):
    def tower_blocks(self, tower: Tower) -> list[nn.Module]:
        return [nn.Identity()]


class Forgetful(nn.Module):
    """A layer that gives something else in the backward pass, as one whose cache was moved on would."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        again = torch._C._current_graph_task_id() != -1
        return F.linear(x, self.weight * (2 if again else 1), self.bias) ** 2


@broken("gradients_to_text_parameters")
class BlockThatCannotRunAgain(ConformingAdapter):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if isinstance(self.model.text_mlp, nn.Linear):
            self.model.text_mlp = Forgetful(self.model.text_mlp)

    def tower_blocks(self, tower: Tower) -> list[nn.Module]:
        return [self.model.text_mlp] if tower == "text" else []


@broken("tower_parameters")
class OverlappingTowers(ConformingAdapter):
    def tower_parameters(self, tower: Tower) -> Any:
        return list(self.model.named_parameters())


@broken("tower_parameters")
class NamesWithoutPrefix(ConformingAdapter):
    def tower_parameters(self, tower: Tower) -> Any:
        return [(name.rpartition(".")[2], parameter) for name, parameter in super().tower_parameters(tower)]


@broken("lora_targets")
class UnknownTarget(ConformingAdapter):
    def lora_targets(self, tower: Tower) -> list[str]:
        return [*super().lora_targets(tower), "blocks.7.q"]


@broken("lora_targets")
class QueriesOfTheLastBlock(ConformingAdapter):
    def lora_targets(self, tower: Tower) -> list[str]:
        return [*super().lora_targets(tower), *(["blocks.1.q", "blocks.1.k"] if tower == "image" else [])]


@broken("lora_targets")
class BlockAndPart(ConformingAdapter):
    def lora_targets(self, tower: Tower) -> list[str]:
        return [*super().lora_targets(tower), *(["blocks.0"] if tower == "image" else [])]


@broken("lora_reaches_features")
class BaseWeights(ConformingAdapter):
    """Slices the base weight out of the layer that LoRA wraps."""

    def dense(self, x: Tensor) -> Tensor:
        block = self.model.blocks[-1]
        x = x + block.out(F.linear(block.norm1(x), block.v.weight, block.v.bias))
        return x + block.fc2(F.gelu(block.fc1(block.norm2(x))))


@broken("lora_reaches_features")
class BaseText(ConformingAdapter):
    def encode_text(self, ids: Tensor) -> Tensor:
        layer = self.model.text_mlp
        self.model.text_mlp = getattr(layer, "base_layer", layer)
        try:
            return super().encode_text(ids)
        finally:
            self.model.text_mlp = layer


@broken("lora_unloads_and_merges")
class NudgesWeights(ConformingAdapter):
    def add_lora(self, *arguments: Any, **options: Any) -> Any:
        with torch.no_grad():
            self.model.blocks[0].fc1.bias.add_(0.1)
        return super().add_lora(*arguments, **options)


@broken("lora_unloads_and_merges")
class MergeForgets(ConformingAdapter):
    def merge(self) -> nn.Module:
        return self.unload()


# What is known only from use ------------------------------------------------------------------------------------------


@broken("joint_space")
class NoFinalNorm(ConformingAdapter):
    def place(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.model.projection(tokens[:, 1:]).unflatten(1, grid)


@broken("joint_space")
class Negated(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(-found.patches, found.pooled)


@broken("joint_space")
class CentredMap(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        return ImageFeatures(found.patches - found.patches.mean((1, 2), keepdim=True), found.pooled)


@broken("patches_in_place")
class TransposedIfLarge(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        rows, columns = found.patches.shape[1:3]
        if rows * columns < 60:
            return found
        return ImageFeatures(found.patches.flatten(1, 2).unflatten(1, (columns, rows)).transpose(1, 2), found.pooled)


@broken("patches_sharp")
class Smoothed(Features):
    def change(self, found: ImageFeatures, pixels: Tensor) -> Any:
        x = F.pad(found.patches.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="replicate")
        return ImageFeatures(F.avg_pool2d(x, 3, 1).permute(0, 2, 3, 1), found.pooled)


@broken("preferred_size")
class WidthBeforeHeight(ConformingAdapter):
    """The position table of the model is that of 2 x 8 patches."""

    description = changed_description(image_size=(8 * PATCH, 2 * PATCH))

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model.shape = 2, 8

    def native_transform(self) -> ImageTransform:
        return self.dense_transform()

    def dense_transform(self, size: Size | None = None) -> ImageTransform:
        return super().dense_transform(self.description.image_size if size is None else size)


@broken("sizes_match_library")
class OtherPositions(ConformingAdapter):
    def embed(self, pixels: Tensor) -> Tensor:
        model = self.model
        x = model.patch(pixels.to(model.patch.weight.dtype))
        table = model.positions[1:].T.unflatten(1, (GRID, GRID))[None]
        table = F.interpolate(table, size=x.shape[-2:], mode="nearest")[0].flatten(1).T
        x = torch.cat([model.class_token.expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        return x + torch.cat([model.positions[:1], table.to(x.dtype)])


@broken("patches_match_library")
class AnotherMode(ReferencedAdapter):
    def dense(self, x: Tensor) -> Tensor:
        return self.model.blocks[-1](x)

    def lora_targets(self, tower: Tower) -> list[str]:
        return [*super().lora_targets(tower), *(["blocks.1.q", "blocks.1.k"] if tower == "image" else [])]


@broken("tokens_match_library")
class NoCapitals(ReferencedAdapter):
    def tokenize(self, texts: Sequence[str]) -> Tokens:
        return super().tokenize([text.lower() for text in texts])


class CropsTheCentre:
    def __init__(self, rest: ImageTransform) -> None:
        self.rest = rest

    def __call__(self, image: Image.Image) -> Tensor:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return self.rest(image.crop((left, top, left + side, top + side)))


@broken("pixels_match_library")
class CropsLikeAnother(ReferencedAdapter):
    def native_transform(self) -> ImageTransform:
        return CropsTheCentre(super().native_transform())


@broken("process_unchanged")
class Reseeds(ConformingAdapter):
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        torch.manual_seed(0)
        return super().encode_image(pixels, pooled=pooled)


@broken("process_unchanged")
class SetsThreads(ConformingAdapter):
    def native_transform(self) -> ImageTransform:
        torch.set_float32_matmul_precision("medium")
        return super().native_transform()


@broken("memory_freed")
class KeepsEverything(ConformingAdapter):
    kept: ClassVar[list[Tensor]] = []

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        found = super().encode_image(pixels, pooled=pooled)
        self.kept.append(found.patches)
        return found


@broken("any_layout")
class Views(ConformingAdapter):
    def embed(self, pixels: Tensor) -> Tensor:
        return super().embed(pixels.view(-1).view(pixels.shape))


@broken("large_batches")
class ChunksInReverse(ConformingAdapter):
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        if len(pixels) <= 16:
            return super().encode_image(pixels, pooled=pooled)
        parts = [super(ChunksInReverse, self).encode_image(part) for part in pixels.split(16)][::-1]
        pooled_parts = [part.pooled for part in parts if part.pooled is not None]
        return ImageFeatures(torch.cat([part.patches for part in parts]), torch.cat(pooled_parts) if pooled else None)


@broken("empty_batches")
class NeedsAnImage(ConformingAdapter):
    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        assert len(pixels), "no images"
        return super().encode_image(pixels, pooled=pooled)


@broken("autocast")
class MixesDtypes(ConformingAdapter):
    def project(self, tokens: Tensor) -> Tensor:
        found = self.model.projection(self.model.norm(tokens))
        return found.index_put(
            (torch.arange(0),), found.new_zeros((0, *found.shape[1:])).to(self.model.norm.weight.dtype)
        )


@broken("float16")
class Overflows(ConformingAdapter):
    def project(self, tokens: Tensor) -> Tensor:
        return super().project(tokens * 3e4 / 3e4)


@broken("towers_complete")
class NoProjection(ConformingAdapter):
    def tower_parameters(self, tower: Tower) -> Any:
        return [(n, p) for n, p in super().tower_parameters(tower) if not n.startswith("projection")]


@broken("towers_complete")
class ScaleInTheTextTower(ConformingAdapter):
    def tower_parameters(self, tower: Tower) -> Any:
        own = list(super().tower_parameters(tower))
        return [*own, ("logit_scale", self.model.logit_scale)] if tower == "text" else own


@broken("training_mode")
class PlainInTraining(ConformingAdapter):
    def dense(self, x: Tensor) -> Tensor:
        return self.model.blocks[-1](x, value=not self.training)


@broken("trains_after_inference")
class CachesInInference(ConformingAdapter):
    """The first call decides whether the class token has a gradient; the values stay right until weights change."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.cut: bool | None = None

    def embed(self, pixels: Tensor) -> Tensor:
        if self.cut is None and pixels.device.type != "meta":
            self.cut = torch.is_inference_mode_enabled()
        x = super().embed(pixels)
        return torch.cat([x[:, :1].detach(), x[:, 1:]], dim=1) if self.cut else x


# Parameters of the copy get no gradient either.
@broken("new_weights_count", "joint_space")
class CopiesTheProjection(ConformingAdapter):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.own = self.model.projection.weight.detach().clone()

    def place(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return F.linear(self.model.norm(tokens[:, 1:]), self.own.to(tokens)).unflatten(1, grid)


@broken("new_weights_count")
class CachesTexts(ConformingAdapter):
    """Cached until the weights' version changes, which in-place changes of ``.data`` do not raise."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.scale: float | None = None

    def encode_text(self, ids: Tensor) -> Tensor:
        found = super().encode_text(ids)
        if ids.device.type == "meta" or found.dtype != torch.float32 or torch.is_inference_mode_enabled():
            return found
        value = float(self.model.text_projection.weight.detach()[0, 0])
        if self.scale is None:
            self.scale = value
        return found if self.scale == value else found * 1.1


@broken("grad_checkpointing")
class ChecksNothing(ConformingAdapter):
    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        pass


@broken("tuning_unloads")
class NoSnapshot(ConformingAdapter):
    def snapshot_weights(self) -> None:
        pass


@broken("lora_unloads_and_merges")
class MergeFreezes(ConformingAdapter):
    def merge(self) -> nn.Module:
        return super().merge().requires_grad_(False)


@broken("lora_unloads_and_merges")
class MergeDrifts(ConformingAdapter):
    def merge(self) -> nn.Module:
        model = super().merge()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-6)
        return model


@broken("lora_reaches_features")
class ReadsAroundLoRA(ConformingAdapter):
    """The value projection of the last block is no target, and its base weight is read for patches."""

    def dense(self, x: Tensor) -> Tensor:
        last = self.model.blocks[-1]
        x = x + last.out(base_layer(last.v)(last.norm1(x)))
        return x + last.fc2(last.act(last.fc1(last.norm2(x))))

    def lora_targets(self, tower: Tower) -> list[str]:
        return [name for name in super().lora_targets(tower) if name != "blocks.1.v"]


@broken("export_holds_model")
class ExportsNothing(ConformingAdapter):
    def export(self, folder: Path) -> ExportedModel:
        return ExportedModel("toy", "load_file('PATH/model.safetensors')")


@broken("logits")
class LogarithmOfAnotherName(ConformingAdapter):
    """The model calls its logarithm a temperature."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if hasattr(self.model, "logit_scale"):
            self.model.temperature = self.model.logit_scale
            del self.model.logit_scale

    def logit_scale(self) -> Tensor:
        return self.model.temperature

    def tower_parameters(self, tower: Tower) -> Any:
        return [(n, p) for n, p in super().tower_parameters(tower) if n != "temperature"]


@broken("logits")
class ForgetsTheBias(ConformingAdapter):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def tower_parameters(self, tower: Tower) -> Any:
        return [(n, p) for n, p in super().tower_parameters(tower) if n != "logit_bias"]


@broken("meta_texts")
class LengthsOnTheDevice(Tokenizing):
    def change(self, tokens: Tokens, texts: Sequence[str]) -> Tokens:
        return Tokens(tokens.ids, tokens.lengths.to(self.device), tokens.truncated)


# What stays within the contract --------------------------------------------------------------------------------------


class NoLoRA(ConformingAdapter):
    def lora_targets(self, tower: Tower) -> list[str]:
        return []


class TextLoRAOnly(ConformingAdapter):
    def lora_targets(self, tower: Tower) -> list[str]:
        return ["text_mlp"] if tower == "text" else []


class OneSize(ConformingAdapter):
    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        from ttd_plugins.errors import ImageSizeError

        if (height, width) != (GRID * PATCH, GRID * PATCH):
            raise ImageSizeError("one size only")
        return GRID, GRID

    def native_transform(self) -> ImageTransform:
        return self.dense_transform()


class EveryPositionMatters(Bidirectional):
    description = changed_description(text_needs_full_context=True)


class ConvolutionalModel(nn.Module):
    """Patches with overlapping receptive fields: strided convolutions and wide depthwise ones, as in ConvNeXt."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.wide = nn.ModuleList([nn.Conv2d(WIDTH, WIDTH, 7, padding=3, groups=WIDTH) for _ in range(depth)])
        self.points = nn.ModuleList([nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(depth)])
        self.down = nn.Conv2d(WIDTH, WIDTH, 2, stride=2)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
