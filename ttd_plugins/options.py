"""The options of TTD: every choice of the method, with its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from ttd_plugins.adapter import Calibration
from ttd_plugins.errors import InputError
from ttd_plugins.method import losses, selection

Teacher = Literal["self", "frozen", "ema"]


@dataclass(frozen=True)
class TTDOptions:
    """Every choice of the method. Those that the paper leaves unknown say so; ``examples/ablation.py`` measures them.

    Attributes:
        extractor: name of the tag extractor that splits captions into candidates.
        extractor_options: keyword arguments for it.
        template: what a tag is put into before it is encoded, with ``{}`` for the tag (unknown; the bare word).
        score: ``"pixel"`` is the paper's; ``"image"`` and ``"text"`` are the baselines that it beats.
        rule, threshold: how scores become a selection (unknown); see :func:`ttd_plugins.method.selection.select_tags`.
        distance, activation: how a map is compared with its target (unknown); see
            :func:`ttd_plugins.method.losses.map_distance`.
        tag_weight, distill_weight: weights of L_tag and L_distill (unknown).
        contrastive_weight: weight of the backbone's own contrastive loss, which keeps global alignment (ours).
        rejected_weight: weight, within L_tag, of the tags that were not selected, whose target is zero (unknown).
        teacher: where the targets come from: ``"self"`` (the paper's, gradients stopped), ``"frozen"`` (the backbone
            as ``unload()`` would give it back when the engine was made: without LoRA, before any TTD step), or
            ``"ema"`` (a moving average of it from then on, which moves while the model is in training mode).
        ema_decay: share of the average that survives a training step.
        calibration: the map from cosine to probability; ``None`` means the backbone's own.
        text_cache_size: how many embeddings of texts are kept from batch to batch where no step moves the tower that
            made them (a frozen text tower, the teacher ``"frozen"``); results are the same to rounding, so that a
            resumed run is no longer bitwise that of one that was not stopped.
        text_activation_checkpointing: use activation checkpointing in the text tower. ``None`` turns it on where texts
            cannot be trimmed to their length and the tower names its blocks
            (:meth:`~ttd_plugins.adapter.DenseAdapter.tower_blocks`).
    """

    extractor: str = "words"
    extractor_options: dict[str, Any] = field(default_factory=dict)
    template: str = "{}"
    score: selection.Score = "pixel"
    rule: selection.Rule = "minmax"
    threshold: float = 0.5
    distance: losses.Distance = "bce"
    activation: losses.Activation = "sigmoid"
    tag_weight: float = 1.0
    distill_weight: float = 10.0
    contrastive_weight: float = 1.0
    rejected_weight: float = 1.0
    teacher: Teacher = "self"
    ema_decay: float = 0.99
    calibration: Calibration | None = None
    text_cache_size: int = 0
    text_activation_checkpointing: bool | None = None

    def __post_init__(self) -> None:
        before, _, after = self.template.partition("{}")
        if "{}" not in self.template or set("{}") & set(before + after):
            raise InputError(
                f"the template {self.template!r} must hold {{}} once, where the tag goes, and no other brace"
            )
        for name, known in (("score", selection.Score), ("rule", selection.Rule), ("teacher", Teacher)):
            if getattr(self, name) not in get_args(known):
                raise InputError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(get_args(known))}")
        for name in ("tag_weight", "distill_weight", "contrastive_weight", "rejected_weight"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.text_cache_size < 0:
            raise InputError(f"text_cache_size must be 0 or more, not {self.text_cache_size}")
        if not 0 <= self.ema_decay <= 1:
            raise InputError(f"ema_decay must be from 0 to 1, not {self.ema_decay}")
        # Fails now rather than in the first step of a long training.
        losses.map_distance(torch.zeros(1, 2), torch.zeros(1, 2), distance=self.distance, activation=self.activation)
