"""What an adapter returns: features, tokens, and how an exported model is loaded. Import them from the contract."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass
class ImageFeatures:
    """Features of a batch of images in the joint space, not L2-normalised, in the dtype of the backbone.

    Attributes:
        patches: ``[B, H, W, D]``, row 0 at the top of the image, column 0 at its left.
        pooled: ``[B, D]``, the library's own image embedding; ``None`` if it was not requested.
    """

    patches: Tensor
    pooled: Tensor | None = None


@dataclass
class Tokens:
    """Tokenised texts.

    Attributes:
        ids: int64 ``[N, L]``, L being the context length, padded as in the backbone's training.
        lengths: int64 ``[N]``, always on the CPU: number of positions up to and including the end token.
        truncated: for each text, whether it was longer than the context and lost its last words.
    """

    ids: Tensor
    lengths: Tensor
    truncated: list[bool]

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.lengths.shape != self.ids.shape[:1] or len(self.truncated) != len(self.ids):
            raise ValueError(
                f"Tokens needs ids [N, L], lengths [N] and N truncation flags; got {tuple(self.ids.shape)}, "
                f"{tuple(self.lengths.shape)} and {len(self.truncated)}"
            )


@dataclass(frozen=True)
class ExportedModel:
    """How the backbone's own library loads what :meth:`~ttd_plugins.adapter.DenseAdapter.export` wrote.

    Texts contain ``PATH`` instead of the folder, which may be moved; :meth:`at` inserts it.

    Attributes:
        library: name of the package that loads it.
        load: one line of code that loads the model.
        more: further lines, for example for its tokenizer and its preprocessing.
        name: the name for :func:`ttd_plugins.load`, or ``None`` if there is none.
        notes: sentences on what was not saved or needs care.
    """

    library: str
    load: str
    more: tuple[str, ...] = ()
    name: str | None = None
    notes: tuple[str, ...] = ()

    def at(self, folder: str | Path) -> tuple[str, ...]:
        """Return the lines of code with ``folder`` instead of ``PATH``, :attr:`load` first."""
        return tuple(line.replace("PATH", str(folder)) for line in (self.load, *self.more))
