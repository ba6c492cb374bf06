"""A real Hypercorn on a free port, and a client that speaks HTTP on a raw socket, so that every byte is the test's."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

from llama_corral.settings import ServerSettings
from llama_corral.web import WebApp, serve


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes = b""
    complete: bool = True

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection."""

    def __init__(self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> None:
        self.stream = stream
        self.buffer = bytearray()

    async def send(self, data: bytes | str) -> None:
        await self.stream.send_all(data.encode("latin-1") if isinstance(data, str) else data)

    async def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> None:
        headers = {"Host": "test", **{name.replace("_", "-"): value for name, value in headers.items()}}
        if body:
            headers = {"Content-Length": str(len(body)), "Content-Type": "application/json"} | headers
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        await self.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body)

    async def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        await self.request(method, path, body, **headers)
        return await self.answer()

    async def head(self) -> Answer:
        """The next response without its body, skipping 100 Continue."""
        raw = (await self._until(b"\r\n\r\n")).decode("latin-1")
        first, *lines = raw.strip().split("\r\n")
        status = int(first.split(" ")[1])
        if status == 100:
            return await self.head()
        pairs = (line.split(": ", 1) for line in lines)
        return Answer(status, {name.lower(): value for name, value in pairs})

    async def answer(self) -> Answer:
        found = await self.head()
        try:
            if "content-length" in found.headers:
                found.body = await self._exactly(int(found.headers["content-length"]))
            elif found.headers.get("transfer-encoding") == "chunked":
                while chunk := await self.chunk():
                    found.body += chunk
        except EOFError:
            found.complete = False
        return found

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body; empty at its proper end, EOFError if the body is cut."""
        size = int(await self._until(b"\r\n"), 16)
        return (await self._exactly(size + 2))[:-2]

    async def eof(self) -> None:
        """Wait for the server to close the connection."""
        try:
            while await self.stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass  # a reset is a close

    async def _until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            await self._more()
        found, _, rest = bytes(self.buffer).partition(mark)
        self.buffer = bytearray(rest)
        return found

    async def _exactly(self, count: int) -> bytes:
        while len(self.buffer) < count:
            await self._more()
        found = bytes(self.buffer[:count])
        del self.buffer[:count]
        return found

    async def _more(self) -> None:
        data = await self.stream.receive_some()
        if not data:
            raise EOFError
        self.buffer += data


@dataclass
class Server:
    app: WebApp
    url: str
    port: int
    stop: trio.Event
    ended: trio.Event = field(default_factory=trio.Event)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Client]:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        async with stream:
            yield Client(stream)

    async def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        """One request on a connection of its own."""
        async with self.connect() as client:
            return await client.ask(method, path, body, **headers)


@pytest.fixture
def make_app() -> Callable[..., WebApp]:
    """Makes an app; arguments are those of ServerSettings."""

    def make(**settings: Any) -> WebApp:
        return WebApp(ServerSettings(**{"port": 0, **settings}), title="test", version="1.0")

    return make


@pytest.fixture
def running() -> Callable[[WebApp], Any]:
    """`async with running(app) as server`."""

    @asynccontextmanager
    async def run(app: WebApp) -> AsyncIterator[Server]:
        stop = trio.Event()
        async with trio.open_nursery() as nursery:

            async def task(task_status: trio.TaskStatus[list[str]]) -> None:
                await serve(app, app.settings, stop=stop, task_status=task_status)
                server.ended.set()

            (url,) = await nursery.start(task)
            server = Server(app, url, int(url.rpartition(":")[2]), stop)
            with trio.fail_after(8):
                yield server
            nursery.cancel_scope.cancel()

    return run


@pytest.fixture(params=["quart", "hot"])
def hot(request: pytest.FixtureRequest) -> bool:
    """Both ways in which a route is answered."""
    return bool(request.param == "hot")
