"""Execute the notebooks in ``examples/notebooks`` and store them with their outputs.

    python examples/make_notebooks.py [NAME ...]

A notebook is its own source: edit it, then run this program. Images of the outputs are stored at most 900 pixels wide
with a palette, so that a notebook stays small. Its metadata has a digest of the sources that the outputs belong to.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent / "notebooks"
MAX_WIDTH, COLOURS = 900, 128
MAX_BYTES = 500_000
SECONDS = 600


def source_digest(notebook: Any) -> str:
    """SHA-256 of the sources of all cells in order, with their kinds."""
    joined = "\0".join(f"{cell.cell_type}\0{cell.source}" for cell in notebook.cells)
    return hashlib.sha256(joined.encode()).hexdigest()


def execute(file: Path, seconds: int = SECONDS) -> Any:
    """Run a notebook in a fresh kernel and return it with its outputs; the file is not changed.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises an exception.
    """
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(
        notebook, timeout=seconds, kernel_name="python3", resources={"metadata": {"path": file.parent}}
    ).execute()
    return notebook


def clean(notebook: Any) -> Any:
    """Return the notebook with small images, without times and other values that differ between two executions."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        # Warnings and progress belong to the machine.
        cell.outputs = [one for one in cell.outputs if not (one.output_type == "stream" and one.name == "stderr")]
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = smaller_png(data["image/png"])
            if "text/plain" in data:
                data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", data["text/plain"])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "source_digest": source_digest(notebook),
    }
    return notebook


def smaller_png(encoded: str) -> str:
    """Return a PNG in base64, scaled down to the width limit and with a palette."""
    with Image.open(io.BytesIO(base64.b64decode(encoded)), formats=("PNG",)) as image:
        image = image.convert("RGB")
        if image.width > MAX_WIDTH:
            image = image.resize((MAX_WIDTH, round(image.height * MAX_WIDTH / image.width)), Image.Resampling.LANCZOS)
        stored = io.BytesIO()
        image.quantize(COLOURS, dither=Image.Dither.NONE).save(stored, "PNG", optimize=True)
    return base64.b64encode(stored.getvalue()).decode()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="names of notebooks, by default all")
    args = parser.parse_args(arguments)
    for file in sorted(FOLDER.glob("*.ipynb")):
        if args.names and file.stem not in args.names:
            continue
        started = time.monotonic()
        nbformat.write(clean(execute(file)), file)
        print(f"{file.name}: {time.monotonic() - started:.0f} s, {file.stat().st_size / 1e3:.0f} kB")
        if file.stat().st_size > MAX_BYTES:
            raise SystemExit(f"{file.name} is above {MAX_BYTES / 1e3:.0f} kB; use fewer or smaller drawings")


if __name__ == "__main__":
    main()
