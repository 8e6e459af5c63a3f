"""Colours of charts and pages, in light and in dark; charts and stylesheets take them from here only."""

from __future__ import annotations

PALETTE: dict[str, tuple[str, str]] = {
    "page": ("#faf8f5", "#161412"),
    "card": ("#ffffff", "#201d1a"),
    "ink": ("#1f1d1a", "#efebe5"),
    "muted": ("#625c54", "#b0a89d"),
    "line": ("#e2dcd3", "#3a352f"),
    "shade": ("#d3cbbf", "#4a443d"),
    "before": ("#8a837a", "#9d958a"),
    "control": ("#2b6cb0", "#74aef0"),
    "after": ("#b8430d", "#ff9757"),
    "better": ("#136c3a", "#7fdca0"),
    "better-soft": ("#e1f3e6", "#17331f"),
    "worse": ("#ae1f1f", "#ff9d95"),
    "worse-soft": ("#fbe6e4", "#43201d"),
    "tentative": ("#74550a", "#e6c46a"),
    "tentative-soft": ("#f8efd6", "#3b3118"),
    "same-soft": ("#efebe5", "#322d28"),
    "series-0": ("#0b62a4", "#77b0ee"),
    "series-1": ("#a8480a", "#ffa063"),
    "series-2": ("#00755d", "#4fd0a8"),
    "series-3": ("#87479f", "#cf9be6"),
    "series-4": ("#856400", "#e0bd4a"),
    "series-5": ("#b81f5b", "#ff84b0"),
    "series-6": ("#4a5a6a", "#a9b8c8"),
    "series-7": ("#6b4420", "#d0a988"),
}
"""Role to (light, dark). Light colours differ from each other, so that a colour in an SVG names its role."""

SERIES = 8
"""Colours of backbones; from the ninth backbone they repeat, and the backbone's number identifies it."""


def light(role: str) -> str:
    """The colour of a role on white, which is what files use."""
    return PALETTE[role][0]


def series_role(number: int) -> str:
    """The role of the backbone with this number, counted from 0."""
    return f"series-{number % SERIES}"


def css_variables(dark: str = "") -> str:
    """Every role as a CSS variable, light or dark.

    Args:
        dark: selector of the dark elements, if the page itself chooses the scheme. By default the browser's colour
            scheme decides, on screens only, because a browser may print while its colour scheme is dark.
    """
    light_rules, dark_rules = (
        " ".join(f"--{role}: {colours[scheme]};" for role, colours in PALETTE.items()) for scheme in (0, 1)
    )
    if dark:
        return f":root {{ {light_rules} }}\n{dark} {{ {dark_rules} }}\n"
    return (
        f":root {{ color-scheme: light; {light_rules} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; {dark_rules} }} }}\n"
    )
