"""A task is cancelled at each stage of its life: one ending, and the right one (P1, P6)."""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext
from typing import Any

import anyio
import anyio.to_thread
import pytest
from pydantic import BaseModel, model_validator
from workflows import Context, Workflow, step
from workflows.events import Event, StartEvent, StopEvent
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

from llama_corral.exceptions import Conflict
from llama_corral.supervision import Backoff

from .flows import Asks, Counter, Probed, Progress
from .link import Link, ended
from .rig import PATIENCE, Probe, living_tasks, until

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P1", "P6")]


class Next(Event):
    pass


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(Backoff, "delay", lambda self, failures: 0.001)


@pytest.fixture
def link(rig):
    return Link(rig.plane)


# Claimed, not started


@pytest.mark.parametrize("when", ["before", "after"])
async def test_while_it_is_claimed(rig, link, when):
    probe = Probe()
    service = await rig.serve(Probed(probe), coordinator=link, cap=1)
    service.reserve = lambda: None
    before = living_tasks()
    with link.held("claim", when):
        task_id = await rig.submit(name=1)
        await link.wait_caught()
        await rig.plane.cancel(task_id)
        await anyio.wait_all_tasks_blocked()
        assert (await rig.plane.get_task(task_id)).status == ("cancelled" if when == "before" else "running")
    await ended(rig, task_id, "cancelled", service=service)
    assert link.endings == ([] if when == "before" else ["cancelled"])
    assert probe.entered == probe.cleaned
    assert living_tasks() == before
    probe.open(2)
    assert (await rig.run(name=2)).status == "completed"


decoding: list[Any] = []
"""Called when a stored state is decoded."""


class Remembered(BaseModel):
    count: int = 0

    @model_validator(mode="after")
    def tell(self) -> Remembered:
        if decoding and self.count:
            decoding.pop()()
        return self


class Remembers(Workflow):
    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe

    @step
    async def work(self, ev: StartEvent, ctx: Context[Remembered]) -> StopEvent:
        with self.probe.inside(ev.get("name")):
            await self.probe.wait_open(ev.get("name"))
        async with ctx.store.edit_state() as state:
            state.count += 1
        return StopEvent(result=state.count)


async def test_while_its_context_is_decoded(rig):
    probe = Probe()
    service = await rig.serve(Remembers(probe))
    await rig.plane.sessions.create("s")
    probe.open(1, 3)
    assert (await rig.run(session="s", name=1)).result == "1"
    accepted = []
    decoding.append(lambda: rig.tasks.start_soon(cancel_later))

    async def cancel_later() -> None:
        await rig.plane.cancel(accepted[0])

    service.reserve = lambda: None
    accepted.append(await rig.submit(session="s", name=2))
    await ended(rig, accepted[0], "cancelled", service=service)
    assert decoding == []
    assert probe.entered == probe.cleaned
    assert (await rig.run(session="s", name=3)).result == "2"


async def test_before_it_goes_on_elsewhere(rig, link):
    """The request comes while the task is handed back: it is not forgotten with the owner."""
    service = await rig.serve(Asks(), coordinator=link)
    task_id = await rig.submit()
    await rig.wait_status(task_id, "waiting")
    with link.held("release", "before"):
        service.stop()
        await link.wait_caught()
        await rig.plane.cancel(task_id)
    await rig.wait_ended(service)
    await ended(rig, task_id, "cancelled")


async def test_a_cancelled_task_whose_owner_dies(rig):
    probe = Probe()
    service = await rig.serve(Probed(probe))
    task_id = await rig.submit(name=1)
    await probe.wait_entered(1)
    await rig.store.request_cancel(task_id, 0)
    await rig.plane.deregister(service.instance_id)
    await ended(rig, task_id, "cancelled")
    for execution in list(service.executions.values()):  # it is not dead: it hears of its loss when it asks
        execution.wake()
    await until(lambda: not service.executions)
    assert probe.cleaned == [1]


# Working


class Blocks(Workflow):
    """A sync step that is blocked until the test lets it go."""

    def __init__(self) -> None:
        super().__init__(timeout=None)
        self.entered = threading.Event()
        self.let_go = threading.Event()
        self.ended = threading.Event()

    @step
    def block(self, ctx: Context, ev: StartEvent) -> StopEvent:
        if ev.get("quick", False):
            return StopEvent(result="quick")
        ctx.write_event_to_stream(Progress(n=1))
        self.entered.set()
        try:
            assert self.let_go.wait(PATIENCE)
            ctx.write_event_to_stream(Progress(n=2))
            return StopEvent(result="late")
        finally:
            self.ended.set()


@pytest.mark.parametrize("how", ["cancel", "deadline", "delete"])
async def test_in_a_sync_step(rig, caplog, how):
    workflow = Blocks()
    service = await rig.serve(workflow, cap=1)
    before = living_tasks()
    await rig.plane.sessions.create("s")
    timeout = 0.4 if how == "deadline" else None
    task_id = (await rig.plane.submit("svc", {}, session_id="s", timeout=timeout)).task_id
    try:
        assert await anyio.to_thread.run_sync(workflow.entered.wait, PATIENCE)
        if how == "delete":
            await rig.plane.sessions.delete("s")
            await until(lambda: not service.executions)
        else:
            if how == "cancel":
                await rig.plane.cancel(task_id)
            record = await ended(rig, task_id, "cancelled", "timed_out", service=service)
            assert record.status == ("cancelled" if how == "cancel" else "timed_out")
        assert not workflow.ended.is_set()
        [said] = [each.getMessage() for each in caplog.records if "abandoned" in each.getMessage()]
        assert "'block'" in said
        assert task_id in said
        assert (await rig.run(quick=True)).result == '"quick"'  # its slot is free, and the loop goes on
    finally:
        workflow.let_go.set()
    assert await anyio.to_thread.run_sync(workflow.ended.wait, PATIENCE)
    await anyio.wait_all_tasks_blocked()
    if how != "delete":
        assert await rig.plane.get_task(task_id) == record
        assert next(event.type for event in await rig.events(task_id)) == "Progress"
        assert len(await rig.events(task_id)) == record.event_count
    assert living_tasks() == before


class Retries(Workflow):
    @step(retry_policy=retry_policy(wait=wait_fixed(1e6), stop=stop_after_attempt(3)))
    async def fail(self, ctx: Context, ev: StartEvent) -> StopEvent:
        ctx.write_event_to_stream(Progress(n=1))
        raise ConnectionError


async def test_while_its_retry_waits(rig):
    service = await rig.serve(Retries(timeout=None), cap=1)
    before = living_tasks()
    task_id = await rig.submit()
    await rig.wait_status(task_id, "waiting")
    assert service.statistics().working == 0
    await rig.plane.cancel(task_id)
    await ended(rig, task_id, "cancelled", service=service)
    assert living_tasks() == before


# Publishing


class Publishes(Workflow):
    def __init__(self, probe: Probe) -> None:
        super().__init__(timeout=None)
        self.probe = probe

    @step
    async def first(self, ev: StartEvent, ctx: Context) -> Next:
        with self.probe.inside("first"):
            for n in range(1500):
                ctx.write_event_to_stream(Progress(n=n))
            return Next()

    @step
    async def second(self, ev: Next) -> StopEvent:
        with self.probe.inside("second"):
            return StopEvent()


@pytest.mark.parametrize("when", ["before", "after"])
async def test_while_its_events_are_published(rig, link, when):
    """The second step waits for the publisher, which waits for the store."""
    probe = Probe()
    service = await rig.serve(Publishes(probe), coordinator=link)
    with link.held("report", when):
        task_id = await rig.submit()
        await link.wait_caught()
        await probe.wait_entered(1)
        await rig.plane.cancel(task_id)
        await anyio.wait_all_tasks_blocked()
        assert (await rig.plane.get_task(task_id)).status == "running"
    record = await ended(rig, task_id, "cancelled", service=service)
    assert probe.entered == ["first"]
    assert link.endings == ["cancelled"]
    events = await rig.events(task_id)
    assert [json.loads(event.payload)["n"] for event in events[:-1]] == list(range(1500))
    assert events[-1].type == "WorkflowCancelledEvent"
    assert record.event_count == 1501


# The final save


@pytest.mark.parametrize("when", ["before", "after", "lost"])
@pytest.mark.parametrize("arguments", [{}, {"fail": True}])
async def test_during_the_final_save(rig, link, when, arguments):
    """The run has ended and its report is on its way: that ending wins."""
    service = await rig.serve(Counter(), coordinator=link)
    before = living_tasks()
    await rig.plane.sessions.create("s")
    if when == "lost":
        link.lost = ["ending"]
    with link.held("ending", "after" if when == "after" else "before"):
        task_id = await rig.submit(session="s", **arguments)
        await link.wait_caught()
        with pytest.raises(Conflict) if when == "after" else nullcontext():
            await rig.plane.cancel(task_id)
        await anyio.wait_all_tasks_blocked()
        assert task_id in service.executions
    expected = "failed" if arguments else "completed"
    record = await ended(rig, task_id, expected, service=service)
    assert link.endings == [expected]
    assert record.context_saved is (None if arguments else True)
    assert living_tasks() == before
    assert (await rig.run(session="s")).result == ("1" if arguments else "2")


@pytest.mark.parametrize("when", ["before", "after", "lost"])
async def test_cancelled_again_during_the_final_save(rig, link, when):
    probe = Probe()
    service = await rig.serve(Probed(probe), coordinator=link)
    task_id = await rig.submit(name=1)
    await probe.wait_entered(1)
    if when == "lost":
        link.lost = ["ending"]
    with link.held("ending", "after" if when == "after" else "before"):
        await rig.plane.cancel(task_id)
        await link.wait_caught()
        probe.open(1)
        with pytest.raises(Conflict) if when == "after" else nullcontext():
            await rig.plane.cancel(task_id)
        await anyio.wait_all_tasks_blocked()
    await ended(rig, task_id, "cancelled", service=service)
    assert link.endings == ["cancelled"]
    assert probe.cleaned == [1]
