"""The tab of the page that segments an image by names; see :meth:`ttd_plugins.app.studio.Studio.segment`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ttd_plugins.app.rendering import render_credit, render_error, render_message, render_segmentation
from ttd_plugins.app.studio import Studio, error_sentence
from ttd_plugins.embedded.photo_examples import EXAMPLES as PHOTOGRAPHS
from ttd_plugins.embedded.photo_examples import photograph, photograph_credit

EXAMPLES = (
    ("000000078499.jpg", "horse, grass, mountain, water, sky"),
    ("000000121647.jpg", "pizza, wine glass, book, table"),
    ("000000252639.jpg", "bus, car, road, sky, tree"),
    ("000000358083.jpg", "cat, mirror, wall"),
)
"""File name of a photograph of the package, and names to look for in it."""


def image_input(gr: Any, element: str, uploaded_path: Callable[[Any], str | None]) -> Any:
    """Return a component that takes an uploaded or pasted image.

    Args:
        gr: gradio.
        element: id of its element.
        uploaded_path: returns the path of an upload inside gradio's folder.
    """
    image = gr.Image(
        type="filepath",
        image_mode=None,
        format="png",
        sources=["upload", "clipboard"],
        label="Image",
        height=280,
        buttons=[],
        elem_id=element,
    )
    # Gradio opens the file itself and fails without a sentence; read_image says what is wrong.
    image.preprocess = uploaded_path
    return image


def add_segment_tab(gr: Any, studio: Studio, uploaded_path: Callable[[Any], str | None]) -> None:
    """Add the components and listeners of the tab to the tab that is open.

    Args:
        gr: gradio.
        studio: the backbones of the page.
        uploaded_path: returns the path of an upload inside gradio's folder.
    """

    def show(image: str | None, names: str, backbone: str, background: bool) -> str:
        try:
            found = studio.segment(image, names, str(backbone or ""), "words" if background else "none")
            return render_segmentation(found)
        except Exception as error:
            return render_error(error_sentence(error, "segmenting this image"))

    def example(number: int, names: str) -> tuple[Any, Any, str]:
        credit = render_credit(photograph_credit(number), "Segment", captioned=False)
        return photograph(number)[0], names, credit

    numbers = {file: number for number, (file, _) in enumerate(PHOTOGRAPHS)}
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            image = image_input(gr, "ttd-segment-image", uploaded_path)
            with gr.Row(elem_id="ttd-segment-examples"):
                examples = [
                    (gr.Button(f"Photo {place + 1}", size="sm", min_width=64), numbers[file], names)
                    for place, (file, names) in enumerate(EXAMPLES)
                ]
            names = gr.Textbox(label="Names", placeholder="dog, grass, sky", lines=2, elem_id="ttd-segment-names")
            backbone = gr.Dropdown(
                studio.backbones,
                value=studio.backbones[0],
                label="Backbone",
                filterable=False,
                elem_id="ttd-segment-backbone",
            )
            background = gr.Checkbox(
                value=True, label="Leave out what no name describes", elem_id="ttd-segment-background"
            )
            run = gr.Button("Segment", variant="primary", elem_id="ttd-segment-run")
        with gr.Column(scale=7, min_width=300):
            result = gr.HTML(
                render_message("empty-segmentation"), elem_id="ttd-segment-output", apply_default_css=False
            )
    hidden = {"api_visibility": "private"}
    for trigger in (run.click, names.submit):
        trigger(show, [image, names, backbone, background], result, concurrency_limit=2, **hidden)
    for button, number, text in examples:
        button.click(partial(example, number, text), None, [image, names, result], **hidden)
