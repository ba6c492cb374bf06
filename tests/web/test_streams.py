"""Streams and long polls: piece by piece, ended by the drain with complete bodies, cut when their source fails."""

from __future__ import annotations

import json
import logging

import pytest
import trio
import trio.testing

from llama_corral.web import (
    Request,
    Response,
    ServerEvent,
    Stream,
    Wakeup,
    last_event_id,
    ndjson,
    sse,
    wait_changed,
)

pytestmark = [pytest.mark.trio, pytest.mark.timeout(10)]


class Log:
    """An event log with a wake-up, as the stores have one."""

    def __init__(self) -> None:
        self.items: list[int] = []
        self.done = False
        self.changed = trio.Event()

    def append(self, item: int) -> None:
        self.items.append(item)
        self.wake()

    def close(self) -> None:
        self.done = True
        self.wake()

    def wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def read(self, start: int = 0):  # noqa: ASYNC900 - a stream's source is one
        index = start
        while True:
            changed = self.changed
            while index < len(self.items):
                yield index, self.items[index]
                index += 1
            if self.done:
                return
            await changed.wait()


def stream_app(make_app, log: Log, hot: bool, heartbeat: float = 15.0, **settings):
    app = make_app(**settings)

    async def lines(request: Request) -> Stream:
        return ndjson(log.read(), convert=lambda found: {"n": found[1]})

    async def events(request: Request) -> Stream:
        last = last_event_id(request)
        source = log.read(0 if last is None else last + 1)
        return sse(source, convert=lambda found: ServerEvent({"n": found[1]}, id=found[0]), heartbeat=heartbeat)

    async def poll(request: Request) -> Response:
        woken = await wait_changed(lambda: log.changed.wait(), request.drain, 5)
        return Response.json(None if woken is Wakeup.DRAIN else woken.value)

    app.add("GET", "/lines", lines, hot=hot)
    app.add("GET", "/events", events, hot=hot)
    app.add("GET", "/poll", poll, hot=hot)
    return app


@pytest.mark.promise("P3")
async def test_lines_arrive_as_they_are_written(make_app, running, hot):
    log = Log()
    async with running(stream_app(make_app, log, hot)) as server, server.connect() as client:
        await client.request("GET", "/lines")
        head = await client.head()
        assert head.headers["content-type"] == "application/x-ndjson"
        for item in range(3):
            log.append(item)
            assert json.loads(await client.chunk()) == {"n": item}
        log.close()
        assert await client.chunk() == b""
        assert (await client.ask("GET", "/health")).status == 200  # the connection lives on


async def test_a_stream_outlives_every_timeout(make_app, running, hot):
    log = Log()
    app = stream_app(make_app, log, hot, heartbeat=0.05, keep_alive_timeout=0.2, body_timeout=0.2)
    app.quart.config["RESPONSE_TIMEOUT"] = 0.2
    async with running(app) as server, server.connect() as client:
        await client.request("GET", "/events")
        await client.head()
        for _ in range(10):  # 10 heartbeats are 0.5 s of silence
            assert await client.chunk() == b": keep-alive\n\n"
        log.append(1)
        log.close()
        rest = b""
        while chunk := await client.chunk():
            rest += chunk
        assert b'id: 0\ndata: {"n":1}\n\n' in rest


@pytest.mark.promise("P3")
async def test_a_reader_that_drops_and_resumes_sees_every_event_once(make_app, running, hot):
    log = Log()
    for item in range(200):
        log.append(item)
    log.close()
    seen: list[int] = []
    async with running(stream_app(make_app, log, hot)) as server:
        while len(seen) < 200:
            async with server.connect() as client:
                await client.request("GET", "/events", **({"Last-Event-ID": str(seen[-1])} if seen else {}))
                await client.head()
                for _ in range(37):
                    if not (chunk := await client.chunk()):
                        break
                    seen.append(int(chunk.split(b"\n")[0].removeprefix(b"id: ")))
    assert seen == list(range(200))


@pytest.mark.promise("P9")
@pytest.mark.parametrize("given", ["abc", "-5", "+5", "1.0", "1e3", "0x10", "\xb2", "1_000", "9" * 30, "1, 2", ""])
async def test_a_last_event_id_that_is_no_index_is_refused(make_app, running, hot, given):
    async with running(stream_app(make_app, Log(), hot)) as server:
        answer = await server.ask("GET", "/events", Last_Event_ID=given)
    assert (answer.status, answer.json()["error"]["code"]) == (422, "bad_input")


@pytest.mark.promise("P7")
async def test_the_drain_ends_everything_with_complete_bodies(make_app, running, hot):
    log = Log()
    app = stream_app(make_app, log, hot, graceful_timeout=5)
    entered, release = trio.Event(), trio.Event()

    async def short() -> str:
        entered.set()
        await release.wait()
        return "short"

    app.add("GET", "/short", short, hot=hot)
    async with (
        running(app) as server,
        server.connect() as lines,
        server.connect() as events,
        server.connect() as poll,
        server.connect() as busy,
    ):
        for client, path in ((lines, "/lines"), (events, "/events"), (poll, "/poll"), (busy, "/short")):
            await client.request("GET", path)
        await lines.head()
        await events.head()
        await entered.wait()
        await trio.testing.wait_all_tasks_blocked(0.01)
        started = trio.current_time()
        server.stop.set()
        assert await lines.chunk() == b""
        assert await events.chunk() == b"event: drain\ndata: {}\n\n"
        assert await events.chunk() == b""
        polled = await poll.answer()
        assert (polled.status, polled.json(), polled.headers["connection"]) == (200, None, "close")
        for client in (lines, events, poll):
            await client.eof()
        assert trio.current_time() - started < 0.5
        assert not server.ended.is_set()
        release.set()
        assert (await busy.answer()).json() == "short"
        await server.ended.wait()


async def test_a_farewell_line(make_app, running, hot):
    log = Log()
    app = make_app()

    async def lines() -> Stream:
        return ndjson(log.read(), farewell={"control": "drain"})

    app.add("GET", "/lines", lines, hot=hot)
    async with running(app) as server, server.connect() as client:
        await client.request("GET", "/lines")
        await client.head()
        server.stop.set()
        assert await client.chunk() == b'{"control":"drain"}\n'
        assert await client.chunk() == b""


async def test_a_source_may_end_itself_on_drain(make_app, running, hot):
    app = make_app(graceful_timeout=5)

    async def lines(request: Request) -> Stream:
        async def source():  # noqa: ASYNC900 - a stream's source is one
            yield 1
            await request.drain.wait()
            yield 2

        return ndjson(source(), ends_on_drain=False)

    app.add("GET", "/lines", lines, hot=hot)
    async with running(app) as server, server.connect() as client:
        await client.request("GET", "/lines")
        await client.head()
        assert await client.chunk() == b"1\n"
        server.stop.set()
        assert await client.chunk() == b"2\n"
        assert await client.chunk() == b""


async def test_a_source_that_raises_leaves_an_incomplete_body(make_app, running, hot, caplog):
    app = make_app()

    async def broken():  # noqa: ASYNC900 - a stream's source is one
        yield {"n": 1}
        raise KeyError("hunter2")

    async def lines() -> Stream:
        return ndjson(broken())

    app.add("GET", "/lines", lines, hot=hot)
    async with running(app) as server, server.connect() as client:
        answer = await client.ask("GET", "/lines", X_Request_ID="find-me")
        assert (answer.status, answer.body, answer.complete) == (200, b'{"n":1}\n', False)
        assert (await server.ask("GET", "/health")).status == 200
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "find-me" in record.getMessage()


@pytest.mark.promise("P6")
@pytest.mark.parametrize("path", ["/lines", "/events"])
async def test_a_reader_that_leaves_ends_the_source_and_its_cleanup_runs(make_app, running, hot, path):
    ended = trio.Event()
    app = make_app()

    async def source():  # noqa: ASYNC900 - a stream's source is one
        try:
            yield 1
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            ended.set()

    async def lines() -> Stream:
        return ndjson(source())

    async def events() -> Stream:
        return sse(source())

    app.add("GET", "/lines", lines, hot=hot)
    app.add("GET", "/events", events, hot=hot)
    async with running(app) as server:
        async with server.connect() as client:
            await client.request("GET", path)
            await client.head()
            await client.chunk()
            left = trio.current_time()
        await ended.wait()
        print(f"latency: {(trio.current_time() - left) * 1000:.2f} ms")
        assert trio.current_time() - left < 0.5


@pytest.mark.promise("P6")
async def test_a_source_that_never_waits_ends_with_its_reader(make_app, running, hot):
    ended = trio.Event()
    app = make_app()

    async def source():  # noqa: ASYNC900 - a stream's source is one
        try:
            while True:
                yield b"x" * 1000
        finally:
            ended.set()

    async def lines() -> Stream:
        return ndjson(source())

    app.add("GET", "/lines", lines, hot=hot)
    async with running(app) as server:
        async with server.connect() as client:
            await client.request("GET", "/lines")
            await client.head()
        await ended.wait()


@pytest.mark.promise("P12")
async def test_a_slow_reader_holds_its_source_back(make_app, running, hot):
    made = 0
    app = make_app(user_timeout=0.2)

    async def source():  # noqa: ASYNC900 - a stream's source is one
        nonlocal made
        while True:
            made += 1
            yield b"x" * 100_000

    async def lines() -> Stream:
        return ndjson(source())

    app.add("GET", "/lines", lines, hot=hot)
    async with running(app) as server, server.connect() as client:
        await client.request("GET", "/lines")
        await client.head()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert made < 200  # socket buffers, nothing else


async def test_head_of_a_stream_ends(make_app, running, hot):
    async with running(stream_app(make_app, Log(), hot)) as server, server.connect() as client:
        await client.request("HEAD", "/events")
        answer = await client.head()
        assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
        assert (await client.ask("GET", "/health")).status == 200


async def test_encoding_of_events():
    assert ServerEvent("a\nb\r\nc", id=3, event="x").encode() == b"id: 3\nevent: x\ndata: a\ndata: b\ndata: c\n\n"
    assert ServerEvent("", id="1\nevent: forged\0").encode() == b"id: 1event: forged\ndata: \n\n"
    assert ServerEvent({"n": float("nan")}).encode() == b'data: {"n":null}\n\n'


async def test_a_long_poll_wakes_for_one_of_three_reasons(autojump_clock):
    drain, changed = trio.Event(), trio.Event()
    assert await wait_changed(changed.wait, drain, 1) is Wakeup.DEADLINE
    changed.set()
    assert await wait_changed(changed.wait, drain, 1) is Wakeup.CHANGED
    drain.set()
    assert await wait_changed(trio.sleep_forever, drain, 1) is Wakeup.DRAIN


async def test_an_error_while_waiting_comes_out_as_it_is(autojump_clock):
    async def broken() -> None:
        await trio.sleep(0.1)
        raise KeyError("store")

    with pytest.raises(KeyError, match="store"):
        await wait_changed(broken, trio.Event(), 1)
