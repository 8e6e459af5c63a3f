"""The layers of ttd_plugins, and the import graph of the packages in this repository."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Layer:
    """One layer: its name, its modules (a package means all of it, unless a longer name is in another layer)."""

    name: str
    modules: tuple[str, ...]
    purpose: str


LAYERS = [
    Layer("base", ("_version", "_renamed_modules", "errors", "utils", "options"), "errors, helpers, options of TTD"),
    Layer(
        "contract",
        (
            "hookspecs",
            "tags",
            "tag_extractors",
            "lora",
            "toolkit.transforms",
            "data.images",
            "library_reference",
            "adapter",
            "packed_texts",
        ),
        "what plugins implement: adapters and tag extractors; LoRA",
    ),
    Layer("toolkit", ("toolkit", "embedded"), "building blocks of adapters; embedded models and generated scenes"),
    Layer(
        "plugins",
        (
            "plugins",
            "backbone_sources",
            "export_record",
            "training.config",
            "training.jsonl_log",
            "training.best_checkpoint",
            "training.checkpoint_state",
            "training.sharding",
            "training.checkpoints",
            "training.trainable_parameters",
        ),
        "discovery, names, load() and wrap(); reading runs and exports",
    ),
    Layer("method", ("method", "functional"), "similarity, selection, losses, text embeddings; ttd_loss()"),
    Layer(
        "engine",
        ("engine", "engine_checks", "engine_outputs", "engine_teacher", "caption_maps", "calibration"),
        "TTD: one batch through the method",
    ),
    Layer("data", ("data",), "image-text pairs, loader, pruning"),
    Layer("evaluation", ("evaluation",), "metrics, protocols, labelled datasets"),
    Layer("training", ("training", "export", "hub_upload"), "runs, checkpoints, export"),
    Layer("results", ("comparison", "reports"), "results of a comparison; tables, charts, pages"),
    Layer(
        "workflows",
        ("fine_tuning", "segmenting", "tagging", "comparison.running", "comparison.demo"),
        "fine_tune(), segment(), find_tags(), compare(), the demo",
    ),
    Layer("tools", ("testing", "benchmark"), "the conformance kit, the benchmark"),
    Layer("front ends", ("app", "cli"), "the app and the commands"),
]
"""From the bottom up: a module imports modules of its own layer and of the layers below."""


def drawing() -> str:
    """The layers as text, from the top down."""
    rows = [(layer.name, ", ".join(layer.modules), layer.purpose) for layer in reversed(LAYERS)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "".join(f"{name:{widths[0]}}  {modules:{widths[1]}}  {purpose}\n" for name, modules, purpose in rows)


def layer_number(module: str) -> int | None:
    """Position in LAYERS of a module such as ``ttd_plugins.engine``; ``None`` for the package itself."""
    fitting = {
        name: number
        for number, layer in enumerate(LAYERS)
        for name in (f"ttd_plugins.{part}" for part in layer.modules)
        if module == name or module.startswith(f"{name}.")
    }
    return fitting[max(fitting, key=len)] if fitting else None


def _module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module_name(file, ROOT): file for file in sorted((ROOT / "ttd_plugins").rglob("*.py"))}
ADAPTER_MODULES = {_module_name(file, ROOT / "adapters"): file for file in sorted((ROOT / "adapters").rglob("*.py"))}
ALL_MODULES = MODULES | ADAPTER_MODULES


def imports(file: Path, *, deferred: bool = True, types: bool = False) -> Iterator[str]:
    """Names of the modules that a file imports.

    Args:
        file: a Python file without relative imports.
        deferred: whether to include imports inside functions.
        types: whether to include imports for type checkers.
    """

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if not types and isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue
            if not deferred and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file} has a relative import"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield whole if whole in ALL_MODULES else str(child.module)
            yield from visit(child)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")))


def import_graph() -> dict[str, set[str]]:
    """For each module of the core and the adapters the ones that it imports: at run time, deferred, or for types."""
    return {
        module: {name for name in imports(file, types=True) if name in ALL_MODULES and name != module}
        for module, file in ALL_MODULES.items()
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Import circles: groups of modules that can all reach each other (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(graph):
        if module not in number:
            visit(module)
    return sorted(found)
