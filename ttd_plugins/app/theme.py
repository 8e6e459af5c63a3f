"""The looks of ``ttd app``: the palette of the reports as a theme of Gradio, and the page's stylesheet and script."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from typing import Any

from ttd_plugins.reports.palette import PALETTE
from ttd_plugins.reports.templating import stylesheet

FONTS = {"font": ["system-ui", "-apple-system", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
"""Fonts of the system: the page loads none."""

ROLES: dict[str, tuple[str, ...]] = {
    "page": ("body_background_fill", "checkbox_label_background_fill_hover", "input_background_fill"),
    "card": (
        "background_fill_primary", "background_fill_secondary", "block_background_fill", "block_label_background_fill",
        "checkbox_background_color", "checkbox_label_background_fill", "checkbox_label_background_fill_selected",
        "panel_background_fill",
    ),
    "ink": (
        "body_text_color", "block_title_text_color", "button_secondary_text_color", "button_secondary_text_color_hover",
        "checkbox_label_text_color", "checkbox_label_text_color_selected",
    ),
    "muted": ("body_text_color_subdued", "block_label_text_color", "block_info_text_color", "input_placeholder_color"),
    "line": (
        "button_secondary_background_fill_hover", "border_color_primary", "block_border_color",
        "block_label_border_color", "input_border_color",
    ),
    "shade": (
        "checkbox_border_color", "checkbox_label_border_color", "button_secondary_border_color",
        "button_secondary_border_color_hover",
    ),
    "same-soft": ("button_secondary_background_fill",),
    "after": (
        "border_color_accent", "button_primary_background_fill", "button_primary_background_fill_hover",
        "button_primary_border_color", "button_primary_border_color_hover", "checkbox_background_color_selected",
        "checkbox_border_color_selected", "checkbox_border_color_focus", "checkbox_label_border_color_selected",
        "input_border_color_focus", "link_text_color", "link_text_color_active", "link_text_color_hover",
        "link_text_color_visited", "slider_color",
    ),
}  # fmt: skip
"""Role of the palette to the settings of Gradio's theme that take its colours, in light and in dark."""


def make_theme(gr: Any) -> Any:
    """Gradio's default theme in the colours of the reports; text on every button has a contrast of at least 4.5."""
    colours = {"color_accent": "var(--after)", "block_border_width": "1px", "block_label_border_width": "1px"}
    for role, settings in ROLES.items():
        for setting in settings:
            colours[setting], colours[f"{setting}_dark"] = PALETTE[role]
    for state in ("", "_hover"):
        setting = f"button_primary_text_color{state}"
        colours[setting], colours[f"{setting}_dark"] = PALETTE["card"][0], PALETTE["page"][1]
    return gr.themes.Default(**FONTS).set(**colours)


def page_head(styles: Iterable[str] = ()) -> str:
    """HTML for the head of the page: its stylesheets and its script.

    Args:
        styles: further rules.
    """
    files = resources.files("ttd_plugins.app")
    layout, script = (files.joinpath(name).read_text(encoding="utf-8") for name in ("app.css", "app.js"))
    css = "\n".join((str(stylesheet("heat_overlay.css", dark=".dark")), layout, *styles))
    return f"<style>{css}</style><script>{script}</script>"
