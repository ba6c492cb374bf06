"""A remote run ends with whoever awaits it, and with the run around; and no other way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from workflows import Context, Workflow, step
from workflows.errors import WorkflowCancelledByUser, WorkflowTimeoutError
from workflows.events import StartEvent, StopEvent

from llama_corral.client import Client
from llama_corral.exceptions import RunClosed, TaskTimedOut, Unavailable
from llama_corral.remote import RemoteCancelled, RemoteTimedOut, RemoteWorkflow
from llama_corral.runtime import open_run, run_workflow

from ..services.rig import Rig
from .flows import Awaits, Calls, Progress
from .waiting import far_task, far_tasks, wait_event, wait_far_status

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P6")]

SOON = 0.15


class Far:
    """The task that a test starts far away."""

    def __init__(self, client: Client, service: str, before: set[str]) -> None:
        self.client = client
        self.service = service
        self.before = before

    async def status(self) -> str:
        task = await far_task(self.client, self.service, self.before)
        # It may still be unwinding: the request for its cancellation is what has been waited for.
        return await wait_far_status(self.client, task.task_id, "cancelled", "completed", "failed", "timed_out")


@pytest.fixture
async def far(client: Client) -> Callable[..., Any]:
    async def begin(service: str = "works") -> Far:
        return Far(client, service, await far_tasks(client, service))

    return begin


class Left(Workflow):
    """Leaves a remote run in one of many ways, once it works."""

    def __init__(self, inner: RemoteWorkflow, how: str) -> None:
        super().__init__(timeout=None)
        self.inner = inner
        self.how = how

    @step
    async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
        handler: Any = self.inner.run()
        await anext(handler.stream_events())
        if self.how == "scope":
            with anyio.move_on_after(0):
                await handler
        elif self.how == "block":
            async with handler:
                pass
        elif self.how == "cancel_run":
            await handler.cancel_run()
            assert handler.is_done()
            assert handler.cancelled()
        elif self.how == "cancel":
            handler.cancel()
            with pytest.raises(WorkflowCancelledByUser):
                await handler
        elif self.how == "raise":
            raise ValueError("on purpose")
        else:
            assert self.how == "forget"
        return StopEvent(result="left")


@pytest.mark.parametrize("way", ["url", "client"])
@pytest.mark.parametrize("how", ["scope", "block", "cancel_run", "cancel", "forget", "raise"])
async def test_it_ends_with_who_awaits_it(url: str, client: Client, far: Any, flavour: Any, how: str, way: str) -> None:
    task = await far()
    left = Left(RemoteWorkflow("works", url if way == "url" else client), how)
    if how == "raise":
        with pytest.raises(ValueError, match="on purpose"):
            await run_workflow(left, flavour=flavour)
    else:
        assert await run_workflow(left, flavour=flavour) == "left"
    assert await task.status() == "cancelled"


async def test_it_ends_with_a_scope_around_the_run(url: str, far: Any, flavour: Any) -> None:
    task = await far()
    remote = RemoteWorkflow("works", url, events=[Progress])
    async with open_run(Calls(remote), flavour=flavour) as run:
        await anext(run.events())
    with pytest.raises(RunClosed):
        await run.result()
    assert await task.status() == "cancelled"


async def test_it_ends_with_a_run_of_its_own(url: str, far: Any, flavour: Any) -> None:
    task = await far()
    async with open_run(RemoteWorkflow("works", url), flavour=flavour) as run:
        await anext(run.events())
        run.cancel()
        with pytest.raises(WorkflowCancelledByUser):
            await run.result()
    assert await task.status() == "cancelled"


async def test_it_ends_when_the_time_of_the_run_around_is_over(url: str, far: Any, flavour: Any) -> None:
    task = await far()
    with pytest.raises(WorkflowTimeoutError):
        await run_workflow(Awaits(RemoteWorkflow("works", url), timeout=SOON), flavour=flavour)
    assert await task.status() == "cancelled"


@pytest.mark.parametrize("service", ["works", "approval"])
@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_it_ends_with_the_task_around(rig: Rig, url: str, far: Any, how: str, service: str) -> None:
    """Whether it works or waits."""
    task = await far(service)
    await rig.serve(Calls(RemoteWorkflow(service, url, events=[Progress])), cap=1)
    limit = SOON if how == "deadline" else None
    task_id = (await rig.plane.submit("svc", {}, timeout=limit)).task_id
    if how == "cancel":
        await wait_event(rig, task_id, "Progress")
        await rig.plane.cancel(task_id)
    assert (await rig.result(task_id)).status == ("cancelled" if how == "cancel" else "timed_out")
    assert await task.status() == "cancelled"


@pytest.mark.parametrize("service", ["works", "approval"])
async def test_it_ends_with_a_session_that_is_deleted(rig: Rig, url: str, far: Any, service: str) -> None:
    task = await far(service)
    await rig.serve(Calls(RemoteWorkflow(service, url, events=[Progress])))
    await rig.plane.sessions.create("s")
    task_id = await rig.submit(session="s")
    await wait_event(rig, task_id, "Progress")
    await rig.plane.sessions.delete("s")
    assert await task.status() == "cancelled"


async def test_its_own_ends_are_raised(rig: Rig, url: str, client: Client, far: Any, flavour: Any) -> None:
    with pytest.raises(RemoteTimedOut) as timed_out:
        await run_workflow(Awaits(RemoteWorkflow("works", url, timeout=SOON)), flavour=flavour)
    assert isinstance(timed_out.value, TaskTimedOut)
    assert isinstance(timed_out.value, WorkflowTimeoutError)
    assert timed_out.value.fields["status"] == "timed_out"

    task = await far()
    async with open_run(Calls(RemoteWorkflow("works", url)), flavour=flavour) as run:
        await anext(run.events())
        await client.task((await far_task(client, "works", task.before)).task_id).cancel()
        with pytest.raises(RemoteCancelled, match="was cancelled"):
            await run.result()


async def test_a_step_may_go_on_after_it(url: str, far: Any, flavour: Any) -> None:
    task = await far()
    assert await run_workflow(Awaits(RemoteWorkflow("works", url)), within=SOON, flavour=flavour) == "left"
    assert await task.status() == "cancelled"


async def test_nothing_is_started_by_a_run_that_ends(url: str, client: Client, flavour: Any) -> None:
    """Clean-up starts nothing new with `run`, and can still wait for something with `run_workflow`."""
    before = await far_tasks(client, "echo")
    remote = RemoteWorkflow("echo", url)
    seen: list[Any] = []

    class Cleans(Workflow):
        @step
        async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
            try:
                ctx.write_event_to_stream(Progress(n=0))
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True), anyio.fail_after(5):
                    with pytest.raises(RunClosed):
                        await remote.run()  # noqa: ASYNC102
                    seen.append(await run_workflow(remote, value="cleaned"))  # noqa: ASYNC102
            return StopEvent()

    async with open_run(Cleans(timeout=None), flavour=flavour) as run:
        await anext(run.events())
    assert seen == ["cleaned"]
    assert len(await far_tasks(client, "echo") - before) == 1


async def test_a_server_that_is_away_is_said_so(flavour: Any, free_port: int) -> None:
    with pytest.raises(Unavailable):
        await run_workflow(Awaits(RemoteWorkflow("works", f"http://127.0.0.1:{free_port}")), flavour=flavour)
