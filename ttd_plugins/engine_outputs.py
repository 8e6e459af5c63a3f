"""What the engine returns: candidates, maps and targets of a batch, its output, and the maps of one image for plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from ttd_plugins.functional import SimilarityMaps, TTDFeatures
from ttd_plugins.method.text_embeddings import on_device
from ttd_plugins.utils.deprecation import RenamedAttribute


@dataclass(frozen=True)
class Candidates:
    """The N candidate tags of a batch: candidate n is tag ``distinct[tag_index[n]]`` of image ``image_index[n]``.

    Attributes:
        tags: the candidates of each caption.
        distinct: the K distinct tags of the batch; each is encoded once.
        image_index, tag_index: int64 ``[N]``; ``image_index`` is ascending.
    """

    tags: list[list[str]]
    distinct: list[str]
    image_index: Tensor
    tag_index: Tensor

    most = RenamedAttribute("max_tags")

    @classmethod
    def of(cls, tags: Sequence[Sequence[str]], device: torch.device) -> Candidates:
        """Flatten the tags of the captions, in order."""
        number: dict[str, int] = {}
        images, indices = [], []
        for image, names in enumerate(tags):
            for name in names:
                images.append(image)
                indices.append(number.setdefault(name, len(number)))
        return cls(
            [list(names) for names in tags],
            list(number),
            on_device(torch.tensor(images, dtype=torch.long), device),
            on_device(torch.tensor(indices, dtype=torch.long), device),
        )

    @property
    def max_tags(self) -> int:
        """The largest number of candidates of one image, without host synchronisation."""
        return max(map(len, self.tags), default=0)


@dataclass
class Alignment:
    """Maps, scores and features of a batch by one backbone, in at least float32.

    Attributes:
        candidates: the N candidate tags.
        grid: rows H and columns W of the patch grid; P = H * W.
        tag_maps: cosines ``[N, P]``.
        caption_maps: cosines ``[B, P]``.
        scores: cosines ``[N]``, by the option ``score``.
        patches: L2-normalised patch features ``[B, P, D]``.
        tags: L2-normalised embeddings of the K distinct tags, ``[K, D]``.
        pooled: L2-normalised pooled image embeddings ``[B, D]``, or ``None`` if they were not needed.
        captions: L2-normalised caption embeddings ``[B, D]``.
        truncated: for each caption, whether it was longer than the context and lost its last words.
    """

    candidates: Candidates
    grid: tuple[int, int]
    tag_maps: Tensor
    caption_maps: Tensor
    scores: Tensor
    patches: Tensor
    tags: Tensor
    pooled: Tensor | None
    captions: Tensor
    truncated: list[bool]

    def __repr__(self) -> str:
        batch, tags, grid = len(self.caption_maps), len(self.tag_maps), " x ".join(map(str, self.grid))
        return f"Alignment({batch} captions, {tags} tags, grid {grid})"


@dataclass(frozen=True)
class EncodedBatch:
    """L2-normalised features of a batch by one backbone, before they are compared.

    Attributes:
        features: patches ``[B, P, D]``, pooled ``[B, D]`` or ``None``, captions ``[B, D]``, distinct tags ``[K, D]``.
        grid: rows and columns of the patch grid.
        truncated: for each caption, whether it was longer than the context.
    """

    features: TTDFeatures
    grid: tuple[int, int]
    truncated: list[bool]

    def alignment(self, candidates: Candidates, maps: SimilarityMaps) -> Alignment:
        """Return the features together with their similarity maps."""
        patches, pooled, captions, tags = self.features
        assert isinstance(tags, Tensor)
        return Alignment(
            candidates,
            self.grid,
            maps.tag_maps,
            maps.caption_maps,
            maps.scores,
            patches,
            tags,
            pooled,
            captions,
            self.truncated,
        )


@dataclass
class Targets:
    """Targets of the maps, without gradient.

    Attributes:
        selected: bool ``[N]``, the image-relevant tags.
        tag_maps: ``[N, P]``, min-max normalised maps of selected tags, zero for rejected ones.
        union: ``[B, P]``, patchwise maximum of an image's ``tag_maps``.
        usable: bool ``[B]``, captions whose union is not empty; the others do not contribute to L_distill.
    """

    selected: Tensor
    tag_maps: Tensor
    union: Tensor
    usable: Tensor

    def __repr__(self) -> str:
        return f"Targets({len(self.selected)} tags, {len(self.usable)} captions)"


def _scalar(value: Any) -> str:
    """A loss in four digits; a value that some library put in its place as it is."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type != "meta":
        return f"{value.item():.4g}"
    return type(value).__name__ if isinstance(value, Tensor) else repr(value)


class _Key(str):
    """A key of an output with the output's parts, so that a copy made from the items has them too.

    It does not refer to the output: a cycle would keep activations until the garbage collector runs.
    """

    parts: tuple[Alignment, Targets]

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


class TTDOutput(dict[str, Any]):
    """Loss of one batch, its parts, and the maps that it was computed from.

    It is a mapping as well, with the keys ``loss``, ``losses``, ``caption_maps``, ``union`` and ``usable``, and a tuple
    of their values by integer index and :meth:`to_tuple`. So training libraries find the loss by ``output["loss"]`` or
    ``output[0]``. Items other than the loss have no gradient. ``TTDOutput(mapping)`` builds an output from the items of
    another one, as such libraries do to convert dtypes.

    Attributes:
        loss: the weighted sum of the parts, a scalar with gradient.
        losses: ``"tag"``, ``"distill"``, ``"contrastive"`` and ``"anchor"``, unweighted scalars without gradient; a
            part of weight zero is left out.
        alignment: maps and scores of the backbone (the student).
        targets: the targets of its maps.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    alignment: Alignment
    targets: Targets

    figures = RenamedAttribute("device_statistics")

    def __init__(
        self,
        loss: Tensor | Mapping[str, Any],
        losses: dict[str, Tensor] | None = None,
        alignment: Alignment | None = None,
        targets: Targets | None = None,
    ) -> None:
        if isinstance(loss, Mapping):
            super().__init__(loss)
            parts = next((key.parts for key in loss if isinstance(key, _Key)), None)
            if parts is None:
                raise TypeError("TTDOutput takes its four parts, or the items of another TTDOutput")
            self.loss, self.losses, (self.alignment, self.targets) = loss["loss"], loss["losses"], parts
            return
        assert losses is not None
        assert alignment is not None
        assert targets is not None
        self.loss, self.losses, self.alignment, self.targets = loss, losses, alignment, targets
        values = {
            "loss": loss,
            "losses": losses,
            "caption_maps": self.caption_maps,
            "union": self.union,
            "usable": self.usable,
        }
        keys = [_Key(name) for name in values]
        for key in keys:
            key.parts = alignment, targets
        super().__init__(zip(keys, values.values(), strict=True))

    # By identity: comparing tensors has no single answer.
    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={_scalar(value)}" for name, value in self.losses.items())
        return f"TTDOutput(loss={_scalar(self.loss)}, losses=({parts}), {self.alignment!r}, {self.targets!r})"

    def __getitem__(self, key: Any) -> Any:
        """Return the value of a key, of an attribute of that name, or of an index or slice of :meth:`to_tuple`."""
        if isinstance(key, int | slice):
            return self.to_tuple()[key]
        if key in ("alignment", "targets"):
            return getattr(self, key)
        return super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values of all keys, the loss first."""
        return tuple(self.values())

    @property
    def caption_maps(self) -> Tensor:
        """Cosine maps of the captions, ``[B, P]``, without gradient."""
        return self.alignment.caption_maps.detach()

    @property
    def union(self) -> Tensor:
        """Targets of the captions' maps, ``[B, P]``."""
        return self.targets.union

    @property
    def usable(self) -> Tensor:
        """Whether each caption has a target, bool ``[B]``."""
        return self.targets.usable

    @property
    def device_statistics(self) -> dict[str, float | Tensor]:
        """The :attr:`statistics` as numbers and scalar device tensors, without host synchronisation."""
        maps, batch = self.alignment.caption_maps.detach(), max(len(self.alignment.truncated), 1)
        return {
            "tags_per_caption": len(self.targets.selected) / batch,
            "selected_per_caption": self.targets.selected.sum() / batch,
            "caption_map_spread": (maps.amax(-1) - maps.amin(-1)).mean(),
            "captions_without_target": (~self.targets.usable).sum(),
            "captions_truncated": float(sum(self.alignment.truncated)),
        }

    @property
    def statistics(self) -> dict[str, float]:
        """Statistics of the batch.

        ``tags_per_caption``, ``selected_per_caption``, ``caption_map_spread`` (mean of max - min over patches; near
        zero means collapse), ``captions_without_target`` and ``captions_truncated``.
        """
        return {name: float(value) for name, value in self.device_statistics.items()}


def _flatten(output: TTDOutput) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output)


def _unflatten(values: Any, keys: list[str]) -> TTDOutput:
    return TTDOutput(dict(zip(keys, values, strict=True)))


# Distributed wrappers look for the tensors of an output in torch's trees, where a subclass of dict is a leaf.
_pytree.register_pytree_node(TTDOutput, _flatten, _unflatten, serialized_type_name="ttd_plugins.engine.TTDOutput")
