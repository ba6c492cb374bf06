"""The cap: how many runs work at a time, and what changing it does."""

from __future__ import annotations

import math

import anyio
import pytest
from workflows import Context, Workflow, step
from workflows.events import Event, StartEvent, StopEvent

from .flows import Probed
from .rig import PATIENCE, Probe, until

pytestmark = pytest.mark.anyio


class Item(Event):
    n: int


class Rendezvous(Workflow):
    """The first runs wait in their step until as many work as the test wants; all others are short."""

    def __init__(self, probe: Probe, wanted: int) -> None:
        super().__init__()
        self.probe = probe
        self.wanted = wanted

    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        with self.probe.inside(ev.n):
            await self.probe.gate.until(lambda: self.probe.peak >= self.wanted)
            await anyio.lowlevel.checkpoint()
        return StopEvent(result=ev.n)


@pytest.mark.parametrize("cap", [1, 2, 3, 8, 64])
async def test_the_number_working_never_exceeds_the_cap_and_reaches_it(rig, cap, configuration):
    probe = Probe()
    count = 500 if configuration == "trio-anyio" else 100
    service = await rig.serve(Rendezvous(probe, cap), cap=cap)
    tasks = [await rig.submit(n=n) for n in range(count)]
    for n, task_id in enumerate(tasks):
        assert (await rig.result(task_id)).result == str(n)
    assert probe.peak == cap
    assert len(probe.entered) == count
    await until(lambda: not service.statistics().working)


async def test_one_run_with_many_steps_at_once_is_one(rig):
    class FanOut(Workflow):
        def __init__(self, probe: Probe) -> None:
            super().__init__()
            self.probe = probe

        @step
        async def split(self, ev: StartEvent, ctx: Context) -> Item | None:
            for n in range(4):
                ctx.send_event(Item(n=n))

        @step(num_workers=4)
        async def work(self, ev: Item) -> StopEvent | None:
            with self.probe.inside(ev.n):
                await self.probe.gate.until(lambda: self.probe.peak == 4)
            return StopEvent(result=None) if ev.n == 3 else None

    service = await rig.serve(FanOut(Probe()), cap=1)
    assert (await rig.run()).status == "completed"
    assert (await rig.run()).status == "completed"
    await until(lambda: not service.statistics().working)


async def test_after_lowering_nothing_starts_until_fewer_work(rig):
    probe = Probe()
    service = await rig.serve(Probed(probe), cap=4)
    tasks = [await rig.submit(name=n) for n in range(10)]
    await probe.wait_working(4)
    service.capacity = 2
    probe.open(0)
    await rig.result(tasks[0])
    probe.open(1)
    await rig.result(tasks[1])
    await anyio.wait_all_tasks_blocked()
    assert sorted(probe.entered) == [0, 1, 2, 3]
    probe.open(2)
    await rig.result(tasks[2])
    await probe.wait_entered(5)
    await anyio.wait_all_tasks_blocked()
    assert len(probe.entered) == 5
    assert service.statistics().capacity == 2
    service.capacity = 5  # at once, although nothing ends
    await probe.wait_working(5)
    probe.open("all")
    for task_id in tasks:
        await rig.result(task_id)
    assert probe.peak == 5


@pytest.mark.promise("P10")
async def test_raising_the_cap_reaches_tickets_in_the_queue(rig):
    probe = Probe()
    service = await rig.serve(Probed(probe), cap=1)
    tasks = [await rig.submit(name=n) for n in range(30)]
    await probe.wait_working(1)
    service.capacity = math.inf
    await probe.wait_working(30)
    probe.open("all")
    for task_id in tasks:
        await rig.result(task_id)


@pytest.mark.parametrize("capacity", [0, -1, 1.5, 2.0, math.nan])
async def test_a_capacity_that_is_none(rig, capacity):
    service = await rig.serve(Probed(Probe()))
    with pytest.raises(ValueError, match="capacity"):
        service.capacity = capacity
    assert service.capacity == 8


async def test_tickets_are_not_starved_by_reserved_slots(rig):
    """Tasks that came as tickets get their turn although the same process keeps submitting."""
    probe = Probe()
    await rig.serve(Probed(probe), cap=1)
    blocker = await rig.submit(name="blocker")
    await probe.wait_entered(1)
    waiting = [await rig.submit(name="ticket") for _ in range(5)]
    await anyio.wait_all_tasks_blocked()
    probe.open("blocker", "ticket", "fast")
    ended: list[str] = []
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:

            async def keep_submitting() -> None:
                while len(ended) < 5:
                    await rig.run(name="fast")

            for _ in range(3):
                tasks.start_soon(keep_submitting)
            for task_id in waiting:
                await rig.result(task_id)
                ended.append(task_id)
    assert probe.entered.index("ticket") <= 4
    assert await rig.result(blocker)
