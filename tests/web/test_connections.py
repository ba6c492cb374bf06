"""Connections: that they really close, that no limit has a way around, and that a client that leaves is noticed.

The faults behind these tests are those of Hypercorn 0.18 with Quart-Trio 0.12; `door.py` says how each is met.
"""

from __future__ import annotations

import logging
import os
import socket
import struct

import httpx
import pytest
import trio
import trio.testing

from llama_corral.web import door

pytestmark = [pytest.mark.trio, pytest.mark.timeout(10), pytest.mark.promise("P9")]


async def ok() -> str:
    return "ok"


def make_ok(make_app, hot, **settings):
    app = make_app(**settings)
    app.add("GET", "/ok", ok, hot=hot)
    app.add("POST", "/ok", ok, hot=hot)  # never looks at its body
    return app


async def test_connection_close_closes(make_app, running, hot):
    async with running(make_ok(make_app, hot)) as server, server.connect() as client:
        assert (await client.ask("GET", "/ok", Connection="close")).status == 200
        await client.eof()


async def test_http_1_0_closes(make_app, running, hot):
    async with running(make_ok(make_app, hot)) as server, server.connect() as client:
        await client.send("GET /ok HTTP/1.0\r\n\r\n")
        assert (await client.answer()).body == b'"ok"'
        await client.eof()


async def test_an_idle_connection_is_closed(make_app, running, hot):
    app = make_ok(make_app, hot, keep_alive_timeout=0.4)
    async with running(app) as server, server.connect() as client:
        assert (await client.ask("GET", "/ok")).status == 200
        assert (await client.ask("GET", "/ok")).status == 200
        await client.eof()


@pytest.mark.parametrize("begun", ["", "GET /ok HTTP/1.1\r\nHost: x\r\nX-Slow"])
async def test_headers_that_do_not_come_close_the_connection(make_app, running, begun):
    async with running(make_ok(make_app, False, keep_alive_timeout=0.1)) as server, server.connect() as client:
        await client.send(begun)
        await client.eof()


async def test_headers_that_are_too_large(make_app, running):
    async with running(make_ok(make_app, False, header_limit=2000)) as server, server.connect() as client:
        await client.send("GET /ok HTTP/1.1\r\nHost: x\r\nX-Big: " + "a" * 100_000)
        assert (await client.answer()).status == 431
        await client.eof()


async def test_no_descriptors_are_left_behind(make_app, running, hot):
    async with running(make_ok(make_app, hot)) as server:
        await server.ask("GET", "/ok", Connection="close")
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            async with server.connect() as client:
                await client.ask("GET", "/ok", Connection="close")
                await client.eof()
        assert len(os.listdir("/proc/self/fd")) <= before + 2


async def test_connections_that_clients_closed_are_not_kept_until_they_are_idle_for_too_long(make_app, running, hot):
    async with running(make_ok(make_app, hot, keep_alive_timeout=60)) as server:
        await server.ask("GET", "/ok", Connection="close")
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            await server.ask("GET", "/ok")
        while len(os.listdir("/proc/self/fd")) > before:
            await trio.testing.wait_all_tasks_blocked()


async def test_head_and_body_of_an_answer_are_one_write(make_app, running, hot):
    async with running(make_ok(make_app, hot)) as server, server.connect() as client:
        for _ in range(5):
            await client.request("GET", "/ok")
            answer = await client.stream.receive_some()
            assert answer.startswith(b"HTTP/1.1 200")
            assert answer.endswith(b'\r\n\r\n"ok"')


@pytest.mark.parametrize("path", ["/ok", "/nowhere"])
async def test_the_answer_to_a_head_request_ends(make_app, running, path):
    async with running(make_ok(make_app, False)) as server, server.connect() as client:
        for _ in range(2):
            await client.request("HEAD", path)
            assert (await client.head()).status == (200 if path == "/ok" else 404)


async def test_a_busy_connection_is_not_idle(make_app, running, hot):
    app = make_app(keep_alive_timeout=0.2)

    async def slow() -> str:
        await trio.sleep(0.5)
        return "ok"

    app.add("GET", "/slow", slow, hot=hot)
    async with running(app) as server, server.connect() as client:
        assert (await client.ask("GET", "/slow")).body == b'"ok"'
        await client.eof()


def upload(size: int, chunked: bool, path: str = "/ok", expect: bool = False) -> tuple[str, bytes]:
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    extra = "Expect: 100-continue\r\n" if expect else ""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{extra}Content-Type: application/json\r\n{length}\r\n\r\n"
    body = b"x" * size
    if chunked:
        pieces = [body[start : start + 8192] for start in range(0, size, 8192)]
        body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    return head, body


@pytest.mark.parametrize("path", ["/ok", "/nowhere"])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("size", [2_000, 160_000, 5_000_000])
async def test_a_body_over_the_limit_is_refused_and_the_answer_arrives(make_app, running, hot, size, chunked, path):
    async with running(make_ok(make_app, hot, body_limit=1000)) as server, server.connect() as client:
        head, body = upload(size, chunked, path)
        await client.send(head)
        await client.send(body)  # all of it, before looking at the answer: it must not be lost in a reset
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert answer.json()["error"]["code"] == "too_large"
        await client.eof()
        assert (await server.ask("GET", "/ok")).status == 200


async def test_a_body_at_the_limit_is_taken(make_app, running, hot):
    async with running(make_ok(make_app, hot, body_limit=1000)) as server, server.connect() as client:
        for chunked in (False, True):
            head, body = upload(1000, chunked)
            await client.send(head)
            await client.send(body)
            assert (await client.answer()).status == 200


async def test_a_client_that_expects_100_is_refused_and_disconnected(make_app, running):
    async with running(make_ok(make_app, False, body_limit=1000)) as server, server.connect() as client:
        head, _ = upload(5_000_000, False, expect=True)
        await client.send(head)
        assert (await client.answer()).status == 413
        await client.stream.send_eof()
        await client.eof()


async def test_a_pooled_client_goes_on_after_a_413(make_app, running, hot):
    async with running(make_ok(make_app, hot, body_limit=1000)) as server, httpx.AsyncClient() as client:
        for size in (2_000, 5_000_000):
            assert (await client.post(f"{server.url}/ok", content=b"x" * size)).status_code == 413
            assert (await client.get(f"{server.url}/ok")).status_code == 200


async def send_without_end(client):
    while True:
        await client.send(b"2000\r\n%s\r\n" % (b"x" * 0x2000))


@pytest.mark.promise("P12")
async def test_an_upload_without_end_is_cut(make_app, running, monkeypatch):
    monkeypatch.setattr(door, "LINGER", 0.1)
    async with running(make_ok(make_app, False, body_limit=1000)) as server, server.connect() as client:
        await client.send("POST /ok HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(trio.BrokenResourceError):
            await send_without_end(client)
        assert (await server.ask("GET", "/ok")).status == 200


async def test_a_wrong_token_with_a_large_body(make_app, running):
    async with running(make_ok(make_app, False, token="t")) as server, server.connect() as client:
        head, body = upload(5_000_000, False)
        await client.send(head)
        await client.send(body)
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (401, "close")
        await client.eof()


@pytest.mark.parametrize("path", ["/ok", "/nowhere"])
@pytest.mark.parametrize("begun", ["Content-Length: 10\r\n\r\nabc", "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"])
async def test_a_body_that_does_not_come_is_refused_in_time(make_app, running, hot, begun, path, monkeypatch):
    monkeypatch.setattr(door, "LINGER", 0.1)
    async with running(make_ok(make_app, hot, body_timeout=0.1)) as server, server.connect() as client:
        await client.send(f"POST {path} HTTP/1.1\r\nHost: x\r\n{begun}")
        answer = await client.answer()
        assert (answer.status, answer.json()["error"]["code"]) == (408, "too_slow")
        assert answer.headers["connection"] == "close"
        await client.eof()


async def test_a_body_that_nobody_reads_does_not_hurt_the_next_request(make_app, running, hot):
    async with running(make_ok(make_app, hot)) as server, server.connect() as client:
        for _ in range(3):
            assert (await client.ask("POST", "/ok", b"x" * 500_000)).status == 200
        assert (await client.ask("POST", "/nowhere", b"x" * 500_000)).status == 404
        assert (await client.ask("GET", "/ok")).status == 200


class Waiting:
    """A handler that waits for ever and tells when it was cancelled."""

    def __init__(self) -> None:
        self.entered = trio.Event()
        self.cancelled = trio.Event()
        self.release = trio.Event()
        self.at = 0.0

    async def __call__(self) -> str:
        self.entered.set()
        try:
            await self.release.wait()
        except trio.Cancelled:
            self.at = trio.current_time()
            self.cancelled.set()
            raise
        return "done"

    async def in_a_nursery(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self)
            nursery.start_soon(trio.sleep_forever)


async def leave(client, how: str) -> None:
    if how == "half-close":
        await client.stream.send_eof()
        return
    if how == "reset":
        client.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.stream.socket.close()


@pytest.mark.promise("P6")
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nursery"])
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
async def test_a_client_that_leaves_cancels_its_handler(make_app, running, hot, how, nested, caplog):
    waiting = Waiting()
    app = make_app()
    app.add("POST", "/wait", waiting.in_a_nursery if nested else waiting.__call__, hot=hot)
    async with running(app) as server, server.connect() as client:
        await client.request("POST", "/wait", b"{}")
        await waiting.entered.wait()
        left = trio.current_time()
        await leave(client, how)
        await waiting.cancelled.wait()
        print(f"latency: {(waiting.at - left) * 1000:.2f} ms")
        assert waiting.at - left < 0.5
        assert (await server.ask("GET", "/health")).status == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_detached_handler_goes_on_without_its_client(make_app, running, hot):
    waiting = Waiting()
    finished = trio.Event()

    async def handler() -> str:
        await waiting()
        finished.set()
        return "done"

    app = make_app()
    app.add("POST", "/wait", handler, hot=hot, detached=True)
    async with running(app) as server, server.connect() as client:
        await client.request("POST", "/wait", b"{}")
        await waiting.entered.wait()
        await leave(client, "close")
        await server.ask("GET", "/health")
        waiting.release.set()
        await finished.wait()
        assert not waiting.cancelled.is_set()


async def test_a_half_closed_client_still_gets_the_answer_of_a_detached_handler(make_app, running, hot):
    waiting = Waiting()
    app = make_app()
    app.add("POST", "/wait", waiting.__call__, hot=hot, detached=True)
    async with running(app) as server, server.connect() as client:
        await client.request("POST", "/wait", b"{}")
        await waiting.entered.wait()
        await client.stream.send_eof()
        await server.ask("GET", "/health")
        waiting.release.set()
        assert (await client.answer()).json() == "done"


async def test_a_client_that_leaves_during_its_body_leaves_nothing(make_app, running, caplog):
    async with running(make_ok(make_app, False)) as server:
        async with server.connect() as client:
            await client.send("POST /ok HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        assert (await server.ask("GET", "/health")).status == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
