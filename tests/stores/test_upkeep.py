"""What keeps a store in order: strays, retention, counts, dead letters."""

from __future__ import annotations

import pytest

from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ErrorRecord
from llama_corral.protocol.records import (
    Checkpoint,
    DeadLetter,
    HeartbeatAnswer,
    HeldTask,
    InstanceRecord,
    Reaped,
    ServiceRecord,
    Terminal,
    Ticket,
)
from llama_corral.stores import recovery_units, upkeep_units
from llama_corral.stores.transaction import Transaction

S = TaskStatus
pytestmark = pytest.mark.anyio


# Strays


@pytest.mark.promise("P2")
async def test_a_heartbeat_shows_what_its_instance_does_not_know_to_hold(driver) -> None:
    await driver.instance("i")
    for task_id in ("held", "lost", "again", "ended"):
        await driver.accept(task_id, by="i")
    await driver.end("ended")
    await driver.store.release("again", 1, None, 3.0)
    await driver.claim("again", by="i")  # the instance never saw the answer: it names the epoch before
    answer = await driver.store.heartbeat("i", [HeldTask("held", 1), HeldTask("again", 1)])
    assert answer.fenced == ("again",)
    assert answer.strays == (HeldTask("lost", 1), HeldTask("again", 2))
    both = [HeldTask("held", 1), HeldTask("lost", 1), HeldTask("again", 1), HeldTask("again", 2)]
    answer = await driver.store.heartbeat("i", both)
    assert (answer.fenced, answer.strays) == ((), ())


class CountingCursor:
    """A cursor that counts the statements it is given."""

    def __init__(self, cursor) -> None:
        self._cursor = cursor
        self.statements = 0

    def __getattr__(self, name: str):
        return getattr(self._cursor, name)

    def execute(self, *statement):
        self.statements += 1
        return self._cursor.execute(*statement)


async def test_a_heartbeat_is_two_statements_whatever_is_held(driver) -> None:
    for number in range(50):
        await driver.accept(f"t{number}", by="i")

    def counted(tx) -> tuple[HeartbeatAnswer, int]:
        cursor = CountingCursor(tx._cursor)
        held = [HeldTask(f"t{number}", 1) for number in range(1, 60)]
        return recovery_units.heartbeat(Transaction(cursor, tx.sql), "i", held), cursor.statements

    answer, statements = await driver.store._write(counted)
    assert (answer.strays, len(answer.fenced), statements) == ((HeldTask("t0", 1),), 10, 2)


@pytest.mark.promise("P1", "P2")
async def test_only_a_stray_of_that_epoch_and_owner_is_taken_away(driver) -> None:
    store = driver.store
    await driver.instance("i")
    await driver.session()
    await driver.accept("lost", by="i")
    await driver.accept("moved", by="j")
    await driver.accept("newer", by="i")
    await store.release("newer", 1, None, 3.0)
    await driver.claim("newer", by="i")
    await driver.accept("ended", by="i")
    await driver.end("ended")
    await driver.accept("spent", "s", by="i", max_attempts=1)
    await driver.accept("next", "s")
    await driver.accept("cancelled", by="i")
    await store.request_cancel("cancelled", 3.0)
    names = ("lost", "moved", "newer", "ended", "unknown", "spent", "cancelled")
    strays = [HeldTask(task_id, 1) for task_id in names]
    reaped = await store.reclaim("i", strays, 4.0)
    assert reaped.tickets == (Ticket("lost", "svc"), Ticket("next", "svc"))
    assert await store.reclaim("i", strays, 4.0) == Reaped()
    statuses = [await driver.status(t) for t in ("lost", "moved", "newer", "ended", "spent", "cancelled")]
    assert statuses == [S.QUEUED, S.RUNNING, S.RUNNING, S.COMPLETED, S.FAILED, S.CANCELLED]
    assert (await store.get_task("lost")).attempts == 1
    assert len(await store.list_instances()) == 1


async def test_an_embedded_instance_says_so(driver) -> None:
    instance = InstanceRecord("i", "svc", 8, 1.0, embedded=True)
    await driver.store.put_service(ServiceRecord("svc", "{}", 1.0), instance)
    assert await driver.store.list_instances() == [instance]


# Retention


async def rows(store) -> dict[str, int]:
    names = ("tasks", "task_events", "task_inbox", "checkpoints", "dead_letters")
    return await store._read(lambda tx: {name: tx.one(f"SELECT count(*) FROM corral_{name}", {})[0] for name in names})


async def test_retention_removes_what_is_old_with_all_that_belongs_to_it(driver) -> None:
    store = driver.store
    await driver.session()
    lost = Terminal(S.FAILED, error=ErrorRecord(type="workflow_changed", message="no", retryable=True))
    for number in range(5):
        task_id = f"old{number}"
        await driver.accept(task_id, "s" if number % 2 else None, by="i")
        await store.send(task_id, "e", 2.0)
        await driver.report(task_id, 1, events=3, checkpoint=Checkpoint("s", 0))
        await driver.report(task_id, 2, terminal=lost, now=10.0 - number)
    await store.put_dead_letter(DeadLetter("topic", "reason", "1", 9.0))
    await store.put_dead_letter(DeadLetter("topic", "reason", "2", 20.0))
    await driver.accept("new", by="i")
    await driver.end("new", events=1, now=20.0)
    await driver.accept("open", by="i")
    await driver.report("open", 1, events=1, checkpoint=Checkpoint("s", 0))
    assert await rows(store) == {
        "tasks": 7,
        "task_events": 17,
        "task_inbox": 5,
        "checkpoints": 6,
        "dead_letters": 2,
    }
    assert await store.purge(10.5, limit=2) == 2
    assert await driver.status("old4") is None  # the oldest ending first
    assert await driver.status("old0") is S.FAILED
    assert await store.purge(10.5, limit=4) == 4  # three tasks and a letter
    assert await store.purge(10.5, limit=4) == 0
    assert await rows(store) == {"tasks": 2, "task_events": 2, "task_inbox": 0, "checkpoints": 1, "dead_letters": 1}
    assert await driver.status("new") is S.COMPLETED
    assert (await store.get_session("s")).task_ids == ()
    assert await store.purge(10.5, limit=-1) == 0
    assert await store.purge(20.0) == 0  # what ended at that time did not end before it


async def test_a_batch_with_very_many_events_is_smaller(driver) -> None:
    for number in range(4):
        await driver.accept(f"t{number}", by="i")
        await driver.end(f"t{number}", events=40 if number == 1 else 5, now=float(number))
    removed = [await driver.store.purge(100.0, limit=3) for _ in range(4)]
    assert removed == [1, 1, 2, 0]


async def test_a_number_that_comes_again_finds_nothing_of_the_removed_task(driver) -> None:
    await driver.accept("t", by="i")
    await driver.end("t", events=3)
    await driver.store.purge(100.0)
    await driver.accept("u", by="i")
    assert await driver.indices("u") == []


# Counts


async def test_what_waits_to_be_claimed_is_counted_by_service(driver) -> None:
    store = driver.store
    await driver.session()
    for task_id in ("a", "b", "c"):
        await driver.accept(task_id, "s")
    await driver.accept("d", service="other")
    await driver.accept("e", by="i")
    await driver.accept("f", by="i")
    await driver.end("f")
    assert [await store.count_queued(name) for name in ("svc", "other", "none")] == [3, 1, 0]
    await driver.claim("a")
    assert await store.count_queued("svc") == 2


# Dead letters


async def test_dead_letters_are_listed_newest_first_in_pages(driver) -> None:
    store = driver.store
    for number in range(1, 6):
        await store.put_dead_letter(DeadLetter("topic", f"reason {number}", "{}", float(number), no=99))
    assert [letter.no for letter in await store.list_dead_letters(limit=2)] == [5, 4]
    assert await store.list_dead_letters(before=2) == [DeadLetter("topic", "reason 1", "{}", 1.0, 1)]
    assert await store.list_dead_letters(limit=-1) == []
    assert await store.purge(100.0) == 5
    await store.put_dead_letter(DeadLetter("topic", "reason", "{}", 6.0))
    assert [letter.no for letter in await store.list_dead_letters()] == [6]  # a number never comes again


@pytest.mark.promise("P12")
async def test_of_very_many_dead_letters_the_oldest_go(driver, monkeypatch) -> None:
    monkeypatch.setattr(upkeep_units, "DEAD_LETTERS", 3)
    for number in range(10):
        await driver.store.put_dead_letter(DeadLetter("topic", "reason", str(number), 1.0))
    assert [letter.message for letter in await driver.store.list_dead_letters()] == ["9", "8", "7"]
