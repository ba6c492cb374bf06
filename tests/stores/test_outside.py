"""What comes to a task from outside: events, cancel requests, deadlines, lost workers, heartbeats."""

from __future__ import annotations

import pytest

from llama_corral.exceptions import Conflict, NotFound
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import Checkpoint, HeldTask, Reaped, Ticket
from llama_corral.stores.rows import INBOX_PAGE

S = TaskStatus
pytestmark = pytest.mark.anyio


# Events


async def test_events_wait_in_the_inbox_before_the_task_runs(driver) -> None:
    await driver.accept("t")
    first = await driver.store.send("t", "a", 1.5)
    assert (first.status, first.owner, first.tickets, first.seq) == (S.QUEUED, None, (), 1)
    await driver.claim("t", by="i")
    second = await driver.store.send("t", "b", 2.5)
    assert (second.status, second.owner, second.seq) == (S.RUNNING, "i", 2)
    page = await driver.store.pull("t", 1, 0)
    assert [(event.seq, event.payload) for event in page.events] == [(1, "a"), (2, "b")]
    assert (page.status, page.head, page.cancel_requested) == ("ok", 2, False)
    assert [event.seq for event in (await driver.store.pull("t", 1, 1)).events] == [2]
    assert (await driver.store.pull("t", 1, 2)).events == ()


@pytest.mark.promise("P12")
async def test_very_many_events_come_page_by_page(driver) -> None:
    await driver.accept("t")
    for _ in range(INBOX_PAGE + 2):
        await driver.store.send("t", "e", 1.5)
    claim = await driver.claim("t", by="i")
    assert [event.seq for event in claim.inbox] == list(range(1, INBOX_PAGE + 1))
    page = await driver.store.pull("t", 1, 1)
    assert ([event.seq for event in page.events], page.head) == (list(range(2, INBOX_PAGE + 2)), INBOX_PAGE + 2)
    page = await driver.store.pull("t", 1, INBOX_PAGE)
    assert [event.seq for event in page.events] == [INBOX_PAGE + 1, INBOX_PAGE + 2]


async def test_pull_is_fenced_like_a_write(driver) -> None:
    await driver.accept("t", by="i")
    assert (await driver.store.pull("t", 2, 0)).status == "fenced"
    await driver.end("t")
    assert (await driver.store.pull("t", 1, 0)).status == "fenced"
    assert (await driver.store.pull("unknown", 1, 0)).status == "deleted"


@pytest.mark.promise("P9")
async def test_events_for_unknown_or_ended_tasks_leave_nothing(driver) -> None:
    await driver.accept("t", by="i")
    await driver.end("t")
    for request in (driver.store.send("t", "e", 4.0), driver.store.request_cancel("t", 4.0)):
        with pytest.raises(Conflict) as caught:
            await request
        assert caught.value.fields["status"] is S.COMPLETED
    for request in (driver.store.send("unknown", "e", 4.0), driver.store.request_cancel("unknown", 4.0)):
        with pytest.raises(NotFound):
            await request
    assert (await driver.store.get_task("t")).cancel_requested is False


# Cancel


@pytest.mark.promise("P1", "P6")
async def test_cancelling_a_task_that_nobody_holds_ends_it(driver) -> None:
    await driver.session()
    await driver.accept("a", "s")
    await driver.accept("b", "s")
    answer = await driver.store.request_cancel("a", 5.0)
    assert (answer.ended, answer.status, answer.owner, answer.session_id) == (True, S.CANCELLED, None, "s")
    assert answer.tickets == (Ticket("b", "svc"),)
    record = await driver.store.get_task("a")
    assert (record.status, record.finished_at, record.error.type) == (S.CANCELLED, 5.0, "cancelled")
    assert await driver.claim("a") is None


@pytest.mark.promise("P6")
async def test_cancelling_an_owned_task_asks_its_owner(driver) -> None:
    await driver.accept("t", by="i")
    answer = await driver.store.request_cancel("t", 5.0)
    assert (answer.ended, answer.status, answer.owner) == (False, S.RUNNING, "i")
    assert (await driver.store.pull("t", 1, 0)).cancel_requested
    assert (await driver.end("t", status=S.CANCELLED)).status == "ok"


@pytest.mark.promise("P1")
@pytest.mark.parametrize("way", ["release", "idle", "reap"])
async def test_a_requested_cancel_is_not_forgotten_with_the_owner(driver, way) -> None:
    """Nobody else may ever claim the task: it ends when its owner gives it up, and frees its line."""
    await driver.session()
    await driver.accept("t", "s", by="i")
    await driver.accept("next", "s")
    await driver.report("t", 1, events=2, checkpoint=Checkpoint("s", 0))
    await driver.store.request_cancel("t", 5.0)
    if way == "reap":
        tickets = (await driver.store.reap(["i"], 6.0)).tickets
    else:
        answer = await driver.store.release("t", 1, Checkpoint("s", 0), 6.0, idle=way == "idle")
        assert answer.status == "ok"
        tickets = answer.tickets
    assert tickets == (Ticket("next", "svc"),)
    record = await driver.store.get_task("t")
    assert (record.status, record.owner, record.finished_at, record.event_count) == (S.CANCELLED, None, 6.0, 2)
    assert record.error.type == "cancelled"
    assert await driver.claim("t", by="j") is None
    assert (await driver.end("t", 2)).status == "fenced"


@pytest.mark.promise("P1")
async def test_an_ending_that_comes_before_its_cancellation_stands(driver) -> None:
    await driver.accept("t", by="i")
    await driver.store.request_cancel("t", 5.0)
    await driver.end("t")
    record = await driver.store.get_task("t")
    assert (record.status, record.cancel_requested) == (S.COMPLETED, True)


async def test_cancelling_an_idle_task_without_owner_ends_it(driver) -> None:
    await driver.accept("t", by="i")
    await driver.report("t", 1, waiting=True)
    await driver.store.release("t", 1, Checkpoint("s", 0), 3.0, idle=True)
    assert (await driver.store.request_cancel("t", 5.0)).ended


# Deadlines


@pytest.mark.promise("P1")
async def test_deadlines_of_tasks_that_nobody_holds_end_them(driver) -> None:
    await driver.session()
    await driver.accept("owned", by="i", deadline=5.0)
    await driver.accept("later", deadline=5.1)
    await driver.accept("none")
    for task_id in ("a", "b", "c"):
        await driver.accept(task_id, "s", deadline=None if task_id == "c" else 5.0)
    answers = await driver.store.expire(5.0)
    assert [(answer.task_id, answer.status, answer.ended) for answer in answers] == [
        ("b", S.TIMED_OUT, True),  # held: it is not queued first, only to end then
        ("a", S.TIMED_OUT, True),
    ]
    assert answers[-1].tickets == (Ticket("c", "svc"),)
    assert (await driver.store.get_task("a")).error.type == "timed_out"
    assert await driver.store.expire(5.0) == []
    assert [await driver.status(t) for t in ("owned", "later", "none", "c")] == [
        S.RUNNING,
        S.QUEUED,
        S.QUEUED,
        S.QUEUED,
    ]


# Lost workers


@pytest.mark.promise("P2")
async def test_reaping_queues_what_the_dead_held_and_nothing_else(driver) -> None:
    for instance_id in ("dead", "alive"):
        await driver.instance(instance_id)
    await driver.accept("a", by="dead")
    await driver.accept("b", by="alive")
    await driver.accept("c", by="dead")
    await driver.report("c", 1, waiting=True)
    assert await driver.store.reap(["dead", "unknown"], 5.0) == Reaped((Ticket("a", "svc"), Ticket("c", "svc")))
    assert [await driver.status(t) for t in "abc"] == [S.QUEUED, S.RUNNING, S.QUEUED]
    assert [instance.instance_id for instance in await driver.store.list_instances()] == ["alive"]
    assert await driver.store.reap(["dead", "unknown"], 5.0) == Reaped()
    assert (await driver.claim("a", by="alive")).attempt == 2


@pytest.mark.promise("P1", "P2")
async def test_a_task_that_loses_every_worker_fails(driver) -> None:
    await driver.session()
    await driver.accept("t", "s", by="i0", max_attempts=2)
    await driver.accept("next", "s")
    assert await driver.store.reap(["i0"], 5.0) == Reaped((Ticket("t", "svc"),))
    await driver.claim("t", by="i1")
    reaped = await driver.store.reap(["i1"], 6.0)
    assert reaped.tickets == (Ticket("next", "svc"),)
    assert [(each.task_id, each.status) for each in reaped.ended] == [("t", TaskStatus.FAILED)]
    record = await driver.store.get_task("t")
    assert (record.status, record.error.type, record.error.retryable) == (S.FAILED, "worker_lost", True)
    assert (record.attempts, record.finished_at) == (2, 6.0)


# Heartbeats


async def test_a_heartbeat_counts_and_compares(driver) -> None:
    await driver.instance("i")
    for task_id in ("same", "cancelled", "mail", "moved", "ended", "mine"):
        await driver.accept(task_id, by="j" if task_id == "moved" else "i")
    await driver.store.request_cancel("cancelled", 3.0)
    await driver.store.send("mail", "e", 3.0)
    await driver.end("ended")
    held = [HeldTask(t, 1) for t in ("same", "cancelled", "mail", "moved", "ended", "gone")] + [HeldTask("mine", 2)]
    answer = await driver.store.heartbeat("i", held)
    assert answer.known
    assert set(answer.fenced) == {"moved", "ended", "gone", "mine"}
    assert set(answer.news) == {"cancelled", "mail"}
    assert (await driver.store.heartbeat("i", [HeldTask("mail", 1, inbox_read=1)])).news == ()
    assert [instance.heartbeat for instance in await driver.store.list_instances()] == [2]


async def test_a_heartbeat_of_an_unknown_instance_asks_it_to_register(driver) -> None:
    assert not (await driver.store.heartbeat("i", [])).known
