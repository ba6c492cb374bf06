"""Services on a bad line and on a store with faults: every task ends once, its log has no gap, steps run once an epoch."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from llama_corral.exceptions import Conflict, StoreUnavailable, Unavailable
from llama_corral.protocol.records import TaskFilter, TaskRecord
from llama_corral.testing import FaultyCoordinator
from llama_corral.testing.store_faults import WRITES

from ..services.flows import Asks, Counter, Echo, Probed
from ..services.rig import PATIENCE, Probe, Rig, until
from .flows import EVENTS, STEPS, ThreeSteps

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P1", "P2", "P3", "P4")]

SEEDS = [1, 2]


def always_by_ticket(service: Any) -> None:
    """The door of the same process would hand tasks over without a claim."""
    service.reserve = lambda: None


async def whole_log(rig: Rig, record: TaskRecord) -> list[dict[str, Any]]:
    events = await rig.events(record.task_id)
    assert [event.index for event in events] == list(range(record.event_count))
    return [json.loads(event.payload) for event in events if event.type == "Progress"]


@pytest.mark.parametrize("seed", SEEDS)
async def test_fifty_tasks_on_a_bad_line(rig, seed):
    """Two instances, of which each loses calls and answers; sessions in line, persons who are asked."""
    workflow = ThreeSteps()
    lines = [FaultyCoordinator(rig.plane) for _ in range(2)]
    for number, line in enumerate(lines):
        always_by_ticket(await rig.serve(workflow, coordinator=line, cap=5))
        line.at_random(seed + 100 * number, lose_answer=0.15, refuse=0.15, duplicate=0.1, delay=0.1)
    sessions = [f"s{number}" for number in range(4)]
    for session in sessions:
        await rig.plane.sessions.create(session)
    names = {}
    for number in range(50):
        session = sessions[number % 5] if number % 5 < 4 else None
        names[await rig.submit(session=session, name=f"n{number}", asks=number % 3 == 0)] = session
    async with anyio.create_task_group() as persons:
        for number, task_id in enumerate(names):
            if number % 3 == 0:
                persons.start_soon(answer_when_asked, rig, task_id)
        records = [await rig.result(task_id) for task_id in names]
    for line in lines:
        await line.deliver_held()  # what was stuck comes through when all is over
        assert {name.split()[0] for name in line.fault_statistics()} == {"lose_answer", "refuse", "duplicate", "delay"}
    await check_fifty(rig, records, workflow)
    # A claim whose answer never came is given to others; it had not begun.
    assert {record.epoch for record in records} <= {1, 2}
    for session in sessions:  # one after the other, each from the context of the one before
        results = [record.result for record in records if names[record.task_id] == session]
        assert results == [str(count) for count in range(1, len(results) + 1)]


async def answer_when_asked(rig: Rig, task_id: str) -> None:
    await rig.wait_status(task_id, "waiting")
    await rig.answer(task_id)


async def check_fifty(rig: Rig, records: list[TaskRecord], workflow: ThreeSteps) -> None:
    assert {record.status for record in records} == {"completed"}
    for number, record in enumerate(records):
        assert await rig.plane.get_task(record.task_id) == record
        told = await whole_log(rig, record)
        assert len(told) == EVENTS
        assert [event["step"] for event in told] == [step for step in STEPS for _ in range(2)]
        for step in STEPS:
            assert workflow.effects[f"n{number}", step] == 1


@pytest.mark.parametrize("seed", SEEDS)
async def test_fifty_tasks_on_a_store_with_faults(rig, seed):
    """Whoever writes may fail, the door and the timers of the control plane included. A task that was accepted with a claim
    of which nobody heard is given to others, and had not begun."""
    workflow = ThreeSteps()
    await rig.serve(workflow, cap=5)
    await rig.serve(workflow, cap=5)
    # An outside event has no id: whoever repeats it because its answer was lost sends it twice.
    rig.store.at_random(seed, set(WRITES) - {"send"}, refuse=0.1, lose_answer=0.1)
    rig.store.refuse("send", nth=3, times=5)
    task_ids = [await submit_until_taken(rig, f"n{number}", asks=number % 3 == 0) for number in range(50)]
    async with anyio.create_task_group() as persons:
        for task_id in task_ids[::3]:
            persons.start_soon(answer_until_taken, rig, task_id)
        records = [await rig.result(task_id) for task_id in task_ids]
    rig.store.heal()
    await check_fifty(rig, records, workflow)
    assert len(await rig.store.list_tasks(TaskFilter())) == 50


async def submit_until_taken(rig: Rig, name: str, **arguments: Any) -> str:
    while True:
        try:
            accepted = await rig.plane.submit("svc", {"name": name, **arguments}, task_id=f"task-{name}")
        except StoreUnavailable:
            continue
        return accepted.task_id


async def answer_until_taken(rig: Rig, task_id: str) -> None:
    await rig.wait_status(task_id, "waiting")
    while (await rig.plane.get_task(task_id)).status == "waiting":
        try:
            await rig.answer(task_id)
            return
        except Unavailable:
            await anyio.wait_all_tasks_blocked()


async def at_work(rig: Rig, probe: Probe, **options: Any) -> tuple[Any, FaultyCoordinator, str]:
    """A service with one slot, its line, and the task that it works on: its first event is stored."""
    line = FaultyCoordinator(rig.plane)
    service = await rig.serve(Probed(probe), coordinator=line, cap=1, **options)
    task_id = await rig.submit(name="x")
    await probe.wait_entered(1)

    async def has_told() -> bool:
        return (await rig.plane.get_task(task_id)).event_count == 1

    await until(has_told)
    return service, line, task_id


async def give_up(rig: Rig, service: Any) -> None:
    """The instance counts as dead."""
    rig.plane._effects.lost(await rig.store.reap([service.instance_id], 1.0))


async def test_a_late_report_of_an_old_epoch_changes_nothing(rig):
    """An ending is stuck on its way; meanwhile its instance counts as dead and another one ends the task."""
    probe, other_probe = Probe(), Probe()
    service, line, task_id = await at_work(rig, probe)
    line.refuse("heartbeat", times=float("inf"))
    line.delay("report")
    line.refuse("report", times=float("inf"))
    probe.open("x")
    await until(lambda: line.held)
    other_probe.open("x")
    await rig.serve(Probed(other_probe))
    await give_up(rig, service)
    record = await rig.result(task_id)
    assert (record.status, record.epoch) == ("completed", 2)
    (answer,) = await line.deliver_held()
    assert answer.status == "fenced"
    line.heal()
    await until(lambda: not service.executions)
    assert await rig.plane.get_task(task_id) == record
    assert len(await whole_log(rig, record)) == 2  # one of the first epoch, one of the second


@pytest.mark.parametrize("first", ["ending", "cancel"])
async def test_of_two_endings_the_first_stands(rig, first):
    """The ending of a run and a cancel request, both on their way."""
    probe = Probe()
    service, line, task_id = await at_work(rig, probe)
    with line.hang("heartbeat"), line.hang("report", when="before" if first == "cancel" else "after") as hung:
        probe.open("x")
        with anyio.fail_after(PATIENCE):
            await hung.reached.wait()
        if first == "cancel":
            await rig.store.reap([service.instance_id], 1.0)
            assert (await rig.plane.cancel(task_id)).ended
        else:
            with pytest.raises(Conflict):
                await rig.plane.cancel(task_id)
        record = await rig.result(task_id)
    assert record.status == ("cancelled" if first == "cancel" else "completed")
    await until(lambda: not service.executions)
    assert await rig.plane.get_task(task_id) == record
    assert len(await whole_log(rig, record)) == 1


async def test_two_instances_that_both_end_it(rig):
    """One of them held it first and was given up. Both endings come at the same moment."""
    probe, other_probe = Probe(), Probe()
    service, line, task_id = await at_work(rig, probe)
    with line.hang("heartbeat"):  # it does not hear that it was given up
        other_line = FaultyCoordinator(rig.plane)
        other = await rig.serve(Probed(other_probe), coordinator=other_line)
        await give_up(rig, service)
        await other_probe.wait_entered(1)
        with line.hang("report") as hung, other_line.hang("report") as other_hung:
            probe.open("x")
            other_probe.open("x")
            with anyio.fail_after(PATIENCE):
                await hung.reached.wait()
                await other_hung.reached.wait()
        record = await rig.result(task_id)
        assert (record.status, record.epoch) == ("completed", 2)
        await until(lambda: not service.executions and not other.executions)
    assert await rig.plane.get_task(task_id) == record
    assert len(await whole_log(rig, record)) == 2


async def test_a_wait_survives_lost_answers_of_release_and_pull(rig):
    """Handed back at a drain, taken by another instance, answered: with every answer lost once or twice."""
    line = FaultyCoordinator(rig.plane)
    service = await rig.serve(Asks(), coordinator=line)
    task_id = await rig.submit(name="x")
    await rig.wait_status(task_id, "waiting")
    line.lose_answer("release", times=2)
    await rig.stop(service)
    other = FaultyCoordinator(rig.plane)
    other.lose_answer("claim", times=2)
    other.lose_answer("pull", times=2)
    await rig.serve(Asks(), coordinator=other)
    await rig.answer(task_id)
    record = await rig.result(task_id)
    assert (record.status, record.result, record.epoch) == ("completed", '["x","yes",1]', 2)
    assert line.fault_statistics() == {"lose_answer release": 2}


async def test_tasks_wait_for_room_and_end(rig):
    """The store has no room while a service works: its reports are repeated until they are stored."""
    await rig.serve(Counter())
    await rig.serve(Echo(), "echo")
    await rig.plane.sessions.create("s")
    assert (await rig.run(session="s")).result == "1"
    task_ids = [await rig.submit(session="s") for _ in range(3)]
    rig.store.disk_full = True
    with pytest.raises(StoreUnavailable):
        await rig.submit(session="s")
    await anyio.wait_all_tasks_blocked()
    rig.store.disk_full = False
    records = [await rig.result(task_id) for task_id in task_ids]
    assert [record.result for record in records] == ["2", "3", "4"]
    assert len(await rig.store.list_tasks(TaskFilter())) == 4
