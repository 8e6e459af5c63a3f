"""The demo's page in a real browser: no error, everything drawn, nothing wider than a phone, controls that work."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers_browser import BROWSER, NEEDS_BROWSER, SWITCHES
from test_reports import make_result

from ttd_plugins.reports.demo_html import write_demo_report

pytestmark = NEEDS_BROWSER

WATCH = """<script>window.errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective + " " + event.blockedURI));
</script>"""

# Looks at the page as it is loaded, then moves every control and looks again.
PROBE = """<script>addEventListener("load", () => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const style = (selector, pseudo) => getComputedStyle(document.querySelector(selector), pseudo);
  const width = document.documentElement.clientWidth;
  const wide = () => all("body *")
    .filter((element) => element.getBoundingClientRect().right > width + 1)
    .map((element) => element.outerHTML.slice(0, 80));
  const look = () => ({
    opacity: style(".heat").opacity,
    shown: document.getElementById("opacity-value").textContent,
    outline: style(".map:not(.truth)", "::after").display,
    open: all("details").filter((details) => details.open).length,
    scrollWidth: document.documentElement.scrollWidth,
    wide: wide(),
  });
  const found = {
    width, before: look(), page: style("body").backgroundColor,
    images: all("img").length,
    broken: all("img").filter((image) => !(image.complete && image.naturalWidth)).length,
    picture: style(".frame").backgroundImage.slice(0, 20),
    flat: all(".frame, svg, .track").filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 5).length,
  };
  const slider = document.getElementById("opacity");
  slider.value = 30;
  slider.dispatchEvent(new Event("input"));
  document.getElementById("outline").click();
  document.getElementById("all-tags").click();
  found.after = look();
  document.getElementById("all-tags").click();
  found.closed = look().open;
  found.errors = errors;
  parent.document.getElementById("found").textContent = JSON.stringify(found);
});</script>"""


def look(tmp_path: Path, width: int, *, dark: bool = False) -> dict[str, Any]:
    """What the probe finds in the page, in a frame of ``width`` CSS pixels."""
    write_demo_report(tmp_path / "report.html", make_result())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = page.replace("<head>", "<head>" + WATCH, 1).replace("</body>", PROBE + "</body>", 1)
    # A frame, because a browser's own window has a least width.
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><pre id="found"></pre>'
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(page)}"></iframe>',
        encoding="utf-8",
    )
    assert BROWSER is not None
    switches = [
        "--headless",
        *SWITCHES,
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=10000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    done = subprocess.run(
        [BROWSER, *switches, "--dump-dom", wrapper.as_uri()], capture_output=True, text=True, timeout=180, check=True
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert found is not None, done.stderr[-2000:]
    assert found[1], "the probe did not run"
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(tmp_path: Path, width: int) -> None:
    found = look(tmp_path, width)
    assert found["errors"] == []
    assert found["width"] == width
    assert found["images"] > 30
    assert found["broken"] == 0
    assert found["flat"] == 0
    assert found["picture"].startswith('url("data:image/png')
    assert found["before"]["opacity"] == "0.65"
    assert found["before"]["shown"] == "65 %"
    assert found["before"]["outline"] != "none"
    assert found["before"]["open"] == 0
    assert found["after"]["opacity"] == "0.3"
    assert found["after"]["shown"] == "30 %"
    assert found["after"]["outline"] == "none"
    assert found["after"]["open"] == 3
    assert found["closed"] == 0
    for state in (found["before"], found["after"]):
        assert state["scrollWidth"] == width
        assert state["wide"] == []


def test_the_page_follows_the_dark_scheme(tmp_path: Path) -> None:
    (tmp_path / "light").mkdir()
    (tmp_path / "dark").mkdir()
    assert look(tmp_path / "light", 800)["page"] == "rgb(250, 248, 245)"
    assert look(tmp_path / "dark", 800, dark=True)["page"] == "rgb(22, 20, 18)"
