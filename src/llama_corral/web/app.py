"""The application: routes on Quart-Trio behind the door.

app = WebApp(settings, title="llama-corral control plane", version="0.1.0")
app.include(task_routes(core))
app.add_component("store", core.store_is_open)
await nursery.start(partial(serve, app, settings, stop=stop))
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import trio
from quart import Response as QuartResponse
from quart import request as quart_request
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import HTTPException

from ..exceptions import Draining, Unavailable
from ..settings import ServerSettings
from .door import Door, Exchange, Receive, Send
from .errors import refusal
from .messages import Request, Response, Scope
from .openapi import describe, render
from .routes import Handler, Route, Routes, RouteTable
from .streams import Stream

logger = logging.getLogger(__name__)


class _Connection(TrioASGIHTTPConnection):
    """Quart's connection, but a `Stream` is sent by the code that the hot routes use too: it is no generator."""

    async def _send_response(self, send: Any, response: Any) -> None:
        if isinstance(response, _StreamResponse):
            exchange: Exchange = self.scope["corral.exchange"]  # type: ignore[typeddict-item]
            await exchange.deliver(response.stream)
        else:
            await super()._send_response(send, response)


class _StreamResponse(TrioResponse):
    def __init__(self, stream: Stream) -> None:
        super().__init__(b"", content_type=stream.content_type)
        self.timeout = None  # Quart's default cuts a stream after a minute
        self.stream = stream


class _Quart(QuartTrio):
    asgi_http_class = _Connection


class WebApp(Routes):
    """An HTTP application: an ASGI callable that takes routes. Give it to `serve`.

    Every app has `/health` (200 while the process lives), `/ready` (503 while it drains or a component is not ready),
    `/openapi.json` and `/docs`.

    Attributes:
        drain: Set when the server stops. Streams and long polls end on it; from then on every answer closes its
            connection.
        quart: The Quart application. Blueprints mounted on it get the door's checks and error shape as well, but are
            not in the OpenAPI document.
    """

    def __init__(self, settings: ServerSettings, *, title: str, version: str, description: str = "") -> None:
        super().__init__()
        self.settings = settings
        self.title = title
        self.version = version
        self.description = description
        self.drain = trio.Event()
        self.table = RouteTable()
        self.quart = self._make_quart()
        self._body_limits: dict[str, int] = {}
        self._components: dict[str, Callable[[], bool]] = {}
        self._document: dict[str, Any] | None = None
        self._door = Door(self)
        self.include(self._own_routes())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._door(scope, receive, send)

    def add(self, method: str, path: str, handler: Handler, **options: Any) -> Route:
        route = super().add(method, path, handler, **options)
        self._mount(route)
        return route

    def hot(self, method: str, path: str, handler: Handler, **options: Any) -> Route:
        """`add` a route that is answered in front of Quart. The same as `hot=True` in the decorators."""
        return self.add(method, path, handler, hot=True, **options)

    def include(self, routes: Iterable[Route]) -> None:
        """Take over all routes of a collection."""
        for route in routes:
            self._routes.append(route)
            self._mount(route)

    def add_component(self, name: str, is_ready: Callable[[], bool]) -> None:
        """Let `/ready` depend on `is_ready()`, a quick look at memory; it is called for every probe."""
        self._components[name] = is_ready

    def body_limit(self, path: str) -> int:
        """The largest body in bytes that a request to the path may have."""
        return max(self.settings.body_limit, self._body_limits.get(path, 0))

    @property
    def document(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if self._document is None:
            self._document = describe(self, self, secured=self.settings.token is not None)
        return self._document

    def _mount(self, route: Route) -> None:
        self._document = None
        self.table.add(route)
        if route.options.body_limit:
            self._body_limits[route.path] = route.options.body_limit

        async def view(**path_params: str) -> QuartResponse:
            request: Request = quart_request.scope["corral.exchange"].request  # type: ignore[typeddict-item]
            request.path_params = path_params
            answer = await route.answer(request)
            if isinstance(answer, Stream):
                return _StreamResponse(answer)
            return _quart_response(answer)

        rule = route.path.replace("{", "<").replace("}", ">")
        endpoint = f"{route.method} {route.path}".replace(".", "_")
        self.quart.add_url_rule(rule, endpoint, view, methods=[route.method])

    def _make_quart(self) -> QuartTrio:
        quart = _Quart("llama_corral.web", static_folder=None)
        quart.url_map.merge_slashes = False  # an empty part is another path, not a typo to redirect
        quart.config.update(
            MAX_CONTENT_LENGTH=self.settings.body_limit,
            BODY_TIMEOUT=None,  # the door has read it
            RESPONSE_TIMEOUT=None,  # it would cut an answer silently; the socket has a timeout of its own
            PROPAGATE_EXCEPTIONS=False,
        )
        quart.register_error_handler(HTTPException, _answer_error)
        quart.register_error_handler(Exception, _answer_error)
        return quart

    def _own_routes(self) -> Routes:
        routes = Routes(tag="server")
        routes.add("GET", "/health", self._health, hot=True)
        routes.add("GET", "/ready", self._ready, hot=True)
        routes.add("GET", "/openapi.json", self._openapi, hidden=True)
        routes.add("GET", "/docs", self._docs, hidden=True)
        return routes

    async def _health(self) -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    async def _ready(self) -> dict[str, str]:
        """The server takes work. 503 while it drains or while one of its components is not ready."""
        if self.drain.is_set():
            raise Draining("this server is stopping", hint="use another one")
        missing = [name for name, is_ready in self._components.items() if not is_ready()]
        if missing:
            raise Unavailable(f"not ready: {', '.join(missing)}")
        return {"status": "ready"}

    async def _openapi(self) -> dict[str, Any]:
        return self.document

    async def _docs(self) -> Response:
        return Response(render(self.document).encode(), content_type="text/html; charset=utf-8")


async def _answer_error(error: Exception) -> Any:
    await trio.lowlevel.checkpoint()  # async at all only because Quart runs a sync error handler in a thread
    if isinstance(error, HTTPException) and (error.code or 500) < 400:
        return error  # a redirect is no error
    return _quart_response(Response.of_refusal(refusal(error)))


def _quart_response(answer: Response) -> QuartResponse:
    response = TrioResponse(answer.body, answer.status, answer.headers, content_type=answer.content_type)
    if answer.status == 204:
        del response.headers["content-type"]
    return response
