"""The layers of ``ttd_plugins``, which the import test enforces and docs/architecture.md draws."""

from __future__ import annotations

# From the bottom up: a module imports its own layer and those before it. A longer name is more exact.
LAYERS = (
    "ttd_plugins._version",
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
