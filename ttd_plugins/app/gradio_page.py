"""The Gradio page around a :class:`~ttd_plugins.app.studio.Studio`; only this module uses Gradio.

Analytics are off, fonts are the system's, and there is no tunnel: nothing leaves the machine.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from ttd_plugins.app.components import visitor, with_request
from ttd_plugins.app.examples import ExampleAnswers, caption_examples, thumbnails_css
from ttd_plugins.app.maps_tab import add_maps_tab
from ttd_plugins.app.rendering import render_credits, render_message
from ttd_plugins.app.request_guard import (
    UNKNOWN_FILE,
    RequestGuard,
    check_allowed_host,
    check_listening,
    split_host,
    uploaded_file,
)
from ttd_plugins.app.segment_tab import add_segment_tab
from ttd_plugins.app.studio import Studio
from ttd_plugins.app.theme import make_theme, page_head
from ttd_plugins.errors import InputError, MissingDependencyError, TTDError, one_sentence

MAX_FILE_SIZE = "64mb"


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


def build_page(studio: Studio, prepared: ExampleAnswers | None = None) -> Any:
    """Build the ``gradio.Blocks`` of a studio.

    Args:
        studio: the backbones of the page.
        prepared: answers to the examples; by default new ones.

    Raises:
        MissingDependencyError: gradio is not installed.
    """
    gr = import_gradio()
    answers = prepared or ExampleAnswers(studio)

    def uploaded_path(payload: Any) -> str | None:
        if payload is None:
            return None
        path = uploaded_file(payload.path, gr.utils.get_upload_folder())
        if path is None:
            raise gr.Error(UNKNOWN_FILE, print_exception=False)
        return path

    with gr.Blocks(title="ttd app", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(render_message("title"), apply_default_css=False, padding=False)
        with gr.Tabs(elem_id="ttd-tabs"):
            with gr.Tab("Caption and tags"):
                maps = add_maps_tab(gr, studio, uploaded_path, page, answers)
            with gr.Tab("Segment by names") as segment:
                segmented = add_segment_tab(gr, studio, uploaded_path, segment)
        examples = [*maps.examples, *segmented.examples]
        credits = {one.credit.name: (one.label, one.credit) for one in reversed(examples) if one.credit is not None}
        gr.HTML(render_credits(list(credits.values())[::-1]), apply_default_css=False, padding=False)

        def forget(request) -> None:  # type: ignore[no-untyped-def]
            for tab in (maps, segmented):
                tab.leave(visitor(request))
            studio.forget(visitor(request))

        page.unload(with_request(gr, forget))
    page.ttd_styles = thumbnails_css([one for one in examples if one.credit is not None])
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
            theme=make_theme(gr),
            head=page_head([getattr(page, "ttd_styles", "")]),
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
    answers = ExampleAnswers(studio)
    page, address = launch_page(
        build_page(studio, answers), host=host, port=port, browser=browser, allow_hosts=allow_hosts
    )
    announce(f"the page is at {address} (Ctrl-C ends it)")
    # The page shows the progress to whoever opens it meanwhile.
    first = next(one for group in caption_examples(studio).values() for one in group)
    names = first.fitting(studio.backbones[:1])
    threading.Thread(target=answers.prepare, args=(first, names), daemon=True).start()
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)
