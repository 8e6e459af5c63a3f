"""Which requests the page of ``ttd app`` answers: known routes, own host names, own origins and uploaded files only.

Gradio answers any host name, and serves and reads files by paths that a visitor posts. :class:`RequestGuard` stands in
front of it. A refusal never depends on whether a path exists.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
import stat
import threading
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ttd_plugins.errors import InputError, one_sentence

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
MAX_BODY = 1 << 20
"""Bytes of a posted JSON body; images are uploaded as files."""
RESOLVE_SECONDS = 5.0
FIRST_PORT, PORTS = 7860, 100

UNKNOWN_FILE = "this file was not uploaded to the page, or is no longer there; upload it again"
UNKNOWN_HOST = (
    "the page does not answer to this host name; open the address that ttd app printed, or start it with --allow-host"
)
UNKNOWN_ORIGIN = "the page does not answer requests of other sites"
UNKNOWN_ROUTE = "the page has no such address"
BAD_BODY = "the body must be a JSON object of at most 1 MiB"

_API = "/gradio_api"
_FILES = (f"{_API}/file=", f"{_API}/file/")
_GET = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/pwa_icon(/\d+)?|/(static|assets|svelte)/.+|"
    r"/gradio_api/(info/?|app_id/?|user/?|login_check/?|startup-events|theme\.css|queue/data|queue/status|"
    r"upload_progress|heartbeat/[^/]+|call/.+|file[=/].+)"
)
_POST = re.compile(r"/gradio_api/(queue/join|upload|cancel|reset/?|(call|run|api)/.+)")
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


class RequestGuard:
    """An ASGI application that refuses a request or passes it on.

    Args:
        app: the application behind the guard.
        hosts: names under which the page may be addressed, besides this machine's loopback names and the address on
            which a connection arrives.
        named: those of ``hosts`` that may be the origin of a proxy in front of the page.
        uploads: folder of uploaded files.
    """

    def __init__(self, app: App, *, hosts: Iterable[str], named: Iterable[str] = (), uploads: str | Path) -> None:
        self.app = app
        self.named = frozenset(named)
        self.hosts = frozenset(hosts) | self.named | set(LOCAL_NAMES)
        self.uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await _refuse(send, *refusal)
        elif scope["method"] == "POST" and not scope["path"].endswith("/upload"):
            await self._forward_json(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason, judged by everything but the body; ``None`` if the request is passed on."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        own = self._own_addresses(scope, headers)
        if own is None:
            return 403, UNKNOWN_HOST
        method, path = scope["method"], scope["path"]
        if not self._is_own_site(headers, own, navigation=method in ("GET", "HEAD")):
            return 403, UNKNOWN_ORIGIN
        routes = {"GET": _GET, "HEAD": _GET, "POST": _POST}.get(method)
        # A deep link is a path of a file with the values of all components.
        if routes is None or not routes.fullmatch(path) or b"deep_link" in scope.get("query_string", b""):
            return 404, UNKNOWN_ROUTE
        for start in _FILES:
            if path.startswith(start) and uploaded_file(path.removeprefix(start), self.uploads) is None:
                return 403, UNKNOWN_FILE
        return None

    def _own_addresses(self, scope: Scope, headers: dict[str, list[str]]) -> list[tuple[str, int | None]] | None:
        """Host and port by which the visitor, or a proxy, addresses the page; ``None`` if a name is not allowed."""
        given = headers.get("host", [])
        forwarded = [part for value in headers.get("x-forwarded-host", []) for part in value.split(",")]
        found = [split_host(value) for value in (*given, *forwarded)]
        arrival = scope.get("server") or ("", None)
        allowed = self.hosts | {str(arrival[0]).lower()}
        addresses = [address for address in found if address is not None and address[0] in allowed]
        return addresses if len(given) == 1 and len(addresses) == len(found) else None

    def _is_own_site(
        self, headers: dict[str, list[str]], own: list[tuple[str, int | None]], *, navigation: bool
    ) -> bool:
        for origin in headers.get("origin", []):
            scheme, _, rest = origin.partition("://")
            address = split_host(rest) if scheme in ("http", "https") else None
            if address is None:
                return False
            host, port = address
            default = {"http": 80, "https": 443}[scheme]
            same = any(host == name and (port or default) == (other or default) for name, other in own)
            # A proxy may replace the Host header.
            if not same and not (host in self.named and port is None):
                return False
        site = headers.get("sec-fetch-site", ["none"])[-1]
        if site in ("same-origin", "none"):
            return True
        # A link to the page is no attack.
        return navigation and headers.get("sec-fetch-mode", ["navigate"])[-1] == "navigate"

    async def _forward_json(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request whose JSON body names uploaded files only."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY:
                await _refuse(send, 413, BAD_BODY)
                return
        try:
            content = json.loads(body) if body else {}
            if not isinstance(content, dict):
                raise ValueError("no object")
            if not names_uploaded_files_only(content, self.uploads):
                await _refuse(send, 403, UNKNOWN_FILE)
                return
            # Written anew, so that Gradio reads what was checked.
            body = json.dumps(content).encode()
        except (ValueError, RecursionError):
            await _refuse(send, 400, BAD_BODY)
            return
        replaced = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        kept = [(k, v) for k, v in scope["headers"] if k.lower() not in (b"content-type", b"content-length")]
        sent = False

        async def receive_checked() -> MutableMapping[str, Any]:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        headers = [(k, v) for k, v in kept if k.lower() != b"transfer-encoding"] + replaced
        await self.app({**scope, "headers": headers}, receive_checked, send)


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# Files ---------------------------------------------------------------------------------------------------------------


def uploaded_file(path: object, uploads: str | Path) -> str | None:
    """Return ``path`` if it is the absolute path of a regular file inside the folder ``uploads``, else ``None``.

    Symlinks are resolved. No path outside the folder is looked up on the disk.
    """
    if not isinstance(path, str) or not os.path.isabs(path):
        return None
    try:
        root = os.path.realpath(uploads)
        if not any(_is_inside(os.path.normpath(path), folder) for folder in (os.path.abspath(uploads), root)):
            return None
        real = os.path.realpath(path)
        inside = _is_inside(real, root) and stat.S_ISREG(os.lstat(real).st_mode)
    except (OSError, ValueError):
        return None
    return path if inside else None


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def names_uploaded_files_only(content: Any, uploads: str | Path) -> bool:
    """Whether every file that a JSON value describes, with Gradio's ``meta`` or without, was uploaded."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if {"path", "url", "meta"} & value.keys() and uploaded_file(value.get("path"), uploads) is None:
                return False
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return True


# Hosts ---------------------------------------------------------------------------------------------------------------


def split_host(text: str) -> tuple[str, int | None] | None:
    """Split ``name:port``, ``name`` or ``[address]:port``; ``None`` if it has another form.

    The name is in lower case, without brackets and without a final dot.
    """
    try:
        parts = urlsplit(f"//{text.strip()}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return None
    if parts.netloc != text.strip() or "@" in parts.netloc:
        return None
    host = host.removesuffix(".")
    return (host, port) if _NAME.fullmatch(host) or _is_address(host) else None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def check_allowed_host(name: str) -> str:
    """Return a host name in lower case.

    Raises:
        InputError: it is not a name or an address without a port.
    """
    found = split_host(f"[{name}]" if ":" in name and _is_address(name) else name)
    if found is None or found[1] is not None:
        raise InputError(f"--allow-host {name!r} must be a host name or an address without a port, such as lab.local")
    return found[0]


def check_listening(host: str, port: int | None) -> tuple[str, int]:
    """Return the address to listen on and a free port.

    Args:
        host: an address of this machine, or a name of one.
        port: the port, or ``None`` for the first free one from 7860.

    Raises:
        InputError: the name is unknown, is no address of this machine, or the port is in use.
    """
    bare = host.strip().removeprefix("[").removesuffix("]")
    family, address = _resolve(bare, host)
    error: OSError | None = None
    for number in [port] if port is not None else range(FIRST_PORT, FIRST_PORT + PORTS):
        error = _bind_error(family, address, number)
        if error is None and family == socket.AF_INET:
            # Gradio tries the port on the loopback address too.
            error = _bind_error(family, ("127.0.0.1",), number)
        if error is None:
            return (f"[{bare}]" if ":" in bare else bare), number
    where = f"{host}:{port}" if port is not None else host
    raise InputError(
        f"the page cannot be served at {where} ({one_sentence(error) if error else 'no port'}); give another --port, "
        "or as --host an address of this machine, such as 127.0.0.1 or 0.0.0.0"
    )


def _bind_error(family: socket.AddressFamily, address: tuple[Any, ...], port: int) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            if os.name == "posix":
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((address[0], port, *address[2:]))
    except OSError as error:
        return error
    return None


def _resolve(bare: str, host: str) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """Family and address of a host; a slow resolver does not hang the command."""
    advice = "give an address of this machine, such as 127.0.0.1 or 0.0.0.0"
    if not _is_address(bare) and (not _NAME.fullmatch(bare.lower()) or re.fullmatch(r"[\d.]+", bare)):
        raise InputError(f"--host {host!r} is neither an address nor a host name; {advice}")
    found: list[Any] = []

    def look_up() -> None:
        # UnicodeError: a label is too long.
        with suppress(OSError, UnicodeError):
            found.extend(socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM))

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(RESOLVE_SECONDS)
    if not found:
        raise InputError(f"--host {host!r} is not known on this machine; {advice}")
    family, _, _, _, address = found[0]
    return family, address
