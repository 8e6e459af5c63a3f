"""What `ttd app` answers to real HTTP requests: own host names, own origins, known routes and uploaded files only."""

from __future__ import annotations

import http.client
import io
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from fakes import FakeFamily, FakePlugin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("gradio")
pytest.importorskip("matplotlib")

from ttd_plugins import cli
from ttd_plugins.app.gradio_page import build_page, launch_page
from ttd_plugins.app.request_guard import check_listening, names_uploaded_files_only, split_host, uploaded_file
from ttd_plugins.app.studio import Studio
from ttd_plugins.errors import InputError
from ttd_plugins.plugins import temporary_plugin

FAKE = "fake:small"
CAPTION = "a dog beside an umbrella"
META = {"_type": "gradio.FileData"}
WAIT = 20.0


class Page:
    """A started page, and raw requests to it."""

    def __init__(self, address: str, uploads: Path) -> None:
        self.host, self.port = urlsplit(address).hostname or "", urlsplit(address).port or 0
        self.uploads = uploads
        self.show = self._index_of("ttd-run")

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=WAIT)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def _index_of(self, element: str) -> int:
        """Number of the function that a click on an element calls."""
        config = json.loads(self.ask("GET", "/config")[1])
        (target,) = (part["id"] for part in config["components"] if part["props"].get("elem_id") == element)
        return next(
            one["id"] for one in config["dependencies"] if [target, "click"] in one["targets"] and one["inputs"]
        )

    def upload(self, name: str = "photo.png", content: bytes | None = None, **headers: str) -> tuple[int, Any]:
        if content is None:
            stream = io.BytesIO()
            pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
            Image.fromarray(pixels).save(stream, "PNG")
            content = stream.getvalue()
        edge = uuid.uuid4().hex
        head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        body = head + content + f"\r\n--{edge}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={edge}"}
        status, answer = self.ask("POST", "/gradio_api/upload", body, kind | headers)
        return status, json.loads(answer) if status == 200 else answer

    def join(self, image: Any, caption: Any = CAPTION, **more: Any) -> tuple[int, bytes, str]:
        session = uuid.uuid4().hex
        body = {"data": [image, caption, [FAKE]], "fn_index": self.show, "session_hash": session} | more
        status, answer = self.ask("POST", "/gradio_api/queue/join", json.dumps(body).encode(), JSON)
        return status, answer, session

    def result(self, session: str) -> str:
        """Everything that the page says to a visitor until the work is done."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=WAIT)
        connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        answer, text, end = connection.getresponse(), "", time.monotonic() + WAIT
        while "process_completed" not in text and time.monotonic() < end:
            text += answer.readline().decode()
        connection.close()
        return text


JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with pytest.MonkeyPatch.context() as patch, temporary_plugin(FakePlugin(FakeFamily()), name="fake_plugin"):
        uploads = tmp_path_factory.mktemp("uploads")
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        blocks, address = launch_page(build_page(Studio([FAKE])), allow_hosts=["Lab.Local"])
        yield Page(address, uploads)
        blocks.close(verbose=False)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """An image of this machine that nobody uploaded."""
    file = tmp_path / "secret.png"
    Image.new("RGB", (16, 16), "teal").save(file)
    return file


# Uploaded images are shown -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", [META, None])
def test_an_uploaded_image_is_shown(page: Page, meta: Any) -> None:
    status, (path,) = page.upload()
    assert status == 200 and Path(path).is_relative_to(page.uploads)
    status, answer, session = page.join({"path": path, "url": None} | ({"meta": meta} if meta else {}))
    assert status == 200, answer
    said = page.result(session)
    assert "ttd-result" in said and "umbrella" in said
    status, content = page.ask("GET", f"/gradio_api/file={quote(path)}")
    assert status == 200 and content.startswith(b"\x89PNG")


def test_the_name_of_an_upload_cannot_leave_the_folder(page: Page, tmp_path: Path) -> None:
    for name in ("../../escaped.png", "/etc/escaped.png", "..", "a/../../../escaped.png"):
        status, answer = page.upload(name)
        if status == 200:
            assert uploaded_file(answer[0], page.uploads), answer


# Other files are not -------------------------------------------------------------------------------------------------


def places(page: Page, secret: Path) -> dict[str, Any]:
    """Values of ``path`` that name no uploaded file, of every kind."""
    fifo, inner = page.uploads / "fifo.png", page.uploads / "inner"
    link, loop, folder_link = page.uploads / "link.png", page.uploads / "loop.png", page.uploads / "linked"
    if not fifo.exists():
        os.mkfifo(fifo)
        inner.mkdir()
        loop.symlink_to(loop)
    for own, target in ((link, secret), (folder_link, secret.parent)):
        own.unlink(missing_ok=True)
        own.symlink_to(target)
    closed = secret.parent / "closed"
    if not closed.exists():
        closed.mkdir()
        (closed / "secret.png").write_bytes(secret.read_bytes())
        closed.chmod(0)
    up = "/".join([".."] * 30)
    return {
        "existing": str(secret),
        "absent": str(secret.parent / "absent.png"),
        "absent folder": str(secret.parent / "absent" / "secret.png"),
        "not readable": str(closed / "secret.png"),
        "folder": str(secret.parent),
        "device": "/dev/zero",
        "stdin": "/dev/stdin",
        "process": "/proc/self/environ",
        "fifo of an upload": str(fifo),
        "uploads": str(page.uploads),
        "folder of uploads": str(inner),
        "absent upload": str(page.uploads / "absent.png"),
        "link": str(link),
        "link loop": str(loop),
        "link folder": str(folder_link / "secret.png"),
        "climbing": f"{page.uploads}/{up}{secret}",
        "sibling": f"{page.uploads}2/secret.png",
        "relative": "secret.png",
        "home": "~/secret.png",
        "empty": "",
        "null byte": f"{secret}\0.png",
        "surrogate": f"{page.uploads}/\ud800.png",
        "long": f"{page.uploads}/{'a' * 5000}.png",
        "url": "http://127.0.0.1:9/secret.png",
        "metadata service": "http://169.254.169.254/latest/meta-data",
        "file url": f"file://{secret}",
        "number": 7,
        "nothing": None,
        "list": [str(secret)],
        "mapping": {"path": str(secret)},
    }


def refused(page: Page, status: int, answer: bytes) -> None:
    assert status == 403 and json.loads(answer) == {
        "detail": "this file was not uploaded to the page, or is no longer there; upload it again"
    }


@pytest.mark.parametrize("meta", [META, None, {"_type": "other"}])
def test_one_answer_to_every_file_that_was_not_uploaded(page: Page, secret: Path, meta: Any) -> None:
    for kind, path in places(page, secret).items():
        payload = {"path": path} | ({"meta": meta} if meta else {})
        status, answer, _ = page.join(payload)
        assert status == 403, kind
        refused(page, status, answer)


def test_one_answer_on_every_route_and_in_every_place(page: Page, secret: Path) -> None:
    payload = {"path": str(secret), "meta": META}
    bodies: list[dict[str, Any]] = [
        {"data": [None, payload, [FAKE]]},  # the caption
        {"data": [None, CAPTION, [payload]]},
        {"data": [None, CAPTION, {"a": {"b": [payload]}}]},
        {"data": [{"url": str(secret)}, CAPTION, [FAKE]]},
        {"data": [{"url": "http://127.0.0.1:9/x.png", "meta": META}, CAPTION, [FAKE]]},
        {"data": [[payload], CAPTION, [FAKE]]},
        {"data": [None, CAPTION, [FAKE]], "event_data": payload},
    ]
    for route in ("queue/join", "run/show", "run/predict", "api/show", "api/predict/", "call/show", "call/v2/show"):
        for body in bodies:
            body = body | {"fn_index": page.show, "session_hash": "x"}
            refused(page, *page.ask("POST", f"/gradio_api/{route}", json.dumps(body).encode(), JSON))


@pytest.mark.parametrize("route", ["file=", "file/"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_file_route_serves_uploads_only(page: Page, secret: Path, route: str, method: str) -> None:
    for kind, path in places(page, secret).items():
        if not isinstance(path, str) or not path or kind == "surrogate":
            continue
        status, answer = page.ask(method, f"/gradio_api/{route}{quote(path)}")
        assert status == 403, kind
        assert method == "HEAD" or b"not uploaded" in answer, kind


def test_no_request_leaves_the_machine(page: Page) -> None:
    asked: list[str] = []

    class Recorder(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the library's name
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_HEAD = do_POST = do_GET  # noqa: N815  # the library's names

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Recorder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x.png"
        for payload in ({"path": url}, {"path": url, "meta": META}, {"url": url}, {"path": url, "url": url}):
            assert page.join(payload)[0] == 403
            assert page.join(None, payload)[0] == 403
        for route in ("file=", "file/", "proxy=", "stream/"):
            assert page.ask("GET", f"/gradio_api/{route}{url}")[0] in (403, 404)
        server.shutdown()
    assert asked == []


def test_a_value_that_is_no_file_description_is_not_one(page: Page, secret: Path) -> None:
    for value in (str(secret), 7, [str(secret)], {"size": 3}, True):
        status, answer, session = page.join(value)
        assert status == 200, answer
        assert "ttd-result" not in page.result(session)


def test_routes_that_the_page_does_not_use_are_closed(page: Page) -> None:
    for path in (
        "/gradio_api/proxy=http://127.0.0.1/", "/gradio_api/custom_component/x/client/y/z", "/gradio_api/dev/reload",
        "/gradio_api/deep_link?session_hash=x", "/?deep_link=x", "/config?deep_link=..%2F..%2Fx", "/docs",
        "/monitoring", "/gradio_api/vibe-code", "/gradio_api/runs", "/gradio_api/token", "/openapi.json",
        "/gradio_api/stream/x/y/z/playlist-file",
    ):  # fmt: skip
        assert page.ask("GET", path)[0] == 404, path
    for path in ("component_server", "process_recording", "vibe-edit", "stream/x", "undo-vibe-edit"):
        assert page.ask("POST", f"/gradio_api/{path}", b"{}", JSON)[0] == 404, path
    assert page.ask("PUT", "/")[0] == page.ask("DELETE", "/gradio_api/upload")[0] == 404


def test_an_example_leaves_the_checks_of_the_visitor_in_place(page: Page) -> None:
    # Gradio makes a component anew for a visitor to whom it was updated.
    sound, broken = (
        {"path": page.upload(name, content)[1][0], "meta": META}
        for name, content in (("sound.png", None), ("broken.jpg", b"\xff\xd8\xff\xe0 no image"))
    )
    session = uuid.uuid4().hex
    config = json.loads(page.ask("GET", "/config")[1])
    ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
    check = next(one for one in config["dependencies"] if [ids["ttd-image"], "upload"] in one["targets"])
    for image, name in ((sound, "sound.png"), (broken, "broken.jpg")):
        # The first of these updates the image, the second one is read by the component of the visitor.
        body = {"data": [image, ""], "fn_index": check["id"], "session_hash": session}
        assert page.ask("POST", "/gradio_api/queue/join", json.dumps(body).encode(), JSON)[0] == 200
        assert name in page.result(session)
    assert page.join(broken, session_hash=session)[0] == 200
    said = page.result(session)
    assert "cannot be decoded" in said


def test_a_body_that_is_no_object_is_refused(page: Page) -> None:
    for body in (b"[1]", b"{", b'"path"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000):
        assert page.ask("POST", "/gradio_api/queue/join", body, JSON)[0] == 400, body[:10]
    assert page.ask("POST", "/gradio_api/queue/join", b'{"a": "' + b"x" * (1 << 20) + b'"}', JSON)[0] == 413


# Hosts and origins ---------------------------------------------------------------------------------------------------

FOREIGN = (
    "evil.example",
    "evil.example:7860",
    "127.0.0.1.evil.example",
    "localhost.evil",
    "a@127.0.0.1",
    "10.0.0.9",
    "",
)


@pytest.mark.parametrize("host", [*FOREIGN, ""])
def test_a_foreign_host_is_refused(page: Page, host: str) -> None:
    for method, path in (("GET", "/"), ("HEAD", "/"), ("GET", "/config"), ("OPTIONS", "/"), ("GET", "/assets/x.js")):
        assert page.ask(method, path, headers={"Host": host})[0] == 403
    assert page.ask("POST", "/gradio_api/queue/join", b"{}", JSON | {"Host": host})[0] == 403
    assert page.ask("GET", "/", headers={"X-Forwarded-Host": host or "evil"})[0] == 403


def test_own_and_named_hosts_are_answered(page: Page) -> None:
    for host in (
        "localhost",
        "LOCALHOST.",
        "127.0.0.1",
        f"127.0.0.1:{page.port}",
        "localhost:9",
        "[::1]:80",
        "lab.local",
    ):
        assert page.ask("GET", "/config", headers={"Host": host})[0] == 200, host
    assert page.ask("GET", "/config", headers={"X-Forwarded-Host": "lab.local"})[0] == 200


def test_requests_of_other_sites_are_refused(page: Page) -> None:
    own = f"127.0.0.1:{page.port}"
    for origin in (
        "http://evil.example", "null", "http://localhost:3000", "http://127.0.0.1", f"http://localhost:{page.port}",
        "file://", f"http://{own}.evil.example", f"ftp://{own}", "http://lab.local:3000",
    ):  # fmt: skip
        headers = {"Origin": origin, "Host": own}
        assert page.upload(**headers)[0] == 403, origin
        assert page.ask("POST", "/gradio_api/queue/join", b"{}", JSON | headers)[0] == 403, origin
        assert page.ask("GET", "/config", headers=headers)[0] == 403, origin
        preflight = headers | {"Access-Control-Request-Method": "POST"}
        assert page.ask("OPTIONS", "/gradio_api/queue/join", headers=preflight)[0] == 403, origin
    for site in ("cross-site", "same-site"):
        assert page.upload(**{"Sec-Fetch-Site": site})[0] == 403
        for mode, status in (("no-cors", 403), ("cors", 403), ("navigate", 200)):
            headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
            assert page.ask("GET", "/config", headers=headers)[0] == status
    for origin in (f"http://{own}", "https://lab.local"):
        assert page.upload(Origin=origin, Host=own)[0] == 200, origin


def test_the_command_checks_its_names() -> None:
    for arguments, words in (
        (["--allow-host", "http://x"], "must be a host name"),
        (["--allow-host", "x:80"], "must be a host name"),
        (["--allow-host", ""], "must be a host name"),
        (["--host", "999.1.1.1"], "neither an address nor a host name"),
        (["--host", "1.2.3"], "neither an address nor a host name"),
        (["--host", ""], "neither an address nor a host name"),
        (["--host", "a b"], "neither an address nor a host name"),
        (["--host", "192.0.2.1"], "cannot be served"),
        (["--host", "2001:db8::1"], "cannot be served"),
        (["--host", "host.invalid"], "is not known on this machine"),
    ):
        begun = time.monotonic()
        result = CliRunner().invoke(cli.app, ["app", "--no-browser", *arguments])
        assert result.exit_code == 2 and words in result.stderr, (arguments, result.output)
        assert result.stderr.count("\n") == 1 and time.monotonic() - begun < 10


# The parts -----------------------------------------------------------------------------------------------------------


def test_a_name_that_never_resolves_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import ttd_plugins.app.request_guard as guard

    release = threading.Event()
    monkeypatch.setattr(guard, "RESOLVE_SECONDS", 0.1)
    monkeypatch.setattr(guard.socket, "getaddrinfo", lambda *_, **__: [release.wait(WAIT)])
    with pytest.raises(InputError, match="not known"):
        check_listening("slow.example", None)
    release.set()


def test_a_free_port_is_found() -> None:
    host, port = check_listening("127.0.0.1", None)
    assert host == "127.0.0.1" and 7860 <= port < 7960


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    path=st.one_of(st.text(), st.lists(st.sampled_from(["..", ".", "a", "", "inner", "\0", "x" * 300])).map("/".join))
)
def test_any_path_is_judged_without_an_error(tmp_path: Path, path: str) -> None:
    uploads = tmp_path / "uploads"
    uploads.mkdir(exist_ok=True)
    for tried in (path, f"{uploads}/{path}"):
        assert uploaded_file(tried, uploads) is None
        assert not names_uploaded_files_only([{"path": tried}], uploads)


@given(st.text(alphabet=st.characters(codec="latin-1")))
def test_any_host_is_judged_without_an_error(text: str) -> None:
    found = split_host(text)
    assert found is None or (found[0] == found[0].lower() and not set(found[0]) & set("/@ []\r\n"))
