"""No hook without documentation, and none without a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from ttd_plugins import hookspecs, plugins

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "plugin-hooks.md"
SPECS = {
    node.name: node
    for node in ast.parse(Path(hookspecs.__file__).read_text()).body
    if isinstance(node, ast.FunctionDef) and any("hookspec" in ast.unparse(mark) for mark in node.decorator_list)
}


def section(hook: str) -> str:
    """The part of the document under the hook's heading."""
    parts = re.split(r"^## (.+)$", DOCUMENT.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True)).get(hook, "")


def test_all_hooks_are_looked_at() -> None:
    assert set(SPECS) == {name for name, caller in vars(plugins.plugin_manager().hook).items() if caller.has_spec()}


@pytest.mark.parametrize("hook", sorted(SPECS))
def test_every_hook_has_a_heading_its_exact_signature_and_an_example(hook: str) -> None:
    spec = SPECS[hook]
    assert spec.returns is not None
    signature = f"def {hook}({ast.unparse(spec.args)}) -> {ast.unparse(spec.returns)}"
    assert signature in section(hook)
    assert f"@hookimpl\ndef {hook}(" in section(hook)


@pytest.mark.parametrize("hook", sorted(SPECS))
def test_every_hook_has_a_test(hook: str) -> None:
    tested = [
        node.name
        for file in TESTS.glob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert any(name.startswith(f"test_hook_{hook}") for name in tested)


def test_no_heading_is_about_a_hook_that_is_gone() -> None:
    named = set(re.findall(r"^## ([a-z_]+)$", DOCUMENT.read_text(), flags=re.MULTILINE))
    assert named == set(SPECS)


def test_the_python_examples_are_python() -> None:
    for example in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL):
        # A bare signature stands for the specification and has no body.
        ast.parse(example if "->" not in example.splitlines()[0] else f"{example.strip()}: ...")


def test_the_example_of_a_tag_extractor_works() -> None:
    example = next(
        text
        for text in re.findall(r"```python\n(.*?)```", section("register_tag_extractors"), re.DOTALL)
        if "class" in text
    )
    module: dict[str, object] = {}
    exec(compile(example, str(DOCUMENT), "exec"), module)
    plugin = type("Plugin", (), {"register_tag_extractors": staticmethod(module["register_tag_extractors"])})
    with plugins.temporary_plugin(plugin, name="documented"):
        assert plugins.make_tag_extractor("hashtags")(["a #Dog and a #dog # #cat"]) == [["dog", "cat"]]
