"""Readers of a log: no event is lost or repeated, every reader ends, nothing is left behind."""

from __future__ import annotations

import gc
import json
import random

import anyio
import pytest
from anyio.lowlevel import checkpoint

from llama_corral.events import Changes, LogReader, read_log, wait_terminal
from llama_corral.exceptions import NotFound, StoreUnavailable
from llama_corral.protocol.lifecycle import TERMINAL, TaskStatus

from .fakes import FakeLog

pytestmark = pytest.mark.anyio


async def collect(log: LogReader, into: list[int] | None = None) -> list[int]:
    seen = [] if into is None else into
    async for page in log:
        seen += [event.index for event in page.events]
    return seen


@pytest.mark.promise("P3")
async def test_a_finished_log_is_read_from_any_index_to_its_record(store: FakeLog, changes: Changes) -> None:
    store.append(*range(5))
    store.end()
    for start in range(8):
        log = read_log(store, changes, "t", start)
        pages = [page async for page in log]
        assert [event.index for page in pages for event in page.events] == list(range(5))[start:]
        assert pages[-1].record.status is TaskStatus.COMPLETED
        assert log.ended
        assert not log.drained
    assert changes.statistics() == {"tasks": 0, "watches": 0}


@pytest.mark.promise("P1", "P3")
@pytest.mark.parametrize("ending", sorted(TERMINAL))
async def test_a_task_without_events_still_ends_its_readers(store: FakeLog, changes: Changes, ending: str) -> None:
    pages = []
    async with anyio.create_task_group() as tasks:

        async def read() -> None:
            pages.extend([page async for page in read_log(store, changes, "t")])

        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        store.end(TaskStatus(ending))
    assert [(page.events, page.record.status) for page in pages] == [((), ending)]


@pytest.mark.promise("P3", "P10")
async def test_a_reader_that_comes_first_follows_to_the_end_without_polling(store: FakeLog, changes: Changes) -> None:
    seen: list[int] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(collect, read_log(store, changes, "t"), seen)
        for number in range(4):
            await anyio.wait_all_tasks_blocked()
            assert seen == list(range(number))
            store.append(number)
        await anyio.wait_all_tasks_blocked()
        assert store.reads == 5  # the first look, then one for each news
        store.end()
    assert seen == [0, 1, 2, 3]


@pytest.mark.promise("P3")
async def test_an_event_between_the_read_and_the_wait_is_not_lost(store: FakeLog, changes: Changes) -> None:
    store.append(0)
    store.after_read = lambda: store.append(1)
    seen: list[int] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(collect, read_log(store, changes, "t"), seen)
        await anyio.wait_all_tasks_blocked()
        assert seen == [0, 1]
        store.after_read = lambda: store.append(3)
        store.append(2)
        await anyio.wait_all_tasks_blocked()
        assert seen == [0, 1, 2, 3]
        store.end()


@pytest.mark.promise("P3")
async def test_events_and_the_ending_between_the_read_and_the_wait_all_arrive(store: FakeLog, changes: Changes) -> None:
    """Fault C1 of the peers: the original sees the result, returns, and never sends what came with it."""

    def both() -> None:
        store.append(1, 2)
        store.end()

    store.append(0)
    store.after_read = both
    log = read_log(store, changes, "t")
    assert await collect(log) == [0, 1, 2]
    assert log.ended


@pytest.mark.promise("P3")
async def test_what_is_stored_while_the_reader_works_on_a_page_is_not_lost(store: FakeLog, changes: Changes) -> None:
    store.append(0)
    seen = []
    async for page in read_log(store, changes, "t"):
        seen += [event.index for event in page.events]
        if len(store.events) < 5:
            store.append(len(store.events))
            if len(store.events) == 5:
                store.end()
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.promise("P3")
async def test_an_index_beyond_the_end_waits_for_it(store: FakeLog, changes: Changes) -> None:
    store.append(0)
    seen: list[int] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(collect, read_log(store, changes, "t", 3), seen)
        for number in range(1, 5):
            await anyio.wait_all_tasks_blocked()
            store.append(number)
        await anyio.wait_all_tasks_blocked()
        assert seen == [3, 4]
        store.end()


@pytest.mark.promise("P3", "P12")
async def test_a_slow_reader_of_a_long_log_holds_one_page(store: FakeLog, changes: Changes) -> None:
    store.append(*range(3000))
    store.end()
    assert await collect(read_log(store, changes, "t")) == list(range(3000))
    assert store.largest_page <= 500
    assert store.reads <= 8


@pytest.mark.promise("P12")
async def test_large_events_make_small_pages(store: FakeLog, changes: Changes) -> None:
    store.append(*[json.dumps({"text": "x" * 10_000})] * 60)
    store.end()
    log = LogReader(store, changes, "t", page_events=50, page_bytes=100_000)
    assert await collect(log) == list(range(60))
    assert store.limits[1:] == [9, 9]


@pytest.mark.promise("P3")
async def test_many_readers_from_different_indices_see_the_same_log(store: FakeLog, changes: Changes) -> None:
    seen: list[list[int]] = [[] for _ in range(20)]
    async with anyio.create_task_group() as tasks:
        for start, into in enumerate(seen):
            tasks.start_soon(collect, read_log(store, changes, "t", start), into)
        await anyio.wait_all_tasks_blocked()
        for number in range(20):
            store.append(number)
            if number % 3 == 0:
                await anyio.wait_all_tasks_blocked()
        store.end()
    assert seen == [list(range(start, 20)) for start in range(20)]
    assert changes.statistics() == {"tasks": 0, "watches": 0}


@pytest.mark.promise("P1", "P3", "P12")
@pytest.mark.parametrize("seed", range(20))
async def test_no_interleaving_loses_or_repeats_an_event(store: FakeLog, changes: Changes, seed: int) -> None:
    """Events and the ending come between any read and any wait, and while readers are at work on a page."""
    chance = random.Random(seed)
    seen: dict[int, list[int]] = {start: [] for start in range(0, 30, 5)}

    def happen() -> None:
        if store.record is not None and not store.record.status.is_terminal:
            store.append(*range(chance.randrange(4)))
            if len(store.events) >= 40:
                store.end()
        store.after_read = happen if chance.random() < 0.8 else None

    async def read(start: int, into: list[int]) -> None:
        with LogReader(store, changes, "t", start, page_events=chance.randrange(1, 5)) as log:
            async for page in log:
                into.extend(event.index for event in page.events)
                for _ in range(chance.randrange(3)):
                    await checkpoint()

    happen()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            for start, into in seen.items():
                tasks.start_soon(read, start, into)
            while store.record is not None and not store.record.status.is_terminal:
                await anyio.wait_all_tasks_blocked()
                happen()
    assert seen == {start: list(range(start, len(store.events))) for start in seen}
    assert changes.statistics() == {"tasks": 0, "watches": 0}


@pytest.mark.promise("P7")
@pytest.mark.parametrize("drain", [None, "event"])
async def test_drain_ends_a_waiting_reader(store: FakeLog, changes: Changes, drain: str | None) -> None:
    event = anyio.Event() if drain else None
    store.append(0)
    log = read_log(store, changes, "t", drain=event)
    seen: list[int] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(collect, log, seen)
        await anyio.wait_all_tasks_blocked()
        store.append(1)
        await anyio.wait_all_tasks_blocked()
        event.set() if event else changes.drain()
    assert seen == [0, 1]
    assert (log.ended, log.drained, log.cursor) == (False, True, 2)
    assert await collect(read_log(store, changes, "t", 1, drain=event)) == [1]
    assert changes.statistics()["watches"] == 0


@pytest.mark.promise("P7", "P3")
async def test_drain_delivers_what_is_stored_first(store: FakeLog, changes: Changes) -> None:
    drain = anyio.Event()
    drain.set()
    store.append(*range(150))
    log = read_log(store, changes, "t", drain=drain)
    assert await collect(log) == list(range(150))
    assert log.drained
    store.end()
    log = read_log(store, changes, "t", drain=drain)
    assert await collect(log) == list(range(150))
    assert (log.ended, log.drained) == (True, False)


@pytest.mark.promise("P9")
async def test_an_unknown_task_is_not_found_before_anything_is_sent(store: FakeLog, changes: Changes) -> None:
    log = read_log(store, changes, "nobody")
    with pytest.raises(NotFound):
        await log.open()
    with pytest.raises(NotFound):
        await anext(log)
    with pytest.raises(NotFound):
        await wait_terminal(store, changes, "nobody", 1)
    assert changes.statistics() == {"tasks": 0, "watches": 0}


@pytest.mark.promise("P3")
async def test_an_opened_log_repeats_its_first_page(store: FakeLog, changes: Changes) -> None:
    store.append(0, 1)
    with read_log(store, changes, "t") as log:
        first = await log.open()
        assert len(first.events) == 2
        assert await log.open() is first
        assert await anext(log) is first
        store.end()
        assert [page.events async for page in log] == [()]
    opened = read_log(store, changes, "t", 2)
    assert (await opened.open()).record.status is TaskStatus.COMPLETED
    assert [page.events async for page in opened] == [()]


async def test_an_empty_opened_log_waits(store: FakeLog, changes: Changes) -> None:
    log = read_log(store, changes, "t")
    assert (await log.open()).events == ()
    seen: list[int] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(collect, log, seen)
        await anyio.wait_all_tasks_blocked()
        store.append(0)
        store.end()
    assert seen == [0]


@pytest.mark.promise("P9")
async def test_a_task_deleted_meanwhile_ends_the_reader(store: FakeLog, changes: Changes) -> None:
    store.append(0)
    log = read_log(store, changes, "t")
    await anext(log)
    store.delete()
    with pytest.raises(NotFound):
        await anext(log)
    assert changes.statistics() == {"tasks": 0, "watches": 0}


@pytest.mark.promise("P6", "P3")
@pytest.mark.parametrize("where", ["waiting", "reading", "waiting with drain"])
async def test_a_cancelled_call_loses_nothing_and_leaves_nothing(store: FakeLog, changes: Changes, where: str) -> None:
    store.append(0)
    log = read_log(store, changes, "t", drain=anyio.Event() if "drain" in where else None)
    await anext(log)
    if where == "reading":
        store.hang = anyio.Event()
        store.append(1)
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anext, log)
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
    assert changes.statistics() == {"tasks": 0, "watches": 0}
    store.hang = None
    if where != "reading":
        store.append(1)  # nobody watches now
    assert [event.index for event in (await anext(log)).events] == [1]
    log.close()
    assert changes.statistics() == {"tasks": 0, "watches": 0}


@pytest.mark.promise("P12")
async def test_a_reader_that_stops_early_leaves_nothing(store: FakeLog, changes: Changes) -> None:
    store.append(0)
    with read_log(store, changes, "t") as log:
        async for _ in log:
            break
    assert changes.statistics()["watches"] == 0
    async for _ in read_log(store, changes, "t"):
        break
    gc.collect()
    assert changes.statistics()["watches"] == 0


async def test_an_error_of_the_store_passes_and_the_reader_can_go_on(store: FakeLog, changes: Changes) -> None:
    store.append(0)
    store.fail = StoreUnavailable("away")
    log = read_log(store, changes, "t")
    with pytest.raises(StoreUnavailable):
        await anext(log)
    store.fail = None
    store.end()
    assert await collect(log) == [0]


@pytest.mark.promise("P3")
async def test_the_backstop_reads_again_when_a_wake_up_was_lost(store: FakeLog, changes: Changes) -> None:
    log = read_log(store, changes, "t", backstop=0.01)
    seen: list[int] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(collect, log, seen)
        await anyio.wait_all_tasks_blocked()
        store.append(0, notify=False)
        store.end(notify=False)
    assert seen == [0]


@pytest.mark.promise("P10")
async def test_long_poll_gets_the_record_and_is_not_woken_by_events(store: FakeLog, changes: Changes) -> None:
    got = []

    async def poll() -> None:
        got.append(await wait_terminal(store, changes, "t", 30))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(poll)
        for number in range(3):
            await anyio.wait_all_tasks_blocked()
            store.append(number)
        assert store.reads == 1
        store.end(TaskStatus.FAILED)
    assert [record.status for record in got] == [TaskStatus.FAILED]
    assert changes.statistics() == {"tasks": 0, "watches": 0}


@pytest.mark.promise("P3")
async def test_long_poll_sees_an_ending_between_its_read_and_its_wait(store: FakeLog, changes: Changes) -> None:
    store.after_read = store.end
    record = await wait_terminal(store, changes, "t", None)
    assert record is not None
    assert record.status is TaskStatus.COMPLETED


@pytest.mark.promise("P7")
async def test_long_poll_ends_with_its_time_and_with_the_drain(store: FakeLog, changes: Changes) -> None:
    assert await wait_terminal(store, changes, "t", 0) is None
    assert store.reads == 1
    assert await wait_terminal(store, changes, "t", 0.01) is None
    drain = anyio.Event()
    async with anyio.create_task_group() as tasks:

        async def poll() -> None:
            assert await wait_terminal(store, changes, "t", None, drain=drain) is None

        tasks.start_soon(poll)
        await anyio.wait_all_tasks_blocked()
        drain.set()
    assert await wait_terminal(store, changes, "t", None, drain=drain) is None
    store.end()
    assert await wait_terminal(store, changes, "t", 0, drain=drain) is not None


@pytest.mark.promise("P7")
async def test_long_poll_ends_when_the_process_stops(store: FakeLog, changes: Changes) -> None:
    got = []

    async def poll() -> None:
        got.append(await wait_terminal(store, changes, "t", None))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(poll)
        await anyio.wait_all_tasks_blocked()
        changes.drain()
    await poll()
    assert got == [None, None]


async def test_long_poll_backstop(store: FakeLog, changes: Changes) -> None:
    async with anyio.create_task_group() as tasks:

        async def poll() -> None:
            assert await wait_terminal(store, changes, "t", None, backstop=0.01) is not None

        tasks.start_soon(poll)
        await anyio.wait_all_tasks_blocked()
        store.end(notify=False)


async def test_statuses_come_behind_the_events_before_them_and_once_each(store: FakeLog, changes: Changes) -> None:
    told: list[object] = []
    store.append(0, 1, 2)

    async def read() -> None:
        log = LogReader(store, changes, "t", statuses=True, page_events=2)
        async for page in log:
            told.extend(event.index for event in page.events)
            if log.status is not None and (not told or told[-1] != log.status):
                told.append(log.status)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        assert told == [0, 1, 2, "running"]
        changes.notify("t", ended=False)  # nothing that it would tell
        await anyio.wait_all_tasks_blocked()
        store.turn(TaskStatus.WAITING)
        await anyio.wait_all_tasks_blocked()
        assert told == [0, 1, 2, "running", "waiting"]
        store.turn(TaskStatus.RUNNING)
        store.append(3)
        await anyio.wait_all_tasks_blocked()
        store.end()
    assert told == [0, 1, 2, "running", "waiting", 3, "running", "completed"]


async def test_who_asks_for_no_statuses_is_told_none(store: FakeLog, changes: Changes) -> None:
    pages: list[object] = []
    async with anyio.create_task_group() as tasks:

        async def read() -> None:
            pages.extend([page async for page in read_log(store, changes, "t")])

        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        store.turn(TaskStatus.WAITING)
        await anyio.wait_all_tasks_blocked()
        assert pages == []
        store.end()
    assert len(pages) == 1
