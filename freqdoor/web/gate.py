"""What stands before the page: who may ask, for what and how much, and what an answer may lead to."""

import json
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterator
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "freqdoor_visitor"
VISITOR = re.compile(r"[0-9a-f]{32}")
HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
API = "/gradio_api/"
OPEN = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", f"{API}info", f"{API}startup-events")
OPEN_FOLDERS = ("/assets/", "/static/")  # Gradio's own files
OWN = (f"{API}upload", f"{API}upload_progress", f"{API}queue/join", f"{API}queue/data", f"{API}cancel", f"{API}reset")
CALLS = (f"{API}queue/join", f"{API}cancel", f"{API}reset")  # what has a body of JSON
HEARTBEAT, FILE, UPLOAD = f"{API}heartbeat/", f"{API}file=", f"{API}upload"
ENVELOPE = 2**16  # bytes of a request around an uploaded file
LONGEST = 2**18  # bytes of any other request
MOST_UPLOADS = 100  # of a visitor that are remembered
MOST_VISITORS = 1000
YEAR = 365 * 24 * 3600  # seconds
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-src 'self'; "
        "frame-ancestors 'none'; object-src 'none'; base-uri 'self'; form-action 'self'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Gate:
    """An ASGI application before Gradio's, which lets through what the page itself asks for, and nothing else.

    It answers names of this machine only (a name of somebody's domain that leads here, DNS rebinding, is none), no
    other site's requests, and routes that the page uses; it knows which visitor has uploaded a file, and lets nobody
    else name it. What is answered may lead the browser to no other host.

    Args:
        app: Gradio's application.
        upload: bytes that an uploaded file may have.
    """

    def __init__(self, app: ASGIApp, upload: int) -> None:
        self._app, self._upload = app, upload
        self._sessions: OrderedDict[str, str | None] = OrderedDict()  # a page that is open -> the visitor
        self._files: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()  # visitor -> paths of their uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a websocket, which the page has none of: closed without an answer
        headers, visitor = Headers(scope=scope), visitor_of(scope)
        guarded = _guarded(send, None if visitor else secrets.token_hex(16))
        refusal = self._refusal(scope, headers, visitor)
        if refusal is None and scope["path"] in CALLS:
            body = await _body(receive)
            receive = _again(body, receive)
            refusal = self._of_others(body, visitor)
        if refusal is not None:
            code, sentence = refusal
            await PlainTextResponse(f"freqdoor: {sentence}\n", code)(scope, receive, guarded)
            return
        if scope["path"] == UPLOAD and visitor:
            plain = [(key, value) for key, value in scope["headers"] if key != b"accept-encoding"]
            await self._app({**scope, "headers": plain}, receive, self._remembering(guarded, visitor))
            return
        await self._app(scope, receive, guarded)

    def _refusal(self, scope: Scope, headers: Headers, visitor: str | None) -> tuple[int, str] | None:
        """Why a request is not let through: a status code and a sentence."""
        path, host = scope["path"], headers.get("host", "")
        if not HOST.fullmatch(host):
            return 421, "this page answers to 127.0.0.1 and localhost only"
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        foreign = site not in (None, "same-origin", "none") or origin not in (None, f"http://{host}")
        if foreign and not (path == "/" and scope["method"] == "GET"):
            return 403, "another site's requests are not answered"
        own = path in OWN or path.startswith((HEARTBEAT, FILE))
        if not own and path not in OPEN and not path.startswith(OPEN_FOLDERS):
            return 404, "there is nothing here"
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, "this page is asked with GET and POST"
        if own and visitor is None:
            return 403, "open the page first, with cookies allowed"
        if path.startswith(FILE) and unquote(path.removeprefix(FILE)) not in self._files.get(visitor or "", ()):
            return 403, "this is no file that you have uploaded"
        most = self._upload + ENVELOPE if path == UPLOAD else LONGEST
        length = headers.get("content-length", "0" if scope["method"] != "POST" else "")
        if not length.isdecimal() or int(length) > most:
            return 413, f"expected at most {most} bytes, and that their number is said, found {length[:20] or 'none'}"
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        if path.startswith(HEARTBEAT):
            session = path.removeprefix(HEARTBEAT)
        return self._of_another_session(session, visitor)

    def _of_another_session(self, session: str, visitor: str | None) -> tuple[int, str] | None:
        """Refuse what another visitor's page has begun: its answers are not for this one."""
        if not session:
            return None
        owner = self._sessions.setdefault(session, visitor)
        self._sessions.move_to_end(session)
        while len(self._sessions) > MOST_VISITORS:
            self._sessions.popitem(last=False)
        return None if owner == visitor else (403, "this is another visitor's page")

    def _of_others(self, body: bytes, visitor: str | None) -> tuple[int, str] | None:
        """Why the body of a call is not let through: it may name no session and no file but the visitor's own."""
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            return 400, "expected a call as the page makes it"
        if refusal := self._of_another_session(str(content.get("session_hash", "")), visitor):
            return refusal
        own = self._files.get(visitor or "", ())
        if any(name not in own for name in _paths(content)):
            return 403, "this is no file that you have uploaded"
        return None

    def _remembering(self, send: Send, visitor: str) -> Send:
        """Note which files a visitor has uploaded, from Gradio's answer, which names them."""
        answer: list[bytes] = []

        async def pass_on(message: Message) -> None:
            if message["type"] == "http.response.body":
                answer.append(message.get("body", b""))
                if not message.get("more_body"):
                    self._note(visitor, b"".join(answer))
            await send(message)

        return pass_on

    def _note(self, visitor: str, answer: bytes) -> None:
        try:
            names = json.loads(answer)
        except ValueError:
            return  # it was refused
        if not isinstance(names, list):
            return
        files = self._files.setdefault(visitor, OrderedDict())
        files.update((str(name), None) for name in names)
        self._files.move_to_end(visitor)
        while len(files) > MOST_UPLOADS:
            files.popitem(last=False)
        while len(self._files) > MOST_VISITORS:
            self._files.popitem(last=False)


def visitor_of(scope: Scope) -> str | None:
    """Who asks: what the page's cookie says; None for somebody new."""
    cookie = SimpleCookie()
    try:
        cookie.load(Headers(scope=scope).get("cookie", ""))
    except CookieError:
        return None
    value = cookie[COOKIE].value if COOKIE in cookie else ""
    return value if VISITOR.fullmatch(value) else None


def _paths(content: Any) -> Iterator[str]:
    """Every file that a call names, wherever it stands."""
    waiting = [content]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if "path" in part or "url" in part:
                yield str(part.get("path"))
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


async def _body(receive: Receive) -> bytes:
    """The whole body of a request, whose length was checked."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """What is received, once more from the body on."""
    first = True

    async def again() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


def _guarded(send: Send, newcomer: str | None) -> Send:
    """Add to every answer what it may lead to; a newcomer gets a name."""

    async def pass_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            if newcomer:
                kept = f"{COOKIE}={newcomer}; Path=/; HttpOnly; SameSite=Lax; Max-Age={YEAR}"
                headers.append("set-cookie", kept)
        await send(message)

    return pass_on
