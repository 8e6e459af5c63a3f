"""axe finds no violation on the page of `ttd app`, in both themes, on a screen and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeFamily, FakePlugin
from helpers_app_page import COMPLETE, Watched
from helpers_browser import NEEDS_BROWSER, launched

pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe to check pages with")
for _name in ("gradio", "matplotlib", "open_clip", "tokenizers"):
    pytest.importorskip(_name)

from ttd_plugins.app.gradio_page import build_page, launch_page
from ttd_plugins.app.studio import Studio
from ttd_plugins.plugins import temporary_plugin

pytestmark = NEEDS_BROWSER


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    # Photographs, scenes and the part for fine-tuning are on the page of these two.
    with temporary_plugin(FakePlugin(FakeFamily()), name="fake_plugin"):
        page, address = launch_page(build_page(Studio(["fake:small", "open_clip:tiny"])))
        yield address
        page.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


def violations(tab: Any) -> list[str]:
    tab.wait_for_timeout(400)  # transitions of colours end
    found = axe.Axe().run(tab).response
    assert len(found["passes"]) > 15
    return [f"{rule['id']}: {node['target']} {node['html']}" for rule in found["violations"] for node in rule["nodes"]]


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1440, "light"),
        (390, "dark"),
        pytest.param(1440, "dark", marks=pytest.mark.slow),
        pytest.param(390, "light", marks=pytest.mark.slow),
    ],
)
def test_every_state_is_accessible(browser: Any, address: str, width: int, scheme: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    visitor = Watched(browser, address, viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = visitor.tab
    assert violations(tab) == [], "start"
    tab.locator("#ttd-caption textarea").fill("a cat and a bird")
    tab.locator("#ttd-caption textarea").press("Enter")
    tab.locator(f"{COMPLETE} .ttd-caption", has_text="a cat and a bird").wait_for()
    tab.get_by_text("Fine-tune here").click()
    tab.locator(".ttd-credits summary").click()
    assert violations(tab) == [], "after Show, with everything unfolded"
    visitor.remove()
    assert violations(tab) == [], "empty"
    tab.locator("#ttd-image input[type=file]").set_input_files(tmp_path / "broken.jpg")
    tab.locator("#ttd-note [role=alert]").wait_for()
    visitor.show()
    tab.locator("#ttd-output [role=alert]").wait_for()
    assert violations(tab) == [], "errors"
    tab.get_by_role("tab", name="Segment by names").click()
    tab.wait_for_selector(f"#ttd-segment-output {COMPLETE}")
    assert violations(tab) == [], "segmentation"
    visitor.remove("#ttd-segment-image")
    assert violations(tab) == [], "empty segmentation"
    visitor.close(address)
