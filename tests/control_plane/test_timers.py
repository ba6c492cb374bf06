"""What becomes due by itself: later starts, further attempts, deadlines, timers of runs that are out of memory."""

from __future__ import annotations

import time
from pathlib import Path

import anyio
import pytest

from llama_corral.exceptions import BadInput
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ErrorRecord, ServiceDefinition
from llama_corral.protocol.records import Checkpoint, RetryPolicy, Terminal

from .corral import Corral, open_corral

pytestmark = pytest.mark.anyio
IDLE = Checkpoint("{}", inbox_applied=0)


@pytest.mark.promise("P5")
@pytest.mark.parametrize("slots", [0, 1])
async def test_a_delayed_task_starts_later_and_without_a_backstop(corral: Corral, slots: int) -> None:
    service = await corral.service(slots=slots)
    accepted = await corral.plane.submit("svc", {}, delay=0.4)
    assert accepted.status is TaskStatus.QUEUED
    assert service.free == slots
    assert corral.queue.statistics()["published"] == 0
    not_before = (await corral.plane.get_task(accepted.task_id)).not_before
    assert not_before is not None
    claim = await service.take_ticket(corral.queue)
    assert claim is not None
    record = await corral.plane.get_task(accepted.task_id)
    assert record.started_at is not None
    assert record.started_at >= not_before >= record.created_at + 0.4
    assert record.not_before is None  # handed back, it need not wait again


async def test_a_moment_that_has_passed_is_now(corral: Corral) -> None:
    await corral.service(slots=2)
    assert (await corral.plane.submit("svc", {}, not_before=time.time() - 1)).status is TaskStatus.RUNNING
    assert (await corral.plane.submit("svc", {}, delay=0)).status is TaskStatus.RUNNING
    for options in ({"delay": 1.0, "not_before": 1.0}, {"delay": 10.0, "timeout": 5.0}):
        with pytest.raises(BadInput):
            await corral.plane.submit("svc", {}, **options)  # type: ignore[arg-type]


@pytest.mark.promise("P1", "P5")
async def test_the_next_process_knows_what_is_due(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/corral.db"
    async with open_corral(url) as corral:
        service = await corral.service(slots=1)
        sleeping = await corral.plane.submit("svc", {})
        claim = await service.wait_claim()
        await corral.plane.release(claim.task_id, claim.epoch, IDLE, idle=True, wake_at=time.time() + 1.5)
        later = await corral.plane.submit("svc", {}, delay=1)
        ending = await corral.plane.submit("svc", {}, delay=1000, timeout=1001)
    async with open_corral(url) as corral:
        due = await corral.store.next_due(0.0)
        assert corral.plane._effects.alarm.next == due
        service = await corral.service()
        claims = [await service.take_ticket(corral.queue), await service.take_ticket(corral.queue)]
        assert [claim.task_id for claim in claims if claim is not None] == [later.task_id, sleeping.task_id]
        assert (await corral.plane.get_task(ending.task_id)).status is TaskStatus.QUEUED


async def test_a_run_that_left_memory_is_woken_in_time(corral: Corral) -> None:
    service = await corral.service(slots=1)
    await corral.plane.submit("svc", {})
    claim = await service.wait_claim()
    answer = await corral.plane.release(claim.task_id, claim.epoch, IDLE, idle=True, wake_at=time.time() + 0.05)
    assert answer.tickets == ()
    again = await service.take_ticket(corral.queue)
    assert again is not None
    assert (again.task_id, again.epoch) == (claim.task_id, 2)


@pytest.mark.promise("P1")
async def test_a_deadline_counts_when_its_owner_has_let_go(corral: Corral, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_corral.control_plane.effects.LOOK_AGAIN", 0.01)
    service = await corral.service(slots=1)
    accepted = await corral.plane.submit("svc", {}, timeout=0.6)
    claim = await service.wait_claim()
    corral.plane._effects.alarm.next = float("inf")  # what an earlier look leaves: owners end their own
    await corral.plane.release(claim.task_id, claim.epoch, IDLE, idle=True)
    record = await corral.plane.wait_result(accepted.task_id, 5)
    assert record is not None
    assert record.status is TaskStatus.TIMED_OUT


async def test_a_held_task_that_may_not_start_yet_starts_in_time(
    corral: Corral, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_corral.control_plane.effects.LOOK_AGAIN", 0.01)
    service = await corral.service(slots=1)
    session = (await corral.plane.sessions.create()).session_id
    await corral.plane.submit("svc", {}, session_id=session)
    held = await corral.plane.submit("svc", {}, session_id=session, delay=0.2)
    assert held.status is TaskStatus.HELD
    corral.plane._effects.alarm.next = float("inf")
    await service.complete(await service.wait_claim())
    claim = await service.take_ticket(corral.queue)  # too early
    if claim is None:
        claim = await service.take_ticket(corral.queue)
    assert claim is not None
    assert claim.task_id == held.task_id


def failure(message: str = "boom") -> Terminal:
    error = ErrorRecord(type="app.Flaky", message=message, retryable=True)
    return Terminal(TaskStatus.FAILED, result_text=message, error=error)


@pytest.mark.promise("P1", "P2")
async def test_a_failure_that_may_be_tried_again_is_no_ending(corral: Corral) -> None:
    service = await corral.service(slots=1)
    answers = []
    seen: list[str] = []
    async with anyio.create_task_group() as group:

        async def run() -> None:
            policy = RetryPolicy(("Flaky",), backoff=0.05)
            answers.append(await corral.plane.run("svc", {}, task_id="t", retry=policy, max_attempts=3))

        async def read() -> None:
            async for page in corral.plane.open_log("t"):
                seen.extend(event.payload for event in page.events)

        group.start_soon(run)
        claim = await service.wait_claim()
        assert claim.retry is not None
        group.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        answer = await service.report(claim, {"n": 0}, terminal=failure("once"))
        assert answer.retry_at is not None
        record = await corral.plane.get_task("t")
        assert (record.status, record.attempts, record.max_attempts) == (TaskStatus.QUEUED, 1, 3)
        assert record.error is not None
        assert record.error.message == "once"
        await anyio.wait_all_tasks_blocked()
        assert (answers, len(seen)) == ([], 1)
        again = await service.take_ticket(corral.queue)
        assert again is not None
        assert (again.epoch, again.attempt) == (2, 2)
        await service.report(again, terminal=failure("twice"))
        last = await service.take_ticket(corral.queue)
        assert last is not None
        assert (await service.report(last, terminal=failure("thrice"))).retry_at is None
    _, terminal = answers[0]
    assert terminal is not None
    assert (terminal.status, terminal.result_text) == (TaskStatus.FAILED, "thrice")
    assert (await corral.plane.get_task("t")).attempts >= 2


async def test_a_service_of_messages_is_given_its_task_again(corral: Corral) -> None:
    await corral.plane.services.define(ServiceDefinition(service_name="old"))
    accepted = await corral.plane.submit("old", {}, retry=RetryPolicy(backoff=0.05))
    await corral.message("old")
    record = await corral.plane.get_task(accepted.task_id)
    await corral.plane._reports._end(accepted.task_id, record.epoch, failure())
    assert (await corral.message("old")).data["task_id"] == accepted.task_id
    assert (await corral.plane.get_task(accepted.task_id)).attempts == 1
