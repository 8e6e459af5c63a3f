"""The report of a comparison: one HTML file that needs no network. ``ttd demo`` and ``ttd compare`` write it.

This module prepares the head of the page; ``comparison_sections.py`` lists the sections. The markup is in
``templates/comparison.html.j2``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttd_plugins.comparison.results import Comparison
from ttd_plugins.reports.comparison_charts import ARM_LABELS
from ttd_plugins.reports.comparison_findings import TIE, describe_comparison
from ttd_plugins.reports.comparison_gallery import scene_view
from ttd_plugins.reports.comparison_metrics import tiles
from ttd_plugins.reports.comparison_sections import SECTIONS
from ttd_plugins.reports.formatting import plural
from ttd_plugins.reports.heat_overlay import HEAT_OPACITY, colour_gradient
from ttd_plugins.reports.palette import SERIES
from ttd_plugins.reports.photographs import photographs_view
from ttd_plugins.reports.templating import render, script, stylesheet
from ttd_plugins.utils.files import write_atomic

PAPER_URL = "https://arxiv.org/abs/2404.00384"


def write_comparison_report(path: Path, comparison: Comparison) -> None:
    """Write the page: finding, tiles, one scene, and the sections of :data:`SECTIONS`.

    Photographs before and after TTD come first, if the comparison has any. The file contains its style, script, charts
    and images, and a content security policy forbids everything else. Without its script the page only loses sorting,
    the choice of maps and backbones, and the opacity slider.

    Args:
        path: where to write.
        comparison: what the page shows; every string in it is escaped. The page says so where an arm was not run,
            a metric is ``None`` or the gallery is empty.

    Raises:
        InputError: the path cannot be written, or a map or image has a wrong shape or values.
        MissingDependencyError: matplotlib, which draws charts and colours maps, is not installed.
    """
    finding = describe_comparison(comparison)
    tuned = any(backbone.metrics.get("after") for backbone in comparison.backbones)
    sections = {section: view for section in SECTIONS if (view := section.view(comparison)) not in (None, [])}
    gallery = next((view for section, view in sections.items() if section.id == "gallery"), None)
    photographs = photographs_view(comparison.photographs) if comparison.photographs else None
    html = render(
        "comparison.html.j2",
        title=finding.headline,
        finding=finding,
        about=_about(comparison, tuned=tuned),
        stylesheet=stylesheet("report.css", "photographs.css", "heat_overlay.css"),
        script=script("report.js"),
        paper_url=PAPER_URL,
        arm_labels=ARM_LABELS,
        comparison=comparison,
        names=[name_view(n, backbone.name) for n, backbone in enumerate(comparison.backbones)],
        tiles=tiles(comparison),
        scene=scene_view(gallery),
        tie=TIE,
        sections=sections,
        gallery=gallery,
        photographs=photographs,
        percent=round(100 * HEAT_OPACITY),
        gradient=colour_gradient() if comparison.gallery or photographs else "",
    )
    write_atomic(path, html)


def _about(comparison: Comparison, *, tuned: bool) -> list[str]:
    """What was run, in a few words."""
    settings = comparison.settings
    data = settings.get("data")
    name = data.get("name") if isinstance(data, Mapping) else data
    seeds = max((len(runs) for b in comparison.backbones for runs in b.metrics.values()), default=0)
    one = len(comparison.backbones) == 1
    parts = ["ttd-plugins", comparison.backbones[0].name if one else plural(len(comparison.backbones), "backbone")]
    parts += [str(name)] if name else []
    if tuned:
        parts.append(plural(seeds, "seed"))
        parts += [f"{settings['steps']} steps"] if "steps" in settings else []
    return parts


def name_view(number: int, name: str) -> dict[str, Any]:
    """A backbone's number, colour and name, in parts between which a long name may break."""
    return {"number": number + 1, "series": number % SERIES, "parts": re.split(r"(?<=[:/@+_-])(?=.)", name)}
