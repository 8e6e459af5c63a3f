"""HTML of ``ttd app``: results and messages. The markup is in ``reports/templates/app_*.html.j2``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.app.studio import AppResult, BackboneView, SegmentationStage
from ttd_plugins.embedded.photo_examples import Credit
from ttd_plugins.engine import CaptionMaps
from ttd_plugins.reports.charts import chart_svg
from ttd_plugins.reports.comparison_charts import curve_chart
from ttd_plugins.reports.formatting import capitalised
from ttd_plugins.reports.heat_overlay import HEAT_OPACITY, colour_gradient, heat_layer_uri, image_uri
from ttd_plugins.reports.label_overlay import class_colours
from ttd_plugins.reports.templating import render

if TYPE_CHECKING:
    from ttd_plugins.segmenting import Segmentation
    from ttd_plugins.training.loop import StepReport

IMAGE_SIDE = 720


def render_message(kind: str) -> str:
    """A fixed text of the page: its ``title``, or a hint: ``empty``, ``empty-caption`` or ``empty-segmentation``."""
    return render("app_message.html.j2", kind=kind)


def render_opacity() -> str:
    """The slider of the opacity of all maps, and the key of their colours."""
    percent = round(100 * HEAT_OPACITY)
    return render("app_message.html.j2", kind="opacity", percent=percent, gradient=colour_gradient())


def render_group(title: str) -> str:
    """The title of a group of examples."""
    return render("app_message.html.j2", kind="group", text=title)


def render_credits(credits: Sequence[tuple[str, Credit]]) -> str:
    """Authors and licences of all photographs of a gallery; each with what it shows."""
    return render("app_message.html.j2", kind="credits", credits=credits)


def render_credit(credit: Credit, *, captioned: bool = True) -> str:
    """Author and licence of the example that is chosen."""
    return render("app_message.html.j2", kind="image", credit=credit, captioned=captioned)


def render_image_note(text: str) -> str:
    """A sentence about the image that is chosen."""
    return render("app_message.html.j2", kind="image", credit=None, text=text)


def render_error(sentence: str) -> str:
    """One sentence about an error."""
    word = sentence.split(maxsplit=1)[0] if sentence.strip() else ""
    # The name of a backbone or of a file keeps its case.
    text = capitalised(sentence) if word.isalpha() else sentence
    return render("app_message.html.j2", kind="error", text=text, chart="")


def render_progress(text: str, done: int, total: int) -> str:
    """A progress bar and its text; the bar has no end where ``total`` is 0."""
    return render("app_message.html.j2", kind="progress", text=text, done=done, total=total, chart="")


def render_note(sentence: str, reports: Sequence[StepReport] = ()) -> str:
    """One sentence that is no error, and the curve of a fine-tuning's loss if it took more than one step."""
    chart = ""
    if len(reports) > 1:
        line = [(float(report.step), report.loss) for report in reports]
        chart = chart_svg(curve_chart("tuning", "Total loss", {"after": [line]}), legend=False)
    return render("app_message.html.j2", kind="note", text=sentence, chart=chart)


def render_result(result: AppResult) -> str:
    """The result, complete or not; every text in it is escaped. The page's script chooses the map.

    A stage that is not complete has the layout of the complete result, so that nothing moves on the page.

    Raises:
        MissingDependencyError: matplotlib, whose colour map is used, is not installed.
    """
    tags = [(f"tag-{number}", tag) for number, tag in enumerate(result.tags)]
    calibrated = any(
        maps is not None and maps.calibrated for view in result.views for maps in (view.before, view.after)
    )
    return render(
        "app_result.html.j2",
        result=result,
        maps=[("caption", "Caption"), *tags, ("union", "Union")],
        views=[_backbone_view(view) for view in result.views],
        stage=next((f"{view.name}: {view.stage}" for view in result.views if view.stage), ""),
        calibrated=calibrated,
        columns=2 + calibrated,
        **_image_view(result.image),
    )


def render_segmentation(found: Segmentation) -> str:
    """The overlay of a segmentation, its legend as a table, and notes; every text is escaped."""
    colours = class_colours(len(found.classes)).tolist()
    rows = [
        {
            "name": one.name,
            "colour": "#" + bytes(colours[one.index]).hex() if one.index else "",
            "share": f"{one.share:.1%}",
            "probability": f"{one.mean_probability:.0%}" if found.calibrated and one.mean_probability else "",
        }
        for one in found.present
    ]
    return render(
        "app_segmentation.html.j2",
        stage="",
        rows=rows,
        absent=[one.name for one in found.classes if one.index and not one.pixels],
        calibrated=found.calibrated,
        backbone=found.backbone,
        notes=found.notes,
        **_image_view(found.overlay(legend=False)),
    )


def render_segmentation_stage(stage: SegmentationStage) -> str:
    """The layout of a segmentation that is being computed."""
    rows = [{"name": name, "colour": "", "share": "…", "probability": ""} for name in stage.names]
    return render(
        "app_segmentation.html.j2",
        stage=stage.stage,
        rows=rows,
        absent=[],
        calibrated=False,
        backbone=stage.backbone,
        notes=[],
        **_image_view(stage.image),
    )


def _image_view(image: NDArray[np.uint8]) -> dict[str, Any]:
    height, width = image.shape[:2]
    return {
        "image": image_uri(image, IMAGE_SIDE),
        "width": width,
        "height": height,
        "narrow": f"{min(1.0, width / height):.4f}",
    }


def _backbone_view(view: BackboneView) -> dict[str, Any]:
    arms: list[tuple[str, str, CaptionMaps | None]] = []
    if view.before is not None or view.stage:
        arms.append(("before", "before TTD" if view.after_title else "as loaded", view.before))
    if view.after is not None or (view.stage and view.after_title):
        arms.append(("after", view.after_title or "after", view.after))
    return {
        "name": view.name,
        "stage": view.stage,
        "error": view.error,
        "notes": view.notes,
        "arms": [
            {"key": key, "title": title, "layers": _layers(maps) if maps else [], "cells": _cells(maps) if maps else []}
            for key, title, maps in arms
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
