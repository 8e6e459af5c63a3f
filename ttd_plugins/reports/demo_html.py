"""The page that ``ttd demo`` ends in: one HTML file that needs no network, and says first what was found.

Every word of the finding is computed from the figures, so that the page reads right when TTD wins, loses or ties.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.embedded.scenes import Scene
from ttd_plugins.engine import CaptionMaps
from ttd_plugins.errors import InputError
from ttd_plugins.reports import page
from ttd_plugins.reports.heatmaps import HEAT_ALPHA, colour_table, heat_levels, png_data_uri, printable, save_bytes
from ttd_plugins.training.loop import StepReport

Arm = Literal["before", "control", "after"]
ARMS: dict[Arm, str] = {"before": "Before", "control": "Control", "after": "After TTD"}

# A loss in selection or retrieval up to here is called small.
SMALL_COST = 0.02
# Below this IoU a map is more wrong than right.
POOR_IOU = 0.5
# A map whose spread fell to this share of what it was is told as a collapse.
COLLAPSE = 0.5
HEAT_SIDE = 80


@dataclass(frozen=True)
class GalleryItem:
    """One scene of the gallery.

    Attributes:
        scene: picture, caption and truth.
        before, control, after: maps of the scene's picture and caption, with the same tags.
        caption_iou: Caption IoU of this scene under ``"before"``, ``"control"`` and ``"after"``.
    """

    scene: Scene
    before: CaptionMaps
    control: CaptionMaps
    after: CaptionMaps
    caption_iou: dict[str, float]


@dataclass(frozen=True)
class DemoResult:
    """All that the demo's page shows.

    Attributes:
        settings: what was run, in the order in which it is to be listed; values may be dictionaries.
        before, control, after: :meth:`~ttd_plugins.evaluation.scene_protocol.SceneMetrics.as_dict` of the untuned
            backbone, of the one trained by the contrastive term alone, and of the one trained by TTD.
        curves: the steps of the trainings, under ``"control"`` and ``"ttd"``.
        gallery: scenes in the order in which they are to be shown, failures included.
        attribution: whose pictures the scenes are made of.
    """

    settings: dict[str, Any]
    before: dict[str, Any]
    control: dict[str, Any]
    after: dict[str, Any]
    curves: dict[str, list[StepReport]]
    gallery: list[GalleryItem]
    attribution: str

    def arms(self) -> dict[Arm, dict[str, Any]]:
        """The metrics of the three arms by name."""
        return {"before": self.before, "control": self.control, "after": self.after}


@dataclass(frozen=True)
class _Figure:
    """A figure of the table: its key in the metrics, its name, its meaning, and whether more is better."""

    key: str
    name: str
    meaning: str
    judged: bool = True


_FIGURES = (
    _Figure(
        "caption_iou",
        "Caption IoU",
        "How well the caption’s map covers the things it names: overlap of the map above 0.40 with their true regions.",
    ),
    _Figure(
        "tag_balance",
        "Tag balance",
        "How evenly the caption’s map lights up what it names: its mean inside the weakest true tag over its mean "
        "inside the strongest. 1 is even; near 0 is single tag bias.",
    ),
    _Figure(
        "tag_f1", "Tag F1", "How well the selection tells the words that are in the picture from those that are not."
    ),
    _Figure(
        "tag_ap",
        "Tag AP",
        "The same without a threshold: average precision of the pixel score over all candidate words.",
    ),
    _Figure("tag_iou", "Tag IoU", "Overlap of each true tag’s own map above 0.50 with the tag’s region."),
    _Figure(
        "retrieval_r1",
        "Retrieval R@1",
        "How often the right picture is found for a caption and the right caption for a picture; what tuning may cost.",
    ),
    _Figure(
        "tag_ap_blind",
        "Tag AP, blind",
        "The scorer that never looks at the picture: each word has its mean score. Tag AP must lie well above.",
        judged=False,
    ),
    _Figure("tag_ap_image", "Tag AP, image score", "The baseline that asks the pooled picture.", judged=False),
    _Figure("tag_ap_text", "Tag AP, text score", "The baseline that asks the caption alone.", judged=False),
    _Figure(
        "caption_map_spread",
        "Spread of the caption’s map",
        "Highest minus lowest cosine in a picture; near zero means that the maps collapsed.",
        judged=False,
    ),
    _Figure("selected_per_caption", "Selected tags per caption", "How many words the rule takes.", judged=False),
    _Figure("true_per_caption", "True tags per caption", "How many words it should take.", judged=False),
)
_TILES = ("caption_iou", "tag_balance", "tag_f1", "retrieval_r1")
_NAMES = {figure.key: figure.name for figure in _FIGURES}
_SHORT_NAMES = {
    "caption_iou": "Caption IoU",
    "tag_balance": "tag balance",
    "tag_f1": "tag selection",
    "retrieval_r1": "retrieval",
}
_KINDS = {
    "background": "Backgrounds (grass, snow …)",
    "common": "Common things",
    "middle": "Less common things",
    "rare": "Rare things",
}


def difference(metrics: Mapping[Arm, Mapping[str, Any]], key: str) -> float | None:
    """``after`` minus the better of ``before`` and ``control``; ``None`` where one of them is not a number."""
    values = [float(metrics[arm][key]) for arm in ARMS]
    return values[2] - max(values[:2]) if all(map(math.isfinite, values)) else None


def describe(metrics: Mapping[Arm, Mapping[str, Any]]) -> page.Finding:
    """Put the figures of the three arms into words.

    The headline goes by Caption IoU and tag balance against the better of before and control, and names what it cost
    in tag F1 and retrieval. Differences below :data:`~ttd_plugins.reports.page.TIE` are called none.
    """
    gains = {key: d for key in ("caption_iou", "tag_balance") if (d := difference(metrics, key)) is not None}
    costs = {key: d for key in ("tag_f1", "retrieval_r1") if (d := difference(metrics, key)) is not None}
    up = [key for key, d in gains.items() if d >= page.TIE]
    down = [key for key, d in gains.items() if d <= -page.TIE]
    lost = [key for key, d in costs.items() if d <= -page.TIE]
    if not gains:
        headline = "These scenes do not let single tag bias be measured"
    elif up and down:
        headline = f"A mixed result: {_names(up)} rose, {_names(down)} fell"
    elif down:
        headline = f"TTD did not help here: {_names(down)} fell"
    elif not up:
        headline = "TTD made no difference to single tag bias here"
    elif len(up) < len(gains):
        headline = f"TTD helped by one measure: {_names(up)} rose"
    else:
        headline = "TTD repaired part of the single tag bias"
    if up and not down and lost:
        size = "a small cost" if min(costs.values()) > -SMALL_COST else "a cost"
        headline += f", at {size} in {_names(lost)}"
    elif up and not down and len(costs) == 2:
        headline += f", at no cost in {_names(list(costs))}"
    sentences = [_compare(metrics, key) for key in (*gains, *costs)]
    return page.Finding(headline, sentences + _bias_words(metrics) + _collapse_words(metrics))


def _names(keys: Sequence[str]) -> str:
    return " and ".join(_SHORT_NAMES[key] for key in keys)


def _compare(metrics: Mapping[Arm, Mapping[str, Any]], key: str) -> str:
    """One sentence on one figure; it tells a gain that is TTD's from one that any further training brings."""
    before, control, after = (float(metrics[arm][key]) for arm in ARMS)
    change = after - max(before, control)
    if change >= page.TIE:
        what = f"rises by {change:.3f}"
    elif change <= -page.TIE and before >= control:
        what = f"falls by {-change:.3f}"
    elif change <= -page.TIE and before - after >= page.TIE:
        what = f"falls by {before - after:.3f}, and lies {-change:.3f} below the control"
    elif change <= -page.TIE:
        what = f"falls {-change:.3f} short of what contrastive training alone reaches"
    elif after - before >= page.TIE:
        what = "gains no more than contrastive training alone brings"
    else:
        what = "does not change"
    return f"{_NAMES[key]} {what}: {after:.3f} after TTD, {before:.3f} before, {control:.3f} in the control."


def _bias_words(metrics: Mapping[Arm, Mapping[str, Any]]) -> list[str]:
    gaps = {}
    for arm in ("before", "after"):
        means = {k: float(v) for k, v in metrics[arm]["caption_map_in_tag"].items() if math.isfinite(v)}
        if len(means) < 2:
            return []
        low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        gaps[arm] = (low, high, means[high] - means[low])
    (low, high, gap), (_, _, left) = gaps["before"], gaps["after"]
    change = "shrinks to" if gap - left >= page.TIE else "grows to" if left - gap >= page.TIE else "stays at"
    return [
        f"Before, the caption’s map favours {_kind(high)} words over {_kind(low)} words by {gap:.3f}; after TTD the "
        f"gap between the most and the least favoured kind {change} {left:.3f}."
    ]


def _kind(kind: str) -> str:
    return {"middle": "less common"}.get(kind, kind)


def _collapse_words(metrics: Mapping[Arm, Mapping[str, Any]]) -> list[str]:
    before, after = (float(metrics[arm]["caption_map_spread"]) for arm in ("before", "after"))
    if not after < COLLAPSE * before:
        return []
    return [
        f"Beware: the spread of the caption’s map fell from {before:.3f} to {after:.3f}; the maps may be collapsing, "
        "which min-max normalisation hides."
    ]


def write_demo_report(path: Path, result: DemoResult) -> None:
    """Write the page: finding, figures, bias by kind of word, training curves, gallery, settings, sources.

    One self-contained HTML file: style, script and pictures are inside, and a content policy forbids all else. It
    reads without the script too.

    Args:
        path: where to write.
        result: all that is shown; every string in it is escaped.

    Raises:
        InputError: the path cannot be written, or the maps of a scene are not all of its caption and the same tags.
        MissingDependencyError: matplotlib, whose colour map is used, is not installed.
    """
    finding = describe(result.arms())
    gallery = [_gallery_item(number, len(result.gallery), item) for number, item in enumerate(result.gallery, start=1)]
    about = " · ".join(
        f"{page.text(key)} {page.text(result.settings[key])}"
        for key in ("backbone", "seed", "steps")
        if key in result.settings
    )
    body = f"""<header>
<p class="about">ttd demo{" · " + about if about else ""}</p>
<h1>{page.text(finding.headline)}</h1>
<p class="lead"><dfn>Single tag bias</dfn>: the map of a whole caption lights up one of the things that it names and
misses the others. TTD teaches the caption’s map to cover what the maps of its single words cover. It is compared with
the model before, and with a <dfn>control</dfn>: the same steps, data, parameters and seed by the contrastive term
alone, or any further training would be mistaken for TTD.</p>
{_tiles(result.arms())}
<ul class="finding">{"".join(f"<li>{page.text(sentence)}</li>" for sentence in finding.sentences)}</ul>
<nav aria-label="Sections"><a href="#figures">Figures</a> <a href="#bias">Bias</a> <a href="#training">Training</a>
<a href="#gallery">Gallery</a> <a href="#settings">Settings</a></nav>
</header>
{_figures_section(result.arms())}
{_bias_section(result.arms())}
{_training_section(result.curves)}
{_gallery_section(gallery)}
{_settings_section(result.settings)}
<footer>
<p>{page.text(result.attribution)}</p>
{page.method_note()}
</footer>
"""
    style = page.heat_style() + "".join(
        _gallery_style(number, item) for number, item in enumerate(result.gallery, start=1)
    )
    whole = page.document(
        f"{finding.headline} – ttd demo", body, sheets=("base.css", "demo.css"), style=style, scripts=("demo.js",)
    )
    save_bytes(path, whole.encode("utf-8"))


def _change(change: float | None, than: str = "") -> str:
    """A difference as a badge whose sign, arrow and colour say the same."""
    if change is None:
        return '<span class="change">n/a</span>'
    if abs(change) < page.TIE:
        sign, kind = "=", "same"
    else:
        sign, kind = ("▲", "better") if change > 0 else ("▼", "worse")
    signed = f"{change:+.3f}".replace("-", "−")
    return f'<span class="change {kind}"><span aria-hidden="true">{sign}</span> {signed}{than}</span>'


def _tiles(metrics: Mapping[Arm, Mapping[str, Any]]) -> str:
    tiles = [
        f'<li><span class="name">{page.text(_NAMES[key])}</span> <strong>{page.number(metrics["after"][key])}</strong> '
        f"{_change(difference(metrics, key))} "
        f'<span class="from"><span>before {page.number(metrics["before"][key])},</span> '
        f"<span>control {page.number(metrics['control'][key])}</span></span></li>"
        for key in _TILES
    ]
    return f'<ul class="tiles">{"".join(tiles)}</ul>'


def _figures_section(metrics: Mapping[Arm, Mapping[str, Any]]) -> str:
    rows = []
    for figure in _FIGURES:
        values = "".join(f"<td>{page.number(metrics[arm][figure.key])}</td>" for arm in ARMS)
        last = _change(difference(metrics, figure.key)) if figure.judged else '<span class="change">–</span>'
        rows.append(
            f'<tbody class="{"judged" if figure.judged else "context"}"><tr>'
            f'<th scope="rowgroup" id="f-{figure.key}">{page.text(figure.name)}</th>{values}<td>{last}</td></tr>'
            f'<tr class="meaning"><td colspan="5" headers="f-{figure.key}">{page.text(figure.meaning)}</td></tr>'
            "</tbody>"
        )
    heads = "".join(f'<th scope="col">{name}</th>' for name in ARMS.values())
    return f"""<section id="figures" aria-labelledby="figures-title">
<h2 id="figures-title">Figures</h2>
<p>Over {int(metrics["after"]["scenes"])} held-out scenes, from 0 to 1 but for the counts and the spread. The
difference is to the better of before and control; less than {page.TIE} counts as none. One run: other seeds give other
figures.</p>
<table class="figures">
<thead><tr><th scope="col">Figure</th>{heads}<th scope="col">Difference</th></tr></thead>
{"".join(rows)}
</table>
</section>"""


def _bias_section(metrics: Mapping[Arm, Mapping[str, Any]]) -> str:
    present = {kind for arm in ARMS for kind in metrics[arm]["caption_map_in_tag"]}
    groups = []
    for kind in [*(k for k in _KINDS if k in present), *sorted(present - set(_KINDS))]:
        bars = []
        for arm, name in ARMS.items():
            value = float(metrics[arm]["caption_map_in_tag"].get(kind, math.nan))
            width = 100 * min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0
            bars.append(
                f'<span class="arm">{name}</span><span class="track" aria-hidden="true">'
                f'<span class="bar {arm}" style="width:{width:.1f}%"></span></span>'
                f'<span class="value">{page.number(value)}</span>'
            )
        groups.append(f'<div class="bars"><h3>{page.text(_KINDS.get(kind, kind))}</h3>{"".join(bars)}</div>')
    return f"""<section id="bias" aria-labelledby="bias-title">
<h2 id="bias-title">Bias by kind of word</h2>
<p>How bright the caption’s map is, from 0 to 1, inside the things that the caption names, by how often a word occurs
in training captions. Without bias the four kinds would have bars of one length.</p>
<div class="chart">{"".join(groups) or "<p>No true tags were measured.</p>"}</div>
</section>"""


_PANELS = (
    ("losses", "contrastive", "Contrastive loss", "Both trainings have it; it keeps captions and pictures together."),
    ("losses", "tag", "Tag loss", "Each tag’s map against its own min-max target."),
    ("losses", "distill", "Distillation loss", "The caption’s map against the union of the selected tags’ maps."),
    ("statistics", "caption_map_spread", "Spread of the caption’s map", "Towards zero would be collapse."),
    ("statistics", "selected_per_caption", "Selected tags per caption", "None or all would be collapse."),
)


def _training_section(curves: Mapping[str, Sequence[StepReport]]) -> str:
    panels = []
    for part, key, title, meaning in _PANELS:
        lines = {}
        for run, reports in curves.items():
            points = [(r.step, getattr(r, part)[key]) for r in reports if key in getattr(r, part)]
            finite = [(step, value) for step, value in points if math.isfinite(value)]
            if finite:
                lines[run] = finite
        if lines:
            panels.append(
                f"<figure><figcaption><b>{page.text(title)}</b> {page.text(meaning)}</figcaption>"
                f"{_chart(title, lines)}</figure>"
            )
    body = f'<div class="curves">{"".join(panels)}</div>' if panels else "<p>No steps were taken.</p>"
    return f"""<section id="training" aria-labelledby="training-title">
<h2 id="training-title">Training</h2>
<p>Over optimiser steps: <span class="key ttd">TTD</span> <span class="key control">control</span>. Thin lines are
single batches, thick ones a running mean.</p>
{body}
</section>"""


_CHART = (340, 170)
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 24


def _chart(title: str, lines: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Lines of (step, value) by training as an inline SVG, with its last values in the text alternative."""
    width, height = _CHART
    steps = [step for line in lines.values() for step, _ in line]
    values = [value for line in lines.values() for _, value in line]
    ticks = page.ticks(min(values), max(values))
    first, last = min(steps), max(steps)

    def x(step: float) -> float:
        return _LEFT + (width - _LEFT - _RIGHT) * (step - first) / max(last - first, 1)

    def y(value: float) -> float:
        return height - _BOTTOM - (height - _TOP - _BOTTOM) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    drawn = [
        f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t:.4g}</text>'
        for t in ticks
    ]
    drawn.append(
        f'<text class="tick" x="{_LEFT}" y="{height - 6}">step {first}</text>'
        f'<text class="tick" x="{width - _RIGHT}" y="{height - 6}" text-anchor="end">{last}</text>'
    )
    for run, line in lines.items():
        raw = page.thinned(line)
        smooth = page.running_mean(raw)
        for style, points in (("raw", raw), ("mean", smooth)):
            path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
            drawn.append(f'<polyline class="{style} {page.text(run)}" points="{path}"/>')
    label = "; ".join(f"{run} from {line[0][1]:.4g} to {line[-1][1]:.4g}" for run, line in lines.items())
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{page.text(f"{title} over steps: {label}")}">'
        f"{''.join(drawn)}</svg>"
    )


def _gallery_section(articles: Sequence[str]) -> str:
    if not articles:
        return """<section id="gallery" aria-labelledby="gallery-title"><h2 id="gallery-title">Gallery</h2>
<p>No scenes were chosen.</p></section>"""
    return f"""<section id="gallery" aria-labelledby="gallery-title">
<h2 id="gallery-title">Gallery</h2>
<p>Each map runs from its own lowest to its own highest similarity: colours say where, not how much. The white line is
the true region of what the caption or the tag names. In captions, <mark class="true">words in the picture</mark>,
<mark class="absent">words for what is absent</mark> and <mark class="filler">other candidate words</mark> are
underlined differently.</p>
<p class="scale"><span>lowest</span><span class="ramp" aria-hidden="true"></span>
<span>highest similarity</span></p>
<div class="controls">
<label for="opacity">Opacity of the maps</label>
<input id="opacity" type="range" min="0" max="100" value="{round(100 * HEAT_ALPHA)}">
<output id="opacity-value" for="opacity">{round(100 * HEAT_ALPHA)} %</output>
<label class="check"><input id="outline" type="checkbox" checked> True region</label>
<button id="all-tags" type="button" aria-pressed="false">Show all tags</button>
</div>
{"".join(articles)}
</section>"""


def _gallery_style(number: int, item: GalleryItem) -> str:
    """The picture and the outline of one scene, stored once and used under each of its maps."""
    height, width = item.scene.image.shape[:2]
    return (
        f"#scene-{number} {{ --ratio: {width} / {height}; --picture: url({png_data_uri(item.scene.image)}); "
        f"--outline: url({png_data_uri(page.outline(item.scene.named_region))}); }}\n"
    )


def _gallery_item(number: int, total: int, item: GalleryItem) -> str:
    scene, stages = item.scene, {"before": item.before, "control": item.control, "after": item.after}
    for maps in stages.values():
        if maps.caption != scene.caption or maps.tags != item.before.tags:
            raise InputError(f"the maps of scene {number} must be of the caption {scene.caption!r} and the same tags")
    ious = {arm: float(item.caption_iou[arm]) for arm in ARMS}
    change = ious["after"] - max(ious["before"], ious["control"])
    pictures = [
        '<figure><div class="frame" role="img" aria-label="The picture alone"></div>'
        "<figcaption>Picture</figcaption></figure>",
        '<figure><div class="frame map truth"><img src="'
        + png_data_uri(_shade(scene.named_region))
        + f'" alt="True region of {page.text(", ".join(scene.true_tags))}"></div>'
        "<figcaption>Truth</figcaption></figure>",
        _map_figure(item, item.before.union, "Union of the selected tags’ maps before TTD", "Tags’ union, before"),
    ]
    alternatives = {"before": "before", "control": "under the control", "after": "after TTD"}
    for arm, name in ARMS.items():
        pictures.append(
            _map_figure(
                item,
                stages[arm].caption_map_normalized,
                f"Map of the caption, {alternatives[arm]}, IoU {page.number(ious[arm])}",
                name,
                f"<b>IoU {page.number(ious[arm])}</b>",
            )
        )
    cut = '<p class="note">The caption is longer than the context: its end was not read.</p>'
    tags = _tag_cards(item)
    return f"""<article id="scene-{number}" aria-labelledby="scene-{number}-title">
<h3 id="scene-{number}-title"><span class="count">Scene {number} of {total}</span> {_verdict(ious, change)}</h3>
<p class="caption">“{_marked_caption(scene, item.before.tags)}”</p>
{cut if item.before.truncated else ""}<div class="row">{"".join(pictures)}</div>
<details><summary>{page.plural(len(item.before.tags), "tag")}: maps and scores before and after</summary>
<div class="tags">{tags}</div></details>
</article>
"""


def _verdict(ious: Mapping[Arm, float], change: float) -> str:
    """Badges of a scene: against the better of before and control, and whether its map is still poor."""
    if abs(change) < page.TIE:
        kind, words = "same", "No change"
    elif change > 0:
        kind, words = "better", "Improved"
    else:
        kind, words = "worse", f"Worse than {'before' if ious['before'] >= ious['control'] else 'the control'}"
    badges = f'<span class="verdict {kind}">{words}</span> {_change(change, " IoU")}'
    if ious["after"] < POOR_IOU:
        badges += f' <span class="verdict worse">Failure: IoU below {POOR_IOU}</span>'
    return badges


def _marked_caption(scene: Scene, tags: Sequence[str]) -> str:
    """The caption, escaped, with its candidate tags marked as in the picture, absent or other."""
    caption = printable(scene.caption)
    names = sorted({printable(tag) for tag in tags} - {""}, key=len, reverse=True)
    if not names:
        return page.text(caption)
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, names))})(?!\w)", re.IGNORECASE)
    parts = []
    for position, piece in enumerate(pattern.split(caption)):
        escaped = html.escape(piece)
        parts.append(f'<mark class="{_truth(scene, piece)}">{escaped}</mark>' if position % 2 else escaped)
    return "".join(parts)


def _truth(scene: Scene, tag: str) -> str:
    name = tag.lower()
    return "true" if name in scene.true_tags else "absent" if name in scene.absent_tags else "filler"


def _shade(region: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Darkness outside a region, RGBA ``[height, width, 4]``."""
    drawn = np.zeros((*region.shape, 4), np.uint8)
    drawn[~region] = (10, 8, 12, 190)
    return drawn


def _heat(item: GalleryItem, heat: NDArray[np.floating]) -> str:
    height, width = item.scene.image.shape[:2]
    scale = HEAT_SIDE / max(height, width)
    levels = heat_levels(heat, max(round(height * scale), 1), max(round(width * scale), 1))
    return png_data_uri(levels, colour_table())


def _map_figure(item: GalleryItem, heat: NDArray[np.floating], alternative: str, title: str, note: str = "") -> str:
    return (
        f'<figure><div class="frame map"><img class="heat" src="{_heat(item, heat)}" '
        f'alt="{page.text(alternative)}"></div><figcaption>{page.text(title)} {note}</figcaption></figure>'
    )


def _tag_cards(item: GalleryItem) -> str:
    words = {"true": "in the picture", "absent": "absent", "filler": "another word"}
    cards = []
    for tag, name in enumerate(item.before.tags):
        truth = _truth(item.scene, name)
        maps = []
        for title, found in (("Before", item.before), ("After", item.after)):
            kept = bool(found.selected[tag])
            right = kept == (truth == "true")
            verdict = ("kept" if kept else "dropped") + ("" if right else ", wrongly")
            score = page.number(float(found.scores[tag]))
            maps.append(
                _map_figure(
                    item,
                    found.tag_maps_normalized[tag],
                    f"Map of “{name}”, {title.lower()}: score {score}, {verdict}",
                    title,
                    f'<b>{score}</b> <span class="{"right" if right else "wrong"}">{verdict}</span>',
                )
            )
        outline = f"url({png_data_uri(page.outline(item.scene.masks[name.lower()]))})" if truth == "true" else "none"
        cards.append(
            f'<div class="tag" style="--outline:{outline}">'
            f'<h4><mark class="{truth}">{page.text(name)}</mark> <span>{words[truth]}</span></h4>'
            f'<div class="pair">{"".join(maps)}</div></div>'
        )
    union = [
        _map_figure(item, found.union, f"Union of the selected tags’ maps, {title.lower()}", title)
        for title, found in (("Before", item.before), ("After", item.after))
    ]
    cards.append(
        '<div class="tag"><h4>Union <span>target of the caption</span></h4>'
        f'<div class="pair">{"".join(union)}</div></div>'
    )
    return "".join(cards)


def _settings_section(settings: Mapping[str, Any]) -> str:
    return f"""<section id="settings" aria-labelledby="settings-title">
<h2 id="settings-title">Settings</h2>
{page.definitions(settings)}
</section>"""
