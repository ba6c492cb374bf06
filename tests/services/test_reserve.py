"""The way past the queue: a slot is reserved, the task is stored with its claim, the run starts."""

from __future__ import annotations

import anyio
import pytest

from llama_corral.exceptions import BadInput, StoreUnavailable

from .flows import Asks, Echo, Probed
from .rig import PATIENCE, Probe, until

pytestmark = pytest.mark.anyio


async def test_a_reserved_slot_counts_and_is_given_back(rig):
    service = await rig.serve(Echo(), cap=2)
    await anyio.wait_all_tasks_blocked()
    one, two = service.reserve(), service.reserve()
    assert one.instance_id == service.instance_id
    assert service.reserve() is None
    assert service.statistics().working == 2
    one.cancel()
    assert service.statistics().working == 1
    two.cancel()
    assert (await rig.run(value=1)).result == "1"
    assert service.statistics().working == 0


async def test_a_task_starts_without_a_message(rig):
    await rig.serve(Echo())
    await anyio.wait_all_tasks_blocked()
    published = rig.queue.statistics()["published"]
    accepted = await rig.plane.submit("svc", {"value": 1})
    assert accepted.status == "running"
    await rig.result(accepted.task_id)
    assert rig.queue.statistics()["published"] == published


@pytest.mark.promise("P2", "P6")
@pytest.mark.parametrize("store", ["rig", "file_rig"])
async def test_no_slot_leaks_when_the_caller_is_cancelled_anywhere(request, store, rig, file_rig):
    rig = {"rig": rig, "file_rig": file_rig}[store]
    service = await rig.serve(Echo(), cap=3)
    for delay in range(40):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rig.plane.submit, "svc", {"value": delay})
            for _ in range(delay % 8):
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
    await until(lambda: not service.executions and not service.statistics().working)
    assert (await rig.run(value=1)).result == "1"


async def test_a_store_that_fails_gives_the_slot_back(rig, monkeypatch):
    async def refuse(*args):
        raise StoreUnavailable("away")

    service = await rig.serve(Echo(), cap=1)
    await anyio.wait_all_tasks_blocked()
    with monkeypatch.context() as patch:
        patch.setattr(rig.store, "accept", refuse)
        with pytest.raises(StoreUnavailable):
            await rig.submit()
    assert service.statistics().working == 0
    assert (await rig.run(value=1)).result == "1"


@pytest.mark.promise("P7")
async def test_a_stop_waits_for_what_is_being_accepted(rig, monkeypatch):
    """Else the task would be stored as claimed by an instance that is gone."""
    stored, go = anyio.Event(), anyio.Event()
    accept = rig.store.accept

    async def slow_accept(*args):
        accepted = await accept(*args)
        stored.set()
        await go.wait()
        return accepted

    monkeypatch.setattr(rig.store, "accept", slow_accept)
    service = await rig.serve(Asks())
    await anyio.wait_all_tasks_blocked()
    async with anyio.create_task_group() as tasks:
        accepted: list[str] = []

        async def submit() -> None:
            accepted.append(await rig.submit(name="x"))

        tasks.start_soon(submit)
        with anyio.fail_after(PATIENCE):
            await stored.wait()
        service.stop()
        await anyio.wait_all_tasks_blocked()
        assert not rig.ended[service.instance_id].is_set()
        go.set()
    await rig.wait_ended(service)
    assert (await rig.plane.get_task(accepted[0])).status == "queued"
    assert await rig.store.list_instances() == []


@pytest.mark.promise("P9")
async def test_bad_input_fails_at_the_door(rig):
    from workflows import Workflow, step
    from workflows.events import StartEvent, StopEvent

    class Ask(StartEvent):
        topic: str
        size: int = 3

    class Strict(Workflow):
        @step
        async def work(self, ev: Ask) -> StopEvent:
            return StopEvent(result=ev.topic)

    await rig.serve(Strict())
    with pytest.raises(BadInput, match="topic") as caught:
        await rig.submit(size=1)
    assert caught.value.hint == "Ask takes: topic, size (optional)"
    task_id = await rig.submit(topic="llamas")
    assert (await rig.result(task_id)).result == '"llamas"'
    assert await rig.plane.services.status() == {
        "svc": {
            "held": 0,
            "queued": 0,
            "running": 0,
            "waiting": 0,
            "oldest_queued": None,
            "instances": 1,
            "capacity": 8,
        }
    }


async def test_process_call_works_on_a_claim(rig):
    from llama_corral.protocol.records import ClaimRequest, NewTask

    probe = Probe()
    service = await rig.serve(Probed(probe))
    for name, cancelled in (("x", False), ("y", True)):
        await rig.store.accept(NewTask(name, "svc", f'{{"name": "{name}"}}', 0.0))
        claim = await rig.store.claim(ClaimRequest(name, service.instance_id, "n", 0.0))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(service.process_call, claim)
            await probe.gate.until(lambda name=name: name in probe.entered)
            if cancelled:
                tasks.cancel_scope.cancel()
            else:
                probe.open(name)
    assert (await rig.result("x")).result == '"x"'
    probe.open("y")
    assert (await rig.result("y")).epoch == 2  # it was handed back, and taken again
