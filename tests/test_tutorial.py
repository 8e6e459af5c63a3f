"""docs/writing-an-adapter.md: its blocks, in their order, in an empty folder, do what the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers_projects import ROOT, environment, run, ttd

PAGE = ROOT / "docs" / "writing-an-adapter.md"
BLOCK = re.compile(r"(<!-- fails -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


def expect_output(expected: list[str], seen: str) -> None:
    """Lines in this order; ``...`` stands for anything, in a line and for lines."""
    pattern = "".join(
        r"(?:.*\n)*?" if line == "..." else f"{re.escape(line).replace(re.escape('...'), '.*')}\n" for line in expected
    )
    assert re.fullmatch(pattern, seen), f"expected:\n{chr(10).join(expected)}\nseen:\n{seen}"


def test_every_block_in_order(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the page trains with LoRA")
    folder, seen = tmp_path / "mini", None
    folder.mkdir()
    done = []
    for fails, kind, content in BLOCK.findall(PAGE.read_text()):
        lines = content.splitlines()
        if kind in ("python", "toml"):
            name = re.fullmatch(r"# (\w+\.(?:py|toml))", lines[0])
            assert name is not None, f"a block does not name its file: {lines[0]}"
            (folder / name[1]).write_text(content)
        elif kind == "diff":
            file = folder / lines[0].removeprefix("--- ")
            old, new = ("".join(f"{line[1:]}\n" for line in lines[1:] if line[0] == sign) for sign in "-+")
            text = file.read_text()
            assert text.count(old) == 1
            file.write_text(text.replace(old, new))
        else:
            assert kind == "console", kind
            for command in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
                line, *expected = command.splitlines()
                done.append(line)
                if line == "pip install -e .":
                    seen = environment(folder, tmp_path / "site")
                    # Errors are quoted in whole.
                    seen["COLUMNS"] = "200"
                    continue
                assert seen is not None
                program, *arguments = shlex.split(line)
                if program == "ttd":
                    result = ttd(*arguments, environment=seen, folder=tmp_path)
                else:
                    assert program == "python"
                    result = run(*arguments, environment=seen, folder=folder)
                assert (result.returncode == 1) if fails else (result.returncode == 0), result.stdout + result.stderr
                expect_output(expected, result.stdout)
    assert len(done) == 6, done
