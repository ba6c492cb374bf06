"""A PostgreSQL server that is stopped, killed, stands still or cannot be heard: what was answered is stored, what was
refused is not, and nothing hangs."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import anyio.to_thread
import pytest

from llama_corral.exceptions import StoreUnavailable
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import ClaimRequest, EventRecord, NewTask, Report, Terminal
from llama_corral.stores import SqlStore
from llama_corral.stores.postgres_server import Link
from llama_corral.testing.servers import PostgresServer

from ..queues.servers import own_server
from ..services.rig import until
from .cable import Cable
from .postgres import Place

pytestmark = pytest.mark.anyio
SOON = 20.0
"""Seconds within which everything here is answered on any machine; most of it much sooner."""


@pytest.fixture
def anyio_backend() -> str:
    return "trio"  # one is enough: the waiting happens in threads


@pytest.fixture
async def server() -> AsyncIterator[PostgresServer]:
    async with own_server(PostgresServer, "CORRAL_TEST_POSTGRES_URL") as started:
        yield started


@pytest.fixture
async def cable(place: Place) -> AsyncIterator[Cable]:
    async with Cable(place.url).serving() as opened:
        yield opened


def task(task_id: str) -> NewTask:
    return NewTask(task_id, "svc", "{}", 1.0)


async def away(call: Callable[[], Awaitable[Any]]) -> StoreUnavailable:
    with anyio.fail_after(SOON), pytest.raises(StoreUnavailable) as caught:
        await call()
    assert caught.value.hint
    return caught.value


# Stopped and started


@pytest.mark.promise("P9")
async def test_a_store_outlives_its_server(server: PostgresServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llama_corral.stores")
    async with SqlStore(server.url) as store:
        await store.accept(task("before"))
        await server.restart()
        assert (await store.accept(task("between"))).created  # nobody notices
        assert await store.get_task("before") is not None
        await server.stop()
        caplog.clear()
        for _ in range(3):
            for call in (lambda: store.accept(task("lost")), lambda: store.get_task("before")):
                error = await away(call)
                assert "in_doubt" not in error.fields
        # At once: each of the two connections has been patient once.
        with anyio.fail_after(1.0):
            await away(lambda: store.accept(task("lost")))
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
        await server.start()
        await until(lambda: works(lambda: store.accept(task("after"))))
        await until(lambda: works(lambda: store.get_task("after")))
        tickets = [ticket.task_id for ticket in await store.due_tickets()]
        assert tickets == ["before", "between", "after"]
        assert "again" in caplog.text


async def works(call: Callable[[], Awaitable[Any]]) -> bool:
    try:
        await call()
    except StoreUnavailable:
        return False
    return True


# Killed in the middle of work


class Load:
    """Tasks that are accepted, report and end, one after the other, and what became of each call."""

    def __init__(self, store: SqlStore, name: str) -> None:
        self.store = store
        self.name = name
        self.count = 0
        self.done: dict[tuple[str, int], bool | None] = {}
        """Of each call of a task: it was answered; it was refused; None: nobody knows."""
        self.stopping = False

    async def run(self) -> None:
        while not self.stopping:
            self.count += 1
            await self.live(f"{self.name}-{self.count}")

    async def live(self, task_id: str) -> None:
        events = (EventRecord("E", "{}"),) * 2
        ending = Terminal(TaskStatus.COMPLETED, "1", "1")
        calls = (
            lambda: self.store.accept(task(task_id), ClaimRequest(task_id, "i", "n", 1.0)),
            lambda: self.store.report(Report(task_id, 1, 1, 2.0, events)),
            lambda: self.store.report(Report(task_id, 1, 2, 3.0, events, terminal=ending)),
        )
        for number, call in enumerate(calls):
            try:
                with anyio.fail_after(SOON):
                    await call()
                self.done[task_id, number] = True
            except StoreUnavailable as error:
                self.done[task_id, number] = None if error.fields.get("in_doubt") else False
                return

    async def check(self) -> int:
        for (task_id, number), done in self.done.items():
            page = await self.store.read_events(task_id, 0)
            applied = {
                0: page is not None,
                1: page is not None and page.record.event_count >= 2,
                2: page is not None and page.record.status is TaskStatus.COMPLETED,
            }[number]
            assert done is None or applied == done, (task_id, number)
            if page is not None:
                assert [event.index for event in page.events] == list(range(page.record.event_count))
                assert page.record.event_count == (4 if page.record.status.is_terminal else page.record.event_count)
        return sum(done is None for done in self.done.values())


@pytest.mark.promise("P1", "P3")
async def test_what_is_answered_is_stored_and_what_is_refused_is_not_whoever_is_killed(server: PostgresServer) -> None:
    async with SqlStore(server.url) as first, SqlStore(server.url) as second:
        loads = [Load(store, f"{number}") for number, store in enumerate([first, second] * 8)]
        async with anyio.create_task_group() as tasks:
            for load in loads:
                tasks.start_soon(load.run)
            for _ in range(3):
                goal = sum(load.count for load in loads) + 100
                await until(lambda goal=goal: sum(load.count for load in loads) > goal)
                server.kill()
                await server.wait_exit()
                await server.start()
            for load in loads:
                load.stopping = True
        for load in loads:
            load.store = first
            await until(lambda: works(lambda: first.get_task("none")))
            await load.check()
        assert [done for load in loads for done in load.done.values()].count(True) > 300


@pytest.mark.promise("P1")
@pytest.mark.parametrize(("cut", "stored"), [("cut_before", False), ("cut_behind", True)])
async def test_a_commit_whose_answer_is_lost_is_in_doubt(cable: Cable, cut: str, stored: bool) -> None:
    async with SqlStore(cable.url) as store:
        getattr(cable, cut)(b"COMMIT\0")  # not the READ COMMITTED of its begin
        error = await away(lambda: store.accept(task("t")))
        assert error.fields["in_doubt"] is True
        assert "same ids" in error.hint
        assert (await store.accept(task("t"))).created is not stored


@pytest.mark.promise("P2")
@pytest.mark.parametrize("cut", ["cut_before", "cut_behind"])
async def test_a_connection_that_is_lost_before_the_commit_is_replaced(cable: Cable, cut: str) -> None:
    async with SqlStore(cable.url) as store:
        getattr(cable, cut)(b"INSERT INTO corral_tasks")
        assert (await store.accept(task("t"))).created
        getattr(cable, cut)(b"FROM corral_tasks")
        assert (await store.get_task("t")).status is TaskStatus.QUEUED
        assert store.statistics()["redone_batches"] == 1


async def test_a_connection_that_the_server_ended_is_replaced(place: Place) -> None:
    ours = f"pid <> pg_backend_pid() AND application_name = '{place.schema}'"
    async with SqlStore(f"{place.url}&application_name={place.schema}") as store:
        for number in range(2):
            found = place.execute(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {ours}")
            assert found == [(True,)] * 2
            assert (await store.accept(task(f"t{number}"))).created
            assert await store.get_task(f"t{number}") is not None


# Nothing is heard


@pytest.mark.promise("P9")
async def test_a_server_that_can_not_be_heard_is_given_up(cable: Cable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Link, "patience", 0.3)
    url = f"{cable.url}&connect_timeout=2"
    async with SqlStore(url) as store:
        await store.accept(task("t"))
        cable.block()
        for call in (lambda: store.accept(task("lost")), lambda: store.get_task("t")):
            assert "in_doubt" not in (await away(call)).fields
        cable.unblock()
        await until(lambda: works(lambda: store.accept(task("found"))))
        await until(lambda: works(lambda: store.get_task("t")))
        assert await store.get_task("lost") is None


@pytest.mark.promise("P7")
async def test_a_store_is_closed_while_its_server_stands_still_or_is_away(server: PostgresServer) -> None:
    results: list[StoreUnavailable] = []
    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            async with SqlStore(server.url, flush_timeout=0.5) as store:
                await store.accept(task("t"))
                server.send_signal(signal.SIGSTOP)

                async def call(function: Callable[[], Awaitable[Any]]) -> None:
                    results.append(await away(function))

                tasks.start_soon(call, lambda: store.accept(task("lost")))
                tasks.start_soon(call, lambda: store.get_task("t"))
                await anyio.wait_all_tasks_blocked()
            server.send_signal(signal.SIGCONT)
    assert len(results) == 2
    with anyio.fail_after(SOON):
        async with SqlStore(server.url) as store:
            await server.stop()
            await away(lambda: store.accept(task("lost")))
