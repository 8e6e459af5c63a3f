"""Old module names, importable for one release: each import warns and returns the module under its new name."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

RENAMED_MODULES = {
    "ttd_plugins.app.layout": "ttd_plugins.app.gradio_page",
    "ttd_plugins.app.page": "ttd_plugins.app.rendering",
    "ttd_plugins.comparison.backbones": "ttd_plugins.backbone_sources",
    "ttd_plugins.compiling": "ttd_plugins.training.compiling",
    "ttd_plugins.data.keeping": "ttd_plugins.data.score_filter",
    "ttd_plugins.data.skipping": "ttd_plugins.data.skipped_samples",
    "ttd_plugins.distributed": "ttd_plugins.utils.distributed",
    "ttd_plugins.evaluation.dense": "ttd_plugins.evaluation.dense_inference",
    "ttd_plugins.evaluation.scenes": "ttd_plugins.evaluation.scene_protocol",
    "ttd_plugins.losses": "ttd_plugins.method.losses",
    "ttd_plugins.nested": "ttd_plugins.utils.settings",
    "ttd_plugins.progress": "ttd_plugins.utils.progress",
    "ttd_plugins.reports.demo": "ttd_plugins.comparison.demo",
    "ttd_plugins.selection": "ttd_plugins.method.selection",
    "ttd_plugins.similarity": "ttd_plugins.method.similarity",
    "ttd_plugins.stanza_tags": "ttd_plugins.tag_extractors.stanza_tags",
    "ttd_plugins.texts": "ttd_plugins.method.text_embeddings",
    "ttd_plugins.toolkit.dense": "ttd_plugins.toolkit.dense_modes",
    "ttd_plugins.toolkit.positions": "ttd_plugins.toolkit.position_embeddings",
    "ttd_plugins.training.evaluation": "ttd_plugins.training.periodic_evaluation",
    "ttd_plugins.training.scenes": "ttd_plugins.training.scene_tuning",
    "ttd_plugins.training.stages": "ttd_plugins.comparison.experiment_record",
    "ttd_plugins.training.tuned": "ttd_plugins.backbone_sources",
}
"""Old module name to new module name."""


class _RenamedModuleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import a renamed module under its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in RENAMED_MODULES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new_name = RENAMED_MODULES[spec.name]
        warnings.warn(
            f"the module {spec.name} is now {new_name}; the old name goes with the next minor release",
            FutureWarning,
            stacklevel=2,
        )
        # A stand-in, so that the import system does not overwrite the name and the spec of the new module.
        stand_in = ModuleType(spec.name, f"Old name of {new_name}.")
        new_module = importlib.import_module(new_name)
        stand_in.__getattr__ = lambda name: getattr(new_module, name)  # type: ignore[method-assign]
        return stand_in

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to execute: attributes are looked up in the new module."""


def install() -> None:
    """Make old module names importable; safe to call more than once."""
    if not any(isinstance(finder, _RenamedModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(_RenamedModuleFinder())
