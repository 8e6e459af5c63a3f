"""Extras: a command works with the extras that its error names, and an extra drags in nothing that it does not need."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from layers import ALL_MODULES, ROOT, imports
from packaging.requirements import Requirement

from ttd_plugins.embedded import PHOTOGRAPHS_FOLDER

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PHOTOGRAPH = str(PHOTOGRAPHS_FOLDER / "images" / "000000196393.jpg")
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "PyYAML", "open_clip": "open_clip_torch", "resvg_py": "resvg-py"}
"""Distribution of a module with another name."""
TRANSITIVE = {
    "huggingface_hub": "a dependency of open_clip_torch and transformers; only a push to the hub names it",
    "pytest": "the conformance kit in a test suite, which has it",
    "lightning": "only users of Lightning call lightning_callback(), and have it",
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(*extras: str) -> list[Requirement]:
    """What pip is asked for, with the extras of this project resolved."""
    found = [Requirement(one) for one in PROJECT["dependencies"]]
    for extra in extras:
        for one in map(Requirement, EXTRAS[extra]):
            found += requirements(*one.extras) if canonical(one.name) == "ttd-plugins" else [one]
    return found


# What is declared ----------------------------------------------------------------------------------------------------


def test_every_import_is_declared() -> None:
    declared = {canonical(one.name) for one in requirements(*EXTRAS)}
    for module, file in ALL_MODULES.items():
        for name in {name.partition(".")[0] for name in imports(file)}:
            if name in sys.stdlib_module_names or name.startswith("ttd_") or name in TRANSITIVE or name == "__future__":
                continue
            assert canonical(DISTRIBUTIONS.get(name, name)) in declared, (
                f"{module} imports {name}, which is no dependency"
            )


def test_the_extra_all_has_every_extra_of_users() -> None:
    assert {canonical(one.name) for one in requirements("all")} == {
        canonical(one.name) for one in requirements(*(set(EXTRAS) - {"all", "test", "docs"}))
    }


@pytest.mark.parametrize(
    ("extra", "without"),
    [
        ("train", {"datasets", "pyarrow", "webdataset", "torchmetrics", "gradio", "open-clip-torch", "transformers"}),
        ("demo", {"datasets", "pyarrow", "gradio", "transformers", "stanza", "accelerate", "tensorboard"}),
        ("open_clip", {"transformers", "peft", "matplotlib", "pyarrow"}),
        ("openai_clip", {"open-clip-torch", "timm", "peft"}),
        ("data", {"peft", "matplotlib", "open-clip-torch"}),
    ],
)
def test_an_extra_asks_for_nothing_that_it_does_not_need(extra: str, without: set[str]) -> None:
    assert not without & {canonical(one.name) for one in requirements(extra)}


def test_an_error_names_an_extra_that_exists() -> None:
    named = {}
    for file in (*ALL_MODULES.values(), *ROOT.glob("docs/*.md"), ROOT / "README.md", *ROOT.glob("examples/**/*.md")):
        for extras in re.findall(r"ttd-plugins\[([a-z_,]+)\]", file.read_text(encoding="utf-8")):
            named |= dict.fromkeys(extras.split(","), file)
    assert {"open_clip", "demo", "train", "data", "lora", "stanza", "app", "tensorboard"} <= set(named)
    assert not set(named) - set(EXTRAS), named


def test_the_sample_of_the_documentation_has_an_extra_for_its_tracker() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert "trackers: [tensorboard]" in page and "the extra `tensorboard`" in page
    assert [Requirement(one).name for one in EXTRAS["tensorboard"]] == ["tensorboard"]


# What works ----------------------------------------------------------------------------------------------------------

PRELUDE = """
import json, os, sys
from importlib.machinery import PathFinder

blocked = set(json.loads(os.environ["BLOCKED_MODULES"]))


class Installed:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else PathFinder.find_spec(name, path, target)

    find_distributions = PathFinder.find_distributions
    invalidate_caches = PathFinder.invalidate_caches


sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
from ttd_plugins.cli import main

main()
"""


@cache
def distributions(*extras: str) -> frozenset[str]:
    """Names of the distributions that pip would install, from the metadata of installed distributions."""
    found: set[str] = set()
    waiting = requirements(*extras)
    while waiting:
        one = waiting.pop()
        wanted = (canonical(one.name), *sorted(one.extras))
        if str(wanted) in found:
            continue
        found |= {str(wanted), wanted[0]}
        try:
            needed = importlib.metadata.requires(one.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in needed:
            other = Requirement(text)
            if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in ("", *one.extras)):
                waiting.append(other)
    return frozenset(found)


def blocked_modules(*extras: str) -> list[str]:
    """Installed modules that an installation with these extras has not."""
    allowed = distributions(*extras)
    return [
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not module.startswith(("ttd_", "_"))
        and module not in sys.stdlib_module_names
        and not allowed & {canonical(owner) for owner in owners}
    ]


def ttd_with(extras: str, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process that sees only what the extras install."""
    blocked = blocked_modules(*filter(None, extras.split(",")))
    environment = os.environ | {"BLOCKED_MODULES": json.dumps(blocked), "TTD_PLUGINS_DENY": "perception_encoder"}
    filled = [one.replace("PHOTO", PHOTOGRAPH) for one in arguments]
    return subprocess.run(
        [sys.executable, "-c", PRELUDE, *filled],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for library in ("open_clip", "transformers", "peft", "accelerate", "datasets", "matplotlib", "emoji", "tokenizers"):
        pytest.importorskip(library, reason="every extra must be installed")
    found = tmp_path_factory.mktemp("extras")
    (found / "pairs").mkdir()
    for number, file in enumerate(sorted((PHOTOGRAPHS_FOLDER / "images").glob("*.jpg"))[:4]):
        (found / "pairs" / f"{number}.jpg").write_bytes(file.read_bytes())
        (found / "pairs" / f"{number}.txt").write_text("a cat and a canary")
    return found


TAGS = ["tags", "PHOTO", "a cat and a canary", "--backbone"]
TRAIN = "train --backbone open_clip:photo --data pairs --steps 1 --batch-size 2 --size 64 --out".split()
COMPARE = "compare --data pairs:pairs --pairs pairs --seeds 1 --steps 1 --batch-size 2 --backbones".split()
WORKS = {
    "open_clip": [
        [*TAGS, "open_clip:photo"],
        [*TAGS, "open_clip:tiny"],
        "segment PHOTO cat --size 64 --scales 1 --no-pamr --out segmented".split(),
        "eval retrieval pairs --preset fast".split(),
        "prune pairs --out scores.jsonl".split(),
    ],
    "eva_clip": [[*TAGS, "eva_clip:tiny"]],
    "siglip": [[*TAGS, "siglip:tiny"]],
    "openai_clip": [[*TAGS, "openai_clip:tiny"]],
    "demo": ["heatmap PHOTO cat --out maps.png".split(), "demo --steps 1 --scenes 8 --out demo".split()],
    "open_clip,data": ["prune pairs --out scores.parquet".split()],
    "open_clip,train": [[*TRAIN, "run"], [*COMPARE, "open_clip:photo", "--out", "compared"]],
    "open_clip,train,tensorboard": [[*TRAIN, "tracked", "--tracker", "tensorboard"]],
}
NEEDS = [
    ("", [*TAGS, "open_clip:photo"], "open_clip"),
    ("open_clip", ["heatmap", "PHOTO", "cat", "--out", "none.png"], "demo"),
    ("", [*TAGS, "siglip:tiny"], "siglip"),
    ("", [*TAGS, "openai_clip:tiny"], "openai_clip"),
    ("", [*TAGS, "eva_clip:tiny"], "eva_clip"),
    ("open_clip", [*TAGS, "open_clip:photo", "--tags", "stanza"], "stanza"),
    ("open_clip", ["prune", "pairs", "--out", "none.parquet"], "data"),
    ("open_clip", [*TRAIN, "none"], "train"),
    ("open_clip,train", [*TRAIN, "none", "--tracker", "tensorboard"], "tensorboard"),
    ("open_clip", ["demo", "--steps", "1", "--scenes", "8", "--out", "none"], "demo"),
    ("demo", ["app"], "app"),
]
QUICK = 2
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("extras", "arguments"),
    [
        pytest.param(
            extras, one, id=f"{extras}: {' '.join(one)[:40]}", marks=[] if extras == "open_clip" and not n else slow
        )
        for extras, commands in WORKS.items()
        for n, one in enumerate(commands)
    ],
)
def test_a_command_works_with_its_extra_alone(extras: str, arguments: list[str], folder: Path) -> None:
    if "tensorboard" in extras:
        pytest.importorskip("tensorboard")
    done = ttd_with(extras, arguments, folder)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("extras", "arguments", "named"),
    [
        pytest.param(*one, id=f"{one[2]}: {' '.join(one[1])[:40]}", marks=[] if number < QUICK else slow)
        for number, one in enumerate(NEEDS)
    ],
)
def test_a_missing_library_is_one_sentence_that_names_the_extra(
    extras: str, arguments: list[str], named: str, folder: Path
) -> None:
    done = ttd_with(extras, arguments, folder)
    assert done.returncode == 2, done.stderr[-2000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert f"pip install 'ttd-plugins[{named}]'" in errors[0]


def test_listings_need_no_extra(folder: Path) -> None:
    for arguments in (["plugins"], ["backbones", "siglip"]):
        done = ttd_with("", arguments, folder)
        assert (done.returncode, "cannot be imported" in done.stdout) == (0, False), done.stderr
