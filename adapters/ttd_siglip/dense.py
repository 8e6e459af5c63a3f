"""Dense features from the pooling head: which patches a probe mixes, and what the last block mixes before it.

The pooled embedding of SigLIP (arXiv 2303.15343) is the head's answer to one learnt probe: attention over the patches,
output projection, then an MLP with its norm and a skip around it. A patch is put into the joint space by giving it the
same treatment with another attention row in the place of the probe's. Of a single patch every row is the same, so an
image of one patch has pooled equal to dense, in every mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.toolkit.dense_modes import DenseMode
from ttd_plugins.toolkit.last_block import BlockParts, last_block

HeadMode = Literal["value", "token_probe", "query_query"]
"""``value``: each patch answers with its own value; ``token_probe``: each patch is the probe, softmax(q k), as FG-CLIP
2 (arXiv 2510.10921) has it; ``query_query``: softmax(q q), as in DeCLIP (2505.04410), but with the skip around the
head's MLP as it was trained, where DeCLIP takes it after the norm."""

LastBlock = Literal["plain", "value"]
"""``plain``: the last encoder block as trained; ``value``: each patch of it attends to itself alone, skip and FFN kept
(MaskCLIP, arXiv 2112.01071)."""


@dataclass(frozen=True)
class SiglipMode:
    """How dense features are made: two independent choices.

    Attributes:
        head: what a patch mixes in the pooling head.
        last_block: what a patch mixes in the last encoder block.
    """

    head: HeadMode = "value"
    last_block: LastBlock = "plain"

    def __post_init__(self) -> None:
        if self.head not in get_args(HeadMode):
            raise InputError(choices_sentence("dense mode", str(self.head), MODES))
        if self.last_block not in get_args(LastBlock):
            raise InputError(choices_sentence("last_block", str(self.last_block), get_args(LastBlock)))

    @property
    def name(self) -> str:
        """The head's mode, followed by ``,last_block=value`` where the last block is not as trained."""
        return self.head if self.last_block == "plain" else f"{self.head},last_block={self.last_block}"


MODES: dict[str, SiglipMode] = {
    mode.name: mode
    for last_block in get_args(LastBlock)
    for mode in (SiglipMode(head, last_block) for head in get_args(HeadMode))
}
"""Every mode by its name."""


def siglip_mode(dense: str | SiglipMode, last_block: str | None = None) -> SiglipMode:
    """Return the mode that a name or a mode means, with ``last_block`` in the place of its own where that is given.

    Raises:
        InputError: one of the names is unknown.
    """
    if not isinstance(dense, SiglipMode):
        if dense not in MODES:
            raise InputError(choices_sentence("dense mode", str(dense), MODES))
        dense = MODES[dense]
    return dense if last_block is None else SiglipMode(dense.head, last_block)  # type: ignore[arg-type]


def self_mask(tokens: int, like: Tensor) -> Tensor:
    """Additive mask ``[tokens, tokens]`` under which each patch sees itself alone: 0 on the diagonal, else -inf."""
    mask = torch.full((tokens, tokens), float("-inf"), dtype=like.dtype, device=like.device)
    return mask.fill_diagonal_(0)


def value_block(parts: BlockParts, x: Tensor, pooled: bool) -> tuple[Tensor, Tensor]:
    """Patches of the last block as trained (none unless ``pooled``), and with each attending to itself alone."""
    return last_block(parts, x, DenseMode("value"), (1, x.shape[1]), prefix=0, averaged=pooled)


def attend(probes: Tensor, keys: Tensor, values: Tensor, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention over heads: three times ``[B, heads, P, W / heads]`` to ``[B, P, W]``."""
    return F.scaled_dot_product_attention(probes, keys, values, dropout_p=dropout).transpose(1, 2).flatten(2)


def mode_names(heads: Iterable[str], last_blocks: Iterable[str]) -> tuple[str, ...]:
    """Names of the modes with one of ``heads`` and one of ``last_blocks``."""
    heads, last_blocks = set(heads), set(last_blocks)
    return tuple(name for name, mode in MODES.items() if mode.head in heads and mode.last_block in last_blocks)
