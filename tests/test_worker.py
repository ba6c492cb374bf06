"""deploy_worker, on both backends, against a core behind a real server."""

from __future__ import annotations

import logging
import socket
from functools import partial

import anyio
import pytest
from pydantic import SecretStr
from workflows import Workflow, step
from workflows.events import StartEvent, StopEvent

from llama_corral.client import Client
from llama_corral.deploy import Worker, WorkerOptions, deploy_worker
from llama_corral.examples.hello import hello
from llama_corral.exceptions import CorralError, SetupError, Unauthorized

from .threaded import open_core

pytestmark = pytest.mark.anyio


class Held(Workflow):
    """Works until it is cancelled; both can be seen from outside."""

    started: anyio.Event
    unwound: anyio.Event

    @step
    async def hold(self, ev: StartEvent) -> StopEvent:
        self.started.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.unwound.set()
        return StopEvent()


def held() -> Held:
    workflow = Held(timeout=None)
    workflow.started, workflow.unwound = anyio.Event(), anyio.Event()
    return workflow


@pytest.mark.parametrize("flavour", ["anyio", "asyncio"])
async def test_it_is_ready_when_it_says_so_and_ends_when_told(flavour: str) -> None:
    async with open_core(token="sesame") as core, Client(core.url, token="sesame") as client:
        options = WorkerOptions(
            control_plane_url=core.url,
            token=SecretStr("sesame"),
            step_flavour=flavour,  # type: ignore[arg-type]
        )
        stop = anyio.Event()
        async with anyio.create_task_group() as tasks:
            workflows = {"hello": hello, "again": hello}
            worker: Worker = await tasks.start(partial(deploy_worker, workflows, options, stop=stop))
            assert (worker.url, list(worker.services)) == (core.url, ["hello", "again"])
            for name in workflows:
                assert await client.run(name, name="Ada") == "Hello, Ada!"
            stop.set()
        assert await core.run(core.plane._store.list_instances) == []  # it has said goodbye


@pytest.mark.promise("P6", "P7")
@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_what_does_not_end_is_handed_back(how: str) -> None:
    workflow = held()
    async with open_core() as core, Client(core.url) as client:
        options = WorkerOptions(control_plane_url=core.url, step_flavour="anyio", drain_timeout=0.1)
        stop = anyio.Event()
        async with anyio.create_task_group() as tasks:
            await tasks.start(partial(deploy_worker, {"held": workflow}, options, stop=stop))
            task = await client.start("held")
            await workflow.started.wait()
            if how == "stop":
                stop.set()
            else:
                tasks.cancel_scope.cancel()
        assert workflow.unwound.is_set()
        assert (await task.status()).status == "queued"


@pytest.mark.promise("P9")
async def test_what_must_be_changed_comes_out() -> None:
    async with open_core(token="sesame") as core:
        wrong = WorkerOptions(control_plane_url=core.url, token=SecretStr("wrong"))
        with pytest.raises(Unauthorized):
            await deploy_worker({"hello": hello}, wrong)
        elsewhere = WorkerOptions(control_plane_url=f"{core.url}/nowhere")
        with pytest.raises(CorralError):
            await deploy_worker({"hello": hello}, elsewhere)
    with pytest.raises(SetupError):
        await deploy_worker({})
    with pytest.raises(CorralError, match="URL"):
        await deploy_worker({"hello": hello}, WorkerOptions(control_plane_url="nonsense"))


async def test_it_waits_for_its_core_and_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    stop = anyio.Event()
    options = WorkerOptions(control_plane_url=f"http://127.0.0.1:{port}", step_flavour="anyio")
    started: list[Worker] = []

    class Status:
        def started(self, value: Worker) -> None:
            started.append(value)
            stop.set()

    said = anyio.Event()
    monkeypatch.setattr("llama_corral.starting.logger.filter", lambda record: (said.set(), True)[1])
    with caplog.at_level(logging.WARNING, "llama_corral.starting"):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(deploy_worker, {"hello": hello}, options, stop=stop, task_status=Status()))
            await said.wait()
            async with open_core(port=port):
                await stop.wait()
    assert [worker.url for worker in started] == [options.control_plane_url]
    assert caplog.text.count("waiting for the control plane") == 1

    stop.set()
    await deploy_worker({"hello": hello}, options, stop=stop)  # stopped before it has started
