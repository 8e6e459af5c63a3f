"""HTML of ``ttd app``: results and messages. The markup is in ``reports/templates/app_*.html.j2``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ttd_plugins.app.studio import AppResult, BackboneView
from ttd_plugins.embedded.photo_examples import Credit
from ttd_plugins.engine import CaptionMaps
from ttd_plugins.reports.charts import chart_svg
from ttd_plugins.reports.comparison_charts import curve_chart
from ttd_plugins.reports.heat_overlay import colour_gradient, heat_layer_uri, image_uri
from ttd_plugins.reports.templating import render

if TYPE_CHECKING:
    from ttd_plugins.training.loop import StepReport

IMAGE_SIDE = 720


def render_message(kind: str) -> str:
    """A fixed text of the page: its ``title``, or the hint shown while there is an ``empty`` result."""
    return render("app_message.html.j2", kind=kind)


def render_credit(credit: Credit) -> str:
    """Author and licence of an example, and what to do next."""
    return render("app_message.html.j2", kind="credit", credit=credit)


def render_error(sentence: str) -> str:
    """One sentence about an error."""
    return render("app_message.html.j2", kind="error", text=sentence, chart="")


def render_progress(text: str, done: int, total: int) -> str:
    """A progress bar and its text."""
    return render("app_message.html.j2", kind="progress", text=text, done=done, total=total, chart="")


def render_note(sentence: str, reports: Sequence[StepReport] = ()) -> str:
    """One sentence that is no error, and the curve of a fine-tuning's loss if it took more than one step."""
    chart = ""
    if len(reports) > 1:
        line = [(float(report.step), report.loss) for report in reports]
        chart = chart_svg(curve_chart("tuning", "Total loss", {"after": [line]}), legend=False)
    return render("app_message.html.j2", kind="note", text=sentence, chart=chart)


def render_result(result: AppResult) -> str:
    """The whole result; every text in it is escaped. The page's script chooses the map.

    Raises:
        MissingDependencyError: matplotlib, whose colour map is used, is not installed.
    """
    height, width = result.image.shape[:2]
    tags = [(f"tag-{number}", tag) for number, tag in enumerate(result.tags)]
    return render(
        "app_result.html.j2",
        result=result,
        image=image_uri(result.image, IMAGE_SIDE),
        width=width,
        height=height,
        narrow=f"{min(1.0, width / height):.4f}",
        maps=[("caption", "Caption"), *tags, ("union", "Union")],
        views=[_backbone_view(view) for view in result.views],
        gradient=colour_gradient(),
    )


def _backbone_view(view: BackboneView) -> dict[str, Any]:
    arms = [("before", "before", view.before), ("after", view.after_title or "after", view.after)]
    return {
        "name": view.name,
        "error": view.error,
        "notes": view.notes,
        "arms": [
            {"key": key, "title": title, "layers": _layers(maps), "cells": _cells(maps)}
            for key, title, maps in arms
            if maps is not None
        ],
    }


def _layers(maps: CaptionMaps) -> list[dict[str, str]]:
    heats = {"caption": maps.caption_map_normalized, "union": maps.union}
    heats |= {f"tag-{number}": heat for number, heat in enumerate(maps.tag_maps_normalized)}
    return [{"map": key, "uri": heat_layer_uri(heat)} for key, heat in heats.items()]


def _cells(maps: CaptionMaps) -> list[dict[str, str]]:
    rows = zip(maps.scores, maps.probabilities, maps.selected, strict=True)
    return [
        {
            "score": f"{float(score):.3f}",
            "probability": f"{float(probability):.0%}" if maps.calibrated else "",
            "word": "selected" if selected else "rejected",
        }
        for score, probability, selected in rows
    ]
