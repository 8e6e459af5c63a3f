"""Shell completion: names of commands, options, backbones, families, plugins and choices, without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ttd_plugins.plugins import list_backbones, list_plugins
from ttd_plugins.tag_extractors import word_tags

RUN = """
import sys
from ttd_plugins.cli import main
try:
    main()
finally:
    sys.stderr.write(" ".join(sys.modules))
"""


def completed(line: str, *, words: str | None = None) -> list[str]:
    """What bash would be given for the last word of a line, whose words it has split at colons."""
    split = (words or line.replace(":", " : ")).split(" ")
    split = [word for word in split[:-1] if word] + split[-1:]
    environment = os.environ | {
        "_TTD_COMPLETE": "complete_bash",
        "COMP_WORDS": "\n".join(split),
        "COMP_CWORD": str(len(split) - 1),
    }
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = done.stderr.split()
    assert "ttd_plugins.cli" in loaded and not {"torch", "numpy", "open_clip", "transformers"} & set(loaded)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ttd tr", ["train"]),
        ("ttd eval s", ["segment"]),
        ("ttd train --text-c", ["--text-cache-size"]),
        ("ttd train --teacher ", ["ema", "frozen", "self"]),
        ("ttd tags photo.jpg --backbone open_clip:ph", ["photo"]),
        ("ttd compare --backbones open_clip:tiny,siglip:ti", ["tiny"]),
        ("ttd check-adapter open_clip:t", ["tiny"]),
        ("ttd backbones openai", ["openai_clip"]),
        ("ttd --deny-plugin stan", ["stanza"]),
        ("ttd tags photo.jpg dog --tags w", ["words"]),
        ("ttd eval segment set --data coco_o", ["coco_object"]),
        ("ttd export run --form l", ["lora"]),
    ],
)
def test_a_word_is_completed(line: str, expected: list[str]) -> None:
    assert completed(line) == expected


def test_embedded_backbones_and_families_are_offered() -> None:
    offered = completed("ttd heatmap photo.jpg dog --backbone ")
    for family in list_backbones():
        assert f"{family.family}:" in offered
    embedded = {name for name in offered if not name.endswith(":")}
    listed = {f"{family.family}:{one.model}" for family in list_backbones() for one in family.backbones}
    assert {"open_clip:photo", "open_clip:tiny", "siglip:tiny"} <= embedded <= listed


def test_installed_plugins_are_offered() -> None:
    # The words extractor is part of the core and has no entry point.
    installed = {plugin.name for plugin in list_plugins() if plugin.distribution} - {word_tags.__name__}
    assert set(completed("ttd --deny-plugin ")) == installed


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_the_script_works_in_bash(tmp_path: Path) -> None:
    """The script that --show-completion prints, with a program `ttd` on the path."""
    program = tmp_path / "ttd"
    program.write_text(f"#!{sys.executable}\nfrom ttd_plugins.cli import main\nmain()\n")
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    source = (
        "source <(_TTD_COMPLETE=source_bash ttd); COMP_WORDS=(ttd tags a.jpg --backbone open_clip : p); COMP_CWORD=6"
    )
    done = subprocess.run(
        ["bash", "-c", f'{source}; _ttd_completion ttd; echo "${{COMPREPLY[@]}}"; complete -p ttd'],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["photo", "complete -o default -F _ttd_completion ttd"], done.stderr
