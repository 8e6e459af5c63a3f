"""A result as HTML: for each backbone the chosen map before and after, and its tags with scores and selection."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttd_plugins.app.studio import AppResult, BackboneView
from ttd_plugins.engine import CaptionMaps
from ttd_plugins.reports import page
from ttd_plugins.reports.heatmaps import colour_table, heat_levels, jpeg_data_uri, png_data_uri

HEAT_SIDE = 160
_PNG_UP_TO = 256


def render_error(sentence: str) -> str:
    """One sentence on what is wrong."""
    return f'<p class="ttd-error" role="alert">{page.text(sentence)}</p>'


def render_progress(text: str, done: int, total: int) -> str:
    """A progress bar and what is being done."""
    return (
        f'<p class="ttd-progress"><progress value="{done}" max="{total}"></progress> <span>{page.text(text)}</span></p>'
    )


def render_note(sentence: str) -> str:
    """One sentence that is no error."""
    return f'<p class="ttd-note" role="status">{page.text(sentence)}</p>'


def render_result(result: AppResult) -> str:
    """The whole result; every text in it is escaped. The maps shown are chosen by the script of the page.

    Raises:
        MissingDependencyError: matplotlib, whose colour map is used, is not installed.
    """
    height, width = result.picture.shape[:2]
    ratio = f"{width} / {height}"
    choices = [("caption", "Caption"), *((f"tag-{i}", tag) for i, tag in enumerate(result.tags)), ("union", "Union")]
    chips = "".join(
        f'<button type="button" class="ttd-chip{" ttd-whole" * (key in ("caption", "union"))}" data-map="{key}" '
        f'aria-pressed="{"true" if key == "caption" else "false"}">{page.text(label)}</button>'
        for key, label in choices
    )
    views = "".join(_view(view, result) for view in result.views)
    return (
        f'<div class="ttd-result" style="--picture:url({_picture(result.picture)});--ratio:{ratio};'
        f'--narrow:{min(1.0, width / height):.4f}">'
        f'<p class="ttd-caption">“{page.text(result.caption)}”</p>'
        f'<div class="ttd-chips" role="group" aria-label="Map to see">{chips}</div>{views}'
        '<p class="ttd-legend">Cosines are min-max-normalised within each map: <span class="ttd-scale" '
        f'style="background:{page.scale_gradient()}"></span> lowest to highest patch. Union: the maps of '
        "the kept tags together, which TTD teaches the caption’s map to match. A tag’s score is the cosine of its "
        "nearest patch.</p></div>"
    )


def _view(view: BackboneView, result: AppResult) -> str:
    error = f'<p class="ttd-error" role="alert">{page.text(view.error)}</p>' if view.error else ""
    notes = "".join(f'<p class="ttd-note">{page.text(note)}</p>' for note in view.notes)
    head = f'<section class="ttd-backbone"><h3>{page.text(view.name)}</h3>{error}{notes}'
    if view.before is None:
        return head + "</section>"
    arms = [("before", "Before", view.before)]
    if view.after is not None:
        arms.append(("after", _capitalised(view.after_title or "after"), view.after))
    figures = "".join(
        f'<figure class="ttd-{arm}"><div class="ttd-frame" role="img" aria-label="{page.text(view.name)}, {arm}: the '
        f'chosen map over the picture">{"".join(_layers(maps))}</div>'
        f"<figcaption>{page.text(title)}</figcaption></figure>"
        for arm, title, maps in arms
    )
    layout = "ttd-body" if len(arms) > 1 else "ttd-body ttd-single"
    return (
        f'{head}<div class="{layout}"><div class="ttd-pair">{figures}</div>{_table(arms, result.tags)}</div></section>'
    )


def _layers(maps: CaptionMaps) -> Iterator[str]:
    height, width = maps.caption_map.shape
    pictures = [
        ("caption", maps.caption_map_normalized),
        *((f"tag-{number}", heat) for number, heat in enumerate(maps.tag_maps_normalized)),
        ("union", maps.union),
    ]
    scale = HEAT_SIDE / max(height, width)
    for key, heat in pictures:
        levels = heat_levels(heat, max(round(height * scale), 1), max(round(width * scale), 1))
        hidden = "" if key == "caption" else " hidden"
        yield f'<img class="ttd-heat" data-map="{key}" alt="" src="{png_data_uri(levels, colour_table())}"{hidden}>'


def _table(arms: list[tuple[str, str, CaptionMaps]], tags: list[str]) -> str:
    heads = "".join(f'<th scope="col">{"Before" if arm == "before" else "After"}</th>' for arm, _, _ in arms)
    rows = []
    for number, tag in enumerate(tags):
        cells = "".join(_cell(maps, number) for _, _, maps in arms)
        rows.append(
            f'<tr><th scope="row"><button type="button" class="ttd-tag" data-map="tag-{number}" aria-pressed="false">'
            f"{page.text(tag)}</button></th>{cells}</tr>"
        )
    return (
        f'<table class="ttd-tags"><thead><tr><th scope="col">Tag</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _cell(maps: CaptionMaps, number: int) -> str:
    kept = bool(maps.selected[number])
    probability = float(maps.probabilities[number])
    word = "kept" if kept else "dropped"
    return (
        f'<td class="{word}"><span class="ttd-score">{float(maps.scores[number]):.3f}</span> '
        f'<span class="ttd-probability">{probability:.0%}</span> <b>{word}</b></td>'
    )


def _picture(picture: NDArray[np.uint8]) -> str:
    if max(picture.shape[:2]) <= _PNG_UP_TO:
        return png_data_uri(picture)
    return jpeg_data_uri(Image.fromarray(picture), quality=88)


def _capitalised(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
