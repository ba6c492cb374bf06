"""Runs that wait hold no slot, and no race between waking, expiring and cancelling costs one or gives one too many."""

from __future__ import annotations

import random

import anyio
import pytest

from llama_corral.exceptions import UsageError
from llama_corral.protocol import topics

from .flows import Asks, WaitsFor
from .rig import PATIENCE, Probe, until

pytestmark = pytest.mark.anyio


def assert_no_slot_is_left(service, limiter) -> None:
    assert limiter.borrowed_tokens == 0
    assert limiter.statistics().tasks_waiting == 0 or limiter.available_tokens > 0
    assert not service.executions


@pytest.mark.promise("P1", "P10")
@pytest.mark.parametrize("cap", [1, 2])
@pytest.mark.parametrize("workflow", [Asks, WaitsFor])
async def test_a_hundred_waiting_runs_leave_room_for_new_ones(rig, cap, workflow):
    probe = Probe()
    service = await rig.serve(workflow(probe), cap=cap)
    waiting = [await rig.submit(name=n) for n in range(100)]
    for task_id in waiting:
        await rig.wait_status(task_id, "waiting")
    assert service.statistics().waiting == 100
    assert service.statistics().working == 0
    late = await rig.submit(name="late")
    await rig.wait_status(late, "waiting")
    await rig.answer(late, "at once")
    assert "at once" in (await rig.result(late)).result
    random.shuffle(waiting)
    for task_id in waiting:
        await rig.answer(task_id, task_id)
    for task_id in waiting:
        assert task_id in (await rig.result(task_id)).result
    assert probe.peak <= cap
    await until(lambda: not service.executions and not service.statistics().working)
    assert_no_slot_is_left(service, service._limiter)


async def test_answers_before_the_question(rig):
    await rig.serve(Asks(), cap=1)
    tasks = [await rig.submit(name=n) for n in range(20)]
    for task_id in tasks:
        await rig.answer(task_id)
    for task_id in tasks:
        assert (await rig.result(task_id)).status == "completed"


async def test_a_wake_up_is_not_lost_behind_an_event_that_nothing_takes(rig):
    """The run holds an event that it has no use for; the answer that comes while its inbox is pulled still arrives."""

    class Slow:
        def __init__(self, plane) -> None:
            self.plane = plane
            self.pulls = 0
            self.go = anyio.Event()

        def __getattr__(self, name):
            return getattr(self.plane, name)

        async def pull(self, task_id, epoch, after):
            self.pulls += 1
            page = await self.plane.pull(task_id, epoch, after)
            if self.pulls == 1:
                await self.go.wait()
            return page

    slow = Slow(rig.plane)
    await rig.serve(WaitsFor(), coordinator=slow)
    task_id = await rig.submit()
    await rig.wait_status(task_id, "waiting")
    await rig.plane.send_event(task_id, '{"type": "InputRequiredEvent", "value": {}}')
    await until(lambda: slow.pulls)
    await rig.answer(task_id, "heard")
    await anyio.wait_all_tasks_blocked()
    slow.go.set()
    assert "heard" in (await rig.result(task_id)).result


async def test_a_wake_up_that_is_faster_than_the_claim(rig):
    """The event is stored after the claim's transaction and its wake-up comes before the claim's answer."""

    class Slow:
        def __init__(self, plane) -> None:
            self.plane = plane
            self.claimed = anyio.Event()
            self.go = anyio.Event()

        def __getattr__(self, name):
            return getattr(self.plane, name)

        async def claim(self, ticket, instance_id, nonce):
            claim = await self.plane.claim(ticket, instance_id, nonce)
            self.claimed.set()
            await self.go.wait()
            return claim

    slow = Slow(rig.plane)
    probe = Probe()
    service = await rig.serve(Asks(probe), coordinator=slow, cap=1)
    service.reserve = lambda: None  # by ticket
    task_id = await rig.submit()
    with anyio.fail_after(PATIENCE):
        await slow.claimed.wait()
    await rig.answer(task_id, "fast")
    await anyio.wait_all_tasks_blocked()
    slow.go.set()
    assert "fast" in (await rig.result(task_id)).result


async def test_missed_wake_ups_are_pulled_when_the_subscription_is_back(rig):
    service = await rig.serve(Asks())
    task_id = await rig.submit()
    await rig.wait_status(task_id, "waiting")
    topic = topics.instance("test", service.instance_id)
    for subscription in rig.queue._listeners.pop(topic):  # the link breaks
        await rig.store.send(
            task_id, service.check_event('{"type": "HumanResponseEvent", "value": {"response": "x"}}'), 0
        )
        subscription.close()
    assert (await rig.result(task_id)).status == "completed"


@pytest.mark.promise("P1", "P6", "P12")
@pytest.mark.parametrize("cap", [1, 3])
@pytest.mark.parametrize("seed", [1, 2])
async def test_answers_timeouts_and_cancellations_in_any_order(rig, cap, seed):
    chance = random.Random(seed)
    probe = Probe()
    service = await rig.serve(WaitsFor(probe), cap=cap)
    tasks = []
    for _ in range(60):
        timeout = chance.choice([None, 0.001, 0.01, 0.03])
        tasks.append(await rig.submit(times=chance.randint(1, 3), timeout=timeout))

    async def disturb(task_id: str) -> None:
        try:
            for _ in range(4):
                await anyio.sleep(chance.random() * 0.03)  # the disorder is the test
                if chance.random() < 0.25:
                    await rig.plane.cancel(task_id)
                else:
                    await rig.answer(task_id)
        except UsageError:
            return  # it has ended
        if not (await rig.plane.get_task(task_id)).status.is_terminal:
            await rig.plane.cancel(task_id)

    async def disturb_to_the_end(task_id: str) -> None:
        try:
            await disturb(task_id)
        except UsageError:
            return

    with anyio.fail_after(PATIENCE * 2):
        async with anyio.create_task_group() as disturbers:
            for task_id in tasks:
                disturbers.start_soon(disturb_to_the_end, task_id)
    endings = [(await rig.result(task_id)).status for task_id in tasks]
    assert set(endings) <= {"completed", "cancelled"}
    assert probe.peak <= cap
    assert probe.working == 0
    await until(lambda: not service.executions and not service.statistics().working)
    assert_no_slot_is_left(service, service._limiter)
