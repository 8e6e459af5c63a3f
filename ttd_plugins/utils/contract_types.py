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


@dataclass(frozen=True)
class TunedFrom:
    """The run, LoRA or file that the weights of a backbone were loaded from; it identifies them in results.

    Attributes:
        kind: ``"run"``, ``"lora"``, ``"weights"``, ``"export"``, ``"comparison"`` or ``"demo"``.
        name: name of the folder or file, without the path, which means nothing elsewhere.
        sha256: first 16 hexadecimal digits of a SHA-256 of the weights that were read.
        step: step of the run's checkpoint; ``None`` for other kinds.
        base: name of the untuned backbone; ``None`` for an export that needs none.
    """

    kind: str
    name: str
    sha256: str
    step: int | None = None
    base: str | None = None

    def __str__(self) -> str:
        """Such as ``run mine, step 200 (1a2b3c4d)``."""
        step = "" if self.step is None else f", step {self.step}"
        return f"{'LoRA' if self.kind == 'lora' else self.kind} {self.name}{step} ({self.sha256[:8]})"

    def as_dict(self) -> dict[str, str | int]:
        """Return the attributes that are known, for JSON."""
        return {key: value for key, value in vars(self).items() if value is not None}
