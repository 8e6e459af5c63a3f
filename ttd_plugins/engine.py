"""TTD: tag selection and self-distillation on one batch of images and captions (arXiv 2404.00384).

The path of a batch: candidate tags of the captions; patch features, and embeddings of captions and distinct tags;
similarity maps; scores and selection; targets without gradient; losses. The engine uses a backbone only through
:class:`~ttd_plugins.adapter.DenseAdapter`.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ttd_plugins import functional
from ttd_plugins.adapter import (
    TOWERS,
    Calibration,
    DenseAdapter,
    Size,
    image_features,
    image_pixels,
    named_tower_parameters,
    undo_tuning,
)
from ttd_plugins.caption_maps import CaptionMaps as CaptionMaps
from ttd_plugins.caption_maps import backbone_notes
from ttd_plugins.engine_checks import (
    check_calibration,
    check_captions,
    check_extracted,
    check_groups,
    check_images,
    check_pixels,
    check_precision,
    check_tags,
    require_adapter,
    require_extractor,
)
from ttd_plugins.engine_outputs import Alignment, Candidates, EncodedBatch, Targets, TTDOutput
from ttd_plugins.engine_teacher import load_teacher, save_teacher, teacher_problem, update_average, without_teacher
from ttd_plugins.errors import InputError, TTDError, UnsupportedModelError
from ttd_plugins.functional import AnchorFeatures, SimilarityMaps, TTDFeatures
from ttd_plugins.method import similarity
from ttd_plugins.method.text_embeddings import TextEmbeddingCache
from ttd_plugins.options import TTDOptions
from ttd_plugins.utils import distributed
from ttd_plugins.utils.running_state import keep_frozen_norms_in_eval

if TYPE_CHECKING:
    from PIL.Image import Image

    from ttd_plugins.tags import TagExtractor


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
        extractor: the name of a tag extractor, as ``ttd plugins`` lists them, or a tag extractor object; by default
            ``options.extractor``.
        **changes: options by name, as in ``TTD(backbone, rule="absolute", threshold=0.2)``.

    With ``teacher="ema"`` the moving average is a part of :meth:`state_dict`, so that a loop resumes with it. Loading a
    state dict without it is an error, and a warning with ``strict=False``.

    Raises:
        InputError: the backbone is not an adapter, or an option has the wrong type or range.
        UnsupportedModelError: the backbone does not support an option.
        TagExtractionError: the tag extractor does not exist, or its resources are missing.

    Example::

        backbone = wrap(model, tokenizer=tokenizer)
        ttd = TTD(backbone)
        loss = ttd(images, captions).loss
    """

    _keys_to_ignore_on_save: ClassVar[None] = None
    """The library behind `Trainer` reads it if a checkpoint has only a part of the weights."""

    def __init__(
        self,
        backbone: DenseAdapter,
        options: TTDOptions | None = None,
        *,
        extractor: TagExtractor | str | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        backbone = require_adapter(backbone, "TTD()")
        for tower in TOWERS:
            named_tower_parameters(backbone, tower)
        unknown = sorted(set(changes) - set(TTDOptions.__dataclass_fields__))
        if unknown:
            raise InputError(f"TTD has no option {unknown[0]!r}; options: {', '.join(TTDOptions.__dataclass_fields__)}")
        if options is not None and not isinstance(options, TTDOptions):
            raise InputError(f"options of TTD() is a TTDOptions, not {options!r}; pass single options by name")
        if isinstance(extractor, str):
            extractor, changes = None, {"extractor": extractor, **changes}
        self.options = replace(options or TTDOptions(), **changes)
        self.backbone = backbone
        self.training = backbone.training
        if extractor is None:
            from ttd_plugins.plugins import make_tag_extractor

            extractor = make_tag_extractor(self.options.extractor, **self.options.extractor_options)
        self.extractor = require_extractor(extractor)
        # A tuple, so that the copy is not a submodule: its weights must not be trained, saved or moved.
        kind = self.options.teacher
        self._teacher = () if kind == "self" else (self._copy_backbone(frozen=kind == "frozen"),)
        self._anchor: tuple[DenseAdapter, ...] = ()
        if self.options.anchor_weight > 0:
            self._anchor = self._teacher if kind == "frozen" else (self._copy_backbone(frozen=True),)
        if self.options.text_activation_checkpointing and not backbone.tower_blocks("text"):
            raise UnsupportedModelError(
                f"text_activation_checkpointing=True needs the blocks of the text tower, and tower_blocks() of "
                f"{backbone.description.name} names none; leave the option out"
            )
        self._text_cache = TextEmbeddingCache(self.options.text_cache_size)
        self._teacher_text_cache = TextEmbeddingCache(self.options.text_cache_size)
        self._anchor_text_cache = TextEmbeddingCache(self.options.text_cache_size)
        self._checked_first_batch = False
        self._checked_first_step = False
        self.covers_unused = True
        """Whether weights that a loss does not use have a zero gradient if several processes train together."""
        self._unused: tuple[tuple[bool, ...], list[nn.Parameter]] | None = None

    def _copy_backbone(self, *, frozen: bool) -> DenseAdapter:
        teacher = copy.deepcopy(self.backbone)
        if frozen:
            undo_tuning(teacher)
        return teacher.requires_grad_(False).eval()

    def __repr__(self) -> str:
        """One line: the backbone, and options that are not at their defaults."""
        options, default = vars(self.options), vars(TTDOptions())
        changed = [f"{name}={value!r}" for name, value in options.items() if value != default[name]]
        return f"TTD({', '.join([repr(self.backbone), *changed])})"

    @property
    def calibration(self) -> Calibration:
        """The map from cosine to probability: the option, or else the backbone's own."""
        return self.options.calibration or self.backbone.description.calibration

    @property
    def teacher(self) -> DenseAdapter | None:
        """The copy that computes the targets; ``None`` if the backbone is its own teacher."""
        return self._teacher[0] if self._teacher else None

    @property
    def _average(self) -> DenseAdapter | None:
        """The teacher if it is a moving average."""
        return self.teacher if self.options.teacher == "ema" else None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._average is not None:
            save_teacher(self._average, destination, prefix)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self._average is not None:
            load_teacher(self._average, state_dict, prefix, missing_keys, error_msgs)
            self._teacher_text_cache.clear()
            state_dict = without_teacher(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, and the moving average of ``teacher="ema"``; see :meth:`torch.nn.Module.load_state_dict`.

        Without a moving average in the state dict it starts anew at the loaded weights, with a warning, if ``strict``
        is false.

        Raises:
            InputError: ``strict``, and the moving average is missing, is of another backbone, or has no use.
        """
        problem = teacher_problem(self._average, state_dict, self.options.teacher) if strict else None
        if problem is not None:
            raise InputError(problem)
        return super().load_state_dict(state_dict, strict, assign)

    def forward(
        self,
        images: Tensor,
        captions: Sequence[str],
        tags: Sequence[Sequence[str]] | None = None,
        groups: Sequence[Hashable] | None = None,
        *,
        return_loss: bool = True,
    ) -> TTDOutput:
        """Compute the loss of a batch of image-text pairs.

        If ``torch.distributed`` is initialised and gradients are enabled, the loss is that of the joint batch of all
        processes: their pairs are negatives of the contrastive term, and means are over all of them. The average of
        the processes' gradients is the gradient of this loss. Every process must make the call. Without gradients the
        loss is that of this batch alone. Trained weights that the loss does not use, such as the logit scale without a
        contrastive term, have a gradient of zero with several processes, so that ``DistributedDataParallel`` needs no
        ``find_unused_parameters``.

        Normalisation layers whose weights are frozen are set to evaluation mode, so that their statistics stay.

        Args:
            images: float ``[B, 3, height, width]``, normalised for the backbone, of any size that it accepts, on its
                device.
            captions: B strings; an empty one has no tags and contributes to the contrastive term only.
            tags: candidate tags of each caption; by default the extractor finds them.
            groups: the id of each pair's image: a string, an integer or another hashable value, in a sequence, an array
                or a tensor. Pairs of one image are not negatives in the contrastive term. Either all processes pass
                groups, or none. Pairs with the same caption are not negatives either, with or without groups.
            return_loss: must be true; training libraries look for the argument before they evaluate a model.

        Raises:
            InputError: an argument has the wrong type or shape, the number of captions, of lists of tags or of groups
                differs from that of images, or the pixels of the first batch are not normalised.
        """
        options = self.options
        if not return_loss:
            raise InputError("TTD always returns its loss; leave return_loss out")
        if getattr(self, "_is_replica", False):
            raise TTDError(
                "nn.DataParallel copies the backbone without its parameters and does not split captions; start one "
                "process for each GPU (torchrun or accelerate launch), or make one GPU visible"
            )
        images = check_images(images, self.backbone)
        ids = None if groups is None else check_groups(groups, images)
        if torch.is_grad_enabled():
            if not self._checked_first_step:
                check_precision(self.backbone)
                self._checked_first_step = True
            keep_frozen_norms_in_eval(self.backbone.model)
            if not self.backbone.has_lora:
                self.backbone.snapshot_weights()
        candidates = self.candidates(images, captions, tags)
        if not self._checked_first_batch:
            check_pixels(images, self.backbone)
        need_pooled = options.contrastive_weight > 0 or options.anchor_weight > 0
        # Without L_tag, tag embeddings only affect targets, and need no gradient.
        tag_gradient = options.tag_weight > 0
        encoded = self._encode(
            self.backbone, images, captions, candidates, pooled=need_pooled, tag_gradient=tag_gradient
        )
        teacher = self._teacher_features(images, captions, candidates)
        anchor = None
        with torch.autocast(images.device.type, enabled=False):
            contrastive = options.contrastive_weight > 0
            scale, bias = (self.backbone.logit_scale(), self.backbone.logit_bias()) if contrastive else (None, None)
            if options.anchor_weight > 0:
                anchor = self._anchor_features(images, captions, teacher)
        result = functional.ttd_loss(
            *encoded.features,
            options,
            logit_scale=scale,
            logit_bias=bias,
            logits=self.backbone.description.logits,
            calibration=self.calibration,
            groups=ids,
            caption_ids=captions,
            teacher_features=teacher,
            anchor_features=anchor,
            image_index=candidates.image_index,
            tag_index=candidates.tag_index,
            max_tags=candidates.max_tags,
            normalized=True,
        )
        loss = result.loss
        if self.covers_unused and distributed.process_count() > 1 and loss.requires_grad:
            with torch.autocast(images.device.type, enabled=False):
                loss = sum((parameter.sum() * 0 for parameter in self._unused_parameters(loss)), loss)
        alignment = encoded.alignment(candidates, result.maps)
        if not self._checked_first_batch:
            if self._uses_calibration():
                maps = [alignment.tag_maps, alignment.caption_maps]
                check_calibration(self.calibration, maps, self.backbone.description.name)
            self._checked_first_batch = True

        targets = Targets(result.selected, result.tag_targets, result.union, result.usable)
        return TTDOutput(loss, result.losses, alignment, targets)

    def candidates(
        self, images: Tensor, captions: Sequence[str], tags: Sequence[Sequence[str]] | None = None
    ) -> Candidates:
        """Return the candidate tags of a batch: ``tags``, or those that the extractor finds in the captions.

        Raises:
            InputError: the batch is empty, an argument has the wrong type or shape, or the number of captions or of
                lists of tags differs from that of images.
            TagExtractionError: the extractor does not return one list of strings for each caption.
        """
        images = check_images(images, self.backbone)
        captions = check_captions(captions, images)
        if tags is None:
            tags = check_extracted(self.extractor(captions), captions, self.extractor)
        else:
            tags = check_tags(tags, captions)
        return Candidates.of(tags, images.device)

    def prepare_texts(
        self, images: Tensor, captions: Sequence[str], tags: Sequence[Sequence[str]] | None = None
    ) -> list[list[str]]:
        """Do the host work of a later call with the same texts: find their tags, and tokenise captions and tags.

        A training loop calls it while the device computes another step, so that the device does not wait for it. The
        next call of this method replaces the prepared tokens.

        Args:
            images, captions, tags: as in :meth:`forward`; only the number of images is used.

        Returns:
            The candidate tags of each caption, for the argument ``tags`` of :meth:`forward`.

        Raises:
            InputError, TagExtractionError: as :meth:`candidates`.
        """
        found = self.candidates(images, captions, tags).tags
        distinct = dict.fromkeys(tag for names in found for tag in names)
        templates = [self.options.template.format(tag) for tag in distinct]
        self._text_cache.tokenize_ahead(self.backbone, [*captions, *templates])
        return found

    def align(
        self, images: Tensor, captions: Sequence[str], candidates: Candidates, *, pooled: bool = True
    ) -> Alignment:
        """Compute maps and scores of a batch with the backbone (the student); gradients follow torch's grad mode.

        Raises:
            InputError: an argument has the wrong type or shape.
        """
        images = check_images(images, self.backbone)
        encoded = self._encode(self.backbone, images, captions, candidates, pooled=pooled)
        with torch.autocast(images.device.type, enabled=False):
            index = candidates.image_index, candidates.tag_index, candidates.max_tags
            maps = functional.similarity_maps(encoded.features, *index, score=self.options.score)
        return encoded.alignment(candidates, maps)

    def _encode(
        self,
        adapter: DenseAdapter,
        images: Tensor,
        captions: Sequence[str],
        candidates: Candidates,
        *,
        pooled: bool,
        tag_gradient: bool = True,
    ) -> EncodedBatch:
        """Encode images, captions and distinct tags by a backbone, and L2-normalise the embeddings."""
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
        normalized = TTDFeatures(patches, pooled_embeddings, caption_embeddings, tag_embeddings)
        return EncodedBatch(normalized, (rows, columns), truncated[: len(captions)])

    def _uses_calibration(self) -> bool:
        """Whether the selection or a loss maps cosines to probabilities."""
        options = self.options
        trained = options.tag_weight > 0 or options.distill_weight > 0
        return trained and (options.rule == "probability" or options.activation == "sigmoid")

    def _unused_parameters(self, loss: Tensor) -> list[nn.Parameter]:
        """Return the trained parameters that a loss does not depend on, found once for each choice of trained ones."""
        trained = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        key = tuple(parameter.requires_grad for parameter in self.backbone.parameters())
        if self._unused is None or self._unused[0] != key:
            used = distributed.leaves(loss)
            self._unused = key, [parameter for parameter in trained if parameter not in used]
        return self._unused[1]

    def _checkpoints_texts(self, adapter: DenseAdapter) -> bool:
        """Whether to use activation checkpointing in the text tower; by default where texts cannot be trimmed."""
        option = self.options.text_activation_checkpointing
        return adapter.description.text_needs_full_context if option is None else option

    @torch.no_grad()
    def _teacher_features(self, images: Tensor, captions: Sequence[str], candidates: Candidates) -> TTDFeatures | None:
        """Update a moving-average teacher, and return the teacher's features; ``None`` without a teacher copy."""
        if not self._teacher:
            return None
        (teacher,) = self._teacher
        teacher.to(images.device)
        # The model's mode and not this module's: the caller's loop switches the model.
        if self._average is not None and self.backbone.model.training:
            update_average(teacher, self.backbone, self.options.ema_decay)
        return self._encode(teacher, images, captions, candidates, pooled=teacher in self._anchor).features

    @torch.no_grad()
    def _anchor_features(self, images: Tensor, captions: Sequence[str], teacher: TTDFeatures | None) -> AnchorFeatures:
        """Pooled image and caption embeddings of the frozen model; a frozen teacher has them."""
        (frozen,) = self._anchor
        logits = similarity.promote(frozen.logit_scale()), frozen.logit_bias()
        if frozen in self._teacher:
            assert teacher is not None
            assert teacher.pooled is not None
            return AnchorFeatures(teacher.pooled, teacher.captions, *logits)
        frozen.to(images.device)
        pooled = image_features(frozen, images, pooled=True).pooled
        assert pooled is not None
        return AnchorFeatures(pooled, self._anchor_text_cache.encode(frozen, captions)[0], *logits)

    @torch.no_grad()
    def targets(self, alignment: Alignment) -> Targets:
        """Select tags and compute the targets of an alignment, without gradient."""
        maps = SimilarityMaps(alignment.tag_maps, alignment.caption_maps, alignment.scores)
        image_index, batch = alignment.candidates.image_index, len(alignment.caption_maps)
        return Targets(*functional.make_targets(maps, image_index, batch, self.options, self.calibration))

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
            InputError: the image cannot be read, or an argument has the wrong type.
            ImageSizeError: the size does not fit the patch grid.
        """
        from ttd_plugins.data.images import read_image, to_rgb

        if not isinstance(caption, str):
            raise InputError(f"the caption must be a string, not a {type(caption).__name__}")
        image = read_image(image) if isinstance(image, Path | str) else to_rgb(image)
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
        """Undo the normalisation of pixels ``[3, height, width]`` on any device, to uint8 ``[height, width, 3]``."""
        description = self.backbone.description
        pixels = pixels.detach().cpu()
        # On the device of the pixels, also where the default device is another one.
        mean, std = (torch.tensor(values, device="cpu") for values in (description.mean, description.std))
        return ((pixels.permute(1, 2, 0).float() * std + mean) * 255).round().clamp(0, 255).byte().numpy()
