"""The tab of the page that segments an image by names; see :meth:`ttd_plugins.app.studio.Studio.segment`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ttd_plugins.app.components import (
    PRIVATE,
    LatestRequest,
    Tab,
    add_gallery,
    checked_upload,
    example_note,
    image_input,
    visitor,
    with_request,
)
from ttd_plugins.app.examples import Example, name_examples
from ttd_plugins.app.rendering import render_error, render_message, render_segmentation, render_segmentation_stage
from ttd_plugins.app.studio import SegmentationStage, Studio, error_sentence


def add_segment_tab(gr: Any, studio: Studio, uploaded_path: Callable[[Any], str | None], tab: Any) -> Tab:
    """Add the components and listeners of the tab to the tab that is open.

    Args:
        gr: gradio.
        studio: the backbones of the page.
        uploaded_path: returns the path of an upload inside gradio's folder.
        tab: the tab; its first example is answered when it is opened.
    """
    latest, texts, begun = LatestRequest(), set[str](), set[str]()
    groups = name_examples(studio)
    examples = [one for group in groups.values() for one in group]

    def segment(image: Any, names: str, backbone: str, background: bool, who: str) -> Iterator[str]:
        current = latest.begin(who)
        try:
            for found in studio.watch_segmentation(
                image, names, str(backbone or ""), "words" if background else "none"
            ):
                if not current():
                    return
                stage = isinstance(found, SegmentationStage)
                yield render_segmentation_stage(found) if stage else render_segmentation(found)  # type: ignore[arg-type]
        except Exception as error:
            if current():
                yield render_error(error_sentence(error, "segmenting this image"))

    def show(image, names, backbone, background, request) -> Iterator[Any]:  # type: ignore[no-untyped-def]
        yield from segment(image, names, backbone, background, visitor(request))
        # Gradio sends the last output again when a generator ends, which may be after a newer result.
        yield gr.skip()

    def fill(one: Example) -> tuple[Any, ...]:
        opened, names = one.open()
        texts.add(names)
        return opened, names, example_note(one, captioned=False)

    def begin(image, names, request) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        if image is not None or names:
            return (gr.skip(),) * 3
        begun.add(visitor(request))
        return fill(examples[0])

    def first(backbone, background, request) -> Iterator[Any]:  # type: ignore[no-untyped-def]
        if visitor(request) in begun:
            begun.discard(visitor(request))
            yield from segment(*examples[0].open(), backbone, background, visitor(request))
        yield gr.skip()

    def example(one: Example) -> Callable[..., Any]:
        def listener(backbone, background, request) -> Iterator[Any]:  # type: ignore[no-untyped-def]
            yield from segment(*one.open(), backbone, background, visitor(request))
            yield gr.skip()

        return with_request(gr, listener)

    def leave(who: str) -> None:
        latest.forget(who)
        begun.discard(who)

    def upload(path, names, request) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        latest.begin(visitor(request))
        shown, text, state = checked_upload(gr, path, names, texts)
        return shown, text, state.note, render_message("empty-segmentation")

    buttons = add_gallery(gr, groups)
    with gr.Row(equal_height=False, elem_classes="ttd-columns"):
        with gr.Column(scale=7, min_width=300):
            result = gr.HTML(
                render_message("empty-segmentation"),
                elem_id="ttd-segment-output",
                apply_default_css=False,
                padding=False,
            )
        with gr.Column(scale=4, min_width=300):
            image = image_input(gr, "ttd-segment-image", uploaded_path)
            note = gr.HTML(
                elem_id="ttd-segment-note", elem_classes="ttd-image-note", apply_default_css=False, padding=False
            )
            names = gr.Textbox(
                label="Names, separated by commas",
                placeholder="dog, grass, sky",
                max_lines=4,
                elem_id="ttd-segment-names",
            )
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
    given, shown = [image, names, backbone, background], [image, names, note, result]
    for trigger in (run.click, names.submit):
        trigger(with_request(gr, show), given, result, concurrency_limit=2, trigger_mode="multiple", **PRIVATE)
    chosen = [image, names, note]
    for button, one in buttons:
        # In two steps, because Gradio merges what a generator yields for an image in a way that breaks it.
        filled = button.click(partial(fill, one), None, chosen, **PRIVATE)
        filled.then(example(one), [backbone, background], result, trigger_mode="multiple", **PRIVATE)
    opened = tab.select(with_request(gr, begin), [image, names], chosen, **PRIVATE)
    opened.then(with_request(gr, first), [backbone, background], result, **PRIVATE)
    image.upload(with_request(gr, upload), [image, names], shown, **PRIVATE)
    # The event comes while the component still has its old value.
    image.clear(with_request(gr, lambda text, request: upload(None, text, request)), names, shown, **PRIVATE)
    return Tab(examples, leave)
