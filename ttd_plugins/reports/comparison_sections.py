"""The sections of the report of a comparison, in the order of the page.

To add a section, write a function that returns plain data from a :class:`~ttd_plugins.comparison.results.Comparison`,
a template that shows them under the name ``view``, and one line in :data:`SECTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ttd_plugins.comparison.results import Comparison
from ttd_plugins.reports.comparison_chart_views import bias_view, curves_view, gains_view, trade_off_view
from ttd_plugins.reports.comparison_choice import choice_view
from ttd_plugins.reports.comparison_gallery import gallery_view
from ttd_plugins.reports.comparison_metrics import metrics_view
from ttd_plugins.reports.comparison_settings import backbones_view, settings_view, warnings_view
from ttd_plugins.reports.lora_scale_charts import scale_view


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        id: its address on the page; unique.
        label: its name in the navigation.
        title: its heading.
        view: the data of its template; the section is left out where it returns ``None`` or an empty list.
        template: file in ``templates/``. It sees ``view``, ``comparison``, ``names`` (number, colour and parts of each
            backbone's name), ``arm_labels``, ``tie`` and the macros of ``macros.html.j2`` as ``macros``.
    """

    id: str
    label: str
    title: str
    view: Callable[[Comparison], Any]
    template: str


SECTIONS = (
    Section("gains", "Gains", "Gains", gains_view, "comparison_gains.html.j2"),
    Section("metrics", "Metrics", "Metrics", metrics_view, "comparison_metrics.html.j2"),
    Section("choice", "Choice", "Choice", choice_view, "comparison_choice.html.j2"),
    Section("trade-off", "Trade-off", "Trade-off", trade_off_view, "comparison_trade_off.html.j2"),
    Section("lora-scale", "LoRA scale", "LoRA scale", scale_view, "comparison_lora_scales.html.j2"),
    Section("bias", "Bias", "Bias by kind of word", bias_view, "comparison_bias.html.j2"),
    Section("training", "Training", "Training", curves_view, "comparison_curves.html.j2"),
    Section("gallery", "Gallery", "Gallery", gallery_view, "comparison_gallery.html.j2"),
    Section("backbones", "Backbones", "Backbones", backbones_view, "comparison_backbones.html.j2"),
    Section("warnings", "Warnings", "Warnings", warnings_view, "comparison_warnings.html.j2"),
    Section("settings", "Settings", "Settings and how to repeat", settings_view, "comparison_settings.html.j2"),
)
"""Every section that a report may have, in order."""
