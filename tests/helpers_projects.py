"""Projects with entry points, made visible to a fresh process without pip and without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(project: Path, site: Path) -> dict[str, str]:
    """The environment of a process that sees ``project`` as installed: its folder, and metadata written to ``site``.

    This is what an editable installation amounts to; CI makes a real one of ``examples/ttd-perception-encoder``.
    """
    settings = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    metadata = site / f"{settings['name'].replace('-', '_')}-{settings['version']}.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {settings['name']}\nVersion: {settings['version']}\n"
    )
    groups = settings.get("entry-points", {})
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    # The tests may have been given their own packages by this variable.
    paths = [str(project), str(site), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "COLUMNS": "100"}


def run(*arguments: str, environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with ``arguments`` in ``folder``."""
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )


def ttd(*arguments: str, environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command ``ttd``."""
    return run("-c", "from ttd_plugins.cli import main; main()", *arguments, environment=environment, folder=folder)
