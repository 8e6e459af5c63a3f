"""A model hub on the loopback address: enough of the protocol of huggingface_hub's client, and faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

LARGE = (".safetensors", ".bin", ".pt")
"""Endings of the files that the hub keeps elsewhere: asked for, it answers with a redirection."""

PATIENCE = 30.0


class HubServer:
    """Serves folders as repositories.

    Attributes:
        repositories: files of each repository, by its name.
        faults: what goes wrong, by a pattern of file names; the first that fits counts. A number is the HTTP status
            of the answer, ``"silent"`` no answer, ``"half"`` half of the body and the connection closed, ``"short"``
            a body of half the size that was announced, ``"stall"`` half of the body and then nothing.
        requests: method and path of everything that was asked for.
        tokens: tokens that may read and write; whoever brings none may read what is public.
        private: repositories that are private.
        commits: messages of commits, by repository.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.faults: dict[str, int | str] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.private: set[str] = set()
        self.commits: list[tuple[str, str]] = []
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, repository: str, folder: Path) -> None:
        """Serve the files of a folder."""
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        self.repositories[repository] = {str(file.relative_to(folder)): file.read_bytes() for file in files}

    def fetched(self, repository: str) -> list[str]:
        """Names of the files of a repository whose bodies were asked for."""
        mark = f"/{repository}/resolve/main/"
        return [path.removeprefix(mark) for method, path in self.requests if method == "GET" and path.startswith(mark)]

    def fault(self, file: str) -> int | str | None:
        """What goes wrong for a file."""
        return next((fault for pattern, fault in self.faults.items() if fnmatchcase(file, pattern)), None)

    def commit(self, repository: str) -> str:
        """A commit that changes with the files."""
        digest = hashlib.sha1(repository.encode())
        for name, content in self.repositories[repository].items():
            digest.update(name.encode() + content)
        return digest.hexdigest()

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port, so that connections are refused."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.failed(hub.fault("write")):
                return
            if not self.has_token():
                self.empty(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
                return
            parts = path.strip("/").split("/")
            if parts[1:] == ["repos", "create"]:
                wanted = json.loads(body)
                name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
                if name in hub.repositories:
                    self.json({"url": f"{hub.url}/{name}"}, 409)
                    return
                hub.repositories[name] = {".gitattributes": b"*.safetensors filter=lfs"}
                hub.private |= {name} if wanted.get("private") or wanted.get("visibility") == "private" else set()
                self.json({"url": f"{hub.url}/{name}"})
            elif parts[1] == "validate-yaml":
                self.json({"errors": [], "warnings": []})
            elif parts[4:5] == ["preupload"]:
                files = json.loads(body)["files"]
                modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
                self.json({"files": modes})
            elif parts[4:5] == ["commit"]:
                self.commit("/".join(parts[2:4]), body)
            else:
                self.empty(404)

        def commit(self, repository: str, body: bytes) -> None:
            files = dict(hub.repositories[repository])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append((repository, value["summary"]))
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                else:
                    assert line["key"] == "deletedFile", line["key"]
                    del files[value["path"]]
            hub.repositories[repository] = files
            commit = hub.commit(repository)
            self.json({"commitUrl": f"{hub.url}/{repository}/commit/{commit}", "commitOid": commit})

        def has_token(self) -> bool:
            return (self.headers.get("Authorization") or "").removeprefix("Bearer ") in hub.tokens

        def json(self, content: Any, status: int = 200) -> None:
            self.body(json.dumps(content).encode(), {"Content-Type": "application/json"}, status=status)

        def log_message(self, *_: Any) -> None: ...

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "whoami-v2"]:
                known = self.has_token()
                self.json({"name": "user", "orgs": []} if known else {"error": "no"}, 200 if known else 401)
            elif parts[0] == "api":
                self.api("/".join(parts[2:4]), parts[4:])
            elif parts[0] == "large":
                _, owner, name, *rest = parts
                self.file(f"{owner}/{name}", "/".join(rest), large=False)
            elif len(parts) > 4 and parts[2] == "resolve":
                self.file("/".join(parts[:2]), "/".join(parts[4:]), large=True)
            else:
                self.empty(404)

        def api(self, repository: str, rest: list[str]) -> None:
            if self.failed(hub.fault("api")):
                return
            files = hub.repositories.get(repository)
            if files is None and self.has_token():
                self.empty(404, {"X-Error-Code": "RepoNotFound"})
            elif files is None:
                self.empty(401, {"X-Error-Message": "Invalid username or password."})
            elif rest[:1] == ["tree"]:
                below = "/".join([*rest[2:], ""])
                found = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                    if name.startswith(below)
                ]
                if below and not found:
                    self.empty(404, {"X-Error-Code": "EntryNotFound"})
                else:
                    self.body(json.dumps(found).encode(), {"Content-Type": "application/json"})
            else:
                listed = {"siblings": [{"rfilename": name} for name in files], "tags": []}
                listed["private"] = repository in hub.private
                answer = {"id": repository, "modelId": repository, "sha": hub.commit(repository), **listed}
                self.body(json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def file(self, repository: str, name: str, *, large: bool) -> None:
            if self.failed(hub.fault(name)):
                return
            files = hub.repositories.get(repository)
            if files is None:
                self.empty(401, {"X-Error-Message": "Invalid username or password."})
                return
            commit = {"X-Repo-Commit": hub.commit(repository)}
            if name not in files:
                self.empty(404, {"X-Error-Code": "EntryNotFound", **commit})
                return
            content = files[name]
            tag = hashlib.sha256(content).hexdigest()
            if large and name.endswith(LARGE):
                linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{tag}"', **commit}
                self.empty(302, {"Location": f"{hub.url}/large/{repository}/{name}", **linked})
                return
            fault = hub.fault(name)
            self.body(content, {"ETag": f'"{tag}"', **commit}, fault if isinstance(fault, str) else None)

        def failed(self, fault: int | str | None) -> bool:
            """Whether a fault took the place of the answer."""
            if fault == "silent":
                hub.released.wait(PATIENCE)
                self.close_connection = True
            elif isinstance(fault, int):
                self.empty(fault)
            return fault == "silent" or isinstance(fault, int)

        def empty(self, status: int, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": "0", **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()

        def body(self, content: bytes, headers: dict[str, str], fault: str | None = None, *, status: int = 200) -> None:
            broken = fault if self.command == "GET" else None
            if broken == "short":
                content = content[: len(content) // 2]
            span = self.headers.get("Range")
            start = int(span.removeprefix("bytes=").partition("-")[0]) if span else 0
            self.send_response(206 if start else status)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            for key, value in {"Content-Length": str(len(content) - start), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if broken in ("half", "stall"):
                self.wfile.write(content[start : len(content) // 2])
                self.wfile.flush()
                if broken == "stall":
                    hub.released.wait(PATIENCE)
                self.close_connection = True
            else:
                self.wfile.write(content[start:])

    return Handler


@contextmanager
def serving() -> Iterator[HubServer]:
    """A running server."""
    hub = HubServer()
    hub.start()
    try:
        yield hub
    finally:
        if hub._thread.is_alive():
            hub.stop()


def point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process's hub client use an endpoint and a cache; both are otherwise read once, on import."""
    constants = huggingface_hub.constants
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)


def environment(url: str, home: Path) -> dict[str, str]:
    """The same as environment variables, for a process of its own."""
    return {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_OFFLINE": "0"}
