"""The backbones of a comparison by name: as they come, or as an earlier fine-tuning left them."""

from __future__ import annotations

from pathlib import Path

import torch

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.errors import BackboneNameError, InputError, choices_sentence
from ttd_plugins.plugins import get_family, load, parse_name
from ttd_plugins.training.tuned import load_tuned, tuned_kind, untuned_name

RANDOM = "random"


def check_backbone(name: str) -> None:
    """Look a name up without loading anything.

    Raises:
        InputError: what tuned it is not there, not understood, or of another backbone.
        TTDError: the family, the model or the weights are unknown.
    """
    base, source = _parts(name)
    if source is not None:
        base = untuned_name(source, base)
    assert base is not None
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
        name: ``family:model@weights``; what an earlier fine-tuning left, in any form of
            :func:`ttd_plugins.training.tuned.tuned_kind` that says its backbone itself; or the name, ``+``, and that.
        seed: decides the weights of a name that ends in ``@random``.
        device: where to compute.

    Raises:
        InputError, TTDError: as :func:`check_backbone`, or it cannot be loaded.
    """
    check_backbone(name)
    base, source = _parts(name)
    torch.manual_seed(seed)
    if source is not None:
        backbone = load_tuned(base, source, device=device)
        backbone.merge()
    else:
        assert base is not None
        backbone = load(base, device=device)
    return backbone.eval()


def _parts(name: str) -> tuple[str | None, str | None]:
    """The name of the untuned backbone and the path of what tuned it; one of them may be missing."""
    # A path with a colon is a path first.
    if Path(name).exists():
        return None, name
    if Path(name.rpartition("@")[2]).exists():
        return name, None
    splits = [(name[:place], name[place + 1 :]) for place, letter in enumerate(name) if letter == "+"]
    splits = [(base, source) for base, source in splits if ":" in base and source]
    for base, source in splits:
        if Path(source).exists():
            tuned_kind(source)
            return base, source
    if splits:
        base, source = splits[0]
        raise InputError(f"there is no {source!r}, where what tuned {base!r} was looked for")
    return name, None
