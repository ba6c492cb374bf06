"""Retry policies, error handlers, timeouts."""

from __future__ import annotations

import threading

import anyio
import anyio.lowlevel
import pytest
from workflows import Context, Workflow, catch_error, step
from workflows.errors import WorkflowRuntimeError, WorkflowTimeoutError
from workflows.events import Event, StartEvent, StepFailedEvent, StopEvent, WorkflowFailedEvent
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

from llama_corral.runtime import open_run, run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


class Flaky(Workflow):
    def __init__(self, failures, **kwargs):
        super().__init__(**kwargs)
        self.failures = failures
        self.calls = 0

    @step(retry_policy=retry_policy(wait=wait_fixed(0), stop=stop_after_attempt(3)))
    async def flaky(self, ctx: Context, ev: StartEvent) -> StopEvent:
        self.calls += 1
        info = ctx.retry_info()
        if self.calls > 1:
            assert isinstance(info.last_exception, ConnectionError)
        if self.calls <= self.failures:
            raise ConnectionError(f"attempt {self.calls}")
        return StopEvent(result=self.calls)


async def test_retries(flavour):
    assert await run_workflow(Flaky(2), flavour=flavour) == 3
    workflow = Flaky(9)
    async with open_run(workflow, flavour=flavour) as run:
        with pytest.raises(ConnectionError, match="attempt 3"):
            await run.result()
        failed = [event async for event in run.events()][-1]
    assert isinstance(failed, WorkflowFailedEvent)
    assert (failed.step_name, failed.attempts) == ("flaky", 3)


class Undecided:
    def next(self, elapsed_time, attempts, error, seed=None):
        raise LookupError("cannot decide")


class BadPolicy(Workflow):
    @step(retry_policy=Undecided())
    async def flaky(self, ev: StartEvent) -> StopEvent:
        raise ConnectionError("first")


async def test_a_policy_that_raises_ends_the_run_with_its_error(flavour):
    with pytest.raises(LookupError, match="cannot decide") as caught:
        await run_workflow(BadPolicy(), flavour=flavour)
    assert isinstance(caught.value.__cause__, ConnectionError)


class Caught(Workflow):
    @step
    async def fail(self, ev: StartEvent) -> StopEvent:
        raise ConnectionError("lost")

    @catch_error
    async def handle(self, ev: StepFailedEvent) -> StopEvent:
        return StopEvent(result=f"{ev.step_name}: {ev.exception}")


async def test_an_error_handler(flavour):
    assert await run_workflow(Caught(), flavour=flavour) == "fail: lost"


class Slow(Workflow):
    @step
    async def slow(self, ctx: Context, ev: StartEvent) -> StopEvent:
        try:
            await anyio.sleep_forever()
        finally:
            ctx.write_event_to_stream(Event())  # too late: dropped
            self.cleaned = True
        return StopEvent()


async def test_a_timeout_ends_the_steps(flavour):
    workflow = Slow(timeout=0.5)
    with pytest.raises(WorkflowTimeoutError, match="slow"):
        await run_workflow(workflow, flavour=flavour)
    assert workflow.cleaned


class Blocked(Workflow):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.go_on = threading.Event()
        self.ended = threading.Event()

    @step
    def block(self, ctx: Context, ev: StartEvent) -> StopEvent:
        self.go_on.wait(30)
        ctx.write_event_to_stream(Event())
        ctx.send_event(Event())
        self.ended.set()
        return StopEvent(result="late")


async def test_a_blocked_sync_step_does_not_hold_up_the_timeout(flavour):
    workflow = Blocked(timeout=0.5)
    with pytest.raises(WorkflowTimeoutError):
        await run_workflow(workflow, flavour=flavour)
    workflow.go_on.set()  # what it does now is nobody's business any more
    assert await anyio.to_thread.run_sync(workflow.ended.wait, 10)


class Groups(Workflow):
    @step
    async def fail(self, ev: StartEvent) -> StopEvent:
        raise ExceptionGroup("its own", [ConnectionError("a"), ValueError("b")])


async def test_a_group_that_a_step_raises_stays_a_group(flavour):
    with pytest.RaisesGroup(ConnectionError, ValueError, match="its own"):
        await run_workflow(Groups(), flavour=flavour)


class InParallel(Workflow):
    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Event | None:
        for _ in range(4):
            ctx.send_event(Event())
        return None

    @step(num_workers=4)
    async def fail(self, ev: Event) -> StopEvent:
        await anyio.lowlevel.checkpoint()
        raise ConnectionError("all at once")


async def test_errors_of_several_steps_at_once_are_one_error(flavour):
    with pytest.raises(ConnectionError, match="all at once"):
        await run_workflow(InParallel(), flavour=flavour)


class Custom(BaseException):
    pass


class Exits(Workflow):
    @step
    async def exits(self, ev: StartEvent) -> StopEvent:
        await anyio.lowlevel.checkpoint()
        raise ev.error


class ExitsInThread(Workflow):
    @step
    def exits(self, ev: StartEvent) -> StopEvent:
        raise ev.error


@pytest.mark.promise("P1")
@pytest.mark.parametrize(
    "make", [lambda: SystemExit(3), lambda: Custom("odd"), lambda: BaseExceptionGroup("one", [SystemExit()])]
)
@pytest.mark.parametrize("workflow", [Exits, ExitsInThread])
async def test_what_is_no_exception_fails_the_run_and_nothing_else(flavour, workflow, make):
    error = make()
    async with open_run(workflow(), flavour=flavour, error=error) as run:
        with pytest.raises(WorkflowRuntimeError, match=f"'exits' raised {type(error).__name__}: ") as caught:
            await run.result()
        assert caught.value.__cause__ is error
        assert [type(event) async for event in run.events()] == [WorkflowFailedEvent]


@pytest.mark.parametrize("configuration", ["trio-anyio"])  # asyncio gives it to its loop, not to the step
async def test_ctrl_c_in_a_step_ends_the_program():
    with pytest.RaisesGroup(KeyboardInterrupt, flatten_subgroups=True):
        await run_workflow(Exits(), error=KeyboardInterrupt())
