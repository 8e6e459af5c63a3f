"""What computes TTD has not learnt the name of any backbone family, nor of anything inside one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CORE = Path(__file__).resolve().parents[1] / "ttd_plugins"
LEFT_OUT = {"__init__.py", "export.py", "hub_upload.py", "comparison/photographs.py", "utils/quick_start.py"}
"""Modules about a library's own format or imports, that only list names, or that show the package's own model."""
FILES = [
    *(file for file in sorted(CORE.glob("*.py")) if file.name not in LEFT_OUT),
    *(
        file
        for folder in (
            "comparison", "data", "evaluation", "lora", "method", "plugins", "tag_extractors", "training", "utils",
        )
        for file in sorted((CORE / folder).rglob("*.py"))
        if str(file.relative_to(CORE)) not in LEFT_OUT
    ),
]  # fmt: skip
FAMILIES = r"open_?clip\w*|openai\w*|sig_?lip\w*|eva(?:0[12]|clip|_\w+)?|meta_?clip\w*|mobile_?clip\w*|clip"
LIBRARIES = r"timm|transformers|torchvision|hugging_?face\w*|convnext\w*|vit|resnet\w*"
PARTS = r"vision_model|text_model|vision_tower|resblocks|qkv|attn_pool|get_(?:image|text)_features|visual"
NAMES = re.compile(rf"\b(?:{FAMILIES}|{LIBRARIES}|{PARTS})\b", re.IGNORECASE)
# The kind of model that the method is for, as its paper calls it, and the verb.
ALLOWED = re.compile(r"\bCLIP-like\b|\b[Cc]lip (?:gradients|all|everything)\b")


def found(text: str) -> list[str]:
    return NAMES.findall(ALLOWED.sub("", text))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CORE)))
def test_a_file_of_the_engine_names_no_family(file: Path) -> None:
    lines = {
        f"{file.name}:{number}": names
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if (names := found(line))
    }
    assert not lines


def test_the_files_are_those_that_compute() -> None:
    listed = {str(file.relative_to(CORE)) for file in FILES}
    assert {"engine.py", "training/loop.py", "evaluation/scene_protocol.py", "data/images.py"} <= listed
    # What is left out: the package's front, the parts for adapters, what is shown, timed, checked, written or shipped.
    others = {str(file.relative_to(CORE)).partition("/")[0] for file in CORE.rglob("*.py")} - {
        name.partition("/")[0] for name in listed
    }
    assert others == {
        "__init__.py",
        "app",
        "benchmark",
        "cli",
        "embedded",
        "export.py",
        "hub_upload.py",
        "reports",
        "testing",
        "toolkit",
    }


@pytest.mark.parametrize(
    "line",
    [
        'if family == "open_clip":', "import timm", "# as OpenAI's CLIP does", "model.visual.trunk", "SigLIP's bias",
        "from transformers import AutoModel", "model.vision_model", "eva_clip", "a ViT",
    ],
)  # fmt: skip
def test_such_a_line_would_be_found(line: str) -> None:
    assert found(line)


@pytest.mark.parametrize(
    "line", ["any CLIP-like backbone", "clip_grad_norm_(x)", "Clip gradients to a norm", "clipping", "adapter"]
)
def test_ordinary_words_are_not(line: str) -> None:
    assert found(line) == []
