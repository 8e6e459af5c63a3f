"""The Gradio page around a :class:`~ttd_plugins.app.studio.Studio`; only this module uses Gradio.

Analytics are off, fonts are the system's, and there is no tunnel: nothing leaves the machine.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from importlib import resources
from typing import Any

from ttd_plugins.app.rendering import (
    render_credit,
    render_error,
    render_message,
    render_note,
    render_progress,
    render_result,
)
from ttd_plugins.app.request_guard import (
    UNKNOWN_FILE,
    RequestGuard,
    check_allowed_host,
    check_listening,
    split_host,
    uploaded_file,
)
from ttd_plugins.app.segment_tab import add_segment_tab, image_input
from ttd_plugins.app.studio import MAX_STEPS, Studio, TuningStoppedError, error_sentence
from ttd_plugins.embedded.photo_examples import photograph, photograph_credit
from ttd_plugins.errors import InputError, MissingDependencyError, TTDError, one_sentence
from ttd_plugins.reports.heat_overlay import HEAT_OPACITY
from ttd_plugins.reports.templating import stylesheet

EXAMPLES = 4
DEFAULT_STEPS = 60
MAX_FILE_SIZE = "64mb"
SCROLL_ON_A_PHONE = """() => {
  if (window.innerWidth < 700) document.querySelector("#ttd-opacity").scrollIntoView({ behavior: "smooth" });
}"""
SET_OPACITY = "(value) => document.documentElement.style.setProperty('--ttd-heat', value / 100)"


def import_gradio() -> Any:
    """Import Gradio with its analytics switched off.

    Raises:
        MissingDependencyError: Gradio cannot be imported.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except Exception as error:  # a broken dependency raises more than ImportError
        raise MissingDependencyError(
            f"the page needs gradio, which cannot be imported ({type(error).__name__}: {one_sentence(error)}); run: "
            "pip install 'ttd-plugins[app]'"
        ) from error
    return gradio


def example_kinds(studio: Studio) -> list[tuple[str, Callable[[int], tuple[Any, str]], int]]:
    """Label, source and number of the buttons with examples: what the page's backbones know."""
    scenes = bool(studio.tunable)
    photographs = any(name not in studio.tunable for name in studio.backbones)
    kinds: list[tuple[str, Callable[[int], tuple[Any, str]], int]] = []
    if photographs:
        kinds.append(("Photo", photograph, EXAMPLES))
    if scenes:
        kinds.append(("Scene", studio.example, EXAMPLES))
    return kinds


def build_page(studio: Studio) -> Any:
    """Build the ``gradio.Blocks`` of a studio.

    Raises:
        MissingDependencyError: gradio is not installed.
    """
    gr = import_gradio()

    def uploaded_path(payload: Any) -> str | None:
        if payload is None:
            return None
        path = uploaded_file(payload.path, gr.utils.get_upload_folder())
        if path is None:
            raise gr.Error(UNKNOWN_FILE, print_exception=False)
        return path

    def visitor(request: Any) -> str:
        return str(request.session_hash or "")

    def shown(image: str | None, caption: str, names: list[str], who: str) -> str:
        try:
            return render_result(studio.view(image, caption, names, who))
        except Exception as error:
            return render_error(error_sentence(error, "showing this image"))

    # Annotations of a request are read when a listener is made, and are strings under deferred evaluation.
    def show(image: str | None, caption: str, names: list[str], request) -> str:  # type: ignore[no-untyped-def]
        return shown(image, caption, names, visitor(request))

    def tune(name, steps, image, caption, names, request) -> Iterator[Any]:  # type: ignore[no-untyped-def]
        who = visitor(request)
        busy, idle = gr.update(interactive=False), gr.update(interactive=True)
        reports: queue.Queue[Any] = queue.Queue()
        finished: list[Any] = []

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
                finished.append(report)
                text = f"step {report.step} of {int(steps)} · loss {report.loss:.3f}"
                yield render_progress(text, report.step, int(steps)), gr.skip(), busy, idle
        finally:
            # The visitor has left the page.
            if thread.is_alive():
                studio.stop(who)
        done = (gr.update(interactive=True), gr.update(interactive=False))
        if isinstance(report, TuningStoppedError):
            yield render_note(str(report)), gr.skip(), *done
        elif report is not None:
            yield render_error(error_sentence(report, f"fine-tuning {name}")), gr.skip(), *done
        else:
            note = f"{name} is fine-tuned; the maps show it as “after”"
            if image is None or not caption.strip():
                yield render_note(f"{note} once there is an image and a caption.", finished), gr.skip(), *done
            else:
                names = list(dict.fromkeys([*names, name]))
                yield render_note(f"{note}.", finished), shown(image, caption, names, who), *done

    def example(draw: Callable[[int], tuple[Any, str]], number: int) -> tuple[Any, Any, Any]:
        try:
            image, caption = draw(number)
        except Exception as error:
            return gr.skip(), gr.skip(), render_error(error_sentence(error, "opening an example"))
        return image, caption, render_credit(photograph_credit(number)) if draw is photograph else gr.skip()

    for listener in (show, tune):
        listener.__annotations__ = {"request": gr.Request}

    blocks = gr.Blocks(title="ttd app", analytics_enabled=False, delete_cache=(3600, 3600))
    with blocks as page, ExitStack() as first_tab:
        gr.HTML(render_message("title"), apply_default_css=False)
        with gr.Tabs(elem_id="ttd-tabs") as tabs:
            maps_tab = gr.Tab("Caption and tags")
        first_tab.enter_context(maps_tab)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                image = image_input(gr, "ttd-image", uploaded_path)
                with gr.Row(elem_id="ttd-examples"):
                    examples = [
                        (gr.Button(f"{kind} {number + 1}", size="sm", min_width=64), draw, number)
                        for kind, draw, count in example_kinds(studio)
                        for number in range(count)
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
                        render_note(
                            "TTD on generated scenes, on this machine; only you see the result. A step takes about "
                            "half a second on two cores."
                        ),
                        apply_default_css=False,
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
                    progress = gr.HTML(elem_id="ttd-progress", apply_default_css=False)
            with gr.Column(scale=7, min_width=300):
                opacity = gr.Slider(
                    0,
                    100,
                    value=round(100 * HEAT_OPACITY),
                    step=1,
                    label="Opacity of the maps (%)",
                    buttons=[],
                    elem_id="ttd-opacity",
                )
                result = gr.HTML(render_message("empty"), elem_id="ttd-output", apply_default_css=False)
        hidden = {"api_visibility": "private"}
        given = [image, caption, names]
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
        for button, draw, number in examples:
            button.click(partial(example, draw, number), None, [image, caption, result], **hidden)
        opacity.change(None, opacity, None, js=SET_OPACITY, **hidden)
        first_tab.close()
        with tabs, gr.Tab("Segment by names"):
            add_segment_tab(gr, studio, uploaded_path)
        page.unload(forget)
    return page


def launch_page(
    page: Any,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = False,
    allow_hosts: Sequence[str] = (),
) -> tuple[Any, str]:
    """Serve the page from a thread of its own, behind a :class:`~ttd_plugins.app.request_guard.RequestGuard`.

    Args:
        page: the ``gradio.Blocks`` of :func:`build_page`.
        host: address to listen on; the default accepts connections from this machine only.
        port: port to listen on; ``None`` takes the first free one from 7860.
        browser: whether to open the page in the browser.
        allow_hosts: further host names under which the page may be addressed, such as that of a proxy.

    Returns:
        The page, whose ``block_thread()`` waits and ``close()`` ends it, and its address.

    Raises:
        InputError: the address or the port cannot be used, or a name in ``allow_hosts`` is no host name.
    """
    named = [check_allowed_host(name) for name in allow_hosts]
    address, free_port = check_listening(host, port)
    own = split_host(address)
    gr = import_gradio()
    guards: list[RequestGuard] = []

    @asynccontextmanager
    async def guard_requests(app: Any) -> AsyncIterator[None]:
        # Outside every middleware of Gradio's, before the first request.
        guard = RequestGuard(
            app.middleware_stack, hosts=[own[0]] if own else [], named=named, uploads=app.uploaded_file_dir
        )
        app.middleware_stack = guard
        guards.append(guard)
        yield

    files = resources.files("ttd_plugins.app")
    layout, script = (files.joinpath(name).read_text(encoding="utf-8") for name in ("app.css", "app.js"))
    css = str(stylesheet("heat_overlay.css", dark=".dark")) + layout
    fonts = {"font": ["system-ui", "-apple-system", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        _, shown, _ = page.queue(max_size=64).launch(
            server_name=address,
            server_port=free_port,
            share=False,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            max_file_size=MAX_FILE_SIZE,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            theme=gr.themes.Default(**fonts),
            head=f"<style>{css}</style><script>{script}</script>",
            app_kwargs={"lifespan": guard_requests},
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"the page cannot be served at {host}:{free_port} ({one_sentence(error)}); give another --port or --host"
        ) from error
    if not guards:
        page.close(verbose=False)
        raise TTDError(
            "this version of gradio starts the page without its guard; install another one: pip install -U gradio"
        )
    return page, str(shown)


def serve(
    studio: Studio,
    *,
    host: str,
    port: int | None,
    browser: bool,
    allow_hosts: Sequence[str] = (),
    announce: Callable[[str], object] = print,
) -> None:
    """Serve the page of a studio until Ctrl-C; ``announce`` is called with a sentence that states the address."""
    page, address = launch_page(build_page(studio), host=host, port=port, browser=browser, allow_hosts=allow_hosts)
    announce(f"the page is at {address} (Ctrl-C ends it)")
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)
