"""TTD: tag selection and self-distillation on one batch of images and captions (arXiv 2404.00384).

The path of a batch: candidate tags of the captions; patch features, and embeddings of captions and distinct tags;
similarity maps; scores and selection; targets without gradient; losses. The engine uses a backbone only through
:class:`~ttd_plugins.adapter.DenseAdapter`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ttd_plugins.adapter import (
    Calibration,
    DenseAdapter,
    Size,
    image_features,
    image_pixels,
)
from ttd_plugins.caption_maps import CaptionMaps as CaptionMaps
from ttd_plugins.caption_maps import backbone_notes
from ttd_plugins.errors import InputError, TagExtractionError, TTDError, UnsupportedModelError
from ttd_plugins.method import losses, selection, similarity
from ttd_plugins.method.text_embeddings import TextEmbeddingCache, on_device
from ttd_plugins.options import TTDOptions
from ttd_plugins.utils import distributed
from ttd_plugins.utils.deprecation import RenamedAttribute

if TYPE_CHECKING:
    from PIL.Image import Image

    from ttd_plugins.tags import TagExtractor


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


@dataclass
class TTDOutput:
    """Loss of one batch, its parts, and the maps that it was computed from.

    Attributes:
        loss: the weighted sum of the parts, a scalar with gradient.
        losses: ``"tag"``, ``"distill"`` and ``"contrastive"``, unweighted scalars without gradient; a part of weight
            zero is left out.
        alignment: maps and scores of the backbone (the student).
        targets: the targets of its maps.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    alignment: Alignment
    targets: Targets

    figures = RenamedAttribute("device_statistics")

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


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Set a module and its submodules to evaluation mode; restore the mode of each at the end."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


class TTD(nn.Module):
    """Text-Tag Self-Distillation on any backbone.

    Args:
        backbone: from :func:`ttd_plugins.load` or :func:`ttd_plugins.wrap`.
        options: the options of the method.
        extractor: a tag extractor object, instead of ``options.extractor``.
        **changes: options by name, as in ``TTD(backbone, rule="absolute", threshold=0.2)``.

    Example::

        backbone = wrap(model, tokenizer=tokenizer)
        ttd = TTD(backbone)
        loss = ttd(images, captions).loss
    """

    def __init__(
        self,
        backbone: DenseAdapter,
        options: TTDOptions | None = None,
        *,
        extractor: TagExtractor | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(changes) - set(TTDOptions.__dataclass_fields__))
        if unknown:
            raise InputError(f"TTD has no option {unknown[0]!r}; options: {', '.join(TTDOptions.__dataclass_fields__)}")
        self.options = replace(options or TTDOptions(), **changes)
        self.backbone = backbone
        self.training = backbone.training
        if extractor is None:
            from ttd_plugins.plugins import make_tag_extractor

            extractor = make_tag_extractor(self.options.extractor, **self.options.extractor_options)
        self.extractor = extractor
        # A tuple, so that the copy is not a submodule: its weights must not be trained, saved or moved.
        self._teacher = () if self.options.teacher == "self" else (self._copy_backbone(),)
        if self.options.text_activation_checkpointing and not backbone.tower_blocks("text"):
            raise UnsupportedModelError(
                f"text_activation_checkpointing=True needs the blocks of the text tower, and tower_blocks() of "
                f"{backbone.description.name} names none; leave the option out"
            )
        self._text_cache = TextEmbeddingCache(self.options.text_cache_size)
        self._teacher_text_cache = TextEmbeddingCache(self.options.text_cache_size)

    def _copy_backbone(self) -> DenseAdapter:
        teacher = copy.deepcopy(self.backbone)
        if self.options.teacher == "frozen":
            teacher.unload()
        return teacher.requires_grad_(False).eval()

    @property
    def calibration(self) -> Calibration:
        """The map from cosine to probability: the option, or else the backbone's own."""
        return self.options.calibration or self.backbone.description.calibration

    @property
    def teacher(self) -> DenseAdapter | None:
        """The copy that computes the targets; ``None`` if the backbone is its own teacher."""
        return self._teacher[0] if self._teacher else None

    def forward(
        self,
        images: Tensor,
        captions: Sequence[str],
        tags: Sequence[Sequence[str]] | None = None,
        groups: Sequence[str] | None = None,
    ) -> TTDOutput:
        """Compute the loss of a batch of image-text pairs.

        If ``torch.distributed`` is initialised and gradients are enabled, the loss is that of the joint batch of all
        processes: their pairs are negatives of the contrastive term, and means are over all of them. The average of
        the processes' gradients is the gradient of this loss. Every process must make the call. Without gradients the
        loss is that of this batch alone.

        Args:
            images: ``[B, 3, height, width]``, normalised for the backbone, of any size that it accepts.
            captions: B strings; an empty one has no tags and contributes to the contrastive term only.
            tags: candidate tags of each caption; by default the extractor finds them.
            groups: a name of each pair's image; pairs of one image are not negatives in the contrastive term. Either
                all processes pass groups, or none.

        Raises:
            InputError: the number of captions, of lists of tags or of groups differs from that of images.
        """
        options = self.options
        if groups is not None and len(groups) != len(images):
            raise InputError(f"{len(images)} images came with {len(groups)} groups; pass one group per image")
        if torch.is_grad_enabled() and not self.backbone.has_lora:
            self.backbone.snapshot_weights()
        candidates = self.candidates(images, captions, tags)
        need_pooled = options.contrastive_weight > 0
        # Without L_tag, tag embeddings only affect targets, and need no gradient.
        tag_gradient = options.tag_weight > 0
        alignment = self._align(
            self.backbone, images, captions, candidates, pooled=need_pooled, tag_gradient=tag_gradient
        )
        targets = self.targets(self._teacher_alignment(images, captions, candidates) or alignment)

        parts: dict[str, Tensor] = {}
        weights = {"tag": options.tag_weight, "distill": options.distill_weight}
        with torch.autocast(images.device.type, enabled=False):
            if options.tag_weight > 0:
                distance = self._distance(alignment.tag_maps, targets.tag_maps)
                weight = torch.where(targets.selected, torch.ones_like(distance), options.rejected_weight)
                # Without tags, or if all are rejected with weight zero, both sums are zero, and so is the loss.
                parts["tag"] = self._mean((weight * distance).sum(), weight.sum())
            if options.distill_weight > 0:
                distance = self._distance(alignment.caption_maps, targets.union)
                usable = targets.usable.float()
                parts["distill"] = self._mean((usable * distance).sum(), usable.sum())
            if need_pooled:
                assert alignment.pooled is not None
                weights["contrastive"] = options.contrastive_weight
                parts["contrastive"] = self._contrastive(
                    alignment.pooled,
                    alignment.captions,
                    groups,
                )
            loss = sum((weights[name] * part for name, part in parts.items()), alignment.caption_maps.sum() * 0)
        return TTDOutput(loss, {name: part.detach() for name, part in parts.items()}, alignment, targets)

    def candidates(
        self, images: Tensor, captions: Sequence[str], tags: Sequence[Sequence[str]] | None = None
    ) -> Candidates:
        """Return the candidate tags of a batch: ``tags``, or those that the extractor finds in the captions.

        Raises:
            InputError: the batch is empty, or the number of captions or of lists of tags differs from that of images.
            TagExtractionError: the extractor returns another number of lists than there are captions.
        """
        if isinstance(captions, str):
            raise InputError("captions must be a list with one string for each image, not a single string")
        if len(captions) != len(images):
            raise InputError(f"{len(images)} images came with {len(captions)} captions; pass one caption per image")
        if tags is not None and len(tags) != len(captions):
            raise InputError(f"{len(captions)} captions came with {len(tags)} lists of tags; pass one list per caption")
        if not len(images):
            raise InputError("the batch is empty; pass at least one image and caption")
        if tags is None:
            tags = self.extractor(captions)
            if len(tags) != len(captions):
                raise TagExtractionError(
                    f"tag extractor {self.extractor.name!r} returned {len(tags)} lists for {len(captions)} captions"
                )
        elif any(isinstance(names, str) for names in tags):
            raise InputError("tags must be a list of tags for each caption, not one string; write [[tag], ...]")
        return Candidates.of(tags, images.device)

    def align(
        self, images: Tensor, captions: Sequence[str], candidates: Candidates, *, pooled: bool = True
    ) -> Alignment:
        """Compute maps and scores of a batch with the backbone (the student); gradients follow torch's grad mode."""
        return self._align(self.backbone, images, captions, candidates, pooled=pooled)

    def _align(
        self,
        adapter: DenseAdapter,
        images: Tensor,
        captions: Sequence[str],
        candidates: Candidates,
        *,
        pooled: bool,
        tag_gradient: bool = True,
    ) -> Alignment:
        pooled = pooled or self.options.score == "image"
        cache = self._text_cache if adapter is self.backbone else self._teacher_text_cache
        checkpointing = self._checkpoints_texts(adapter)
        # With checkpointing encode text first, so that backward frees image activations before it recomputes text.
        features = None if checkpointing else image_features(adapter, images, pooled=pooled)
        # Captions and tags together, so that texts of similar length share a call of the text tower.
        tags = [self.options.template.format(tag) for tag in candidates.distinct]
        if tag_gradient or not torch.is_grad_enabled():
            embeddings, truncated = cache.encode(adapter, [*captions, *tags], activation_checkpointing=checkpointing)
            caption_embeddings, tag_embeddings = embeddings[: len(captions)], embeddings[len(captions) :]
        else:
            caption_embeddings, truncated = cache.encode(adapter, captions, activation_checkpointing=checkpointing)
            with torch.no_grad():
                tag_embeddings, _ = cache.encode(adapter, tags)
        if features is None:
            features = image_features(adapter, images, pooled=pooled)
        with torch.autocast(images.device.type, enabled=False):
            rows, columns = features.patches.shape[1:3]
            patches = similarity.normalize(features.patches.flatten(1, 2))
            pooled_embeddings = similarity.normalize(features.pooled) if features.pooled is not None else None
            image_index, tag_index = candidates.image_index, candidates.tag_index
            tag_maps = similarity.tag_maps(patches, tag_embeddings, image_index, tag_index, candidates.max_tags)
            if self.options.score == "pixel":
                scores = selection.pixel_scores(tag_maps)
            elif self.options.score == "image":
                assert pooled_embeddings is not None
                scores = selection.image_scores(pooled_embeddings, tag_embeddings, image_index, tag_index)
            else:
                scores = selection.text_scores(caption_embeddings, tag_embeddings, image_index, tag_index)
            return Alignment(
                candidates,
                (rows, columns),
                tag_maps,
                similarity.caption_maps(patches, caption_embeddings),
                scores,
                patches,
                tag_embeddings,
                pooled_embeddings,
                caption_embeddings,
                truncated[: len(captions)],
            )

    def _checkpoints_texts(self, adapter: DenseAdapter) -> bool:
        """Whether to use activation checkpointing in the text tower; by default where texts cannot be trimmed."""
        option = self.options.text_activation_checkpointing
        return adapter.description.text_needs_full_context if option is None else option

    @torch.no_grad()
    def _teacher_alignment(self, images: Tensor, captions: Sequence[str], candidates: Candidates) -> Alignment | None:
        """Update a moving-average teacher, and return the teacher's alignment; ``None`` without a teacher copy."""
        if not self._teacher:
            return None
        (teacher,) = self._teacher
        teacher.to(images.device)
        # The model's mode and not this module's: the caller's loop switches the model.
        if self.options.teacher == "ema" and self.backbone.model.training:
            averages, parameters = list(teacher.parameters()), list(self.backbone.parameters())
            if [p.shape for p in averages] != [p.shape for p in parameters]:
                raise TTDError("LoRA was added to or removed from the backbone after TTD() was built; build a new TTD")
            for average, current in zip(averages, parameters, strict=True):
                average.lerp_(current.detach().to(average.dtype), 1 - self.options.ema_decay)
        return self._align(teacher, images, captions, candidates, pooled=False)

    @torch.no_grad()
    def targets(self, alignment: Alignment) -> Targets:
        """Select tags and compute the targets of an alignment, without gradient."""
        image_index, batch = alignment.candidates.image_index, len(alignment.caption_maps)
        selected = selection.select_tags(
            alignment.scores,
            image_index,
            batch,
            rule=self.options.rule,
            threshold=self.options.threshold,
            calibration=self.calibration,
        )
        maps = similarity.minmax_normalize(alignment.tag_maps) * selected[:, None]
        union = similarity.union_map(maps, image_index, batch)
        # The union is empty without a selected tag, or if the maps of all selected tags are flat.
        return Targets(selected, maps, union, usable=union.amax(-1) > 0)

    def _distance(self, maps: Tensor, targets: Tensor) -> Tensor:
        return losses.map_distance(
            maps,
            targets,
            distance=self.options.distance,
            activation=self.options.activation,
            calibration=self.calibration,
        )

    def _mean(self, total: Tensor, count: Tensor) -> Tensor:
        """Return ``total / count``: with gradients over the joint batch of all processes, otherwise over this one."""
        return distributed.joint_mean(total, count) if torch.is_grad_enabled() else total / count.clamp_min(1e-6)

    def _contrastive(self, pooled: Tensor, captions: Tensor, groups: Sequence[str] | None) -> Tensor:
        numbers = None if groups is None else distributed.group_numbers(groups, pooled.device)
        if torch.is_grad_enabled():
            pooled, captions = distributed.gather_rows(pooled), distributed.gather_rows(captions)
            numbers = None if numbers is None else distributed.gather_rows(numbers)
        return losses.contrastive_loss(
            pooled,
            captions,
            scale=similarity.promote(self.backbone.logit_scale()),
            bias=self.backbone.logit_bias(),
            form=self.backbone.description.logits,
            groups=numbers,
        )

    @torch.no_grad()
    def maps(
        self,
        image: Image | Path | str,
        caption: str,
        *,
        size: Size | None = None,
        tags: Sequence[str] | None = None,
    ) -> CaptionMaps:
        """Compute the maps of one image and its caption, in evaluation mode.

        Args:
            image: a PIL image or its path.
            caption: any string.
            size: input (height, width) in pixels, or the side of a square; by default the backbone's preferred size.
            tags: candidate tags; by default the extractor finds them in the caption.

        Raises:
            InputError: the image cannot be read.
            ImageSizeError: the size does not fit the patch grid.
        """
        if isinstance(image, Path | str):
            from ttd_plugins.data.images import read_image

            image = read_image(image)
        pixels = image_pixels(self.backbone, image, size)
        images = pixels[None].to(self.backbone.device)
        with evaluation_mode(self.backbone):
            candidates = self.candidates(images, [caption], None if tags is None else [tags])
            alignment = self.align(images, [caption], candidates, pooled=False)
        targets = self.targets(alignment)
        own = self.options.calibration
        calibrated = self.backbone.description.calibrated if own is None else own != Calibration()

        def array(maps: Tensor) -> NDArray[Any]:
            return maps.reshape(*maps.shape[:-1], *alignment.grid).cpu().numpy()

        return CaptionMaps(
            image=self.image_array(pixels),
            caption=caption,
            tags=candidates.tags[0],
            scores=alignment.scores.cpu().numpy(),
            probabilities=self.calibration.probability(alignment.scores).cpu().numpy(),
            selected=targets.selected.cpu().numpy(),
            tag_maps=array(alignment.tag_maps),
            tag_maps_normalized=array(similarity.minmax_normalize(alignment.tag_maps)),
            union=array(targets.union)[0],
            caption_map=array(alignment.caption_maps)[0],
            caption_map_normalized=array(similarity.minmax_normalize(alignment.caption_maps))[0],
            truncated=alignment.truncated[0],
            calibrated=calibrated,
            notes=backbone_notes(self.backbone.description, calibrated=calibrated, rule=self.options.rule),
        )

    def image_array(self, pixels: Tensor) -> NDArray[np.uint8]:
        """Undo the backbone's normalisation: pixels ``[3, height, width]`` to uint8 ``[height, width, 3]``."""
        description = self.backbone.description
        mean, std = torch.tensor(description.mean), torch.tensor(description.std)
        return ((pixels.permute(1, 2, 0).float() * std + mean) * 255).round().clamp(0, 255).byte().numpy()
