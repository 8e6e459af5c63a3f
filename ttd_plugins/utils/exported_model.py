"""How the backbone's own library loads an exported model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
