"""Runs that wait leave memory, and come back for their event, their timer or their end."""

from __future__ import annotations

import json
import time

import anyio
import pytest
from workflows import Context, Workflow, step
from workflows.events import HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from llama_corral.exceptions import UsageError
from llama_corral.runtime import run_workflow
from llama_corral.services.sweeper import IdleSweeper

from .flows import Asks, WaitsFor
from .link import Link, ended
from .rig import PATIENCE, Probe, Recorder, open_bare, until

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P12")]

SOON = 0.01


async def wait_left(rig, service, task_id):
    """Until the run is out of memory."""

    async def has_left() -> bool:
        record = await rig.plane.get_task(task_id)
        return record.status == "waiting" and record.owner is None and task_id not in service.executions

    await until(has_left)


async def waiting_outside(rig, workflow, **arguments):
    service = await rig.serve(workflow, idle_timeout=SOON)
    task_id = await rig.submit(**arguments)
    await wait_left(rig, service, task_id)
    return service, task_id


@pytest.mark.promise("P2", "P3")
@pytest.mark.parametrize("workflow", [Asks, WaitsFor])
async def test_a_run_leaves_memory_and_comes_back_with_its_event(rig, workflow):
    probe = Probe()
    service, task_id = await waiting_outside(rig, workflow(probe), name="x")
    assert service.statistics().waiting == service.statistics().working == 0
    before = list(probe.entered)
    await rig.answer(task_id, "late")
    record = await ended(rig, task_id, "completed", service=service)
    assert record.result == ('["x","late",1]' if workflow is Asks else '["late"]')
    assert (record.epoch, record.attempts) == (2, 0)
    assert len(probe.entered) == len(before) + 1  # nothing that was done is done again
    marks = [json.loads(event.payload) for event in await rig.events(task_id) if event.type == "RunResumed"]
    assert marks == [{"epoch": 2, "attempt": 1, "from_index": 1}]


async def test_it_leaves_again_and_again(rig):
    service, task_id = await waiting_outside(rig, WaitsFor(), times=3)
    for n in range(3):
        await rig.answer(task_id, str(n))
        if n < 2:

            async def asked(n=n) -> bool:
                log = (await rig.store.read_events(task_id, 0)).events
                return sum(event.type == "InputRequiredEvent" for event in log) == n + 2

            await until(asked)
            await wait_left(rig, service, task_id)
    assert (await rig.result(task_id)).result == '["0","1","2"]'


async def test_another_instance_takes_it(rig):
    service, task_id = await waiting_outside(rig, Asks(), name="x")
    await rig.stop(service)
    assert (await rig.plane.get_task(task_id)).status == "waiting"
    await rig.answer(task_id)
    await rig.serve(Asks())
    assert (await rig.result(task_id)).result == '["x","yes",1]'


@pytest.mark.promise("P1", "P6")
async def test_it_is_cancelled_where_it_is(rig):
    service, task_id = await waiting_outside(rig, Asks())
    await rig.plane.cancel(task_id)
    await ended(rig, task_id, "cancelled", service=service)


async def test_it_comes_back_for_its_timer(rig):
    recorder = Recorder(rig.plane)
    service = await rig.serve(WaitsFor(), coordinator=recorder, idle_timeout=SOON)
    service.reserve = lambda: None
    began = time.time()
    task_id = await rig.submit(timeout=1)
    assert (await rig.result(task_id)).result == '["expired"]'
    ((checkpoint, how),) = recorder.releases
    assert how["idle"]
    assert began < how["wake_at"] < time.time() + 1
    assert checkpoint is not None
    assert [claim.epoch for claim in recorder.claims] == [1, 2]


async def test_a_run_whose_timer_is_due_soon_stays(rig):
    recorder = Recorder(rig.plane)
    await rig.serve(WaitsFor(), coordinator=recorder, idle_timeout=0.05)
    task_id = await rig.submit(timeout=0.08)
    assert (await rig.result(task_id)).result == '["expired"]'
    assert not recorder.releases


@pytest.mark.promise("P1")
async def test_a_workflows_timeout_counts_outside_of_memory_too(rig):
    service, task_id = await waiting_outside(rig, Asks(timeout=1))
    assert (await rig.plane.get_task(task_id)).epoch == 1
    record = await ended(rig, task_id, "timed_out", service=service)
    assert record.epoch == 2
    assert record.error.type == "WorkflowTimeoutError"


@pytest.mark.promise("P1")
async def test_the_tasks_deadline_ends_it_outside(rig):
    service = await rig.serve(Asks(), idle_timeout=SOON)
    task_id = (await rig.plane.submit("svc", {}, timeout=1)).task_id
    await wait_left(rig, service, task_id)
    await ended(rig, task_id, "timed_out", service=service)


async def test_it_stays_where_that_is_wanted(rig):
    service = await rig.serve(Asks(), idle_timeout=None)
    task_id = await rig.submit()
    await rig.wait_status(task_id, "waiting")
    assert service.sweeper is None
    assert task_id in service.executions


async def test_it_stays_where_it_cannot_be_stored(rig):
    class Odd(Workflow):
        @step
        async def ask(self, ev: StartEvent, ctx: Context) -> InputRequiredEvent:
            await ctx.store.set("odd", object())
            return InputRequiredEvent()

        @step
        async def answered(self, ev: HumanResponseEvent) -> StopEvent:
            return StopEvent(result=ev.response)

    service = await rig.serve(Odd(), idle_timeout=SOON)
    task_id = await rig.submit()
    await rig.wait_status(task_id, "waiting")
    tried = []
    leave = service.executions[task_id].leave
    service.executions[task_id].leave = lambda: tried.append(leave()) or tried[-1]
    await until(lambda: len(tried) > 1)
    assert not any(tried)
    await rig.answer(task_id)
    assert (await rig.result(task_id)).result == '"yes"'


async def test_a_run_whose_step_waits_for_a_run_of_its_own_stays(rig):
    class Outer(Workflow):
        @step
        async def nest(self, ev: StartEvent) -> StopEvent:
            entered.append(1)
            return StopEvent(result=await run_workflow(Asks(timeout=None)))

    entered = []
    service = await rig.serve(Outer(timeout=None), idle_timeout=SOON)
    task_id = await rig.submit()
    await rig.wait_status(task_id, "waiting")
    execution = service.executions[task_id]
    await until(lambda: execution.idle)
    assert not execution.leave()
    await rig.plane.cancel(task_id)
    await rig.result(task_id)
    assert entered == [1]


async def test_a_bare_queue_keeps_its_runs(anyio_backend, flavour, nothing_left):
    async with open_bare(Asks(), flavour, idle_timeout=SOON) as bare:
        assert bare.service.sweeper is None
        assert bare.service.checkpoints == "none"


# Races


@pytest.mark.promise("P1", "P2")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["answer", "cancel"])
async def test_what_comes_while_it_leaves_is_not_lost(rig, when, what):
    link = Link(rig.plane)
    service = await rig.serve(Asks(), coordinator=link, idle_timeout=SOON)
    with link.held("release", when):
        task_id = await rig.submit(name="x")
        await link.wait_caught()
        if what == "answer":
            await rig.answer(task_id)
        else:
            await rig.plane.cancel(task_id)
    record = await ended(rig, task_id, "completed" if what == "answer" else "cancelled", service=service)
    if what == "answer":
        assert record.result == '["x","yes",1]'


async def test_what_is_sent_to_the_service_itself_while_it_leaves_is_refused(rig):
    link = Link(rig.plane)
    service = await rig.serve(Asks(), coordinator=link, idle_timeout=SOON)
    with link.held("release", "before"):
        task_id = await rig.submit(name="x")
        await link.wait_caught()
        with pytest.raises(UsageError, match="takes no events now"):
            service.executions[task_id].send(HumanResponseEvent(response="lost"))
    await rig.answer(task_id)
    assert (await rig.result(task_id)).result == '["x","yes",1]'


@pytest.mark.promise("P1")
async def test_many_leave_and_come_back(rig):
    probe = Probe()
    service = await rig.serve(Asks(probe), cap=4, idle_timeout=SOON)
    tasks = [await rig.submit(name=n) for n in range(100)]
    with anyio.fail_after(PATIENCE):
        for n, task_id in enumerate(tasks):
            if n % 2:
                await wait_left(rig, service, task_id)
            await rig.answer(task_id, str(n))
        for n, task_id in enumerate(tasks):
            assert (await rig.result(task_id)).result == f'[{n},"{n}",1]'
    assert probe.entered.count("ask") == probe.entered.count("answered") == 100
    await until(lambda: not service.executions)
    assert not len(service.sweeper)


@pytest.mark.promise("P7")
async def test_a_drain_while_it_leaves(rig):
    link = Link(rig.plane)
    service = await rig.serve(Asks(), coordinator=link, idle_timeout=SOON)
    with link.held("release", "before"):
        task_id = await rig.submit(name="x")
        await link.wait_caught()
        service.stop()
        await anyio.wait_all_tasks_blocked()
    await rig.wait_ended(service)
    assert (await rig.plane.get_task(task_id)).status == "waiting"
    await rig.serve(Asks())
    await rig.answer(task_id)
    assert (await rig.result(task_id)).result == '["x","yes",1]'


# The sweeper


class Leaves:
    def __init__(self, left, *, can=True):
        self.left = left
        self.can = can

    def leave(self):
        self.left.append(self)
        return self.can


@pytest.mark.promise("P10")
async def test_the_sweeper_sleeps_while_nothing_waits(anyio_backend, monkeypatch):
    sleeps = []
    sleep = anyio.sleep

    async def noted(seconds):
        sleeps.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr("llama_corral.services.sweeper.anyio.sleep", noted)
    sweeper = IdleSweeper(SOON)
    left = []
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sweeper.sweep_forever)
            await anyio.wait_all_tasks_blocked()
            assert sleeps == []
            one, two, three = Leaves(left), Leaves(left), Leaves(left)
            for each in (one, two, three):
                sweeper.add(each)
            sweeper.discard(two)
            await until(lambda: len(left) == 2)
            assert left == [one, three]
            await anyio.wait_all_tasks_blocked()
            count = len(sleeps)
            await anyio.wait_all_tasks_blocked()
            assert len(sleeps) == count <= 3
            stubborn = Leaves(left, can=False)
            sweeper.add(stubborn)
            await until(lambda: len(left) > 3)
            assert len(sweeper) == 1
            tasks.cancel_scope.cancel()
