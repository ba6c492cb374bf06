"""The door: what every request passes before, and every answer after, the handlers (ASGI, around Quart).

In this order: request id, CORS, token, body (all of it, within limit and time), then the handler under a watch for the
client going away. Reading the body here, and not in the handlers, is what makes the limits hold on every path. Nothing
in this project streams a request body, so nothing is lost by it.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import trio

from ..exceptions import CorralError, TooLarge, TooSlow, Unauthorized
from ..log_ids import REQUEST_ID
from .errors import ForeignOrigin, Malformed
from .messages import Request, Response, Scope
from .routes import Answer

if TYPE_CHECKING:
    from .app import WebApp

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("llama_corral.access")

LINGER = 2.0
"""Seconds for which the body of a refused request is read and thrown away. A socket closed with unread data sends a
reset, and the client would lose the answer that tells it what was wrong."""

OPEN_PATHS = frozenset({"/health", "/ready"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}", re.ASCII)
_CORS_HEADERS = "authorization, content-type, last-event-id, x-request-id"


class _ClientLeftError(Exception):
    """The client closed the connection before its request was complete: there is nobody to answer."""


class Door:
    """The outermost ASGI application of a `WebApp`."""

    def __init__(self, app: WebApp) -> None:
        self.app = app
        settings = app.settings
        self.token = settings.token.get_secret_value().strip().encode() if settings.token else None
        self.origins = frozenset(settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await Exchange(self, scope, receive, send).run()
        elif scope["type"] == "lifespan":
            await self.app.quart(scope, receive, send)  # type: ignore[arg-type]
        else:
            await send({"type": "websocket.close", "code": 1000, "reason": None})

    def check(self, request: Request) -> None:
        """Refuse what can be refused by its head alone."""
        if "\0" in request.path:
            raise Malformed("the path contains a NUL character")
        if self.token is None:
            self._check_origin(request)
        elif request.path not in OPEN_PATHS:
            self._check_token(self.token, request)
        length = request.headers.get("content-length", "")
        if length and "transfer-encoding" in request.headers:
            # A proxy may believe the other one, and take for a request what we take for a body.
            raise Malformed("both Content-Length and Transfer-Encoding are given", hint="send one of them")
        limit = self.app.body_limit(request.path)
        if length.isdecimal() and int(length) > limit:
            raise self.too_large(limit)

    def too_large(self, limit: int) -> TooLarge:
        return TooLarge(f"the body is larger than {limit} bytes", hint="raise body_limit or send less", limit=limit)

    def cors_headers(self, request: Request) -> list[tuple[bytes, bytes]]:
        """Never with credentials: a token is sent by whoever has it, cookies mean nothing here."""
        origin = request.headers.get("origin")
        if not self.origins or origin is None:
            return []
        if "*" in self.origins:
            allowed = b"*"
        elif origin in self.origins:
            allowed = origin.encode("latin-1")
        else:
            return [(b"vary", b"Origin")]
        return [
            (b"access-control-allow-origin", allowed),
            (b"access-control-expose-headers", b"retry-after, x-request-id"),
            (b"vary", b"Origin"),
        ]

    def preflight(self, request: Request) -> Response | None:
        """The answer to a browser's question whether its page may call us; it carries no token."""
        headers = request.headers
        if request.method != "OPTIONS" or "origin" not in headers or "access-control-request-method" not in headers:
            return None
        if not {"*", headers["origin"]} & self.origins:
            return Response.error(ForeignOrigin("this server does not take requests from pages of that origin"))
        return Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE",
                "Access-Control-Allow-Headers": _CORS_HEADERS,
                "Access-Control-Max-Age": "600",
            },
        )

    def _check_origin(self, request: Request) -> None:
        # Without a token the network position is the only protection, and a page in the user's browser shares it.
        origin = request.headers.get("origin")
        if origin is None or request.method in SAFE_METHODS or {"*", origin} & self.origins:
            return
        if origin.partition("://")[2] != request.headers.get(
            "host"
        ):  # an origin has no path; and it may be no URL at all
            raise ForeignOrigin(
                "a page of another origin may not change anything here",
                hint="add its origin to CORRAL_CORS_ORIGINS if it may",
            )

    @staticmethod
    def _check_token(token: bytes, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        matches = hmac.compare_digest(given.strip().encode("latin-1"), token)
        if scheme.lower() != "bearer" or not matches:
            raise Unauthorized(
                "the token is missing" if not given else "the token is wrong",
                hint="send 'Authorization: Bearer TOKEN' with the server's CORRAL_TOKEN",
            )


class Exchange:
    """One request and its answer."""

    def __init__(self, door: Door, scope: Scope, receive: Receive, send: Send) -> None:
        self.door = door
        self.app = door.app
        self.scope = scope
        self._receive = receive
        self._send = send
        self.status = 0
        self.sent = 0
        self._replayed = False
        self.request = Request(scope, "", self.app.drain)
        given = self.request.headers.get("x-request-id", "")
        self.request.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["corral.exchange"] = self

    async def run(self) -> None:
        REQUEST_ID.set(self.request.id)  # each request has a task, hence a context, of its own
        started = time.perf_counter()
        try:
            await self._run()
        finally:
            if self.app.settings.access_log:
                self._log_access(time.perf_counter() - started)

    async def _run(self) -> None:
        refused = self.door.preflight(self.request)
        try:
            if refused is None:
                self.door.check(self.request)
                await self._read_body()
        except _ClientLeftError:
            return
        except CorralError as error:
            refused = Response.error(error)
        if refused is not None:
            await self._refuse(refused)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, nursery.cancel_scope, name="disconnect watch")
            await self._dispatch()
            nursery.cancel_scope.cancel()

    async def _dispatch(self) -> None:
        try:
            found = self.app.table.match(self.request.method, self.request.path)
            if found is not None and found[0].options.hot:
                route, self.request.path_params = found
                await self.deliver(await route.answer(self.request))
            else:
                await self.app.quart(self.scope, self._replay, self.send)  # type: ignore[arg-type]
        except Exception as error:
            if self.status:
                logger.exception("request %s failed after its answer had begun", self.request.id)
            else:
                await self.deliver(Response.error(error))

    async def deliver(self, answer: Answer) -> None:
        """Send an answer. A stream whose source fails is left without its last message, so that its body is cut."""
        if isinstance(answer, Response):
            await self.send(_start(answer.status, answer.raw_headers()))
            await self.send(_body(answer.body, last=True))
            return
        await self.send(_start(200, answer.raw_headers()))
        if self.request.method == "HEAD" or await answer.run(self._write, self.app.drain):
            await self.send(_body(b"", last=True))

    async def _write(self, data: bytes) -> None:
        await self.send(_body(data, last=False))

    async def send(self, message: Message) -> None:
        """Pass a message on to Hypercorn, which closes the connection, if it is to be closed, inside the last one.

        Only that one is shielded. Unshielded, the close it causes is heard as a disconnect and cancels it half-way:
        the socket stays open. Shielding every message would make a source that never waits immune to cancellation.
        """
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": self._headers(message["headers"])}
        else:
            self.sent += len(message.get("body", b""))
            if not message.get("more_body", False):
                with trio.CancelScope(shield=True):
                    await self._send(message)
                return
        await self._send(message)

    def _headers(self, given: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        headers = [*given, (b"x-request-id", self.request.id.encode()), *self.door.cors_headers(self.request)]
        if self.scope["http_version"].startswith("1"):
            if self.app.drain.is_set() and not any(name.lower() == b"connection" for name, _ in given):
                headers.append((b"connection", b"close"))
            return headers
        return [header for header in headers if header[0].lower() != b"connection"]  # forbidden from HTTP/2 on

    async def _read_body(self) -> None:
        chunks: list[bytes] = []
        size = 0
        settings, limit = self.app.settings, self.app.body_limit(self.request.path)
        with trio.move_on_after(settings.body_timeout) as scope:
            while True:
                message = await self._receive()
                if message["type"] != "http.request":
                    raise _ClientLeftError
                chunk = message.get("body", b"")
                if chunk:
                    size += len(chunk)
                    if size > limit:
                        raise self.door.too_large(limit)
                    chunks.append(chunk)
                if not message.get("more_body", False):
                    break
        if scope.cancelled_caught:
            raise TooSlow(
                f"the body did not arrive within {settings.body_timeout:g} s",
                hint="send it faster, or in smaller parts",
            )
        self.request.body = chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _refuse(self, answer: Response) -> None:
        """Answer a request whose body has not been read, then read on for a while and throw it away.

        Somebody must receive until the end: Hypercorn's reader waits for room in a small queue, and the last message
        waits for that reader.
        """
        headers = self.request.headers
        if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            answer.headers["Connection"] = "close"
        ended = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._discard, ended, name="discard body")
            await self.send(_start(answer.status, answer.raw_headers()))
            await self.send(_body(answer.body, last=False))
            with trio.move_on_after(LINGER):
                await ended.wait()
            await self.send(_body(b"", last=True))
            nursery.cancel_scope.cancel()

    async def _discard(self, ended: trio.Event) -> None:
        while True:
            message = await self._receive()
            if not message.get("more_body", False):
                ended.set()
            if message["type"] == "http.disconnect":
                return

    async def _watch(self, scope: trio.CancelScope) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self.request.detached:
            scope.cancel()

    async def _replay(self) -> Message:
        """What Quart receives: the body, then nothing. The disconnect is watched here, for all routes alike."""
        if not self._replayed:
            self._replayed = True
            return {"type": "http.request", "body": self.request.body, "more_body": False}
        await trio.sleep_forever()
        raise AssertionError("unreachable")

    def _log_access(self, seconds: float) -> None:
        client = (self.scope.get("client") or ("-",))[0]
        fields = {
            "method": self.request.method,
            "path": self.request.path,
            "status": self.status,
            "ms": round(seconds * 1000, 1),
            "bytes": self.sent,
            "client": client,
        }
        text = "%(client)s %(method)s %(path)r %(status)s %(bytes)s B %(ms)s ms"
        access_logger.info(text, fields, extra=fields)


def _start(status: int, headers: list[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def _body(data: bytes, *, last: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": not last}
