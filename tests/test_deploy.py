"""deploy_core, deploy_workflow, deploy_all: ready when they say so, errors raised, cancellation passed on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import anyio
import httpx
import pytest
import trio
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from llama_corral.aio import open_asyncio_loop
from llama_corral.deploy import (
    Deployment,
    DeployOptions,
    ServiceOptions,
    deploy_all,
    deploy_core,
    deploy_workflow,
    open_core,
)
from llama_corral.examples.hello import hello
from llama_corral.exceptions import AddressError, SetupError, StoreError
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.services import WorkflowServiceConfig
from llama_corral.settings import ServerSettings


class Unblocked(Event):
    pass


class Held(Workflow):
    """Works until it is told, or cancelled; both can be seen from outside."""

    started: trio.Event
    unwound: trio.Event

    @step
    async def hold(self, ev: StartEvent) -> StopEvent:
        self.started.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.unwound.set()
        return StopEvent()


class Ask(Workflow):
    @step
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        answer = await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent(), timeout=None)
        return StopEvent(result=answer.response)


def held() -> Held:
    workflow = Held(timeout=None)
    workflow.started, workflow.unwound = trio.Event(), trio.Event()
    return workflow


def options(folder: Path, **changes: object) -> DeployOptions:
    given = {"store_url": f"sqlite:///{folder}/corral.db", "settings": ServerSettings(port=0), "step_flavour": "anyio"}
    return DeployOptions(**(given | changes))  # type: ignore[arg-type]


@pytest.mark.trio
@pytest.mark.parametrize("flavour", ["anyio", "asyncio"])
async def test_all_is_ready_when_it_says_so(tmp_path: Path, flavour: str) -> None:
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        deployment: Deployment = await nursery.start(
            partial(deploy_all, {"hello": hello, "again": hello}, options(tmp_path, step_flavour=flavour), stop=stop)
        )
        async with httpx.AsyncClient(base_url=deployment.url) as client:
            assert (await client.get("/ready")).status_code == 200
            for name in ("hello", "again"):
                answer = await client.post(f"/services/{name}/run", json={"name": "Ada"})
                assert answer.status_code == 200
                assert "Ada" in answer.json()["result"]
            definition = (await client.get("/services/hello")).json()
            assert definition["port"] == int(deployment.url.rpartition(":")[2])
        stop.set()
    with pytest.raises(OSError):
        await trio.open_tcp_stream("127.0.0.1", int(deployment.url.rpartition(":")[2]))


@pytest.mark.trio
@pytest.mark.promise("P6", "P7")
async def test_a_stop_drains_and_hands_back_what_does_not_end(tmp_path: Path) -> None:
    stop, workflow = trio.Event(), held()
    async with trio.open_nursery() as nursery:
        deployment = await nursery.start(
            partial(deploy_all, {"held": workflow}, options(tmp_path, drain_timeout=0.1), stop=stop)
        )
        accepted = await deployment.core.plane.submit("held", {})
        await workflow.started.wait()
        stop.set()
    assert workflow.unwound.is_set()
    async with open_core(options(tmp_path)) as core:
        record = await core.plane.get_task(accepted.task_id)
        assert record.status is TaskStatus.QUEUED
        assert record.owner is None


@pytest.mark.trio
@pytest.mark.promise("P2", "P7")
async def test_what_waited_goes_on_after_a_restart_on_the_same_file(tmp_path: Path) -> None:
    for start in range(2):
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            deployment = await nursery.start(partial(deploy_all, {"ask": Ask()}, options(tmp_path), stop=stop))
            plane = deployment.core.plane
            if start == 0:
                accepted = await plane.submit("ask", {}, task_id="asked")
                async for page in plane.open_log("asked"):
                    if page.events:
                        break
            else:
                await plane.send_event("asked", '{"type": "HumanResponseEvent", "value": {"response": "yes"}}')
                record = await plane.wait_result(accepted.task_id, 20)
                assert record is not None
                assert (record.status, record.result) == (TaskStatus.COMPLETED, '"yes"')
            stop.set()


@pytest.mark.trio
@pytest.mark.promise("P6")
async def test_cancelling_it_leaves_nothing(tmp_path: Path) -> None:
    workflow = held()
    before = trio.lowlevel.current_statistics().tasks_living
    async with trio.open_nursery() as nursery:
        deployment = await nursery.start(partial(deploy_all, {"held": workflow}, options(tmp_path)))
        await deployment.core.plane.submit("held", {})
        await workflow.started.wait()
        nursery.cancel_scope.cancel()
    assert workflow.unwound.is_set()
    assert trio.lowlevel.current_statistics().tasks_living == before


@pytest.mark.trio
async def test_a_core_and_a_workflow_started_one_by_one(tmp_path: Path) -> None:
    stop, services = trio.Event(), ServiceOptions(step_flavour="anyio")
    async with trio.open_nursery() as nursery:
        core = await nursery.start(partial(deploy_core, options(tmp_path), stop=stop))
        service = await nursery.start(
            partial(deploy_workflow, hello, WorkflowServiceConfig(service_name="hi"), core, services)
        )
        async with httpx.AsyncClient(base_url=core.url) as client:
            assert (await client.post("/services/hi/run", json={})).json()["status"] == "completed"
        service.stop()
        stop.set()


@pytest.mark.anyio
@pytest.mark.parametrize("flavour", ["anyio", "asyncio"])
async def test_a_core_without_http_on_both_backends(flavour: str) -> None:
    async with open_asyncio_loop(), open_core(DeployOptions(store_url="sqlite://")) as core:
        async with anyio.create_task_group() as tasks:
            config = WorkflowServiceConfig(service_name="hello")
            services = ServiceOptions(step_flavour=flavour)  # type: ignore[arg-type]
            service = await tasks.start(partial(deploy_workflow, hello, config, core, services))
            _, terminal = await core.plane.run("hello", {"name": "Ada"}, task_id="t")
            assert terminal is not None
            assert terminal.status is TaskStatus.COMPLETED
            service.stop()


class Failing(Workflow):
    @step
    async def fail(self, ev: StartEvent) -> StopEvent:
        raise ValueError("as ever")


@pytest.mark.trio
@pytest.mark.parametrize("where", ["options", "settings", None])
async def test_debug_keeps_tracebacks(tmp_path: Path, where: str | None) -> None:
    settings = ServerSettings(port=0, debug=where == "settings")
    given = options(tmp_path, settings=settings, debug=where == "options")
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        deployment = await nursery.start(partial(deploy_all, {"failing": Failing()}, given, stop=stop))
        accepted = await deployment.core.plane.submit("failing", {})
        record = await deployment.core.plane.wait_result(accepted.task_id, 20)
        assert record.error.type == "ValueError"
        assert (record.error.traceback is not None) == (where is not None)
        stop.set()


@pytest.mark.trio
async def test_errors_come_out(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        stop = trio.Event()
        first = await nursery.start(partial(deploy_all, {"hello": hello}, options(tmp_path), stop=stop))
        taken = ServerSettings(port=int(first.url.rpartition(":")[2]))
        other = tmp_path / "other"
        other.mkdir()
        with pytest.RaisesGroup(AddressError, flatten_subgroups=True):
            await deploy_all({"hello": hello}, options(other, settings=taken))
        with pytest.raises(StoreError, match="process"):
            await deploy_all({"hello": hello}, options(tmp_path))
        stop.set()
    with pytest.raises(SetupError):
        await deploy_all({}, options(tmp_path))
