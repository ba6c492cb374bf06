"""Runs inside of runs: whose they are, and what waiting for one means to the slot of the run around."""

from __future__ import annotations

import asyncio
import contextlib
import random

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
from workflows import Context, Workflow, step
from workflows.errors import WorkflowCancelledByUser
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from llama_corral.aio import open_asyncio_loop
from llama_corral.exceptions import FlavourError, RunClosed
from llama_corral.runtime import RunOptions, Slot, SlotHooks, make_run, open_run, run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left"), pytest.mark.promise("P6")]


class Asks(Workflow):
    """Waits for a person. What it stores of itself is the way in for the tests."""

    def __init__(self, box, **kwargs):
        super().__init__(timeout=None, **kwargs)
        self.box = box

    @step
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        self.box.asking = ctx
        answer = await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent(prefix="?"))
        self.box.check()
        await anyio.lowlevel.checkpoint()
        return StopEvent(result=f"child: {answer.response}")


class Box:
    """What a test knows of a parent under a cap of one."""

    def __init__(self):
        self.limiter = anyio.CapacityLimiter(1)
        self.slot = Slot(self.limiter)
        self.asking = None
        self.unwound = []

    def check(self):
        assert self.slot.held, "a step works without a slot"

    def answer(self):
        self.asking.send_event(HumanResponseEvent(response="yes"))

    async def drive(self, parent, flavour, *, hold=None):
        """Drive a parent until it is idle, look at its slot, hold that by somebody else if asked to, answer."""
        hooks = IdleHooks(self.slot)
        run = make_run(parent, hooks=hooks, options=RunOptions(flavour=flavour))
        async with anyio.create_task_group() as group:
            group.start_soon(run.drive)
            await hooks.idle.wait()
            assert run.is_idle
            assert not self.slot.held
            assert self.limiter.borrowed_tokens == 0
            if hold is not None:
                await hold(run)
            else:
                self.answer()
        self.slot.release()
        return await run.result()


class IdleHooks(SlotHooks):
    def __init__(self, slot):
        super().__init__(slot)
        self.idle = anyio.Event()

    def on_idle(self):
        super().on_idle()
        self.idle.set()


class AwaitsRunWorkflow(Workflow):
    def __init__(self, box, flavour):
        super().__init__(timeout=None)
        self.box, self.flavour = box, flavour

    @step
    async def call(self, ctx: Context, ev: StartEvent) -> StopEvent:
        result = await self.wait()
        self.box.check()
        await anyio.lowlevel.checkpoint()
        return StopEvent(result=f"parent of {result}")

    async def wait(self):
        return await run_workflow(Asks(self.box), flavour=self.flavour)


class AwaitsResult(AwaitsRunWorkflow):
    async def wait(self):
        async with open_run(Asks(self.box), flavour=self.flavour) as run:
            return await run.result()


class ReadsEvents(AwaitsRunWorkflow):
    async def wait(self):
        async with open_run(Asks(self.box), flavour=self.flavour) as run:
            async for _ in run.events():
                self.box.check()
            return await run.result()


class ThreeDeep(AwaitsRunWorkflow):
    async def wait(self):
        return await run_workflow(AwaitsRunWorkflow(self.box, self.flavour), flavour=self.flavour)


class FromAThread(Workflow):
    def __init__(self, box, flavour):
        super().__init__(timeout=None)
        self.box = box

    @step
    def call(self, ev: StartEvent) -> StopEvent:
        result = anyio.from_thread.run(run_workflow, Asks(self.box))
        self.box.check()
        return StopEvent(result=f"parent of {result}")


@pytest.mark.parametrize("parent", [AwaitsRunWorkflow, AwaitsResult, ReadsEvents, ThreeDeep, FromAThread])
@pytest.mark.parametrize("inner", ["anyio", "asyncio"])
async def test_a_parent_of_an_idle_child_is_idle(flavour, inner, parent):
    box = Box()
    async with open_asyncio_loop():
        result = await box.drive(parent(box, inner), flavour)
    assert result.endswith("parent of child: yes")
    assert box.limiter.borrowed_tokens == 0


class PlainRun(AwaitsRunWorkflow):
    async def wait(self):
        return await Asks(self.box).run()


class PlainHandler(AwaitsRunWorkflow):
    async def wait(self):
        handler = Asks(self.box).run()
        async for _ in handler.stream_events():
            self.box.check()
        return await handler


class PlainAttribute(AwaitsRunWorkflow):
    def __init__(self, box, flavour):
        super().__init__(box, flavour)
        self.child = Asks(box)

    async def wait(self):
        return await self.child.run()


class PlainVerbose(PlainAttribute):
    def __init__(self, box, flavour):
        super().__init__(box, flavour)
        self.child = Asks(box, verbose=True)


@pytest.mark.parametrize("parent", [PlainRun, PlainHandler, PlainAttribute, PlainVerbose])
async def test_plain_run_in_a_step_belongs_to_its_run(configuration, flavour, parent, capsys):
    box = Box()
    async with open_asyncio_loop():
        if configuration != "trio-anyio":
            assert await box.drive(parent(box, flavour), flavour) == "parent of child: yes"
            assert (capsys.readouterr().out != "") == (parent is PlainVerbose)
            return
        with pytest.raises(FlavourError, match=r"step 'call' speaks Trio and cannot await .*Asks.run\(\)") as raised:
            await run_workflow(parent(box, flavour), flavour=flavour)
        assert "run_workflow" in raised.value.hint
    assert box.asking is None  # nothing was started


class Started(Event):
    pass


class Leaves(Workflow):
    """A step that starts a run and does not wait for it."""

    def __init__(self, then):
        super().__init__(timeout=None)
        self.then = then
        self.began = self.unwound = 0
        self.handlers = []

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Started | None:
        self.handlers.append(Hangs(self, ctx).run())

    @step
    async def end(self, ev: Started) -> StopEvent:
        if self.then == "fail":
            raise LookupError
        if self.then == "hang":
            await anyio.sleep_forever()
        return StopEvent()


class Hangs(Workflow):
    def __init__(self, parent, ctx):
        super().__init__(timeout=None)
        self.parent, self.ctx = parent, ctx

    @step
    async def hang(self, ev: StartEvent) -> StopEvent:
        self.ctx.send_event(Started())
        self.parent.began += 1
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            self.parent.unwound += 1
        return StopEvent()


@pytest.mark.parametrize("then", ["return", "fail", "hang"])
async def test_a_run_that_a_step_left_behind_ends_with_the_steps_run(configuration, flavour, then):
    if configuration == "trio-anyio":
        pytest.skip("plain run() is asyncio's")
    async with open_asyncio_loop():
        workflow = Leaves(then)
        async with open_run(workflow, flavour=flavour) as run:
            await anyio.wait_all_tasks_blocked()
            assert workflow.began == 1
            assert run.is_done == (then != "hang")
            assert workflow.unwound == run.is_done
        assert workflow.unwound == 1
        if configuration == "asyncio":  # in hosted asyncio the handler's own task ended with its step
            with pytest.raises(RunClosed):
                await workflow.handlers[0]
        else:
            assert workflow.handlers[0].is_done()


class Gathers(AwaitsRunWorkflow):
    async def wait(self):
        results = []

        async def one():
            results.append(await run_workflow(Asks(self.box), flavour=self.flavour))

        async with anyio.create_task_group() as group:
            group.start_soon(one)
            group.start_soon(anyio.lowlevel.checkpoint)
        return results[0]


async def test_a_step_that_waits_in_tasks_of_its_own_keeps_its_slot(flavour):
    """What its own task does meanwhile cannot be known, and the cap is not to be exceeded."""
    box = Box()
    run = make_run(Gathers(box, flavour), hooks=SlotHooks(box.slot), options=RunOptions(flavour=flavour))
    async with open_asyncio_loop(), anyio.create_task_group() as group:
        group.start_soon(run.drive)
        await anyio.wait_all_tasks_blocked()
        assert box.slot.held
        assert not run.is_idle
        box.answer()
    assert await run.result() == "parent of child: yes"
    box.slot.release()


class GivesUp(AwaitsRunWorkflow):
    """Waits for its child for a while only."""

    async def wait(self):
        self.scope = anyio.CancelScope()
        with self.scope:
            await run_workflow(Asks(self.box), flavour=self.flavour)
        return "given up"


class GivesUpPlain(AwaitsRunWorkflow):
    async def wait(self):
        self.scope = asyncio.current_task()
        try:
            await Asks(self.box).run()
        except asyncio.CancelledError:  # noqa: ASYNC103 -- its own, as asyncio.timeout would
            asyncio.current_task().uncancel()
        return "given up"


@pytest.mark.parametrize("then", ["free", "end", "cancel"])
@pytest.mark.parametrize("parent_class", [GivesUp, GivesUpPlain])
async def test_a_step_that_gives_up_its_wait_waits_for_a_slot(flavour, configuration, parent_class, then):
    """Another run has the only slot when the step stops waiting for its child."""
    if configuration == "trio-anyio" and parent_class is GivesUpPlain:
        pytest.skip("plain run() is asyncio's")
    box = Box()
    parent = parent_class(box, flavour)
    other = Slot(box.limiter)

    async def hold(run):
        await other.ensure()
        if configuration != "trio-asyncio":
            parent.scope.cancel()
        else:
            await stop_in_asyncio(parent.scope)
        await anyio.wait_all_tasks_blocked()
        assert not run.is_done
        assert not run.is_idle
        if then == "free":
            other.release()
        elif then == "end":
            run.cancel()
        else:
            group.cancel_scope.cancel()

    async with open_asyncio_loop(), anyio.create_task_group() as group:
        if then == "free":
            assert await box.drive(parent, flavour, hold=hold) == "parent of given up"
        else:
            try:
                with contextlib.suppress(WorkflowCancelledByUser):
                    await box.drive(parent, flavour, hold=hold)
            finally:
                box.slot.release()
                other.release()
    assert box.limiter.borrowed_tokens == 0


async def stop_in_asyncio(scope):
    """An asyncio cancel scope can be cancelled from asyncio code only."""
    from llama_corral.aio import call_asyncio

    async def cancel():
        scope.cancel()

    await call_asyncio(cancel)


class Middle(Event):
    pass


class Family(Workflow):
    """A parent that works, awaits a child that asks and works, and works again."""

    def __init__(self, world):
        super().__init__(timeout=None)
        self.world = world

    @step
    async def first(self, ev: StartEvent) -> Middle:
        await self.world.work(ev.name)
        await run_workflow(Child(self.world), start_event=StartEvent(name=ev.name))
        await self.world.work(ev.name)
        return Middle(name=ev.name)

    @step
    async def second(self, ev: Middle) -> StopEvent:
        async with open_run(Child(self.world), start_event=StartEvent(name=ev.name)) as child:
            async for _ in child.events():
                await self.world.work(ev.name)
        await self.world.work(ev.name)
        return StopEvent(result=ev.name)


class Child(Workflow):
    def __init__(self, world):
        super().__init__(timeout=None)
        self.world = world

    @step
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        await self.world.work(ev.name)
        self.world.asking[ev.name] = ctx
        await ctx.wait_for_event(HumanResponseEvent)
        await self.world.work(ev.name)
        return StopEvent()


class World:
    def __init__(self, cap):
        self.limiter = anyio.CapacityLimiter(cap)
        self.slots = {}
        self.working = set()
        self.peak = 0
        self.asking = {}

    async def work(self, name):
        assert self.slots[name].held
        assert name not in self.working
        self.working.add(name)
        self.peak = max(self.peak, len(self.working))
        try:
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
        finally:
            self.working.discard(name)

    async def run(self, name, flavour, results):
        slot = self.slots[name] = Slot(self.limiter)
        run = make_run(
            Family(self),
            start_event=StartEvent(name=name),
            hooks=SlotHooks(slot),
            options=RunOptions(flavour=flavour),
        )
        try:
            await run.drive()
        finally:
            slot.release()
        results.append(await run.result())


@pytest.mark.parametrize("cap", [1, 3])
async def test_families_never_work_beyond_the_cap(flavour, cap):
    world = World(cap)
    results = []
    dice = random.Random(cap)
    async with open_asyncio_loop(), anyio.create_task_group() as group:
        for number in range(30):
            group.start_soon(world.run, str(number), flavour, results)
        while len(results) < 30:
            await anyio.wait_all_tasks_blocked()
            assert world.limiter.borrowed_tokens == 0
            names = sorted(world.asking)
            for name in dice.sample(names, min(len(names), 7)):
                world.asking.pop(name).send_event(HumanResponseEvent())
            await anyio.wait_all_tasks_blocked()
    assert sorted(results, key=int) == [str(number) for number in range(30)]
    assert world.peak == cap
    assert world.limiter.borrowed_tokens == 0


async def test_a_run_that_a_thread_started_ends_with_the_run_around(flavour):
    """An abandoned thread goes on until it notices; what it awaits in the event loop does not."""
    box = Box()
    hooks = IdleHooks(box.slot)
    async with open_asyncio_loop():
        async with open_run(FromAThread(box, flavour), flavour=flavour, hooks=hooks) as run:
            await hooks.idle.wait()
            run.cancel()
            with pytest.raises(WorkflowCancelledByUser):
                await run.result()
    assert not hooks.slot.held


class TwoChildren(AwaitsRunWorkflow):
    """Awaits an idle child while another one works."""

    async def wait(self):
        async with open_run(Busy(self.box), flavour=self.flavour) as busy:
            try:
                return await run_workflow(Asks(self.box), flavour=self.flavour)
            finally:
                await busy.result()  # noqa: ASYNC102 -- it is about to end


class Busy(Workflow):
    def __init__(self, box):
        super().__init__(timeout=None)
        self.box = box

    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        for _ in range(200):
            await anyio.lowlevel.checkpoint()
            self.box.check()
        if self.box.asking is not None:
            self.box.answer()
        return StopEvent(result="worked")


async def test_a_parent_of_an_idle_child_and_a_busy_one_is_not_idle(flavour):
    box = Box()
    async with open_asyncio_loop():
        async with open_run(TwoChildren(box, flavour), flavour=flavour, hooks=SlotHooks(box.slot)) as run:
            assert await run.result() == "parent of child: yes"
        box.slot.release()


class LeavesBusy(Workflow):
    """Its step ends before the run that it started."""

    def __init__(self, box):
        super().__init__(timeout=None)
        self.box = box

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> StopEvent | None:
        self.handler = Busy(self.box).run()

    @step
    async def end(self, ctx: Context, ev: HumanResponseEvent) -> StopEvent:
        return StopEvent(result=await self.handler)


async def test_a_run_that_outlives_its_step_works_under_the_slot_of_the_run_around(configuration, flavour):
    if configuration == "trio-anyio":
        pytest.skip("plain run() is asyncio's")
    box = Box()
    hooks = IdleHooks(box.slot)
    async with open_asyncio_loop():
        async with open_run(LeavesBusy(box), flavour=flavour, hooks=hooks) as run:
            await hooks.idle.wait()  # and not before the child has ended: it checks its slot
            assert not box.slot.held
            run.send_event(HumanResponseEvent())
            assert await run.result() == "worked"  # awaited by another step than the one that started it
        box.slot.release()


class Cleans(Workflow):
    """The clean-up of its step runs a workflow."""

    def __init__(self, how, flavour):
        super().__init__(timeout=None)
        self.how, self.flavour = how, flavour
        self.cleaned = None

    @step
    async def hang(self, ev: StartEvent) -> StopEvent:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                if self.how == "plain":
                    self.cleaned = await Tidies().run()  # noqa: ASYNC102
                else:
                    self.cleaned = await run_workflow(Tidies(), flavour=self.flavour)  # noqa: ASYNC102
        return StopEvent()


class Tidies(Workflow):
    @step
    async def tidy(self, ev: StartEvent) -> StopEvent:
        await anyio.lowlevel.checkpoint()
        return StopEvent(result="tidy")


@pytest.mark.parametrize("how", ["plain", "run_workflow"])
async def test_clean_up_may_run_a_workflow(configuration, flavour, how):
    if configuration == "trio-anyio" and how == "plain":
        pytest.skip("plain run() is asyncio's")
    workflow = Cleans(how, flavour)
    async with open_asyncio_loop():
        async with open_run(workflow, flavour=flavour) as run:
            await anyio.wait_all_tasks_blocked()
            run.cancel()
            with pytest.raises(WorkflowCancelledByUser):
                await run.result()
    assert workflow.cleaned == "tidy"


class OwnLoop(Workflow):
    """A sync step with an event loop of its own in its thread."""

    def __init__(self, child):
        super().__init__(timeout=None)
        self.child = child

    @step
    def work(self, ev: StartEvent) -> StopEvent:
        async def plain():
            return await self.child.run()

        return StopEvent(result=[asyncio.run(plain()), anyio.run(run_workflow, Tidies())])


async def test_a_sync_step_may_run_workflows_in_a_loop_of_its_own(flavour):
    workflow = OwnLoop(Tidies())
    assert await run_workflow(workflow, flavour=flavour) == ["tidy", "tidy"]


async def test_an_attribute_that_has_run_before_belongs_to_the_run_too(configuration, flavour):
    if configuration == "trio-anyio":
        pytest.skip("plain run() is asyncio's")
    box = Box()
    parent = PlainAttribute(box, flavour)
    parent.child._runtime_locked = True  # as it is once it has run
    async with open_asyncio_loop():
        assert await box.drive(parent, flavour) == "parent of child: yes"
