"""Griffe extension: docstrings of this package as the site shows them.

Docstrings name objects by Sphinx roles (``:class:`~ttd_plugins.TTD```), which editors show well. The site links them.
Fields of configuration classes are described by ``option("...")`` in their annotation; the site shows this sentence.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from griffe import Alias, Attribute, Docstring, Expr, ExprSubscript, Extension, Module, Object

DOCS = Path(__file__).resolve().parents[1] / "docs"

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc|obj|py:\w+):`(~?)([\w.]+)`")
_LITERAL_BLOCK = re.compile(
    r"^(?P<indent> *)(?P<text>\S.*)?::\n\n(?P<block>(?:(?P=indent) {4,}\S.*\n?|\n)+)", re.MULTILINE
)

_SHARED_ENTRY = re.compile(r"^ {4}(?P<names>\w+(?:, \w+)+): (?P<text>.*\n(?: {8,}\S.*\n)*)", re.MULTILINE)


def with_links(text: str, scope: str) -> str:
    """Return a docstring with its roles as optional cross-references, which stay code where the site has no target.

    Args:
        text: the docstring.
        scope: dotted path of the object, from which short names such as ``load`` are resolved.
    """

    def link(match: re.Match[str]) -> str:
        short, path = match[1], match[2]
        target = path if path.startswith("ttd_plugins") or ("." in path and path[0].islower()) else f"{scope}.{path}"
        shown = path.rpartition(".")[2] if short else path
        return f'<autoref optional hover identifier="{target}"><code>{shown}</code></autoref>'

    return _ROLE.sub(link, text)


def with_fences(text: str) -> str:
    """Return a docstring with its literal blocks (``Example::``) as fenced Python code."""

    def fence(match: re.Match[str]) -> str:
        indent, words = match["indent"], match["text"]
        block = match["block"].rstrip()
        code = "\n".join(line[len(indent) + 4 :] for line in block.splitlines())
        opening = f"{indent}{words}:\n\n" if words else ""
        fenced = "\n".join(f"{indent}{line}".rstrip() for line in ("```python", *code.splitlines(), "```"))
        return f"{opening}{fenced}\n\n"

    return _LITERAL_BLOCK.sub(fence, text if text.endswith("\n") else f"{text}\n").rstrip()


def with_guides(text: str) -> str:
    """Return a docstring whose mentions of pages (``docs/training.md``) link to them, as the reference needs it."""
    return re.sub(
        r"``docs/([\w-]+)\.md``",
        lambda match: f'<a href="../{match[1]}.html"><code>{match[1]}</code></a>' if _is_page(match[1]) else match[0],
        text,
    )


def _is_page(name: str) -> bool:
    return (DOCS / f"{name}.md").is_file()


def with_single_names(text: str) -> str:
    """Return a docstring whose entries for several arguments (``rank, world: ...``) have one entry for each."""

    def split(match: re.Match[str]) -> str:
        first, *others = match["names"].split(", ")
        return f"    {first}: {match['text']}" + "".join(f"    {name}: See ``{first}``.\n" for name in others)

    return _SHARED_ENTRY.sub(split, f"{text}\n").rstrip()


def option_description(annotation: Any) -> str | None:
    """Return the sentence of ``option("...")`` in an annotation, or ``None``."""
    try:
        tree = ast.parse(str(annotation), mode="eval")
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "option" and node.args:
            return str(ast.literal_eval(node.args[0]))
    return None


class PlainDocstrings(Extension):
    """Rewrites the docstrings and annotations of a package once it is read."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Rewrite the docstrings of all objects of a package."""
        self._visit(pkg)

    def _visit(self, found: Object) -> None:
        if isinstance(found, Attribute):
            self._show_option(found)
        if found.docstring is not None:
            scope = found.path if found.is_class or found.is_module else found.parent.path if found.parent else ""
            text = with_guides(with_fences(with_single_names(found.docstring.value)))
            found.docstring.value = with_links(text, scope)
        for member in found.members.values():
            if not isinstance(member, Alias):
                self._visit(member)

    @staticmethod
    def _show_option(field: Attribute) -> None:
        annotation = field.annotation
        if not isinstance(annotation, ExprSubscript) or str(annotation.left) != "Annotated":
            return
        sentence = option_description(annotation)
        elements = getattr(annotation.slice, "elements", None)
        if sentence is None or not elements:
            return
        if field.docstring is None:
            field.docstring = Docstring(sentence, parent=field)
        first: Expr | str = elements[0]
        field.annotation = first
