from __future__ import annotations

import json
from dataclasses import replace

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_corral.events import (
    SSE_HEARTBEAT,
    Changes,
    NdjsonBody,
    SseBody,
    ndjson_line,
    parse_cursor,
    read_log,
    sse_end,
    sse_event,
)
from llama_corral.exceptions import BadInput, StoreUnavailable
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ErrorRecord, TaskResult
from llama_corral.protocol.records import StoredEvent

from .fakes import FakeLog

# What can end a line for a client, in any combination with other text.
texts = st.text(alphabet=st.one_of(st.sampled_from('\n\r\x85\u2028\u2029\x0b\x0c\x1c\x1d\x1e{}":\\'), st.characters()))


def lines_of(body: bytes) -> list[str]:
    """As the original's client splits a stream: httpx decodes and uses `str.splitlines`."""
    return body.decode().splitlines()


@pytest.mark.promise("P3")
@given(fields=st.dictionaries(texts, texts, max_size=3), ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
def test_an_event_is_one_line_and_the_same_value(fields: dict[str, str], ascii_only: bool, indent: int | None) -> None:
    # Raw surrogates cannot travel as UTF-8: JSON text with them is escaped by whoever writes it.
    payload = json.dumps(fields, ensure_ascii=ascii_only or not _encodable(fields), indent=indent)
    event = StoredEvent(3, 1, "Progress", payload)
    [line] = lines_of(ndjson_line(event))
    assert json.loads(line) == fields
    first, second, third, blank = sse_event(event).decode().split("\n", 3)
    assert (first, second, blank) == ("id: 3", "event: Progress", "\n")
    assert json.loads(third.removeprefix("data: ")) == fields


def _encodable(fields: dict[str, str]) -> bool:
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def test_frames_to_the_byte() -> None:
    event = StoredEvent(7, 1, "app.Progress", '{"percent": 40}')
    assert ndjson_line(event) == b'{"percent": 40}\n'
    assert sse_event(event) == b'id: 7\nevent: app.Progress\ndata: {"percent": 40}\n\n'
    assert sse_event(replace(event, type="a\nid: 9")) == b'id: 7\nevent: a id: 9\ndata: {"percent": 40}\n\n'


def test_the_end_frame_is_the_result_and_moves_no_cursor(store: FakeLog) -> None:
    store.end()
    assert store.record is not None
    kind, data = sse_end(store.record).decode().strip().split("\n")
    assert kind == "event: end"
    result = TaskResult.model_validate_json(data.removeprefix("data: "))
    assert (result.task_id, result.status, result.result, result.value) == ("t", "completed", "a=1", {"a": 1})
    failed = replace(store.record, error=ErrorRecord(type="ValueError", message="no\nway"), result=None)
    assert "id:" not in sse_end(failed).decode()


@pytest.mark.promise("P9")
def test_cursors() -> None:
    assert parse_cursor() == 0
    assert parse_cursor(start="0") == 0
    assert parse_cursor(start="12") == 12
    assert parse_cursor("12") == 13
    assert parse_cursor("12", "3") == 13
    for wrong in ("", "-1", "+1", " 1", "1 ", "1_0", "1.0", "x", "٣", "²", "9" * 19, "null"):
        with pytest.raises(BadInput):
            parse_cursor(wrong)
        with pytest.raises(BadInput):
            parse_cursor(start=wrong)


@pytest.mark.anyio
@pytest.mark.promise("P3")
async def test_an_ndjson_body_has_a_line_for_each_event_and_no_others(store: FakeLog, changes: Changes) -> None:
    chunks: list[bytes] = []
    async with anyio.create_task_group() as tasks:

        async def read() -> None:
            chunks.extend([chunk async for chunk in NdjsonBody(read_log(store, changes, "t"))])

        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        store.append(0)
        await anyio.wait_all_tasks_blocked()
        store.append(1, 2)
        store.end()
    assert chunks == [b'{"n": 0}\n', b'{"n": 1}\n{"n": 2}\n']


@pytest.mark.anyio
@pytest.mark.promise("P3")
async def test_an_sse_body_ends_with_the_record(store: FakeLog, changes: Changes) -> None:
    store.append(0, 1)
    store.end()
    body = b"".join([chunk async for chunk in SseBody(read_log(store, changes, "t", 1))]).decode()
    frames = body.split("\n\n")
    assert frames[0] == 'id: 1\nevent: Progress\ndata: {"n": 1}'
    assert frames[1].startswith("event: end\ndata: {")
    assert frames[2:] == [""]


@pytest.mark.anyio
@pytest.mark.promise("P7")
async def test_an_sse_body_says_that_the_server_drains(store: FakeLog, changes: Changes) -> None:
    drain = anyio.Event()
    store.append(0)
    chunks: list[bytes] = []
    async with anyio.create_task_group() as tasks:

        async def read() -> None:
            chunks.extend([chunk async for chunk in SseBody(read_log(store, changes, "t", drain=drain))])

        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        drain.set()
    assert chunks[1:] == [b'event: drain\ndata: {"from": 1}\n\n']
    # With the drain on already, events and the frame come in one chunk.
    [chunk] = [chunk async for chunk in SseBody(read_log(store, changes, "t", drain=drain))]
    assert chunk == b"".join(chunks)


@pytest.mark.anyio
async def test_a_quiet_sse_body_beats_and_loses_nothing(store: FakeLog, changes: Changes) -> None:
    store.append(0)
    with read_log(store, changes, "t") as log:
        body = SseBody(log, heartbeat=0.01)
        await anext(body)
        assert await anext(body) == SSE_HEARTBEAT
        assert await anext(body) == SSE_HEARTBEAT
        store.append(1)
        assert b"id: 1" in await anext(body)
        store.end()
        assert b"event: end" in await anext(body)
        with pytest.raises(StopAsyncIteration):
            await anext(body)


@pytest.mark.anyio
@pytest.mark.promise("P9")
async def test_an_error_after_the_beginning_is_a_frame(store: FakeLog, changes: Changes) -> None:
    store.append(0)
    body = SseBody(read_log(store, changes, "t"))
    await anext(body)
    store.fail = StoreUnavailable("The store is away", hint="Try again.")
    store.append(1)
    frame = (await anext(body)).decode()
    assert frame.startswith("event: error\ndata: ")
    assert json.loads(frame.split("data: ")[1]) == {
        "error": {"code": "store_unavailable", "message": "The store is away", "hint": "Try again."}
    }
    assert [chunk async for chunk in body] == []


@pytest.mark.anyio
async def test_an_sse_body_tells_statuses_to_who_asks(store: FakeLog, changes: Changes) -> None:
    store.append(0)
    body = SseBody(read_log(store, changes, "t", statuses=True))
    running = b'event: status\ndata: {"status": "running"}\n\n'
    assert await anext(body) == b'id: 0\nevent: Progress\ndata: {"n": 0}\n\n' + running
    store.turn(TaskStatus.WAITING)
    assert await anext(body) == running.replace(b"running", b"waiting")
    store.append(1)
    assert (await anext(body)).count(b"event:") == 1  # it still waits
    store.end()
    assert b"status:" not in await anext(body)
