"""Cancellation is real, deadlines end a task as timed out, and what is lost or deleted reports nothing."""

from __future__ import annotations

import time

import anyio
import pytest
from workflows import Context, Workflow, step
from workflows.errors import WorkflowCancelledByUser, WorkflowTimeoutError
from workflows.events import StartEvent, StopEvent

from llama_corral.exceptions import NotFound
from llama_corral.protocol.records import ClaimRequest

from .flows import Asks, Probed, WaitsFor
from .rig import PATIENCE, Probe, living_tasks, open_rig, until

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P1", "P6")]


async def test_a_working_task(rig, record_property):
    probe = Probe()
    service = await rig.serve(Probed(probe))
    before = living_tasks()
    task_id = await rig.submit(name="x")
    await probe.wait_entered(1)
    await rig.plane.wait_result(task_id, 0)
    asked = time.perf_counter()
    await rig.plane.cancel(task_id)
    with anyio.fail_after(PATIENCE):
        await probe.gate.until(lambda: bool(probe.cleaned))
    print(f"the step saw its cancellation after {(time.perf_counter() - asked) * 1e3:.2f} ms")
    record = await rig.result(task_id)
    assert (record.status, record.error.type, record.result) == ("cancelled", "TaskCancelled", None)
    assert next(event.type for event in await rig.events(task_id)) == "Progress"
    await anyio.wait_all_tasks_blocked()
    assert not service.executions
    assert living_tasks() - before == set()


@pytest.mark.parametrize("workflow", [Asks, WaitsFor])
async def test_a_waiting_task(rig, workflow):
    service = await rig.serve(workflow())
    before = living_tasks()
    task_id = await rig.submit()
    await rig.wait_status(task_id, "waiting")
    await rig.plane.cancel(task_id)
    assert (await rig.result(task_id)).status == "cancelled"
    assert "InputRequiredEvent" in [event.type for event in await rig.events(task_id)]
    await anyio.wait_all_tasks_blocked()
    assert not service.executions
    assert living_tasks() - before == set()


async def test_queued_and_held_tasks(rig):
    probe = Probe()
    await rig.serve(Probed(probe), cap=1)
    await rig.plane.sessions.create("s")
    working = await rig.submit(session="s", name="working")
    await probe.wait_entered(1)
    held = await rig.submit(session="s", name="held")
    queued = await rig.submit(name="queued")
    for task_id in (held, queued):
        await rig.plane.cancel(task_id)
        assert (await rig.result(task_id)).status == "cancelled"
    after = await rig.submit(session="s", name="after")
    probe.open("all")
    assert (await rig.result(working)).status == "completed"
    assert (await rig.result(after)).status == "completed"
    assert probe.entered == ["working", "after"]


async def test_a_run_that_waits_for_its_slot(rig):
    probe = Probe()
    service = await rig.serve(Asks(probe), cap=1)
    task_id = await rig.submit()
    await rig.wait_status(task_id, "waiting")
    slot = service.reserve()
    await rig.answer(task_id)  # its step is started and waits for the slot
    await anyio.wait_all_tasks_blocked()
    await rig.plane.cancel(task_id)
    assert (await rig.result(task_id)).status == "cancelled"
    slot.cancel()
    assert probe.entered == ["ask"]
    assert service.statistics().working == 0


async def test_a_step_that_cleans_up_slowly_and_streams(rig):
    class Tidy(Workflow):
        @step
        async def work(self, ev: StartEvent, ctx: Context) -> StopEvent:
            probe.entered.append(1)
            probe.gate.changed()
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.01)  # what cleaning up takes
                    probe.cleaned.append(1)

    probe = Probe()
    await rig.serve(Tidy())
    task_id = await rig.submit()
    await probe.wait_entered(1)
    await rig.plane.cancel(task_id)
    assert (await rig.result(task_id)).status == "cancelled"
    assert probe.cleaned == [1]


async def test_the_tasks_own_deadline(rig):
    probe = Probe()
    await rig.serve(Probed(probe))
    task_id = (await rig.plane.submit("svc", {"name": 1}, timeout=0.5)).task_id
    record = await rig.result(task_id)
    assert (record.status, record.error.type) == ("timed_out", "TimeoutError")
    assert probe.cleaned == [1]


async def test_the_deadline_of_a_waiting_task(rig):
    await rig.serve(Asks())
    task_id = (await rig.plane.submit("svc", {}, timeout=0.1)).task_id
    assert (await rig.result(task_id)).status == "timed_out"


async def test_the_workflows_own_timeout(rig):
    probe = Probe()
    await rig.serve(Probed(probe, timeout=0.5))
    record = await rig.run(name=1)
    assert (record.status, record.error.type) == ("timed_out", "WorkflowTimeoutError")
    assert "WorkflowTimedOutEvent" in [event.type for event in await rig.events(record.task_id)]
    assert probe.cleaned == [1]


async def test_a_timeout_that_a_step_raises_is_a_failure(rig):
    class Parent(Workflow):
        @step
        async def work(self, ev: StartEvent) -> StopEvent:
            raise (WorkflowTimeoutError if ev.timeout else WorkflowCancelledByUser)("the child's")

    await rig.serve(Parent())
    for timeout in (True, False):
        record = await rig.run(timeout=timeout)
        assert (record.status, record.error.message, record.error.step) == ("failed", "the child's", "work")


async def test_a_deleted_session_stops_its_run(rig):
    probe = Probe()
    service = await rig.serve(Probed(probe))
    await rig.plane.sessions.create("s")
    task_id = await rig.submit(session="s", name=1)
    await probe.wait_entered(1)
    await rig.plane.sessions.delete("s")
    with anyio.fail_after(PATIENCE):
        await probe.gate.until(lambda: probe.cleaned == [1])
    await anyio.wait_all_tasks_blocked()
    assert not service.executions
    assert service.statistics().working == 0
    with pytest.raises(NotFound):
        await rig.plane.get_task(task_id)


@pytest.mark.promise("P2")
async def test_a_fenced_run_reports_nothing(rig):
    probe = Probe()
    service = await rig.serve(Probed(probe))
    task_id = await rig.submit(name=1)
    await probe.wait_entered(1)
    await rig.wait_status(task_id, "running")
    await anyio.wait_all_tasks_blocked()
    await rig.store.release(task_id, 1, None, 0)
    claim = await rig.store.claim(ClaimRequest(task_id, "another", "n", 0))
    assert claim.epoch == 2
    probe.open(1)
    await until(lambda: not service.executions)
    record = await rig.plane.get_task(task_id)
    assert (record.status, record.owner) == ("running", "another")
    assert service.statistics().working == 0


@pytest.mark.promise("P2")
async def test_a_heartbeat_finds_what_is_not_ours(anyio_backend, flavour, nothing_left):
    async with open_rig(flavour, heartbeat_interval=0.02) as rig:
        probe = Probe()
        service = await rig.serve(Probed(probe))
        task_id = await rig.submit(name=1)
        await probe.wait_entered(1)
        await rig.wait_status(task_id, "running")
        await anyio.wait_all_tasks_blocked()
        await rig.store.release(task_id, 1, None, 0)
        await rig.store.claim(ClaimRequest(task_id, "another", "n", 0))
        with anyio.fail_after(PATIENCE):
            await probe.gate.until(lambda: probe.cleaned == [1])
        # And a cancel request whose wake-up was lost.
        other = await rig.submit(name=2)
        await probe.wait_entered(2)
        await rig.store.request_cancel(other, 0)
        assert (await rig.result(other)).status == "cancelled"
        # And an instance that was forgotten registers again.
        await rig.store.delete_instance(service.instance_id)
        await until(rig.store.list_instances)
