"""Failures that are not the end: attempts by a task's policy, and repetitions that a person asks for."""

from __future__ import annotations

import dataclasses

import pytest

from llama_corral.exceptions import Conflict, NotFound
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ErrorRecord
from llama_corral.protocol.records import Checkpoint, EventRecord, Report, RetryPolicy, Terminal, Ticket

S = TaskStatus
POLICY = RetryPolicy(errors=("ValueError", "my.Error"), backoff=2.0, factor=3.0, max_backoff=10.0)
pytestmark = pytest.mark.anyio


def failing(task_id: str = "t", seq: int = 1, epoch: int = 1, *, retryable: bool = True, now: float = 3.0) -> Report:
    error = ErrorRecord(type="ValueError", message=f"no, said epoch {epoch}", retryable=retryable)
    return Report(
        task_id, epoch, seq, now, (EventRecord("E", "{}"),), terminal=Terminal(S.FAILED, result_text="no", error=error)
    )


async def children(store, task_id: str) -> tuple[int, int]:
    """How many checkpoints and inbox events a task has."""

    def count(tx) -> tuple[int, ...]:
        (no,) = tx.one(tx.sql.task_number, {"task_id": task_id})
        return tuple(
            tx.one(f"SELECT count(*) FROM corral_{name} WHERE task_no = {no}", {})[0]
            for name in ("checkpoints", "task_inbox")
        )

    return await store._read(count)


# By the task's policy


@pytest.mark.parametrize(("failures", "seconds"), [(1, 2.0), (2, 6.0), (3, 10.0), (100_000, 10.0)])
def test_the_wait_grows_up_to_its_limit(failures: int, seconds: float) -> None:
    assert POLICY.delay(failures) == seconds


@pytest.mark.promise("P2")
async def test_a_retryable_failure_is_tried_again_later(driver) -> None:
    store = driver.store
    accepted = await driver.accept("t", by="i", retry=POLICY)
    assert accepted.claim.retry == POLICY
    await store.send("t", "mail", 2.0)
    await driver.report("t", 1, events=2, checkpoint=Checkpoint("snap", 1, "f", progress=False))
    answer = await store.report(failing(seq=2))
    assert (answer.status, answer.next_index, answer.tickets, answer.retry_at) == ("ok", 3, (), 5.0)
    assert await store.report(failing(seq=2)) == answer  # its answer was lost
    record = await store.get_task("t")
    assert (record.status, record.attempts, record.owner, record.not_before) == (S.QUEUED, 1, None, 5.0)
    assert record.error.message == "no, said epoch 1"
    assert (record.finished_at, record.result_text, record.event_count) == (None, "", 3)
    assert await driver.claim("t", by="j", now=4.9) is None
    assert await store.due_tickets(now=4.9) == []
    assert await store.next_due(4.0) == 5.0
    assert await store.due_tickets(now=5.0) == [Ticket("t", "svc")]
    claim = await driver.claim("t", by="j", now=5.0)
    assert (claim.epoch, claim.attempt, claim.next_index, claim.retry) == (2, 2, 3, POLICY)
    assert claim.checkpoint == Checkpoint("snap", 1, "f", event_count=2)
    assert (await store.report(failing(seq=2))).status == "fenced"
    assert await store.next_due(4.0) is None
    await driver.end("t", 1, 2)
    record = await store.get_task("t")
    assert (record.status, record.error, record.attempts) == (S.COMPLETED, None, 1)
    assert await children(store, "t") == (0, 0)


@pytest.mark.promise("P1", "P2")
async def test_attempts_are_used_up_by_failures_and_lost_workers_alike(driver) -> None:
    store = driver.store
    await driver.accept("t", by="i", retry=POLICY, max_attempts=3)
    assert (await store.report(failing())).retry_at == 5.0
    await driver.claim("t", by="i", now=5.0)
    await store.reap(["i"], 6.0)
    await driver.claim("t", by="j", now=6.0)
    answer = await store.report(failing(epoch=3, now=7.0))
    assert (answer.status, answer.retry_at) == ("ok", None)
    assert (await store.report(failing(epoch=3, now=7.0))).retry_at is None
    record = await store.get_task("t")
    assert (record.status, record.finished_at, record.error.message) == (S.FAILED, 7.0, "no, said epoch 3")


async def test_progress_sets_failures_back_and_a_snapshot_alone_does_not(driver) -> None:
    store = driver.store
    await driver.accept("t", by="i", retry=POLICY, max_attempts=2)
    await store.report(failing())
    await driver.claim("t", by="i", now=9.0)
    await driver.report("t", 1, 2, checkpoint=Checkpoint("a", 0, progress=False))
    assert (await store.get_task("t")).attempts == 1
    await driver.report("t", 2, 2, checkpoint=Checkpoint("b", 0))
    assert (await store.get_task("t")).attempts == 0
    assert (await store.report(failing(seq=3, epoch=2, now=9.0))).retry_at == 11.0
    await driver.claim("t", by="i", now=12.0)
    await store.release("t", 3, Checkpoint("c", 0, progress=False), 12.0)
    assert (await driver.claim("t", by="i", now=12.0)).attempt == 2


@pytest.mark.parametrize(
    ("more", "cancel", "retryable"),
    [
        ({}, False, True),  # no policy
        ({"retry": POLICY}, False, False),
        ({"retry": POLICY, "max_attempts": 1}, False, True),
        ({"retry": POLICY, "deadline": 5.0}, False, True),  # it could only start when its time is over
        ({"retry": POLICY}, True, True),  # nobody may claim it again
    ],
)
@pytest.mark.promise("P1")
async def test_what_can_not_be_tried_again_ends(driver, more, cancel: bool, retryable: bool) -> None:
    await driver.accept("t", by="i", **more)
    if cancel:
        await driver.store.request_cancel("t", 2.5)
    answer = await driver.store.report(failing(retryable=retryable))
    assert (answer.status, answer.retry_at) == ("ok", None)
    assert await driver.status("t") is S.FAILED
    assert await driver.indices("t") == [0]


async def test_a_retried_task_keeps_its_place_in_its_line(driver) -> None:
    await driver.session()
    await driver.accept("a", "s", by="i", retry=POLICY)
    await driver.accept("b", "s")
    assert (await driver.store.report(failing("a"))).tickets == ()
    assert await driver.status("b") is S.HELD
    answer = await driver.store.request_cancel("a", 4.0)
    assert (answer.ended, answer.tickets) == (True, (Ticket("b", "svc"),))
    # It did not end by the report, so the report's ending does not stand.
    assert (await driver.store.report(failing("a"))).status == "fenced"
    record = await driver.store.get_task("a")
    assert (record.status, record.error.type) == (S.CANCELLED, "cancelled")


async def test_a_fenced_failure_queues_nothing(driver) -> None:
    await driver.accept("t", by="i", retry=POLICY)
    await driver.store.reap(["i"], 3.0)
    await driver.claim("t", by="j")
    assert (await driver.store.report(failing())).status == "fenced"
    assert (await driver.store.report(failing("unknown"))).status == "deleted"
    assert await driver.status("t") is S.RUNNING


async def test_the_store_counts_the_events_before_a_checkpoint(driver) -> None:
    await driver.accept("t", by="i")
    await driver.report("t", 1, events=3)
    await driver.report("t", 2, events=2, checkpoint=Checkpoint("a", 0, event_count=99))
    await driver.report("t", 3, events=4)
    await driver.store.reap(["i"], 3.0)
    assert (await driver.claim("t")).checkpoint.event_count == 5
    await driver.store.release("t", 2, Checkpoint("b", 0), 3.0)
    assert (await driver.claim("t")).checkpoint == Checkpoint("b", 0, event_count=9)


# By a person


async def fail(driver, task_id: str, session: str | None = None, *, retryable: bool = True, **more) -> None:
    """A task that read one of two events, left a checkpoint and failed."""
    await driver.accept(task_id, session, by="i", **more)
    for payload in ("one", "two"):
        await driver.store.send(task_id, payload, 2.0)
    await driver.report(task_id, 1, events=2, checkpoint=Checkpoint("snap", 1, "f"))
    await driver.store.report(failing(task_id, 2, retryable=retryable))


@pytest.mark.promise("P1", "P2")
async def test_a_repetition_goes_on_where_the_old_task_stopped(driver) -> None:
    store = driver.store
    await fail(driver, "t", input='{"n":1}', max_attempts=5, deadline=9.0)
    old = await store.get_task("t")
    accepted = await store.retry("t", 20.0)
    assert (accepted.status, accepted.created) == (S.QUEUED, True)
    assert accepted.session_id == accepted.task_id != "t"
    assert await store.retry("t", 21.0) == dataclasses.replace(accepted, created=False)
    assert await store.get_task("t") == old
    new = await store.get_task(accepted.task_id)
    assert (new.retry_of, new.input, new.max_attempts, new.created_at, new.deadline) == ("t", '{"n":1}', 5, 20.0, None)
    assert (new.epoch, new.attempts, new.event_count, new.error) == (0, 0, 0, None)
    claim = await driver.claim(new.task_id, by="j")
    assert claim.checkpoint == Checkpoint("snap", 1, "f", event_count=0)
    assert [(event.seq, event.payload) for event in claim.inbox] == [(2, "two")]
    assert (await store.send(new.task_id, "three", 22.0)).seq == 3
    await driver.end(new.task_id)
    assert (await store.retry("t", 23.0)).status is S.COMPLETED


async def test_a_repetition_that_is_gone_can_be_asked_for_again(driver) -> None:
    await fail(driver, "t")
    first = await driver.store.retry("t", 20.0)
    await driver.store.request_cancel(first.task_id, 1.0)
    assert await driver.store.purge(2.0) == 1
    again = await driver.store.retry("t", 21.0)
    assert (again.task_id, again.created) == (first.task_id, True)
    claim = await driver.claim(again.task_id)
    assert (claim.checkpoint.snapshot, len(claim.inbox)) == ("snap", 1)


async def test_a_fresh_repetition_takes_nothing_over(driver) -> None:
    await fail(driver, "t", retry=POLICY, max_attempts=1)
    accepted = await driver.store.retry("t", 20.0, fresh=True)
    claim = await driver.claim(accepted.task_id)
    assert (claim.checkpoint, claim.inbox, claim.retry) == (None, (), POLICY)
    assert await children(driver.store, accepted.task_id) == (0, 0)


async def test_a_repetition_fails_and_is_repeated_itself(driver) -> None:
    await fail(driver, "t")
    second = (await driver.store.retry("t", 20.0)).task_id
    await driver.claim(second)
    await driver.store.report(failing(second))
    third = await driver.store.retry(second, 30.0)
    assert len({"t", second, third.task_id}) == 3
    claim = await driver.claim(third.task_id)
    assert (claim.checkpoint.snapshot, [event.seq for event in claim.inbox]) == ("snap", [2])


@pytest.mark.parametrize("status", [S.FAILED, S.CANCELLED, S.TIMED_OUT])
async def test_what_ended_for_good_is_repeated_from_its_start(driver, status: TaskStatus) -> None:
    await driver.accept("t", by="i")
    await driver.store.send("t", "one", 2.0)
    await driver.report("t", 1, checkpoint=Checkpoint("snap", 1))
    await driver.end("t", 2, status=status)
    assert await children(driver.store, "t") == (0, 0)
    accepted = await driver.store.retry("t", 20.0)
    claim = await driver.claim(accepted.task_id)
    assert (claim.checkpoint, claim.inbox) == (None, ())
    assert (await driver.store.send(accepted.task_id, "new", 21.0)).seq == 1


async def test_a_lost_task_keeps_what_its_repetition_needs(driver) -> None:
    await driver.accept("t", by="i", max_attempts=1)
    await driver.store.send("t", "one", 2.0)
    await driver.report("t", 1, checkpoint=Checkpoint("snap", 0))
    await driver.store.reap(["i"], 3.0)
    assert (await driver.store.get_task("t")).error.type == "worker_lost"
    claim = await driver.claim((await driver.store.retry("t", 4.0)).task_id)
    assert (claim.checkpoint.snapshot, len(claim.inbox)) == ("snap", 1)


async def test_a_repetition_joins_the_line_of_its_session(driver) -> None:
    await driver.session()
    await fail(driver, "t", "s")
    await driver.accept("now", "s", by="i")
    accepted = await driver.store.retry("t", 20.0)
    assert (accepted.status, accepted.session_id) == (S.HELD, "s")
    assert (await driver.end("now")).tickets == (Ticket(accepted.task_id, "svc"),)
    assert (await driver.claim(accepted.task_id)).checkpoint.snapshot == "snap"
    assert (await driver.store.get_session("s")).task_ids == ("t", "now", accepted.task_id)


@pytest.mark.promise("P9")
async def test_what_can_not_be_repeated_is_said(driver) -> None:
    store = driver.store
    with pytest.raises(NotFound):
        await store.retry("unknown", 4.0)
    await driver.accept("open", by="i")
    await driver.accept("good", by="i")
    await driver.end("good")
    for task_id, status in (("open", S.RUNNING), ("good", S.COMPLETED)):
        with pytest.raises(Conflict) as caught:
            await store.retry(task_id, 4.0)
        assert caught.value.fields["status"] is status
        assert caught.value.hint
    await driver.session(policy="reject")
    await fail(driver, "t", "s")
    await driver.accept("now", "s", by="i")
    with pytest.raises(Conflict):
        await store.retry("t", 4.0)
    await driver.end("now")
    accepted = await store.retry("t", 4.0)
    assert (await store.retry("t", 5.0)).task_id == accepted.task_id  # busy with itself


async def test_a_deleted_session_takes_repetitions_and_what_failed_tasks_left(driver) -> None:
    await driver.session()
    await fail(driver, "t", "s")
    await driver.store.retry("t", 4.0)
    await driver.store.delete_session("s")

    def left(tx) -> list[int]:
        names = ("tasks", "checkpoints", "task_inbox", "task_events")
        return [tx.one(f"SELECT count(*) FROM corral_{name}", {})[0] for name in names]

    assert await driver.store._read(left) == [0, 0, 0, 0]
