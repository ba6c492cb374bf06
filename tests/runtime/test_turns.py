"""`num_concurrent_runs`: how many runs of one workflow are active at once."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest
from workflows import Context, Workflow, step
from workflows.errors import WorkflowCancelledByUser
from workflows.events import HumanResponseEvent, StartEvent, StopEvent, WorkflowCancelledEvent

from llama_corral.aio import open_asyncio_loop
from llama_corral.runtime import Slot, SlotHooks, open_run, run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


class Limited(Workflow):
    def __init__(self, limit, timeout=None):
        super().__init__(num_concurrent_runs=limit, timeout=timeout)
        self.active = self.peak = 0
        self.order = []

    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        self.active += 1
        self.peak = max(self.peak, self.active)
        self.order.append(ev.get("n"))
        try:
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
        finally:
            self.active -= 1
        return StopEvent(result=ev.get("n"))


@pytest.mark.parametrize("limit", [1, 3])
async def test_no_more_are_active_and_in_order(flavour, limit):
    workflow = Limited(limit)
    results = []

    async def one(n):
        results.append(await run_workflow(workflow, n=n, flavour=flavour))

    async with open_asyncio_loop(), anyio.create_task_group() as group:
        for n in range(20):
            group.start_soon(one, n)
    assert sorted(results) == list(range(20))
    assert workflow.peak == limit
    assert workflow.active == 0


async def test_first_come_first_served(flavour):
    workflow = Limited(1)
    async with open_asyncio_loop(), anyio.create_task_group() as group:
        for n in range(10):
            group.start_soon(lambda n=n: run_workflow(workflow, n=n, flavour=flavour))
            await anyio.lowlevel.checkpoint()
    assert workflow.order == list(range(10))


class Waits(Workflow):
    def __init__(self, limit=1, timeout=None):
        super().__init__(num_concurrent_runs=limit, timeout=timeout)

    @step
    async def wait(self, ctx: Context, ev: StartEvent) -> StopEvent:
        answer = await ctx.wait_for_event(HumanResponseEvent)
        return StopEvent(result=answer.response)


@pytest.mark.promise("P6")
@pytest.mark.parametrize("how", ["cancel", "leave"])
async def test_a_run_that_waits_for_its_turn_can_be_cancelled(flavour, how):
    workflow = Waits()
    async with open_run(workflow, flavour=flavour) as first:
        await anyio.wait_all_tasks_blocked()
        async with open_run(workflow, flavour=flavour) as second:
            await anyio.wait_all_tasks_blocked()
            assert second.is_idle
            assert not second.is_done
            assert second.statistics().ticks == 0
            if how == "cancel":
                second.cancel()
                with pytest.raises(WorkflowCancelledByUser):
                    await second.result()
                assert [type(event) async for event in second.events()] == [WorkflowCancelledEvent]
        # it has not taken the turn with it
        async with open_run(workflow, flavour=flavour) as third:
            third.send_event(HumanResponseEvent(response="third"))
            await anyio.wait_all_tasks_blocked()
            assert not third.is_done
            first.send_event(HumanResponseEvent(response="first"))
            assert await first.result() == "first"
            assert await third.result() == "third"


async def test_it_holds_no_slot_meanwhile(flavour):
    workflow = Waits()
    limiter = anyio.CapacityLimiter(1)
    slots = [Slot(limiter), Slot(limiter)]
    async with open_run(workflow, flavour=flavour, hooks=SlotHooks(slots[0])) as first:
        await anyio.wait_all_tasks_blocked()
        slots[1].take_nowait()
        async with open_run(workflow, flavour=flavour, hooks=SlotHooks(slots[1])) as second:
            await anyio.wait_all_tasks_blocked()
            assert limiter.borrowed_tokens == 0
            first.send_event(HumanResponseEvent(response="first"))
            await first.result()
            slots[0].release()
            second.send_event(HumanResponseEvent(response="second"))
            assert await second.result() == "second"
            slots[1].release()


async def test_instances_have_limits_of_their_own(flavour):
    one, other = Waits(), Waits()
    async with open_run(one, flavour=flavour), open_run(other, flavour=flavour) as run:
        await anyio.wait_all_tasks_blocked()
        run.send_event(HumanResponseEvent(response="mine"))
        assert await run.result() == "mine"


class Recursive(Workflow):
    """Both sides of the border take turns of the same workflow."""

    def __init__(self, inner, flavour):
        super().__init__(timeout=None)
        self.inner, self.flavour = inner, flavour

    @step
    async def call(self, ev: StartEvent) -> StopEvent:
        return StopEvent(result=await run_workflow(self.inner, n=ev.get("n"), flavour=self.flavour))


async def test_runs_in_either_library_share_the_limit(flavour):
    workflow = Limited(2)
    async with open_asyncio_loop(), anyio.create_task_group() as group:
        for n in range(6):
            group.start_soon(lambda n=n: run_workflow(Recursive(workflow, flavour), n=n, flavour=flavour))
            group.start_soon(lambda n=n: run_workflow(workflow, n=n, flavour="anyio"))
    assert workflow.peak == 2
    assert len(workflow.order) == 12
