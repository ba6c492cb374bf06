"""Group commit: who fails with whom, who can be cancelled when, and who is answered at the end."""

from __future__ import annotations

import sqlite3
import threading
from typing import Any

import anyio
import anyio.to_thread
import pytest

from llama_corral.exceptions import StoreUnavailable
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import Claim, NewTask, SessionRecord
from llama_corral.stores import SqlStore

pytestmark = pytest.mark.anyio


class Gate:
    """A unit that stays in the writer's thread until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()

    def __call__(self, tx: Any) -> str:
        self.entered.set()
        assert self._open.wait(30)
        return "passed"

    async def wait_until_entered(self) -> None:
        assert await anyio.to_thread.run_sync(self.entered.wait, 30)

    def open(self) -> None:
        self._open.set()


def new_task(task_id: str, **more: Any) -> NewTask:
    return NewTask(task_id, "svc", "{}", 1.0, **more)


async def gather(callers: dict[str, Any]) -> dict[str, Any]:
    """Run the callers side by side; each one's result, or the exception that it raised."""
    results: dict[str, Any] = {}

    async def call(name: str, function: Any) -> None:
        try:
            results[name] = await function()
        except Exception as error:
            results[name] = error

    async with anyio.create_task_group() as task_group:
        for name, function in callers.items():
            task_group.start_soon(call, name, function)
    return results


async def as_one_batch(store: SqlStore, callers: dict[str, Any]) -> dict[str, Any]:
    """Let the callers wait behind a gate, so that the writer takes them together."""
    gate = Gate()

    async def open_when_they_wait() -> None:
        await anyio.wait_all_tasks_blocked()
        assert store.statistics()["waiting_units"] == len(callers)
        gate.open()

    results: dict[str, Any] = {}
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(store._write, gate)
        await gate.wait_until_entered()
        task_group.start_soon(open_when_they_wait)
        results.update(await gather(callers))
    return results


def accepting(store: SqlStore, *task_ids: str) -> dict[str, Any]:
    return {task_id: lambda task_id=task_id: store.accept(new_task(task_id)) for task_id in task_ids}


async def test_what_has_gathered_is_one_batch(file_store: SqlStore) -> None:
    results = await as_one_batch(file_store, accepting(file_store, *"abcde"))
    assert all(results[task_id].created for task_id in "abcde")
    numbers = file_store.statistics()
    assert (numbers["batches"], numbers["largest_batch"], numbers["units"]) == (2, 5, 6)


async def test_a_batch_is_no_larger_than_it_may_be(url: str) -> None:
    async with SqlStore(url, batch_size=3, backlog=2) as store:
        callers = accepting(store, *(str(number) for number in range(20)))
        results = await gather(callers)
        assert all(result.created for result in results.values())
        assert store.statistics()["largest_batch"] <= 3


@pytest.mark.promise("P9")
async def test_one_bad_unit_fails_alone(file_store: SqlStore) -> None:
    def breaks(tx: Any) -> None:
        tx.run(tx.sql.delete_instance, {"instance_id": "i"})
        raise ZeroDivisionError

    def half(tx: Any) -> None:
        tx.run(tx.sql.insert_session, {"session_id": "s", "state": "{}", "version": 0, "policy": "x", "created_at": 1})
        tx.run("INSERT INTO corral_nowhere VALUES (:x)", {"x": 1})

    callers = {
        **accepting(file_store, "a"),
        "breaks": lambda: file_store._write(breaks),
        **accepting(file_store, "b"),
        "half": lambda: file_store._write(half),
        **accepting(file_store, "c"),
    }
    results = await as_one_batch(file_store, callers)
    assert isinstance(results["breaks"], ZeroDivisionError)
    assert isinstance(results["half"], StoreUnavailable)
    assert [results[task_id].created for task_id in "abc"] == [True] * 3
    assert file_store.statistics()["redone_batches"] == 1
    assert await file_store.get_session("s") is None
    assert len(await file_store.due_tickets()) == 3


async def test_a_refusal_costs_the_batch_nothing(file_store: SqlStore) -> None:
    callers = {**accepting(file_store, "a", "b"), "refused": lambda: file_store.send("unknown", "{}", 1.0)}
    results = await as_one_batch(file_store, callers)
    assert results["refused"].code == "not_found"
    assert file_store.statistics()["redone_batches"] == 0


@pytest.mark.promise("P1", "P4")
@pytest.mark.parametrize("together", [True, False])
async def test_concurrent_endings_leave_one(file_store: SqlStore, together: bool, driver_of) -> None:
    driver = driver_of(file_store)
    await driver.session()
    await driver.accept("t", "s", by="i")
    await driver.accept("next", "s")
    endings = [TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED, TaskStatus.TIMED_OUT] * 4
    callers = {
        str(number): lambda status=status: driver.end("t", status=status, events=1, now=3.0)
        for number, status in enumerate(endings)
    }
    results = await (as_one_batch(file_store, callers) if together else gather(callers))
    assert {answer.status for answer in results.values()} == {"ok"}  # all but one are taken for repetitions
    assert await driver.status("t") in endings
    assert await driver.indices("t") == [0]
    assert await driver.status("next") is TaskStatus.QUEUED


@pytest.mark.promise("P1")
@pytest.mark.parametrize("first", ["cancel", "expire", "claim"])
async def test_of_a_cancel_a_deadline_and_a_claim_one_wins(file_store: SqlStore, first: str, driver_of) -> None:
    driver = driver_of(file_store)
    await driver.accept("t", deadline=2.0)
    callers = {
        "cancel": lambda: file_store.request_cancel("t", 5.0),
        "expire": lambda: file_store.expire(5.0),
        "claim": lambda: driver.claim("t"),
    }
    results = await as_one_batch(file_store, {first: callers.pop(first), **callers})
    cancelled = getattr(results["cancel"], "ended", False)
    ended = [cancelled, bool(results["expire"]), isinstance(results["claim"], Claim)]
    assert ended.count(True) == 1
    expected = [TaskStatus.CANCELLED, TaskStatus.TIMED_OUT, TaskStatus.RUNNING][ended.index(True)]
    assert await driver.status("t") is expected


# Cancellation


@pytest.mark.promise("P6")
async def test_a_caller_cancelled_while_it_waits_withdraws_its_unit(file_store: SqlStore) -> None:
    gate = Gate()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(file_store._write, gate)
        await gate.wait_until_entered()
        async with anyio.create_task_group() as cancelled:
            cancelled.start_soon(file_store.accept, new_task("t"))
            await anyio.wait_all_tasks_blocked()
            assert file_store.statistics()["waiting_units"] == 1
            cancelled.cancel_scope.cancel()
        gate.open()
    assert await file_store.get_task("t") is None
    assert file_store.statistics()["withdrawn_units"] == 1


@pytest.mark.promise("P6")
async def test_a_caller_cancelled_in_front_of_a_full_backlog_withdraws_too(url: str) -> None:
    gate = Gate()
    async with SqlStore(url, backlog=1) as store, anyio.create_task_group() as task_group:
        task_group.start_soon(store._write, gate)
        await gate.wait_until_entered()
        task_group.start_soon(store.accept, new_task("a"))
        await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as cancelled:
            cancelled.start_soon(store.accept, new_task("b"))
            await anyio.wait_all_tasks_blocked()
            cancelled.cancel_scope.cancel()
        gate.open()
        await store.accept(new_task("c"))  # behind the other two
        assert [ticket.task_id for ticket in await store.due_tickets()] == ["a", "c"]


@pytest.mark.promise("P6")
async def test_a_caller_cancelled_while_its_unit_commits_waits_for_it(file_store: SqlStore) -> None:
    gate = Gate()
    returned = False

    def accept_slowly(tx: Any) -> None:
        tx.run(tx.sql.insert_session, {"session_id": "s", "state": "{}", "version": 0, "policy": "x", "created_at": 1})
        gate(tx)

    async def call(scope: anyio.CancelScope) -> None:
        nonlocal returned
        with scope:
            await file_store._write(accept_slowly)
            pytest.fail("a cancelled caller is not answered")
        returned = True

    async with anyio.create_task_group() as task_group:
        scope = anyio.CancelScope()
        task_group.start_soon(call, scope)
        await gate.wait_until_entered()
        scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert not returned
        gate.open()
    assert scope.cancelled_caught
    assert await file_store.get_session("s") is not None


@pytest.mark.promise("P6")
async def test_cancelled_callers_leave_nothing_half_applied(file_store: SqlStore, driver_of) -> None:
    """Many callers, each with a task, its events and its ending, cancelled at different moments."""
    driver = driver_of(file_store)
    answered: set[str] = set()

    async def work(task_id: str, patience: int) -> None:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as task_group:

                async def run() -> None:
                    await driver.accept(task_id, by="i")
                    await driver.end(task_id, events=3)
                    answered.add(task_id)
                    scope.cancel()

                task_group.start_soon(run)
                for _ in range(patience):
                    await anyio.lowlevel.checkpoint()
                if patience % 2:
                    scope.cancel()

    async with anyio.create_task_group() as task_group:
        for number in range(200):
            task_group.start_soon(work, f"t{number}", number)
    applied = 0
    for number in range(200):
        page = await file_store.read_events(f"t{number}", 0)
        if f"t{number}" in answered:
            assert page is not None
            assert page.record.status is TaskStatus.COMPLETED
        if page is not None:
            applied += 1
            ended = page.record.status is TaskStatus.COMPLETED
            assert [event.index for event in page.events] == ([0, 1, 2] if ended else [])
            assert page.record.event_count == len(page.events)
    assert len(answered) >= 100
    assert applied >= len(answered)


# Closing


@pytest.mark.promise("P7")
async def test_leaving_the_block_commits_what_waits_and_refuses_the_rest(url: str) -> None:
    gate = Gate()
    results: dict[str, Any] = {}
    async with anyio.create_task_group() as task_group:
        async with SqlStore(url, backlog=2) as store:
            task_group.start_soon(store._write, gate)  # noqa: ASYNC111 - to outlive the store is the point
            await gate.wait_until_entered()

            async def call() -> None:
                results.update(await gather(accepting(store, *"abcd")))

            task_group.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            task_group.start_soon(anyio.to_thread.run_sync, gate.open)
    accepted = sorted(task_id for task_id in "abcd" if not isinstance(results[task_id], Exception))
    assert len(accepted) >= 2  # what fits into the backlog; before AnyIO 4.16 also who waits for room
    assert [task_id for task_id in "abcd" if not isinstance(results[task_id], StoreUnavailable)] == accepted
    for call in (store.accept(new_task("e")), store.get_task("a"), store.list_services()):
        with pytest.raises(StoreUnavailable):
            await call
    async with store:
        assert sorted(ticket.task_id for ticket in await store.due_tickets()) == accepted


@pytest.mark.promise("P7", "P9")
async def test_a_store_that_can_not_flush_in_time_answers_everybody(url: str) -> None:
    gate = Gate()
    results: dict[str, Any] = {}
    async with anyio.create_task_group() as task_group:
        async with SqlStore(url, flush_timeout=0, backlog=2) as store:

            async def call_all() -> None:
                results.update(await gather({"gate": lambda: store._write(gate)}))

            async def call_late() -> None:
                results.update(await gather(accepting(store, *"abcd")))
                results["late"] = True

            task_group.start_soon(call_all)
            await gate.wait_until_entered()
            task_group.start_soon(call_late)
            await anyio.wait_all_tasks_blocked()

            async def open_when_closing() -> None:
                await anyio.wait_all_tasks_blocked()  # the block waits for the writer, whose deadline has passed
                gate.open()

            task_group.start_soon(open_when_closing)
    assert results["gate"] == "passed"
    assert all(isinstance(results[task_id], StoreUnavailable) for task_id in "abcd")
    async with SqlStore(url) as store:
        assert await store.due_tickets() == []


@pytest.mark.promise("P9")
async def test_a_crash_of_the_writer_ends_the_block_and_leaves_nobody_waiting(url: str, monkeypatch) -> None:
    def crash(self, batch) -> None:
        raise ZeroDivisionError

    results: dict[str, Any] = {}

    async def work() -> None:
        async with SqlStore(url) as store:
            monkeypatch.setattr("llama_corral.stores.commits.Commits.commit", crash)
            with anyio.CancelScope(shield=True):
                results.update(await gather(accepting(store, *"abc")))
            await anyio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as caught:  # noqa: ASYNC401 - RaisesGroup is newer than our oldest pytest
        await work()
    assert caught.group_contains(ZeroDivisionError)
    assert all(isinstance(results[task_id], StoreUnavailable) for task_id in "abc")


@pytest.mark.promise("P1", "P6")
async def test_an_ending_can_be_stored_from_a_cancelled_block(url: str, driver_of) -> None:
    with anyio.CancelScope() as scope:
        async with SqlStore(url) as store:
            driver = driver_of(store)
            await driver.accept("t", by="i")
            try:
                scope.cancel()
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await driver.end("t", status=TaskStatus.CANCELLED)
    async with SqlStore(url) as store:
        assert (await store.get_task("t")).status is TaskStatus.CANCELLED


async def test_what_the_block_raises_comes_out_as_it_is(url: str) -> None:
    for name in (url, "sqlite://"):
        with pytest.raises(ZeroDivisionError):
            async with SqlStore(name):
                raise ZeroDivisionError


@pytest.mark.promise("P9")
async def test_a_store_that_was_not_entered_is_unavailable() -> None:
    store = SqlStore("sqlite://")
    with pytest.raises(StoreUnavailable):
        await store.accept(new_task("t"))
    async with store:
        await store.accept(new_task("t"))
    with pytest.raises(StoreUnavailable):
        await store.get_task("t")


# A database that fails


@pytest.mark.promise("P9")
async def test_a_full_disk_fails_what_did_not_fit_and_nothing_else(file_store: SqlStore) -> None:
    await file_store.accept(new_task("before"))
    large = "x" * 200_000
    await limit_pages(file_store, 40)
    results = await as_one_batch(
        file_store,
        {
            **accepting(file_store, "a"),
            "large": lambda: file_store.accept(NewTask("large", "svc", large, 1.0)),
            **accepting(file_store, "b"),
        },
    )
    assert isinstance(results["large"], StoreUnavailable)
    assert "space" in results["large"].hint
    await limit_pages(file_store, 1_000_000)
    stored = {ticket.task_id for ticket in await file_store.due_tickets()}
    assert stored == {"before"} | {task_id for task_id in "ab" if not isinstance(results[task_id], Exception)}
    assert (await file_store.accept(NewTask("large", "svc", large, 1.0))).created


async def limit_pages(store: SqlStore, pages: int) -> None:
    await store._write(lambda tx: tx.all(f"PRAGMA max_page_count = {pages}", {}))


@pytest.mark.promise("P1", "P9")
@pytest.mark.parametrize("method", ["begin", "commit", "savepoint"])
async def test_a_transaction_that_can_not_be_made_fails_all_of_its_units(
    file_store: SqlStore, monkeypatch, method: str
) -> None:
    def fail(self, *names: Any) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    def breaks(tx: Any) -> None:
        raise ZeroDivisionError

    callers = accepting(file_store, "a", "b")
    if method == "savepoint":
        callers["breaks"] = lambda: file_store._write(breaks)
    gate = Gate()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(file_store._write, gate)
        await gate.wait_until_entered()

        async def fail_from_now_on() -> None:
            await anyio.wait_all_tasks_blocked()
            # Commits of the gate come first: it is the only unit of its transaction.
            monkeypatch.setattr("llama_corral.stores.commits.Commits.commit", failing(method, fail))
            gate.open()

        task_group.start_soon(fail_from_now_on)
        results = await gather(callers)
    monkeypatch.undo()
    assert all(isinstance(result, StoreUnavailable) for result in results.values()), results
    assert await file_store.due_tickets() == []
    assert (await file_store.accept(new_task("a"))).created


def failing(method: str, fail: Any) -> Any:
    from llama_corral.stores.commits import Commits
    from llama_corral.stores.sqlite import SqliteConnection

    commit = Commits.commit

    def patched(self: Commits, batch: Any) -> None:
        original = getattr(SqliteConnection, method)
        setattr(SqliteConnection, method, fail)
        try:
            commit(self, batch)
        finally:
            setattr(SqliteConnection, method, original)

    return patched


@pytest.mark.promise("P9")
async def test_a_database_that_undoes_everything_fails_the_whole_batch(file_store: SqlStore) -> None:
    def undo(tx: Any) -> None:
        tx.run("ROLLBACK", {})
        raise sqlite3.OperationalError("the database undid the transaction")

    results = await as_one_batch(
        file_store,
        {**accepting(file_store, "a"), "undo": lambda: file_store._write(undo), **accepting(file_store, "b")},
    )
    assert all(isinstance(result, StoreUnavailable) for result in results.values())
    assert await file_store.due_tickets() == []


# Reads


async def test_a_bad_read_fails_alone(file_store: SqlStore) -> None:
    def breaks(tx: Any) -> None:
        raise ZeroDivisionError

    await file_store.create_session(SessionRecord("s"))
    results = await gather({"bad": lambda: file_store._read(breaks), "good": lambda: file_store.get_session("s")})
    assert isinstance(results["bad"], ZeroDivisionError)
    assert results["good"].session_id == "s"


async def test_a_cancelled_read_leaves_the_reader_at_work(file_store: SqlStore) -> None:
    gate = Gate()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(file_store._read, gate)
        await gate.wait_until_entered()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await file_store.get_task("t")
        assert scope.cancelled_caught
        gate.open()
    assert await file_store.get_task("t") is None


async def test_reads_that_gather_are_one_transaction(file_store: SqlStore) -> None:
    gate = Gate()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(file_store._read, gate)
        await gate.wait_until_entered()
        for _ in range(10):
            task_group.start_soon(file_store.get_task, "t")
        await anyio.wait_all_tasks_blocked()
        gate.open()
    numbers = file_store.statistics()
    assert (numbers["reads"], numbers["read_batches"]) == (11, 2)


async def test_a_read_sees_every_write_that_was_answered_before(file_store: SqlStore, driver_of) -> None:
    driver = driver_of(file_store)

    async def follow(task_id: str) -> None:
        await driver.accept(task_id, by="i")
        for seq in range(1, 11):
            await driver.report(task_id, seq, events=1)
            page = await file_store.read_events(task_id, seq - 1)
            assert [event.index for event in page.events] == [seq - 1]

    async with anyio.create_task_group() as task_group:
        for number in range(16):
            task_group.start_soon(follow, f"t{number}")
