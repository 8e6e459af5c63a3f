"""Parts that both tabs of the page share: the gallery, the image with its note, and the order of answers."""

from __future__ import annotations

import threading
from abc import ABCMeta
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ttd_plugins.app.examples import Example
from ttd_plugins.app.rendering import render_credit, render_error, render_group, render_image_note
from ttd_plugins.app.studio import error_sentence
from ttd_plugins.data.images import open_image, read_image

PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
"""Settings of every listener: no address in the API, and the page's own progress."""
BROWSER_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
"""Formats that a browser shows; an image of another one is converted for it."""


@dataclass(frozen=True)
class Tab:
    """What the page needs of a tab.

    Attributes:
        examples: those of its gallery; the first one is answered when the tab is opened.
        leave: frees what the page stores for a visitor.
    """

    examples: list[Example]
    leave: Callable[[str], None]


class LatestRequest:
    """Which request of a visitor is the newest, so that a slower old one does not replace its result."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._newest: dict[str, object] = {}

    def begin(self, visitor: str) -> Callable[[], bool]:
        """Begin a request; returns a function that says whether it is still the visitor's newest."""
        mine = object()
        with self._guard:
            self._newest[visitor] = mine
        return lambda: self._newest.get(visitor) is mine

    def forget(self, visitor: str) -> None:
        """Drop the visitor, whose requests all end."""
        with self._guard:
            self._newest.pop(visitor, None)


def with_request(gr: Any, listener: Callable[..., Any]) -> Callable[..., Any]:
    """Annotate a listener so that Gradio passes the request as ``request``; it evaluates no string annotations."""
    listener.__annotations__ = {"request": gr.Request}
    return listener


def visitor(request: Any) -> str:
    """Id of the visitor who sent a request."""
    return str(request.session_hash or "")


@dataclass(frozen=True)
class UploadState:
    """What the page says of an uploaded image.

    Attributes:
        note: HTML of one sentence.
        usable: whether the image can be read.
        shown: the image for a browser that does not show its format, or ``None``.
    """

    note: str
    usable: bool
    shown: Image.Image | None = None


def check_upload(path: str | None) -> UploadState:
    """Read an uploaded image at once, so that a file that cannot be used is reported before anything is computed."""
    if path is None:
        return UploadState("", usable=False)
    name = Path(path).name
    try:
        with open_image(path, name) as opened:
            known = opened.format in BROWSER_FORMATS
        image = read_image(path, name)
    except Exception as error:
        return UploadState(render_error(f"{error_sentence(error, name)}; choose another file"), usable=False)
    note = render_image_note(f"{name}, {image.width} × {image.height} pixels.")
    return UploadState(note, usable=True, shown=None if known else image)


def example_note(example: Example, *, captioned: bool = True) -> str:
    """The note below the image of an example: its author and licence, or that it is drawn."""
    if example.credit is not None:
        return render_credit(example.credit, captioned=captioned)
    return render_image_note("A scene that the package draws, with its caption.")


def image_input(gr: Any, element: str, uploaded_path: Callable[[Any], str | None]) -> Any:
    """Return a component that takes an uploaded or pasted image.

    Args:
        gr: gradio.
        element: id of its element.
        uploaded_path: returns the path of an upload inside gradio's folder.
    """

    def preprocess(component: Any, payload: Any) -> str | None:
        return uploaded_path(payload)

    # Gradio opens the file itself and fails without a sentence; read_image says what is wrong. It makes the component
    # anew for each visitor, so the class has the method. The metaclass would write a .pyi file beside this one.
    kind = ABCMeta.__new__(type(gr.Image), "Image", (gr.Image,), {"preprocess": preprocess})
    return kind(
        type="filepath",
        image_mode=None,
        format="png",
        sources=["upload", "clipboard"],
        label="Image",
        height=220,
        buttons=[],
        elem_id=element,
        alt_text="The chosen image",
    )


def add_gallery(gr: Any, groups: Mapping[str, Sequence[Example]]) -> list[tuple[Any, Example]]:
    """Add a button with a thumbnail for each example; ``thumbnails_css`` draws the thumbnails.

    Args:
        gr: gradio.
        groups: title of each group to its examples.

    Returns:
        Each button and its example.
    """
    buttons = []
    with gr.Row(elem_classes="ttd-gallery"):
        for title, examples in groups.items():
            with gr.Column(scale=len(examples), min_width=0):
                gr.HTML(render_group(title), apply_default_css=False, padding=False)
                with gr.Row(elem_classes="ttd-thumbs"):
                    for one in examples:
                        button = gr.Button(
                            one.label,
                            size="sm",
                            min_width=0,
                            elem_id=f"ttd-example-{one.key}",
                            elem_classes="ttd-thumb",
                        )
                        buttons.append((button, one))
    return buttons


def checked_upload(gr: Any, path: str | None, text: str, given: Collection[str]) -> tuple[Any, Any, UploadState]:
    """What becomes of image and text when an image is chosen or removed.

    Args:
        gr: gradio.
        path: the uploaded image, or ``None`` if it was removed.
        text: caption or names in the page; dropped where it belongs to an example, and so describes another image.
        given: texts of the examples that were answered.

    Returns:
        The image and the text for the page, each unchanged where possible, so that a visitor's input stays; and what
        the page says of the image.
    """
    state = check_upload(path)
    image = state.shown if state.shown is not None else gr.skip() if state.usable or path is None else None
    return image, "" if text in given else gr.skip(), state
