"""Dense modes of SigLIP: which patches the pooling head mixes for a patch, and which the last block mixes before it.

The pooled embedding of SigLIP (arXiv 2303.15343) is the output of a pooling head for one learned probe: attention over
the patches, output projection, then an MLP with its norm and a residual connection. A patch enters the joint space
through the same head, with another row of attention weights than the probe's. For an image of one patch all rows are
equal, so there pooled equals dense in every mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.toolkit.dense_modes import DenseMode
from ttd_plugins.toolkit.last_block import BlockParts, last_block

HeadMode = Literal["value", "token_probe", "query_query"]
"""``value``: each patch attends to itself alone; ``token_probe``: each patch is the probe, softmax(q k), as in FG-CLIP
2 (arXiv 2510.10921); ``query_query``: softmax(q q), as in DeCLIP (2505.04410), but with the residual connection around
the head's MLP as trained, where DeCLIP's starts after the norm."""

LastBlock = Literal["plain", "value"]
"""``plain``: the last encoder block as trained; ``value``: each of its patches attends to itself alone, with residual
connection and FFN (MaskCLIP, arXiv 2112.01071)."""


@dataclass(frozen=True)
class SiglipMode:
    """How dense features are computed: two independent choices.

    Attributes:
        head: which values a patch mixes in the pooling head.
        last_block: which values a patch mixes in the last encoder block.
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
        """The mode of the head, followed by ``,last_block=value`` where the last block is not as trained."""
        return self.head if self.last_block == "plain" else f"{self.head},last_block={self.last_block}"


MODES: dict[str, SiglipMode] = {
    mode.name: mode
    for last_block in get_args(LastBlock)
    for mode in (SiglipMode(head, last_block) for head in get_args(HeadMode))
}
"""Every mode by its name."""


def siglip_mode(dense: str | SiglipMode, last_block: str | None = None) -> SiglipMode:
    """Return the mode with this name, or the mode itself, with its ``last_block`` replaced where one is given.

    Raises:
        InputError: one of the names is unknown.
    """
    if not isinstance(dense, SiglipMode):
        if dense not in MODES:
            raise InputError(choices_sentence("dense mode", str(dense), MODES))
        dense = MODES[dense]
    return dense if last_block is None else SiglipMode(dense.head, last_block)  # type: ignore[arg-type]


def value_block(parts: BlockParts, x: Tensor, pooled: bool) -> tuple[Tensor, Tensor]:
    """Patches of the last block as trained (none unless ``pooled``), and with each patch attending to itself alone."""
    return last_block(parts, x, DenseMode("value"), (1, x.shape[1]), prefix=0, averaged=pooled)


def attend(probes: Tensor, keys: Tensor, values: Tensor, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention over heads: three times ``[B, heads, P, W / heads]`` to ``[B, P, W]``."""
    return F.scaled_dot_product_attention(probes, keys, values, dropout_p=dropout).transpose(1, 2).flatten(2)
