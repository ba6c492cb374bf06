"""What sleeps in the store until a time, and which time is next."""

from __future__ import annotations

import pytest

from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import Checkpoint, Ticket

S = TaskStatus
pytestmark = pytest.mark.anyio


async def fall_asleep(driver, task_id: str, wake_at: float | None, **more) -> None:
    await driver.accept(task_id, by="i", **more)
    await driver.report(task_id, 1, waiting=True)
    answer = await driver.store.release(task_id, 1, Checkpoint("s", 0), 3.0, idle=True, wake_at=wake_at)
    assert answer.tickets == ()


@pytest.mark.promise("P2")
async def test_a_run_that_left_memory_comes_back_for_its_timer(driver) -> None:
    store = driver.store
    await fall_asleep(driver, "a", 6.0)
    await fall_asleep(driver, "b", 5.0)
    await fall_asleep(driver, "c", None)
    again = await store.release("a", 1, Checkpoint("s", 0), 3.0, idle=True, wake_at=6.0)
    assert (again.status, again.tickets) == ("ok", ())
    assert await store.wake(4.9) == []
    assert await store.next_due(4.9) == 5.0
    assert await store.wake(6.0) == [Ticket("b", "svc"), Ticket("a", "svc")]
    assert await store.wake(6.0) == []
    assert [await driver.status(t) for t in "abc"] == [S.QUEUED, S.QUEUED, S.WAITING]
    assert (await driver.claim("a", by="j")).checkpoint.snapshot == "s"


@pytest.mark.promise("P1", "P2")
async def test_very_many_that_are_due_end_and_wake_in_portions(driver) -> None:
    """One unit for all of them would keep everybody else's writes waiting for seconds."""
    await driver.session()
    for number in range(5):
        await fall_asleep(driver, f"asleep{number}", 5.0 + number / 10)
        await driver.accept(f"line{number}", "s", deadline=5.0 - number / 10)
    ended = [[answer.task_id for answer in await driver.store.expire(6.0, limit=2)] for _ in range(4)]
    assert ended == [["line4", "line3"], ["line2", "line1"], ["line0"], []]
    woken = [[ticket.task_id for ticket in await driver.store.wake(6.0, limit=2)] for _ in range(4)]
    assert woken == [["asleep0", "asleep1"], ["asleep2", "asleep3"], ["asleep4"], []]


async def test_a_timer_that_is_due_already_queues_at_once(driver) -> None:
    await driver.accept("t", by="i")
    answer = await driver.store.release("t", 1, Checkpoint("s", 0), 3.0, idle=True, wake_at=3.0)
    assert answer.tickets == (Ticket("t", "svc"),)
    assert await driver.status("t") is S.QUEUED


@pytest.mark.parametrize("way", ["send", "cancel", "expire", "reap"])
async def test_a_timer_ends_with_the_sleep(driver, way: str) -> None:
    store = driver.store
    await fall_asleep(driver, "t", 50.0, deadline=5.0)
    if way == "cancel":
        await store.request_cancel("t", 4.0)
    elif way == "expire":
        await store.expire(5.0)
    else:
        assert (await store.send("t", "e", 4.0)).tickets == (Ticket("t", "svc"),)
        if way == "reap":
            await driver.claim("t", by="j")
            await store.reap(["j"], 4.0)
        assert await store.next_due(4.0) == 5.0
    assert await store.next_due(6.0) is None
    assert await store.wake(50.0) == []


async def test_the_next_moment_is_the_first_of_all(driver) -> None:
    store = driver.store
    assert await store.next_due(0.0) is None
    await driver.accept("owned", by="i", deadline=4.0)  # its owner's
    assert await store.next_due(0.0) is None
    await driver.session()
    await driver.accept("front", "s", by="i")
    for task_id, more in {
        "held": {"session": "s", "deadline": 10.0},
        "queued": {"deadline": 11.0},
        "later": {"not_before": 9.0},
    }.items():
        await driver.accept(task_id, **more)
    await fall_asleep(driver, "asleep", 8.0, deadline=12.0)
    moments = []
    now = 3.0
    while (due := await store.next_due(now)) is not None:
        moments.append(due)
        now = due
    assert moments == [8.0, 9.0, 10.0, 11.0, 12.0]


async def test_a_start_time_counts_once(driver) -> None:
    """When the clock is set back, a task that has been claimed does not wait for its start a second time."""
    await driver.accept("t", not_before=5.0)
    await driver.claim("t", by="i", now=5.0)
    await driver.store.reap(["i"], 1.0)
    assert await driver.store.due_tickets(now=1.0) == [Ticket("t", "svc")]
    assert (await driver.claim("t", by="j", now=1.0)).epoch == 2
    assert (await driver.accept("u", by="i", not_before=2.0)).claim is not None
    await driver.store.reap(["i"], 1.0)
    assert await driver.store.due_tickets(now=1.0) == [Ticket("u", "svc")]
