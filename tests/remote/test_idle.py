"""A caller is idle while the remote run is: its slot is somebody else's meanwhile. What a person answers finds its way."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest
from workflows import Context, Workflow, step
from workflows.events import HumanResponseEvent, StartEvent, StopEvent

from llama_corral.client import Client
from llama_corral.remote import RemoteWorkflow
from llama_corral.runtime import Slot, SlotHooks, open_run

from ..services.rig import Rig
from .flows import Approval, Awaits, Calls, Progress, Question
from .waiting import far_task, far_tasks, wait_event, wait_far_status, wait_status

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P10")]


async def test_a_person_answers_through_the_caller(rig: Rig, url: str) -> None:
    """The question comes out of the caller's own stream, the answer is sent to the caller, and its slot is free."""
    service = await rig.serve(Calls(RemoteWorkflow("asks", url, events=[Question])), cap=1)
    await rig.serve(Awaits(RemoteWorkflow("echo", url)), "other", cap=1)
    first = await rig.submit(questions=2)
    for number in range(2):
        asked = json.loads((await wait_event(rig, first, "Question", number)).payload)
        assert (asked["prefix"], asked["number"]) == ("Why?", number)
        await wait_status(rig, first, "waiting")
        statistics = service.statistics()
        assert (statistics.working, statistics.waiting) == (0, 1)
        second = await rig.submit(questions=0, value=number)  # a second caller, under a cap of one
        await wait_event(rig, second, "Question")
        await rig.answer(second, "because")
        assert json.loads((await rig.result(second)).result or "") == ["because"]
        await rig.answer(first, f"answer {number}")
    assert json.loads((await rig.result(first)).result or "") == ["answer 0", "answer 1"]
    types = [event.type for event in await rig.events(first)]
    assert types == ["Question", "Question", "StopEvent"]


async def test_answers_may_come_before_the_question(rig: Rig, url: str) -> None:
    await rig.serve(Calls(RemoteWorkflow("asks", url)), cap=1)
    task_id = await rig.submit(questions=2)
    await rig.answer(task_id, "first")
    await rig.answer(task_id, "second")
    assert json.loads((await rig.result(task_id)).result or "") == ["first", "second"]


class Tells(Workflow):
    """Awaits a remote run, by an upstream idiom that a test chooses."""

    def __init__(self, inner: RemoteWorkflow, how: str) -> None:
        super().__init__(timeout=None)
        self.inner = inner
        self.how = how

    @step
    async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
        handler = self.inner.run()
        if self.how == "block":
            async with handler:
                return StopEvent(result=await handler)
        if self.how == "stream":
            async for event in handler.stream_events():
                ctx.write_event_to_stream(event)
        return StopEvent(result=await handler)


@pytest.mark.parametrize("how", ["await", "stream", "block"])
@pytest.mark.parametrize("way", ["url", "client"])
async def test_the_slot_is_free_while_it_waits_and_taken_while_it_works(
    url: str, client: Client, flavour: Any, how: str, way: str
) -> None:
    before = await far_tasks(client, "asks")
    limiter = anyio.CapacityLimiter(1)
    slot = Slot(limiter)
    became_idle, works = anyio.Event(), anyio.Event()

    class Hooks(SlotHooks):
        def on_idle(self) -> None:
            super().on_idle()
            became_idle.set()

        async def before_step(self, step: str) -> None:
            await super().before_step(step)
            if became_idle.is_set():
                works.set()

    remote = RemoteWorkflow("asks", url if way == "url" else client)
    async with open_run(Tells(remote, how), hooks=Hooks(slot), flavour=flavour) as run:
        with anyio.fail_after(8):
            await became_idle.wait()
        assert run.is_idle
        assert not slot.held
        async with limiter:  # somebody else works
            task = await far_task(client, "asks", before)
            assert task.status == "waiting"
            await client.task(task.task_id).send_event(HumanResponseEvent(response="so"))
            await wait_far_status(client, task.task_id, "completed")
            assert not run.is_done  # it has no slot to go on with
            assert not works.is_set()
        assert await run.result() == ["so"]
        assert works.is_set()
    slot.release()


async def test_who_waits_for_a_queued_task_is_idle_after_a_moment(rig: Rig, url: str, client: Client) -> None:
    """Its session is busy, so it is held; nobody works for the caller."""
    session = await client.sessions.create()
    blocker = await session.start("approval")
    service = await rig.serve(Awaits(RemoteWorkflow("approval", url, session_id=session.id)), cap=1)
    task_id = await rig.submit()
    await wait_status(rig, task_id, "waiting")
    assert service.statistics().working == 0
    await blocker.send_event(Approval(by="Ada"))
    await blocker.result()
    (far,) = [task for task in await session.tasks() if task.task_id != blocker.id]
    await client.task(far.task_id).send_event(Approval(by="Bob"))
    assert (await rig.result(task_id)).result == '"Bob"'


async def test_it_is_busy_while_the_remote_run_works(rig: Rig, url: str, client: Client) -> None:
    before = await far_tasks(client, "works")
    service = await rig.serve(Calls(RemoteWorkflow("works", url, events=[Progress])), cap=1)
    task_id = await rig.submit()
    await wait_event(rig, task_id, "Progress")
    far = await far_task(client, "works", before)
    assert (await rig.plane.get_task(task_id)).status == "running"
    assert service.statistics().working == 1
    await client.task(far.task_id).cancel()
    record = await rig.result(task_id)
    assert record.error is not None
    assert (record.status, record.error.type, record.error.step) == ("failed", "RemoteCancelled", "call")
