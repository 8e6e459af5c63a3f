"""The backbones of a comparison by name: as they come, or as an earlier fine-tuning left them."""

from __future__ import annotations

from pathlib import Path

import torch

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.errors import BackboneNameError, InputError, choices_sentence
from ttd_plugins.plugins import get_family, load, parse_name

RANDOM = "random"


def check_backbone(name: str) -> None:
    """Look a name up without loading anything.

    Raises:
        InputError: it names a folder that holds neither a run nor LoRA.
        TTDError: the family, the model or the weights are unknown.
    """
    base, folder = _parts(name)
    if folder is not None and not ((folder / "config.yaml").is_file() or (folder / "adapter_config.json").is_file()):
        raise InputError(
            f"{str(folder)!r} holds neither a run of `ttd train` (config.yaml) nor LoRA (adapter_config.json)"
        )
    if folder is not None and base is None and not (folder / "config.yaml").is_file():
        raise InputError(f"{name!r} holds LoRA alone; say of which backbone, as in FAMILY:MODEL+{name}")
    if base is not None:
        parsed = parse_name(base)
        family = get_family(parsed.family)
        known = family.weights(parsed.model)
        # Families take the path of a checkpoint file in place of a name as well.
        if (
            parsed.weights not in (*known, RANDOM, family.default_weights(parsed.model))
            and not Path(parsed.weights).exists()
        ):
            raise BackboneNameError(choices_sentence(f"weights of {parsed.model}", parsed.weights, [*known, RANDOM]))


def open_backbone(name: str, *, seed: int = 0, device: str | None = None) -> DenseAdapter:
    """A backbone without LoRA in evaluation mode, what it was tuned by before folded into its weights.

    Args:
        name: ``family:model@weights``; the folder of a run of ``ttd train``; or a name, ``+``, and the folder of a run
            of it or of LoRA in peft's format.
        seed: decides the weights of a name that ends in ``@random``.
        device: where to compute.

    Raises:
        InputError, TTDError: as :func:`check_backbone`, or it cannot be loaded.
    """
    check_backbone(name)
    base, folder = _parts(name)
    torch.manual_seed(seed)
    backbone = None if base is None else load(base, device=device)
    if folder is not None and (folder / "config.yaml").is_file():
        from ttd_plugins.training.checkpoints import restore_backbone

        backbone = restore_backbone(folder, backbone=backbone)
        backbone.merge()
    elif folder is not None:
        from ttd_plugins.lora import load_lora

        assert backbone is not None
        load_lora(backbone, folder).merge()
    assert backbone is not None
    if device is not None:
        backbone.to(device)
    return backbone.eval()


def _parts(name: str) -> tuple[str | None, Path | None]:
    """The name of the untuned backbone and the folder of what tuned it; one of them may be missing."""
    # A path with a colon is a path first.
    if Path(name).is_dir():
        return None, Path(name)
    base, plus, folder = name.rpartition("+")
    if plus and ":" in base and not Path(name.rpartition("@")[2]).exists():
        if not Path(folder).is_dir():
            raise InputError(f"there is no folder {folder!r}, where what tuned {base!r} was looked for")
        return base, Path(folder)
    return name, None
