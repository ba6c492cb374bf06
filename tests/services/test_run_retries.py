"""Tasks that ask to be tried again when their workflow raises."""

from __future__ import annotations

import logging

import anyio
import pytest
from workflows import Context, Workflow, step
from workflows.errors import WorkflowTimeoutError
from workflows.events import Event, StartEvent, StopEvent

from llama_corral.exceptions import FlavourError
from llama_corral.protocol.records import NewTask, RetryPolicy
from llama_corral.services import checkpoints
from llama_corral.services.outcome import may_retry

from .flows import Asks
from .rig import Probe, Recorder, until

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P1", "P2")]


class Broken(Exception):
    pass


class BrokenBadly(Broken):
    pass


class Half(Event):
    pass


class Fails(Workflow):
    """Its second step fails so often."""

    def __init__(self, failures, error=BrokenBadly):
        super().__init__(timeout=None)
        self.failures = failures
        self.error = error
        self.entered = []

    @step
    async def first(self, ev: StartEvent, ctx: Context) -> Half:
        self.entered.append("first")
        return Half()

    @step
    async def second(self, ev: Half) -> StopEvent:
        self.entered.append("second")
        if self.entered.count("second") <= self.failures:
            raise self.error("no luck")
        return StopEvent(result="at last")


AT_ONCE = {"backoff": 0.001, "max_backoff": 0.001}


async def submit(rig, policy, *, max_attempts=3, service="svc", deadline=None):
    """Accepted as the routes do it: stored, and its ticket published."""
    now = rig.plane._now()
    task = NewTask("t", service, "{}", now, max_attempts=max_attempts, retry=policy, deadline=deadline)
    await rig.store.accept(task)
    rig.plane._effects.tickets(await rig.store.due_tickets())
    return "t"


async def run(rig, policy, **options):
    task_id = await submit(rig, policy, **options)
    return await rig.result(task_id)


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(checkpoints, "CHECKPOINT_AGE", 0.0)
    monkeypatch.setattr(checkpoints, "COST_SHARE", 0.0)


async def test_a_task_is_tried_again_until_it_succeeds(rig, caplog):
    workflow = Fails(2)
    recorder = Recorder(rig.plane)
    await rig.serve(workflow, coordinator=recorder, checkpoints="none")
    record = await run(rig, RetryPolicy(**AT_ONCE))
    assert (record.status, record.result, record.epoch) == ("completed", '"at last"', 3)
    assert workflow.entered == ["first", "second"] * 3
    assert [claim.attempt for claim in recorder.claims] == [1, 2, 3]
    events = await rig.events("t")
    assert [event.type for event in events].count("WorkflowFailedEvent") == 2
    assert [event.type for event in events].count("RunResumed") == 2
    assert [each for each in caplog.records if each.levelno >= logging.ERROR] == []


async def test_it_goes_on_from_its_checkpoint(rig, at_once):
    workflow = Fails(2)
    await rig.serve(workflow)
    record = await run(rig, RetryPolicy(**AT_ONCE))
    assert record.status == "completed"
    assert workflow.entered == ["first", "second", "second", "second"]


async def test_it_fails_at_last_with_its_error(rig, caplog):
    await rig.serve(Fails(99), checkpoints="none")
    record = await run(rig, RetryPolicy(**AT_ONCE), max_attempts=2)
    assert (record.status, record.error.type, record.error.retryable) == ("failed", "BrokenBadly", True)
    assert record.epoch == 2
    await until(lambda: [each for each in caplog.records if each.levelno >= logging.ERROR])
    assert len([each for each in caplog.records if each.levelno >= logging.ERROR]) == 1


async def test_without_a_policy_it_fails_at_once(rig):
    await rig.serve(Fails(1))
    record = await run(rig, None)
    assert (record.status, record.epoch, record.error.retryable) == ("failed", 1, False)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, True),
        (("BrokenBadly",), True),
        (("Broken",), True),
        ((f"{__name__}.Broken",), True),
        (("Exception",), True),
        (("builtins.Exception",), True),
        (("ValueError", "Broken"), True),
        (("ValueError",), False),
        (("broken",), False),
        ((f"{__name__}.BrokenB",), False),
        ((), False),
    ],
)
def test_errors_are_judged_by_the_names_of_their_classes(names, expected):
    policy = RetryPolicy(names)
    assert may_retry(BrokenBadly("x"), policy) is expected
    assert may_retry(ExceptionGroup("several", [BrokenBadly("x"), Broken("y")]), RetryPolicy(("Broken",)))
    assert not may_retry(ExceptionGroup("several", [BrokenBadly("x"), KeyError("y")]), RetryPolicy(("Broken",)))
    assert not may_retry(BrokenBadly("x"), None)
    assert not may_retry(FlavourError("x"), RetryPolicy())


async def test_only_what_was_asked_for(rig):
    await rig.serve(Fails(1, KeyError))
    record = await run(rig, RetryPolicy(("Broken",), **AT_ONCE))
    assert (record.status, record.error.type, record.epoch) == ("failed", "KeyError", 1)


async def test_refused_input_is_not_tried_again(rig):
    class Strict(Workflow):
        @step
        async def work(self, ev: Needs) -> StopEvent:
            return StopEvent()

    await rig.serve(Strict())
    record = await run(rig, RetryPolicy(**AT_ONCE))
    assert (record.status, record.error.type, record.epoch) == ("failed", "BadInput", 1)


class Needs(StartEvent):
    n: int


async def test_a_timeout_of_the_workflow_is_no_failure(rig):
    class Late(Workflow):
        @step
        async def work(self, ev: StartEvent) -> StopEvent:
            entered.append(1)
            await anyio.sleep_forever()
            return StopEvent()

    entered = []
    await rig.serve(Late(timeout=0.5))
    record = await run(rig, RetryPolicy(**AT_ONCE))
    assert (record.status, record.error.type) == ("timed_out", "WorkflowTimeoutError")
    assert entered == [1]


async def test_a_timeout_that_a_step_raises_is_one(rig):
    await rig.serve(Fails(1, WorkflowTimeoutError))
    record = await run(rig, RetryPolicy(("WorkflowTimeoutError",), **AT_ONCE))
    assert (record.status, record.epoch) == ("completed", 2)


@pytest.mark.promise("P6")
async def test_a_cancelled_task_is_not_tried_again(rig):
    probe = Probe()
    await rig.serve(Asks(probe))
    task_id = await submit(rig, RetryPolicy(**AT_ONCE))
    await rig.wait_status(task_id, "waiting")
    await rig.plane.cancel(task_id)
    record = await rig.result(task_id)
    assert (record.status, record.epoch) == ("cancelled", 1)


async def test_between_its_attempts_nobody_holds_it(rig):
    workflow = Fails(1)
    service = await rig.serve(workflow)
    task_id = await submit(rig, RetryPolicy(backoff=3600))

    async def failed_once() -> bool:
        return (await rig.plane.get_task(task_id)).attempts == 1

    await until(failed_once)
    record = await rig.wait_status(task_id, "queued")
    await until(lambda: not service.executions and not service.statistics().working)
    assert (record.owner, record.attempts, record.error.type) == (None, 1, "BrokenBadly")
    await rig.plane.cancel(task_id)
    assert (await rig.result(task_id)).status == "cancelled"


async def test_raise_exceptions_raises_only_what_ended_a_task(rig):
    service = await rig.serve(Fails(1), raise_exceptions=True, checkpoints="none")
    record = await run(rig, RetryPolicy(**AT_ONCE))
    assert record.status == "completed"
    assert service.statistics().running
    assert not rig.crashes
