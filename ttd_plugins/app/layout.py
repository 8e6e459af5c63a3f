"""The Gradio page around a :class:`~ttd_plugins.app.studio.Studio`; all that knows Gradio is here.

No analytics, no fonts from elsewhere, no tunnel: nothing leaves the machine.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from importlib import resources
from typing import Any

from ttd_plugins.app.page import render_error, render_note, render_progress, render_result
from ttd_plugins.app.studio import MOST_STEPS, Studio, TuningStoppedError, told
from ttd_plugins.errors import InputError, MissingDependencyError, one_sentence

EXAMPLES = 4
DEFAULT_STEPS = 60
LARGEST_FILE = "64mb"
EMPTY = '<div class="ttd-empty">Drop a picture, say what it shows, and press <b>Show maps</b>.</div>'
TITLE = """<div class="ttd-title"><h1>TTD: what a caption’s words light up</h1>
<p>The map of a whole caption leans on one of its words. See it, and what Text-Tag Self-Distillation does to it, on a
picture of yours.</p></div>"""
SCROLL_ON_A_PHONE = """() => {
  if (window.innerWidth < 700) document.querySelector("#ttd-opacity").scrollIntoView({ behavior: "smooth" });
}"""
SET_OPACITY = "(value) => document.documentElement.style.setProperty('--ttd-heat', value / 100)"


def import_gradio() -> Any:
    """Gradio, with its analytics switched off before it is imported.

    Raises:
        MissingDependencyError: it is not installed, or only half.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except Exception as error:  # a half-installed dependency of it fails with more than ImportError
        raise MissingDependencyError(
            f"the page needs gradio, which cannot be imported ({type(error).__name__}: {one_sentence(error)}); run: "
            "pip install 'ttd-plugins[app]'"
        ) from error
    return gradio


def build_page(studio: Studio) -> Any:
    """The ``gradio.Blocks`` of a studio.

    Raises:
        MissingDependencyError: gradio is not installed.
    """
    gr = import_gradio()

    def visitor(request: Any) -> str:
        return str(request.session_hash or "")

    def shown(picture: str | None, caption: str, names: list[str], who: str) -> str:
        try:
            return render_result(studio.view(picture, caption, names, who))
        except Exception as error:
            return render_error(told(error, "this picture"))

    # Annotations of a request are read when a listener is made, and are strings under deferred evaluation.
    def show(picture: str | None, caption: str, names: list[str], request) -> str:  # type: ignore[no-untyped-def]
        return shown(picture, caption, names, visitor(request))

    def tune(name, steps, picture, caption, names, request) -> Iterator[Any]:  # type: ignore[no-untyped-def]
        who = visitor(request)
        busy, idle = gr.update(interactive=False), gr.update(interactive=True)
        reports: queue.Queue[Any] = queue.Queue()

        def work() -> None:
            try:
                studio.tune(str(name), int(steps), who, on_step=reports.put)
                reports.put(None)
            except BaseException as error:
                reports.put(error)

        yield render_progress("loading, or waiting for another fine-tuning", 0, int(steps)), gr.skip(), busy, idle
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while True:
                report = reports.get()
                if report is None or isinstance(report, BaseException):
                    break
                text = f"step {report.step} of {int(steps)} · loss {report.loss:.3f}"
                yield render_progress(text, report.step, int(steps)), gr.skip(), busy, idle
        finally:
            # Left behind by a visitor who went away.
            if thread.is_alive():
                studio.stop(who)
        done = (gr.update(interactive=True), gr.update(interactive=False))
        if isinstance(report, TuningStoppedError):
            yield render_note(str(report)), gr.skip(), *done
        elif report is not None:
            yield render_error(told(report, f"fine-tuning {name}")), gr.skip(), *done
        else:
            note = f"{name} is fine-tuned; the maps show it as “after”"
            if picture is None or not caption.strip():
                yield render_note(f"{note} once there is a picture and a caption."), gr.skip(), *done
            else:
                names = list(dict.fromkeys([*names, name]))
                yield render_note(f"{note}."), shown(picture, caption, names, who), *done

    def example(number: int) -> tuple[Any, Any, Any]:
        try:
            picture, caption = studio.example(number)
        except Exception as error:
            return gr.skip(), gr.skip(), render_error(told(error, "drawing a scene"))
        return picture, caption, gr.skip()

    for listener in (show, tune):
        listener.__annotations__ = {"request": gr.Request}

    with gr.Blocks(title="ttd app", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(TITLE, apply_default_css=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                picture = gr.Image(
                    type="filepath",
                    image_mode=None,
                    format="png",
                    sources=["upload", "clipboard"],
                    label="Picture",
                    height=280,
                    buttons=[],
                    elem_id="ttd-picture",
                )
                # Gradio opens the file itself and fails without a sentence; read_image says what is wrong.
                picture.preprocess = lambda payload: None if payload is None else payload.path
                with gr.Row(elem_id="ttd-examples"):
                    examples = [
                        gr.Button(f"Scene {number}", size="sm", min_width=64) for number in range(1, EXAMPLES + 1)
                    ]
                caption = gr.Textbox(
                    label="Caption", placeholder="a dog beside an umbrella on the grass", lines=2, elem_id="ttd-caption"
                )
                names = gr.CheckboxGroup(
                    studio.backbones, value=studio.backbones[:1], label="Backbones", elem_id="ttd-backbones"
                )
                run = gr.Button("Show maps", variant="primary", elem_id="ttd-run")
                with gr.Accordion("Fine-tune here", open=False, visible=bool(studio.tunable), elem_id="ttd-tuning"):
                    gr.HTML(
                        '<p class="ttd-note">TTD on generated scenes, on this machine, for you alone. A step takes '
                        "about half a second on two cores.</p>",
                        apply_default_css=False,
                    )
                    target = gr.Dropdown(
                        studio.tunable, value=next(iter(studio.tunable), None), label="Backbone", filterable=False
                    )
                    steps = gr.Slider(
                        1, MOST_STEPS, value=DEFAULT_STEPS, step=1, label="Steps", buttons=[], elem_id="ttd-steps"
                    )
                    with gr.Row():
                        begin = gr.Button("Fine-tune", elem_id="ttd-tune", min_width=100)
                        end = gr.Button("Stop", interactive=False, elem_id="ttd-stop", min_width=100)
                    progress = gr.HTML(elem_id="ttd-progress", apply_default_css=False)
            with gr.Column(scale=7, min_width=300):
                opacity = gr.Slider(
                    0, 100, value=65, step=1, label="Opacity of the maps (%)", buttons=[], elem_id="ttd-opacity"
                )
                result = gr.HTML(EMPTY, elem_id="ttd-output", apply_default_css=False)
        hidden = {"api_visibility": "private"}
        given = [picture, caption, names]
        for trigger in (run.click, caption.submit):
            shown_now = trigger(show, given, result, concurrency_limit=4, **hidden)
            shown_now.then(None, None, None, js=SCROLL_ON_A_PHONE, **hidden)
        begin.click(
            tune,
            [target, steps, *given],
            [progress, result, begin, end],
            concurrency_limit=8,
            show_progress="hidden",
            **hidden,
        )

        def halt(request) -> None:  # type: ignore[no-untyped-def]
            studio.stop(visitor(request))

        def forget(request) -> None:  # type: ignore[no-untyped-def]
            studio.forget(visitor(request))

        for ending in (halt, forget):
            ending.__annotations__ = {"request": gr.Request}
        end.click(halt, None, None, queue=False, **hidden)
        for number, button in enumerate(examples):
            button.click(lambda number=number: example(number), None, [picture, caption, result], **hidden)
        opacity.change(None, opacity, None, js=SET_OPACITY, **hidden)
        page.unload(forget)
    return page


def launch_page(
    page: Any, *, host: str = "127.0.0.1", port: int | None = None, browser: bool = False
) -> tuple[Any, str]:
    """Serve the page from a thread of its own.

    Args:
        page: what :func:`build_page` gave.
        host: the address to listen at; the default is reached from this machine alone.
        port: by default the first free one from 7860.
        browser: whether to open it in the browser.

    Returns:
        The page, whose ``block_thread()`` waits and ``close()`` ends it, and its address.

    Raises:
        InputError: the address or port cannot be had.
    """
    gr = import_gradio()
    files = resources.files("ttd_plugins.app")
    css, script = (files.joinpath(name).read_text(encoding="utf-8") for name in ("app.css", "app.js"))
    fonts = {"font": ["system-ui", "-apple-system", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        _, address, _ = page.queue(max_size=64).launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            max_file_size=LARGEST_FILE,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            theme=gr.themes.Default(**fonts),
            head=f"<style>{css}</style><script>{script}</script>",
        )
    except (OSError, ValueError) as error:
        where = f"{host}:{port}" if port is not None else host
        raise InputError(
            f"the page cannot be served at {where} ({one_sentence(error)}); give another --port or --host"
        ) from error
    return page, str(address)


def serve(studio: Studio, *, host: str, port: int | None, browser: bool, said: Any = print) -> None:
    """Serve the page of a studio until Ctrl-C, and say where it is."""
    page, address = launch_page(build_page(studio), host=host, port=port, browser=browser)
    said(f"the page is at {address} (Ctrl-C ends it)")
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)
