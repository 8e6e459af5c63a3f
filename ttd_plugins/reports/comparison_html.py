"""The page that ``ttd compare`` ends in: one HTML file that needs no network, and says first what was found."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttd_plugins.comparison.results import ARMS, Arm, BackboneResult, Comparison, Metric, Picture, TagView, View
from ttd_plugins.errors import InputError
from ttd_plugins.reports import page
from ttd_plugins.reports.comparison_charts import (
    ARM_LABELS,
    curve_chart,
    curve_keys,
    curve_lines,
    series,
    trade_off_chart,
    trade_off_figures,
)
from ttd_plugins.reports.comparison_findings import VERDICT_WORDS, Change, change, describe_comparison, mean
from ttd_plugins.reports.heatmaps import HEAT_ALPHA, colour_table, jpeg_data_uri, png_data_uri, printable, save_bytes

# A picture is shown at about 220 CSS pixels; more would only make the file large.
PICTURE_SIDE = 480
# Below this side a PNG is small, and keeps drawn scenes sharp.
PNG_SIDE = 160
OUTLINE_SIDE = 200
HEAT_COLOURS = 64
POOR_IOU = 0.5
CURVE_LABELS = {
    "loss": "Loss, whole",
    "contrastive": "Contrastive loss",
    "tag": "Tag loss",
    "distill": "Distillation loss",
}


def write_comparison_report(path: Path, comparison: Comparison) -> None:
    """Write the page: finding, table, trade-off, curves, gallery, backbones, warnings, settings.

    One self-contained HTML file: style, script and pictures are inside, and a content policy forbids all else. It
    reads without the script too, which sorts, selects maps and backbones, and sets the opacity.

    Args:
        path: where to write.
        comparison: all that is shown; every string in it is escaped. Arms that were not run, figures that are
            ``None`` and an empty gallery are said to be so.

    Raises:
        InputError: the path cannot be written, or a map or picture has a wrong shape or values.
        MissingDependencyError: there is a gallery, and matplotlib, whose colour map is used, is not installed.
    """
    finding = describe_comparison(comparison)
    warnings = _warnings_section(comparison)
    sections = [
        ("figures", "Figures", _figures_section(comparison)),
        ("trade-off", "Trade-off", _trade_off_section(comparison)),
        ("training", "Training", _training_section(comparison)),
        ("gallery", "Gallery", _gallery_section(comparison)),
        ("backbones", "Backbones", _backbones_section(comparison)),
        ("warnings", "Warnings", warnings),
        ("settings", "Settings", _settings_section(comparison.settings)),
    ]
    sections = [section for section in sections if section[2]]
    links = " ".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
    body = f"""<header>
<p class="about">{_about(comparison)}</p>
<h1>{page.text(finding.headline)}</h1>
<ul class="finding">{"".join(f"<li>{page.text(sentence)}</li>" for sentence in finding.sentences)}</ul>
<p class="lead"><dfn>Single tag bias</dfn>: the map of a whole caption lights up one of the things that it names and
misses the others. TTD teaches the caption’s map to cover what the maps of its single words cover. Each backbone is
measured <dfn>before</dfn>, after the same steps, data and seeds by the contrastive term alone (the
<dfn>control</dfn>), and <dfn>after TTD</dfn>. What TTD does is the difference to the control.</p>
<nav aria-label="Sections">{links}</nav>
</header>
{"".join(section for _, _, section in sections)}
<footer>
{f"<p>{page.text(comparison.attribution)}</p>" if comparison.attribution else ""}
{page.method_note()}
</footer>
"""
    style = page.heat_style() + _gallery_style(comparison.gallery) if comparison.gallery else ""
    whole = page.document(
        f"{finding.headline} – ttd compare",
        body,
        sheets=("base.css", "comparison.css"),
        style=style,
        scripts=("comparison.js",),
    )
    save_bytes(path, whole.encode("utf-8"))


def _about(comparison: Comparison) -> str:
    settings = comparison.settings
    data = settings.get("data")
    name = data.get("name") if isinstance(data, Mapping) else data
    seeds = max((len(runs) for b in comparison.backbones for runs in b.metrics.values()), default=0)
    parts = ["ttd compare", page.plural(len(comparison.backbones), "backbone")]
    parts += [str(name)] if name else []
    if any(backbone.metrics.get("after") for backbone in comparison.backbones):
        parts.append(page.plural(seeds, "seed"))
        parts += [f"{settings['steps']} steps"] if "steps" in settings else []
    return " · ".join(map(page.text, parts))


def _section(key: str, title: str, body: str) -> str:
    return (
        f'<section id="{key}" aria-labelledby="{key}-title">\n<h2 id="{key}-title">{title}</h2>\n{body}\n</section>\n'
    )


def _name(number: int, backbone: str) -> str:
    """A backbone's number in its colour, and its name, whole."""
    # Long names break where their parts meet.
    name = re.sub(r"(?<=[:/@+_-])(?=.)", "<wbr>", page.text(backbone))
    return f'<span class="chip {series(number)}" aria-hidden="true">{number + 1}</span> {name}'


# Figures --------------------------------------------------------------------------------------------------------------


def _figures_section(comparison: Comparison) -> str:
    heads = [_head("Backbone", "text", "ascending"), _head("Arm", "arm", "ascending")]
    for figure in comparison.metrics:
        first = "ascending" if figure.better == "lower" else "descending"
        heads.append(_head(figure.label, "number", first, {"higher": "↑", "lower": "↓"}.get(figure.better or "", "")))
    rows: list[str] = []
    begun: set[str] = set()
    for number, backbone in enumerate(comparison.backbones):
        for place, arm in enumerate(ARMS):
            if backbone.metrics.get(arm):
                cells = "".join(_cell(backbone, arm, figure) for figure in comparison.metrics)
                first = "" if backbone.name in begun else " first"
                begun.add(backbone.name)
                rows.append(
                    f'<tr class="{arm}{first}"><th scope="row" data-sort="{page.text(backbone.name.lower())}">'
                    f"{_name(number, backbone.name)}</th>"
                    f'<td class="arm" data-sort="{place}"><span class="swatch {arm}" aria-hidden="true"></span>'
                    f"{ARM_LABELS[arm]}</td>{cells}</tr>"
                )
    if not rows or not comparison.metrics:
        return _section("figures", "Figures", "<p>Nothing was measured.</p>")
    meanings = "".join(
        f"<div><dt>{page.text(figure.label)}{f', {figure.better} is better' if figure.better else ''}</dt>"
        f"<dd>{page.text(figure.meaning)}</dd></div>"
        for figure in comparison.metrics
    )
    return _section(
        "figures",
        "Figures",
        f"""<p>Mean ± sample standard deviation over seeds. Under each figure after TTD stands its difference to the
control of the same seed, or to before where no control was run: a difference no larger than its own spread over seeds
is called <em>within the spread</em>, and one below {page.TIE} <em>no change</em>. A click on a heading sorts.</p>
<div class="scroll" role="region" aria-label="Table of figures, scrolls sideways" tabindex="0">
<table class="sortable"><thead><tr>{"".join(heads)}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>
<p class="sr" aria-live="polite" id="sorted"></p>
<details class="meanings"><summary>What the figures mean</summary><dl>{meanings}</dl></details>""",
    )


def _head(label: str, kind: str, first: str, arrow: str = "") -> str:
    """A heading that sorts; ``first`` is the direction of the first click, with the best on top."""
    direction = "higher" if arrow == "↑" else "lower"
    better = f'&nbsp;<span class="way">{arrow}<span class="sr"> {direction} is better</span></span>'
    return (
        f'<th scope="col" data-kind="{kind}" data-first="{first}" data-label="{page.text(label)}" aria-sort="none">'
        f'<button type="button">{page.text(label)}{better if arrow else ""}'
        '&nbsp;<span class="arrow" aria-hidden="true"></span></button></th>'
    )


def _cell(backbone: BackboneResult, arm: Arm, figure: Metric) -> str:
    value = mean(backbone, arm, figure.key)
    if value is None:
        return '<td data-sort=""><span class="missing">n/a</span></td>'
    spread = backbone.spread(arm, figure.key)
    shown = f'<span class="mean">{page.number(value)}</span>'
    if spread is not None:
        shown += f' <span class="spread">± {page.number(spread)}</span>'
    if arm == "after":
        shown += _badge(change(backbone, figure))
    return f'<td data-sort="{value!r}">{shown}</td>'


def _badge(found: Change | None) -> str:
    """A change as text whose sign, word and colour say the same."""
    if found is None:
        return '<span class="change">change n/a</span>'
    sign = {"better": "▲ ", "worse": "▼ "}.get(found.verdict, "")
    word = VERDICT_WORDS[found.verdict]
    against = "" if found.baseline == "control" else " than before" if word in ("better", "worse") else " to before"
    shown = f'<span aria-hidden="true">{sign}</span>' if sign else ""
    return (
        f'<span class="change {found.verdict}">{shown}{found.signed}'
        f"{f'<br><span class=word>{word}{against}</span>' if word else ''}</span>"
    )


# Plots ----------------------------------------------------------------------------------------------------------------


def _trade_off_section(comparison: Comparison) -> str:
    wide = trade_off_chart(comparison, 760, 440, names=True)
    axes = trade_off_figures(comparison)
    if not wide or axes is None:
        keys = " and ".join(comparison.trade_off)
        return _section(
            "trade-off", "Trade-off", f"<p>No backbone has both figures of this plot, {page.text(keys)}.</p>"
        )
    up, cost = axes
    arms = {arm for backbone in comparison.backbones for arm in ARMS if backbone.metrics.get(arm)}
    legend = "".join(
        f'<li><svg class="icon" viewBox="0 0 16 16" aria-hidden="true">{mark}</svg> {label}</li>'
        for arm, mark, label in (
            ("before", '<circle class="mark before" cx="8" cy="8" r="5.5"/>', "before"),
            ("control", '<rect class="mark control" x="3" y="3" width="10" height="10"/>', "control"),
            ("after", '<circle class="mark after" cx="8" cy="8" r="6"/>', "after TTD"),
        )
        if arm in arms
    )
    if "after" in arms:
        dot = '<circle class="dot" cx="8" cy="8" r="2.6"/>'
        legend += f'<li><svg class="icon" viewBox="0 0 16 16" aria-hidden="true">{dot}</svg> one seed</li>'
    for arm, label in (("before", "from before"), ("control", "from the control")):
        if {"after", arm} <= arms:
            way = f'<line class="way {arm}" x1="1" x2="27" y1="8" y2="8"/>'
            legend += f'<li><svg class="icon long" viewBox="0 0 28 16" aria-hidden="true">{way}</svg> {label}</li>'
    names = "".join(f"<li>{_name(n, backbone.name)}</li>" for n, backbone in enumerate(comparison.backbones))
    return _section(
        "trade-off",
        "Trade-off",
        f"""<p>What TTD should raise against what it may cost: {page.text(up.label)} upwards,
{page.text(cost.label)} to the right. An arrow that leads up and not to the left gains without paying.</p>
<figure class="plot">{wide}{trade_off_chart(comparison, 360, 340, names=False)}
<ul class="legend">{legend}</ul><ul class="legend names">{names}</ul></figure>""",
    )


def _training_section(comparison: Comparison) -> str:
    keys = curve_keys(comparison)
    panels = []
    shown = []
    for key in keys:
        label = CURVE_LABELS.get(key, key.replace("_", " ").capitalize())
        lines = {n: found for n, b in enumerate(comparison.backbones) if (found := curve_lines(b, key))}
        if not lines:
            continue
        shown.append((key, label))
        figures = "".join(
            f"<figure><figcaption><b>{_name(n, comparison.backbones[n].name)}</b></figcaption>"
            f"{curve_chart(f'{label} of {comparison.backbones[n].name}', found)}</figure>"
            for n, found in lines.items()
        )
        panels.append(
            f'<div class="part" data-part="{len(shown) - 1}"><h3>{page.text(label)}</h3>'
            f'<div class="curves">{figures}</div></div>'
        )
    if not panels:
        return ""
    options = "".join(f'<option value="{n}">{page.text(label)}</option>' for n, (_, label) in enumerate(shown))
    return _section(
        "training",
        "Training",
        f"""<p>Over the optimiser’s steps: <span class="key after">TTD</span> <span class="key control">control</span>.
Thin lines are single seeds, thick ones a running mean of their mean. The whole loss of TTD has more terms than the
control’s, so the two may be compared by the contrastive loss only. Each backbone has a scale of its own.</p>
<p class="pick scripted"><label for="curve">Curve</label> <select id="curve">{options}</select></p>
{"".join(panels)}""",
    )


# Gallery --------------------------------------------------------------------------------------------------------------


def _gallery_section(comparison: Comparison) -> str:
    if not comparison.gallery:
        return _section("gallery", "Gallery", "<p>No pictures were chosen.</p>")
    names = [backbone.name for backbone in comparison.backbones]
    arms = [arm for arm in ARMS if any(arm in v for p in comparison.gallery for v in p.views.values())]
    boxes = "".join(
        f'<label><input type="checkbox" class="backbone" value="{n}" checked> {_name(n, name)}</label>'
        for n, name in enumerate(names)
    )
    control = (
        '<label class="check"><input id="control" type="checkbox"> Control</label>'
        if {"control", "after"} <= set(arms)
        else ""
    )
    articles = "".join(
        _article(number, len(comparison.gallery), picture, names, arms)
        for number, picture in enumerate(comparison.gallery, start=1)
    )
    percent = round(100 * HEAT_ALPHA)
    truth = any(picture.truth for picture in comparison.gallery)
    outline = "The white line is the true region of what the caption, or the chosen tag, names." if truth else ""
    check = '<label class="check"><input id="outline" type="checkbox" checked> True region</label>' if truth else ""
    return _section(
        "gallery",
        "Gallery",
        f"""<p>The same pictures and captions for every backbone, first seed. Each map runs from its own lowest to its
own highest similarity: colours say where, not how much. {outline}</p>
<p class="scale"><span>lowest</span><span class="ramp" aria-hidden="true"></span> <span>highest similarity</span></p>
<div class="controls scripted">
<label for="opacity">Opacity</label>
<input id="opacity" type="range" min="0" max="100" value="{percent}">
<output id="opacity-value" for="opacity">{percent} %</output>
{check}{control}
<details class="chooser"><summary>Backbones: <span id="shown">{len(names)} of {len(names)}</span></summary>
<fieldset><legend class="sr">Backbones that are shown</legend>{boxes}</fieldset></details>
</div>
{articles}""",
    )


def _tags_of(picture: Picture) -> list[tuple[str, int]]:
    """Every tag that some backbone has, by its text and place, in the caption's order."""
    found = {
        (tag.text, tag.start): None for views in picture.views.values() for view in views.values() for tag in view.tags
    }
    return sorted(found, key=lambda tag: (tag[1] < 0, tag[1]))


def _article(number: int, total: int, picture: Picture, names: Sequence[str], arms: Sequence[Arm]) -> str:
    tags = _tags_of(picture)
    truths = {_folded(tag) for tag in picture.truth}
    ident = f"picture-{number}"
    options = "".join(
        f'<label><input type="radio" name="{ident}-map" value="{n}"> <span>'
        f'<mark class="{_truth(text, truths)}">{page.text(text)}</mark></span></label>'
        for n, (text, _) in enumerate(tags)
    )
    cards = "".join(
        _card(n, name, picture, picture.views[name], tags, truths)
        for n, name in enumerate(names)
        if name in picture.views
    )
    named = ", ".join(picture.truth)
    drawn = "The picture" + (f", with the true regions of {named} outlined" if named else "")
    true_tags = f"True tags: <b>{page.text(named)}</b>" if named else "What is truly in the picture is not known."
    caption = (
        f'<label><input type="radio" name="{ident}-map" value="caption" checked> <span>whole caption</span></label>'
    )
    return f"""<article id="{ident}" aria-labelledby="{ident}-title">
<h3 id="{ident}-title"><span class="count">Picture {number} of {total}</span> {_counts(picture)}</h3>
{f'<p class="why">{page.text(picture.why[:1].upper() + picture.why[1:])}</p>' if picture.why else ""}
<div class="intro">
<figure><div class="frame truth"><div class="edge" role="img" aria-label="{page.text(drawn)}"></div></div>
<figcaption>{page.text(picture.key)}</figcaption></figure>
<div><p class="caption">“{_marked(picture.caption, tags, truths)}”</p>
<p class="true-tags">{true_tags}</p>
<fieldset class="maps scripted"><legend>Map</legend>
{caption}{options}</fieldset></div>
</div>
<div class="cards">{cards or '<p class="note">No backbone has a map of this picture.</p>'}</div>
</article>
"""


def _counts(picture: Picture) -> str:
    """Badges of a picture: on how many backbones its Caption IoU rose and fell, and how many are poor."""
    better = worse = poor = known = 0
    for views in picture.views.values():
        last = views.get("after") or views.get("before")
        first = views.get("control") or views.get("before")
        if last is None or last.iou is None:
            continue
        known += 1
        poor += last.iou < POOR_IOU
        if "after" in views and first is not None and first.iou is not None:
            better += last.iou - first.iou >= page.TIE
            worse += first.iou - last.iou >= page.TIE
    badges = []
    if better:
        badges.append(f'<span class="verdict better">▲ better on {better} of {known}</span>')
    if worse:
        badges.append(f'<span class="verdict worse">▼ worse on {worse} of {known}</span>')
    if poor:
        badges.append(f'<span class="verdict">failure on {poor} of {known}: IoU below {POOR_IOU}</span>')
    return " ".join(badges)


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _truth(tag: str, truths: set[str]) -> str:
    return "true" if _folded(tag) in truths else "filler"


def _marked(caption: str, tags: Sequence[tuple[str, int]], truths: set[str]) -> str:
    """The caption, escaped, with its tags marked where they start."""
    parts, end = [], 0
    for text, start in tags:
        if start >= end and start + len(text) <= len(caption):
            marked = _piece(caption[start : start + len(text)])
            parts.append(f'{_piece(caption[end:start])}<mark class="{_truth(text, truths)}">{marked}</mark>')
            end = start + len(text)
    return "".join(parts) + _piece(caption[end:])


def _piece(text: str) -> str:
    """Part of a caption, escaped; the spaces at its ends are kept."""
    return "".join(
        (" " if text[:1].isspace() else "", page.text(text), " " if text[-1:].isspace() and text.strip() else "")
    )


def _card(
    number: int,
    name: str,
    picture: Picture,
    views: Mapping[Arm, View],
    tags: Sequence[tuple[str, int]],
    truths: set[str],
) -> str:
    arms = [arm for arm in ARMS if arm in views]
    figures = "".join(_map_figure(name, arm, views, tags) for arm in arms)
    rows = []
    for n, (text, start) in enumerate(tags):
        cells = "".join(
            f'<td class="{arm}">{_selection(_find(views[arm], text, start), text, truths)}</td>' for arm in arms
        )
        rows.append(
            f'<tr data-tag="{n}"><th scope="row"><mark class="{_truth(text, truths)}">{page.text(text)}</mark></th>'
            f"{cells}</tr>"
        )
    table = (
        f'<table class="scores"><thead><tr><th scope="col">Tag</th>'
        f"{''.join(f'<th scope=col class={arm}>{ARM_LABELS[arm]}</th>' for arm in arms)}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
        if rows
        else '<p class="none">No candidate tags.</p>'
    )
    return (
        f'<div class="card" data-backbone="{number}"><h4>{_name(number, name)}</h4>'
        f'<div class="pair">{figures}</div>{table}</div>'
    )


def _find(view: View, text: str, start: int) -> TagView | None:
    return next((tag for tag in view.tags if (tag.text, tag.start) == (text, start)), None)


def _selection(tag: TagView | None, text: str, truths: set[str]) -> str:
    """Score and selection of a tag; told right from wrong where the truth is known."""
    if tag is None:
        return "–"
    kept = "kept" if tag.selected else "dropped"
    wrong = bool(truths) and tag.selected != (_folded(text) in truths)
    kind = ("wrong" if wrong else "right") if truths else ""
    mark = "✓" if tag.selected else "✗"
    told = f'<span class="{kind}"><span aria-hidden="true">{mark}</span> {kept}{", wrongly" if wrong else ""}</span>'
    return f"<b>{tag.score:.2f}</b> {told}"


def _map_figure(name: str, arm: Arm, views: Mapping[Arm, View], tags: Sequence[tuple[str, int]]) -> str:
    view = views[arm]
    iou = "" if view.iou is None else f"IoU {page.number(view.iou)}"
    label = page.text(f"{ARM_LABELS[arm]}: map of the caption by {name}{', ' + iou if iou else ''}")
    layers = [f'<img class="heat" data-map="caption" src="{_heat(view.caption)}" alt="{label}">']
    notes = [f'<span data-map="caption">{f"<b>{iou}</b>" if iou else ""}{_iou_change(arm, views)}</span>']
    for n, (text, start) in enumerate(tags):
        tag = _find(view, text, start)
        if tag is None:
            notes.append(f'<span data-map="{n}" hidden>no candidate here</span>')
            continue
        kept = "kept" if tag.selected else "dropped"
        label = page.text(f"{ARM_LABELS[arm]}: map of “{text}” by {name}, score {tag.score:.2f}, {kept}")
        layers.append(f'<img class="heat" data-map="{n}" src="{_heat(tag.heat)}" alt="{label}" hidden>')
        notes.append(f'<span data-map="{n}" hidden><b>{tag.score:.2f}</b> {kept}</span>')
    return (
        f'<figure class="{arm}"><div class="frame map">{"".join(layers)}</div>'
        f"<figcaption>{ARM_LABELS[arm]} {''.join(notes)}</figcaption></figure>"
    )


def _iou_change(arm: Arm, views: Mapping[Arm, View]) -> str:
    if arm != "after":
        return ""
    first = views.get("control") or views.get("before")
    last = views["after"]
    if first is None or first.iou is None or last.iou is None:
        return ""
    value = last.iou - first.iou
    against = "control" if "control" in views else "before"
    kind, sign = ("same", "=") if abs(value) < page.TIE else ("better", "▲") if value > 0 else ("worse", "▼")
    return (
        f' <span class="change {kind}"><span aria-hidden="true">{sign}</span> {page.signed(value)} vs {against}</span>'
    )


@cache
def _palette() -> NDArray[np.uint8]:
    return colour_table()[np.linspace(0, 255, HEAT_COLOURS).round().astype(int)]


def _heat(heat: NDArray[np.floating[Any]]) -> str:
    """A map as a palette PNG of its own patch grid, which the browser enlarges."""
    if heat.ndim != 2 or not heat.size or not np.isfinite(heat).all():
        raise InputError(f"a heat map must be finite and of shape [H, W]; this one has shape {list(heat.shape)}")
    levels = (heat * (HEAT_COLOURS - 1)).round().clip(0, HEAT_COLOURS - 1).astype(np.uint8)
    return png_data_uri(levels, _palette())


def _picture_uri(image: NDArray[np.uint8]) -> str:
    """A picture for the page: no larger than is shown; photographs as JPEG, small drawings as PNG."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"a picture must be uint8 [height, width, 3]; this one is {image.dtype} {list(image.shape)}")
    if max(image.shape[:2]) <= PNG_SIDE:
        return png_data_uri(image)
    picture = Image.fromarray(image)
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    return jpeg_data_uri(picture, quality=82, optimize=True)


def _outline_uri(region: NDArray[np.bool_]) -> str:
    """The border of a region, drawn at a size that stays a thin line on the page."""
    height, width = region.shape
    scale = min(OUTLINE_SIDE / max(height, width), 1.0)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    small = np.asarray(Image.fromarray(region).resize(size, Image.Resampling.NEAREST), dtype=bool)
    return png_data_uri(page.outline(small))


def _gallery_style(gallery: Sequence[Picture]) -> str:
    """Picture and outlines of each article, stored once and used under each of its maps."""
    rules = []
    for number, picture in enumerate(gallery, start=1):
        height, width = picture.image.shape[:2]
        for tag, region in picture.truth.items():
            if region.shape != (height, width):
                raise InputError(
                    f"picture {picture.key!r}: the mask of {tag!r} is {list(region.shape)}, but the picture is "
                    f"{[height, width]}"
                )
        lines = {"caption": "none"}
        if picture.truth:
            lines["caption"] = f"url({_outline_uri(np.logical_or.reduce(list(picture.truth.values())))})"
        regions = {_folded(tag): region for tag, region in picture.truth.items()}
        for n, (text, _) in enumerate(_tags_of(picture)):
            own = regions.get(_folded(text))
            lines[str(n)] = "none" if own is None else f"url({_outline_uri(own)})"
        held = "".join(f"--outline-{key}: {value}; " for key, value in lines.items())
        rules.append(
            f"#picture-{number} {{ --ratio: {width} / {height}; --picture: url({_picture_uri(picture.image)}); "
            f"{held}--outline: var(--outline-caption); }}\n"
        )
    return "".join(rules)


# The rest -------------------------------------------------------------------------------------------------------------


def _backbones_section(comparison: Comparison) -> str:
    columns = list(dict.fromkeys(key for backbone in comparison.backbones for key in backbone.about))
    timed = any(backbone.seconds for backbone in comparison.backbones)
    if not columns and not timed:
        return ""
    heads = "".join(f'<th scope="col">{page.text(_words(key))}</th>' for key in columns)
    heads += '<th scope="col">time</th>' if timed else ""
    rows = []
    for number, backbone in enumerate(comparison.backbones):
        cells = "".join(f"<td>{_value(backbone.about.get(key))}</td>" for key in columns)
        if timed:
            cells += f"<td>{_duration(sum(backbone.seconds.values())) if backbone.seconds else '–'}</td>"
        rows.append(f'<tr><th scope="row">{_name(number, backbone.name)}</th>{cells}</tr>')
    return _section(
        "backbones",
        "Backbones",
        f"""<div class="scroll" role="region" aria-label="Table of backbones, scrolls sideways" tabindex="0">
<table class="plain"><thead><tr><th scope="col">Backbone</th>{heads}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>""",
    )


def _words(key: object) -> str:
    return str(key).replace("_", " ")


def _value(value: Any) -> str:
    """A value of a table as short escaped text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value / 1e6:.1f} M" if value >= 10**6 else f"{value:,}".replace(",", " ")
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, Mapping):
        return "<br>".join(f"{page.text(_words(key))} {_value(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        if len(value) == 2 and all(isinstance(one, int) for one in value):
            return " × ".join(map(str, value))
        return page.text(", ".join(map(str, value)))
    shown = printable(str(value))
    # A hash is no reading matter.
    if len(shown) >= 32 and all(c in "0123456789abcdef" for c in shown):
        return f'<code title="{html.escape(shown)}">{shown[:10]}…</code>'
    return html.escape(shown)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "n/a"
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


def _warnings_section(comparison: Comparison) -> str:
    told = [(number, backbone) for number, backbone in enumerate(comparison.backbones) if backbone.warnings]
    if not told and not comparison.failures:
        return ""
    parts = [
        f"<h3>{_name(number, backbone.name)}</h3>"
        f"<ul>{''.join(f'<li>{page.text(warning)}</li>' for warning in backbone.warnings)}</ul>"
        for number, backbone in told
    ]
    parts += [
        f'<h3>{page.text(name)} <span class="verdict worse">failed, left out</span></h3><p>{page.text(reason)}</p>'
        for name, reason in comparison.failures.items()
    ]
    return _section("warnings", "Warnings", "".join(parts))


def _settings_section(settings: Mapping[str, Any]) -> str:
    command = settings.get("command")
    repeat = (
        f'<pre class="command">{page.text(command)}</pre>'
        if command
        else "<p>These settings decide the result. <code>results.json</code>, beside this page, has them for a "
        "program, with the figures of every seed; the same command in the same folder takes up what is finished.</p>"
    )
    rest = {key: value for key, value in settings.items() if key != "command"}
    return _section("settings", "Settings and how to repeat", repeat + page.definitions(rest))
