"""Connections that break: a proxy drops them at every place where that can hurt."""

from __future__ import annotations

import pytest

from llama_corral.client import Client, SyncClient
from llama_corral.exceptions import NotFound, Unavailable
from llama_corral.protocol.messages import new_id

from .conftest import Cutter

EVENTS = 4
INDEXES = list(range(EVENTS + 1))  # the stop event is one of them


@pytest.mark.anyio
@pytest.mark.promise("P3")
@pytest.mark.parametrize("after", range(EVENTS + 2))
async def test_a_stream_goes_on_after_a_drop_at_any_event(cutter: Cutter, anyio_backend: str, after: int) -> None:
    async with Client(cutter.url) as client:
        task = await client.start("ticking", events=EVENTS)
        cutter.after = [after]
        events = task.events()
        assert [event.index async for event in events] == INDEXES
        assert events.record is not None
        assert events.record.status == "completed"
    assert cutter.cuts == 1


@pytest.mark.anyio
async def test_a_stream_goes_on_after_many_drops(cutter: Cutter, anyio_backend: str) -> None:
    async with Client(cutter.url) as client:
        task = await client.start("ticking", events=EVENTS, hold=True)
        cutter.after = [1, 1, 0, 1, 0, 0, 1]
        indexes = []
        async for event in task.events():
            indexes.append(event.index)
            if event.index == EVENTS:  # the question
                await task.send_event("HumanResponseEvent", {"response": "yes"})
        assert indexes == list(range(len(indexes)))
        assert (await task.result())["answer"] == "yes"
    assert cutter.cuts == 7


@pytest.mark.anyio
@pytest.mark.promise("P2")
async def test_run_survives_a_lost_answer_to_its_start(cutter: Cutter, anyio_backend: str) -> None:
    async with Client(cutter.url) as client:
        session = await client.sessions.create()
        cutter.swallow = 1
        cutter.after = [0]
        assert await session.run("counter", by=1) == {"count": 1, "history": [1]}
        assert len(await session.tasks()) == 1
    assert cutter.cuts == 2


@pytest.mark.anyio
async def test_a_result_survives_a_lost_answer(cutter: Cutter, anyio_backend: str) -> None:
    async with Client(cutter.url) as client:
        task = await client.start("hello")
        cutter.swallow = 2
        assert await task.result() == "Hello, world!"
    assert cutter.cuts == 2


@pytest.mark.anyio
async def test_an_event_is_not_sent_twice(cutter: Cutter, anyio_backend: str) -> None:
    async with Client(cutter.url) as client:
        task = await client.start("ticking", hold=True)
        cutter.swallow = 1
        with pytest.raises(Unavailable) as lost:
            await task.send_event("HumanResponseEvent", {"response": "once"})
        assert lost.value.fields["sent"]
        assert (await task.result())["answer"] == "once"


@pytest.mark.anyio
async def test_a_stream_without_progress_gives_up(cutter: Cutter, anyio_backend: str) -> None:
    async with Client(cutter.url, reconnect_for=0.1) as client:
        task = await client.start("ticking", hold=True)
        cutter.after = [0] * 50
        with pytest.raises(Unavailable, match=r"stream was cut|no answer"):
            await anext(task.events(5))
        cutter.after = []
        await task.cancel()


@pytest.mark.anyio
async def test_deleting_a_session_ends_its_streams(url: str, anyio_backend: str) -> None:
    async with Client(url) as client:
        session = await client.sessions.create()
        task = await session.start("ticking", events=1, hold=True)
        async with task.events() as events:
            assert [(await anext(events)).type for _ in range(2)] == ["Tick", "InputRequiredEvent"]
            await session.delete()
            with pytest.raises(NotFound):
                [event async for event in events]


@pytest.mark.anyio
@pytest.mark.promise("P3")
async def test_a_stream_that_is_dropped_at_every_event_has_each_once(cutter: Cutter, anyio_backend: str) -> None:
    async with Client(cutter.url) as client:
        task = await client.start("ticking", events=EVENTS)
        await task.wait()
        cutter.after = [1] * len(INDEXES)  # each connection brings one event more
        events = task.events()
        seen = [(event.index, event.data.get("number")) async for event in events]
        assert seen == [(index, index if index < EVENTS else None) for index in INDEXES]
        assert events.record is not None
    assert cutter.cuts == len(INDEXES)


@pytest.mark.promise("P3")
@pytest.mark.parametrize("backend", ["trio", "asyncio"])
@pytest.mark.parametrize("cuts", [[1] * len(INDEXES), *([after] for after in range(EVENTS + 2))])
def test_the_sync_client_goes_on_too(cutter: Cutter, backend: str, cuts: list[int]) -> None:
    with SyncClient(cutter.url, backend=backend) as client:  # type: ignore[arg-type]
        task = client.start("ticking", events=EVENTS, task_id=new_id())
        task.wait()
        cutter.after = [*cuts]
        events = task.events()
        assert [event.index for event in events] == INDEXES
        assert events.record is not None
    assert cutter.cuts == len(cuts)
