"""Dense modes: how the last block of a vision transformer computes patch features, and the published presets.

A mode is three independent choices: which values a patch mixes (``attention``), whether the residual connection around
attention stays (``residual``), and whether the feed-forward network with its own residual connection stays (``ffn``).
The final LayerNorm and the projection after the block are the backbone's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.utils.deprecation import RenamedAttribute

AttentionKind = Literal["value", "plain", "qq", "kk", "qq+kk", "kk+window"]
"""``value``: each patch attends to itself alone; ``plain``: softmax(q k) as trained; ``qq``, ``kk``: softmax of query
(key) with query (key); ``qq+kk``: the sum of both softmaxes; ``kk+window``: kk with a Gaussian bonus for neighbours."""


@dataclass(frozen=True)
class DenseMode:
    """How the last block computes dense features.

    Attributes:
        attention: which values a patch of the last block mixes, and with which weights.
        residual: whether the block's input is added to the output of attention.
        ffn: whether the feed-forward network of the block follows.
        window_std: standard deviation, in patches, of the Gaussian window of ``"kk+window"``.
    """

    attention: AttentionKind = "value"
    residual: bool = True
    ffn: bool = True
    window_std: float = 5.0

    def __post_init__(self) -> None:
        if self.attention not in get_args(AttentionKind):
            raise InputError(choices_sentence("dense attention", str(self.attention), get_args(AttentionKind)))
        if not self.window_std > 0:
            raise InputError(f"window_std must be a positive number of patches, not {self.window_std}")

    @property
    def needs_explicit_qkv(self) -> bool:
        """Whether the mode needs queries, keys and values outside the attention module's own forward."""
        return self.attention not in ("value", "plain")

    by_hand = RenamedAttribute("needs_explicit_qkv")

    @property
    def is_block_unchanged(self) -> bool:
        """Whether patches are those of the block as trained."""
        return self.attention == "plain" and self.residual and self.ffn

    @property
    def name(self) -> str:
        """The name of the preset, or the choices written out, such as ``"qq,residual"``."""
        for name, mode in PRESETS.items():
            if mode == self:
                return name
        attention = f"{self.attention}({self.window_std:g})" if self.attention == "kk+window" else self.attention
        return ",".join([attention, *(["residual"] if self.residual else []), *(["ffn"] if self.ffn else [])])


PRESETS: dict[str, DenseMode] = {
    "maskclip": DenseMode("value", residual=True, ffn=True),
    "value_only": DenseMode("value", residual=False, ffn=False),
    "clearclip": DenseMode("qq", residual=False, ffn=False),
    "sclip": DenseMode("qq+kk", residual=True, ffn=True),
    "naclip": DenseMode("kk+window", residual=False, ffn=False),
    "plain": DenseMode("plain", residual=True, ffn=True),
}
"""Published modes: ``maskclip`` MaskCLIP (arXiv 2112.01071) and TCL (2212.00785), the one that TTD (2404.00384)
trains; ``clearclip`` ClearCLIP (2407.12442); ``sclip`` SCLIP (2312.01597); ``naclip`` NACLIP (2404.08181), window of
std 5 patches; ``plain`` the tokens as trained. ``value_only`` is the value path without residual connection and FFN."""

QUERIES_AND_KEYS: dict[str, tuple[str, ...]] = {
    "value": (),
    "plain": ("q", "k"),
    "qq": ("q",),
    "kk": ("k",),
    "qq+kk": ("q", "k"),
    "kk+window": ("k",),
}
"""Which of queries (``q``) and keys (``k``) of the last block the patch features depend on, by kind of attention."""


@dataclass(frozen=True)
class HeadMode:
    """The only dense mode of convolutional towers: the head of the tower at each position of the last feature map."""

    name: str = "head"


def dense_mode(dense: str | DenseMode) -> DenseMode:
    """Return the mode with this name, or the mode itself.

    Raises:
        InputError: no preset has that name.
    """
    if isinstance(dense, DenseMode):
        return dense
    if dense not in PRESETS:
        raise InputError(choices_sentence("dense mode", str(dense), PRESETS))
    return PRESETS[dense]


def diagonal_mask(tokens: int, like: Tensor, prefix: int = 1) -> Tensor:
    """Additive mask ``[tokens, tokens]`` under which a patch attends to itself alone and a prefix token to all tokens.

    It is 0 on the diagonal and in the first ``prefix`` rows (class and register tokens), and -inf elsewhere.
    """
    mask = torch.full((tokens, tokens), float("-inf"), dtype=like.dtype, device=like.device)
    mask.fill_diagonal_(0)
    mask[:prefix] = 0
    return mask


def gaussian_window(grid: tuple[int, int], std: float, like: Tensor) -> Tensor:
    """NACLIP's additive bonus for near patches, ``exp(-distance**2 / (2 std**2))``, ``[P, 1 + P]``.

    Distances are in patches. Column 0 belongs to the class token, which has no position in the grid; it is 0.
    """
    rows, columns = (torch.arange(side, device=like.device, dtype=torch.float32) for side in grid)
    row_part = torch.exp(-((rows[:, None] - rows[None]) ** 2) / (2 * std**2))
    column_part = torch.exp(-((columns[:, None] - columns[None]) ** 2) / (2 * std**2))
    return F.pad(torch.kron(row_part, column_part), (1, 0)).to(like.dtype)
