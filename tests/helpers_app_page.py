"""A visitor's tab of the page of `ttd app`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WAIT = 60_000
COMPLETE = ".ttd-result[data-stage='']"
"""A result of which no stage is left."""


class Watched:
    """A visitor's tab, and what went wrong or away in it; by default the first example is answered."""

    def __init__(self, browser: Any, address: str, *, answered: bool = True, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(WAIT)
        self.troubles: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda said: self.troubles.append(said.text) if said.type == "error" else None)
        self.tab.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(address)
        self.tab.wait_for_selector("#ttd-run")
        if answered:
            self.tab.wait_for_selector(f"#ttd-output {COMPLETE}")

    def close(self, address: str) -> None:
        hosts = {urlsplit(url).netloc for url in self.requests if url.startswith(("http", "ws"))}
        assert hosts == {urlsplit(address).netloc}
        assert self.troubles == []
        self.context.close()

    def remove(self, image: str = "#ttd-image") -> None:
        """Remove the image that is shown."""
        self.tab.locator(f"{image} button[aria-label='Remove Image']").click()
        self.tab.wait_for_selector(f"{image} input[type=file]", state="attached")
        self.tab.wait_for_selector(f"#{'ttd-output' if image == '#ttd-image' else 'ttd-segment-output'} .ttd-empty")

    def upload(self, file: Path, image: str = "#ttd-image") -> None:
        """Upload a file that can be read, instead of the image that is shown."""
        self.remove(image)
        self.tab.locator(f"{image} input[type=file]").set_input_files(file)
        note = "#ttd-note" if image == "#ttd-image" else "#ttd-segment-note"
        self.tab.locator(note, has_text=file.name).wait_for()

    def show(self) -> None:
        self.tab.locator("#ttd-run").click()

    def set_slider(self, name: str, value: str) -> None:
        """Type a number, again where Gradio mounts the slider only then and puts its first value back."""
        number, slider = (self.tab.locator(f"{name} input[type={kind}]") for kind in ("number", "range"))
        deadline = time.monotonic() + WAIT / 1000
        while slider.input_value() != value:
            assert time.monotonic() < deadline, f"{name} does not take {value}"
            number.fill(value)
            number.press("Enter")
            self.tab.wait_for_timeout(300)


def contrast(tab: Any, selector: str, paper: str = "") -> float:
    """Contrast ratio of the text of an element and its background, or that of the element ``paper``."""
    ink, ground = (
        luminance(tab.locator(where).first.evaluate(f"e => getComputedStyle(e).{what}"))
        for where, what in ((selector, "color"), (paper or selector, "backgroundColor"))
    )
    return (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance of a computed colour, WCAG 2."""
    numbers = colour[colour.index("(") + 1 : colour.index(")")].replace("srgb", "").replace("/", " ").replace(",", " ")
    parts = [float(part) for part in numbers.split()[:3]]
    if "srgb" not in colour:
        parts = [part / 255 for part in parts]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
