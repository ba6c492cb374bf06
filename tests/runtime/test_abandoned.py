"""Sync steps whose run is cancelled: the thread is abandoned and said so, and nothing of it is seen afterwards (P6)."""

from __future__ import annotations

import logging
import threading
from contextlib import asynccontextmanager, suppress

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from workflows import Context, Workflow, step
from workflows.errors import WorkflowCancelledByUser, WorkflowTimeoutError
from workflows.events import Event, HumanResponseEvent, StartEvent, StopEvent

from llama_corral.exceptions import RunClosed
from llama_corral.runtime import RunHooks, open_run, run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left"), pytest.mark.promise("P6")]

PATIENCE = 10.0


class Left(Exception):
    pass


class Note(Event):
    pass


class Late(Event):
    pass


class Blocked(Workflow):
    """A sync step that is blocked until the test lets it go, and then does everything that it can."""

    def __init__(self, how="return", **options) -> None:
        super().__init__(**{"timeout": None, **options})
        self.how = how
        self.entered = threading.Event()
        self.let_go = threading.Event()
        self.ended = threading.Event()
        self.late = 0
        self.tidying = anyio.Event()
        self.tidy = anyio.Event()

    @step
    def block(self, ctx: Context, ev: StartEvent) -> Late | StopEvent:
        self.entered.set()
        try:
            assert self.let_go.wait(PATIENCE)
            if self.how == "raise":
                raise LookupError("too late")
            ctx.write_event_to_stream(Note())
            ctx.send_event(Late())
            return StopEvent(result="late")
        finally:
            self.ended.set()

    @step
    async def take(self, ev: Late) -> None:
        self.late += 1

    @step
    async def beside(self, ev: HumanResponseEvent) -> StopEvent | None:
        if ev.response == "stop":
            return StopEvent(result="stopped")
        if ev.response == "fail":
            raise LookupError("failed")
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                self.tidying.set()
                await self.tidy.wait()

    async def wait_entered(self):
        assert await anyio.to_thread.run_sync(self.entered.wait, PATIENCE)

    async def wait_ended(self):
        self.let_go.set()
        assert await anyio.to_thread.run_sync(self.ended.wait, PATIENCE)
        await anyio.wait_all_tasks_blocked()

    @asynccontextmanager
    async def released(self):
        """Whatever becomes of the test, the thread ends."""
        try:
            yield
        finally:
            self.let_go.set()


@pytest.fixture
def warnings(caplog):
    """What was said at WARNING and above."""
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class Ears(RunHooks):
    def __init__(self):
        self.heard = []

    def on_event(self, event):
        self.heard.append(event)


WAYS = {
    "scope": RunClosed,
    "cancel": WorkflowCancelledByUser,
    "leave": RunClosed,
    "timeout": WorkflowTimeoutError,
    "stop": None,
    "fail": LookupError,
}


@pytest.mark.parametrize("how", ["return", "raise"])
@pytest.mark.parametrize("way", WAYS)
async def test_abandoned_and_reported(flavour, warnings, way, how):
    workflow = Blocked(how, timeout=0.4 if way == "timeout" else None)
    ears = Ears()
    async with workflow.released():
        with anyio.fail_after(PATIENCE), anyio.CancelScope() as scope, suppress(Left):
            async with open_run(workflow, run_id="the-run", flavour=flavour, hooks=ears) as run:
                await workflow.wait_entered()
                assert warnings() == [] or way == "timeout"
                if way == "leave":
                    raise Left
                if way == "scope":
                    scope.cancel()
                elif way == "cancel":
                    run.cancel()
                elif way != "timeout":
                    run.send_event(HumanResponseEvent(response=way))
                with suppress(WAYS[way] or Left):
                    await run.wait_stop_event()
        [abandoned] = [text for text in warnings() if "abandoned" in text]
        assert "'block'" in abandoned
        assert "the-run" in abandoned
        assert not workflow.ended.is_set()
        if WAYS[way] is None:
            assert run.stop_event.result == "stopped"
        else:
            with pytest.raises(WAYS[way]):
                _ = run.stop_event
        said, heard, numbers = warnings(), list(ears.heard), run.statistics()
        await workflow.wait_ended()
    assert (warnings(), ears.heard, run.statistics(), workflow.late) == (said, heard, numbers, 0)
    assert [event async for event in run.events()] == heard


async def test_what_an_abandoned_thread_does_while_its_run_unwinds(flavour, configuration, warnings):
    """The run is not over yet: another step cleans up. The thread that nobody waits for has no part in it any more."""
    workflow = Blocked()
    ears = Ears()
    async with workflow.released(), anyio.create_task_group() as group:

        async def own(*, task_status):
            with scope:
                async with open_run(workflow, hooks=ears) as run:
                    task_status.started(run)
                    await run.result()

        scope = anyio.CancelScope()
        run = await group.start(own)
        await workflow.wait_entered()
        run.send_event(HumanResponseEvent(response="stay"))
        await anyio.wait_all_tasks_blocked()
        scope.cancel()
        with anyio.fail_after(PATIENCE):
            await workflow.tidying.wait()
        await workflow.wait_ended()
        assert not run.is_done
        workflow.tidy.set()
    assert run.is_done
    assert (ears.heard, workflow.late) == ([], 0)
    assert len(warnings()) == 1


async def test_a_blocked_step_stops_nobody_else(flavour):
    class Quick(Workflow):
        @step
        async def first(self, ctx: Context, ev: StartEvent) -> Note:
            await anyio.lowlevel.checkpoint()
            return Note()

        @step
        def second(self, ev: Note) -> StopEvent:
            return StopEvent(result="quick")

    blocked = Blocked()
    async with blocked.released():
        with anyio.fail_after(PATIENCE):
            async with open_run(blocked, flavour=flavour) as run:
                await blocked.wait_entered()
                assert await run_workflow(Quick(), flavour=flavour) == "quick"
                run.cancel()
            assert await run_workflow(Quick(), flavour=flavour) == "quick"
        assert not blocked.ended.is_set()
        await blocked.wait_ended()


async def test_a_step_that_waits_for_a_thread_never_begins(flavour, warnings):
    first, second = Blocked(), Blocked()
    threads = anyio.CapacityLimiter(1)
    async with first.released(), second.released():
        async with open_run(first, flavour=flavour, sync_limiter=threads) as run:
            await first.wait_entered()
            async with open_run(second, flavour=flavour, sync_limiter=threads):
                await anyio.wait_all_tasks_blocked()
                assert threads.statistics().tasks_waiting == 1
            assert threads.statistics().tasks_waiting == 0
            assert warnings() == []
            first.let_go.set()
            assert await run.result() == "late"
        assert threads.borrowed_tokens == 0
    assert not second.entered.is_set()
    assert first.late in (0, 1)
    assert warnings() == []


async def test_threads_end_by_themselves_and_are_used_again(flavour):
    threads = anyio.CapacityLimiter(3)
    blocked = [Blocked() for _ in range(3)]
    async with open_run(Blocked(), flavour=flavour, sync_limiter=threads):
        pass
    for workflow in blocked:
        async with open_run(workflow, flavour=flavour, sync_limiter=threads):
            await workflow.wait_entered()
    for workflow in blocked:
        await workflow.wait_ended()
    again = [Blocked() for _ in range(3)]
    for workflow in again:
        workflow.let_go.set()
        with anyio.fail_after(PATIENCE):
            async with open_run(workflow, flavour=flavour, sync_limiter=threads) as run:
                assert await run.result() == "late"
