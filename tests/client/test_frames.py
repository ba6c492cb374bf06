"""Streams that a server ends in other ways than with the ending: scripted answers, one a connection."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
from anyio.from_thread import BlockingPortal

from llama_corral.client import Client
from llama_corral.exceptions import CorralError, NotFound, StoreUnavailable

END = 'event: end\ndata: {"task_id": "t", "result": "1", "value": 1}\n\n'


def event(index: int | str) -> str:
    return f'id: {index}\nevent: Tick\ndata: {{"n": 1}}\n\n'


def error(code: str) -> str:
    return f"event: error\ndata: {json.dumps({'error': {'code': code, 'message': code, 'hint': None}})}\n\n"


@dataclass
class Script:
    """A server that answers each connection with the next text as its event stream."""

    url: str
    bodies: list[str] = field(default_factory=list)
    asked: list[bytes] = field(default_factory=list)

    async def answer(self, stream: trio.SocketStream) -> None:
        async with stream:
            self.asked.append(await stream.receive_some(65536))
            head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
            await stream.send_all((head + self.bodies.pop(0)).encode())


@pytest.fixture
def script(trio_thread: BlockingPortal) -> Iterator[Script]:
    @asynccontextmanager
    async def serving() -> AsyncIterator[Script]:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        script = Script(f"http://127.0.0.1:{listener.socket.getsockname()[1]}")
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, script.answer, [listener])
            yield script
            nursery.cancel_scope.cancel()

    with trio_thread.wrap_async_context_manager(serving()) as script:
        yield script


async def read(url: str, start: int = 0) -> list[int]:
    async with Client(url, reconnect_for=1) as client, client.task("t").events(start) as events:
        indexes = [event.index async for event in events]
        assert events.record is not None
        assert events.record.value == 1
    return indexes


@pytest.mark.anyio
@pytest.mark.promise("P3")
@pytest.mark.parametrize(
    "first",
    [
        event(5) + event(6) + 'event: drain\ndata: {"from": 7}\n\n',
        event(5) + event(6) + error("store_unavailable"),
        event(5) + event(6),
        event(5) + event(6) + event(8),
        event(5) + event(6) + ": heartbeat\n\nevent: of-the-future\ndata: {}\n\n" + event(7)[:-3],
    ],
    ids=["drain", "error", "cut", "gap", "cut in a frame"],
)
async def test_it_connects_again(script: Script, anyio_backend: str, first: str) -> None:
    script.bodies = [first, event(6) + event(7) + END]
    assert await read(script.url, 5) == [5, 6, 7]
    assert b"GET /tasks/t/events?from=5 " in script.asked[0]
    assert b"last-event-id: 6\r\n" in script.asked[1].lower()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (error("not_found"), NotFound),
        (event("+1"), CorralError),
        ("id: 0\nevent: x\ndata: {\n\n", CorralError),
        ("event: end\ndata: {}\n\n", CorralError),
    ],
    ids=["not found", "id", "fields", "ending"],
)
async def test_it_raises(script: Script, anyio_backend: str, body: str, kind: type[CorralError]) -> None:
    script.bodies = [body]
    with pytest.raises(kind):
        await read(script.url)


@pytest.mark.anyio
async def test_it_gives_up(script: Script, anyio_backend: str) -> None:
    script.bodies = [error("store_unavailable")] * 30
    async with Client(script.url, reconnect_for=0.2) as client, client.task("t").events() as events:
        with pytest.raises(StoreUnavailable):
            await anext(events)
