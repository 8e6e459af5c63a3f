"""The tab of the page with the maps of a caption and its tags; see :meth:`ttd_plugins.app.studio.Studio.watch`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
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
from ttd_plugins.app.examples import Example, ExampleAnswers, caption_examples, thumbnails_css
from ttd_plugins.app.rendering import (
    render_error,
    render_message,
    render_note,
    render_opacity,
    render_progress,
    render_result,
)
from ttd_plugins.app.studio import MAX_STEPS, AppResult, Studio, TuningStoppedError, error_sentence

DEFAULT_STEPS = 60


def scene_thumbnails(examples: Sequence[Example]) -> str:
    """Thumbnails of the scenes as HTML; they are drawn after the page is shown, because that takes a second."""
    css = thumbnails_css([one for one in examples if one.credit is None])
    return f"<style>{css}</style>"


class _Answers:
    """The listeners that answer with maps."""

    def __init__(self, gr: Any, studio: Studio, prepared: ExampleAnswers) -> None:
        self.gr, self.studio, self.prepared = gr, studio, prepared
        self.latest, self.texts = LatestRequest(), set[str]()

    def pages(self, results: Callable[[], Iterator[AppResult]], who: str) -> Iterator[str]:
        """The result as HTML whenever a stage begins or ends, until the visitor asks for something else."""
        current = self.latest.begin(who)
        try:
            for result in results():
                if not current():
                    return
                yield render_result(result)
        except Exception as error:
            if current():
                yield render_error(error_sentence(error, "showing this image"))

    def show(self, image: str | None, caption: str, names: list[str], who: str) -> Iterator[str]:
        """Answer to an image and a caption."""
        yield from self.pages(lambda: self.studio.watch(image, caption, names, who), who)

    def fill(self, one: Example, names: Sequence[str]) -> tuple[Any, ...]:
        """Image, caption, backbones and note of an example."""
        try:
            image, caption = one.open()
        except Exception:
            # The answer that follows says why.
            return (self.gr.skip(),) * 4
        self.texts.add(caption)
        return image, caption, one.fitting(names), example_note(one)

    def example(self, one: Example, names: Sequence[str], who: str) -> Iterator[str]:
        """Answer to an example."""
        yield from self.pages(lambda: self.prepared.watch(one, one.fitting(names), who), who)

    def upload(self, path: str | None, caption: str, who: str) -> tuple[Any, ...]:
        """Check an image as soon as it is chosen or removed: image, caption, note and result."""
        self.latest.begin(who)
        image, text, state = checked_upload(self.gr, path, caption, self.texts)
        return image, text, state.note, render_message("empty-caption" if state.usable else "empty")

    def tune(
        self, name: str, steps: int, image: str | None, caption: str, names: list[str], who: str
    ) -> Iterator[tuple[Any, ...]]:
        """Fine-tune a backbone, then show its maps: progress, result, and the two buttons."""
        skip, update = self.gr.skip(), self.gr.update
        busy, idle = update(interactive=False), update(interactive=True)
        reports: queue.Queue[Any] = queue.Queue()
        finished: list[Any] = []

        def work() -> None:
            try:
                self.studio.tune(name, steps, who, on_step=reports.put)
                reports.put(None)
            except BaseException as error:
                reports.put(error)

        yield render_progress("loading, or waiting for another fine-tuning", 0, steps), skip, busy, idle
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while True:
                report = reports.get()
                if report is None or isinstance(report, BaseException):
                    break
                finished.append(report)
                text = f"step {report.step} of {steps} · loss {report.loss:.3f}"
                yield render_progress(text, report.step, steps), skip, busy, idle
        finally:
            # The visitor has left the page.
            if thread.is_alive():
                self.studio.stop(who)
        done = (update(interactive=True), update(interactive=False))
        if isinstance(report, TuningStoppedError):
            yield render_note(str(report)), skip, *done
        elif report is not None:
            yield render_error(error_sentence(report, f"fine-tuning {name}")), skip, *done
        else:
            note = f"{name} is fine-tuned; the maps show it as “after”"
            if image is None or not caption.strip():
                yield render_note(f"{note} once there is an image and a caption.", finished), skip, *done
                return
            for page in self.show(image, caption, list(dict.fromkeys([*names, name])), who):
                yield render_note(f"{note}.", finished), page, *done


def add_maps_tab(
    gr: Any, studio: Studio, uploaded_path: Callable[[Any], str | None], page: Any, prepared: ExampleAnswers
) -> Tab:
    """Add the components and listeners of the tab to the tab that is open.

    Args:
        gr: gradio.
        studio: the backbones of the page.
        uploaded_path: returns the path of an upload inside gradio's folder.
        page: the blocks; the first example is answered when they are loaded.
        prepared: answers to the examples.
    """
    groups = caption_examples(studio)
    examples = [one for group in groups.values() for one in group]
    answers = _Answers(gr, studio, prepared)
    buttons = add_gallery(gr, groups)
    thumbnails = gr.HTML(elem_id="ttd-scene-thumbnails", apply_default_css=False, padding=False)
    with gr.Row(equal_height=False, elem_classes="ttd-columns"):
        with gr.Column(scale=7, min_width=300):
            gr.HTML(render_opacity(), apply_default_css=False, padding=False)
            result = gr.HTML(render_message("empty"), elem_id="ttd-output", apply_default_css=False, padding=False)
        with gr.Column(scale=4, min_width=300):
            image = image_input(gr, "ttd-image", uploaded_path)
            note = gr.HTML(elem_id="ttd-note", elem_classes="ttd-image-note", apply_default_css=False, padding=False)
            caption = gr.Textbox(
                label="Caption", placeholder="a dog beside an umbrella on the grass", max_lines=4, elem_id="ttd-caption"
            )
            names = gr.CheckboxGroup(
                studio.backbones, value=studio.backbones[:1], label="Backbones", elem_id="ttd-backbones"
            )
            run = gr.Button("Show maps", variant="primary", elem_id="ttd-run")
            with gr.Accordion("Fine-tune here", open=False, visible=bool(studio.tunable), elem_id="ttd-tuning"):
                gr.HTML(
                    render_note(
                        "TTD on generated scenes, on this machine; only you see the result. A step takes about "
                        "half a second on two cores."
                    ),
                    apply_default_css=False,
                    padding=False,
                )
                target = gr.Dropdown(
                    studio.tunable, value=next(iter(studio.tunable), None), label="Backbone", filterable=False
                )
                steps = gr.Slider(
                    1, MAX_STEPS, value=DEFAULT_STEPS, step=1, label="Steps", buttons=[], elem_id="ttd-steps"
                )
                with gr.Row():
                    begin = gr.Button("Fine-tune", elem_id="ttd-tune", min_width=100)
                    end = gr.Button("Stop", interactive=False, elem_id="ttd-stop", min_width=100)
                progress = gr.HTML(elem_id="ttd-progress", apply_default_css=False, padding=False)
    given = [image, caption, names]

    def show(image, caption, names, request) -> Iterator[Any]:  # type: ignore[no-untyped-def]
        yield from answers.show(image, caption, names, visitor(request))
        # Gradio sends the last output again when a generator ends, which may be after a newer result.
        yield gr.skip()

    def example(one: Example) -> Callable[..., Any]:
        def listener(names, request) -> Iterator[Any]:  # type: ignore[no-untyped-def]
            yield from answers.example(one, names, visitor(request))
            yield gr.skip()

        return with_request(gr, listener)

    def upload(image, caption, request) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        return answers.upload(image, caption, visitor(request))

    def tune(name, steps, image, caption, names, request) -> Iterator[Any]:  # type: ignore[no-untyped-def]
        yield from answers.tune(str(name), int(steps), image, caption, names, visitor(request))

    def halt(request) -> None:  # type: ignore[no-untyped-def]
        studio.stop(visitor(request))

    many = {"concurrency_limit": 4, "trigger_mode": "multiple", **PRIVATE}
    for trigger in (run.click, caption.submit):
        trigger(with_request(gr, show), given, result, **many)
    for trigger, one in [*((button.click, one) for button, one in buttons), (page.load, examples[0])]:
        # In two steps, because Gradio merges what a generator yields for an image in a way that breaks it.
        filled = trigger(partial(answers.fill, one), names, [image, caption, names, note], **PRIVATE)
        filled.then(example(one), names, result, **many)
    page.load(lambda: scene_thumbnails(examples), None, thumbnails, **PRIVATE)
    checked = [image, caption, note, result]
    image.upload(with_request(gr, upload), [image, caption], checked, **PRIVATE)
    # The event comes while the component still has its old value.
    image.clear(with_request(gr, lambda text, request: upload(None, text, request)), caption, checked, **PRIVATE)
    begin.click(
        with_request(gr, tune),
        [target, steps, *given],
        [progress, result, begin, end],
        concurrency_limit=8,
        **PRIVATE,
    )
    end.click(with_request(gr, halt), None, None, queue=False, **PRIVATE)
    return Tab(examples, answers.latest.forget)
