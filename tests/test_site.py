"""The documentation site: current generated pages, existing messages and links, documented public names, the build."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
from helpers_browser import NEEDS_BROWSER, launched
from layers import MODULES

import ttd_plugins
import ttd_plugins.testing
from ttd_plugins.utils.configuration import field_information

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
REPOSITORY = "https://github.com/ttd-plugins/ttd-plugins"
API = {page.name: page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md"))}
DIRECTIVES = re.findall(r"^::: (\S+)\n((?:    .*\n)*)", "".join(f"{text}\n" for text in API.values()), re.MULTILINE)

sys.path.insert(0, str(ROOT / "docs_build"))

import reference

# Generated pages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(reference.PAGES))
def test_a_generated_page_is_current(name: str) -> None:
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == reference.PAGES[name](), f"docs/{name} is stale; run: python docs_build/reference.py"


def test_every_configuration_class_has_a_table() -> None:
    known = {table.kind for table in reference.TABLES}
    found = {
        value
        for name in MODULES
        if not name.startswith(("ttd_plugins.app", "ttd_plugins.cli")) and "torchmetrics" not in name
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, type) and hasattr(value, "__pydantic_fields__")
    }
    assert found <= known and len(found) > 10


def test_every_option_is_in_its_table_with_type_default_and_meaning() -> None:
    page = (DOCS / "options.md").read_text(encoding="utf-8")
    for table in reference.TABLES:
        section = re.split(r"^#{2,3} ", page.split(f" {table.heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
        rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.MULTILINE))
        assert list(rows) == list(field_information(table.kind)), table.heading
        for name, row in rows.items():
            kind, _, meaning = re.split(r" ?\| ", row, maxsplit=2)
            assert kind and meaning, f"{table.heading}.{name}"
            assert not re.search(r"typing|pydantic|<class", row), f"{table.heading}.{name}: {row}"


def test_every_command_has_a_section_a_guide_and_its_options() -> None:
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    root = reference.typer.main.get_command(reference.app)
    names = [name for name, _, _ in reference.commands(root, "ttd")][1:]
    assert re.findall(r"^#{2,3} (ttd .+)$", page, re.MULTILINE) == names
    assert set(reference.GUIDES) == {name for name in names if name.count(" ") == 1}
    for option in ("`--learning-rate`", "`--lr`", "`--rule`", "`--resume`"):
        assert (option in page) == (option != "`--learning-rate`")
    assert "deprecated" not in page.lower(), "old flags are hidden"


# Public names --------------------------------------------------------------------------------------------------------


def own_names(module: ModuleType) -> list[str]:
    """Public names of a module: those of ``__all__``, or its own classes and functions."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not name.startswith("_")]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


def documented_objects() -> Iterator[tuple[str, Any]]:
    """Every class, function and module of the reference, with its dotted path."""
    for path, options in DIRECTIVES:
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError:
            owner, _, name = path.rpartition(".")
            yield path, getattr(importlib.import_module(owner), name)
            continue
        yield path, module
        hidden = re.findall(r"!\^\(?([\w|]+)\)?\$", options)
        left_out = set("|".join(hidden).split("|")) if hidden else set()
        for name in own_names(module):
            if name not in left_out:
                yield f"{path}.{name}", getattr(module, name)


OBJECTS = dict(documented_objects())


@pytest.mark.parametrize("module", [ttd_plugins, ttd_plugins.testing], ids=lambda module: module.__name__)
def test_every_exported_name_is_in_the_reference(module: ModuleType) -> None:
    missing = [name for name in module.__all__ if f"{module.__name__}.{name}" not in OBJECTS and name != "__version__"]
    assert not missing, f"add to docs/api: {missing}"


def test_the_method_the_toolkit_and_the_metrics_are_in_the_reference() -> None:
    packages = ("method", "toolkit")
    modules = {name for name in MODULES if name.startswith(tuple(f"ttd_plugins.{package}." for package in packages))}
    modules |= {"ttd_plugins.evaluation.metrics", "ttd_plugins.adapter", "ttd_plugins.errors", "ttd_plugins.functional"}
    assert not [name for name in sorted(modules) if name not in OBJECTS]


def test_no_name_is_twice_in_the_reference() -> None:
    paths = [path for path, _ in DIRECTIVES]
    assert len(paths) == len(set(paths))
    places: dict[int, list[str]] = {}
    for path, value in OBJECTS.items():
        if inspect.isfunction(value) or inspect.isclass(value):
            places.setdefault(id(value), []).append(path)
    twice = [found for found in places.values() if len(found) > 1]
    assert not twice, "leave one of them out with filters"


def test_every_name_of_the_reference_has_a_docstring() -> None:
    missing = []
    for path, value in OBJECTS.items():
        made = "<locals>" in getattr(value, "__qualname__", "")  # a constant that a function made
        if made or not (inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if not (value.__doc__ or "").strip() or (value.__doc__ or "").startswith(f"{path.rpartition('.')[2]}("):
            missing.append(path)
        if inspect.isclass(value) and value.__module__.startswith("ttd_plugins"):
            for name, member in vars(value).items():
                is_method = not name.startswith("_") and isinstance(member, FunctionType | property)
                if is_method and not inspect.getdoc(getattr(value, name)):
                    missing.append(f"{path}.{name}")
    assert not missing


def test_the_reference_is_large_enough_to_be_of_use() -> None:
    assert len(OBJECTS) > 200


# Messages ------------------------------------------------------------------------------------------------------------


def literals(source: str) -> Iterator[str]:
    """The string literals of a file, with ``…`` where a value is inserted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


MESSAGES = re.findall(r"^### (.+)$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
LITERALS = {
    text
    for top in ("ttd_plugins", "adapters")
    for file in (ROOT / top).rglob("*.py")
    for text in literals(file.read_text(encoding="utf-8"))
}


def is_quoted(message: str, text: str) -> bool:
    """Whether the fixed parts of ``message`` are in ``text``, in their order."""
    parts = [re.escape(part) for part in message.split("…") if part.strip(" ;:,()'")]
    return re.search(".*".join(parts), text, re.DOTALL) is not None


def test_frequent_messages_are_explained() -> None:
    assert len(MESSAGES) >= 25 and len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_explained_exists(message: str) -> None:
    assert len(re.sub(r"\W", "", message)) >= 12, "too short to be found"
    assert any(is_quoted(message, text) for text in LITERALS), f"no string of the code reads: {message}"


def test_a_message_that_does_not_exist_is_noticed() -> None:
    assert not any(is_quoted("the … of step … is …; raise the learning rate", text) for text in LITERALS)
    assert not is_quoted("the … of … is", "is the of")


# Links ---------------------------------------------------------------------------------------------------------------

pages_hook = pytest.importorskip("pages", reason="mkdocs is not installed: pip install 'ttd-plugins[docs]'")


def pages() -> list[str]:
    own = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    return sorted([*own, *pages_hook.OUTSIDE_PAGES])


@pytest.mark.parametrize("page", pages())
def test_links_of_a_page_have_targets_on_both_hosts(page: str) -> None:
    source = ROOT / pages_hook.source_of(page)
    text = source.read_text(encoding="utf-8")
    # Raises where a file outside docs/ does not exist.
    for link in re.findall(r"\]\(([^()\s]+)\)", pages_hook.with_site_links(text, page, REPOSITORY)):
        assert not link.startswith("../../"), f"{link} leaves the site"
    for link in re.findall(r"\]\(([^()\s:]+)\)", re.sub(r"(?ms)^ *```.*?^ *```", "", text)):
        target = (source.parent / link.partition("#")[0]).resolve() if not link.startswith("#") else source
        names = {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*")} | set(pages_hook.OUTSIDE_PAGES)
        known = target.is_relative_to(DOCS) and target.relative_to(DOCS).as_posix() in names
        assert target.exists() or known, f"{source}: {link}"


@pytest.mark.parametrize(
    ("link", "page", "expected"),
    [
        ("own-loop.md#resume", "training.md", "own-loop.md#resume"),
        ("../training.md", "api/training.md", "../training.md"),
        ("#a", "training.md", "#a"),
        ("https://arxiv.org/abs/1#x", "training.md", "https://arxiv.org/abs/1#x"),
        ("../ttd_plugins/adapter.py", "architecture.md", f"{REPOSITORY}/blob/main/ttd_plugins/adapter.py"),
        ("../ttd_plugins/toolkit", "architecture.md", f"{REPOSITORY}/tree/main/ttd_plugins/toolkit"),
        ("../../README.md#licence", "api/index.md", f"{REPOSITORY}/blob/main/README.md#licence"),
        ("../CHANGELOG.md", "deprecation.md", "changelog.md"),
        ("../../CONTRIBUTING.md#x", "api/index.md", "../contributing.md#x"),
        ("docs/deprecation.md", "changelog.md", "deprecation.md"),
        ("train.yaml", "paper-recipe.md", f"{REPOSITORY}/blob/main/examples/paper_recipe/train.yaml"),
        ("../../docs/evaluation.md", "paper-recipe.md", "evaluation.md"),
    ],
)
def test_a_link_is_rewritten_for_the_site(link: str, page: str, expected: str) -> None:
    assert pages_hook.site_link(link, page, REPOSITORY) == expected


def test_code_keeps_its_links_and_a_missing_file_is_an_error() -> None:
    text = "[a](../LICENSE)\n```\n[a](../LICENSE)\n```\n"
    assert pages_hook.with_site_links(text, "x.md", REPOSITORY) == text.replace(
        "../LICENSE", f"{REPOSITORY}/blob/main/LICENSE", 1
    )
    with pytest.raises(pages_hook.PluginError, match=r"links to nothing\.py, which does not exist"):
        pages_hook.site_link("../nothing.py", "x.md", REPOSITORY)


# Docstrings ----------------------------------------------------------------------------------------------------------


def test_docstrings_are_markdown_on_the_site() -> None:
    pytest.importorskip("griffe", reason="mkdocstrings is not installed: pip install 'ttd-plugins[docs]'")
    import docstrings

    linked = docstrings.with_links("See :func:`~ttd_plugins.load` and :meth:`read`.", "a.B")
    assert 'identifier="ttd_plugins.load"><code>load</code>' in linked and 'identifier="a.B.read"' in linked
    assert docstrings.with_fences("A.\n\nExample::\n\n    x = 1\n\n    y = 2\n\nB.") == (
        "A.\n\nExample:\n\n```python\nx = 1\n\ny = 2\n```\n\nB."
    )
    assert docstrings.with_single_names("Args:\n    rank, world: this\n        process.\n    x: y") == (
        "Args:\n    rank: this\n        process.\n    world: See ``rank``.\n    x: y"
    )
    assert docstrings.option_description("Annotated[int, option('A number.', ge=0)]") == "A number."
    assert docstrings.with_guides("``docs/training.md``, ``docs/none.md``") == (
        '<a href="../training.html"><code>training</code></a>, ``docs/none.md``'
    )


# The site ------------------------------------------------------------------------------------------------------------


def build(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(out),
    ]
    settings = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'ttd-plugins[docs]'")
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_built_and_searchable(site: Path) -> None:
    assert {f"{name.removesuffix('.md')}.html" for name in pages()} <= {
        file.relative_to(site).as_posix() for file in site.rglob("*.html")
    }
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    text = {entry["location"]: entry["text"] for entry in index["docs"]}
    assert "selection rule" in text["options.html#ttdoptions"]
    assert "api/backbones.html#ttd_plugins.load" in text


def test_the_site_needs_no_other_host(site: Path) -> None:
    """No page loads a font, script, style or image from elsewhere; links to read on are allowed."""
    loading = re.compile(
        r"<(?:script|img|iframe|source)[^>]+(?:src|srcset)=\"?https?:|<link[^>]+stylesheet[^>]+https?:"
    )
    for page in site.rglob("*.html"):
        assert not loading.search(page.read_text(encoding="utf-8")), page
    assert 'data-md-component="source"' not in (site / "index.html").read_text(encoding="utf-8")


def test_no_docstring_shows_its_markup(site: Path) -> None:
    for page in (site / "api").glob("*.html"):
        text = re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))
        assert not re.search(r":(?:class|func|meth|mod|data|attr):`|``\w|Annotated\[", text), page.name


@NEEDS_BROWSER
def test_the_site_works_from_files_without_a_network_on_any_screen(site: Path) -> None:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    requests: list[str] = []
    with launched() as browser:
        pages_at = {1440: ("commands",), 390: ("options", "own-data", "speed", "api/engine", "troubleshooting")}
        for width, names in pages_at.items():
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark")
            page.on("request", lambda request: requests.append(request.url))
            for name in ("index", *names):
                page.goto((site / f"{name}.html").as_uri())
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} at {width}"
                assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)"), name
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.on("request", lambda request: requests.append(request.url))
        page.goto((site / "index.html").as_uri())
        page.click(".md-search__input")
        page.keyboard.type("selection rule")
        page.wait_for_selector(".md-search-result__link[href*='options.html']", timeout=15000)
    assert not [url for url in requests if not url.startswith(("file:", "data:", "blob:"))]


BROKEN = """# Page

[a](missing.md), [b](index.md#missing-heading), [c][ttd_plugins.missing_name]
"""


def test_broken_links_fail_the_build(tmp_path: Path) -> None:
    """The settings of ``mkdocs.yml`` on a site of one page."""
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("mkdocstrings_handlers.python", reason="mkdocstrings is not installed")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(BROKEN)
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    settings |= {"nav": [{"Home": "index.md"}], "docs_dir": str(tmp_path / "docs"), "extra_css": []}
    settings |= {"hooks": [str(ROOT / "docs_build" / "pages.py")], "watch": [], "extra": {"polyfills": []}}
    settings["theme"] |= {"custom_dir": str(ROOT / "docs_build" / "theme"), "logo": None, "favicon": None}
    options = settings["plugins"][-1]["mkdocstrings"]["handlers"]["python"]
    options["paths"] = [str(ROOT)]
    options["options"]["extensions"] = [str(ROOT / "docs_build" / "docstrings.py")]
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    for complaint in ("missing.md", "missing-heading", "ttd_plugins.missing_name"):
        assert complaint in done.stdout + done.stderr
