"""Prose is plain ML English: odd phrases stay out of docstrings, comments, messages and pages."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("ttd_plugins", "adapters", "examples", "benchmarks", "docs_build")
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs", "examples", "ttd_plugins")
# Everything that a reader of a page sees; style sheets have no prose.
TEMPLATES = {".html", ".j2", ".in", ".js"}

# What not to write (a regular expression, matched without case; a space matches any white space), and what to write.
RULES = (
    (r"pictur(?:e|es|ed)", "image"),
    (r"figures?(?! \d)", "metric, value or number; a figure is a drawing"),
    (r"(?:is|are|was|were|be|been|not) told|told (?:in|by|of|the|apart|from|otherwise|alike)", "stated, reported, set"),
    (r"tells", "says, reports, returns"),
    (r"gives|giving", "returns, yields, raises, has, passes"),
    (r"(?:is|are|was|were|be|been) asked", "is called, is queried"),
    (r"of what", "name the thing"),
    (r"(?:is|are|was|were|be|to be) had", "is available, comes from"),
    (r"stands? behind|stood behind", "supports, follows"),
    (r"answers? for", "claims, registers, resolves"),
    (r"never look(?:s|ing|ed)?|does not look at (?:the|any) (?:image|picture)", "image-blind"),
    (r"(?<!image-)blind", "image-blind"),
    (r"lays?|laid", "puts, draws, arranges"),
    (r"whose it is", "its owner"),
    (r"speaks? for (?:all|them|the)", "rank 0, the main process"),
    (r"wait(?:s|ing|ed)? (?:for|until) the device", "host synchronisation"),
    (r"(?:computed|computes|compute) (?:twice|a second time)|asked (?:twice|again)", "activation checkpointing"),
    (r"what (?:is|was) kept|remember(?:s|ed|ing)?|forgotten|forgets?", "cache, store, snapshot; evict, free"),
    (r"(?:kept|dropped) tags?|tags? (?:is|are|was|were) (?:kept|dropped)|kept (?:and|or) dropped", "selected"),
    (r"for ever", "always, permanently"),
    (r"(?:the )?better of (?:two|the two|both|before)", "gain is after TTD minus control"),
    (r"less the control", "minus the control"),
    (r"heed(?:s|ed)?", "handled"),
    (r"mend(?:s|ed|ing)?", "repair, correct"),
    (r"in the place of", "instead of"),
    (r"many a", "many"),
    (r"but for", "except for"),
)  # fmt: skip
# A sentence that opens with "Of several processes" or the like keeps its subject for the end.
INVERSION = r"(?:^|(?<=[.:;] ))Of (?!course)\w+"

# Where a phrase is right: (file, phrase in lower case, why).
EXCEPTIONS = (
    ("ttd_plugins/embedded/scenes/vocabulary.py", "picture", "a filler of captions: the scenes are data"),
    ("examples/build_photo_backbone.py", "picture", "a template of class names, as captions have it"),
)


@dataclass(frozen=True)
class Finding:
    path: str
    line: int
    phrase: str
    instead: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.phrase!r}; write: {self.instead}"


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w.`/-])(?:{pattern})(?![\w`/]|[.-]\w)".replace(" ", r"\s+"), re.IGNORECASE)


COMPILED = [(_compile(pattern), instead) for pattern, instead in RULES]
COMPILED.append((re.compile(INVERSION), "subject, verb, object"))


def findings(path: str, line: int, text: str) -> Iterator[Finding]:
    """The phrases of ``text`` that a rule forbids; ``line`` is that of its first character."""
    prose = text
    for code in (r"(?s)``.+?``", r"`[^`\n]+`", r"(?m)^ *(?:>>>|\.\.\. ).*$"):
        prose = re.sub(code, lambda match: re.sub(r"\S", "¤", match[0]), prose)
    for pattern, instead in COMPILED:
        for match in pattern.finditer(prose):
            phrase = " ".join(match[0].lower().split())
            if not any((path, phrase) == exception[:2] for exception in EXCEPTIONS):
                yield Finding(path, line + text.count("\n", 0, match.start()), match[0], instead)


def prose_of_python(source: str) -> Iterator[tuple[int, str]]:
    """Docstrings, messages (string literals of several words) and blocks of comments, each with its first line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
    block: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if block and token.start[0] != last + 1:
                yield last - len(block) + 1, "\n".join(block)
                block = []
            block.append(token.string.lstrip("# "))
            last = token.start[0]
    if block:
        yield last - len(block) + 1, "\n".join(block)


def prose_of_page(text: str) -> str:
    """A page without its code blocks, addresses, tags and template expressions; line breaks stay."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"\S", "¤", match[0])

    for code in (r"^```.*?^```", r"<style.*?</style>", r"\{\{.*?\}\}|\{%.*?%\}", r"<[^<>]*>", r"\]\([^)]*\)"):
        text = re.sub(code, blank, text, flags=re.DOTALL | re.MULTILINE)
    return text


def prose_of(file: Path) -> Iterator[tuple[int, str]]:
    source = file.read_text(encoding="utf-8")
    return prose_of_python(source) if file.suffix == ".py" else iter([(1, prose_of_page(source))])


def part_of(path: Path) -> str:
    """What a file is reported with: its package, its example, or the page itself."""
    parts = path.parts
    if parts[0] in ("ttd_plugins", "adapters", "examples") and len(parts) > 2:
        return "/".join(parts[:2])
    return path.as_posix() if path.suffix == ".md" else parts[0]


def files() -> dict[str, list[Path]]:
    found = [file for top in CODE for file in (ROOT / top).rglob("*.py")]
    for top in PAGES:
        place = ROOT / top
        inside = place.rglob("*") if place.is_dir() else [place]
        found += [file for file in inside if file.suffix in TEMPLATES | {".md"}]
    parts: dict[str, list[Path]] = {}
    for file in sorted(set(found)):
        relative = file.relative_to(ROOT)
        if "tests" not in relative.parts and "egg-info" not in str(relative):
            parts.setdefault(part_of(relative), []).append(file)
    return parts


FILES = files()


@pytest.mark.parametrize("part", sorted(FILES))
def test_prose_is_plain(part: str) -> None:
    found = []
    for file in FILES[part]:
        path = file.relative_to(ROOT).as_posix()
        found += [finding for line, text in prose_of(file) for finding in findings(path, line, text)]
    if found:
        pytest.fail("\n".join(map(str, sorted(found, key=lambda each: (each.path, each.line)))), pytrace=False)


def test_the_files_are_seen() -> None:
    parts = {"README.md", "ttd_plugins", "ttd_plugins/training", "adapters/ttd_siglip", "examples", "docs/data.md"}
    assert parts <= set(FILES)


@pytest.mark.parametrize(
    "sentence",
    [
        "hold what enters each block of the text tower alone, and the rest is computed twice",
        "The statistics before anybody waits for the device",
        "Whose it is, the traceback tells",
        "Random weights are had by `@random` only.",
        "percentages that no calibration stands behind are each told in one sentence",
        "Of several processes none ends before all are done",
        "a scorer that never looks",
        "Registers the family and answers for\nmodel objects.",
        "the tags are kept",
    ],
)
def test_the_worst_sentences_are_noticed(sentence: str) -> None:
    assert list(findings("page.md", 1, sentence))


@pytest.mark.parametrize(
    "sentence",
    [
        "Use `@random` for random weights.",
        "Figure 3 of the paper, and `run.pictures` or ``of what`` as code; run.pictures in a message",
        "Returns only loss tensors, so that DDP sees no unused outputs. Encode text first.",
        "The image-blind baseline selects tags without the image.",
        "a list of tags, of course",
        ">>> picture = of what",
    ],
)
def test_plain_sentences_pass(sentence: str) -> None:
    assert not list(findings("page.md", 1, sentence))


def test_docstrings_messages_and_comments_are_read_with_their_lines() -> None:
    source = '"""Doc of\nwhat."""\n\n# one of\n# what\nx = f"of what {1}"  # of what\ny = "of_what"\n'
    seen = [each for line, text in prose_of_python(source) for each in findings("m.py", line, text)]
    assert sorted(each.line for each in seen) == [1, 4, 6, 6]


def test_code_and_addresses_of_a_page_are_no_prose() -> None:
    page = "A\n```bash\nttd of what\n```\n[text](of what) {{ of what }} <a class='of what'>of what</a>\n"
    seen = list(findings("page.md", 1, prose_of_page(page)))
    assert [each.line for each in seen] == [5]


@pytest.mark.parametrize(("path", "phrase", "reason"), EXCEPTIONS)
def test_every_exception_is_still_needed(path: str, phrase: str, reason: str) -> None:
    words = " ".join(" ".join(text.lower().split()) for _, text in prose_of(ROOT / path))
    assert reason
    assert phrase in words, f"{path} has no {phrase!r} any more; remove the exception"
