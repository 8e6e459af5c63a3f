"""Trainable parameters of a backbone: LoRA, all weights or none of each tower, and their weight decay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ttd_plugins.adapter import TOWERS, DenseAdapter, named_tower_parameters
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.lora import load_lora
from ttd_plugins.training.config import OptimizerConfig, TowersConfig, TrainConfig
from ttd_plugins.utils.rng import seeded_torch
from ttd_plugins.utils.running_state import keep_frozen_norms_in_eval

INITIAL_LORA = "initial_lora"
"""Folder in a run with a copy of the LoRA that it started from."""


def build_backbone(
    config: TrainConfig, backbone: DenseAdapter | None = None, *, run: Path | None = None
) -> DenseAdapter:
    """Return the backbone of a run before its first step; the seed decides fresh weights.

    Args:
        config: the configuration of the run.
        backbone: replaces the one that the configuration names; changed in place.
        run: folder of the run, whose copy of the LoRA of ``towers.lora_from`` is used if it exists.

    Raises:
        InputError: there is neither an object nor a name.
        TTDError: the backbone cannot be loaded, or cannot be tuned as configured.
    """
    backbone = load_untuned(config) if backbone is None else backbone
    with seeded_torch(config.run.seed):
        start = config.towers.lora_from
        copied = None if run is None or start is None else run / INITIAL_LORA
        prepare_towers(backbone, config.towers, lora_from=copied if copied is not None and copied.is_dir() else start)
    return backbone


def load_untuned(config: TrainConfig) -> DenseAdapter:
    """Load the backbone that a configuration names, before anything is trained; the seed decides fresh weights.

    Raises:
        InputError: no backbone is named.
        TTDError: the backbone cannot be loaded.
    """
    if config.backbone.name is None:
        raise InputError(
            "no backbone is named; give backbone.name (--backbone), one of those that `ttd backbones` lists"
        )
    from ttd_plugins.plugins.loading import load

    with seeded_torch(config.run.seed):
        return load(config.backbone.name, **config.backbone.options)


def prepare_towers(backbone: DenseAdapter, towers: TowersConfig, *, lora_from: Path | str | None = None) -> None:
    """Add LoRA and set ``requires_grad`` of every parameter, in place.

    Args:
        backbone: the backbone, without LoRA.
        towers: what is trained of each tower.
        lora_from: folder of a LoRA to start from.

    Raises:
        TTDError: the backbone has LoRA already, a tower supports none, half-precision weights would be trained, or the
            LoRA in ``lora_from`` cannot be loaded or adapts a tower that is not tuned by LoRA.
    """
    with_lora = [tower for tower in TOWERS if getattr(towers, tower) == "lora"]
    if backbone.has_lora:
        raise TTDError(f"{backbone.description.name} has LoRA already; merge() or unload() it first")
    if lora_from is not None:
        load_lora(backbone, lora_from)
        assert backbone._lora is not None
        for tower in backbone._lora.towers:
            if tower not in with_lora:
                raise InputError(
                    f"the LoRA in {lora_from} adapts the {tower} tower, and towers.{tower} is "
                    f"{getattr(towers, tower)}; set towers.{tower}: lora"
                )
    elif with_lora:
        backbone.add_lora(
            towers.rank, alpha=towers.alpha, dropout=towers.dropout, towers=with_lora, modules=towers.modules
        )
    else:
        backbone.model.requires_grad_(False)
    in_towers: set[int] = set()
    trained: list[tuple[str, nn.Parameter]] = []
    for tower in TOWERS:
        named = named_tower_parameters(backbone, tower)
        in_towers |= {id(parameter) for _, parameter in named}
        if getattr(towers, tower) == "full":
            trained += [pair for pair in named if pair[1].is_floating_point()]
    if towers.logit_scale:
        lora = {id(parameter) for parameter in backbone.lora_parameters()}
        others = in_towers | lora
        trained += [pair for pair in backbone.model.named_parameters() if id(pair[1]) not in others]
    for name, parameter in trained:
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise TTDError(
                f"{name} has dtype {str(parameter.dtype).removeprefix('torch.')}, which rounds small steps away; load "
                "the backbone in float32 and set run.mixed_precision, or tune by LoRA"
            )
        parameter.requires_grad_(True)


def train_mode(backbone: DenseAdapter) -> None:
    """Set training mode, but keep frozen normalisation layers in evaluation mode, so that their statistics stay."""
    backbone.train()
    keep_frozen_norms_in_eval(backbone.model)


def parameter_groups(model: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Return two parameter groups for AdamW: matrices with weight decay; vectors, norms and biases without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    rest = [parameter for parameter in trained if parameter.ndim < 2]
    return [
        {"params": matrices, "weight_decay": optimizer.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
