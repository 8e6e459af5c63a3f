"""Old module names, importable for one release: each import warns and returns the module under its new name."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

RENAMED_MODULES: dict[str, str | tuple[str, ...]] = {
    "ttd_plugins.app.layout": "ttd_plugins.app.gradio_page",
    "ttd_plugins.app.page": "ttd_plugins.app.rendering",
    "ttd_plugins.comparison.backbones": "ttd_plugins.backbone_sources",
    "ttd_plugins.benchmark.unshared": "ttd_plugins.benchmark.unshared_baseline",
    "ttd_plugins.benchmark.variants": "ttd_plugins.benchmark.step_variants",
    "ttd_plugins.compiling": "ttd_plugins.training.compiling",
    "ttd_plugins.data.keeping": "ttd_plugins.data.score_filter",
    "ttd_plugins.data.opening": "ttd_plugins.data.source_detection",
    "ttd_plugins.data.pairs": ("ttd_plugins.data.pair_source", "ttd_plugins.data.caption_parsing"),
    "ttd_plugins.data.skipping": "ttd_plugins.data.skipped_samples",
    "ttd_plugins.distributed": "ttd_plugins.utils.distributed",
    "ttd_plugins.evaluation.datasets.base": (
        "ttd_plugins.evaluation.datasets.reader",
        "ttd_plugins.evaluation.datasets.annotation_files",
    ),
    "ttd_plugins.evaluation.datasets.coco": "ttd_plugins.evaluation.datasets.coco_captions",
    "ttd_plugins.evaluation.datasets.masks": "ttd_plugins.evaluation.datasets.coco_masks",
    "ttd_plugins.evaluation.dense": "ttd_plugins.evaluation.dense_inference",
    "ttd_plugins.evaluation.labelled": "ttd_plugins.evaluation.captioned_images",
    "ttd_plugins.evaluation.protocols.running": "ttd_plugins.evaluation.protocols.runner",
    "ttd_plugins.evaluation.scenes": "ttd_plugins.evaluation.scene_protocol",
    "ttd_plugins.evaluation.stateful": "ttd_plugins.evaluation.torchmetrics_classes",
    "ttd_plugins.losses": "ttd_plugins.method.losses",
    "ttd_plugins.nested": "ttd_plugins.utils.settings",
    "ttd_plugins.progress": "ttd_plugins.utils.progress",
    "ttd_plugins.reports.demo": "ttd_plugins.comparison.demo",
    "ttd_plugins.selection": "ttd_plugins.method.selection",
    "ttd_plugins.similarity": "ttd_plugins.method.similarity",
    "ttd_plugins.stanza_tags": "ttd_plugins.tag_extractors.stanza_tags",
    "ttd_plugins.testing.check": "ttd_plugins.testing.check_types",
    "ttd_plugins.testing.registry": "ttd_plugins.testing.all_checks",
    "ttd_plugins.testing.session": (
        "ttd_plugins.testing.check_session",
        "ttd_plugins.testing.all_checks",
        "ttd_plugins.testing.library_reference",
    ),
    "ttd_plugins.texts": "ttd_plugins.method.text_embeddings",
    "ttd_plugins.toolkit.dense": "ttd_plugins.toolkit.dense_modes",
    "ttd_plugins.toolkit.positions": "ttd_plugins.toolkit.position_embeddings",
    "ttd_plugins.toolkit.text": "ttd_plugins.toolkit.tokenizing",
    "ttd_plugins.training.evaluation": "ttd_plugins.training.periodic_evaluation",
    "ttd_plugins.training.scenes": "ttd_plugins.training.scene_tuning",
    "ttd_plugins.training.stages": "ttd_plugins.comparison.experiment_record",
    "ttd_plugins.training.tuned": "ttd_plugins.backbone_sources",
}
"""Old module name to new module name, or to several names if the module was split."""


class _RenamedModuleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import a renamed module under its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in RENAMED_MODULES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new_names = RENAMED_MODULES[spec.name]
        new_names = (new_names,) if isinstance(new_names, str) else new_names
        text = " and ".join(new_names)
        warnings.warn(
            f"the module {spec.name} is now {text}; the old name goes with the next minor release",
            FutureWarning,
            stacklevel=2,
        )
        # A stand-in, so that the import system does not overwrite the name and the spec of the new module.
        stand_in = ModuleType(spec.name, f"Old name of {text}.")
        new_modules = [importlib.import_module(name) for name in new_names]

        def find(name: str) -> object:
            for module in new_modules:
                with contextlib.suppress(AttributeError):
                    return getattr(module, name)
            raise AttributeError(f"module {spec.name!r} has no attribute {name!r}")

        stand_in.__getattr__ = find  # type: ignore[method-assign]
        return stand_in

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to execute: attributes are looked up in the new module."""


def install() -> None:
    """Make old module names importable; safe to call more than once."""
    if not any(isinstance(finder, _RenamedModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(_RenamedModuleFinder())
