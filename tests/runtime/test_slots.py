"""Runs under a cap: a slot is taken where a step starts and given back when the run is idle."""

from __future__ import annotations

import contextlib
import random

import anyio
import anyio.lowlevel
import pytest
import trio
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, StartEvent, StopEvent

from llama_corral.aio import open_asyncio_loop
from llama_corral.runtime import RunOptions, Slot, SlotHooks, make_run

pytestmark = pytest.mark.promise("P6", "P12")


class Next(Event):
    pass


class Meter:
    """How many runs have a step at work, and whether each of them holds its slot."""

    def __init__(self, limiter):
        self.limiter = limiter
        self.working: dict[str, int] = {}
        self.peak = 0
        self.without_slot = 0
        self.peak_borrowed = 0

    def enter(self, name, slot):
        self.working[name] = self.working.get(name, 0) + 1
        self.peak = max(self.peak, len(self.working))
        self.peak_borrowed = max(self.peak_borrowed, self.limiter.borrowed_tokens)
        self.without_slot += not slot.held

    def leave(self, name):
        self.working[name] -= 1
        if not self.working[name]:
            del self.working[name]


class Quiz(Workflow):
    """Two questions, with work in between."""

    def __init__(self, meter, waiter_timeout=None):
        super().__init__(timeout=None)
        self.meter = meter
        self.waiter_timeout = waiter_timeout

    async def work(self, ev):
        self.meter.enter(ev.name, ev.slot)
        try:
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
        finally:
            self.meter.leave(ev.name)

    @step
    async def first(self, ctx: Context, ev: StartEvent) -> Next:
        await self.work(ev)
        await self.ask(ctx)
        return Next(name=ev.name, slot=ev.slot)

    @step
    async def second(self, ctx: Context, ev: Next) -> StopEvent:
        await self.work(ev)
        await self.ask(ctx)
        await self.work(ev)
        return StopEvent(result=ev.name)

    async def ask(self, ctx):
        with contextlib.suppress(TimeoutError):
            await ctx.wait_for_event(HumanResponseEvent, timeout=self.waiter_timeout)


class Runs:
    """Many runs of a workflow under one cap, each in a scope of its own."""

    def __init__(self, cap):
        self.limiter = anyio.CapacityLimiter(cap)
        self.meter = Meter(self.limiter)
        self.slots = []
        self.results = []
        self.runs = []
        self.scopes = []

    async def one(self, workflow, flavour="anyio"):
        slot = Slot(self.limiter)
        self.slots.append(slot)
        name = str(len(self.slots))
        run = make_run(
            workflow,
            start_event=StartEvent(name=name, slot=slot),
            hooks=SlotHooks(slot),
            options=RunOptions(flavour=flavour),
        )
        self.runs.append(run)
        with anyio.CancelScope() as scope:
            self.scopes.append(scope)
            try:
                await run.drive()
            finally:
                slot.release()
            self.results.append(await run.result())

    def check(self, cap, *, reached=True):
        meter = self.meter
        assert meter.peak <= cap
        assert meter.peak_borrowed <= cap
        assert meter.without_slot == 0
        assert self.limiter.borrowed_tokens == 0
        assert not any(slot.held for slot in self.slots)
        if reached:
            assert meter.peak == cap


@pytest.mark.anyio
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("cap", [1, 2])
async def test_a_hundred_waiting_runs_hold_no_slot(flavour, cap):
    runs = Runs(cap)
    workflow = Quiz(runs.meter)
    async with open_asyncio_loop(), anyio.create_task_group() as group:
        for _ in range(100):
            group.start_soon(runs.one, workflow, flavour)
        await anyio.wait_all_tasks_blocked()
        assert all(run.is_idle for run in runs.runs)
        assert runs.limiter.borrowed_tokens == 0
        for _ in range(2):
            for run in runs.runs:
                run.send_event(HumanResponseEvent(response="go on"))
            await anyio.wait_all_tasks_blocked()
    assert len(runs.results) == 100
    runs.check(cap)


@pytest.mark.trio
@pytest.mark.parametrize("cap", [1, 2])
@pytest.mark.parametrize("seed", range(3))
async def test_expiring_waiters_and_random_cancellation(cap, seed, autojump_clock):
    chance = random.Random(seed)
    runs = Runs(cap)
    workflow = Quiz(runs.meter, waiter_timeout=5.0)
    async with trio.open_nursery() as nursery:
        for _ in range(150):
            nursery.start_soon(runs.one, workflow)
        for _ in range(40):
            await trio.sleep(chance.uniform(0, 0.6))
            for index in chance.sample(range(150), 20):
                if index < len(runs.scopes) and chance.random() < 0.15:
                    runs.scopes[index].cancel()
                elif not runs.runs[index].is_done and chance.random() < 0.3:
                    runs.runs[index].send_event(HumanResponseEvent(response="x"))
                elif chance.random() < 0.05:
                    runs.runs[index].cancel() if not runs.runs[index].is_done else None
                    runs.scopes[index].cancel()
    assert all(run.is_done for run in runs.runs)
    assert runs.results
    runs.check(cap)


@pytest.mark.anyio
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("cap", [1, 2])
async def test_random_cancellation_everywhere(flavour, cap):
    chance = random.Random(cap)
    runs = Runs(cap)
    workflow = Quiz(runs.meter)
    async with open_asyncio_loop(), anyio.create_task_group() as group:
        for _ in range(60):
            group.start_soon(runs.one, workflow, flavour)
        for _ in range(200):
            for _ in range(chance.randrange(4)):
                await anyio.lowlevel.checkpoint()
            index = chance.randrange(60)
            if index >= len(runs.runs):
                continue
            if chance.random() < 0.25:
                runs.scopes[index].cancel()
            elif not runs.runs[index].is_done:
                runs.runs[index].send_event(HumanResponseEvent(response="x"))
        await anyio.wait_all_tasks_blocked()
        for run in runs.runs:
            for _ in range(2):
                if not run.is_done:
                    run.send_event(HumanResponseEvent(response="x"))
    runs.check(cap)


class Busy(Workflow):
    """Each run works until its gate is opened."""

    def __init__(self, meter):
        super().__init__(timeout=None)
        self.meter = meter
        self.gates = {str(n): trio.Event() for n in range(1, 9)}
        self.order = []

    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        self.meter.enter(ev.name, ev.slot)
        self.order.append(int(ev.name))
        await self.gates[ev.name].wait()
        self.meter.leave(ev.name)
        return StopEvent(result=ev.name)


@pytest.mark.trio
async def test_a_cap_lowered_while_runs_work(autojump_clock):
    runs = Runs(4)
    workflow = Busy(runs.meter)
    settled = trio.testing.wait_all_tasks_blocked
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(runs.one, workflow)
            await settled()
        assert len(runs.meter.working) == 4
        runs.limiter.total_tokens = 2
        for name in "12":
            workflow.gates[name].set()
        await settled()
        assert sorted(runs.meter.working) == ["3", "4"]  # nothing started until the number was below the cap
        workflow.gates["3"].set()
        await settled()
        assert sorted(runs.meter.working) == ["4", "5"]
        runs.limiter.total_tokens = 5
        await settled()
        assert len(runs.meter.working) == 5
        for gate in workflow.gates.values():
            gate.set()
    assert workflow.order[:5] == [1, 2, 3, 4, 5]  # first come, first served
    assert sorted(workflow.order) == list(range(1, 9))
    runs.check(5)


@pytest.mark.anyio
async def test_a_slot_by_itself(configuration):
    limiter = anyio.CapacityLimiter(1)
    one, two = Slot(limiter), Slot(limiter)
    assert one.take_nowait()
    assert one.take_nowait()
    assert not two.take_nowait()
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(two.ensure)
        await anyio.wait_all_tasks_blocked()
        assert not two.held
        one.release()
        one.release()
    assert two.held
    with anyio.CancelScope() as scope:
        scope.cancel()
        await one.ensure()
    assert not one.held
    async with anyio.create_task_group() as group:  # the one that waits at the limiter is cancelled, the other is not
        first = anyio.CancelScope()

        async def cancelled_one():
            with first:
                await one.ensure()

        group.start_soon(cancelled_one)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(one.ensure)
        await anyio.wait_all_tasks_blocked()
        first.cancel()
        await anyio.wait_all_tasks_blocked()
        two.release()
    assert one.held
    one.release()
    assert limiter.borrowed_tokens == 0
