"""The notebooks run offline as they are stored, their outputs belong to their sources, and they stay small."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from PIL import Image

from ttd_plugins import cli

pytest.importorskip("nbclient", reason="the notebooks need nbclient")
from helpers_examples import ROOT, example

make_notebooks = example("make_notebooks")
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
NAMES = [file.stem for file in NOTEBOOKS]


def stored(file: Path) -> Any:
    return make_notebooks.nbformat.read(file, as_version=4)


def images(notebook: Any) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def test_there_are_three() -> None:
    assert NAMES == ["compare-backbones", "ttd-on-your-clip", "write-an-adapter"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=NAMES)
def test_outputs_belong_to_the_stored_sources(file: Path) -> None:
    notebook = stored(file)
    assert notebook.metadata["source_digest"] == make_notebooks.source_digest(notebook), (
        f"{file.name} was edited after its outputs; run: python examples/make_notebooks.py {file.stem}"
    )
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    text = file.read_text(encoding="utf-8")
    assert "Traceback" not in text and "/work" not in text and "/home/" not in text and "/tmp/" not in text


@pytest.mark.parametrize("file", NOTEBOOKS, ids=NAMES)
def test_a_notebook_is_small(file: Path) -> None:
    assert file.stat().st_size < make_notebooks.MAX_BYTES
    found = images(stored(file))
    assert found
    for encoded in found:
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            assert image.width <= make_notebooks.MAX_WIDTH


@pytest.mark.parametrize("file", NOTEBOOKS, ids=NAMES)
def test_a_notebook_says_how_to_install_and_to_switch_to_pretrained_weights(file: Path) -> None:
    notebook = stored(file)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert notebook.cells[0].source.startswith("# ") and "pip install 'ttd-plugins[" in prose
    # The line that replaces the embedded model where there is a network.
    assert re.search(r"^# (BACKBONES?) = .*# with a network", code, re.MULTILINE)
    assert re.search(r"^BACKBONES? = ", code, re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (file.parent / target).is_file(), f"{file.name} links to {target}, which does not exist"
    for line in re.findall(r"`ttd ([^`]+)`", prose):
        words = shlex.split(line)
        command = typer.main.get_command(cli.app).commands[words[0]]
        command.make_context(words[0], words[1:])


@pytest.mark.parametrize("file", NOTEBOOKS, ids=NAMES)
def test_a_notebook_runs(file: Path) -> None:
    for library in (
        "open_clip",
        "peft",
        "matplotlib",
        "ipykernel",
        *(["transformers"] if "compare" in file.stem else []),
    ):
        pytest.importorskip(library)
    before = file.read_bytes()
    executed = make_notebooks.clean(make_notebooks.execute(file))
    assert file.read_bytes() == before
    old = stored(file)
    for now, then in zip(executed.cells, old.cells, strict=True):
        assert now.source == then.source
        # The same kinds of output, and the same words; numbers differ with the machine.
        assert shape(now) == shape(then)


def shape(cell: Any) -> list[tuple[str, list[str]]]:
    found = []
    for output in cell.get("outputs", ()):
        kinds = sorted(output.get("data", {}))
        text = output.get("text", "") + "".join(output.get("data", {}).get(kind, "") for kind in ("text/markdown",))
        found.append((output.output_type, [*kinds, re.sub(r"[-+−]?\d[\d.,e+-]*", "N", text)]))
    return found


def test_an_edit_without_a_new_execution_is_found(tmp_path: Path) -> None:
    content = json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))
    content["cells"][0]["source"] = ["# Another title"]
    file = tmp_path / "edited.ipynb"
    file.write_text(json.dumps(content))
    notebook = stored(file)
    assert notebook.metadata["source_digest"] != make_notebooks.source_digest(notebook)
