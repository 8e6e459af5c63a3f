"""Write README's table of families and features, from the adapters' declarations and behaviour.

    python examples/support_matrix.py          # writes the table between the marks of README.md
    python examples/support_matrix.py --print  # prints it

Each column is an embedded model of a family, so that nothing is downloaded. A test compares README with this table.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ttd_plugins import load, wrap
from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.errors import UnsupportedModelError

README = Path(__file__).resolve().parents[1] / "README.md"
MARKS = re.compile(r"(<!-- support-matrix -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = {
    "open_clip:tiny": "`open_clip` ViT",
    "open_clip:photo": "`open_clip` conv",
    "openai_clip:tiny": "`openai_clip`",
    "siglip:tiny": "`siglip`",
    "eva_clip:tiny": "`eva_clip`",
}
"""Embedded models and the headings of their columns."""

NOTE = "see ¹"
"""Refers to the sentence below the table."""


def mark(supported: bool) -> str:
    """The cell of a feature."""
    return "✓" if supported else "–"


def supports(action: Callable[[], object]) -> bool:
    """Whether the adapter does something instead of refusing it."""
    try:
        action()
    except UnsupportedModelError:
        return False
    return True


def wraps_object(adapter: DenseAdapter) -> bool:
    """Whether the model as an object, without its name, is recognised as a model of the same family."""
    return wrap(adapter.model).description.family == adapter.description.family


def takes_other_sizes(adapter: DenseAdapter) -> bool:
    """Whether an image that is neither of the trained size nor square has one feature per patch."""
    height, width = (3 * adapter.description.patch_size[0], 5 * adapter.description.patch_size[1])
    with torch.inference_mode():
        return adapter.encode_image(torch.zeros(1, 3, height, width)).patches.shape[1:3] == (3, 5)


def export_library(adapter: DenseAdapter) -> str:
    """The library that loads an export; a note where the family exports models, but not its embedded one."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return adapter.export(Path(folder)).library
        except UnsupportedModelError:
            return "–" if type(adapter).export is DenseAdapter.export else NOTE


def modes(adapter: DenseAdapter) -> str:
    """The dense modes that the adapter declares, without their variants, which are written after a comma."""
    return ", ".join(f"`{name}`" for name in adapter.description.dense_modes if "," not in name)


ROWS: dict[str, Callable[[DenseAdapter], str]] = {
    "dense modes": modes,
    "objects of your own, `wrap(model)`": lambda adapter: mark(wraps_object(adapter)),
    "any multiple of the patch as input, not square": lambda adapter: mark(takes_other_sizes(adapter)),
    "positions at other sizes": lambda adapter: ", ".join(adapter.resamplings),
    "LoRA in both towers": lambda adapter: mark(all(map(adapter.lora_targets, ("image", "text")))),
    "activation checkpointing": lambda adapter: mark(supports(adapter.set_grad_checkpointing)),
    "compiled image blocks": lambda adapter: mark(bool(adapter.tower_blocks("image"))),
    "texts trimmed to their length": lambda adapter: mark(not adapter.description.text_needs_full_context),
    "contrastive loss": lambda adapter: adapter.description.logits,
    "export loads in": export_library,
}
"""Features and what fills their cells."""


def table() -> str:
    """The table in Markdown."""
    adapters = [load(name) for name in COLUMNS]
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines.append("| ships a model, no download | " + " | ".join(f"`{name}`" for name in COLUMNS) + " |")
    lines += [f"| {feature} | " + " | ".join(map(cell, adapters)) + " |" for feature, cell in ROWS.items()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print the table and write nothing")
    options = parser.parse_args(arguments)
    content = table()
    if options.print:
        print(content, end="")
        return
    README.write_text(MARKS.sub(rf"\g<1>{content}\g<2>", README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {README}")


if __name__ == "__main__":
    main()
