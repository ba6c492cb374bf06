"""Stopping: what waits is handed back at once with a checkpoint, what works may finish, the rest is handed back."""

from __future__ import annotations

import anyio
import pytest

from llama_corral.exceptions import BadInput, SetupError, Unavailable
from llama_corral.protocol.messages import ActionTypes, QueueMessage

from .flows import Asks, Counter, Echo, Fails, Probed, WaitsFor
from .rig import PATIENCE, Probe, until

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P7")]


@pytest.mark.promise("P2")
@pytest.mark.parametrize("workflow", [Asks, WaitsFor])
async def test_a_second_instance_goes_on_from_the_checkpoint(rig, workflow):
    service = await rig.serve(workflow())
    before = await rig.submit(name="a", times=2)
    between = await rig.submit(name="b", times=2)
    for task_id in (before, between):
        await rig.wait_status(task_id, "waiting")
    await rig.answer(before, "one")
    if workflow is WaitsFor:  # its second question

        async def asked_again() -> bool:
            record = await rig.plane.get_task(before)
            return record.event_count == 2 and record.status == "waiting"

        await until(asked_again)
    else:
        await rig.result(before)
    await rig.stop(service)
    assert (await rig.plane.get_task(between)).status == "queued"
    await rig.answer(between, "sent between")
    probe = Probe()
    await rig.serve(workflow(probe))
    if workflow is WaitsFor:
        await rig.answer(between, "two")
        await rig.answer(before, "two")
        assert (await rig.result(before)).result == '["one","two"]'
        assert (await rig.result(between)).result == '["sent between","two"]'
    else:
        assert (await rig.result(between)).result == '["b","sent between",1]'
        assert probe.entered == ["answered"]  # the step before it did not run again
    for task_id in (before, between):
        indices = [event.index for event in await rig.events(task_id)]
        assert indices == list(range(len(indices)))


async def test_an_event_that_nothing_took_goes_with_the_checkpoint(rig):
    service = await rig.serve(WaitsFor())
    task_id = await rig.submit(times=2)
    await rig.wait_status(task_id, "waiting")
    # Nothing takes it: the run holds it, and the store's inbox counts it as read.
    await rig.plane.send_event(task_id, '{"type": "InputRequiredEvent", "value": {"held": 1}}')
    await until(lambda: service.executions[task_id].inbox_read)
    (held,) = service.executions[task_id]._run.held_events()
    assert held.get("held") == 1
    await rig.stop(service)
    again = await rig.serve(WaitsFor())
    await rig.wait_status(task_id, "waiting")
    (held,) = again.executions[task_id]._run.held_events()
    assert held.get("held") == 1
    for answer in ("a", "b"):
        await rig.answer(task_id, answer)
    assert (await rig.result(task_id)).result == '["a","b"]'


async def test_working_runs_may_finish(rig):
    probe = Probe()
    service = await rig.serve(Probed(probe), drain_timeout=PATIENCE)
    task_id = await rig.submit(name=1)
    await probe.wait_entered(1)
    service.stop()
    await anyio.wait_all_tasks_blocked()
    assert service.reserve() is None
    late = await rig.submit(name=2)
    probe.open(1)
    assert (await rig.result(task_id)).status == "completed"
    await rig.wait_ended(service)
    assert (await rig.plane.get_task(late)).status == "queued"
    assert probe.entered == [1]
    probe.open(2)
    await rig.serve(Probed(probe))
    assert (await rig.result(late)).status == "completed"


async def test_a_working_run_that_begins_to_wait_is_handed_back(rig):
    probe = Probe()
    service = await rig.serve(Asks(probe), drain_timeout=PATIENCE)
    task_id = await rig.submit(name="x")
    service.stop()
    await rig.wait_ended(service)
    await rig.serve(Asks())
    await rig.answer(task_id)
    assert (await rig.result(task_id)).result == '["x","yes",1]'


@pytest.mark.promise("P6")
@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_what_does_not_finish_in_time_is_handed_back(rig, how):
    probe = Probe()
    async with anyio.create_task_group() as tasks:
        service = await rig.serve(Probed(probe), drain_timeout=0.02, tasks=tasks)
        waiting_service = await rig.serve(Asks(), "asks", drain_timeout=0.02, tasks=tasks)
        working = await rig.submit(name=1)
        waiting = await rig.submit("asks", name="w")
        await probe.wait_entered(1)
        await rig.wait_status(waiting, "waiting")
        if how == "cancel":
            tasks.cancel_scope.cancel()
        service.stop()
        waiting_service.stop()
    assert probe.cleaned == [1]
    for task_id in (working, waiting):
        record = await rig.plane.get_task(task_id)
        assert (record.status, record.attempts) == ("queued", 0)
    assert await rig.store.list_instances() == []
    probe.open(1)
    await rig.serve(Probed(probe))
    await rig.serve(Asks(), "asks")
    await rig.answer(waiting)
    assert (await rig.result(waiting)).result == '["w","yes",1]'
    assert (await rig.result(working)).status == "completed"


@pytest.mark.promise("P4")
async def test_state_that_is_not_json_starts_the_task_again(rig):
    from workflows import Context, Workflow, step
    from workflows.events import HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

    class Odd(Workflow):
        @step
        async def ask(self, ev: StartEvent, ctx: Context) -> InputRequiredEvent:
            starts.append(1)
            await ctx.store.set("odd", object())
            return InputRequiredEvent()

        @step
        async def answered(self, ev: HumanResponseEvent) -> StopEvent:
            return StopEvent(result=ev.response)

    starts: list[int] = []
    service = await rig.serve(Odd())
    task_id = await rig.submit()
    await rig.wait_status(task_id, "waiting")
    await rig.stop(service)
    await rig.serve(Odd())
    await until(lambda: len(starts) == 2)  # an answer that is there at the start may end the run before it asks
    await rig.answer(task_id)
    assert (await rig.result(task_id)).result == '"yes"'
    assert len(starts) == 2


@pytest.mark.promise("P1")
async def test_raise_exceptions_reports_and_then_raises(rig):
    probe = Probe()
    service = await rig.serve(Fails(), raise_exceptions=True)
    other = await rig.serve(Probed(probe), "other")
    task_id = await rig.submit()
    assert (await rig.result(task_id)).status == "failed"
    await rig.wait_ended(service)
    (crash,) = rig.crashes
    rig.crashes.clear()
    assert isinstance(crash, ExceptionGroup)
    while isinstance(crash, ExceptionGroup):
        (crash,) = crash.exceptions
    assert isinstance(crash, ValueError)
    assert (await rig.plane.get_task(await rig.submit("other", name=1))).status == "running"
    assert other.statistics().running


async def test_raise_exceptions_hands_back_the_other_runs(rig):
    probe = Probe()

    from workflows import Workflow, step
    from workflows.events import StartEvent, StopEvent

    class FailsOrWaits(Workflow):
        @step
        async def work(self, ev: StartEvent) -> StopEvent:
            if ev.get("fail", False):
                raise ValueError("boom")
            with probe.inside(1):
                await probe.wait_open(1)
            return StopEvent(result="fine")

    service = await rig.serve(FailsOrWaits(), raise_exceptions=True)
    other = await rig.submit()
    await probe.wait_entered(1)
    await rig.submit(fail=True)
    await rig.wait_ended(service)
    rig.crashes.clear()
    record = await rig.plane.get_task(other)
    assert (record.status, record.attempts) == ("queued", 0)


async def test_stop_before_the_start_and_twice(rig):
    service = await rig.serve(Echo())
    service.stop()
    service.stop()
    await rig.wait_ended(service)
    assert await service.home() | {"running": "False"} == await service.home()
    with anyio.fail_after(PATIENCE):
        await service.processing_loop()
    with pytest.raises(Unavailable):
        await service.process_message(
            QueueMessage(action=ActionTypes.NEW_TASK, data={"input": "{}", "task_id": "t"}, type="svc")
        )
    with pytest.raises(BadInput):
        await service.process_message(QueueMessage(action=ActionTypes.COMPLETED_TASK))


async def test_one_service_does_not_run_twice_at_a_time(rig):
    service = await rig.serve(Echo())
    with pytest.raises(RuntimeError, match="running already"):
        await service.processing_loop()
    assert (await rig.run(value=1)).result == "1"


async def test_a_service_runs_again_after_it_was_cancelled(rig):
    async with anyio.create_task_group() as tasks:
        service = await rig.serve(Counter(), tasks=tasks)
        tasks.cancel_scope.cancel()
    await rig.tasks.start(rig._run, service)
    assert (await rig.run()).result == "1"


async def test_tickets_inside_the_service_go_back_to_the_queue(rig):
    probe = Probe()
    service = await rig.serve(Probed(probe), cap=1, drain_timeout=0)
    await rig.submit(name="blocker")
    await probe.wait_entered(1)
    for n in range(3):
        message = QueueMessage(action=ActionTypes.NEW_TASK, data={"input": "{}", "task_id": f"t{n}"}, type="svc")
        await service.process_message(message)
    await anyio.wait_all_tasks_blocked()
    assert (await service.home())["num_outstanding_calls"] == "4"
    await rig.stop(service)
    await anyio.wait_all_tasks_blocked()
    async with rig.queue.consumer("test.svc") as consumer:
        found = [delivery.message.data["task_id"] for delivery in await consumer.receive(10)]
    assert [each for each in found if each in ("t0", "t1", "t2")] == ["t0", "t1", "t2"]


async def test_no_http_on_asyncio(rig, anyio_backend):
    service = await rig.serve(Echo())
    if anyio_backend == "asyncio":
        with pytest.raises(SetupError, match="Trio"):
            await service.launch_server()
