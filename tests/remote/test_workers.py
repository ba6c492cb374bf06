"""Callers that are workers of the same control plane: they may call each other, and outlive what is restarted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from workflows import Workflow, step
from workflows.events import HumanResponseEvent, StartEvent, StopEvent

from llama_corral.client import Client
from llama_corral.deploy import WorkerOptions, deploy_worker
from llama_corral.remote import RemoteWorkflow, call
from llama_corral.runtime import Slot, SlotHooks, open_run
from llama_corral.testing import open_stack

from ..threaded import open_core
from .flows import Asks, Calls, Question
from .waiting import wait_far_status

TIME = 20.0


class Nests(Workflow):
    """Calls itself `depth` times, one inside of the other."""

    def __init__(self, inner: RemoteWorkflow) -> None:
        super().__init__(timeout=None)
        self.inner = inner

    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        return StopEvent(result=ev.depth and await self.inner.run(depth=ev.depth - 1) + 1)


@pytest.mark.anyio
async def test_a_service_may_call_itself_under_a_cap_of_one(flavour: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "QUEUED_PATIENCE", 0.02)
    async with open_core() as core, Client(core.url) as client, anyio.create_task_group() as tasks:
        options = WorkerOptions(control_plane_url=core.url, step_flavour=flavour, max_concurrent_tasks=1)
        stop = anyio.Event()
        workflows = {"nests": Nests(RemoteWorkflow("nests", core.url))}
        await tasks.start(partial(deploy_worker, workflows, options, stop=stop))
        with anyio.fail_after(TIME):
            assert await client.run("nests", depth=3) == 3
        stop.set()


@pytest.mark.anyio
@pytest.mark.promise("P2")
async def test_it_goes_on_when_the_control_plane_is_back(flavour: Any, tmp_path: Path) -> None:
    """A call by URL waits for it; so does whoever has answered meanwhile."""
    store = f"sqlite:///{tmp_path}/corral.db"
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        async with open_core(store=store) as core:
            workflows = {
                "asks": Asks(),
                "calls": Calls(RemoteWorkflow("asks", core.url, events=[Question])),
            }
            options = WorkerOptions(control_plane_url=core.url, step_flavour=flavour)
            await tasks.start(partial(deploy_worker, workflows, options, stop=stop))
            async with Client(core.url) as client:
                task_id = (await client.start("calls")).id
                assert await wait_far_status(client, task_id, "waiting") == "waiting"
        async with open_core(store=store, port=core.port), Client(core.url) as client:
            await client.task(task_id).send_event(HumanResponseEvent(response="so"))
            assert await client.task(task_id).result(TIME) == ["so"]
            assert len(await client.tasks()) == 2
            stop.set()


class IdleSlot(SlotHooks):
    def __init__(self, slot: Slot) -> None:
        super().__init__(slot)
        self.idle = anyio.Event()

    def on_idle(self) -> None:
        super().on_idle()
        self.idle.set()


@pytest.mark.anyio
@pytest.mark.promise("P2", "P10")
@pytest.mark.parametrize("killed", [False, True])
async def test_another_control_plane_tells_that_it_waits(flavour: Any, killed: bool) -> None:
    """The worker knows one, the caller asks the other. Where that one dies, the caller goes on at the first."""
    stop, slot = anyio.Event(), Slot(anyio.CapacityLimiter(1))
    async with open_core(count=2) as core, Client(core.url) as client, anyio.create_task_group() as tasks:
        options = WorkerOptions(control_plane_url=core.urls[0], step_flavour=flavour)
        await tasks.start(partial(deploy_worker, {"asks": Asks()}, options, stop=stop))
        remote = RemoteWorkflow("asks", core.urls[::-1], events=[Question])
        hooks = IdleSlot(slot)
        async with open_run(Calls(remote), hooks=hooks, flavour=flavour) as run:
            with anyio.fail_after(TIME):
                await hooks.idle.wait()
                assert not slot.held
                if killed:
                    await core.ones[1].kill()
                (task,) = await client.tasks()
                await client.task(task.task_id).send_event(HumanResponseEvent(response="so"))
                assert await run.result() == ["so"]
        stop.set()


@pytest.mark.process
@pytest.mark.promise("P2")
@pytest.mark.trio
async def test_a_killed_worker_leaves_the_remote_run_to_the_next(tmp_path: Path) -> None:
    flows = Path(__file__).with_name("flows.py")
    async with (
        open_stack(folder=tmp_path, workers=0, options=("--heartbeat", "0.2", "--lease", "1")) as stack,
        Client(stack.url) as client,
    ):
        calls = partial(stack.add_worker, targets=[f"calls={flows}:calls"], environment={"CORRAL_TEST_FAR": stack.url})
        await stack.add_worker(targets=[f"asks={flows}:asks"])
        killed = await calls()
        task = await client.start("calls", questions=2)
        await wait_far_status(client, task.id, "waiting")
        await task.send_event(HumanResponseEvent(response="early"))
        async with task.events() as events:
            with anyio.fail_after(TIME):
                while (await anext(events)).data.get("number") != 1:
                    pass
        killed.kill()
        await calls()
        await task.send_event(HumanResponseEvent(response="late"))
        assert await task.result(TIME) == ["early", "late"]
        assert sorted([each.service_name for each in await client.tasks()]) == ["asks", "calls"]
