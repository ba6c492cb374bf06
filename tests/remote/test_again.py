"""A step that runs again finds the remote run that it has started; a call of its own is a run of its own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, StartEvent, StopEvent
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

from llama_corral.client import Client
from llama_corral.exceptions import TaskFailed
from llama_corral.protocol.messages import new_id
from llama_corral.protocol.records import RetryPolicy
from llama_corral.remote import RemoteWorkflow
from llama_corral.runtime import run_workflow

from ..services.rig import Rig, take_away
from .flows import Calls, Progress, Question
from .waiting import far_task, far_tasks, wait_event, wait_status

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P2")]


async def answered(rig: Rig, task_id: str) -> list[str]:
    await wait_status(rig, task_id, "waiting")
    await rig.answer(task_id, "late")
    found: list[str] = json.loads((await rig.result(task_id)).result or "")
    return found


@pytest.mark.promise("P7")
@pytest.mark.parametrize("how", ["handed back", "taken away"])
@pytest.mark.parametrize("checkpoints", ["auto", "none"])
async def test_an_instance_that_takes_over_finds_the_remote_run(
    rig: Rig, url: str, client: Client, how: str, checkpoints: Any
) -> None:
    before = await far_tasks(client, "asks")

    def calls() -> Calls:
        return Calls(RemoteWorkflow("asks", url, events=[Question]))

    service = await rig.serve(calls(), checkpoints=checkpoints)
    task_id = await rig.submit(questions=2)
    await wait_event(rig, task_id, "Question")
    if checkpoints == "auto":
        await wait_status(rig, task_id, "waiting")
        await rig.answer(task_id, "early")
        await wait_event(rig, task_id, "Question", 1)
        await wait_status(rig, task_id, "waiting")
    if how == "taken away":
        await take_away(rig, service)
    await rig.stop(service)
    far = await far_task(client, "asks", before)  # one, and it goes on
    assert far.status == "waiting"
    await rig.serve(calls(), checkpoints=checkpoints)
    await wait_event(rig, task_id, "RunResumed")
    if checkpoints == "none":  # what was answered is answered again
        await wait_event(rig, task_id, "Question", 1)
        await rig.answer(task_id, "early")
    assert await answered(rig, task_id) == ["early", "late"]
    assert await far_tasks(client, "asks") - before == {far.task_id}
    assert (await client.task(far.task_id).status()).status == "completed"


class Retries(Workflow):
    """Awaits a remote run and fails after it, at its first attempts."""

    def __init__(self, inner: RemoteWorkflow) -> None:
        super().__init__(timeout=None)
        self.inner = inner
        self.attempts = 0

    @step(retry_policy=retry_policy(wait=wait_fixed(0), stop=stop_after_attempt(3)))
    async def work(self, ev: StartEvent) -> StopEvent:
        self.attempts += 1
        result = await self.inner.run(value=1)
        if self.attempts < 3:
            raise ValueError(f"attempt {self.attempts}")
        return StopEvent(result=result)


async def test_a_retry_of_a_step_wants_a_new_run(rig: Rig, url: str, client: Client) -> None:
    """What came of the first one may be what the step did not like."""
    before = await far_tasks(client, "echo")
    await rig.serve(Retries(RemoteWorkflow("echo", url)))
    assert (await rig.run()).result == "1"
    assert len(await far_tasks(client, "echo") - before) == 3


async def test_a_task_that_is_tried_again_does_again_what_failed(rig: Rig, url: str, client: Client) -> None:
    before = {name: await far_tasks(client, name) for name in ("echo", "fails")}

    class Both(Workflow):
        good, bad = RemoteWorkflow("echo", url), RemoteWorkflow("fails", url)

        @step
        async def work(self, ev: StartEvent) -> StopEvent:
            assert await self.good.run(value=1) == 1
            await self.bad.run()
            return StopEvent()

    await rig.serve(Both(timeout=None))
    retry = RetryPolicy(("TaskFailed",), backoff=0.0)
    task_id = (await rig.plane.submit("svc", {}, max_attempts=3, retry=retry)).task_id
    record = await rig.result(task_id)
    assert (record.status, record.error and record.error.type) == ("failed", "TaskFailed")
    counts = {name: len(await far_tasks(client, name) - before[name]) for name in before}
    assert counts == {"echo": 1, "fails": 3}


class More(Event):
    left: int


class Loops(Workflow):
    """The same call again and again: by one step, and by each call of another."""

    def __init__(self, inner: RemoteWorkflow) -> None:
        super().__init__(timeout=None)
        self.inner = inner

    @step
    async def begin(self, ev: StartEvent) -> list[More]:
        handlers = [self.inner.run(value=0) for _ in range(2)]
        for handler in handlers:
            await handler
        return [More(left=0) for _ in range(3)]

    @step
    async def each(self, ctx: Context, ev: More) -> StopEvent | None:
        await self.inner.run(value=0)
        done = await ctx.store.get("done", default=0) + 1
        await ctx.store.set("done", done)
        return StopEvent(result=done) if done == 3 else None


@pytest.mark.parametrize("served", [True, False])
async def test_each_call_is_a_run_of_its_own(rig: Rig, url: str, client: Client, flavour: Any, served: bool) -> None:
    before = await far_tasks(client, "echo")
    workflow = Loops(RemoteWorkflow("echo", url))
    if served:
        await rig.serve(workflow)
        assert (await rig.run()).result == "3"
        assert (await rig.run()).result == "3"  # another task, other runs
    else:
        for _ in range(2):
            assert await run_workflow(workflow, run_id="the same", flavour=flavour) == 3
    assert len(await far_tasks(client, "echo") - before) == 10


class WaitsAfter(Workflow):
    """Waits for a person after a remote run: the step begins again with the answer."""

    def __init__(self, inner: RemoteWorkflow) -> None:
        super().__init__(timeout=None)
        self.inner = inner

    @step
    async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
        result = await self.inner.run(value=1)
        answer = await ctx.wait_for_event(HumanResponseEvent)
        return StopEvent(result=[result, answer.response])


async def test_a_step_that_waited_has_what_it_had(rig: Rig, url: str, client: Client) -> None:
    before = await far_tasks(client, "echo")
    await rig.serve(WaitsAfter(RemoteWorkflow("echo", url)))
    task_id = await rig.submit()
    await wait_status(rig, task_id, "waiting")
    await rig.answer(task_id)
    assert (await rig.result(task_id)).result == '[1,"yes"]'
    assert len(await far_tasks(client, "echo") - before) == 1


class Named(Workflow):
    """A call that its caller has given a name."""

    def __init__(self, inner: RemoteWorkflow, name: str) -> None:
        super().__init__(timeout=None)
        self.inner = inner
        self.name = name

    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        return StopEvent(result=await self.inner.run(run_id=self.name, value=1))


async def test_a_name_is_one_run_whoever_calls(url: str, client: Client, flavour: Any) -> None:
    """Also where that one has failed."""
    before = {service: await far_tasks(client, service) for service in ("echo", "fails")}
    name = new_id()
    for _ in range(2):
        assert await run_workflow(Named(RemoteWorkflow("echo", url), name), flavour=flavour) == 1
        with pytest.raises(TaskFailed):
            await run_workflow(Named(RemoteWorkflow("fails", url), name), flavour=flavour)
    for service, tasks in before.items():
        assert len(await far_tasks(client, service) - tasks) == 1


async def test_served_itself_it_passes_everything_on(rig: Rig, url: str, client: Client) -> None:
    """Also where another instance takes over."""
    before = await far_tasks(client, "asks")

    def remote() -> RemoteWorkflow:
        return RemoteWorkflow("asks", url, events=[Question, Progress])

    service = await rig.serve(remote(), cap=1)
    task_id = await rig.submit(questions=2)
    await wait_event(rig, task_id, "Question")
    await wait_status(rig, task_id, "waiting")
    assert service.statistics().working == 0
    await rig.answer(task_id, "early")
    await wait_event(rig, task_id, "Question", 1)
    await wait_status(rig, task_id, "waiting")
    await rig.stop(service)
    await rig.serve(remote(), cap=1)
    assert await answered(rig, task_id) == ["early", "late"]
    assert len(await far_tasks(client, "asks") - before) == 1
